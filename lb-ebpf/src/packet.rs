//! A packet at a hook, XDP or TC: bounds-checked reading, and writing that
//! keeps the checksums true.

use core::{
    ffi::{c_long, c_void},
    hint::black_box,
};

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::{
        BPF_F_INGRESS, BPF_F_INVALIDATE_HASH, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR,
        BPF_F_RECOMPUTE_CSUM, TC_ACT_REDIRECT, bpf_adj_room_mode, xdp_action::XDP_REDIRECT,
    },
    helpers::{
        bpf_clone_redirect, bpf_csum_update, bpf_redirect, bpf_redirect_peer, bpf_skb_change_tail,
        bpf_skb_load_bytes, bpf_skb_store_bytes, bpf_xdp_get_buff_len,
    },
    programs::{TcContext, XdpContext},
};
use lb_common::{checksum::Delta, flow::EDGE_XDP, node::EARLY_BYTES};

use crate::{
    edge::{Side, Way},
    family::Family,
    parse::{L3, claimed_length},
    trace::Capture,
};

/// The kernel's `EINVAL`.
const EINVAL: c_long = 22;

/// Tells `bpf_l4_csum_replace` that the pseudo header is IPv6's, which has no
/// header checksum to balance the sum that the device reported (Linux 6.16,
/// commit ead7f9b8de65; older kernels refuse the flag).
const BPF_F_IPV6: u64 = 1 << 7;

#[unsafe(no_mangle)]
pub static HAS_XDP_FRAGS: Global<u8> = Global::new(0);

/// The mark of a frame that is only there to carry another one ("klbf"). It is
/// set for the way from a hook of a device into the same hook, and nobody else
/// sees it.
const CARRIER_MARK: u32 = 0x6b6c_6266;

/// Where a transport checksum stands and what kind it is.
#[derive(Clone, Copy)]
pub struct ChecksumField {
    pub offset: usize,
    /// UDP: 0 means "none" and stays, and a sum of 0 is written as 0xffff
    /// (RFC 768).
    pub zero_is_none: bool,
    pub ipv6: bool,
}

/// The packet could not be changed.
pub struct Refused;

pub trait Packet: Capture {
    /// Whether this hook runs before a checksum left to the device
    /// (`CHECKSUM_PARTIAL`) can be told from a finished one.
    const CHECKSUM_MAY_BE_UNFINISHED: bool;
    /// Whether this hook does only what most packets need, and leaves the rest
    /// to TC: masquerade, fragments, ICMP, answers.
    const LEAVES_RARE_TO_TC: bool;

    /// Whether each write is a call of a helper, whatever its length.
    const WRITES_CALL_HELPERS: bool;

    fn data(&self) -> usize;
    fn data_end(&self) -> usize;

    /// The context, as helpers take it.
    fn context(&self) -> *mut c_void;

    /// Index of the device whose hook this is.
    fn ifindex(&self) -> u32;

    /// Where the packet comes in, as flows note it.
    fn edge(&self) -> u32;

    /// Bytes of the whole frame, those included that [`Self::data_end`] leaves
    /// out.
    fn length(&self) -> usize;

    /// As [`Self::length`], of a packet that was parsed, and without what fills up a
    /// short frame; XDP need not call a helper for that.
    fn length_by<F: Family>(&self) -> usize;

    /// Of how many frames it consists on the wire: the kernel joins those of a
    /// flow on their way in (GRO), and splits them as late as it can (GSO).
    fn frames(&self) -> u32;

    /// Whether it is a packet of the kernel's that it will split, or has joined: of
    /// one that is too long for its IP header this has 0 for a length.
    fn is_joined(&self) -> bool;

    /// Whether the kernel keeps a VLAN's tag beside the frame, which is there to
    /// be taken off by a device above this one.
    fn is_tagged(&self) -> bool;

    /// Whether the whole frame has `length` bytes.
    #[inline(always)]
    fn reaches(&self, length: usize) -> bool {
        self.length() >= length
    }

