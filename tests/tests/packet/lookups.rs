//! The lookups in hash maps that each kind of packet costs, as the table in
//! `docs/verifier-budget.md` has them.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use lb_common::{
    Hook,
    node::{CONFIG_LOOPBACK_NODE_PORTS, Config},
    service::FRONTEND_REFUSE,
};
use lb_tests::{
    cgroup::Cgroup,
    lookups::Counting,
    packet::{Packet, flags},
    program::{Backend, Datapath, MASQUERADE_PORTS, NODE4, NODE6},
    scope::Scope,
};
use socket2::{Domain, Socket, Type};

use crate::world::{World, with_cluster_network, worlds};

const PAGE: &str = include_str!("../../../docs/verifier-budget.md");

/// Packet and hook → lookups by map, as the page writes them.
type Table = BTreeMap<(String, &'static str), String>;

/// A datapath, and what was seen of it so far.
struct Observer {
    datapath: Datapath,
    counting: Counting,
    /// Where clients' packets come in.
    hook: Hook,
    table: Table,
}

impl Observer {
    fn new() -> Self {
        let datapath = Datapath::new();
        let counting = Counting::new(&datapath);
        Self {
            datapath,
            counting,
            hook: Hook::TcIngress,
            table: Table::new(),
        }
    }

    /// Makes the frontend lead to the backend, and its address a `ClusterIP`.
    fn serve(&mut self, world: &World, local: bool) {
        let (addr, frontend) = (world.backend, world.frontend);
        let backends = [Backend { addr, local }];
        self.datapath.serve(world.protocol, frontend, &backends);
        let config = with_cluster_network(self.datapath.config(), frontend.ip());
        self.datapath.configure(&config);
        self.datapath.put_address(frontend.ip(), FRONTEND_REFUSE);
    }

    /// Sends a packet in without a look at it.
    fn enter(&self, packet: &Packet) -> Vec<u8> {
        self.counting.run(self.hook, &packet.bytes()).0
    }

    fn leave(&self, packet: &Packet) {
        self.counting.run(Hook::TcEgress, &packet.bytes());
    }

    fn enters(&mut self, what: &str, packet: &Packet) -> Vec<u8> {
        self.note(what, self.hook, &packet.bytes())
    }

    fn leaves(&mut self, what: &str, packet: &Packet) -> Vec<u8> {
        self.note(what, Hook::TcEgress, &packet.bytes())
    }

    /// A socket of this process is connected, which must be in a group with the
    /// programs. Whether that leads anywhere does not matter.
    fn connects(&mut self, what: &str, socket: &Socket, to: SocketAddr) {
        let (_, counts) = self.counting.count(|| socket.connect(&to.into()));
        let what = format!("connect(), {what}");
        self.table.insert((what, "socket"), in_words(&counts));
    }

    fn note(&mut self, what: &str, hook: Hook, frame: &[u8]) -> Vec<u8> {
        let (out, counts) = self.counting.run(hook, frame);
        let hook = match hook {
            Hook::Xdp => "XDP",
            Hook::TcIngress => "TC in",
            _ => "TC out",
        };
        self.table
            .insert((what.to_owned(), hook), in_words(&counts));
        out
    }
}

/// The sum, and the maps without their family.
fn in_words(counts: &BTreeMap<&str, u64>) -> String {
    let mut text = counts.values().sum::<u64>().to_string();
    for (index, (name, count)) in counts.iter().enumerate() {
        let name = name.trim_end_matches(['4', '6']);
        let separator = if index == 0 { " |" } else { "," };
        let times = if *count > 1 {
            format!("{count} × ")
        } else {
            String::new()
        };
        write!(text, "{separator} {times}{name}").expect("a string grows");
    }
    text
}

fn tcp(src: SocketAddr, dst: SocketAddr, flags: u8) -> Packet {
    Packet::tcp(src, dst, flags).numbers(1001, 5001)
}

/// What is for somebody else.
fn strangers(world: &World, observer: &mut Observer) {
    let (client, stranger) = (world.client, world.stranger);
    if world.is_tcp() {
        observer.enters("no service: TCP, first packet", &world.first(stranger));
        let later = tcp(client, stranger, flags::ACK);
        observer.enters("no service: TCP, later packet", &later);
        observer.leaves("no service: TCP", &later);
    } else {
        let packet = Packet::udp(client, stranger);
        observer.enters("no service: UDP", &packet);
        observer.leaves("no service: UDP", &packet);
        let node = if client.is_ipv4() {
            NODE4.into()
        } else {
            NODE6.into()
        };
        let port = SocketAddr::new(node, MASQUERADE_PORTS.start);
        observer.enters("UDP to a port of masquerade", &Packet::udp(client, port));
    }
    let mut other_port = world.frontend;
    other_port.set_port(81);
    let what = if world.is_tcp() { "TCP" } else { "UDP" };
    let what = format!("{what}, another port of a ClusterIP");
    observer.enters(&what, &world.first(other_port));
}

/// From the first packet to one in a later second.
fn flow(world: &World, observer: &mut Observer) {
    let World {
        client,
        frontend,
        backend,
        ..
    } = *world;
    let protocol = if world.is_tcp() { "TCP" } else { "UDP" };
    observer.enters(&format!("{protocol}, new flow"), &world.first(frontend));
    observer.leaves(&format!("{protocol}, first answer"), &world.answer(backend));
    let (there, back) = if world.is_tcp() {
        (
            tcp(client, frontend, flags::ACK),
            Packet::tcp(backend, client, flags::ACK).numbers(5001, 1001),
        )
    } else {
        (Packet::udp(client, frontend), Packet::udp(backend, client))
    };
    // What they tell is news once, and once in a second.
    for _ in 0..2 {
        observer.enter(&there);
        observer.leave(&back);
    }
    observer.enters(&format!("{protocol}, flow"), &there);
    observer.leaves(&format!("{protocol}, answer"), &back);
    observer.datapath.age_flows(1);
    observer.enters(&format!("{protocol}, flow, once a second"), &there);
}

/// There and back with a source of the node.
fn masqueraded(world: &World, observer: &mut Observer) {
    let World {
        client,
        frontend,
        backend,
        ..
    } = *world;
    let first = observer.enters("TCP, new flow, masqueraded", &world.first(frontend));
    let (sent, _) = observer.counting.run(Hook::TcEgress, &first);
    let source = lb_tests::packet::read(&sent).src;
    let back = |to, kind, seq| Packet::tcp(backend, to, kind).numbers(seq, 1001);
    for (kind, seq) in [
        (flags::SYN | flags::ACK, 5000),
        (flags::ACK, 5001),
        (flags::ACK, 5001),
    ] {
        observer.enter(&back(source, kind, seq));
        observer.leave(&back(client, kind, seq));
        let entered = observer.enter(&tcp(client, frontend, flags::ACK));
        observer.counting.run(Hook::TcEgress, &entered);
    }
    observer.leaves("TCP, masqueraded", &tcp(client, backend, flags::ACK));
    observer.enters("TCP, answer to the node", &back(source, flags::ACK, 5001));
}

/// Sockets of processes. Datagrams: nothing is sent when they connect.
fn connections(world: &World, observer: &mut Observer) {
    let group = Cgroup::new(Scope::test().name());
    observer.counting.attach_connect(&group);
    let _inside = group.enter();
    let domain = Domain::for_address(world.client);
    let socket = || Socket::new(domain, Type::DGRAM, None).expect("a socket");
    let local = |v4: IpAddr, v6: IpAddr, port| {
        SocketAddr::new(if world.client.is_ipv4() { v4 } else { v6 }, port)
    };
    observer.connects("no service", &socket(), world.stranger);
    observer.connects("a Service", &socket(), world.frontend);
    let loopback = local(Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), 9);
    let config = observer.datapath.config();
    observer.datapath.configure(&Config {
        flags: CONFIG_LOOPBACK_NODE_PORTS,
        ..config
    });
    observer.connects("no service, loopback", &socket(), loopback);
    observer.datapath.configure(&config);
    let any = local(
        Ipv4Addr::UNSPECIFIED.into(),
        Ipv6Addr::UNSPECIFIED.into(),
        0,
    );
    let bound = socket();
    bound.bind(&any.into()).expect("a port");
    observer.connects("no service, with a port of its own", &bound, world.stranger);
}

