//! SCTP by sockets, where the kernel has it: those of the matrix do.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use lb_common::flow::SCTP;
use lb_tests::{
    agent::Hooks,
    manifests::NODE,
    topology::{Addresses, Family, Host},
    traffic::Protocol,
    world::{Frontend, World},
};
use socket2::{Domain, Socket, Type};

use crate::sctp::{POD, await_backends, put};

/// Longer than an association takes to be made, and its data to arrive.
const LIMIT: Duration = Duration::from_secs(10);
/// Of several packets.
const SIZE: usize = 5000;

/// A socket of a host, bound to an address of its own: one that has several
/// tells its peer all of them.
fn socket(host: &Host, family: Family, port: u16) -> io::Result<Socket> {
    let addr = host.addresses.port(family, port);
    host.place.netns().within(|| {
        let protocol = socket2::Protocol::from(i32::from(SCTP));
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(protocol))?;
        socket.bind(&addr.into())?;
        Ok(socket)
    })
}

/// An exchange with the pod's server; returns whom the server saw.
fn exchange(listener: &Socket, client: &Host, to: SocketAddr) -> IpAddr {
    let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
    let mut client = socket(client, family, 0).expect("as the server's");
    client
        .connect_timeout(&to.into(), LIMIT)
        .unwrap_or_else(|error| panic!("{to}: {error}"));
    let (mut server, peer) = listener.accept().expect("the other end");
    let message = [7; SIZE];
    for [from, to] in [[0, 1], [1, 0]] {
        let ends = [&mut client, &mut server];
        ends[from].write_all(&message).expect("sent");
        ends[to].set_read_timeout(Some(LIMIT)).expect("a limit");
        let mut received = [0; SIZE];
        ends[to].read_exact(&mut received).expect("all of it");
        assert_eq!(received, message);
    }
    peer.as_socket().expect("an address").ip()
}

/// With checksums in the packets, and left to devices that never come.
#[test]
fn associations_of_real_stacks() {
    for (offloads, remote) in [(false, false), (false, true), (true, false), (true, true)] {
        let world = crate::world_with_offloads(Hooks::TC, offloads);
        let pod = &world.cluster.pod(POD.0).host;
        let listeners = Family::ALL.map(|family| socket(pod, family, 3000));
        let [Ok(v4), Ok(v6)] = listeners else {
            println!("skipped: the kernel has no SCTP: {listeners:?}");
            return;
        };
        for listener in [&v4, &v6] {
            listener.listen(8).expect("a listener");
        }
        put(&world, &[POD], if remote { "node-2" } else { NODE });
        await_backends(&world, 1);
        println!("offloads: {offloads}, remote: {remote}");
        exchange_all(&world, [&v4, &v6], remote);
    }
}

fn exchange_all(world: &World, listeners: [&Socket; 2], remote: bool) {
    let (outside, pod) = (&world.cluster.outside, &world.cluster.client.host);
    for (family, listener) in Family::ALL.into_iter().zip(listeners) {
        for (client, kind) in [
            (pod, Frontend::ClusterIp),
            (outside, Frontend::ClusterIp),
            (outside, Frontend::NodePort),
        ] {
            let to = world.frontend(kind, family, Protocol::Tcp);
            let is_masqueraded = remote && client.addresses == outside.addresses;
            let source = if is_masqueraded {
                Addresses::NODE
            } else {
                client.addresses
            };
            assert_eq!(exchange(listener, client, to), source.ip(family), "{to}");
        }
    }
}