    /// Tries to make the first `length` bytes readable. Pointers taken before
    /// are void.
    fn make_readable(&self, length: usize);

    /// Writes `value` at `offset`.
    fn write<T: Copy>(&self, offset: usize, value: T) -> Result<(), Refused>;

    /// As [`Self::write`], for bytes that no checksum of the kernel's own
    /// accounts for.
    fn patch<T: Copy>(&self, offset: usize, value: T) -> Result<(), Refused>;

    /// Tells the kernel's sum of the whole packet (`CHECKSUM_COMPLETE`), if there is
    /// one, of a change by [`Self::write`] that no checksum in the packet makes up for.
    fn account(&self, change: Delta);

    /// As [`Self::read`], through a helper where there is one: for loops, which
    /// the compiler turns into arithmetic on packet pointers that the verifier
    /// refuses.
    fn load(&self, offset: usize) -> Option<u32>;

    /// Cuts the frame off at `length`.
    fn cut(&self, length: usize) -> Result<(), Refused>;

    /// Makes room for `length` bytes between Ethernet and IP header.
    fn make_room(&self, length: usize) -> Result<(), Refused>;

    /// Has the frame leave by the device by which it came in.
    fn send_back(&self) -> Result<(), Refused>;

    /// Has the frame leave by a device.
    fn send_out(&self, ifindex: u32) -> Way;

    /// Has the frame come out of the other end of a device, past its egress
    /// hook.
    fn hand_over(&self, ifindex: u32) -> Way;

    /// Copies the whole frame; returns its length in bytes.
    fn save(&self, to: &mut [u8; EARLY_BYTES]) -> Result<u32, Refused>;

    /// Has a copy of the frame come to this hook once more, as a carrier.
    fn send_carrier(&self, side: Side) -> Result<(), Refused>;

    /// Whether the frame was sent so.
    fn is_carrier(&self) -> bool;

    /// Makes the frame another.
    fn replace(&self, by: &[u8; EARLY_BYTES], length: u32) -> Result<(), Refused>;

    /// Has the frame come to this hook once more, as no carrier.
    fn come_again(&self, side: Side) -> Result<(), Refused>;

    /// Applies `delta` to the header checksum at `offset`.
    fn fix_header_checksum(&self, offset: usize, delta: Delta) -> Result<(), Refused>;

    /// Applies both deltas to a transport checksum: the pseudo header's
    /// addresses, and the transport header itself.
    fn fix_transport_checksum(
        &self,
        field: ChecksumField,
        addresses: Delta,
        ports: Delta,
    ) -> Result<(), Refused>;

    /// The value at `offset`, if the frame reaches that far.
    ///
    /// `T` must be valid for all bytes. It may be read as aligned although it
    /// need not be: BPF code runs where the machine does not mind, and the
    /// alternative is a load per byte.
    #[inline(always)]
    fn read<T: Copy>(&self, offset: usize) -> Option<T> {
        // SAFETY: `pointer` yields only pointers to `T` within the frame.
        Some(unsafe { *self.pointer::<T>(offset)? })
    }

    /// Points at the `T` at `offset`, if the frame reaches that far. The form
    /// `start + size > end` is the one that verifiers before 5.16 get right
    /// (kernel commit 2fa7d94afc1a).
    #[inline(always)]
    fn pointer<T>(&self, offset: usize) -> Option<*mut T> {
        let start = self.data() + offset;
        if start + size_of::<T>() > self.data_end() {
            return None;
        }
        Some(start as *mut T)
    }
}

/// The way after a helper that redirects has been called: it answers with the
/// action that the program must return.
#[inline(always)]
const fn way(answer: c_long, action: u32) -> Way {
    if answer == action as c_long {
        Way::Elsewhere
    } else {
        Way::On
    }
}

/// Flags of a helper that redirects to one of the hooks of a device.
#[inline(always)]
const fn redirect_to(side: Side) -> u64 {
    match side {
        Side::In => BPF_F_INGRESS as u64,
        Side::Out => 0,
    }
}

