use std::str::FromStr as _;

use super::*;
use crate::model::{EndpointPort, Hints, Protocol};

const NODE: &str = "node-a";

fn node() -> NodeFacts {
    NodeFacts {
        name: NODE.to_owned(),
        zone: Some("zone-a".to_owned()),
        addresses: ["192.168.50.1", "fd00:50::1"]
            .map(|addr| IpAddr::from_str(addr).expect("an address"))
            .into(),
        settings: Settings::default(),
    }
}

fn service() -> Service {
    Service {
        id: NamespacedName::new("default", "web"),
        created: 0,
        cluster_ips: vec![ip("10.96.0.1")],
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
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// An endpoint from a few letters: `r`eady, `s`erving, `t`erminating; on this
/// node unless `@` says elsewhere; hints for zones and nodes by name.
fn endpoint(addr: &str, letters: &str) -> Endpoint {
    let mut words = letters.split_whitespace();
    let conditions = words.next().unwrap_or_default();
    let mut hints = Hints::default();
    let mut node = Some(NODE);
    for word in words {
        if let Some(name) = word.strip_prefix("zone=") {
            hints.zones.insert(name.to_owned());
        } else if let Some(name) = word.strip_prefix("for=") {
            hints.nodes.insert(name.to_owned());
        } else if let Some(name) = word.strip_prefix('@') {
            node = Some(name).filter(|name| !name.is_empty());
        }
    }
    Endpoint {
        addr: ip(addr),
        node: node.map(Box::from),
        ready: conditions.contains('r'),
        serving: conditions.contains('s'),
        terminating: conditions.contains('t'),
        hints: (hints != Hints::default()).then(|| Box::new(hints)),
    }
}

fn slice(name: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        id: NamespacedName::new("default", name),
        service: "web".to_owned(),
        family: Family::of(
            endpoints
                .first()
                .map_or(ip("10.0.0.1"), |endpoint| endpoint.addr),
        ),
        triggered: None,
        ports: vec![EndpointPort {
            name: "http".to_owned(),
            protocol: Protocol::Tcp,
            port: 3000,
        }],
        endpoints,
    }
}

/// The one frontend of a kind.
fn frontend(plan: &ServicePlan, kind: FrontendKind) -> &FrontendPlan {
    let mut frontends = plan.ports.iter().flat_map(|port| &port.frontends);
    frontends
        .find(|frontend| frontend.kind == kind)
        .unwrap_or_else(|| panic!("no frontend of kind {kind:?}"))
}

fn last_octets(backends: &[Backend]) -> Vec<u8> {
    let last_octet = |backend: &Backend| match backend.addr.ip() {
        IpAddr::V4(addr) => addr.octets()[3],
        IpAddr::V6(addr) => addr.octets()[15],
    };
    backends.iter().map(last_octet).collect()
}

/// What clients outside get of the one frontend of a kind, by last octets.
fn backends(plan: &ServicePlan, kind: FrontendKind) -> (Verdict, Vec<u8>) {
    let frontend = frontend(plan, kind);
    (frontend.verdict, last_octets(&frontend.backends))
}

/// As [`backends`], for clients on this node.
fn inner_backends(plan: &ServicePlan, kind: FrontendKind) -> Vec<u8> {
    let frontend = frontend(plan, kind);
    last_octets(frontend.inner.as_ref().unwrap_or(&frontend.backends))
}

/// The endpoints of a slice, from letters; see [`endpoint`].
fn endpoints(letters: &[&str]) -> Vec<Endpoint> {
    let numbered = (1..).zip(letters);
    numbered
        .map(|(n, letters)| endpoint(&format!("10.244.0.{n}"), letters))
        .collect()
}

#[test]
fn endpoints_that_new_flows_get() {
    use Verdict::{Forward, Reject};
    let rows: [(&str, &[&str], Verdict, &[u8]); 8] = [
        ("ready ones", &["rs", "rs"], Forward, &[1, 2]),
        ("none", &[], Reject, &[]),
        ("not ready", &["s", "rs"], Forward, &[2]),
        ("not ready, the only one", &["s"], Reject, &[]),
        ("draining, while one is ready", &["st", "rs"], Forward, &[2]),
        ("draining, none is ready", &["st", "s"], Forward, &[1]),
        ("terminating and no longer serving", &["t"], Reject, &[]),
        ("ready by publishNotReadyAddresses", &["rt"], Forward, &[1]),
    ];
    for (name, endpoints, verdict, expected) in rows {
        let endpoints = endpoints
            .iter()
            .enumerate()
            .map(|(index, letters)| endpoint(&format!("10.244.0.{}", index + 1), letters));
        let plan = plan(&service(), &[&slice("a", endpoints.collect())], &node());
        let found = backends(&plan, FrontendKind::ClusterIp);
        assert_eq!(found, (verdict, expected.to_vec()), "{name}");
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table, a column a line")]
fn local_policies() {
    use Policy::{Cluster, Local};
    use Verdict::{Drop, Forward, Reject};
    // Policies, endpoints, then what ClusterIP and NodePort lead to.
    type Lead = (Verdict, &'static [u8]);
    type Row = (
        &'static str,
        Policy,
        Policy,
        &'static [&'static str],
        Lead,
        Lead,
    );
    let rows: [Row; 9] = [
        (
            "both Cluster",
            Cluster,
            Cluster,
            &["rs", "rs @b"],
            (Forward, &[1, 2]),
            (Forward, &[1, 2]),
        ),
        (
            "external Local",
            Cluster,
            Local,
            &["rs", "rs @b"],
            (Forward, &[1, 2]),
            (Forward, &[1]),
        ),
        (
            "internal Local",
            Local,
            Cluster,
            &["rs", "rs @b"],
            (Forward, &[1]),
            (Forward, &[1, 2]),
        ),
        (
            "both Local",
            Local,
            Local,
            &["rs", "rs @b"],
            (Forward, &[1]),
            (Forward, &[1]),
        ),
        (
            "none here",
            Cluster,
            Local,
            &["rs @b"],
            (Forward, &[1]),
            (Drop, &[]),
        ),
        (
            "none here, internal",
            Local,
            Cluster,
            &["rs @b"],
            (Drop, &[]),
            (Forward, &[1]),
        ),
        (
            "none anywhere",
            Local,
            Local,
            &[],
            (Reject, &[]),
            (Reject, &[]),
        ),
        (
            "here only draining",
            Cluster,
            Local,
            &["st", "rs @b"],
            (Forward, &[2]),
            (Forward, &[1]),
        ),
        (
            "no node is not here",
            Cluster,
            Local,
            &["rs @"],
            (Forward, &[1]),
            (Drop, &[]),
        ),
    ];
    for (name, internal, external, endpoints, cluster_ip, node_port) in rows {
        let mut service = service();
        service.internal_policy = internal;
        service.external_policy = external;
        service.ports[0].node_port = Some(30080);
        let endpoints = endpoints
            .iter()
            .enumerate()
            .map(|(index, letters)| endpoint(&format!("10.244.0.{}", index + 1), letters));
        let plan = plan(&service, &[&slice("a", endpoints.collect())], &node());
        let (verdict, list) = cluster_ip;
        assert_eq!(
            backends(&plan, FrontendKind::ClusterIp),
            (verdict, list.to_vec()),
            "{name}, ClusterIP"
        );
        let (verdict, list) = node_port;
        assert_eq!(
            backends(&plan, FrontendKind::NodePort),
            (verdict, list.to_vec()),
            "{name}, NodePort"
        );
    }
}

#[test]
fn topology_hints() {
    let rows: [(&str, &[&str], &[u8]); 8] = [
        ("zone", &["rs zone=zone-a", "rs zone=zone-b"], &[1]),
        (
            "several zones",
            &["rs zone=zone-a", "rs zone=zone-b zone=zone-a"],
            &[1, 2],
        ),
        ("one has none", &["rs zone=zone-a", "rs"], &[1, 2]),
        (
            "none for this zone",
            &["rs zone=zone-b", "rs zone=zone-c"],
            &[1, 2],
        ),
        ("node", &["rs for=node-a", "rs for=node-b"], &[1]),
        (
            "node before zone",
            &["rs for=node-a zone=zone-b", "rs for=node-b zone=zone-a"],
            &[1],
        ),
        (
            "none for this node, then zone",
            &["rs for=b zone=zone-b", "rs for=c zone=zone-a"],
            &[2],
        ),
        (
            "one that is not ready does not count",
            &["rs zone=zone-a", "s", "rs zone=zone-b"],
            &[1],
        ),
    ];
    for (name, endpoints, expected) in rows {
        let endpoints = endpoints
            .iter()
            .enumerate()
            .map(|(index, letters)| endpoint(&format!("10.244.0.{}", index + 1), letters));
        let plan = plan(&service(), &[&slice("a", endpoints.collect())], &node());
        assert_eq!(
            backends(&plan, FrontendKind::ClusterIp).1,
            expected,
            "{name}"
        );
    }
    // A node that does not know its zone obeys no zone.
    let nowhere = NodeFacts {
        zone: None,
        ..node()
    };
    let endpoints = ["rs zone=zone-a", "rs zone=zone-b"];
    let endpoints = [1, 2].map(|n| endpoint(&format!("10.244.0.{n}"), endpoints[n - 1]));
    let plan = plan(&service(), &[&slice("a", endpoints.into())], &nowhere);
    assert_eq!(backends(&plan, FrontendKind::ClusterIp).1, [1, 2]);
}

#[test]
fn an_address_in_two_slices_counts_once() {
    let rows = [
        ("a live one beats a terminating one", "rs", "st", vec![1]),
        ("in either order", "st", "rs", vec![1]),
        ("else the later one wins", "rs", "s", vec![]),
        ("else the later one wins, again", "s", "rs", vec![1]),
    ];
    for (name, first, second, expected) in rows {
        let slices = [
            slice("a", vec![endpoint("10.244.0.1", first)]),
            slice("b", vec![endpoint("10.244.0.1", second)]),
        ];
        let plan = plan(&service(), &slices.each_ref(), &node());
        assert_eq!(
            backends(&plan, FrontendKind::ClusterIp).1,
            expected,
            "{name}"
        );
    }
}

#[test]
fn frontends_of_every_kind_and_family() {
    let mut service = service();
    service.cluster_ips.push(ip("fd00:10:96::1"));
    service.external_ips = vec![ip("198.51.100.1")];
    service.load_balancer_ips = vec![ip("203.0.113.1"), ip("2001:db8::1")];
    service.ports[0].node_port = Some(30080);
    let slices = [
        slice("a", vec![endpoint("10.244.0.5", "rs")]),
        slice("b", vec![endpoint("fd00:10:244::5", "rs")]),
    ];
    let plan = plan(&service, &slices.each_ref(), &node());
    let frontends: Vec<_> = plan.ports[0]
        .frontends
        .iter()
        .map(|frontend| {
            let to: Vec<_> = frontend
                .backends
                .iter()
                .map(|b| b.addr.to_string())
                .collect();
            format!("{:?} {} → {}", frontend.kind, frontend.key, to.join(", "))
        })
        .collect();
    assert_eq!(
        frontends,
        [
            "ClusterIp 10.96.0.1:80/TCP → 10.244.0.5:3000",
            "ExternalIp 198.51.100.1:80/TCP → 10.244.0.5:3000",
            "LoadBalancer 203.0.113.1:80/TCP → 10.244.0.5:3000",
            "NodePort 192.168.50.1:30080/TCP → 10.244.0.5:3000",
            "Address 10.96.0.1 → 10.244.0.5:3000",
            "Address 203.0.113.1 → 10.244.0.5:3000",
            "Address 198.51.100.1 → 10.244.0.5:3000",
            "ClusterIp [fd00:10:96::1]:80/TCP → [fd00:10:244::5]:3000",
            "LoadBalancer [2001:db8::1]:80/TCP → [fd00:10:244::5]:3000",
            "NodePort [fd00:50::1]:30080/TCP → [fd00:10:244::5]:3000",
            "Address fd00:10:96::1 → [fd00:10:244::5]:3000",
            "Address 2001:db8::1 → [fd00:10:244::5]:3000",
        ]
    );
}

#[test]
fn ports_are_joined_by_name_and_protocol() {
    let mut service = service();
    service.ports.push(ServicePort {
        name: "metrics".to_owned(),
        protocol: Protocol::Tcp,
        port: 9000,
        node_port: None,
    });
    let mut both = slice("a", vec![endpoint("10.244.0.1", "rs")]);
    both.ports.push(EndpointPort {
        name: "metrics".to_owned(),
        protocol: Protocol::Tcp,
        port: 9100,
    });
    both.ports.push(EndpointPort {
        name: "http".to_owned(),
        protocol: Protocol::Udp,
        port: 53,
    });
    let plan = plan(&service, &[&both], &node());
    let ports: Vec<_> = plan
        .ports
        .iter()
        .map(|port| port.frontends[0].backends[0].addr.port())
        .collect();
    assert_eq!(ports, [3000, 9100]);
}

#[test]
fn endpoints_that_still_answer_stay_alive() {
    let endpoints = ["rs", "s", "st", "t"]
        .iter()
        .enumerate()
        .map(|(index, letters)| endpoint(&format!("10.244.0.{}", index + 1), letters));
    let plan = plan(&service(), &[&slice("a", endpoints.collect())], &node());
    let alive: Vec<_> = plan.ports[0]
        .alive
        .iter()
        .map(|b| b.addr.to_string())
        .collect();
    assert_eq!(
        alive,
        ["10.244.0.1:3000", "10.244.0.2:3000", "10.244.0.3:3000"]
    );
}

#[test]
fn an_address_of_two_kinds_is_one_frontend() {
    let mut service = service();
    service.external_ips = vec![ip("203.0.113.7"), ip("192.168.50.1")];
    service.load_balancer_ips = vec![ip("203.0.113.7")];
    service.ports[0].node_port = Some(80);
    let plan = plan(&service, &[], &node());
    let frontends = plan.ports[0].frontends.iter();
    let keys: Vec<_> = frontends.map(|frontend| frontend.key.to_string()).collect();
    assert_eq!(
        keys,
        [
            "10.96.0.1:80/TCP",
            "203.0.113.7:80/TCP",
            "192.168.50.1:80/TCP",
            "10.96.0.1",
            "203.0.113.7",
        ]
    );
}

#[test]
fn a_local_policy_for_those_outside_does_not_bind_those_inside() {
    use Policy::{Cluster, Local};
    type Row = (
        &'static str,
        Policy,
        &'static [&'static str],
        &'static [u8],
        &'static [u8],
    );
    let rows: [Row; 6] = [
        ("Cluster", Cluster, &["rs", "rs @b"], &[1, 2], &[1, 2]),
        ("Local", Local, &["rs", "rs @b"], &[1], &[1, 2]),
        ("none here", Local, &["rs @b"], &[], &[1]),
        ("none anywhere", Local, &["s"], &[], &[]),
        ("here only draining", Local, &["st", "rs @b"], &[1], &[2]),
        (
            "hints for another node's zone",
            Local,
            &["rs zone=zone-b", "rs @b zone=zone-a"],
            &[1],
            &[2],
        ),
    ];
    for (name, external, letters, outer, inner) in rows {
        let mut service = service();
        service.external_policy = external;
        service.external_ips = vec![ip("198.51.100.1")];
        service.load_balancer_ips = vec![ip("203.0.113.1")];
        service.ports[0].node_port = Some(30080);
        let plan = plan(&service, &[&slice("a", endpoints(letters))], &node());
        for kind in [
            FrontendKind::NodePort,
            FrontendKind::LoadBalancer,
            FrontendKind::ExternalIp,
        ] {
            assert_eq!(backends(&plan, kind).1, outer, "{name}, {kind:?}");
            assert_eq!(inner_backends(&plan, kind), inner, "{name}, {kind:?}");
        }
        assert_eq!(
            inner_backends(&plan, FrontendKind::ClusterIp),
            inner,
            "{name}"
        );
    }
    // A policy for those inside binds them.
    let mut service = service();
    service.internal_policy = Local;
    let plan = plan(
        &service,
        &[&slice("a", endpoints(&["rs", "rs @b"]))],
        &node(),
    );
    assert_eq!(inner_backends(&plan, FrontendKind::ClusterIp), [1]);
}

/// Flags of what is said of an address, and whether it has endpoints.
fn address(plan: &ServicePlan, addr: &str) -> Option<(u8, bool)> {
    let mut frontends = plan.ports.iter().flat_map(|port| &port.frontends);
    let frontend = frontends.find(|frontend| frontend.key == FrontendKey::of_address(ip(addr)))?;
    assert_eq!(frontend.kind, FrontendKind::Address);
    Some((frontend.flags, !frontend.backends.is_empty()))
}

#[test]
fn addresses_refuse_other_ports_and_answer_pings() {
    const BOTH: u8 = FRONTEND_REFUSE | FRONTEND_ECHO;
    let mut service = service();
    // The last one is the node's own, which answers for itself.
    service.load_balancer_ips = vec![ip("203.0.113.1"), ip("192.168.50.1")];
    service.external_ips = vec![ip("198.51.100.1")];
    let slices = [slice("a", endpoints(&["rs"]))];
    for (ping, cluster_ip, balancer) in [
        (Ping::LoadBalancer, FRONTEND_REFUSE, FRONTEND_ECHO),
        (Ping::All, BOTH, FRONTEND_ECHO),
        (Ping::Off, FRONTEND_REFUSE, 0),
    ] {
        let mut node = node();
        node.settings.ping = ping;
        for (slices, leads) in [(&slices.each_ref()[..], true), (&[], false)] {
            let plan = plan(&service, slices, &node);
            let with = |flags| (flags, leads);
            assert_eq!(
                address(&plan, "10.96.0.1"),
                Some(with(cluster_ip)),
                "{ping:?}"
            );
            assert_eq!(
                address(&plan, "203.0.113.1"),
                Some(with(balancer)),
                "{ping:?}"
            );
            assert_eq!(
                address(&plan, "198.51.100.1"),
                Some(with(0)),
                "its fragments are kept"
            );
            assert_eq!(address(&plan, "192.168.50.1"), None, "{ping:?}");
        }
    }
}

#[test]
fn a_port_that_leads_somewhere_speaks_for_the_address() {
    let mut service = service();
    for name in ["metrics", "admin"] {
        service.ports.push(ServicePort {
            name: name.to_owned(),
            port: service.ports[0].port + 1,
            ..service.ports[0].clone()
        });
    }
    service.ports[2].port += 1;
    let mut slice = slice("a", endpoints(&["rs"]));
    slice.ports[0].name = "metrics".to_owned();
    let plan = plan(&service, &[&slice], &node());
    let speakers: Vec<_> = plan
        .ports
        .iter()
        .map(|port| {
            let mut kinds = port.frontends.iter().map(|frontend| frontend.kind);
            kinds.any(|kind| kind == FrontendKind::Address)
        })
        .collect();
    assert_eq!(speakers, [false, true, false]);
}

#[test]
fn source_ranges_are_for_load_balancers_of_their_family() {
    let rows: [(&[&str], &[&str], bool, bool); 6] = [
        (&[], &[], false, false),
        (&["10.0.0.0/8"], &["10.0.0.0/8"], true, false),
        (
            &["10.0.0.0/8", "2001:db8:9::/48"],
            &["10.0.0.0/8", "2001:db8:9::/48"],
            true,
            true,
        ),
        (&["10.0.0.0/8", "0.0.0.0/0"], &[], false, false),
        (&["10.0.0.0/8", "::/0"], &["10.0.0.0/8"], true, false),
        // The node may, so the address itself may.
        (
            &["192.168.0.0/16"],
            &["192.168.0.0/16", "203.0.113.1/32"],
            true,
            false,
        ),
    ];
    let mut service = service();
    service.cluster_ips.push(ip("fd00:10:96::1"));
    service.load_balancer_ips = vec![ip("203.0.113.1"), ip("2001:db8::1")];
    service.external_ips = vec![ip("198.51.100.1")];
    service.ports[0].node_port = Some(30080);
    for (ranges, sources, restricts_v4, restricts_v6) in rows {
        let network = |text: &&str| text.parse::<IpNet>().expect("a network");
        service.source_ranges = ranges.iter().map(network).collect();
        let plan = plan(&service, &[], &node());
        let port = &plan.ports[0];
        assert_eq!(
            port.sources,
            sources.iter().map(network).collect(),
            "{ranges:?}"
        );
        for frontend in &port.frontends {
            let restricted = frontend.flags & FRONTEND_SOURCE_RANGES != 0;
            let of_family = match Family::of(frontend.key.addr) {
                Family::V4 => restricts_v4,
                Family::V6 => restricts_v6,
            };
            let expected = of_family && frontend.kind == FrontendKind::LoadBalancer;
            assert_eq!(restricted, expected, "{ranges:?}: {}", frontend.key);
        }
    }
}

#[test]
fn affinity_goes_before_the_algorithm_and_the_service_before_the_agent() {
    use Algorithm::{Maglev, Random};
    for (affinity, own, agents, expected) in [
        (None, None, Random, Choice::Random),
        (None, None, Maglev, Choice::Maglev(7)),
        (None, Some(Random), Maglev, Choice::Random),
        (None, Some(Maglev), Random, Choice::Maglev(7)),
        (Some(60), Some(Maglev), Maglev, Choice::Affinity(60)),
    ] {
        let mut service = service();
        (service.affinity, service.algorithm) = (affinity, own);
        let mut node = node();
        node.settings.algorithm = agents;
        node.settings.maglev_table = 7;
        let plan = plan(&service, &[], &node);
        assert_eq!(plan.ports[0].choice, expected);
    }
}
