//! ICMP of both families: errors about translated packets are translated like these,
//! the packet that they quote included, so that path MTU discovery and
//! "unreachable" work through a Service; and pings of a Service's address are
//! answered.

use lb_common::{
    Address as _, Port, Reason,
    checksum::Delta,
    flow::{TCP, Tuple, UDP, is_for_ingress},
    service::{FRONTEND_ECHO, ServiceKey},
};

use crate::{
    answer,
    edge::Side,
    family::Family,
    flow::{self, Flow},
    known,
    packet::{Packet, Refused},
    parse::{L3, read},
    rewrite::Pair,
    trace,
};

/// Bytes of the header that all ICMP messages have.
pub const ICMP_HEADER: usize = 8;

/// Where the checksum stands in it.
const CHECKSUM: usize = 2;

/// A packet that has no ports of its own.
#[inline(never)]
pub fn handle<P: Packet, F: Family>(packet: &P, side: Side) -> Reason {
    match try_handle::<P, F>(packet, side) {
        Ok(reason) | Err(reason) => reason,
    }
}

#[inline(always)]
fn try_handle<P: Packet, F: Family>(packet: &P, side: Side) -> Result<Reason, Reason> {
    let header = F::header(packet, L3, false)?;
    if header.protocol != F::ICMP {
        return Err(Reason::OtherProtocol);
    }
    let at = L3 + header.length;
    // Type and code: a single byte at a variable offset is what the verifier
    // does not believe to be within the packet.
    let [kind, _] = read::<P, u16>(packet, at)?.to_ne_bytes();
    if F::is_icmp_error(kind) {
        return translate_error::<P, F>(packet, at, side);
    }
    if side == Side::In && kind == F::ECHO_REQUEST {
        return echo::<P, F>(packet, at);
    }
    Err(Reason::OtherProtocol)
}

/// The packet that an error quotes.
struct Quoted<A> {
    /// Where its IP header and the one behind it stand.
    l3: usize,
    l4: usize,
    tuple: Tuple<A>,
}

/// Translates an error about a packet that was translated on the other way
/// through this hook. The entry that it would have had in return tells how it
/// looked before.
#[inline(always)]
fn translate_error<P: Packet, F: Family>(
    packet: &P,
    at: usize,
    side: Side,
) -> Result<Reason, Reason> {
    let quoted = quoted::<P, F>(packet, at + ICMP_HEADER)?;
    let answer = quoted.tuple.reversed();
    trace::note::<F>(&answer);
    if known::now_if_flow(&answer).is_none() {
        return Err(Reason::OtherProtocol);
    }
    let Some(flow) = flow::find_by::<F>(&answer, quoted.tuple.protocol != UDP) else {
        return Err(Reason::OtherProtocol);
    };
    if is_for_ingress(flow.entry().direction) != (side == Side::In) {
        return Err(Reason::TransitReply);
    }
    let outer: Pair<F::Addr> = read(packet, L3 + F::ADDRESSES)?;
    // It goes to whom the packet seemed to come from, or it is none of ours.
    if !outer.dst.same(&quoted.tuple.src) {
        return Err(Reason::Malformed);
    }
    rewrite_error::<P, F>(packet, at, &quoted, &flow).map_err(|Refused| Reason::RewriteFailed)?;
    Ok(Reason::IcmpError)
}

#[inline(always)]
fn quoted<P: Packet, F: Family>(packet: &P, l3: usize) -> Result<Quoted<F::Addr>, Reason> {
    let header = F::header(packet, l3, true)?;
    let l4 = l3 + header.length;
    let addresses: Pair<F::Addr> = read(packet, l3 + F::ADDRESSES)?;
    let ports: Pair<Port> = read(packet, l4)?;
    let tuple = Tuple::new(
        addresses.src,
        addresses.dst,
        ports.src,
        ports.dst,
        header.protocol,
    );
    Ok(Quoted { l3, l4, tuple })
}

