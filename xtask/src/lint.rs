//! What has to be clean before anything is merged.

use anyhow::Result;

use crate::{
    ebpf,
    process::{self, step},
    toolchain,
};

/// Formatting, then clippy, then rustdoc, cheapest first.
///
/// # Errors
/// At the first that complains.
pub(crate) fn run() -> Result<()> {
    step("Formatting");
    process::run(process::cargo().args(["fmt", "--all", "--check"]))?;
    step("Clippy on the host's crates");
    clippy(&[
        "--workspace",
        "--exclude=lb-ebpf",
        "--all-targets",
        "--all-features",
    ])?;
    // clippy belongs to one compiler, and the one for BPF may have none: clippy
    // reads the crate as a program of the host, and the BPF compiler has its
    // own warnings denied.
    step("Clippy on the BPF crate");
    clippy(&["--package=lb-ebpf"])?;
    step("Warnings of the BPF compiler");
    ebpf::check(&toolchain::ready()?)?;
    step("Documentation");
    process::run(process::cargo().env("RUSTDOCFLAGS", "-D warnings").args([
        "doc",
        "--locked",
        "--workspace",
        "--no-deps",
    ]))
}

fn clippy(selection: &[&str]) -> Result<()> {
    process::run(
        process::cargo()
            .args(["clippy", "--locked"])
            .args(selection)
            .args(["--", "-D", "warnings"]),
    )
}
