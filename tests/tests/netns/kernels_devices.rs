//! Uplinks that are a VLAN or a bond, and a pod in a VLAN: the kernels of the
//! matrix have such devices, and the one that runs the other tests may not.

use std::{process::Command, time::Duration};

use lb_tests::{
    agent::Hooks,
    topology::{Addresses, Family, Host, UPLINK},
    traffic::{Protocol, Request},
    world::{Frontend, PODS, World},
};

use crate::{
    devices_kinds::{PROTOCOLS, ask, serve_outside},
    masquerade::only_remote,
};

/// How long a bond may take to use its other device.
const FAILOVER: Duration = Duration::from_secs(10);

/// Makes a device in the namespace of a host; says so where the kernel has no
/// such kind.
fn is_made(host: &Host, device: &str) -> bool {
    let words: Vec<_> = device.split(' ').collect();
    let add = || {
        Command::new("ip")
            .args(["link", "add"])
            .args(&words)
            .output()
    };
    let output = host
        .place
        .netns()
        .within(add)
        .expect("iproute2 is installed");
    let complaint = String::from_utf8_lossy(&output.stderr);
    let is_unknown = ["Unknown device type", "not supported"]
        .iter()
        .any(|words| complaint.contains(words));
    assert!(
        output.status.success() || is_unknown,
        "{device}: {complaint}"
    );
    if is_unknown {
        println!("skipped: {device}: {complaint}");
    }
    !is_unknown
}

