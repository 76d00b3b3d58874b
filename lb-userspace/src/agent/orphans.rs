//! The task that ends connected UDP sockets whose backend has gone.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{sync::Notify, task::block_in_place, time::sleep};
use tracing::{info, warn};

use crate::{datapath::kernel::KernelMaps, netns::Namespaces, termination};

/// A process may be in the middle of `connect()` when its backend goes: the
/// programs have chosen, and the socket is not connected yet. It is after this
/// time.
const IN_CONNECT: Duration = Duration::from_secs(1);

/// Looks whenever backends have ended, and once more a little later; and first
/// of all, since an earlier run may have been killed before it looked.
pub(super) async fn follow(maps: KernelMaps, namespaces: Arc<Namespaces>, ended: Arc<Notify>) {
    let mut again = true;
    loop {
        if let Err(error) = block_in_place(|| end(&maps, &namespaces)) {
            let error = format!("{error:#}");
            warn!(
                error,
                "connected UDP sockets stay with backends that have gone"
            );
        }
        tokio::select! {
            () = ended.notified() => again = true,
            () = sleep(IN_CONNECT), if again => again = false,
        }
    }
}

fn end(maps: &KernelMaps, namespaces: &Namespaces) -> anyhow::Result<()> {
    let orphans = maps.orphans()?;
    let sockets = termination::terminate(&orphans, namespaces).context("ending sockets")?;
    if sockets > 0 {
        info!(sockets, "ended, for their backends have gone");
    }
    Ok(())
}
