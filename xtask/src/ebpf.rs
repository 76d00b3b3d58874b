//! The BPF objects: the one place that knows how they are built.

mod lean;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    paths,
    process::{self, step},
    toolchain::{TARGET, Toolchain},
};

/// The crate, and the programs in it that are objects: klb's, and the one that
/// the benchmark compares it to.
const PACKAGE: &str = "lb-ebpf";
const PROGRAM: &str = "klb-bpf";
const FLOOR: &str = "klb-floor";

/// Builds the object and puts it where `klb` and the tests look for it.
///
/// # Errors
/// If it does not compile.
pub(crate) fn build(toolchain: &Toolchain) -> Result<PathBuf> {
    step("Building the BPF object");
    let object = paths::object();
    build_program(toolchain, PROGRAM, &object)?;
    Ok(object)
}

/// Builds the object that the benchmark compares klb's to.
///
/// # Errors
/// If it does not compile.
pub(crate) fn build_floor(toolchain: &Toolchain) -> Result<PathBuf> {
    step("Building the floor's BPF object");
    let object = paths::floor_object();
    build_program(toolchain, FLOOR, &object)?;
    Ok(object)
}

fn build_program(toolchain: &Toolchain, program: &str, object: &Path) -> Result<()> {
    process::run(command(toolchain).args(["--bin", program]))?;
    let built = target_dir().join(TARGET).join("release").join(program);
    let bytes = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    let bytes = lean::without_dwarf(&bytes).with_context(|| built.display().to_string())?;
    // An object that is the same keeps its time, or `klb` would be built anew.
    if fs::read(object).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    if let Some(folder) = object.parent() {
        fs::create_dir_all(folder)?;
    }
    // Renamed into place: a test that loads it now sees the old or the new one.
    let fresh = object.with_extension("o.new");
    fs::write(&fresh, bytes)?;
    fs::rename(fresh, object)?;
    Ok(())
}

/// Builds every object, and takes a warning for an error.
///
/// # Errors
/// If there is a warning, or it does not compile.
pub(crate) fn check(toolchain: &Toolchain) -> Result<()> {
    // By cargo and not by `-D warnings`: other flags would compile `core` anew.
    process::run(command(toolchain).args(["--config", "build.warnings='deny'", "-Z", "warnings"]))
}

fn command(toolchain: &Toolchain) -> Command {
    let mut command = toolchain.build(paths::workspace(), &target_dir());
    command.args(["--package", PACKAGE]);
    command
}

/// A folder of its own: another compiler in the host's folder would make each
/// throw away what the other has built.
fn target_dir() -> PathBuf {
    paths::workspace().join("target/bpf-build")
}
