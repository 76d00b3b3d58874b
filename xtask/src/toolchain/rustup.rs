//! A nightly of rustup with `rust-src`, and the release of bpf-linker that its
//! authors recommend for it: a static program that brings its own LLVM.

use std::{
    env,
    env::consts,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{LINKER_VERSION, Toolchain, has_source};
use crate::{
    paths,
    process::{self, step},
};

/// The nightly that is installed where there is none. A dated one, so that a
/// newer LLVM than the linker's does not arrive by itself.
const NIGHTLY: &str = "nightly-2026-06-01";

/// Every nightly with `rust-src`, with every linker that might fit.
pub(super) fn find() -> Vec<Toolchain> {
    let linkers = linkers();
    nightlies()
        .iter()
        .flat_map(|nightly| linkers.iter().map(|linker| toolchain(nightly, linker)))
        .collect()
}

/// Downloads the linker, then the compiler. In this order since the first is
/// small: where one server is out of reach, so often is the other.
///
/// # Errors
/// Without rustup, if a server is out of reach, or if a step fails.
pub(super) fn install() -> Result<Toolchain> {
    process::find("rustup").context("rustup is not installed")?;
    let linker = linker_folder()?.join("bpf-linker");
    if !linker.is_file() {
        download_linker()?;
    }
    let nightly = match dated_nightly() {
        Some(nightly) => nightly,
        None => install_nightly()?,
    };
    Ok(toolchain(&nightly, &linker))
}

/// What does the same by hand.
pub(super) fn advice() -> String {
    format!(
        "rustup toolchain install {NIGHTLY} --profile minimal --component rust-src\n    \
         and bpf-linker {LINKER_VERSION} in PATH, with that compiler's LLVM"
    )
}

fn toolchain(nightly: &Path, linker: &Path) -> Toolchain {
    Toolchain {
        cargo: nightly.join("bin/cargo"),
        rustc: nightly.join("bin/rustc"),
        linker: linker.into(),
    }
}

/// Found by looking rather than by asking rustup, which may install what it is
/// asked for.
fn nightlies() -> Vec<PathBuf> {
    let Some(toolchains) = toolchains() else {
        return Vec::new();
    };
    fs::read_dir(toolchains)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("nightly"))
        .map(|entry| entry.path())
        .filter(|folder| has_source(folder))
        .collect()
}

/// The folder's name goes on with the host's name.
fn dated_nightly() -> Option<PathBuf> {
    nightlies().into_iter().find(|folder| {
        folder
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(NIGHTLY))
    })
}

fn toolchains() -> Option<PathBuf> {
    let home = env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".rustup")))?;
    Some(home.join("toolchains"))
}

fn linkers() -> Vec<PathBuf> {
    process::find("bpf-linker")
        .into_iter()
        .chain(linker_folder().ok().map(|folder| folder.join("bpf-linker")))
        .filter(|linker| linker.is_file())
        .collect()
}

fn linker_folder() -> Result<PathBuf> {
    Ok(paths::cache()?.join(format!("bpf-linker-release-{LINKER_VERSION}")))
}

fn download_linker() -> Result<()> {
    let folder = linker_folder()?;
    let url = format!(
        "https://github.com/aya-rs/bpf-linker/releases/download/\
         v{LINKER_VERSION}/bpf-linker-{}-unknown-linux-musl.tar.zst",
        consts::ARCH
    );
    step(format_args!(
        "Downloading bpf-linker {LINKER_VERSION} to {}",
        folder.display()
    ));
    let cache = paths::cache()?;
    fs::create_dir_all(&cache)?;
    let archive = cache.join("bpf-linker.tar.zst");
    process::output(curl().arg("--output").arg(&archive).arg(url))
        .context("bpf-linker's server is out of reach")?;
    fs::create_dir_all(&folder)?;
    process::output(
        Command::new("tar")
            .args(["--zstd", "-xf"])
            .arg(&archive)
            .arg("-C")
            .arg(&folder),
    )?;
    fs::remove_file(archive)?;
    Ok(())
}

fn install_nightly() -> Result<PathBuf> {
    let server = env::var("RUSTUP_DIST_SERVER");
    let server = server.as_deref().unwrap_or("https://static.rust-lang.org");
    // rustup would try again and again.
    process::output(curl().arg(format!("{server}/dist/channel-rust-nightly.toml.sha256")))
        .context("rustup's server is out of reach")?;
    step(format_args!("Installing {NIGHTLY} with rust-src by rustup"));
    process::run(
        Command::new("rustup")
            .args(["toolchain", "install", NIGHTLY, "--profile", "minimal"])
            .args(["--component", "rust-src", "--no-self-update"]),
    )?;
    dated_nightly().context("rustup installed a nightly, but not where it was looked for")
}

fn curl() -> Command {
    let mut command = Command::new("curl");
    command
        .args(["--fail", "--silent", "--show-error", "--location"])
        .args(["--connect-timeout", "5", "--max-time", "300"]);
    command
}
