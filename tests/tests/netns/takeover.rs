//! From kube-proxy to klb and back, under traffic.
//!
//! kube-proxy's part is played by nftables rules of the shape that it makes. Its
//! work is told from klb's by what the backend sees: kube-proxy masquerades a
//! client from outside, klb keeps its address.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use lb_tests::{
    agent::Hooks,
    helper::Stream,
    process::Process,
    topology::{Addresses, Family, Host},
    traffic::{Outcome, Protocol, Request},
    world::{Frontend, World},
};

/// Requests that show that a connection goes on.
const SOME: usize = 20;

/// Rules as kube-proxy makes them, for the ports of the world's Service.
pub(crate) fn kube_proxy(world: &World) {
    let mut rules = String::new();
    for family in Family::ALL {
        let ip = match family {
            Family::V4 => "ip",
            Family::V6 => "ip6",
        };
        let service = &world.service;
        let mut jumps = String::new();
        writeln!(rules, "table {ip} kube-proxy {{").expect("a string grows");
        for port in &service.ports {
            let protocol = port.protocol.kubernetes().to_lowercase();
            let endpoints = [5, 6].map(|number| Addresses::pod(number).port(family, port.target));
            let [first, second] = endpoints;
            writeln!(
                rules,
                "chain {protocol}1 {{ meta l4proto {protocol} dnat to {first}; }}
                 chain {protocol}2 {{ meta l4proto {protocol} dnat to {second}; }}
                 chain {protocol}-service {{
                   numgen random mod 2 vmap {{ 0 : goto {protocol}1, 1 : goto {protocol}2 }};
                 }}
                 chain {protocol}-external {{ meta mark set mark or 0x4000; goto {protocol}-service; }}"
            )
            .expect("a string grows");
            writeln!(
                jumps,
                "{ip} daddr {cluster} {protocol} dport {port} goto {protocol}-service
                 {ip} daddr {node} {protocol} dport {node_port} goto {protocol}-external",
                cluster = service.addresses.ip(family),
                node = Addresses::NODE.ip(family),
                port = port.port,
                node_port = port.node_port,
            )
            .expect("a string grows");
        }
        writeln!(
            rules,
            "  chain services {{ {jumps} }}
               chain prerouting {{ type nat hook prerouting priority -100; jump services; }}
               chain output {{ type nat hook output priority -100; jump services; }}
               chain postrouting {{
                 type nat hook postrouting priority 100;
                 meta mark & 0x4000 != 0 masquerade
               }}
             }}",
        )
        .expect("a string grows");
    }
    let file = world.cluster.scope().new_file("kube-proxy.nft");
    fs::write(&file, rules).expect("a folder of our own");
    add_default_routes(world);
    let node = world.cluster.node.place.netns();
    node.output("nft", &["-f", &file.display().to_string()]);
}

/// A packet of the node's own is routed before it is translated.
pub(crate) fn add_default_routes(world: &World) {
    let node = world.cluster.node.place.netns();
    for family in Family::ALL {
        let via = Addresses::OUTSIDE.ip(family);
        node.ip(&format!("route add default via {via}\n"));
    }
}

/// Connections of every kind of client to every kind of frontend, each asking
/// again and again.
pub(crate) fn connections(world: &World) -> Vec<(String, Stream)> {
    streams(world, Protocol::Tcp)
}

/// Sockets of clients in the same places, over UDP.
fn conversations(world: &World) -> Vec<(String, Stream)> {
    streams(world, Protocol::Udp)
}

fn streams(world: &World, protocol: Protocol) -> Vec<(String, Stream)> {
    let cluster = &world.cluster;
    let mut streams = Vec::new();
    for family in Family::ALL {
        let request = |kind| world.request(kind, family, protocol);
        let clients: [(&str, &Host, Frontend); 4] = [
            ("outside", &cluster.outside, Frontend::NodePort),
            ("outside", &cluster.outside, Frontend::ClusterIp),
            ("pod", &cluster.client.host, Frontend::ClusterIp),
            ("node", &cluster.node, Frontend::ClusterIp),
        ];
        for (name, client, kind) in clients {
            let name = format!("{name} to {kind:?} over {family} and {protocol:?}");
            streams.push((name, client.stream(&request(kind), true)));
        }
    }
    assert_go_on(&streams);
    streams
}

pub(crate) fn assert_go_on(streams: &[(String, Stream)]) {
    for (name, stream) in streams {
        println!("{name}");
        stream.await_more(SOME);
    }
}

