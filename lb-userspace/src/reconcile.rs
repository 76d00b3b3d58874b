//! Makes the maps hold what the plans say, by the fewest writes and in an order
//! in which no reader ever sees half of a change.
//!
//! Adding: backends, slots of a range that nobody uses, who may use it, the name,
//! and last the frontend's entry, by whose one update the new set is in force.
//! Removing goes
//! the other way, and only after everything that a batch adds is there, so that
//! a frontend that changes hands is never without an entry.
//!
//! The maps are read at the start. From then on nobody else should write them;
//! [`Reconciler::verify`] looks whether that is so.

mod restore;
mod values;
mod verify;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use lb_common::{
    flow::UDP,
    names,
    service::{BackendRef, FRONTEND_REFUSE, ServiceEntry},
};

use self::values::{Known, Windows, cover, meta, place_of, wanted_backends};
pub(crate) use self::values::{entry, parked, table_size};
pub use self::verify::Drift;
use crate::{
    datapath::{Family, FrontendKey, MapError, Maps, SlotValue},
    ids::{BackendIds, Numbers},
    model::{NamespacedName, Protocol, ServicePort},
    plan::{FrontendPlan, PortPlan, ServicePlan},
    slots::FreeRanges,
};

/// How long a range of slots rests before it is used again. A program that read
/// the old entry has long ended by then.
const GRACE: Duration = Duration::from_secs(1);

/// Service ids are below this: many times what the maps hold, so that an id is
/// not used again soon, and few enough to keep a list of.
const SERVICE_IDS: u32 = 1 << 20;

/// So many Services of which nothing is in the maps are written together.
const MANY: usize = 64;

/// How many writes adding a Service took, and how it went.
type Counted = (u64, Result<(), MapError>);

/// Owns the maps.
pub struct Reconciler<M> {
    maps: M,
    writes: u64,
    /// A backend of a UDP port has gone in this batch.
    ended: bool,
    /// Frontends of UDP that were not there before this batch.
    begun: Vec<SocketAddr>,
    /// What the service maps hold. By hashes, as the ports are: a start asks for
    /// each several times, and comparing its way through a tree takes longer
    /// than all else that is done here.
    entries: HashMap<FrontendKey, ServiceEntry>,
    /// What is in the maps for the ports of a Service; none without any.
    ports: HashMap<NamespacedName, Vec<PortState>>,
    service_ids: Numbers,
    backend_ids: BackendIds,
    slots: BTreeMap<Family, FreeRanges>,
    /// That hold every `ClusterIP` since the start.
    networks: BTreeMap<Family, IpNet>,
    /// As the map has them, which may be wider after a start.
    written_networks: BTreeMap<Family, IpNet>,
    retired: Vec<Retired>,
    /// What an earlier run left and nobody owns, until the first batch.
    strays: Strays,
}

/// What is in the maps for one Service port. Its lists are short as a rule, and
/// kept in order.
#[derive(Debug)]
struct PortState {
    /// With the Service's and the protocol it names the port, across restarts.
    name: Box<str>,
    protocol: Protocol,
    id: u32,
    /// The number by which the map names it; `None` until it does.
    port: Option<u16>,
    frontends: Vec<FrontendKey>,
    backends: Vec<Known>,
    ranges: Vec<Range>,
    /// Who may use the frontends that are marked so.
    sources: BTreeSet<IpNet>,
}

/// A range of slots: the backends of a frontend, and behind them those that are
/// parked. An entry may lead to the first part of one only.
#[derive(Debug)]
struct Range {
    family: Family,
    first: u32,
    slots: Box<[SlotValue]>,
    /// An entry has led here, so it rests before it is used again.
    rests: bool,
}

#[derive(Debug)]
struct Retired {
    until: Instant,
    family: Family,
    first: u32,
    count: u32,
}

#[derive(Debug, Default)]
struct Strays {
    frontends: BTreeSet<FrontendKey>,
    /// That the frontends lead to.
    ranges: Vec<Range>,
    sources: BTreeSet<(u32, IpNet)>,
    metas: BTreeSet<u32>,
    backends: Vec<BackendRef>,
}

/// What a batch did.
#[derive(Debug, Default)]
pub struct Report {
    /// Map operations.
    pub writes: u64,
    /// Backends of UDP ports have gone: sockets may wait for them for ever.
    pub ended: bool,
    /// Frontends of UDP that were not there before: sockets that were connected
    /// to them earlier are not translated.
    pub begun: Vec<SocketAddr>,
    /// Which of the plans, by their places, needed writes and are in force now.
    pub changed: Vec<usize>,
    /// Services that are not as planned, and why. What they had, they keep.
    pub failed: Vec<(NamespacedName, MapError)>,
    /// Why something is still there that an earlier run left and nobody owns.
    pub unowned: Option<MapError>,
}

