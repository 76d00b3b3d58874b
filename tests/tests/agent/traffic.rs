//! What `/metrics` tells of the traffic of Services and backends.

use lb_tests::{
    agent::{Hooks, ServicePort},
    topology::Family,
    traffic::Protocol,
    world::{Frontend, PODS, World},
};

use crate::metrics::METRICS;

fn metrics(world: &World) -> String {
    world.agent.page(METRICS, "/metrics").body
}

/// The sum of the time series of a name that have all these labels; `None` if
/// there is none.
fn sum(metrics: &str, name: &str, labels: &[&str]) -> Option<u64> {
    let lines = metrics.lines().filter(|line| {
        let of_name = line.strip_prefix(name);
        of_name.is_some_and(|rest| rest.starts_with('{'))
            && labels.iter().all(|label| line.contains(label))
    });
    let values = lines.map(|line| {
        let value = line.rsplit(' ').next().expect("a value");
        value.parse::<u64>().expect("a number")
    });
    values.fold(None, |sum, value| Some(sum.unwrap_or(0) + value))
}

const SERVICE: [&str; 3] = [
    "namespace=\"default\"",
    "service=\"echo\"",
    "port_name=\"http\"",
];

fn with(label: &str) -> Vec<&str> {
    [&SERVICE[..], &[label]].concat()
}

/// Requests from outside, and some from a pod, which are translated at its
/// socket.
const OUTSIDE: u64 = 12;
const AT_SOCKETS: u64 = 5;

fn use_it(world: &World) {
    let from_outside = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    for _ in 0..OUTSIDE {
        world.cluster.outside.ask(&from_outside).expect("an answer");
    }
    let inside = world.request(Frontend::ClusterIp, Family::V6, Protocol::Tcp);
    for _ in 0..AT_SOCKETS {
        world.cluster.client.host.ask(&inside).expect("an answer");
    }
}

#[test]
fn services_and_backends_are_counted_and_services_never_count_back() {
    let mut world = crate::stopped_world(Hooks::ALL);
    let flags = &mut world.agent.flags;
    flags.push("--traffic-metrics=backends".to_owned());
    world.agent.start();
    use_it(&world);
    let first = metrics(&world);
    for of in ["service", "backend"] {
        let flows = sum(&first, &format!("klb_{of}_flows_total"), &SERVICE);
        assert_eq!(flows, Some(OUTSIDE + AT_SOCKETS), "{of}: {first}");
        for direction in ["direction=\"in\"", "direction=\"out\""] {
            let packets = sum(&first, &format!("klb_{of}_packets_total"), &with(direction));
            let packets = packets.expect("packets");
            // SYN, ACK, request, FIN and their like.
            assert!((3 * OUTSIDE..20 * OUTSIDE).contains(&packets), "{packets}");
            let name = format!("klb_{of}_traffic_bytes_total");
            let bytes = sum(&first, &name, &with(direction)).expect("bytes");
            assert!((54 * packets..1500 * packets).contains(&bytes), "{bytes}");
        }
    }
    let active = sum(&first, "klb_service_active_flows", &SERVICE);
    assert_eq!(active, Some(OUTSIDE), "closed ones are there for a while");

    // What has flowed through a backend is not taken back when it goes.
    world.put_endpoints(&PODS[..1]);
    let are_gone = |services: &[ServicePort]| {
        let mut frontends = services.iter().flat_map(|service| &service.frontends);
        frontends.all(|frontend| frontend.backends.len() == 1)
    };
    world.agent.await_services("pods to go", are_gone);
    let second = metrics(&world);
    let flows = |metrics, of| sum(metrics, &format!("klb_{of}_flows_total"), &SERVICE);
    assert_eq!(flows(&second, "service"), Some(OUTSIDE + AT_SOCKETS));
    let left = flows(&second, "backend").expect("one is left");
    assert!(left < OUTSIDE + AT_SOCKETS);

    // The kernel's counts outlive the agent.
    world.agent.kill();
    world.agent.start();
    let third = metrics(&world);
    assert_eq!(flows(&third, "service"), Some(0));
    assert_eq!(flows(&third, "backend"), Some(left));
}

#[test]
fn the_number_of_time_series_is_bounded_by_a_flag() {
    for (detail, services, backends) in [("off", false, false), ("services", true, false)] {
        let mut world = crate::stopped_world(Hooks::SOCKET);
        world
            .agent
            .flags
            .push(format!("--traffic-metrics={detail}"));
        world.agent.start();
        let metrics = metrics(&world);
        for (of, told) in [("service", services), ("backend", backends)] {
            let flows = sum(&metrics, &format!("klb_{of}_flows_total"), &SERVICE);
            assert_eq!(flows.is_some(), told, "{detail}: {metrics}");
        }
    }
}
