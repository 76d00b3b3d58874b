//! Traffic that is no business of klb passes the node as if klb were not there,
//! byte for byte: each frame is sent once before the agent starts and once
//! while all its hooks are attached, and must arrive the same.

use std::{net::SocketAddr, time::Duration};

use etherparse::{IpFragOffset, IpNumber, Ipv4Header, Ipv6Header};
use lb_tests::{
    agent::Hooks,
    packet::{Packet, flags},
    topology::{Addresses, Family, Host},
    traffic::{Protocol, Request},
    wire::RawSocket,
    world::World,
};

const ETHERNET: usize = 14;
/// In every payload: these frames are the test's, not the stack's.
const MARK: &[u8] = b"a stranger's payload";

struct Frame {
    name: &'static str,
    bytes: Vec<u8>,
}

/// What is sent from one host to a pod.
fn frames(from: &Host, to: Addresses) -> Vec<Frame> {
    let mut frames = Vec::new();
    for family in Family::ALL {
        let src = from.addresses.port(family, 41000);
        let dst = to.port(family, 9999);
        frames.extend(transport(src, dst));
    }
    let (src, dst) = (from.addresses, to);
    frames.extend(ipv4(src.v4.octets(), dst.v4.octets()));
    frames.extend(ipv6(src.v6.octets(), dst.v6.octets()));
    frames
}

fn transport(src: SocketAddr, dst: SocketAddr) -> Vec<Frame> {
    let frame = |name, packet: Packet| Frame {
        name,
        bytes: packet.payload(MARK).bytes(),
    };
    vec![
        frame("UDP", Packet::udp(src, dst)),
        frame("TCP SYN", Packet::tcp(src, dst, flags::SYN)),
        frame("TCP in mid-connection", Packet::tcp(src, dst, flags::ACK)),
        frame("TCP RST", Packet::tcp(src, dst, flags::RST)),
        // A Service's port, but a pod's address.
        frame(
            "UDP to port 53",
            Packet::udp(src, SocketAddr::new(dst.ip(), 53)),
        ),
    ]
}

fn ipv4(src: [u8; 4], dst: [u8; 4]) -> Vec<Frame> {
    let frame = |name, protocol, change: fn(&mut Ipv4Header)| {
        let length = u16::try_from(MARK.len()).expect("short");
        let mut header = Ipv4Header::new(length, 64, protocol, src, dst).expect("short");
        header.identification = 0x4b1b;
        change(&mut header);
        header.header_checksum = header.calc_header_checksum();
        let mut bytes = ethernet(0x0800);
        header.write(&mut bytes).expect("a vector grows");
        bytes.extend(MARK);
        Frame { name, bytes }
    };
    vec![
        frame("SCTP", IpNumber::SCTP, |_| {}),
        frame("ESP", IpNumber::ENCAPSULATING_SECURITY_PAYLOAD, |_| {}),
        frame("an unknown protocol", IpNumber(253), |_| {}),
        frame("IPv4, first fragment", IpNumber::UDP, |header| {
            header.more_fragments = true;
        }),
        frame("IPv4, later fragment", IpNumber::UDP, |header| {
            header.fragment_offset = IpFragOffset::try_new(100).expect("13 bits");
        }),
        frame("IPv4 with a class", IpNumber::SCTP, |header| {
            header.dscp = 46.try_into().expect("6 bits");
            header.ecn = 1.try_into().expect("2 bits");
        }),
    ]
}

