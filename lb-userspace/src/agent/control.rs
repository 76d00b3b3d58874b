//! The task that owns the desired state and the maps: from what the source tells
//! to what the kernel has.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use nix::time::{ClockId, clock_gettime};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout_at},
};
use tracing::{debug, info, warn};

use super::{backoff::Retry, failures::Failures, orphans};
use crate::{
    aside::aside,
    datapath::Maps,
    errors::Chain,
    health::Reporter,
    index::{Conflict, Index},
    k8s::{
        events::{Events, Reason},
        source::Source,
    },
    metrics::ControlMetrics,
    model::{Concern, Event, NamespacedName, Scope},
    plan::{Choice, ServicePlan},
    reconcile::{Reconciler, Report},
    record::Recorder,
};

/// So many entries are written at once, without giving way: in a fraction of a
/// millisecond.
const SHORT: usize = 256;

/// How often what is done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Changes that come sooner after a write than this are gathered for the
    /// next one. One that comes after a rest is written at once.
    pub batch_delay: Duration,
    /// Between two looks at what the maps hold.
    pub verify_interval: Duration,
}

/// What this task hears from the others and tells them.
pub(super) struct Links {
    /// On which `NodePort`s answer.
    pub addresses: watch::Receiver<BTreeSet<IpAddr>>,
    /// Tells which pods opted out, once that is known.
    pub opted_out: watch::Sender<Option<BTreeSet<IpAddr>>>,
    /// Is told what matters to connected UDP sockets.
    pub orphans: Arc<orphans::News>,
    /// Set once the first full state is in the maps.
    pub synced: watch::Sender<bool>,
    /// Is told how far the maps are, and what load balancers ask for.
    pub health: Reporter,
    /// Are told what an operator has to deal with.
    pub events: Events,
    /// Notes for commands which Services fail.
    pub recorder: Recorder,
    /// Count all that.
    pub metrics: ControlMetrics,
}

/// The desired state, and the maps that follow it.
pub(super) struct Control<M> {
    links: Links,
    /// The source has told all there is of these.
    known: BTreeSet<Scope>,
    index: Index,
    reconciler: Reconciler<M>,
    /// Whom it concerns that something cannot be understood.
    unknown: BTreeSet<Concern>,
    /// The Services that an earlier run left in the maps and this one has not
    /// written yet.
    inherited: BTreeSet<NamespacedName>,
    /// The conflicts that were logged, to say each once.
    conflicts: BTreeMap<NamespacedName, Vec<Conflict>>,
    failures: Failures,
    /// What an earlier run left and nobody owns is still there.
    strays: Option<Retry>,
    pace: Pace,
    /// When the maps are looked at next.
    verify_at: Instant,
    /// The last look failed.
    unverified: Option<Retry>,
}

/// What is left to do after the maps were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Complete,
    /// Some Services have no room. More will not come of trying.
    NoRoom,
    /// Some writes failed.
    Failed,
}

impl<M: Maps> Control<M> {
    /// Takes over what the maps hold. Writes nothing yet.
    pub(super) fn new(
        mut index: Index,
        maps: M,
        mut links: Links,
        pace: Pace,
    ) -> anyhow::Result<Self> {
        index.set_node_addresses(links.addresses.borrow_and_update().clone());
        let reconciler = Reconciler::restore(maps).context("reading the maps of an earlier run")?;
        Ok(Self {
            links,
            known: BTreeSet::new(),
            index,
            unknown: BTreeSet::new(),
            inherited: reconciler.services(),
            reconciler,
            conflicts: BTreeMap::new(),
            pace,
            verify_at: Instant::now() + pace.verify_interval,
            unverified: None,
            failures: Failures::default(),
            strays: None,
        })
    }

    /// Follows the source, for ever.
    pub(super) async fn run(mut self, mut source: Source) -> anyhow::Result<()> {
        self.read_everything(&mut source).await;
        loop {
            self.tell_opted_out();
            let outcome = self.reconcile(Instant::now());
            if outcome != Outcome::Failed {
                self.links.synced.send_replace(true);
            }
            self.wait(&mut source).await?;
        }
    }

    fn tell_opted_out(&self) {
        if !self.known.contains(&Scope::Pods) {
            return;
        }
        let addresses = Some(self.index.opted_out());
        self.links.opted_out.send_if_modified(|told| {
            let changed = *told != addresses;
            *told = addresses;
            changed
        });
    }

