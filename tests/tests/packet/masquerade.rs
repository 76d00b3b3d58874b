//! Backends that must answer through this node: on another node, or the client
//! itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::{
    Hook, Reason,
    flow::TCP,
    node::{Config, DEVICE_POD, Device},
    service::{FRONTEND_LOCAL_POLICY, FrontendKind},
};
use lb_tests::{
    packet::{Packet, flags, read},
    program::{Backend, Datapath, MASQUERADE_PORTS, NODE4, NODE6},
};

use crate::world::{
    HERE, World, answered, dropped, local, sctp_worlds, tcp_worlds, translated, untouched, worlds,
};

const fn remote(addr: SocketAddr) -> Backend {
    Backend { addr, local: false }
}

fn node(world: &World) -> IpAddr {
    if world.client.is_ipv4() {
        NODE4.into()
    } else {
        NODE6.into()
    }
}

fn serve_remote(world: &World) -> Datapath {
    let mut datapath = Datapath::new();
    datapath.serve(world.protocol, world.frontend, &[remote(world.backend)]);
    datapath
}

/// What the backend sees, as the packet leaves: after ingress and egress.
fn sent(datapath: &mut Datapath, world: &World, client: SocketAddr) -> SocketAddr {
    let packet = Packet::first(world.protocol, client, world.frontend);
    let entered = datapath.run(Hook::TcIngress, &packet.bytes());
    assert_eq!(entered.reason, Reason::NewMasqueradedFlow);
    let left = datapath.run(Hook::TcEgress, &entered.frame);
    assert_eq!(left.reason, Reason::Masqueraded);
    let seen = read(&left.frame);
    assert_eq!(seen.dst, world.backend);
    seen.src
}

#[test]
fn there_and_back_through_both_translations() {
    for world in worlds().into_iter().chain(sctp_worlds()) {
        let mut datapath = serve_remote(&world);
        let source = sent(&mut datapath, &world, world.client);
        assert_eq!(source.ip(), node(&world));
        assert!(MASQUERADE_PORTS.contains(&source.port()), "{source}");
        let mut answer = world.answer(world.backend);
        answer.dst = source;
        for hook in [Hook::TcIngress, Hook::Xdp] {
            translated(
                &mut datapath,
                hook,
                &answer,
                Reason::Unmasqueraded,
                (world.backend, world.client),
            );
        }
        answered(&mut datapath, &world);
        // The hooks that the packets pass in between leave them alone.
        let between = world.answer(world.backend).bytes();
        let passing = datapath.run(Hook::TcIngress, &between);
        assert_eq!(passing.frame, between);
        assert_eq!(datapath.flow_count(), 4);
    }
}

#[test]
fn a_connection_is_confirmed_in_both_of_its_flows() {
    for world in tcp_worlds() {
        let mut datapath = serve_remote(&world);
        let source = sent(&mut datapath, &world, world.client);
        for (from_client, number) in [(false, 0), (true, 1), (false, 2), (true, 3)] {
            if number == 3 {
                datapath.age_flows(1);
            }
            let mut pass = |hook, packet: &Packet| datapath.run(hook, &packet.bytes()).reason;
            let kind = if number == 0 {
                flags::SYN | flags::ACK
            } else {
                flags::ACK
            };
            if from_client {
                let ack = Packet::tcp(world.client, world.frontend, kind).numbers(1001, 5001);
                assert_eq!(pass(Hook::TcIngress, &ack), Reason::Forward);
                let ack = Packet::tcp(world.client, world.backend, kind).numbers(1001, 5001);
                assert_eq!(pass(Hook::TcEgress, &ack), Reason::Masqueraded);
            } else {
                let answer = Packet::tcp(world.backend, source, kind).numbers(5000, 1001);
                assert_eq!(pass(Hook::TcIngress, &answer), Reason::Unmasqueraded);
                let answer = Packet::tcp(world.backend, world.client, kind).numbers(5000, 1001);
                assert_eq!(pass(Hook::TcEgress, &answer), Reason::Reply);
            }
        }
        assert_eq!((datapath.young_count(), datapath.flow_count()), (0, 4));
    }
}

#[test]
fn the_source_is_that_of_the_device_by_which_the_packet_leaves() {
    for world in worlds() {
        let mut datapath = serve_remote(&world);
        let (addr4, addr6) = (
            Ipv4Addr::new(192, 0, 2, 7),
            "2001:db8::77".parse::<Ipv6Addr>().expect("IPv6"),
        );
        // Without a route in the test's namespace the way out is the way in.
        datapath.set_device(
            HERE,
            Device {
                addr4: addr4.into(),
                addr6: addr6.into(),
                flags: 0,
            },
        );
        let source = sent(&mut datapath, &world, world.client).ip();
        assert!(
            source == IpAddr::V4(addr4) || source == IpAddr::V6(addr6),
            "{source}"
        );
    }
}

