//! Who is sent where, and what the answer looks like.

use std::collections::BTreeSet;

use lb_common::{Hook, Reason, flow::TCP, node::Config};
use lb_tests::{
    packet::{self, Packet, flags},
    program::{Backend, Datapath},
};

use crate::world::{World, answered, local, tcp_worlds, translated, udp_worlds, untouched, worlds};

/// The hooks at which a client's packet comes in.
const ENTRIES: [Hook; 2] = [Hook::TcIngress, Hook::Xdp];

#[test]
fn there_and_back_at_every_entry() {
    for world in worlds() {
        for entry in ENTRIES {
            let mut datapath = world.serve_one();
            let World {
                client,
                frontend,
                backend,
                ..
            } = world;
            translated(
                &mut datapath,
                entry,
                &world.first(frontend),
                Reason::NewFlow,
                (client, backend),
            );
            translated(
                &mut datapath,
                Hook::TcEgress,
                &world.answer(backend),
                Reason::Reply,
                (frontend, client),
            );
            translated(
                &mut datapath,
                entry,
                &world.first(frontend).payload(*b"and more"),
                Reason::Forward,
                (client, backend),
            );
            assert_eq!(datapath.flow_count(), 2, "one entry a direction");
        }
    }
}

#[test]
fn tc_goes_on_with_a_flow_that_xdp_opened_and_the_other_way_round() {
    for world in worlds() {
        for (first, second) in [(Hook::Xdp, Hook::TcIngress), (Hook::TcIngress, Hook::Xdp)] {
            let mut datapath = Datapath::new();
            let backends = [local(world.backend), local(world.other_backend)];
            datapath.serve(world.protocol, world.frontend, &backends);
            let frame = world.first(world.frontend).bytes();
            let chosen = packet::read(&datapath.run(first, &frame).frame).dst;
            translated(
                &mut datapath,
                second,
                &world.first(world.frontend),
                Reason::Forward,
                (world.client, chosen),
            );
        }
    }
}

#[test]
fn new_flows_spread_over_the_backends_and_flows_stay() {
    for world in worlds() {
        let mut datapath = Datapath::new();
        let backends = [local(world.backend), local(world.other_backend)];
        datapath.serve(world.protocol, world.frontend, &backends);
        let mut counts = [0; 2];
        for port in 20_000..20_200 {
            let mut client = world.client;
            client.set_port(port);
            let first = Packet::first(world.protocol, client, world.frontend);
            let chosen = packet::read(&datapath.run(Hook::TcIngress, &first.bytes()).frame).dst;
            let index = backends.iter().position(|backend| backend.addr == chosen);
            counts[index.expect("one of the backends")] += 1;
            translated(
                &mut datapath,
                Hook::TcIngress,
                &first,
                Reason::Forward,
                (client, chosen),
            );
        }
        // 200 throws of a fair coin: fewer than 50 of one side has a chance of
        // about one in 10¹³.
        assert!(counts.iter().all(|count| *count >= 50), "{counts:?}");
    }
}

/// What XDP leaves to TC gets there the backend that XDP has drawn. If TC drew
/// once more, backends of this node would get three of four connections here.
#[test]
fn xdp_does_not_prefer_backends_of_this_node() {
    for world in worlds() {
        let mut datapath = Datapath::new();
        let config = Config {
            port_count: 10_000,
            ..datapath.config()
        };
        datapath.configure(&config);
        let remote = Backend {
            addr: world.other_backend,
            local: false,
        };
        let backends = [local(world.backend), remote];
        datapath.serve(world.protocol, world.frontend, &backends);
        let mut stays = 0;
        for port in 20_000..20_400 {
            let mut client = world.client;
            client.set_port(port);
            let first = Packet::first(world.protocol, client, world.frontend).bytes();
            if datapath.run(Hook::Xdp, &first).reason == Reason::RemoteBackend {
                let left = datapath.run(Hook::TcIngress, &first);
                assert_eq!(left.reason, Reason::NewMasqueradedFlow);
            } else {
                stays += 1;
            }
        }
        // A fair coin is below or above that once in 10¹² times.
        assert!((130..=270).contains(&stays), "{stays} of 400");
    }
}

