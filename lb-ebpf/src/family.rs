//! What differs between IPv4 and IPv6: the maps, and where things stand in the
//! header. Everything else is written once, over [`Family`].

use aya_ebpf::{bindings::bpf_fib_lookup as FibLookup, btf_maps::lpm_trie::Key};
use lb_common::{
    Addr4, Addr6, Address, Reason,
    checksum::{Delta, pseudo_header},
    flow::FlowEntry,
    node::{Config, Device, Netns, Network, Route},
    service::{BackendRef, ServiceEntry, ServiceKey, Slot, SourceRange},
};

use crate::maps::{
    AFFINITY4, AFFINITY6, Affinities, BACKENDS, EARLY4, EARLY6, Earlies, FLOWS4, FLOWS6,
    FRAGMENTS4, FRAGMENTS6, Flows, Fragments, RANGES4, RANGES6, ROUTES4, ROUTES6, Ranges, Routes,
    SERVICES4, SERVICES6, SLOTS4, SLOTS6, SOCKETS4, SOCKETS6, Services, Slots, Sockets, YOUNG4,
    YOUNG6, Young,
};
use crate::{
    packet::{Packet, Refused},
    parse::{Header, L3, Parsed, Ports, header_v4, header_v6, parse_v4, parse_v6},
    rewrite::Pair,
};

pub trait Family {
    type Addr: Address;

    /// Where source and destination, which follow each other, stand in the
    /// header.
    const ADDRESSES: usize;
    /// Where the header's own checksum stands, if it has one.
    const HEADER_CHECKSUM: Option<usize>;

    /// Bytes of the header without options.
    const HEADER: usize;
    /// Where the header claims the packet's length, and bytes of itself that it leaves
    /// out of that.
    const LENGTH: usize;
    const UNCLAIMED: usize;
    /// Protocol number of the family's ICMP.
    const ICMP: u8;
    const ECHO_REQUEST: u8;
    const ECHO_REPLY: u8;
    /// Type and code of "port unreachable".
    const PORT_UNREACHABLE: (u8, u8);

    /// Whether a message of this type quotes the packet that it is about.
    fn is_icmp_error(kind: u8) -> bool;

    /// Reads the IP header at an offset, that of the packet or of one that it
    /// quotes.
    fn header<P: Packet>(packet: &P, offset: usize, quoted: bool) -> Result<Header, Reason>;

    /// Writes an IP header for an ICMP message of `length` bytes.
    fn write_header<P: Packet>(
        packet: &P,
        addresses: &Pair<Self::Addr>,
        length: u16,
    ) -> Result<(), Refused>;

    /// Writes the addresses and ports of a translation into a packet whose ports
    /// follow its addresses, and mends the header's own checksum by what the
    /// addresses change in it.
    fn write_ends<P: Packet>(
        packet: &P,
        to: &FlowEntry<Self::Addr>,
        addresses: Delta,
    ) -> Result<(), Refused>;

    /// How many routers the packet may yet meet, if it can be read.
    fn hops<P: Packet>(packet: &P) -> Option<u8>;

    /// What a router does to a packet that it passes on: takes one off its time to
    /// live, which has one to take, and writes the Ethernet addresses of the next
    /// hop.
    fn forward<P: Packet>(packet: &P, route: &Route<Self::Addr>) -> Result<(), Refused>;

    /// What the pseudo header adds to the checksum of an ICMP message of
    /// `length` bytes.
    fn pseudo_sum(addresses: &Pair<Self::Addr>, length: u16) -> u64;

    /// Source and destination for an answer to the packet.
    #[inline(always)]
    fn addresses<P: Packet>(packet: &P) -> Option<Pair<Self::Addr>> {
        let Pair { src, dst } = packet.read(L3 + Self::ADDRESSES)?;
        Some(Pair { src: dst, dst: src })
    }

    /// Reads the headers of a frame of this family.
    #[inline(always)]
    fn parse<P: Packet>(packet: &P) -> Result<Parsed<Self::Addr>, Reason> {
        Self::parse_as(packet, Ports::Needed)
    }

