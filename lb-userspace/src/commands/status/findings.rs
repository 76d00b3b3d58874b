//! What is wrong, in plain words: what keeps Services from being served as they
//! should be, and what is worth a look.

use lb_common::{Reason, names};

use super::{MapRow, Noted, Status};

/// From this share on, in percent, a map is worth a warning.
const NEARLY_FULL: usize = 90;

/// Seconds without news from the source, until the maps are taken to be behind.
const SILENCE: u64 = 60;

/// Reasons that no healthy node counts.
const ALARMING: [Reason; 5] = [
    Reason::FlowTableFull,
    Reason::RewriteFailed,
    Reason::BadSlot,
    Reason::MasqueradeExhausted,
    Reason::AnswerLimit,
];

/// What Services are made of. Who opted out matters less.
const OF_SERVICES: [&str; 4] = ["Service", "EndpointSlice", "Node", "manifests"];

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// Any of these makes the node unhealthy.
    pub(super) problems: Vec<String>,
    pub(super) warnings: Vec<String>,
}

impl Findings {
    pub(super) fn of(status: &Status) -> Self {
        let mut this = Self::default();
        this.agent(status);
        if let Some(noted) = &status.noted {
            this.noted(noted, status.agent.running);
        }
        this.layouts(status);
        this.sockets(status);
        this.devices(status);
        for map in &status.maps {
            this.map(map);
        }
        this.counters(status);
        this
    }

    fn problem(&mut self, text: impl Into<String>) {
        self.problems.push(text.into());
    }

    fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(text.into());
    }

    /// One that was stopped on purpose leaves a datapath that works, and nobody
    /// who follows changes.
    fn agent(&mut self, status: &Status) {
        if !status.agent.running {
            self.problem("no agent runs: traffic flows, changes of Services are not followed");
        }
    }

    fn noted(&mut self, noted: &Noted, is_running: bool) {
        let record = &noted.record;
        if is_running && !record.ready {
            self.problem("the agent is not ready: not all is in the maps, or not every hook is attached; its log tells why");
        }
        let failing = &record.failing;
        if failing.count > 0 {
            self.problem(format!(
                "{} should be",
                counted(
                    failing.count,
                    "Service is in the maps not as it",
                    "Services are in the maps not as they"
                )
            ));
        }
        for unheard in &record.unheard {
            let text = format!(
                "nothing is heard of {} since {}: {}",
                unheard.what,
                noted.ago(unheard.since),
                unheard.error
            );
            // A clock may have been set back meanwhile.
            let now = record.written.saturating_add(noted.age_seconds);
            let silence = now.saturating_sub(unheard.since);
            let matters = OF_SERVICES.contains(&unheard.what.as_str());
            if matters && silence >= SILENCE {
                self.problem(text);
            } else {
                self.warn(text);
            }
        }
        let skipped = &record.skipped;
        if skipped.count > 0 {
            self.warn(format!(
                "{} skipped; what they described before stays",
                counted(
                    skipped.count,
                    "object or manifest makes no sense to klb and is",
                    "objects or manifests make no sense to klb and are"
                )
            ));
        }
    }

    fn layouts(&mut self, status: &Status) {
        for layout in &status.draining {
            self.warn(format!(
                "connections of a klb with layout {layout} go on beside this one's; its programs \
                 go when they have had nothing to translate for --layout-drain"
            ));
        }
    }

    fn sockets(&mut self, status: &Status) {
        let noted = status.noted.as_ref();
        match status.sockets.len() {
            0 if noted.is_some_and(|noted| noted.record.ready && noted.record.sockets) => {
                self.problem(
                    "none of the socket hooks is attached, and the agent had attached them",
                );
            }
            count if (1..names::SOCKET_PROGRAMS.len()).contains(&count) => {
                self.problem("only some of the socket hooks are attached");
            }
            _ => {}
        }
        let mut devices = status.devices.iter();
        if status.pods == 0
            && !status.sockets.is_empty()
            && status.kernel.features.netns_cookie == Some(true)
            && devices.any(|device| device.role.as_deref() == Some("pod"))
        {
            self.warn("no network namespace of a pod is found: can the agent see --netns-dir?");
        }
    }

    fn devices(&mut self, status: &Status) {
        for device in &status.devices {
            // One without a name has gone, and the agent will forget it.
            if let Some(name) = &device.name
                && (device.tc_ingress.is_none() || device.tc_egress.is_none())
            {
                self.problem(format!("device {name} lacks a TC program"));
            }
        }
    }

    fn map(&mut self, map: &MapRow) {
        // What has ended stays in a map that evicts until its place is needed:
        // full is how such a map looks after a day of work.
        if map.evicts || map.percent() < NEARLY_FULL {
            return;
        }
        let text = format!(
            "map {} is {}% full: Services that do not fit keep their previous state",
            map.name,
            map.percent()
        );
        if map.entries >= map.max_entries as usize {
            self.problem(text);
        } else {
            self.warn(text);
        }
    }

    /// What was counted once may be long over; what is counted now is not.
    fn counters(&mut self, status: &Status) {
        for counter in &status.counters {
            if !ALARMING.map(Reason::name).contains(&counter.reason) {
                continue;
            }
            let text = format!(
                "{} at {}: {}",
                counter.reason,
                counter.hook,
                counter.how_often()
            );
            if counter.per_second.is_some_and(|rate| rate > 0.0) {
                self.problem(text);
            } else {
                self.warn(text);
            }
        }
    }
}

