//! Every level of tests: first all is built, then level after level runs,
//! whatever the one before it said.

use std::{
    env,
    io::{self, BufRead as _, BufReader, IsTerminal as _},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use crate::{
    ebpf, image, kernels, paths,
    process::{self, step},
    release, setup,
    tally::{Table, Tally},
    toolchain,
};

/// What the command line can ask for.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Selection {
    /// Pure code on the host
    Unit,
    /// Single packets through the real object (root)
    Packet,
    /// Real sockets in network namespaces (root)
    Netns,
    /// The agent from manifests to maps (root)
    Agent,
    /// The packet tests and one for each hook on other kernels, in virtual
    /// machines
    Kernels,
    /// The container image
    Image,
    /// Every level, `kernels` and `image` included
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Unit,
    Packet,
    Netns,
    Agent,
    Kernels,
    Image,
}

/// The cargo features that open the levels for root. Always all of them: each
/// other set would compile the test kit again.
const ROOT_FEATURES: &str = "--features=lb-tests/packet,lb-tests/netns,lb-tests/agent";

/// Names the kubeconfig of a cluster that tests may use.
const KUBECONFIG: &str = "KLB_TEST_KUBECONFIG";

impl Level {
    const ALL: [Self; 6] = [
        Self::Unit,
        Self::Packet,
        Self::Netns,
        Self::Agent,
        Self::Kernels,
        Self::Image,
    ];

    fn selected(selection: Option<Selection>) -> Vec<Self> {
        let one = match selection {
            None => {
                return Self::ALL
                    .into_iter()
                    .filter(|level| !level.is_long())
                    .collect();
            }
            Some(Selection::All) => return Self::ALL.into(),
            Some(Selection::Unit) => Self::Unit,
            Some(Selection::Packet) => Self::Packet,
            Some(Selection::Netns) => Self::Netns,
            Some(Selection::Agent) => Self::Agent,
            Some(Selection::Kernels) => Self::Kernels,
            Some(Selection::Image) => Self::Image,
        };
        vec![one]
    }

    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Packet => "packet",
            Self::Netns => "netns",
            Self::Agent => "agent",
            Self::Kernels => "kernels",
            Self::Image => "image",
        }
    }

    /// Whether it runs only if it is asked for, or everything is.
    fn is_long(self) -> bool {
        matches!(self, Self::Kernels | Self::Image)
    }

    /// Whether it loads BPF programs into this machine's kernel.
    fn needs_root(self) -> bool {
        matches!(self, Self::Packet | Self::Netns | Self::Agent)
    }

    /// Whether it runs the `klb` program.
    fn needs_klb(self) -> bool {
        matches!(self, Self::Netns | Self::Agent | Self::Kernels)
    }

    /// Compiles this level's tests.
    fn build(self) -> Result<Tests> {
        match self {
            Self::Kernels => return kernels::Matrix::build().map(Tests::Kernels),
            Self::Image => return Ok(Tests::Image),
            Self::Unit | Self::Packet | Self::Netns | Self::Agent => {}
        }
        process::run(self.cargo_test().args(["--quiet", "--no-run"]))?;
        Ok(Tests::Cargo(self.cargo_test()))
    }

    fn cargo_test(self) -> Command {
        let mut command = process::cargo();
        command
            .args(["test", "--locked"])
            .env("KLB_BIN", paths::klb());
        if self.needs_root() {
            command.args([ROOT_FEATURES, "--test", self.name()]);
        }
        command
    }
}

/// The tests of one level, compiled.
enum Tests {
    Cargo(Command),
    Kernels(kernels::Matrix),
    /// Looks at what it builds.
    Image,
}

impl Tests {
    fn run(self) -> Result<Tally> {
        match self {
            Self::Cargo(command) => stream(command),
            Self::Kernels(matrix) => matrix.run(),
            Self::Image => image::build().map(|()| Tally {
                passed: 1,
                ..Tally::default()
            }),
        }
    }
}

/// Sets up, builds, runs the levels and prints the table.
///
/// # Errors
/// If something cannot be set up or does not compile, or if a test failed.
pub(crate) fn run(selection: Option<Selection>) -> Result<()> {
    let levels = Level::selected(selection);
    set_up(&levels)?;
    step("Building the tests");
    let built: Vec<_> = levels
        .into_iter()
        .map(|level| Ok((level, level.build()?)))
        .collect::<Result<_>>()?;
    let mut table = Table::default();
    for (level, tests) in built {
        step(format_args!("Tests: {}", level.name()));
        let start = Instant::now();
        let tally = tests.run().unwrap_or_else(|error| {
            eprintln!("error: {}: {error:#}", level.name());
            Tally::BROKEN
        });
        table.push(level.name(), tally, start.elapsed());
        if level == Level::Agent && env::var_os(KUBECONFIG).is_none() {
            println!("skipped: the tests against a real API server, for want of {KUBECONFIG}=FILE");
        }
    }
    println!("\n{table}");
    ensure!(table.total().failed == 0, "some tests failed");
    Ok(())
}

/// Installs what `levels` need, and builds what they test.
fn set_up(levels: &[Level]) -> Result<()> {
    if levels.iter().any(|level| level.needs_root()) {
        ensure!(
            process::is_root(),
            "these tests load BPF programs and make network namespaces: run them as root \
             (`cargo xtask test unit` needs none)"
        );
        setup::network()?;
    }
    if levels.contains(&Level::Agent) {
        setup::browser()?;
    }
    if levels.contains(&Level::Kernels) {
        kernels::fetch()?;
    }
    if levels.contains(&Level::Image) {
        image::set_up()?;
    }
    if levels.iter().any(|level| level.needs_klb()) {
        release::build()?;
    } else if levels.iter().any(|level| *level != Level::Unit) {
        ebpf::build(&toolchain::ready()?)?;
    }
    Ok(())
}

/// Runs `cargo test`, shows what it prints, and counts.
fn stream(mut command: Command) -> Result<Tally> {
    command.arg("--no-fail-fast");
    if io::stdout().is_terminal() {
        command.args(["--", "--color=always"]);
    }
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut tally = Tally::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        if let Some(result) = Tally::read(&line) {
            tally += result;
        }
    }
    let status = child.wait()?;
    // A test program that was killed prints no result.
    if !status.success() && tally.failed == 0 {
        tally += Tally::BROKEN;
    }
    Ok(tally)
}
