//! The edge of the node: where a client's packet comes in and its reply goes
//! out. The whole way of a packet, in reading order.

use core::mem::MaybeUninit;

use lb_common::{
    Reason,
    flow::REPLY,
    service::{ServiceEntry, ServiceKey},
};

use crate::{
    clock,
    family::{Family, V4, V6},
    flow::{self, Opener},
    packet::Packet,
    parse::{Parsed, Version, version},
    rewrite,
};

/// A packet comes in at the edge.
#[inline(always)]
pub fn enter<P: Packet>(packet: &P) -> Reason {
    match version(packet) {
        Ok(Version::V4) => enter_family::<P, V4>(packet),
        Ok(Version::V6) => enter_family::<P, V6>(packet),
        Err(reason) => reason,
    }
}

/// A packet goes out at the edge.
#[inline(always)]
pub fn leave<P: Packet>(packet: &P) -> Reason {
    match version(packet) {
        Ok(Version::V4) => leave_family::<P, V4>(packet),
        Ok(Version::V6) => leave_family::<P, V6>(packet),
        Err(reason) => reason,
    }
}

/// Not inlined, nor is [`leave_family`]: both families in one function need
/// more than the 512 bytes of stack.
#[inline(never)]
fn enter_family<P: Packet, F: Family>(packet: &P) -> Reason {
    let parsed = match F::parse(packet) {
        Ok(parsed) => parsed,
        Err(reason) => return reason,
    };
    // A datagram that is for no frontend costs two lookups, a TCP segment one,
    // or two if it opens a connection. Datagrams of a flow pay for that with a
    // lookup more.
    let service = if parsed.is_tcp() {
        None
    } else {
        match service_of::<F>(&parsed) {
            None => return flow::meet_stranger::<F>(&parsed.tuple, packet.edge()),
            service => service,
        }
    };
    let now = clock::seconds();
    if let Some(flow) = flow::find::<F>(&parsed.tuple) {
        if flow.entry().direction == REPLY {
            // The backend's answer comes in here; it is translated where its
            // client is. An expired one is translated nowhere.
            return Reason::TransitReply;
        }
        if !flow.is_over(&parsed, now) {
            if must_leave_to_tc::<P, F>(packet, &parsed) {
                return Reason::UnfinishedChecksum;
            }
            flow.advance(&parsed, now, packet.edge());
            return rewrite::translate::<P, F>(packet, &parsed, flow.get(), Reason::Forward);
        }
        flow::remove::<F>(&parsed.tuple);
    }
    if parsed.is_tcp() && !parsed.is_syn() {
        return Reason::NoFlow;
    }
    let Some(service) = service.or_else(|| service_of::<F>(&parsed)) else {
        return Reason::NotService;
    };
    if must_leave_to_tc::<P, F>(packet, &parsed) {
        return Reason::UnfinishedChecksum;
    }
    let mut entry = MaybeUninit::uninit();
    let opener = Opener {
        now,
        edge: packet.edge(),
        local_backends_only: P::LOCAL_BACKENDS_ONLY,
    };
    let reason = flow::open::<F>(&parsed, service, &opener, &mut entry);
    match reason {
        Reason::NewFlow => {
            // SAFETY: `open` has written it.
            let entry = unsafe { entry.assume_init_ref() };
            rewrite::translate::<P, F>(packet, &parsed, entry, reason)
        }
        Reason::Forward => match flow::find::<F>(&parsed.tuple) {
            Some(flow) => rewrite::translate::<P, F>(packet, &parsed, flow.get(), reason),
            None => Reason::FlowTableFull,
        },
        refused => refused,
    }
}

#[inline(never)]
fn leave_family<P: Packet, F: Family>(packet: &P) -> Reason {
    let parsed = match F::parse(packet) {
        Ok(parsed) => parsed,
        Err(reason) => return reason,
    };
    let Some(flow) = flow::find::<F>(&parsed.tuple) else {
        return Reason::NotService;
    };
    if flow.entry().direction != REPLY {
        return Reason::NotService;
    }
    let now = clock::seconds();
    if flow.is_over(&parsed, now) {
        flow::remove::<F>(&parsed.tuple);
        return Reason::StaleFlow;
    }
    flow.advance(&parsed, now, flow.entry().edge);
    rewrite::translate::<P, F>(packet, &parsed, flow.get(), Reason::Reply)
}

/// The frontend that the packet is sent to.
#[inline(always)]
fn service_of<F: Family>(parsed: &Parsed<F::Addr>) -> Option<&'static ServiceEntry> {
    let tuple = &parsed.tuple;
    F::service(&ServiceKey::new(tuple.dst, tuple.dst_port, tuple.protocol))
}

/// Whether only TC can keep this packet's checksum true.
#[inline(always)]
fn must_leave_to_tc<P: Packet, F: Family>(packet: &P, parsed: &Parsed<F::Addr>) -> bool {
    P::CHECKSUM_MAY_BE_UNFINISHED && rewrite::looks_unfinished::<P, F>(packet, parsed)
}
