//! Frames that a test run refuses to make, over real devices: through a bridge
//! whose ports have every packet hook, and out again byte for byte.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use lb_common::{
    Hook, Reason,
    node::{DEVICE_POD, Device},
};
use lb_tests::{
    fragments,
    packet::{self, Packet, Seen},
    private::{in_private_namespace, ip},
    program::{Backend, Datapath},
    wire::RawSocket,
};
use nix::net::if_::if_nametoindex;

const DEADLINE: Duration = Duration::from_secs(5);

/// `in0` ─ `in1`, bridge, `out1` ─ `out0`; a frame sent on `in0` arrives at
/// `out0` through XDP and TC ingress of `in1` and TC egress of `out1`.
fn bridge() -> (RawSocket, RawSocket) {
    // Without IPv6 no device says anything by itself.
    for scope in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        std::fs::write(path, "1").expect("a sysctl of this namespace");
    }
    ip("link add br0 type bridge stp_state 0 mcast_snooping 0 forward_delay 0");
    // Netfilter on a bridge drops what is no good IP packet; absent where the
    // kernel has no such thing.
    for protocol in ["ip", "ip6", "arp"] {
        let path = format!("/proc/sys/net/bridge/bridge-nf-call-{protocol}tables");
        drop(std::fs::write(path, "0"));
    }
    for side in ["in", "out"] {
        ip(&format!("link add {side}0 type veth peer name {side}1"));
        ip(&format!("link set {side}1 master br0 up"));
        ip(&format!("link set {side}0 up"));
    }
    ip("link set br0 up");
    (RawSocket::open("in0"), RawSocket::open("out0"))
}

/// Sends one frame and returns what came out at the other end.
fn through(from: &RawSocket, to: &RawSocket, frame: &[u8]) -> Vec<u8> {
    from.send(frame)
        .unwrap_or_else(|error| panic!("sending {} bytes: {error}", frame.len()));
    to.receive(DEADLINE)
        .unwrap_or_else(|| panic!("no frame for {} bytes: {frame:02x?}", frame.len()))
}

/// A bridge port forwards from the moment that it is told; the first frame
/// through tells that it was.
fn wait_until_forwarding(from: &RawSocket, to: &RawSocket) {
    // Broadcast, from an address of its own, of a protocol for experiments.
    let mut probe = [0_u8; 60];
    probe[..6].fill(0xff);
    probe[6] = 2;
    probe[12..14].copy_from_slice(&[0x88, 0xb5]);
    let end = Instant::now() + DEADLINE;
    loop {
        from.send(&probe).expect("a frame of 60 bytes");
        if to.receive(Duration::from_millis(50)).is_some() {
            break;
        }
        assert!(Instant::now() < end, "the bridge does not forward");
    }
    while to.receive(Duration::from_millis(50)).is_some() {}
}

#[test]
fn frames_of_every_length_pass_every_hook_and_are_counted() {
    in_private_namespace(|| {
        let (from, to) = bridge();
        let parse = |text: &str| text.parse().expect("an address");
        let client = parse("192.168.50.2:40000");
        let client6 = parse("[fd00:50::2]:40000");
        let frontend = parse("10.96.0.1:80");
        let frontend6 = parse("[fd00:10:96::1]:80");
        let mut datapath = Datapath::new();
        for protocol in [6, 17] {
            for (frontend, backend) in [
                (frontend, parse("10.244.0.5:3000")),
                (frontend6, parse("[fd00:10:244::5]:3000")),
            ] {
                let local = Backend {
                    addr: backend,
                    local: true,
                };
                datapath.serve(protocol, frontend, &[local]);
            }
        }
        datapath.attach(Hook::Xdp, "in1");
        datapath.attach(Hook::TcIngress, "in1");
        datapath.attach(Hook::TcEgress, "out1");
        wait_until_forwarding(&from, &to);

        let hooks = [Hook::Xdp, Hook::TcIngress, Hook::TcEgress];
        for protocol in [6, 17] {
            for (client, frontend) in [(client, frontend), (client6, frontend6)] {
                let whole = Packet::first(protocol, client, frontend)
                    .payload(vec![1; 128])
                    .bytes();
                let before = hooks.map(|hook| datapath.counters(hook)[&Reason::Truncated]);
                for length in 14..=128 {
                    let frame = &whole[..length];
                    assert_eq!(through(&from, &to, frame), frame, "{length} bytes");
                }
                for (hook, before) in hooks.into_iter().zip(before) {
                    let counted = datapath.counters(hook)[&Reason::Truncated] - before;
                    assert_eq!(counted, 115, "{hook:?}: one for each length");
                }
                let mut nonsense = whole.clone();
                for fill in [0x00, 0xff, 0x45, 0x4f, 0x60] {
                    nonsense[14..].fill(fill);
                    for length in (14..=128).step_by(3) {
                        let frame = &nonsense[..length];
                        assert_eq!(through(&from, &to, frame), frame, "{fill:#x} {length}");
                    }
                }
            }
        }
        assert_eq!(datapath.flow_count(), 0);
        // Less than an Ethernet header reaches no hook: the device refuses it.
        for length in 0..14 {
            assert!(
                from.send(&[0; 14][..length]).is_err(),
                "{length} bytes sent"
            );
        }
    });
}

