//! What became of packets: of all time, and now.

use std::{
    cmp::Reverse,
    thread,
    time::{Duration, Instant},
};

use lb_common::reason::Effect;
use serde::Serialize;

use crate::{
    commands::{effect_name, look::Tone, table::Table},
    datapath::{
        kernel::{Counter, Counters},
        pins::Pins,
    },
};

#[derive(Clone, Debug, Serialize)]
pub(in crate::commands) struct Row {
    pub(in crate::commands) hook: &'static str,
    pub(in crate::commands) reason: &'static str,
    pub(in crate::commands) effect: &'static str,
    pub(in crate::commands) count: u64,
    /// While the command looked, if it was told to look for a while.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::commands) per_second: Option<f64>,
    pub(in crate::commands) description: &'static str,
    /// See [`Counter::is_refusal`].
    #[serde(skip)]
    pub(in crate::commands) is_refusal: bool,
}

impl From<&Counter> for Row {
    fn from(counter: &Counter) -> Self {
        Self {
            hook: counter.hook.name(),
            reason: counter.reason.name(),
            effect: effect_name(counter.reason.effect()),
            count: counter.count,
            per_second: None,
            description: counter.reason.description().trim(),
            is_refusal: counter.is_refusal(),
        }
    }
}

/// The counters above zero; with how they grow, after a second look so much
/// later.
pub(super) fn read(pins: &Pins, over: Option<Duration>) -> anyhow::Result<Vec<Row>> {
    let counters = Counters::open(pins)?;
    let first = counters.read()?;
    let Some(over) = over else {
        return Ok(rows(&first).collect());
    };
    let began = Instant::now();
    thread::sleep(over);
    Ok(growing(&first, &counters.read()?, began.elapsed()))
}

fn rows(counters: &[Counter]) -> impl Iterator<Item = Row> {
    let counters = counters.iter().filter(|counter| counter.count > 0);
    counters.map(Row::from)
}

/// What is counted now comes first, and of that what is refused.
pub(in crate::commands) fn growing(
    first: &[Counter],
    second: &[Counter],
    time: Duration,
) -> Vec<Row> {
    let before = |row: &Row| {
        let mut same =
            rows(first).filter(|other| (other.hook, other.reason) == (row.hook, row.reason));
        same.next().map_or(0, |row| row.count)
    };
    let mut rows: Vec<Row> = rows(second).collect();
    for row in &mut rows {
        let more = row.count.saturating_sub(before(row));
        row.per_second = Some(per_second(more, time));
    }
    rows.sort_by_key(|row| Reverse(row.urgency()));
    rows
}

/// As many digits as mean something.
pub(in crate::commands) fn per_second(count: u64, time: Duration) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "nobody counts 2^53 packets in a while"
    )]
    let rate = count as f64 / time.as_secs_f64().max(f64::EPSILON);
    if rate < 0.1 {
        return rate;
    }
    (rate * 10.0).round() / 10.0
}

impl Row {
    /// A flow without a backend is answered, and has ended all the same.
    fn urgency(&self) -> u8 {
        const REFUSE: &str = effect_name(Effect::Refuse);
        const ANSWER: &str = effect_name(Effect::Answer);
        match self.effect {
            _ if self.per_second.is_none_or(|rate| rate == 0.0) => 0,
            REFUSE => 3,
            ANSWER => 2,
            _ => 1,
        }
    }

    /// For a warning: `4 times`, and whether it goes on.
    pub(super) fn how_often(&self) -> String {
        let times = format!("{} times", self.count);
        match self.per_second {
            None => times,
            Some(0.0) => format!("{times}, and not now"),
            Some(rate) => format!("{times}, now {} a second", shown(rate)),
        }
    }
}

/// Something that happens is never shown as 0.
pub(in crate::commands) fn shown(rate: f64) -> String {
    match rate {
        0.0 => "0".to_owned(),
        0.0..0.1 => "<0.1".to_owned(),
        0.0..10.0 => format!("{rate:.1}"),
        _ => format!("{rate:.0}"),
    }
}

