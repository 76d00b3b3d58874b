//! Every client at every frontend over every hook, TCP and UDP, IPv4 and IPv6:
//! a test for each, and the table of what klb can do where.
//!
//! What only this level shows: that the hooks fit together. The packet tests
//! look at one program at a time; here the stack routes between them, and the
//! receiving stack verifies the checksums.

use std::{collections::BTreeMap, time::Duration};

use lb_common::{Hook, Reason};
use lb_tests::{
    agent::{Hooks, Status},
    topology::{Family, Host},
    traffic::{Failure, Protocol},
    world::{Frontend, World},
};

use crate::policies::AT_ONCE;

/// Who asks.
#[derive(Clone, Copy, Debug)]
enum Client {
    /// A pod without endpoints.
    Pod,
    /// A process of the node itself.
    Node,
    /// A host beyond the uplink.
    Outside,
}

/// What becomes of it.
#[derive(Debug)]
enum Expected {
    /// The hook that chooses the backend.
    By(Hook),
    /// klb does not see it; what the client is told then.
    Nobody(Failure),
}

use Client::{Node, Outside, Pod};
use Expected::{By, Nobody};
use Frontend::{ClusterIp, NodePort};
use Hook::{Socket, TcIngress, Xdp};

/// No hook answers for the address, and nobody has a route to it.
const NO_ROUTE: Failure = Failure::Unreachable;
/// No hook answers for the node's own port, and nobody listens there.
const NO_LISTENER: Failure = Failure::Refused;

/// How long a socket that tries on is waited for.
const SILENCE: Duration = Duration::from_millis(300);

/// Makes a module for each row, with a test for each protocol and family.
macro_rules! combinations {
    ($($name:ident: $hooks:ident, $client:ident, $frontend:ident, $expected:expr;)+) => {$(
        mod $name {
            use super::*;

            #[test]
            fn tcp_ipv4() {
                check(Hooks::$hooks, $client, $frontend, Family::V4, Protocol::Tcp, &$expected);
            }

            #[test]
            fn tcp_ipv6() {
                check(Hooks::$hooks, $client, $frontend, Family::V6, Protocol::Tcp, &$expected);
            }

            #[test]
            fn udp_ipv4() {
                check(Hooks::$hooks, $client, $frontend, Family::V4, Protocol::Udp, &$expected);
            }

            #[test]
            fn udp_ipv6() {
                check(Hooks::$hooks, $client, $frontend, Family::V6, Protocol::Udp, &$expected);
            }
        }
    )+};
}

combinations! {
    // The socket hook alone, on no device: whoever is in the control group.
    socket_pod_cluster_ip:     SOCKET, Pod,     ClusterIp, By(Socket);
    socket_pod_node_port:      SOCKET, Pod,     NodePort,  By(Socket);
    socket_node_cluster_ip:    SOCKET, Node,    ClusterIp, By(Socket);
    socket_node_node_port:     SOCKET, Node,    NodePort,  By(Socket);
    socket_outside_cluster_ip: SOCKET, Outside, ClusterIp, Nobody(NO_ROUTE);
    socket_outside_node_port:  SOCKET, Outside, NodePort,  Nobody(NO_LISTENER);

    // TC alone: whoever comes in by a device. The node's own packets do not.
    tc_pod_cluster_ip:         TC,     Pod,     ClusterIp, By(TcIngress);
    tc_pod_node_port:          TC,     Pod,     NodePort,  By(TcIngress);
    tc_node_cluster_ip:        TC,     Node,    ClusterIp, Nobody(NO_ROUTE);
    tc_node_node_port:         TC,     Node,    NodePort,  Nobody(NO_LISTENER);
    tc_outside_cluster_ip:     TC,     Outside, ClusterIp, By(TcIngress);
    tc_outside_node_port:      TC,     Outside, NodePort,  By(TcIngress);

    // The same by filters of clsact, where the kernel has no tcx (before 6.6).
    clsact_pod_cluster_ip:     CLSACT, Pod,     ClusterIp, By(TcIngress);
    clsact_pod_node_port:      CLSACT, Pod,     NodePort,  By(TcIngress);
    clsact_outside_cluster_ip: CLSACT, Outside, ClusterIp, By(TcIngress);
    clsact_outside_node_port:  CLSACT, Outside, NodePort,  By(TcIngress);

    // XDP, with TC for the replies: uplinks only, so pods are left to TC.
    xdp_pod_cluster_ip:        XDP,    Pod,     ClusterIp, By(TcIngress);
    xdp_pod_node_port:         XDP,    Pod,     NodePort,  By(TcIngress);
    xdp_node_cluster_ip:       XDP,    Node,    ClusterIp, Nobody(NO_ROUTE);
    xdp_node_node_port:        XDP,    Node,    NodePort,  Nobody(NO_LISTENER);
    xdp_outside_cluster_ip:    XDP,    Outside, ClusterIp, By(Xdp);
    xdp_outside_node_port:     XDP,    Outside, NodePort,  By(Xdp);

    // The same where the driver has no XDP.
    xdp_generic_outside_cluster_ip: XDP_GENERIC, Outside, ClusterIp, By(Xdp);
    xdp_generic_outside_node_port:  XDP_GENERIC, Outside, NodePort,  By(Xdp);

    // All together: the earliest hook has the work, and leaves none to others.
    all_pod_cluster_ip:        ALL,    Pod,     ClusterIp, By(Socket);
    all_pod_node_port:         ALL,    Pod,     NodePort,  By(Socket);
    all_node_cluster_ip:       ALL,    Node,    ClusterIp, By(Socket);
    all_node_node_port:        ALL,    Node,    NodePort,  By(Socket);
    all_outside_cluster_ip:    ALL,    Outside, ClusterIp, By(Xdp);
    all_outside_node_port:     ALL,    Outside, NodePort,  By(Xdp);
}

