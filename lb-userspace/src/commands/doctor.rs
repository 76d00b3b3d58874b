//! `klb doctor`: whether this node is fit for klb, before it is installed and
//! after.
//!
//! Each subject has a file: what is gathered of it, which may be little where
//! something cannot be read, and what follows from that, which is pure.

mod agent;
mod balancers;
mod check;
mod kernel;
mod mounts;
mod network;
mod offloads;
mod rights;

use std::{fmt::Write as _, process::ExitCode};

use serde::Serialize;

use self::check::{Check, Level};
use super::{
    look::{Look, Tone},
    print,
};
use crate::args::DoctorArgs;

/// Runs `klb doctor`. The exit status tells whether anything fails.
pub fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let report = Report::new(Facts::gather(args).checks());
    print(args.output, &report, page)?;
    Ok(if report.result == Level::Fail {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// All that the checks go by.
struct Facts {
    kernel: kernel::Facts,
    mounts: mounts::Facts,
    rights: rights::Facts,
    balancers: balancers::Facts,
    network: network::Facts,
    agent: agent::Facts,
}

impl Facts {
    fn gather(args: &DoctorArgs) -> Self {
        Self {
            kernel: kernel::Facts::gather(),
            mounts: mounts::Facts::gather(&args.paths.bpffs),
            rights: rights::Facts::gather(),
            balancers: balancers::Facts::gather(args.preflight),
            network: network::Facts::gather(args),
            agent: agent::Facts::gather(args),
        }
    }

    fn checks(&self) -> Vec<Check> {
        let Self {
            kernel,
            mounts,
            rights,
            balancers,
            network,
            agent,
        } = self;
        let parts = [
            kernel.checks(),
            mounts.checks(),
            rights.checks(),
            balancers.checks(),
            network.checks(),
            agent.checks(),
        ];
        parts.into_iter().flatten().collect()
    }
}

/// `klb doctor -o json`, on which other programs rely.
#[derive(Debug, Serialize)]
struct Report {
    /// The worst of all.
    result: Level,
    checks: Vec<Check>,
}

impl Report {
    fn new(checks: Vec<Check>) -> Self {
        let levels = checks.iter().map(|check| check.level);
        Self {
            result: levels.max().unwrap_or(Level::Ok),
            checks,
        }
    }
}

fn page(report: &Report, look: Look) -> String {
    let mut page = String::new();
    let names = report.checks.iter().map(|check| check.name.len());
    let width = names.max().unwrap_or(0);
    for check in &report.checks {
        let Check {
            name,
            level,
            finding,
            fix,
        } = check;
        // Writing to a String does not fail.
        let _ok = writeln!(
            page,
            "{}  {name:<width$}  {finding}",
            level_word(*level, look)
        );
        if let Some(fix) = fix {
            let _ok = writeln!(page, "{:<4}  {:<width$}  → {fix}", "", "");
        }
    }
    let count = |level| {
        report
            .checks
            .iter()
            .filter(|check| check.level == level)
            .count()
    };
    let _ok = writeln!(
        page,
        "\n{} checks: {} ok, {} warn, {} fail",
        report.checks.len(),
        count(Level::Ok),
        count(Level::Warn),
        count(Level::Fail)
    );
    page
}

/// In four places, as wide as the longest.
fn level_word(level: Level, look: Look) -> String {
    let tone = match level {
        Level::Ok => Some(Tone::Good),
        Level::Warn => None,
        Level::Fail => Some(Tone::Bad),
    };
    look.paint(tone, &format!("{:<4}", level.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_is_a_line_and_the_worst_is_the_result() {
        let checks = vec![
            Check::ok("BTF", "is there"),
            Check::warn("rp_filter", "is strict", "make it loose"),
        ];
        let report = Report::new(checks.clone());
        assert_eq!(report.result, Level::Warn);
        assert_eq!(
            page(&report, Look::PLAIN),
            "ok    BTF        is there\n\
             warn  rp_filter  is strict\n\
             \x20                → make it loose\n\
             \n2 checks: 1 ok, 1 warn, 0 fail\n"
        );
        let more = [checks, vec![Check::fail("kernel", "is old", "a new one")]].concat();
        let json = serde_json::to_value(Report::new(more)).expect("JSON");
        assert_eq!(json["result"], "fail");
        assert_eq!(json["checks"][1]["level"], "warn");
        assert_eq!(json["checks"][1]["fix"], "make it loose");
        assert!(json["checks"][0]["fix"].is_null());
    }
}
