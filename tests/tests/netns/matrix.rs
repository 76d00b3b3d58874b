//! `docs/matrix.md`, cell by cell, with real sockets: the page is the test's
//! table.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use lb_common::{Hook, Reason};
use lb_tests::{
    agent::{Hooks, ServicePort},
    manifests::NODE,
    topology::{Addresses, Family, Host},
    traffic::{Answer, Failure, Protocol, Request},
};

use crate::{
    policies::AT_ONCE,
    two_nodes::{FAR, NEAR, TwoNodes},
};

const PAGE: &str = include_str!("../../../docs/matrix.md");

/// Asked so often, each of two pods has answered but once in two million times.
const ATTEMPTS: u32 = 22;
/// Of so many attempts, if not all was seen that should be: once in two million
/// times is too often for some hundred cells in every run.
const ROUNDS: usize = 3;

/// How long nothing must be heard where the page says *silence*.
const SILENCE: Duration = Duration::from_millis(200);

/// A line of one of the page's tables.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) client: &'static str,
    pub(crate) frontend: &'static str,
    /// The policy, or where the endpoints are.
    pub(crate) service: &'static str,
    /// Over the socket hook, TC and XDP.
    pub(crate) expected: [&'static str; 3],
}

pub(crate) fn rows() -> Vec<Row> {
    let lines = PAGE.lines().filter(|line| line.starts_with("| "));
    let cells = lines
        .map(|line| -> Vec<&str> { line.trim_matches('|').split('|').map(str::trim).collect() });
    cells
        .filter(|cells| cells[0] != "client")
        .map(|cells| match cells[..] {
            [client, frontend, service, socket, tc, xdp] => Row {
                client,
                frontend,
                service,
                expected: [socket, tc, xdp],
            },
            _ => panic!("six columns, not {cells:?}"),
        })
        .collect()
}

/// Name and number of a pod.
type Endpoint = (&'static str, u8);

/// One of the Services that there are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Service {
    number: u8,
    external: &'static str,
    internal: &'static str,
    endpoints: &'static [Endpoint],
}

const BOTH: &[Endpoint] = &[NEAR, FAR];

pub(crate) const SERVICES: [Service; 7] = [
    service(1, "Cluster", "Cluster", BOTH),
    service(2, "Cluster", "Local", BOTH),
    service(3, "Local", "Cluster", BOTH),
    service(4, "Local", "Local", BOTH),
    service(5, "Local", "Local", &[]),
    service(6, "Local", "Local", &[NEAR]),
    service(7, "Local", "Local", &[FAR]),
];

const fn service(
    number: u8,
    external: &'static str,
    internal: &'static str,
    endpoints: &'static [Endpoint],
) -> Service {
    Service {
        number,
        external,
        internal,
        endpoints,
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

    pub(crate) fn to(self, frontend: &str, family: Family, protocol: Protocol) -> SocketAddr {
        let port = match (frontend, protocol) {
            ("NodePort", _) => self.node_port(protocol),
            (_, Protocol::Tcp) => TCP_PORT,
            (_, Protocol::Udp) => UDP_PORT,
        };
        SocketAddr::new(self.address(frontend, family), port)
    }

    /// Whether a row of the page speaks of this Service; the client has an
    /// endpoint that is on the other node for it.
    pub(crate) fn is_meant(self, row: &Row, client: &Client<'_>) -> bool {
        let [_, elsewhere] = client.endpoints;
        let is_served = self.endpoints.len() == BOTH.len();
        match row.service.split_once(' ') {
            Some(("internal", policy)) => is_served && self.internal == policy,
            Some(("external", policy)) => is_served && self.external == policy,
            None if row.service == "none" => self.endpoints.is_empty(),
            None if row.service == "elsewhere" => {
                matches!(self.endpoints, [(name, _)] if *name == elsewhere)
            }
            _ => panic!("no Service {}", row.service),
        }
    }

    /// Whether an agent has written the Service and its endpoints.
    fn is_known(self, services: &[ServicePort]) -> bool {
        let name = format!("matrix-{}", self.number);
        let ports = services.iter().filter(|port| port.name == name);
        let known = ports.filter(|port| {
            let mut verdicts = port.frontends.iter().map(|frontend| &frontend.verdict);
            let leads_somewhere = verdicts.any(|verdict| verdict != "reject");
            // Of five kinds, the node's loopback included, in two families.
            port.frontends.len() == 10 && leads_somewhere != self.endpoints.is_empty()
        });
        known.count() == 2
    }

    fn manifest(self) -> String {
        let Self {
            number,
            external,
            internal,
            endpoints,
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
            let endpoints = endpoints.iter().map(|endpoint| {
                let node = if *endpoint == NEAR { NODE } else { "node-2" };
                let addr = Addresses::pod(endpoint.1).ip(family);
                format!("{{addresses: ['{addr}'], nodeName: {node}}}")
            });
            let endpoints: Vec<_> = endpoints.collect();
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
endpoints: [{endpoints}]
",
                name = family.to_string().to_lowercase(),
                endpoints = endpoints.join(", "),
            )
            .expect("a string grows");
        }
        text
    }
}

