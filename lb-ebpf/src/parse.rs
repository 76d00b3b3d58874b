//! Bytes → [`Parsed`]: the only code that reads headers.
//!
//! Whatever cannot be parsed is passed on untouched; the reason says why.

use core::mem::transmute;

use lb_common::{
    Addr4, Addr6, Port, Reason,
    flow::{FLOW_SYN_DATA, FlowEntry, SCTP, TCP, Tuple, UDP, seen},
};
use network_types::{eth::EthHdr, ip::Ipv4Hdr, ip::Ipv6Hdr, tcp::TcpHdr, udp::UdpHdr};

use crate::{
    family::{Family, V4, V6},
    fragment, opaque,
    packet::Packet,
    rewrite::Pair,
};

/// Where the IP header stands: behind an Ethernet header without a VLAN tag.
/// (TC has taken a tag off; XDP passes a tagged frame as [`Reason::NotIp`].)
pub const L3: usize = EthHdr::LEN;

/// `EtherType`s, as they lie in memory.
const IPV4: u16 = 0x0800_u16.to_be();
const IPV6: u16 = 0x86dd_u16.to_be();

/// Transport headers stand within the first 512 bytes.
const L4_MASK: u16 = 0x1ff;

/// Most bytes of a packet that an ICMP error quotes: an IP header with options
/// or extensions, and the start of the transport header.
pub const QUOTABLE: usize = 128;

/// Everything that is looked at in one packet.
#[derive(Clone, Copy)]
pub struct Parsed<A> {
    pub tuple: Tuple<A>,
    /// Where the transport header stands.
    l4: u16,
    /// Bytes from there to the end of the IP packet, as the pseudo header
    /// counts them.
    pub l4_length: u16,
    pub fragment: Fragment,
    /// The packet that a fragment is of, as [`lb_common::node::FragmentKey::id`].
    pub id: u32,
    pub signals: Signals,
}

/// Which part of an IP packet a frame holds.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// The first part, with the transport header.
    First,
    /// Another part, without it.
    Later,
}

/// What the life of a flow depends on, in TCP's words; zero for UDP.
#[derive(Clone, Copy)]
pub struct Signals {
    pub flags: u8,
    /// There is data behind the header.
    pub data: bool,
    pub seq: u32,
    pub ack: u32,
}

/// The family of a packet.
pub enum Version {
    V4,
    V6,
}

const FIN: u8 = 1 << 0;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;
const ACK: u8 = 1 << 4;

impl<A> Parsed<A> {
    /// Where the transport header stands. The mask is for the verifier, which
    /// forgets what it knew of a number that was put into memory.
    #[inline(always)]
    pub const fn l4(&self) -> usize {
        (self.l4 & L4_MASK) as usize
    }

    /// How much of the packet an ICMP error quotes, in bytes from its IP header
    /// on: a multiple of 4. Of TCP it is the whole header, since the kernel does
    /// not cut a frame off before a checksum that is still to be finished.
    #[inline(always)]
    pub const fn quotable_length(&self) -> usize {
        let transport = match self.tuple.protocol {
            TCP => 20,
            SCTP => 12,
            _ => 8,
        };
        let length = self.l4().wrapping_sub(L3).wrapping_add(transport);
        if length < QUOTABLE { length } else { QUOTABLE }
    }

    /// Takes from the verifier what it knows, which is another thing for each way
    /// through the headers.
    #[inline(always)]
    fn blur(&mut self) {
        let zero = opaque::zero();
        self.l4 ^= zero as u16;
        self.l4_length ^= zero as u16;
        self.id ^= zero;
        self.signals.seq ^= zero;
        self.signals.ack ^= zero;
        // SAFETY: it is the same value.
        self.fragment = unsafe { transmute::<u8, Fragment>(self.fragment as u8 ^ zero as u8) };
    }

    /// Whether the protocol has connections, which are opened and closed.
    #[inline(always)]
    pub const fn is_connection(&self) -> bool {
        self.tuple.protocol != UDP
    }