impl Packet for XdpContext {
    const CHECKSUM_MAY_BE_UNFINISHED: bool = true;
    const LEAVES_RARE_TO_TC: bool = true;
    const WRITES_CALL_HELPERS: bool = false;

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
    fn edge(&self) -> u32 {
        self.ifindex() | EDGE_XDP
    }

    #[inline(always)]
    fn length(&self) -> usize {
        if HAS_XDP_FRAGS.load() == 0 {
            return Self::data_end(self) - Self::data(self);
        }
        // SAFETY: the context is the kernel's, and the loader sets the constant
        // only where the helper exists.
        unsafe { bpf_xdp_get_buff_len(self.ctx) as usize }
    }

    /// Most frames are in one buffer, which takes no call to tell.
    #[inline(always)]
    fn reaches(&self, length: usize) -> bool {
        Self::data_end(self) - Self::data(self) >= length
            || HAS_XDP_FRAGS.load() != 0 && self.length() >= length
    }

    #[inline(always)]
    fn length_by<F: Family>(&self) -> usize {
        let claimed = self.read(L3 + F::LENGTH);
        claimed.map_or(0, |claimed| {
            claimed_length::<Self, F>(self, claimed).wrapping_add(L3)
        })
    }

    #[inline(always)]
    fn frames(&self) -> u32 {
        1
    }

    #[inline(always)]
    fn is_joined(&self) -> bool {
        false
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        false
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
    fn patch<T: Copy>(&self, offset: usize, value: T) -> Result<(), Refused> {
        self.write(offset, value)
    }

    #[inline(always)]
    fn account(&self, _change: Delta) {}

    #[inline(always)]
    fn load(&self, offset: usize) -> Option<u32> {
        self.read(offset)
    }

    // What is answered or sent elsewhere is left to TC.
    #[inline(always)]
    fn cut(&self, _length: usize) -> Result<(), Refused> {
        Err(Refused)
    }

    #[inline(always)]
    fn make_room(&self, _length: usize) -> Result<(), Refused> {
        Err(Refused)
    }

    #[inline(always)]
    fn send_back(&self) -> Result<(), Refused> {
        Err(Refused)
    }

    #[inline(always)]
    fn send_out(&self, ifindex: u32) -> Way {
        if ifindex == self.ifindex() {
            return Way::Back;
        }
        // SAFETY: the helper takes numbers only.
        way(unsafe { bpf_redirect(ifindex, 0) }, XDP_REDIRECT)
    }

    #[inline(always)]
    fn save(&self, _to: &mut [u8; EARLY_BYTES]) -> Result<u32, Refused> {
        Err(Refused)
    }

    #[inline(always)]
    fn send_carrier(&self, _side: Side) -> Result<(), Refused> {
        Err(Refused)
    }

    #[inline(always)]
    fn is_carrier(&self) -> bool {
        false
    }

    #[inline(always)]
    fn replace(&self, _by: &[u8; EARLY_BYTES], _length: u32) -> Result<(), Refused> {
        Err(Refused)
    }

    #[inline(always)]
    fn come_again(&self, _side: Side) -> Result<(), Refused> {
        Err(Refused)
    }

    #[inline(always)]
    fn hand_over(&self, _ifindex: u32) -> Way {
        Way::On
    }

    #[inline(always)]
    fn fix_header_checksum(&self, offset: usize, delta: Delta) -> Result<(), Refused> {
        let field = self.pointer::<u16>(offset).ok_or(Refused)?;
        // SAFETY: as in `write`.
        unsafe { *field = delta.apply(*field) };
        Ok(())
    }

    #[inline(always)]
    fn fix_transport_checksum(
        &self,
        field: ChecksumField,
        addresses: Delta,
        ports: Delta,
    ) -> Result<(), Refused> {
        let to = self.pointer::<u16>(field.offset).ok_or(Refused)?;
        // SAFETY: as in `write`.
        let old = unsafe { *to };
        if field.zero_is_none && old == 0 {
            return Ok(());
        }
        let mut new = addresses.and(ports).apply(old);
        if field.zero_is_none && new == 0 {
            new = 0xffff;
        }
        // SAFETY: as in `write`.
        unsafe { *to = new };
        Ok(())
    }
}

/// The length of a frame that is kept, in a form in which every verifier sees
/// that it is neither 0 nor too much: before 6.8 it learns nothing from a
/// comparison with 0, and the compiler removes what it knows to be true.
#[inline(always)]
fn early_length(length: u32) -> Result<u32, Refused> {
    const MASK: u32 = EARLY_BYTES as u32 - 1;
    if length == 0 || length > EARLY_BYTES as u32 {
        return Err(Refused);
    }
    Ok((black_box(length.wrapping_sub(1)) & MASK) + 1)
}

impl Packet for TcContext {
    const CHECKSUM_MAY_BE_UNFINISHED: bool = false;
    const LEAVES_RARE_TO_TC: bool = false;
    const WRITES_CALL_HELPERS: bool = true;

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
    fn edge(&self) -> u32 {
        self.ifindex()
    }

