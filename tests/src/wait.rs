//! Waiting for something to become true, never for longer than said.

use std::{
    panic,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

/// How often a condition is looked at.
const PAUSE: Duration = Duration::from_millis(3);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The payload of the unwinding that [`interrupt`] starts.
#[derive(Debug)]
pub struct Interrupted;

/// Makes every thread that waits, now or later, unwind with [`Interrupted`]:
/// its guards then remove what they made. May be called by a signal handler.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Calls [`interrupt`] on Ctrl-C, SIGTERM or SIGHUP. The second signal ends the
/// process as usual.
///
/// # Panics
/// If the kernel refuses.
pub fn interrupt_on_signals() {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    extern "C" fn handler(_signal: libc::c_int) {
        interrupt();
    }
    let handler = SigHandler::Handler(handler);
    let action = SigAction::new(handler, SaFlags::SA_RESETHAND, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler stores to an atomic and does nothing else.
        unsafe { sigaction(signal, &action) }.expect("a handler for a signal");
    }
}

/// Whether [`interrupt`] was called.
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Asks `ready` until it has an answer.
///
/// # Panics
/// If it has none within `limit`; the message says that `what` was awaited.
pub fn until<T>(what: &str, limit: Duration, ready: impl FnMut() -> Option<T>) -> T {
    attempt(limit, ready).unwrap_or_else(|| panic!("waited {limit:?} for {what}"))
}

/// As [`until`], but `None` when the time is over.
pub fn attempt<T>(limit: Duration, mut ready: impl FnMut() -> Option<T>) -> Option<T> {
    let started = Instant::now();
    loop {
        if let Some(value) = ready() {
            return Some(value);
        }
        if started.elapsed() > limit {
            return None;
        }
        pause();
    }
}

fn pause() {
    if is_interrupted() && !thread::panicking() {
        // No panic message: the user knows.
        panic::resume_unwind(Box::new(Interrupted));
    }
    thread::sleep(PAUSE);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_the_wait() {
        let mut asked = 0;
        let answer = until("the third question", Duration::from_secs(5), || {
            asked += 1;
            (asked == 3).then_some(asked)
        });
        assert_eq!(answer, 3);
    }

    #[test]
    fn a_wait_has_an_end() {
        assert_eq!(attempt(Duration::from_millis(5), || None::<()>), None);
    }
}