/// A number, and the words for one or for many.
fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        commands::{
            get::DeviceRow,
            status::{EVICTING, counters, tests::status},
        },
        record::{Few, Record, Unheard},
    };

    fn map(name: &'static str, entries: usize) -> MapRow {
        MapRow {
            name,
            entries,
            max_entries: 100,
            evicts: EVICTING.contains(&name),
        }
    }

    fn noted(record: Record) -> Noted {
        let record = Record {
            written: 10_000,
            ..record
        };
        Noted::at(record, 10_000)
    }

    #[test]
    fn a_healthy_node_has_nothing() {
        let ready = Record {
            ready: true,
            sockets: true,
            ..Record::default()
        };
        for record in [None, Some(noted(ready))] {
            let status = Status {
                noted: record,
                ..status()
            };
            let Findings { problems, warnings } = Findings::of(&status);
            assert_eq!(
                (problems.len(), warnings.len()),
                (0, 0),
                "{problems:?} {warnings:?}"
            );
        }
    }

    #[test]
    fn a_map_that_evicts_is_full_and_well() {
        let mut status = status();
        status.maps.extend(EVICTING.map(|name| map(name, 100)));
        let found = Findings::of(&status);
        assert!(found.problems.is_empty() && found.warnings.is_empty());
        status.maps.push(map(names::RANGES4, 99));
        let found = Findings::of(&status);
        assert!(found.problems.is_empty(), "{found:?}");
        assert!(found.warnings[0].contains("klb_range4 is 99% full"));
        status.maps.push(map(names::RANGES6, 100));
        let found = Findings::of(&status);
        assert!(found.problems[0].contains("klb_range6 is 100% full"));
    }

    fn device(name: &str, role: Option<&str>, tc_egress: Option<&'static str>) -> DeviceRow {
        DeviceRow {
            name: Some(name.to_owned()),
            index: 3,
            role: role.map(str::to_owned),
            tc_ingress: Some("tcx"),
            tc_egress,
            xdp: None,
        }
    }

    #[test]
    fn what_keeps_services_from_being_served_is_a_problem() {
        let mut status = status();
        status.agent.running = false;
        status.sockets.truncate(2);
        status.devices.push(device("eth0", None, None));
        let problems = Findings::of(&status).problems;
        let [agent, sockets, device] = &problems[..] else {
            panic!("{problems:?}");
        };
        assert!(agent.contains("no agent runs: traffic flows"), "{agent}");
        assert!(sockets.contains("some of the socket hooks"), "{sockets}");
        assert!(device.contains("eth0 lacks"), "{device}");
    }

    #[test]
    fn sockets_are_missed_where_they_should_be_served() {
        for (sockets, expected) in [(true, 1), (false, 0)] {
            let mut status = status();
            status.sockets.clear();
            status.noted = Some(noted(Record {
                ready: true,
                sockets,
                ..Record::default()
            }));
            assert_eq!(Findings::of(&status).problems.len(), expected);
        }
    }

    #[test]
    fn what_the_agent_noted_is_judged() {
        let unheard = |what: &str, since| Unheard {
            what: what.to_owned(),
            since,
            error: "refused".to_owned(),
        };
        let ready = Record {
            ready: true,
            ..Record::default()
        };
        for (record, problem, warning) in [
            (Record::default(), Some("is not ready"), None),
            (
                Record {
                    failing: Few {
                        count: 1,
                        some: Vec::new(),
                    },
                    ..ready.clone()
                },
                Some("1 Service is in the maps not as"),
                None,
            ),
            (
                Record {
                    skipped: Few {
                        count: 2,
                        some: Vec::new(),
                    },
                    ..ready.clone()
                },
                None,
                Some("2 objects or manifests make no sense to klb and are skipped"),
            ),
            (
                Record {
                    skipped: Few {
                        count: 1,
                        some: Vec::new(),
                    },
                    ..ready.clone()
                },
                None,
                Some("1 object or manifest makes no sense to klb and is skipped"),
            ),
            // The clock was set back since.
            (
                Record {
                    unheard: vec![unheard("Service", 20_000)],
                    ..ready.clone()
                },
                None,
                Some("nothing is heard of Service since 0s"),
            ),
            (
                Record {
                    unheard: vec![unheard("Service", 9_900)],
                    ..ready.clone()
                },
                Some("nothing is heard of Service since 100s: refused"),
                None,
            ),
            (
                Record {
                    unheard: vec![unheard("Service", 9_990)],
                    ..ready.clone()
                },
                None,
                Some("nothing is heard of Service since 10s"),
            ),
            (
                Record {
                    unheard: vec![unheard("Pod", 9_000)],
                    ..ready
                },
                None,
                Some("nothing is heard of Pod"),
            ),
        ] {
            let status = Status {
                noted: Some(noted(record)),
                ..status()
            };
            let Findings { problems, warnings } = Findings::of(&status);
            for (found, expected) in [(problems, problem), (warnings, warning)] {
                assert_eq!(found.len(), usize::from(expected.is_some()), "{found:?}");
                let as_expected = expected.is_none_or(|text| found[0].contains(text));
                assert!(as_expected, "{expected:?}: {found:?}");
            }
        }
    }

    #[test]
    fn what_was_counted_once_is_no_problem_and_what_is_counted_now_is() {
        let counter = |reason, per_second| counters::Row {
            hook: "xdp",
            reason,
            effect: "refuse",
            count: 4,
            per_second,
            description: "",
            is_refusal: true,
        };
        let mut status = status();
        status.counters = vec![
            counter("bad_slot", None),
            counter("masquerade_exhausted", Some(0.0)),
            counter("answer_limit", Some(2.0)),
            counter("no_backend", Some(2.0)),
        ];
        let found = Findings::of(&status);
        assert_eq!(
            found.problems,
            ["answer_limit at xdp: 4 times, now 2.0 a second"]
        );
        let warnings = found.warnings.join("\n");
        for part in ["bad_slot at xdp: 4", "masquerade_exhausted at xdp: 4"] {
            assert!(warnings.contains(part), "{part} in {warnings}");
        }
    }

    #[test]
    fn pods_that_are_not_found_are_a_warning() {
        let mut status = status();
        status
            .devices
            .push(device("veth1", Some("pod"), Some("tcx")));
        let found = Findings::of(&status);
        assert!(found.problems.is_empty(), "{found:?}");
        assert!(found.warnings[0].contains("--netns-dir"), "{found:?}");
    }
}
