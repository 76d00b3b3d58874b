//! Where Debian's packages come from: the mirrors that the system uses, for
//! suites that it may not use.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use crate::process;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The suite of Debian that this is, such as `bookworm`.
///
/// # Errors
/// If the system does not say.
pub(crate) fn codename() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release")?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    codename
        .map(str::to_owned)
        .context("/etc/os-release names no suite")
}

/// The lines of a `sources.list` for some suites.
pub(crate) fn list(suites: &[&str]) -> String {
    let mirrors = Mirrors::of_the_system().unwrap_or_default();
    let line = |suite: &&str| {
        let mirror = if suite.ends_with("-security") {
            &mirrors.security
        } else {
            &mirrors.main
        };
        format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n")
    };
    suites.iter().map(line).collect()
}

/// Where Debian's packages come from.
#[derive(Debug, PartialEq, Eq)]
struct Mirrors {
    main: String,
    security: String,
}

impl Default for Mirrors {
    fn default() -> Self {
        Self {
            main: "http://deb.debian.org/debian".into(),
            security: "http://deb.debian.org/debian-security".into(),
        }
    }
}

impl Mirrors {
    fn of_the_system() -> Result<Self> {
        let codename = codename()?;
        let targets = process::text(Command::new("apt-get").args([
            "indextargets",
            "--format=$(RELEASE) $(REPO_URI)",
            "Created-By: Packages",
        ]))?;
        Ok(Self::read(&targets, &codename))
    }

    /// Reads lines of a suite and its mirror each.
    fn read(targets: &str, codename: &str) -> Self {
        let mirror = |suite: &str| {
            targets
                .lines()
                .filter_map(|line| line.split_once(' '))
                .find(|(release, _)| *release == suite)
                .map(|(_, mirror)| mirror.to_owned())
        };
        let known = Self::default();
        Self {
            main: mirror(codename).unwrap_or(known.main),
            security: mirror(&format!("{codename}-security")).unwrap_or(known.security),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirrors_are_those_of_the_systems_own_suite() {
        let targets = "nodistro https://example.com/node/\n\
                       bookworm http://mirror.example/debian/\n\
                       bookworm-security http://mirror.example/security/\n";
        let expected = Mirrors {
            main: "http://mirror.example/debian/".into(),
            security: "http://mirror.example/security/".into(),
        };
        assert_eq!(Mirrors::read(targets, "bookworm"), expected);
    }

    #[test]
    fn without_a_mirror_of_its_own_the_system_uses_debians() {
        assert_eq!(Mirrors::read("", "noble"), Mirrors::default());
    }
}
