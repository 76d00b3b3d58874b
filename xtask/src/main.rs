//! klb's build, test and demo commands: `cargo xtask help`.

mod apt;
mod bench;
mod demo;
mod ebpf;
mod guard;
mod image;
mod kernels;
mod lint;
mod paths;
mod process;
mod release;
mod setup;
mod tally;
mod test;
mod toolchain;
mod traffic;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

/// Builds, tests and shows klb. Every command sets up what it is missing first.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    /// Build target/release/klb, with the BPF object inside
    Build,
    /// Build a container image with a static klb, and look whether it is one
    Image,
    /// Show klb at work in a cluster of network namespaces, and leave nothing behind
    Demo {
        /// Leave the cluster running, and say what to try
        #[arg(long)]
        keep: bool,
        /// Remove a cluster that was kept, and do nothing else
        #[arg(long, conflicts_with = "keep")]
        remove: bool,
    },
    /// Run tests: all levels but `kernels` and `image`, or the one that is named
    Test {
        #[arg(value_enum)]
        level: Option<test::Selection>,
    },
    /// Measure klb beside what it replaces, and print figures
    Bench(bench::Options),
    /// Print who answers whom over which hook: the table that the tests check
    Matrix,
    /// Check the formatting, and deny every warning of compiler, clippy and rustdoc
    Lint,
    /// Install what the other commands need, and do nothing else
    Setup,
}

fn main() -> ExitCode {
    match run(&Command::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> Result<()> {
    match command {
        Command::Build => release::build(),
        Command::Image => image::build(),
        Command::Demo { remove: true, .. } => demo::remove(),
        Command::Demo { keep, .. } => {
            setup::network()?;
            release::build()?;
            demo::run(*keep)
        }
        Command::Test { level } => test::run(*level),
        Command::Bench(options) => {
            setup::bench()?;
            bench::build(options)?;
            bench::run(options)
        }
        Command::Matrix => {
            print!("{}", include_str!("../../docs/matrix.md"));
            Ok(())
        }
        Command::Lint => lint::run(),
        Command::Setup => setup::everything(),
    }
}