impl<M: Maps> Reconciler<M> {
    /// The Services of which something is in the maps.
    pub fn services(&self) -> BTreeSet<NamespacedName> {
        self.ports.keys().cloned().collect()
    }

    /// The frontends that a Service has in the maps.
    pub fn frontends(&self, service: &NamespacedName) -> BTreeSet<FrontendKey> {
        let ports = self.ports.get(service).into_iter().flatten();
        let frontends = ports.flat_map(|port| port.frontends.iter().map(|key| (port.id, *key)));
        frontends
            .filter(|(id, key)| {
                self.entries
                    .get(key)
                    .is_some_and(|entry| entry.service == *id)
            })
            .map(|(_, key)| key)
            .collect()
    }

    /// The maps, to look at.
    pub fn maps(&self) -> &M {
        &self.maps
    }

    /// Makes the maps hold what the plans say about their Services. A plan
    /// without ports removes its Service.
    pub fn apply(&mut self, plans: &[ServicePlan], now: Instant) -> Report {
        let before = self.writes;
        let mut report = Report::default();
        self.release_retired(now);
        let (added, is_first) = self.add(plans);
        for (place, (plan, (written, result))) in plans.iter().zip(added).enumerate() {
            let (removed, result) = self.counted(|this| match result {
                // There was nothing before, so there is nothing to remove.
                Ok(()) if is_first => Ok(()),
                Ok(()) => this.remove_rest(plan, now),
                // Another try begins where this one did.
                Err(error) => this.shed(&plan.service, now).and(Err(error)),
            });
            match result {
                Ok(()) if written + removed > 0 => report.changed.push(place),
                Ok(()) => {}
                Err(error) => report.failed.push((plan.service.clone(), error)),
            }
        }
        report.unowned = self.remove_strays(now).err();
        report.writes = self.writes - before;
        report.ended = std::mem::take(&mut self.ended);
        report.begun = std::mem::take(&mut self.begun);
        report
    }

    /// Adds what the plans say; how many writes each took, with its result, and
    /// whether there was nothing before. Then all is written together. If that
    /// fails, each Service is written for itself, so that what cannot be written
    /// of one is not missed by the others.
    fn add(&mut self, plans: &[ServicePlan]) -> (Vec<Counted>, bool) {
        let is_first = self.entries.is_empty() && self.ports.is_empty();
        if !is_first || plans.len() < MANY {
            return (self.add_each(plans), false);
        }
        let frontends = plans.iter().flat_map(|plan| &plan.ports);
        let frontends = frontends.map(|port| port.frontends.len()).sum();
        self.entries.reserve(frontends);
        self.ports.reserve(plans.len());
        self.maps.gather();
        let added = self.add_each(plans);
        let Err(error) = self.maps.flush() else {
            return (added, true);
        };
        tracing::warn!(%error, "not everything could be written at once");
        if let Err(error) = self.take_over() {
            tracing::warn!(%error, "what was written is not known");
        }
        (self.add_each(plans), false)
    }

    fn add_each(&mut self, plans: &[ServicePlan]) -> Vec<Counted> {
        plans
            .iter()
            .map(|plan| self.counted(|this| this.add_or_make_room(plan)))
            .collect()
    }

    /// How many writes something took, with its result.
    fn counted<T>(&mut self, action: impl FnOnce(&mut Self) -> T) -> (u64, T) {
        let before = self.writes;
        let result = action(self);
        (self.writes - before, result)
    }

    /// Adds what the plan says. Where a map is full, the frontends that the
    /// Service gives up anyway go first.
    fn add_or_make_room(&mut self, plan: &ServicePlan) -> Result<(), MapError> {
        match self.add_service(plan) {
            Err(error) if error.is_full() && self.remove_frontends(plan)? => self.add_service(plan),
            result => result,
        }
    }

    fn release_retired(&mut self, now: Instant) {
        let (over, resting) = std::mem::take(&mut self.retired)
            .into_iter()
            .partition(|range: &Retired| range.until <= now);
        self.retired = resting;
        for range in over {
            if let Some(free) = self.slots.get_mut(&range.family) {
                free.release(range.first, range.count);
            }
        }
    }

