//! Figures: what was measured, and what it says about the targets.

use std::{fmt, fs};

use serde_json::{Value, json};

use super::stats::Quartiles;

/// One figure: rows that were measured in the same rounds.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    /// As it is called on the command line.
    pub(super) name: &'static str,
    pub(super) title: String,
    /// Of the rows' values: `µs`, `ns`.
    pub(super) unit: &'static str,
    /// The row that the ratios are to; none if the values speak for themselves.
    pub(super) reference: Option<&'static str>,
    pub(super) rows: Vec<Row>,
    /// The file of its plot, below `docs/bench/`.
    pub(super) plot: Option<&'static str>,
    /// The highest load average that was seen while it was measured.
    pub(super) load: f64,
}

/// One way to do the work.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) name: String,
    /// The line that it is a point of, and the number of Services there.
    pub(super) point: Option<(&'static str, u32)>,
    /// A value of each round, in the order of the rounds.
    pub(super) rounds: Vec<f64>,
    targets: Vec<Target>,
    /// What the ratio to the reference is known to be. If it is not, something
    /// is wrong with the measurement.
    band: Option<(f64, f64)>,
}

impl Row {
    pub(super) fn new(name: impl Into<String>, rounds: Vec<f64>) -> Self {
        Self {
            name: name.into(),
            point: None,
            rounds,
            targets: Vec::new(),
            band: None,
        }
    }

    /// A point of a line, whose name is added to by the number of Services.
    pub(super) fn of_services(self, line: &'static str, services: u32) -> Self {
        Self {
            name: format!("{line}, {services}"),
            point: Some((line, services)),
            ..self
        }
    }

    pub(super) fn target(mut self, target: Target) -> Self {
        self.targets.push(target);
        self
    }

    pub(super) fn band(self, low: f64, high: f64) -> Self {
        Self {
            band: Some((low, high)),
            ..self
        }
    }
}

/// What a row is to reach.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    bound: Bound,
    of: Of,
}

#[derive(Clone, Copy, Debug)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

#[derive(Clone, Copy, Debug)]
enum Of {
    /// The value itself.
    Value,
    /// The ratio to the figure's reference.
    Ratio,
    /// The ratio to another row.
    RatioTo(&'static str),
}

impl Target {
    /// Of the ratio to the figure's reference.
    pub(super) const fn at_most(bound: f64) -> Self {
        Self {
            bound: Bound::AtMost(bound),
            of: Of::Ratio,
        }
    }

    /// Of the ratio to the figure's reference.
    pub(super) const fn at_least(bound: f64) -> Self {
        Self {
            bound: Bound::AtLeast(bound),
            of: Of::Ratio,
        }
    }

    /// The same bound, of the ratio to another row.
    pub(super) const fn to(self, row: &'static str) -> Self {
        Self {
            of: Of::RatioTo(row),
            ..self
        }
    }

    /// The same bound, of the value itself.
    pub(super) const fn of_value(self) -> Self {
        Self {
            of: Of::Value,
            ..self
        }
    }

    fn is_met(self, value: f64) -> bool {
        match self.bound {
            Bound::AtMost(bound) => value <= bound,
            Bound::AtLeast(bound) => value >= bound,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bound {
            Bound::AtMost(bound) => write!(f, "≤ {}", digits(bound)),
            Bound::AtLeast(bound) => write!(f, "≥ {}", digits(bound)),
        }?;
        match self.of {
            Of::RatioTo(row) => write!(f, " × {row}"),
            Of::Value | Of::Ratio => Ok(()),
        }
    }
}

/// Whether a target is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Met,
    Missed,
    /// A row of the figure is not what it is known to be.
    NotTrusted,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Met => "met",
            Self::Missed => "MISSED",
            Self::NotTrusted => "not trusted",
        })
    }
}

impl Figure {
    pub(super) fn new(name: &'static str, title: impl Into<String>, unit: &'static str) -> Self {
        Self {
            name,
            title: title.into(),
            unit,
            reference: None,
            rows: Vec::new(),
            plot: None,
            load: load(),
        }
    }

    /// Compares all rows with this one.
    pub(super) fn to(self, reference: &'static str) -> Self {
        Self {
            reference: Some(reference),
            ..self
        }
    }

    pub(super) fn plot(self, file: &'static str) -> Self {
        Self {
            plot: Some(file),
            ..self
        }
    }

