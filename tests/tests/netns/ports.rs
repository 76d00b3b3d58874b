//! A client may use one port again and again. What klb remembers of the last
//! time must not get in the way of the next.

use std::time::Duration;

use lb_tests::{
    agent::Hooks,
    topology::{Addresses, Family},
    traffic::{Protocol, Request},
    world::{Frontend, World},
};

/// How long nothing is heard where klb refuses.
const SILENCE: Duration = Duration::from_secs(2);

/// Service, then the pod itself, then the Service: all from one port. After the
/// first, the pod's answers to that port look like answers for the Service.
fn service_then_direct(hooks: Hooks, protocol: Protocol) {
    let world = crate::world(hooks);
    only_one_pod(&world);
    let client = &world.cluster.client.host;
    let target = match protocol {
        Protocol::Tcp => 3000,
        Protocol::Udp => 3053,
    };
    for family in Family::ALL {
        let service = world.request(Frontend::ClusterIp, family, protocol);
        let pod = Addresses::pod(5).port(family, target);
        let direct = Request::new(protocol, pod);
        for (turn, request) in [&service, &direct, &service, &direct]
            .into_iter()
            .enumerate()
        {
            let request = request.clone().from_port(40000);
            let answer = client.ask(&request);
            let answer =
                answer.unwrap_or_else(|failure| panic!("{family}, turn {turn}: {failure}"));
            assert_eq!(answer.from, request.to, "{family}, turn {turn}");
            assert_eq!(answer.seen, client.addresses.port(family, 40000));
        }
    }
}

/// Leaves the client no choice of pod.
pub(crate) fn only_one_pod(world: &World) {
    world.put_endpoints(&[("pod-1", 5)]);
    world.agent.await_services("a single endpoint", |services| {
        let mut frontends = services.iter().flat_map(|port| &port.frontends);
        frontends.all(|frontend| frontend.backends.len() == 1)
    });
}

#[test]
fn tcp_through_tc() {
    service_then_direct(Hooks::TC, Protocol::Tcp);
}

#[test]
fn udp_through_tc() {
    service_then_direct(Hooks::TC, Protocol::Udp);
}

#[test]
fn tcp_through_the_socket() {
    service_then_direct(Hooks::SOCKET, Protocol::Tcp);
}

#[test]
fn udp_through_the_socket() {
    service_then_direct(Hooks::SOCKET, Protocol::Udp);
}

/// One port towards two frontends of one pod at the same time: to the pod both
/// are one peer, so klb must keep them apart or refuse, but never mix them up.
#[test]
fn one_port_to_two_frontends() {
    let world = crate::world(Hooks::TC);
    only_one_pod(&world);
    let client = &world.cluster.client.host;
    let to = |kind| {
        world
            .request(kind, Family::V4, Protocol::Udp)
            .from_port(40001)
    };
    let first = client.ask(&to(Frontend::ClusterIp)).expect("an answer");
    assert_eq!(
        first.from,
        world.frontend(Frontend::ClusterIp, Family::V4, Protocol::Udp)
    );
    let second = to(Frontend::NodePort).timeout(SILENCE);
    if let Ok(second) = client.ask(&second) {
        let frontend = world.frontend(Frontend::NodePort, Family::V4, Protocol::Udp);
        assert_eq!(second.from, frontend, "answers of the other frontend");
    }
}