/// A note behind the table's title.
pub(super) fn note(over: Option<u64>) -> String {
    match over {
        None => "of all time; --over 5s tells what is counted now".to_owned(),
        Some(seconds) => format!("of all time, and per second over {seconds}s"),
    }
}

pub(super) fn table(rows: &[Row]) -> Table {
    if rows.iter().any(|row| row.per_second.is_some()) {
        return growing_table(rows);
    }
    let mut table = Table::new(&["HOOK", "REASON", "EFFECT", "COUNT", "MEANING"]);
    for row in rows {
        table.row([
            row.hook.to_owned(),
            row.reason.to_owned(),
            row.effect.to_owned(),
            row.count.to_string(),
            row.description.trim().to_owned(),
        ]);
    }
    table.judged(&["EFFECT"], tone)
}

/// Refused may well be right, but that is where to look first.
fn tone(effect: &str) -> Option<Tone> {
    match effect {
        "refuse" => Some(Tone::Bad),
        "translate" => Some(Tone::Good),
        _ => None,
    }
}

fn growing_table(rows: &[Row]) -> Table {
    let header = ["HOOK", "REASON", "EFFECT", "PER-SECOND", "COUNT", "MEANING"];
    let mut table = Table::new(&header);
    for row in rows {
        table.row([
            row.hook.to_owned(),
            row.reason.to_owned(),
            row.effect.to_owned(),
            row.per_second.map(shown).unwrap_or_default(),
            row.count.to_string(),
            row.description.trim().to_owned(),
        ]);
    }
    table.judged(&["EFFECT"], tone)
}

#[cfg(test)]
mod tests {
    use lb_common::{Hook, Reason};

    use super::*;

    fn counter(reason: Reason, count: u64) -> Counter {
        Counter {
            hook: Hook::Xdp,
            reason,
            count,
        }
    }

    #[test]
    fn what_is_refused_now_comes_first() {
        let first = [
            counter(Reason::NewFlow, 10),
            counter(Reason::BadSlot, 5),
            counter(Reason::FlowTableFull, 7),
        ];
        let second = [
            counter(Reason::BadSlot, 5),
            counter(Reason::NewFlow, 60),
            counter(Reason::NoBackend, 10),
            counter(Reason::FlowTableFull, 8),
            counter(Reason::MasqueradeExhausted, 0),
        ];
        let rows = growing(&first, &second, Duration::from_secs(5));
        let rates: Vec<_> = rows
            .iter()
            .map(|row| (row.reason, row.per_second))
            .collect();
        assert_eq!(
            rates,
            [
                (Reason::FlowTableFull.name(), Some(0.2)),
                (Reason::NoBackend.name(), Some(2.0)),
                (Reason::NewFlow.name(), Some(10.0)),
                (Reason::BadSlot.name(), Some(0.0)),
            ]
        );
        let often: Vec<_> = rows.iter().map(Row::how_often).collect();
        assert_eq!(often[0], "8 times, now 0.2 a second");
        assert_eq!(often[3], "5 times, and not now");
        let table = table(&rows).to_string();
        let line = table.lines().nth(1).expect("a row");
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(words[2..5], ["refuse", "0.2", "8"], "{table}");
    }

    #[test]
    fn without_a_second_look_nothing_is_said_of_now() {
        let rows: Vec<_> = rows(&[counter(Reason::BadSlot, 5)]).collect();
        assert_eq!(rows[0].how_often(), "5 times");
        assert!(!table(&rows).to_string().contains("PER-SECOND"));
        let json = serde_json::to_value(&rows).expect("JSON");
        assert!(json[0].get("per_second").is_none(), "{json}");
    }

    #[test]
    fn what_happens_is_never_shown_as_nothing() {
        let minute = Duration::from_secs(60);
        let shown = [0, 1, 120, 700, 60_000].map(|count| shown(per_second(count, minute)));
        assert_eq!(shown, ["0", "<0.1", "2.0", "12", "1000"]);
    }

    #[test]
    fn a_map_that_was_made_anew_has_no_past() {
        let first = [counter(Reason::NewFlow, 100)];
        let second = [counter(Reason::NewFlow, 3)];
        let rows = growing(&first, &second, Duration::from_secs(1));
        assert_eq!(rows[0].per_second, Some(0.0));
    }
}
