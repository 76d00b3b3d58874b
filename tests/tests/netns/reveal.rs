//! The client is shown the address that it named, whatever way it asks, and
//! whichever hook translated.

use std::collections::BTreeSet;

use lb_tests::{
    agent::Hooks,
    topology::{Family, Host},
    traffic::{Protocol, Request},
    world::{Frontend, PODS, World},
};

/// Asks in every way there is; each must show the frontend.
fn check(world: &World, client: &Host) {
    for kind in [Frontend::ClusterIp, Frontend::NodePort] {
        for family in Family::ALL {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let request = world.request(kind, family, protocol);
                for request in ways(&request, family) {
                    shows_frontend(client, &request);
                }
            }
        }
    }
}

/// The request, by each kind of socket that can make it.
fn ways(request: &Request, family: Family) -> Vec<Request> {
    let mut ways = vec![request.clone(), request.clone().connected()];
    if family == Family::V4 {
        ways.push(request.clone().mapped());
        ways.push(request.clone().mapped().connected());
    }
    ways
}

fn shows_frontend(client: &Host, request: &Request) {
    let answer = client
        .ask(request)
        .unwrap_or_else(|failure| panic!("{request:?}: {failure}"));
    assert_eq!(answer.from, request.to, "{request:?}");
    let asks = request.connected || request.protocol == Protocol::Tcp;
    assert_eq!(answer.peer, asks.then_some(request.to), "{request:?}");
}

#[test]
fn by_the_socket_hook_to_pods() {
    let world = crate::world(Hooks::SOCKET);
    check(&world, &world.cluster.client.host);
}

#[test]
fn by_the_socket_hook_to_the_node() {
    let world = crate::world(Hooks::SOCKET);
    check(&world, &world.cluster.node);
}

#[test]
fn by_tc_to_pods() {
    let world = crate::world(Hooks::TC);
    check(&world, &world.cluster.client.host);
}

#[test]
fn by_xdp_to_the_outside() {
    let world = crate::world(Hooks::XDP);
    check(&world, &world.cluster.outside);
}

/// A pod whose processes are outside of the control group, as in a virtual
/// machine, is served by TC while the socket hook serves the others.
#[test]
fn beside_the_socket_hook() {
    let world = crate::world(Hooks::ALL);
    check(&world, &world.cluster.client.host.without_cgroup());
    check(&world, &world.cluster.client.host);
}

/// New connections spread over all pods: with three pods, sixty connections
/// miss one of them once in 10^10 runs.
#[test]
fn connections_spread_over_all_pods() {
    let everyone = BTreeSet::from(PODS.map(|(name, _)| name.to_owned()));
    for hooks in [Hooks::SOCKET, Hooks::TC] {
        let world = crate::world(hooks);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let request = world.request(Frontend::ClusterIp, Family::V6, protocol);
            let answers = world.cluster.client.host.ask_often(&request, 60);
            let names = answers
                .into_iter()
                .map(|answer| answer.expect("an answer").name);
            assert_eq!(names.collect::<BTreeSet<_>>(), everyone, "{hooks:?}");
        }
    }
}
