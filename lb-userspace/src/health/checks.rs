//! Servers at which load balancers ask whether this node has endpoints of a
//! Service (`healthCheckNodePort`).

use std::{
    collections::{BTreeMap, BTreeSet},
    future::ready,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use hyper::header::{HeaderName, HeaderValue};
use serde::Serialize;
use tokio::{sync::watch, task::JoinHandle, time::sleep};
use tracing::{info, warn};

use super::{
    http::{self, Answer, Asked, RETRY},
    progress::{Now, View},
};
use crate::{
    datapath::Family,
    k8s::events::{Events, Reason},
    model::{EndpointSlice, NamespacedName, Service},
};

/// How many endpoints there are, for balancers that send each node a share.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What load balancers ask for, of all Services that have a port for it.
pub type Checks = BTreeMap<NamespacedName, HealthCheck>;

/// What load balancers ask for, of one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    pub port: u16,
    /// As in [`Service`]: of two Services that want a port the older has it.
    pub created: i64,
    /// For each family of the Service the ready endpoints on this node. A pod
    /// has one address of each, and counts once with each.
    pub local: BTreeMap<Family, usize>,
}

impl HealthCheck {
    /// What is to be told of a Service; `None` if nobody asks.
    pub fn of(service: &Service, slices: &[&EndpointSlice], node: &str) -> Option<Self> {
        let port = service.health_check_port?;
        let families = service.cluster_ips.iter().map(|ip| Family::of(*ip));
        let local = families.map(|family| (family, local_endpoints(slices, family, node)));
        Some(Self {
            port,
            created: service.created,
            local: local.collect(),
        })
    }

    /// What a client of a family is told: a balancer may well ask over one that
    /// the Service does not have.
    fn weight(&self, family: Family) -> usize {
        let other = || self.local.values().next();
        let count = self.local.get(&family).or_else(other);
        count.copied().unwrap_or_default()
    }
}

/// Those that are ready: one that terminates still answers, but is to get no
/// traffic any more.
fn local_endpoints(slices: &[&EndpointSlice], family: Family, node: &str) -> usize {
    let slices = slices.iter().filter(|slice| slice.family == family);
    // Without a port there is nothing to send traffic to.
    let slices = slices.filter(|slice| !slice.ports.is_empty());
    let local = slices
        .flat_map(|slice| &slice.endpoints)
        .filter(|endpoint| endpoint.ready && endpoint.node.as_deref() == Some(node));
    let addresses: BTreeSet<_> = local.map(|endpoint| endpoint.addr).collect();
    addresses.len()
}

#[derive(Debug, Serialize)]
struct Body<'a> {
    service: ServiceName<'a>,
    #[serde(rename = "localEndpoints")]
    local_endpoints: usize,
    #[serde(rename = "serviceProxyHealthy")]
    service_proxy_healthy: bool,
}

#[derive(Debug, Serialize)]
struct ServiceName<'a> {
    namespace: &'a str,
    name: &'a str,
}

/// What a balancer is told, whatever the path.
fn answer(service: &NamespacedName, weight: usize, proxy_healthy: bool) -> Answer {
    let body = Body {
        service: ServiceName {
            namespace: service.namespace(),
            name: service.name(),
        },
        local_endpoints: weight,
        service_proxy_healthy: proxy_healthy,
    };
    Answer::health(weight != 0 && proxy_healthy, &body)
        .with(WEIGHT, HeaderValue::from(weight as u64))
}

/// Which Service is to be asked for at a socket.
type Sockets = BTreeMap<SocketAddr, NamespacedName>;

/// A Service without a server: an older one has the port.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Clash {
    service: NamespacedName,
    port: u16,
    owner: NamespacedName,
}

