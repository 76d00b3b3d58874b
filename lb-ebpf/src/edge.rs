//! The edge of the node: where a client's packet comes in and its reply goes
//! out. The whole way of a packet, in reading order.

use lb_common::{
    Address as _, Port, Reason,
    flow::{FLOW_MASQUERADED, is_for_ingress},
    node::CONFIG_BYPASS,
    reason::Effect,
    service::{FRONTEND_REFUSE, ServiceEntry, ServiceKey},
};

use crate::{
    answer, clock, config,
    family::{Family, V4, V6},
    flow::{self, Flow},
    fragment,
    icmp::{self, Side},
    open::{open, opening},
    packet::Packet,
    parse::{Fragment, Parsed, Version, version},
    rewrite, route,
};

/// What becomes of a packet.
pub struct Outcome {
    pub reason: Reason,
    pub way: Way,
}

/// Which way a packet takes that goes on at all.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// What comes behind this hook.
    On,
    /// Out of the device by which it came in.
    Back,
    /// To another device, as a helper has been told.
    Elsewhere,
}

impl Outcome {
    #[inline(always)]
    const fn of(reason: Reason) -> Self {
        let elsewhere =
            matches!(reason, Reason::FragmentReleased) || matches!(reason.effect(), Effect::Answer);
        Self {
            reason,
            way: if elsewhere { Way::Elsewhere } else { Way::On },
        }
    }
}

/// A packet comes in at the edge.
#[inline(always)]
pub fn enter<P: Packet>(packet: &P) -> Outcome {
    match version(packet) {
        Ok(Version::V4) => enter_family::<P, V4>(packet),
        Ok(Version::V6) => enter_family::<P, V6>(packet),
        Err(reason) => Outcome::of(reason),
    }
}

/// Each step is a function of its own, called from here: together they need more
/// than the 512 bytes of stack.
#[inline(always)]
fn enter_family<P: Packet, F: Family>(packet: &P) -> Outcome {
    let reason = match go_on::<P, F>(packet) {
        Some(Reason::OtherProtocol) if !P::LEAVES_RARE_TO_TC => {
            icmp::handle::<P, F>(packet, Side::In)
        }
        Some(Reason::Fragment) if !P::LEAVES_RARE_TO_TC => fragment::keep::<P, F>(packet),
        Some(Reason::FragmentReleased) if !P::LEAVES_RARE_TO_TC => fragment::unload::<P, F>(packet),
        Some(reason) => reason,
        None => begin::<P, F>(packet),
    };
    let is_refused = matches!(reason, Reason::NoBackend | Reason::NoSuchPort);
    if is_refused {
        return Outcome::of(if P::LEAVES_RARE_TO_TC {
            Reason::LeftToTc
        } else {
            answer::unreachable::<P, F>(packet, reason)
        });
    }
    if is_of_flow(reason) && config::has(CONFIG_BYPASS) {
        return past_the_stack::<P, F>(packet, reason);
    }
    Outcome::of(counted(reason))
}

/// A packet of a flow, with `--routing bypass`.
#[inline(always)]
fn past_the_stack<P: Packet, F: Family>(packet: &P, reason: Reason) -> Outcome {
    let Some(reason) = blur::<F>(reason) else {
        return Outcome::of(reason);
    };
    let mut outcome = Outcome::of(counted(reason));
    if route::look_up::<P, F>(packet) && route::count_hop::<P, F>(packet) {
        let to_pod = route::is_last_hook::<P, F>(packet);
        // No egress hook comes behind XDP, nor on the way into a pod, so its
        // work is done here.
        if (P::LEAVES_RARE_TO_TC || to_pod)
            && is_translated_again(reason)
            && blur::<F>(go_out::<P, F>(packet)) == Some(Reason::RewriteFailed)
        {
            return Outcome::of(Reason::RewriteFailed);
        }
        outcome.way = route::send::<P, F>(packet, to_pod);
    }
    outcome
}

/// The reason to count for one that [`go_on`] gives.
#[inline(always)]
const fn counted(reason: Reason) -> Reason {
    match reason {
        Reason::Masqueraded => Reason::Forward,
        reason => reason,
    }
}

/// Whether an egress hook has something to do with a packet for which [`go_on`]
/// or [`begin`] gave this reason.
#[inline(always)]
const fn is_translated_again(reason: Reason) -> bool {
    !matches!(reason, Reason::NewFlow | Reason::Forward)
}

