//! The kit itself, without klb: what it builds works, what it claims to verify
//! is verified, and nothing stays behind. Where these pass and others fail, the
//! fault is klb's.

use std::{
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use lb_tests::{
    packet::Packet,
    scope::Scope,
    sweep,
    topology::{Addresses, Cluster, Family, Host, Options},
    traffic::{Failure, Protocol, Request},
    wait,
    wire::RawSocket,
    world::PODS,
};

fn cluster() -> Cluster {
    let options = Options {
        helper: crate::helper(),
        offloads: false,
    };
    let mut cluster = Cluster::new(Scope::test(), options);
    cluster.add_pods(&PODS);
    cluster
}

#[test]
fn everybody_reaches_pods_directly() {
    let cluster = cluster();
    for (name, number) in PODS {
        for family in Family::ALL {
            for (protocol, port) in [(Protocol::Tcp, 3000), (Protocol::Udp, 3053)] {
                let to = Addresses::pod(number).port(family, port);
                for client in [&cluster.client.host, &cluster.node, &cluster.outside] {
                    let request = Request::new(protocol, to).size(1200);
                    let answer = client.ask(&request).expect("an answer");
                    assert_eq!(answer.name, name);
                    assert_eq!(answer.from, to);
                    assert_eq!(answer.seen.ip(), client.addresses.ip(family));
                }
            }
        }
    }
}

#[test]
fn nobody_answers_for_a_service() {
    let cluster = cluster();
    let service = Addresses::service(1);
    for family in Family::ALL {
        let request = Request::new(Protocol::Tcp, service.port(family, 80));
        assert_eq!(cluster.node.ask(&request), Err(Failure::Unreachable));
        let request = Request::new(Protocol::Tcp, Addresses::NODE.port(family, 30080));
        assert_eq!(cluster.outside.ask(&request), Err(Failure::Refused));
    }
}

#[test]
fn receivers_verify_checksums() {
    let cluster = cluster();
    let (client, server) = (&cluster.client.host, &cluster.pod("pod-1").host);
    let to = server.addresses.port(Family::V4, 3053);
    let from = client.addresses.port(Family::V4, 40000);
    // Makes both neighbours known.
    client
        .ask(&Request::new(Protocol::Udp, to))
        .expect("an answer");
    let device = client.place.netns().within(|| RawSocket::open("eth0"));
    let mut frame = Packet::udp(from, to).bytes();
    frame[..6].copy_from_slice(&[0xee; 6]);
    let last = frame.len() - 1;
    frame[last] ^= 1;
    let before = wrong_udp_checksums(server);
    device.send(&frame).expect("sent");
    wait::until(
        "a wrong checksum to be counted",
        Duration::from_secs(5),
        || (wrong_udp_checksums(server) > before).then_some(()),
    );
}

/// `InCsumErrors` of UDP over IPv4.
fn wrong_udp_checksums(host: &Host) -> u64 {
    let snmp = host
        .place
        .netns()
        .within(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))
        .expect("the kernel counts");
    let mut lines = snmp.lines().filter(|line| line.starts_with("Udp:"));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let mut columns = names.split(' ').zip(values.split(' '));
    let (_, value) = columns
        .find(|(name, _)| *name == "InCsumErrors")
        .expect("a column");
    value.parse().expect("a number")
}

#[test]
fn a_panic_leaves_nothing_behind() {
    let mut scope = String::new();
    let result = catch_unwind(AssertUnwindSafe(|| {
        let cluster = cluster();
        cluster.scope().name().clone_into(&mut scope);
        assert!(sweep::exists(&scope));
        std::panic::resume_unwind(Box::new("without a message"));
    }));
    assert!(result.is_err());
    assert!(!sweep::exists(&scope), "{scope} is still there");
}

#[test]
fn what_a_killed_test_leaves_can_be_removed_by_name() {
    let cluster = cluster();
    let scope = cluster.scope().name().to_owned();
    let server = SocketAddr::from(([10, 244, 0, 5], 3000));
    let request = Request::new(Protocol::Tcp, server);
    assert!(cluster.node.ask(&request).is_ok());
    // No guard drops, as after SIGKILL.
    std::mem::forget(cluster);
    sweep::remove(&scope);
    assert!(!sweep::exists(&scope), "{scope} is still there");
}
