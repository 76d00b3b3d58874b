//! SCTP by raw frames between real stacks: a kernel forwards what it does not
//! speak itself.

use std::{net::SocketAddr, time::Duration};

use lb_common::{Hook, Reason, flow::SCTP};
use lb_tests::{
    agent::Hooks,
    icmp::{Message, port_unreachable},
    manifests::NODE,
    packet::{Packet, chunk, read},
    topology::{Addresses, Family, Host},
    traffic::{Protocol, Request},
    wire::RawSocket,
    world::{ENDPOINTS_FILE, Frontend, SERVICE_FILE, World, endpoints},
};

use crate::strangers::gateway;

pub(crate) const POD: (&str, u8) = ("pod-1", 5);
/// The tag that the backend wants in packets to it.
const BACKENDS_TAG: u32 = 80;

/// A host's device.
struct End {
    device: RawSocket,
    gateway: [u8; 6],
}

impl End {
    fn new(host: &Host) -> Self {
        // The stack gets to know its neighbour.
        for family in Family::ALL {
            let pod = Addresses::pod(6).port(family, 3000);
            let answer = host.ask(&Request::new(Protocol::Tcp, pod));
            answer.expect("an answer of a pod itself");
        }
        Self {
            device: host.place.netns().within(|| RawSocket::open("eth0")),
            gateway: gateway(host),
        }
    }

    fn send(&self, packet: &Packet) {
        let mut frame = packet.bytes();
        frame[..6].copy_from_slice(&self.gateway);
        self.device.send(&frame).expect("sent");
    }

    /// The next frame of a protocol.
    fn receive(&self, protocols: &[u8], what: &str) -> Vec<u8> {
        loop {
            let frame = self.device.receive(Duration::from_secs(5));
            let frame = frame.unwrap_or_else(|| panic!("no {what}"));
            let protocol = match frame[12..14] {
                [0x08, 0x00] => frame[23],
                [0x86, 0xdd] => frame[20],
                _ => continue,
            };
            if protocols.contains(&protocol) {
                return frame;
            }
        }
    }

    fn assert_receives(&self, (src, dst): (SocketAddr, SocketAddr), what: &str) {
        let seen = read(&self.receive(&[SCTP], what));
        assert_eq!((seen.src, seen.dst), (src, dst), "{what}");
    }
}

/// Makes the Service's HTTP port one of SCTP, with these pods on a node.
pub(crate) fn put(world: &World, pods: &[(&str, u8)], node: &str) {
    let sctp = |manifest: String| manifest.replace("protocol: TCP", "protocol: SCTP");
    let endpoints = endpoints(&world.service, pods).to_string();
    let endpoints = endpoints.replace(&format!("nodeName: {NODE}"), &format!("nodeName: {node}"));
    let manifests = &world.agent.manifests;
    manifests.put(SERVICE_FILE, &sctp(world.service.to_string()));
    manifests.put(ENDPOINTS_FILE, &sctp(endpoints));
}

pub(crate) fn await_backends(world: &World, count: usize) {
    world.agent.await_services("SCTP", |services| {
        let mut ports = services.iter().filter(|port| port.protocol == "SCTP");
        let is_there = |port: &lb_tests::agent::ServicePort| {
            let mut frontends = port.frontends.iter();
            frontends.all(|frontend| frontend.backends.len() == count)
        };
        ports.next().is_some_and(is_there)
    });
}

/// Clients and the frontends that they use; each with a port of its own.
fn clients(world: &World) -> Vec<(&Host, SocketAddr, SocketAddr)> {
    let (outside, pod) = (&world.cluster.outside, &world.cluster.client.host);
    let mut clients = Vec::new();
    for family in Family::ALL {
        for (number, (client, kind)) in (0..).zip([
            (pod, Frontend::ClusterIp),
            (outside, Frontend::ClusterIp),
            (outside, Frontend::NodePort),
        ]) {
            let from = client.addresses.port(family, 40_000 + number);
            let to = world.frontend(kind, family, Protocol::Tcp);
            clients.push((client, from, to));
        }
    }
    clients
}

/// From the first packet to data, there and back.
fn associate(client: &End, server: &End, from: SocketAddr, to: SocketAddr, source: SocketAddr) {
    let backend = Addresses::pod(POD.1);
    let family = if from.is_ipv4() {
        Family::V4
    } else {
        Family::V6
    };
    let backend = backend.port(family, 3000);
    let mut source = source;
    for (kind, tag, answer) in [
        (chunk::INIT, Packet::SCTP_TAG, chunk::INIT_ACK),
        (chunk::COOKIE_ECHO, BACKENDS_TAG, chunk::COOKIE_ACK),
        (chunk::DATA, BACKENDS_TAG, chunk::DATA),
    ] {
        client.send(&Packet::sctp(from, to, kind, tag));
        let seen = read(&server.receive(&[SCTP], &format!("chunk {kind}")));
        if source.port() == 0 {
            source.set_port(seen.src.port());
        }
        assert_eq!((seen.src, seen.dst), (source, backend));
        server.send(&Packet::sctp(backend, source, answer, Packet::SCTP_TAG));
        client.assert_receives((to, from), &format!("answer {answer}"));
    }
}

#[test]
fn associations_go_to_pods_of_this_node_and_of_others_and_back() {
    for hooks in [Hooks::TC, Hooks::XDP] {
        for remote in [false, true] {
            let mut world = crate::stopped_world(hooks);
            put(&world, &[POD], if remote { "node-2" } else { NODE });
            world.agent.start();
            await_backends(&world, 1);
            let server = End::new(&world.cluster.pod(POD.0).host);
            for (host, from, to) in clients(&world) {
                println!("{hooks:?}, remote: {remote}, {from} to {to}");
                let is_outside = host.addresses == Addresses::OUTSIDE;
                let source = match from {
                    SocketAddr::V4(_) if remote && is_outside => (Addresses::NODE.v4, 0).into(),
                    SocketAddr::V6(_) if remote && is_outside => (Addresses::NODE.v6, 0).into(),
                    _ => from,
                };
                associate(&End::new(host), &server, from, to, source);
            }
            let status = world.agent.status();
            let masqueraded = status.count(Hook::TcIngress, Reason::NewMasqueradedFlow);
            assert_eq!(masqueraded, if remote { 4 } else { 0 });
        }
    }
}

#[test]
fn without_endpoints_a_client_is_told() {
    for hooks in [Hooks::TC, Hooks::XDP] {
        let mut world = crate::stopped_world(hooks);
        put(&world, &[], NODE);
        world.agent.start();
        await_backends(&world, 0);
        for (host, from, to) in clients(&world) {
            let client = End::new(host);
            let init = Packet::sctp(from, to, chunk::INIT, Packet::SCTP_TAG);
            client.send(&init);
            let told = loop {
                let told = Message::read(&client.receive(&[1, 58], "refusal"));
                // Neighbours find each other by ICMPv6, too.
                if told.src == to.ip() {
                    break told;
                }
            };
            assert_eq!(told.dst, from.ip());
            assert_eq!(told.kind, port_unreachable(to.ip()), "{hooks:?} {to}");
            let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
            let header = if to.is_ipv4() { 20 } else { 40 };
            assert_eq!(told.payload[header..header + 4], ports);
        }
    }
}
