//! How a flow begins: who may, where it leads, and its entries.

use core::ptr;

use aya_ebpf::bindings::{BPF_NOEXIST, bpf_fib_lookup as FibLookup};
use lb_common::{
    Address, Port, Reason,
    flow::{FLOW_MASQUERADED, FLOW_SYN_DATA, FORWARD, FlowEntry, Tuple},
    node::{CONFIG_BYPASS, DEVICE_POD, Device},
    service::{
        AffinityKey, FRONTEND_LOCAL_POLICY, FRONTEND_MAGLEV, FRONTEND_SOURCE_RANGES, FrontendKind,
        SLOT_LOCAL, ServiceEntry, Slot,
    },
};

use crate::{
    config, credit, direct,
    family::Family,
    flow::{self, is_in_use},
    known,
    maps::{DEVICES, SCRATCH, Scratch},
    masquerade, opaque,
    packet::Packet,
    parse::Parsed,
    select::{self, Window},
};

/// How often it is tried to open a flow when the backend chosen already has one
/// with this client's address and port: a client uses one port towards several
/// frontends at once, and two of them may lead to one backend.
const ATTEMPTS: u32 = 4;
/// How often of these with the client's own port, in the hope that another
/// backend is chosen; then the client gets another port.
const OWN_PORT_ATTEMPTS: u32 = 2;

/// The kernel's `EEXIST`.
const EEXIST: i32 = 17;

/// Everything that opening a flow works on, in memory of the CPU's own: the 512
/// bytes of stack do not hold it.
pub struct Opening<A> {
    /// The client's packet, and the frontend that it is for: where
    /// [`crate::edge`] leaves off.
    pub parsed: Parsed<A>,
    pub service: ServiceEntry,
    /// Another connection to the backend has the client's port.
    pub is_port_taken: bool,
    /// Whether the flow begins among the young; else it may stand among the
    /// confirmed from the beginning ([`lb_common::credit`]).
    pub young: bool,
    /// Whether the other table may have flows with the reply's tuple.
    pub looks_into_other: bool,
    /// The backend.
    pub slot: Slot<A>,
    /// Seconds of the monotonic clock.
    pub now: u32,
    /// Where the packet comes in.
    pub ifindex: u32,
    pub edge: u32,
    /// The flow that is being written: its client's direction and the other.
    pub key: Tuple<A>,
    pub entry: FlowEntry<A>,
    pub peer_key: Tuple<A>,
    pub peer: FlowEntry<A>,
    /// By which device the packet will leave.
    pub route: FibLookup,
}

impl<A: Address> Opening<A> {
    /// Notes the packet that opens a flow, and what for.
    #[inline(always)]
    pub fn start<P: Packet>(
        &mut self,
        packet: &P,
        parsed: &Parsed<A>,
        service: Option<&ServiceEntry>,
        now: u32,
    ) {
        // SAFETY: neither packet nor map entry is in this CPU's memory. By
        // assignment, of which the compiler cannot know that, it would be a
        // call of `memmove`.
        unsafe {
            ptr::copy_nonoverlapping(parsed, &raw mut self.parsed, 1);
            if let Some(service) = service {
                ptr::copy_nonoverlapping(service, &raw mut self.service, 1);
            } else {
                self.service = direct::SERVICE;
            }
        }
        self.now = now;
        self.ifindex = packet.ifindex();
        self.edge = packet.edge();
    }

    /// Whether a pod is behind the device.
    #[inline(always)]
    fn is_inside(&self) -> bool {
        device(self.ifindex).is_some_and(|device| device.flags & DEVICE_POD != 0)
    }
}

/// This CPU's [`Opening`].
#[inline(always)]
pub fn opening<F: Family>() -> Option<&'static mut Opening<F::Addr>> {
    const {
        assert!(size_of::<Opening<F::Addr>>() <= size_of::<Scratch>());
        assert!(align_of::<Opening<F::Addr>>() <= align_of::<Scratch>());
    }
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: size and alignment are checked above, and any bytes are integers.
    // The memory is this CPU's, a packet program is not interrupted by another,
    // and each asks for it where it does not hold it yet.
    Some(unsafe { &mut *scratch.cast() })
}

