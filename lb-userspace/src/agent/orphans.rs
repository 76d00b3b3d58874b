//! The task that ends connected UDP sockets whose backend has gone, or that were
//! connected before their frontend came.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use futures::FutureExt as _;
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};
use tracing::{info, warn};

use crate::{
    args::SocketLb, aside::aside, datapath::kernel::KernelMaps, netns::Namespaces, termination,
};

/// A process may be in the middle of `connect()` when its backend goes: the
/// programs have chosen, and the socket is not connected yet. It is after this
/// time.
const IN_CONNECT: Duration = Duration::from_secs(1);

/// Of its time the task looks at most one part in so many. Where many sockets
/// are connected and backends go all the time, a process learns of it later.
const SHARE: u32 = 20;

/// What the task is told.
#[derive(Debug, Default)]
pub(super) struct News {
    /// Whether a socket that is connected anew is given a backend.
    serves_sockets: bool,
    told: Notify,
    begun: Mutex<BTreeSet<SocketAddr>>,
}

impl News {
    pub(super) fn new(socket_lb: SocketLb) -> Arc<Self> {
        Arc::new(Self {
            serves_sockets: socket_lb != SocketLb::Off,
            ..Self::default()
        })
    }

    /// Backends have ended.
    pub(super) fn ended(&self) {
        self.told.notify_one();
    }

    /// These have become frontends of UDP. Where sockets are not served, one that is
    /// connected to such an address loses nothing by staying so.
    pub(super) fn begun(&self, frontends: Vec<SocketAddr>) {
        if !self.serves_sockets {
            return;
        }
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        begun.extend(frontends);
        drop(begun);
        self.told.notify_one();
    }

    fn take_begun(&self) -> BTreeSet<SocketAddr> {
        std::mem::take(&mut self.begun.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Looks whenever there are news, and once more a little later; and first of all,
/// since an earlier run may have been killed before it looked.
pub(super) async fn follow(maps: KernelMaps, namespaces: Arc<Namespaces>, news: Arc<News>) {
    // For two looks: see `IN_CONNECT`.
    let mut last = BTreeSet::new();
    look_when(&news.told, || {
        let begun = news.take_begun();
        let frontends = last.union(&begun).copied().collect();
        last = begun;
        if let Err(error) = aside(|| end(&maps, &frontends, &namespaces)) {
            let error = format!("{error:#}");
            warn!(
                error,
                "connected UDP sockets stay with backends that have gone"
            );
        }
    })
    .await;
}

/// A look covers all backends that ended before it. One comes at once after a
/// rest, and the next no sooner than after the time that `connect()` takes.
async fn look_when(ended: &Notify, mut look: impl FnMut()) {
    let mut again = true;
    loop {
        let start = Instant::now();
        look();
        sleep(IN_CONNECT.max(start.elapsed() * SHARE)).await;
        let news = ended.notified().now_or_never().is_some();
        if news || again {
            again = news;
        } else {
            ended.notified().await;
            again = true;
        }
    }
}

fn end(
    maps: &KernelMaps,
    frontends: &BTreeSet<SocketAddr>,
    namespaces: &Namespaces,
) -> anyhow::Result<()> {
    let orphans = maps.orphans()?;
    let sockets = termination::terminate(&orphans, frontends, namespaces);
    let sockets = sockets.context("ending sockets")?;
    if sockets > 0 {
        info!(
            sockets,
            "ended, for their backends have gone, or they were connected before their Service came"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// When it was looked, in milliseconds from the start, until there was no
    /// reason any more; backends end at these times.
    async fn looks(ends: &[u64]) -> Vec<u64> {
        let (ended, start) = (Notify::new(), Instant::now());
        let looks = Mutex::new(Vec::new());
        let millis = || u64::try_from(start.elapsed().as_millis()).expect("short");
        let ending = async {
            for end in ends {
                sleep(Duration::from_millis(end - millis())).await;
                ended.notify_one();
            }
            sleep(Duration::from_secs(10)).await;
        };
        tokio::select! {
            () = look_when(&ended, || looks.lock().expect("looks").push(millis())) => {}
            () = ending => {}
        }
        looks.into_inner().expect("looks")
    }

    #[test]
    fn who_was_there_before_a_frontend_stays_where_sockets_are_not_served() {
        let frontend = SocketAddr::from(([10, 96, 0, 1], 53));
        for socket_lb in [SocketLb::All, SocketLb::Host, SocketLb::Off] {
            let is_served = socket_lb != SocketLb::Off;
            let news = News::new(socket_lb);
            news.begun(vec![frontend]);
            assert_eq!(news.told.notified().now_or_never().is_some(), is_served);
            assert_eq!(news.take_begun().contains(&frontend), is_served);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_at_once_and_one_more() {
        assert_eq!(looks(&[]).await, [0, 1000]);
        assert_eq!(looks(&[5500]).await, [0, 1000, 5500, 6500]);
        assert_eq!(looks(&[5500, 5600]).await, [0, 1000, 5500, 6500, 7500]);
    }

    #[tokio::test(start_paused = true)]
    async fn backends_that_go_all_the_time_cost_a_look_in_a_second() {
        let ends: Vec<_> = (500..1000).map(|n| n * 10).collect();
        let looks = looks(&ends).await;
        assert_eq!(looks, [0, 1000, 5000, 6000, 7000, 8000, 9000, 10000, 11000]);
    }
}
