//! The task that keeps the programs on the node's devices.
//!
//! A task of its own, and the only owner of the programs: a new pod's device
//! gets them at once, even while thousands of Services are being written.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use anyhow::Context as _;
use lb_common::node::{DEVICE_PEER, DEVICE_XDP, Device as Entry};
use tokio::{sync::watch, time::sleep};
use tracing::{info, warn};

use super::backoff::Backoff;
use crate::{
    datapath::{MapError, attach::Hooks, kernel::DeviceTable},
    devices::{self, Device, Edge, Role, Watcher},
    errors::Chain,
    metrics::Repairs,
    netlink::Changes,
};

/// What this task tells the others.
pub(super) struct Reports {
    /// Are told what somebody else had changed in the table of devices.
    pub repairs: Repairs,
    /// The addresses on which `NodePort`s answer.
    pub addresses: watch::Sender<BTreeSet<IpAddr>>,
    /// Set once every hook of the devices that there were at the start is
    /// attached, but for XDP where it is another layout's.
    pub attached: watch::Sender<bool>,
    /// Set once that is, too.
    pub complete: watch::Sender<bool>,
}

/// Runs until netlink fails. Without any change all is looked at again at
/// intervals.
pub(super) async fn follow(
    mut hooks: Hooks,
    mut table: DeviceTable,
    mut watcher: Watcher,
    mut in_charge: watch::Receiver<bool>,
    reports: Reports,
    verify_interval: Duration,
) -> anyhow::Result<()> {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
    let mut uplinks = None;
    let mut unservable = BTreeSet::new();
    let mut taken = false;
    loop {
        let edge = watcher.edge();
        log_uplinks(&mut uplinks, edge.devices.values());
        for device in edge.unservable.difference(&unservable) {
            warn!(device, "{}", devices::UNSERVABLE);
        }
        unservable.clone_from(&edge.unservable);
        reports.addresses.send_if_modified(|addresses| {
            let changed = *addresses != edge.addresses;
            addresses.clone_from(&edge.addresses);
            changed
        });
        let mut write = |hooks: &Hooks| {
            let mended = table.write(&with_xdp(&edge, hooks.native_xdp()))?;
            reports.repairs.count(table.name(), mended);
            Ok::<_, MapError>(())
        };
        // Before the programs: they look at it when a flow begins.
        let mut written = write(&hooks);
        let failures = hooks.apply(&edge.devices);
        if written.is_ok() {
            // Those that XDP was just put onto are told.
            written = write(&hooks);
        }
        if let Err(error) = &written {
            warn!(error = %Chain(error), "the programs do not know all devices; trying again");
        }
        for failure in &failures {
            warn!(error = %Chain(failure), "a program is not attached; trying again");
        }
        let rest = if failures.is_empty() && written.is_ok() {
            backoff.reset();
            reports.attached.send_replace(true);
            if taken {
                reports.complete.send_replace(true);
            }
            verify_interval
        } else {
            backoff.next()
        };
        // The time being over is as good a reason to look as a change.
        let changes = tokio::select! {
            changes = watcher.changed() => changes,
            () = sleep(rest) => Ok(Changes::default()),
            Ok(_) = in_charge.wait_for(|is| *is), if !taken => {
                hooks.take_charge();
                taken = true;
                Ok(Changes::default())
            }
        };
        if changes
            .context("following the node's devices and addresses")?
            .filters
        {
            hooks.forget_lost_filters();
        }
    }
}

/// The table, with the devices named that XDP can send frames to: those whose
/// driver runs klb's program, since one that can also takes frames from it, and
/// the pods' that take them anyway. Where the kernel tells which take frames, it
/// is asked.
fn with_xdp(edge: &Edge, native: &BTreeSet<u32>) -> BTreeMap<u32, Entry> {
    let mut table = edge.table.clone();
    for (index, entry) in &mut table {
        let is_native = native.contains(index);
        let takes_frames = match &edge.frame_takers {
            Some(takers) => takers.contains(index) && (is_native || entry.flags & DEVICE_PEER != 0),
            None => is_native,
        };
        if takes_frames {
            entry.flags |= DEVICE_XDP;
        }
    }
    table
}

/// Says which devices are uplinks, whenever that changes: by default they follow
/// the routes, which somebody may wonder about.
fn log_uplinks<'a>(
    logged: &mut Option<BTreeSet<String>>,
    devices: impl Iterator<Item = &'a Device>,
) {
    let uplinks: BTreeSet<String> = devices
        .filter(|device| device.role == Role::Uplink)
        .map(|device| device.name.clone())
        .collect();
    if logged.as_ref() == Some(&uplinks) {
        return;
    }
    if uplinks.is_empty() {
        warn!("no device is an uplink: nothing from outside reaches a Service; see --uplink");
    } else {
        info!(?uplinks, "uplinks");
    }
    *logged = Some(uplinks);
}
