//! Connected UDP sockets that were translated at the socket: their processes must
//! not go on talking to a backend that has gone.

use std::time::Duration;

use lb_tests::{
    agent::Hooks,
    helper::Stream,
    topology::{Family, Host},
    traffic::{Outcome, Protocol},
    wait,
    world::{Frontend, PODS, World},
};

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
    wait::until("another pod to answer", Duration::from_secs(10), || {
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
