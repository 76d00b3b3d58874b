//! Packets whose transport header is not where it usually is: fragments, and
//! IPv6's extension headers; and SCTP, whose checksum is of another kind.

use std::{net::SocketAddr, slice};

use lb_common::{Hook, Reason, flow::TCP, node::EARLY_PLACES};
use lb_tests::{
    fragments::{cut, join},
    packet::{Packet, chunk, flags, read},
    program::{Datapath, TC_DROP},
};

use crate::world::{
    World, behind_a_pod_device, local, sctp_worlds, translated, udp_worlds, untouched, worlds,
};

/// A datagram of 3000 bytes.
fn large(src: SocketAddr, dst: SocketAddr) -> Packet {
    let payload: Vec<u8> = (0..3000_u32).map(|n| n as u8).collect();
    Packet::udp(src, dst).payload(payload)
}

/// Runs frames through a hook; all must be translated.
fn through(datapath: &mut Datapath, hook: Hook, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let run = |frame: &Vec<u8>| {
        let outcome = datapath.run(hook, frame);
        assert_ne!(outcome.frame, *frame, "{:?}", outcome.reason);
        outcome.frame
    };
    frames.iter().map(run).collect()
}

#[test]
fn fragments_follow_the_first() {
    for world in udp_worlds() {
        let mut datapath = world.serve_one();
        for id in 1..5 {
            let sent = large(world.client, world.frontend);
            let frames = through(&mut datapath, Hook::TcIngress, &cut(&sent, id, 1400));
            let seen = read(&join(&frames));
            assert_eq!((seen.src, seen.dst), (world.client, world.backend));
            let answer = large(world.backend, world.client);
            let frames = through(&mut datapath, Hook::TcEgress, &cut(&answer, id, 1400));
            let seen = read(&join(&frames));
            assert_eq!((seen.src, seen.dst), (world.frontend, world.client));
        }
    }
}

#[test]
fn fragments_of_two_packets_are_told_apart() {
    for world in udp_worlds() {
        let mut datapath = world.serve_one();
        datapath.serve(
            world.protocol,
            world.other_frontend,
            &[local(world.other_backend)],
        );
        let mut other = world.frontend;
        other.set_port(81);
        datapath.serve(world.protocol, other, &[local(world.other_backend)]);
        let one = cut(&large(world.client, world.frontend), 1, 1600);
        let two = cut(&large(world.client, other), 2, 1600);
        let mixed = [&one[0], &two[0], &two[1], &one[1]].map(Clone::clone);
        let frames = through(&mut datapath, Hook::TcIngress, &mixed);
        for (parts, backend) in [([0, 3], world.backend), ([1, 2], world.other_backend)] {
            let seen = read(&join(&parts.map(|n: usize| frames[n].clone())));
            assert_eq!(seen.dst, backend);
        }
    }
}

#[test]
fn a_fragment_without_its_first_passes_and_is_counted() {
    for world in udp_worlds() {
        let mut datapath = world.serve_one();
        let frames = cut(&large(world.client, world.frontend), 1, 1400);
        for hook in [Hook::TcIngress, Hook::TcEgress] {
            untouched(&mut datapath, hook, &frames[1], Reason::Fragment);
        }
        untouched(&mut datapath, Hook::Xdp, &frames[0], Reason::LeftToTc);
        untouched(&mut datapath, Hook::Xdp, &frames[1], Reason::LeftToTc);
    }
}

#[test]
fn fragments_that_come_before_their_first_are_kept_for_it() {
    for world in udp_worlds() {
        let mut datapath = world.serve_one();
        datapath.put_address(world.frontend.ip(), 0);
        let frames = cut(&large(world.client, world.frontend), 7, 1000);
        let [first, early @ ..] = &frames[..] else {
            panic!("several fragments");
        };
        for frame in early {
            let outcome = datapath.run(Hook::TcIngress, frame);
            assert_eq!(outcome.reason, Reason::FragmentKept);
            assert_eq!(outcome.action, TC_DROP);
        }
        // The carriers go where a test run cannot follow: see `netns::wire`.
        let mut seen = through(&mut datapath, Hook::TcIngress, slice::from_ref(first));
        seen.extend(through(&mut datapath, Hook::TcIngress, early));
        let whole = read(&join(&seen));
        assert_eq!((whole.src, whole.dst), (world.client, world.backend));
    }
}

