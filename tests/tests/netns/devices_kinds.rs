//! Pods and nodes behind devices of other kinds than a routed veth.

use lb_common::{Hook, Reason};
use lb_tests::{
    agent::Hooks,
    helper::{Helper, await_server},
    manifests::{Endpoints, NODE},
    process::Process,
    topology::{Addresses, Cluster, Family, Host, Pod, UPLINK},
    traffic::{Answer, Protocol, Request},
    world::{ENDPOINTS_FILE, Frontend, World},
};

pub(crate) const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

pub(crate) fn ask(host: &Host, request: &Request) -> Answer {
    let answer = host.ask(request);
    answer.unwrap_or_else(|failure| panic!("{}: {failure}", request.to))
}

/// Hangs every pod on a bridge of the node's, as the CNI plugin `bridge` does.
fn put_on_a_bridge(cluster: &Cluster) {
    let node = cluster.node.place.netns();
    node.ip(
        "link add br0 address 02:00:00:00:00:01 type bridge forward_delay 0 mcast_snooping 0\n\
         addr add 10.244.0.1/24 dev br0\n\
         addr add fd00:10:244::1/64 dev br0 nodad\n\
         link set br0 up\n",
    );
    for (number, pod) in cluster.pods.iter().chain([&cluster.client]).enumerate() {
        let Pod { device, host, .. } = pod;
        let Addresses { v4, v6 } = host.addresses;
        node.ip(&format!(
            "route del {v4}/32 dev {device}\n\
             route del {v6}/128 dev {device}\n\
             link set {device} address 02:00:00:00:01:{number:02x} master br0\n"
        ));
        host.place.netns().ip(&format!(
            "addr add {v4}/24 dev eth0\n\
             addr del {v6}/128 dev eth0\n\
             addr add {v6}/64 dev eth0 nodad\n\
             route replace default via 10.244.0.1\n\
             route replace default via fd00:10:244::1\n"
        ));
    }
}

/// The answer of one pod to another never reaches the bridge device: programs
/// are on its ports.
#[test]
fn pods_on_a_bridge() {
    for hooks in [Hooks::TC, Hooks::CLSACT, Hooks::ALL] {
        let mut world = crate::stopped_world(hooks);
        put_on_a_bridge(&world.cluster);
        world.agent.start();
        let (outside, pod) = (&world.cluster.outside, &world.cluster.client.host);
        for family in Family::ALL {
            for protocol in PROTOCOLS {
                for (client, kind) in [
                    (outside, Frontend::NodePort),
                    (pod, Frontend::ClusterIp),
                    (&pod.without_cgroup(), Frontend::ClusterIp),
                ] {
                    let request = world.request(kind, family, protocol);
                    let answer = ask(client, &request);
                    assert_eq!(answer.from, request.to, "{hooks:?}");
                    assert_eq!(answer.seen.ip(), client.addresses.ip(family), "{hooks:?}");
                }
            }
        }
        // Some of these choose the asking pod itself: all sixty miss it once in
        // 10^10 runs.
        let pod = world.cluster.pod("pod-1").host.without_cgroup();
        let answers = pod.ask_often(&world.any_request(), 60).into_iter();
        let names: Vec<_> = answers
            .map(|answer| answer.expect("an answer").name)
            .collect();
        assert!(names.iter().any(|name| name == "pod-1"), "{names:?}");
        let devices = world.agent.status().devices;
        let mut names = devices.iter().filter_map(|device| device.name.as_deref());
        assert!(names.all(|name| name != "br0"));
    }
}

/// Makes the host outside another node as well, to whose pods an overlay leads,
/// as with flannel; returns the server of its one pod, which has the address of
/// that end.
fn join_by_vxlan(world: &World) -> Process {
    let (here, there) = (Addresses::NODE, Addresses::OUTSIDE);
    let ends = [
        (&world.cluster.node, here, there, 0, 1, UPLINK),
        (&world.cluster.outside, there, here, 1, 0, "eth0"),
    ];
    for (host, local, remote, own, other, device) in ends {
        let (local, remote) = (local.v4, remote.v4);
        let netns = host.place.netns();
        if own == 1 {
            // The gateway below must not be reachable by any other device.
            netns.ip("route del fd00:10:244::/64\n");
        }
        netns.ip(&format!(
            "link add vx0 type vxlan id 42 local {local} remote {remote} dstport 4789 dev {device}\n\
             addr add 10.244.{own}.250/32 dev vx0\n\
             addr add fd00:10:244:{own}::250/128 dev vx0 nodad\n\
             link set vx0 up\n\
             route replace 10.244.{other}.0/24 via 10.244.{other}.250 dev vx0 onlink\n\
             route replace fd00:10:244:{other}::/64 via fd00:10:244:{other}::250 dev vx0 onlink\n"
        ));
    }
    serve_outside(world, ["10.244.1.250", "fd00:10:244:1::250"])
}

