//! `--routing bypass`: packets of flows go straight to the next hop's device,
//! past the node's stack. What the route lookup cannot answer at once goes up
//! the stack after all: an unknown neighbour is found out there, a packet that
//! is too large is answered there.

use aya_ebpf::{
    bindings::bpf_fib_lookup as FibLookup,
    helpers::{bpf_fib_lookup, bpf_jiffies64},
};
use lb_common::{
    Address,
    flow::Tuple,
    node::{DEVICE_PEER, DEVICE_XDP, ROUTE_BITS, ROUTE_TICK_BITS, Route},
};

use crate::{
    edge::Way,
    family::Family,
    open::{device, opening},
    packet::Packet,
    parse::L3,
    rewrite::Pair,
};

/// Bytes of what a route lookup takes.
const SIZE: i32 = 64;
const _: () = assert!(size_of::<FibLookup>() == SIZE as usize);

/// The kernel has found route and neighbour (`BPF_FIB_LKUP_RET_SUCCESS`).
const FOUND: i64 = 0;
/// The packet is for the node, or leads nowhere (`BPF_FIB_LKUP_RET_NOT_FWDED`).
const NOT_FORWARDED: i64 = 4;

/// Asks the kernel by which device a packet of `length` bytes leaves that comes
/// in at `ifindex`, and between which Ethernet addresses. Whether it knows all of
/// it, and the packet is not too large for the way; the device it may know
/// anyway. A length of 0 is not compared under XDP, and under TC the kernel knows
/// it by itself.
#[inline(always)]
pub fn find<P: Packet, F: Family>(
    packet: &P,
    route: &mut FibLookup,
    addresses: &Pair<F::Addr>,
    protocol: u8,
    length: u16,
    ifindex: u32,
) -> bool {
    FOUND == ask::<P, F>(packet, route, addresses, protocol, length, ifindex)
}

/// Whether packets with this tuple that come in here are for the node itself.
#[inline(always)]
pub fn ends_here<P: Packet, F: Family>(packet: &P, tuple: &Tuple<F::Addr>) -> bool {
    let Some(work) = opening::<F>() else {
        return false;
    };
    let ends = Pair {
        src: tuple.src,
        dst: tuple.dst,
    };
    let (route, here) = (&mut work.route, packet.ifindex());
    NOT_FORWARDED == ask::<P, F>(packet, route, &ends, tuple.protocol, 0, here)
}

/// What the kernel says to [`find`]: its `BPF_FIB_LKUP_RET_*`.
#[inline(always)]
fn ask<P: Packet, F: Family>(
    packet: &P,
    route: &mut FibLookup,
    addresses: &Pair<F::Addr>,
    protocol: u8,
    length: u16,
    ifindex: u32,
) -> i64 {
    F::set_route_ends(route, &addresses.src, &addresses.dst);
    // Family, protocol, no ports, the length; the device; no type of service.
    // Field by field the compiler would call `memset`.
    let [low, high] = length.to_ne_bytes();
    let head = [
        u32::from_ne_bytes([F::ADDRESS_FAMILY, protocol, 0, 0]),
        u32::from_ne_bytes([0, 0, low, high]),
        ifindex,
        0,
    ];
    // SAFETY: these are the fields before the addresses, all integers.
    unsafe { (&raw mut *route).cast::<[u32; 4]>().write(head) };
    // SAFETY: context and struct live through the call.
    unsafe { bpf_fib_lookup(packet.context(), &raw mut *route, SIZE, 0) }
}

/// The way of a packet that comes in here, if it can be taken; if not, the stack
/// has to see.
///
/// What the kernel tells is kept for a moment: to ask it takes longer than all
/// else that is done for a packet of a flow.
#[inline(never)]
pub fn look_up<P: Packet, F: Family>(packet: &P) -> Option<&'static Route<F::Addr>> {
    // The tag of a VLAN would stay with the frame on its way, and of a last hop the
    // stack has to tell the sender.
    if packet.is_tagged() || F::hops(packet)? <= 1 {
        return None;
    }
    let ends: Pair<F::Addr> = packet.read(L3 + F::ADDRESSES)?;
    // SAFETY: the entry belongs to this CPU, and a packet program is not
    // interrupted by another.
    let route = unsafe { &mut *F::routes().get_ptr_mut(place(&ends, packet.edge()))? };
    let now = ticks();
    if !is_known::<P, F>(packet, route, &ends, now) && !learn::<P, F>(packet, route, &ends, now) {
        return None;
    }
    // XDP can send only to a device whose driver takes frames from XDP, and
    // nobody tells if it does not: they are lost.
    let is_reached =
        !P::LEAVES_RARE_TO_TC || route.ifindex == packet.ifindex() || route.flags & DEVICE_XDP != 0;
    is_reached.then_some(route)
}

