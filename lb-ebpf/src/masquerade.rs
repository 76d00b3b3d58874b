//! The second flow of a client whose backend must answer through this node:
//! where its packets leave they get an address and port of the node, and the
//! answers, where they come in, the client's.

use lb_common::{
    Address as _, Port, Reason,
    flow::{FLOW_MASQUERADED, MASQUERADE, Tuple},
    node::{Config, DEVICE_POD},
};

use crate::{
    config,
    family::Family,
    flow, known,
    maps::PORT_CURSORS,
    open::{Opening, device, link_peer},
    packet::Packet,
    rewrite::Pair,
    route,
};

/// How many ports are tried for one flow, the next ones first: so every port
/// gets its turn.
const ATTEMPTS: u32 = 48;
/// How many of these are the next ones. If all are taken, by connections that
/// are as old as one another, the others are spread over the whole range.
const NEXT: u32 = 16;
/// Of the others, the binary logarithm.
const SPREAD_BITS: u32 = 5;
const _: () = assert!(ATTEMPTS - NEXT == 1 << SPREAD_BITS);

/// Opens the second flow of the one that `work` has just opened: from the client
/// to the backend, as if from this node. [`Reason::NewMasqueradedFlow`] if it is
/// there.
#[inline(never)]
pub fn open<P: Packet, F: Family>(packet: &P, work: &mut Opening<F::Addr>) -> Reason {
    let Some(config) = config::get().filter(|config| config.port_count != 0) else {
        return Reason::MasqueradeExhausted;
    };
    work.key = work.entry.translated(work.key.protocol);
    work.entry.direction = MASQUERADE;
    work.entry.flags &= !FLOW_MASQUERADED;
    let Some(address) = source::<P, F>(packet, work) else {
        return Reason::MasqueradeExhausted;
    };
    work.entry.src = address;
    for attempt in 0..ATTEMPTS {
        let step = if attempt < NEXT {
            1
        } else {
            (u32::from(config.port_count) >> SPREAD_BITS) + 1
        };
        let Some(port) = next_port(config, &work.key, step) else {
            break;
        };
        work.entry.src_port = port;
        match link_peer::<F>(work) {
            Reason::NewFlow => return link_client::<F>(work),
            Reason::TupleConflict => {}
            refused => return refused,
        }
    }
    Reason::MasqueradeExhausted
}

/// Writes the client's direction. An older flow of the same tuple has ended
/// with the first flow that it belonged to.
#[inline(always)]
fn link_client<F: Family>(work: &Opening<F::Addr>) -> Reason {
    known::note(&work.key, MASQUERADE, work.now);
    let inserted = flow::replace::<F>(work.young, &work.key, &work.entry);
    if inserted.is_err() {
        flow::remove_entry::<F>(&work.peer_key);
        return Reason::FlowTableFull;
    }
    Reason::NewMasqueradedFlow
}

/// The next of the node's ports to try, `step` after the one before: by turns for
/// each backend, from a place that outsiders do not know (RFC 6056, 3.3.4,
/// "double-hash port selection"). By turns, a port rests for as long as possible
/// before it is used again.
#[inline(always)]
fn next_port<A: lb_common::Address>(config: &Config, key: &Tuple<A>, step: u32) -> Option<Port> {
    let backend = key
        .dst
        .folded()
        .wrapping_add(u32::from(key.dst_port.get()))
        .wrapping_mul(0x9e37_79b1);
    let cursor = PORT_CURSORS.get_ptr_mut(backend >> 22)?;
    // SAFETY: the entry is shared by all CPUs; if two read the same number,
    // one of them finds the port in use and takes the next.
    let turn = unsafe {
        let turn = (*cursor).wrapping_add(step);
        *cursor = turn;
        turn
    };
    let start = (backend ^ config.secret).wrapping_mul(0x85eb_ca6b) >> 8;
    let offset = start
        .wrapping_add(turn)
        .checked_rem(u32::from(config.port_count))?;
    Some(Port::from(config.first_port.wrapping_add(offset as u16)))
}

/// The address of this node that the backend shall see: that of the device by
/// which the packet leaves, else the node's own.
#[inline(always)]
fn source<P: Packet, F: Family>(packet: &P, work: &mut Opening<F::Addr>) -> Option<F::Addr> {
    if let Some(device) = device(way_out::<P, F>(packet, work))
        && device.flags & DEVICE_POD == 0
    {
        let address = F::device_address(device);
        if !address.is_zero() {
            return Some(address);
        }
    }
    let node = F::device_address(device(0)?);
    (!node.is_zero()).then_some(node)
}

/// Index of the device by which the kernel will send the packet; where it came
/// in if the kernel does not know, or says so only when it also knows the
/// neighbour (before 5.11).
#[inline(never)]
fn way_out<P: Packet, F: Family>(packet: &P, work: &mut Opening<F::Addr>) -> u32 {
    let addresses = Pair {
        src: work.key.src,
        dst: work.key.dst,
    };
    let protocol = work.key.protocol;
    route::find::<P, F>(
        packet,
        &mut work.route,
        &addresses,
        protocol,
        0,
        work.ifindex,
    );
    work.route.ifindex
}
