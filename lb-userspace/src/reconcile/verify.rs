//! Looking whether the maps still hold what was written, and mending them.
//!
//! Nobody else should write them. But an operator with bpftool may, as may a
//! second agent that was started by force; and whoever trusts his own memory
//! for ever never finds out.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
};

use ipnet::IpNet;
use lb_common::{
    names,
    service::{BackendRef, is_living},
};

use super::{Reconciler, values::meta};
use crate::datapath::{Family, FrontendKey, MapError, Maps, SlotValue};

/// What was mended: name of the map → number of its entries.
pub type Drift = BTreeMap<&'static str, u64>;

impl<M: Maps> Reconciler<M> {
    /// Reads all that the maps hold and writes what is not as it was written
    /// before, in the order in which a change is: what a frontend leads to goes
    /// before the frontend.
    ///
    /// # Errors
    ///
    /// If a map cannot be read or written; what was mended until then stays so.
    pub fn verify(&mut self) -> Result<Drift, MapError> {
        let mut drift = Drift::new();
        if self.maps.mend_served()? {
            self.writes += 1;
            count(&mut drift, names::SERVED, 1);
        }
        self.mend_backends(&mut drift)?;
        self.mend_slots(&mut drift)?;
        let strange_ranges = self.mend_ranges(&mut drift)?;
        let strange_metas = self.mend_metas(&mut drift)?;
        if self.maps.mend_settings()? {
            self.writes += 1;
            count(&mut drift, names::CONFIG, 1);
        }
        self.mend_networks(&mut drift)?;
        self.mend_services(&mut drift)?;
        for (service, range) in strange_ranges {
            self.write(|maps| maps.delete_range(service, range))?;
        }
        for service in strange_metas {
            self.write(|maps| maps.delete_meta(service))?;
        }
        Ok(drift)
    }

    fn mend_backends(&mut self, drift: &mut Drift) -> Result<(), MapError> {
        let mut found = self.maps.backends()?;
        let values: Vec<_> = self.backend_ids.values().collect();
        for (id, generation) in values {
            let found = found.remove(&id);
            // Of one that could not be written the map knows nothing.
            let is_dead = !is_living(generation) && !found.is_some_and(is_living);
            if found != Some(generation) && !is_dead {
                count(drift, names::BACKENDS, 1);
                self.write(|maps| maps.put_backend(id, generation))?;
            }
        }
        // Whoever it was meant to be, no slot names it.
        for (id, generation) in found {
            if is_living(generation) {
                count(drift, names::BACKENDS, 1);
                let backend = BackendRef { id, generation };
                self.write(|maps| maps.put_backend(id, generation.wrapping_add(1)))?;
                self.backend_ids.learn(backend);
            }
        }
        Ok(())
    }

    fn mend_slots(&mut self, drift: &mut Drift) -> Result<(), MapError> {
        let mut wrong: Vec<(Family, u32, SlotValue)> = Vec::new();
        let ports = self.ports.values().flatten();
        for range in ports.flat_map(|port| &port.ranges) {
            for (index, slot) in (range.first..).zip(&range.slots) {
                // One that cannot be read is not as it should be either.
                let found = self.maps.slot(range.family, index).ok();
                if found.as_ref() != Some(slot) {
                    wrong.push((range.family, index, *slot));
                }
            }
        }
        for (family, index, slot) in wrong {
            let map = match family {
                Family::V4 => names::SLOTS4,
                Family::V6 => names::SLOTS6,
            };
            count(drift, map, 1);
            self.write(|maps| maps.put_slot(family, index, &slot))?;
        }
        Ok(())
    }

    /// Returns what is there and should not be.
    fn mend_ranges(&mut self, drift: &mut Drift) -> Result<BTreeSet<(u32, IpNet)>, MapError> {
        let mut found = self.maps.ranges()?;
        // Until everything is known, what an earlier run left is nobody's drift.
        found.retain(|range| !self.strays.sources.contains(range));
        let ports = self.ports.values().flatten();
        let wanted: BTreeSet<_> = ports
            .flat_map(|port| port.sources.iter().map(|range| (port.id, *range)))
            .collect();
        for (_, range) in found.symmetric_difference(&wanted) {
            let map = match Family::of(range.addr()) {
                Family::V4 => names::RANGES4,
                Family::V6 => names::RANGES6,
            };
            count(drift, map, 1);
        }
        for (service, range) in wanted.difference(&found) {
            self.write(|maps| maps.put_range(*service, *range))?;
        }
        Ok(found.difference(&wanted).copied().collect())
    }

    /// Returns what is there and should not be.
    fn mend_metas(&mut self, drift: &mut Drift) -> Result<Vec<u32>, MapError> {
        let mut found = self.maps.metas()?;
        found.retain(|id, _| !self.strays.metas.contains(id));
        let ports = self.ports.iter();
        let ports =
            ports.flat_map(|(service, ports)| ports.iter().map(move |port| (service, port)));
        let wanted: Vec<_> = ports
            .filter_map(|(service, port)| {
                let meta = meta(service, &port.name, port.protocol, port.port?)?;
                Some((port.id, meta))
            })
            .collect();
        for (service, meta) in wanted {
            if found.remove(&service) != Some(meta) {
                count(drift, names::META, 1);
                self.write(|maps| maps.put_meta(service, &meta))?;
            }
        }
        count(drift, names::META, found.len());
        Ok(found.into_keys().collect())
    }

    fn mend_networks(&mut self, drift: &mut Drift) -> Result<(), MapError> {
        for (family, network) in self.written_networks.clone() {
            if self.maps.cluster_network(family)? != Some(network) {
                count(drift, names::CONFIG, 1);
                self.write(|maps| maps.put_cluster_network(network))?;
            }
        }
        Ok(())
    }

    fn mend_services(&mut self, drift: &mut Drift) -> Result<(), MapError> {
        let map = |key: &FrontendKey| match Family::of(key.addr) {
            Family::V4 => names::SERVICES4,
            Family::V6 => names::SERVICES6,
        };
        let mut found = self.maps.services()?;
        let entries = mem::take(&mut self.entries);
        let mut result = Ok(());
        for (key, entry) in &entries {
            if found.remove(key) != Some(*entry) && result.is_ok() {
                count(drift, map(key), 1);
                result = self.write(|maps| maps.put_service(*key, entry));
            }
        }
        self.entries = entries;
        result?;
        for key in found.into_keys() {
            count(drift, map(&key), 1);
            self.write(|maps| maps.delete_service(key))?;
        }
        Ok(())
    }
}

fn count(drift: &mut Drift, map: &'static str, entries: usize) {
    if entries > 0 {
        *drift.entry(map).or_default() += entries as u64;
    }
}
