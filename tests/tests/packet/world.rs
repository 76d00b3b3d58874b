//! Who is who in the packet tests, and one step of a script.

use std::net::{IpAddr, SocketAddr};

use lb_common::{
    Addr4, Addr6, Hook, Reason,
    flow::{SCTP, TCP, UDP},
    node::{Config, DEVICE_POD, Device, Network},
    reason::Effect,
};
use lb_tests::{
    packet::{self, Packet, chunk, flags},
    private::ip,
    program::{Backend, Datapath, TC_DROP, TC_GO_ON, XDP_DROP, XDP_PASS},
};

/// A test run comes in, and goes out, by the loopback device.
pub(crate) const HERE: u32 = 1;

/// Says that a pod is behind that.
pub(crate) fn behind_a_pod_device(datapath: &mut Datapath) {
    let device = Device {
        flags: DEVICE_POD,
        ..Device::default()
    };
    datapath.set_device(HERE, device);
}

/// The addresses of one family and one protocol, by role.
#[derive(Clone, Copy, Debug)]
pub(crate) struct World {
    pub(crate) protocol: u8,
    pub(crate) client: SocketAddr,
    pub(crate) frontend: SocketAddr,
    pub(crate) other_frontend: SocketAddr,
    pub(crate) backend: SocketAddr,
    pub(crate) other_backend: SocketAddr,
    pub(crate) stranger: SocketAddr,
}

/// Both families, both protocols.
pub(crate) fn worlds() -> Vec<World> {
    let parse = |text: &str| text.parse().expect("an address");
    let mut worlds = Vec::new();
    for protocol in [TCP, UDP] {
        worlds.push(World {
            protocol,
            client: parse("192.168.50.2:40000"),
            frontend: parse("10.96.0.1:80"),
            other_frontend: parse("192.168.50.1:30080"),
            backend: parse("10.244.0.5:3000"),
            other_backend: parse("10.244.0.6:3000"),
            stranger: parse("198.51.100.7:443"),
        });
        worlds.push(World {
            protocol,
            client: parse("[fd00:50::2]:40000"),
            frontend: parse("[fd00:10:96::1]:80"),
            other_frontend: parse("[fd00:50::1]:30080"),
            backend: parse("[fd00:10:244::5]:3000"),
            other_backend: parse("[fd00:10:244::6]:3000"),
            stranger: parse("[2001:db8::7]:443"),
        });
    }
    worlds
}

/// Those of [`worlds`] that speak TCP.
pub(crate) fn tcp_worlds() -> impl Iterator<Item = World> {
    worlds().into_iter().filter(|world| world.protocol == TCP)
}

/// Those of [`worlds`] that speak UDP.
pub(crate) fn udp_worlds() -> impl Iterator<Item = World> {
    worlds().into_iter().filter(|world| world.protocol == UDP)
}

/// Both families, with SCTP.
pub(crate) fn sctp_worlds() -> impl Iterator<Item = World> {
    udp_worlds().map(|world| World {
        protocol: SCTP,
        ..world
    })
}

pub(crate) const fn local(addr: SocketAddr) -> Backend {
    Backend { addr, local: true }
}

impl World {
    /// A datapath in which the frontend leads to the one local backend.
    pub(crate) fn serve_one(&self) -> Datapath {
        let mut datapath = Datapath::new();
        datapath.serve(self.protocol, self.frontend, &[local(self.backend)]);
        datapath
    }

    pub(crate) const fn is_tcp(&self) -> bool {
        self.protocol == TCP
    }

    /// The first packet of a connection from the client.
    pub(crate) fn first(&self, to: SocketAddr) -> Packet {
        Packet::first(self.protocol, self.client, to)
    }

    /// The backend's answer to [`Self::first`], as it leaves the backend.
    pub(crate) fn answer(&self, from: SocketAddr) -> Packet {
        match self.protocol {
            TCP => Packet::tcp(from, self.client, flags::SYN | flags::ACK).numbers(5000, 1001),
            SCTP => Packet::sctp(from, self.client, chunk::INIT_ACK, Packet::SCTP_TAG),
            _ => Packet::udp(from, self.client),
        }
    }
}

