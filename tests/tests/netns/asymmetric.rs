//! Packets come in by one uplink, and the answers leave by another.

use lb_common::{Hook, Reason};
use lb_tests::{
    agent::Hooks,
    topology::{Addresses, Family},
    traffic::Protocol,
    world::{Frontend, World},
};

use crate::masquerade::only_remote;

/// A second link between the node and the host outside, by which the node sends
/// all that is for that host.
fn world(hooks: Hooks, routing: &str) -> World {
    let mut world = crate::stopped_world(hooks);
    let (node, outside) = (&world.cluster.node, &world.cluster.outside);
    let (node, outside) = (node.place.netns(), outside.place.netns());
    // As on any host with such routes: the source need not be behind the device.
    for device in ["all", "up0"] {
        node.sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), "2");
    }
    outside.sysctl("net/ipv4/conf/all/rp_filter", "0");
    let Addresses { v4, v6 } = Addresses::OUTSIDE;
    node.ip(&format!(
        "link add up1 type veth peer name eth2 netns {}\n\
         addr add 192.168.53.1/24 dev up1\n\
         addr add fd00:53::1/64 dev up1 nodad\n\
         link set up1 up\n",
        outside.name(),
    ));
    outside.ip("addr add 192.168.53.2/24 dev eth2\n\
         addr add fd00:53::2/64 dev eth2 nodad\n\
         link set eth2 up\n");
    node.ip(&format!(
        "route add {v4}/32 via 192.168.53.2 dev up1\n\
         route add {v6}/128 via fd00:53::2 dev up1\n"
    ));
    for (netns, device) in [(node, "up1"), (outside, "eth2")] {
        netns.output("ethtool", &["-K", device, "tx", "off"]);
    }
    let flags = ["--uplink=up1".to_owned(), format!("--routing={routing}")];
    world.agent.flags.extend(flags);
    world.agent.start();
    world
}

/// Packets that a device of the node has sent.
fn sent_by(world: &World, device: &str) -> u64 {
    let netns = world.cluster.node.place.netns();
    let text = netns.output("ip", &["-s", "-j", "link", "show", device]);
    let links: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let count = links[0]["stats64"]["tx"]["packets"].as_u64();
    count.unwrap_or_else(|| panic!("{device}: {text}"))
}

#[test]
fn answers_by_another_uplink_are_from_the_frontend() {
    for (hooks, routing) in [
        (Hooks::ALL, "kernel"),
        (Hooks::TC, "kernel"),
        (Hooks::CLSACT, "kernel"),
        (Hooks::ALL, "bypass"),
        (Hooks::TC, "bypass"),
    ] {
        let world = world(hooks, routing);
        // None twice: a flow stays what it was opened as.
        let mut ports = 42_000..;
        for remote in [false, true] {
            if remote {
                only_remote(&world, "pod-2", 6);
            }
            let before = sent_by(&world, "up1");
            for family in Family::ALL {
                for (protocol, size) in [(Protocol::Tcp, 20_000), (Protocol::Udp, 1300)] {
                    let request = world.request(Frontend::NodePort, family, protocol);
                    let request = request.from_port(ports.next().expect("no end"));
                    let answer = world.cluster.outside.ask(&request.clone().size(size));
                    let answer = answer.unwrap_or_else(|failure| {
                        panic!("{hooks:?}, {routing}, {request:?}, remote: {remote}: {failure:?}")
                    });
                    let to = world.frontend(Frontend::NodePort, family, protocol);
                    assert_eq!(answer.from, to);
                    let is_kept = answer.seen.ip() == Addresses::OUTSIDE.ip(family);
                    assert_eq!(is_kept, !remote, "{answer:?}");
                }
            }
            assert!(sent_by(&world, "up1") > before, "the answers went by up0");
        }
        let status = world.agent.status();
        assert!(status.count(Hook::TcEgress, Reason::Reply) > 0);
    }
}
