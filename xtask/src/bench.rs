//! `cargo xtask bench`: figures, measured on the machine it runs on.
//!
//! Timings of a busy machine say little, so nothing here passes or fails. What
//! must not get worse is a budget in a test.

mod control;

use anyhow::{Result, ensure};
use lb_tests::sweep;

use crate::{demo, process};

/// The name of all that a benchmark makes.
const NAME: &str = "klb-bench";

/// Builds the helper program and measures.
///
/// # Errors
/// If something does not build.
pub(crate) fn run() -> Result<()> {
    ensure!(process::is_root(), "network namespaces and BPF need root");
    demo::build_helper()?;
    sweep::remove(NAME);
    control::run();
    Ok(())
}
