//! What differs between IPv4 and IPv6.

use aya_ebpf::bindings::bpf_fib_lookup as FibLookup;
use lb_common::{Addr4, Addr6, Address, checksum::Delta};

use crate::{
    maps::{
        FLOWS4, FLOWS6, Flows, SERVICES4, SERVICES6, SLOTS4, SLOTS6, SOCKETS4, SOCKETS6, Services,
        Slots, Sockets, WAYS4, WAYS6, Ways,
    },
    packet::{Packet, Refused},
};

/// Where the IP header stands.
pub const L3: usize = 14;

pub trait Family {
    type Addr: Address + Default;

    const ADDRESS_FAMILY: u8;
    /// Offsets in the frame.
    const PROTOCOL: usize;
    const SRC: usize;
    const DST: usize;
    const PORTS: usize;
    const HEADER_CHECKSUM: Option<usize>;

    /// Whether ports follow the header: no options, no fragment.
    fn is_plain<P: Packet>(packet: &P) -> Option<bool>;
    /// Takes one off the time to live; refused if that was the last.
    fn count_hop<P: Packet>(packet: &P) -> Result<(), Refused>;
    fn set_route_ends(route: &mut FibLookup, src: &Self::Addr, dst: &Self::Addr);

    fn services() -> &'static Services<Self::Addr>;
    fn slots() -> &'static Slots<Self::Addr>;
    fn flows() -> &'static Flows<Self::Addr>;
    fn sockets() -> &'static Sockets<Self::Addr>;
    fn ways() -> &'static Ways<Self::Addr>;
}

pub struct V4;
pub struct V6;

impl Family for V4 {
    type Addr = Addr4;
    const ADDRESS_FAMILY: u8 = 2;
    const PROTOCOL: usize = L3 + 9;
    const SRC: usize = L3 + 12;
    const DST: usize = L3 + 16;
    const PORTS: usize = L3 + 20;
    const HEADER_CHECKSUM: Option<usize> = Some(L3 + 10);

    #[inline(always)]
    fn is_plain<P: Packet>(packet: &P) -> Option<bool> {
        const PLAIN: u8 = 0x45;
        const IS_FRAGMENT: u16 = 0x3fff_u16.to_be();
        let start: u8 = packet.read(L3)?;
        let fragment: u16 = packet.read(L3 + 6)?;
        Some(start == PLAIN && fragment & IS_FRAGMENT == 0)
    }

    #[inline(always)]
    fn count_hop<P: Packet>(packet: &P) -> Result<(), Refused> {
        let old: u16 = packet.read(L3 + 8).ok_or(Refused)?;
        let [hops, protocol] = old.to_ne_bytes();
        if hops <= 1 {
            return Err(Refused);
        }
        let new = u16::from_ne_bytes([hops.wrapping_sub(1), protocol]);
        packet.fix_header(L3 + 10, Delta::new().word(old.into(), new.into()))?;
        packet.write(L3 + 8, new)
    }

    #[inline(always)]
    fn set_route_ends(route: &mut FibLookup, src: &Addr4, dst: &Addr4) {
        let ([src, ..], [dst, ..]) = (src.words(), dst.words());
        route.__bindgen_anon_3.ipv4_src = src;
        route.__bindgen_anon_4.ipv4_dst = dst;
    }

    #[inline(always)]
    fn services() -> &'static Services<Addr4> {
        &SERVICES4
    }
    #[inline(always)]
    fn slots() -> &'static Slots<Addr4> {
        &SLOTS4
    }
    #[inline(always)]
    fn flows() -> &'static Flows<Addr4> {
        &FLOWS4
    }
    #[inline(always)]
    fn sockets() -> &'static Sockets<Addr4> {
        &SOCKETS4
    }
    #[inline(always)]
    fn ways() -> &'static Ways<Addr4> {
        &WAYS4
    }
}

impl Family for V6 {
    type Addr = Addr6;
    const ADDRESS_FAMILY: u8 = 10;
    const PROTOCOL: usize = L3 + 6;
    const SRC: usize = L3 + 8;
    const DST: usize = L3 + 24;
    const PORTS: usize = L3 + 40;
    const HEADER_CHECKSUM: Option<usize> = None;

    #[inline(always)]
    fn is_plain<P: Packet>(_packet: &P) -> Option<bool> {
        Some(true)
    }

    #[inline(always)]
    fn count_hop<P: Packet>(packet: &P) -> Result<(), Refused> {
        let hops: u8 = packet.read(L3 + 7).ok_or(Refused)?;
        if hops <= 1 {
            return Err(Refused);
        }
        packet.write(L3 + 7, hops.wrapping_sub(1))
    }

    #[inline(always)]
    fn set_route_ends(route: &mut FibLookup, src: &Addr6, dst: &Addr6) {
        let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (src.words(), dst.words());
        route.__bindgen_anon_3.ipv6_src = [s0, s1, s2, s3];
        route.__bindgen_anon_4.ipv6_dst = [d0, d1, d2, d3];
    }

    #[inline(always)]
    fn services() -> &'static Services<Addr6> {
        &SERVICES6
    }
    #[inline(always)]
    fn slots() -> &'static Slots<Addr6> {
        &SLOTS6
    }
    #[inline(always)]
    fn flows() -> &'static Flows<Addr6> {
        &FLOWS6
    }
    #[inline(always)]
    fn sockets() -> &'static Sockets<Addr6> {
        &SOCKETS6
    }
    #[inline(always)]
    fn ways() -> &'static Ways<Addr6> {
        &WAYS6
    }
}