/// Somebody who asks, and the node whose klb decides about it.
pub(crate) struct Client<'a> {
    pub(crate) host: &'a Host,
    /// The node's endpoint, and the other node's.
    endpoints: [&'static str; 2],
    pub(crate) node: Addresses,
}

impl<'a> Client<'a> {
    pub(crate) fn new(nodes: &'a TwoNodes, name: &str, frontend: &str) -> Self {
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
    pub(crate) fn observe(&self, to: SocketAddr, protocol: Protocol, expected: &str) -> String {
        let mut answers = match ask(self.host, to, protocol, expected) {
            Ok(answer) => vec![answer],
            Err(Failure::TimedOut) if expected == "silence" => return "silence".to_owned(),
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
            1 if seen.contains(&(remote, "client")) => "remote",
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

/// Asks, and waits as long as what is expected may take.
fn ask(
    client: &Host,
    to: SocketAddr,
    protocol: Protocol,
    expected: &str,
) -> Result<Answer, Failure> {
    let request = Request::new(protocol, to).connected();
    let ask = |limit| client.ask(&request.clone().timeout(limit));
    match expected {
        "no route" => ask(Duration::from_millis(200)),
        "silence" => ask(SILENCE),
        "refused" => ask(AT_ONCE),
        _ => match ask(Duration::from_millis(1200)) {
            Err(Failure::TimedOut) => {
                eprintln!("{:?}: {to} {protocol:?}, once more", client.addresses.v4);
                client.ask(&request)
            }
            result => result,
        },
    }
}

/// Two nodes with all the Services, and a router that knows where they are.
pub(crate) fn nodes(hooks: Hooks) -> TwoNodes {
    let nodes = TwoNodes::new(hooks, NEAR);
    let manifests: Vec<_> = SERVICES.into_iter().map(Service::manifest).collect();
    let manifests = manifests.join("---\n");
    for agent in nodes.agents() {
        agent.manifests.put("matrix.yaml", &manifests);
    }
    for agent in nodes.agents() {
        agent.await_services("the matrix", |services| {
            SERVICES
                .into_iter()
                .all(|service| service.is_known(services))
        });
    }
    route_services(&nodes);
    for node in [&nodes.world.cluster.node, &nodes.second.node] {
        // Every closed port is told, and not only the first six.
        for key in ["net/ipv4/icmp_ratelimit", "net/ipv6/icmp/ratelimit"] {
            node.place.netns().sysctl(key, "0");
        }
    }
    nodes
}

/// Has the router send what is for Services to the first node, but not back
/// there what comes from it.
fn route_services(nodes: &TwoNodes) {
    let Addresses { v4, v6 } = Addresses::NODE;
    let router = nodes.world.cluster.outside.place.netns();
    router.ip(&format!(
        "route add 203.0.113.0/24 via {v4}\n\
         route add 198.51.100.0/24 via {v4}\n\
         route add 2001:db8::/32 via {v6}\n"
    ));
    for network in [
        "10.96.0.0/12",
        "203.0.113.0/24",
        "198.51.100.0/24",
        "fd00:10:96::/112",
        "2001:db8::/32",
    ] {
        let family = if network.contains(':') { "-6" } else { "-4" };
        let rule = format!("{family} rule add iif eth0 to {network} unreachable");
        let rule: Vec<_> = rule.split(' ').collect();
        router.output("ip", &rule);
    }
}

/// Checks a cell with every Service, family and protocol; returns what is not
/// as the page says.
fn check(nodes: &TwoNodes, row: &Row, column: usize) -> Vec<String> {
    let client = Client::new(nodes, row.client, row.frontend);
    let expected = row.expected[column];
    let mut wrong = Vec::new();
    for service in SERVICES.into_iter().filter(|s| s.is_meant(row, &client)) {
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
    assert_eq!(rows.len(), 2 * 32, "every client, frontend and Service");
    let nodes = nodes(hooks);
    let wrong: Vec<_> = rows
        .iter()
        .flat_map(|row| check(&nodes, row, column))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_silence_is_klbs(&nodes, &rows, column);
}

/// What is dropped in silence on its way to klb would look the same.
fn assert_silence_is_klbs(nodes: &TwoNodes, rows: &[Row], column: usize) {
    let silent = rows.iter().filter(|row| row.expected[column] == "silence");
    let dropped = nodes.agents().into_iter().map(|agent| {
        let status = agent.status();
        let count = |hook| status.count(hook, Reason::NoLocalBackend);
        count(Hook::TcIngress) + count(Hook::Xdp)
    });
    // A packet at least in each family and protocol.
    let expected = 4 * silent.count() as u64;
    let dropped: u64 = dropped.sum();
    assert!(dropped >= expected, "{dropped} of {expected}");
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
