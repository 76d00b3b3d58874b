//! How the kernel's ticks tell programs the time.

use std::{io, sync::OnceLock, time::Duration};

use aya::sys::BpfHelper;
use lb_common::clock::Ticks;
use nix::time::{ClockId, clock_getres, clock_gettime};

use super::sys;

/// What a clock with high-resolution timers says of its precision.
const PRECISE: Duration = Duration::from_nanos(1);

/// Longer than it takes to see a tick.
const LIMIT: Duration = Duration::from_secs(1);

/// How they tell the time; `None` if they do not: without high-resolution timers they are
/// counted as they come, and some never come. Measured once, since it stays so.
///
/// # Errors
///
/// `EPERM` without the privileges to load programs.
pub(super) fn ticks() -> io::Result<Option<Ticks>> {
    static FOUND: OnceLock<Option<Ticks>> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(*found);
    }
    let precision = Duration::from(clock_getres(ClockId::CLOCK_MONOTONIC)?);
    let found = if precision == PRECISE {
        measured()?
    } else {
        None
    };
    Ok(*FOUND.get_or_init(|| found))
}

/// Their number is compared with the clock right after it has changed: for a while before
/// that it may be behind by more than one. And within a tick, or something came between.
fn measured() -> io::Result<Option<Ticks>> {
    // The precision of this clock, which has the time of the last tick, is a tick.
    let tick = Duration::from(clock_getres(ClockId::CLOCK_MONOTONIC_COARSE)?);
    let length = u32::try_from(tick.as_nanos()).unwrap_or_default();
    let counter = sys::HelperCall::new(BpfHelper::BPF_FUNC_jiffies64)?;
    let begun = now()?;
    let mut last = counter.run()?;
    loop {
        let before = now()?;
        let number = counter.run()?;
        let after = now()?;
        if number != last && after < before + tick {
            return Ok(Ticks::new(length, number, after.as_nanos() as u64));
        }
        if after > begun + LIMIT {
            return Err(io::ErrorKind::TimedOut.into());
        }
        last = number;
    }
}

fn now() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
}
