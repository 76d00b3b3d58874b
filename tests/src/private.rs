//! A network namespace for one test, without the kit's cluster.

use std::{process::Command, thread};

use nix::sched::{CloneFlags, unshare};

/// Runs `body` in a network namespace without a name, which goes away with the
/// thread that it lives in.
///
/// # Panics
/// As `body` does, or if there can be none.
pub fn in_private_namespace(body: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace needs root");
        body();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` there.
///
/// # Panics
/// If it fails.
pub fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split_whitespace())
        .status()
        .expect("iproute2 is installed");
    assert!(status.success(), "ip {arguments}: {status}");
}
