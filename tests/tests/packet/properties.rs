//! Random packets through the real programs: the checksums that come out are
//! right, and the way back is the inverse of the way there.

use std::cell::RefCell;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::{
    Hook, Reason,
    flow::{TCP, UDP},
};
use lb_tests::{
    packet::{self, Packet, flags},
    program::Datapath,
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use crate::world::local;

/// Client, frontend and backend of one family.
fn addresses() -> impl Strategy<Value = [SocketAddr; 3]> {
    let v4 = any::<[(u32, u16); 3]>()
        .prop_map(|a| a.map(|(ip, port)| SocketAddr::new(Ipv4Addr::from(ip).into(), port)));
    let v6 = any::<[(u128, u16); 3]>()
        .prop_map(|a| a.map(|(ip, port)| SocketAddr::new(Ipv6Addr::from(ip).into(), port)));
    prop_oneof![v4, v6]
}

#[test]
fn there_and_back_is_the_identity() {
    let datapath = RefCell::new(Datapath::new());
    let mut runner = TestRunner::new(Config {
        cases: 400,
        failure_persistence: None,
        ..Config::default()
    });
    let strategy = (
        addresses(),
        prop_oneof![Just(TCP), Just(UDP)],
        prop_oneof![Just(Hook::TcIngress), Just(Hook::Xdp)],
        prop::collection::vec(any::<u8>(), 0..1200),
    );
    runner
        .run(
            &strategy,
            |([client, frontend, backend], protocol, hook, payload)| {
                let mut datapath = datapath.borrow_mut();
                datapath.serve(protocol, frontend, &[local(backend)]);
                let first = Packet::first(protocol, client, frontend).payload(payload.clone());
                let there = datapath.run(hook, &first.bytes());
                // One in 65,536 finished checksums looks unfinished.
                prop_assume!(there.reason != Reason::UnfinishedChecksum);
                prop_assert_eq!(there.reason, Reason::NewFlow);
                let seen = packet::read(&there.frame);
                prop_assert_eq!((seen.src, seen.dst), (client, backend));
                prop_assert_eq!(&seen.payload, &payload);

                let answer = if protocol == TCP {
                    Packet::tcp(seen.dst, seen.src, flags::SYN | flags::ACK).numbers(1, 1001)
                } else {
                    Packet::udp(seen.dst, seen.src)
                };
                let back = datapath.run(Hook::TcEgress, &answer.payload(payload.clone()).bytes());
                prop_assert_eq!(back.reason, Reason::Reply);
                let seen = packet::read(&back.frame);
                prop_assert_eq!((seen.src, seen.dst), (frontend, client));
                prop_assert_eq!(&seen.payload, &payload);
                Ok(())
            },
        )
        .unwrap_or_else(|error| panic!("{error}"));
}

/// An unfinished checksum is the sum of the pseudo header and nothing else, so
/// TC must turn it into the sum of the new pseudo header. A test run's packet
/// is not marked as unfinished; what this shows is that XDP never mistakes one
/// for a finished checksum, whatever the addresses.
#[test]
fn xdp_never_takes_an_unfinished_checksum_for_a_finished_one() {
    let datapath = RefCell::new(Datapath::new());
    let mut runner = TestRunner::new(Config {
        cases: 400,
        failure_persistence: None,
        ..Config::default()
    });
    let strategy = (addresses(), prop_oneof![Just(TCP), Just(UDP)]);
    runner
        .run(&strategy, |([client, frontend, backend], protocol)| {
            let mut datapath = datapath.borrow_mut();
            datapath.serve(protocol, frontend, &[local(backend)]);
            let frame = Packet::first(protocol, client, frontend)
                .unfinished_checksum()
                .bytes();
            let outcome = datapath.run(Hook::Xdp, &frame);
            prop_assert_eq!(outcome.reason, Reason::UnfinishedChecksum);
            prop_assert_eq!(outcome.frame, frame);
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

/// Translating to the same address and port changes no byte.
#[test]
fn the_identity_translation_is_the_identity() {
    let mut datapath = Datapath::new();
    for hook in [Hook::TcIngress, Hook::Xdp] {
        for protocol in [TCP, UDP] {
            for (client, frontend) in [
                ("10.0.0.2:40000", "10.0.0.9:80"),
                ("[fd00::2]:40000", "[fd00::9]:80"),
            ] {
                let client: SocketAddr = client.parse().expect("an address");
                let frontend: SocketAddr = frontend.parse().expect("an address");
                datapath.serve(protocol, frontend, &[local(frontend)]);
                let frame = Packet::first(protocol, client, frontend).bytes();
                let outcome = datapath.run(hook, &frame);
                assert_ne!(outcome.reason, Reason::NotService);
                assert_eq!(outcome.frame, frame, "{hook:?} {protocol}");
            }
        }
    }
}