/// The same way with a packet that is klb's: the hooks are really there.
#[test]
fn the_hooks_of_the_bridge_translate() {
    in_private_namespace(|| {
        let (from, to) = bridge();
        let parse = |text: &str| text.parse().expect("an address");
        let (client, frontend) = (parse("192.168.50.2:40000"), parse("10.96.0.1:80"));
        let backend = parse("10.244.0.5:3000");
        for hook in [Hook::Xdp, Hook::TcIngress] {
            let mut datapath = Datapath::new();
            let local = Backend {
                addr: backend,
                local: true,
            };
            datapath.serve(17, frontend, &[local]);
            datapath.attach(hook, "in1");
            wait_until_forwarding(&from, &to);
            let frame = Packet::udp(client, frontend).bytes();
            let seen = packet::read(&through(&from, &to, &frame));
            assert_eq!((seen.src, seen.dst), (client, backend), "{hook:?}");
        }
    });
}

/// A client, a frontend and its backend, in either family.
fn worlds() -> [[SocketAddr; 3]; 2] {
    [
        ["192.168.50.2:40000", "10.96.0.1:53", "10.244.0.5:53"],
        [
            "[fd00:50::2]:40000",
            "[fd00:10:96::1]:53",
            "[fd00:10:244::5]:53",
        ],
    ]
    .map(|world| world.map(|addr| addr.parse().expect("an address")))
}

/// Sends the fragments of a datagram in the wrong order; returns what they make
/// when they have come through.
fn backwards(from: &RawSocket, to: &RawSocket, src: SocketAddr, dst: SocketAddr) -> Seen {
    let packet = Packet::udp(src, dst).payload(vec![9; 3000]);
    let mut frames = fragments::cut(&packet, 1, 1000);
    frames.reverse();
    for frame in &frames {
        from.send(frame).expect("a frame that fits");
    }
    let arrived: Vec<_> = frames
        .iter()
        .map(|_| to.receive(DEADLINE).expect("a fragment"))
        .collect();
    let seen = packet::read(&fragments::join(&arrived));
    assert_eq!(seen.payload, vec![9; 3000]);
    seen
}

/// The later fragment first: it is kept, and follows the first one out.
#[test]
fn fragments_out_of_order_all_arrive_translated() {
    in_private_namespace(|| {
        let (from, to) = bridge();
        let mut datapath = Datapath::new();
        datapath.attach(Hook::TcIngress, "in1");
        wait_until_forwarding(&from, &to);
        for [client, frontend, backend] in worlds() {
            let local = Backend {
                addr: backend,
                local: true,
            };
            datapath.serve(17, frontend, &[local]);
            datapath.put_address(frontend.ip(), 0);
            let seen = backwards(&from, &to, client, frontend);
            assert_eq!((seen.src, seen.dst), (client, backend));
        }
    });
}

/// Those of an answer to a pod come by where it goes out to the pod.
#[test]
fn fragments_of_answers_out_of_order_all_arrive_translated() {
    in_private_namespace(|| {
        let (from, to) = bridge();
        let mut datapath = Datapath::new();
        datapath.attach(Hook::TcEgress, "out1");
        let pod = Device {
            flags: DEVICE_POD,
            ..Device::default()
        };
        let index = if_nametoindex("out1").expect("a device");
        datapath.set_device(index, pod);
        wait_until_forwarding(&from, &to);
        for [client, frontend, backend] in worlds() {
            let local = Backend {
                addr: backend,
                local: true,
            };
            datapath.serve(17, frontend, &[local]);
            let question = Packet::udp(client, frontend).bytes();
            datapath.run(Hook::TcIngress, &question);
            let seen = backwards(&from, &to, backend, client);
            assert_eq!((seen.src, seen.dst), (frontend, client));
        }
    });
}
