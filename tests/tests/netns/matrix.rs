//! `docs/matrix.md`, cell by cell, with real sockets: the page is the test's
//! table.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use lb_tests::{
    agent::Hooks,
    manifests::NODE,
    topology::{Addresses, Family, Host},
    traffic::{Answer, Failure, Protocol, Request},
};

use crate::two_nodes::{FAR, NEAR, TwoNodes};

const PAGE: &str = include_str!("../../../docs/matrix.md");

/// Asked so often, each of two pods has answered but once in two million times.
const ATTEMPTS: u32 = 22;
/// Of so many attempts, if not all was seen that should be: once in two million
/// times is too often for some hundred cells in every run.
const ROUNDS: usize = 3;

/// A line of the page's table.
#[derive(Debug)]
struct Row {
    client: &'static str,
    frontend: &'static str,
    policy: &'static str,
    /// Over the socket hook, TC and XDP.
    expected: [&'static str; 3],
}

fn rows() -> Vec<Row> {
    let lines = PAGE.lines().filter(|line| line.starts_with("| "));
    let cells = lines
        .map(|line| -> Vec<&str> { line.trim_matches('|').split('|').map(str::trim).collect() });
    cells
        .skip(1)
        .map(|cells| match cells[..] {
            [client, frontend, policy, socket, tc, xdp] => Row {
                client,
                frontend,
                policy,
                expected: [socket, tc, xdp],
            },
            _ => panic!("six columns, not {cells:?}"),
        })
        .collect()
}

/// A Service of the four that there are.
#[derive(Clone, Copy, Debug)]
struct Service {
    number: u8,
    external: &'static str,
    internal: &'static str,
}

const SERVICES: [Service; 4] = [
    service(1, "Cluster", "Cluster"),
    service(2, "Cluster", "Local"),
    service(3, "Local", "Cluster"),
    service(4, "Local", "Local"),
];

const fn service(number: u8, external: &'static str, internal: &'static str) -> Service {
    Service {
        number,
        external,
        internal,
    }
}

const TCP_PORT: u16 = 80;
const UDP_PORT: u16 = 53;

impl Service {
    fn address(self, frontend: &str, family: Family) -> IpAddr {
        let n = self.number;
        let (v4, v6) = match frontend {
            "ClusterIP" => (format!("10.96.1.{n}"), format!("fd00:10:96::10{n}")),
            "LoadBalancer" => (format!("203.0.113.{n}"), format!("2001:db8:1::{n}")),
            "ExternalIP" => (format!("198.51.100.{n}"), format!("2001:db8:2::{n}")),
            "NodePort" => return Addresses::NODE.ip(family),
            other => panic!("no frontend {other}"),
        };
        let text = match family {
            Family::V4 => v4,
            Family::V6 => v6,
        };
        text.parse().expect("an address")
    }

    fn node_port(self, protocol: Protocol) -> u16 {
        let udp = u16::from(protocol == Protocol::Udp);
        31_000 + 2 * u16::from(self.number) + udp
    }

    fn to(self, frontend: &str, family: Family, protocol: Protocol) -> SocketAddr {
        let port = match (frontend, protocol) {
            ("NodePort", _) => self.node_port(protocol),
            (_, Protocol::Tcp) => TCP_PORT,
            (_, Protocol::Udp) => UDP_PORT,
        };
        SocketAddr::new(self.address(frontend, family), port)
    }

    /// Whether a row of the page speaks of this Service.
    fn is_meant(self, policy: &str) -> bool {
        match policy.split_once(' ') {
            Some(("internal", policy)) => self.internal == policy,
            Some(("external", policy)) => self.external == policy,
            _ => panic!("no policy {policy}"),
        }
    }