fn ipv6(src: [u8; 16], dst: [u8; 16]) -> Vec<Frame> {
    let frame = |name, next: IpNumber, inner: &[u8]| {
        let header = Ipv6Header {
            payload_length: u16::try_from(inner.len() + MARK.len()).expect("short"),
            next_header: next,
            hop_limit: 64,
            source: src,
            destination: dst,
            ..Ipv6Header::default()
        };
        let mut bytes = ethernet(0x86dd);
        header.write(&mut bytes).expect("a vector grows");
        bytes.extend(inner);
        bytes.extend(MARK);
        Frame { name, bytes }
    };
    // Next header 132 (SCTP), length 0 (8 bytes), one option of padding.
    let options = [132, 0, 1, 4, 0, 0, 0, 0];
    // Next header 17 (UDP), offset in the upper 13 bits, identification.
    let fragment = |offset| [17, 0, 0, offset, 0, 0, 0x4b, 0x1b];
    vec![
        frame("SCTP over IPv6", IpNumber::SCTP, &[]),
        frame("IPv6 options", IpNumber::IPV6_DESTINATION_OPTIONS, &options),
        frame(
            "IPv6, first fragment, of more",
            IpNumber::IPV6_FRAGMENTATION_HEADER,
            &fragment(1),
        ),
        frame(
            "IPv6, later fragment, of more",
            IpNumber::IPV6_FRAGMENTATION_HEADER,
            &fragment(65),
        ),
    ]
}

/// From anybody to the gateway of all pods.
fn ethernet(ether_type: u16) -> Vec<u8> {
    let mut header = vec![0xee; 6];
    header.extend([2, 0, 0, 0, 0, 1]);
    header.extend(ether_type.to_be_bytes());
    header
}

/// A sender and a receiver.
struct Way<'a> {
    from: &'a Host,
    sender: RawSocket,
    receiver: RawSocket,
    gateway: [u8; 6],
}

impl<'a> Way<'a> {
    fn new(world: &'a World, from: &'a Host) -> Self {
        let pod = &world.cluster.pod("pod-1").host;
        // The stacks get to know their neighbours.
        for family in Family::ALL {
            let request = Request::new(Protocol::Tcp, pod.addresses.port(family, 3000));
            from.ask(&request).expect("an answer of the pod itself");
        }
        let open = |host: &Host| host.place.netns().within(|| RawSocket::open("eth0"));
        Self {
            from,
            sender: open(from),
            receiver: open(pod),
            gateway: gateway(from),
        }
    }

    /// Sends every frame; returns what arrived.
    fn pass(&self) -> Vec<Frame> {
        frames(self.from, Addresses::pod(5))
            .into_iter()
            .map(|Frame { name, mut bytes }| {
                bytes[..6].copy_from_slice(&self.gateway);
                self.sender.send(&bytes).expect("sent");
                let bytes = self.arrival(name);
                Frame { name, bytes }
            })
            .collect()
    }

    fn arrival(&self, name: &str) -> Vec<u8> {
        loop {
            let frame = self.receiver.receive(Duration::from_secs(5));
            let frame = frame.unwrap_or_else(|| panic!("{name} did not arrive"));
            if frame.ends_with(MARK) {
                return frame;
            }
        }
    }
}

/// The node's address on the link of a host.
pub(crate) fn gateway(host: &Host) -> [u8; 6] {
    let neighbours = host.place.netns().output("ip", &["neigh"]);
    let line = neighbours
        .lines()
        .find(|line| line.starts_with("169.254.1.1 ") || line.starts_with("192.168.50.1 "))
        .unwrap_or_else(|| panic!("no gateway among {neighbours}"));
    let mut words = line.split(' ').skip_while(|word| *word != "lladdr");
    let octets = words.nth(1).expect("an address").split(':');
    let octets: Vec<u8> = octets
        .map(|octet| u8::from_str_radix(octet, 16).expect("an octet"))
        .collect();
    octets.try_into().expect("six octets")
}

#[test]
fn strangers_pass_unchanged() {
    let helper = crate::helper();
    let mut world = World::new(helper, Hooks::ALL);
    let before: Vec<_> = {
        let ways = [&world.cluster.client.host, &world.cluster.outside];
        ways.map(|from| Way::new(&world, from).pass()).into()
    };
    world.agent.start();
    let ways = [&world.cluster.client.host, &world.cluster.outside];
    for (from, before) in ways.into_iter().zip(before) {
        let after = Way::new(&world, from).pass();
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(after.bytes, before.bytes, "{}", after.name);
            assert!(after.bytes.len() > ETHERNET + MARK.len());
        }
    }
    let new_flows = world.agent.status().new_flows();
    assert!(new_flows.is_empty(), "{new_flows:?}");
}
