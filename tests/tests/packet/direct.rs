//! A client that has, from one port, a connection by a Service and one to its
//! backend itself: to the backend these would be one.

use std::net::SocketAddr;

use lb_common::{Hook, Reason, service::FRONTEND_REFUSE};
use lb_tests::{
    packet::{Packet, flags, read},
    program::Datapath,
};

use crate::world::{World, dropped, tcp_worlds, translated, untouched, with_cluster_network};

/// The first packet of a direct connection.
fn direct(world: &World, seq: u32) -> Packet {
    Packet::tcp(world.client, world.backend, flags::SYN).numbers(seq, 0)
}

/// A connection by the Service, of which the client has confirmed the backend's
/// answer.
fn connect(world: &World, hook: Hook) -> Datapath {
    let mut datapath = world.serve_one();
    let (client, frontend) = (world.client, world.frontend);
    for (hook, packet) in [
        (hook, world.first(frontend)),
        (Hook::TcEgress, world.answer(world.backend)),
        (
            hook,
            Packet::tcp(client, frontend, flags::ACK).numbers(1001, 5001),
        ),
    ] {
        datapath.run(hook, &packet.bytes());
    }
    datapath
}

/// Sends a direct SYN that gets another port; returns the client with that.
fn open_beside(datapath: &mut Datapath, hook: Hook, world: &World) -> SocketAddr {
    let outcome = datapath.run(hook, &direct(world, 900_000).bytes());
    assert_eq!(outcome.reason, Reason::NewFlow, "{hook:?}");
    let seen = read(&outcome.frame);
    assert_eq!(
        (seen.dst, seen.src.ip()),
        (world.backend, world.client.ip())
    );
    assert_ne!(seen.src.port(), world.client.port());
    seen.src
}

#[test]
fn a_direct_connection_beside_another_gets_a_port_of_its_own() {
    for world in tcp_worlds() {
        for hook in [Hook::TcIngress, Hook::Xdp] {
            let mut datapath = connect(&world, hook);
            let datapath = &mut datapath;
            let World {
                client,
                frontend,
                backend,
                ..
            } = world;
            let moved = open_beside(datapath, hook, &world);
            // Again, as the answer is late.
            let (there, back) = ((moved, backend), (backend, client));
            let syn = direct(&world, 900_000);
            translated(datapath, hook, &syn, Reason::Forward, there);
            let answer = Packet::tcp(backend, moved, flags::SYN | flags::ACK).numbers(70, 900_001);
            translated(datapath, Hook::TcEgress, &answer, Reason::Reply, back);
            let more = Packet::tcp(client, backend, flags::ACK).numbers(900_001, 71);
            translated(datapath, hook, &more, Reason::Forward, there);
            // The other one goes on.
            let more = Packet::tcp(client, frontend, flags::ACK).numbers(1001, 5001);
            translated(datapath, hook, &more, Reason::Forward, (client, backend));
            if hook == Hook::Xdp {
                // Behind XDP it has the tuple of the direct one.
                let more = Packet::tcp(client, backend, flags::ACK).numbers(1001, 5001);
                let tc = Hook::TcIngress;
                untouched(datapath, tc, &more.bytes(), Reason::NotService);
            }
            let more = Packet::tcp(backend, client, flags::ACK).numbers(5001, 1001);
            let to = (frontend, client);
            translated(datapath, Hook::TcEgress, &more, Reason::Reply, to);
        }
    }
}

#[test]
fn a_direct_connection_outlives_the_one_that_it_was_beside() {
    for world in tcp_worlds() {
        let mut datapath = connect(&world, Hook::TcIngress);
        let datapath = &mut datapath;
        let moved = open_beside(datapath, Hook::TcIngress, &world);
        let (client, backend) = (world.client, world.backend);
        let answer = Packet::tcp(backend, moved, flags::SYN | flags::ACK).numbers(70, 900_001);
        datapath.run(Hook::TcEgress, &answer.bytes());
        let reset = Packet::tcp(client, world.frontend, flags::RST).numbers(1001, 0);
        datapath.run(Hook::TcIngress, &reset.bytes());
        // Of the ports there is a flow, but its end makes room for a direct one
        // that has its port to itself.
        let more = |flags| Packet::tcp(client, backend, flags).numbers(900_001, 71);
        let there = (moved, backend);
        let fin = flags::FIN | flags::ACK;
        translated(
            datapath,
            Hook::TcIngress,
            &more(flags::ACK),
            Reason::Forward,
            there,
        );
        translated(
            datapath,
            Hook::TcIngress,
            &more(fin),
            Reason::Forward,
            there,
        );
        let answer = Packet::tcp(backend, moved, fin).numbers(71, 900_002);
        let back = (backend, client);
        translated(datapath, Hook::TcEgress, &answer, Reason::Reply, back);
        translated(
            datapath,
            Hook::TcIngress,
            &more(flags::ACK),
            Reason::Forward,
            there,
        );
        let syn = direct(&world, 1_000_000).bytes();
        untouched(datapath, Hook::TcIngress, &syn, Reason::NotService);
        let more = more(flags::ACK).bytes();
        untouched(datapath, Hook::TcIngress, &more, Reason::NoFlow);
    }
}

