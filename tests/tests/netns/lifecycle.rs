//! How connections of real stacks begin and end: half closed, from both sides
//! at once, by a reset; and among SYNs of nobody.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use lb_common::{Hook, Reason};
use lb_tests::{
    agent::Hooks,
    packet::{Packet, flags},
    topology::{Addresses, Family, Host},
    traffic::{Outcome, Protocol},
    wait,
    wire::RawSocket,
    world::{ENDPOINTS_FILE, Frontend, World, endpoints},
};
use socket2::{Domain, Socket, Type};

use crate::strangers::gateway;

/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(10);
/// More than a socket's buffers hold.
const BULK: usize = 8_000_000;

/// A world in which the Service's HTTP port leads to a server of the test's own.
struct Ends {
    world: World,
    listener: TcpListener,
}

impl Ends {
    fn new(hooks: Hooks) -> Self {
        let mut world = crate::stopped_world(hooks);
        let pod = world.cluster.pod("pod-1").host.place.netns();
        let any = (Ipv6Addr::UNSPECIFIED, 4000);
        let listener = pod.within(|| TcpListener::bind(any)).expect("a free port");
        let manifest = endpoints(&world.service, &[("pod-1", 5)]).to_string();
        let manifest = manifest.replace("port: 3000", "port: 4000");
        world.agent.manifests.put(ENDPOINTS_FILE, &manifest);
        world.agent.start();
        Self { world, listener }
    }

    /// Who connects, and to what.
    fn clients(&self) -> Vec<(&Host, SocketAddr)> {
        let cluster = &self.world.cluster;
        let clients = [
            (&cluster.outside, Frontend::NodePort),
            (&cluster.client.host, Frontend::ClusterIp),
        ];
        let clients = clients.into_iter().flat_map(|(client, kind)| {
            Family::ALL.map(|family| (client, self.world.frontend(kind, family, Protocol::Tcp)))
        });
        clients.collect()
    }

    /// Both ends of a connection: the client's, and the server's.
    fn connect(&self, client: &Host, to: SocketAddr, from_port: u16) -> [TcpStream; 2] {
        let socket = client.place.netns().within(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            let any: SocketAddr = if to.is_ipv4() {
                ([0; 4], from_port).into()
            } else {
                ([0; 8], from_port).into()
            };
            socket.bind(&any.into())?;
            socket.connect_timeout(&to.into(), LIMIT)?;
            Ok::<_, std::io::Error>(socket)
        });
        let client = TcpStream::from(socket.expect("a connection"));
        let (server, _) = self.listener.accept().expect("the other end");
        for end in [&client, &server] {
            end.set_read_timeout(Some(LIMIT)).expect("a limit");
        }
        [client, server]
    }
}

/// Sends much by an end of which the other has closed its half, and closes.
fn send_bulk([mut from, mut to]: [TcpStream; 2]) {
    let bulk = vec![7; BULK];
    thread::scope(|scope| {
        scope.spawn(|| {
            from.write_all(&bulk).expect("all sent");
            from.shutdown(Shutdown::Write).expect("closed");
        });
        let mut received = Vec::new();
        to.read_to_end(&mut received).expect("all of it");
        assert!(received == bulk, "{} bytes", received.len());
    });
}

#[test]
fn half_closed_connections_go_on_in_the_other_direction() {
    for hooks in [Hooks::TC, Hooks::XDP] {
        let ends = Ends::new(hooks);
        for (client, to) in ends.clients() {
            for server_closes in [false, true] {
                let [client, server] = ends.connect(client, to, 0);
                let [mut first, mut other] = if server_closes {
                    [server, client]
                } else {
                    [client, server]
                };
                first.write_all(b"this is all").expect("sent");
                first.shutdown(Shutdown::Write).expect("closed");
                let mut text = String::new();
                other.read_to_string(&mut text).expect("an end");
                assert_eq!(text, "this is all");
                send_bulk([other, first]);
            }
        }
    }
}

/// Holds up what the node forwards, until it drops.
struct Hold<'a>(&'a World);

impl<'a> Hold<'a> {
    fn new(world: &'a World) -> Self {
        let rules = "table inet hold { chain forward { type filter hook forward priority 0; \
                     policy drop; }; }";
        let file = world.cluster.scope().new_file("hold.nft");
        std::fs::write(&file, rules).expect("a folder of our own");
        let node = world.cluster.node.place.netns();
        node.output("nft", &["-f", &file.display().to_string()]);
        Self(world)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let node = self.0.cluster.node.place.netns();
        node.output("nft", &["delete", "table", "inet", "hold"]);
    }
}

/// Each FIN is sent before the other has come.
#[test]
fn both_ends_close_at_once() {
    for hooks in [Hooks::TC, Hooks::XDP] {
        let ends = Ends::new(hooks);
        for (client, to) in ends.clients() {
            let mut both = ends.connect(client, to, 0);
            let hold = Hold::new(&ends.world);
            for end in &both {
                end.shutdown(Shutdown::Write).expect("closed");
            }
            drop(hold);
            for end in &mut both {
                let left = end.read_to_end(&mut Vec::new());
                assert_eq!(left.expect("an end, and no error"), 0);
            }
        }
    }
}

