//! The BPF toolchain: a compiler that has the source of `core` and accepts
//! unstable flags, and a bpf-linker whose LLVM reads what that compiler writes.
//!
//! The host crates do not need it; they build with the user's own toolchain,
//! which is never changed.

mod debian;
mod proof;
mod rustup;

use std::{
    env::consts,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::process::{self, step};

/// The bpf-linker that is built or downloaded where there is none.
const LINKER_VERSION: &str = "0.13.0";

/// What the object is compiled for.
pub(crate) const TARGET: &str = "bpfel-unknown-none";

/// What the cargo that runs us, or the user, sets for the host's toolchain.
const HOST_VARIABLES: &[&str] = &[
    "CARGO",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_DIR",
    "LD_LIBRARY_PATH",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// Programs that together build a BPF object.
#[derive(Clone, Debug)]
pub(crate) struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
    linker: PathBuf,
}

impl Toolchain {
    /// `cargo build` for the BPF target, in `folder`.
    pub(crate) fn build(&self, folder: &Path, target_dir: &Path) -> Command {
        let mut command = self.host_cargo();
        command
            .current_dir(folder)
            .env("CARGO_ENCODED_RUSTFLAGS", self.flags())
            .args(["build", "--locked", "--release", "-Z", "build-std=core"])
            .args(["--target", TARGET])
            .arg("--target-dir")
            .arg(target_dir);
        command
    }

    /// This toolchain's cargo, for the host.
    fn host_cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo);
        for variable in HOST_VARIABLES {
            command.env_remove(variable);
        }
        command
            .env("RUSTC", &self.rustc)
            // Unstable flags on a compiler that is not a nightly.
            .env("RUSTC_BOOTSTRAP", "1");
        command
    }

    /// What aya-build passes, and the linker's place.
    fn flags(&self) -> OsString {
        // aya-ebpf asks for the machine that the object will run on, since
        // `pt_regs` differs; its name for every 64-bit RISC-V is this one.
        let machine = match consts::ARCH {
            arch if arch.starts_with("riscv64") => "riscv64",
            arch => arch,
        };
        let mut flags = OsString::from(format!("--cfg=bpf_target_arch=\"{machine}\""));
        for flag in ["-Cdebuginfo=2", "-Clink-arg=--btf", "-Clinker="] {
            flags.push("\x1f");
            flags.push(flag);
        }
        flags.push(&self.linker);
        flags
    }

    /// Which programs these are: the same text means the same behaviour.
    ///
    /// # Errors
    /// If one of them does not run.
    fn identity(&self) -> Result<String> {
        let compiler = process::text(Command::new(&self.rustc).arg("-vV"))?;
        let linker = process::text(Command::new(&self.linker).arg("--version"))?;
        Ok(format!(
            "{}\n{compiler}{}\n{linker}",
            self.rustc.display(),
            self.linker.display()
        ))
    }
}

/// A toolchain that has been seen to build BPF: one that is there, or else a
/// new one.
///
/// # Errors
/// If there is none and none can be installed; the message says what is
/// missing, and how to get it.
pub(crate) fn ready() -> Result<Toolchain> {
    let candidates: Vec<_> = debian::find().into_iter().chain(rustup::find()).collect();
    if let Some(known) = proof::known(&candidates) {
        return Ok(known.clone());
    }
    for candidate in candidates {
        match proof::prove(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(error) => eprintln!("It does not build BPF: {error:#}"),
        }
    }
    install()
}

fn install() -> Result<Toolchain> {
    step("There is no usable BPF toolchain yet");
    let by_rustup = match proven(rustup::install) {
        Ok(toolchain) => return Ok(toolchain),
        Err(error) => error,
    };
    step(format_args!("rustup cannot provide one: {by_rustup:#}"));
    proven(debian::install).with_context(|| {
        format!(
            "there is no BPF toolchain, and none could be installed; one of these is enough\n\
             - {}\n  here: {by_rustup:#}\n\
             - Debian's packages",
            rustup::advice(),
        )
    })
}

fn proven(install: fn() -> Result<Toolchain>) -> Result<Toolchain> {
    let toolchain = install()?;
    proof::prove(&toolchain)?;
    Ok(toolchain)
}

/// Whether the standard library's source is where cargo looks for it below
/// `sysroot`.
fn has_source(sysroot: &Path) -> bool {
    sysroot
        .join("lib/rustlib/src/rust/library/Cargo.lock")
        .is_file()
}
