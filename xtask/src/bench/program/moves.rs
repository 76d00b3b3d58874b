//! Flows that move when an endpoint goes that is not theirs: none may.

use std::net::SocketAddr;

use lb_common::{
    Hook,
    flow::{TCP, UDP},
};
use lb_tests::{
    packet::{self, Packet, flags},
    program::{Backend, Datapath},
    topology::Family,
};

use super::flows;
use crate::bench::report::{Figure, Row, Target};

/// Flows of each kind.
const FLOWS: u32 = 4096;

const PORT: u16 = 80;

/// Counts them, for each protocol and family.
///
/// # Panics
/// If a flow of the endpoint that is gone stays there, or any is not translated.
pub(super) fn figure() -> Figure {
    let title = format!("flows of {FLOWS} that move when another endpoint goes");
    let mut figure = Figure::new("flows", title, "flows");
    for (protocol, name) in [(TCP, "TCP"), (UDP, "UDP")] {
        for family in Family::ALL {
            let moved = f64::from(moved(protocol, family));
            let row = Row::new(format!("klb, {name}, {family}"), vec![moved]);
            figure
                .rows
                .push(row.target(Target::at_most(0.0).of_value()));
        }
    }
    figure
}

fn moved(protocol: u8, family: Family) -> u32 {
    let mut datapath = Datapath::of_default_size();
    let frontend = flows::frontend(family, PORT);
    let backends = flows::backends(family);
    let local: Vec<_> = backends
        .iter()
        .map(|&addr| Backend { addr, local: true })
        .collect();
    let references = datapath.serve(protocol, frontend, &local);
    let before: Vec<_> = (0..FLOWS)
        .map(|number| send(&datapath, protocol, flags::SYN, family, number))
        .collect();
    if protocol == TCP {
        flows::establish(&mut datapath, family);
    }
    let (gone, reference) = (backends[2], references[2]);
    datapath.change_frontend(protocol, frontend, |entry| {
        entry.slot_count -= 1;
        entry.inner_slot_count -= 1;
    });
    datapath.set_generation(reference.id, reference.generation + 1);
    let mut moved = 0;
    for (number, before) in (0..FLOWS).zip(before) {
        let after = send(&datapath, protocol, flags::ACK, family, number);
        if before != gone && after != before {
            moved += 1;
        }
        // A datagram goes where somebody answers; a connection has ended.
        assert!(protocol == TCP || after != gone, "a flow to what has gone");
    }
    moved
}

/// Sends a flow's packet in, and returns where it goes.
fn send(datapath: &Datapath, protocol: u8, kind: u8, family: Family, number: u32) -> SocketAddr {
    let (client, frontend) = (flows::client(family, number), flows::frontend(family, PORT));
    let packet = if protocol == TCP {
        Packet::tcp(client, frontend, kind)
    } else {
        Packet::udp(client, frontend)
    };
    let frame = packet.bytes();
    let mut out = vec![0; frame.len() + 64];
    let (_, length) = datapath
        .test_run(Hook::TcIngress, &frame, &mut out, None)
        .expect("a test run");
    let to = packet::read(&out[..length]).dst;
    assert!(flows::backends(family).contains(&to), "{to}");
    to
}