#[test]
fn ip_options_move_the_transport_header() {
    for world in worlds().into_iter().filter(|world| world.client.is_ipv4()) {
        for entry in ENTRIES {
            for length in [4, 8, 40] {
                let mut datapath = world.serve_one();
                // No-operation options (RFC 791).
                let options = vec![1; length];
                translated(
                    &mut datapath,
                    entry,
                    &world.first(world.frontend).ip_options(&options),
                    Reason::NewFlow,
                    (world.client, world.backend),
                );
            }
        }
    }
}

#[test]
fn udp_without_a_checksum_stays_without() {
    for world in udp_worlds().filter(|world| world.client.is_ipv4()) {
        for entry in ENTRIES {
            let mut datapath = world.serve_one();
            let packet = world.first(world.frontend).no_checksum();
            let outcome = datapath.run(entry, &packet.bytes());
            assert_eq!(outcome.reason, Reason::NewFlow);
            assert_eq!(outcome.frame[14 + 20 + 6..][..2], [0, 0]);
            assert_eq!(packet::read(&outcome.frame).dst, world.backend);
        }
    }
}

#[test]
fn xdp_leaves_unfinished_checksums_to_tc() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        let frame = world.first(world.frontend).unfinished_checksum().bytes();
        untouched(&mut datapath, Hook::Xdp, &frame, Reason::UnfinishedChecksum);
        assert_eq!(datapath.flow_count(), 0, "XDP left nothing behind");
        // Also in the middle of a flow, and of answers, which XDP may translate.
        datapath.run(Hook::Xdp, &world.first(world.frontend).bytes());
        untouched(&mut datapath, Hook::Xdp, &frame, Reason::UnfinishedChecksum);
        let answer = world.answer(world.backend).unfinished_checksum().bytes();
        untouched(
            &mut datapath,
            Hook::Xdp,
            &answer,
            Reason::UnfinishedChecksum,
        );
    }
}

#[test]
fn xdp_leaves_remote_backends_to_tc() {
    for world in worlds() {
        let mut datapath = Datapath::new();
        let remote = Backend {
            addr: world.backend,
            local: false,
        };
        datapath.serve(world.protocol, world.frontend, &[remote]);
        let first = world.first(world.frontend);
        untouched(
            &mut datapath,
            Hook::Xdp,
            &first.bytes(),
            Reason::RemoteBackend,
        );
        assert_eq!(datapath.flow_count(), 0, "XDP left nothing behind");
        translated(
            &mut datapath,
            Hook::TcIngress,
            &first,
            Reason::NewMasqueradedFlow,
            (world.client, world.backend),
        );
    }
}

#[test]
fn a_frontend_is_one_protocol_and_one_port() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        let other_protocol = World {
            protocol: if world.protocol == TCP { 17 } else { 6 },
            ..world
        };
        let mut other_port = world.frontend;
        other_port.set_port(81);
        for packet in [
            other_protocol.first(world.frontend),
            world.first(other_port),
        ] {
            for entry in ENTRIES {
                untouched(&mut datapath, entry, &packet.bytes(), Reason::NotService);
            }
        }
    }
}

#[test]
fn a_reply_on_its_way_through_the_node_is_left_alone() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        datapath.run(Hook::TcIngress, &world.first(world.frontend).bytes());
        let answer = world.answer(world.backend).bytes();
        for entry in ENTRIES {
            untouched(&mut datapath, entry, &answer, Reason::TransitReply);
        }
        answered(&mut datapath, &world);
    }
}

