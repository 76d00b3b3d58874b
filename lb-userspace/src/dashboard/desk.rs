//! Who reads the maps for the dashboard: one reader, behind everybody else.
//!
//! What was read is good for a second, and for longer the longer it took to read.
//! So however many pages are open, they take a small part of one CPU, as one does.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use hyper::{StatusCode, body::Bytes};
use serde::Serialize;
use tokio::sync::{Mutex, watch};

use super::{
    Refusal,
    list::{Excerpt, Listing, Past, Selection},
    nice::behind,
};
use crate::{
    args::Paths,
    commands::{PortId, get::PortDetail, status::Status},
    datapath::{
        Maps as _, features::Features, kernel::KernelMaps, load::LoadError, pins::Pins,
        traffic::TrafficTable,
    },
    errors::Chain,
    health::{Now, View},
    metrics::ServiceTraffic,
};

/// For so long what was read is good, at least.
const FRESH: Duration = Duration::from_secs(1);

/// Of all time, reading takes no more than one part of so many.
const PARTS: u32 = 20;

/// Answers that are kept.
const ANSWERS: usize = 64;

/// What somebody wants to know.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wanted {
    /// As `klb status` has it, and how far the agent is.
    Status,
    /// Some of the Service ports.
    Services(Selection),
    /// One of them, with its frontends and backends.
    Port(PortId),
}

/// Where all of it comes from.
pub(super) struct Sources {
    node_name: String,
    paths: Paths,
    pins: Pins,
    maps: KernelMaps,
    table: TrafficTable,
    traffic: Arc<ServiceTraffic>,
    features: Features,
    ready: watch::Receiver<bool>,
    view: View,
    started: Instant,
}

impl Sources {
    pub(super) fn open(
        node_name: &str,
        paths: &Paths,
        traffic: Arc<ServiceTraffic>,
        ready: watch::Receiver<bool>,
        view: View,
    ) -> Result<Self, LoadError> {
        let pins = paths.pins();
        Ok(Self {
            node_name: node_name.to_owned(),
            paths: paths.clone(),
            maps: KernelMaps::open(&pins)?,
            table: TrafficTable::open(&pins)?,
            traffic,
            features: Features::probe(),
            ready,
            view,
            started: Instant::now(),
            pins,
        })
    }
}

/// Something that was read.
#[derive(Debug)]
struct Kept<T> {
    until: Instant,
    value: T,
}

impl<T> Kept<T> {
    /// What was read from `began` until `now`.
    fn new(value: T, began: Instant, now: Instant) -> Self {
        let cost = now.saturating_duration_since(began);
        let until = now + FRESH.max(cost.saturating_mul(PARTS));
        Self { until, value }
    }
}

/// The answers of late.
#[derive(Debug, Default)]
struct Answers(BTreeMap<Wanted, Kept<Bytes>>);

impl Answers {
    fn find(&self, wanted: &Wanted, now: Instant) -> Option<Bytes> {
        let kept = self.0.get(wanted).filter(|kept| now < kept.until);
        kept.map(|kept| kept.value.clone())
    }

    fn keep(&mut self, wanted: Wanted, answer: Kept<Bytes>, now: Instant) {
        self.0.retain(|_, kept| now < kept.until);
        if self.0.len() < ANSWERS {
            self.0.insert(wanted, answer);
        }
    }
}

/// The sources, and what was read from them of late.
struct Drawer {
    sources: Sources,
    answers: Answers,
    listing: Option<Kept<Arc<Listing>>>,
    past: Option<Past>,
}

/// The reader. Those who ask at once wait for each other.
pub(super) struct Desk(Arc<Mutex<Drawer>>);

impl Desk {
    pub(super) fn new(sources: Sources) -> Self {
        Self(Arc::new(Mutex::new(Drawer {
            sources,
            answers: Answers::default(),
            listing: None,
            past: None,
        })))
    }

    /// A JSON document.
    ///
    /// # Errors
    ///
    /// If the maps cannot be read, or have nothing of the kind.
    pub(super) async fn read(&self, wanted: Wanted) -> Result<Bytes, Refusal> {
        let mut drawer = Arc::clone(&self.0).lock_owned().await;
        if let Some(answer) = drawer.answers.find(&wanted, Instant::now()) {
            return Ok(answer);
        }
        let read = behind(move || drawer.read(wanted)).await;
        read.unwrap_or_else(|| Err(Refusal::failed("reading the maps has failed")))
    }
}

/// What `klb status` says, and more that only the agent knows.
#[derive(Debug, Serialize)]
struct StatusDocument<'a> {
    node: &'a str,
    /// When it was read, in seconds since the agent's start.
    at_seconds: f64,
    ready: bool,
    /// No update has waited for long to be written.
    follows: bool,
    #[serde(flatten)]
    status: Status,
}

