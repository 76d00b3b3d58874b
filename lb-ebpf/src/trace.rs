//! Telling `klb trace` what happens to packets and calls.
//!
//! Where nobody listens this is the load of one number, at a few places: the
//! settings of the trace are an array, whose lookup the kernel compiles into an
//! address. All else is in functions of their own, behind that.
//!
//! A packet is remembered where it comes in ([`begin`]), the tuple by which its
//! flow is looked up is noted there ([`note`]), and once its outcome is settled
//! ([`end`]) the flow's entry tells how it was translated, and of which Service it
//! is. Whether anybody asked for it is decided then.

use core::{
    hint::black_box,
    ptr::{copy_nonoverlapping, slice_from_raw_parts},
};

use aya_ebpf::{
    EbpfContext as _,
    helpers::{
        bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_ktime_get_ns, bpf_skb_load_bytes,
        bpf_xdp_load_bytes,
    },
    programs::{TcContext, XdpContext},
};
use lb_common::{
    Addr6, Address, Hook, Port, Reason,
    flow::{Tuple, UDP},
    reason::Effect,
    service::ServiceKey,
    socket::SOCKET_REVERSE,
    trace::{
        EVENT_DATAGRAM, EVENT_ENDS, EVENT_TRANSLATED, Ends, Event, OLD_XDP_BYTES, TRACE_BYTES,
        Trace, Tracing, bits_of_effect,
    },
};

use crate::{
    clock,
    edge::Outcome,
    family::{Family, V4, V6},
    flow,
    maps::{EVENTS, TRACE, TRACING},
    opaque,
    packet::{HAS_XDP_FRAGS, Packet},
    socket::Call,
};

/// Reasons of packets and calls that go on changed.
const TRANSLATED: u64 = bits_of_effect(Effect::Translate);

/// No address.
const NOWHERE: Addr6 = Addr6::from_words([0; 4]);

/// Numbers of the two families in [`Tracing::family`].
const IPV4: u32 = 4;
const IPV6: u32 = 6;

/// A packet whose first bytes can be copied.
pub trait Capture {
    /// Copies the first `length` bytes, 1 to [`TRACE_BYTES`] and no more than there
    /// are. Returns how many were copied.
    fn copy_start(&self, to: *mut u8, length: u32) -> u32;
}

impl Capture for TcContext {
    #[inline(always)]
    fn copy_start(&self, to: *mut u8, length: u32) -> u32 {
        // SAFETY: the context is the kernel's, and the caller has room.
        match unsafe { bpf_skb_load_bytes(self.as_ptr(), 0, to.cast(), length) } {
            0 => length,
            _ => 0,
        }
    }
}

impl Capture for XdpContext {
    #[inline(always)]
    fn copy_start(&self, to: *mut u8, length: u32) -> u32 {
        if HAS_XDP_FRAGS.load() == 0 {
            return copy_words(self, to, length);
        }
        // SAFETY: as for TC, and the helper came with that for several buffers.
        match unsafe { bpf_xdp_load_bytes(self.ctx, 0, to.cast(), length) } {
            0 => length,
            _ => 0,
        }
    }
}

/// Before Linux 5.18 a packet under XDP can be read word by word only.
#[inline(always)]
fn copy_words(packet: &XdpContext, to: *mut u8, length: u32) -> u32 {
    const WORD: usize = size_of::<u64>();
    let mut at = 0;
    while at < OLD_XDP_BYTES {
        let Some(word) = packet.pointer::<u64>(at) else {
            break;
        };
        // SAFETY: within the packet, and within the caller's room.
        unsafe { copy_nonoverlapping(word, to.add(at).cast(), 1) };
        at = at.wrapping_add(WORD);
    }
    let copied = at as u32 ^ opaque::zero();
    if copied < length { copied } else { length }
}

