//! The lookups in hash maps that each kind of packet costs, as the table in
//! `docs/verifier-budget.md` has them.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    mem::{self, MaybeUninit},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use lb_common::{
    Credit, Hook,
    flow::{SCTP, UDP},
    node::{CONFIG_BYPASS, Config, DEVICE_PEER, DEVICE_POD, DEVICE_XDP, Device},
    service::{FRONTEND_ECHO, FRONTEND_REFUSE, FRONTEND_SOURCE_RANGES, FrontendKind},
};
use lb_tests::{
    cgroup::Cgroup,
    fragments::cut,
    icmp::{Message, echo, too_big},
    lookups::Counting,
    netns,
    packet::{Packet, chunk, flags},
    private::{in_private_namespace, ip},
    program::{Backend, Datapath},
    scope::Scope,
};
use socket2::{Domain, Socket, Type};

use crate::world::{World, make_a_router, sctp_worlds, udp_worlds, with_cluster_network, worlds};

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
        // What others have noted of flows would be looked for, and what packets see in
        // another second is news, which they write.
        let datapath = Datapath::without_time();
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

    /// Changes the settings.
    fn configure(&mut self, change: impl FnOnce(Config) -> Config) {
        let config = change(self.datapath.config());
        self.datapath.configure(&config);
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

    /// As [`Self::enters`], for a packet for which the kernel is asked for its way now
    /// and then: as many lookups as when it is not.
    fn enters_again(&mut self, what: &str, packet: &Packet) {
        const TIMES: usize = 3;
        let counts = (0..TIMES).map(|_| self.counting.run(self.hook, &packet.bytes()).1);
        let least = counts.min_by_key(|counts| counts.values().sum::<u64>());
        let least = least.expect("more than none");
        self.table.insert(row(what, self.hook), in_words(&least));
    }

    /// A call of a socket of this process, which must be in a group with the
    /// programs. Whether that leads anywhere does not matter.
    fn calls<T>(&mut self, what: &str, call: impl FnOnce() -> T) -> T {
        let (result, counts) = self.counting.count(call);
        self.table
            .insert((what.to_owned(), "socket"), in_words(&counts));
        result
    }

    fn connects(&mut self, what: &str, socket: &Socket, to: SocketAddr) {
        let what = format!("connect(), {what}");
        drop(self.calls(&what, || socket.connect(&to.into())));
    }

    fn note(&mut self, what: &str, hook: Hook, frame: &[u8]) -> Vec<u8> {
        let (out, counts) = self.counting.run(hook, frame);
        self.table.insert(row(what, hook), in_words(&counts));
        out
    }
}

/// What a row of the table begins with.
fn row(what: &str, hook: Hook) -> (String, &'static str) {
    let hook = match hook {
        Hook::Xdp => "XDP",
        Hook::TcIngress => "TC in",
        _ => "TC out",
    };
    (what.to_owned(), hook)
}

/// The sum, and the maps without their family.
fn in_words(counts: &BTreeMap<&str, u64>) -> String {
    let mut text = counts.values().sum::<u64>().to_string();
    if counts.is_empty() {
        text += " | –";
    }
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

/// As the page names it.
const fn name(world: &World) -> &'static str {
    match world.protocol {
        UDP => "UDP",
        SCTP => "SCTP",
        _ => "TCP",
    }
}

/// What is for somebody else.
fn strangers(world: &World, observer: &mut Observer) {
    let (client, stranger) = (world.client, world.stranger);
    if world.protocol == SCTP {
        for (what, kind) in [("first", chunk::INIT), ("later", chunk::DATA)] {
            let packet = Packet::sctp(client, stranger, kind, 80);
            observer.enters(&format!("no service: SCTP, {what} packet"), &packet);
        }
    } else if world.is_tcp() {
        observer.enters("no service: TCP, first packet", &world.first(stranger));
        let later = tcp(client, stranger, flags::ACK);
        observer.enters("no service: TCP, later packet", &later);
        observer.leaves("no service: TCP", &later);
    } else {
        let packet = Packet::udp(client, stranger);
        observer.enters("no service: UDP", &packet);
        observer.leaves("no service: UDP", &packet);
    }
    let at_served_port = SocketAddr::new(stranger.ip(), world.frontend.port());
    let what = format!(
        "no service: {}, first packet, a port that is served",
        name(world)
    );
    observer.enters(&what, &world.first(at_served_port));
    let mut other_port = world.frontend;
    other_port.set_port(81);
    let what = format!("{}, another port of a ClusterIP", name(world));
    observer.enters(&what, &world.first(other_port));
}

