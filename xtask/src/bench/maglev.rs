//! Maglev tables, by the agent's own code: see `lb-userspace/examples/maglev.rs`.

use std::process::Command;

use anyhow::Result;
use serde_json::Value;

use super::{
    Options, progress,
    report::{Figure, Row, Target},
};
use crate::{paths, process};

/// Milliseconds in which the paper builds a table of this size.
const BUILD: f64 = 1.8;
/// Percent of all slots that may move besides those of the backend that goes.
const MOVED: f64 = 1.0;

/// Builds the example.
///
/// # Errors
/// If it does not compile.
pub(super) fn build() -> Result<()> {
    process::run(process::cargo().args([
        "build",
        "--locked",
        "--release",
        "--package=lb-userspace",
        "--example=maglev",
    ]))
}

/// # Panics
/// If the example does not run.
pub(super) fn measure(options: &Options, done: &mut dyn FnMut(Figure)) {
    progress("Maglev tables");
    let rounds = options.rounds(31).to_string();
    let mut example = Command::new(paths::target().join("release/examples/maglev"));
    let text = process::text(example.arg(&rounds)).unwrap_or_else(|error| panic!("{error:#}"));
    let results: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("the example prints JSON"))
        .collect();
    let mut build = Figure::new("maglev", "65537 slots, to build", "ms").to("a copy");
    let mut spread = Figure::new("maglev", "most slots of a backend, less fewest", "slots");
    let mut moved = Figure::new("maglev", "slots that move besides, when one goes", "%");
    for result in &results {
        let name = format!("klb, {} backends", result["backends"]);
        let value = |name: &str| vec![result[name].as_f64().unwrap_or(f64::NAN)];
        let row = Row::new(name.clone(), list(&result["build"]));
        build
            .rows
            .push(row.target(Target::at_most(BUILD).of_value()));
        let row = Row::new(name.clone(), value("spread"));
        spread
            .rows
            .push(row.target(Target::at_most(1.0).of_value()));
        let row = Row::new(name, value("moved"));
        moved.rows.push(if result["backends"] == 1000 {
            row.target(Target::at_most(MOVED).of_value())
        } else {
            row
        });
    }
    let copies = results.last().map(|result| list(&result["copy"]));
    build
        .rows
        .push(Row::new("a copy", copies.unwrap_or_default()));
    [build, spread, moved].into_iter().for_each(done);
}

fn list(value: &Value) -> Vec<f64> {
    let values = value.as_array().into_iter().flatten();
    values.filter_map(Value::as_f64).collect()
}