/// Opens a flow for the packet in `work`: checks that the client may, chooses a
/// backend, and writes the entries. [`Reason::NewFlow`] and
/// [`Reason::NewMasqueradedFlow`] say so; [`Reason::Forward`] if there is an
/// entry already.
#[inline(always)]
pub fn open<P: Packet, F: Family>(packet: &P, work: &mut Opening<F::Addr>) -> Reason {
    begin_entry(work);
    if work.service.flags & FRONTEND_SOURCE_RANGES != 0
        && !F::is_in_source_ranges(work.service.service, &work.parsed.tuple.src)
    {
        return Reason::SourceRange;
    }
    // Mostly it is the same for all.
    let is_inside = work.service.has_two_windows() && work.is_inside();
    let reason = match Window::of(&work.service, is_inside) {
        Ok(window) => open_within::<P, F>(window, work),
        Err(reason) => reason,
    };
    if reason != Reason::NewMasqueradedFlow {
        return reason;
    }
    let reason = masquerade::open::<P, F>(packet, work);
    if reason != Reason::NewMasqueradedFlow {
        flow::remove_pair::<F>(&work.parsed.tuple);
    }
    reason
}

/// Opens a flow to one of the backends in the window, and with
/// [`Reason::NewMasqueradedFlow`] asks for the second flow that it needs.
#[inline(never)]
fn open_within<P: Packet, F: Family>(window: Window, work: &mut Opening<F::Addr>) -> Reason {
    let affinity = AffinityKey {
        client: work.parsed.tuple.src,
        service: work.service.service,
    };
    let timeout = work.service.affinity;
    let kept = if timeout == 0 {
        None
    } else {
        select::kept::<F>(&affinity, window, timeout, work.now)
    };
    choose_table(work);
    let hash = select::hash(&work.parsed.tuple);
    let is_direct = work.service.service == direct::NO_SERVICE;
    for attempt in 0..ATTEMPTS {
        let number = if work.service.flags & FRONTEND_MAGLEV != 0 {
            hash
        } else if attempt == 0 {
            select::draw(hash, work.entry.isn)
        } else {
            select::random()
        };
        work.slot = match kept {
            _ if is_direct => direct::receiver(&work.parsed.tuple),
            Some(slot) => *slot,
            None => match window.slot::<F>(number) {
                Ok(slot) => *slot,
                Err(reason) => return reason,
            },
        };
        let port = if attempt < OWN_PORT_ATTEMPTS && !work.is_port_taken {
            work.parsed.tuple.src_port
        } else {
            any_port()
        };
        let reason = try_open::<P, F>(port, work);
        if reason == Reason::TupleConflict {
            continue;
        }
        if timeout != 0 && reason != Reason::Forward {
            select::keep::<F>(&affinity, work.slot.backend, work.now);
        }
        return reason;
    }
    Reason::TupleConflict
}

/// Chooses the table where the flow begins.
///
/// Not inlined: the verifier has less to walk.
#[inline(never)]
fn choose_table<A: Address>(work: &mut Opening<A>) {
    if !work.parsed.is_connection() {
        work.young = true;
        work.looks_into_other = false;
        return;
    }
    work.young = !credit::take(work.now);
    if work.young {
        known::note_young(work.now);
    }
    work.looks_into_other = work.young || known::are_any_young(work.now);
}

/// A port for a client whose own is taken: none of the well-known ones.
#[inline(always)]
fn any_port() -> Port {
    const FIRST: u16 = 1024;
    let ports = u32::from(u16::MAX - FIRST);
    let random = select::random() >> 16;
    Port::from(FIRST.wrapping_add((random.wrapping_mul(ports) >> 16) as u16))
}

/// What the agent has noted about a device.
#[inline(always)]
pub fn device(ifindex: u32) -> Option<&'static Device> {
    // SAFETY: only the agent writes this map. It is not preallocated, so an
    // update brings an entry of its own and the old one stays as it is.
    unsafe { DEVICES.get(&ifindex) }
}

