//! What the agent noted of itself: how far the maps are, and what it could make
//! nothing of.

use std::{io, mem, path::Path};

use serde::Serialize;

use crate::{
    commands::{get::seconds, table::Table},
    record::{Failing, Fault, Few, MINUTE, Record, Refusals, Refused, now},
};

use super::counters::Row;

/// What an agent noted last.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Noted {
    /// Seconds since then. An agent without news notes nothing.
    pub(super) age_seconds: u64,
    #[serde(flatten)]
    pub(super) record: Record,
    #[serde(skip)]
    refused: Vec<Refused>,
}

/// What was refused lately.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Lately {
    /// In so many seconds: a minute, if the agent has counted for so long.
    over_seconds: u64,
    refused: Vec<Refusals>,
}

impl Noted {
    /// What is in a state folder, of the agent with this process id, if one
    /// runs: what one before it noted says nothing about it.
    pub(super) fn read(state_dir: &Path, pid: Option<&str>) -> io::Result<Option<Self>> {
        let record = Record::read(state_dir)?;
        let record = record.filter(|record| pid.is_none_or(|pid| pid == record.pid.to_string()));
        Ok(record.map(|record| Self::at(record, now())))
    }

    pub(super) fn at(mut record: Record, now: u64) -> Self {
        Self {
            age_seconds: now.saturating_sub(record.written),
            refused: mem::take(&mut record.refused),
            record,
        }
    }

    /// What the counters have more than a minute ago.
    pub(super) fn lately(&self, counters: &[Row]) -> Option<Lately> {
        let now = self.record.written + self.age_seconds;
        let past = self.refused.iter().rfind(|old| old.at + MINUTE <= now);
        let past = past.or(self.refused.first())?;
        let before = |row: &Row| {
            let mut counts = past.counts.iter();
            let same = counts.find(|old| (&*old.hook, &*old.reason) == (row.hook, row.reason));
            same.map_or(0, |old| old.count)
        };
        let refused = counters.iter().filter(|row| row.is_refusal);
        let refused = refused.map(|row| Refusals {
            hook: row.hook.to_owned(),
            reason: row.reason.to_owned(),
            count: row.count.saturating_sub(before(row)),
        });
        Some(Lately {
            over_seconds: now.saturating_sub(past.at).min(MINUTE),
            refused: refused.filter(|refusals| refusals.count > 0).collect(),
        })
    }

    /// How long ago something was, at the time of the look.
    pub(super) fn ago(&self, time: u64) -> String {
        let seconds_ago = (self.record.written + self.age_seconds).saturating_sub(time);
        seconds(u32::try_from(seconds_ago).unwrap_or(u32::MAX))
    }

    /// How far the maps are, in a line.
    pub(super) fn summary(&self, is_running: bool) -> String {
        let Record {
            ready,
            synced,
            failing,
            unheard,
            ..
        } = &self.record;
        let mut parts = vec![match (ready, synced) {
            (false, _) => "not ready yet".to_owned(),
            (true, Some(time)) => format!("last written {} ago", self.ago(*time)),
            (true, None) => "nothing written yet".to_owned(),
        }];
        if failing.count > 0 {
            parts.push(format!("{} Services not as they should be", failing.count));
        }
        let unheard = unheard.iter();
        parts.extend(unheard.map(|unheard| format!("nothing heard of {}", unheard.what)));
        if !is_running {
            let noted = self.ago(self.record.written);
            parts.push(format!("as the agent noted {noted} ago"));
        }
        parts.join(", ")
    }

    /// Title, number of rows, and rows, of what there is to show.
    pub(super) fn tables(&self) -> Vec<(&'static str, usize, Table)> {
        let Record {
            failing, skipped, ..
        } = &self.record;
        let tables = [
            ("not written", failing.count, failing_table(failing)),
            (
                "skipped   as it makes no sense; what it described before stays",
                skipped.count,
                self.skipped_table(skipped),
            ),
        ];
        let tables = tables.into_iter();
        tables.filter(|(_, count, _)| *count > 0).collect()
    }

    fn skipped_table(&self, skipped: &Few<Fault>) -> Table {
        let mut table = Table::new(&[
            "KIND",
            "NAMESPACE",
            "NAME",
            "FIELD",
            "SKIPPED",
            "SINCE",
            "WHY",
            "WHERE",
        ]);
        for fault in &skipped.some {
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            table.row([
                text(&fault.kind),
                text(&fault.namespace),
                text(&fault.name),
                text(&fault.field),
                if fault.in_part { "in part" } else { "all" }.to_owned(),
                self.ago(fault.since),
                fault.message.replace('\n', " "),
                place(fault),
            ]);
        }
        more(&mut table, skipped.count, skipped.some.len());
        table
    }
}

impl Lately {
    /// In a line.
    pub(super) fn summary(&self) -> String {
        let Self {
            over_seconds,
            refused,
        } = self;
        if refused.is_empty() {
            return format!("nothing in the last {over_seconds}s");
        }
        let parts = refused.iter().map(|refusals| {
            let Refusals {
                hook,
                reason,
                count,
            } = refusals;
            format!("{count} {reason} at {hook}")
        });
        let parts: Vec<_> = parts.collect();
        format!("in the last {over_seconds}s: {}", parts.join(", "))
    }
}

