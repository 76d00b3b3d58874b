//! What the maps say now, and again and again.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use lb_common::{
    flow::State,
    service::{BackendRef, ServiceMeta},
};

use super::picture::Picture;
use crate::{
    args::Paths,
    commands::open_pins,
    datapath::{
        Maps as _,
        kernel::{Counter, Counters, Flow, KernelMaps, Member},
        pins::Pins,
        traffic::{History, Totals, TrafficTable},
    },
};

/// Of the time, at most this part is spent on reading the tables of flows, which
/// takes as long as they are full.
const SHARE_FOR_FLOWS: u32 = 20;

/// Seconds of silence from which on a flow without an answer is one that will
/// hardly get any.
const SILENCE: u32 = 2;

/// What was counted until a moment.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    pub(super) at: Instant,
    pub(super) ports: BTreeMap<u32, ServiceMeta>,
    pub(super) members: BTreeMap<BackendRef, Member>,
    pub(super) services: BTreeMap<u32, Totals>,
    /// Of those that have counters of their own.
    pub(super) backends: BTreeMap<BackendRef, Totals>,
    /// Of all others, and of flows that have outlived their backends.
    pub(super) rest: Totals,
    pub(super) counters: Vec<Counter>,
}

/// Flows that packets are translated by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(super) struct FlowCount {
    /// All, those included that have just ended.
    pub(super) active: u64,
    /// Of these, those that the backend or the client has reset.
    pub(super) reset: u64,
    /// Of these, those that wait in vain: opened, and silent for two seconds.
    pub(super) unanswered: u64,
}

impl FlowCount {
    fn add(&mut self, flow: &Flow) {
        self.active += 1;
        match flow.state {
            State::Reset => self.reset += 1,
            State::Opening | State::Unreplied if flow.idle >= SILENCE => self.unanswered += 1,
            _ => {}
        }
    }
}

/// Flows by Service and by backend.
#[derive(Clone, Debug, Default)]
pub(super) struct FlowCounts {
    pub(super) services: BTreeMap<u32, FlowCount>,
    pub(super) backends: BTreeMap<BackendRef, FlowCount>,
}

impl FlowCounts {
    pub(super) fn of(flows: &[Flow]) -> Self {
        let mut counts = Self::default();
        for flow in flows {
            counts.services.entry(flow.service).or_default().add(flow);
            counts.backends.entry(flow.life).or_default().add(flow);
        }
        counts
    }
}

/// Reads the maps of one pin folder, and tells what has changed since.
pub(super) struct Meter {
    pins: Pins,
    history: History,
    before: Reading,
    flows: FlowCounts,
    flows_are_due: Instant,
}

impl Meter {
    /// Reads for the first time.
    ///
    /// # Errors
    ///
    /// If nothing is pinned, or it may not be read.
    pub(super) fn start(paths: &Paths) -> anyhow::Result<Self> {
        let pins = open_pins(paths)?;
        let mut history = History::default();
        let (_, before) = read(&pins, &mut history, None)?;
        Ok(Self {
            pins,
            history,
            before,
            flows: FlowCounts::default(),
            flows_are_due: Instant::now(),
        })
    }

    /// Reads again. The maps are opened every time: those of before may have been
    /// removed meanwhile.
    ///
    /// # Errors
    ///
    /// As [`Self::start`]; the next try may succeed.
    pub(super) fn read(&mut self) -> anyhow::Result<Picture> {
        let (maps, now) = read(&self.pins, &mut self.history, Some(&self.before))?;
        self.read_flows(&maps)?;
        let picture = Picture::between(&self.before, &now, &self.flows);
        self.before = now;
        Ok(picture)
    }

    fn read_flows(&mut self, maps: &KernelMaps) -> anyhow::Result<()> {
        let began = Instant::now();
        if began >= self.flows_are_due {
            self.flows = FlowCounts::of(&maps.flows()?);
            self.flows_are_due = began + pause_after(began.elapsed());
        }
        Ok(())
    }
}

/// From the beginning of one look at the flows to the next.
fn pause_after(took: Duration) -> Duration {
    // What is done in a moment may be done at every look.
    const MOMENT: Duration = Duration::from_millis(5);
    if took <= MOMENT {
        return Duration::ZERO;
    }
    took * SHARE_FOR_FLOWS
}

fn read(
    pins: &Pins,
    history: &mut History,
    before: Option<&Reading>,
) -> anyhow::Result<(KernelMaps, Reading)> {
    let maps = KernelMaps::open(pins)?;
    let table = TrafficTable::open(pins)?;
    let (ports, members) = (maps.metas()?, maps.members()?);
    for service in before.into_iter().flat_map(|before| before.renamed(&ports)) {
        history.forget(service);
    }
    history.update(&members, |backend| table.read(backend))?;
    history.retain_services(|service| ports.contains_key(&service));
    let counted = history.backends().filter(|(life, _)| table.counts(*life));
    let reading = Reading {
        at: Instant::now(),
        services: history.services().clone(),
        backends: counted.collect(),
        rest: table.rest()?,
        counters: Counters::open(pins)?.read()?,
        ports,
        members,
    };
    Ok((maps, reading))
}

impl Reading {
    /// Numbers of Services that have gone, or that are others' now.
    pub(super) fn renamed(&self, ports: &BTreeMap<u32, ServiceMeta>) -> Vec<u32> {
        let own = self.ports.iter();
        let renamed = own.filter(|(id, meta)| ports.get(id) != Some(meta));
        renamed.map(|(id, _)| *id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_counted_by_what_becomes_of_them() {
        let end = |text: &str| text.parse().expect("an address");
        let flow = |id, state, idle| Flow {
            protocol: lb_common::flow::TCP,
            client: end("192.0.2.9:1024"),
            frontend: end("10.96.0.1:80"),
            backend: end("10.244.0.5:3000"),
            service: 7,
            life: BackendRef { id, generation: 1 },
            state,
            idle,
        };
        let counts = FlowCounts::of(&[
            flow(1, State::Established, 100),
            flow(1, State::Opening, 1),
            flow(1, State::Opening, 2),
            flow(2, State::Unreplied, 5),
            flow(2, State::Reset, 5),
            flow(2, State::Closed, 5),
        ]);
        let count = |active, reset, unanswered| FlowCount {
            active,
            reset,
            unanswered,
        };
        assert_eq!(counts.services[&7], count(6, 1, 2));
        let backends: Vec<_> = counts.backends.into_values().collect();
        assert_eq!(backends, [count(3, 0, 1), count(3, 1, 1)]);
    }

    #[test]
    fn full_tables_of_flows_are_read_seldom() {
        let pause = |took| pause_after(Duration::from_millis(took)).as_millis();
        assert_eq!([2, 50, 400].map(pause), [0, 1000, 8000]);
    }
}