    /// Does something to the states of a Service's ports. Whatever comes of it, what
    /// is in the maps then is in the states.
    fn with_ports<T>(
        &mut self,
        service: &NamespacedName,
        action: impl FnOnce(&mut Self, &mut Vec<PortState>) -> T,
    ) -> T {
        let mut ports = self.ports.remove(service).unwrap_or_default();
        let result = action(self, &mut ports);
        if !ports.is_empty() {
            self.ports.insert(service.clone(), ports);
        }
        result
    }

    /// What is said of addresses comes last: it refuses every port that has no
    /// frontend, and those of the Service are to have theirs by then.
    fn add_service(&mut self, plan: &ServicePlan) -> Result<(), MapError> {
        let addresses = self.with_ports(&plan.service, |this, ports| {
            let mut addresses = Vec::new();
            ports.reserve_exact(plan.ports.len().saturating_sub(ports.len()));
            for port in &plan.ports {
                let place = this.place_of_port(&port.port, ports)?;
                this.add_port(&plan.service, port, &mut ports[place], &mut addresses)?;
            }
            Ok(addresses)
        })?;
        for (key, entry) in addresses {
            self.put_entry(key, entry)?;
        }
        Ok(())
    }

    /// Where the state of a port is, which gets one if it has none.
    fn place_of_port(
        &mut self,
        port: &ServicePort,
        ports: &mut Vec<PortState>,
    ) -> Result<usize, MapError> {
        if let Some(place) = ports.iter().position(|state| state.is_of(port)) {
            return Ok(place);
        }
        let id = self.service_ids.take().ok_or_else(|| full(names::META))?;
        ports.push(PortState::new(&port.name, port.protocol, id));
        Ok(ports.len() - 1)
    }

    /// Writes an entry, unless it is there; tells whether it did.
    fn put_entry(&mut self, key: FrontendKey, entry: ServiceEntry) -> Result<bool, MapError> {
        let place = self.entries.entry(key);
        let is_new = match &place {
            Entry::Occupied(now) if *now.get() == entry => return Ok(false),
            Entry::Occupied(_) => false,
            Entry::Vacant(_) => true,
        };
        self.writes += 1;
        self.maps.put_service(key, &entry)?;
        place.insert_entry(entry);
        if is_new && key.protocol == UDP {
            self.begun.push(SocketAddr::new(key.addr, key.port));
        }
        Ok(true)
    }

    fn add_port(
        &mut self,
        service: &NamespacedName,
        plan: &PortPlan,
        state: &mut PortState,
        addresses: &mut Vec<(FrontendKey, ServiceEntry)>,
    ) -> Result<(), MapError> {
        self.add_backends(plan, state)?;
        let mut entries = Vec::with_capacity(plan.frontends.len());
        let mut windows = Windows::default();
        for frontend in &plan.frontends {
            if frontend.flags & FRONTEND_REFUSE != 0 {
                self.widen_network(frontend.key.addr)?;
            }
            let entry = self.add_ranges(frontend, plan, &mut windows, state)?;
            entries.push((frontend.key, entry));
        }
        for range in plan.sources.difference(&state.sources.clone()) {
            self.write(|maps| maps.put_range(state.id, *range))?;
            state.sources.insert(*range);
        }
        if state.port != Some(plan.port.port) {
            let meta = meta(service, &state.name, state.protocol, plan.port.port);
            let meta = meta.ok_or_else(|| full(names::META))?;
            self.write(|maps| maps.put_meta(state.id, &meta))?;
            state.port = Some(plan.port.port);
        }
        state.frontends.reserve_exact(entries.len());
        for (key, entry) in entries {
            state.has_frontend(key);
            if key.is_address() {
                // A little early: its range rests, though no packet goes by it yet.
                state.led_by(&key, &entry);
                addresses.push((key, entry));
            } else if self.put_entry(key, entry)? {
                state.led_by(&key, &entry);
            }
        }
        Ok(())
    }

    fn add_backends(&mut self, plan: &PortPlan, state: &mut PortState) -> Result<(), MapError> {
        let wanted = wanted_backends(plan);
        let more = wanted.len().saturating_sub(state.backends.len());
        state.backends.reserve_exact(more);
        for addr in wanted {
            if let Err(place) = place_of(&state.backends, addr) {
                let backend = self.add_backend()?;
                state.backends.insert(place, (addr, backend));
            }
        }
        Ok(())
    }

