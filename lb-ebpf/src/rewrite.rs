//! Putting another tuple into a packet.

use lb_common::{
    Reason,
    checksum::pseudo_header,
    crc32c,
    flow::{FlowEntry, SCTP, TCP, UDP},
};

use crate::{
    family::Family,
    opaque,
    packet::{ChecksumField, Packet, Refused},
    parse::{Fragment, L3, Parsed},
    traffic,
};

/// Source and destination as they follow each other in a header.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Pair<T> {
    pub src: T,
    pub dst: T,
}

/// Translates the packet as `flow` says; `done` is the reason to give for it.
///
/// On failure the packet may be half translated: it must not go on, and the
/// reason says so.
///
/// Not inlined: the sums of an IPv6 tuple's words need a stack of their own.
#[inline(never)]
pub fn translate<P: Packet, F: Family>(
    packet: &P,
    parsed: &Parsed<F::Addr>,
    flow: &FlowEntry<F::Addr>,
    done: Reason,
) -> Reason {
    let done = opaque::reason(done);
    match try_translate::<P, F>(packet, parsed, flow) {
        Ok(()) => {
            traffic::count_packet::<P, F>(packet, flow, done);
            done
        }
        Err(Refused) => Reason::RewriteFailed,
    }
}

#[inline(always)]
fn try_translate<P: Packet, F: Family>(
    packet: &P,
    parsed: &Parsed<F::Addr>,
    flow: &FlowEntry<F::Addr>,
) -> Result<(), Refused> {
    let addresses = flow.address_delta(&parsed.tuple);
    let has_transport = P::LEAVES_RARE_TO_TC || parsed.fragment != Fragment::Later;
    let is_sctp = parsed.tuple.protocol == SCTP;
    if has_transport && is_sctp {
        translate_sctp(packet, parsed, flow.ports())?;
    } else if has_transport {
        let (field, ports) = (checksum_field::<F>(parsed), flow.port_delta(&parsed.tuple));
        packet.fix_transport_checksum(field, addresses, ports)?;
        // The ports stand right behind the addresses as a rule, so that one write
        // is enough for both: at TC each is a call of a helper, and these calls
        // are most of what a translation costs.
        if parsed.l4() == L3 + F::HEADER {
            return F::write_ends(packet, flow, addresses);
        }
        packet.write(parsed.l4(), flow.ports())?;
    }
    match F::HEADER_CHECKSUM {
        Some(offset) => packet.fix_header_checksum(L3 + offset, addresses)?,
        // No checksum has them, but that of the packet as a whole.
        None if is_sctp || !has_transport => packet.account(addresses),
        None => {}
    }
    packet.write(
        L3 + F::ADDRESSES,
        Pair {
            src: flow.src,
            dst: flow.dst,
        },
    )
}

/// SCTP's checksum does not cover addresses, and covers the whole packet: of one
/// in fragments it could not be kept true.
#[inline(always)]
fn translate_sctp<P: Packet, A>(packet: &P, parsed: &Parsed<A>, new: u32) -> Result<(), Refused> {
    let old: u32 = packet.read(parsed.l4()).ok_or(Refused)?;
    if old == new {
        return Ok(());
    }
    if parsed.fragment != Fragment::Whole {
        return Err(Refused);
    }
    let at = parsed.l4() + SCTP_CHECKSUM;
    let checksum: u32 = packet.read(at).ok_or(Refused)?;
    // 0 is what stands there while the device is to compute it.
    if checksum != 0 {
        let delta = crc32c_delta(old.to_le(), new.to_le(), parsed.l4_length);
        packet.patch(at, checksum ^ delta.to_le())?;
    }
    packet.patch(parsed.l4(), new)
}

/// Where the checksum stands in SCTP's header.
const SCTP_CHECKSUM: usize = 8;

/// Not inlined: it is two loops deep.
#[inline(never)]
fn crc32c_delta(from: u32, to: u32, length: u16) -> u32 {
    crc32c::delta(from, to, length)
}

/// Whether the packet's checksum looks like one that a device was to finish:
/// the plain sum of the pseudo header, or for SCTP nothing.
///
/// A finished checksum looks like that once in 65,536 packets; as such packets
/// are left to TC, which handles both kinds, that costs a little time and
/// nothing else.
#[inline(always)]
pub fn looks_unfinished<P: Packet, F: Family>(packet: &P, parsed: &Parsed<F::Addr>) -> bool {
    let tuple = &parsed.tuple;
    if tuple.protocol == SCTP {
        return packet.read::<u32>(parsed.l4() + SCTP_CHECKSUM) == Some(0);
    }
    let field = checksum_field::<F>(parsed);
    packet.read::<u16>(field.offset)
        == Some(pseudo_header(
            &tuple.src,
            &tuple.dst,
            tuple.protocol,
            parsed.l4_length,
        ))
}

#[inline(always)]
fn checksum_field<F: Family>(parsed: &Parsed<F::Addr>) -> ChecksumField {
    let offset = if parsed.tuple.protocol == TCP { 16 } else { 6 };
    ChecksumField {
        offset: parsed.l4() + offset,
        zero_is_none: parsed.tuple.protocol == UDP,
        ipv6: F::HEADER_CHECKSUM.is_none(),
    }
}
