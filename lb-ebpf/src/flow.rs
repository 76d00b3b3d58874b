//! The life of a flow: found, opened, advanced, over.
//!
//! Entries are changed in place by whichever CPU has the packet. Each field is
//! written by one store, and every change is one that may be lost or repeated:
//! a bit that is only ever set, or a time that the next packet writes again.
//! In an LRU map the memory may, very rarely, be given to another flow between
//! lookup and store; that flow then sees a bit or a time that the next packets
//! of either flow put right or outlive.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use lb_common::{
    Address, Reason,
    flow::{FORWARD, FlowEntry, REPLY, Tuple},
    service::{SLOT_LOCAL, ServiceEntry, Slot},
};

use crate::{
    config,
    family::{Family, is_alive},
    parse::Parsed,
    select,
};

/// How often another backend is tried when the one chosen already has a flow
/// with this client's address and port.
const ATTEMPTS: u32 = 4;

/// The kernel's `EEXIST`.
const EEXIST: i32 = 17;

/// An entry in the flow table.
pub struct Flow<F: Family>(*mut FlowEntry<F::Addr>);

/// The entry for packets with this tuple.
#[inline(always)]
pub fn find<F: Family>(tuple: &Tuple<F::Addr>) -> Option<Flow<F>> {
    F::flows().get_ptr_mut(tuple).map(Flow)
}

impl<F: Family> Flow<F> {
    /// The entry as it is now. The compiler loads the fields that are used;
    /// asking again is cheaper than keeping 60 bytes on a stack of 512.
    #[inline(always)]
    pub fn entry(&self) -> FlowEntry<F::Addr> {
        // SAFETY: the pointer is the kernel's, valid while the program runs.
        unsafe { *self.0 }
    }

    /// The entry where it is, for code that must not copy it.
    #[inline(always)]
    pub fn get(&self) -> &FlowEntry<F::Addr> {
        // SAFETY: the pointer is the kernel's, valid while the program runs.
        unsafe { &*self.0 }
    }

    /// Whether the packet is none of this flow: it has been silent too long,
    /// its ports begin a new connection, or (UDP) its backend has gone.
    #[inline(always)]
    pub fn is_over(&self, parsed: &Parsed<F::Addr>, now: u32) -> bool {
        let protocol = parsed.tuple.protocol;
        if self.entry().expired(protocol, now, config::timeouts()) {
            return true;
        }
        if !parsed.is_tcp() {
            return self.entry().direction == FORWARD && !is_alive(self.entry().backend);
        }
        if self.entry().direction == REPLY {
            // A backend that answers another SYN than the one that opened this
            // flow answers a client that talks to it directly, from a port
            // that it used for this flow before.
            return parsed.answers_syn() && parsed.tcp.ack != self.entry().isn.wrapping_add(1);
        }
        parsed.is_syn()
            && parsed.tcp.seq != self.entry().isn
            && self.entry().state(protocol).yields_to_syn()
    }

    /// Notes what the packet tells, in both entries of the flow; nothing is
    /// written, and the other entry is not looked up, when that is nothing new
    /// within the second. `edge` is where the client's packet came in; for the
    /// backend's it is what the entry says.
    #[inline(always)]
    pub fn advance(&self, parsed: &Parsed<F::Addr>, now: u32, edge: u32) {
        let seen = self.entry().seen | parsed.seen();
        let isn = if parsed.is_syn() && self.entry().direction == FORWARD {
            parsed.tcp.seq
        } else {
            self.entry().isn
        };
        let entry = self.entry();
        if seen != entry.seen || now != entry.last_seen || isn != entry.isn || edge != entry.edge {
            // SAFETY: see the head of this file.
            unsafe {
                (*self.0).seen = seen;
                (*self.0).last_seen = now;
                (*self.0).isn = isn;
                (*self.0).edge = edge;
            }
            tell_peer(&parsed.tuple, self);
        }
    }
}

/// Brings the other direction up to date, and back if the LRU dropped it: one
/// direction without the other would be a connection that hangs.
///
/// Not inlined, nor are the two below: they run seldom, and the 512 bytes of
/// stack do not hold two more tuples in every caller.
#[inline(never)]
fn tell_peer<F: Family>(tuple: &Tuple<F::Addr>, flow: &Flow<F>) {
    let entry = flow.entry();
    let peer_key = entry.peer_key(tuple.protocol);
    match find::<F>(&peer_key) {
        Some(peer) if peer.entry().mirrors(tuple) => {
            // SAFETY: see the head of this file.
            unsafe {
                (*peer.0).seen_peer = entry.seen;
                (*peer.0).last_seen = entry.last_seen;
                (*peer.0).isn = entry.isn;
                (*peer.0).edge = entry.edge;
            }
        }
        // Another flow has the tuple.
        Some(_) => {}
        None => {
            // A full table shows when a flow is opened.
            let _ = F::flows().insert(&peer_key, entry.mirrored(tuple), u64::from(BPF_NOEXIST));
        }
    }
}

