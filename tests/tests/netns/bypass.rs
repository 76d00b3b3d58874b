//! `--routing bypass`: what the route lookup knows goes straight to the next
//! hop's device.

use std::{net::SocketAddr, time::Duration};

use lb_common::{
    Hook, Reason,
    flow::{TCP, UDP},
    node::{CONFIG_BYPASS, Config, DEVICE_PEER, DEVICE_POD, DEVICE_XDP, Device},
};
use lb_tests::{
    agent::Hooks,
    packet::{Packet, flags, read},
    private::{in_private_namespace, ip},
    program::{Backend, Datapath, NODE4, NODE6, TC_GO_ON, TC_REDIRECT, XDP_PASS, XDP_REDIRECT},
    topology::{Family, Host},
    traffic::Protocol,
    wait,
    world::{Frontend, World as Live},
};

use crate::two_nodes::{FAR, TwoNodes};

/// The addresses of one family and one protocol, by role.
#[derive(Clone, Copy, Debug)]
struct World {
    protocol: u8,
    client: SocketAddr,
    frontend: SocketAddr,
    other_frontend: SocketAddr,
    backend: SocketAddr,
    stranger: SocketAddr,
}

fn worlds() -> Vec<World> {
    let parse = |text: &str| text.parse().expect("an address");
    let world =
        |protocol, [client, frontend, other_frontend, backend, stranger]: [&str; 5]| World {
            protocol,
            client: parse(client),
            frontend: parse(frontend),
            other_frontend: parse(other_frontend),
            backend: parse(backend),
            stranger: parse(stranger),
        };
    let v4 = [
        "192.168.50.2:40000",
        "10.96.0.1:80",
        "192.168.50.1:30080",
        "10.244.0.5:3000",
        "198.51.100.7:443",
    ];
    let v6 = [
        "[fd00:50::2]:40000",
        "[fd00:10:96::1]:80",
        "[fd00:50::1]:30080",
        "[fd00:10:244::5]:3000",
        "[2001:db8::7]:443",
    ];
    [TCP, UDP]
        .into_iter()
        .flat_map(|protocol| [world(protocol, v4), world(protocol, v6)])
        .collect()
}

impl World {
    fn first(&self, to: SocketAddr) -> Packet {
        Packet::first(self.protocol, self.client, to)
    }

    /// The backend's answer to [`Self::first`].
    fn answer(&self) -> Packet {
        if self.protocol == TCP {
            let answer = flags::SYN | flags::ACK;
            Packet::tcp(self.backend, self.client, answer).numbers(5000, 1001)
        } else {
            Packet::udp(self.backend, self.client)
        }
    }
}

const fn local(addr: SocketAddr) -> Backend {
    Backend { addr, local: true }
}

/// Runs in a network namespace whose loopback device, where test runs come in,
/// forwards: to the backends by a device `out0` whose neighbours are known, and
/// to the client by `in0` whose neighbour is not.
fn in_a_router(body: impl FnOnce() + Send + 'static) {
    in_private_namespace(|| {
        ip("link set lo up");
        for name in ["out0", "in0"] {
            ip(&format!("link add {name} type veth peer name {name}-peer"));
            ip(&format!("link set {name} address 02:00:00:00:01:01 up"));
            ip(&format!("link set {name}-peer up"));
        }
        for (network, neighbour) in [
            ("10.244.0.0/24", "10.244.0.5"),
            ("fd00:10:244::/64", "fd00:10:244::5"),
        ] {
            ip(&format!("route add {network} dev out0"));
            ip(&format!(
                "neigh add {neighbour} lladdr 02:00:00:00:02:02 dev out0 nud permanent"
            ));
        }
        ip("route add 192.168.50.0/24 dev in0");
        ip("route add fd00:50::/64 dev in0");
        for path in [
            "ipv4/conf/all",
            "ipv4/conf/lo",
            "ipv6/conf/all",
            "ipv6/conf/lo",
        ] {
            let path = format!("/proc/sys/net/{path}/forwarding");
            std::fs::write(path, "1").expect("a sysctl of this namespace");
        }
        body();
    });
}

fn serve(world: &World) -> Datapath {
    let mut datapath = Datapath::new();
    datapath.serve(world.protocol, world.frontend, &[local(world.backend)]);
    let config = Config {
        flags: CONFIG_BYPASS,
        ..datapath.config()
    };
    datapath.configure(&config);
    datapath
}

