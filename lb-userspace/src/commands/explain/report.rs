//! The answer, for programs and for people.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use serde::Serialize;

use super::{
    choice::{Candidate, Kept, Policy, odds},
    frontend::{Frontend, Near},
    place::Place,
    verdict::Verdict,
    walk::Step,
};
use crate::{commands::PortId, datapath::trial::Ends};

/// Candidates that a page names before it counts the rest.
const SHOWN: usize = 8;

/// `klb explain -o json`, on which other programs rely.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) packet: Packet,
    pub(super) at: Place,
    pub(super) frontend: Option<Frontend>,
    /// Where none matches, those that nearly do.
    pub(super) nearest: Vec<Near>,
    /// The Service ports that have the destination as a backend.
    pub(super) backend_of: Vec<PortId>,
    pub(super) policy: Option<Policy>,
    pub(super) affinity: Option<Kept>,
    pub(super) candidates: Vec<Candidate>,
    /// The living flow that the packet is of.
    pub(super) flow: Option<Flow>,
    pub(super) steps: Vec<Step>,
    pub(super) backend: Option<Backend>,
    pub(super) rewrite: Option<Rewrite>,
    pub(super) masquerade: Option<Masquerade>,
    pub(super) verdict: Verdict,
    pub(super) notes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Packet {
    pub(super) protocol: String,
    /// `SYN` and its like.
    pub(super) kind: &'static str,
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    /// The port that it is from was not given.
    pub(super) port_assumed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Flow {
    pub(super) state: &'static str,
    pub(super) idle_seconds: u32,
    /// What its packets become.
    pub(super) becomes: Ends,
    pub(super) backend: SocketAddr,
    /// The backend still belongs to the Service.
    pub(super) backend_lives: bool,
}

/// The backend that this packet gets.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Backend {
    pub(super) address: IpAddr,
    pub(super) port: u16,
    /// `null` for one that is none of the candidates.
    pub(super) local: Option<bool>,
    /// `flow`, `affinity`, `only`, `random` or `maglev`.
    pub(super) by: &'static str,
    /// The odds of another client.
    pub(super) share: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Rewrite {
    pub(super) from: Change,
    pub(super) to: Change,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Change {
    pub(super) was: SocketAddr,
    pub(super) becomes: SocketAddr,
}

impl Rewrite {
    /// `None` if nothing changes.
    pub(super) fn new(was: Ends, becomes: Ends) -> Option<Self> {
        (was != becomes).then_some(Self {
            from: Change {
                was: was.src,
                becomes: becomes.src,
            },
            to: Change {
                was: was.dst,
                becomes: becomes.dst,
            },
        })
    }
}

impl Change {
    fn text(self) -> String {
        if self.was == self.becomes {
            format!("{} (as it was)", self.was)
        } else {
            format!("{} → {}", self.was, self.becomes)
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Masquerade {
    pub(super) address: IpAddr,
    pub(super) port: u16,
    pub(super) why: String,
}

/// Lines with a word before them.
#[derive(Default)]
struct Page(String);

impl Page {
    fn line(&mut self, word: &str, text: &str) {
        // Writing to a String does not fail.
        let _ok = writeln!(self.0, "{word:<12}{text}");
    }

    fn lines(&mut self, word: &str, lines: impl IntoIterator<Item = String>) {
        let mut word = word;
        for line in lines {
            self.line(word, &line);
            word = "";
        }
    }
}

impl Report {
    pub(super) fn page(&self) -> String {
        let mut page = Page::default();
        page.line("packet", &self.packet_text());
        page.line("at", &self.at.text());
        match &self.frontend {
            Some(frontend) => page.line("frontend", &frontend.text()),
            None => page.lines("frontend", self.no_frontend()),
        }
        if let Some(policy) = &self.policy {
            page.line("policy", &policy.text());
        }
        if let Some(kept) = &self.affinity {
            page.line("affinity", &kept.text());
        }
        page.lines("candidates", self.candidate_lines());
        if let Some(flow) = &self.flow {
            page.line("flow", &flow.text());
        }
        page.lines("steps", self.step_lines());
        if let Some(backend) = &self.backend {
            page.line("backend", &self.backend_text(backend));
        }
        if let Some(Rewrite { from, to }) = self.rewrite {
            page.line("rewrite", &format!("to    {}", to.text()));
            page.line("", &format!("from  {}", from.text()));
        }
        if let Some(Masquerade { address, port, why }) = &self.masquerade {
            let text = format!("as {}: {why}", SocketAddr::new(*address, *port));
            page.line("masquerade", &text);
        }
        page.lines("note", self.notes.iter().cloned());
        let Verdict {
            outcome,
            reason,
            explanation,
        } = &self.verdict;
        let reason = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
        page.line("verdict", &format!("{outcome}{reason}: {explanation}"));
        page.0
    }

    fn packet_text(&self) -> String {
        let Packet {
            protocol,
            kind,
            from,
            to,
            port_assumed,
        } = &self.packet;
        match (port_assumed, self.at.is_socket()) {
            // A call has none.
            (true, true) => format!("{protocol} {kind}, {} → {to}", from.ip()),
            (true, false) => {
                let port = from.port();
                format!("{protocol} {kind}, {from} → {to} (port {port} assumed)")
            }
            (false, _) => format!("{protocol} {kind}, {from} → {to}"),
        }
    }

    fn no_frontend(&self) -> Vec<String> {
        let mut lines = vec!["none".to_owned()];
        if !self.nearest.is_empty() {
            lines[0] += "; the nearest are";
        }
        let near = self.nearest.iter();
        lines
            .extend(near.map(|near| format!("{} ({})", near.frontend.text(), near.differs.text())));
        lines
    }

    fn slots(&self) -> u32 {
        self.candidates
            .iter()
            .map(|candidate| candidate.slots)
            .sum()
    }

    fn candidate_lines(&self) -> Vec<String> {
        let slots = self.slots();
        let candidates = self.candidates.iter().take(SHOWN);
        let mut lines: Vec<_> = candidates
            .map(|candidate| {
                let whom = candidate.sees;
                let addr = candidate.addr().to_string();
                let place = candidate.place();
                let odds = odds(candidate.slots, slots);
                format!("{addr:<24}{place:<8}{odds:<7}sees the {whom}")
            })
            .collect();
        if self.candidates.len() > SHOWN {
            lines.push(format!("and {} more", self.candidates.len() - SHOWN));
        }
        if lines.is_empty() && self.frontend.is_some() {
            lines.push("none".to_owned());
        }
        lines
    }

    fn step_lines(&self) -> Vec<String> {
        let steps = self.steps.iter();
        steps
            .map(|step| {
                let at = match &step.device {
                    Some(device) => format!("{} {device}", step.hook),
                    None => step.hook.to_owned(),
                };
                let how = if step.run { "" } else { " (not run)" };
                format!("{at:<18}{}{how}: {}", step.reason, step.description)
            })
            .collect()
    }

    fn backend_text(&self, backend: &Backend) -> String {
        let addr = SocketAddr::new(backend.address, backend.port);
        let slots = self.slots();
        let mut candidates = self.candidates.iter();
        let own = candidates.find(|candidate| candidate.addr() == addr);
        let odds = own.map_or_else(String::new, |own| odds(own.slots, slots));
        let by = match backend.by {
            "flow" => "that of the flow".to_owned(),
            "affinity" => "kept by affinity".to_owned(),
            "only" => "the only one".to_owned(),
            "maglev" => format!("by the Maglev table: {odds} of it"),
            _ => format!("drawn, with odds of {odds}"),
        };
        let place = match backend.local {
            Some(true) => ", on this node",
            Some(false) => ", on another node",
            None => "",
        };
        format!("{addr}{place}; {by}")
    }
}

impl Flow {
    fn text(&self) -> String {
        let Self {
            state,
            idle_seconds,
            backend,
            backend_lives,
            becomes: _,
        } = self;
        let gone = if *backend_lives {
            ""
        } else {
            ", which has left the Service"
        };
        format!("{state}, idle for {idle_seconds}s, with {backend}{gone}")
    }
}