/// What somebody asks for who listens.
#[inline(always)]
fn listener() -> Option<&'static Trace> {
    let trace = TRACE.get(0)?;
    // SAFETY: a field of an entry that the command writes. Volatile, or what was
    // read before a packet was handled would count after it.
    let until = unsafe { (&raw const trace.until).read_volatile() };
    if until == 0 { None } else { Some(trace) }
}

#[inline(always)]
fn tracing() -> Option<*mut Tracing> {
    TRACING.get_ptr_mut(0)
}

/// A packet comes in.
#[inline(always)]
pub fn begin<P: Packet>(packet: &P) {
    if let Some(trace) = listener() {
        remember(packet, trace);
    }
}

/// Remembers the packet as it is, and forgets the one before it.
#[inline(never)]
fn remember<P: Packet>(packet: &P, trace: &Trace) {
    let Some(tracing) = tracing() else {
        return;
    };
    // SAFETY: the memory is this CPU's, and a packet program is not interrupted by
    // another. Fields are written one by one: as a whole it would be a call of
    // `memset`.
    unsafe {
        if !trace.is_on(clock::seconds()) {
            (*tracing).event.trace = 0;
            forget();
            return;
        }
        (*tracing).event.trace = trace.id;
        (*tracing).family = 0;
        (*tracing).event.length = packet.length() as u32;
        (*tracing).event.captured = capture(packet, trace, (&raw mut (*tracing).bytes).cast());
    }
}

/// Nobody has put off the end of the trace: that has not to be found again for
/// each packet.
///
/// A command that begins at this very moment is not heard until it puts off the
/// end for the first time.
#[inline(always)]
fn forget() {
    if let Some(trace) = TRACE.get_ptr_mut(0) {
        // SAFETY: one store of a number.
        unsafe { (&raw mut (*trace).until).write_volatile(0) };
    }
}

/// Copies as much of the packet's start as is wanted.
#[inline(always)]
fn capture<P: Packet>(packet: &P, trace: &Trace, to: *mut u8) -> u16 {
    const MASK: u32 = TRACE_BYTES as u32 - 1;
    let (length, wanted) = (packet.length() as u32, trace.snaplen);
    let length = if length < wanted { length } else { wanted };
    if length == 0 {
        return 0;
    }
    // In a form in which every verifier sees the bounds; see `packet`.
    let length = (black_box(length.wrapping_sub(1)) & MASK) + 1;
    packet.copy_start(to, length) as u16
}

/// A flow is looked up by this tuple.
#[inline(always)]
pub fn note<F: Family>(tuple: &Tuple<F::Addr>) {
    if listener().is_some() {
        keep::<F>(tuple);
    }
}

/// The first tuple is the packet's as it came in.
#[inline(never)]
fn keep<F: Family>(tuple: &Tuple<F::Addr>) {
    let Some(tracing) = tracing() else {
        return;
    };
    // SAFETY: as in `remember`; there is room for a tuple of either family.
    unsafe {
        const { assert!(size_of::<Tuple<F::Addr>>() <= size_of::<[u32; 10]>()) };
        if (*tracing).family == 0 {
            (*tracing).event.before = Ends::of(tuple);
            (*tracing).event.protocol = tuple.protocol;
        }
        copy_nonoverlapping(tuple, (&raw mut (*tracing).tuple).cast(), 1);
        (*tracing).family = if F::HEADER_CHECKSUM.is_some() {
            IPV4
        } else {
            IPV6
        };
    }
}

/// What becomes of the packet is settled. Returns the same.
#[inline(always)]
pub fn end<P: Packet>(packet: &P, hook: Hook, outcome: Outcome) -> Outcome {
    let Some(trace) = listener() else {
        return outcome;
    };
    let reason = opaque::reason(outcome.reason);
    tell(packet, hook, reason, trace);
    Outcome { reason, ..outcome }
}