/// The client's first packet, at the last router that it may pass.
fn last_hop(world: &World) -> Vec<u8> {
    let mut frame = world.first(world.frontend).bytes();
    if world.client.is_ipv4() {
        frame[22] = 1;
        // The header's checksum, for 63 less in the high byte of a word.
        let sum = u32::from(u16::from_be_bytes([frame[24], frame[25]])) + 0x3f00;
        let sum = (sum & 0xffff) + (sum >> 16);
        frame[24..26].copy_from_slice(&(sum as u16).to_be_bytes());
    } else {
        frame[21] = 1;
    }
    frame
}

/// Where time to live or hop limit stands.
fn hops(world: &World, frame: &[u8]) -> u8 {
    frame[if world.client.is_ipv4() { 22 } else { 21 }]
}

#[test]
fn packets_go_on_with_the_next_hops_address_and_one_hop_less() {
    in_a_router(|| {
        for world in worlds() {
            let mut datapath = serve(&world);
            for reason in [Reason::NewFlow, Reason::Forward] {
                let packet = world.first(world.frontend);
                let outcome = datapath.run(Hook::TcIngress, &packet.bytes());
                assert_eq!((outcome.reason, outcome.action), (reason, TC_REDIRECT));
                let seen = read(&outcome.frame);
                assert_eq!((seen.src, seen.dst), (world.client, world.backend));
                assert_eq!(outcome.frame[..6], [2, 0, 0, 0, 2, 2]);
                assert_eq!(outcome.frame[6..12], [2, 0, 0, 0, 1, 1]);
                assert_eq!(hops(&world, &outcome.frame), 63);
            }
        }
    });
}

#[test]
fn a_pods_end_of_a_device_is_handed_the_packet() {
    in_a_router(|| {
        let index = nix::net::if_::if_nametoindex("out0").expect("made above");
        for world in worlds() {
            let mut datapath = serve(&world);
            let flags = DEVICE_POD | DEVICE_PEER;
            let device = Device {
                flags,
                ..Device::default()
            };
            datapath.set_device(index, device);
            let outcome = datapath.run(Hook::TcIngress, &world.first(world.frontend).bytes());
            assert_eq!(outcome.action, TC_REDIRECT);
        }
    });
}

/// Its device has no hook behind the one where the answer comes in.
#[test]
fn an_answer_to_a_pod_is_translated_where_it_comes_in() {
    in_a_router(|| {
        let index = nix::net::if_::if_nametoindex("in0").expect("made above");
        for neighbour in ["192.168.50.2", "fd00:50::2"] {
            ip(&format!(
                "neigh add {neighbour} lladdr 02:00:00:00:03:03 dev in0 nud permanent"
            ));
        }
        for world in worlds() {
            let mut datapath = serve(&world);
            let device = Device {
                flags: DEVICE_POD | DEVICE_PEER,
                ..Device::default()
            };
            datapath.set_device(index, device);
            let first = world.first(world.frontend);
            datapath.run(Hook::TcIngress, &first.bytes());
            let outcome = datapath.run(Hook::TcIngress, &world.answer().bytes());
            let what = (outcome.reason, outcome.action);
            assert_eq!(what, (Reason::TransitReply, TC_REDIRECT), "{world:?}");
            let seen = read(&outcome.frame);
            assert_eq!((seen.src, seen.dst), (world.frontend, world.client));
            assert_eq!(outcome.frame[..6], [2, 0, 0, 0, 3, 3]);
            assert_eq!(hops(&world, &outcome.frame), 63);
            // A connection that the backend alone remembers: not for the client.
            if world.protocol == TCP {
                let mut other = world;
                other.client.set_port(world.client.port() + 1);
                datapath.run(Hook::TcIngress, &other.first(other.frontend).bytes());
                let stale = Packet::tcp(other.backend, other.client, flags::ACK);
                let stale = stale.numbers(7, 8).payload([]);
                let outcome = datapath.run(Hook::TcIngress, &stale.bytes());
                assert_eq!(outcome.reason, Reason::PortTaken);
            }
        }
    });
}