/// Makes a router of the current network namespace, whose neighbours are known.
pub(crate) fn make_a_router() {
    ip("link add out0 type veth peer name out0-peer");
    ip("link set out0-peer up");
    ip("link set out0 up");
    for neighbour in [
        "10.244.0.5",
        "10.244.0.6",
        "fd00:10:244::5",
        "fd00:10:244::6",
        "192.168.50.2",
        "fd00:50::2",
    ] {
        ip(&format!("route add {neighbour} dev out0"));
        ip(&format!(
            "neigh add {neighbour} lladdr 02:00:00:00:02:02 dev out0 nud permanent"
        ));
    }
    for family in ["ipv4", "ipv6"] {
        let path = format!("/proc/sys/net/{family}/conf/all/forwarding");
        std::fs::write(path, "1").expect("a sysctl of this namespace");
    }
}

/// Runs a packet, which must go on translated to the given tuple.
pub(crate) fn translated(
    datapath: &mut Datapath,
    hook: Hook,
    packet: &Packet,
    reason: Reason,
    (src, dst): (SocketAddr, SocketAddr),
) {
    let sent = packet::read(&packet.bytes());
    let outcome = datapath.run(hook, &packet.bytes());
    assert_eq!(outcome.reason, reason, "{hook:?} {packet:?}");
    assert_eq!(outcome.action, go_on(hook), "{hook:?} {packet:?}");
    let seen = packet::read(&outcome.frame);
    assert_eq!((seen.src, seen.dst), (src, dst), "{hook:?} {packet:?}");
    assert_eq!(seen.payload, sent.payload, "the payload is not ours");
}

/// The backend's answer goes out, and must come from the frontend.
pub(crate) fn answered(datapath: &mut Datapath, world: &World) {
    translated(
        datapath,
        Hook::TcEgress,
        &world.answer(world.backend),
        Reason::Reply,
        (world.frontend, world.client),
    );
}

/// Runs a frame, which must come out byte for byte as it went in.
pub(crate) fn untouched(datapath: &mut Datapath, hook: Hook, frame: &[u8], reason: Reason) {
    assert_eq!(
        reason.effect(),
        Effect::Pass,
        "{reason:?} lets nothing pass"
    );
    let outcome = datapath.run(hook, frame);
    assert_eq!(outcome.reason, reason, "{hook:?} {frame:02x?}");
    assert_eq!(outcome.action, go_on(hook), "{hook:?} {frame:02x?}");
    assert_eq!(outcome.frame, frame, "{hook:?} changed a packet it passed");
}

/// Runs a packet, which must be dropped.
pub(crate) fn dropped(datapath: &mut Datapath, hook: Hook, packet: &Packet, reason: Reason) {
    let outcome = datapath.run(hook, &packet.bytes());
    assert_eq!(outcome.reason, reason, "{hook:?} {packet:?}");
    let drop = if hook == Hook::Xdp { XDP_DROP } else { TC_DROP };
    assert_eq!(outcome.action, drop, "{hook:?} {packet:?}");
}

const fn go_on(hook: Hook) -> u32 {
    if matches!(hook, Hook::Xdp) {
        XDP_PASS
    } else {
        TC_GO_ON
    }
}

/// Settings with a network of the `ClusterIP`s that holds just this one.
pub(crate) fn with_cluster_network(config: Config, addr: IpAddr) -> Config {
    match addr {
        IpAddr::V4(addr) => Config {
            cluster_net4: Network {
                addr: addr.into(),
                mask: Addr4 { octets: [255; 4] },
            },
            ..config
        },
        IpAddr::V6(addr) => Config {
            cluster_net6: Network {
                addr: addr.into(),
                mask: Addr6 { octets: [255; 16] },
            },
            ..config
        },
    }
}