    /// As [`Self::parse`], also of a fragment whose ports are not known.
    #[inline(always)]
    fn parse_fragment<P: Packet>(packet: &P) -> Result<Parsed<Self::Addr>, Reason> {
        Self::parse_as(packet, Ports::Optional)
    }

    fn parse_as<P: Packet>(packet: &P, ports: Ports) -> Result<Parsed<Self::Addr>, Reason>;

    fn services() -> &'static Services<Self::Addr>;
    fn slots() -> &'static Slots<Self::Addr>;
    fn flows() -> &'static Flows<Self::Addr>;
    fn routes() -> &'static Routes<Self::Addr>;
    fn young() -> &'static Young<Self::Addr>;
    fn affinities() -> &'static Affinities<Self::Addr>;
    fn ranges() -> &'static Ranges<Self::Addr>;
    fn fragments() -> &'static Fragments<Self::Addr>;
    fn earlies() -> &'static Earlies<Self::Addr>;
    fn sockets() -> &'static Sockets<Self::Addr>;

    /// The address that packets get which are masqueraded at the device.
    fn device_address(device: &Device) -> Self::Addr;
    /// The pod's address.
    fn netns_address(netns: &Netns) -> Self::Addr;
    /// An address that no host has, for a network namespace without a known one.
    fn stand_in(cookie: [u32; 2]) -> Self::Addr;
    /// 127.0.0.1 or its like.
    fn is_loopback(addr: &Self::Addr) -> bool;
    /// The network that holds every `ClusterIP`.
    fn cluster_network(config: &Config) -> &Network<Self::Addr>;
    /// The number of the family in socket addresses.
    const ADDRESS_FAMILY: u8;

    /// Writes the addresses of a route lookup.
    fn set_route_ends(route: &mut FibLookup, src: &Self::Addr, dst: &Self::Addr);

    /// Whether the client may use the load balancer's addresses of a Service
    /// port that names who may.
    #[inline(always)]
    fn is_in_source_ranges(service: u32, client: &Self::Addr) -> bool {
        let range = SourceRange {
            service,
            addr: *client,
        };
        let key = Key::new(size_of::<SourceRange<Self::Addr>>() as u32 * 8, range);
        Self::ranges().get(&key).is_some()
    }

    /// The entry of a frontend.
    #[inline(always)]
    fn service(key: &ServiceKey<Self::Addr>) -> Option<&'static ServiceEntry> {
        // SAFETY: only the agent writes this map. It is not preallocated, so an
        // update brings an entry of its own and the old one stays as it is
        // until every program that may see it has ended.
        unsafe { Self::services().get(key) }
    }

    /// The backend in a slot.
    #[inline(always)]
    fn slot(index: u32) -> Result<&'static Slot<Self::Addr>, Reason> {
        Self::slots().get(index).ok_or(Reason::BadSlot)
    }
}

pub struct V4;
pub struct V6;

/// Where an IPv4 packet's time to live stands.
const LIFE: usize = L3 + 8;

/// Where its header's checksum stands.
const CHECKSUM: usize = L3 + 10;

/// Where an IPv6 packet's next header and hop limit stand.
const HOPS: usize = L3 + 6;

/// An IPv4 packet's time to live and protocol, as they stand beside each other.
#[inline(always)]
fn life<P: Packet>(packet: &P) -> Result<u16, Refused> {
    packet.read(LIFE).ok_or(Refused)
}

