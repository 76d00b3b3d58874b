//! The servers and clients of the demo and of the benchmarks.

use std::path::PathBuf;

use anyhow::Result;

use crate::{paths, process};

/// Builds `klb-traffic`.
///
/// # Errors
/// If it does not compile.
pub(crate) fn build_helper() -> Result<()> {
    process::step("Building klb-traffic, the servers and clients");
    process::run(process::cargo().args([
        "build",
        "--locked",
        "--release",
        "--package=lb-tests",
        "--bin=klb-traffic",
    ]))
}

/// Where [`build_helper`] puts it.
pub(crate) fn helper() -> PathBuf {
    paths::target().join("release/klb-traffic")
}