    fn add_backend(&mut self) -> Result<BackendRef, MapError> {
        let backend = self
            .backend_ids
            .take()
            .ok_or_else(|| full(names::BACKENDS))?;
        let result = self.write(|maps| maps.put_backend(backend.id, backend.generation));
        if result.is_err() {
            self.backend_ids.end(backend);
        }
        result.map(|()| backend)
    }

    /// Has the network of all `ClusterIP`s hold this one.
    fn widen_network(&mut self, addr: IpAddr) -> Result<(), MapError> {
        let family = Family::of(addr);
        let network = cover(self.networks.get(&family).copied(), addr);
        if self.written_networks.get(&family) != Some(&network) {
            self.write(|maps| maps.put_cluster_network(network))?;
            self.written_networks.insert(family, network);
        }
        self.networks.insert(family, network);
        Ok(())
    }

    /// The entry of a frontend, once the ranges are there that it leads to.
    fn add_ranges<'a>(
        &mut self,
        frontend: &'a FrontendPlan,
        plan: &PortPlan,
        windows: &mut Windows<'a>,
        state: &mut PortState,
    ) -> Result<ServiceEntry, MapError> {
        let family = Family::of(frontend.key.addr);
        let now = self.entries.get(&frontend.key).copied();
        let now = now.unwrap_or_default();
        let mut entry = entry(frontend, plan.choice, state.id);

        let outer = windows.outer(frontend, plan, &state.backends);
        entry.parked = outer.parked;
        entry.slot_count = length(&outer.slots) - u32::from(outer.parked);
        entry.first_slot = self.add_range(family, &outer.slots, now.first_slot, state)?;

        (entry.inner_first_slot, entry.inner_slot_count) = match &frontend.inner {
            None => (entry.first_slot, entry.slot_count),
            Some(inner) => {
                let inner = windows.inner(inner, plan.choice, &state.backends);
                let first = self.add_range(family, inner, now.inner_first_slot, state)?;
                (first, length(inner))
            }
        };
        Ok(entry)
    }

    /// The first slot of a range that begins with these, written if the port has
    /// none; 0 if there are none. Of several, that in which the frontend is now.
    fn add_range(
        &mut self,
        family: Family,
        slots: &[SlotValue],
        now: u32,
        state: &mut PortState,
    ) -> Result<u32, MapError> {
        if slots.is_empty() {
            return Ok(0);
        }
        let same = state.ranges.iter();
        let same = same.filter(|range| range.family == family && range.slots.starts_with(slots));
        if let Some(range) = same.max_by_key(|range| range.first == now) {
            return Ok(range.first);
        }
        let map = match family {
            Family::V4 => names::SLOTS4,
            Family::V6 => names::SLOTS6,
        };
        let count = length(slots);
        let free = self.slots.get_mut(&family);
        let first = free
            .and_then(|free| free.take(count))
            .ok_or_else(|| full(map))?;
        for (index, slot) in (first..).zip(slots) {
            let result = self.write(|maps| maps.put_slot(family, index, slot));
            if let Err(error) = result {
                // No entry leads here yet, so the range need not rest.
                if let Some(free) = self.slots.get_mut(&family) {
                    free.release(first, count);
                }
                return Err(error);
            }
        }
        // Most have one.
        state.ranges.reserve_exact(1);
        state.ranges.push(Range {
            family,
            first,
            slots: slots.into(),
            rests: false,
        });
        Ok(first)
    }

    /// Removes the Service's frontends that its plan does not have. Returns
    /// whether there were any.
    fn remove_frontends(&mut self, plan: &ServicePlan) -> Result<bool, MapError> {
        let wanted = plan.ports.iter().flat_map(|port| &port.frontends);
        let wanted: BTreeSet<_> = wanted.map(|frontend| frontend.key).collect();
        self.with_ports(&plan.service, |this, ports| {
            let mut removed = false;
            for state in ports {
                let before = state.frontends.len();
                this.keep_frontends(state, &wanted)?;
                removed |= state.frontends.len() < before;
            }
            Ok(removed)
        })
    }

    /// Removes the port's frontends that are not among the wanted.
    fn keep_frontends(
        &mut self,
        state: &mut PortState,
        wanted: &BTreeSet<FrontendKey>,
    ) -> Result<(), MapError> {
        let id = state.id;
        remove_if(&mut state.frontends, |key| {
            (!wanted.contains(key)).then(|| self.delete_frontend(*key, id))
        })
    }

    /// Removes what the Service has and its plan does not say.
    fn remove_rest(&mut self, plan: &ServicePlan, now: Instant) -> Result<(), MapError> {
        self.with_ports(&plan.service, |this, ports| {
            remove_if(ports, |state| {
                let port = plan.ports.iter().find(|port| state.is_of(&port.port));
                let result = this.remove_from_port(port, state, now);
                match result {
                    Ok(()) if port.is_some() => None,
                    Ok(()) => {
                        this.service_ids.release(state.id);
                        Some(Ok(()))
                    }
                    Err(error) => Some(Err(error)),
                }
            })
        })
    }

    fn remove_from_port(
        &mut self,
        plan: Option<&PortPlan>,
        state: &mut PortState,
        now: Instant,
    ) -> Result<(), MapError> {
        let frontends = plan.into_iter().flat_map(|plan| &plan.frontends);
        let wanted = frontends.map(|frontend| frontend.key).collect();
        self.keep_frontends(state, &wanted)?;
        let wanted = plan.map(|plan| plan.sources.clone()).unwrap_or_default();
        for range in &state.sources.clone() - &wanted {
            self.write(|maps| maps.delete_range(state.id, range))?;
            state.sources.remove(&range);
        }
        if plan.is_none() && state.port.is_some() {
            self.write(|maps| maps.delete_meta(state.id))?;
            state.port = None;
        }
        let wanted = plan.map(wanted_backends).unwrap_or_default();
        self.keep_backends(state, |addr| wanted.binary_search(addr).is_ok())?;
        self.retire_unused(state, now);
        Ok(())
    }

    /// Ends the port's backends that are not wanted.
    fn keep_backends(
        &mut self,
        state: &mut PortState,
        is_wanted: impl Fn(&SocketAddr) -> bool,
    ) -> Result<(), MapError> {
        let protocol = state.protocol;
        remove_if(&mut state.backends, |(addr, backend)| {
            (!is_wanted(addr)).then(|| {
                self.end_backend(*backend)?;
                self.ended |= protocol == Protocol::Udp;
                Ok(())
            })
        })
    }

    /// Gives back what a change that failed has left of a Service: what no entry
    /// leads to. What is in force stays.
    fn shed(&mut self, service: &NamespacedName, now: Instant) -> Result<(), MapError> {
        self.with_ports(service, |this, ports| {
            for state in ports {
                this.retire_unused(state, now);
                let slots = state.ranges.iter().flat_map(|range| &range.slots);
                let named: BTreeSet<_> = slots.map(|slot| slot.addr).collect();
                this.keep_backends(state, |addr| named.contains(addr))?;
            }
            Ok(())
        })
    }

    /// Retires the ranges that none of the port's entries leads to.
    fn retire_unused(&mut self, state: &mut PortState, now: Instant) {
        let entries = state.frontends.iter();
        let entries =
            entries.filter_map(|key| Some((Family::of(key.addr), self.entries.get(key)?)));
        let entries = entries.filter(|(_, entry)| entry.service == state.id);
        let used: BTreeSet<_> = entries
            .flat_map(|(family, entry)| first_slots(entry).map(move |first| (family, first)))
            .collect();
        let (kept, retired) = std::mem::take(&mut state.ranges)
            .into_iter()
            .partition(|range: &Range| used.contains(&(range.family, range.first)));
        state.ranges = kept;
        self.retire(retired, now);
    }

    fn retire(&mut self, ranges: impl IntoIterator<Item = Range>, now: Instant) {
        self.retired.extend(ranges.into_iter().map(|range| Retired {
            until: if range.rests { now + GRACE } else { now },
            family: range.family,
            first: range.first,
            count: length(&range.slots),
        }));
    }

    /// Deletes an entry, unless it has become another port's.
    fn delete_frontend(&mut self, key: FrontendKey, owner: u32) -> Result<(), MapError> {
        if self
            .entries
            .get(&key)
            .is_some_and(|entry| entry.service == owner)
        {
            self.write(|maps| maps.delete_service(key))?;
            self.entries.remove(&key);
        }
        Ok(())
    }

    fn end_backend(&mut self, backend: BackendRef) -> Result<(), MapError> {
        let dead = backend.generation.wrapping_add(1);
        self.write(|maps| maps.put_backend(backend.id, dead))?;
        self.backend_ids.end(backend);
        Ok(())
    }

    fn remove_strays(&mut self, now: Instant) -> Result<(), MapError> {
        if self.strays.is_empty() {
            return Ok(());
        }
        let ports = self.ports.values().flatten();
        let owners: BTreeSet<u32> = ports.map(|port| port.id).collect();
        while let Some(key) = self.strays.frontends.first().copied() {
            // A port that got this frontend since has written over the entry.
            let owner = self.entries.get(&key).map(|entry| entry.service);
            if !owner.is_some_and(|owner| owners.contains(&owner)) {
                self.write(|maps| maps.delete_service(key))?;
                self.entries.remove(&key);
            }
            self.strays.frontends.remove(&key);
        }
        let ranges = std::mem::take(&mut self.strays.ranges);
        self.retire(ranges, now);
        while let Some((id, range)) = self.strays.sources.first().copied() {
            self.write(|maps| maps.delete_range(id, range))?;
            self.strays.sources.remove(&(id, range));
        }
        while let Some(id) = self.strays.metas.first().copied() {
            if !owners.contains(&id) {
                self.write(|maps| maps.delete_meta(id))?;
            }
            self.strays.metas.remove(&id);
        }
        let ports = self.ports.values().flatten();
        let used: BTreeSet<u32> = ports
            .flat_map(|port| port.backends.iter().map(|(_, backend)| backend.id))
            .collect();
        while let Some(backend) = self.strays.backends.last().copied() {
            if !used.contains(&backend.id) {
                self.end_backend(backend)?;
                // Whose it was nobody knows.
                self.ended = true;
            }
            self.strays.backends.pop();
        }
        Ok(())
    }

    fn write<T>(
        &mut self,
        operation: impl FnOnce(&mut M) -> Result<T, MapError>,
    ) -> Result<T, MapError> {
        self.writes += 1;
        operation(&mut self.maps)
    }
}

