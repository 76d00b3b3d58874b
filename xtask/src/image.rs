//! The container image: one static program in an empty root.

use std::{
    env::consts::ARCH,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    apt, ebpf, paths,
    process::{self, step},
    toolchain,
};

/// What the image is called, without its version.
const NAME: &str = "localhost/klb";

/// The program is no larger than so many bytes.
const LIMIT: u64 = 20 << 20;

/// Builds the program and the image, and looks at both. The image is left in
/// `target/klb-image.tar`, as `docker save` writes it.
///
/// # Errors
/// If something is missing or does not compile, or if the image is not what it
/// should be.
pub(crate) fn build() -> Result<()> {
    set_up()?;
    ebpf::build(&toolchain::ready()?)?;
    let klb = build_program()?;
    let size = inspect_program(&klb).with_context(|| klb.display().to_string())?;
    let image = Image::build(&klb)?;
    image.inspect()?;
    let archive = image.save()?;
    step(format_args!(
        "Built {} as {}: {}, of which klb is {}",
        image.tag,
        archive.display(),
        mebibytes(fs::metadata(&archive)?.len()),
        mebibytes(size)
    ));
    Ok(())
}

/// Installs what builds an image.
///
/// # Errors
/// If something is missing and cannot be installed.
pub(crate) fn set_up() -> Result<()> {
    apt::ensure(apt::IMAGE, "the container image")
}

fn mebibytes(bytes: u64) -> String {
    let tenths = (bytes * 10) >> 20;
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

/// The release build, without a libc to look for.
fn build_program() -> Result<PathBuf> {
    step("Building a static klb");
    // With a target that is named, build scripts do not get the flags.
    let target = format!("{ARCH}-unknown-linux-gnu");
    process::run(
        process::cargo()
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            // Not in Cargo.toml, where it would go for the BPF object too.
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
            .args(["build", "--locked", "--release"])
            .args(["--package", "lb-userspace", "--bin", "klb"])
            .args(["--target", &target]),
    )?;
    Ok(paths::target().join(target).join("release/klb"))
}

/// The size in bytes of a program that may go into the image.
fn inspect_program(klb: &Path) -> Result<u64> {
    let bytes = fs::read(klb)?;
    let size = bytes.len() as u64;
    ensure!(size <= LIMIT, "{size} bytes are more than {LIMIT}");
    ensure!(
        is_static(&bytes).context("no program of this kind of machine")?,
        "it asks for an interpreter, which the image does not have"
    );
    Ok(size)
}

/// Whether an ELF program of this kind of machine runs without an interpreter
/// (no `PT_INTERP`), which is what loads shared libraries; `None` if it is none.
fn is_static(program: &[u8]) -> Option<bool> {
    const MAGIC: &[u8] = b"\x7fELF\x02\x01";
    const INTERPRETER: u32 = 3;
    let number = |at: usize, bytes: usize| {
        let mut number = [0; 8];
        number[..bytes].copy_from_slice(program.get(at..at.checked_add(bytes)?)?);
        usize::try_from(u64::from_le_bytes(number)).ok()
    };
    if !program.starts_with(MAGIC) {
        return None;
    }
    // `e_phoff`, `e_phentsize` and `e_phnum`.
    let (first, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    let mut kinds = (0..count).map(|index| number(first.checked_add(index * size)?, 4));
    kinds.try_fold(true, |is_static, kind| {
        Some(is_static && kind? != INTERPRETER as usize)
    })
}

/// An image in a storage of its own.
struct Image {
    folder: PathBuf,
    tag: String,
}

impl Image {
    fn build(klb: &Path) -> Result<Self> {
        step("Building the image");
        let image = Self {
            folder: paths::target().join("image"),
            tag: format!("{NAME}:{}", env!("CARGO_PKG_VERSION")),
        };
        if image.folder.exists() {
            fs::remove_dir_all(&image.folder)?;
        }
        let context = image.folder.join("context");
        fs::create_dir_all(&context)?;
        fs::copy(klb, context.join("klb"))?;
        let file = paths::workspace().join("Containerfile");
        process::run(
            image
                .buildah()
                // By itself, not by runc: nothing is run.
                .args(["build", "--quiet", "--isolation", "chroot"])
                .args(["--tag", &image.tag, "--file"])
                .arg(file)
                .arg(context),
        )?;
        Ok(image)
    }

    /// buildah, with nothing of its owner's.
    fn buildah(&self) -> Command {
        let mut command = Command::new("buildah");
        command
            .arg("--root")
            .arg(self.folder.join("storage"))
            .arg("--runroot")
            .arg(self.folder.join("run"))
            .args(["--storage-driver", "vfs"]);
        command
    }

    /// Nothing but klb is in it, and that runs there.
    fn inspect(&self) -> Result<()> {
        let container = process::text(self.buildah().args(["from", "--pull-never", &self.tag]))?;
        let container = container.trim();
        let result = self.inspect_container(container);
        process::output(self.buildah().args(["rm", container]))?;
        result
    }

    fn inspect_container(&self, container: &str) -> Result<()> {
        let root = process::text(self.buildah().args(["mount", container]))?;
        let root = Path::new(root.trim());
        let entries = fs::read_dir(root)?.map(|entry| Ok(entry?.file_name()));
        let entries = entries.collect::<Result<Vec<_>>>()?;
        ensure!(entries == ["klb"], "in the image is {entries:?}");
        let version = process::text(Command::new("chroot").arg(root).args(["/klb", "--version"]))?;
        let wanted = concat!("klb ", env!("CARGO_PKG_VERSION"));
        ensure!(version.trim() == wanted, "the image's klb says {version:?}");
        Ok(())
    }

    fn save(&self) -> Result<PathBuf> {
        let archive = paths::target().join("klb-image.tar");
        if archive.exists() {
            fs::remove_file(&archive)?;
        }
        let to = format!("docker-archive:{}:{}", archive.display(), self.tag);
        process::output(self.buildah().args(["push", &self.tag, &to]))?;
        Ok(archive)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program with these kinds of segments.
    fn program(kinds: &[u32]) -> Vec<u8> {
        let mut program = vec![0; 64];
        program[..6].copy_from_slice(b"\x7fELF\x02\x01");
        program[32] = 64;
        program[54] = 56;
        program[56] = kinds.len() as u8;
        for kind in kinds {
            program.extend(kind.to_le_bytes());
            program.extend([0; 52]);
        }
        program
    }

    #[test]
    fn a_program_is_static_if_nobody_has_to_load_its_libraries() {
        assert_eq!(is_static(&program(&[6, 1, 2])), Some(true));
        assert_eq!(is_static(&program(&[6, 3, 1])), Some(false));
        assert_eq!(is_static(&program(&[6, 3, 1])[..70]), None);
        assert_eq!(is_static(b"#!/bin/sh"), None);
    }

    /// The tests are linked as everything is here.
    #[test]
    fn this_program_is_not() {
        let own = fs::read("/proc/self/exe").expect("a program");
        assert_eq!(is_static(&own), Some(false));
    }
}
