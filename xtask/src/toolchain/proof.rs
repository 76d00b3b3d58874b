//! The proof that a toolchain works: it builds a BPF program. That takes some
//! seconds, since `core` is compiled, so the last proof is remembered.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::{TARGET, Toolchain};
use crate::{
    paths,
    process::{self, step},
};

const MANIFEST: &str = r#"[package]
name = "proof"
version = "0.0.0"
edition = "2024"

[workspace]
"#;

const LOCK: &str = r#"version = 4

[[package]]
name = "proof"
version = "0.0.0"
"#;

const PROGRAM: &str = r#"#![no_std]
#![no_main]

#[unsafe(no_mangle)]
#[unsafe(link_section = "socket")]
pub extern "C" fn proof(context: *const u8) -> u32 {
    context.is_null().into()
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
"#;

/// `EM_BPF` of the ELF header, and where that field is.
const ELF_MACHINE_BPF: [u8; 2] = 247_u16.to_le_bytes();
const ELF_MACHINE: std::ops::Range<usize> = 18..20;

/// The candidate that passed the last proof, if it has not changed since.
pub(super) fn known(candidates: &[Toolchain]) -> Option<&Toolchain> {
    let proven = fs::read_to_string(stamp().ok()?).ok()?;
    candidates
        .iter()
        .find(|candidate| candidate.identity().is_ok_and(|text| text == proven))
}

/// Builds a program with `toolchain`, and remembers that it went well.
///
/// # Errors
/// If it does not build, or is not a BPF object.
pub(super) fn prove(toolchain: &Toolchain) -> Result<()> {
    step(format_args!(
        "Trying {} with {} on a small BPF program",
        toolchain.rustc.display(),
        toolchain.linker.display()
    ));
    let identity = toolchain.identity()?;
    let folder = paths::cache()?.join("proof");
    fs::create_dir_all(folder.join("src"))?;
    fs::write(folder.join("Cargo.toml"), MANIFEST)?;
    fs::write(folder.join("Cargo.lock"), LOCK)?;
    fs::write(folder.join("src/main.rs"), PROGRAM)?;
    let target = folder.join("target");
    process::output(&mut toolchain.build(&folder, &target))?;
    let object = fs::read(target.join(TARGET).join("release/proof"))?;
    ensure!(
        object.get(ELF_MACHINE) == Some(&ELF_MACHINE_BPF),
        "what it built is no BPF object"
    );
    fs::remove_dir_all(&folder)?;
    let stamp = stamp()?;
    fs::write(&stamp, identity).with_context(|| format!("cannot write {}", stamp.display()))
}

fn stamp() -> Result<PathBuf> {
    Ok(paths::cache()?.join("bpf-toolchain.proven"))
}