/// Where the way between two addresses is kept.
#[inline(always)]
fn place<A: Address>(ends: &Pair<A>, edge: u32) -> u32 {
    let mixed = ends.src.folded().wrapping_mul(0x9e37_79b1) ^ ends.dst.folded() ^ edge;
    mixed.wrapping_mul(0x85eb_ca6b) >> (u32::BITS - ROUTE_BITS)
}

/// Time in the unit of [`Route::told`].
#[inline(always)]
fn ticks() -> u32 {
    // SAFETY: the helper takes nothing; the kernel compiles it into a load.
    let ticks = unsafe { bpf_jiffies64() };
    (ticks >> ROUTE_TICK_BITS) as u32
}

/// Whether what was told is about such a packet, and not too long ago.
#[inline(always)]
fn is_known<P: Packet, F: Family>(
    packet: &P,
    route: &Route<F::Addr>,
    ends: &Pair<F::Addr>,
    now: u32,
) -> bool {
    route.told == now
        && route.edge == packet.edge()
        && route.dst.same(&ends.dst)
        && route.src.same(&ends.src)
        && (packet.length_by::<F>() <= route.length as usize || packet.frames() > 1)
}

/// Asks the kernel, and notes what it tells. Whether it knows all of the way.
#[inline(always)]
fn learn<P: Packet, F: Family>(
    packet: &P,
    route: &mut Route<F::Addr>,
    ends: &Pair<F::Addr>,
    now: u32,
) -> bool {
    let Some(work) = opening::<F>() else {
        return false;
    };
    let length = if P::LEAVES_RARE_TO_TC {
        packet.length_by::<F>().wrapping_sub(L3) as u16
    } else {
        0
    };
    route.told = 0;
    if !find::<P, F>(packet, &mut work.route, ends, 0, length, packet.ifindex()) {
        return false;
    }
    route.src = ends.src;
    route.dst = ends.dst;
    route.edge = packet.edge();
    route.told = now;
    route.ifindex = work.route.ifindex;
    route.flags = device(route.ifindex).map_or(0, |device| device.flags);
    // Of joined packets the kernel does not look how long they are.
    let length = if packet.frames() > 1 {
        0
    } else {
        packet.length_by::<F>()
    };
    route.length = length as u32;
    route.macs = macs(&work.route);
    true
}

/// Whether the packet can come out of the other end of the device, which is a
/// pod's: there the kernel has it without another turn in a queue, but no egress
/// hook of the device sees it.
#[inline(always)]
pub fn is_last_hook<P: Packet, A>(packet: &P, route: &Route<A>) -> bool {
    !P::LEAVES_RARE_TO_TC && route.ifindex != packet.ifindex() && route.flags & DEVICE_PEER != 0
}

/// Sends a packet on its way, out of the other end of the device if `to_pod`;
/// [`Way::On`] if it cannot.
///
/// Not inlined: the verifier has less to walk.
#[inline(never)]
pub fn send<P: Packet, F: Family>(packet: &P, route: &Route<F::Addr>, to_pod: bool) -> Way {
    if F::forward(packet, route).is_err() {
        return Way::On;
    }
    if to_pod {
        packet.hand_over(route.ifindex)
    } else {
        packet.send_out(route.ifindex)
    }
}

/// Destination and source as an Ethernet header has them, in words: of bytes the
/// compiler makes a call of `memcpy`.
#[inline(always)]
const fn macs(route: &FibLookup) -> [u32; 3] {
    let [to0, to1, to2, to3, to4, to5] = route.dmac;
    let [from0, from1, from2, from3, from4, from5] = route.smac;
    [
        u32::from_ne_bytes([to0, to1, to2, to3]),
        u32::from_ne_bytes([to4, to5, from0, from1]),
        u32::from_ne_bytes([from2, from3, from4, from5]),
    ]
}
