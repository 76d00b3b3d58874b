//! Time as flows keep it.

use aya_ebpf::{
    Global,
    helpers::{bpf_jiffies64, bpf_ktime_get_ns},
};
use lb_common::clock::{self, Ticks};

/// [`Ticks`], as the loader found them; 0 if they do not tell the time.
#[unsafe(no_mangle)]
static TICK: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static FIRST_TICK: Global<u64> = Global::new(0);

/// Seconds of the monotonic clock.
#[inline(always)]
pub fn seconds() -> u32 {
    let length = TICK.load();
    let nanoseconds = if length == 0 {
        // SAFETY: the helper takes nothing and may be called from every program.
        unsafe { bpf_ktime_get_ns() }
    } else {
        // SAFETY: as before; the kernel compiles it into a load.
        let number = unsafe { bpf_jiffies64() };
        Ticks::nanoseconds(length, FIRST_TICK.load(), number)
    };
    clock::seconds(nanoseconds)
}
