//! What has to be there before something can be built or run.

use anyhow::Result;

use crate::{apt, kernels, process::step, toolchain};

/// Installs what any command needs, the kernels of the matrix included.
///
/// # Errors
/// If something is missing and cannot be installed.
pub(crate) fn everything() -> Result<()> {
    bench()?;
    browser()?;
    toolchain::ready()?;
    kernels::fetch()?;
    step("Everything is set up");
    Ok(())
}

/// Installs the tools that the demo and the tests in network namespaces use.
///
/// # Errors
/// If something is missing and cannot be installed.
pub(crate) fn network() -> Result<()> {
    apt::ensure(apt::NETWORK, "network namespaces")
}

/// Installs what looks at the dashboard in tests.
///
/// # Errors
/// If something is missing and cannot be installed.
pub(crate) fn browser() -> Result<()> {
    apt::ensure(apt::BROWSER, "the test of the dashboard in a browser")
}

/// Installs what klb is measured beside.
///
/// # Errors
/// If something is missing and cannot be installed.
pub(crate) fn bench() -> Result<()> {
    network()?;
    apt::ensure(apt::BENCH, "what klb is measured beside")
}
