//! Packets: building them, and reading them back with every checksum verified
//! in full.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    EtherType, Ethernet2Header, IpHeaders, IpNumber, Ipv4Header, Ipv4Options, Ipv6Header,
    NetHeaders, PacketHeaders, PayloadSlice, TcpHeader, TransportHeader, UdpHeader,
};
use lb_common::{
    Addr4, Addr6,
    checksum::pseudo_header,
    flow::{SCTP, TCP, UDP},
};

pub(crate) const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Types of SCTP chunks (RFC 9260, 3.2).
pub mod chunk {
    pub const DATA: u8 = 0;
    pub const INIT: u8 = 1;
    pub const INIT_ACK: u8 = 2;
    pub const COOKIE_ECHO: u8 = 10;
    pub const COOKIE_ACK: u8 = 11;
}

/// TCP flags, as the header has them.
pub mod flags {
    pub const FIN: u8 = 1 << 0;
    pub const SYN: u8 = 1 << 1;
    pub const RST: u8 = 1 << 2;
    pub const PSH: u8 = 1 << 3;
    pub const ACK: u8 = 1 << 4;
}

/// A packet to be built. Start with [`Packet::tcp`] or [`Packet::udp`].
#[derive(Clone, Debug)]
pub struct Packet {
    pub src: SocketAddr,
    pub dst: SocketAddr,
    kind: Kind,
    payload: Vec<u8>,
    ip_options: Vec<u8>,
    checksum: Checksum,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Tcp { flags: u8, seq: u32, ack: u32 },
    Udp,
    Sctp { chunk: u8, tag: u32 },
}

/// What stands in the transport checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checksum {
    Finished,
    /// Only the pseudo header's sum: the device is to do the rest.
    Unfinished,
    /// UDP: 0, "none".
    None,
}

impl Packet {
    /// What the client of [`Self::first`] wants in packets to it.
    pub const SCTP_TAG: u32 = 70;

    pub fn tcp(src: SocketAddr, dst: SocketAddr, flags: u8) -> Self {
        let kind = Kind::Tcp {
            flags,
            seq: 1000,
            ack: 0,
        };
        Self::new(src, dst, kind)
    }

    pub fn udp(src: SocketAddr, dst: SocketAddr) -> Self {
        Self::new(src, dst, Kind::Udp)
    }

    /// TCP (a SYN), UDP or SCTP (an INIT with [`Self::SCTP_TAG`]) by protocol
    /// number.
    pub fn first(protocol: u8, src: SocketAddr, dst: SocketAddr) -> Self {
        match protocol {
            TCP => Self::tcp(src, dst, flags::SYN),
            UDP => Self::udp(src, dst),
            SCTP => Self::sctp(src, dst, chunk::INIT, Self::SCTP_TAG),
            other => panic!("no packets of protocol {other} here"),
        }
    }

    fn new(src: SocketAddr, dst: SocketAddr, kind: Kind) -> Self {
        assert_eq!(src.is_ipv4(), dst.is_ipv4(), "one family a packet");
        Self {
            src,
            dst,
            kind,
            payload: b"an odd payload".to_vec(),
            ip_options: Vec::new(),
            checksum: Checksum::Finished,
        }
    }

    /// An SCTP packet with one chunk. The tag is the sender's of an INIT, and
    /// else the receiver's.
    pub fn sctp(src: SocketAddr, dst: SocketAddr, chunk: u8, tag: u32) -> Self {
        Self::new(src, dst, Kind::Sctp { chunk, tag })
    }

    /// TCP sequence and acknowledgment numbers.
    #[must_use]
    pub fn numbers(mut self, new_seq: u32, new_ack: u32) -> Self {
        match &mut self.kind {
            Kind::Tcp { seq, ack, .. } => (*seq, *ack) = (new_seq, new_ack),
            _ => panic!("only TCP has numbers"),
        }
        self
    }

    #[must_use]
    pub fn payload(mut self, payload: impl Into<Vec<u8>>) -> Self {
        self.payload = payload.into();
        self
    }

    /// IPv4 options, a multiple of 4 bytes.
    #[must_use]
    pub fn ip_options(mut self, options: &[u8]) -> Self {
        self.ip_options = options.to_vec();
        self
    }

    #[must_use]
    pub fn unfinished_checksum(mut self) -> Self {
        self.checksum = Checksum::Unfinished;
        self
    }

    /// UDP without a checksum.
    #[must_use]
    pub fn no_checksum(mut self) -> Self {
        self.checksum = Checksum::None;
        self
    }

    /// The frame, with an Ethernet header.
    pub fn bytes(&self) -> Vec<u8> {
        ip_frame(
            self.src.ip(),
            self.dst.ip(),
            self.protocol(),
            &self.ip_options,
            &self.transport(),
        )
    }

    pub(crate) fn protocol(&self) -> u8 {
        match self.kind {
            Kind::Tcp { .. } => TCP,
            Kind::Udp => UDP,
            Kind::Sctp { .. } => SCTP,
        }
    }

