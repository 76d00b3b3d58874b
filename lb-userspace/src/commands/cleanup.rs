//! `klb cleanup`: leaves the kernel as if klb had never run.

use std::{
    fs, io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use lb_common::{
    flow::State,
    node::{Config, Network},
};

use super::{open_maps, print_text};
use crate::{
    args::CleanupArgs,
    datapath::{
        MapError, Maps as _, attach,
        kernel::{Flow, KernelMaps},
        layouts,
        pins::{Lock, LockError, Pins, PinsLock},
    },
    kube_proxy::{Leftovers, process},
    record::Record,
    sysctl::Reservation,
};

/// Runs `klb cleanup`. Running it again does nothing.
///
/// Device hooks are looked for in the network namespace that the command runs
/// in, which must be the agent's.
pub fn run(args: &CleanupArgs) -> anyhow::Result<()> {
    if args.kube_proxy {
        return of_kube_proxy(args);
    }
    let pins = args.paths.pins();
    let locks = if args.force {
        None
    } else {
        let locks = take_locks(&args.paths.state_dir, &pins);
        Some(locks.context("stop the agent first, or give --force")?)
    };
    if args.drain && pins.root().exists() {
        drain(&pins, Duration::from_secs(args.timeout.into())).context("draining")?;
    }
    for other in layouts::others(&pins).context("listing other layouts")? {
        layouts::remove(&other).with_context(|| format!("removing {}", other.root().display()))?;
    }
    let devices = attach::detach_everything(&pins).context("detaching")?;
    let removed = pins
        .remove_all()
        .with_context(|| format!("removing {}", pins.root().display()))?;
    Reservation::new(&args.paths.state_dir)
        .release()
        .context("giving the masquerade ports back")?;
    Record::remove(&args.paths.state_dir)
        .and_then(|()| remove_state(&args.paths.state_dir))
        .with_context(|| format!("removing {}", args.paths.state_dir.display()))?;
    drop(locks);
    if devices + removed == 0 {
        eprintln!("klb: nothing to remove at {}", pins.root().display());
    } else {
        eprintln!(
            "klb: detached from sockets and from devices ({devices}), removed maps ({removed})"
        );
    }
    Ok(())
}

/// Runs `klb cleanup --kube-proxy`.
fn of_kube_proxy(args: &CleanupArgs) -> anyhow::Result<()> {
    let leftovers = Leftovers::find()?;
    for kept in leftovers.kept() {
        eprintln!("klb: stays: {kept}");
    }
    let harm = leftovers.harm()?;
    for harm in &harm {
        eprintln!("klb: {harm}");
    }
    if args.dry_run {
        return print_text(&leftovers.to_string());
    }
    if let Some(sign) = process::find().filter(|_| !args.force) {
        bail!("{sign}, and would write its rules anew: uninstall it first, or give --force");
    }
    if leftovers.is_empty() {
        eprintln!("klb: nothing of kube-proxy's is here");
        return Ok(());
    }
    if !harm.is_empty() && !args.force {
        bail!("nothing was removed: wait until these have ended, and give --force");
    }
    leftovers.remove()?;
    for removed in leftovers.summary() {
        eprintln!("klb: removed {removed}");
    }
    if !args.paths.pins().root().exists() {
        eprintln!("klb: nothing of klb is here either: nobody serves Services on this node");
    }
    Ok(())
}

/// Of the state and of the pins: an agent with another `--state-dir` has the
/// second one only.
fn take_locks(state_dir: &Path, pins: &Pins) -> Result<(Lock, Option<PinsLock>), LockError> {
    let lock = Lock::take(state_dir)?;
    let pins_lock = pins.root().exists().then(|| PinsLock::take(pins));
    Ok((lock, pins_lock.transpose()?))
}

/// Hands new connections over to whoever comes behind klb, kube-proxy say, and
/// waits until klb's own have ended.
///
/// Only those of TCP and SCTP are waited for, which would break otherwise: a
/// datagram is translated by who is there when it comes.
fn drain(pins: &Pins, limit: Duration) -> anyhow::Result<()> {
    const PAUSE: Duration = Duration::from_millis(200);
    attach::detach_sockets(pins)?;
    let mut maps = open_maps(pins)?;
    remove_frontends(&mut maps)?;
    let started = Instant::now();
    let mut shown = None;
    loop {
        let left = maps.flows()?.iter().filter(|flow| holds_up(flow)).count();
        if left == 0 {
            return Ok(());
        }
        if started.elapsed() >= limit {
            eprintln!("klb: the time is over; connections that break now: {left}");
            return Ok(());
        }
        if shown.replace(left) != Some(left) {
            eprintln!("klb: connections left: {left}");
        }
        thread::sleep(PAUSE);
    }
}

/// No packet begins a flow any more, nor is one refused.
fn remove_frontends(maps: &mut KernelMaps) -> Result<(), MapError> {
    let config = Config {
        cluster_net4: Network::default(),
        cluster_net6: Network::default(),
        ..maps.config()?
    };
    maps.set_config(&config)?;
    let frontends = maps.services()?.into_keys();
    frontends
        .into_iter()
        .try_for_each(|frontend| maps.delete_service(frontend))
}

/// Whether the two ends of a flow have still something to say, by a protocol
/// that needs every segment to be translated in the same way.
fn holds_up(flow: &Flow) -> bool {
    matches!(
        flow.state,
        State::Opening | State::Established | State::HalfClosed
    )
}

/// Removes the lock's file, and the folder if nothing else is in it. In a
/// container it is a mount in a root that nobody can write to, and stays.
fn remove_state(folder: &Path) -> io::Result<()> {
    for result in [fs::remove_file(Lock::path(folder)), fs::remove_dir(folder)] {
        match result.map_err(|error| error.kind()) {
            Ok(())
            | Err(
                io::ErrorKind::NotFound
                | io::ErrorKind::DirectoryNotEmpty
                | io::ErrorKind::ResourceBusy
                | io::ErrorKind::ReadOnlyFilesystem,
            ) => {}
            Err(kind) => return Err(kind.into()),
        }
    }
    Ok(())
}
