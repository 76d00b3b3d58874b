//! The way of a packet that has been translated.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::bpf_fib_lookup as FibLookup,
    helpers::{bpf_fib_lookup, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer},
};

use crate::{
    family::{Family, V4, V6},
    packet::Packet,
    translate::Translated,
};

/// Bytes of what a route lookup takes.
const SIZE: i32 = 64;
const _: () = assert!(size_of::<FibLookup>() == SIZE as usize);

/// The kernel has found route and neighbour (`BPF_FIB_LKUP_RET_SUCCESS`).
const FOUND: i64 = 0;

/// Sends the packet on by the kernel's routes. The action to return, if the
/// kernel knows the way.
#[inline(always)]
pub fn by_table<P: Packet>(packet: &P, translated: Option<Translated>) -> Option<u32> {
    match translated? {
        Translated::V4 => by_table_family::<P, V4>(packet),
        Translated::V6 => by_table_family::<P, V6>(packet),
    }
}

#[inline(always)]
fn by_table_family<P: Packet, F: Family>(packet: &P) -> Option<u32> {
    let (src, dst) = (packet.read(F::SRC)?, packet.read(F::DST)?);
    let mut route = MaybeUninit::<FibLookup>::uninit();
    let head = [u32::from(F::ADDRESS_FAMILY).to_le(), 0, packet.ifindex(), 0];
    // SAFETY: these are the fields before the addresses; the addresses follow,
    // and the helper writes what is behind them. (That a program need not clear
    // it first, verifiers know since 6.3.)
    let found = unsafe {
        route.as_mut_ptr().cast::<[u32; 4]>().write(head);
        F::set_route_ends(&mut *route.as_mut_ptr(), &src, &dst);
        bpf_fib_lookup(packet.context(), route.as_mut_ptr(), SIZE, 0)
    };
    if found != FOUND {
        return None;
    }
    // SAFETY: the helper has written it.
    let route = unsafe { route.assume_init_ref() };
    F::count_hop(packet).ok()?;
    packet.write(0, macs(route)).ok()?;
    // SAFETY: the helper takes numbers only.
    Some(unsafe { bpf_redirect(route.ifindex, 0) }.cast_unsigned() as u32)
}

/// Destination and source as an Ethernet header has them, in words.
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

/// Sends the packet on as the map of ways says.
#[inline(always)]
pub fn by_map<P: Packet>(packet: &P, translated: Option<Translated>) -> Option<u32> {
    match translated? {
        Translated::V4 => by_map_family::<P, V4>(packet),
        Translated::V6 => by_map_family::<P, V6>(packet),
    }
}

#[inline(always)]
fn by_map_family<P: Packet, F: Family>(packet: &P) -> Option<u32> {
    let dst: F::Addr = packet.read(F::DST)?;
    // SAFETY: only the benchmark writes this map, before the program runs.
    let way = unsafe {
        F::ways()
            .get(&dst)
            .or_else(|| F::ways().get(&F::Addr::default()))
    }?;
    // SAFETY: the helpers take numbers, and no neighbour.
    let action = unsafe {
        if way.to_peer == 0 {
            bpf_redirect_neigh(way.ifindex, core::ptr::null_mut(), 0, 0)
        } else {
            bpf_redirect_peer(way.ifindex, 0)
        }
    };
    Some(action.cast_unsigned() as u32)
}
