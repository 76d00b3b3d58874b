//! How long to wait before trying again.

use std::time::Duration;

use tokio::time::Instant;

/// Doubles from one failure to the next, up to a limit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backoff {
    first: Duration,
    limit: Duration,
    next: Duration,
}

impl Backoff {
    pub(super) const fn new(first: Duration, limit: Duration) -> Self {
        Self {
            first,
            limit,
            next: first,
        }
    }

    /// The wait after another failure.
    pub(super) fn next(&mut self) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(self.limit);
        wait
    }

    /// To be called after a success.
    pub(super) const fn reset(&mut self) {
        self.next = self.first;
    }
}

/// When to do something again that failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retry {
    backoff: Backoff,
    due: Instant,
}

impl Retry {
    /// It has failed for the first time.
    pub(super) fn new(now: Instant) -> Self {
        let mut this = Self {
            backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(30)),
            due: now,
        };
        this.failed(now);
        this
    }

    /// It has failed again. A try that was made before it was due, for another
    /// reason, changes nothing.
    pub(super) fn failed(&mut self, now: Instant) {
        if now >= self.due {
            self.due = now + self.backoff.next();
        }
    }

    pub(super) const fn due(&self) -> Instant {
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_limit_and_start_anew() {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_millis(300));
        let waits: Vec<u128> = (0..5).map(|_| backoff.next().as_millis()).collect();
        assert_eq!(waits, [50, 100, 200, 300, 300]);
        backoff.reset();
        assert_eq!(backoff.next().as_millis(), 50);
    }
}
