//! The agent with an API server, into the kernel's maps, under real traffic.

use std::{collections::BTreeSet, net::IpAddr};

use lb_common::Hook;
use lb_tests::{
    agent::{Agent, Hooks},
    apiserver::ApiServer,
    helper::Stream,
    manifests::{self, Service},
    topology::{Addresses, Family},
    traffic::{Protocol, Request},
    world::{Frontend, PODS, World, echo, endpoints},
};

/// A world whose agent is to read from an API server. Agent and server are not
/// there to talk to anybody else: the server is in the node's namespace.
pub(crate) fn world(hooks: Hooks) -> (World, ApiServer) {
    let mut world = crate::stopped_world(hooks);
    let server = world.cluster.node.place.netns().within(ApiServer::start);
    server.put_yaml(&manifests::node());
    put(&server, &world.service, &PODS);
    let folder = world.cluster.scope().folder();
    world.agent.kubeconfig = Some(server.kubeconfig(&folder));
    (world, server)
}

/// Creates a Service with these pods, or gives it these.
fn put(server: &ApiServer, service: &Service, pods: &[(&str, u8)]) {
    server.put_yaml(&service.to_string());
    put_endpoints(server, service, pods);
}

fn put_endpoints(server: &ApiServer, service: &Service, pods: &[(&str, u8)]) {
    server.put_yaml(&endpoints(service, pods).to_string());
}

/// Waits until a Service leads to these pods, at all its frontends.
fn await_pods(agent: &Agent, service: &str, pods: &[u8]) {
    agent.await_services(&format!("{service} to lead to {pods:?}"), |services| {
        let ports = services.iter().filter(|port| port.name == service);
        let frontends: Vec<_> = ports.flat_map(|port| &port.frontends).collect();
        frontends.is_empty() == pods.is_empty()
            && frontends.iter().all(|frontend| {
                let family = match frontend.address {
                    IpAddr::V4(_) => Family::V4,
                    IpAddr::V6(_) => Family::V6,
                };
                let addresses = frontend.backends.iter().map(|backend| backend.address);
                let wanted = pods.iter().map(|number| Addresses::pod(*number).ip(family));
                addresses.collect::<BTreeSet<_>>() == wanted.collect()
            })
    });
}

/// Ends it; no connection may have failed, and all answers are these pods'.
fn assert_flawless(name: &str, stream: Stream, pods: &[&str]) {
    let reports = stream.stop();
    let sent = reports.len();
    let outcomes = reports.into_iter().map(|report| report.outcome.result());
    let wrong: Vec<_> = outcomes
        .filter(|result| {
            !result
                .as_ref()
                .is_ok_and(|answer| pods.contains(&answer.name.as_str()))
        })
        .collect();
    assert!(wrong.is_empty(), "{name}: of {sent} went wrong {wrong:?}");
}

#[test]
fn the_maps_follow_the_server() {
    let (mut world, server) = world(Hooks::ALL);
    world.agent.start();
    await_pods(&world.agent, "echo", &[5, 6, 7]);
    world
        .cluster
        .client
        .host
        .ask(&world.any_request())
        .expect("an answer");
    put_endpoints(&server, &world.service, &[("pod-2", 6)]);
    await_pods(&world.agent, "echo", &[6]);
    server.delete("services", "default", "echo");
    await_pods(&world.agent, "echo", &[]);
}

/// The node forwards what the maps hold, says that it is not ready, and is as
/// soon as the server is back.
#[test]
fn the_server_is_away_when_the_agent_starts() {
    let (mut world, server) = world(Hooks::ALL);
    world.agent.start();
    let request = world.any_request();
    let stream = world.cluster.client.host.stream(&request, false);
    stream.await_more(10);
    server.set_down(true);
    world.agent.kill();
    world.agent.spawn();
    world.agent.await_log("that the server is away", |line| {
        line.contains("trying again")
    });
    stream.await_more(10);
    assert!(!world.agent.log().text().contains(" ready"));
    put_endpoints(&server, &world.service, &[("pod-3", 7)]);
    server.set_down(false);
    world.agent.await_log("ready", |line| {
        line.split_whitespace().any(|word| word == "ready")
    });
    await_pods(&world.agent, "echo", &[7]);
    stream.await_more(10);
    assert_flawless("pod", stream, &["pod-1", "pod-2", "pod-3"]);
}