/// A connection that begins among the young.
fn without_credit(world: &World, observer: &mut Observer) {
    let mut client = world.client;
    client.set_port(client.port() + 100);
    let syn = Packet::first(world.protocol, client, world.frontend);
    let answer = Packet::tcp(world.backend, client, flags::SYN | flags::ACK).numbers(5000, 1001);
    observer.datapath.set_credit(0);
    observer.datapath.forget_what_was_rare();
    observer.enters("TCP, new flow, no credit", &syn);
    observer.leaves("TCP, first answer, no credit", &answer);
    observer.enters(
        "TCP, confirmed, no credit",
        &tcp(client, world.frontend, flags::ACK),
    );
    observer.datapath.set_credit(Credit::MOST);
    observer.datapath.forget_what_was_rare();
}

/// From the first packet to one in a later second.
fn flow(world: &World, observer: &mut Observer) {
    let World {
        client,
        frontend,
        backend,
        ..
    } = *world;
    let protocol = name(world);
    // The first flow of a frontend is not looked for.
    let before = SocketAddr::new(client.ip(), client.port() + 200);
    observer.enter(&Packet::first(world.protocol, before, frontend));
    observer.enters(&format!("{protocol}, new flow"), &world.first(frontend));
    observer.leaves(&format!("{protocol}, first answer"), &world.answer(backend));
    let (there, back) = match world.protocol {
        UDP => (Packet::udp(client, frontend), Packet::udp(backend, client)),
        SCTP => (
            Packet::sctp(client, frontend, chunk::DATA, 80),
            Packet::sctp(backend, client, chunk::DATA, Packet::SCTP_TAG),
        ),
        _ => (
            tcp(client, frontend, flags::ACK),
            Packet::tcp(backend, client, flags::ACK).numbers(5001, 1001),
        ),
    };
    if world.is_tcp() {
        // The client's acknowledgment has told all that there is to tell.
        observer.enter(&there);
        observer.leaves("TCP, first data of the backend", &back);
    }
    // What they tell is news once, and once in a second.
    for _ in 0..2 {
        observer.enter(&there);
        observer.leave(&back);
    }
    observer.enters(&format!("{protocol}, flow"), &there);
    observer.leaves(&format!("{protocol}, answer"), &back);
    observer.datapath.age_flows(1);
    observer.enters(&format!("{protocol}, flow, once a second"), &there);
    errors(world, observer, (&there, &back));
    if world.protocol == UDP {
        fragments(world, observer);
    }
}

/// ICMP about a flow's packets and about those of others, by which errors and
/// answers come.
fn errors(world: &World, observer: &mut Observer, (there, back): (&Packet, &Packet)) {
    let protocol = name(world);
    let (client, frontend) = (world.client.ip(), world.frontend.ip());
    let about = |frame: &[u8], to| {
        let router = world.stranger.ip();
        Message::about(frame, usize::MAX, router, to, too_big(router)).bytes()
    };
    let forwarded = observer.enter(there);
    let error = about(&forwarded, client);
    observer.note(&format!("ICMP about {protocol}"), Hook::TcEgress, &error);
    let (answered, _) = observer.counting.run(Hook::TcEgress, &back.bytes());
    let error = about(&answered, frontend);
    let hook = observer.hook;
    observer.note(&format!("ICMP about an answer of {protocol}"), hook, &error);
    let direct = Packet::first(world.protocol, world.client, world.stranger);
    let error = about(&direct.bytes(), client);
    for hook in [hook, Hook::TcEgress] {
        observer.note(&format!("no service: ICMP about {protocol}"), hook, &error);
    }
}

/// Pings of an address of a Service, and of another.
fn pings(world: &World, observer: &mut Observer) {
    let ping = |dst| {
        let [kind, _] = echo(dst);
        Message {
            src: world.client.ip(),
            dst,
            kind,
            rest: 1,
            payload: b"how are you".to_vec(),
        }
    };
    let hook = observer.hook;
    let stranger = ping(world.stranger.ip());
    observer.note("no service: ping", hook, &stranger.bytes());
    let frontend = world.frontend.ip();
    observer
        .datapath
        .put_address(frontend, FRONTEND_REFUSE | FRONTEND_ECHO);
    observer.note("ping", hook, &ping(frontend).bytes());
    observer.datapath.put_address(frontend, FRONTEND_REFUSE);
}

/// Datagrams larger than a packet.
fn fragments(world: &World, observer: &mut Observer) {
    let large = |src, dst| Packet::udp(src, dst).payload(vec![7; 3000]);
    let World {
        client,
        frontend,
        backend,
        stranger,
        ..
    } = *world;
    let hook = observer.hook;
    for (id, (what, hook, packet)) in (1..).zip([
        ("no service: UDP", hook, large(client, stranger)),
        ("no service: UDP", Hook::TcEgress, large(client, stranger)),
        ("UDP, flow", hook, large(client, frontend)),
        ("UDP, answer", Hook::TcEgress, large(backend, client)),
    ]) {
        let frames = cut(&packet, id, 1000);
        observer.note(&format!("{what}, first fragment"), hook, &frames[0]);
        observer.note(&format!("{what}, later fragment"), hook, &frames[1]);
    }
}