    /// Transport header and payload, with the checksum that was asked for.
    fn transport(&self) -> Vec<u8> {
        let mut bytes = match self.kind {
            Kind::Sctp { chunk, tag } => return self.sctp_bytes(chunk, tag),
            Kind::Tcp { flags, seq, ack } => {
                let mut header = TcpHeader::new(self.src.port(), self.dst.port(), seq, 4096);
                header.acknowledgment_number = ack;
                header.fin = flags & flags::FIN != 0;
                header.syn = flags & flags::SYN != 0;
                header.rst = flags & flags::RST != 0;
                header.psh = flags & flags::PSH != 0;
                header.ack = flags & flags::ACK != 0;
                header.to_bytes().to_vec()
            }
            Kind::Udp => UdpHeader {
                source_port: self.src.port(),
                destination_port: self.dst.port(),
                length: u16::try_from(UdpHeader::LEN + self.payload.len()).expect("fits"),
                checksum: 0,
            }
            .to_bytes()
            .to_vec(),
        };
        bytes.extend(&self.payload);
        let offset = checksum_offset(self.protocol());
        let pseudo = pseudo_sum(self.src.ip(), self.dst.ip(), self.protocol(), bytes.len());
        let checksum = match self.checksum {
            Checksum::Finished => match !ones_sum(&bytes, pseudo) {
                0 if self.protocol() == UDP => 0xffff,
                checksum => checksum,
            },
            Checksum::Unfinished => pseudo,
            Checksum::None => 0,
        };
        bytes[offset..offset + 2].copy_from_slice(&checksum.to_ne_bytes());
        bytes
    }
}

impl Packet {
    fn sctp_bytes(&self, chunk: u8, tag: u32) -> Vec<u8> {
        let header_tag = if chunk == chunk::INIT { 0 } else { tag };
        let mut bytes = Vec::new();
        bytes.extend(self.src.port().to_be_bytes());
        bytes.extend(self.dst.port().to_be_bytes());
        bytes.extend(header_tag.to_be_bytes());
        bytes.extend([0; 4]);
        let length = u16::try_from(8 + self.payload.len()).expect("short");
        bytes.extend([chunk, 0]);
        bytes.extend(length.to_be_bytes());
        bytes.extend(tag.to_be_bytes());
        bytes.extend(&self.payload);
        let checksum = crc32c(&bytes);
        bytes[8..12].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }
}

/// SCTP's checksum (RFC 9260, appendix A), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 * (crc & 1))
        })
    };
    !bytes.iter().fold(!0, step)
}

fn read_sctp(src: IpAddr, dst: IpAddr, bytes: &[u8]) -> (Seen, ChecksumState) {
    let mut cleared = bytes.to_vec();
    cleared[8..12].fill(0);
    let checksum = if crc32c(&cleared).to_le_bytes() == bytes[8..12] {
        ChecksumState::Right
    } else {
        ChecksumState::Wrong
    };
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let seen = Seen {
        src: SocketAddr::new(src, port(0)),
        dst: SocketAddr::new(dst, port(2)),
        protocol: SCTP,
        payload: bytes[12..].to_vec(),
    };
    (seen, checksum)
}

/// A frame from the client's device to the node's, with these bytes behind the
/// IP header.
pub(crate) fn ip_frame(
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = Vec::new();
    let ether_type = match src {
        IpAddr::V4(_) => EtherType::IPV4,
        IpAddr::V6(_) => EtherType::IPV6,
    };
    Ethernet2Header {
        source: CLIENT_MAC,
        destination: NODE_MAC,
        ether_type,
    }
    .write(&mut frame)
    .expect("memory takes every write");
    ip_header(src, dst, protocol, options, payload.len())
        .write(&mut frame)
        .expect("memory takes every write");
    frame.extend(payload);
    frame
}

fn ip_header(src: IpAddr, dst: IpAddr, protocol: u8, options: &[u8], length: usize) -> IpHeaders {
    let protocol = IpNumber(protocol);
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let length = u16::try_from(length).expect("fits an IPv4 packet");
            let mut header = Ipv4Header::new(length, 64, protocol, src.octets(), dst.octets())
                .expect("a legal IPv4 header");
            header.options = Ipv4Options::try_from(options).expect("legal IPv4 options");
            header.set_payload_len(usize::from(length)).expect("fits");
            header.header_checksum = header.calc_header_checksum();
            IpHeaders::Ipv4(header, etherparse::Ipv4Extensions::default())
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => IpHeaders::Ipv6(
            Ipv6Header {
                traffic_class: 0,
                flow_label: 0x12345.try_into().expect("a legal flow label"),
                payload_length: u16::try_from(length).expect("fits an IPv6 packet"),
                next_header: protocol,
                hop_limit: 64,
                source: src.octets(),
                destination: dst.octets(),
            },
            etherparse::Ipv6Extensions::default(),
        ),
        _ => unreachable!("one family a packet"),
    }
}

/// A packet as a receiver sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub protocol: u8,
    pub payload: Vec<u8>,
}

