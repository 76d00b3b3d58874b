//! Counting for each backend: its flows, and the packets that are translated.

use lb_common::{
    Reason,
    flow::{FORWARD, FlowEntry, REPLY},
    service::BackendRef,
    traffic::{Owner, Traffic},
};

use crate::{family::Family, maps::TRAFFIC, packet::Packet};

/// Counts a packet that has been translated by an entry. Where masquerade
/// translates a packet twice, it is counted at the client's edge.
#[inline(always)]
pub fn count_packet<P: Packet, F: Family>(packet: &P, flow: &FlowEntry<F::Addr>, done: Reason) {
    if flow.direction > REPLY {
        return;
    }
    let Some(traffic) = of(flow.backend) else {
        return;
    };
    let (packets, bytes) = (u64::from(packet.frames()), packet.length_by::<F>() as u64);
    if flow.direction == FORWARD {
        traffic.packets_in = traffic.packets_in.wrapping_add(packets);
        traffic.bytes_in = traffic.bytes_in.wrapping_add(bytes);
    } else {
        traffic.packets_out = traffic.packets_out.wrapping_add(packets);
        traffic.bytes_out = traffic.bytes_out.wrapping_add(bytes);
    }
    if matches!(done, Reason::NewFlow | Reason::NewMasqueradedFlow) {
        traffic.flows = traffic.flows.wrapping_add(1);
    }
}

/// Counts a flow that begins at a socket.
#[inline(always)]
pub fn count_flow(backend: BackendRef) {
    if let Some(traffic) = of(backend) {
        traffic.flows = traffic.flows.wrapping_add(1);
    }
}

/// This CPU's counters for a backend; those of entry 0 if it has none.
#[inline(always)]
fn of(backend: BackendRef) -> Option<&'static mut Traffic> {
    let Some(own) = TRAFFIC.get_ptr_mut(backend.id) else {
        return rest();
    };
    // SAFETY: the entry belongs to this CPU, and a program is not interrupted by
    // another that holds it.
    let own = unsafe { &mut *own };
    match own.owner(backend) {
        Owner::Same => {}
        Owner::Earlier => reset(own, backend.generation),
        Owner::Later => return rest(),
    }
    Some(own)
}

#[inline(always)]
fn rest() -> Option<&'static mut Traffic> {
    let rest = TRAFFIC.get_ptr_mut(0)?;
    // SAFETY: as in `of`.
    Some(unsafe { &mut *rest })
}

/// Begins to count anew.
#[inline(always)]
fn reset(traffic: &mut Traffic, generation: u32) {
    // SAFETY: each is a field of a struct that is borrowed. Volatile, or the
    // compiler makes a call of `memset` of it.
    unsafe {
        (&raw mut traffic.flows).write_volatile(0);
        (&raw mut traffic.packets_in).write_volatile(0);
        (&raw mut traffic.bytes_in).write_volatile(0);
        (&raw mut traffic.packets_out).write_volatile(0);
        (&raw mut traffic.bytes_out).write_volatile(0);
    }
    traffic.generation = generation;
}
