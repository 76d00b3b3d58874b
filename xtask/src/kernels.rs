//! The packet tests, and one for each hook with the agent and real sockets, on
//! other kernels: Debian's, from the oldest that klb supports to the newest
//! there is, in virtual machines without a disk.
//!
//! A kernel is downloaded once. A machine gets an initramfs with a static build
//! of the tests, the BPF object, klb, the programs that the tests run and a
//! busybox, and says how it went on its serial console.

mod archive;
mod image;
mod initramfs;
mod libraries;
mod machine;
mod modules;

use std::{
    fs,
    path::PathBuf,
    process::Stdio,
    sync::{Mutex, PoisonError},
    thread,
};

use anyhow::{Context as _, Result};

use crate::{
    apt,
    kernels::{archive::Archive, image::Image, machine::Outcome},
    paths,
    process::{self, step},
    tally::Tally,
};

/// One kernel of the matrix.
struct Kernel {
    /// What it is called here, and its folder in the cache.
    name: &'static str,
    /// The suites of Debian that have it, as their cloud flavour.
    suites: &'static [&'static str],
}

const MATRIX: [Kernel; 4] = [
    Kernel {
        name: "5.10",
        suites: &["bullseye", "bullseye-security"],
    },
    Kernel {
        name: "6.1",
        suites: &["bookworm", "bookworm-security"],
    },
    Kernel {
        name: "6.12",
        suites: &["bookworm-backports"],
    },
    Kernel {
        name: "newest",
        suites: &["sid"],
    },
];

/// Machines at a time. Each has two processors, but its tests use one.
const AT_ONCE: usize = 2;

/// Installs the tools and downloads the kernels that are not there yet.
///
/// # Errors
/// If something is missing and cannot be installed.
pub(crate) fn fetch() -> Result<()> {
    apt::ensure(apt::KERNELS, "the kernel matrix")?;
    apt::ensure(apt::NETWORK, "the kernel matrix")?;
    for kernel in &MATRIX {
        kernel.fetch()?;
    }
    Ok(())
}

impl Kernel {
    /// A kernel that is there stays, also "newest"; remove the folder to get
    /// another one.
    fn fetch(&self) -> Result<()> {
        let folder = self.folder()?;
        if folder.is_dir() {
            return Ok(());
        }
        step(format_args!(
            "Downloading Debian's kernel {} ({}) to {}",
            self.name,
            self.suites.join(", "),
            folder.display()
        ));
        let scratch = folder.with_extension("partial");
        if scratch.exists() {
            fs::remove_dir_all(&scratch)?;
        }
        let archive = Archive::open(&scratch.join("apt"), self.suites)?;
        let root = scratch.join("root");
        for package in archive.download()? {
            image::unpack(&package, &root)?;
        }
        image::index(&root)?;
        fs::rename(&root, &folder)?;
        fs::remove_dir_all(&scratch)?;
        Ok(())
    }

    fn folder(&self) -> Result<PathBuf> {
        Ok(paths::cache()?.join("kernels").join(self.name))
    }
}

/// The machines, ready to start.
pub(crate) struct Matrix {
    machines: Vec<machine::Machine>,
}

impl Matrix {
    /// Builds the static tests, and an initramfs for each kernel.
    ///
    /// # Errors
    /// If the tests do not compile, or a kernel lacks something.
    pub(crate) fn build() -> Result<Self> {
        let contents = Contents {
            tests: StaticTests::build()?,
            object: paths::object(),
            klb: paths::klb(),
        };
        let scratch = paths::target().join("kernels");
        fs::create_dir_all(&scratch)?;
        let machines = MATRIX
            .iter()
            .map(|kernel| {
                let image = Image::open(&kernel.folder()?)
                    .with_context(|| format!("kernel {}", kernel.name))?;
                let archive = initramfs::build(&image, &contents)?;
                machine::Machine::new(image, archive, &scratch.join(kernel.name))
            })
            .collect::<Result<_>>()?;
        Ok(Self { machines })
    }

    /// Starts every machine and waits for all of them.
    ///
    /// # Errors
    /// If a machine cannot be started; one whose tests fail is in the tally.
    pub(crate) fn run(self) -> Result<Tally> {
        let waiting = Mutex::new(self.machines.into_iter());
        let total = Mutex::new(Tally::default());
        let work = || -> Result<()> {
            while let Some(machine) = next(&waiting) {
                let outcome = machine.run()?;
                *total.lock().unwrap_or_else(PoisonError::into_inner) += outcome.tally();
                report(machine.release(), &outcome);
            }
            Ok(())
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                worker.join().expect("a worker does not panic")?;
            }
            Ok::<_, anyhow::Error>(())
        })?;
        Ok(total.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

fn next<T>(queue: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).next()
}

fn report(release: &str, outcome: &Outcome) {
    match outcome {
        Outcome::Passed(tally) => println!("kernel {release}: {tally}"),
        Outcome::Failed {
            tally,
            why,
            console,
        } => {
            println!("{console}\nkernel {release}: {tally}: {why}");
        }
    }
}

/// The tests, and what they run, as files that need nothing else.
struct StaticTests {
    packet: PathBuf,
    netns: PathBuf,
    helper: PathBuf,
}

impl StaticTests {
    fn build() -> Result<Self> {
        let messages = process::text(
            process::cargo()
                .env("RUSTFLAGS", "-C target-feature=+crt-static")
                .args(["test", "--locked", "--release", "--no-run"])
                .args(["--package=lb-tests", "--features=packet,netns"])
                .args(["--test=packet", "--test=netns"])
                // With a target that is named, build scripts do not get the flags.
                .args(["--target", TARGET])
                .args(["--message-format", "json-render-diagnostics"])
                .stderr(Stdio::inherit()),
        )?;
        let messages: Vec<_> = messages
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .collect();
        let executable = |name: &str| {
            let mut built = messages.iter().filter(|it| it["target"]["name"] == name);
            built
                .find_map(|message| message["executable"].as_str().map(PathBuf::from))
                .with_context(|| format!("cargo built {name}, but names no executable"))
        };
        Ok(Self {
            packet: executable("packet")?,
            netns: executable("netns")?,
            helper: executable("klb-traffic")?,
        })
    }
}

/// What every machine gets.
struct Contents {
    tests: StaticTests,
    object: PathBuf,
    klb: PathBuf,
}

/// What the machines are: Debian's amd64.
const TARGET: &str = "x86_64-unknown-linux-gnu";