    /// Reads until the source has told all there is of Services. Only then may
    /// the maps be written: what is missing until then would be taken for
    /// deleted.
    async fn read_everything(&mut self, source: &mut Source) {
        while !self.known.contains(&Scope::Services) {
            let events = source.next().await;
            self.take_in(events);
        }
        self.begin();
    }

    /// What an earlier run left of Services that are no more is looked at, too.
    fn begin(&mut self) {
        for service in &self.inherited {
            self.index.mark(service.clone());
        }
    }

    fn take_in(&mut self, events: Vec<Event>) {
        for event in events {
            self.links.metrics.heard(&event, self.index.trigger(&event));
            match event {
                Event::Apply(object) => self.index.apply(object),
                Event::Delete(object) => self.index.delete(&object),
                Event::Unknown(unknown) => self.unknown = unknown,
                Event::Synced(scope) => {
                    self.known.insert(scope);
                }
            }
        }
    }

    /// Waits for news, or for the time of the next try, and for what else comes
    /// until the next write is due.
    async fn wait(&mut self, source: &mut Source) -> anyhow::Result<()> {
        let due = Instant::now() + self.pace.batch_delay;
        let strays = self.strays.map(|retry| retry.due());
        let retry = self.failures.next_due().into_iter().chain(strays).min();
        self.take_news(source, retry).await?;
        while Instant::now() < due {
            match timeout_at(due, self.take_news(source, None)).await {
                Ok(taken) => taken?,
                Err(_elapsed) => break,
            }
        }
        Ok(())
    }

