//! Putting another tuple into a packet.

use lb_common::{
    Port, Reason,
    checksum::pseudo_header,
    flow::{FlowEntry, TCP, UDP},
};

use crate::{
    family::Family,
    packet::{ChecksumField, Packet, Refused},
    parse::{L3, Parsed},
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
    match try_translate::<P, F>(packet, parsed, flow) {
        Ok(()) => done,
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
    let ports = flow.port_delta(&parsed.tuple);
    if let Some(offset) = F::HEADER_CHECKSUM {
        packet.fix_header_checksum(L3 + offset, addresses)?;
    }
    packet.fix_transport_checksum(checksum_field::<F>(parsed), addresses, ports)?;
    packet.write(
        L3 + F::ADDRESSES,
        Pair {
            src: flow.src,
            dst: flow.dst,
        },
    )?;
    packet.write::<Pair<Port>>(
        parsed.l4(),
        Pair {
            src: flow.src_port,
            dst: flow.dst_port,
        },
    )
}

/// Whether the packet's checksum looks like one that a device was to finish:
/// the plain sum of the pseudo header.
///
/// A finished checksum looks like that once in 65,536 packets; as such packets
/// are left to TC, which handles both kinds, that costs a little time and
/// nothing else.
#[inline(always)]
pub fn looks_unfinished<P: Packet, F: Family>(packet: &P, parsed: &Parsed<F::Addr>) -> bool {
    let field = checksum_field::<F>(parsed);
    let tuple = &parsed.tuple;
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
