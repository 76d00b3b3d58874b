//! The edge of the node: where a client's packet comes in and its reply goes
//! out. The whole way of a packet, in reading order.

use lb_common::{
    Address as _, Port, Reason,
    flow::{FLOW_MASQUERADED, MASQUERADE, is_for_ingress},
    node::CONFIG_BYPASS,
    reason::Effect,
    service::{FRONTEND_REFUSE, ServiceEntry, ServiceKey},
};

use crate::{
    answer, clock, config, direct,
    family::{Family, V4, V6},
    flow::{self, Flow},
    fragment, icmp, known, opaque,
    open::{open, opening},
    packet::Packet,
    parse::{Fragment, Parsed, Version, version},
    rewrite, route,
    served::is_served,
    trace,
};

/// Which of the two hooks of a device a packet meets.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    In,
    Out,
}

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
        Some(reason) if !P::LEAVES_RARE_TO_TC => fragment_at::<P, F>(packet, reason, Side::In),
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

/// What becomes of a fragment that must wait for its first, and of a carrier; any
/// other reason stays.
#[inline(always)]
fn fragment_at<P: Packet, F: Family>(packet: &P, reason: Reason, side: Side) -> Reason {
    match reason {
        Reason::Fragment => fragment::keep::<P, F>(packet, side),
        Reason::FragmentReleased => fragment::unload::<P, F>(packet, side),
        reason => reason,
    }
}

