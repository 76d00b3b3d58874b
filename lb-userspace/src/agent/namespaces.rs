//! The task that tells the socket programs whose network namespace is which
//! pod's.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use lb_common::node::{NETNS_OPTED_OUT, Netns};
use tokio::{
    sync::watch,
    task::block_in_place,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::backoff::Backoff;
use crate::{
    datapath::kernel::NetnsTable,
    errors::Chain,
    metrics::Repairs,
    netlink::Monitor,
    netns::{Namespaces, Pod, words},
};

/// A pod's device and its addresses come one by one: how long they are gathered
/// before its namespace is looked at.
const GATHER: Duration = Duration::from_millis(50);

/// After so long all is looked at again, should the kernel have kept a change to
/// itself.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// Runs until netlink fails. `known` is set once the first pods are in the
/// table.
pub(super) async fn follow(
    namespaces: Arc<Namespaces>,
    mut table: NetnsTable,
    mut opted_out: watch::Receiver<Option<BTreeSet<IpAddr>>>,
    known: watch::Sender<bool>,
    repairs: Repairs,
) -> anyhow::Result<()> {
    let monitor = open_monitor().context("following the devices of pods")?;
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
    // What an earlier run knew of those who opted out stays until this run does.
    while opted_out.borrow_and_update().is_none() {
        opted_out.changed().await.context(NOBODY)?;
    }
    loop {
        let pods = block_in_place(|| namespaces.pods());
        let entries = entries(
            &pods,
            &opted_out.borrow_and_update().clone().unwrap_or_default(),
        );
        debug!(pods = pods.len(), "network namespaces");
        let rest = match table.write(&entries) {
            Ok(mended) => {
                repairs.count(table.name(), mended);
                backoff.reset();
                known.send_replace(true);
                LONGEST_REST
            }
            Err(error) => {
                warn!(error = %Chain(&error), "the programs do not know all pods; trying again");
                backoff.next()
            }
        };
        tokio::select! {
            changes = timeout(rest, monitor.changed()) => if let Ok(changes) = changes {
                changes?;
                sleep(GATHER).await;
                monitor.forget()?;
            },
            changed = opted_out.changed() => changed.context(NOBODY)?,
        }
    }
}

const NOBODY: &str = "nobody tells who opted out";

/// Without the privilege to hear of other namespaces only what happens on the
/// node's side is followed at once.
fn open_monitor() -> std::io::Result<Monitor> {
    Monitor::open_beyond().or_else(|error| {
        warn!(%error, "changes of pods' addresses are seen late (CAP_NET_BROADCAST)");
        Monitor::open(None)
    })
}

/// What the table should hold. Where the kernel has no cookies, nothing.
fn entries(pods: &[Pod], opted_out: &BTreeSet<IpAddr>) -> BTreeMap<[u32; 2], Netns> {
    let entries = pods.iter().filter_map(|pod| {
        let is_out = !pod.addresses.is_disjoint(opted_out);
        let entry = Netns {
            addr4: pod.sources.addr4,
            addr6: pod.sources.addr6,
            flags: if is_out { NETNS_OPTED_OUT } else { 0 },
        };
        Some((words(pod.cookie?), entry))
    });
    entries.collect()
}

#[cfg(test)]
mod tests {
    use lb_common::{Addr4, node::Device};

    use super::*;

    #[test]
    fn a_pod_is_known_by_cookie_and_opts_out_by_address() {
        let pod = |last: u8, cookie| Pod {
            cookie,
            addresses: BTreeSet::from([[10, 244, 0, last].into()]),
            sources: Device {
                addr4: Addr4 {
                    octets: [10, 244, 0, last],
                },
                ..Device::default()
            },
        };
        let pods = [pod(5, Some(0x1_0000_0007)), pod(6, Some(8)), pod(7, None)];
        let entries = entries(&pods, &BTreeSet::from([[10, 244, 0, 6].into()]));
        let entry = |last: u8, flags| Netns {
            addr4: pods[usize::from(last - 5)].sources.addr4,
            flags,
            ..Netns::default()
        };
        let expected = BTreeMap::from([([7, 1], entry(5, 0)), ([8, 0], entry(6, NETNS_OPTED_OUT))]);
        assert_eq!(entries, expected);
    }
}
