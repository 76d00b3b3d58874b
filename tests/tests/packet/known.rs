//! Which addresses and ports are known to have flows (`klb_known`): for a packet
//! between others no flow is looked for.

use lb_common::{Hook, Reason, flow::State, known::Known};
use lb_tests::{
    packet::{Packet, flags},
    program::{Backend, Datapath},
};

use crate::world::{World, sctp_worlds, tcp_worlds, translated, untouched, worlds};

/// Seconds for which what is noted counts, which is longer than any flow may be
/// silent.
fn longest() -> u32 {
    State::TIMEOUTS.into_iter().sum()
}

/// A flow to a backend, between ends that nothing was noted of before.
fn opened(world: &World, local: bool) -> Datapath {
    let mut datapath = Datapath::new();
    let addr = world.backend;
    datapath.serve(world.protocol, world.frontend, &[Backend { addr, local }]);
    for end in [world.client, world.frontend, world.backend] {
        datapath.change_known(end, |_| Known::default());
    }
    let reason = datapath
        .run(Hook::TcIngress, &world.first(world.frontend).bytes())
        .reason;
    assert!(matches!(
        reason,
        Reason::NewFlow | Reason::NewMasqueradedFlow
    ));
    datapath
}

/// Makes all notes so many seconds older; they may be from before the machine was
/// started, as its clock wraps.
fn age(datapath: &mut Datapath, world: &World, seconds: u32) {
    for end in [world.frontend, world.backend] {
        datapath.change_known(end, |known| Known {
            to: known.to.wrapping_sub(seconds),
            from: known.from.wrapping_sub(seconds),
        });
    }
}

#[test]
fn both_ends_are_noted_for_as_long_as_a_flow_goes_on() {
    for world in worlds().into_iter().chain(sctp_worlds()) {
        let mut datapath = opened(&world, true);
        let (frontend, backend) = (
            datapath.known(world.frontend),
            datapath.known(world.backend),
        );
        assert!(frontend.to > 0 && frontend.from == 0, "{frontend:?}");
        assert!(backend.from > 0 && backend.to == 0, "{backend:?}");
        age(&mut datapath, &world, 5);
        datapath.age_flows(5);
        let again = world.first(world.frontend);
        let to = (world.client, world.backend);
        translated(&mut datapath, Hook::TcIngress, &again, Reason::Forward, to);
        assert!(
            datapath.known(world.frontend).to >= frontend.to,
            "{world:?}"
        );
        assert!(
            datapath.known(world.backend).from >= backend.from,
            "{world:?}"
        );
    }
}

#[test]
fn a_backend_that_sees_the_node_is_noted_both_ways() {
    for world in worlds() {
        let mut datapath = opened(&world, false);
        let backend = datapath.known(world.backend);
        assert!(backend.to > 0 && backend.from > 0, "{backend:?}");
    }
}

#[test]
fn no_flow_is_looked_for_between_ends_that_have_none() {
    for world in tcp_worlds() {
        let mut datapath = opened(&world, true);
        let later = Packet::tcp(world.client, world.frontend, flags::ACK).numbers(1001, 5001);
        let answer = world.answer(world.backend);
        // That there is one tells who looks.
        let expect = |datapath: &mut Datapath, is_known: bool| {
            if is_known {
                let to = (world.client, world.backend);
                translated(datapath, Hook::TcIngress, &later, Reason::Forward, to);
                let to = (world.frontend, world.client);
                translated(datapath, Hook::TcEgress, &answer, Reason::Reply, to);
            } else {
                untouched(datapath, Hook::TcIngress, &later.bytes(), Reason::NoFlow);
                untouched(
                    datapath,
                    Hook::TcEgress,
                    &answer.bytes(),
                    Reason::NotService,
                );
            }
        };
        // Whatever sees the flow notes it anew.
        age(&mut datapath, &world, longest() + 5);
        expect(&mut datapath, false);
        let mut datapath = opened(&world, true);
        // A test may be held up for a while.
        age(&mut datapath, &world, longest() - 60);
        expect(&mut datapath, true);
        for end in [world.frontend, world.backend] {
            datapath.change_known(end, |_| Known::default());
        }
        expect(&mut datapath, false);
    }
}
