//! The clock that flows are stamped with: seconds of the monotonic clock.
//!
//! Programs read it for every packet of a flow. To ask the kernel for it are two calls,
//! and each return from one is a jump that some machines mispredict on purpose (AMD's
//! "Safe RET", against what is known as Inception): 13 ns of the 98 of such a packet. The
//! number of the kernel's ticks (`jiffies`) is a load.

/// Seconds of the monotonic clock, as entries have them; they fit for 136 years
/// of uptime. Within 0.07 s of the whole seconds, and without the division of 64
/// bits: a program asks for every packet.
#[inline(always)]
pub const fn seconds(nanoseconds: u64) -> u32 {
    /// Of a nanosecond, what does not count: 2²⁶ ns are 0.067 s.
    const DROPPED: u32 = 26;
    /// 2²⁶ ns in seconds, times 2²⁹.
    const FACTOR: u64 = 36_028_797;
    (((nanoseconds >> DROPPED).wrapping_mul(FACTOR)) >> 29) as u32
}

/// How ticks tell the time of the monotonic clock: with high-resolution timers the kernel
/// counts as many as have passed by that clock (`tick_do_update_jiffies64`), so that they
/// never drift apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticks {
    /// Nanoseconds from one to the next.
    pub length: u32,
    /// Number of the one at which the clock was at 0.
    pub first: u64,
}

impl Ticks {
    /// Seconds before the kernel's own count is at 2³², where it begins (`INITIAL_JIFFIES`).
    const EARLY: u64 = 300;

    /// Seconds from when the clock starts to when ticks are counted, at most: what a
    /// machine with much memory may take to come so far.
    const LATE: u64 = 600;

    /// From the lower half of their number when the clock was at `now` nanoseconds; `None`
    /// if that cannot be.
    pub fn new(length: u32, number: u32, now: u64) -> Option<Self> {
        const SECOND: u64 = 1_000_000_000;
        let passed = now.checked_div(length.into())?;
        let first = u64::from(number.wrapping_sub(passed as u32));
        let in_ticks = |seconds: u64| seconds.wrapping_mul(SECOND).checked_div(length.into());
        let latest = (1_u64 << 32).checked_sub(in_ticks(Self::EARLY)?)?;
        let earliest = latest.checked_sub(in_ticks(Self::LATE)?)?;
        // The first of all are counted as they come, and one may have been counted meanwhile.
        let latest = latest.wrapping_add(in_ticks(1)?);
        (earliest <= first && first <= latest).then_some(Self { length, first })
    }

    /// Nanoseconds of the clock at a tick.
    #[inline(always)]
    pub const fn nanoseconds(length: u32, first: u64, number: u64) -> u64 {
        number.wrapping_sub(first).wrapping_mul(length as u64)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert, proptest};

    use super::*;

    proptest! {
        #[test]
        fn seconds_are_seconds(nanoseconds in 0..u64::from(u32::MAX) * 1_000_000_000) {
            let early = seconds(nanoseconds.saturating_sub(70_000_000));
            let exact = u32::try_from(nanoseconds / 1_000_000_000).expect("in range");
            // A second in 60 years, and one where a second begins.
            let drift = exact.div_ceil(60 * 365 * 86_400) + 1;
            prop_assert!(early <= exact && exact - early <= drift, "{early}, {exact}");
        }

        #[test]
        fn time_does_not_go_back(one in 0..u64::from(u32::MAX >> 1) * 1_000_000_000, later in 0..1_u64 << 40) {
            let (early, late) = (one, one + later);
            prop_assert!(seconds(early) <= seconds(late));
        }
    }

    const LENGTHS: [u32; 4] = [10_000_000, 4_000_000, 3_333_333, 1_000_000];

    proptest! {
        /// Up to 40 years, of ticks that began up to a minute after the clock.
        #[test]
        fn ticks_tell_the_time(
            length in proptest::sample::select(LENGTHS.as_slice()),
            now in 0_u64..40 * 365 * 86_400 * 1_000_000_000,
            late in 0_u64..60_000_000_000,
        ) {
            let begun = (1 << 32) - 300_000_000_000 / u64::from(length);
            let number = begun + now / u64::from(length) - late / u64::from(length);
            let ticks = Ticks::new(length, number as u32, now).expect("plausible");
            let told = Ticks::nanoseconds(ticks.length, ticks.first, number);
            prop_assert!(told <= now && now - told < length.into(), "{told} at {now}");
        }
    }

    #[test]
    fn ticks_that_cannot_be_are_not_believed() {
        let length = 4_000_000;
        let begun = (1_u64 << 32) - 75_000;
        let now = 1_000 * u64::from(length);
        let new = |number: u64| Ticks::new(length, number as u32, now);
        assert!(new(begun + 1_000).is_some());
        assert!(new(begun + 1_250).is_some(), "a second early");
        assert!(new(begun + 1_251).is_none());
        assert!(new(begun + 1_000 - 150_000).is_some(), "ten minutes late");
        assert!(new(begun + 1_000 - 150_001).is_none());
        assert!(new(0).is_none());
        assert!(Ticks::new(0, begun as u32, now).is_none());
    }
}
