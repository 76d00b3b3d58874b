//! ICMP: errors about translated packets, answers instead of a backend's, and
//! pings.

use std::net::IpAddr;

use lb_common::{Hook, Reason, flow::SCTP, service::FRONTEND_ECHO};
use lb_tests::{
    cpu,
    fragments::cut,
    icmp::{Message, echo, is_sent_back, port_unreachable, too_big},
    program::{Backend, Datapath, NODE4, NODE6, TC_DROP, TC_REDIRECT},
};

use crate::world::{World, sctp_worlds, udp_worlds, untouched, worlds};

const ETHERNET: usize = 14;

/// How much of a packet errors quote: everything, or the eight bytes behind the
/// IP header that RFC 792 asks for.
fn quotes(world: &World) -> [usize; 2] {
    let header = if world.client.is_ipv4() { 20 } else { 40 };
    [usize::MAX, header + 8]
}

/// With SCTP as well.
fn all_worlds() -> impl Iterator<Item = World> {
    worlds().into_iter().chain(sctp_worlds())
}

fn router(world: &World) -> IpAddr {
    world.stranger.ip()
}

/// An error that went through a hook.
fn error_through(datapath: &mut Datapath, hook: Hook, message: &Message) -> Message {
    let outcome = datapath.run(hook, &message.bytes());
    assert_eq!(outcome.reason, Reason::IcmpError, "{hook:?} {message:?}");
    Message::read(&outcome.frame)
}

/// Asserts that a quote is what its sender had sent, checksums included as far
/// as they are quoted. But not SCTP's: it is of the whole packet, which a quote
/// seldom is, and receivers go by the tag.
fn assert_quotes(message: &Message, frame: &[u8]) {
    let sent = &frame[ETHERNET..][..message.payload.len()];
    let quoted = without_sctp_checksum(&message.payload);
    assert_eq!(quoted, without_sctp_checksum(sent));
}

fn without_sctp_checksum(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let (header, protocol) = match packet[0] >> 4 {
        4 => (usize::from(packet[0] & 15) * 4, packet[9]),
        _ => (40, packet[6]),
    };
    if protocol == SCTP
        && let Some(checksum) = packet.get_mut(header + 8..header + 12)
    {
        checksum.fill(0);
    }
    packet
}

#[test]
fn errors_on_the_way_to_the_backend_come_back_about_what_the_client_sent() {
    for world in all_worlds() {
        let mut datapath = world.serve_one();
        let sent = world.first(world.frontend).bytes();
        let forwarded = datapath.run(Hook::TcIngress, &sent).frame;
        for quoted in quotes(&world) {
            for from in [router(&world), world.backend.ip()] {
                let kind = too_big(from);
                let error = Message::about(&forwarded, quoted, from, world.client.ip(), kind);
                let seen = error_through(&mut datapath, Hook::TcEgress, &error);
                let between = (world.frontend.ip(), world.client.ip());
                assert_eq!((seen.src, seen.dst), between, "whoever sent it");
                assert_eq!((seen.kind, seen.rest), (kind, 1400));
                if quoted == usize::MAX || !world.is_tcp() {
                    assert_quotes(&seen, &sent);
                }
            }
        }
    }
}

/// As path MTU discovery of datagrams that are larger than any link needs it.
#[test]
fn errors_about_the_first_of_several_fragments_come_back() {
    for world in udp_worlds() {
        let mut datapath = world.serve_one();
        let large = world.first(world.frontend).payload(vec![7; 3000]);
        let sent = cut(&large, 7, 1440).remove(0);
        let forwarded = datapath.run(Hook::TcIngress, &sent).frame;
        let from = router(&world);
        let error = Message::about(&forwarded, 600, from, world.client.ip(), too_big(from));
        let seen = error_through(&mut datapath, Hook::TcEgress, &error);
        assert_eq!(seen.dst, world.client.ip());
        assert_quotes(&seen, &sent);
    }
}

#[test]
fn errors_on_the_way_to_the_client_reach_the_backend() {
    for world in all_worlds() {
        let mut datapath = world.serve_one();
        datapath.run(Hook::TcIngress, &world.first(world.frontend).bytes());
        let answer = world.answer(world.backend).bytes();
        let replied = datapath.run(Hook::TcEgress, &answer).frame;
        for (from, seen_from) in [
            (router(&world), router(&world)),
            (world.client.ip(), world.client.ip()),
        ] {
            let kind = too_big(from);
            let error = Message::about(&replied, usize::MAX, from, world.frontend.ip(), kind);
            let seen = error_through(&mut datapath, Hook::TcIngress, &error);
            assert_eq!((seen.src, seen.dst), (seen_from, world.backend.ip()));
            assert_quotes(&seen, &answer);
        }
    }
}

#[test]
fn errors_find_the_client_behind_a_masquerade() {
    for world in all_worlds() {
        let mut datapath = Datapath::new();
        let remote = Backend {
            addr: world.backend,
            local: false,
        };
        datapath.serve(world.protocol, world.frontend, &[remote]);
        let sent = world.first(world.frontend).bytes();
        let entered = datapath.run(Hook::TcIngress, &sent).frame;
        let left = datapath.run(Hook::TcEgress, &entered).frame;
        let node: IpAddr = if world.client.is_ipv4() {
            NODE4.into()
        } else {
            NODE6.into()
        };
        let kind = too_big(node);
        let error = Message::about(&left, usize::MAX, router(&world), node, kind);
        let between = error_through(&mut datapath, Hook::TcIngress, &error);
        assert_eq!(
            (between.src, between.dst),
            (router(&world), world.client.ip())
        );
        assert_quotes(&between, &entered);
        let seen = error_through(&mut datapath, Hook::TcEgress, &between);
        assert_eq!(
            (seen.src, seen.dst),
            (world.frontend.ip(), world.client.ip())
        );
        assert_quotes(&seen, &sent);
    }
}

