//! What the programs know about the node: settings, devices, namespaces.

use crate::{
    addr::{Addr4, Addr6, Port},
    flow::State,
};

/// Settings: the one entry of `klb_config`. Written by the agent, also while
/// programs run; fields are independent of each other.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The smallest network that holds every `ClusterIP`; mask and network are
    /// zero if there is none. Only packets to an address in it pay for the
    /// lookup that tells whether its port is nobody's.
    pub cluster_net4: Network<Addr4>,
    pub cluster_net6: Network<Addr6>,
    /// The first of the node's ports that masquerade uses, host order.
    pub first_port: u16,
    /// Number of these ports; 0 if nothing can be masqueraded.
    pub port_count: u16,
    /// Bits of `CONFIG_*`.
    pub flags: u32,
    /// Random, fixed for the life of the maps: makes ports hard to guess.
    pub secret: u32,
    /// Low and high word of the cookie of the node's own network namespace.
    pub host_netns: [u32; 2],
    /// Seconds of silence after which a flow is over, by [`State`].
    pub timeouts: [u32; State::COUNT],
}

/// Sockets of pods are left alone (`--socket-lb host`).
pub const CONFIG_HOST_SOCKETS_ONLY: u32 = 1 << 0;
/// Translated packets go past the node's stack (`--routing bypass`).
pub const CONFIG_BYPASS: u32 = 1 << 1;

/// A network: the address has no bits outside of the mask. Without a mask it is
/// every address if its own is not zero, and none if it is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Network<A> {
    pub addr: A,
    pub mask: A,
}

/// A device of the node, by index in `klb_device`. Index 0 is the node itself:
/// its addresses are used where the device has none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Sources of packets that are masqueraded when they leave by the device;
    /// all zero if it has none.
    pub addr4: Addr4,
    pub addr6: Addr6,
    /// Bits of `DEVICE_*`.
    pub flags: u32,
}

/// A pod is behind the device: its clients count as inside.
pub const DEVICE_POD: u32 = 1 << 0;
/// The other end of the device is the pod's own (veth, netkit), so that packets
/// can be handed over to it.
pub const DEVICE_PEER: u32 = 1 << 1;
/// XDP can send frames out of the device: its driver takes them. What one does not
/// take is lost, and nobody tells.
pub const DEVICE_XDP: u32 = 1 << 2;

/// The way that the kernel told for packets between two addresses, in `klb_route4`
/// and `klb_route6`, by a hash of what it was asked; it is believed for a moment.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Route<A> {
    pub src: A,
    pub dst: A,
    /// Where the packets come in, as flows note it.
    pub edge: u32,
    /// When the kernel told, in [`ROUTE_TICK_BITS`].
    pub told: u32,
    /// Index of the device by which the packets leave.
    pub ifindex: u32,
    /// The device's bits of `DEVICE_*`.
    pub flags: u32,
    /// The longest frame, in bytes, of which the kernel has said that it is not
    /// too large.
    pub length: u32,
    /// Destination and source as an Ethernet header has them.
    pub macs: [u32; 3],
}

/// Binary logarithm of the number of entries of `klb_route4` and `klb_route6`.
pub const ROUTE_BITS: u32 = 12;

/// For how long the kernel is believed: the binary logarithm of a number of its
/// ticks, which are a hundredth to a thousandth of a second. So a route or
/// neighbour that has changed counts after a third of a second at most.
pub const ROUTE_TICK_BITS: u32 = 5;

/// A network namespace, by its cookie (`SO_NETNS_COOKIE`) in `klb_netns`: a pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Netns {
    /// The pod's addresses: with which its packets will leave. All zero if it
    /// has none.
    pub addr4: Addr4,
    pub addr6: Addr6,
    /// Bits of `NETNS_*`.
    pub flags: u32,
}

/// The pod's sockets are left alone (it opted out).
pub const NETNS_OPTED_OUT: u32 = 1 << 0;

/// Names a fragmented packet (RFC 791, RFC 8200 4.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey<A> {
    pub src: A,
    pub dst: A,
    /// As it stands in the packet; an IPv4 identification fills the first two
    /// bytes.
    pub id: u32,
    /// IP protocol number.
    pub protocol: u8,
    pub pad: u8,
    pub pad2: u16,
}

/// A place for a fragment that came before the first one of its packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EarlyKey<A> {
    pub packet: FragmentKey<A>,
    /// Several fragments of one packet may be early.
    pub place: u32,
}

/// How many fragments of one packet are kept.
pub const EARLY_PLACES: u32 = 4;

/// Binary logarithm of the number of entries of `klb_rare`.
pub const RARE_BITS: u32 = 10;

/// The longest frame that is kept, in bytes.
pub const EARLY_BYTES: usize = 2048;

/// A frame that came too early.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Early {
    /// In bytes.
    pub length: u32,
    pub bytes: [u8; EARLY_BYTES],
}

/// What only the first fragment says.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentPorts {
    pub src_port: Port,
    pub dst_port: Port,
}
