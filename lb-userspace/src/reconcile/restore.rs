//! Taking over what an earlier run left in the maps.

use std::{cmp::Reverse, collections::BTreeSet};

use lb_common::service::{FRONTEND_REFUSE, ServiceMeta};

use super::{
    BTreeMap, BackendIds, Family, FreeRanges, FrontendKey, HashMap, MapError, Maps, NamespacedName,
    Numbers, PortState, Protocol, Range, Reconciler, SERVICE_IDS, ServiceEntry, Strays,
    values::{cover, meta, place_of},
};

/// Where the state of a Service port is: whose, and which of the Service's.
type Owner = (NamespacedName, usize);

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
            entries: HashMap::new(),
            ports: HashMap::new(),
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
        let entries = maps.services()?;
        self.ports = HashMap::new();
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
        for (key, entry) in &entries {
            self.restore_frontend(&owners, *key, entry);
        }
        self.restore_ranges(&owners, &entries)?;
        self.entries = entries.into_iter().collect();
        self.strays.backends = self.backend_ids.strays();
        Ok(())
    }

    /// The Service ports by id, from their names.
    fn restore_ports(&mut self) -> Result<BTreeMap<u32, Owner>, MapError> {
        let mut owners = BTreeMap::new();
        for (id, meta) in self.maps.metas()? {
            let named = named(id, &meta).filter(|(service, state)| {
                let mut ports = self.ports.get(service).into_iter().flatten();
                ports.all(|port| port.name != state.name || port.protocol != state.protocol)
            });
            let Some((service, state)) = named.filter(|_| self.service_ids.reserve(id)) else {
                self.strays.metas.insert(id);
                continue;
            };
            let ports = self.ports.entry(service.clone()).or_default();
            owners.insert(id, (service, ports.len()));
            ports.reserve_exact(1);
            ports.push(state);
        }
        Ok(owners)
    }

    /// The state of the Service port with an id.
    fn port_of(&mut self, owners: &BTreeMap<u32, Owner>, id: u32) -> Option<&mut PortState> {
        let (service, place) = owners.get(&id)?;
        self.ports.get_mut(service)?.get_mut(*place)
    }

    fn restore_sources(&mut self, owners: &BTreeMap<u32, Owner>) -> Result<(), MapError> {
        for (id, range) in self.maps.ranges()? {
            if let Some(state) = self.port_of(owners, id) {
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
        owners: &BTreeMap<u32, Owner>,
        key: FrontendKey,
        entry: &ServiceEntry,
    ) {
        if entry.flags & FRONTEND_REFUSE != 0 {
            let family = Family::of(key.addr);
            let network = cover(self.networks.get(&family).copied(), key.addr);
            self.networks.insert(family, network);
        }
        if let Some(state) = self.port_of(owners, entry.service) {
            state.has_frontend(key);
        } else {
            // Until it is removed, nobody else may be taken for its Service.
            self.service_ids.reserve(entry.service);
            self.strays.frontends.insert(key);
        }
    }

    /// Takes the slots that entries lead to; those of a stray entry, too, until
    /// it is removed. What overlaps another's or leaves the array is left: the
    /// frontend gets a fresh range.
    fn restore_ranges(
        &mut self,
        owners: &BTreeMap<u32, Owner>,
        entries: &BTreeMap<FrontendKey, ServiceEntry>,
    ) -> Result<(), MapError> {
        let entries = entries.iter();
        let spans: BTreeSet<Span> = entries.flat_map(|(key, entry)| spans(key, entry)).collect();
        for span in spans {
            let Some(range) = self.restore_range(span)? else {
                continue;
            };
            let owner = owners.get(&span.service);
            let ports =
                owner.and_then(|(service, place)| Some((self.ports.get_mut(service)?, *place)));
            let Some(state) = ports.and_then(|(ports, place)| ports.get_mut(place)) else {
                self.strays.ranges.push(range);
                continue;
            };
            for slot in &range.slots {
                if let Err(place) = place_of(&state.backends, slot.addr)
                    && self.backend_ids.adopt(slot.backend)
                {
                    state.backends.insert(place, (slot.addr, slot.backend));
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

/// The port that a name is of, with that alone in its state; `None` if it is none.
fn named(id: u32, found: &ServiceMeta) -> Option<(NamespacedName, PortState)> {
    let service = NamespacedName::new(found.namespace.as_str(), found.name.as_str());
    let protocol = Protocol::from_number(found.protocol)?;
    let mut state = PortState::new(found.port_name.as_str(), protocol, id);
    let port = found.port.get();
    // What else it may say is written anew.
    let is_whole = meta(&service, &state.name, protocol, port) == Some(*found);
    state.port = is_whole.then_some(port);
    Some((service, state))
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
