//! `klb cleanup`: leaves the kernel as if klb had never run.

use std::{fs, io, path::Path};

use anyhow::Context as _;

use crate::{
    args::CleanupArgs,
    datapath::{
        attach,
        pins::{Lock, Pins},
    },
};

/// Runs `klb cleanup`. Running it again does nothing.
///
/// Device hooks are looked for in the network namespace that the command runs
/// in, which must be the agent's.
pub fn run(args: &CleanupArgs) -> anyhow::Result<()> {
    let pins = Pins::new(&args.paths.bpffs);
    let lock = if args.force {
        None
    } else {
        let lock = Lock::take(&args.paths.state_dir);
        Some(lock.context("stop the agent first, or give --force")?)
    };
    let devices = attach::detach_everything(&pins).context("detaching")?;
    let removed = pins
        .remove_all()
        .with_context(|| format!("removing {}", pins.root().display()))?;
    remove_state(&args.paths.state_dir)
        .with_context(|| format!("removing {}", args.paths.state_dir.display()))?;
    drop(lock);
    if devices + removed == 0 {
        eprintln!("klb: nothing to remove at {}", pins.root().display());
    } else {
        eprintln!(
            "klb: detached from sockets and from devices ({devices}), removed maps ({removed})"
        );
    }
    Ok(())
}

/// Removes the lock's file, and the folder if nothing else is in it.
fn remove_state(folder: &Path) -> io::Result<()> {
    for result in [fs::remove_file(Lock::path(folder)), fs::remove_dir(folder)] {
        match result.map_err(|error| error.kind()) {
            Ok(()) | Err(io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {}
            Err(kind) => return Err(kind.into()),
        }
    }
    Ok(())
}
