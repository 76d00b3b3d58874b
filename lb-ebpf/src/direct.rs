//! Clients that talk to a pod directly while they have, from the same port, a
//! connection by a Service to it. To the client these are two; the pod cannot tell
//! them apart, and answers the second one's SYN with an acknowledgment of the
//! first (RFC 5961, 4).
//!
//! So one of the two gets another port on its way, as conntrack would give it: the
//! direct one if it comes second, and if it was there first the one by the
//! Service, once the pod has said so ([`flow::Flow::meets_another`]).

use lb_common::{
    Address,
    flow::{REPLY, State, Tuple},
    service::{BackendRef, SLOT_LOCAL, ServiceEntry, Slot},
};

use crate::{
    clock, config,
    family::Family,
    flow::{self, Flow},
    known,
    parse::Parsed,
};

/// The service id of a flow that is none of a Service's; their numbers begin at 1.
pub const NO_SERVICE: u32 = 0;

/// Whether the client of a SYN that is for no frontend has a connection by a
/// Service to this very receiver, from the same port: one that came in here. What
/// came in elsewhere may be this packet, translated on its way.
#[inline(always)]
pub fn is_second<F: Family>(parsed: &Parsed<F::Addr>, edge: u32) -> bool {
    if !may_be_direct::<F>(parsed) || !known::is_server(&parsed.tuple) {
        return false;
    }
    let Some(flow) = flow::find_confirmed::<F>(&parsed.tuple.reversed()) else {
        return false;
    };
    let (protocol, entry) = (parsed.tuple.protocol, flow.entry());
    entry.direction == REPLY
        && entry.edge == edge
        && matches!(
            entry.state(protocol),
            State::Established | State::HalfClosed
        )
        && !entry.expired(protocol, clock::seconds(), config::timeouts())
}

/// Whether it is a connection to an address that a pod may have.
#[inline(always)]
fn may_be_direct<F: Family>(parsed: &Parsed<F::Addr>) -> bool {
    let dst = &parsed.tuple.dst;
    parsed.is_connection()
        && !config::get().is_some_and(|config| dst.is_in(F::cluster_network(config)))
}

/// Whether the flow is of a direct connection that comes in at another hook. What
/// has its tuple here is the other connection's packet, which XDP has translated.
#[inline(always)]
pub fn is_elsewhere<F: Family>(flow: &Flow<F>, edge: u32) -> bool {
    let entry = flow.entry();
    entry.service == NO_SERVICE && entry.edge != edge
}

/// What such a flow is opened for, in place of a frontend's entry: it has one slot,
/// which is [`receiver`].
pub const SERVICE: ServiceEntry = ServiceEntry {
    first_slot: 0,
    slot_count: 1,
    inner_first_slot: 0,
    inner_slot_count: 1,
    service: NO_SERVICE,
    affinity: 0,
    kind: 0,
    flags: 0,
    parked: 0,
};

/// Whom the client names, as a backend that sees the client's own address.
#[inline(always)]
pub fn receiver<A: Address>(tuple: &Tuple<A>) -> Slot<A> {
    Slot {
        addr: tuple.dst,
        port: tuple.dst_port,
        flags: SLOT_LOCAL,
        backend: BackendRef {
            id: 0,
            generation: 0,
        },
    }
}
