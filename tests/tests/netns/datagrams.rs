//! Datagrams larger than a packet, in fragments both ways.

use lb_tests::{
    agent::Hooks,
    topology::{Addresses, Family},
    traffic::Protocol,
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