/// What a Service asks for besides a backend.
fn policies(world: &World, observer: &mut Observer) {
    let (protocol, frontend) = (world.protocol, world.other_frontend);
    let service = World { frontend, ..*world };
    // Ports that the other hook's clients do not use.
    let packet = |number| {
        let port = 100 * (world.client.port() % 100) + number;
        let client = SocketAddr::new(world.client.ip(), 45_000 + port);
        Packet::first(protocol, client, frontend)
    };
    observer.serve(&service, true);
    observer.enter(&packet(9));
    observer
        .datapath
        .change_frontend(protocol, frontend, |entry| entry.affinity = 60);
    let what = name(world);
    observer.enters(
        &format!("{what}, new flow of a new client, affinity"),
        &packet(0),
    );
    observer.enters(&format!("{what}, new flow, affinity"), &packet(1));
    observer.serve(&service, true);
    let mut number = 0;
    observer
        .datapath
        .change_frontend(protocol, frontend, |entry| {
            entry.kind = FrontendKind::LoadBalancer as u8;
            entry.flags = FRONTEND_SOURCE_RANGES;
            number = entry.service;
        });
    observer.enters(&format!("{what}, not in the source ranges"), &packet(2));
    observer.datapath.allow(number, world.client.ip(), 8);
    observer.enters(&format!("{what}, new flow, source ranges"), &packet(3));
}

/// With `--routing bypass`, in a router: past the stack, to a backend here and,
/// at XDP, to one elsewhere.
fn bypassed(observer: &mut Observer, is_v4: bool) -> Table {
    observer.configure(|config| Config {
        flags: CONFIG_BYPASS,
        ..config
    });
    let world = worlds()
        .into_iter()
        .find(|world| world.client.is_ipv4() == is_v4);
    let mut world = world.expect("TCP first");
    world.client.set_port(46_000);
    // To a backend here by TC: its device is not one that XDP sends to.
    observer.hook = Hook::TcIngress;
    observer.serve(&world, true);
    observer.enters("TCP, new flow, bypass", &world.first(world.frontend));
    for (kind, seq) in ANSWERS {
        observer.leave(&Packet::tcp(world.backend, world.client, kind).numbers(seq, 1001));
        observer.enter(&tcp(world.client, world.frontend, flags::ACK));
    }
    observer.enters_again(
        "TCP, flow, bypass",
        &tcp(world.client, world.frontend, flags::ACK),
    );
    let index = nix::net::if_::if_nametoindex("out0").expect("the router's");
    let pod = Device {
        flags: DEVICE_POD | DEVICE_PEER,
        ..Device::default()
    };
    observer.datapath.set_device(index, pod);
    let back = Packet::tcp(world.backend, world.client, flags::ACK).numbers(5001, 1001);
    // The way is looked up once.
    observer.enter(&back);
    observer.enters_again("TCP, answer, bypass", &back);
    // To one elsewhere and back by XDP, which can send by the device.
    let device = Device {
        flags: DEVICE_XDP,
        ..Device::default()
    };
    observer.datapath.set_device(index, device);
    observer.hook = Hook::Xdp;
    let remote = World {
        frontend: world.other_frontend,
        backend: world.other_backend,
        ..world
    };
    observer.serve(&remote, false);
    let what = "TCP, new flow, masqueraded, bypass";
    let first = observer.enters(what, &remote.first(remote.frontend));
    let source = lb_tests::packet::read(&first).src;
    for (kind, seq) in ANSWERS {
        observer.enter(&Packet::tcp(remote.backend, source, kind).numbers(seq, 1001));
        observer.enter(&tcp(remote.client, remote.frontend, flags::ACK));
    }
    let there = tcp(remote.client, remote.frontend, flags::ACK);
    observer.enters_again("TCP, masqueraded, bypass", &there);
    let back = Packet::tcp(remote.backend, source, flags::ACK).numbers(5001, 1001);
    observer.enters_again("TCP, answer to the node, bypass", &back);
    observer.configure(|config| Config { flags: 0, ..config });
    mem::take(&mut observer.table)
}

/// What a backend sends, flags and sequence numbers, until all is told that can
/// be.
const ANSWERS: [(u8, u32); 3] = [
    (flags::SYN | flags::ACK, 5000),
    (flags::ACK, 5001),
    (flags::ACK, 5001),
];

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
    for (kind, seq) in ANSWERS {
        observer.enter(&back(source, kind, seq));
        observer.leave(&back(client, kind, seq));
        let entered = observer.enter(&tcp(client, frontend, flags::ACK));
        observer.counting.run(Hook::TcEgress, &entered);
    }
    observer.leaves("TCP, masqueraded", &tcp(client, backend, flags::ACK));
    observer.enters("TCP, answer to the node", &back(source, flags::ACK, 5001));
}