/// Starts a server in the host outside and makes it the only endpoint, on
/// another node.
pub(crate) fn serve_outside(world: &World, [v4, v6]: [&str; 2]) -> Process {
    let outside = &world.cluster.outside.place;
    let mut server = Helper::new(crate::helper()).serve(outside, "remote");
    await_server(&mut server);
    let addresses = Addresses {
        v4: v4.parse().expect("IPv4"),
        v6: v6.parse().expect("IPv6"),
    };
    let endpoints = Endpoints {
        service: &world.service,
        pods: vec![("remote".to_owned(), addresses)],
    };
    let node = format!("nodeName: {NODE}");
    let manifest = endpoints.to_string().replace(&node, "nodeName: node-2");
    world.agent.manifests.put(ENDPOINTS_FILE, &manifest);
    server
}

/// What is masqueraded gets the overlay's address, for which the other node has
/// a route; and packets as large as the underlay's are too large for it.
#[test]
fn a_backend_behind_vxlan() {
    for hooks in [Hooks::TC, Hooks::CLSACT, Hooks::ALL] {
        let mut world = crate::stopped_world(hooks);
        let _server = join_by_vxlan(&world);
        world.agent.start();
        let (outside, pod) = (
            &world.cluster.outside,
            world.cluster.client.host.without_cgroup(),
        );
        for family in Family::ALL {
            let masqueraded = match family {
                Family::V4 => "10.244.0.250",
                Family::V6 => "fd00:10:244::250",
            };
            let pods = pod.addresses.ip(family).to_string();
            for protocol in PROTOCOLS {
                for (client, kind, seen) in [
                    (outside, Frontend::NodePort, masqueraded),
                    (&pod, Frontend::ClusterIp, &pods),
                ] {
                    let size = match protocol {
                        Protocol::Tcp => 100_000,
                        Protocol::Udp => 1000,
                    };
                    let request = world.request(kind, family, protocol).size(size);
                    let answer = ask(client, &request);
                    assert_eq!(answer.from, request.to, "{hooks:?}");
                    assert_eq!(answer.seen.ip().to_string(), seen, "{hooks:?}");
                }
            }
        }
        let status = world.agent.status();
        let masqueraded = status.count(Hook::TcIngress, Reason::NewMasqueradedFlow);
        assert_eq!(masqueraded, 4, "{:?}", status.counters);
        let mut devices = status.devices.iter();
        let overlay = devices.find(|device| device.name.as_deref() == Some("vx0"));
        let overlay = overlay.expect("programs on the overlay");
        assert_eq!(
            (overlay.role.as_deref(), &overlay.xdp),
            (Some("overlay"), &None)
        );
    }
}

/// Packets of such a pod go out past the node's stack: it is served at its
/// sockets.
#[test]
fn a_macvlan_pod_is_served_at_its_sockets() {
    let mut world = crate::stopped_world(Hooks::ALL);
    let _server = serve_outside(&world, ["192.168.50.2", "fd00:50::2"]);
    world.agent.start();
    let pod = world.cluster.unplugged_pod("macvlan", 40);
    let own = Addresses {
        v4: "192.168.50.40".parse().expect("IPv4"),
        v6: "fd00:50::40".parse().expect("IPv6"),
    };
    let netns = pod.host.place.netns();
    let name = netns.name();
    world.cluster.node.place.netns().ip(&format!(
        "link add link {UPLINK} name mv0 type macvlan mode bridge\n\
         link set mv0 netns {name} name eth0\n"
    ));
    let Addresses { v4, v6 } = own;
    netns.ip(&format!(
        "addr add {v4}/24 dev eth0\n\
         addr add {v6}/64 dev eth0 nodad\n\
         link set eth0 up\n"
    ));
    for family in Family::ALL {
        for protocol in PROTOCOLS {
            let request = world.request(Frontend::ClusterIp, family, protocol);
            let answer = ask(&pod.host, &request);
            assert_eq!(answer.from, request.to);
            assert_eq!(answer.seen.ip(), own.ip(family));
        }
    }
}