#[test]
fn what_the_route_lookup_does_not_know_goes_up_the_stack() {
    in_a_router(|| {
        for world in worlds() {
            let mut datapath = serve(&world);
            // A router has to answer.
            let outcome = datapath.run(Hook::TcIngress, &last_hop(&world));
            assert_eq!(outcome.action, TC_GO_ON, "{world:?}");
            assert_eq!(read(&outcome.frame).dst, world.backend);
            assert_eq!(hops(&world, &outcome.frame), 1);
            // The client's neighbour is not known.
            let answer = world.answer().bytes();
            let outcome = datapath.run(Hook::TcIngress, &answer);
            assert_eq!((outcome.action, outcome.frame), (TC_GO_ON, answer));
            // No route.
            datapath.serve(
                world.protocol,
                world.other_frontend,
                &[local(world.stranger)],
            );
            let packet = Packet::first(world.protocol, world.client, world.other_frontend);
            let outcome = datapath.run(Hook::TcIngress, &packet.bytes());
            assert_eq!(outcome.action, TC_GO_ON);
            assert_eq!(hops(&world, &outcome.frame), 64);
        }
    });
}

/// The kernel is believed for a moment only.
#[test]
fn a_neighbour_that_changes_is_seen_soon() {
    in_a_router(|| {
        for world in worlds() {
            let mut datapath = serve(&world);
            let packet = world.first(world.frontend).bytes();
            let mut sent_to = || datapath.run(Hook::TcIngress, &packet).frame[..6].to_vec();
            assert_eq!(sent_to(), [2, 0, 0, 0, 2, 2]);
            let backend = world.backend.ip();
            let replace = |lladdr| {
                ip(&format!(
                    "neigh replace {backend} lladdr {lladdr} dev out0 nud permanent"
                ));
            };
            replace("02:00:00:00:04:04");
            let what = "packets go to the neighbour's new address";
            let is_there = || (sent_to() == [2, 0, 0, 0, 4, 4]).then_some(());
            wait::until(what, Duration::from_secs(10), is_there);
            replace("02:00:00:00:02:02");
        }
    });
}

/// That a small packet has a way says nothing of a large one.
#[test]
fn a_packet_that_is_too_large_for_a_known_way_goes_up_the_stack() {
    in_a_router(|| {
        ip("link set out0 mtu 1280");
        for (world, hook) in worlds()
            .into_iter()
            .flat_map(|world| [(world, Hook::TcIngress), (world, Hook::Xdp)])
        {
            let mut datapath = serve(&world);
            takes_from_xdp(&mut datapath, "out0");
            let small = world.first(world.frontend);
            let large = small.clone().payload([7; 1300]);
            let mut go = |packet: &Packet| datapath.run(hook, &packet.bytes()).action;
            let sent = if hook == Hook::Xdp {
                XDP_REDIRECT
            } else {
                TC_REDIRECT
            };
            assert_eq!(go(&small), sent, "{world:?}");
            let passed = if hook == Hook::Xdp {
                XDP_PASS
            } else {
                TC_GO_ON
            };
            assert_eq!(go(&large), passed, "{world:?}");
            assert_eq!(go(&small), sent, "{world:?}");
        }
    });
}

/// Has the datapath know that XDP can send frames to a device.
fn takes_from_xdp(datapath: &mut Datapath, name: &str) {
    let index = nix::net::if_::if_nametoindex(name).expect("there");
    let device = Device {
        flags: DEVICE_XDP,
        ..Device::default()
    };
    datapath.set_device(index, device);
}

/// The backend of the world, on another node.
fn serve_remote(world: &World) -> Datapath {
    let mut datapath = serve(world);
    let remote = Backend {
        addr: world.backend,
        local: false,
    };
    datapath.serve(world.protocol, world.frontend, &[remote]);
    datapath
}