/// The same reason, as a number that the verifier does not know: else it walks
/// through all that follows for each of them.
#[inline(always)]
fn blur<F: Family>(reason: Reason) -> Option<Reason> {
    let work = opening::<F>()?;
    let memory = &raw mut work.reason;
    // SAFETY: it is this CPU's memory, and what is read is what was written.
    // Volatile, so that the compiler does not know it either.
    unsafe {
        memory.write_volatile(reason);
        Some(memory.read_volatile())
    }
}

/// Whether a packet counted under this reason goes on to the other end of a
/// flow.
#[inline(always)]
const fn is_of_flow(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::NewFlow
            | Reason::NewMasqueradedFlow
            | Reason::Forward
            | Reason::Masqueraded
            | Reason::Unmasqueraded
            | Reason::TransitReply
    )
}

/// A packet goes out at the edge.
#[inline(always)]
pub fn leave<P: Packet>(packet: &P) -> Outcome {
    Outcome::of(match version(packet) {
        Ok(Version::V4) => leave_family::<P, V4>(packet),
        Ok(Version::V6) => leave_family::<P, V6>(packet),
        Err(reason) => reason,
    })
}

#[inline(always)]
fn leave_family<P: Packet, F: Family>(packet: &P) -> Reason {
    match go_out::<P, F>(packet) {
        Reason::OtherProtocol => icmp::handle::<P, F>(packet, Side::Out),
        reason => reason,
    }
}

/// A packet that is of a flow, or of no business of klb's. `None` if it opens a
/// flow; what [`begin`] needs is in [`opening`] then.
#[inline(never)]
fn go_on<P: Packet, F: Family>(packet: &P) -> Option<Reason> {
    let parsed = match F::parse(packet) {
        Ok(parsed) => parsed,
        Err(reason) => return Some(reason),
    };
    if !P::LEAVES_RARE_TO_TC && parsed.fragment == Fragment::First {
        if packet.is_carrier() {
            return Some(Reason::FragmentReleased);
        }
        fragment::send_carriers::<P, F>(packet, &parsed.tuple, parsed.id);
    }
    // What is no business of klb's costs two lookups at most. So the flow of what
    // may open one is only looked up if it is for a frontend, and that of all
    // others first.
    let mut service = None;
    if parsed.may_open() {
        service = service_of::<F>(&parsed);
        if service.is_none() {
            return Some(without_frontend::<P, F>(packet, &parsed));
        }
    }
    let flow = flow::find::<F>(&parsed);
    let now = clock::seconds();
    if let Some(flow) = flow {
        if !is_for_ingress(flow.entry().direction) {
            // It is translated where it goes out. What has expired is
            // translated nowhere.
            return Some(Reason::TransitReply);
        }
        if !flow.is_over(&parsed, now) {
            return Some(follow::<P, F>(packet, &parsed, &flow, now));
        }
        flow::remove::<F>(&parsed.tuple);
    }
    let Some(service) = service else {
        return Some(Reason::NoFlow);
    };
    if must_leave_to_tc::<P, F>(packet, &parsed) {
        return Some(Reason::UnfinishedChecksum);
    }
    let Some(work) = opening::<F>() else {
        return Some(Reason::FlowTableFull);
    };
    work.start(packet, &parsed, service, now);
    None
}

/// A packet of a flow that goes on. [`Reason::Masqueraded`], which is
/// [`counted`] as another, says that only half of it is done: the client's
/// packet is to be masqueraded where it goes out.
#[inline(always)]
fn follow<P: Packet, F: Family>(
    packet: &P,
    parsed: &Parsed<F::Addr>,
    flow: &Flow<F>,
    now: u32,
) -> Reason {
    if must_leave_to_tc::<P, F>(packet, parsed) {
        return Reason::UnfinishedChecksum;
    }
    flow.advance(parsed, now, packet.edge());
    let reason = if is_half_done::<P, F>(flow) {
        Reason::Masqueraded
    } else {
        flow.reason()
    };
    rewrite::translate::<P, F>(packet, parsed, flow.get(), reason)
}