    /// Whether this packet opens a connection.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        self.signals.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// Whether this packet answers one that opens a connection.
    #[inline(always)]
    pub const fn is_syn_ack(&self) -> bool {
        self.signals.flags & (SYN | ACK | RST | FIN) == SYN | ACK
    }

    /// Whether this packet of a client acknowledges the backend's SYN, and
    /// nothing behind it.
    #[inline(always)]
    pub const fn acknowledges(&self, syn_ack: u32) -> bool {
        self.signals.flags & (SYN | ACK | RST) == ACK && self.signals.ack == syn_ack && syn_ack != 0
    }

    /// Whether this packet acknowledges something and says nothing else.
    #[inline(always)]
    pub const fn is_bare_ack(&self) -> bool {
        self.signals.flags & (SYN | ACK | RST | FIN) == ACK && !self.signals.data
    }

    /// Whether this packet may open a flow.
    #[inline(always)]
    pub const fn may_open(&self) -> bool {
        (!self.is_connection() || self.is_syn()) && !matches!(self.fragment, Fragment::Later)
    }

    /// Whether this packet answers another SYN than the one that opened `flow`: a
    /// SYN-ACK, or the RST that refuses a SYN, which is the only one with an ACK
    /// and sequence number 0 (RFC 9293, 3.10.7.1). It may acknowledge the data
    /// that came with the SYN (TCP Fast Open, RFC 7413).
    #[inline(always)]
    pub const fn answers_other(&self, flow: &FlowEntry<A>) -> bool {
        let is_answer = self.is_syn_ack()
            || self.signals.flags & (RST | ACK) == RST | ACK && self.signals.seq == 0;
        let most = if flow.flags & FLOW_SYN_DATA == 0 {
            0
        } else {
            u16::MAX as u32
        };
        is_answer && self.signals.ack.wrapping_sub(flow.isn.wrapping_add(1)) > most
    }

    /// What this packet tells about its direction: bits of [`seen`].
    #[inline(always)]
    pub const fn seen(&self) -> u8 {
        let flags = self.signals.flags;
        let mut bits = match flags & (SYN | RST) {
            0 => seen::DATA,
            SYN => seen::SYN,
            _ => seen::RST,
        };
        if flags & FIN != 0 {
            bits |= seen::FIN;
        }
        bits
    }
}

/// Whether a later fragment is of use without its ports.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    Needed,
    Optional,
}

/// The family of a frame.
#[inline(always)]
pub fn version<P: Packet>(packet: &P) -> Result<Version, Reason> {
    match read::<P, u16>(packet, L3 - size_of::<u16>())? {
        IPV4 => Ok(Version::V4),
        IPV6 => Ok(Version::V6),
        _ => Err(Reason::NotIp),
    }
}

/// Reads, and makes the frame readable first where it is not. The frame may
/// be spread over pages (TC), and mostly its headers are not; those of a frame at
/// XDP are in its first buffer.
#[inline(always)]
pub fn read<P: Packet, T: Copy>(packet: &P, offset: usize) -> Result<T, Reason> {
    if let Some(value) = packet.read(offset) {
        return Ok(value);
    }
    if P::LEAVES_RARE_TO_TC || !packet.reaches(offset + size_of::<T>()) {
        return Err(Reason::Truncated);
    }
    packet.make_readable(offset + size_of::<T>());
    packet.read(offset).ok_or(Reason::Truncated)
}

/// A header of network-types, whose fields are byte arrays, read as aligned:
/// else the compiler loads an address byte by byte.
#[repr(C, align(4))]
#[derive(Clone, Copy)]
struct Aligned<T> {
    header: T,
}

