//! What is counted for each backend.

use std::slice;

use lb_common::{Hook, Reason, service::BackendRef, traffic::Traffic};
use lb_tests::{
    cpu,
    packet::{Packet, flags},
    program::{Backend, Datapath},
};

use crate::world::{World, local, worlds};

/// Serves one backend, and says which it is.
fn serve(world: &World, backend: Backend) -> (Datapath, BackendRef) {
    let mut datapath = Datapath::new();
    let backends = slice::from_ref(&backend);
    let refs = datapath.serve(world.protocol, world.frontend, backends);
    (datapath, refs[0])
}

/// A packet of the flow that is no SYN.
fn later(world: &World) -> Packet {
    if world.is_tcp() {
        Packet::tcp(world.client, world.frontend, flags::ACK).numbers(1001, 5001)
    } else {
        world.first(world.frontend)
    }
}

#[test]
fn packets_are_counted_both_ways_and_flows_once() {
    for world in worlds() {
        for entry in [Hook::TcIngress, Hook::Xdp] {
            let (mut datapath, backend) = serve(&world, local(world.backend));
            let (first, later) = (world.first(world.frontend).bytes(), later(&world).bytes());
            let answer = world.answer(world.backend).bytes();
            datapath.run(entry, &first);
            datapath.run(Hook::TcEgress, &answer);
            datapath.run(entry, &later);
            // What is for others, and what is refused, is not counted.
            datapath.run(entry, &world.first(world.stranger).bytes());
            let expected = Traffic {
                generation: backend.generation,
                pad: 0,
                flows: 1,
                packets_in: 2,
                bytes_in: (first.len() + later.len()) as u64,
                packets_out: 1,
                bytes_out: answer.len() as u64,
            };
            assert_eq!(
                datapath.traffic(backend.id),
                expected,
                "{entry:?} {world:?}"
            );
        }
    }
}

/// A packet that is translated at two hooks counts once.
#[test]
fn masquerade_counts_at_the_clients_edge() {
    for world in worlds() {
        let remote = Backend {
            addr: world.backend,
            local: false,
        };
        let (mut datapath, backend) = serve(&world, remote);
        let entered = datapath.run(Hook::TcIngress, &world.first(world.frontend).bytes());
        let left = datapath.run(Hook::TcEgress, &entered.frame);
        assert_eq!(left.reason, Reason::Masqueraded);
        let traffic = datapath.traffic(backend.id);
        assert_eq!((traffic.flows, traffic.packets_in), (1, 1));
    }
}

#[test]
fn another_life_of_a_number_counts_from_nothing() {
    // Each CPU counts, and begins anew with the next packet that it sees itself.
    cpu::stay();
    for world in worlds() {
        let (mut datapath, backend) = serve(&world, local(world.backend));
        datapath.run(Hook::TcIngress, &world.first(world.frontend).bytes());
        // A flow that outlived its backend counts for nobody who lives.
        datapath.use_ids_again();
        let backends = [local(world.other_backend)];
        let next = datapath.serve(world.protocol, world.frontend, &backends)[0];
        assert_eq!(next.id, backend.id);
        let mut other = world.client;
        other.set_port(40_001);
        let packet = Packet::first(world.protocol, other, world.frontend);
        datapath.run(Hook::TcIngress, &packet.bytes());
        if world.is_tcp() {
            datapath.run(Hook::TcIngress, &later(&world).bytes());
        }
        let traffic = datapath.traffic(next.id);
        let counted = (traffic.generation, traffic.flows, traffic.packets_in);
        assert_eq!(counted, (next.generation, 1, 1));
        let rest = datapath.traffic(0);
        assert_eq!(rest.packets_in, u64::from(world.is_tcp()));
    }
}