fn check(
    hooks: Hooks,
    client: Client,
    frontend: Frontend,
    family: Family,
    protocol: Protocol,
    expected: &Expected,
) {
    let world = crate::world(hooks);
    let host = host(&world, client);
    let request = world.request(frontend, family, protocol);
    match expected {
        By(hook) => {
            let answer = host.ask(&request.size(1300)).expect("an answer");
            let frontend = world.frontend(frontend, family, protocol);
            assert_eq!(answer.from, frontend, "who answers");
            let client = host.addresses.ip(family);
            assert_eq!(answer.seen.ip(), client, "whom the pod sees");
            assert_work(&world.agent.status(), *hook);
        }
        Nobody(failure) => {
            // A router's "no route" may pass: some sockets try on.
            let tries_on = matches!((client, failure), (Outside, Failure::Unreachable));
            let limit = if tries_on { SILENCE } else { AT_ONCE };
            // Only a connected UDP socket is told of an ICMP error.
            let request = request.connected().timeout(limit);
            let told = host.ask(&request).expect_err("nobody to answer");
            assert!(
                told == *failure || (tries_on && told == Failure::TimedOut),
                "{told}"
            );
            assert_eq!(world.agent.status().new_flows(), BTreeMap::new());
        }
    }
}

fn host(world: &World, client: Client) -> &Host {
    match client {
        Pod => &world.cluster.client.host,
        Node => &world.cluster.node,
        Outside => &world.cluster.outside,
    }
}

/// The hook, and no other, chose a backend; replies to packets were translated
/// at TC egress.
fn assert_work(status: &Status, hook: Hook) {
    let chosen = BTreeMap::from([(hook, 1)]);
    assert_eq!(status.new_flows(), chosen, "{:?}", status.counters);
    let replies = status.count(Hook::TcEgress, Reason::Reply);
    assert_eq!(replies > 0, hook != Socket, "{:?}", status.counters);
}

/// Packets as senders with offloads make them: TCP larger than any frame, and
/// checksums left to a device that never comes. XDP leaves those to TC.
#[test]
fn unfinished_checksums_and_large_packets() {
    for (hooks, client, hook) in [
        (Hooks::TC, Pod, TcIngress),
        (Hooks::CLSACT, Outside, TcIngress),
        (Hooks::XDP, Outside, TcIngress),
        (Hooks::ALL, Node, Socket),
    ] {
        let world = crate::world_with_offloads(hooks, true);
        for family in Family::ALL {
            let request = world.request(NodePort, family, Protocol::Tcp);
            let answer = host(&world, client).ask(&request.size(300_000));
            answer.unwrap_or_else(|failure| panic!("{hooks:?} {family}: {failure}"));
            let request = world.request(NodePort, family, Protocol::Udp);
            let answer = host(&world, client).ask(&request.size(1300));
            answer.unwrap_or_else(|failure| panic!("{hooks:?} {family} UDP: {failure}"));
        }
        let flows = BTreeMap::from([(hook, 4)]);
        assert_eq!(world.agent.status().new_flows(), flows, "{hooks:?}");
    }
}
