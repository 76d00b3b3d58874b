//! The life of a flow: found, advanced, over. How one begins is in
//! [`crate::open`].
//!
//! Two tables hold flows. Connections that both sides have confirmed stand in
//! one of their own, so that whoever forges senders pushes out what has not
//! been confirmed, and never an established connection. As long as clients do
//! answer, connections stand there from their beginning ([`lb_common::credit`]);
//! only others have to move. Datagrams, of which nothing can be confirmed, are in
//! the young table for all their life.
//!
//! Entries are changed in place by whichever CPU has the packet. Each field is
//! written by one store, and every change is one that may be lost or repeated:
//! a bit that is only ever set, or a time that the next packet writes again.
//! In an LRU map the memory may, very rarely, be given to another flow between
//! lookup and store; that flow then sees a bit or a time that the next packets
//! of either flow put right or outlive.

use core::ptr::{self, NonNull};

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use lb_common::{
    Port, Reason,
    flow::{
        EDGE_XDP, FLOW_ALSO_YOUNG, FLOW_MASQUERADED, FLOW_PORT_TAKEN, FORWARD, FlowEntry,
        MASQUERADE, REPLY, Tuple, UDP, is_confirmed, is_from_client, seen,
    },
    service::ServiceKey,
};

use crate::{
    config, credit,
    family::{Family, is_alive},
    known,
    parse::{Fragment, Parsed},
};

/// An entry in one of the flow tables.
pub struct Flow<F: Family> {
    entry: *mut FlowEntry<F::Addr>,
    young: bool,
}

/// The entry for packets with this tuple, among the confirmed connections.
#[inline(always)]
pub fn find_confirmed<F: Family>(tuple: &Tuple<F::Addr>) -> Option<Flow<F>> {
    let entry = F::flows().get_ptr_mut(tuple)?;
    Some(Flow {
        entry,
        young: false,
    })
}

/// The entry for packets with this tuple, among all others.
#[inline(always)]
pub fn find_young<F: Family>(tuple: &Tuple<F::Addr>) -> Option<Flow<F>> {
    let entry = F::young().get_ptr_mut(tuple)?;
    Some(Flow { entry, young: true })
}

/// The entry for packets with this tuple.
#[inline(always)]
pub fn find<F: Family>(parsed: &Parsed<F::Addr>, now: u32) -> Option<Flow<F>> {
    if parsed.is_connection() {
        let flow = find_confirmed(&parsed.tuple);
        // What is large enough for fragments comes after the handshake.
        if flow.is_some() || parsed.fragment == Fragment::Later {
            return flow;
        }
    }
    let entry = entry_among_young::<F>(&parsed.tuple, parsed.is_syn(), now);
    Some(Flow {
        entry: NonNull::new(entry)?.as_ptr(),
        young: true,
    })
}

/// The entry of [`find_young`], or null; for a SYN only if any connection may be
/// among the young.
///
/// Not inlined: the verifier has less to walk.
#[inline(never)]
fn entry_among_young<F: Family>(
    tuple: &Tuple<F::Addr>,
    is_syn: bool,
    now: u32,
) -> *mut FlowEntry<F::Addr> {
    if is_syn && !known::are_any_young(now) {
        return ptr::null_mut();
    }
    F::young().get_ptr_mut(tuple).unwrap_or(ptr::null_mut())
}

/// As [`find`], for a tuple that is not the packet's own.
#[inline(always)]
pub fn find_by<F: Family>(tuple: &Tuple<F::Addr>, is_connection: bool) -> Option<Flow<F>> {
    if is_connection && let Some(flow) = find_confirmed(tuple) {
        return Some(flow);
    }
    find_young(tuple)
}

impl<F: Family> Flow<F> {
    /// The entry as it is now. The compiler loads the fields that are used;
    /// asking again is cheaper than keeping 60 bytes on a stack of 512.
    #[inline(always)]
    pub fn entry(&self) -> FlowEntry<F::Addr> {
        // SAFETY: the pointer is the kernel's, valid while the program runs.
        unsafe { *self.entry }
    }

    /// The entry where it is, for code that must not copy it.
    #[inline(always)]
    pub fn get(&self) -> &FlowEntry<F::Addr> {
        // SAFETY: the pointer is the kernel's, valid while the program runs.
        unsafe { &*self.entry }
    }

    /// Why a packet of this entry is translated.
    #[inline(always)]
    pub fn reason(&self) -> Reason {
        match self.entry().direction {
            FORWARD => Reason::Forward,
            REPLY => Reason::Reply,
            MASQUERADE => Reason::Masqueraded,
            _ => Reason::Unmasqueraded,
        }
    }

