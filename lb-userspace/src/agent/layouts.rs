//! The task that follows up on pin folders of other layouts: of the klb that ran
//! here before an upgrade or a downgrade.
//!
//! Until this agent's maps hold everything, the other's programs serve. Then they
//! lose their frontends, and with them all that is new; what they know goes on.
//! A folder goes when its programs have had nothing to translate for a while.

use std::time::Duration;

use tokio::{
    sync::watch,
    task::block_in_place,
    time::{Instant, sleep},
};
use tracing::{info, warn};

use crate::datapath::{
    layouts,
    pins::{Pins, PinsLock},
};

/// How often it is looked whether there was anything to translate.
const LOOK: Duration = Duration::from_secs(10);
/// How long it takes until another agent is looked for once more.
const AGAIN: Duration = Duration::from_secs(1);

/// A folder of another layout.
struct Other {
    pins: Pins,
    /// Held so that no agent of that layout begins meanwhile; that one would take
    /// back what is new.
    _lock: Option<PinsLock>,
    translated: Option<u64>,
    /// When that changed last.
    since: Instant,
}

/// Runs until all others have gone. `parts` are what has to be in place before
/// they lose what is new, and `in_charge` tells that they have.
pub(super) async fn follow(
    others: Vec<Pins>,
    parts: [watch::Receiver<bool>; 2],
    in_charge: watch::Sender<bool>,
    drain: Duration,
) {
    for mut part in parts {
        // A sender that has gone takes the agent with it.
        if part.wait_for(|done| *done).await.is_err() {
            return;
        }
    }
    let mut draining = Vec::new();
    for pins in others {
        draining.push(stop_opening(pins).await);
    }
    in_charge.send_replace(true);
    while !draining.is_empty() {
        sleep(LOOK.min(drain)).await;
        draining.retain_mut(|other| block_in_place(|| goes_on(other, drain)));
    }
}

async fn stop_opening(pins: Pins) -> Other {
    let layout = layouts::name(&pins);
    let lock = loop {
        match PinsLock::take(&pins) {
            Ok(lock) => break Some(lock),
            Err(error) if pins.root().exists() => {
                warn!(layout, %error, "a klb of another layout is still there; waiting for its end");
                sleep(AGAIN).await;
            }
            // Somebody has removed it.
            Err(_) => break None,
        }
    };
    match block_in_place(|| layouts::stop_opening(&pins)) {
        Ok(frontends) => info!(layout, frontends, "taken over; its connections go on"),
        Err(error) => warn!(layout, %error, "its frontends are not removed"),
    }
    Other {
        translated: layouts::translated(&pins),
        pins,
        _lock: lock,
        since: Instant::now(),
    }
}

/// Whether the folder stays; removes it if not.
fn goes_on(other: &mut Other, drain: Duration) -> bool {
    let translated = layouts::translated(&other.pins);
    if translated != other.translated {
        other.translated = translated;
        other.since = Instant::now();
    }
    if other.since.elapsed() < drain {
        return true;
    }
    let layout = layouts::name(&other.pins);
    match layouts::remove(&other.pins) {
        Ok(()) => {
            info!(layout, "removed: it had nothing to translate any more");
            false
        }
        Err(error) => {
            warn!(layout, %error, "not removed");
            true
        }
    }
}
