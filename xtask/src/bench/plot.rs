//! Plots of figures, as SVG that is written by hand.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{
    report::{Figure, Row, digits},
    stats::median,
};
use crate::paths;

/// Size of a plot, and what is left around it; in pixels.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 46.0;
const RIGHT: f64 = 170.0;
const BOTTOM: f64 = 46.0;
/// Of a bar, with the gap to the next one, and of the names beside bars.
const BAR: f64 = 26.0;
const NAMES: f64 = 230.0;

/// Colours that differ for people who see few of them (Okabe and Ito).
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
];

/// Writes the plots of all figures that have one, and returns where.
///
/// # Errors
/// If a file cannot be written.
pub(super) fn write(figures: &[Figure]) -> Result<Vec<PathBuf>> {
    let folder = paths::workspace().join("docs/bench");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let plots = figures
        .iter()
        .filter_map(|figure| Some((figure, figure.plot?)));
    plots
        .map(|(figure, file)| put(&folder.join(file), &draw(figure)))
        .collect()
}

fn put(path: &Path, text: &str) -> Result<PathBuf> {
    fs::write(path, text).with_context(|| path.display().to_string())?;
    Ok(path.to_owned())
}

fn draw(figure: &Figure) -> String {
    if figure.rows.iter().any(|row| row.point.is_some()) {
        lines(figure)
    } else {
        bars(figure)
    }
}

/// A bar for each row: its median.
fn bars(figure: &Figure) -> String {
    let values: Vec<_> = figure.rows.iter().map(value).collect();
    let most = values.iter().copied().fold(0.0, f64::max);
    let mut svg = String::new();
    let mut y = TOP;
    for (row, value) in figure.rows.iter().zip(values) {
        let length = (WIDTH - NAMES - RIGHT / 2.0) * value / most;
        let colour = if row.name.starts_with("klb") {
            COLOURS[0]
        } else {
            COLOURS[7]
        };
        let middle = y + BAR * 0.6;
        text(&mut svg, NAMES - 8.0, middle, "end", &row.name);
        rectangle(&mut svg, NAMES, y, length.max(1.0), BAR * 0.75, colour);
        text(
            &mut svg,
            NAMES + length + 6.0,
            middle,
            "start",
            &digits(value),
        );
        y += BAR;
    }
    frame(figure, y + 12.0, &svg)
}

/// A line for each name, against the number of Services; both axes are
/// logarithmic where the values spread.
fn lines(figure: &Figure) -> String {
    let mut series: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for row in &figure.rows {
        if let Some((line, services)) = row.point {
            let point = (f64::from(services), value(row));
            series.entry(line).or_default().push(point);
        }
    }
    let points = || series.values().flatten();
    let x = Axis::new(points().map(|point| point.0), LEFT, WIDTH - RIGHT, false);
    let y = Axis::new(points().map(|point| point.1), HEIGHT - BOTTOM, TOP, true);
    let mut svg = String::new();
    for tick in x.ticks() {
        let at = x.at(tick);
        line(&mut svg, &[(at, TOP), (at, HEIGHT - BOTTOM)], "#dddddd");
        text(
            &mut svg,
            at,
            HEIGHT - BOTTOM + 16.0,
            "middle",
            &digits(tick),
        );
    }
    for tick in y.ticks() {
        let at = y.at(tick);
        line(&mut svg, &[(LEFT, at), (WIDTH - RIGHT, at)], "#dddddd");
        text(&mut svg, LEFT - 6.0, at + 4.0, "end", &digits(tick));
    }
    let middle = f64::midpoint(LEFT, WIDTH - RIGHT);
    text(&mut svg, middle, HEIGHT - 8.0, "middle", "Services");
    for (index, (name, points)) in series.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let points: Vec<_> = points.iter().map(|(a, b)| (x.at(*a), y.at(*b))).collect();
        line(&mut svg, &points, colour);
        for (x, y) in points {
            circle(&mut svg, x, y, colour);
        }
        let at = TOP + 18.0 * f64::from(u32::try_from(index).expect("few rows"));
        circle(&mut svg, WIDTH - RIGHT + 14.0, at, colour);
        text(&mut svg, WIDTH - RIGHT + 24.0, at + 4.0, "start", name);
    }
    frame(figure, HEIGHT, &svg)
}

fn value(row: &Row) -> f64 {
    median(row.rounds.iter().copied())
}

/// An axis: from values to pixels.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    is_logarithmic: bool,
}

impl Axis {
    /// With `zero`, an axis that is not logarithmic begins there.
    fn new(values: impl Iterator<Item = f64> + Clone, from: f64, to: f64, zero: bool) -> Self {
        let high = values.clone().fold(f64::MIN, f64::max);
        let low = values.fold(f64::MAX, f64::min);
        let is_logarithmic = low > 0.0 && high / low > 8.0;
        let low = if zero && !is_logarithmic { 0.0 } else { low };
        Self {
            low,
            high,
            from,
            to,
            is_logarithmic,
        }
    }

    fn at(&self, value: f64) -> f64 {
        let scale = |value: f64| {
            if self.is_logarithmic {
                value.log10()
            } else {
                value
            }
        };
        let (low, high) = (scale(self.low), scale(self.high));
        let part = if high > low {
            (scale(value) - low) / (high - low)
        } else {
            0.5
        };
        self.from + (self.to - self.from) * part
    }

    /// Powers of ten, or four steps.
    fn ticks(&self) -> Vec<f64> {
        if self.is_logarithmic {
            let powers = (-6..9).map(|power| 10_f64.powi(power));
            let inside = powers.filter(|power| (self.low..=self.high).contains(power));
            return inside.collect();
        }
        let step = (self.high - self.low) / 4.0;
        (0..5).map(|n| self.low + step * f64::from(n)).collect()
    }
}

fn frame(figure: &Figure, height: f64, inside: &str) -> String {
    let title = format!("{} ({})", figure.title, figure.unit);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    text(&mut svg, 12.0, 24.0, "start", &title);
    svg + inside + "</svg>\n"
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
    )
    .expect("a string grows");
}

fn rectangle(svg: &mut String, x: f64, y: f64, width: f64, height: f64, colour: &str) {
    writeln!(
        svg,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" \
         fill=\"{colour}\"/>"
    )
    .expect("a string grows");
}

fn circle(svg: &mut String, x: f64, y: f64, colour: &str) {
    writeln!(
        svg,
        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/>"
    )
    .expect("a string grows");
}

fn line(svg: &mut String, points: &[(f64, f64)], colour: &str) {
    let points: Vec<_> = points
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>",
        points.join(" ")
    )
    .expect("a string grows");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_drawn() {
        let mut figure = Figure::new("7", "packets <per> second", "Mpps");
        figure.rows = vec![
            Row::new("direct", vec![0.9]),
            Row::new("klb, XDP", vec![2.8]),
        ];
        let svg = draw(&figure);
        assert!(svg.contains(">direct</text>") && svg.contains(">2.8</text>"));
        assert!(svg.contains("packets &lt;per>"));
        let bars = svg.matches("<rect x=").count();
        assert_eq!(bars, 2);
    }

    #[test]
    fn values_that_spread_have_a_logarithmic_axis() {
        let axis = Axis::new([1.0, 100.0, 10_000.0].into_iter(), 0.0, 100.0, true);
        assert!((axis.at(100.0) - 50.0).abs() < 1e-9);
        let axis = Axis::new([50.0, 100.0].into_iter(), 0.0, 100.0, true);
        assert!((axis.at(50.0) - 50.0).abs() < 1e-9);
    }
}