    #[inline(always)]
    fn length(&self) -> usize {
        self.len() as usize
    }

    #[inline(always)]
    fn length_by<F: Family>(&self) -> usize {
        self.length()
    }

    #[inline(always)]
    fn frames(&self) -> u32 {
        // SAFETY: the context is the kernel's.
        match unsafe { (*self.skb.skb).gso_segs } {
            0 => 1,
            frames => frames,
        }
    }

    #[inline(always)]
    fn is_joined(&self) -> bool {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.skb.skb).gso_size != 0 }
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.skb.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn make_readable(&self, length: usize) {
        // Failure shows in the bounds check that follows.
        let _ = self.pull_data(length as u32);
    }

    /// Through the helper, not through a pointer: a program that stores
    /// through packet pointers makes the kernel copy the header of *every*
    /// cloned packet before it runs, those of no Service included.
    #[inline(always)]
    fn write<T: Copy>(&self, offset: usize, value: T) -> Result<(), Refused> {
        self.store(offset, &value, u64::from(BPF_F_INVALIDATE_HASH))
            .map_err(|_error| Refused)
    }

    #[inline(always)]
    fn patch<T: Copy>(&self, offset: usize, value: T) -> Result<(), Refused> {
        let flags = u64::from(BPF_F_RECOMPUTE_CSUM | BPF_F_INVALIDATE_HASH);
        self.store(offset, &value, flags).map_err(|_error| Refused)
    }

    #[inline(always)]
    fn account(&self, change: Delta) {
        // SAFETY: the context is the kernel's. It is refused where there is no sum.
        unsafe { bpf_csum_update(self.skb.skb, change.to_wsum()) };
    }

    #[inline(always)]
    fn load(&self, offset: usize) -> Option<u32> {
        Self::load(self, offset).ok()
    }

    #[inline(always)]
    fn cut(&self, length: usize) -> Result<(), Refused> {
        // SAFETY: the context is the kernel's.
        match unsafe { bpf_skb_change_tail(self.skb.skb, length as u32, 0) } {
            0 => Ok(()),
            _ => Err(Refused),
        }
    }

    #[inline(always)]
    fn make_room(&self, length: usize) -> Result<(), Refused> {
        let length = length as u16;
        self.adjust_room(length.into(), bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, 0)
            .map_err(|_error| Refused)
    }

    #[inline(always)]
    fn send_back(&self) -> Result<(), Refused> {
        match self.send_out(self.ifindex()) {
            Way::On => Err(Refused),
            Way::Back | Way::Elsewhere => Ok(()),
        }
    }

    #[inline(always)]
    fn send_out(&self, ifindex: u32) -> Way {
        // SAFETY: the helper takes numbers only.
        way(unsafe { bpf_redirect(ifindex, 0) }, TC_ACT_REDIRECT as u32)
    }

