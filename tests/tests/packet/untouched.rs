//! What is no business of klb: it leaves every hook as it came.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::{Hook, Reason, reason::Effect};
use lb_tests::{
    packet::Packet,
    program::{Datapath, TC_GO_ON, XDP_PASS},
};

use crate::world::{local, untouched, worlds};

const PACKET_HOOKS: [Hook; 3] = [Hook::Xdp, Hook::TcIngress, Hook::TcEgress];

#[test]
fn packets_to_strangers() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        for packet in [
            world.first(world.stranger),
            world.first(world.stranger).unfinished_checksum(),
            world.first(world.stranger).payload([]),
            world.first(world.stranger).payload(vec![7; 1400]),
        ] {
            for hook in PACKET_HOOKS {
                untouched(&mut datapath, hook, &packet.bytes(), Reason::NotService);
            }
        }
        assert_eq!(datapath.flow_count(), 0);
    }
}

#[test]
fn metadata_of_packets_to_strangers() {
    // Offsets in `struct __sk_buff` (linux/bpf.h) of fields that a test run
    // takes: mark, priority, cb[5].
    const SK_BUFF: usize = 192;
    const FIELDS: [(usize, usize); 3] = [(8, 4), (32, 4), (48, 20)];
    for world in worlds() {
        let datapath = world.serve_one();
        let frame = world.first(world.stranger).bytes();
        for hook in [Hook::TcIngress, Hook::TcEgress] {
            let mut before = vec![0; SK_BUFF];
            for (offset, length) in FIELDS {
                before[offset..offset + length].fill(0x5a);
            }
            let mut after = vec![0; SK_BUFF];
            let mut out = vec![0; frame.len()];
            datapath
                .test_run(hook, &frame, &mut out, Some((&before, &mut after)))
                .unwrap_or_else(|error| panic!("{hook:?}: {error:?}"));
            for (offset, length) in FIELDS {
                let range = offset..offset + length;
                assert_eq!(after[range.clone()], before[range], "{hook:?} at {offset}");
            }
            assert_eq!(out, frame);
        }
    }
}

/// Every prefix of a packet to the frontend. Less than an Ethernet header no
/// device delivers, and newer kernels refuse it here too.
#[test]
fn packets_cut_short_at_every_length() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        let whole = world.first(world.frontend).payload(vec![1; 128]).bytes();
        for hook in PACKET_HOOKS {
            for length in 0..=128 {
                let frame = &whole[..length];
                let Some(outcome) = datapath.try_run(hook, frame) else {
                    continue;
                };
                assert_eq!(outcome.reason, Reason::Truncated, "{hook:?} {length}");
                assert_eq!(outcome.frame, frame, "{hook:?} {length}");
            }
        }
        assert_eq!(datapath.flow_count(), 0);
    }
}

/// Zeros and ones of every length, with every first byte of an IP header.
#[test]
fn nonsense_of_every_length() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        for ether_type in [[0x08, 0x00], [0x86, 0xdd], [0x08, 0x06]] {
            for fill in [0x00, 0xff, 0x45, 0x60] {
                for length in 14..=128 {
                    let mut frame = vec![fill; length];
                    frame[12..14].copy_from_slice(&ether_type);
                    for hook in PACKET_HOOKS {
                        passes(&mut datapath, hook, &frame);
                    }
                }
            }
        }
    }
}

/// One byte of a good packet at a time set to each of a few values.
#[test]
fn headers_with_one_wrong_byte() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        let good = world.first(world.stranger).bytes();
        for position in 12..good.len().min(14 + 40 + 20) {
            for value in [0x00, 0x01, 0x0f, 0x40, 0x4f, 0x60, 0x80, 0xff] {
                let mut frame = good.clone();
                frame[position] = value;
                for hook in PACKET_HOOKS {
                    passes(&mut datapath, hook, &frame);
                }
            }
        }
    }
}

fn passes(datapath: &mut Datapath, hook: Hook, frame: &[u8]) {
    let Some(outcome) = datapath.try_run(hook, frame) else {
        return;
    };
    assert_eq!(
        outcome.reason.effect(),
        Effect::Pass,
        "{hook:?} {:?} {frame:02x?}",
        outcome.reason
    );
    assert_eq!(outcome.frame, frame, "{hook:?}");
    let go_on = if hook == Hook::Xdp {
        XDP_PASS
    } else {
        TC_GO_ON
    };
    assert_eq!(outcome.action, go_on, "{hook:?}");
}

/// Headers that klb does not translate. (Fragments and extension headers are in
/// `headers`.)
#[test]
fn what_is_passed_says_why() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        let base = world.first(world.frontend).bytes();
        let mut rows: Vec<(&str, usize, &[u8], Reason)> =
            vec![("ARP", 12, &[0x08, 0x06], Reason::NotIp)];
        if world.client.is_ipv4() {
            rows.extend([
                ("version 5", 14, &[0x55][..], Reason::Malformed),
                ("header of 16 bytes", 14, &[0x44], Reason::Malformed),
                ("ICMP", 23, &[1], Reason::OtherProtocol),
                ("GRE", 23, &[47], Reason::OtherProtocol),
                ("a total length of 19", 16, &[0, 19], Reason::Malformed),
            ]);
        } else {
            rows.extend([
                ("version 4", 14, &[0x45][..], Reason::Malformed),
                ("ICMPv6", 20, &[58], Reason::OtherProtocol),
                ("no payload", 18, &[0, 0], Reason::Truncated),
            ]);
        }
        for (name, position, bytes, reason) in rows {
            let mut frame = base.clone();
            frame[position..position + bytes.len()].copy_from_slice(bytes);
            for hook in PACKET_HOOKS {
                println!("{name} at {hook:?}");
                untouched(&mut datapath, hook, &frame, reason);
            }
        }
    }
}

/// "Don't fragment" is no fragment.
#[test]
fn dont_fragment_is_translated() {
    for world in worlds().into_iter().filter(|world| world.client.is_ipv4()) {
        let mut datapath = world.serve_one();
        let mut frame = Packet::first(world.protocol, world.client, world.frontend).bytes();
        frame[20] = 0x40;
        let outcome = datapath.run(Hook::TcIngress, &frame);
        assert_eq!(outcome.reason, Reason::NewFlow);
        assert_eq!(outcome.frame[20], 0x40);
    }
}

/// A frontend at a loopback address is for the node's sockets alone: whoever
/// shares a wire with the node could send a packet there.
#[test]
fn packets_to_loopback_addresses() {
    for world in worlds() {
        let loopback: IpAddr = if world.client.is_ipv4() {
            Ipv4Addr::LOCALHOST.into()
        } else {
            Ipv6Addr::LOCALHOST.into()
        };
        let frontend = SocketAddr::new(loopback, 30_080);
        let mut datapath = world.serve_one();
        datapath.serve(world.protocol, frontend, &[local(world.backend)]);
        for hook in PACKET_HOOKS {
            let packet = world.first(frontend).bytes();
            untouched(&mut datapath, hook, &packet, Reason::NotService);
        }
    }
}