/// Tells the packet that is remembered, if somebody asked for it.
#[inline(never)]
fn tell<P: Packet>(packet: &P, hook: Hook, reason: Reason, trace: &Trace) {
    let Some(tracing) = tracing() else {
        return;
    };
    // SAFETY: as in `remember`.
    let tracing = unsafe { &mut *tracing };
    if tracing.event.trace != trace.id || !trace.has_hook(hook) || !trace.has_reason(reason) {
        return;
    }
    tracing.event.flags = 0;
    tracing.event.service = 0;
    match tracing.family {
        IPV4 => complete::<V4>(tracing, reason),
        IPV6 => complete::<V6>(tracing, reason),
        _ => {
            tracing.event.before = Ends::default();
            tracing.event.protocol = 0;
        }
    }
    if tracing.event.flags & EVENT_TRANSLATED == 0 {
        tracing.event.after = Ends::default();
    }
    let event = &tracing.event;
    if !is_about(
        trace,
        event.service,
        event.protocol,
        &event.before,
        &event.after,
    ) {
        return;
    }
    tracing.event.hook = hook as u8;
    tracing.event.reason = reason as u8;
    tracing.event.ifindex = packet.ifindex();
    // SAFETY: the helper takes nothing.
    tracing.event.time = unsafe { bpf_ktime_get_ns() };
    tell_with_frames(packet, reason, trace, tracing);
}

/// Finds of which flow the packet is, or for which frontend.
#[inline(never)]
fn complete<F: Family>(tracing: &mut Tracing, reason: Reason) {
    // SAFETY: `keep` has put a tuple of this family there.
    let tuple = unsafe { &*(&raw const tracing.tuple).cast::<Tuple<F::Addr>>() };
    tracing.event.flags = EVENT_ENDS;
    if let Some(flow) = flow::find_by::<F>(tuple, tuple.protocol != UDP) {
        let entry = flow.get();
        tracing.event.service = entry.service;
        if TRANSLATED >> (reason as u32) & 1 != 0 {
            tracing.event.after = Ends {
                src: entry.src.mapped(),
                dst: entry.dst.mapped(),
                src_port: entry.src_port,
                dst_port: entry.dst_port,
            };
            tracing.event.flags = EVENT_ENDS | EVENT_TRANSLATED;
        }
    } else {
        tracing.event.service = service_of::<F>(tuple.dst, tuple.dst_port, tuple.protocol);
    }
}

/// The Service of a frontend; 0 if there is none.
#[inline(always)]
fn service_of<F: Family>(addr: F::Addr, port: Port, protocol: u8) -> u32 {
    F::service(&ServiceKey::new(addr, port, protocol)).map_or(0, |entry| entry.service)
}

/// Not inlined: it is needed once for each kind of packet and call.
#[inline(never)]
fn is_about(trace: &Trace, service: u32, protocol: u8, before: &Ends, after: &Ends) -> bool {
    trace.is_about(service, protocol, before, after)
}

/// Puts the packet as it goes on behind the packet as it came, and all into the
/// ring.
#[inline(always)]
fn tell_with_frames<P: Packet>(packet: &P, reason: Reason, trace: &Trace, tracing: &mut Tracing) {
    /// Of the lengths together, with one at its most.
    const MASK: usize = 4 * TRACE_BYTES - 1;
    const CHANGED: u64 = TRANSLATED | bits_of_effect(Effect::Answer);
    let before = usize::from(tracing.event.captured) & (2 * TRACE_BYTES - 1);
    let mut after = 0;
    tracing.event.length_after = 0;
    if CHANGED >> (reason as u32) & 1 != 0 {
        // SAFETY: `before` is less than half of the room.
        let to = unsafe { (&raw mut tracing.bytes).cast::<u8>().add(before) };
        after = capture(packet, trace, to);
        if after != 0 {
            tracing.event.length_after = packet.length() as u32;
        }
    }
    tracing.event.captured_after = after;
    let frames = black_box(before.wrapping_add(after.into())) & MASK;
    let start = (&raw const tracing.event).cast::<u8>();
    // SAFETY: the frames are right behind the event.
    let told = unsafe { &*slice_from_raw_parts(start, size_of::<Event>() + frames) };
    if EVENTS.output_untyped::<[u8]>(told, 0).is_err() {
        tracing.lost = tracing.lost.wrapping_add(1);
    }
}

