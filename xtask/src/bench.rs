//! `cargo xtask bench`: the same work, on the same machine, for klb and for what
//! a user would have in its place.
//!
//! What is compared was measured in the same rounds, one way after the other,
//! again and again: a machine that is busy slows all of them, and their ratios
//! stay. A figure in which a well-known row is not what it is known to be says
//! that it is not to be trusted.

mod control;
mod floor;
mod live;
mod maglev;
mod packets;
mod plot;
mod program;
mod report;
mod rules;
mod services;
mod site;
mod stats;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};

use self::report::Figure;
use crate::{ebpf, guard, process::step, release, toolchain, traffic};

/// What the names of all that a benchmark makes begin with.
const NAME: &str = "klb-bench";

/// What is measured, and how long.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Which figures; all if none is named
    #[arg(value_enum, value_name = "FIGURE")]
    figures: Vec<Name>,
    /// Services on the node, where a figure does not say how many
    #[arg(long, default_value_t = 10_000)]
    services: u32,
    /// Rounds of every figure
    #[arg(long)]
    rounds: Option<usize>,
    /// Write all that was measured to this file, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fewer rounds, and no more Services than `--services`: done in three
    /// minutes
    #[arg(long)]
    quick: bool,
}

/// The figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// New connections to a ClusterIP
    #[value(name = "1")]
    NewConnection,
    /// Round trips of an established connection to a ClusterIP
    #[value(name = "2")]
    RoundTrip,
    /// New connections to a NodePort, from outside
    #[value(name = "3")]
    NodePort,
    /// UDP requests, each by a socket of its own
    #[value(name = "4")]
    Datagram,
    /// New connections, against the number of Services
    #[value(name = "5")]
    Flatness,
    /// What traffic to no Service pays
    #[value(name = "6")]
    Tax,
    /// Packets per second to a NodePort
    #[value(name = "7")]
    Packets,
    /// The programs, for a packet of an established flow
    #[value(name = "8")]
    Established,
    /// The programs, for the first packet of a flow
    #[value(name = "9")]
    NewFlow,
    /// `connect()`
    #[value(name = "10")]
    Connect,
    /// One change, from the API to the maps
    #[value(name = "11")]
    Change,
    /// A start with nothing in the maps
    #[value(name = "12")]
    ColdStart,
    /// Flows that move when an endpoint goes that is not theirs
    #[value(name = "flows")]
    Flows,
    /// Maglev tables: balance, disruption, time to build
    #[value(name = "maglev")]
    Maglev,
}

impl Options {
    fn wants(&self, figure: Name) -> bool {
        self.figures.is_empty() || self.figures.contains(&figure)
    }

    /// How many rounds a figure has that takes `usual` if nothing is said.
    fn rounds(&self, usual: usize) -> usize {
        // Three still have a middle one.
        let usual = match (self.quick, usual) {
            (true, 0..=3) => 1,
            (true, _) => 3,
            (false, usual) => usual,
        };
        self.rounds.unwrap_or(usual).max(1)
    }
}

/// A group of figures that share what is set up for them; each is handed over as
/// soon as it is measured.
type Part = fn(&Options, &mut dyn FnMut(Figure));

/// The groups, with what they measure.
const PARTS: &[(&[Name], Part)] = &[
    (
        &[
            Name::NewConnection,
            Name::RoundTrip,
            Name::NodePort,
            Name::Datagram,
            Name::Flatness,
            Name::Tax,
            Name::Packets,
        ],
        live::measure,
    ),
    (program::NAMES, program::measure),
    (&[Name::Maglev], maglev::measure),
    (&[Name::Change, Name::ColdStart], control::measure),
];

/// Builds what the figures need.
///
/// # Errors
/// If something does not build.
pub(crate) fn build(options: &Options) -> Result<()> {
    let toolchain = toolchain::ready()?;
    ebpf::build_floor(&toolchain)?;
    let mut names = PARTS.iter().flat_map(|(names, _)| *names);
    let needs_no_agent = |name| program::NAMES.contains(name) || *name == Name::Maglev;
    if names.all(|name| needs_no_agent(name) || !options.wants(*name)) {
        ebpf::build(&toolchain)?;
    } else {
        release::build()?;
        traffic::build_helper()?;
    }
    if options.wants(Name::Maglev) {
        maglev::build()?;
    }
    Ok(())
}

/// Measures what was built, and prints.
///
/// # Errors
/// If something is not as it should be, or on Ctrl-C.
pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(
        crate::process::is_root(),
        "network namespaces and BPF need root"
    );
    let mut figures = Vec::new();
    let outcome = guard::guarded("the benchmark", || measure(options, &mut figures));
    // What was measured before something went wrong is as good as any.
    if let Some(path) = &options.json {
        write_json(path, &figures)?;
    }
    // Three rounds are no figure to keep.
    if !options.quick {
        for path in plot::write(&figures)? {
            step(format_args!("Wrote {}", path.display()));
        }
    }
    println!("{}", report::summary(&figures));
    outcome
}

fn measure(options: &Options, figures: &mut Vec<Figure>) {
    elapsed();
    println!("{}, Linux {}", report::processor(), report::kernel());
    for (names, part) in PARTS {
        if !names.iter().any(|name| options.wants(*name)) {
            continue;
        }
        part(options, &mut |figure| {
            println!("\n{figure}");
            figures.push(figure);
        });
    }
    step(format_args!("Measured in {:.0} s", elapsed().as_secs_f64()));
}

fn write_json(path: &Path, figures: &[Figure]) -> Result<()> {
    let text = format!("{:#}\n", report::json(figures));
    fs::write(path, text).with_context(|| path.display().to_string())
}

/// Says what is being measured, and since when the first thing was, in seconds:
/// there are many of them between two figures.
fn progress(text: impl std::fmt::Display) {
    eprintln!("{:>7.1} {text}", elapsed().as_secs_f64());
}

/// Since this was asked first.
fn elapsed() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}