/// Numbers that look random and are the same every time (xorshift, Marsaglia).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// A thousand changes of endpoints: a Service that always has a ready one is
/// always served by one of its own, a connection stays with its pod, and a Service
/// that nothing happens to does not notice.
#[test]
fn a_thousand_changes_under_traffic() {
    let (mut world, server) = world(Hooks::ALL);
    let calm = echo("calm", 2, 30090);
    put(&server, &calm, &PODS[..1]);
    // Its endpoints are nobody: whoever got one of them would get no answer.
    let noise = echo("noise", 3, 30100);
    put(&server, &noise, &[]);
    world.agent.start();
    let request = |service: &Service, family, protocol| {
        let mut ports = service.ports.iter();
        let port = ports.find(|port| port.protocol == protocol);
        let port = port.expect("a port of each protocol").port;
        Request::new(protocol, service.addresses.port(family, port))
    };
    let pod = &world.cluster.client.host;
    let changing = &PODS[1..];
    let names =
        |pods: &[(&'static str, u8)]| pods.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    put_endpoints(&server, &world.service, changing);
    await_pods(&world.agent, "echo", &[6, 7]);
    let outside = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    // No family and backend of both the sockets and the packets of the pod: see
    // "two connections that a backend cannot tell apart" in ARCHITECTURE.md.
    let streams = [
        (
            "changing, socket",
            pod.stream(&request(&world.service, Family::V6, Protocol::Tcp), false),
            names(changing),
        ),
        (
            "changing, TC",
            pod.without_cgroup()
                .stream(&request(&world.service, Family::V4, Protocol::Udp), false),
            names(changing),
        ),
        (
            "changing, XDP",
            world.cluster.outside.stream(&outside, false),
            names(changing),
        ),
        (
            "changing, socket, held",
            pod.stream(&request(&world.service, Family::V6, Protocol::Tcp), true),
            names(changing),
        ),
        (
            "changing, TC, held",
            pod.without_cgroup()
                .stream(&request(&world.service, Family::V4, Protocol::Tcp), true),
            names(changing),
        ),
        (
            "changing, XDP, held",
            world.cluster.outside.stream(&outside, true),
            names(changing),
        ),
        (
            "calm, socket",
            pod.stream(&request(&calm, Family::V4, Protocol::Tcp), false),
            names(&PODS[..1]),
        ),
        (
            "calm, TC",
            pod.without_cgroup()
                .stream(&request(&calm, Family::V6, Protocol::Tcp), false),
            names(&PODS[..1]),
        ),
    ];
    let mut numbers = Numbers(0x6b_6c62);
    for change in 0..1000 {
        let chosen = match numbers.next(3) {
            0 => &changing[..1],
            1 => &changing[1..],
            _ => changing,
        };
        put_endpoints(&server, &world.service, chosen);
        if change % 4 == 0 {
            let number = 100 + u8::try_from(numbers.next(40)).expect("small");
            let nobody: &[_] = &[("nobody", number)];
            let chosen = if numbers.next(4) == 0 { &[] } else { nobody };
            put_endpoints(&server, &noise, chosen);
        }
        // As fast as one stream after the other gets an answer.
        streams[change % streams.len()].1.await_more(1);
    }
    put_endpoints(&server, &world.service, changing);
    await_pods(&world.agent, "echo", &[6, 7]);
    for (name, stream, pods) in streams {
        assert_flawless(name, stream, &pods);
    }
    let hooks = world.agent.status().new_flows();
    for hook in [Hook::Xdp, Hook::TcIngress, Hook::Socket] {
        assert!(hooks.contains_key(&hook), "no flow by {hook:?}: {hooks:?}");
    }
}
