//! Where things are.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// The root of the repository.
pub(crate) fn workspace() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// The folder that cargo builds host crates in.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(
        || workspace().join("target"),
        |folder| workspace().join(folder),
    )
}

/// The BPF object. It does not follow `CARGO_TARGET_DIR`: lb-userspace's build
/// script has to find it too.
pub(crate) fn object() -> PathBuf {
    workspace().join("target/bpf/klb.bpf.o")
}

/// The object that the benchmark compares it to. In another folder: whatever is
/// new beside the first makes `klb` be built anew.
pub(crate) fn floor_object() -> PathBuf {
    workspace().join("target/bpf-floor/floor.bpf.o")
}

/// The release build of `klb`.
pub(crate) fn klb() -> PathBuf {
    target().join("release/klb")
}

/// What is made or downloaded once and used by every clone: the BPF linker and
/// the kernels of the matrix.
///
/// # Errors
/// If neither `XDG_CACHE_HOME` nor `HOME` is set.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => env::home_dir()
            .filter(|home| !home.as_os_str().is_empty())
            .context("neither XDG_CACHE_HOME nor HOME is set, so there is no cache folder")?
            .join(".cache"),
    };
    Ok(base.join("klb"))
}
