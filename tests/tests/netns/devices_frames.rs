//! Large frames: jumbo MTUs, MTUs that change under traffic, and the packets of
//! many frames that a kernel hands to its devices.

use std::{collections::BTreeSet, net::IpAddr};

use lb_common::{Hook, Reason};
use lb_tests::{
    agent::Hooks,
    netns::Netns,
    topology::{Cluster, Family, UPLINK},
    traffic::{Outcome, Protocol},
    world::{Frontend, World},
};
use serde::Deserialize;
use serde_json::Value;

use crate::trace::{ended, listening};

/// Every device of the cluster, both ends of each.
fn devices(cluster: &Cluster) -> Vec<(&Netns, &str)> {
    let node = cluster.node.place.netns();
    let mut ends = vec![(node, UPLINK), (cluster.outside.place.netns(), "eth0")];
    for pod in cluster.pods.iter().chain([&cluster.client]) {
        ends.push((node, &pod.device));
        ends.push((pod.host.place.netns(), "eth0"));
    }
    ends
}

/// Gives every device an MTU.
fn set_mtu(cluster: &Cluster, mtu: u32) {
    for (netns, device) in devices(cluster) {
        netns.ip(&format!("link set {device} mtu {mtu}\n"));
    }
}

/// Sends bodies of some sizes from outside and from a pod, which must arrive
/// whole.
fn exchange(world: &World, sizes: &[(Protocol, usize)]) {
    let clients = [&world.cluster.outside, &world.cluster.client.host];
    for family in Family::ALL {
        for (protocol, size) in sizes {
            for (client, kind) in clients
                .into_iter()
                .zip([Frontend::NodePort, Frontend::ClusterIp])
            {
                let request = world.request(kind, family, *protocol).size(*size);
                let answer = client.ask(&request);
                let answer = answer
                    .unwrap_or_else(|failure| panic!("{size} bytes to {}: {failure}", request.to));
                assert_eq!(answer.from, request.to);
            }
        }
    }
}

/// How XDP is on the uplink, as `klb status` has it.
fn xdp(world: &World) -> Option<String> {
    let devices = world.agent.status().devices;
    let mut devices = devices.into_iter();
    let uplink = devices.find(|device| device.name.as_deref() == Some(UPLINK));
    uplink.expect("the uplink").xdp
}

#[test]
fn jumbo_frames_pass_native_xdp() {
    let mut world = crate::stopped_world(Hooks::XDP);
    set_mtu(&world.cluster, 9000);
    world.agent.start();
    assert_eq!(xdp(&world).as_deref(), Some("native"));
    exchange(&world, &[(Protocol::Tcp, 200_000), (Protocol::Udp, 8900)]);
    let status = world.agent.status();
    assert_eq!(status.count(Hook::Xdp, Reason::NewFlow), 4);
}

/// A driver asks the XDP program before it takes a larger MTU.
#[test]
fn an_mtu_changes_under_traffic() {
    let world = crate::world(Hooks::XDP);
    let request = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    let stream = world.cluster.outside.stream(&request.size(20_000), true);
    for mtu in [9000, 1400, 1500] {
        stream.await_more(5);
        set_mtu(&world.cluster, mtu);
        assert_eq!(xdp(&world).as_deref(), Some("native"), "at {mtu}");
    }
    stream.await_more(5);
    for report in stream.stop() {
        if let Outcome::Failure(failure) = report.outcome {
            panic!("{failure}");
        }
    }
}

/// TCP hands 64 KiB at once to a device that can cut them, and gets as much from
/// one that joins frames; with checksums left to devices and without.
#[test]
fn packets_of_many_frames_pass_tc() {
    for hooks in [Hooks::TC, Hooks::CLSACT, Hooks::XDP_GENERIC] {
        for offloads in [true, false] {
            let world = crate::world_with_offloads(hooks, offloads);
            exchange(&world, &[(Protocol::Tcp, 4_000_000), (Protocol::Udp, 1400)]);
            let size = packet_size(&world);
            assert_eq!(size > 1514, offloads, "{size} bytes a packet");
        }
    }
}

/// TCP hands more than 64 KiB at once to a device that takes it ("BIG TCP", Linux 5.19,
/// and 6.3 for IPv4): no IP header can tell such a length, and each has 0 in its place.
#[test]
fn packets_longer_than_their_header_can_tell_pass_tc() {
    for hooks in [Hooks::TC, Hooks::CLSACT] {
        let world = crate::world_with_offloads(hooks, true);
        set_longest(&world.cluster, 200_000);
        let flags = ["--reason", "forward", "--hook", "tc-ingress", "-o", "json"];
        let trace = listening(&world.agent, &flags);
        exchange(&world, &[(Protocol::Tcp, 4_000_000)]);
        let (lines, _) = ended(trace);
        let events = lines.iter().map(|line| {
            let event: Value = serde_json::from_str(line).expect("JSON");
            let client: IpAddr = serde_json::from_value(event["before"]["src"]["address"].clone())
                .expect("an address");
            (client, event["length"].as_u64().expect("a length"))
        });
        let long: BTreeSet<_> = events
            .filter(|(_, length)| *length > u16::MAX.into())
            .map(|(client, _)| client)
            .collect();
        let clients = [&world.cluster.outside, &world.cluster.client.host];
        let all = Family::ALL
            .into_iter()
            .flat_map(|family| clients.map(|client| client.addresses.ip(family)));
        assert_eq!(long, all.collect(), "who sends long packets");
    }
}

/// Has the kernel make longer packets for every device of the cluster, at both ends.
fn set_longest(cluster: &Cluster, bytes: u32) {
    for (netns, device) in devices(cluster) {
        netns.ip(&format!(
            "link set {device} gso_max_size {bytes} gro_max_size {bytes}\n"
        ));
        netns.set_longest_ipv4(device, bytes);
    }
}

/// Bytes of a packet from the client pod, on average.
fn packet_size(world: &World) -> u64 {
    #[derive(Deserialize)]
    struct Link {
        stats64: Stats,
    }
    #[derive(Deserialize)]
    struct Stats {
        rx: Received,
    }
    #[derive(Deserialize)]
    struct Received {
        bytes: u64,
        packets: u64,
    }
    let device = &world.cluster.client.device;
    let node = world.cluster.node.place.netns();
    let text = node.output("ip", &["-s", "-j", "link", "show", "dev", device]);
    let links: Vec<Link> = serde_json::from_str(&text).expect("JSON of ip");
    let Received { bytes, packets } = links[0].stats64.rx;
    bytes / packets
}
