//! Taking over what an earlier run left in the maps.

use std::{cmp::Reverse, collections::BTreeSet};

use lb_common::service::FRONTEND_REFUSE;

use super::{
    BTreeMap, BackendIds, Family, FreeRanges, FrontendKey, MapError, Maps, Numbers, PortId,
    PortState, Range, Reconciler, SERVICE_IDS, ServiceEntry, Strays,
    values::{cover, port_id},
};

/// Slots that an entry leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    /// The longest first: it holds those that begin where it begins.
    count: Reverse<u32>,
    family: Family,
    first: u32,
    /// Whose entry.
    service: u32,
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
            ended: false,
            begun: Vec::new(),
            entries: BTreeMap::new(),
            ports: BTreeMap::new(),
            service_ids: Numbers::new(SERVICE_IDS),
            backend_ids: BackendIds::new(BTreeMap::new(), 0),
            slots: BTreeMap::new(),
            networks: BTreeMap::new(),
            written_networks: BTreeMap::new(),
            retired: Vec::new(),
            strays: Strays::default(),
            maps,
        };
        this.take_over()?;
        Ok(this)
    }

    /// Forgets everything, and takes over what the maps hold.
    pub(super) fn take_over(&mut self) -> Result<(), MapError> {
        let maps = &self.maps;
        self.entries = maps.services()?;
        self.ports = BTreeMap::new();
        self.service_ids = Numbers::new(SERVICE_IDS);
        self.backend_ids = BackendIds::new(maps.backends()?, maps.backend_capacity());
        self.slots = Family::ALL
            .map(|family| (family, FreeRanges::new(maps.slot_capacity(family))))
            .into();
        self.networks = BTreeMap::new();
        self.written_networks = BTreeMap::new();
        self.retired = Vec::new();
        self.strays = Strays::default();
        for family in Family::ALL {
            let network = self.maps.cluster_network(family)?;
            self.written_networks
                .extend(network.map(|network| (family, network)));
        }
        let owners = self.restore_ports()?;
        self.restore_sources(&owners)?;
        for (key, entry) in self.entries.clone() {
            self.restore_frontend(&owners, key, &entry);
        }
        self.restore_ranges(&owners)?;
        self.strays.backends = self.backend_ids.strays();
        Ok(())
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
                meta: Some(meta),
                ..PortState::new(id)
            };
            self.ports.insert(port.clone(), Box::new(state));
            owners.insert(id, port);
        }
        Ok(owners)
    }

    fn restore_sources(&mut self, owners: &BTreeMap<u32, PortId>) -> Result<(), MapError> {
        for (id, range) in self.maps.ranges()? {
            let owner = owners.get(&id);
            if let Some(state) = owner.and_then(|port| self.ports.get_mut(port)) {
                state.sources.insert(range);
            } else {
                // They must not become somebody else's.
                self.service_ids.reserve(id);
                self.strays.sources.insert((id, range));
            }
        }
        Ok(())
    }

    fn restore_frontend(
        &mut self,
        owners: &BTreeMap<u32, PortId>,
        key: FrontendKey,
        entry: &ServiceEntry,
    ) {
        if entry.flags & FRONTEND_REFUSE != 0 {
            let family = Family::of(key.addr);
            let network = cover(self.networks.get(&family).copied(), key.addr);
            self.networks.insert(family, network);
        }
        let owner = owners.get(&entry.service);
        if let Some(state) = owner.and_then(|port| self.ports.get_mut(port)) {
            state.frontends.insert(key);
        } else {
            // Until it is removed, nobody else may be taken for its Service.
            self.service_ids.reserve(entry.service);
            self.strays.frontends.insert(key);
        }
    }

    /// Takes the slots that entries lead to; those of a stray entry, too, until
    /// it is removed. What overlaps another's or leaves the array is left: the
    /// frontend gets a fresh range.
    fn restore_ranges(&mut self, owners: &BTreeMap<u32, PortId>) -> Result<(), MapError> {
        let entries = self.entries.iter();
        let spans: BTreeSet<Span> = entries.flat_map(|(key, entry)| spans(key, entry)).collect();
        for span in spans {
            let Some(range) = self.restore_range(span)? else {
                continue;
            };
            let owner = owners.get(&span.service);
            let Some(state) = owner.and_then(|port| self.ports.get_mut(port)) else {
                self.strays.ranges.push(range);
                continue;
            };
            for slot in &range.slots {
                let is_new = !state.backends.contains_key(&slot.addr);
                if is_new && self.backend_ids.adopt(slot.backend) {
                    state.backends.insert(slot.addr, slot.backend);
                }
            }
            state.ranges.reserve_exact(1);
            state.ranges.push(range);
        }
        Ok(())
    }

    /// `None` if not all of the slots are free.
    fn restore_range(&mut self, span: Span) -> Result<Option<Range>, MapError> {
        let Span {
            count: Reverse(count),
            family,
            first,
            ..
        } = span;
        let free = self.slots.get_mut(&family);
        if !free.is_some_and(|free| free.reserve(first, count)) {
            return Ok(None);
        }
        let slots = (first..first + count).map(|index| self.maps.slot(family, index));
        Ok(Some(Range {
            family,
            first,
            slots: slots.collect::<Result<_, _>>()?,
            rests: true,
        }))
    }
}

/// Outer range with what is parked behind it, and inner range.
fn spans(key: &FrontendKey, entry: &ServiceEntry) -> [Span; 2] {
    let span = |first, count| Span {
        count: Reverse(count),
        family: Family::of(key.addr),
        first,
        service: entry.service,
    };
    let outer = entry.slot_count.saturating_add(entry.parked.into());
    [
        span(entry.first_slot, outer),
        span(entry.inner_first_slot, entry.inner_slot_count),
    ]
}