/// At XDP no egress hook comes behind, so both translations are made at once.
#[test]
fn xdp_sends_to_a_remote_backend_and_back_by_itself() {
    in_a_router(|| {
        ip("neigh add 192.168.50.2 lladdr 02:00:00:00:03:03 dev in0 nud permanent");
        ip("neigh add fd00:50::2 lladdr 02:00:00:00:03:03 dev in0 nud permanent");
        for world in worlds() {
            let mut datapath = serve_remote(&world);
            for device in ["in0", "out0"] {
                takes_from_xdp(&mut datapath, device);
            }
            let packet = world.first(world.frontend);
            let outcome = datapath.run(Hook::Xdp, &packet.bytes());
            let what = (outcome.reason, outcome.action);
            assert_eq!(what, (Reason::NewMasqueradedFlow, XDP_REDIRECT));
            let sent = read(&outcome.frame);
            let node = if world.client.is_ipv4() {
                NODE4.into()
            } else {
                NODE6.into()
            };
            assert_eq!((sent.src.ip(), sent.dst), (node, world.backend));
            assert_eq!(outcome.frame[..6], [2, 0, 0, 0, 2, 2]);
            assert_eq!(hops(&world, &outcome.frame), 63);

            let mut answer = world.answer();
            answer.dst = sent.src;
            let outcome = datapath.run(Hook::Xdp, &answer.bytes());
            let what = (outcome.reason, outcome.action);
            assert_eq!(what, (Reason::Unmasqueraded, XDP_REDIRECT));
            let seen = read(&outcome.frame);
            assert_eq!((seen.src, seen.dst), (world.frontend, world.client));
            assert_eq!(outcome.frame[..6], [2, 0, 0, 0, 3, 3]);
        }
    });
}

/// A VXLAN or VLAN device, or a pod's veth: frames from XDP would be lost there.
#[test]
fn xdp_leaves_to_the_stack_what_goes_to_devices_without_xdp() {
    in_a_router(|| {
        for world in worlds() {
            let mut datapath = serve(&world);
            let outcome = datapath.run(Hook::Xdp, &world.first(world.frontend).bytes());
            assert_eq!(
                (outcome.reason, outcome.action),
                (Reason::NewFlow, XDP_PASS)
            );
            assert_eq!(read(&outcome.frame).dst, world.backend);
            assert_eq!(hops(&world, &outcome.frame), 64);
        }
    });
}

/// What the stack has to refuse, so that the sender is told, goes up as the stack
/// expects it: from the client, not from the node itself.
#[test]
fn xdp_leaves_to_the_stack_what_is_at_its_last_hop_or_too_large() {
    in_a_router(|| {
        ip("link set out0 mtu 1280");
        for world in worlds() {
            let last = last_hop(&world);
            let large = world.first(world.frontend).payload([7; 1300]).bytes();
            for frame in [last, large] {
                let mut datapath = serve_remote(&world);
                takes_from_xdp(&mut datapath, "out0");
                let outcome = datapath.run(Hook::Xdp, &frame);
                let what = (outcome.reason, outcome.action);
                assert_eq!(what, (Reason::NewMasqueradedFlow, XDP_PASS));
                let seen = read(&outcome.frame);
                assert_eq!((seen.src, seen.dst), (world.client, world.backend));
                assert_eq!(hops(&world, &outcome.frame), hops(&world, &frame));
            }
        }
    });
}

/// Datagrams that the node's stack has forwarded, of both families.
fn forwarded(node: &Host) -> u64 {
    node.place.netns().within(|| {
        let read = |name: &str| {
            std::fs::read_to_string(format!("/proc/thread-self/net/{name}"))
                .expect("the kernel counts")
        };
        let snmp = read("snmp");
        let mut lines = snmp.lines().filter(|line| line.starts_with("Ip: "));
        let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
        let place = names
            .split(' ')
            .position(|name| name == "ForwDatagrams")
            .expect("a column");
        let v4: u64 = values
            .split(' ')
            .nth(place)
            .and_then(|value| value.parse().ok())
            .expect("a number");
        let snmp6 = read("snmp6");
        let v6: u64 = snmp6
            .lines()
            .find_map(|line| line.strip_prefix("Ip6OutForwDatagrams"))
            .and_then(|value| value.trim().parse().ok())
            .expect("a number");
        v4 + v6
    })
}

