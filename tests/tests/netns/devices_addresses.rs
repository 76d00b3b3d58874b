//! Addresses of the node that come and go while `NodePort`s answer on them.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use lb_tests::{
    agent::Hooks,
    topology::{Addresses, Family, UPLINK},
    traffic::{Failure, Outcome, Protocol, Request},
    wait,
    world::World,
};

use crate::{devices, policies::AT_ONCE};

/// How long a change may take to be followed: most of it is what a machine that
/// does much else needs to start who asks. An agent that was not told of it looks
/// again after `--verify-interval`, ten minutes.
const BOUND: Duration = Duration::from_secs(10);

/// A request to a `NodePort` of the Service on some address, to be tried again
/// until it is answered as it should.
fn request(world: &World, addr: IpAddr, protocol: Protocol) -> Request {
    let mut ports = world.service.ports.iter();
    let port = ports.find(|port| port.protocol == protocol);
    let port = port.expect("a port of each protocol").node_port;
    Request::new(protocol, (addr, port).into()).timeout(Duration::from_millis(100))
}

fn parse(addr: &str) -> IpAddr {
    addr.parse().expect("an address")
}

fn change(world: &World, commands: &[String]) {
    world
        .cluster
        .node
        .place
        .netns()
        .ip(&(commands.join("\n") + "\n"));
}

/// Has the host outside ask nobody who has an address: a question that is lost
/// is repeated after a second only.
fn add_route(world: &World, addr: IpAddr, family: Family) {
    let via = Addresses::NODE.ip(family);
    let outside = world.cluster.outside.place.netns();
    outside.ip(&format!("route add {addr} via {via}\n"));
}

#[test]
fn an_address_answers_while_the_node_has_it() {
    let world = crate::world(Hooks::TC);
    let outside = &world.cluster.outside;
    let first = request(&world, Addresses::NODE.v4.into(), Protocol::Tcp);
    let stream = outside.stream(&first, true);
    let mut fastest = BOUND;
    for (family, addr, flags) in [
        (Family::V4, parse("192.168.50.77"), ""),
        (Family::V6, parse("fd00:50::77"), "nodad"),
        (Family::V4, parse("192.168.50.78"), ""),
        (Family::V6, parse("fd00:50::78"), "nodad"),
    ] {
        add_route(&world, addr, family);
        let requests =
            [Protocol::Tcp, Protocol::Udp].map(|protocol| request(&world, addr, protocol));
        change(&world, &[format!("addr add {addr} dev {UPLINK} {flags}")]);
        let started = Instant::now();
        for request in &requests {
            let answer = outside.await_answer(request, BOUND);
            answer.unwrap_or_else(|failure| panic!("{addr}: {failure}"));
        }
        fastest = fastest.min(started.elapsed());
        change(&world, &[format!("addr del {addr} dev {UPLINK}")]);
        for request in &requests {
            wait::until(&format!("{addr} to fall silent"), BOUND, || {
                outside.ask(request).err()
            });
        }
    }
    assert!(fastest < devices::AT_ONCE, "after {fastest:?}");
    stream.await_more(5);
    for report in stream.stop() {
        if let Outcome::Failure(failure) = report.outcome {
            panic!("{failure}");
        }
    }
}

/// Those of other networks do not, and one of a router's loopback device does.
#[test]
fn addresses_answer_in_the_networks_that_were_named() {
    let mut world = crate::stopped_world(Hooks::TC);
    let networks = "--nodeport-addresses=192.168.50.0/24,198.51.100.0/24";
    world.agent.flags.push(networks.to_owned());
    world.agent.start();
    let outside = &world.cluster.outside;
    let (other, router) = (parse("203.0.113.7"), parse("198.51.100.7"));
    for addr in [other, router] {
        add_route(&world, addr, Family::V4);
    }
    change(
        &world,
        &[
            format!("addr add {other}/32 dev {UPLINK}"),
            format!("addr add {router}/32 dev lo"),
        ],
    );
    let answer = outside.await_answer(&request(&world, router, Protocol::Tcp), BOUND);
    answer.expect("an answer of the router's address");
    for addr in [other, Addresses::NODE.v6.into()] {
        let request = request(&world, addr, Protocol::Tcp).timeout(AT_ONCE);
        assert_eq!(outside.ask(&request), Err(Failure::Refused), "{addr}");
    }
}

/// What is masqueraded has the uplink's first address.
#[test]
fn masquerade_follows_the_addresses_of_devices() {
    let world = crate::world(Hooks::TC);
    crate::masquerade::only_remote(&world, "pod-2", 6);
    let (old, new) = (Addresses::NODE.ip(Family::V4), parse("192.168.50.9"));
    change(&world, &[format!("addr add {new}/24 dev {UPLINK}")]);
    let (outside, request) = (&world.cluster.outside, request(&world, new, Protocol::Tcp));
    let answer = outside.await_answer(&request, BOUND);
    assert_eq!(answer.expect("an answer").seen.ip(), old);
    let key = format!("net/ipv4/conf/{UPLINK}/promote_secondaries");
    world.cluster.node.place.netns().sysctl(&key, "1");
    change(&world, &[format!("addr del {old}/24 dev {UPLINK}")]);
    wait::until("the other address to be used", BOUND, || {
        let answer = outside.ask(&request).ok()?;
        (answer.seen.ip() == new).then_some(())
    });
}
