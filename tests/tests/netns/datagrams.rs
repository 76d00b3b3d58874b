//! Datagrams larger than a packet, in fragments both ways.

use lb_common::{Hook, Reason};
use lb_tests::{
    agent::Hooks,
    topology::{Addresses, Family},
    traffic::{Protocol, Request},
    world::Frontend,
};

use crate::masquerade::only_remote;

/// Three fragments, at an MTU of 1500.
const LARGE: usize = 4000;
/// Nearly the largest that there is.
const LARGEST: usize = 60_000;

/// To a backend of the node, which sees the client, and to one elsewhere, which
/// sees the node.
#[test]
fn large_datagrams_arrive_whole_both_ways() {
    for hooks in [Hooks::TC, Hooks::XDP, Hooks::ALL] {
        let world = crate::world(hooks);
        let pod = world.cluster.client.host.without_cgroup();
        let outside = &world.cluster.outside;
        // None twice: a flow stays what it was opened as.
        let mut ports = 42_000..;
        for remote in [false, true] {
            if remote {
                only_remote(&world, "pod-2", 6);
            }
            for (client, kind, family) in [
                (&pod, Frontend::ClusterIp),
                (outside, Frontend::ClusterIp),
                (outside, Frontend::NodePort),
            ]
            .into_iter()
            .flat_map(|(client, kind)| Family::ALL.map(|family| (client, kind, family)))
            {
                let masqueraded = remote && client.addresses == outside.addresses;
                let source = if masqueraded {
                    Addresses::NODE
                } else {
                    client.addresses
                };
                for size in [LARGE, LARGEST] {
                    let request = world.request(kind, family, Protocol::Udp).size(size);
                    let request = request.from_port(ports.next().expect("no end"));
                    let answer = client.ask(&request).unwrap_or_else(|failure| {
                        panic!("{hooks:?}, remote: {remote}, {request:?}: {failure}")
                    });
                    assert_eq!(answer.from, request.to, "{hooks:?}");
                    assert_eq!(answer.seen.ip(), source.ip(family), "{hooks:?} {request:?}");
                }
            }
        }
    }
}

/// To a process of the node itself, which is no business of klb's, and between
/// pods.
#[test]
fn large_datagrams_of_strangers_arrive_whole_both_ways() {
    let world = crate::world(Hooks::ALL);
    let node = &world.cluster.node;
    let _server = node.serve("node", 8080, 5353);
    let pod = &world.cluster.client.host;
    for family in Family::ALL {
        for (client, to) in [
            (&world.cluster.outside, node.addresses.port(family, 5353)),
            (pod, node.addresses.port(family, 5353)),
            (pod, Addresses::pod(5).port(family, 3053)),
        ] {
            for size in [LARGE, LARGEST] {
                let request = Request::new(Protocol::Udp, to).size(size);
                let answer = client
                    .ask(&request)
                    .unwrap_or_else(|failure| panic!("{request:?}: {failure}"));
                assert_eq!(answer.from, to);
                assert_eq!(answer.seen.ip(), client.addresses.ip(family));
            }
        }
    }
    let status = world.agent.status();
    for hook in [Hook::TcIngress, Hook::TcEgress] {
        assert_eq!(status.count(hook, Reason::FragmentKept), 0, "{hook:?}");
    }
}