/// Reads the headers of an IPv4 frame.
#[inline(always)]
pub fn parse_v4<P: Packet>(packet: &P, ports: Ports) -> Result<Parsed<Addr4>, Reason> {
    const MORE_FRAGMENTS: u16 = 0x2000;
    const OFFSET: u16 = 0x1fff;
    let Aligned { header } = read::<P, Aligned<Ipv4Hdr>>(packet, L3)?;
    let header_length = usize::from(header.vihl & 0x0f) << 2;
    if header.vihl >> 4 != 4 || header_length < Ipv4Hdr::LEN {
        return Err(Reason::Malformed);
    }
    let claimed = claimed_length::<P, V4>(packet, header.tot_len);
    let frags = u16::from_be_bytes(header.frags);
    let [id0, id1] = header.id;
    let transport = Transport {
        protocol: header.proto,
        offset: L3 + header_length,
        length: payload_length(packet, claimed, header_length)?,
        fragment: if frags & OFFSET != 0 {
            Fragment::Later
        } else if frags & MORE_FRAGMENTS != 0 {
            Fragment::First
        } else {
            Fragment::Whole
        },
        id: u32::from_ne_bytes([id0, id1, 0, 0]),
    };
    let src = Addr4 {
        octets: header.src_addr,
    };
    let dst = Addr4 {
        octets: header.dst_addr,
    };
    transport.parse::<P, V4>(packet, src, dst, ports)
}

