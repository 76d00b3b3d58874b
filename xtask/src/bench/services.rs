//! The Services of a cluster that is measured: the same for klb, which hears of
//! them from an API server, and for rule sets.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use lb_common::flow::{TCP, UDP};
use lb_tests::{apiserver::ApiServer, manifests, measure, topology::Addresses};
use serde_json::{Value, json};

/// Numbers of the pods behind the Service that is asked.
pub(super) const PODS: [u8; 3] = [5, 6, 7];
/// Endpoints of every Service.
const ENDPOINTS: u32 = 3;
/// `NodePort`s of the Service that is asked: of each of its ports.
const NODE_PORTS: [u16; 3] = [32_700, 32_701, 32_702];
/// Others have one each, until these are used up.
const FIRST_NODE_PORT: u16 = 30_000;
const OTHER_NODE_PORTS: u32 = 2_700;
/// One Service of so many has a `NodePort`.
const NODE_PORT_EVERY: u32 = 10;

/// So many Services, of which the last one is asked: a list of rules is walked
/// to its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Services {
    pub(super) count: u32,
}

/// A Service.
#[derive(Clone, Debug)]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) address: Ipv4Addr,
    pub(super) endpoints: Vec<Ipv4Addr>,
    pub(super) ports: Vec<Port>,
    /// The endpoints are pods of this node.
    is_local: bool,
}

/// A port of a Service.
#[derive(Clone, Copy, Debug)]
pub(super) struct Port {
    pub(super) name: &'static str,
    /// `tcp` or `udp`.
    pub(super) protocol: &'static str,
    pub(super) number: u16,
    pub(super) target: u16,
    pub(super) on_nodes: Option<u16>,
}

impl Services {
    /// All of them, the one that is asked at the end.
    pub(super) fn all(self) -> impl Iterator<Item = Service> {
        let others = (0..self.count.saturating_sub(1)).map(|number| other(number, 0));
        others.chain([self.target()])
    }

    /// The one that is asked.
    pub(super) fn target(self) -> Service {
        Service {
            name: "target".to_owned(),
            address: address(self.count),
            endpoints: PODS.map(|number| Addresses::pod(number).v4).into(),
            ports: vec![
                port("tcp", measure::CONNECT_PORT, Some(NODE_PORTS[0])),
                Port {
                    name: "held",
                    ..port("tcp", measure::ROUND_TRIP_PORT, Some(NODE_PORTS[1]))
                },
                Port {
                    name: "datagrams",
                    ..port("udp", measure::DATAGRAM_PORT, Some(NODE_PORTS[2]))
                },
            ],
            is_local: true,
        }
    }

    /// A server that tells of them, and of the node.
    pub(super) fn served(self) -> ApiServer {
        let server = ApiServer::start();
        server.put_yaml(&manifests::node());
        for service in self.all() {
            server.put(service.manifest());
            server.put(service.slice());
        }
        server.forget_history();
        server
    }
}

/// A Service that nobody asks; with other endpoints in every round.
pub(super) fn other(number: u32, round: u32) -> Service {
    let endpoint = |index| {
        let first = u32::from(Ipv4Addr::new(10, 128, 0, 1));
        Ipv4Addr::from(first + (number * ENDPOINTS + index + round * 7_919) % (1 << 22))
    };
    let order = number / NODE_PORT_EVERY;
    let has_node_port = number.is_multiple_of(NODE_PORT_EVERY) && order < OTHER_NODE_PORTS;
    let node_port =
        has_node_port.then(|| FIRST_NODE_PORT + u16::try_from(order).expect("few enough"));
    Service {
        name: format!("service-{number}"),
        address: address(number),
        endpoints: (0..ENDPOINTS).map(endpoint).collect(),
        ports: vec![port("tcp", 8080, node_port)],
        is_local: false,
    }
}

fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 1, 0)) + number)
}

/// The port 80, or for the Service that is asked the port of its servers.
fn port(protocol: &'static str, target: u16, on_nodes: Option<u16>) -> Port {
    Port {
        name: "http",
        protocol,
        number: if target == 8080 { 80 } else { target },
        target,
        on_nodes,
    }
}

impl Port {
    /// As the IP header has it.
    pub(super) fn protocol_number(&self) -> u8 {
        if self.protocol == "udp" { UDP } else { TCP }
    }
}

impl Service {
    /// What a port leads to.
    pub(super) fn backends(&self, port: &Port) -> Vec<SocketAddr> {
        let endpoints = self.endpoints.iter();
        endpoints
            .map(|address| SocketAddrV4::new(*address, port.target).into())
            .collect()
    }

    /// Where clients of the cluster ask.
    pub(super) fn cluster_ip(&self, port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(self.address, port)
    }

    /// Where clients outside ask.
    ///
    /// # Panics
    /// If the port has no `NodePort`.
    pub(super) fn node_port(&self, target: u16) -> SocketAddrV4 {
        let port = self.ports.iter().find(|port| port.target == target);
        let node_port = port.and_then(|port| port.on_nodes);
        SocketAddrV4::new(Addresses::NODE.v4, node_port.expect("a NodePort"))
    }

    pub(super) fn manifest(&self) -> Value {
        let ports = self.ports.iter().map(|port| {
            let mut value = json!({
                "name": port.name,
                "protocol": port.protocol.to_uppercase(),
                "port": port.number,
                "targetPort": port.target,
            });
            if let Some(node_port) = port.on_nodes {
                value["nodePort"] = json!(node_port);
            }
            value
        });
        let has_node_port = self.ports.iter().any(|port| port.on_nodes.is_some());
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": self.name, "namespace": "bench" },
            "spec": {
                "type": if has_node_port { "NodePort" } else { "ClusterIP" },
                "clusterIP": self.address,
                "clusterIPs": [self.address],
                "ports": ports.collect::<Vec<_>>(),
            },
        })
    }

    pub(super) fn slice(&self) -> Value {
        let endpoints = (0..).zip(&self.endpoints).map(|(index, address)| {
            let node = if self.is_local {
                manifests::NODE.to_owned()
            } else {
                format!("node-{}", index + 2)
            };
            json!({
                "addresses": [address],
                "conditions": { "ready": true, "serving": true, "terminating": false },
                "nodeName": node,
                "targetRef": { "kind": "Pod", "name": format!("{}-{index}", self.name), "namespace": "bench" },
                "zone": "z",
            })
        });
        let ports = self.ports.iter().map(|port| {
            json!({
                "name": port.name,
                "port": port.target,
                "protocol": port.protocol.to_uppercase(),
            })
        });
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-1", self.name),
                "namespace": "bench",
                "labels": { "kubernetes.io/service-name": self.name },
            },
            "addressType": "IPv4",
            "ports": ports.collect::<Vec<_>>(),
            "endpoints": endpoints.collect::<Vec<_>>(),
        })
    }
}
