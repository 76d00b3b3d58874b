//! A kernel as its packages install it: the image and the modules.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::modules;
use crate::process;

/// What is a module in Debian's kernels and that a test may need.
const MODULES: [&str; 9] = [
    "veth",
    "sch_ingress",
    "cls_bpf",
    "8021q",
    "bonding",
    "nfs",
    "nfsv3",
    "sctp",
    "udp_diag",
];

/// An unpacked kernel.
pub(super) struct Image {
    /// Its full version, as `uname -r` prints it.
    pub(super) release: String,
    /// The compressed kernel that a boot loader starts.
    pub(super) vmlinuz: PathBuf,
    modules: PathBuf,
}

impl Image {
    /// Finds a kernel's parts below `root`.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn open(root: &Path) -> Result<Self> {
        let release = release(root)?;
        let modules = root.join("lib/modules").join(&release);
        let places = [
            root.join("boot").join(format!("vmlinuz-{release}")),
            modules.join("vmlinuz"),
        ];
        let vmlinuz = places
            .into_iter()
            .find(|place| place.is_file())
            .with_context(|| format!("no vmlinuz below {}", root.display()))?;
        Ok(Self {
            release,
            vmlinuz,
            modules,
        })
    }

    /// The modules that the tests need, in the order in which they have to be
    /// loaded: file name and content.
    ///
    /// # Errors
    /// If a file is missing or compressed in an unknown way.
    pub(super) fn modules(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let read = |name| {
            let file = self.modules.join(name);
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
        };
        modules::in_order(&read("modules.dep")?, &read("modules.builtin")?, &MODULES)?
            .into_iter()
            .map(|path| self.module(path))
            .collect()
    }

    fn module(&self, path: &str) -> Result<(String, Vec<u8>)> {
        let file = self.modules.join(path);
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if let Some(name) = name.strip_suffix(".xz") {
            let content = process::output(Command::new("xz").arg("-dc").arg(&file))?;
            return Ok((name.into(), content));
        }
        if !name.ends_with(".ko") {
            bail!("{} is compressed in an unknown way", file.display());
        }
        Ok((name.into_owned(), fs::read(&file)?))
    }
}

/// Unpacks a package's files into `root`.
///
/// # Errors
/// If dpkg-deb fails.
pub(super) fn unpack(package: &Path, root: &Path) -> Result<()> {
    process::output(Command::new("dpkg-deb").arg("-x").arg(package).arg(root))?;
    Ok(())
}

/// Writes `modules.dep`, which an installation makes and a package lacks.
///
/// # Errors
/// If depmod fails.
pub(super) fn index(root: &Path) -> Result<()> {
    // depmod looks below /lib; newer packages hold /usr/lib and rely on the
    // system's link.
    let lib = root.join("lib");
    if !lib.exists() {
        symlink("usr/lib", &lib)?;
    }
    let release = release(root)?;
    let depmod = process::find("depmod").context("there is no depmod")?;
    process::output(Command::new(depmod).arg("-b").arg(root).arg(release))?;
    Ok(())
}

fn release(root: &Path) -> Result<String> {
    let folder = root.join("lib/modules");
    let entry = fs::read_dir(&folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .next()
        .with_context(|| format!("no kernel in {}", folder.display()))??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}