/// Where there should be servers.
fn wanted(checks: &Checks, addresses: &BTreeSet<IpAddr>) -> (Sockets, Vec<Clash>) {
    let mut by_age: Vec<_> = checks.iter().collect();
    by_age.sort_by_key(|(service, check)| (check.created, *service));
    let mut owners: BTreeMap<u16, &NamespacedName> = BTreeMap::new();
    let mut clashes = Vec::new();
    for (service, HealthCheck { port, .. }) in by_age {
        let owner = *owners.entry(*port).or_insert(service);
        if owner != service {
            clashes.push(Clash {
                service: service.clone(),
                port: *port,
                owner: owner.clone(),
            });
        }
    }
    let sockets = owners.into_iter().flat_map(|(port, service)| {
        let socket = move |ip: &IpAddr| (SocketAddr::new(*ip, port), service.clone());
        addresses.iter().map(socket)
    });
    (sockets.collect(), clashes)
}

/// The sockets that are open for a Service for which they should not be.
fn superfluous<'a>(
    open: impl Iterator<Item = (&'a SocketAddr, &'a NamespacedName)>,
    wanted: &Sockets,
) -> Vec<SocketAddr> {
    open.filter(|(socket, service)| wanted.get(socket) != Some(service))
        .map(|(socket, _)| *socket)
        .collect()
}

/// Where the servers listen.
#[derive(Clone, Debug)]
pub enum Listen {
    /// At the address of each family that stands for all.
    Everywhere(BTreeSet<IpAddr>),
    /// At the addresses of the node that answer `NodePort`s.
    At(watch::Receiver<BTreeSet<IpAddr>>),
}

impl Listen {
    /// At all addresses, of the families that the kernel has.
    pub fn everywhere() -> Self {
        let mut addresses = BTreeSet::from([Ipv4Addr::UNSPECIFIED.into()]);
        let v6 = IpAddr::from(Ipv6Addr::UNSPECIFIED);
        if http::bind_family(SocketAddr::new(v6, 0)).is_ok() {
            addresses.insert(v6);
        }
        Self::Everywhere(addresses)
    }

    fn addresses(&mut self) -> BTreeSet<IpAddr> {
        match self {
            Self::Everywhere(addresses) => addresses.clone(),
            Self::At(addresses) => addresses.borrow_and_update().clone(),
        }
    }

    async fn changed(&mut self) {
        if let Self::At(addresses) = self
            && addresses.changed().await.is_ok()
        {
            return;
        }
        std::future::pending::<()>().await;
    }
}

/// Keeps a server for each Service that wants one, for ever. A socket that
/// cannot be had is tried again until it can.
pub async fn serve_checks(mut view: View, mut listen: Listen, events: Events) {
    let mut servers = Servers {
        view: view.clone(),
        events,
        open: BTreeMap::new(),
        complaints: BTreeSet::new(),
    };
    loop {
        let addresses = listen.addresses();
        let (wanted, clashes) = wanted(&view.checks.borrow_and_update(), &addresses);
        let complete = servers.follow(&wanted, &clashes).await;
        let retry = async {
            if complete {
                std::future::pending::<()>().await;
            }
            sleep(RETRY).await;
        };
        tokio::select! {
            changed = view.checks.changed() => if changed.is_err() {
                // Who tells what is asked for has gone, and the agent with it.
                return;
            },
            () = listen.changed() => {}
            () = retry => {}
        }
    }
}

struct Servers {
    view: View,
    events: Events,
    open: BTreeMap<SocketAddr, Server>,
    /// What was complained of and has not passed, to log it once.
    complaints: BTreeSet<String>,
}