/// A client that has one port for a connection by the Service and for one to the
/// pod that it leads to, whichever comes first.
#[test]
fn one_port_serves_a_connection_by_the_service_and_a_direct_one() {
    for hooks in [Hooks::TC, Hooks::XDP] {
        let ends = Ends::new(hooks);
        for (number, (client, service)) in (0..).zip(ends.clients()) {
            let family = if service.is_ipv4() {
                Family::V4
            } else {
                Family::V6
            };
            let pod = Addresses::pod(5).port(family, 4000);
            for (turn, [one, other]) in [[service, pod], [pod, service]].into_iter().enumerate() {
                let port = 42_000 + 2 * number + turn as u16;
                let mut both = [one, other].map(|to| ends.connect(client, to, port));
                // The first one was not harmed by the second.
                for (number, [client, server]) in (1..).zip(&mut both) {
                    let mut byte = [0];
                    client.write_all(&[number]).expect("sent");
                    server.read_exact(&mut byte).unwrap_or_else(|error| {
                        panic!("server {hooks:?} {client:?} turn {turn} number {number}: {error}")
                    });
                    assert_eq!(byte, [number]);
                    server.write_all(&[number + 2]).expect("sent");
                    client.read_exact(&mut byte).unwrap_or_else(|error| {
                        panic!("client {hooks:?} {client:?} turn {turn} number {number}: {error}")
                    });
                    assert_eq!(byte, [number + 2]);
                }
            }
        }
    }
}

/// The same addresses and ports, at once after a reset from either side.
#[test]
fn a_port_is_used_again_after_a_reset() {
    for hooks in [Hooks::TC, Hooks::XDP] {
        let ends = Ends::new(hooks);
        for (client, to) in ends.clients() {
            for server_resets in [false, true, false] {
                let [client, server] = ends.connect(client, to, 41_000);
                let [resets, mut told] = if server_resets {
                    [server, client]
                } else {
                    [client, server]
                };
                let socket = Socket::from(resets);
                socket.set_linger(Some(Duration::ZERO)).expect("an option");
                drop(socket);
                let told = told.read_to_end(&mut Vec::new()).expect_err("a reset");
                assert_eq!(
                    told.kind(),
                    std::io::ErrorKind::ConnectionReset,
                    "{hooks:?}"
                );
            }
        }
    }
}

/// How many flows the tables of the flooded node hold.
const FLOWS: u16 = 4096;

/// A SYN from one of so many addresses that nobody has.
fn stray(family: Family, number: u16, to: SocketAddr) -> Packet {
    let [high, low] = number.to_be_bytes();
    let from: SocketAddr = match family {
        Family::V4 => ([198, 18, high, low], 4000).into(),
        Family::V6 => ([0x2001, 0x2, 0, 0, 0, 0, 0, number], 4000).into(),
    };
    Packet::tcp(from, to, flags::SYN)
}

#[test]
fn a_flood_of_syns_harms_no_connection() {
    for (hooks, hook) in [(Hooks::TC, Hook::TcIngress), (Hooks::XDP, Hook::Xdp)] {
        let mut world = crate::stopped_world(hooks);
        world
            .agent
            .flags
            .retain(|flag| !flag.starts_with("--map-flows"));
        let sizes = ["--map-flows", "--map-young-flows"].map(|flag| format!("{flag}={FLOWS}"));
        world.agent.flags.extend(sizes);
        let (node, outside) = (&world.cluster.node, &world.cluster.outside);
        let Addresses { v4, v6 } = outside.addresses;
        node.place.netns().ip(&format!(
            "route add 198.18.0.0/15 via {v4}\n\
             route add 2001:2::/48 via {v6}\n"
        ));
        outside
            .place
            .netns()
            .ip("route add blackhole 198.18.0.0/15\n\
             route add blackhole 2001:2::/48\n");
        world.agent.start();
        let cluster = &world.cluster;
        let streams: Vec<_> = [
            (&cluster.outside, Frontend::NodePort),
            (&cluster.client.host, Frontend::ClusterIp),
        ]
        .into_iter()
        .flat_map(|(client, kind)| Family::ALL.map(|family| (client, kind, family)))
        .map(|(client, kind, family)| {
            let request = world.request(kind, family, Protocol::Tcp);
            client.stream(&request, true)
        })
        .collect();
        for stream in &streams {
            stream.await_more(3);
        }
        let device = outside.place.netns().within(|| RawSocket::open("eth0"));
        let node = gateway(outside);
        for family in Family::ALL {
            let to = world.frontend(Frontend::NodePort, family, Protocol::Tcp);
            for number in 0..3 * FLOWS {
                let mut frame = stray(family, number, to).bytes();
                frame[..6].copy_from_slice(&node);
                // The device's queue may be full.
                wait::until("room", LIMIT, || device.send(&frame).ok());
            }
        }
        for stream in streams {
            stream.await_more(5);
            for report in stream.stop() {
                if let Outcome::Failure(failure) = report.outcome {
                    panic!("{hooks:?}: {failure}");
                }
            }
        }
        let opened = world.agent.status().count(hook, Reason::NewFlow);
        assert!(opened > 2 * 2 * u64::from(FLOWS), "{hooks:?}: {opened}");
    }
}