    async fn take_news(
        &mut self,
        source: &mut Source,
        retry: Option<Instant>,
    ) -> anyhow::Result<()> {
        let retry = async {
            match retry {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            events = source.next() => {
                self.take_in(events);
            }
            changed = self.links.addresses.changed() => {
                changed.context("the node's addresses are not followed any more")?;
                let addresses = self.links.addresses.borrow_and_update().clone();
                info!(?addresses, "the node's addresses have changed");
                self.index.set_node_addresses(addresses);
            }
            () = retry => {}
            () = sleep_until(self.verify_at) => self.verify(Instant::now()),
        }
        Ok(())
    }

    /// Looks whether the maps still hold what was written, and mends them.
    fn verify(&mut self, now: Instant) {
        let result = aside(|| self.reconciler.verify());
        self.links.metrics.verified(result.as_ref().ok());
        self.verify_at = now + self.pace.verify_interval;
        match result {
            Ok(drift) => {
                self.unverified = None;
                debug!(drift = drift.len(), took = ?now.elapsed(), "the maps were verified");
            }
            Err(error) => {
                warn!(error = %Chain(&error), "the maps cannot be verified; trying again");
                let retry = self.unverified.get_or_insert_with(|| Retry::new(now));
                retry.failed(now);
                self.verify_at = self.verify_at.min(retry.due());
            }
        }
    }

    /// Writes what has changed, and what failed before and is due.
    fn reconcile(&mut self, now: Instant) -> Outcome {
        for service in self.failures.due(now) {
            self.index.mark(service.clone());
        }
        self.hold();
        let mut plans = Vec::new();
        for (plan, conflicts) in self.index.take_changes() {
            self.log_conflicts(&plan, conflicts);
            plans.push(plan);
        }
        self.links.health.begin(&plans);
        let is_short = self.is_short(&plans);
        let mut write = || {
            let before = own_time();
            let report = self.reconciler.apply(&plans, now.into_std());
            (report, own_time().saturating_sub(before))
        };
        // Writing ten thousand Services takes a while, and others have work too.
        let (report, wrote) = if is_short { write() } else { aside(write) };
        let took = now.elapsed();
        log_written(&plans, &report);
        if report.ended {
            self.links.orphans.ended();
        }
        // At the start all frontends may be new, and sockets are kube-proxy's.
        if *self.links.synced.borrow() && !report.begun.is_empty() {
            self.links.orphans.begun(report.begun.clone());
        }
        debug!(
            services = plans.len(),
            writes = report.writes,
            failed = report.failed.len(),
            ?wrote,
            ?took,
            "reconciled"
        );
        self.remember(&plans, &report, now);
        let metrics = &mut self.links.metrics;
        metrics.written(&plans, &report, took);
        metrics.failing(self.failures.len());
        self.links.recorder.synced(self.failures.errors());
        self.links.health.finish(&self.failures.waiting());
        let (leaving, checks) = (self.index.leaving(), self.index.checks());
        self.links.health.tell(leaving, checks);
        self.outcome()
    }

    /// Whether the plans are written in about the time that it takes to have
    /// another thread serve the others: waking it, and going on beside it.
    fn is_short(&self, plans: &[ServicePlan]) -> bool {
        let is_first = !*self.links.synced.borrow();
        let entries: usize = plans.iter().map(most_entries).sum();
        !is_first && self.strays.is_none() && entries <= SHORT
    }

    /// Remembers what failed, for another try, and that all else is as planned.
    fn remember(&mut self, plans: &[ServicePlan], report: &Report, now: Instant) {
        let failed: BTreeSet<_> = report.failed.iter().map(|(service, _)| service).collect();
        for plan in plans {
            if !failed.contains(&plan.service) {
                self.failures.settled(&plan.service);
                self.inherited.remove(&plan.service);
            }
        }
        for (service, error) in &report.failed {
            if let Some(error) = self.failures.failed(service, error, now) {
                warn!(%service, error, "keeps its previous state in the maps");
            }
            let (reason, note) = (Reason::FailedToProgramService, Chain(error).to_string());
            self.links.events.tell_service(reason, service, note);
        }
        match (&report.unowned, &mut self.strays) {
            (None, strays) => *strays = None,
            (Some(_), Some(retry)) => retry.failed(now),
            (Some(error), strays @ None) => {
                warn!(error = %Chain(error), "what an earlier run left is still there");
                *strays = Some(Retry::new(now));
            }
        }
    }

    fn outcome(&self) -> Outcome {
        if self.strays.is_some() || !self.failures.waiting().is_empty() {
            Outcome::Failed
        } else if self.failures.is_empty() {
            Outcome::Complete
        } else {
            Outcome::NoRoom
        }
    }

    /// Finds the Services that must stay as they are.
    fn hold(&mut self) {
        let inherited = self.inherited.iter();
        let staying = inherited.filter(|service| self.must_stay(service));
        let staying = staying.map(|service| (service.clone(), self.reconciler.frontends(service)));
        let staying = staying.collect();
        for service in self.index.hold(staying) {
            warn!(%service, "stays as it is in the maps: what describes it cannot be understood");
            self.failures.settled(&service);
        }
    }

    /// Whether a Service keeps what an earlier run gave it: a description of it
    /// is there, or may be there, and cannot be understood. What this run has
    /// understood once, its source remembers.
    fn must_stay(&self, inherited: &NamespacedName) -> bool {
        self.unknown.contains(&Concern::Service(inherited.clone()))
            || self.unknown.contains(&Concern::Anyone) && !self.index.knows_all_of(inherited)
    }

    fn log_conflicts(&mut self, plan: &ServicePlan, conflicts: Vec<Conflict>) {
        let service = &plan.service;
        let logged = self.conflicts.remove(service).unwrap_or_default();
        for conflict in conflicts
            .iter()
            .filter(|conflict| !logged.contains(conflict))
        {
            let Conflict { key, owner } = conflict;
            warn!(%service, frontend = %key, %owner, "an older Service has this frontend");
            let note = format!("{owner}, an older Service, has {key}");
            let events = &self.links.events;
            events.tell_service(Reason::FrontendConflict, service, note);
        }
        if !conflicts.is_empty() {
            self.conflicts.insert(service.clone(), conflicts);
        }
    }
}

/// How many entries a plan has, at most; most Services have a list for several
/// frontends.
fn most_entries(plan: &ServicePlan) -> usize {
    let ports = plan.ports.iter().map(|port| {
        let slots = match port.choice {
            Choice::Maglev(size) => size as usize,
            Choice::Random | Choice::Affinity(_) => port.alive.len(),
        };
        port.frontends.len() * (1 + slots)
    });
    1 + ports.sum::<usize>()
}

/// CPU time of this thread; without such a clock none.
fn own_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// A line for each Service that has changed, or one for many: a start with ten
/// thousand is one thing to read about.
fn log_written(plans: &[ServicePlan], report: &Report) {
    const MANY: usize = 16;
    let Report {
        writes, changed, ..
    } = report;
    if changed.len() > MANY {
        info!(services = changed.len(), entries = writes, "written");
        return;
    }
    for plan in changed.iter().filter_map(|place| plans.get(*place)) {
        let ports = plan.ports.iter();
        let frontends: usize = ports.clone().map(|port| port.frontends.len()).sum();
        let endpoints: usize = ports.map(|port| port.alive.len()).sum();
        info!(service = %plan.service, frontends, endpoints, "written");
    }
}

#[cfg(test)]
mod batches;
#[cfg(test)]
mod histories;
#[cfg(test)]
mod steps;
#[cfg(test)]
mod tests;
