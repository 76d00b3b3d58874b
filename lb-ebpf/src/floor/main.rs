//! The floor: programs that do only what no load balancer can leave out, against
//! which `cargo xtask bench` measures klb's. They are never shipped.
//!
//! A packet is parsed, its frontend looked up, its flow looked up or written in
//! both directions, and its destination replaced. There is no expiry, policy,
//! affinity or counter; whatever is not plain TCP or UDP passes.
//!
//! [`replay`] is the other half: programs that hand one of these, or of klb's,
//! the same packet again and again.
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

mod family;
mod maps;
mod packet;
mod replay;
mod route;
mod shared;
mod socket;
mod translate;

use aya_ebpf::{
    bindings::{
        TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_DROP, XDP_PASS},
    },
    macros::{cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, TcContext, XdpContext},
};

use crate::{
    socket::{Noted, Plain},
    translate::{Both, Forward},
};

/// What a program of a cgroup returns for "go on".
const PROCEED: i32 = 1;

/// To a backend on this node: translated, and up the stack.
#[xdp]
pub fn floor_xdp(ctx: XdpContext) -> u32 {
    translate::run::<_, Forward>(&ctx);
    XDP_PASS
}

/// The same, and out by the device that the route says.
#[xdp]
pub fn floor_xdp_fib(ctx: XdpContext) -> u32 {
    let translated = translate::run::<_, Both>(&ctx);
    route::by_table(&ctx, translated).unwrap_or(XDP_PASS)
}

#[classifier]
pub fn floor_tc(ctx: TcContext) -> i32 {
    translate::run::<_, Forward>(&ctx);
    TC_ACT_UNSPEC
}

#[classifier]
pub fn floor_tc_fib(ctx: TcContext) -> i32 {
    let translated = translate::run::<_, Both>(&ctx);
    route::by_table(&ctx, translated).map_or(TC_ACT_UNSPEC, u32::cast_signed)
}

/// Both directions, past the node's stack, as a map says for each address.
#[classifier]
pub fn floor_tc_peer(ctx: TcContext) -> i32 {
    let translated = translate::run::<_, Both>(&ctx);
    route::by_map(&ctx, translated).map_or(TC_ACT_UNSPEC, u32::cast_signed)
}

#[cgroup_sock_addr(connect4)]
pub fn floor_connect4(ctx: SockAddrContext) -> i32 {
    socket::on4::<Noted>(&ctx);
    PROCEED
}

#[cgroup_sock_addr(connect6)]
pub fn floor_connect6(ctx: SockAddrContext) -> i32 {
    socket::on6::<Noted>(&ctx);
    PROCEED
}

/// Without a note of the frontend, which the process would be shown.
#[cgroup_sock_addr(connect4)]
pub fn floor_plain4(ctx: SockAddrContext) -> i32 {
    socket::on4::<Plain>(&ctx);
    PROCEED
}

#[cgroup_sock_addr(connect6)]
pub fn floor_plain6(ctx: SockAddrContext) -> i32 {
    socket::on6::<Plain>(&ctx);
    PROCEED
}

/// Reads the headers, and does nothing about them.
#[classifier]
pub fn floor_read_tc(ctx: TcContext) -> i32 {
    translate::read(&ctx);
    TC_ACT_UNSPEC
}

/// Nothing: what is left to measure is the call of a program.
#[xdp]
pub fn floor_no_xdp(_ctx: XdpContext) -> u32 {
    XDP_PASS
}

#[classifier]
pub fn floor_no_tc(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[cgroup_sock_addr(connect4)]
pub fn floor_no_conn4(_ctx: SockAddrContext) -> i32 {
    PROCEED
}

#[cgroup_sock_addr(connect6)]
pub fn floor_no_conn6(_ctx: SockAddrContext) -> i32 {
    PROCEED
}

/// Restores a packet and hands it to the program in `floor_next_xdp`.
#[xdp]
pub fn floor_replay_x(ctx: XdpContext) -> u32 {
    replay::xdp(&ctx)
}

/// As before, with `floor_next_tc`.
#[classifier]
pub fn floor_replay_t(ctx: TcContext) -> i32 {
    replay::tc(&ctx)
}

/// Restores a packet and sends it.
#[xdp]
pub fn floor_source(ctx: XdpContext) -> u32 {
    replay::send(&ctx)
}

/// Takes packets in where they arrive.
#[xdp]
pub fn floor_sink_xdp(ctx: XdpContext) -> u32 {
    replay::take_in(&ctx).map_or(XDP_PASS, |()| XDP_DROP)
}

/// The same, for what comes past XDP.
#[classifier]
pub fn floor_sink_tc(ctx: TcContext) -> i32 {
    replay::take_in(&ctx).map_or(TC_ACT_UNSPEC, |()| TC_ACT_SHOT)
}

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