    pub(super) fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }

    /// Looks at the load average once more.
    pub(super) fn note_load(&mut self) {
        self.load = self.load.max(load());
    }

    /// A row's ratio to another one, round by round.
    fn ratio_to(&self, row: &Row, other: &str) -> Option<Quartiles> {
        let other = self.row(other)?;
        let rounds = row.rounds.iter().zip(&other.rounds);
        let ratios: Vec<_> = rounds.map(|(value, other)| value / other).collect();
        (!ratios.is_empty()).then(|| Quartiles::of(ratios))
    }

    /// A row's ratio to the reference.
    pub(super) fn ratio(&self, row: &Row) -> Option<Quartiles> {
        self.ratio_to(row, self.reference?)
    }

    /// The rows that are not what they are known to be.
    pub(super) fn strangers(&self) -> Vec<&Row> {
        let rows = self.rows.iter();
        rows.filter(|row| match (row.band, self.ratio(row)) {
            (Some((low, high)), Some(ratio)) => !(low..=high).contains(&ratio.median),
            _ => false,
        })
        .collect()
    }

    /// What a row's target says, and whether it is met.
    fn judge(&self, row: &Row, target: Target) -> Option<Verdict> {
        let value = match target.of {
            Of::Value => Some(Quartiles::of(row.rounds.iter().copied())),
            Of::Ratio => self.ratio(row),
            Of::RatioTo(other) => self.ratio_to(row, other),
        }?;
        Some(if !self.strangers().is_empty() {
            Verdict::NotTrusted
        } else if target.is_met(value.median) {
            Verdict::Met
        } else {
            Verdict::Missed
        })
    }

    /// All verdicts, with the rows that they are about.
    pub(super) fn verdicts(&self) -> impl Iterator<Item = (&Row, Target, Verdict)> {
        self.rows.iter().flat_map(move |row| {
            let targets = row.targets.iter();
            targets.filter_map(move |target| Some((row, *target, self.judge(row, *target)?)))
        })
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let targets = row.targets.iter().filter_map(|target| {
                let verdict = self.judge(row, *target)?;
                Some(json!({ "target": target.to_string(), "verdict": verdict.to_string() }))
            });
            json!({
                "name": row.name,
                "services": row.point.map(|(_, services)| services),
                "rounds": row.rounds,
                "value": quartiles(Some(Quartiles::of(row.rounds.iter().copied()))),
                "ratio": quartiles(self.ratio(row)),
                "band": row.band.map(|(low, high)| [low, high]),
                "targets": targets.collect::<Vec<_>>(),
            })
        });
        json!({
            "figure": self.name,
            "title": self.title,
            "unit": self.unit,
            "reference": self.reference,
            "load": self.load,
            "rows": rows.collect::<Vec<_>>(),
        })
    }
}

/// The table that people read.
impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rounds = self.rows.iter().map(|row| row.rounds.len()).max();
        writeln!(
            f,
            "{}: {} ({} rounds, load {:.1})",
            self.name,
            self.title,
            rounds.unwrap_or(0),
            self.load
        )?;
        let ratio = self.reference.map(|name| format!("× {name}"));
        let ratio = ratio.unwrap_or_default();
        let unit = format!("{} [p25 p75]", self.unit);
        writeln!(f, "  {:<34} {unit:<28} {ratio:<26} target", "")?;
        for row in &self.rows {
            let value = text(Quartiles::of(row.rounds.iter().copied()));
            let ratio = self.ratio(row).map(text).unwrap_or_default();
            let targets = row.targets.iter().filter_map(|target| {
                let verdict = self.judge(row, *target)?;
                Some(format!("{target}: {verdict}"))
            });
            let targets = targets.collect::<Vec<_>>().join(", ");
            let line = format!("  {:<34} {value:<28} {ratio:<26} {targets}", row.name);
            writeln!(f, "{}", line.trim_end())?;
        }
        for row in self.strangers() {
            let (low, high) = row.band.unwrap_or_default();
            writeln!(
                f,
                "  NOT TO BE TRUSTED: {} is known to be {} to {} × {}",
                row.name,
                digits(low),
                digits(high),
                self.reference.unwrap_or_default()
            )?;
        }
        Ok(())
    }
}