/// Reads a frame as a strict receiver would: every length and every checksum
/// must be right.
///
/// # Panics
/// If anything is wrong with it.
pub fn read(frame: &[u8]) -> Seen {
    let (seen, checksum) = dissect(frame);
    assert!(
        matches!(checksum, ChecksumState::Right | ChecksumState::Absent),
        "checksum {checksum:?} in {seen:?}"
    );
    seen
}

/// As [`read`], for a frame whose transport checksum must still be the plain
/// sum of the pseudo header.
///
/// # Panics
/// If anything is wrong with it.
pub fn read_unfinished(frame: &[u8]) -> Seen {
    let (seen, checksum) = dissect(frame);
    assert_eq!(checksum, ChecksumState::Unfinished, "in {seen:?}");
    seen
}

#[derive(Debug, PartialEq, Eq)]
enum ChecksumState {
    Right,
    Absent,
    Unfinished,
    Wrong,
}

fn dissect(frame: &[u8]) -> (Seen, ChecksumState) {
    let headers = PacketHeaders::from_ethernet_slice(frame).expect("a frame that parses");
    let (src, dst): (IpAddr, IpAddr) = match &headers.net {
        Some(NetHeaders::Ipv4(header, _)) => {
            assert_eq!(
                header.header_checksum,
                header.calc_header_checksum(),
                "IPv4 header checksum"
            );
            (header.source.into(), header.destination.into())
        }
        Some(NetHeaders::Ipv6(header, _)) => (header.source.into(), header.destination.into()),
        other => panic!("no IP packet: {other:?}"),
    };
    if matches!(&headers.payload, PayloadSlice::Ip(ip) if ip.ip_number.0 == SCTP) {
        return read_sctp(src, dst, headers.payload.slice());
    }
    let (protocol, ports, mut transport) = match &headers.transport {
        Some(TransportHeader::Tcp(tcp)) => (
            TCP,
            (tcp.source_port, tcp.destination_port),
            tcp.to_bytes().to_vec(),
        ),
        Some(TransportHeader::Udp(udp)) => (
            UDP,
            (udp.source_port, udp.destination_port),
            udp.to_bytes().to_vec(),
        ),
        other => panic!("neither TCP nor UDP: {other:?}"),
    };
    transport.extend(headers.payload.slice());
    let seen = Seen {
        src: SocketAddr::new(src, ports.0),
        dst: SocketAddr::new(dst, ports.1),
        protocol,
        payload: headers.payload.slice().to_vec(),
    };
    let pseudo = pseudo_sum(src, dst, protocol, transport.len());
    let offset = checksum_offset(protocol);
    let field = u16::from_ne_bytes([transport[offset], transport[offset + 1]]);
    let checksum = if ones_sum(&transport, pseudo) == 0xffff {
        ChecksumState::Right
    } else if protocol == UDP && field == 0 {
        ChecksumState::Absent
    } else if field == pseudo {
        ChecksumState::Unfinished
    } else {
        ChecksumState::Wrong
    };
    (seen, checksum)
}

const fn checksum_offset(protocol: u8) -> usize {
    if protocol == TCP { 16 } else { 6 }
}

pub(crate) fn pseudo_sum(src: IpAddr, dst: IpAddr, protocol: u8, length: usize) -> u16 {
    let length = u16::try_from(length).expect("fits an IP packet");
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            pseudo_header(&Addr4::from(src), &Addr4::from(dst), protocol, length)
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            pseudo_header(&Addr6::from(src), &Addr6::from(dst), protocol, length)
        }
        _ => unreachable!("one family a packet"),
    }
}

/// The one's complement sum of all 16-bit words, the slow and obvious way.
pub(crate) fn ones_sum(bytes: &[u8], start: u16) -> u16 {
    let mut sum = u32::from(start);
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_ne_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("folded")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs() -> [(SocketAddr, SocketAddr); 2] {
        [("10.0.0.1:1", "10.0.0.2:2"), ("[fd00::1]:1", "[fd00::2]:2")].map(|(a, b)| {
            (
                a.parse().expect("an address"),
                b.parse().expect("an address"),
            )
        })
    }

    #[test]
    fn what_is_built_reads_back() {
        for (src, dst) in pairs() {
            for packet in [Packet::tcp(src, dst, flags::SYN), Packet::udp(src, dst)] {
                let seen = read(&packet.bytes());
                assert_eq!((seen.src, seen.dst), (src, dst));
                let seen = read_unfinished(&packet.unfinished_checksum().bytes());
                assert_eq!(seen.payload, b"an odd payload");
            }
            read(&Packet::udp(src, dst).no_checksum().bytes());
        }
    }

    #[test]
    #[should_panic(expected = "checksum Wrong")]
    fn a_wrong_checksum_is_noticed() {
        let (src, dst) = pairs()[0];
        let mut frame = Packet::tcp(src, dst, flags::SYN).bytes();
        *frame.last_mut().expect("not empty") ^= 1;
        read(&frame);
    }
}