/// A process has connected, or sent a datagram. Returns the same reason.
#[inline(always)]
pub fn call<C: Call>(call: &C, reason: Reason, datagram: bool) -> Reason {
    let Some(trace) = listener() else {
        return reason;
    };
    let reason = opaque::reason(reason);
    tell_call(&C::read(call.context()), reason, datagram, trace);
    reason
}

/// The event is made in the ring, and taken back if nobody asked for it: the stack
/// has no room for both ends twice, and a call's program may be interrupted, so
/// that it has no memory of the CPU's own.
#[inline(never)]
fn tell_call<C: Call>(call: &C, reason: Reason, datagram: bool, trace: &Trace) {
    if !trace.has_hook(Hook::Socket) || !trace.has_reason(reason) {
        return;
    }
    if !trace.is_on(clock::seconds()) {
        forget();
        return;
    }
    let Some(mut room) = EVENTS.reserve(0) else {
        if let Some(tracing) = tracing() {
            // SAFETY: the memory is this CPU's.
            unsafe { (*tracing).lost_calls = (*tracing).lost_calls.wrapping_add(1) };
        }
        return;
    };
    let event = room.as_mut_ptr();
    // SAFETY: the room is for one event, of which each field is written before it
    // is told.
    let is_wanted = unsafe {
        describe(call, reason, event);
        let ends = (&(*event).before, &(*event).after);
        is_about(trace, (*event).service, (*event).protocol, ends.0, ends.1)
    };
    if !is_wanted {
        // Its reader is woken all the same, or it would not be for the next one.
        room.discard(0);
        return;
    }
    let comm = bpf_get_current_comm().unwrap_or_default();
    // SAFETY: as before.
    unsafe {
        (*event).comm = comm;
        (*event).pid = (bpf_get_current_pid_tgid() >> 32) as u32;
        (*event).time = bpf_ktime_get_ns();
        (*event).trace = trace.id;
        (*event).ifindex = 0;
        (*event).length = 0;
        (*event).length_after = 0;
        (*event).captured = 0;
        (*event).captured_after = 0;
        (*event).reason = reason as u8;
        (*event).hook = Hook::Socket as u8;
        if datagram {
            (*event).flags |= EVENT_DATAGRAM;
        }
    }
    room.submit(0);
}

/// Both ends of a call, and of which Service it is.
///
/// # Safety
///
/// `event` may be written.
#[inline(always)]
unsafe fn describe<C: Call>(call: &C, reason: Reason, event: *mut Event) {
    let (addr, port, protocol) = (call.addr(), call.port(), call.protocol());
    // SAFETY: the caller's.
    let event = unsafe { &mut *event };
    event.protocol = protocol;
    event.flags = EVENT_ENDS;
    event.service = 0;
    event.before = receiver(addr, port);
    event.after = receiver(NOWHERE, Port::default());
    if TRANSLATED >> (reason as u32) & 1 == 0 {
        event.service = service_of::<C::Family>(addr, port, protocol);
        return;
    }
    // SAFETY: fields are read at once.
    if let Some(shown) = unsafe { C::Family::sockets().get(&call.key(SOCKET_REVERSE)) } {
        event.service = shown.service;
        event.before = receiver(shown.addr, shown.port);
        event.after = receiver(addr, port);
        event.flags = EVENT_ENDS | EVENT_TRANSLATED;
    }
}

/// The one end of a call that is known.
#[inline(always)]
fn receiver<A: Address>(addr: A, port: Port) -> Ends {
    Ends {
        src: NOWHERE,
        dst: addr.mapped(),
        src_port: Port::default(),
        dst_port: port,
    }
}
