//! Several agents on one machine, each in a namespace: how clusters of several
//! nodes are tested, so they must not know of each other.

use lb_tests::agent::Hooks;

#[test]
fn two_agents_do_not_meet() {
    let (mut one, other) = (crate::world(Hooks::ALL), crate::world(Hooks::ALL));
    // The same Service address in both, and a pod that tells which it is.
    one.put_endpoints(&[("pod-1", 5)]);
    other.put_endpoints(&[("pod-3", 7)]);
    for world in [&one, &other] {
        world.agent.await_services("a single endpoint", |services| {
            let mut frontends = services.iter().flat_map(|port| &port.frontends);
            frontends.all(|frontend| frontend.backends.len() == 1)
        });
    }
    for (world, name) in [(&one, "pod-1"), (&other, "pod-3")] {
        let pod = &world.cluster.client.host;
        for client in [&world.cluster.node, pod, &pod.without_cgroup()] {
            for answer in client.ask_often(&world.any_request(), 5) {
                assert_eq!(answer.expect("an answer").name, name);
            }
        }
    }
    one.agent.terminate();
    let said = one.agent.klb(&["cleanup"]);
    assert!(said.status.success(), "{said:?}");
    let answer = other.cluster.node.ask(&other.any_request());
    assert_eq!(answer.expect("an answer").name, "pod-3");
}
