//! `--routing bypass`: packets of flows go straight to the next hop's device,
//! past the node's stack. What the route lookup cannot answer at once goes up
//! the stack after all: an unknown neighbour is found out there, a packet that
//! is too large is answered there.

use aya_ebpf::{bindings::bpf_fib_lookup as FibLookup, helpers::bpf_fib_lookup};
use lb_common::{Reason, node::DEVICE_PEER};

use crate::{
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

/// Asks the kernel by which device a packet leaves that comes in at `ifindex`,
/// and between which Ethernet addresses. Whether it knows all of it; the device
/// it may know anyway.
#[inline(always)]
pub fn find<P: Packet, F: Family>(
    packet: &P,
    route: &mut FibLookup,
    addresses: &Pair<F::Addr>,
    protocol: u8,
    ifindex: u32,
) -> bool {
    F::set_route_ends(route, &addresses.src, &addresses.dst);
    // Family, protocol, no ports, no length; the device; no type of service.
    // Field by field the compiler would call `memset`.
    let head = [
        u32::from_le_bytes([F::ADDRESS_FAMILY, protocol, 0, 0]).to_le(),
        0,
        ifindex,
        0,
    ];
    // SAFETY: these are the fields before the addresses, all integers.
    unsafe { (&raw mut *route).cast::<[u32; 4]>().write(head) };
    // SAFETY: context and struct live through the call.
    FOUND == unsafe { bpf_fib_lookup(packet.context(), &raw mut *route, SIZE, 0) }
}

/// Sends a packet on its way that was translated for `reason`. Returns whether it
/// could; if not, the stack has to.
#[inline(never)]
pub fn forward<P: Packet, F: Family>(packet: &P, reason: Reason) -> bool {
    let Some(work) = opening::<F>() else {
        return false;
    };
    let Some(addresses) = packet.read(L3 + F::ADDRESSES) else {
        return false;
    };
    let here = packet.ifindex();
    if !find::<P, F>(packet, &mut work.route, &addresses, 0, here) {
        return false;
    }
    let macs = macs(&work.route);
    if F::count_hop(packet).is_err() || packet.write(0, macs).is_err() {
        return false;
    }
    let there = work.route.ifindex;
    // Past the egress hook of the pod's device: only what that one would not
    // have to translate.
    let last_hook = matches!(reason, Reason::Forward | Reason::NewFlow) && there != here;
    let flags = device(there).map_or(0, |device| device.flags);
    if last_hook && flags & DEVICE_PEER != 0 {
        packet.hand_over(there)
    } else {
        packet.send_out(there)
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