impl PortState {
    fn new(name: &str, protocol: Protocol, id: u32) -> Self {
        Self {
            name: name.into(),
            protocol,
            id,
            port: None,
            frontends: Vec::new(),
            backends: Vec::new(),
            ranges: Vec::new(),
            sources: BTreeSet::new(),
        }
    }

    fn is_of(&self, port: &ServicePort) -> bool {
        *self.name == *port.name && self.protocol == port.protocol
    }

    fn has_frontend(&mut self, key: FrontendKey) {
        if let Err(place) = self.frontends.binary_search(&key) {
            self.frontends.insert(place, key);
        }
    }

    /// An entry leads to some of the ranges from now on.
    fn led_by(&mut self, key: &FrontendKey, entry: &ServiceEntry) {
        let family = Family::of(key.addr);
        for first in first_slots(entry) {
            let ranges = self.ranges.iter_mut();
            let mut led = ranges.filter(|range| (range.family, range.first) == (family, first));
            if let Some(range) = led.next() {
                range.rests = true;
            }
        }
    }
}

impl Strays {
    fn is_empty(&self) -> bool {
        let Self {
            frontends,
            ranges,
            sources,
            metas,
            backends,
        } = self;
        frontends.is_empty()
            && ranges.is_empty()
            && sources.is_empty()
            && metas.is_empty()
            && backends.is_empty()
    }
}