/// Of a datagram that is for nobody's port of a Service's address; and of one that
/// leaves for a pod.
#[test]
fn fragments_of_strangers_follow_their_first() {
    for world in udp_worlds() {
        let mut datapath = world.serve_one();
        datapath.put_address(world.frontend.ip(), 0);
        behind_a_pod_device(&mut datapath);
        let mut nobodys = world.frontend;
        nobodys.set_port(9999);
        for (hook, dst, later) in [
            (Hook::TcIngress, nobodys, Reason::NoFlow),
            (Hook::TcEgress, world.stranger, Reason::NotService),
        ] {
            let frames = cut(&large(world.client, dst), 3, 1400);
            untouched(&mut datapath, hook, &frames[0], Reason::NotService);
            for frame in &frames[1..] {
                untouched(&mut datapath, hook, frame, later);
            }
        }
    }
}

/// Where they go out to a pod too: its datagram may be a backend's answer.
#[test]
fn early_fragments_are_kept_for_a_pod() {
    for world in udp_worlds() {
        let mut datapath = world.serve_one();
        datapath.run(Hook::TcIngress, &world.first(world.frontend).bytes());
        let frames = cut(&large(world.backend, world.client), 8, 1400);
        untouched(&mut datapath, Hook::TcEgress, &frames[1], Reason::Fragment);
        behind_a_pod_device(&mut datapath);
        let outcome = datapath.run(Hook::TcEgress, &frames[1]);
        assert_eq!(outcome.reason, Reason::FragmentKept);
        assert_eq!(outcome.action, TC_DROP);
        let seen = through(&mut datapath, Hook::TcEgress, &frames);
        let whole = read(&join(&seen));
        assert_eq!((whole.src, whole.dst), (world.frontend, world.client));
    }
}

#[test]
fn there_is_room_for_few_early_fragments_of_a_packet() {
    let world = udp_worlds().next().expect("a world");
    let mut datapath = world.serve_one();
    datapath.put_address(world.frontend.ip(), 0);
    let frames = cut(&large(world.client, world.frontend), 7, 400);
    let early = &frames[1..];
    for (n, frame) in (0..).zip(early) {
        let outcome = datapath.run(Hook::TcIngress, frame);
        let expected = if n < EARLY_PLACES {
            Reason::FragmentKept
        } else {
            Reason::Fragment
        };
        assert_eq!(outcome.reason, expected);
    }
}

