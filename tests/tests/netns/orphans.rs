//! Connected UDP sockets: their processes must not go on talking to a backend that
//! has gone, nor to an address that was no Service's when they connected.

use std::{
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use lb_tests::{
    agent::Hooks,
    helper::Stream,
    topology::{Addresses, Family, Host},
    traffic::{Outcome, Protocol},
    wait,
    world::{Frontend, PODS, World, echo},
};

/// How long a socket may stay as it was: before the agent looks again it rests for
/// twenty times as long as the last look took, which goes through the namespaces of
/// other tests as well.
pub(crate) const LOOKED_AT: Duration = Duration::from_secs(60);

/// The pod that answered last.
fn last(stream: &Stream) -> Option<String> {
    let reports = stream.reports();
    reports
        .iter()
        .rev()
        .find_map(|report| match &report.outcome {
            Outcome::Answer(answer) => Some(answer.name.clone()),
            Outcome::Failure(_) => None,
        })
}

fn leaves_a_backend_that_has_gone(world: &World, client: &Host, family: Family) {
    world.put_endpoints(&PODS);
    world.agent.await_services("all endpoints", |services| {
        let mut frontends = services.iter().flat_map(|service| &service.frontends);
        frontends.all(|frontend| frontend.backends.len() == PODS.len())
    });
    let request = world.request(Frontend::ClusterIp, family, Protocol::Udp);
    let stream = client.stream(&request.connected(), true);
    stream.await_more(3);
    let before = last(&stream).expect("it has answered");
    let rest: Vec<_> = PODS
        .into_iter()
        .filter(|(name, _)| *name != before)
        .collect();
    // The pod itself lives on and would answer: only the endpoint has gone.
    world.put_endpoints(&rest);
    wait::until("another pod to answer", LOOKED_AT, || {
        (last(&stream).as_ref() != Some(&before)).then_some(())
    });
    let lost = stream
        .stop()
        .iter()
        .filter(|report| matches!(report.outcome, Outcome::Failure(_)))
        .count();
    assert!(lost <= 1, "the process is told once, not {lost} times");
}

#[test]
fn a_process_of_the_node_is_told_and_finds_another_backend() {
    let world = crate::world(Hooks::ALL);
    for family in Family::ALL {
        leaves_a_backend_that_has_gone(&world, &world.cluster.node, family);
    }
}

#[test]
fn a_process_of_a_pod_is_told_and_finds_another_backend() {
    let world = crate::world(Hooks::ALL);
    for family in Family::ALL {
        leaves_a_backend_that_has_gone(&world, &world.cluster.client.host, family);
    }
}

/// A socket of a host that is connected, as before any hook had seen it.
fn connected(host: &Host, to: SocketAddr) -> UdpSocket {
    host.place.netns().within(move || {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).expect("bound");
        socket.connect(to).expect("a route");
        socket
    })
}

/// What a process of the node sends to an address that becomes a Service's only
/// then would go there, untranslated, for ever.
#[test]
fn a_socket_of_the_node_that_was_there_before_its_service_is_ended() {
    let world = crate::world(Hooks::ALL);
    let node = &world.cluster.node;
    let late = echo("late", 9, 30090);
    for family in Family::ALL {
        let via = Addresses::OUTSIDE.ip(family);
        node.place
            .netns()
            .ip(&format!("route add default via {via}\n"));
    }
    let sockets = Family::ALL.map(|family| {
        let service = late.addresses.port(family, 53);
        let stranger = late.addresses.port(family, 54);
        let pod = &world.cluster.client.host;
        let stay = [connected(node, stranger), connected(pod, service)];
        (connected(node, service), stay)
    });
    world.agent.manifests.put("late.yaml", &late.to_string());
    for (socket, stay) in sockets {
        wait::until("the socket to be ended", LOOKED_AT, || {
            socket.peer_addr().is_err().then_some(())
        });
        // What a pod sends is translated where it leaves the pod.
        assert!(stay.iter().all(|socket| socket.peer_addr().is_ok()));
    }
}