/// Takes out of a list what was removed, which `remove` tells: `None` of what stays.
/// The first that cannot be removed stays too, and so does all behind it.
fn remove_if<T>(
    list: &mut Vec<T>,
    mut remove: impl FnMut(&mut T) -> Option<Result<(), MapError>>,
) -> Result<(), MapError> {
    let mut result = Ok(());
    list.retain_mut(|item| {
        if result.is_err() {
            return true;
        }
        match remove(item) {
            None => true,
            Some(Ok(())) => false,
            Some(Err(error)) => {
                result = Err(error);
                true
            }
        }
    });
    result
}

/// Where the ranges begin that an entry leads to.
fn first_slots(entry: &ServiceEntry) -> impl Iterator<Item = u32> + use<> {
    let outer = (entry.slot_count > 0 || entry.parked > 0).then_some(entry.first_slot);
    let inner = (entry.inner_slot_count > 0).then_some(entry.inner_first_slot);
    outer.into_iter().chain(inner)
}

/// Number of slots; more than the numbers of slots there are do not fit.
fn length(slots: &[SlotValue]) -> u32 {
    u32::try_from(slots.len()).unwrap_or(u32::MAX)
}

/// There is no room in a map, which the agent knows without asking the kernel.
fn full(map: &'static str) -> MapError {
    MapError {
        operation: "write",
        map,
        source: io::Error::from_raw_os_error(libc::ENOSPC),
    }
}

#[cfg(test)]
mod tests;