    #[inline(always)]
    fn save(&self, to: &mut [u8; EARLY_BYTES]) -> Result<u32, Refused> {
        let length = early_length(self.len())?;
        // SAFETY: the context is the kernel's, and `length` bytes fit.
        let result =
            unsafe { bpf_skb_load_bytes(self.context(), 0, to.as_mut_ptr().cast(), length) };
        if result == 0 {
            Ok(length)
        } else {
            Err(Refused)
        }
    }

    #[inline(always)]
    fn send_carrier(&self, side: Side) -> Result<(), Refused> {
        let flags = redirect_to(side);
        // SAFETY: the context is the kernel's, and the mark a field that may be
        // written.
        let result = unsafe {
            let mark = (*self.skb.skb).mark;
            (*self.skb.skb).mark = CARRIER_MARK;
            let result = bpf_clone_redirect(self.skb.skb, self.ifindex(), flags);
            (*self.skb.skb).mark = mark;
            result
        };
        if result == 0 { Ok(()) } else { Err(Refused) }
    }

    #[inline(always)]
    fn is_carrier(&self) -> bool {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.skb.skb).mark == CARRIER_MARK }
    }

    #[inline(always)]
    fn replace(&self, by: &[u8; EARLY_BYTES], length: u32) -> Result<(), Refused> {
        let length = early_length(length)?;
        self.cut(length as usize)?;
        let flags = u64::from(BPF_F_RECOMPUTE_CSUM | BPF_F_INVALIDATE_HASH);
        // SAFETY: the context is the kernel's, and `length` bytes are there.
        let stored =
            unsafe { bpf_skb_store_bytes(self.skb.skb, 0, by.as_ptr().cast(), length, flags) };
        if stored == 0 { Ok(()) } else { Err(Refused) }
    }

    #[inline(always)]
    fn come_again(&self, side: Side) -> Result<(), Refused> {
        // SAFETY: the mark is a field that may be written, and the helper takes
        // numbers only.
        let action = unsafe {
            (*self.skb.skb).mark = 0;
            bpf_redirect(self.ifindex(), redirect_to(side))
        };
        match way(action, TC_ACT_REDIRECT as u32) {
            Way::On => Err(Refused),
            Way::Back | Way::Elsewhere => Ok(()),
        }
    }

    #[inline(always)]
    fn hand_over(&self, ifindex: u32) -> Way {
        // SAFETY: the helper takes numbers only.
        way(
            unsafe { bpf_redirect_peer(ifindex, 0) },
            TC_ACT_REDIRECT as u32,
        )
    }

    #[inline(always)]
    fn fix_header_checksum(&self, offset: usize, delta: Delta) -> Result<(), Refused> {
        self.l3_csum_replace(offset, 0, u64::from(delta.to_wsum()), 0)
            .map_err(|_error| Refused)
    }

    /// The helper knows whether the checksum is finished; a pseudo header's
    /// change is the only one that an unfinished one takes.
    #[inline(always)]
    fn fix_transport_checksum(
        &self,
        field: ChecksumField,
        addresses: Delta,
        ports: Delta,
    ) -> Result<(), Refused> {
        let mangled = if field.zero_is_none {
            u64::from(BPF_F_MARK_MANGLED_0)
        } else {
            0
        };
        let pseudo = mangled | u64::from(BPF_F_PSEUDO_HDR);
        let sum = u64::from(addresses.to_wsum());
        let mut result = if field.ipv6 {
            self.l4_csum_replace(field.offset, 0, sum, pseudo | BPF_F_IPV6)
        } else {
            self.l4_csum_replace(field.offset, 0, sum, pseudo)
        };
        if field.ipv6 && result == Err(-EINVAL) {
            result = self.l4_csum_replace(field.offset, 0, sum, pseudo);
        }
        result.map_err(|_error| Refused)?;
        // Often a Service's port is its pods', too.
        if ports.is_nothing() {
            return Ok(());
        }
        self.l4_csum_replace(field.offset, 0, u64::from(ports.to_wsum()), mangled)
            .map_err(|_error| Refused)
    }
}
