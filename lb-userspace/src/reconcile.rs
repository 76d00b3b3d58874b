//! Makes the maps hold what the plans say, by the fewest writes and in an order
//! in which no reader ever sees half of a change.
//!
//! Adding: backends, slots of a range that nobody uses, the name, and last the
//! frontend's entry, by whose one update the new set is in force. Removing goes
//! the other way, and only after everything that a batch adds is there, so that
//! a frontend that changes hands is never without an entry.
//!
//! The maps are read once, at the start; from then on nobody else writes them.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use lb_common::{
    Port, names,
    service::{BackendRef, FRONTEND_DROP, FRONTEND_LOCAL_POLICY, Name, ServiceEntry, ServiceMeta},
};

use crate::{
    datapath::{Family, FrontendKey, MapError, Maps, SlotValue},
    ids::{BackendIds, Numbers},
    model::{NamespacedName, Policy, Protocol, ServicePort},
    plan::{Backend, FrontendPlan, PortPlan, ServicePlan, Verdict},
    slots::FreeRanges,
};

/// How long a range of slots rests before it is used again. A program that read
/// the old entry has long ended by then.
const GRACE: Duration = Duration::from_secs(1);

/// Service ids are below this: many times what the maps hold, so that an id is
/// not used again soon, and few enough to keep a list of.
const SERVICE_IDS: u32 = 1 << 20;

/// Owns the maps.
pub struct Reconciler<M> {
    maps: M,
    writes: u64,
    /// What the service maps hold.
    entries: BTreeMap<FrontendKey, ServiceEntry>,
    ports: BTreeMap<PortId, PortState>,
    service_ids: Numbers,
    backend_ids: BackendIds,
    slots: BTreeMap<Family, FreeRanges>,
    retired: Vec<Retired>,
    /// What an earlier run left and nobody owns, until the first batch.
    strays: Strays,
}

/// Names a Service port, across restarts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct PortId {
    service: NamespacedName,
    name: String,
    protocol: Protocol,
}

/// What is in the maps for one Service port.
#[derive(Debug)]
struct PortState {
    id: u32,
    /// As the map has it; `None` until it has one.
    meta: Option<ServiceMeta>,
    frontends: BTreeSet<FrontendKey>,
    backends: BTreeMap<SocketAddr, BackendRef>,
    ranges: Vec<Range>,
}

/// A range of slots: the backends of a frontend, and behind them those that are
/// parked.
#[derive(Debug)]
struct Range {
    family: Family,
    first: u32,
    slots: Vec<SlotValue>,
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
    /// With the range that they lead to, if nobody else has it.
    frontends: BTreeMap<FrontendKey, Option<Range>>,
    metas: BTreeSet<u32>,
    backends: Vec<BackendRef>,
}

/// What a batch did.
#[derive(Debug, Default)]
pub struct Report {
    /// Map operations.
    pub writes: u64,
    /// Services that are not as planned, and why. What they had, they keep.
    pub failed: Vec<(NamespacedName, MapError)>,
}

impl<M: Maps> Reconciler<M> {
    /// Takes over what the maps hold. Nothing is written.
    ///
    /// # Errors
    ///
    /// If a map cannot be read.
    pub fn restore(maps: M) -> Result<Self, MapError> {
        let mut this = Self {
            writes: 0,
            entries: maps.services()?,
            ports: BTreeMap::new(),
            service_ids: Numbers::new(SERVICE_IDS),
            backend_ids: BackendIds::new(maps.backends()?, maps.backend_capacity()),
            slots: Family::ALL
                .map(|family| (family, FreeRanges::new(maps.slot_capacity(family))))
                .into(),
            retired: Vec::new(),
            strays: Strays::default(),
            maps,
        };
        let owners = this.restore_ports()?;
        for (key, entry) in this.entries.clone() {
            if let Some(port) = owners.get(&entry.service) {
                this.restore_frontend(port, key, &entry)?;
            } else {
                // Until it is removed it leads to its slots, which must not
                // become somebody else's meanwhile; nor must its number.
                this.service_ids.reserve(entry.service);
                let range = this.restore_range(key, &entry)?;
                this.strays.frontends.insert(key, range);
            }
        }
        this.strays.backends = this.backend_ids.strays();
        Ok(this)
    }

    /// The Service ports by id, from their names.
    fn restore_ports(&mut self) -> Result<BTreeMap<u32, PortId>, MapError> {
        let mut owners = BTreeMap::new();
        for (id, meta) in self.maps.metas()? {
            let port = port_id(&meta).filter(|port| !self.ports.contains_key(port));
            let Some(port) = port.filter(|_| self.service_ids.reserve(id)) else {
                self.strays.metas.insert(id);
                continue;
            };
            let state = PortState {
                id,
                meta: Some(meta),
                frontends: BTreeSet::new(),
                backends: BTreeMap::new(),
                ranges: Vec::new(),
            };
            self.ports.insert(port.clone(), state);
            owners.insert(id, port);
        }
        Ok(owners)
    }