#[test]
fn ports_are_used_to_the_last_and_running_out_harms_nobody() {
    for world in worlds() {
        let mut datapath = serve_remote(&world);
        let client = |n: u16| SocketAddr::new(world.client.ip(), 40_000 + n);
        let count = MASQUERADE_PORTS.end - MASQUERADE_PORTS.start;
        let sources: Vec<_> = (0..count)
            .map(|n| sent(&mut datapath, &world, client(n)))
            .collect();
        let mut ports: Vec<_> = sources.iter().map(SocketAddr::port).collect();
        ports.sort_unstable();
        assert!(ports.into_iter().eq(MASQUERADE_PORTS), "each port once");
        let flows = datapath.flow_count();
        let one_more = Packet::first(world.protocol, client(count), world.frontend);
        dropped(
            &mut datapath,
            Hook::TcIngress,
            &one_more,
            Reason::MasqueradeExhausted,
        );
        assert_eq!(datapath.flow_count(), flows, "it left nothing behind");
        for (n, source) in (0..).zip(sources) {
            let mut answer = world.answer(world.backend);
            answer.dst = source;
            translated(
                &mut datapath,
                Hook::TcIngress,
                &answer,
                Reason::Unmasqueraded,
                (world.backend, client(n)),
            );
        }
    }
}

/// Connections that last for long take ports one after the other, and in the next
/// turn they come one after the other.
#[test]
fn a_long_run_of_ports_that_are_taken_is_jumped_over() {
    const COUNT: u16 = 96;
    const AGAIN: u16 = 8;
    for world in tcp_worlds() {
        let mut datapath = serve_remote(&world);
        let config = Config {
            port_count: COUNT,
            ..datapath.config()
        };
        datapath.configure(&config);
        let client = |n: u16| SocketAddr::new(world.client.ip(), 10_000 + n);
        let mut sources = Vec::new();
        for n in 0..COUNT + AGAIN {
            if n == COUNT {
                end_connections(&mut datapath, &world, (0..AGAIN).map(client), &sources);
            }
            sources.push(sent(&mut datapath, &world, client(n)));
        }
        // The turn is behind these, and everything before them is taken.
        let last = COUNT..COUNT + AGAIN;
        let free = &sources[usize::from(last.start)..];
        end_connections(&mut datapath, &world, last.map(client), free);
        let source = sent(&mut datapath, &world, client(COUNT + AGAIN));
        assert!(free.contains(&source), "{source}");
    }
}

/// Clients reset connections of which the backend sees these sources, which are
/// over then.
fn end_connections(
    datapath: &mut Datapath,
    world: &World,
    clients: impl Iterator<Item = SocketAddr>,
    sources: &[SocketAddr],
) {
    for (client, source) in clients.zip(sources) {
        let reset = |to| Packet::tcp(client, to, flags::RST).bytes();
        datapath.run(Hook::TcIngress, &reset(world.frontend));
        let left = datapath.run(Hook::TcEgress, &reset(world.backend));
        assert_eq!(read(&left.frame).src, *source);
    }
    datapath.age_flows(11);
}

#[test]
fn a_port_is_free_again_when_its_flow_is_over() {
    for world in worlds() {
        let mut datapath = serve_remote(&world);
        let client = |n: u16| SocketAddr::new(world.client.ip(), 40_000 + n);
        let count = MASQUERADE_PORTS.end - MASQUERADE_PORTS.start;
        for n in 0..count {
            sent(&mut datapath, &world, client(n));
        }
        datapath.age_flows(61);
        for n in 0..count {
            sent(&mut datapath, &world, client(100 + n));
        }
    }
}

#[test]
fn other_backends_have_ports_of_their_own() {
    for world in worlds() {
        let mut datapath = serve_remote(&world);
        let other = [remote(world.other_backend)];
        datapath.serve(world.protocol, world.other_frontend, &other);
        let client = |n: u16| SocketAddr::new(world.client.ip(), 40_000 + n);
        for n in MASQUERADE_PORTS {
            sent(&mut datapath, &world, client(n - MASQUERADE_PORTS.start));
        }
        let packet = Packet::first(world.protocol, world.client, world.other_frontend);
        let outcome = datapath.run(Hook::TcIngress, &packet.bytes());
        assert_eq!(outcome.reason, Reason::NewMasqueradedFlow);
    }
}

