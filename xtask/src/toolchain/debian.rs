//! Debian's newest compiler (the packages that build its web browsers), and a
//! bpf-linker built against the LLVM of that compiler.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{LINKER_VERSION, Toolchain, has_source};
use crate::{
    apt, paths,
    process::{self, step},
};

/// The LLVM of `rustc-web`; [`apt::BPF`] names its package.
const LLVM: &str = "llvm-22";

/// The toolchain, if all of it is there.
pub(super) fn find() -> Option<Toolchain> {
    let toolchain = toolchain().ok()?;
    let complete = has_source(Path::new("/usr"))
        && toolchain.cargo.is_file()
        && toolchain.rustc.is_file()
        && linker_is_current(&toolchain.linker);
    complete.then_some(toolchain)
}

/// Installs what is missing of it.
///
/// # Errors
/// Off Debian, without root where packages are missing, or if a step fails.
pub(super) fn install() -> Result<Toolchain> {
    apt::ensure(apt::BPF, "the BPF toolchain")?;
    let toolchain = toolchain()?;
    if !linker_is_current(&toolchain.linker) {
        build_linker(&toolchain)?;
    }
    Ok(toolchain)
}

fn toolchain() -> Result<Toolchain> {
    Ok(Toolchain {
        cargo: "/usr/bin/cargo".into(),
        rustc: "/usr/bin/rustc".into(),
        linker: linker_folder()?.join("bin/bpf-linker"),
    })
}

fn linker_folder() -> Result<PathBuf> {
    Ok(paths::cache()?.join("bpf-linker"))
}

fn linker_is_current(linker: &Path) -> bool {
    process::text(Command::new(linker).arg("--version"))
        .is_ok_and(|version| version.trim_end() == format!("bpf-linker {LINKER_VERSION}"))
}

fn build_linker(toolchain: &Toolchain) -> Result<()> {
    let folder = linker_folder()?;
    step(format_args!(
        "Building bpf-linker {LINKER_VERSION} against {LLVM} in {} (a minute or two)",
        folder.display()
    ));
    let mut command = toolchain.host_cargo();
    command
        // Without this the build finds whichever LLVM comes first in PATH.
        .env("LLVM_PREFIX", format!("/usr/lib/{LLVM}"))
        .args(["install", "bpf-linker", "--locked", "--force"])
        .args(["--version", LINKER_VERSION])
        .args(["--no-default-features", "--features", LLVM])
        .arg("--root")
        .arg(&folder);
    process::run(&mut command).context("bpf-linker could not be built")
}