/// Extension headers: hop-by-hop options, destination options, a fragment
/// header that cuts nothing (RFC 6946), and authentication.
const EXTENSIONS: [&[u8]; 4] = [
    &[0, 0, 1, 4, 0, 0, 0, 0],
    &[60, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    &[44, 0, 0, 0, 0, 0, 0, 9],
    &[
        51, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
    ],
];

/// A jumbo option (RFC 2675, 2) of 70,000 bytes.
const JUMBO: &[u8] = &[0, 0, 0xc2, 4, 0, 1, 0x11, 0x70];

/// The frame with 0 for the length that its IP header claims.
fn without_length(mut frame: Vec<u8>) -> Vec<u8> {
    let at = if frame[12..14] == [0x08, 0x00] {
        16
    } else {
        18
    };
    frame[at..at + 2].fill(0);
    frame
}

/// The kernel's own packets of TCP may be longer than their headers can tell ("BIG
/// TCP"). By IPv6 they had a jumbo option at first, and have none in newer kernels.
#[test]
fn packets_longer_than_their_header_can_tell() {
    for world in worlds().into_iter().filter(|world| world.protocol == TCP) {
        let mut datapath = world.serve_one();
        datapath.run(Hook::TcIngress, &world.first(world.frontend).bytes());
        let is_ipv4 = world.client.is_ipv4();
        let forms: &[&[&[u8]]] = if is_ipv4 { &[&[]] } else { &[&[], &[JUMBO]] };
        for (hook, src, dst) in [
            (Hook::TcIngress, world.client, world.frontend),
            (Hook::TcEgress, world.backend, world.client),
        ] {
            let plain = Packet::tcp(src, dst, flags::ACK).bytes();
            let expected = datapath.run(hook, &plain);
            for extensions in forms {
                let form = |frame: &[u8]| match extensions {
                    [] => without_length(frame.to_vec()),
                    extensions => without_length(extend(frame, extensions)),
                };
                let frame = form(&plain);
                let outcome = datapath.run_joined(hook, &frame, 1000);
                assert_eq!(outcome.reason, expected.reason, "{extensions:?}");
                assert_eq!(outcome.frame, form(&expected.frame), "{extensions:?}");
                let wrong = if is_ipv4 {
                    Reason::Malformed
                } else {
                    Reason::Truncated
                };
                untouched(&mut datapath, hook, &frame, wrong);
            }
        }
    }
}

/// Puts extension headers, of which the first byte is their own number, before
/// the transport header of an IPv6 frame.
fn extend(frame: &[u8], extensions: &[&[u8]]) -> Vec<u8> {
    const NEXT_HEADER: usize = 14 + 6;
    const END: usize = 14 + 40;
    let mut bytes = Vec::new();
    let mut following = frame[NEXT_HEADER];
    for extension in extensions.iter().rev() {
        let mut header = extension.to_vec();
        let own = std::mem::replace(&mut header[0], following);
        header.extend(bytes);
        bytes = header;
        following = own;
    }
    let mut extended = frame[..END].to_vec();
    let length = u16::try_from(frame.len() - END + bytes.len()).expect("short");
    extended[14 + 4..14 + 6].copy_from_slice(&length.to_be_bytes());
    extended[NEXT_HEADER] = following;
    extended.extend(bytes);
    extended.extend(&frame[END..]);
    extended
}

fn v6_worlds() -> impl Iterator<Item = World> {
    worlds().into_iter().filter(|world| world.client.is_ipv6())
}

#[test]
fn extension_headers_are_walked_over() {
    let [hop, options, atomic, authentication] = EXTENSIONS;
    for world in v6_worlds() {
        for extensions in [
            &[hop][..],
            &[options],
            &[atomic],
            &[authentication],
            &[hop, options, atomic, authentication, options],
        ] {
            let mut datapath = world.serve_one();
            let plain = world.first(world.frontend).bytes();
            let expected = Packet::first(world.protocol, world.client, world.backend).bytes();
            let frame = extend(&plain, extensions);
            untouched(&mut datapath, Hook::Xdp, &frame, Reason::LeftToTc);
            let outcome = datapath.run(Hook::TcIngress, &frame);
            assert_eq!(outcome.reason, Reason::NewFlow, "{extensions:?}");
            assert_eq!(outcome.frame, extend(&expected, extensions));
        }
    }
}

#[test]
fn extension_headers_without_end_or_beyond_the_packet_pass() {
    let [hop, options, ..] = EXTENSIONS;
    for world in v6_worlds() {
        let mut datapath = world.serve_one();
        let plain = world.first(world.frontend).bytes();
        let many = [options; 7];
        let too_long: &[u8] = &[60, 40, 1, 4, 0, 0, 0, 0];
        // Source routing: there is another destination still to come.
        let routing: &[u8] = &[
            43, 2, 0, 1, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,
        ];
        let endless = [hop, too_long, options];
        for extensions in [&many[..], &endless, &[routing]] {
            let frame = extend(&plain, extensions);
            untouched(
                &mut datapath,
                Hook::TcIngress,
                &frame,
                Reason::ExtensionHeader,
            );
        }
    }
}

#[test]
fn an_sctp_association_goes_there_and_back() {
    for world in sctp_worlds() {
        for hook in [Hook::TcIngress, Hook::Xdp] {
            let mut datapath = world.serve_one();
            let to_backend = (world.client, world.backend);
            let to_client = (world.frontend, world.client);
            let send = |kind, tag| Packet::sctp(world.client, world.frontend, kind, tag);
            let answer = |kind, tag| Packet::sctp(world.backend, world.client, kind, tag);
            let mut pass = |hook, packet: &Packet, reason, tuple| {
                translated(&mut datapath, hook, packet, reason, tuple);
            };
            pass(hook, &send(chunk::INIT, 70), Reason::NewFlow, to_backend);
            pass(hook, &send(chunk::INIT, 70), Reason::Forward, to_backend);
            let out = Hook::TcEgress;
            pass(out, &answer(chunk::INIT_ACK, 70), Reason::Reply, to_client);
            pass(
                hook,
                &send(chunk::COOKIE_ECHO, 80),
                Reason::Forward,
                to_backend,
            );
            pass(
                out,
                &answer(chunk::COOKIE_ACK, 70),
                Reason::Reply,
                to_client,
            );
            pass(hook, &send(chunk::DATA, 80), Reason::Forward, to_backend);
            datapath.age_flows(1);
            translated(
                &mut datapath,
                hook,
                &send(chunk::DATA, 80),
                Reason::Forward,
                to_backend,
            );
            assert_eq!(datapath.young_count(), 0, "it is confirmed");
        }
    }
}

#[test]
fn sctp_answers_to_somebody_else_are_left_alone() {
    for world in sctp_worlds() {
        let mut datapath = world.serve_one();
        let init = Packet::sctp(world.client, world.frontend, chunk::INIT, 70);
        datapath.run(Hook::TcIngress, &init.bytes());
        let other = Packet::sctp(world.backend, world.client, chunk::INIT_ACK, 71).bytes();
        untouched(&mut datapath, Hook::TcEgress, &other, Reason::StaleFlow);
        let stray = Packet::sctp(world.client, world.frontend, chunk::DATA, 5).bytes();
        untouched(&mut datapath, Hook::TcIngress, &stray, Reason::NoFlow);
    }
}

/// A sender leaves SCTP's checksum to a device that can compute it, and 0 stands
/// there until then.
#[test]
fn a_checksum_of_sctp_that_a_device_computes_is_left_to_it() {
    for world in sctp_worlds() {
        let mut datapath = world.serve_one();
        let at = if world.client.is_ipv4() { 34 } else { 54 } + 8;
        let mut frame = Packet::sctp(world.client, world.frontend, chunk::INIT, 70).bytes();
        let finished = datapath.run(Hook::TcIngress, &frame).frame;
        frame[at..at + 4].fill(0);
        let mut unfinished = datapath.run(Hook::TcIngress, &frame);
        assert_eq!(unfinished.reason, Reason::Forward);
        assert_eq!(unfinished.frame[at..at + 4], [0; 4]);
        unfinished.frame[at..at + 4].copy_from_slice(&finished[at..at + 4]);
        assert_eq!(unfinished.frame, finished);
    }
}

#[test]
fn sctp_packets_of_every_length_keep_their_checksum() {
    for world in sctp_worlds() {
        let mut datapath = world.serve_one();
        for length in (0..1440).step_by(7) {
            let packet = Packet::sctp(world.client, world.frontend, chunk::INIT, 70)
                .payload(vec![0x5a; length]);
            let outcome = datapath.run(Hook::TcIngress, &packet.bytes());
            let seen = read(&outcome.frame);
            assert_eq!((seen.src, seen.dst), (world.client, world.backend));
        }
    }
}
