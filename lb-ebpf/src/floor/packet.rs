//! A packet at a hook: reading, and writing that keeps the checksums true.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    programs::{TcContext, XdpContext},
};
use lb_common::checksum::Delta;

/// The packet could not be changed.
pub struct Refused;

pub trait Packet {
    fn data(&self) -> usize;
    fn data_end(&self) -> usize;
    fn context(&self) -> *mut c_void;
    fn ifindex(&self) -> u32;
    /// Makes the first `length` bytes readable, where they may not be.
    fn make_readable(&self, length: usize);
    fn write<T: Copy>(&self, offset: usize, value: T) -> Result<(), Refused>;
    /// Applies `delta` to the header checksum at `offset`.
    fn fix_header(&self, offset: usize, delta: Delta) -> Result<(), Refused>;
    /// Applies both deltas to the transport checksum at `offset`; UDP's may be
    /// "none".
    fn fix_transport(
        &self,
        offset: usize,
        is_udp: bool,
        address: Delta,
        port: Delta,
    ) -> Result<(), Refused>;

    /// The value at `offset`; `T` must be valid for all bytes.
    #[inline(always)]
    fn read<T: Copy>(&self, offset: usize) -> Option<T> {
        // SAFETY: `pointer` yields only pointers to `T` within the frame.
        Some(unsafe { *self.pointer::<T>(offset)? })
    }

    #[inline(always)]
    fn pointer<T>(&self, offset: usize) -> Option<*mut T> {
        let start = self.data() + offset;
        if start + size_of::<T>() > self.data_end() {
            return None;
        }
        Some(start as *mut T)
    }
}

impl Packet for XdpContext {
    #[inline(always)]
    fn data(&self) -> usize {
        Self::data(self)
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        Self::data_end(self)
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.as_ptr()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn make_readable(&self, _length: usize) {}

    #[inline(always)]
    fn write<T: Copy>(&self, offset: usize, value: T) -> Result<(), Refused> {
        let to = self.pointer::<T>(offset).ok_or(Refused)?;
        // SAFETY: `pointer` checked the bounds, and a packet under XDP has one
        // owner.
        unsafe { *to = value };
        Ok(())
    }

    #[inline(always)]
    fn fix_header(&self, offset: usize, delta: Delta) -> Result<(), Refused> {
        let old: u16 = self.read(offset).ok_or(Refused)?;
        Packet::write(self, offset, delta.apply(old))
    }

    #[inline(always)]
    fn fix_transport(
        &self,
        offset: usize,
        is_udp: bool,
        address: Delta,
        port: Delta,
    ) -> Result<(), Refused> {
        let old: u16 = self.read(offset).ok_or(Refused)?;
        if is_udp && old == 0 {
            return Ok(());
        }
        let mut new = address.and(port).apply(old);
        if is_udp && new == 0 {
            new = 0xffff;
        }
        Packet::write(self, offset, new)
    }
}

impl Packet for TcContext {
    #[inline(always)]
    fn data(&self) -> usize {
        Self::data(self)
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        Self::data_end(self)
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.as_ptr()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.skb.skb).ifindex }
    }

    #[inline(always)]
    fn make_readable(&self, length: usize) {
        let _ = self.pull_data(length as u32);
    }

    #[inline(always)]
    fn write<T: Copy>(&self, offset: usize, value: T) -> Result<(), Refused> {
        self.store(offset, &value, 0).map_err(|_error| Refused)
    }

    #[inline(always)]
    fn fix_header(&self, offset: usize, delta: Delta) -> Result<(), Refused> {
        self.l3_csum_replace(offset, 0, u64::from(delta.to_wsum()), 0)
            .map_err(|_error| Refused)
    }

    #[inline(always)]
    fn fix_transport(
        &self,
        offset: usize,
        is_udp: bool,
        address: Delta,
        port: Delta,
    ) -> Result<(), Refused> {
        let mangled = if is_udp {
            u64::from(BPF_F_MARK_MANGLED_0)
        } else {
            0
        };
        let pseudo = mangled | u64::from(BPF_F_PSEUDO_HDR);
        self.l4_csum_replace(offset, 0, u64::from(address.to_wsum()), pseudo)
            .and_then(|()| self.l4_csum_replace(offset, 0, u64::from(port.to_wsum()), mangled))
            .map_err(|_error| Refused)
    }
}
