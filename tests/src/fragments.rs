//! Packets in parts: cut as a sender does, and put together as a receiver does.

use std::net::IpAddr;

use crate::packet::{Packet, ip_frame};

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
/// IPv6's fragment header (RFC 8200, 4.5).
const FRAGMENT_HEADER: usize = 8;
const FRAGMENT: u8 = 44;

/// The frames of a packet whose fragments carry at most `size` bytes each, which
/// must be a multiple of 8.
pub fn cut(packet: &Packet, id: u32, size: usize) -> Vec<Vec<u8>> {
    let whole = packet.bytes();
    let (src, dst) = (packet.src.ip(), packet.dst.ip());
    let header = if src.is_ipv4() { IPV4 } else { IPV6 };
    let payload = &whole[ETHERNET + header..];
    let count = payload.len().div_ceil(size);
    let parts = payload.chunks(size).enumerate();
    parts
        .map(|(n, part)| {
            let offset = u16::try_from(n * size).expect("fits");
            fragment(
                (src, dst),
                packet.protocol(),
                id,
                offset,
                n + 1 < count,
                part,
            )
        })
        .collect()
}

fn fragment(
    (src, dst): (IpAddr, IpAddr),
    protocol: u8,
    id: u32,
    offset: u16,
    more: bool,
    part: &[u8],
) -> Vec<u8> {
    if src.is_ipv6() {
        let mut bytes = vec![protocol, 0];
        bytes.extend((offset | u16::from(more)).to_be_bytes());
        bytes.extend(id.to_be_bytes());
        bytes.extend(part);
        return ip_frame(src, dst, FRAGMENT, &[], &bytes);
    }
    let mut frame = ip_frame(src, dst, protocol, &[], part);
    let flags = (offset / 8) | (u16::from(more) << 13);
    let id = u16::try_from(id).expect("IPv4 has 16 bits for it");
    frame[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&id.to_be_bytes());
    frame[ETHERNET + 6..ETHERNET + 8].copy_from_slice(&flags.to_be_bytes());
    finish_header(&mut frame);
    frame
}

/// Writes an IPv4 header's checksum.
fn finish_header(frame: &mut [u8]) {
    let (header, _) =
        etherparse::Ipv4Header::from_slice(&frame[ETHERNET..]).expect("an IPv4 header");
    let checksum = header.calc_header_checksum();
    frame[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&checksum.to_be_bytes());
}

/// The packet that the frames are fragments of, in any order, as one frame.
///
/// # Panics
/// If a fragment has other addresses than the others, a wrong header checksum,
/// or one is missing.
pub fn join(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut parts: Vec<_> = frames.iter().map(|frame| part(frame)).collect();
    parts.sort_by_key(|part| part.offset);
    let mut payload = Vec::new();
    let (addresses, protocol) = (parts[0].addresses, parts[0].protocol);
    let last = parts.len() - 1;
    for (n, part) in parts.into_iter().enumerate() {
        assert_eq!((part.addresses, part.protocol), (addresses, protocol));
        assert_eq!(part.offset, payload.len(), "the fragments fit together");
        assert_eq!(part.more, n < last);
        payload.extend(part.bytes);
    }
    ip_frame(addresses.0, addresses.1, protocol, &[], &payload)
}

struct Part {
    addresses: (IpAddr, IpAddr),
    protocol: u8,
    offset: usize,
    more: bool,
    bytes: Vec<u8>,
}

fn part(frame: &[u8]) -> Part {
    let packet = &frame[ETHERNET..];
    let short = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    if packet[0] >> 4 == 4 {
        let (header, rest) = etherparse::Ipv4Header::from_slice(packet).expect("an IPv4 header");
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        return Part {
            addresses: (header.source.into(), header.destination.into()),
            protocol: header.protocol.0,
            offset: usize::from(short(6) & 0x1fff) * 8,
            more: short(6) & 0x2000 != 0,
            bytes: rest.to_vec(),
        };
    }
    let (header, rest) = etherparse::Ipv6Header::from_slice(packet).expect("an IPv6 header");
    assert_eq!(header.next_header.0, FRAGMENT);
    Part {
        addresses: (header.source.into(), header.destination.into()),
        protocol: rest[0],
        offset: usize::from(short(IPV6 + 2) & 0xfff8),
        more: short(IPV6 + 2) & 1 != 0,
        bytes: rest[FRAGMENT_HEADER..].to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_joins_again() {
        for (src, dst) in [("10.0.0.1:1", "10.0.0.2:2"), ("[fd00::1]:1", "[fd00::2]:2")] {
            let packet = Packet::udp(src.parse().expect("src"), dst.parse().expect("dst"))
                .payload([7; 3000]);
            let frames = cut(&packet, 99, 1000);
            assert_eq!(frames.len(), 4);
            let seen = crate::packet::read(&join(&frames));
            assert_eq!(seen.payload, [7; 3000]);
        }
    }
}