/// These and a header checksum in one word, as they follow each other in memory.
#[inline(always)]
const fn life_and_checksum(life: u16, checksum: u16) -> u32 {
    let ([a, b], [c, d]) = (life.to_ne_bytes(), checksum.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// An IPv4 header's checksum, as it lies in memory, once its time to live is less by
/// one, as the kernel changes it (`ip_decrease_ttl`; RFC 1141, 2).
#[inline(always)]
const fn after_a_hop(checksum: u16) -> u16 {
    let sum = checksum as u32 + 0x0100_u16.to_be() as u32;
    let carry = if sum >= 0xffff { 1 } else { 0 };
    sum.wrapping_add(carry) as u16
}

impl Family for V4 {
    type Addr = Addr4;
    const ADDRESSES: usize = 12;
    const HEADER_CHECKSUM: Option<usize> = Some(10);
    const HEADER: usize = 20;
    const LENGTH: usize = 2;
    const UNCLAIMED: usize = 0;
    const ICMP: u8 = 1;
    const ADDRESS_FAMILY: u8 = 2;
    const ECHO_REQUEST: u8 = 8;
    const ECHO_REPLY: u8 = 0;
    const PORT_UNREACHABLE: (u8, u8) = (3, 3);

    /// Unreachable, time exceeded, parameter problem (RFC 792).
    #[inline(always)]
    fn is_icmp_error(kind: u8) -> bool {
        matches!(kind, 3 | 11 | 12)
    }
    #[inline(always)]
    fn header<P: Packet>(packet: &P, offset: usize, quoted: bool) -> Result<Header, Reason> {
        header_v4(packet, offset, quoted)
    }
    #[inline(always)]
    fn write_header<P: Packet>(
        packet: &P,
        addresses: &Pair<Addr4>,
        length: u16,
    ) -> Result<(), Refused> {
        /// Version and length of the header, and the precedence of a router's
        /// own messages (RFC 1812, 4.3.2.5).
        const START: u32 = 0x45c0 << 16;
        const TTL_AND_PROTOCOL: u32 = 64 << 24 | (V4::ICMP as u32) << 16;
        let words = [
            (START | (u32::from(length) + Self::HEADER as u32)).to_be(),
            0,
            TTL_AND_PROTOCOL.to_be(),
        ];
        packet.patch(L3, words)?;
        packet.patch(L3 + Self::ADDRESSES, *addresses)?;
        let mut delta = Delta::new();
        for word in words {
            delta = delta.word(0, word);
        }
        let none = Addr4::default();
        delta = delta.address(&none, &addresses.src);
        delta = delta.address(&none, &addresses.dst);
        packet.patch(L3 + 10, delta.apply(0xffff))
    }
    #[inline(always)]
    fn write_ends<P: Packet>(
        packet: &P,
        to: &FlowEntry<Addr4>,
        addresses: Delta,
    ) -> Result<(), Refused> {
        let old: u16 = packet.read(CHECKSUM).ok_or(Refused)?;
        let checksum = addresses.apply(old);
        let ([src, ..], [dst, ..]) = (to.src.words(), to.dst.words());
        if P::WRITES_CALL_HELPERS {
            let life = life_and_checksum(life(packet)?, checksum);
            return packet.write(LIFE, [life, src, dst, to.ports()]);
        }
        packet.write(CHECKSUM, checksum)?;
        packet.write(L3 + Self::ADDRESSES, [src, dst, to.ports()])
    }
    #[inline(always)]
    fn hops<P: Packet>(packet: &P) -> Option<u8> {
        packet.read(LIFE)
    }
    /// In one write, with what stands between the two: at TC each is a call of a
    /// helper, which takes longer than to copy these bytes.
    #[inline(always)]
    fn forward<P: Packet>(packet: &P, route: &Route<Addr4>) -> Result<(), Refused> {
        // Up to the header's checksum, and two bytes behind it.
        let start: [u32; 7] = packet.read(0).ok_or(Refused)?;
        let [_, _, _, kind, length, life, checksum] = start;
        let [frags0, frags1, ttl, protocol] = life.to_ne_bytes();
        let life = u32::from_ne_bytes([frags0, frags1, ttl.wrapping_sub(1), protocol]);
        let [sum0, sum1, src0, src1] = checksum.to_ne_bytes();
        let [sum0, sum1] = after_a_hop(u16::from_ne_bytes([sum0, sum1])).to_ne_bytes();
        let checksum = u32::from_ne_bytes([sum0, sum1, src0, src1]);
        let [to, both, from] = route.macs;
        packet.write(0, [to, both, from, kind, length, life, checksum])
    }
    #[inline(always)]
    fn pseudo_sum(_addresses: &Pair<Addr4>, _length: u16) -> u64 {
        0
    }

    #[inline(always)]
    fn parse_as<P: Packet>(packet: &P, ports: Ports) -> Result<Parsed<Addr4>, Reason> {
        parse_v4(packet, ports)
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
    fn routes() -> &'static Routes<Addr4> {
        &ROUTES4
    }
    #[inline(always)]
    fn flows() -> &'static Flows<Addr4> {
        &FLOWS4
    }
    #[inline(always)]
    fn young() -> &'static Young<Addr4> {
        &YOUNG4
    }
    #[inline(always)]
    fn affinities() -> &'static Affinities<Addr4> {
        &AFFINITY4
    }
    #[inline(always)]
    fn ranges() -> &'static Ranges<Addr4> {
        &RANGES4
    }
    #[inline(always)]
    fn fragments() -> &'static Fragments<Addr4> {
        &FRAGMENTS4
    }
    #[inline(always)]
    fn earlies() -> &'static Earlies<Addr4> {
        &EARLY4
    }
    #[inline(always)]
    fn sockets() -> &'static Sockets<Addr4> {
        &SOCKETS4
    }
    #[inline(always)]
    fn device_address(device: &Device) -> Addr4 {
        device.addr4
    }
    #[inline(always)]
    fn netns_address(netns: &Netns) -> Addr4 {
        netns.addr4
    }
    /// In 0.0.0.0/8, "this network" (RFC 1122, 3.2.1.3).
    #[inline(always)]
    fn stand_in([low, _]: [u32; 2]) -> Addr4 {
        Addr4 {
            octets: (low & 0x00ff_ffff).to_be_bytes(),
        }
    }
    #[inline(always)]
    fn is_loopback(addr: &Addr4) -> bool {
        u32::from_be_bytes(addr.octets) == 0x7f00_0001
    }
    #[inline(always)]
    fn cluster_network(config: &Config) -> &Network<Addr4> {
        &config.cluster_net4
    }
    #[inline(always)]
    fn set_route_ends(route: &mut FibLookup, src: &Addr4, dst: &Addr4) {
        let ([src, ..], [dst, ..]) = (src.words(), dst.words());
        route.__bindgen_anon_3.ipv4_src = src;
        route.__bindgen_anon_4.ipv4_dst = dst;
    }
}