/// A packet of a flow, with `--routing bypass`.
#[inline(always)]
fn past_the_stack<P: Packet, F: Family>(packet: &P, reason: Reason) -> Outcome {
    let reason = opaque::reason(reason);
    let mut outcome = Outcome::of(counted(reason));
    if let Some(route) = route::look_up::<P, F>(packet) {
        let to_pod = route::is_last_hook(packet, route);
        // No egress hook comes behind XDP, nor on the way into a pod, so its
        // work is done here.
        if (P::LEAVES_RARE_TO_TC || to_pod)
            && is_translated_again(reason)
            && let reason @ (Reason::RewriteFailed | Reason::PortTaken) =
                opaque::reason(go_out::<P, F, true>(packet))
        {
            return Outcome::of(reason);
        }
        outcome.way = route::send::<P, F>(packet, route, to_pod);
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
    match go_out::<P, F, false>(packet) {
        Reason::OtherProtocol => icmp::handle::<P, F>(packet, Side::Out),
        reason => fragment_at::<P, F>(packet, reason, Side::Out),
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
    if is_carrier::<P, F>(packet, &parsed, Side::In) {
        return Some(Reason::FragmentReleased);
    }
    trace::note::<F>(&parsed.tuple);
    // What is no business of klb's costs one lookup at most: a flow is only looked
    // for between ends that have flows.
    let now = known::now_if_flow(&parsed.tuple);
    let mut is_port_taken = false;
    if let Some(now) = now
        && let Some(reason) = as_of_flow::<P, F>(packet, &parsed, now, &mut is_port_taken)
    {
        return Some(reason);
    }
    if !parsed.may_open() {
        return Some(Reason::NoFlow);
    }
    let service = service_of::<F>(&parsed);
    let is_direct = service.is_none() && direct::is_second::<F>(&parsed, packet.edge());
    if service.is_none() && !is_direct {
        return Some(without_frontend::<P, F>(packet, &parsed));
    }
    if must_leave_to_tc::<P, F>(packet, &parsed) {
        return Some(Reason::UnfinishedChecksum);
    }
    let Some(work) = opening::<F>() else {
        return Some(Reason::FlowTableFull);
    };
    work.start(packet, &parsed, service, now.unwrap_or_else(clock::seconds));
    work.is_port_taken = is_port_taken || is_direct;
    None
}

/// What becomes of a packet that is of a flow which goes on. If the flow is over it
/// is removed, and it is told whether its client needs another port.
#[inline(always)]
fn as_of_flow<P: Packet, F: Family>(
    packet: &P,
    parsed: &Parsed<F::Addr>,
    now: u32,
    is_port_taken: &mut bool,
) -> Option<Reason> {
    let flow = flow::find::<F>(parsed, now)?;
    let direction = flow.entry().direction;
    let is_here = is_for_ingress(direction);
    if is_here {
        if direct::is_elsewhere(&flow, packet.edge()) {
            return Some(Reason::NotService);
        }
        if flow.is_over(parsed, now) {
            *is_port_taken |= flow.is_port_taken();
            flow::remove::<F>(&parsed.tuple, &flow);
            return None;
        }
    } else if direction == MASQUERADE && parsed.may_open() {
        // A client's first packet, or datagram, to the backend's own address: of this
        // flow, and translated on its way, or of none.
        return None;
    }
    if must_leave_to_tc::<P, F>(packet, parsed) {
        return Some(Reason::UnfinishedChecksum);
    }
    Some(if is_here {
        follow::<P, F>(packet, parsed, &flow, now)
    } else {
        // It is translated where it goes out; what has expired is translated
        // nowhere.
        Reason::TransitReply
    })
}

/// Whether the packet is there for another that waits. Those that wait for it are
/// sent for.
#[inline(always)]
fn is_carrier<P: Packet, F: Family>(packet: &P, parsed: &Parsed<F::Addr>, side: Side) -> bool {
    if P::LEAVES_RARE_TO_TC || parsed.fragment != Fragment::First {
        return false;
    }
    if packet.is_carrier() {
        return true;
    }
    fragment::meet_first::<P, F>(packet, &parsed.tuple, parsed.id, side);
    false
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
    flow.advance(parsed, now, packet.edge());
    let reason = if is_half_done(flow) {
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
    let Some(flow) = flow::find_by::<F>(&work.parsed.tuple, true) else {
        return Reason::FlowTableFull;
    };
    let reason = if reason == Reason::Forward && is_half_done(&flow) {
        Reason::Masqueraded
    } else {
        reason
    };
    rewrite::translate::<P, F>(packet, &work.parsed, flow.get(), reason)
}

/// Whether a client's packet of this flow is to be masqueraded when it goes out.
#[inline(always)]
fn is_half_done<F: Family>(flow: &Flow<F>) -> bool {
    flow.entry().flags & FLOW_MASQUERADED != 0
}

/// A datagram or a SYN that is for no frontend.
#[inline(always)]
fn without_frontend<P: Packet, F: Family>(packet: &P, parsed: &Parsed<F::Addr>) -> Reason {
    let Some(config) = config::get() else {
        return Reason::NotService;
    };
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

/// A packet that may be a reply, or is to be masqueraded. `KNOWN` if [`go_on`] has
/// found it to be of a flow: then its ends are not asked once more.
#[inline(never)]
fn go_out<P: Packet, F: Family, const KNOWN: bool>(packet: &P) -> Reason {
    let parsed = match F::parse(packet) {
        Ok(parsed) => parsed,
        Err(reason) => return reason,
    };
    if is_carrier::<P, F>(packet, &parsed, Side::Out) {
        return Reason::FragmentReleased;
    }
    trace::note::<F>(&parsed.tuple);
    let now = if KNOWN {
        clock::seconds()
    } else if let Some(now) = known::now_if_flow(&parsed.tuple) {
        now
    } else {
        return Reason::NotService;
    };
    let Some(flow) = flow::find::<F>(&parsed, now) else {
        return Reason::NotService;
    };
    if is_for_ingress(flow.entry().direction) {
        return Reason::NotService;
    }
    if flow.is_over(&parsed, now) {
        flow::remove::<F>(&parsed.tuple, &flow);
        return Reason::StaleFlow;
    }
    if flow.meets_another(&parsed) {
        return flow::take_port::<F>(&parsed.tuple, &flow);
    }
    flow.advance(&parsed, now, packet.edge());
    rewrite::translate::<P, F>(packet, &parsed, flow.get(), flow.reason())
}

/// The frontend that the packet is sent to. Those at loopback addresses are for
/// sockets only: a packet from elsewhere with such a receiver is a lie.
#[inline(always)]
fn service_of<F: Family>(parsed: &Parsed<F::Addr>) -> Option<&'static ServiceEntry> {
    let tuple = &parsed.tuple;
    if !is_served(tuple.dst_port) || F::is_loopback(&tuple.dst) {
        return None;
    }
    F::service(&ServiceKey::new(tuple.dst, tuple.dst_port, tuple.protocol))
}

/// Whether only TC can keep this packet's checksum true.
#[inline(always)]
fn must_leave_to_tc<P: Packet, F: Family>(packet: &P, parsed: &Parsed<F::Addr>) -> bool {
    P::CHECKSUM_MAY_BE_UNFINISHED && rewrite::looks_unfinished::<P, F>(packet, parsed)
}