/// The quoted packet gets the addresses and ports that it had where its sender
/// sees it. Its own checksums follow, so that the sender could verify them. In
/// the checksum around the quote a change and the checksum that follows it
/// cancel out; what does not is `sum`.
#[inline(never)]
fn rewrite_error<P: Packet, F: Family>(
    packet: &P,
    at: usize,
    quoted: &Quoted<F::Addr>,
    flow: &Flow<F>,
) -> Result<(), Refused> {
    let entry = flow.get();
    let old = &quoted.tuple;
    let addresses = Delta::new()
        .address(&old.src, &entry.dst)
        .address(&old.dst, &entry.src);
    let ports = Delta::new().ports(
        [old.src_port, old.dst_port],
        [entry.dst_port, entry.src_port],
    );
    let mut sum = ports;
    if let Some(offset) = F::HEADER_CHECKSUM {
        amend(packet, quoted.l3 + offset, addresses)?;
    } else {
        sum = sum.and(addresses);
    }
    if amend_transport(packet, quoted, addresses.and(ports)) {
        sum = Delta::new();
        if F::HEADER_CHECKSUM.is_some() {
            // Two checksums have followed the addresses.
            sum = sum
                .address(&entry.dst, &old.src)
                .address(&entry.src, &old.dst);
        }
    }
    packet.patch(
        quoted.l3 + F::ADDRESSES,
        Pair {
            src: entry.dst,
            dst: entry.src,
        },
    )?;
    packet.patch(
        quoted.l4,
        Pair {
            src: entry.dst_port,
            dst: entry.src_port,
        },
    )?;
    let sender = readdress::<P, F>(packet, old, flow)?;
    if F::HEADER_CHECKSUM.is_none() {
        sum = sum.and(sender);
    }
    amend(packet, at + CHECKSUM, sum)
}

/// Follows the change in the quoted packet's transport checksum, if that is
/// quoted. Returns whether it is.
#[inline(always)]
fn amend_transport<P: Packet, A>(packet: &P, quoted: &Quoted<A>, delta: Delta) -> bool {
    let offset = match quoted.tuple.protocol {
        TCP => 16,
        UDP => 6,
        _ => return false,
    };
    match packet.read::<u16>(quoted.l4 + offset) {
        // A UDP checksum of 0 is none.
        None | Some(0) => false,
        Some(_) => amend(packet, quoted.l4 + offset, delta).is_ok(),
    }
}

/// The message itself goes to the packet's sender, from the address that the
/// sender knows the receiver by where it knows another than this side does,
/// whoever sent it: as the kernel's NAT does. A router may be on both ways, and
/// drops a message that comes to it from its own address.
#[inline(always)]
fn readdress<P: Packet, F: Family>(
    packet: &P,
    quoted: &Tuple<F::Addr>,
    flow: &Flow<F>,
) -> Result<Delta, Refused> {
    let entry = flow.get();
    let outer: Pair<F::Addr> = packet.read(L3 + F::ADDRESSES).ok_or(Refused)?;
    let mut new = Pair {
        src: outer.src,
        dst: entry.dst,
    };
    if !entry.src.same(&quoted.dst) {
        new.src = entry.src;
    }
    let delta = Delta::new()
        .address(&outer.src, &new.src)
        .address(&outer.dst, &new.dst);
    let at = L3 + F::ADDRESSES;
    match F::HEADER_CHECKSUM {
        // Which makes up for them.
        Some(offset) => {
            packet.fix_header_checksum(L3 + offset, delta)?;
            packet.write(at, new)?;
        }
        None => packet.patch(at, new)?,
    }
    Ok(delta)
}

/// Applies a change to the checksum at `offset`.
#[inline(always)]
fn amend<P: Packet>(packet: &P, offset: usize, delta: Delta) -> Result<(), Refused> {
    let old = packet.read::<u16>(offset).ok_or(Refused)?;
    packet.patch(offset, delta.apply(old))
}

/// Answers a ping of an address whose entry says so.
#[inline(always)]
fn echo<P: Packet, F: Family>(packet: &P, at: usize) -> Result<Reason, Reason> {
    let outer: Pair<F::Addr> = read(packet, L3 + F::ADDRESSES)?;
    let none = Port::default();
    trace::note::<F>(&Tuple::new(outer.src, outer.dst, none, none, F::ICMP));
    let key = ServiceKey::new(outer.dst, none, 0);
    let entry = F::service(&key).ok_or(Reason::NotService)?;
    if entry.flags & FRONTEND_ECHO == 0 || entry.slot_count == 0 {
        return Err(Reason::NotService);
    }
    let kind: u16 = read(packet, at)?;
    let reply = u16::from_ne_bytes([F::ECHO_REPLY, 0]);
    let delta = Delta::new().word(u32::from(kind), u32::from(reply));
    let swapped = Pair {
        src: outer.dst,
        dst: outer.src,
    };
    // Swapping source and destination changes no sum.
    amend(packet, at + CHECKSUM, delta)
        .and_then(|()| packet.patch(at, reply))
        .and_then(|()| packet.patch(L3 + F::ADDRESSES, swapped))
        .and_then(|()| answer::send_back(packet))
        .map_err(|Refused| Reason::RewriteFailed)?;
    Ok(Reason::Echo)
}
