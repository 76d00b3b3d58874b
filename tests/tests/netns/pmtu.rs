//! A hop of 1400 bytes on the way to the backend: whoever sends more is told so
//! by the router in the middle, in terms of the address that it knows.

use lb_common::{Hook, Reason};
use lb_tests::{
    agent::Hooks,
    topology::{Family, Host, UPLINK},
    traffic::{Protocol, Request},
    world::Frontend,
};

use crate::two_nodes::{FAR, TwoNodes};

/// Much more than a packet, and less than a send buffer.
const BULK: usize = 60_000;

/// The far pod alone behind the Service, and the narrow hop before its node.
fn narrow(hooks: Hooks) -> TwoNodes {
    let nodes = TwoNodes::new(hooks, FAR);
    let router = nodes.world.cluster.outside.place.netns();
    router.ip("link set eth1 mtu 1400");
    let second = nodes.second.node.place.netns();
    second.ip(&format!("link set {UPLINK} mtu 1400"));
    nodes
}

/// Sends a bulk over TCP. The stack never splits such packets, so it arrives
/// only if the sender is told to send less.
fn send_bulk(nodes: &TwoNodes, client: &Host, kind: Frontend, family: Family) {
    let to = nodes.world.frontend(kind, family, Protocol::Tcp);
    let request = Request::new(Protocol::Tcp, to).size(BULK);
    nodes.ask(client, &request, FAR.0);
    let learned = path_mtu(client, to.ip());
    assert_eq!(learned, Some(1400), "{kind:?} {family}: {learned:?}");
}

/// What a host has learned of the way to an address.
fn path_mtu(host: &Host, to: std::net::IpAddr) -> Option<u32> {
    let route = host
        .place
        .netns()
        .output("ip", &["route", "get", &to.to_string()]);
    let mut words = route.split_whitespace();
    words.find(|word| *word == "mtu")?;
    words.next()?.parse().ok()
}

#[test]
fn a_client_outside_learns_the_path_mtu_of_a_node_port() {
    for hooks in [Hooks::ALL, Hooks::TC, Hooks::CLSACT] {
        let nodes = narrow(hooks);
        let outside = &nodes.world.cluster.outside;
        for family in Family::ALL {
            send_bulk(&nodes, outside, Frontend::NodePort, family);
        }
        let translated = nodes
            .world
            .agent
            .status()
            .count(Hook::TcIngress, Reason::IcmpError);
        assert!(translated >= 2, "{translated}");
    }
}

#[test]
fn a_pod_learns_the_path_mtu_of_a_cluster_ip() {
    for hooks in [Hooks::TC, Hooks::CLSACT] {
        let nodes = narrow(hooks);
        let pod = &nodes.world.cluster.client.host.without_cgroup();
        for family in Family::ALL {
            send_bulk(&nodes, pod, Frontend::ClusterIp, family);
        }
    }
}