    fn restore_frontend(
        &mut self,
        port: &PortId,
        key: FrontendKey,
        entry: &ServiceEntry,
    ) -> Result<(), MapError> {
        let range = self.restore_range(key, entry)?;
        let Some(state) = self.ports.get_mut(port) else {
            return Ok(());
        };
        state.frontends.insert(key);
        // Another frontend of the port may have brought the range already.
        for slot in range.iter().flat_map(|range| &range.slots) {
            let is_new = !state.backends.contains_key(&slot.addr);
            if is_new && self.backend_ids.adopt(slot.backend) {
                state.backends.insert(slot.addr, slot.backend);
            }
        }
        state.ranges.extend(range);
        Ok(())
    }

    /// Takes the range of an entry. `None` if it has none, if somebody has it,
    /// or if it overlaps another or leaves the array; the frontend then gets a
    /// fresh one unless it is its own port that has it.
    fn restore_range(
        &mut self,
        key: FrontendKey,
        entry: &ServiceEntry,
    ) -> Result<Option<Range>, MapError> {
        let family = Family::of(key.addr);
        let first = entry.first_slot;
        let count = entry.slot_count.saturating_add(entry.parked.into());
        let free = self.slots.get_mut(&family);
        if !free.is_some_and(|free| free.reserve(first, count)) {
            return Ok(None);
        }
        let slots = (first..first + count).map(|index| self.maps.slot(family, index));
        Ok(Some(Range {
            family,
            first,
            slots: slots.collect::<Result<_, _>>()?,
        }))
    }