/// Everything, in one family.
fn observe(observer: &mut Observer, is_v4: bool) -> Table {
    for mut world in worlds() {
        if world.client.is_ipv4() != is_v4 {
            continue;
        }
        observer.serve(&world, true);
        for (hook, port) in [(Hook::TcIngress, 40000), (Hook::Xdp, 40001)] {
            observer.hook = hook;
            world.client.set_port(port);
            strangers(&world, observer);
            flow(&world, observer);
        }
        if !world.is_tcp() {
            connections(&world, observer);
        }
        if world.is_tcp() {
            let remote = World {
                frontend: world.other_frontend,
                backend: world.other_backend,
                ..world
            };
            observer.hook = Hook::TcIngress;
            observer.serve(&remote, false);
            masqueraded(&remote, observer);
        }
    }
    mem::take(&mut observer.table)
}

#[test]
fn packets_cost_the_lookups_that_the_page_says() {
    let mut observer = Observer::new();
    let table = observe(&mut observer, true);
    let other = observe(&mut observer, false);
    assert_eq!(table, other, "both families cost the same");
    for ((packet, hook), cell) in &table {
        let cost: Option<u32> = cell.split(' ').next().and_then(|sum| sum.parse().ok());
        let limit = match packet.as_str() {
            "connect(), no service" => 1,
            packet if packet.starts_with("no service") => 2,
            _ => continue,
        };
        assert!(cost <= Some(limit), "{packet}, {hook}: {cell}");
    }
    let mut rows = String::from("| packet | hook | lookups | in |\n|---|---|---|---|\n");
    for ((packet, hook), cell) in &table {
        writeln!(rows, "| {packet} | {hook} | {cell} |").expect("a string grows");
    }
    assert!(PAGE.contains(&rows), "the page should say:\n{rows}");
}
