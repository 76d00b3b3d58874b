//! The objects of which random histories are made.

use super::*;
use crate::model::{Algorithm, Endpoint, EndpointPort, Hints, Policy, Protocol, ServicePort};

pub(super) fn name(number: u8) -> NamespacedName {
    NamespacedName::new("default", format!("service-{number}"))
}

pub(super) fn slice_name(number: u8) -> NamespacedName {
    NamespacedName::new("default", format!("slice-{number}"))
}

pub(super) fn zone_name(number: u8) -> String {
    format!("zone-{number}")
}

/// An address of each of the families, by first three octets and last one; a bit
/// for IPv4 and one for IPv6.
fn both(first: [u8; 3], last: u8, families: u8) -> Vec<IpAddr> {
    let [a, b, c] = first;
    let v4 = IpAddr::from([a, b, c, last]);
    let segments = [0xfd00, a.into(), b.into(), c.into(), 0, 0, 0, last.into()];
    let addresses = [v4, IpAddr::from(segments)].into_iter();
    let chosen = addresses
        .zip(0..)
        .filter(|(_, bit)| families & (1 << bit) != 0);
    chosen.map(|(addr, _)| addr).collect()
}

pub(super) fn services() -> impl Strategy<Value = Service> {
    let policy = || prop_oneof![3 => Just(Policy::Cluster), 1 => Just(Policy::Local)];
    let ports = prop::collection::btree_map(1u8..4, prop::option::weighted(0.3, 0u16..4), 1..3);
    let choice = (
        prop::option::weighted(0.2, 10u32..12),
        prop::option::weighted(0.2, Just(Algorithm::Maglev)),
    );
    // One family or both.
    let families = prop_oneof![2 => Just(0b01), 1 => Just(0b10), 2 => Just(0b11)];
    // Few addresses and node ports, so that Services get into each other's way.
    (
        1u8..6,
        (1u8..7, families),
        0i64..3,
        ports,
        (policy(), policy()),
        choice,
        any::<bool>(),
    )
        .prop_map(
            |(
                number,
                (address, families),
                created,
                ports,
                (internal, external),
                (affinity, algorithm),
                balanced,
            )| Service {
                id: name(number),
                created,
                cluster_ips: both([10, 96, 0], address, families),
                external_ips: Vec::new(),
                load_balancer_ips: if balanced {
                    both([203, 0, 113], address, 0b11)
                } else {
                    Vec::new()
                },
                source_ranges: if balanced {
                    vec!["192.0.2.0/24".parse().expect("a network")]
                } else {
                    Vec::new()
                },
                affinity,
                algorithm,
                internal_policy: internal,
                external_policy: external,
                health_check_port: None,
                ports: ports
                    .into_iter()
                    .map(|(port, node_port)| ServicePort {
                        name: format!("p{port}"),
                        protocol: if port == 3 {
                            Protocol::Udp
                        } else {
                            Protocol::Tcp
                        },
                        port: port.into(),
                        node_port: node_port.map(|port| 30000 + port),
                    })
                    .collect(),
            },
        )
}

pub(super) fn slices() -> impl Strategy<Value = EndpointSlice> {
    let zone = prop::option::weighted(0.7, 1u8..3);
    let endpoint = (1u8..9, any::<bool>(), 0u8..10, zone);
    let endpoints = prop::collection::vec(endpoint, 0..5);
    let hinted = prop::bool::weighted(0.3);
    // A slice may move from one Service to another, and from one family to the
    // other.
    let slice = (1u8..8, 1u8..6, any::<bool>(), hinted, endpoints);
    slice.prop_map(|(slice, service, is_v6, hinted, endpoints)| EndpointSlice {
        id: slice_name(slice),
        service: name(service).name().to_owned(),
        family: if is_v6 { Family::V6 } else { Family::V4 },
        ports: [
            ("p1", Protocol::Tcp),
            ("p2", Protocol::Tcp),
            ("p3", Protocol::Udp),
        ]
        .into_iter()
        .map(|(name, protocol)| EndpointPort {
            name: name.to_owned(),
            protocol,
            port: 3000,
        })
        .collect(),
        endpoints: endpoints
            .into_iter()
            .map(|(last, local, health, zone)| Endpoint {
                addr: both([10, 244, 0], last, 0b11)[usize::from(is_v6)],
                node: Some(if local { NODE } else { "there" }.into()),
                ready: health > 2,
                serving: health > 0,
                terminating: matches!(health, 1 | 2),
                hints: zone.filter(|_| hinted).map(|zone| {
                    Box::new(Hints {
                        zones: [zone_name(zone)].into(),
                        nodes: BTreeSet::new(),
                    })
                }),
            })
            .collect(),
        triggered: None,
    })
}