    /// Whether the packet is none of this flow: it has been silent too long,
    /// its ports begin a new connection, or (UDP) its backend has gone, or its
    /// frontend, for which it is looked once in a second.
    #[inline(always)]
    pub fn is_over(&self, parsed: &Parsed<F::Addr>, now: u32) -> bool {
        let protocol = parsed.tuple.protocol;
        if self.entry().expired(protocol, now, config::timeouts()) {
            return true;
        }
        if !parsed.is_connection() {
            let (entry, to) = (self.entry(), &parsed.tuple);
            return entry.direction == FORWARD
                && (!is_alive(entry.backend)
                    || entry.last_seen != now && !is_frontend::<F>(&to.dst, to.dst_port));
        }
        if !is_from_client(self.entry().direction) {
            // A backend that answers another SYN than the one that opened this
            // flow answers a client that talks to it directly, from a port
            // that it used for this flow before.
            return parsed.answers_other(self.get());
        }
        parsed.is_syn()
            && (self.is_port_taken()
                || parsed.signals.seq != self.entry().isn
                    && self.entry().state(protocol).yields_to_syn())
    }

    /// Whether the client's next SYN needs another port.
    #[inline(always)]
    pub fn is_port_taken(&self) -> bool {
        self.entry().flags & FLOW_PORT_TAKEN != 0
    }

    /// Whether the backend, instead of answering the client's SYN, acknowledges
    /// what another connection with these ports has sent: one that is not klb's
    /// ([`crate::direct`]), or that it alone remembers. Seen by the client, this
    /// would be answered with a RST, and end the other connection.
    #[inline(always)]
    pub fn meets_another(&self, parsed: &Parsed<F::Addr>) -> bool {
        let entry = self.entry();
        entry.direction == REPLY && entry.seen == 0 && parsed.is_bare_ack()
    }

    /// Notes what the packet tells, in both entries of the flow; nothing is
    /// written, and the other entry is not looked up, when that is nothing new
    /// within the second. `edge` is where a client's packet came in.
    #[inline(always)]
    pub fn advance(&self, parsed: &Parsed<F::Addr>, now: u32, edge: u32) {
        let entry = self.entry();
        let mut seen = entry.seen | parsed.seen();
        let mut isn = entry.isn;
        let mut syn_ack = entry.syn_ack;
        let mut edge = edge;
        if is_from_client(entry.direction) {
            if parsed.is_syn() {
                isn = parsed.signals.seq;
            } else if parsed.acknowledges(entry.syn_ack) {
                seen |= seen::ACKED;
            }
        } else if parsed.is_syn_ack() {
            syn_ack = parsed.signals.seq.wrapping_add(1);
        }
        // Where the client has acknowledged the backend's SYN all else confirms
        // nothing more.
        if (seen | entry.seen_peer) & seen::ACKED != 0 {
            seen &= !seen::DATA | entry.seen;
        }
        // TC and XDP may share a flow: fragments go through TC. What XDP has
        // translated TC sees too, so XDP is what is to be remembered.
        if entry.direction != FORWARD || entry.edge == edge | EDGE_XDP {
            edge = entry.edge;
        }
        if seen == entry.seen
            && now == entry.last_seen
            && isn == entry.isn
            && syn_ack == entry.syn_ack
            && edge == entry.edge
        {
            return;
        }
        // A backend's datagrams are no news of a frontend that has gone: the
        // client's next one is to look.
        if !parsed.is_connection()
            && entry.direction == REPLY
            && entry.last_seen != now
            && !is_frontend::<F>(&self.get().src, entry.src_port)
        {
            return;
        }
        note_ends(&parsed.tuple, self, now);
        // SAFETY: see the head of this file.
        unsafe {
            (*self.entry).seen = seen;
            (*self.entry).last_seen = now;
            (*self.entry).isn = isn;
            (*self.entry).syn_ack = syn_ack;
            (*self.entry).edge = edge;
        }
        tell_peer(&parsed.tuple, self);
        if parsed.is_connection() {
            settle(
                &parsed.tuple,
                self,
                is_confirmed(entry.seen, entry.seen_peer),
            );
        }
    }
}

/// Whether datagrams may be sent to such a frontend.
#[inline(never)]
fn is_frontend<F: Family>(addr: &F::Addr, port: Port) -> bool {
    F::service(&ServiceKey::new(*addr, port, UDP)).is_some()
}

