//! The ports that stand for masqueraded clients, and the node's own sockets.

use std::net::UdpSocket;

use lb_tests::{agent::Hooks, world::World};

const SYSCTL: &str = "net.ipv4.ip_local_reserved_ports";

pub(crate) fn reserved(world: &World) -> String {
    let node = world.cluster.node.place.netns();
    node.output("sysctl", &["-n", SYSCTL]).trim().to_owned()
}

#[test]
fn are_the_kernels_to_give_to_nobody_until_cleanup() {
    let mut world = crate::stopped_world(Hooks::TC);
    let node = world.cluster.node.clone();
    node.place
        .netns()
        .sysctl("net/ipv4/ip_local_reserved_ports", "8080,40005");
    let flag = "--masquerade-ports=40000-40010";
    world.agent.flags.push(flag.to_owned());
    world.agent.start();
    assert_eq!(reserved(&world), "8080,40000-40010");
    world.agent.kill();
    assert_eq!(reserved(&world), "8080,40000-40010");
    world.agent.flags.retain(|other| other != flag);
    world.agent.start();
    assert_eq!(reserved(&world), "8080,40005,50000-65535");
    world.agent.terminate();
    let said = world.agent.klb(&["cleanup"]);
    assert!(said.status.success(), "{said:?}");
    assert_eq!(reserved(&world), "8080,40005");
}

#[test]
fn that_a_process_has_taken_are_named() {
    let world = crate::world(Hooks::TC);
    let port_warnings = || {
        let mut warnings = world.agent.status().warnings;
        warnings.retain(|warning| warning.contains("ports"));
        warnings
    };
    assert_eq!(port_warnings(), [""; 0]);
    let node = world.cluster.node.place.netns();
    let socket = node.within(|| UdpSocket::bind("0.0.0.0:50123").expect("a free port"));
    let warnings = port_warnings();
    assert!(
        warnings
            .iter()
            .any(|warning| warning.contains(":50123/UDP")),
        "{warnings:?}"
    );
    drop(socket);
    assert_eq!(port_warnings(), [""; 0]);
    node.sysctl("net/ipv4/ip_local_reserved_ports", "50000-60000");
    let warnings = port_warnings();
    assert!(
        warnings.iter().any(|warning| warning.contains(SYSCTL)),
        "{warnings:?}"
    );
}