/// Both ends of the uplink, by the names of their devices.
fn ends(world: &World) -> [(&Host, &'static str); 2] {
    let cluster = &world.cluster;
    [(&cluster.node, UPLINK), (&cluster.outside, "eth0")]
}

/// Gives both ends of the uplink another name, and takes their addresses.
fn put_below(world: &World, name: &str) {
    for (host, device) in ends(world) {
        host.place.netns().ip(&format!(
            "link set {device} down\n\
             addr flush dev {device}\n\
             link set {device} name {name}\n\
             link set {name} up\n"
        ));
    }
}

/// Makes the uplink a VLAN of what it was.
fn put_in_a_vlan(world: &World) -> bool {
    put_below(world, "below");
    let mut ends = ends(world).into_iter();
    let are_made = ends
        .all(|(host, device)| is_made(host, &format!("link below name {device} type vlan id 7")));
    if are_made {
        world.cluster.address_uplink();
    }
    are_made
}

/// Makes the uplink a bond of what it was and of another link.
fn put_in_a_bond(world: &World) -> bool {
    put_below(world, "below");
    let (node, outside) = (&world.cluster.node, &world.cluster.outside);
    node.place.netns().ip(&format!(
        "link add second type veth peer name second netns {}\n",
        outside.place.netns().name()
    ));
    for (host, device) in ends(world) {
        if !is_made(
            host,
            &format!("{device} type bond mode active-backup miimon 20"),
        ) {
            return false;
        }
        let netns = host.place.netns();
        netns.output("ethtool", &["-K", "second", "tx", "off"]);
        for member in ["below", "second"] {
            netns.ip(&format!(
                "link set {member} down\n\
                 link set {member} master {device}\n\
                 link set {member} up\n"
            ));
        }
    }
    world.cluster.address_uplink();
    true
}

/// A client outside and a pod are served, by pods here and elsewhere.
fn assert_served(world: &World) {
    let (outside, pod) = (&world.cluster.outside, &world.cluster.client.host);
    // None twice: a flow stays what it was opened as.
    let mut ports = 42_000..;
    for remote in [false, true] {
        if remote {
            only_remote(world, "pod-2", 6);
        } else {
            world.put_endpoints(&PODS);
            world.agent.await_services("all endpoints", |services| {
                let mut frontends = services.iter().flat_map(|service| &service.frontends);
                frontends.all(|frontend| frontend.backends.len() == PODS.len())
            });
        }
        for family in Family::ALL {
            for (protocol, size) in [(Protocol::Tcp, 20_000), (Protocol::Udp, 1300)] {
                for (client, kind) in [
                    (outside, Frontend::NodePort),
                    (outside, Frontend::ClusterIp),
                    (pod, Frontend::ClusterIp),
                ] {
                    let request = world.request(kind, family, protocol).size(size);
                    let request = request.from_port(ports.next().expect("no end"));
                    // A link comes up a moment after it was told to.
                    let answer = client.await_answer(&request, FAILOVER);
                    let answer = answer.unwrap_or_else(|failure| panic!("{request:?}: {failure}"));
                    assert_eq!(answer.from, request.to);
                    let is_masqueraded = remote && client.addresses == outside.addresses;
                    let source = if is_masqueraded {
                        Addresses::NODE
                    } else {
                        client.addresses
                    };
                    assert_eq!(answer.seen.ip(), source.ip(family), "{request:?}");
                }
            }
        }
    }
    let devices = world.agent.status().devices;
    let mut uplinks = devices
        .iter()
        .filter(|device| device.role.as_deref() == Some("uplink"));
    let uplink = uplinks.next().expect("an uplink");
    assert_eq!(
        (uplink.name.as_deref(), uplinks.next().is_some()),
        (Some(UPLINK), false)
    );
    assert!(
        uplink.tc_ingress.is_some() && uplink.tc_egress.is_some(),
        "{uplink:?}"
    );
}

#[test]
fn an_uplink_that_is_a_vlan() {
    for hooks in [Hooks::ALL, Hooks::TC] {
        let mut world = crate::stopped_world(hooks);
        if !put_in_a_vlan(&world) {
            return;
        }
        world.agent.start();
        assert_served(&world);
    }
}

/// The device below sees them with their tag beside the frame, which would go with
/// them to the pod.
#[test]
fn bypass_leaves_frames_of_a_vlan_to_its_device() {
    let mut world = crate::stopped_world(Hooks::TC);
    if !put_in_a_vlan(&world) {
        return;
    }
    let flags = ["--uplink=below", "--routing=bypass"].map(str::to_owned);
    world.agent.flags.extend(flags);
    world.agent.start();
    for family in Family::ALL {
        for protocol in PROTOCOLS {
            let request = world.request(Frontend::NodePort, family, protocol);
            let answer = world.cluster.outside.await_answer(&request, FAILOVER);
            answer.unwrap_or_else(|failure| panic!("{request:?}: {failure}"));
        }
    }
}

/// And goes on by the other link when one goes.
#[test]
fn an_uplink_that_is_a_bond() {
    let mut world = crate::stopped_world(Hooks::ALL);
    if !put_in_a_bond(&world) {
        return;
    }
    world.agent.start();
    assert_served(&world);
    for (host, _) in ends(&world) {
        host.place.netns().ip("link set below down\n");
    }
    assert_served(&world);
}

/// Such pods, as the CNI plugin `vlan` makes them, send past the node's stack.
#[test]
fn a_pod_in_a_vlan_is_served_at_its_sockets() {
    let mut world = crate::stopped_world(Hooks::ALL);
    let (node, outside) = (&world.cluster.node, &world.cluster.outside);
    if !is_made(outside, "link eth0 name vlan7 type vlan id 7") {
        return;
    }
    outside
        .place
        .netns()
        .ip("addr add 192.168.57.2/24 dev vlan7\n\
         addr add fd00:57::2/64 dev vlan7 nodad\n\
         link set vlan7 up\n");
    let pod = world.cluster.unplugged_pod("vlan", 40);
    let netns = pod.host.place.netns();
    assert!(is_made(
        node,
        &format!("link {UPLINK} name vlan7 type vlan id 7")
    ));
    node.place.netns().ip(&format!(
        "link set vlan7 netns {} name eth0\n",
        netns.name()
    ));
    netns.ip("addr add 192.168.57.40/24 dev eth0\n\
         addr add fd00:57::40/64 dev eth0 nodad\n\
         link set eth0 up\n");
    let _server = serve_outside(&world, ["192.168.57.2", "fd00:57::2"]);
    world.agent.start();
    for family in Family::ALL {
        for protocol in PROTOCOLS {
            let request: Request = world.request(Frontend::ClusterIp, family, protocol);
            let answer = ask(&pod.host, &request);
            assert_eq!(answer.from, request.to);
        }
    }
}