#[derive(Debug, Serialize)]
struct PortDocument {
    /// As [`StatusDocument::at_seconds`].
    at_seconds: f64,
    #[serde(flatten)]
    detail: PortDetail,
}

impl Drawer {
    fn read(&mut self, wanted: Wanted) -> Result<Bytes, Refusal> {
        let began = Instant::now();
        let text = match &wanted {
            Wanted::Status => self.status(),
            Wanted::Services(selection) => self.services(selection, began),
            Wanted::Port(port) => match self.port(port) {
                Ok(Some(text)) => Ok(text),
                Ok(None) => {
                    let sentence = "there is no such Service port";
                    return Err(Refusal::new(StatusCode::NOT_FOUND, sentence));
                }
                Err(error) => Err(error),
            },
        };
        let text = text.map_err(|error| Refusal::failed(Chain(error.as_ref()).to_string()))?;
        let (text, now) = (Bytes::from(text), Instant::now());
        let answer = Kept::new(text.clone(), began, now);
        self.answers.keep(wanted, answer, now);
        Ok(text)
    }

    fn status(&self) -> anyhow::Result<String> {
        let Sources {
            node_name,
            paths,
            pins,
            maps,
            features,
            ready,
            view,
            started,
            ..
        } = &self.sources;
        // The time of the counters, which are read first.
        let at_seconds = started.elapsed().as_secs_f64();
        let document = StatusDocument {
            node: node_name,
            at_seconds,
            ready: *ready.borrow(),
            follows: view.is_healthy(Now::get()),
            status: Status::of_agent(paths, pins, maps, *features)?,
        };
        Ok(serde_json::to_string(&document)?)
    }

    fn services(&mut self, selection: &Selection, now: Instant) -> anyhow::Result<String> {
        let listing = self.listing(now)?;
        let excerpt: Excerpt<'_> = listing.select(selection);
        Ok(serde_json::to_string(&excerpt)?)
    }

    /// All of them, as they were a while ago or are now.
    fn listing(&mut self, now: Instant) -> anyhow::Result<Arc<Listing>> {
        let kept = self.listing.as_ref().filter(|kept| now < kept.until);
        if let Some(kept) = kept {
            return Ok(Arc::clone(&kept.value));
        }
        let reading = self.sources.traffic.read().context("reading the traffic")?;
        let services = self.sources.maps.services()?;
        let listing = Listing::new(&services, &reading, self.past.as_ref(), now);
        let listing = Arc::new(listing);
        let kept = Kept::new(Arc::clone(&listing), now, Instant::now());
        self.past = Some(Past::new(now, kept.until, reading.services));
        self.listing = Some(kept);
        Ok(listing)
    }

    fn port(&self, port: &PortId) -> anyhow::Result<Option<String>> {
        let Sources {
            maps,
            table,
            started,
            ..
        } = &self.sources;
        let at_seconds = started.elapsed().as_secs_f64();
        let Some(detail) = PortDetail::read(maps, table, port)? else {
            return Ok(None);
        };
        let document = PortDocument { at_seconds, detail };
        Ok(Some(serde_json::to_string(&document)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(name: &str) -> Wanted {
        Wanted::Port(PortId {
            namespace: "default".to_owned(),
            name: name.to_owned(),
            port_name: String::new(),
        })
    }

    #[test]
    fn what_took_long_is_good_for_longer() {
        let began = Instant::now();
        for (cost, life) in [(0, 1000), (50, 1000), (100, 2000), (3000, 60_000)] {
            let now = began + Duration::from_millis(cost);
            let kept = Kept::new((), began, now);
            assert_eq!(kept.until - now, Duration::from_millis(life), "{cost}");
        }
    }

    #[test]
    fn an_answer_is_given_again_while_it_is_good() {
        let mut answers = Answers::default();
        let now = Instant::now();
        let (web, mail) = (port("web"), port("mail"));
        answers.keep(web.clone(), Kept::new(Bytes::from("1"), now, now), now);
        for (wanted, after, found) in [
            (&web, 0, Some("1")),
            (&web, 999, Some("1")),
            (&web, 1000, None),
            (&mail, 0, None),
            (&Wanted::Status, 0, None),
        ] {
            let then = now + Duration::from_millis(after);
            let answer = answers.find(wanted, then);
            assert_eq!(answer.as_deref(), found.map(str::as_bytes), "{wanted:?}");
        }
    }

    #[test]
    fn answers_do_not_pile_up() {
        let mut answers = Answers::default();
        let now = Instant::now();
        for number in 0..2 * ANSWERS {
            let answer = Kept::new(Bytes::new(), now, now);
            answers.keep(port(&number.to_string()), answer, now);
        }
        assert_eq!(answers.0.len(), ANSWERS);
        let then = now + FRESH;
        answers.keep(Wanted::Status, Kept::new(Bytes::new(), then, then), then);
        assert_eq!(answers.0.len(), 1);
    }
}
