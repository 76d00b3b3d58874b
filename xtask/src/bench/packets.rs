//! Figure 7: packets per second through the node to a `NodePort`, all work on
//! one CPU.
//!
//! The host outside sends frames of 1,024 flows from within a test run of its
//! program, straight into the node's device; programs at the pods' devices take
//! them in and count. Neither end has a socket, so that what is between them is most of what
//! is measured.

use std::{net::Ipv4Addr, time::Duration};

use aya::{
    TestRunAttrs, TestRunOptions,
    programs::{TestRun as _, Xdp},
};
use lb_common::checksum::fold;
use lb_tests::{
    measure::take_cpu,
    netns::Netns,
    topology::{Addresses, UPLINK},
};

use nix::time::{ClockId, clock_gettime};

use super::{
    floor::{self, Floor, get, set, shared},
    services::PODS,
    site::{CPU, Site, index_of},
};

/// A power of two.
const FLOWS: u32 = 1024;
/// Frames that are sent at once: as many as a driver takes in one poll.
const BATCH: u32 = 64;
/// Frames of the first run, by which the second is made as long as it should be.
const FIRST: u32 = 20_000;
/// Bytes of a frame: what a flow's packet without payload has, and a little.
const LENGTH: usize = size_of::<[u64; shared::WORDS]>();
/// Where the senders' addresses are from; the last two bytes are the flow's.
const SENDERS: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 0);

/// What sends and what takes in, attached to all sites.
pub(super) struct Traffic {
    floor: Floor,
}

impl Traffic {
    /// Sends through the node of each of these.
    ///
    /// # Panics
    /// If something is not as it should be.
    pub(super) fn through<'a>(sites: impl Iterator<Item = &'a Site>) -> Self {
        let mut floor = Floor::load().unwrap_or_else(|error| panic!("the floor: {error:#}"));
        for site in sites {
            let node = site.cluster.node.place.netns();
            let outside = site.cluster.outside.place.netns();
            // A veth takes frames in bulk where it polls, as a wire's device
            // always does.
            node.output("ethtool", &["-K", UPLINK, "gro", "on"]);
            outside.output("ethtool", &["-K", "eth0", "gro", "on"]);
            let via = Addresses::OUTSIDE.v4;
            node.ip(&format!("route replace {SENDERS}/24 via {via}\n"));
            for pod in &site.cluster.pods {
                let netns = pod.host.place.netns();
                // A frame that XDP sends on never becomes what TC gets, and the
                // other way round it would be an effort.
                let redirects_frames = site.redirects_frames();
                let attached = netns.within(|| {
                    if redirects_frames {
                        floor.attach_xdp(floor::SINK_XDP, "eth0")
                    } else {
                        floor.attach_tc(floor::SINK_TC, "eth0")
                    }
                });
                attached.unwrap_or_else(|error| panic!("{}: {error:#}", pod.name));
            }
        }
        Self { floor }
    }

    /// Millions of packets per second that reach the pods.
    ///
    /// # Panics
    /// If too many of them get lost, or a pod gets none.
    pub(super) fn measure(&mut self, site: &Site, time: Duration) -> f64 {
        let frame = shared::Frame {
            head: head(site),
            count: 0,
            mask: FLOWS - 1,
            is_v6: 0,
            pad: 0,
        };
        let map = self.floor.map("floor_frame").expect("a map of the floor");
        set(map, 0, frame).expect("the one entry");
        let first = self.send(site, FIRST).max(Duration::from_millis(1));
        let enough = f64::from(FIRST) * time.as_secs_f64() / first.as_secs_f64();
        #[expect(clippy::cast_sign_loss, reason = "a number of frames")]
        let count = (enough as u32).next_multiple_of(BATCH);
        let before = self.arrived();
        let took = self.send(site, count);
        let after = self.arrived();
        let arrived: Vec<_> = before.iter().zip(&after).map(|(a, b)| b - a).collect();
        let total: u64 = arrived.iter().sum();
        let total = f64::from(u32::try_from(total).expect("no more than were sent"));
        let lost = 1.0 - total / f64::from(count);
        let wanted = if site.is_direct() { 1 } else { arrived.len() };
        let reached = arrived.iter().filter(|count| **count > 0).count();
        assert!(
            lost < 0.02 && reached == wanted,
            "{}: of {count} packets the pods got {arrived:?}",
            site.name
        );
        total / took.as_secs_f64() / 1e6
    }

    /// Packets to the address of each pod that were taken in so far.
    fn arrived(&mut self) -> Vec<u64> {
        let map = self.floor.map("floor_taken").expect("a map of the floor");
        let counts = PODS.map(|number| get(map, number.into()).expect("an entry"));
        counts.into()
    }

    /// Sends so many frames; returns what that took of the CPU. Whatever becomes
    /// of a frame is done when it is sent, by who sends it.
    fn send(&mut self, site: &Site, count: u32) -> Duration {
        let program = self.floor.loaded(floor::SOURCE).expect("of the floor");
        let program: &Xdp = (&*program).try_into().expect("for XDP");
        site.cluster.outside.place.netns().within(|| {
            take_cpu(CPU).expect("a CPU of our own");
            let data = [0; LENGTH];
            // `struct xdp_md`: the frame from here to there, no metadata, and
            // the device that it is sent by.
            let context = [0, LENGTH as u32, 0, index_of("eth0"), 0, 0];
            let context: Vec<_> = context.into_iter().flat_map(u32::to_ne_bytes).collect();
            let options = TestRunOptions {
                data_in: Some(&data),
                ctx_in: Some(&context),
                repeat: count,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                ..TestRunOptions::new()
            };
            let before = own_time();
            program.test_run(options).expect("frames are sent");
            own_time().saturating_sub(before)
        })
    }
}