    /// The Services of which something is in the maps.
    pub fn services(&self) -> BTreeSet<NamespacedName> {
        self.ports.keys().map(|port| port.service.clone()).collect()
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
        let mut done = Vec::new();
        for plan in plans {
            match self.add_or_make_room(plan) {
                Ok(()) => done.push(plan),
                Err(error) => report.failed.push((plan.service.clone(), error)),
            }
        }
        for plan in done {
            if let Err(error) = self.remove_rest(plan, now) {
                report.failed.push((plan.service.clone(), error));
            }
        }
        if let Err(error) = self.remove_strays(now) {
            // Whoever is named, another batch will try again.
            tracing::warn!(%error, "what an earlier run left is still there");
        }
        report.writes = self.writes - before;
        report
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

    fn add_service(&mut self, plan: &ServicePlan) -> Result<(), MapError> {
        for port in &plan.ports {
            let id = PortId::new(&plan.service, &port.port);
            let mut state = match self.ports.remove(&id) {
                Some(state) => state,
                None => PortState::new(self.service_ids.take().ok_or_else(|| full(names::META))?),
            };
            // What was written is in `state`, also if the rest fails.
            let result = self.add_port(&id, port, &mut state);
            self.ports.insert(id, state);
            result?;
        }
        Ok(())
    }

    fn add_port(
        &mut self,
        id: &PortId,
        plan: &PortPlan,
        state: &mut PortState,
    ) -> Result<(), MapError> {
        for backend in wanted_backends(plan) {
            if let Entry::Vacant(place) = state.backends.entry(backend) {
                place.insert(self.add_backend()?);
            }
        }
        let mut entries = Vec::new();
        for frontend in &plan.frontends {
            let parked = parked(frontend, &plan.alive);
            let first_slot = self.add_range(frontend, &parked, state)?;
            entries.push((
                frontend.key,
                entry(frontend, first_slot, parked.len(), state.id),
            ));
        }
        let meta = meta(id, &plan.port).ok_or_else(|| full(names::META))?;
        if state.meta != Some(meta) {
            self.write(|maps| maps.put_meta(state.id, &meta))?;
            state.meta = Some(meta);
        }
        for (key, entry) in entries {
            state.frontends.insert(key);
            if self.entries.get(&key) != Some(&entry) {
                self.write(|maps| maps.put_service(key, &entry))?;
                self.entries.insert(key, entry);
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

    /// The first slot of a range that holds the frontend's backends and those
    /// that are parked, written if the port has none like it; 0 if there are
    /// none.
    fn add_range(
        &mut self,
        frontend: &FrontendPlan,
        parked: &[Backend],
        state: &mut PortState,
    ) -> Result<u32, MapError> {
        let family = Family::of(frontend.key.addr);
        let slots = slot_values(frontend.backends.iter().chain(parked), &state.backends);
        if slots.is_empty() {
            return Ok(0);
        }
        let mut same = state.ranges.iter();
        if let Some(range) = same.find(|range| range.family == family && range.slots == slots) {
            return Ok(range.first);
        }
        let map = match family {
            Family::V4 => names::SLOTS4,
            Family::V6 => names::SLOTS6,
        };
        let count = u32::try_from(slots.len()).map_err(|_too_many| full(map))?;
        let free = self.slots.get_mut(&family);
        let first = free
            .and_then(|free| free.take(count))
            .ok_or_else(|| full(map))?;
        for (index, slot) in (first..).zip(&slots) {
            let result = self.write(|maps| maps.put_slot(family, index, slot));
            if let Err(error) = result {
                // No entry leads here yet, so the range need not rest.
                if let Some(free) = self.slots.get_mut(&family) {
                    free.release(first, count);
                }
                return Err(error);
            }
        }
        state.ranges.push(Range {
            family,
            first,
            slots,
        });
        Ok(first)
    }

    /// The ports of a Service that have something in the maps.
    fn ports_of(&self, service: &NamespacedName) -> Vec<PortId> {
        let first = PortId {
            service: service.clone(),
            name: String::new(),
            protocol: Protocol::Tcp,
        };
        let ports = self.ports.range(first..).map(|(id, _)| id);
        ports
            .take_while(|id| id.service == *service)
            .cloned()
            .collect()
    }

    /// Removes the Service's frontends that its plan does not have. Returns
    /// whether there were any.
    fn remove_frontends(&mut self, plan: &ServicePlan) -> Result<bool, MapError> {
        let wanted: BTreeSet<_> = plan
            .ports
            .iter()
            .flat_map(|port| port.frontends.iter().map(|frontend| frontend.key))
            .collect();
        let mut removed = false;
        for id in self.ports_of(&plan.service) {
            let Some(mut state) = self.ports.remove(&id) else {
                continue;
            };
            let unwanted: Vec<_> = state.frontends.difference(&wanted).copied().collect();
            let mut result = Ok(());
            for key in unwanted {
                result = self.delete_frontend(key, state.id);
                if result.is_err() {
                    break;
                }
                state.frontends.remove(&key);
                removed = true;
            }
            self.ports.insert(id, state);
            result?;
        }
        Ok(removed)
    }

    /// Removes what the Service has and its plan does not say.
    fn remove_rest(&mut self, plan: &ServicePlan, now: Instant) -> Result<(), MapError> {
        let ids = self.ports_of(&plan.service);
        for id in ids {
            let mut ports = plan.ports.iter();
            let port = ports.find(|port| PortId::new(&plan.service, &port.port) == id);
            let Some(mut state) = self.ports.remove(&id) else {
                continue;
            };
            let result = self.remove_from_port(port, &mut state, now);
            if port.is_none() && result.is_ok() {
                self.service_ids.release(state.id);
            } else {
                self.ports.insert(id, state);
            }
            result?;
        }
        Ok(())
    }

    fn remove_from_port(
        &mut self,
        plan: Option<&PortPlan>,
        state: &mut PortState,
        now: Instant,
    ) -> Result<(), MapError> {
        let frontends = plan
            .map(|plan| plan.frontends.as_slice())
            .unwrap_or_default();
        let wanted: BTreeSet<_> = frontends.iter().map(|frontend| frontend.key).collect();
        for key in state.frontends.difference(&wanted) {
            self.delete_frontend(*key, state.id)?;
        }
        state.frontends = wanted;
        if plan.is_none() && state.meta.is_some() {
            self.write(|maps| maps.delete_meta(state.id))?;
            state.meta = None;
        }
        let wanted = plan.map(wanted_backends).unwrap_or_default();
        let unwanted: Vec<_> = state.backends.keys().copied().collect();
        for addr in unwanted.into_iter().filter(|addr| !wanted.contains(addr)) {
            if let Some(backend) = state.backends.get(&addr).copied() {
                self.end_backend(backend)?;
                state.backends.remove(&addr);
            }
        }
        let used: BTreeSet<_> = state
            .frontends
            .iter()
            .filter_map(|key| Some((Family::of(key.addr), self.entries.get(key)?)))
            .filter(|(_, entry)| entry.slot_count > 0 || entry.parked > 0)
            .map(|(family, entry)| (family, entry.first_slot))
            .collect();
        let (kept, retired) = std::mem::take(&mut state.ranges)
            .into_iter()
            .partition(|range: &Range| used.contains(&(range.family, range.first)));
        state.ranges = kept;
        self.retire(retired, now);
        Ok(())
    }

    fn retire(&mut self, ranges: impl IntoIterator<Item = Range>, now: Instant) {
        self.retired.extend(ranges.into_iter().map(|range| Retired {
            until: now + GRACE,
            family: range.family,
            first: range.first,
            count: u32::try_from(range.slots.len()).unwrap_or(0),
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
        let owners: BTreeSet<u32> = self.ports.values().map(|port| port.id).collect();
        while let Some((key, range)) = self.strays.frontends.pop_first() {
            // A port that got this frontend since has written over the entry.
            let owner = self.entries.get(&key).map(|entry| entry.service);
            if !owner.is_some_and(|owner| owners.contains(&owner)) {
                if let Err(error) = self.write(|maps| maps.delete_service(key)) {
                    self.strays.frontends.insert(key, range);
                    return Err(error);
                }
                self.entries.remove(&key);
            }
            self.retire(range, now);
        }
        while let Some(id) = self.strays.metas.first().copied() {
            if !owners.contains(&id) {
                self.write(|maps| maps.delete_meta(id))?;
            }
            self.strays.metas.remove(&id);
        }
        let ports = self.ports.values();
        let used: BTreeSet<u32> = ports
            .flat_map(|port| port.backends.values().map(|backend| backend.id))
            .collect();
        while let Some(backend) = self.strays.backends.last().copied() {
            if !used.contains(&backend.id) {
                self.end_backend(backend)?;
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

impl PortId {
    fn new(service: &NamespacedName, port: &ServicePort) -> Self {
        Self {
            service: service.clone(),
            name: port.name.clone(),
            protocol: port.protocol,
        }
    }
}

impl PortState {
    const fn new(id: u32) -> Self {
        Self {
            id,
            meta: None,
            frontends: BTreeSet::new(),
            backends: BTreeMap::new(),
            ranges: Vec::new(),
        }
    }
}

impl Strays {
    fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.metas.is_empty() && self.backends.is_empty()
    }
}

/// Addresses of every backend that must live.
fn wanted_backends(plan: &PortPlan) -> BTreeSet<SocketAddr> {
    let listed = plan
        .frontends
        .iter()
        .flat_map(|frontend| &frontend.backends);
    listed
        .chain(&plan.alive)
        .map(|backend| backend.addr)
        .collect()
}

/// The living backends of the frontend's family that it does not lead to, as
/// many as an entry can count.
fn parked(frontend: &FrontendPlan, alive: &BTreeSet<Backend>) -> Vec<Backend> {
    let listed: BTreeSet<_> = frontend.backends.iter().collect();
    let family = Family::of(frontend.key.addr);
    alive
        .iter()
        .filter(|backend| Family::of(backend.addr.ip()) == family && !listed.contains(backend))
        .take(u16::MAX.into())
        .copied()
        .collect()
}

fn slot_values<'a>(
    backends: impl Iterator<Item = &'a Backend>,
    known: &BTreeMap<SocketAddr, BackendRef>,
) -> Vec<SlotValue> {
    let values = backends.filter_map(|backend| {
        Some(SlotValue {
            addr: backend.addr,
            local: backend.local,
            backend: *known.get(&backend.addr)?,
        })
    });
    values.collect()
}

fn entry(frontend: &FrontendPlan, first_slot: u32, parked: usize, service: u32) -> ServiceEntry {
    let mut flags = 0;
    if frontend.policy == Policy::Local {
        flags |= FRONTEND_LOCAL_POLICY;
    }
    if frontend.verdict == Verdict::Drop {
        flags |= FRONTEND_DROP;
    }
    let slot_count = u32::try_from(frontend.backends.len()).unwrap_or(u32::MAX);
    ServiceEntry {
        first_slot,
        slot_count,
        inner_first_slot: first_slot,
        inner_slot_count: slot_count,
        service,
        affinity: 0,
        kind: frontend.kind as u8,
        flags,
        parked: u16::try_from(parked).unwrap_or(u16::MAX),
    }
}

/// `None` if a name is longer than a map holds; the conversion has refused such
/// names.
fn meta(id: &PortId, port: &ServicePort) -> Option<ServiceMeta> {
    Some(ServiceMeta {
        namespace: Name::new(&id.service.namespace)?,
        name: Name::new(&id.service.name)?,
        port_name: Name::new(&id.name)?,
        port: Port::from(port.port),
        protocol: port.protocol.number(),
        pad: 0,
    })
}

fn port_id(meta: &ServiceMeta) -> Option<PortId> {
    Some(PortId {
        service: NamespacedName::new(meta.namespace.as_str(), meta.name.as_str()),
        name: meta.port_name.as_str().to_owned(),
        protocol: Protocol::from_number(meta.protocol)?,
    })
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