    /// The Service with an endpoint on each node.
    fn manifest(self) -> String {
        let Self {
            number,
            external,
            internal,
        } = self;
        let both = |frontend| Family::ALL.map(|family| self.address(frontend, family));
        let ([c4, c6], [l4, l6], [e4, e6]) =
            (both("ClusterIP"), both("LoadBalancer"), both("ExternalIP"));
        let (tcp, udp) = (self.node_port(Protocol::Tcp), self.node_port(Protocol::Udp));
        let mut text = format!(
            "apiVersion: v1
kind: Service
metadata: {{name: matrix-{number}, namespace: default}}
spec:
  type: LoadBalancer
  ipFamilies: [IPv4, IPv6]
  clusterIP: {c4}
  clusterIPs: ['{c4}', '{c6}']
  externalIPs: ['{e4}', '{e6}']
  externalTrafficPolicy: {external}
  internalTrafficPolicy: {internal}
  ports:
  - {{name: tcp, port: {TCP_PORT}, targetPort: 3000, nodePort: {tcp}, protocol: TCP}}
  - {{name: udp, port: {UDP_PORT}, targetPort: 3053, nodePort: {udp}, protocol: UDP}}
status: {{loadBalancer: {{ingress: [{{ip: '{l4}'}}, {{ip: '{l6}'}}]}}}}
"
        );
        for family in Family::ALL {
            let [near, far] = [NEAR, FAR].map(|(_, number)| Addresses::pod(number).ip(family));
            write!(
                text,
                "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: matrix-{number}-{name}
  namespace: default
  labels: {{kubernetes.io/service-name: matrix-{number}}}
addressType: {family}
ports:
- {{name: tcp, port: 3000, protocol: TCP}}
- {{name: udp, port: 3053, protocol: UDP}}
endpoints:
- {{addresses: ['{near}'], nodeName: {NODE}}}
- {{addresses: ['{far}'], nodeName: node-2}}
",
                name = family.to_string().to_lowercase(),
            )
            .expect("a string grows");
        }
        text
    }
}

/// Somebody who asks, and the node whose klb decides about it.
struct Client<'a> {
    host: &'a Host,
    /// The node's endpoint, and the other node's.
    endpoints: [&'static str; 2],
    node: Addresses,
}

impl<'a> Client<'a> {
    fn new(nodes: &'a TwoNodes, name: &str, frontend: &str) -> Self {
        let cluster = &nodes.world.cluster;
        let host = match name {
            "pod" => &cluster.client.host,
            "node" => &cluster.node,
            "outside" => &cluster.outside,
            "far pod" => nodes.far_client(),
            other => panic!("no client {other}"),
        };
        if name == "far pod" && frontend != "NodePort" {
            return Self {
                host,
                endpoints: [FAR.0, NEAR.0],
                node: Addresses::NODE_2,
            };
        }
        Self {
            host,
            endpoints: [NEAR.0, FAR.0],
            node: Addresses::NODE,
        }
    }

    /// Asks until all is seen that there is to see, and says it in the page's
    /// words.
    fn observe(&self, to: SocketAddr, protocol: Protocol, expected: &str) -> String {
        let patience = if expected == "no route" {
            Patience::Little
        } else {
            Patience::Much
        };
        let mut answers = match ask(self.host, to, protocol, patience) {
            Ok(answer) => vec![answer],
            // A router's "no route" may pass: some sockets try on.
            Err(Failure::Unreachable | Failure::TimedOut) => return "no route".to_owned(),
            Err(Failure::Refused) => return "refused".to_owned(),
            Err(other) => return other.to_string(),
        };
        let request = Request::new(protocol, to).connected();
        for _ in 0..ROUNDS {
            let (more, failures) = split(self.host.ask_often(&request, ATTEMPTS));
            answers.extend(more);
            // A machine that stands still for seconds is none of the page's
            // matters: one may be lost. That none is has tests of its own.
            match &failures[..] {
                [] => {}
                [failure] => eprintln!("{to} {protocol:?}, one of {ATTEMPTS}: {failure}"),
                [failure, ..] => return format!("{failure}, more than once"),
            }
            if self.in_words(&answers, to) == expected {
                break;
            }
        }
        self.in_words(&answers, to)
    }

    fn name_of(&self, source: IpAddr) -> &'static str {
        let is = |addresses: Addresses| Family::ALL.map(|f| addresses.ip(f)).contains(&source);
        if is(self.host.addresses) {
            "client"
        } else if is(self.node) {
            "node"
        } else {
            "somebody else"
        }
    }