/// Reads the headers of an IPv6 frame.
#[inline(always)]
pub fn parse_v6<P: Packet>(packet: &P, ports: Ports) -> Result<Parsed<Addr6>, Reason> {
    let Aligned { header } = read::<P, Aligned<Ipv6Hdr>>(packet, L3)?;
    let [version, ..] = header.vcf;
    if version >> 4 != 6 {
        return Err(Reason::Malformed);
    }
    let claimed = claimed_length::<P, V6>(packet, header.payload_len);
    let mut transport = Transport {
        protocol: header.next_hdr,
        offset: L3 + Ipv6Hdr::LEN,
        length: payload_length(packet, claimed, Ipv6Hdr::LEN)?,
        fragment: Fragment::Whole,
        id: 0,
    };
    if is_extension(header.next_hdr) {
        if P::LEAVES_RARE_TO_TC {
            return Err(Reason::LeftToTc);
        }
        transport.skip_extensions(packet)?;
    }
    // Not from the header above, of which the compiler copies them byte by byte: words
    // that are loaded from bytes just stored have to wait for these.
    let addresses: Option<Pair<Addr6>> = packet.read(L3 + V6::ADDRESSES);
    let Pair { src, dst } = addresses.ok_or(Reason::Truncated)?;
    transport.parse::<P, V6>(packet, src, dst, ports)
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// Whether it is an extension header (RFC 8200, 4; RFC 4302).
#[inline(always)]
const fn is_extension(next_header: u8) -> bool {
    matches!(
        next_header,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS
    )
}

/// What a walk over extension headers comes to, as one number: functions of BPF
/// return no more. Protocol, offset from the first of the headers, and which
/// fragment, from the low byte on; the identification in the high half.
#[derive(Clone, Copy)]
struct Walk(u64);

impl Walk {
    const FAILED: Self = Self(!0);

    #[inline(always)]
    const fn new(protocol: u8, length: usize, fragment: Fragment, id: u32) -> Self {
        Self(
            protocol as u64
                | (length as u64 & 0xffff) << 8
                | (fragment as u64) << 24
                | (id as u64) << 32,
        )
    }
}

/// Walks over extension headers, at most six and 256 bytes of them.
#[inline(never)]
fn walk_extensions<P: Packet>(packet: &P, protocol: u32) -> u64 {
    const HEADERS: usize = 6;
    const BYTES: usize = 256;
    /// The lowest three bits are no part of the fragment's offset.
    const OFFSET: u16 = 0xfff8;
    const MORE_FRAGMENTS: u16 = 1;
    let start = L3 + Ipv6Hdr::LEN;
    let mut next = protocol as u8;
    let (mut length, mut fragment, mut id) = (0, Fragment::Whole, 0);
    for _ in 0..HEADERS {
        if !is_extension(next) {
            return Walk::new(next, length, fragment, id).0;
        }
        if length > BYTES {
            break;
        }
        let Some(word) = packet.load(start + length) else {
            break;
        };
        let [following, size, high, low] = word.to_ne_bytes();
        match next {
            FRAGMENT => {
                let Some(identification) = packet.load(start + length + 4) else {
                    break;
                };
                let flags = u16::from_be_bytes([high, low]);
                id = identification;
                length += 8;
                if flags & OFFSET != 0 {
                    return Walk::new(following, length, Fragment::Later, id).0;
                }
                if flags & MORE_FRAGMENTS != 0 {
                    fragment = Fragment::First;
                }
            }
            // Its destination is not yet the last one.
            ROUTING if low != 0 => break,
            AUTHENTICATION => length += (usize::from(size) + 2) << 2,
            _ => length += (usize::from(size) + 1) << 3,
        }
        next = following;
    }
    Walk::FAILED.0
}

/// Bytes of an IP packet, given what stands at [`Family::LENGTH`] of its header.
///
/// TCP's packets may be longer than a header can tell while they are the kernel's own
/// ("BIG TCP", Linux 5.19, and 6.3 for IPv4): their headers have 0 there. By IPv6 a jumbo
/// option (RFC 2675) stands behind it, which newer kernels leave out.
#[inline(always)]
pub fn claimed_length<P: Packet, F: Family>(packet: &P, claimed: [u8; 2]) -> usize {
    match u16::from_be_bytes(claimed) {
        0 if packet.is_joined() => packet.length().wrapping_sub(L3),
        claimed => usize::from(claimed).wrapping_add(F::UNCLAIMED),
    }
}

/// Bytes behind the IP header, given the length that the header claims for the
/// whole packet and its own; of more than there is room for as many as there is.
#[inline(always)]
fn payload_length<P: Packet>(packet: &P, claimed: usize, header: usize) -> Result<u16, Reason> {
    if !packet.reaches(L3 + claimed) {
        return Err(Reason::Truncated);
    }
    if claimed < header {
        return Err(Reason::Malformed);
    }
    let length = claimed.wrapping_sub(header);
    Ok(if length > u16::MAX as usize {
        u16::MAX
    } else {
        length as u16
    })
}

/// What the IP header says about the one behind it.
struct Transport {
    protocol: u8,
    offset: usize,
    length: u16,
    fragment: Fragment,
    id: u32,
}

impl Transport {
    /// Moves on behind IPv6's extension headers.
    #[inline(always)]
    fn skip_extensions<P: Packet>(&mut self, packet: &P) -> Result<(), Reason> {
        let walk = walk_extensions(packet, self.protocol.into());
        if walk == Walk::FAILED.0 {
            return Err(Reason::ExtensionHeader);
        }
        let length = (walk >> 8) as u16 & L4_MASK;
        if self.length < length {
            return Err(Reason::Truncated);
        }
        self.protocol = walk as u8;
        self.offset += usize::from(length);
        self.length -= length;
        self.fragment = match (walk >> 24) as u8 {
            0 => Fragment::Whole,
            1 => Fragment::First,
            _ => Fragment::Later,
        };
        self.id = (walk >> 32) as u32;
        Ok(())
    }

    #[inline(always)]
    fn parse<P: Packet, F: Family>(
        &self,
        packet: &P,
        src: F::Addr,
        dst: F::Addr,
        ports: Ports,
    ) -> Result<Parsed<F::Addr>, Reason> {
        if !matches!(self.protocol, TCP | UDP | SCTP) {
            return Err(Reason::OtherProtocol);
        }
        if P::LEAVES_RARE_TO_TC && self.fragment != Fragment::Whole {
            return Err(Reason::LeftToTc);
        }
        let (src_port, dst_port, signals) =
            if !P::LEAVES_RARE_TO_TC && self.fragment == Fragment::Later {
                self.ports_of_first::<F>(src, dst, ports)?
            } else {
                match self.protocol {
                    TCP => self.parse_tcp(packet)?,
                    UDP => self.parse_udp(packet)?,
                    _ => self.parse_sctp(packet)?,
                }
            };
        let mut parsed = Parsed {
            tuple: Tuple::new(src, dst, src_port, dst_port, self.protocol),
            l4: self.offset as u16 & L4_MASK,
            l4_length: self.length,
            fragment: self.fragment,
            id: self.id,
            signals,
        };
        parsed.blur();
        Ok(parsed)
    }

    /// The ports of a later fragment, if they are needed.
    ///
    /// They are asked for by a tuple of their own. What a function is given stands in
    /// memory, and the packet's tuple would be copied from there, for every packet: 40
    /// bytes, some of which would have to wait for what has just been stored in smaller
    /// pieces.
    #[inline(always)]
    fn ports_of_first<F: Family>(
        &self,
        src: F::Addr,
        dst: F::Addr,
        ports: Ports,
    ) -> Result<(Port, Port, Signals), Reason> {
        let signals = Signals {
            flags: ACK,
            data: true,
            seq: 0,
            ack: 0,
        };
        if ports == Ports::Optional {
            return Ok((Port::default(), Port::default(), signals));
        }
        let tuple = Tuple::new(src, dst, Port::default(), Port::default(), self.protocol);
        let first = fragment::ports::<F>(&tuple, self.id).ok_or(Reason::Fragment)?;
        Ok((first.src_port, first.dst_port, signals))
    }

    /// SCTP's handshake and end, told as TCP's: INIT and INIT ACK carry a tag
    /// that is as good as a sequence number for telling associations apart
    /// (RFC 9260, 3.3 and 5).
    #[inline(always)]
    fn parse_sctp<P: Packet>(&self, packet: &P) -> Result<(Port, Port, Signals), Reason> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Head {
            src_port: Port,
            dst_port: Port,
            tag: u32,
            checksum: u32,
            chunk: u8,
            chunk_flags: u8,
            chunk_length: u16,
        }
        const INIT: u8 = 1;
        const INIT_ACK: u8 = 2;
        const ABORT: u8 = 6;
        const SHUTDOWN: u8 = 7;
        const SHUTDOWN_ACK: u8 = 8;
        const SHUTDOWN_COMPLETE: u8 = 14;
        if usize::from(self.length) < size_of::<Head>() {
            return Err(Reason::Truncated);
        }
        let mut signals = Signals {
            flags: ACK,
            data: false,
            seq: 1,
            ack: 0,
        };
        if packet.frames() > 1 {
            // Chunks of data, which the sender's kernel has left to be split, in
            // buffers of their own: made readable, they could not be any more.
            let [src, dst] = read::<P, [Port; 2]>(packet, self.offset)?;
            return Ok((src, dst, signals));
        }
        let head: Head = read(packet, self.offset)?;
        match head.chunk {
            INIT => {
                let tag: u32 = read(packet, self.offset + size_of::<Head>())?;
                signals.flags = SYN;
                signals.seq = u32::from_be(tag);
            }
            INIT_ACK => {
                signals.flags = SYN | ACK;
                signals.ack = u32::from_be(head.tag).wrapping_add(1);
            }
            ABORT => signals.flags = RST,
            SHUTDOWN | SHUTDOWN_ACK | SHUTDOWN_COMPLETE => signals.flags = FIN | ACK,
            _ => {}
        }
        Ok((head.src_port, head.dst_port, signals))
    }

    #[inline(always)]
    fn parse_tcp<P: Packet>(&self, packet: &P) -> Result<(Port, Port, Signals), Reason> {
        /// `network_types::TcpHdr` up to the flags, which it has as a bit field
        /// that is read bit by bit.
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Head {
            src_port: Port,
            dst_port: Port,
            seq: u32,
            ack: u32,
            data_offset: u8,
            flags: u8,
        }
        if usize::from(self.length) < TcpHdr::LEN {
            return Err(Reason::Truncated);
        }
        let head: Head = read(packet, self.offset)?;
        let header_length = u16::from(head.data_offset >> 4) << 2;
        if usize::from(header_length) < TcpHdr::LEN || header_length > self.length {
            return Err(Reason::Malformed);
        }
        let signals = Signals {
            flags: head.flags,
            data: self.length > header_length,
            seq: u32::from_be(head.seq),
            ack: u32::from_be(head.ack),
        };
        Ok((head.src_port, head.dst_port, signals))
    }

    #[inline(always)]
    fn parse_udp<P: Packet>(&self, packet: &P) -> Result<(Port, Port, Signals), Reason> {
        if usize::from(self.length) < UdpHdr::LEN {
            return Err(Reason::Truncated);
        }
        let Aligned { header } = read::<P, Aligned<UdpHdr>>(packet, self.offset)?;
        let claimed = u16::from_be_bytes(header.len);
        let is_too_long = claimed > self.length && self.fragment == Fragment::Whole;
        if usize::from(claimed) < UdpHdr::LEN || is_too_long {
            return Err(Reason::Malformed);
        }
        let nothing = Signals {
            flags: 0,
            data: true,
            seq: 0,
            ack: 0,
        };
        let (src, dst) = (Port { octets: header.src }, Port { octets: header.dst });
        Ok((src, dst, nothing))
    }
}