/// What XDP translated comes to TC next, and goes out somewhere.
#[test]
fn the_translated_packet_passes_the_hooks_behind() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        let first = world.first(world.frontend).bytes();
        let frame = datapath.run(Hook::Xdp, &first).frame;
        for hook in [Hook::TcIngress, Hook::TcEgress] {
            untouched(&mut datapath, hook, &frame, Reason::NotService);
        }
        assert_eq!(datapath.flow_count(), 2, "the flow goes on");
    }
}

#[test]
fn tcp_in_mid_connection_without_a_flow_belongs_to_somebody_else() {
    for world in tcp_worlds() {
        let mut datapath = world.serve_one();
        for flags in [
            flags::ACK,
            flags::FIN | flags::ACK,
            flags::RST,
            flags::SYN | flags::ACK,
        ] {
            let packet = Packet::tcp(world.client, world.frontend, flags);
            for entry in ENTRIES {
                untouched(&mut datapath, entry, &packet.bytes(), Reason::NoFlow);
            }
        }
        assert_eq!(datapath.flow_count(), 0);
    }
}

#[test]
fn two_frontends_never_share_a_reply_path() {
    for world in worlds() {
        let mut datapath = Datapath::new();
        let backends = [local(world.backend), local(world.other_backend)];
        let protocol = world.protocol;
        datapath.serve(protocol, world.frontend, &backends[..1]);
        datapath.serve(protocol, world.other_frontend, &backends);
        datapath.run(Hook::TcIngress, &world.first(world.frontend).bytes());
        // The same client port towards the other frontend: with the first backend
        // it is taken.
        let outcome = datapath.run(Hook::TcIngress, &world.first(world.other_frontend).bytes());
        assert_eq!(outcome.reason, Reason::NewFlow);
        let seen = packet::read(&outcome.frame);
        let same_backend = seen.dst == world.backend;
        assert!(!same_backend || seen.src.port() != world.client.port());
        let reply = datapath.run(Hook::TcEgress, &world.answer(world.backend).bytes());
        assert_eq!(packet::read(&reply.frame).src, world.frontend);
    }
}

#[test]
fn a_port_that_is_taken_at_the_only_backend_is_exchanged() {
    for world in worlds() {
        let mut datapath = Datapath::new();
        let only = [local(world.backend)];
        datapath.serve(world.protocol, world.frontend, &only);
        datapath.serve(world.protocol, world.other_frontend, &only);
        datapath.run(Hook::TcIngress, &world.first(world.frontend).bytes());
        let second = world.first(world.other_frontend).bytes();
        let outcome = datapath.run(Hook::TcIngress, &second);
        assert_eq!(outcome.reason, Reason::NewFlow);
        let seen = packet::read(&outcome.frame);
        assert_eq!(
            (seen.src.ip(), seen.dst),
            (world.client.ip(), world.backend)
        );
        assert_ne!(seen.src.port(), world.client.port());
        // Each answer finds its frontend, and the client's port.
        let mut answer = world.answer(world.backend);
        for (port, frontend) in [
            (seen.src.port(), world.other_frontend),
            (world.client.port(), world.frontend),
        ] {
            answer.dst.set_port(port);
            let to_client = (frontend, world.client);
            translated(
                &mut datapath,
                Hook::TcEgress,
                &answer,
                Reason::Reply,
                to_client,
            );
        }
        // The port stays the same for the flow.
        let again = datapath.run(Hook::TcIngress, &second);
        assert_eq!(packet::read(&again.frame).src, seen.src);
    }
}

#[test]
fn many_flows_are_all_remembered() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        let ports: BTreeSet<u16> = (30_000..30_100).collect();
        for port in &ports {
            let mut client = world.client;
            client.set_port(*port);
            let first = Packet::first(world.protocol, client, world.frontend);
            datapath.run(Hook::TcIngress, &first.bytes());
        }
        assert_eq!(datapath.flow_count(), 2 * ports.len());
    }
}
