//! Time as flows keep it.

use aya_ebpf::helpers::bpf_ktime_get_ns;

/// Seconds of the monotonic clock. They fit for 136 years of uptime.
#[inline(always)]
pub fn seconds() -> u32 {
    // SAFETY: the helper takes nothing and may be called from every program.
    let nanoseconds = unsafe { bpf_ktime_get_ns() };
    #[expect(
        clippy::integer_division_remainder_used,
        reason = "the divisor is a constant, so no panic path comes of it"
    )]
    let seconds = nanoseconds / 1_000_000_000;
    seconds as u32
}
