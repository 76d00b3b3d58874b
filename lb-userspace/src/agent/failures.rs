//! The Services that are not in the maps as they should be, and when each is
//! tried again: by itself, so that whoever has no room costs others nothing.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use super::backoff::Retry;
use crate::{datapath::MapError, errors::Chain, model::NamespacedName};

/// What failed last, by Service.
#[derive(Debug, Default)]
pub(super) struct Failures(BTreeMap<NamespacedName, Failure>);

#[derive(Debug)]
struct Failure {
    retry: Retry,
    /// As it was logged.
    error: String,
    /// The maps have no room, which no try makes.
    is_full: bool,
}

impl Failures {
    /// A try has failed. Returns what is to be said of it, unless that was the
    /// last thing said.
    pub(super) fn failed(
        &mut self,
        service: &NamespacedName,
        error: &MapError,
        now: Instant,
    ) -> Option<String> {
        let (text, is_full) = (Chain(error).to_string(), error.is_full());
        let Some(failure) = self.0.get_mut(service) else {
            let failure = Failure {
                retry: Retry::new(now),
                error: text.clone(),
                is_full,
            };
            self.0.insert(service.clone(), failure);
            return Some(text);
        };
        failure.retry.failed(now);
        failure.is_full = is_full;
        let is_new = failure.error != text;
        failure.error.clone_from(&text);
        is_new.then_some(text)
    }

    /// The Service is as it should be, or is left as it is.
    pub(super) fn settled(&mut self, service: &NamespacedName) {
        self.0.remove(service);
    }

    /// Whose next try is due.
    pub(super) fn due(&self, now: Instant) -> impl Iterator<Item = &NamespacedName> {
        let due = self
            .0
            .iter()
            .filter(move |(_, failure)| failure.retry.due() <= now);
        due.map(|(service, _)| service)
    }

    /// When the next try is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.0.values().map(|failure| failure.retry.due()).min()
    }

    /// Those whose next try may be better.
    pub(super) fn waiting(&self) -> BTreeSet<NamespacedName> {
        let waiting = self.0.iter().filter(|(_, failure)| !failure.is_full);
        waiting.map(|(service, _)| service.clone()).collect()
    }

    /// Each with what went wrong last.
    pub(super) fn errors(&self) -> impl Iterator<Item = (&NamespacedName, &str)> {
        let failures = self.0.iter();
        failures.map(|(service, failure)| (service, failure.error.as_str()))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::{io, time::Duration};

    use super::*;

    fn error(code: i32) -> MapError {
        MapError {
            operation: "write",
            map: "klb_svc4",
            source: io::Error::from_raw_os_error(code),
        }
    }

    #[test]
    fn each_is_tried_in_its_own_time_and_told_of_once() {
        let (one, two) = (
            NamespacedName::new("default", "one"),
            NamespacedName::new("default", "two"),
        );
        let start = Instant::now();
        let after = |millis| start + Duration::from_millis(millis);
        let mut failures = Failures::default();
        assert!(failures.failed(&one, &error(libc::E2BIG), start).is_some());
        // News of it, tried at once: no reason to wait longer for the next.
        for millis in 1..100 {
            let told = failures.failed(&one, &error(libc::E2BIG), after(millis));
            assert_eq!(told, None);
        }
        assert_eq!(failures.next_due(), Some(after(100)));
        failures.failed(&two, &error(libc::EIO), after(50));
        assert_eq!(failures.due(after(120)).collect::<Vec<_>>(), [&one]);
        failures.failed(&one, &error(libc::E2BIG), after(120));
        assert_eq!(failures.due(after(160)).collect::<Vec<_>>(), [&two]);
        assert_eq!(failures.waiting(), BTreeSet::from([two.clone()]));
        failures.settled(&two);
        assert_eq!(failures.next_due(), Some(after(320)));
        assert!(
            failures
                .failed(&one, &error(libc::EIO), after(320))
                .is_some()
        );
        assert_eq!((failures.len(), failures.waiting().len()), (1, 1));
    }
}
