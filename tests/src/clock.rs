//! The clock of the programs.

use std::{fs, sync::OnceLock, time::Duration};

use lb_common::clock::Ticks;
use nix::time::{ClockId, clock_getres, clock_gettime};

/// How ticks tell the time, by the kernel's own word.
///
/// # Panics
/// If it does not tell.
pub(crate) fn ticks() -> Ticks {
    /// Clock and ticks are told one after the other, and something may come between.
    const LOOKS: usize = 5;
    static TICKS: OnceLock<Ticks> = OnceLock::new();
    *TICKS.get_or_init(|| {
        let mut looks = [(); LOOKS].map(|()| look());
        looks.sort_by_key(|ticks| ticks.first);
        looks[LOOKS / 2]
    })
}

/// Ticks by which it is the middle of a second, and stays so: each counts for a
/// nanosecond.
///
/// # Panics
/// If the kernel does not tell how many there have been.
pub(crate) fn stopped() -> Ticks {
    const SECOND: u64 = 1_000_000_000;
    let Ticks { length, first } = ticks();
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).expect("a clock"));
    let number = first + now.as_nanos() as u64 / u64::from(length);
    let time = now.as_secs() * SECOND + SECOND / 2;
    Ticks {
        length: 1,
        first: number.wrapping_sub(time),
    }
}

fn look() -> Ticks {
    let length = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).expect("a clock");
    let length = Duration::from(length).as_nanos();
    let text = fs::read_to_string("/proc/timer_list").expect("the kernel's timers");
    let (now, jiffies) = (number(&text, "now at "), number(&text, "jiffies: "));
    let length = u32::try_from(length).expect("less than a second");
    let ticks = Ticks::new(length, jiffies as u32, now);
    ticks.unwrap_or_else(|| panic!("{length} ns, {jiffies} ticks at {now} ns"))
}

/// The number behind the beginning of a line.
fn number(text: &str, beginning: &str) -> u64 {
    let mut lines = text.lines();
    let found = lines.find_map(|line| line.strip_prefix(beginning));
    let number = found.and_then(|rest| rest.split_whitespace().next());
    let number = number.and_then(|number| number.parse().ok());
    number.unwrap_or_else(|| panic!("no {beginning:?} in {text}"))
}
