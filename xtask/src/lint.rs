//! What has to be clean before anything is merged.

use anyhow::{Result, bail};

use crate::{
    ebpf,
    process::{self, step},
    toolchain,
};

type Check = fn() -> Result<()>;

/// Cheapest first.
const CHECKS: [(&str, Check); 5] = [
    ("Formatting", formatting),
    ("Clippy on the host's crates", clippy_on_host),
    ("Clippy on the BPF crate", clippy_on_bpf),
    ("Warnings of the BPF compiler", bpf_compiler),
    ("Documentation", documentation),
];

/// Runs every check, also after one that complains.
///
/// # Errors
/// If one complains, or the BPF toolchain cannot be set up.
pub(crate) fn run() -> Result<()> {
    let mut complaints = Vec::new();
    for (name, check) in CHECKS {
        step(name);
        if let Err(error) = check() {
            eprintln!("error: {error:#}");
            complaints.push(name);
        }
    }
    if !complaints.is_empty() {
        bail!("not clean: {}", complaints.join(", "));
    }
    Ok(())
}

fn formatting() -> Result<()> {
    process::run(process::cargo().args(["fmt", "--all", "--check"]))
}

fn clippy_on_host() -> Result<()> {
    clippy(&[
        "--workspace",
        "--exclude=lb-ebpf",
        "--all-targets",
        "--all-features",
    ])
}

/// As a program of the host: clippy belongs to one compiler, and the one for
/// BPF may have none.
fn clippy_on_bpf() -> Result<()> {
    clippy(&["--package=lb-ebpf"])
}

fn bpf_compiler() -> Result<()> {
    ebpf::check(&toolchain::ready()?)
}

fn documentation() -> Result<()> {
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
