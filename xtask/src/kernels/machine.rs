//! One virtual machine, from its start to its last word.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{image::Image, initramfs::MARKER};
use crate::{process, tally::Tally};

/// For a boot and all tests without hardware support, which take two to ten
/// minutes, by what else the machine does.
const LIMIT: Duration = Duration::from_secs(1500);

/// A machine that can be started.
pub(super) struct Machine {
    image: Image,
    initramfs: PathBuf,
    console: PathBuf,
}

/// How a machine's tests went.
pub(super) enum Outcome {
    Passed(Tally),
    Failed {
        tally: Tally,
        why: String,
        /// Everything that the machine said.
        console: String,
    },
}

impl Outcome {
    pub(super) fn tally(&self) -> Tally {
        match self {
            Self::Passed(tally) | Self::Failed { tally, .. } => *tally,
        }
    }
}

impl Machine {
    /// Writes the machine's files; their names begin with `base`.
    ///
    /// # Errors
    /// If that fails.
    pub(super) fn new(image: Image, initramfs: Vec<u8>, base: &Path) -> Result<Self> {
        // Not `with_extension`, which would take the end of "5.10" for one.
        let file = |end: &str| PathBuf::from(format!("{}.{end}", base.display()));
        let machine = Self {
            image,
            initramfs: file("initramfs"),
            console: file("console"),
        };
        fs::write(&machine.initramfs, initramfs)
            .with_context(|| format!("cannot write {}", machine.initramfs.display()))?;
        Ok(machine)
    }

    pub(super) fn release(&self) -> &str {
        &self.image.release
    }

    /// Boots the machine and waits until it has powered itself off.
    ///
    /// # Errors
    /// If qemu cannot be started.
    pub(super) fn run(&self) -> Result<Outcome> {
        let mut child = self.qemu()?.spawn().context("cannot run qemu")?;
        let ended = process::wait_within(&mut child, LIMIT)?.is_some();
        let console = fs::read(&self.console)?;
        let console = String::from_utf8_lossy(&console).replace('\r', "");
        Ok(judge(console, ended))
    }

    fn qemu(&self) -> Result<Command> {
        let console = File::create(&self.console)?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-display", "none", "-serial", "stdio"])
            .args(["-no-reboot", "-m", "1536", "-smp", "2"])
            // qemu 7.2 emulates `cmpxchg16b` wrongly: a third of the boots of
            // 6.12 crashed in its slab allocator, and none of 60 without it.
            .args(["-cpu", "max,cx16=off"])
            .arg("-kernel")
            .arg(&self.image.vmlinuz)
            .arg("-initrd")
            .arg(&self.initramfs)
            // A panic reboots at once, and `-no-reboot` makes that the end.
            .args(["-append", "console=ttyS0 quiet panic=-1"])
            .stdin(Stdio::null())
            .stderr(console.try_clone()?)
            .stdout(console);
        Ok(command)
    }
}

/// Reads a console from its end: the tests must have run and succeeded.
fn judge(console: String, ended: bool) -> Outcome {
    let tests = Tally::read_all(&console);
    let status = console
        .lines()
        .find_map(|line| line.strip_prefix(MARKER))
        .map(str::trim);
    let why = match (tests, status) {
        (Some(tally), Some("0")) if tally.failed == 0 => return Outcome::Passed(tally),
        (_, Some(status)) => format!("the tests ended with status {status}"),
        (_, None) if ended => "the machine went down before the tests ended".into(),
        (_, None) => format!("no end after {} s", LIMIT.as_secs()),
    };
    let mut tally = tests.unwrap_or_default();
    if tally.failed == 0 {
        tally += Tally::BROKEN;
    }
    Outcome::Failed {
        tally,
        why,
        console,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULT: &str = "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured\n";

    fn tally(console: &str, ended: bool) -> Tally {
        judge(console.into(), ended).tally()
    }

    #[test]
    fn success_needs_a_result_and_a_status() {
        let good = format!("[ 0.1] Linux\n{RESULT}{MARKER} 0\n");
        assert!(matches!(judge(good, true), Outcome::Passed(tally) if tally.passed == 2));
    }

    #[test]
    fn every_other_end_counts_as_a_failure() {
        for (console, ended) in [
            (String::new(), true),
            (String::new(), false),
            (format!("{MARKER} 0\n"), true),
            (format!("{MARKER} 127\n"), true),
            (RESULT.into(), true),
            (format!("{RESULT}{MARKER} 101\n"), true),
        ] {
            assert_eq!(tally(&console, ended).failed, 1, "{console:?}");
        }
    }
}