impl Family for V6 {
    type Addr = Addr6;
    const ADDRESSES: usize = 8;
    const HEADER_CHECKSUM: Option<usize> = None;
    const HEADER: usize = 40;
    const LENGTH: usize = 4;
    const UNCLAIMED: usize = Self::HEADER;
    const ICMP: u8 = 58;
    const ADDRESS_FAMILY: u8 = 10;
    const ECHO_REQUEST: u8 = 128;
    const ECHO_REPLY: u8 = 129;
    const PORT_UNREACHABLE: (u8, u8) = (1, 4);

    /// Unreachable, too big, time exceeded, parameter problem (RFC 4443).
    #[inline(always)]
    fn is_icmp_error(kind: u8) -> bool {
        matches!(kind, 1..=4)
    }
    #[inline(always)]
    fn header<P: Packet>(packet: &P, offset: usize, quoted: bool) -> Result<Header, Reason> {
        header_v6(packet, offset, quoted)
    }
    #[inline(always)]
    fn write_header<P: Packet>(
        packet: &P,
        addresses: &Pair<Addr6>,
        length: u16,
    ) -> Result<(), Refused> {
        const VERSION: u32 = 6 << 28;
        const NEXT_HEADER_AND_HOPS: u32 = (V6::ICMP as u32) << 8 | 64;
        let words = [
            VERSION.to_be(),
            (u32::from(length) << 16 | NEXT_HEADER_AND_HOPS).to_be(),
        ];
        packet.patch(L3, words)?;
        packet.patch(L3 + Self::ADDRESSES, *addresses)
    }
    #[inline(always)]
    fn write_ends<P: Packet>(
        packet: &P,
        to: &FlowEntry<Addr6>,
        _addresses: Delta,
    ) -> Result<(), Refused> {
        let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (to.src.words(), to.dst.words());
        let words = [s0, s1, s2, s3, d0, d1, d2, d3, to.ports()];
        packet.write(L3 + Self::ADDRESSES, words)
    }
    #[inline(always)]
    fn hops<P: Packet>(packet: &P) -> Option<u8> {
        packet.read(HOPS + 1)
    }
    /// In one write as well. No checksum in the packet covers the hop limit.
    #[inline(always)]
    fn forward<P: Packet>(packet: &P, route: &Route<Addr6>) -> Result<(), Refused> {
        // Up to the hop limit, and two bytes behind it.
        let start: [u32; 6] = packet.read(0).ok_or(Refused)?;
        let [_, _, _, kind, length, life] = start;
        let [next, hops, src0, src1] = life.to_ne_bytes();
        let lived = u32::from_ne_bytes([next, hops.wrapping_sub(1), src0, src1]);
        let [to, both, from] = route.macs;
        packet.write(0, [to, both, from, kind, length, lived])?;
        packet.account(Delta::new().word(life, lived));
        Ok(())
    }
    #[inline(always)]
    fn pseudo_sum(addresses: &Pair<Addr6>, length: u16) -> u64 {
        pseudo_header(&addresses.src, &addresses.dst, Self::ICMP, length).into()
    }

