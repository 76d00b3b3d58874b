//! Messages of ICMP for both families, built and read.

use std::{
    io::{self, Read as _},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use etherparse::{Ethernet2Header, IpHeaders};
use socket2::{Domain, Protocol, Socket, Type};

use crate::packet::{CLIENT_MAC, NODE_MAC, ip_frame, ones_sum, pseudo_sum};

/// A message of either family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub src: IpAddr,
    pub dst: IpAddr,
    /// Type and code.
    pub kind: (u8, u8),
    /// What follows the checksum: an MTU, or identifier and sequence number.
    pub rest: u32,
    /// For an error the packet that it is about, from its IP header on.
    pub payload: Vec<u8>,
}

/// "Fragmentation needed" or "packet too big", by family.
pub const fn too_big(of: IpAddr) -> (u8, u8) {
    if of.is_ipv4() { (3, 4) } else { (2, 0) }
}

/// "Port unreachable", by family.
pub const fn port_unreachable(of: IpAddr) -> (u8, u8) {
    if of.is_ipv4() { (3, 3) } else { (1, 4) }
}

/// Echo request and reply, by family.
pub const fn echo(of: IpAddr) -> [(u8, u8); 2] {
    if of.is_ipv4() {
        [(8, 0), (0, 0)]
    } else {
        [(128, 0), (129, 0)]
    }
}

const fn protocol(of: IpAddr) -> u8 {
    if of.is_ipv4() { 1 } else { 58 }
}

impl Message {
    /// An error about a frame, of which at most `quoted` bytes are quoted.
    pub fn about(frame: &[u8], quoted: usize, src: IpAddr, dst: IpAddr, kind: (u8, u8)) -> Self {
        let packet = &frame[Ethernet2Header::LEN..];
        Self {
            src,
            dst,
            kind,
            rest: 1400,
            payload: packet[..quoted.min(packet.len())].to_vec(),
        }
    }

    /// The frame, with an Ethernet header.
    pub fn bytes(&self) -> Vec<u8> {
        let mut message = vec![self.kind.0, self.kind.1, 0, 0];
        message.extend(self.rest.to_be_bytes());
        message.extend(&self.payload);
        let checksum = !ones_sum(&message, self.pseudo(message.len()));
        message[2..4].copy_from_slice(&checksum.to_ne_bytes());
        ip_frame(self.src, self.dst, protocol(self.src), &[], &message)
    }

    fn pseudo(&self, length: usize) -> u16 {
        match self.src {
            IpAddr::V4(_) => 0,
            IpAddr::V6(_) => pseudo_sum(self.src, self.dst, protocol(self.src), length),
        }
    }

    /// Reads a frame as a strict receiver would.
    ///
    /// # Panics
    /// If it is no ICMP message, or a length or checksum is wrong.
    pub fn read(frame: &[u8]) -> Self {
        let packet = &frame[Ethernet2Header::LEN..];
        let (headers, payload) = IpHeaders::from_slice(packet).expect("an IP packet");
        let (src, dst): (IpAddr, IpAddr) = match &headers {
            IpHeaders::Ipv4(header, _) => {
                let checksum = header.calc_header_checksum();
                assert_eq!(header.header_checksum, checksum, "IPv4 header checksum");
                (header.source.into(), header.destination.into())
            }
            IpHeaders::Ipv6(header, _) => (header.source.into(), header.destination.into()),
        };
        assert_eq!(payload.ip_number.0, protocol(src));
        let bytes = payload.payload;
        let (head, rest) = bytes.split_at(8);
        let message = Self {
            src,
            dst,
            kind: (head[0], head[1]),
            rest: u32::from_be_bytes([head[4], head[5], head[6], head[7]]),
            payload: rest.to_vec(),
        };
        let sum = ones_sum(bytes, message.pseudo(bytes.len()));
        assert_eq!(sum, 0xffff, "ICMP checksum of {message:?}");
        message
    }
}

/// Pings an address once, by a socket of the kernel's own for that.
///
/// # Errors
/// Why there was no reply.
pub fn ping(to: IpAddr, within: Duration) -> io::Result<()> {
    let to = SocketAddr::new(to, 0);
    let protocol = if to.is_ipv4() {
        Protocol::ICMPV4
    } else {
        Protocol::ICMPV6
    };
    let mut socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(protocol))?;
    socket.set_read_timeout(Some(within))?;
    socket.connect(&to.into())?;
    let [request, reply] = echo(to.ip());
    // Identifier and checksum are the kernel's to write.
    let payload = *b"how are you";
    let mut message = vec![request.0, request.1, 0, 0, 0, 0, 0, 1];
    message.extend(payload);
    socket.send(&message)?;
    let mut answer = [0; 100];
    let length = socket.read(&mut answer)?;
    let is_reply = (answer[0], answer[1]) == reply && answer[8..length] == payload;
    is_reply
        .then_some(())
        .ok_or(io::ErrorKind::InvalidData.into())
}

/// Whether a frame goes back to where it came from.
pub fn is_sent_back(frame: &[u8]) -> bool {
    frame[..6] == CLIENT_MAC && frame[6..12] == NODE_MAC
}
