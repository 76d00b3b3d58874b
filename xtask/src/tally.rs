//! Counting tests, from what libtest prints, and the table over all levels.

use std::{
    fmt::{self, Display},
    ops::AddAssign,
    time::Duration,
};

/// How many tests went which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    pub(crate) ignored: u32,
}

impl Tally {
    /// What a level counts as that broke before its tests could say anything.
    pub(crate) const BROKEN: Self = Self {
        passed: 0,
        failed: 1,
        ignored: 0,
    };

    /// Reads a line like `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    pub(crate) fn read(line: &str) -> Option<Self> {
        let (_, result) = line.split_once("test result: ")?;
        let (_, counts) = result.split_once(". ")?;
        let mut tally = Self::default();
        for count in counts.split("; ") {
            match count.split_once(' ')? {
                (number, "passed") => tally.passed = number.parse().ok()?,
                (number, "failed") => tally.failed = number.parse().ok()?,
                (number, "ignored") => tally.ignored = number.parse().ok()?,
                _ => {}
            }
        }
        Some(tally)
    }

    /// The sum over a text's lines, if one of them is a result.
    pub(crate) fn read_all(text: &str) -> Option<Self> {
        let mut results = text.lines().filter_map(Self::read).peekable();
        results.peek()?;
        let mut sum = Self::default();
        for result in results {
            sum += result;
        }
        Some(sum)
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        let Self {
            passed,
            failed,
            ignored,
        } = other;
        self.passed += passed;
        self.failed += failed;
        self.ignored += ignored;
    }
}

impl Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passed,
            failed,
            ignored,
        } = self;
        write!(f, "{passed} passed, {failed} failed, {ignored} skipped")
    }
}

/// The levels that have run.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<(String, Tally, Duration)>,
}

impl Table {
    pub(crate) fn push(&mut self, level: impl Into<String>, tally: Tally, took: Duration) {
        self.rows.push((level.into(), tally, took));
    }

    pub(crate) fn total(&self) -> Tally {
        let mut total = Tally::default();
        for (_, tally, _) in &self.rows {
            total += *tally;
        }
        total
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "level       passed  failed  ignored  seconds")?;
        for (level, tally, took) in &self.rows {
            let Tally {
                passed,
                failed,
                ignored,
            } = tally;
            let seconds = took.as_secs_f64();
            writeln!(
                f,
                "{level:<10}  {passed:>6}  {failed:>6}  {ignored:>7}  {seconds:>7.1}"
            )?;
        }
        write!(f, "\nklb: {}", self.total())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_line_is_read_with_and_without_colour() {
        let expected = Tally {
            passed: 12,
            failed: 3,
            ignored: 1,
        };
        for word in ["FAILED", "\u{1b}[31mFAILED\u{1b}(B\u{1b}[m"] {
            let line = format!(
                "test result: {word}. 12 passed; 3 failed; 1 ignored; 0 measured; \
                 2 filtered out; finished in 0.10s"
            );
            assert_eq!(Tally::read(&line), Some(expected));
        }
    }

    #[test]
    fn other_lines_are_no_results() {
        for line in [
            "",
            "test result: ",
            "test packet::drops ... ok",
            "running 3 tests",
        ] {
            assert_eq!(Tally::read(line), None, "{line}");
        }
    }

    #[test]
    fn a_text_without_a_result_is_not_a_text_with_no_tests() {
        assert_eq!(Tally::read_all("running 0 tests\n"), None);
        let empty = "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(Tally::read_all(empty), Some(Tally::default()));
    }

    #[test]
    fn the_table_ends_with_the_sum() {
        let mut table = Table::default();
        for _ in 0..2 {
            let tally = Tally {
                passed: 2,
                failed: 0,
                ignored: 1,
            };
            table.push("unit", tally, Duration::from_millis(1500));
        }
        let text = table.to_string();
        assert!(
            text.contains("unit             2       0        1      1.5\n"),
            "{text}"
        );
        assert!(
            text.ends_with("klb: 4 passed, 0 failed, 2 skipped"),
            "{text}"
        );
    }
}