/// Sockets of processes, for datagrams.
fn sockets(world: &World, observer: &mut Observer) {
    let group = Cgroup::new(Scope::test().name());
    observer.counting.attach_sockets(&group);
    let _inside = group.enter();
    let domain = Domain::for_address(world.client);
    let socket = || Socket::new(domain, Type::DGRAM, None).expect("a socket");
    let local = |v4: IpAddr, v6: IpAddr, port| {
        SocketAddr::new(if world.client.is_ipv4() { v4 } else { v6 }, port)
    };
    observer.connects("no service", &socket(), world.stranger);
    let at_served_port = SocketAddr::new(world.stranger.ip(), world.frontend.port());
    observer.connects(
        "no service, a port that is served",
        &socket(),
        at_served_port,
    );
    observer.connects("a Service", &socket(), world.frontend);
    let loopback = local(Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), 9);
    observer.connects("no service, loopback", &socket(), loopback);
    let any = local(
        Ipv4Addr::UNSPECIFIED.into(),
        Ipv6Addr::UNSPECIFIED.into(),
        0,
    );
    let bound = socket();
    bound.bind(&any.into()).expect("a port");
    observer.connects("no service, with a port of its own", &bound, world.stranger);
    let (client, server) = (socket(), socket());
    for what in ["a Service", "a Service, again"] {
        let send = || client.send_to(b"?", &world.frontend.into());
        drop(observer.calls(&format!("sendto(), {what}"), send));
    }
    server.bind(&loopback.into()).expect("a port");
    let send = || client.send_to(b"?", &loopback.into());
    observer.calls("sendto(), no service", send).expect("sent");
    let receive = || server.recv_from(&mut [MaybeUninit::uninit()]);
    observer
        .calls("recvfrom(), no service", receive)
        .expect("received");
}

/// Everything, in one family.
fn observe(observer: &mut Observer, is_v4: bool) -> Table {
    for mut world in worlds().into_iter().chain(sctp_worlds()) {
        if world.client.is_ipv4() != is_v4 {
            continue;
        }
        for (hook, port) in [(Hook::TcIngress, 40000), (Hook::Xdp, 40001)] {
            observer.hook = hook;
            observer.serve(&world, true);
            world.client.set_port(port);
            strangers(&world, observer);
            flow(&world, observer);
            if world.protocol == UDP {
                pings(&world, observer);
            }
            if world.is_tcp() {
                without_credit(&world, observer);
                policies(&world, observer);
            }
        }
        if world.protocol == UDP {
            sockets(&world, observer);
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
    in_private_namespace(|| {
        ip("link set lo up");
        let mut observer = Observer::new();
        let mut tables = [true, false].map(|is_v4| observe(&mut observer, is_v4));
        make_a_router();
        for (table, is_v4) in tables.iter_mut().zip([true, false]) {
            table.extend(bypassed(&mut observer, is_v4));
        }
        let [table, other] = tables;
        assert_eq!(table, other, "both families cost the same");
        compare(&table);
    });
}

#[test]
fn a_call_of_the_node_does_not_look_for_its_address() {
    in_private_namespace(|| {
        ip("link set lo up");
        let Some(host_netns) = netns::cookie() else {
            eprintln!("before Linux 5.14 the kernel does not tell whose call it is");
            return;
        };
        let mut observer = Observer::new();
        observer.configure(|config| Config {
            host_netns,
            ..config
        });
        let group = Cgroup::new(Scope::test().name());
        observer.counting.attach_sockets(&group);
        let _inside = group.enter();
        for world in udp_worlds() {
            observer.serve(&world, true);
            let domain = Domain::for_address(world.client);
            let socket = Socket::new(domain, Type::DGRAM, None).expect("a socket");
            observer.connects("a Service", &socket, world.frontend);
            let cost = observer.table.values().next();
            assert_eq!(cost.map(String::as_str), Some("1 | klb_svc"));
        }
    });
}

/// With the page, and with what the design allows.
fn compare(table: &Table) {
    for ((packet, hook), cell) in table {
        let cost: Option<u32> = cell.split(' ').next().and_then(|sum| sum.parse().ok());
        let limit = match packet.as_str() {
            packet if packet.starts_with("connect(), no service") => 1,
            packet if packet.starts_with("no service") => 1,
            _ => continue,
        };
        assert!(cost <= Some(limit), "{packet}, {hook}: {cell}");
    }
    let mut rows = String::from("| packet | hook | lookups | in |\n|---|---|---|---|\n");
    for ((packet, hook), cell) in table {
        writeln!(rows, "| {packet} | {hook} | {cell} |").expect("a string grows");
    }
    assert!(PAGE.contains(&rows), "the page should say:\n{rows}");
}
