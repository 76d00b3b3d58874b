//! The same packet again and again: `BPF_PROG_TEST_RUN` hands a program what the
//! run before made of the frame, and a frame that is translated already is not
//! looked at. So the headers are restored first, for the next flow.

use aya_ebpf::{
    bindings::{
        TC_ACT_SHOT,
        xdp_action::{XDP_ABORTED, XDP_TX},
    },
    programs::{TcContext, XdpContext},
};
use lb_common::checksum::fold;

use crate::{
    family::{Family, V4, V6},
    maps::{FRAME, NEXT_TC, NEXT_XDP, TAKEN},
    packet::Packet,
    shared::{WORDS, flow},
};

const UDP: u8 = 17;
/// Where the transport checksum stands in its header.
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

/// What is returned means that there was no program to call.
#[inline(always)]
pub fn xdp(ctx: &XdpContext) -> u32 {
    if restore(ctx).is_some() {
        // SAFETY: the programs in the map want nothing but a context.
        unsafe { NEXT_XDP.tail_call(ctx, 0) };
    }
    XDP_ABORTED
}

/// As [`xdp`].
#[inline(always)]
pub fn tc(ctx: &TcContext) -> i32 {
    if restore(ctx).is_some() {
        // SAFETY: as in `xdp`.
        unsafe { NEXT_TC.tail_call(ctx, 0) };
    }
    TC_ACT_SHOT
}

/// Sends the packet out of the device that the test run names.
#[inline(always)]
pub fn send(ctx: &XdpContext) -> u32 {
    match restore(ctx) {
        Some(()) => XDP_TX,
        None => XDP_ABORTED,
    }
}

/// Where packets go that are counted.
const SINK_PORT: u16 = 4002;

/// Takes in a datagram to [`SINK_PORT`], and counts it. Of IPv4 and without
/// options.
#[inline(always)]
pub fn take_in<P: Packet>(packet: &P) -> Option<()> {
    packet.make_readable(V4::PORTS + size_of::<[u16; 2]>());
    let protocol: u8 = packet.read(V4::PROTOCOL)?;
    let port: u16 = packet.read(V4::PORTS + size_of::<u16>())?;
    if (protocol, port) != (UDP, SINK_PORT.to_be()) {
        return None;
    }
    let [.., last]: [u8; 4] = packet.read(V4::DST)?;
    let count = TAKEN.get_ptr_mut(last.into())?;
    // SAFETY: all packets that are counted are on one CPU.
    unsafe { *count += 1 };
    Some(())
}

#[inline(always)]
fn restore<P: Packet>(packet: &P) -> Option<()> {
    let frame = FRAME.get_ptr_mut(0)?;
    // SAFETY: one program runs at a time, and nobody else is at the map then.
    let frame = unsafe { &mut *frame };
    let number = frame.count & frame.mask;
    frame.count = frame.count.wrapping_add(1);
    let to = packet.pointer::<[u64; WORDS]>(0)?;
    // SAFETY: `pointer` checked the bounds, and the frame of a test run has one
    // owner.
    unsafe { copy(&frame.head, to) };
    if frame.is_v6 == 0 {
        choose::<P, V4>(packet, number)
    } else {
        choose::<P, V6>(packet, number)
    }
}

/// Word by word: as a whole it would be a call of `memcpy`.
///
/// # Safety
///
/// `to` must be valid.
#[inline(always)]
unsafe fn copy(from: &[u64; WORDS], to: *mut [u64; WORDS]) {
    let [w0, w1, w2, w3, w4, w5, w6, w7, w8, w9] = *from;
    let words = to.cast::<u64>();
    for (place, word) in [w0, w1, w2, w3, w4, w5, w6, w7, w8, w9]
        .into_iter()
        .enumerate()
    {
        // SAFETY: the caller says so.
        unsafe { words.add(place).write_volatile(word) };
    }
}

/// Makes it a packet of the flow of that number.
#[inline(always)]
fn choose<P: Packet, F: Family>(packet: &P, number: u32) -> Option<()> {
    let (port, addr) = flow(number);
    let (port, addr) = (port.to_be(), addr.to_be());
    set(packet, F::DST - size_of::<u16>(), addr)?;
    set(packet, F::PORTS, port)?;
    if let Some(offset) = F::HEADER_CHECKSUM {
        add(packet, offset, addr.into())?;
    }
    let checksum = if packet.read::<u8>(F::PROTOCOL)? == UDP {
        UDP_CHECKSUM
    } else {
        TCP_CHECKSUM
    };
    add(
        packet,
        F::PORTS + checksum,
        u64::from(addr).wrapping_add(port.into()),
    )
}

/// Adds to what the checksum at `offset` is of.
#[inline(always)]
fn add<P: Packet>(packet: &P, offset: usize, sum: u64) -> Option<()> {
    let old: u16 = packet.read(offset)?;
    set(packet, offset, !fold(u64::from(!old).wrapping_add(sum)))
}

#[inline(always)]
fn set<P: Packet>(packet: &P, offset: usize, value: u16) -> Option<()> {
    let to = packet.pointer::<u16>(offset)?;
    // SAFETY: `pointer` checked the bounds, and the frame of a test run has one
    // owner.
    unsafe { *to = value };
    Some(())
}