    /// Who answered, and whom it saw, as the page says it.
    fn in_words(&self, answers: &[Answer], to: SocketAddr) -> String {
        let mut seen = BTreeSet::new();
        for answer in answers {
            assert_eq!(answer.from, to, "who answers");
            seen.insert((answer.name.as_str(), self.name_of(answer.seen.ip())));
        }
        let [local, remote] = self.endpoints;
        let words = match seen.len() {
            1 if seen.contains(&(local, "client")) => "local",
            2 if !seen.contains(&(local, "client")) => "",
            2 if seen.contains(&(remote, "client")) => "both",
            2 if seen.contains(&(remote, "node")) => "both, masqueraded",
            _ => "",
        };
        if words.is_empty() {
            format!("{seen:?}")
        } else {
            words.to_owned()
        }
    }
}

fn split(results: Vec<Result<Answer, Failure>>) -> (Vec<Answer>, Vec<Failure>) {
    let (mut answers, mut failures) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(answer) => answers.push(answer),
            Err(failure) => failures.push(failure),
        }
    }
    (answers, failures)
}

/// Asks; once more if there is no answer, since the kernel limits how often it
/// says that a port is closed.
fn ask(
    client: &Host,
    to: SocketAddr,
    protocol: Protocol,
    patience: Patience,
) -> Result<Answer, Failure> {
    let request = Request::new(protocol, to).connected();
    if patience == Patience::Little {
        return client.ask(&request.timeout(Duration::from_millis(200)));
    }
    let request = request.timeout(Duration::from_millis(1200));
    match client.ask(&request) {
        Err(Failure::TimedOut) => {
            eprintln!("{:?}: {to} {protocol:?}, once more", client.addresses.v4);
            client.ask(&request)
        }
        result => result,
    }
}

/// How long an answer is waited for: little where none may come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Patience {
    Little,
    Much,
}

fn nodes(hooks: Hooks) -> TwoNodes {
    let nodes = TwoNodes::new(hooks, NEAR);
    let manifests: Vec<_> = SERVICES.into_iter().map(Service::manifest).collect();
    let manifests = manifests.join("---\n");
    for agent in nodes.agents() {
        agent.manifests.put("matrix.yaml", &manifests);
    }
    for agent in nodes.agents() {
        agent.await_services("the matrix", |services| {
            let ours = services
                .iter()
                .filter(|service| service.name.starts_with("matrix-"));
            let ready = ours.filter(|service| {
                let backends = service.frontends.iter().flat_map(|f| &f.backends);
                service.frontends.len() == 8 && backends.count() > 0
            });
            ready.count() == 2 * SERVICES.len()
        });
    }
    let node = Addresses::NODE;
    nodes.world.cluster.outside.place.netns().ip(&format!(
        "route add 203.0.113.0/24 via {v4}\n\
         route add 198.51.100.0/24 via {v4}\n\
         route add 2001:db8::/32 via {v6}\n",
        v4 = node.v4,
        v6 = node.v6,
    ));
    nodes
}

/// Checks a cell with every Service, family and protocol; returns what is not
/// as the page says.
fn check(nodes: &TwoNodes, row: &Row, column: usize) -> Vec<String> {
    let client = Client::new(nodes, row.client, row.frontend);
    let expected = row.expected[column];
    let mut wrong = Vec::new();
    for service in SERVICES.into_iter().filter(|s| s.is_meant(row.policy)) {
        for family in Family::ALL {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let to = service.to(row.frontend, family, protocol);
                let observed = client.observe(to, protocol, expected);
                if observed != expected {
                    wrong.push(format!(
                        "{} at {} ({service:?}) {family} {protocol:?}: \
                         expected {expected}, observed {observed}",
                        row.client, row.frontend,
                    ));
                }
            }
        }
    }
    wrong
}

fn check_column(hooks: Hooks, column: usize) {
    let rows = rows();
    assert_eq!(rows.len(), 32, "every client, frontend and policy");
    let nodes = nodes(hooks);
    let wrong: Vec<_> = rows
        .iter()
        .flat_map(|row| check(&nodes, row, column))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn over_the_socket_hook() {
    check_column(Hooks::SOCKET, 0);
}

#[test]
fn over_tc() {
    check_column(Hooks::TC, 1);
}

#[test]
fn over_xdp() {
    check_column(Hooks::XDP, 2);
}