impl Servers {
    /// Closes what is not wanted, then opens what is. Returns whether all are
    /// open.
    async fn follow(&mut self, wanted: &Sockets, clashes: &[Clash]) -> bool {
        let open = self.open.iter();
        let open = open.map(|(socket, server)| (socket, &server.service));
        for socket in superfluous(open, wanted) {
            if let Some(server) = self.open.remove(&socket) {
                server.close().await;
            }
        }
        let mut complaints = BTreeSet::new();
        let mut complete = true;
        for (socket, service) in wanted {
            if self.open.contains_key(socket) {
                continue;
            }
            match http::bind_family(*socket) {
                Ok(listener) => {
                    info!(%service, address = %socket, "load balancers may ask");
                    let server = Server::start(service.clone(), listener, *socket, &self.view);
                    self.open.insert(*socket, server);
                }
                Err(error) => {
                    complete = false;
                    complaints.insert(self.complain(service, *socket, &error));
                }
            }
        }
        for Clash {
            service,
            port,
            owner,
        } in clashes
        {
            let why = format!("{owner}, an older Service, has it");
            complaints.insert(self.refuse(service, *port, &why));
        }
        self.complaints = complaints;
        complete
    }

    fn complain(&self, service: &NamespacedName, socket: SocketAddr, error: &io::Error) -> String {
        let why = match error.kind() {
            // Whichever address it is, the operator looks for the process.
            io::ErrorKind::AddrInUse => error.to_string(),
            _ => format!("{}: {error}", socket.ip()),
        };
        self.refuse(service, socket.port(), &why)
    }

    /// Tells that a Service is without a server; in the log only if that is new.
    fn refuse(&self, service: &NamespacedName, port: u16, why: &str) -> String {
        let node = self.events.node();
        let note =
            format!("node {node} failed to start healthcheck \"{service}\" on port {port}: {why}");
        if !self.complaints.contains(&note) {
            warn!(%service, port, "load balancers cannot ask for it: {why}");
        }
        let reason = Reason::FailedToStartServiceHealthcheck;
        self.events.tell_service(reason, service, note.clone());
        note
    }
}

/// A server for one Service at one socket.
struct Server {
    service: NamespacedName,
    task: JoinHandle<()>,
}

impl Server {
    fn start(
        service: NamespacedName,
        listener: tokio::net::TcpListener,
        socket: SocketAddr,
        view: &View,
    ) -> Self {
        let (family, view, name) = (Family::of(socket.ip()), view.clone(), service.clone());
        let answer = move |_whatever: Asked| {
            let checks = view.checks.borrow();
            let weight = checks.get(&name).map_or(0, |check| check.weight(family));
            ready(answer(&name, weight, view.is_healthy(Now::get())))
        };
        let task = tokio::spawn(http::serve("health check", listener, answer));
        Self { service, task }
    }

    /// Ends it, and waits until the socket is free.
    async fn close(mut self) {
        self.task.abort();
        // Cancelled, as was asked for.
        drop((&mut self.task).await);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        time::Duration,
    };

    use serde_json::{Value, json};
    use tokio::time::timeout;

    use super::*;
    use crate::{
        health::{
            http::client::{free_address, get, try_get},
            progress::{NodeObject, Reporter},
        },
        model::{Endpoint, EndpointPort, Policy, Protocol, ServicePort},
    };

    const NODE: &str = "node-1";

    fn name(name: &str) -> NamespacedName {
        NamespacedName::new("default", name)
    }

    fn check(port: u16, created: i64, local: usize) -> HealthCheck {
        HealthCheck {
            port,
            created,
            local: [(Family::V4, local)].into(),
        }
    }

    fn checks<const N: usize>(checks: [(&str, HealthCheck); N]) -> Checks {
        checks
            .map(|(service, check)| (name(service), check))
            .into_iter()
            .collect()
    }