/// Ends them, and makes sure that nothing was ever missed.
pub(crate) fn stop(streams: Vec<(String, Stream)>) {
    for (name, stream) in streams {
        for report in stream.stop() {
            if let Outcome::Failure(failure) = report.outcome {
                panic!("{name}: {failure}");
            }
        }
    }
}

fn node_port(world: &World, family: Family) -> Request {
    world.request(Frontend::NodePort, family, Protocol::Tcp)
}

/// The address of the client outside, as the backend of a new connection sees
/// it.
fn seen_address(world: &World, family: Family) -> IpAddr {
    let answer = world.cluster.outside.ask(&node_port(world, family));
    let client: SocketAddr = answer.expect("an answer").seen;
    client.ip()
}

pub(crate) fn assert_served_by_kube_proxy(world: &World) {
    for family in Family::ALL {
        assert_ne!(seen_address(world, family), Addresses::OUTSIDE.ip(family));
    }
}

pub(crate) fn assert_served_by_klb(world: &World) {
    for family in Family::ALL {
        assert_eq!(seen_address(world, family), Addresses::OUTSIDE.ip(family));
    }
}

fn klb_takes_over(hooks: Hooks) {
    let mut world = crate::stopped_world(hooks);
    kube_proxy(&world);
    assert_served_by_kube_proxy(&world);
    let old = connections(&world);
    let conversations = conversations(&world);
    let newcomers = newcomers(&world);
    world.agent.start();
    assert_served_by_klb(&world);
    for streams in [&old, &conversations, &newcomers] {
        assert_go_on(streams);
    }
    for streams in [old, conversations, newcomers] {
        stop(streams);
    }
}

/// Clients outside that make a new connection for every request.
fn newcomers(world: &World) -> Vec<(String, Stream)> {
    let stream = |family| {
        let request = node_port(world, family);
        let stream = world.cluster.outside.stream(&request, false);
        (format!("new connections over {family}"), stream)
    };
    Family::ALL.map(stream).into()
}

#[test]
fn connections_of_kube_proxys_live_on_under_klb() {
    klb_takes_over(Hooks::ALL);
}

#[test]
fn connections_of_kube_proxys_live_on_under_xdp() {
    klb_takes_over(Hooks::XDP);
}

/// Starts `klb cleanup --drain`.
fn drain(world: &World, flags: &[&str]) -> Process {
    let place = &world.cluster.node.place;
    let mut command = place.command(&world.agent.program);
    command.args(["cleanup", "--drain"]).args(flags);
    command.args(world.agent.paths());
    place.start("drain", command)
}

/// A world in which klb serves, with kube-proxy's rules behind it.
fn served_world(hooks: Hooks) -> World {
    let mut world = crate::stopped_world(hooks);
    kube_proxy(&world);
    world.agent.start();
    assert_served_by_klb(&world);
    world
}

fn kube_proxy_takes_over(hooks: Hooks) {
    let mut world = served_world(hooks);
    let old = connections(&world);
    let conversations = conversations(&world);
    let newcomers = newcomers(&world);
    world.agent.terminate();
    let mut drain = drain(&world, &[]);
    let limit = Duration::from_secs(60);
    drain.wait_for_stderr("the number of connections", limit, |line| {
        line.contains("connections left")
    });
    assert_served_by_kube_proxy(&world);
    for streams in [&old, &conversations, &newcomers] {
        assert_go_on(streams);
    }
    assert!(drain.status().is_none(), "{drain:?}");
    assert!(world.agent.pins().exists());
    stop(old);
    let status = drain.wait(limit);
    assert!(status.success(), "{drain:?}");
    assert!(!world.agent.pins().exists());
    for streams in [conversations, newcomers] {
        assert_go_on(&streams);
        stop(streams);
    }
    assert_served_by_kube_proxy(&world);
}

#[test]
fn connections_of_klbs_live_on_until_they_are_drained() {
    kube_proxy_takes_over(Hooks::ALL);
}

#[test]
fn connections_of_klbs_live_on_under_xdp() {
    kube_proxy_takes_over(Hooks::XDP);
}

#[test]
fn a_drain_has_an_end() {
    let mut world = served_world(Hooks::TC);
    let old = world
        .cluster
        .outside
        .stream(&node_port(&world, Family::V4), true);
    old.await_more(1);
    world.agent.terminate();
    let mut drain = drain(&world, &["--timeout", "1s"]);
    let status = drain.wait(Duration::from_secs(60));
    assert!(status.success(), "{drain:?}");
    let said = drain.stderr().text();
    assert!(said.contains("that break now: 1"), "{said}");
    assert!(!world.agent.pins().exists());
    assert_served_by_kube_proxy(&world);
}