/// Opens a flow with the backend in the slot.
#[inline(never)]
fn try_open<P: Packet, F: Family>(port: Port, work: &mut Opening<F::Addr>) -> Reason {
    let masquerades = must_masquerade(work);
    if P::LEAVES_RARE_TO_TC && masquerades && !config::has(CONFIG_BYPASS) {
        return Reason::RemoteBackend;
    }
    work.key = work.parsed.tuple;
    work.entry.src = work.key.src;
    work.entry.src_port = port;
    work.entry.dst = work.slot.addr;
    work.entry.dst_port = work.slot.port;
    work.entry.backend = work.slot.backend;
    work.entry.direction = FORWARD;
    if masquerades {
        work.entry.flags |= FLOW_MASQUERADED;
    } else {
        work.entry.flags &= !FLOW_MASQUERADED;
    }
    known::note(&work.key, FORWARD, work.now);
    match flow::insert::<F>(work.young, &work.key, &work.entry, BPF_NOEXIST) {
        Ok(()) => {}
        // The next packet of the same flow was faster on another CPU.
        Err(error) if error == -EEXIST => return Reason::Forward,
        Err(_) => return Reason::FlowTableFull,
    }
    let reason = link_peer::<F>(work);
    if reason != Reason::NewFlow {
        flow::remove_entry::<F>(&work.key);
        return reason;
    }
    if masquerades {
        Reason::NewMasqueradedFlow
    } else {
        reason
    }
}

/// Whether the backend must see an address of this node, so that it answers
/// through it: it is on another node, or it is the client itself.
///
/// A pod of this node gets its answers anyway. Its own address is kept where
/// kube-proxy keeps it: towards a `ClusterIP`, and where the policy is `Local`.
#[inline(always)]
fn must_masquerade<A: Address>(work: &Opening<A>) -> bool {
    if work.slot.flags & SLOT_LOCAL != 0 {
        return work.parsed.tuple.src.same(&work.slot.addr);
    }
    let keeps_source = work.service.kind == FrontendKind::ClusterIp as u8
        || work.service.flags & FRONTEND_LOCAL_POLICY != 0;
    !(keeps_source && work.is_inside())
}

/// What an entry says whatever its backend is.
#[inline(always)]
fn begin_entry<A: Address>(work: &mut Opening<A>) {
    work.entry.seen = work.parsed.seen();
    work.entry.seen_peer = 0;
    work.entry.flags = if work.parsed.signals.data {
        FLOW_SYN_DATA
    } else {
        0
    };
    work.entry.service = work.service.service;
    work.entry.isn = work.parsed.signals.seq;
    work.entry.syn_ack = 0;
    work.entry.last_seen = work.now;
    work.entry.edge = work.edge;
}

/// Writes the entry of the other direction, unless a living flow has its tuple
/// already: a client may use one port towards two frontends, and both may
/// choose this backend.
#[inline(never)]
pub fn link_peer<F: Family>(work: &mut Opening<F::Addr>) -> Reason {
    work.peer_key = work.entry.peer_key(work.key.protocol);
    work.peer = work.entry.mirrored(&work.key);
    known::note(&work.peer_key, work.peer.direction, work.now);
    let inserted = if is_in_other_table::<F>(work) {
        Err(-EEXIST)
    } else {
        flow::insert::<F>(work.young, &work.peer_key, &work.peer, BPF_NOEXIST)
    };
    match opaque::error(inserted) {
        0 => Reason::NewFlow,
        error if error == -EEXIST => replace_peer::<F>(work),
        _ => Reason::FlowTableFull,
    }
}

/// Whether a flow with the reply's tuple is, or was, in the other table than this one.
#[inline(always)]
fn is_in_other_table<F: Family>(work: &Opening<F::Addr>) -> bool {
    if !work.looks_into_other {
        return false;
    }
    let flow = if work.young {
        flow::find_confirmed::<F>(&work.peer_key)
    } else {
        flow::find_young::<F>(&work.peer_key)
    };
    flow.is_some()
}

/// Writes the entry of the other direction where one is or was.
#[inline(never)]
fn replace_peer<F: Family>(work: &Opening<F::Addr>) -> Reason {
    if is_in_use::<F>(&work.peer_key, work.now) {
        return Reason::TupleConflict;
    }
    // What is there has ended.
    match flow::replace::<F>(work.young, &work.peer_key, &work.peer) {
        Ok(()) => Reason::NewFlow,
        Err(_) => Reason::FlowTableFull,
    }
}
