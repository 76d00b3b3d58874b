//! What happens so seldom that it is worth a lookup only where it has happened
//! lately: noted by a hash of the packet that it concerns, or by a number of its own.
//! What has the same hash costs a lookup in vain.

use lb_common::node::RARE_BITS;

use crate::maps::RARE;

/// Notes that it has happened, at a second of the monotonic clock.
#[inline(always)]
pub fn note(hash: u32, now: u32) {
    if let Some(last) = entry(hash) {
        // SAFETY: one store of a number, of which every later one will do.
        unsafe { *last = now };
    }
}

/// Whether it has happened within so many seconds before.
#[inline(always)]
pub fn is_noted(hash: u32, now: u32, within: u32) -> bool {
    let Some(last) = entry(hash) else {
        return false;
    };
    // SAFETY: one load of a number.
    let last = unsafe { *last };
    // Signed: another CPU's time may be later than this one's.
    last != 0 && now.wrapping_sub(last).cast_signed() <= within.cast_signed()
}

#[inline(always)]
fn entry(hash: u32) -> Option<*mut u32> {
    let mixed = hash.wrapping_mul(0x9e37_79b1);
    RARE.get_ptr_mut(mixed >> (u32::BITS - RARE_BITS))
}