#[test]
fn nothing_is_masqueraded_without_ports_or_address() {
    for world in worlds() {
        let mut datapath = serve_remote(&world);
        datapath.set_device(0, Device::default());
        let packet = world.first(world.frontend);
        let reason = Reason::MasqueradeExhausted;
        dropped(&mut datapath, Hook::TcIngress, &packet, reason);
        assert_eq!(datapath.flow_count(), 0);
    }
}

#[test]
fn a_pod_that_reaches_itself_sees_the_node() {
    for world in worlds().into_iter().chain(sctp_worlds()) {
        let mut datapath = world.serve_one();
        datapath.set_device(
            HERE,
            Device {
                flags: DEVICE_POD,
                ..Device::default()
            },
        );
        let pod = SocketAddr::new(world.backend.ip(), 40_000);
        let source = sent(&mut datapath, &world, pod);
        assert_eq!(source.ip(), node(&world));
    }
}

/// SEMANTICS: towards a `ClusterIP`, and where a policy is `Local`, kube-proxy
/// keeps the address of a pod; else it masquerades.
#[test]
fn pods_keep_their_address_where_kube_proxy_keeps_it() {
    use FrontendKind::{ClusterIp, ExternalIp, LoadBalancer, NodePort};
    for world in worlds() {
        for (kind, flags, masqueraded) in [
            (ClusterIp, 0, false),
            (NodePort, 0, true),
            (LoadBalancer, 0, true),
            (ExternalIp, 0, true),
            (NodePort, FRONTEND_LOCAL_POLICY, false),
            (LoadBalancer, FRONTEND_LOCAL_POLICY, false),
        ] {
            let mut datapath = serve_remote(&world);
            datapath.change_frontend(world.protocol, world.frontend, |entry| {
                entry.kind = kind as u8;
                entry.flags = flags;
            });
            datapath.set_device(
                HERE,
                Device {
                    flags: DEVICE_POD,
                    ..Device::default()
                },
            );
            let packet = world.first(world.frontend);
            let reason = datapath.run(Hook::TcIngress, &packet.bytes()).reason;
            let expected = if masqueraded {
                Reason::NewMasqueradedFlow
            } else {
                Reason::NewFlow
            };
            assert_eq!(reason, expected, "{kind:?} {flags}");
        }
    }
}

#[test]
fn a_direct_packet_from_a_used_port_is_not_masqueraded() {
    for world in worlds() {
        let mut datapath = serve_remote(&world);
        sent(&mut datapath, &world, world.client);
        let direct = if world.protocol == TCP {
            Packet::tcp(world.client, world.backend, flags::SYN).numbers(900_000, 0)
        } else {
            Packet::udp(world.client, world.backend)
        };
        let direct = direct.bytes();
        datapath.run(Hook::TcIngress, &direct);
        let left = datapath.run(Hook::TcEgress, &direct);
        assert_eq!(left.frame, direct, "{:?}", left.reason);
    }
}

#[test]
fn a_new_connection_from_a_used_port_is_masqueraded_anew() {
    for world in tcp_worlds() {
        let mut datapath = serve_remote(&world);
        sent(&mut datapath, &world, world.client);
        let again = Packet::tcp(world.client, world.frontend, flags::SYN)
            .numbers(900_000, 0)
            .bytes();
        let entered = datapath.run(Hook::TcIngress, &again);
        assert_eq!(entered.reason, Reason::NewMasqueradedFlow);
        let left = datapath.run(Hook::TcEgress, &entered.frame);
        assert_eq!(left.reason, Reason::Masqueraded);
        let seen = read(&left.frame);
        let answer =
            Packet::tcp(world.backend, seen.src, flags::SYN | flags::ACK).numbers(5000, 900_001);
        translated(
            &mut datapath,
            Hook::TcIngress,
            &answer,
            Reason::Unmasqueraded,
            (world.backend, world.client),
        );
        assert_eq!(datapath.flow_count(), 4, "the old flows are gone");
    }
}

#[test]
fn strangers_at_the_ports_of_masquerade_are_left_alone() {
    for world in worlds() {
        let mut datapath = serve_remote(&world);
        datapath.serve(
            world.protocol,
            world.other_frontend,
            &[local(world.backend)],
        );
        let port = SocketAddr::new(node(&world), MASQUERADE_PORTS.start);
        let frame = Packet::first(world.protocol, world.stranger, port).bytes();
        untouched(&mut datapath, Hook::TcIngress, &frame, Reason::NotService);
        untouched(&mut datapath, Hook::Xdp, &frame, Reason::NotService);
    }
}