/// That some packet with the same hash has, or had, a flow of its own is no reason
/// to let a port of a `ClusterIP` be.
#[test]
fn what_is_refused_is_refused_whatever_has_its_hash() {
    for world in tcp_worlds() {
        let mut datapath = connect(&world, Hook::TcIngress);
        open_beside(&mut datapath, Hook::TcIngress, &world);
        let config = with_cluster_network(datapath.config(), world.backend.ip());
        datapath.configure(&config);
        datapath.put_address(world.backend.ip(), FRONTEND_REFUSE);
        let outcome = datapath.run(Hook::TcIngress, &direct(&world, 7).bytes());
        assert_eq!(outcome.reason, Reason::NoSuchPort);
    }
}

/// What came in elsewhere may be the connection's own packet, translated on its
/// way.
#[test]
fn a_packet_translated_by_xdp_is_no_direct_one() {
    for world in tcp_worlds() {
        let mut datapath = connect(&world, Hook::Xdp);
        let syn = direct(&world, 900_000).bytes();
        untouched(&mut datapath, Hook::TcIngress, &syn, Reason::NotService);
    }
}

/// The direct connection was there first: the backend acknowledges what that one
/// has sent.
#[test]
fn a_connection_whose_port_is_taken_at_the_backend_gets_another() {
    for world in tcp_worlds() {
        for hook in [Hook::TcIngress, Hook::Xdp] {
            let mut datapath = world.serve_one();
            let datapath = &mut datapath;
            let (client, backend) = (world.client, world.backend);
            let syn = world.first(world.frontend);
            datapath.run(hook, &syn.bytes());
            let other = Packet::tcp(backend, client, flags::ACK)
                .numbers(77, 99)
                .payload([]);
            dropped(datapath, Hook::TcEgress, &other, Reason::PortTaken);
            // The client, none the wiser, tries again.
            let outcome = datapath.run(hook, &syn.bytes());
            assert_eq!(outcome.reason, Reason::NewFlow);
            let moved = read(&outcome.frame).src;
            assert_ne!(moved.port(), client.port());
            let answer = Packet::tcp(backend, moved, flags::SYN | flags::ACK).numbers(5000, 1001);
            let to = (world.frontend, client);
            translated(datapath, Hook::TcEgress, &answer, Reason::Reply, to);
            let more = Packet::tcp(client, world.frontend, flags::ACK).numbers(1001, 5001);
            translated(datapath, hook, &more, Reason::Forward, (moved, backend));
            // The other connection's packets are nobody's again.
            untouched(datapath, Hook::TcEgress, &other.bytes(), Reason::NotService);
        }
    }
}

/// Data may overtake the backend's answer, and an established connection is told
/// what its backend says.
#[test]
fn an_acknowledgment_is_no_sign_of_another_connection_by_itself() {
    for world in tcp_worlds() {
        let ack = |payload: &[u8]| {
            Packet::tcp(world.backend, world.client, flags::ACK)
                .numbers(5001, 1001)
                .payload(payload)
        };
        let to = (world.frontend, world.client);
        let mut opening = world.serve_one();
        opening.run(Hook::TcIngress, &world.first(world.frontend).bytes());
        translated(
            &mut opening,
            Hook::TcEgress,
            &ack(b"early"),
            Reason::Reply,
            to,
        );
        let mut connected = connect(&world, Hook::TcIngress);
        translated(&mut connected, Hook::TcEgress, &ack(b""), Reason::Reply, to);
    }
}