/// Real connections, through a node whose stack sees next to nothing of them.
#[test]
fn connections_go_past_the_stack() {
    for hooks in [Hooks::TC, Hooks::CLSACT, Hooks::XDP] {
        let mut world = crate::stopped_world(hooks);
        world.agent.flags.push("--routing=bypass".to_owned());
        world.agent.start();
        for family in Family::ALL {
            for (frontend, client) in [
                (Frontend::NodePort, &world.cluster.outside),
                (Frontend::ClusterIp, &world.cluster.client.host),
            ] {
                let request = world.request(frontend, family, Protocol::Tcp);
                // The first packets find out the neighbours.
                for size in [1, 300_000] {
                    let before = forwarded(&world.cluster.node);
                    let answer = client.ask(&request.clone().size(size));
                    let answer = answer.unwrap_or_else(|failure| panic!("{hooks:?}: {failure}"));
                    assert_eq!(answer.from, world.frontend(frontend, family, Protocol::Tcp));
                    assert_eq!(answer.seen.ip(), client.addresses.ip(family));
                    let passed = forwarded(&world.cluster.node) - before;
                    // XDP leaves packets to pods to the stack: see below.
                    if size > 1 && hooks != Hooks::XDP {
                        assert!(passed < 20, "{hooks:?} {family}: {passed} packets");
                    }
                }
                let request = world.request(frontend, family, Protocol::Udp);
                let request = request.size(1300);
                client.ask(&request).expect("an answer");
                let before = forwarded(&world.cluster.node);
                client.ask(&request).expect("an answer");
                let passed = forwarded(&world.cluster.node) - before;
                // Of XDP the request.
                let most = u64::from(hooks == Hooks::XDP && frontend == Frontend::NodePort);
                assert_eq!(passed, most, "{hooks:?} {frontend:?} {family}: UDP");
            }
        }
    }
}

/// A veth takes frames from XDP while its other end polls. That can change at any
/// time, and what is sent to one that does not is lost.
#[test]
fn xdp_sends_to_pods_that_take_its_frames() {
    let mut world = crate::stopped_world(Hooks::XDP);
    world.agent.flags.push("--routing=bypass".to_owned());
    let poll = |world: &Live, state: &str| {
        for pod in &world.cluster.pods {
            let netns = pod.host.place.netns();
            netns.output("ethtool", &["-K", "eth0", "gro", state]);
        }
    };
    // Also what polls already when the agent comes.
    poll(&world, "on");
    world.agent.start();
    for state in ["on", "off", "on"] {
        poll(&world, state);
        for family in Family::ALL {
            let request = world.request(Frontend::NodePort, family, Protocol::Tcp);
            let request = request.size(300_000).timeout(Duration::from_secs(2));
            let what = format!("{family}: the stack forwards, with polling {state}");
            let is_so = || {
                let before = forwarded(&world.cluster.node);
                let answer = world.cluster.outside.ask(&request).ok()?;
                assert_eq!(answer.seen.ip(), world.cluster.outside.addresses.ip(family));
                let passes_stack = forwarded(&world.cluster.node) - before >= 20;
                (passes_stack == (state == "off")).then_some(())
            };
            wait::until(&what, Duration::from_secs(10), is_so);
        }
    }
}

/// A remote backend behind the device by which the client comes: XDP sends each
/// packet out where it came in, both ways.
#[test]
fn xdp_sends_back_by_the_wire_what_came_by_it() {
    for hooks in [Hooks::XDP, Hooks::XDP_GENERIC] {
        let nodes = TwoNodes::with_flags(hooks, FAR, &["--routing=bypass"]);
        let world = &nodes.world;
        let router = world.cluster.outside.place.netns();
        // A veth takes what its peer's XDP program sends back only if it has a
        // program of its own (`veth_xdp_flush`).
        let mut bystander = Datapath::new();
        router.within(|| bystander.attach(Hook::Xdp, "eth0"));
        for family in Family::ALL {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let request = world.request(Frontend::NodePort, family, protocol);
                // The first packets find out the neighbours.
                for size in [
                    1,
                    if protocol == Protocol::Tcp {
                        300_000
                    } else {
                        1300
                    },
                ] {
                    let before = forwarded(&world.cluster.node);
                    let request = request.clone().size(size);
                    let seen = nodes.ask(&world.cluster.outside, &request, FAR.0);
                    assert_eq!(seen, world.cluster.node.addresses.ip(family));
                    let passed = forwarded(&world.cluster.node) - before;
                    if size > 1 {
                        assert_eq!(passed, 0, "{hooks:?} {family} {protocol:?}");
                    }
                }
            }
        }
    }
}