/// Has the client's next SYN open a new flow, with another port; given an entry
/// from the backend.
#[inline(never)]
pub fn take_port<F: Family>(tuple: &Tuple<F::Addr>, flow: &Flow<F>) -> Reason {
    if let Some(peer) = find_by::<F>(&flow.entry().peer_key(tuple.protocol), true) {
        // SAFETY: see the head of this file.
        unsafe { (*peer.entry).flags |= FLOW_PORT_TAKEN };
    }
    Reason::PortTaken
}

/// Has packets of both directions known as those of a flow; once a second is
/// enough.
///
/// Not inlined, nor are those below: they run seldom, and the 512 bytes of
/// stack do not hold two more tuples in every caller.
#[inline(never)]
fn note_ends<F: Family>(tuple: &Tuple<F::Addr>, flow: &Flow<F>, now: u32) {
    let entry = flow.entry();
    if entry.last_seen == now {
        return;
    }
    if flow.young && tuple.protocol != UDP {
        known::note_young(now);
    }
    known::note(tuple, entry.direction, now);
    let peer_key = entry.peer_key(tuple.protocol);
    known::note(&peer_key, entry.direction ^ 1, now);
}

/// Brings the other direction up to date, and back if the LRU dropped it: one
/// direction without the other would be a connection that hangs.
#[inline(never)]
fn tell_peer<F: Family>(tuple: &Tuple<F::Addr>, flow: &Flow<F>) {
    let entry = flow.entry();
    let peer_key = entry.peer_key(tuple.protocol);
    let peer = if flow.young {
        find_young::<F>(&peer_key)
    } else {
        find_confirmed::<F>(&peer_key)
    };
    match peer {
        Some(peer) if peer.entry().mirrors(tuple) => {
            // SAFETY: see the head of this file.
            unsafe {
                (*peer.entry).seen_peer = entry.seen;
                (*peer.entry).last_seen = entry.last_seen;
                (*peer.entry).isn = entry.isn;
                (*peer.entry).syn_ack = entry.syn_ack;
                (*peer.entry).edge = entry.edge;
            }
        }
        // Another flow has the tuple.
        Some(_) => {}
        // A full table shows when a flow is opened.
        None => {
            let peer = entry.mirrored(tuple);
            let _ = insert::<F>(flow.young, &peer_key, &peer, BPF_NOEXIST);
        }
    }
}

/// What follows from the news of a connection: it may be confirmed now, or may have
/// been for a while.
#[inline(never)]
fn settle<F: Family>(tuple: &Tuple<F::Addr>, flow: &Flow<F>, was_confirmed: bool) {
    let entry = flow.entry();
    if !is_confirmed(entry.seen, entry.seen_peer) {
        return;
    }
    if flow.young {
        confirm(tuple, flow);
    } else if entry.flags & FLOW_ALSO_YOUNG != 0 {
        leave_young(tuple, flow);
    } else if !was_confirmed {
        earn(&entry);
    }
}

/// A connection that is confirmed is credit for another one; of two flows of one
/// connection the first counts.
#[inline(always)]
fn earn<A>(entry: &FlowEntry<A>) {
    if entry.direction <= REPLY {
        credit::give();
    }
}

/// Puts both entries of a connection into the table of confirmed ones.
///
/// They stay among the young for now: another CPU may have missed them there
/// just before, and looks among the young next. If it missed them twice, its
/// packet would pass untranslated, and whoever got it would reset the
/// connection. [`leave_young`] ends it.
#[inline(never)]
fn confirm<F: Family>(tuple: &Tuple<F::Addr>, flow: &Flow<F>) {
    let peer_key = flow.entry().peer_key(tuple.protocol);
    let Some(peer) = find_young::<F>(&peer_key) else {
        return;
    };
    if !peer.entry().mirrors(tuple) {
        return;
    }
    // SAFETY: see the head of this file. Among the young, nobody looks at it.
    unsafe {
        (*peer.entry).flags |= FLOW_ALSO_YOUNG;
        (*flow.entry).flags |= FLOW_ALSO_YOUNG;
    }
    // A failure leaves the connection young, as it was.
    let is_there = F::flows().insert(&peer_key, peer.get(), u64::from(BPF_ANY));
    if is_there.is_ok() {
        let _ = F::flows().insert(tuple, flow.get(), u64::from(BPF_ANY));
        earn(flow.get());
    }
}

