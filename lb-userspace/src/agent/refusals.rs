//! What is refused is counted by the kernel, and noted here now and then: so that
//! `klb status` can tell what was refused in the last minute.

use std::time::Duration;

use tokio::time::sleep;
use tracing::warn;

use crate::{datapath::kernel::Counters, record::Recorder};

/// Between two looks: what a minute is not exact by.
const PERIOD: Duration = Duration::from_secs(10);

/// Notes it for ever, and before the call returns: what is refused from then on is
/// news.
pub(super) fn follow(counters: Counters, recorder: Recorder) -> impl Future<Output = ()> {
    let mut is_known = note(&counters, &recorder, true);
    async move {
        loop {
            sleep(PERIOD).await;
            is_known = note(&counters, &recorder, is_known);
        }
    }
}

/// Whether they could be read; if not, that is said unless it was.
fn note(counters: &Counters, recorder: &Recorder, was_known: bool) -> bool {
    match counters.read_refusals() {
        Ok(counters) => recorder.counted(&counters),
        Err(error) if was_known => {
            warn!(%error, "klb status will not know what was refused");
            return false;
        }
        Err(_) => return false,
    }
    true
}