/// Removes both entries of the flow that has `tuple` in one direction.
#[inline(never)]
pub fn remove<F: Family>(tuple: &Tuple<F::Addr>) {
    let Some(flow) = find::<F>(tuple) else {
        return;
    };
    let peer_key = flow.entry().peer_key(tuple.protocol);
    let peer = find::<F>(&peer_key);
    // Whoever is faster in removing either does what we want.
    if peer.is_some_and(|peer| peer.entry().mirrors(tuple)) {
        let _ = F::flows().remove(&peer_key);
    }
    let _ = F::flows().remove(tuple);
}

/// A datagram that is for no frontend. If its answer would be taken for that of
/// a flow which came in here, the client has used the same port towards a
/// Service before, and now talks to the backend directly: the flow ends. (TCP's
/// SYN-ACK tells the two apart; a datagram has nothing of the kind, so whom the
/// client spoke to last decides.)
///
/// A flow that came in elsewhere is left alone: this may be its own datagram,
/// translated at another hook on its way.
#[inline(always)]
pub fn meet_stranger<F: Family>(tuple: &Tuple<F::Addr>, edge: u32) -> Reason {
    let answer = tuple.reversed();
    match find::<F>(&answer) {
        Some(flow) if flow.entry().direction == REPLY && flow.entry().edge == edge => {
            remove::<F>(&answer);
            Reason::StaleFlow
        }
        _ => Reason::NotService,
    }
}

/// Who opens a flow.
pub struct Opener {
    /// Seconds of the monotonic clock.
    pub now: u32,
    pub edge: u32,
    pub local_backends_only: bool,
}

/// Opens a flow: chooses a backend and writes both entries, and the forward
/// one also to `opened`. Returns [`Reason::NewFlow`] then, and
/// [`Reason::Forward`] if there is an entry already.
#[inline(always)]
pub fn open<F: Family>(
    parsed: &Parsed<F::Addr>,
    service: &ServiceEntry,
    opener: &Opener,
    opened: &mut MaybeUninit<FlowEntry<F::Addr>>,
) -> Reason {
    for _ in 0..ATTEMPTS {
        let reason = try_open::<F>(parsed, service, opener, opened);
        if reason != Reason::TupleConflict {
            return reason;
        }
    }
    Reason::TupleConflict
}

/// Opens a flow with one backend.
#[inline(never)]
fn try_open<F: Family>(
    parsed: &Parsed<F::Addr>,
    service: &ServiceEntry,
    opener: &Opener,
    opened: &mut MaybeUninit<FlowEntry<F::Addr>>,
) -> Reason {
    let slot = match select::backend::<F>(service) {
        Ok(slot) => slot,
        Err(reason) => return reason,
    };
    if opener.local_backends_only && slot.flags & SLOT_LOCAL == 0 {
        return Reason::RemoteBackend;
    }
    let entry = opened.write(first_entry(parsed, slot, service.service, opener));
    match F::flows().insert(&parsed.tuple, &*entry, u64::from(BPF_NOEXIST)) {
        Ok(()) => {}
        // The next packet of the same flow was faster on another CPU.
        Err(error) if error == -EEXIST => return Reason::Forward,
        Err(_) => return Reason::FlowTableFull,
    }
    let reason = link_reply::<F>(&parsed.tuple, entry);
    if reason != Reason::NewFlow {
        let _ = F::flows().remove(&parsed.tuple);
    }
    reason
}

#[inline(always)]
fn first_entry<A: Address>(
    parsed: &Parsed<A>,
    slot: &Slot<A>,
    service: u32,
    opener: &Opener,
) -> FlowEntry<A> {
    FlowEntry {
        src: parsed.tuple.src,
        dst: slot.addr,
        src_port: parsed.tuple.src_port,
        dst_port: slot.port,
        direction: FORWARD,
        seen: parsed.seen(),
        seen_peer: 0,
        flags: 0,
        service,
        backend: slot.backend,
        isn: parsed.tcp.seq,
        last_seen: opener.now,
        edge: opener.edge,
    }
}

/// Writes the reply entry, unless the backend has a living flow with this
/// client's address and port already: a client may use one port towards two
/// frontends, and both may choose this backend.
#[inline(always)]
fn link_reply<F: Family>(tuple: &Tuple<F::Addr>, entry: &FlowEntry<F::Addr>) -> Reason {
    let key = entry.peer_key(tuple.protocol);
    let reply = entry.mirrored(tuple);
    let mut result = F::flows().insert(&key, &reply, u64::from(BPF_NOEXIST));
    if result == Err(-EEXIST) {
        if is_in_use::<F>(&key, entry.last_seen) {
            return Reason::TupleConflict;
        }
        result = F::flows().insert(&key, &reply, u64::from(BPF_ANY));
    }
    match result {
        Ok(()) => Reason::NewFlow,
        Err(_) => Reason::FlowTableFull,
    }
}

/// Whether the entry belongs to a flow that goes on. One that has ended, or has
/// lost its other direction, is in nobody's way.
#[inline(never)]
fn is_in_use<F: Family>(key: &Tuple<F::Addr>, now: u32) -> bool {
    let Some(flow) = find::<F>(key) else {
        return false;
    };
    let peer_key = flow.entry().peer_key(key.protocol);
    !flow.entry().expired(key.protocol, now, config::timeouts())
        && find::<F>(&peer_key).is_some_and(|peer| peer.entry().mirrors(key))
}
