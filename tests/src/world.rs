//! A cluster with klb and one Service: where most tests begin.

use std::{net::SocketAddr, path::PathBuf};

use crate::{
    agent::{Agent, Hooks},
    manifests::{self, Endpoints, Port, Service},
    scope::Scope,
    topology::{Addresses, Cluster, Family, Options},
    traffic::{Protocol, Request},
};

/// Names and numbers of the pods behind the Service.
pub const PODS: [(&str, u8); 3] = [("pod-1", 5), ("pod-2", 6), ("pod-3", 7)];

/// The file that holds the Service.
pub const SERVICE_FILE: &str = "service.yaml";
/// The file that holds its EndpointSlices.
pub const ENDPOINTS_FILE: &str = "endpoints.yaml";

/// Room for what tests do: the kernel clears maps of the default sizes longer
/// than most tests take, and bpftool dumps arrays whole. The flow table still
/// holds some seconds of a stream of connections: a smaller one forgets flows
/// that a busy machine has not served yet.
const SMALL_MAPS: [&str; 5] = [
    "--map-services=1024",
    "--map-slots=4096",
    "--map-backends=1024",
    "--map-service-ports=1024",
    "--map-flows=65536",
];

/// The kinds of address that the Service has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frontend {
    ClusterIp,
    NodePort,
}

/// A cluster, an agent, and a Service with [`PODS`] behind it.
#[derive(Debug)]
pub struct World {
    // Before the cluster: it cleans up in the node's namespace.
    pub agent: Agent,
    pub cluster: Cluster,
    pub service: Service,
}

impl World {
    /// Everything, with the agent not yet started. `helper` is the path of
    /// `klb-traffic`.
    pub fn new(helper: impl Into<PathBuf>, hooks: Hooks) -> Self {
        let options = Options {
            helper: helper.into(),
            offloads: false,
        };
        Self::with_options(options, hooks)
    }

    /// As [`Self::new`].
    pub fn with_options(options: Options, hooks: Hooks) -> Self {
        let mut cluster = Cluster::new(Scope::test(), options);
        cluster.add_pods(&PODS);
        let mut agent = Agent::new(&cluster, hooks);
        agent.flags = SMALL_MAPS.map(str::to_owned).into();
        let world = Self {
            agent,
            cluster,
            service: echo("echo", 1, 30080),
        };
        let manifests = &world.agent.manifests;
        manifests.put("node.yaml", &manifests::node());
        manifests.put(SERVICE_FILE, &world.service.to_string());
        world.put_endpoints(&PODS);
        world
    }

    /// Makes these pods the endpoints.
    pub fn put_endpoints(&self, pods: &[(&str, u8)]) {
        let endpoints = endpoints(&self.service, pods);
        self.agent
            .manifests
            .put(ENDPOINTS_FILE, &endpoints.to_string());
    }

    /// Where clients find the Service.
    ///
    /// # Panics
    /// If it does not speak the protocol.
    pub fn frontend(&self, kind: Frontend, family: Family, protocol: Protocol) -> SocketAddr {
        let mut ports = self.service.ports.iter();
        let port = ports.find(|port| port.protocol == protocol);
        let port = port.expect("a port of each protocol");
        match kind {
            Frontend::ClusterIp => self.service.addresses.port(family, port.port),
            Frontend::NodePort => Addresses::NODE.port(family, port.node_port),
        }
    }

    /// A request to the Service.
    pub fn request(&self, kind: Frontend, family: Family, protocol: Protocol) -> Request {
        Request::new(protocol, self.frontend(kind, family, protocol))
    }

    /// The Service's `ClusterIP` over IPv4 and TCP: where it does not matter.
    pub fn any_request(&self) -> Request {
        self.request(Frontend::ClusterIp, Family::V4, Protocol::Tcp)
    }
}

/// A Service with a TCP port 80 and a UDP port 53, and two node ports from
/// `node_port` on.
pub fn echo(name: &str, number: u8, node_port: u16) -> Service {
    Service {
        name: name.to_owned(),
        addresses: Addresses::service(number),
        ports: vec![
            Port {
                name: "http",
                protocol: Protocol::Tcp,
                port: 80,
                target: 3000,
                node_port,
            },
            Port {
                name: "datagrams",
                protocol: Protocol::Udp,
                port: 53,
                target: 3053,
                node_port: node_port + 1,
            },
        ],
    }
}

/// The manifest of a Service's endpoints.
pub fn endpoints<'a>(service: &'a Service, pods: &[(&str, u8)]) -> Endpoints<'a> {
    let pods = pods
        .iter()
        .map(|(name, number)| ((*name).to_owned(), Addresses::pod(*number)))
        .collect();
    Endpoints { service, pods }
}
