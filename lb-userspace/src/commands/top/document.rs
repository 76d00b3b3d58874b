//! One look, printed: for pipes, files and programs.

use std::time::Duration;

use serde::Serialize;

use super::{
    figures::{percent, short},
    picture::{BackendRow, Picture, Rates, ServiceRow},
};
use crate::commands::{
    look::Look,
    status::counters::{self, shown},
    table::Table,
};

#[derive(Debug, Serialize)]
pub(super) struct Document {
    interval_seconds: f64,
    services: Vec<ServiceRow>,
    unattributed_per_second: Rates,
    refused: Vec<counters::Row>,
}

impl Document {
    pub(super) fn new(picture: Picture, interval: Duration) -> Self {
        let Picture {
            services,
            unattributed,
            refusals,
        } = picture;
        Self {
            interval_seconds: interval.as_secs_f64(),
            services,
            unattributed_per_second: unattributed,
            refused: refusals,
        }
    }

    /// Services; the backends of those that were asked for by name; and what is
    /// refused, if anything is.
    pub(super) fn text(&self, with_backends: bool, look: Look) -> String {
        let mut text = self.service_table().shown(look);
        let mut add = |table: Table| {
            text.push('\n');
            text.push_str(&table.shown(look));
        };
        if with_backends {
            add(self.backend_table());
        }
        if !self.refused.is_empty() {
            add(self.refusal_table());
        }
        text
    }

    fn service_table(&self) -> Table {
        let mut table = Table::new(&[
            "NAMESPACE",
            "SERVICE",
            "PROTOCOL",
            "BACKENDS",
            "CONN/S",
            "PACKETS/S",
            "BYTES/S",
            "FLOWS",
        ]);
        for row in &self.services {
            let ServiceRow {
                id: _,
                port,
                protocol,
                per_second,
                flows,
                backends,
            } = row;
            table.row([
                port.namespace.clone(),
                port.service(),
                protocol.clone(),
                backends.len().to_string(),
                short(per_second.connections),
                short(per_second.packets()),
                short(per_second.bytes()),
                flows.active.to_string(),
            ]);
        }
        table
    }

    fn backend_table(&self) -> Table {
        let mut table = Table::new(&[
            "NAMESPACE",
            "SERVICE",
            "BACKEND",
            "SHARE",
            "CONN/S",
            "PACKETS/S",
            "BYTES/S",
            "FLOWS",
            "RESET",
            "SILENT",
        ]);
        let services = self.services.iter();
        let rows =
            services.flat_map(|service| service.backends.iter().map(move |row| (service, row)));
        for (service, row) in rows {
            let rate = |of: fn(&Rates) -> f64| {
                let rates = row.per_second.as_ref();
                rates.map(|rates| short(of(rates))).unwrap_or_default()
            };
            let BackendRow { share, flows, .. } = row;
            table.row([
                service.port.namespace.clone(),
                service.port.service(),
                row.addr().to_string(),
                percent(*share),
                rate(|rates| rates.connections),
                rate(Rates::packets),
                rate(Rates::bytes),
                flows.active.to_string(),
                flows.reset.to_string(),
                flows.unanswered.to_string(),
            ]);
        }
        table
    }

    fn refusal_table(&self) -> Table {
        let mut table = Table::new(&["HOOK", "REFUSED", "PER-SECOND", "MEANING"]);
        for row in &self.refused {
            table.row([
                row.hook.to_owned(),
                row.reason.to_owned(),
                row.per_second.map(shown).unwrap_or_default(),
                row.description.trim().to_owned(),
            ]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{args::Sort, commands::top::draw::tests::picture};

    fn document() -> Document {
        let mut picture = picture();
        picture.sort(Sort::Connections);
        Document::new(picture, Duration::from_secs(1))
    }

    #[test]
    fn a_look_is_a_table_that_scripts_can_cut() {
        let text = document().text(false, Look::PLAIN);
        let rows: Vec<Vec<_>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(rows[0][4..], ["CONN/S", "PACKETS/S", "BYTES/S", "FLOWS"]);
        let web = [
            "shop", "web:http", "TCP", "3", "1234", "12.3k", "4.6M", "345",
        ];
        assert_eq!(rows[1], web);
        assert!(rows.iter().all(|row| !row.contains(&"10.244.0.5:3000")));
        assert!(text.contains("no_backend"), "{text}");
    }

    #[test]
    fn backends_are_there_if_a_service_is_named() {
        let text = document().text(true, Look::PLAIN);
        let line = text.lines().find(|line| line.contains("10.244.0.5:3000"));
        let words: Vec<_> = line.expect("a backend").split_whitespace().collect();
        assert_eq!(words[3..], ["50%", "617", "6150", "2.3M", "170", "2", "0"]);
    }

    #[test]
    fn json_names_every_figure() {
        let json = serde_json::to_value(document()).expect("JSON");
        let web = &json["services"][0];
        assert_eq!(web["name"], "web");
        assert_eq!(web["per_second"]["connections"], 1234.0);
        assert_eq!(web["backends"][0]["address"], "10.244.0.5");
        assert_eq!(web["backends"][0]["share"], 0.5);
        assert_eq!(web["backends"][0]["flows"]["reset"], 2);
        assert_eq!(json["refused"][0]["reason"], "no_backend");
        assert_eq!(json["interval_seconds"], 1.0);
    }
}