/// How many targets are met, and which are not, by figure.
pub(super) fn summary(figures: &[Figure]) -> String {
    let mut met = 0;
    let mut rest = Vec::new();
    for figure in figures {
        let (good, bad): (Vec<_>, Vec<_>) = figure
            .verdicts()
            .partition(|(_, _, verdict)| *verdict == Verdict::Met);
        met += good.len();
        if !bad.is_empty() {
            rest.push(format!("  {}: {}", figure.name, figure.title));
        }
        let bad = bad.into_iter();
        rest.extend(bad.map(|(row, target, verdict)| {
            let name = &row.name;
            format!("    {name}: {target}: {verdict}")
        }));
    }
    let targets = if met == 1 { "target" } else { "targets" };
    let first = format!("{met} {targets} met");
    [vec![first], rest].concat().join("\n")
}

/// All figures, as JSON.
pub(super) fn json(figures: &[Figure]) -> Value {
    json!({
        "kernel": kernel(),
        "processor": processor(),
        "figures": figures.iter().map(Figure::json).collect::<Vec<_>>(),
    })
}

/// Release of the running kernel.
pub(super) fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease");
    release.unwrap_or_default().trim().to_owned()
}

/// What the processor calls itself, and how many there are.
pub(super) fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let names = text.lines().filter(|line| line.starts_with("model name"));
    let names: Vec<_> = names.filter_map(|line| line.split(": ").nth(1)).collect();
    format!(
        "{} × {}",
        names.len(),
        names.first().copied().unwrap_or("?")
    )
}

/// The load average of the last minute.
fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split(' ').next().and_then(|word| word.parse().ok());
    first.unwrap_or(f64::NAN)
}

fn quartiles(quartiles: Option<Quartiles>) -> Value {
    quartiles.map_or(
        Value::Null,
        |Quartiles { p25, median, p75 }| json!({ "p25": p25, "median": median, "p75": p75 }),
    )
}

fn text(quartiles: Quartiles) -> String {
    let Quartiles { p25, median, p75 } = quartiles;
    format!("{} [{} {}]", digits(median), digits(p25), digits(p75))
}

/// A number with as many digits as a measurement has: four, or all before the
/// point.
pub(super) fn digits(value: f64) -> String {
    let places = match value.abs() {
        0.0 => 0,
        size if size < 10.0 => 3,
        size if size < 100.0 => 2,
        size if size < 1000.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.places$}");
    if places == 0 {
        return text;
    }
    let text = text.trim_end_matches('0').trim_end_matches('.');
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure() -> Figure {
        let mut figure = Figure::new("1", "a title", "µs").to("direct");
        figure.rows = vec![
            Row::new("direct", vec![10.0, 20.0, 40.0]),
            Row::new("nftables", vec![12.0, 24.0, 48.0]).band(1.1, 1.3),
            Row::new("klb", vec![10.1, 20.2, 40.4])
                .target(Target::at_most(1.02))
                .target(Target::at_most(0.8).to("nftables"))
                .target(Target::at_least(30.0).of_value()),
        ];
        figure
    }

    fn verdicts(figure: &Figure) -> Vec<Verdict> {
        figure.verdicts().map(|(_, _, verdict)| verdict).collect()
    }

    #[test]
    fn rounds_are_compared_with_themselves() {
        let figure = figure();
        let ratio = figure.ratio(&figure.rows[2]).expect("a reference");
        assert!((ratio.p75 - ratio.p25).abs() < 1e-9);
        let [met, missed] = [Verdict::Met, Verdict::Missed];
        assert_eq!(verdicts(&figure), [met, missed, missed]);
    }

    #[test]
    fn what_is_missed_is_told_by_figure() {
        let mut good = figure();
        good.rows[2].targets.truncate(1);
        let expected = "2 targets met\n  1: a title\n    \
                        klb: ≤ 0.8 × nftables: MISSED\n    klb: ≥ 30: MISSED";
        assert_eq!(summary(&[good.clone(), figure()]), expected);
        assert_eq!(summary(&[good]), "1 target met");
    }

    #[test]
    fn a_strange_row_spoils_the_figure() {
        let mut figure = figure();
        figure.rows[1].rounds = vec![20.0; 3];
        assert_eq!(verdicts(&figure), [Verdict::NotTrusted; 3]);
        assert!(figure.to_string().contains("NOT TO BE TRUSTED: nftables"));
    }

    #[test]
    fn numbers_have_four_digits() {
        for (value, text) in [
            (0.0, "0"),
            (1.0, "1"),
            (0.9364, "0.936"),
            (61.234, "61.23"),
            (12345.6, "12346"),
        ] {
            assert_eq!(digits(value), text);
        }
    }
}