/// CPU time of this thread. A test run also waits, for RCU.
fn own_time() -> Duration {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("there is such a clock");
    time.into()
}

/// The beginning of a frame to the site's `NodePort`, or to its first pod; its
/// checksums are of a source port and of last bytes of an address that are 0.
fn head(site: &Site) -> [u64; shared::WORDS] {
    let to = site.packets_to();
    let node = site.cluster.node.place.netns();
    let outside = site.cluster.outside.place.netns();
    let mut frame = Vec::with_capacity(LENGTH);
    frame.extend(mac(node, UPLINK));
    frame.extend(mac(outside, "eth0"));
    frame.extend([0x08, 0x00]);
    let ip_length = u16::try_from(LENGTH - 14).expect("short");
    let udp_length = ip_length - 20;
    let mut ip = vec![0x45, 0];
    ip.extend(ip_length.to_be_bytes());
    // No fragment, 64 hops, UDP, and no checksum yet.
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(SENDERS.octets());
    ip.extend(to.ip().octets());
    let sum = checksum(&ip, 0);
    ip[10..12].copy_from_slice(&sum);
    frame.extend(&ip);
    let mut udp = vec![0, 0];
    udp.extend(to.port().to_be_bytes());
    udp.extend(udp_length.to_be_bytes());
    udp.extend([0, 0]);
    udp.resize(udp_length.into(), 0x5a);
    let pseudo = u64::from(17_u16.to_be()) + u64::from(udp_length.to_be());
    let pseudo = pseudo + words(&ip[12..]);
    let sum = checksum(&udp, pseudo);
    udp[6..8].copy_from_slice(&sum);
    frame.extend(udp);
    let mut head = [0; shared::WORDS];
    for (word, bytes) in head.iter_mut().zip(frame.chunks_exact(8)) {
        *word = u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
    }
    head
}

fn checksum(bytes: &[u8], more: u64) -> [u8; 2] {
    (!fold(words(bytes) + more)).to_ne_bytes()
}

/// The sum of all pairs of bytes, as they stand in memory.
fn words(bytes: &[u8]) -> u64 {
    let pairs = bytes.chunks_exact(2);
    pairs
        .map(|pair| u64::from(u16::from_ne_bytes([pair[0], pair[1]])))
        .sum()
}

/// The Ethernet address of a device.
fn mac(netns: &Netns, device: &str) -> [u8; 6] {
    let text = netns.output("ip", &["-j", "link", "show", device]);
    let links: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let address = links[0]["address"].as_str().expect("an address");
    let bytes = address.split(':').map(|byte| u8::from_str_radix(byte, 16));
    let bytes: Vec<_> = bytes.collect::<Result<_, _>>().expect("six bytes");
    bytes.try_into().expect("six bytes")
}