/// What an IP header says, for those who need no ports.
pub struct Header {
    /// Bytes, options included.
    pub length: usize,
    /// Of what is behind it; 0 if that is a later fragment.
    pub protocol: u8,
}

/// The IPv4 header at `offset`.
#[inline(always)]
pub fn header_v4<P: Packet>(packet: &P, offset: usize, quoted: bool) -> Result<Header, Reason> {
    const MORE_FRAGMENTS: u16 = 0x2000;
    const OFFSET: u16 = 0x1fff;
    // Of a quoted packet in fragments the first has ports as well.
    let fragment = if quoted {
        OFFSET
    } else {
        OFFSET | MORE_FRAGMENTS
    };
    let Aligned { header } = read::<P, Aligned<Ipv4Hdr>>(packet, offset)?;
    let length = usize::from(header.vihl & 0x0f) << 2;
    if header.vihl >> 4 != 4 || length < Ipv4Hdr::LEN {
        return Err(Reason::Malformed);
    }
    let is_fragment = u16::from_be_bytes(header.frags) & fragment != 0;
    Ok(Header {
        length,
        protocol: if is_fragment { 0 } else { header.proto },
    })
}

/// The IPv6 header at `offset`; extension headers count as a protocol, but for
/// that of a first fragment that is quoted.
#[inline(always)]
pub fn header_v6<P: Packet>(packet: &P, offset: usize, quoted: bool) -> Result<Header, Reason> {
    let Aligned { header } = read::<P, Aligned<Ipv6Hdr>>(packet, offset)?;
    let [version, ..] = header.vcf;
    if version >> 4 != 6 {
        return Err(Reason::Malformed);
    }
    if quoted && header.next_hdr == FRAGMENT {
        return first_fragment(packet, offset + Ipv6Hdr::LEN);
    }
    Ok(Header {
        length: Ipv6Hdr::LEN,
        protocol: header.next_hdr,
    })
}

/// The IPv6 header with the fragment header at `offset` (RFC 8200, 4.5).
#[inline(always)]
fn first_fragment<P: Packet>(packet: &P, offset: usize) -> Result<Header, Reason> {
    const BYTES: usize = 8;
    let word: u32 = read(packet, offset)?;
    let [protocol, _, high, low] = word.to_ne_bytes();
    let is_first = u16::from_be_bytes([high, low]) >> 3 == 0;
    Ok(Header {
        length: Ipv6Hdr::LEN + BYTES,
        protocol: if is_first { protocol } else { 0 },
    })
}
