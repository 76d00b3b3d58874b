//! What stands in the floor's own maps. The benchmark, which fills them,
//! compiles this file too.

/// Words of a frame, of 8 bytes each, that [`Frame`] restores, and the least
/// that a frame has.
pub(crate) const WORDS: usize = 10;

/// The packet that is replayed, and how many flows it stands for: the one entry
/// of `floor_frame`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    /// The first words, with a source port of 0 and a source address
    /// that ends in 16 zeros; so their checksums do not count either.
    pub(crate) head: [u64; WORDS],
    /// Packets so far: the number of the flow, before the mask.
    pub(crate) count: u32,
    /// Number of flows, a power of two, less one.
    pub(crate) mask: u32,
    /// 1 for a frame of IPv6.
    pub(crate) is_v6: u32,
    pub(crate) pad: u32,
}

/// The flow of that number: its source port, and the last 16 bits of its source
/// address. Both in host order.
#[inline(always)]
pub(crate) const fn flow(number: u32) -> (u16, u16) {
    const FIRST_PORT: u32 = 1024;
    const PORT_BITS: u32 = 15;
    let port = FIRST_PORT + (number & ((1 << PORT_BITS) - 1));
    (port as u16, (number >> PORT_BITS) as u16 + 1)
}

/// Where packets to an address go next, in `floor_way4` and `floor_way6`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Way {
    pub(crate) ifindex: u32,
    /// 1 if the packet comes out of the other end of the device, 0 if it leaves
    /// by the device and the neighbour is asked for.
    pub(crate) to_peer: u32,
}