/// Of a manifest: its file, and which document of it.
fn place(fault: &Fault) -> String {
    match (&fault.file, fault.document) {
        (Some(file), Some(document)) => format!("{file}, document {document}"),
        (Some(file), None) => file.clone(),
        (None, _) => String::new(),
    }
}

fn failing_table(failing: &Few<Failing>) -> Table {
    let mut table = Table::new(&["NAMESPACE", "SERVICE", "WHY"]);
    for service in &failing.some {
        table.row([
            service.namespace.clone(),
            service.name.clone(),
            service.error.clone(),
        ]);
    }
    more(&mut table, failing.count, failing.some.len());
    table
}

/// A last row that counts those which are not shown.
fn more(table: &mut Table, count: usize, shown: usize) {
    if count > shown {
        table.note(&format!("and {} more: see the agent's log", count - shown));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Unheard;

    fn noted(record: Record) -> Noted {
        let written = 1_000_000;
        Noted::at(Record { written, ..record }, written + 30)
    }

    #[test]
    fn how_far_the_maps_are_is_a_line() {
        let well = Record {
            ready: true,
            synced: Some(999_990),
            ..Record::default()
        };
        assert_eq!(noted(well.clone()).summary(true), "last written 40s ago");
        assert_eq!(
            noted(well.clone()).summary(false),
            "last written 40s ago, as the agent noted 30s ago"
        );
        assert_eq!(noted(Record::default()).summary(true), "not ready yet");
        let unwell = Record {
            failing: Few {
                count: 2,
                some: Vec::new(),
            },
            unheard: vec![Unheard {
                what: "Service".to_owned(),
                since: 999_000,
                error: "refused".to_owned(),
            }],
            ..well
        };
        assert_eq!(
            noted(unwell).summary(true),
            "last written 40s ago, 2 Services not as they should be, nothing heard of Service"
        );
    }

    #[test]
    fn of_what_was_refused_a_minute_counts() {
        let row = |reason, count, is_refusal| Row {
            hook: "xdp",
            reason,
            effect: "",
            count,
            per_second: None,
            description: "",
            is_refusal,
        };
        let rows = [
            row("no_backend", 9, true),
            row("bad_slot", 4, true),
            row("new_flow", 7, false),
        ];
        let refused = |at, count| Refused {
            at,
            counts: vec![Refusals {
                hook: "xdp".to_owned(),
                reason: "no_backend".to_owned(),
                count,
            }],
        };
        let said = |refused: Vec<Refused>, rows: &[Row]| {
            let lately = noted(Record {
                refused,
                ..Record::default()
            })
            .lately(rows);
            lately.map(|lately| lately.summary())
        };
        assert_eq!(said(Vec::new(), &rows), None);
        // The look is at 1,000,030.
        let long = vec![
            refused(999_000, 1),
            refused(999_960, 5),
            refused(999_990, 8),
        ];
        assert_eq!(
            said(long, &rows).as_deref(),
            Some("in the last 60s: 4 no_backend at xdp, 4 bad_slot at xdp")
        );
        let short = vec![refused(1_000_010, 9)];
        assert_eq!(
            said(short, &rows[..1]).as_deref(),
            Some("nothing in the last 20s")
        );
    }

    #[test]
    fn what_is_skipped_is_named_with_its_place() {
        assert!(noted(Record::default()).tables().is_empty());
        let fault = Fault {
            kind: Some("Service".to_owned()),
            namespace: Some("shop".to_owned()),
            name: Some("web".to_owned()),
            field: Some("spec.ports[0].port".to_owned()),
            message: "80000 is not between 1 and 65535".to_owned(),
            file: Some("web.yaml".to_owned()),
            document: Some(2),
            in_part: false,
            since: 999_910,
        };
        let record = Record {
            skipped: Few {
                count: 4,
                some: vec![fault],
            },
            ..Record::default()
        };
        let tables = noted(record).tables();
        let [(_, 4, table)] = &tables[..] else {
            panic!("{tables:?}");
        };
        assert_eq!(
            table.to_string(),
            "KIND      NAMESPACE   NAME   FIELD                SKIPPED   SINCE   \
             WHY                                WHERE\n\
             Service   shop        web    spec.ports[0].port   all       2m      \
             80000 is not between 1 and 65535   web.yaml, document 2\n\
             and 3 more: see the agent's log\n"
        );
    }

    #[test]
    fn what_another_process_noted_is_not_the_agents() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let recorder = crate::record::Recorder::new(folder.path(), true);
        recorder.ready();
        let own = std::process::id().to_string();
        let read = |pid: Option<&str>| Noted::read(folder.path(), pid).expect("read").is_some();
        assert!(read(Some(&own)) && read(None));
        assert!(!read(Some("1")));
    }
}