#[test]
fn errors_about_what_is_not_ours_are_left_alone() {
    for world in all_worlds() {
        let mut datapath = world.serve_one();
        let forwarded = datapath.run(Hook::TcIngress, &world.first(world.frontend).bytes());
        let direct = world.first(world.stranger).bytes();
        let client = world.client.ip();
        for (frame, to) in [
            (&direct, client),
            // Not to whom the packet came from.
            (&forwarded.frame, world.other_backend.ip()),
        ] {
            let kind = too_big(client);
            let error = Message::about(frame, usize::MAX, router(&world), to, kind).bytes();
            for hook in [Hook::TcIngress, Hook::TcEgress, Hook::Xdp] {
                let outcome = datapath.run(hook, &error);
                assert_eq!(outcome.frame, error, "{hook:?} {:?}", outcome.reason);
            }
        }
        // Cut short anywhere.
        let kind = too_big(client);
        let error = Message::about(&forwarded.frame, usize::MAX, router(&world), client, kind);
        let ports_end = if world.client.is_ipv4() { 24 } else { 44 };
        for length in 0..ports_end {
            let mut short = error.clone();
            short.payload.truncate(length);
            let frame = short.bytes();
            let outcome = datapath.run(Hook::TcEgress, &frame);
            assert_eq!(outcome.frame, frame, "{length}");
        }
    }
}

#[test]
fn without_a_backend_the_client_is_told_so() {
    for world in all_worlds() {
        let mut datapath = Datapath::new();
        datapath.serve(world.protocol, world.frontend, &[]);
        for options in [&[][..], &[1, 1, 1, 0][..]] {
            if world.client.is_ipv6() && !options.is_empty() {
                continue;
            }
            let sent = world.first(world.frontend).ip_options(options).bytes();
            let outcome = datapath.run(Hook::TcIngress, &sent);
            assert_eq!(outcome.reason, Reason::NoBackend);
            assert_eq!(outcome.action, TC_REDIRECT);
            assert!(is_sent_back(&outcome.frame));
            let answer = Message::read(&outcome.frame);
            let (from, to) = (world.frontend.ip(), world.client.ip());
            assert_eq!((answer.src, answer.dst), (from, to));
            assert_eq!(answer.kind, port_unreachable(from));
            assert!(answer.payload.len() >= 28);
            assert_quotes(&answer, &sent);
            assert_eq!(datapath.flow_count(), 0);
        }
        let frame = world.first(world.frontend).bytes();
        untouched(&mut datapath, Hook::Xdp, &frame, Reason::LeftToTc);
    }
}

#[test]
fn answers_are_limited() {
    let world = worlds()[0];
    let mut datapath = Datapath::new();
    datapath.serve(world.protocol, world.frontend, &[]);
    let packet = world.first(world.frontend);
    let frame = packet.bytes();
    // A CPU gives a thousand a second. To look at the counters of each packet takes a
    // machine that is emulated longer than that.
    cpu::stay();
    let mut answered = 0;
    let refused = loop {
        let run = datapath.test_run(Hook::TcIngress, &frame, &mut [0; 1500], None);
        let (action, _) = run.expect("the kernel takes it");
        if action != TC_DROP {
            answered += 1;
            assert!(answered < 1_000_000, "there is no limit");
            continue;
        }
        // Another second may have begun.
        let outcome = datapath.run(Hook::TcIngress, &frame);
        if outcome.reason != Reason::NoBackend {
            break outcome;
        }
    };
    assert!(answered >= 1000, "{answered}");
    let what = (refused.reason, refused.action);
    assert_eq!(what, (Reason::AnswerLimit, TC_DROP));
}

#[test]
fn pings_are_answered_where_the_address_says_so() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        let [request, reply] = echo(world.client.ip());
        let ping = Message {
            src: world.client.ip(),
            dst: world.frontend.ip(),
            kind: request,
            rest: 0x1234_0001,
            payload: b"how are you".to_vec(),
        };
        let frame = ping.bytes();
        let left_alone = |datapath: &mut Datapath| {
            let outcome = datapath.run(Hook::TcIngress, &frame);
            assert_eq!(outcome.frame, frame, "{:?}", outcome.reason);
        };
        left_alone(&mut datapath);
        datapath.put_address(world.frontend.ip(), 0);
        left_alone(&mut datapath);
        datapath.put_address(world.frontend.ip(), FRONTEND_ECHO);
        let outcome = datapath.run(Hook::TcIngress, &frame);
        assert_eq!(outcome.reason, Reason::Echo);
        assert_eq!(outcome.action, TC_REDIRECT);
        assert!(is_sent_back(&outcome.frame));
        let pong = Message {
            src: ping.dst,
            dst: ping.src,
            kind: reply,
            ..ping
        };
        assert_eq!(Message::read(&outcome.frame), pong);
        untouched(&mut datapath, Hook::TcEgress, &frame, Reason::OtherProtocol);
    }
}
