//! klb's BPF programs.
//!
//! A packet program is parse → flow lookup → service lookup → select → rewrite
//! → verdict, a file each, generic over the address family and over the kind of
//! packet ([`packet::Packet`]: XDP or TC). A socket program is the middle of
//! that with a socket call in place of the packet.
//!
//! Code for the verifier has rules of its own: no indexing, no division by a
//! variable, nothing that can panic, no copy of more than a few words. The
//! lints below keep the first three.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![deny(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::integer_division_remainder_used,
    clippy::panic,
    clippy::unwrap_used
)]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "a key given to a map by value is copied to the stack once more"
)]
#![expect(
    clippy::needless_pass_by_value,
    reason = "aya's macros hand the context over by value"
)]
#![expect(
    unreachable_pub,
    reason = "nothing outside reaches into a program; `pub` marks what a module offers the others"
)]

mod answer;
mod clock;
mod config;
mod credit;
mod direct;
mod edge;
mod family;
mod flow;
mod fragment;
mod icmp;
mod known;
mod maps;
mod masquerade;
mod opaque;
mod open;
mod packet;
mod parse;
mod rare;
mod rewrite;
mod route;
mod select;
mod served;
mod socket;
mod trace;
mod traffic;
mod verdict;

use aya_ebpf::{
    macros::{cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, TcContext, XdpContext},
};
use lb_common::Hook;

use crate::{
    edge::Outcome,
    socket::{Connect, Reveal, Send},
};

/// From the outside, before the stack.
#[xdp]
pub fn klb_xdp(ctx: XdpContext) -> u32 {
    on_xdp(&ctx)
}

/// The same on kernels that let XDP have packets of several buffers (5.18):
/// without that no driver takes a program at an MTU of 9000. All headers are in
/// the first buffer.
#[xdp(frags)]
pub fn klb_xdp_frags(ctx: XdpContext) -> u32 {
    on_xdp(&ctx)
}

/// From a client into the node.
#[classifier]
pub fn klb_tc_in(ctx: TcContext) -> i32 {
    on_tc(Hook::TcIngress, &ctx, edge::enter)
}

/// From the node to a client.
#[classifier]
pub fn klb_tc_out(ctx: TcContext) -> i32 {
    on_tc(Hook::TcEgress, &ctx, edge::leave)
}

#[inline(always)]
fn on_xdp(ctx: &XdpContext) -> u32 {
    trace::begin(ctx);
    verdict::xdp(trace::end(ctx, Hook::Xdp, edge::enter(ctx)))
}

#[inline(always)]
fn on_tc(hook: Hook, ctx: &TcContext, run: impl FnOnce(&TcContext) -> Outcome) -> i32 {
    trace::begin(ctx);
    verdict::tc(hook, trace::end(ctx, hook, run(ctx)))
}

#[cgroup_sock_addr(connect4)]
pub fn klb_connect4(ctx: SockAddrContext) -> i32 {
    verdict::socket(socket::on4::<Connect>(&ctx))
}

#[cgroup_sock_addr(connect6)]
pub fn klb_connect6(ctx: SockAddrContext) -> i32 {
    verdict::socket(socket::on6::<Connect>(&ctx))
}

#[cgroup_sock_addr(sendmsg4)]
pub fn klb_sendmsg4(ctx: SockAddrContext) -> i32 {
    verdict::socket(socket::on4::<Send>(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn klb_sendmsg6(ctx: SockAddrContext) -> i32 {
    verdict::socket(socket::on6::<Send>(&ctx))
}

#[cgroup_sock_addr(recvmsg4)]
pub fn klb_recvmsg4(ctx: SockAddrContext) -> i32 {
    verdict::socket(socket::on4::<Reveal>(&ctx))
}

#[cgroup_sock_addr(recvmsg6)]
pub fn klb_recvmsg6(ctx: SockAddrContext) -> i32 {
    verdict::socket(socket::on6::<Reveal>(&ctx))
}

#[cgroup_sock_addr(getpeername4)]
pub fn klb_getpeer4(ctx: SockAddrContext) -> i32 {
    verdict::socket(socket::on4::<Reveal>(&ctx))
}

#[cgroup_sock_addr(getpeername6)]
pub fn klb_getpeer6(ctx: SockAddrContext) -> i32 {
    verdict::socket(socket::on6::<Reveal>(&ctx))
}

/// Most helpers used here are for GPL-compatible programs only, and "Dual
/// MIT/GPL" is the kernel's word for such a licence that is also permissive.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// For clippy, which checks this crate as a program of the host.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

/// Required to compile; nothing here panics, or the verifier would refuse it.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
