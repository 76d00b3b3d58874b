//! Debian's archive, read by apt with folders of its own: the system's package
//! sources and lists stay as they are.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};

use crate::{apt::sources, process};

/// The package that always depends on a suite's newest kernel for virtual
/// machines.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// Some suites of Debian, with their lists read.
pub(super) struct Archive {
    folder: PathBuf,
}

impl Archive {
    /// Reads the lists of `suites` into `folder`.
    ///
    /// # Errors
    /// If the mirror is out of reach, or a signature does not fit.
    pub(super) fn open(folder: &Path, suites: &[&str]) -> Result<Self> {
        for part in ["lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(folder.join(part))?;
        }
        fs::write(folder.join("status"), "")?;
        fs::write(folder.join("sources.list"), sources::list(suites))?;
        let archive = Self {
            folder: folder.into(),
        };
        process::output(archive.apt("apt-get").arg("update"))?;
        Ok(archive)
    }

    /// Downloads the packages of the newest kernel and returns their files.
    ///
    /// # Errors
    /// If the archive has no such kernel, or a download fails.
    pub(super) fn download(&self) -> Result<Vec<PathBuf>> {
        let packages = self.kernel_packages()?;
        let folder = self.folder.join("packages");
        process::output(
            self.apt("apt-get")
                .current_dir(&folder)
                .arg("download")
                .args(&packages),
        )?;
        let files: Vec<_> = fs::read_dir(&folder)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()?;
        ensure!(
            files.len() == packages.len(),
            "apt downloaded something else than {packages:?}: {files:?}"
        );
        Ok(files)
    }

    /// A kernel is one package, `linux-image-…`; since 7.x that is empty and
    /// depends on three that have the files.
    fn kernel_packages(&self) -> Result<Vec<String>> {
        let dependencies = process::text(self.apt("apt-cache").args([
            "depends",
            "--recurse",
            "--no-recommends",
            "--no-suggests",
            "--no-conflicts",
            "--no-breaks",
            "--no-replaces",
            "--no-enhances",
            META_PACKAGE,
        ]))?;
        let packages: Vec<_> = dependencies
            .lines()
            .filter(|line| is_kernel_package(line))
            .map(String::from)
            .collect();
        ensure!(
            !packages.is_empty(),
            "{META_PACKAGE} depends on no kernel in {}",
            self.folder.display()
        );
        Ok(packages)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let mut set = |option: &str, file: &Path| {
            command
                .arg("-o")
                .arg(format!("{option}={}", file.display()));
        };
        let nothing = Path::new("/dev/null");
        set("Dir::Etc::sourcelist", &self.folder.join("sources.list"));
        set("Dir::Etc::sourceparts", nothing);
        set("Dir::Etc::preferences", nothing);
        set("Dir::Etc::preferencesparts", nothing);
        set("Dir::State::lists", &self.folder.join("lists"));
        // What is installed here must not decide which version is the newest.
        set("Dir::State::status", &self.folder.join("status"));
        set("Dir::Cache", &self.folder.join("cache"));
        for option in [
            "APT::Architecture=amd64",
            // The user `_apt` cannot enter the cache folder of another user.
            "APT::Sandbox::User=root",
            "APT::Update::Error-Mode=any",
            "Acquire::Languages=none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
            // An old suite is not signed anew for ever.
            "Acquire::Check-Valid-Until=false",
        ] {
            command.args(["-o", option]);
        }
        command.arg("-q");
        command
    }
}

/// Whether a line of `apt-cache depends` names a package with a kernel's files:
/// a version follows its prefix, which a metapackage has not, and the lines
/// below a package begin with blanks.
fn is_kernel_package(line: &str) -> bool {
    let is_versioned = |prefix: &&str| {
        line.strip_prefix(*prefix)
            .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
    };
    line.ends_with("-cloud-amd64")
        && [
            "linux-image-",
            "linux-base-",
            "linux-binary-",
            "linux-modules-",
        ]
        .iter()
        .any(is_versioned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_kernels_own_packages_are_taken() {
        for line in [
            "linux-image-5.10.0-46-cloud-amd64",
            "linux-base-7.2.13+deb14-cloud-amd64",
            "linux-binary-7.2.13+deb14-cloud-amd64",
            "linux-modules-7.2.13+deb14-cloud-amd64",
        ] {
            assert!(is_kernel_package(line), "{line}");
        }
        for line in [
            META_PACKAGE,
            "  Depends: linux-image-5.10.0-46-cloud-amd64",
            "linux-base-cloud-amd64",
            "linux-image-6.1.0-50-amd64",
        ] {
            assert!(!is_kernel_package(line), "{line}");
        }
    }
}
