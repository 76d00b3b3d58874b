//! The packet in question as a frame, and what is read of one that comes out.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher as _, Hasher as _},
    net::{IpAddr, SocketAddr},
};

use etherparse::{
    IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions, Ipv6Header, NetSlice,
    PacketBuilder, SlicedPacket, TransportSlice,
};
use lb_common::flow::{SCTP, TCP, UDP};

use crate::datapath::trial::Ends;

/// No program asks who is meant on the wire.
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
const HOPS: u8 = 64;

/// What a packet is to its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Its first.
    Opening,
    /// One in the middle.
    Later,
}

impl Kind {
    /// What such a packet is called.
    pub(super) const fn name(self, protocol: u8) -> &'static str {
        match (protocol, self) {
            (TCP, Self::Opening) => "SYN",
            (TCP, Self::Later) => "ACK",
            (SCTP, Self::Opening) => "INIT",
            (SCTP, Self::Later) => "DATA",
            _ => "datagram",
        }
    }
}

/// Makes a frame. Its sequence number is another one every time: a backend is
/// drawn by it.
pub(super) fn build(ends: Ends, protocol: u8, kind: Kind) -> Vec<u8> {
    let Ends { src, dst } = ends;
    let number = any_number();
    let builder = PacketBuilder::ethernet2(MACS[0], MACS[1]).ip(headers(src.ip(), dst.ip()));
    let mut frame = Vec::new();
    let written = match protocol {
        TCP => {
            let header = builder.tcp(src.port(), dst.port(), number, u16::MAX);
            match kind {
                Kind::Opening => header.syn().write(&mut frame, &[]),
                Kind::Later => header.ack(number).write(&mut frame, &[]),
            }
        }
        UDP => builder.udp(src.port(), dst.port()).write(&mut frame, &[]),
        _ => builder.write(&mut frame, IpNumber(SCTP), &sctp(src, dst, kind, number)),
    };
    // Memory takes every write, and what is written is short.
    debug_assert!(written.is_ok(), "{written:?}");
    frame
}

fn any_number() -> u32 {
    // Seeded by the system, anew for each.
    RandomState::new().build_hasher().finish() as u32
}

fn headers(src: IpAddr, dst: IpAddr) -> IpHeaders {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => IpHeaders::Ipv4(
            Ipv4Header {
                time_to_live: HOPS,
                source: src.octets(),
                destination: dst.octets(),
                ..Ipv4Header::default()
            },
            Ipv4Extensions::default(),
        ),
        (src, dst) => IpHeaders::Ipv6(
            Ipv6Header {
                hop_limit: HOPS,
                source: octets(src),
                destination: octets(dst),
                ..Ipv6Header::default()
            },
            Ipv6Extensions::default(),
        ),
    }
}

const fn octets(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        IpAddr::V6(addr) => addr.octets(),
    }
}

/// A packet with one chunk (RFC 9260, 3.3.1 and 3.3.2).
fn sctp(src: SocketAddr, dst: SocketAddr, kind: Kind, tag: u32) -> Vec<u8> {
    const DATA: u8 = 0;
    const INIT: u8 = 1;
    const WHOLE_MESSAGE: u8 = 3;
    /// Of either chunk here, header and contents.
    const LENGTH: u16 = 20;
    const WINDOW: u32 = 1 << 16;
    let (header_tag, chunk, flags) = match kind {
        Kind::Opening => (0, INIT, 0),
        Kind::Later => (tag, DATA, WHOLE_MESSAGE),
    };
    let mut packet = Vec::new();
    packet.extend(src.port().to_be_bytes());
    packet.extend(dst.port().to_be_bytes());
    packet.extend(header_tag.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend([chunk, flags]);
    packet.extend(LENGTH.to_be_bytes());
    // Of an INIT the tag comes first, which is not 0.
    packet.extend((tag | 1).to_be_bytes());
    packet.extend(WINDOW.to_be_bytes());
    packet.extend([0, 1, 0, 1]);
    packet.extend(tag.to_be_bytes());
    let checksum = crc32c(&packet).to_le_bytes();
    packet[8..12].copy_from_slice(&checksum);
    packet
}

/// SCTP's checksum (RFC 9260, appendix A), bit by bit: the packet is short.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(crc & 1))
        })
    };
    !bytes.iter().fold(!0, step)
}

/// The ends of a packet; `None` if it is none of klb's protocols.
pub(super) fn ends(frame: &[u8]) -> Option<Ends> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (src, dst): (IpAddr, IpAddr) = match packet.net.as_ref()? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
            )
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
            )
        }
        NetSlice::Arp(_) => return None,
    };
    let (src_port, dst_port) = match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
        Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
        Some(_) => return None,
        None => {
            let payload = packet.ip_payload()?;
            match (payload.ip_number, payload.payload) {
                (IpNumber(SCTP), &[a, b, c, d, ..]) => {
                    (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
                }
                _ => return None,
            }
        }
    };
    Some(Ends {
        src: SocketAddr::new(src, src_port),
        dst: SocketAddr::new(dst, dst_port),
    })
}

#[cfg(test)]
mod tests {
    use lb_tests::packet;

    use super::*;

    fn all() -> impl Iterator<Item = (Ends, u8, Kind)> {
        let pairs = [("10.0.0.1:1", "10.0.0.2:2"), ("[fd00::1]:1", "[fd00::2]:2")];
        let pairs = pairs.map(|(src, dst)| Ends {
            src: src.parse().expect("an address"),
            dst: dst.parse().expect("an address"),
        });
        let kinds = [Kind::Opening, Kind::Later];
        let each = move |ends| {
            let kinds = kinds.into_iter();
            kinds.flat_map(move |kind| [TCP, UDP, SCTP].map(|protocol| (ends, protocol, kind)))
        };
        pairs.into_iter().flat_map(each)
    }

    #[test]
    fn frames_are_what_a_strict_receiver_takes() {
        for (ends, protocol, kind) in all() {
            let seen = packet::read(&build(ends, protocol, kind));
            assert_eq!((seen.src, seen.dst), (ends.src, ends.dst), "{kind:?}");
            assert_eq!(seen.protocol, protocol);
        }
    }

    #[test]
    fn the_ends_of_a_frame_are_read_back() {
        for (expected, protocol, kind) in all() {
            let frame = build(expected, protocol, kind);
            assert_eq!(ends(&frame), Some(expected), "{protocol} {kind:?}");
            for length in 0..frame.len() {
                // Whatever is left of it.
                let _some = ends(&frame[..length]);
            }
        }
        assert_eq!(ends(&[0; 64]), None);
    }

    #[test]
    fn two_connections_have_different_numbers() {
        let (ends, ..) = all().next().expect("some");
        let frames = [0; 4].map(|_| build(ends, TCP, Kind::Opening));
        assert!(frames.iter().any(|frame| frame != &frames[0]));
    }
}