/// The packet that is in [`opening`] opens a flow.
#[inline(never)]
fn begin<P: Packet, F: Family>(packet: &P) -> Reason {
    let Some(work) = opening::<F>() else {
        return Reason::FlowTableFull;
    };
    let reason = open::<P, F>(packet, work);
    if !matches!(
        reason,
        Reason::NewFlow | Reason::NewMasqueradedFlow | Reason::Forward
    ) {
        return reason;
    }
    if reason == Reason::NewFlow {
        return rewrite::translate::<P, F>(packet, &work.parsed, &work.entry, reason);
    }
    // Of two flows the second one is in `work`; or it has been opened elsewhere.
    let Some(flow) = flow::find_young::<F>(&work.parsed.tuple) else {
        return Reason::FlowTableFull;
    };
    let reason = if reason == Reason::Forward && is_half_done::<P, F>(&flow) {
        Reason::Masqueraded
    } else {
        reason
    };
    rewrite::translate::<P, F>(packet, &work.parsed, flow.get(), reason)
}

/// Whether a client's packet of this flow is to be masqueraded by this hook too,
/// when it goes out.
#[inline(always)]
fn is_half_done<P: Packet, F: Family>(flow: &Flow<F>) -> bool {
    P::LEAVES_RARE_TO_TC && flow.entry().flags & FLOW_MASQUERADED != 0
}

/// A datagram or a SYN that is for no frontend.
#[inline(always)]
fn without_frontend<P: Packet, F: Family>(packet: &P, parsed: &Parsed<F::Addr>) -> Reason {
    let Some(config) = config::get() else {
        return Reason::NotService;
    };
    let port = parsed.tuple.dst_port.get();
    if !parsed.is_connection() && port.wrapping_sub(config.first_port) < config.port_count {
        // The answer of a backend to an address of this node.
        if let Some(flow) = flow::find_young::<F>(&parsed.tuple) {
            return unmasquerade::<P, F>(packet, parsed, &flow);
        }
    }
    if parsed.tuple.dst.is_in(F::cluster_network(config)) {
        let key = ServiceKey::new(parsed.tuple.dst, Port::default(), 0);
        let refused = F::service(&key).is_some_and(|entry| entry.flags & FRONTEND_REFUSE != 0);
        if refused {
            return Reason::NoSuchPort;
        }
    }
    if parsed.is_connection() {
        return Reason::NotService;
    }
    flow::meet_stranger::<F>(&parsed.tuple, packet.edge())
}

/// A datagram to one of the node's ports that masquerade uses.
#[inline(always)]
fn unmasquerade<P: Packet, F: Family>(
    packet: &P,
    parsed: &Parsed<F::Addr>,
    flow: &Flow<F>,
) -> Reason {
    let now = clock::seconds();
    if !is_for_ingress(flow.entry().direction) || flow.is_over(parsed, now) {
        return Reason::TransitReply;
    }
    follow::<P, F>(packet, parsed, flow, now)
}

/// A packet that may be a reply, or is to be masqueraded.
#[inline(never)]
fn go_out<P: Packet, F: Family>(packet: &P) -> Reason {
    let parsed = match F::parse(packet) {
        Ok(parsed) => parsed,
        Err(reason) => return reason,
    };
    let Some(flow) = flow::find::<F>(&parsed) else {
        return Reason::NotService;
    };
    if is_for_ingress(flow.entry().direction) {
        return Reason::NotService;
    }
    let now = clock::seconds();
    if flow.is_over(&parsed, now) {
        flow::remove::<F>(&parsed.tuple);
        return Reason::StaleFlow;
    }
    flow.advance(&parsed, now, packet.edge());
    rewrite::translate::<P, F>(packet, &parsed, flow.get(), flow.reason())
}

/// The frontend that the packet is sent to. Those at loopback addresses are for
/// sockets only: a packet from elsewhere with such a receiver is a lie.
#[inline(always)]
fn service_of<F: Family>(parsed: &Parsed<F::Addr>) -> Option<&'static ServiceEntry> {
    let tuple = &parsed.tuple;
    if F::is_loopback(&tuple.dst) {
        return None;
    }
    F::service(&ServiceKey::new(tuple.dst, tuple.dst_port, tuple.protocol))
}

/// Whether only TC can keep this packet's checksum true.
#[inline(always)]
fn must_leave_to_tc<P: Packet, F: Family>(packet: &P, parsed: &Parsed<F::Addr>) -> bool {
    P::CHECKSUM_MAY_BE_UNFINISHED && rewrite::looks_unfinished::<P, F>(packet, parsed)
}
