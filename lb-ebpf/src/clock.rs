//! Time as flows keep it.

use aya_ebpf::{
    Global,
    helpers::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns},
};

#[unsafe(no_mangle)]
static HAS_COARSE_CLOCK: Global<u8> = Global::new(0);

/// Seconds of the monotonic clock.
#[inline(always)]
pub fn seconds() -> u32 {
    let nanoseconds = if HAS_COARSE_CLOCK.load() == 0 {
        // SAFETY: the helper takes nothing and may be called from every program.
        unsafe { bpf_ktime_get_ns() }
    } else {
        // SAFETY: as before, and the loader sets the constant only where the
        // helper exists.
        unsafe { bpf_ktime_get_coarse_ns() }
    };
    lb_common::flow::seconds(nanoseconds)
}
