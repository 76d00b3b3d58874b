//! Services by number, as many as a test wants.

use std::net::{IpAddr, Ipv4Addr};

use lb_userspace::{
    datapath::Family,
    model::{
        Endpoint, EndpointPort, EndpointSlice, NamespacedName, Object, Policy, Protocol, Service,
        ServicePort,
    },
};

fn addr(first: [u8; 4], number: u32) -> IpAddr {
    Ipv4Addr::from(u32::from_be_bytes(first) + number).into()
}

/// The Service of a number, with an address of its own.
pub(crate) fn service(number: u32) -> Object {
    Object::Service(Service {
        id: NamespacedName::new("a-namespace", format!("a-service-{number}")),
        created: 1_700_000_000,
        cluster_ips: vec![addr([10, 96, 0, 1], number)],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        affinity: None,
        algorithm: None,
        internal_policy: Policy::Cluster,
        external_policy: Policy::Cluster,
        health_check_port: None,
        ports: vec![ServicePort {
            name: "http".to_owned(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
    })
}

/// The endpoints of that Service, of a hundred that are its own.
pub(crate) fn slice(number: u32, endpoints: impl IntoIterator<Item = u32>) -> Object {
    let endpoint = |index| Endpoint {
        addr: addr([10, 128, 0, 1], number * 100 + index),
        node: Some(format!("node-{index}").into()),
        ready: true,
        serving: true,
        terminating: false,
        hints: None,
    };
    Object::EndpointSlice(EndpointSlice {
        id: NamespacedName::new("a-namespace", format!("a-service-{number}-x7k2p")),
        service: format!("a-service-{number}"),
        family: Family::V4,
        ports: vec![EndpointPort {
            name: "http".to_owned(),
            protocol: Protocol::Tcp,
            port: 8080,
        }],
        endpoints: endpoints.into_iter().map(endpoint).collect(),
        triggered: None,
    })
}