    #[inline(always)]
    fn parse_as<P: Packet>(packet: &P, ports: Ports) -> Result<Parsed<Addr6>, Reason> {
        parse_v6(packet, ports)
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
    fn routes() -> &'static Routes<Addr6> {
        &ROUTES6
    }
    #[inline(always)]
    fn flows() -> &'static Flows<Addr6> {
        &FLOWS6
    }
    #[inline(always)]
    fn young() -> &'static Young<Addr6> {
        &YOUNG6
    }
    #[inline(always)]
    fn affinities() -> &'static Affinities<Addr6> {
        &AFFINITY6
    }
    #[inline(always)]
    fn ranges() -> &'static Ranges<Addr6> {
        &RANGES6
    }
    #[inline(always)]
    fn fragments() -> &'static Fragments<Addr6> {
        &FRAGMENTS6
    }
    #[inline(always)]
    fn earlies() -> &'static Earlies<Addr6> {
        &EARLY6
    }
    #[inline(always)]
    fn sockets() -> &'static Sockets<Addr6> {
        &SOCKETS6
    }
    #[inline(always)]
    fn device_address(device: &Device) -> Addr6 {
        device.addr6
    }
    #[inline(always)]
    fn netns_address(netns: &Netns) -> Addr6 {
        netns.addr6
    }
    /// In the first /64, which holds nothing but special addresses (RFC 4291, 2.5).
    #[inline(always)]
    fn stand_in([low, high]: [u32; 2]) -> Addr6 {
        Addr6::from_words([0, 0, high.to_be(), low.to_be()])
    }
    #[inline(always)]
    fn is_loopback(addr: &Addr6) -> bool {
        let [w0, w1, w2, w3] = addr.words();
        w0 | w1 | w2 == 0 && w3 == 1_u32.to_be()
    }
    #[inline(always)]
    fn cluster_network(config: &Config) -> &Network<Addr6> {
        &config.cluster_net6
    }
    #[inline(always)]
    fn set_route_ends(route: &mut FibLookup, src: &Addr6, dst: &Addr6) {
        // Word by word: as a whole it would be a call of `memmove`.
        let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (src.words(), dst.words());
        route.__bindgen_anon_3.ipv6_src = [s0, s1, s2, s3];
        route.__bindgen_anon_4.ipv6_dst = [d0, d1, d2, d3];
    }
}

/// Whether this life of the backend goes on.
#[inline(always)]
pub fn is_alive(backend: BackendRef) -> bool {
    BACKENDS.get(backend.id).copied() == Some(backend.generation)
}
