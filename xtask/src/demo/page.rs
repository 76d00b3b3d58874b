//! What the demo prints: plain text, without colours.

use std::{collections::BTreeMap, fmt::Display};

use anyhow::{Result, bail};

const WIDTH: usize = 72;
/// Length of the longest bar.
const BAR: usize = 40;

pub(super) fn section(title: &str) {
    let rule = "─".repeat(WIDTH.saturating_sub(title.chars().count() + 4));
    println!("\n── {title} {rule}");
}

pub(super) fn line(text: impl Display) {
    println!("   {text}");
}

/// A bar for each name.
pub(super) fn bars(counts: &BTreeMap<String, usize>) {
    let most = counts.values().copied().max().unwrap_or(0).max(1);
    for (name, count) in counts {
        let bar = "█".repeat((count * BAR).div_ceil(most));
        line(format_args!("{name}  {bar} {count}"));
    }
}

/// The first lines of a text.
pub(super) fn excerpt(text: &str, lines: usize) {
    let all = text.lines().count();
    text.lines().take(lines).for_each(line);
    match all.saturating_sub(lines) {
        0 => {}
        1 => line("… and 1 line more"),
        more => line(format_args!("… and {more} lines more")),
    }
}

/// What was claimed so far.
#[derive(Debug, Default)]
pub(super) struct Checks {
    passed: usize,
    failed: Vec<String>,
}

impl Checks {
    /// Prints a claim, and whether it holds.
    pub(super) fn check(&mut self, claim: impl Display, holds: bool) {
        if holds {
            self.passed += 1;
            println!("ok {claim}");
        } else {
            self.failed.push(claim.to_string());
            println!("NO {claim}");
        }
    }

    pub(super) fn all_passed(&self) -> bool {
        self.failed.is_empty()
    }

    /// # Errors
    /// If a check failed.
    pub(super) fn verdict(&self) -> Result<()> {
        match &self.failed[..] {
            [] => {
                println!("ok all {} checks passed", self.passed);
                Ok(())
            }
            failed => bail!("{} checks failed:\n{}", failed.len(), failed.join("\n")),
        }
    }
}