/// Removes what [`confirm`] left of a connection among the young: with its first
/// packet that brings something new, which is the next second's or a FIN.
#[inline(never)]
fn leave_young<F: Family>(tuple: &Tuple<F::Addr>, flow: &Flow<F>) {
    let _ = F::young().remove(&flow.entry().peer_key(tuple.protocol));
    let _ = F::young().remove(tuple);
    // SAFETY: see the head of this file.
    unsafe { (*flow.entry).flags &= !FLOW_ALSO_YOUNG };
}

/// Removes all entries of the flow that has `tuple` in one direction, where this was
/// found.
#[inline(never)]
pub fn remove<F: Family>(tuple: &Tuple<F::Addr>, flow: &Flow<F>) {
    let entry = flow.entry();
    if entry.flags & FLOW_MASQUERADED != 0 {
        remove_masquerade::<F>(&entry, tuple);
    }
    remove_both(tuple, flow);
}

/// Removes the second flow of one that is masqueraded, given either entry of the
/// first.
#[inline(always)]
fn remove_masquerade<F: Family>(entry: &FlowEntry<F::Addr>, tuple: &Tuple<F::Addr>) {
    let second = if entry.direction == FORWARD {
        entry.translated(tuple.protocol)
    } else {
        tuple.reversed()
    };
    remove_pair::<F>(&second);
}

/// Removes both entries of a flow, from whichever table.
#[inline(always)]
pub fn remove_pair<F: Family>(tuple: &Tuple<F::Addr>) {
    if let Some(flow) = find_by::<F>(tuple, true) {
        remove_both(tuple, &flow);
    }
}

/// As [`remove_pair`], given one of the two.
#[inline(never)]
fn remove_both<F: Family>(tuple: &Tuple<F::Addr>, flow: &Flow<F>) {
    let peer_key = flow.entry().peer_key(tuple.protocol);
    let peer = find_by::<F>(&peer_key, true);
    // Whoever is faster in removing either does what we want.
    if let Some(peer) = peer
        && peer.entry().mirrors(tuple)
    {
        remove_found(&peer_key, &peer);
    }
    remove_found(tuple, flow);
}

/// Removes an entry from where it was found. To look into the other table takes
/// half as long again.
#[inline(always)]
fn remove_found<F: Family>(tuple: &Tuple<F::Addr>, flow: &Flow<F>) {
    if flow.young || flow.entry().flags & FLOW_ALSO_YOUNG != 0 {
        let _ = F::young().remove(tuple);
    }
    if !flow.young {
        let _ = F::flows().remove(tuple);
    }
}

/// Writes an entry into one of the tables, the young one or that of confirmed
/// connections.
#[inline(always)]
pub fn insert<F: Family>(
    young: bool,
    key: &Tuple<F::Addr>,
    entry: &FlowEntry<F::Addr>,
    flags: u32,
) -> Result<(), i32> {
    if young {
        F::young().insert(key, entry, u64::from(flags))
    } else {
        F::flows().insert(key, entry, u64::from(flags))
    }
}

/// As [`insert`], in place of what either table has.
#[inline(always)]
pub fn replace<F: Family>(
    young: bool,
    key: &Tuple<F::Addr>,
    entry: &FlowEntry<F::Addr>,
) -> Result<(), i32> {
    let _ = if young {
        F::flows().remove(key)
    } else {
        F::young().remove(key)
    };
    insert::<F>(young, key, entry, BPF_ANY)
}

#[inline(always)]
pub fn remove_entry<F: Family>(tuple: &Tuple<F::Addr>) {
    let _ = F::flows().remove(tuple);
    let _ = F::young().remove(tuple);
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
    if !known::may_be_answer(&answer) {
        return Reason::NotService;
    }
    match find_young::<F>(&answer) {
        Some(flow) if flow.entry().direction == REPLY && flow.entry().edge == edge => {
            remove::<F>(&answer, &flow);
            Reason::StaleFlow
        }
        _ => Reason::NotService,
    }
}

/// Whether the tuple belongs to a flow that goes on. An entry that has expired,
/// or has lost its other direction, is in nobody's way.
#[inline(never)]
pub fn is_in_use<F: Family>(key: &Tuple<F::Addr>, now: u32) -> bool {
    let Some(flow) = find_by::<F>(key, true) else {
        return false;
    };
    let peer_key = flow.entry().peer_key(key.protocol);
    !flow.entry().expired(key.protocol, now, config::timeouts())
        && find_by::<F>(&peer_key, true).is_some_and(|peer| peer.entry().mirrors(key))
}
