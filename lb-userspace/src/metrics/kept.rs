//! What takes long to find out, and is asked for often.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// For so long what was found out is good enough.
const LIFE: Duration = Duration::from_secs(60);

/// A value that is found out once in a minute at most.
#[derive(Debug)]
pub(super) struct Kept<T>(Mutex<Option<(Instant, T)>>);

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T: Clone> Kept<T> {
    /// The value, as it was a minute ago or later. Two who ask at once wait for
    /// one answer.
    ///
    /// # Errors
    ///
    /// That of finding out.
    pub(super) fn get<E>(
        &self,
        now: Instant,
        find_out: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((time, value)) = &*kept
            && now.saturating_duration_since(*time) < LIFE
        {
            return Ok(value.clone());
        }
        let value = find_out()?;
        *kept = Some((now, value.clone()));
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_found_out_once_in_a_minute() {
        let kept = Kept::default();
        let start = Instant::now();
        let mut found = 0;
        let values = [0, 59, 60, 61, 130].map(|seconds| {
            let now = start + Duration::from_secs(seconds);
            kept.get(now, || {
                found += 1;
                Ok::<_, ()>(found)
            })
        });
        assert_eq!(values, [Ok(1), Ok(1), Ok(2), Ok(2), Ok(3)]);
    }

    #[test]
    fn what_cannot_be_found_out_is_asked_again() {
        let kept = Kept::default();
        let now = Instant::now();
        assert_eq!(kept.get(now, || Err("busy")), Err("busy"));
        assert_eq!(kept.get(now, || Ok::<_, &str>(1)), Ok(1));
    }
}