    fn service(cluster_ips: &[&str], health_check_port: Option<u16>) -> Service {
        Service {
            id: name("s"),
            created: 7,
            cluster_ips: cluster_ips
                .iter()
                .map(|ip| ip.parse().expect("an IP"))
                .collect(),
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            affinity: None,
            algorithm: None,
            internal_policy: Policy::Cluster,
            external_policy: Policy::Local,
            health_check_port,
            ports: vec![ServicePort {
                name: String::new(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: None,
            }],
        }
    }

    /// Address, node, ready, terminating.
    type Row = (&'static str, Option<&'static str>, bool, bool);

    fn slice(ports: &[u16], endpoints: &[Row]) -> EndpointSlice {
        let family = endpoints.first().map_or(Family::V4, |(addr, ..)| {
            Family::of(addr.parse().expect("an IP"))
        });
        let endpoint = |(addr, node, ready, terminating): &Row| Endpoint {
            addr: addr.parse().expect("an IP"),
            node: node.map(Into::into),
            ready: *ready,
            serving: true,
            terminating: *terminating,
            hints: None,
        };
        EndpointSlice {
            id: name("slice"),
            service: "s".to_owned(),
            family,
            ports: ports
                .iter()
                .map(|port| EndpointPort {
                    name: format!("port-{port}"),
                    protocol: Protocol::Tcp,
                    port: *port,
                })
                .collect(),
            endpoints: endpoints.iter().map(endpoint).collect(),
            triggered: None,
        }
    }

    #[test]
    fn endpoints_count_by_address_if_they_are_here_and_ready() {
        const HERE: Option<&str> = Some(NODE);
        for (what, slices, count) in [
            ("nothing", vec![], 0),
            (
                "one",
                vec![slice(&[80], &[("10.0.0.1", HERE, true, false)])],
                1,
            ),
            (
                "one pod, two ports",
                vec![slice(&[80, 81], &[("10.0.0.1", HERE, true, false)])],
                1,
            ),
            (
                "one pod, a slice for each port",
                vec![
                    slice(&[80], &[("10.0.0.1", HERE, true, false)]),
                    slice(&[81], &[("10.0.0.1", HERE, true, false)]),
                ],
                1,
            ),
            (
                "elsewhere, and nobody knows where",
                vec![slice(
                    &[80],
                    &[
                        ("10.0.0.1", Some("node-2"), true, false),
                        ("10.0.0.2", None, true, false),
                    ],
                )],
                0,
            ),
            (
                "not ready, and terminating",
                vec![slice(
                    &[80],
                    &[
                        ("10.0.0.1", HERE, false, false),
                        ("10.0.0.2", HERE, false, true),
                    ],
                )],
                0,
            ),
            (
                "no port",
                vec![slice(&[], &[("10.0.0.1", HERE, true, false)])],
                0,
            ),
            (
                "of the other family",
                vec![slice(&[80], &[("fd00::1", HERE, true, false)])],
                0,
            ),
            (
                "two",
                vec![slice(
                    &[80],
                    &[
                        ("10.0.0.1", HERE, true, false),
                        ("10.0.0.2", HERE, true, false),
                    ],
                )],
                2,
            ),
        ] {
            let slices: Vec<_> = slices.iter().collect();
            let check = HealthCheck::of(&service(&["10.96.0.1"], Some(30_000)), &slices, NODE);
            let wanted = check_of(30_000, 7, &[(Family::V4, count)]);
            assert_eq!(check, Some(wanted), "{what}");
        }
    }

    fn check_of(port: u16, created: i64, local: &[(Family, usize)]) -> HealthCheck {
        HealthCheck {
            port,
            created,
            local: local.iter().copied().collect(),
        }
    }

    #[test]
    fn a_pod_of_two_families_is_one_endpoint() {
        let slices = [
            slice(&[80], &[("10.0.0.1", Some(NODE), true, false)]),
            slice(
                &[80],
                &[
                    ("fd00::1", Some(NODE), true, false),
                    ("fd00::2", Some(NODE), true, false),
                ],
            ),
        ];
        let slices: Vec<_> = slices.iter().collect();
        for (cluster_ips, v4, v6) in [
            (&["10.96.0.1", "fd00:96::1"][..], 1, 2),
            // The other family's clients are told of the one that there is.
            (&["10.96.0.1"], 1, 1),
            (&["fd00:96::1"], 2, 2),
        ] {
            let check = HealthCheck::of(&service(cluster_ips, Some(30_000)), &slices, NODE);
            let check = check.expect("it has a port");
            assert_eq!(check.weight(Family::V4), v4, "{cluster_ips:?}");
            assert_eq!(check.weight(Family::V6), v6, "{cluster_ips:?}");
        }
        assert_eq!(
            HealthCheck::of(&service(&["10.96.0.1"], None), &slices, NODE),
            None
        );
    }

    #[test]
    fn the_answer_is_kube_proxys() {
        for (weight, healthy, status) in [(2, true, 200), (0, true, 503), (2, false, 503)] {
            let answer = answer(&name("s"), weight, healthy);
            assert_eq!(answer.status.as_u16(), status, "{weight} {healthy}");
            let body: Value = serde_json::from_slice(&answer.body).expect("JSON");
            let wanted = json!({
                "service": { "namespace": "default", "name": "s" },
                "localEndpoints": weight,
                "serviceProxyHealthy": healthy,
            });
            assert_eq!(body, wanted);
            let value = answer.headers.iter().find(|(name, _)| *name == WEIGHT);
            let value = value.expect("a weight").1.to_str().expect("text");
            assert_eq!(value, weight.to_string());
        }
    }

    #[test]
    fn the_older_of_two_services_has_the_port() {
        let addresses = BTreeSet::from([[192, 168, 0, 1].into(), [10, 0, 0, 1].into()]);
        let sockets = |list: &[(&str, &str)]| -> Sockets {
            list.iter()
                .map(|(socket, service)| (socket.parse().expect("a socket"), name(service)))
                .collect()
        };
        let clash = |service: &str, owner: &str| Clash {
            service: name(service),
            port: 30_000,
            owner: name(owner),
        };
        for (what, checks, open, clashes) in [
            ("none", checks([]), sockets(&[]), vec![]),
            (
                "each has a port",
                checks([("a", check(30_000, 1, 0)), ("b", check(30_001, 1, 0))]),
                sockets(&[
                    ("192.168.0.1:30000", "a"),
                    ("10.0.0.1:30000", "a"),
                    ("192.168.0.1:30001", "b"),
                    ("10.0.0.1:30001", "b"),
                ]),
                vec![],
            ),
            (
                "one port, and an older one",
                checks([("a", check(30_000, 2, 0)), ("b", check(30_000, 1, 0))]),
                sockets(&[("192.168.0.1:30000", "b"), ("10.0.0.1:30000", "b")]),
                vec![clash("a", "b")],
            ),
            (
                "one port, equally old: by name",
                checks([("a", check(30_000, 1, 0)), ("b", check(30_000, 1, 0))]),
                sockets(&[("192.168.0.1:30000", "a"), ("10.0.0.1:30000", "a")]),
                vec![clash("b", "a")],
            ),
        ] {
            assert_eq!(wanted(&checks, &addresses), (open, clashes), "{what}");
        }
        let nowhere = wanted(&checks([("a", check(30_000, 1, 0))]), &BTreeSet::new());
        assert_eq!(nowhere.0, Sockets::new());
    }

    #[test]
    fn what_is_open_closes_when_it_is_another_services_or_nobodys() {
        let socket = |port| SocketAddr::from(([0, 0, 0, 0], port));
        let open = Sockets::from([
            (socket(1), name("stays")),
            (socket(2), name("changes")),
            (socket(3), name("goes")),
        ]);
        let wanted = Sockets::from([
            (socket(1), name("stays")),
            (socket(2), name("other")),
            (socket(4), name("goes")),
        ]);
        assert_eq!(superfluous(open.iter(), &wanted), [socket(2), socket(3)]);
    }

    /// Servers at the loopback device.
    struct Fixture {
        reporter: Reporter,
        addresses: watch::Sender<BTreeSet<IpAddr>>,
        task: JoinHandle<()>,
    }

    impl Fixture {
        fn start() -> Self {
            let mut reporter = Reporter::new(NodeObject::Optional);
            let (addresses, listen) = watch::channel([Ipv4Addr::LOCALHOST.into()].into());
            let view = reporter.view();
            reporter.finish(&BTreeSet::new());
            let task = serve_checks(view, Listen::At(listen), Events::default());
            Self {
                reporter,
                addresses,
                task: tokio::spawn(task),
            }
        }

        fn tell<const N: usize>(&self, list: [(&str, HealthCheck); N]) {
            self.reporter.tell(None, &checks(list));
        }
    }

    impl Drop for Fixture {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    /// Asks until the answer is as wanted.
    async fn await_answer(addr: SocketAddr, wanted: &str) {
        let answers = async {
            while !get(addr, "/any/path").await.contains(wanted) {
                tokio::task::yield_now().await;
            }
        };
        let limit = Duration::from_secs(20);
        timeout(limit, answers).await.expect(wanted);
    }

    async fn await_nobody(addr: SocketAddr) {
        let silence = async {
            while try_get(addr, "/").await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        let limit = Duration::from_secs(20);
        timeout(limit, silence).await.expect("nobody listens");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn servers_come_count_move_and_go_with_their_services() {
        let (one, two) = (free_address(), free_address());
        let fixture = Fixture::start();
        fixture.tell([("a", check(one.port(), 1, 0))]);
        await_answer(one, "HTTP/1.1 503").await;
        fixture.tell([("a", check(one.port(), 1, 3))]);
        await_answer(one, "HTTP/1.1 200").await;
        await_answer(one, "x-load-balancing-endpoint-weight: 3\r\n").await;
        fixture.tell([("a", check(two.port(), 1, 3))]);
        await_nobody(one).await;
        await_answer(two, "HTTP/1.1 200").await;
        fixture.tell([("b", check(two.port(), 1, 3))]);
        await_answer(two, "\"name\":\"b\"").await;
        fixture.addresses.send_replace(BTreeSet::new());
        await_nobody(two).await;
    }

    /// A balancer that keeps its connection would go on to hear of the Service.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_server_that_goes_takes_its_connections_along() {
        let addr = free_address();
        let fixture = Fixture::start();
        fixture.tell([("a", check(addr.port(), 1, 1))]);
        await_answer(addr, "HTTP/1.1 200").await;
        let mut kept = std::net::TcpStream::connect(addr).expect("a server");
        let limit = Duration::from_secs(5);
        kept.set_read_timeout(Some(limit))
            .expect("a socket has a timeout");
        kept.write_all(b"GET / HTTP/1.1\r\nHost: klb\r\n\r\n")
            .expect("sent");
        kept.read_exact(&mut [0]).expect("an answer");
        fixture.tell([]);
        kept.read_to_end(&mut Vec::new())
            .expect("the connection ends");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_port_that_is_taken_is_had_when_it_is_free() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let addr = taken.local_addr().expect("bound");
        let fixture = Fixture::start();
        let free = free_address();
        fixture.tell([
            ("a", check(addr.port(), 1, 1)),
            ("b", check(free.port(), 1, 1)),
        ]);
        await_answer(free, "\"name\":\"b\"").await;
        drop(taken);
        await_answer(addr, "\"name\":\"a\"").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_service_whose_port_an_older_one_has_gets_it_when_that_goes() {
        let addr = free_address();
        let fixture = Fixture::start();
        let young = || ("a", check(addr.port(), 2, 1));
        fixture.tell([young(), ("b", check(addr.port(), 1, 1))]);
        await_answer(addr, "\"name\":\"b\"").await;
        fixture.tell([young()]);
        await_answer(addr, "\"name\":\"a\"").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn everywhere_is_in_both_families() {
        let mut addresses = Listen::everywhere().addresses();
        let v4 = IpAddr::from(Ipv4Addr::UNSPECIFIED);
        assert!(addresses.remove(&v4));
        let first = http::bind_family(SocketAddr::new(v4, 0)).expect("free");
        let port = first.local_addr().expect("bound").port();
        // Neither stands for the other.
        for v6 in addresses {
            drop(http::bind_family(SocketAddr::new(v6, port)).expect("no clash"));
        }
        drop(first);
    }
}
