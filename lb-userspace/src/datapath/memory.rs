//! Maps in memory, for tests: they count writes, fail on demand, and know what
//! a reader of the kernel's maps would see after every single write.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use ipnet::IpNet;
use lb_common::{
    names,
    service::{ServiceEntry, ServiceMeta, is_living},
};

use super::{Family, FrontendKey, MapError, Maps, SlotValue, gather::Gathered};

/// The content of all maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    pub services: BTreeMap<FrontendKey, ServiceEntry>,
    pub slots: BTreeMap<(Family, u32), SlotValue>,
    pub backends: BTreeMap<u32, u32>,
    pub metas: BTreeMap<u32, ServiceMeta>,
    pub ranges: BTreeSet<(u32, IpNet)>,
    pub networks: BTreeMap<Family, IpNet>,
}

/// What is called before a write, with its number from 1; an error makes the
/// write fail.
pub type Fault = Box<dyn FnMut(u64) -> io::Result<()> + Send>;

/// What is called after a write that succeeded.
pub type Observer = Box<dyn FnMut(&Content) + Send>;

/// Maps in memory.
pub struct MemoryMaps {
    pub content: Content,
    pub writes: u64,
    /// Frontends of both families together.
    pub service_capacity: usize,
    pub slot_capacity: u32,
    pub backend_capacity: u32,
    pub fault: Option<Fault>,
    pub observer: Option<Observer>,
    /// What is kept back, if it is.
    pub gathered: Option<Gathered>,
}

impl Default for MemoryMaps {
    fn default() -> Self {
        Self {
            content: Content::default(),
            writes: 0,
            service_capacity: 1024,
            slot_capacity: 1024,
            backend_capacity: 1024,
            fault: None,
            observer: None,
            gathered: None,
        }
    }
}

impl Content {
    /// Where new flows of clients outside go, as a program would find it: what
    /// is in the frontend's slots, in order.
    ///
    /// # Errors
    ///
    /// A sentence, if a program would meet a slot that was never written or a
    /// backend that does not live.
    pub fn resolve(&self, key: &FrontendKey) -> Result<Vec<SlotValue>, String> {
        let entry = self.entry(key)?;
        self.slots(key, entry.first_slot, entry.slot_count)
    }

    /// As [`Self::resolve`], for clients on this node.
    ///
    /// # Errors
    ///
    /// As [`Self::resolve`].
    pub fn resolve_inside(&self, key: &FrontendKey) -> Result<Vec<SlotValue>, String> {
        let entry = self.entry(key)?;
        self.slots(key, entry.inner_first_slot, entry.inner_slot_count)
    }

    fn entry(&self, key: &FrontendKey) -> Result<&ServiceEntry, String> {
        let entry = self
            .services
            .get(key)
            .ok_or_else(|| format!("{key}: no entry"))?;
        if !self.metas.contains_key(&entry.service) {
            return Err(format!("{key}: Service {} has no name", entry.service));
        }
        Ok(entry)
    }

    fn slots(&self, key: &FrontendKey, first: u32, count: u32) -> Result<Vec<SlotValue>, String> {
        let slots = (first..first + count).map(|index| {
            let slot = self.slots.get(&(Family::of(key.addr), index)).copied();
            let slot = slot.ok_or_else(|| format!("{key}: slot {index} was never written"))?;
            let generation = self.backends.get(&slot.backend.id);
            if generation != Some(&slot.backend.generation) || !is_living(slot.backend.generation) {
                return Err(format!("{key}: backend {:?} does not live", slot.backend));
            }
            Ok(slot)
        });
        slots.collect()
    }
}

impl MemoryMaps {
    fn write(
        &mut self,
        operation: &'static str,
        map: &'static str,
        change: impl FnOnce(&mut Content),
    ) -> Result<(), MapError> {
        self.writes += 1;
        if let Some(fault) = &mut self.fault {
            fault(self.writes).map_err(|source| MapError {
                operation,
                map,
                source,
            })?;
        }
        change(&mut self.content);
        if let Some(observer) = &mut self.observer {
            observer(&self.content);
        }
        Ok(())
    }
}

const fn services(family: Family) -> &'static str {
    match family {
        Family::V4 => names::SERVICES4,
        Family::V6 => names::SERVICES6,
    }
}

const fn slots(family: Family) -> &'static str {
    match family {
        Family::V4 => names::SLOTS4,
        Family::V6 => names::SLOTS6,
    }
}

const fn ranges(family: Family) -> &'static str {
    match family {
        Family::V4 => names::RANGES4,
        Family::V6 => names::RANGES6,
    }
}

impl Maps for MemoryMaps {
    fn services(&self) -> Result<BTreeMap<FrontendKey, ServiceEntry>, MapError> {
        Ok(self.content.services.clone())
    }

    fn put_service(&mut self, key: FrontendKey, entry: &ServiceEntry) -> Result<(), MapError> {
        if let Some(gathered) = &mut self.gathered {
            gathered.services.push((key, *entry));
            return Ok(());
        }
        let map = services(Family::of(key.addr));
        let services = &self.content.services;
        if services.len() >= self.service_capacity && !services.contains_key(&key) {
            return Err(MapError {
                operation: "write",
                map,
                source: io::Error::from_raw_os_error(libc::E2BIG),
            });
        }
        self.write("write", map, |content| {
            content.services.insert(key, *entry);
        })
    }

    fn delete_service(&mut self, key: FrontendKey) -> Result<(), MapError> {
        let map = services(Family::of(key.addr));
        self.write("delete", map, |content| {
            content.services.remove(&key);
        })
    }

    fn slot_capacity(&self, _family: Family) -> u32 {
        self.slot_capacity
    }

    fn slot(&self, family: Family, index: u32) -> Result<SlotValue, MapError> {
        let slot = self.content.slots.get(&(family, index)).copied();
        slot.ok_or_else(|| MapError {
            operation: "read",
            map: slots(family),
            source: io::Error::from_raw_os_error(libc::ENOENT),
        })
    }

    fn put_slot(&mut self, family: Family, index: u32, value: &SlotValue) -> Result<(), MapError> {
        if let Some(gathered) = &mut self.gathered {
            gathered.slots.push((family, index, *value));
            return Ok(());
        }
        assert_eq!(
            Family::of(value.addr.ip()),
            family,
            "an address of the map's family"
        );
        self.write("write", slots(family), |content| {
            content.slots.insert((family, index), *value);
        })
    }

    fn backends(&self) -> Result<BTreeMap<u32, u32>, MapError> {
        Ok(self.content.backends.clone())
    }

    fn backend_capacity(&self) -> u32 {
        self.backend_capacity
    }

    fn put_backend(&mut self, id: u32, generation: u32) -> Result<(), MapError> {
        if let Some(gathered) = &mut self.gathered {
            gathered.backends.push((id, generation));
            return Ok(());
        }
        self.write("write", names::BACKENDS, |content| {
            content.backends.insert(id, generation);
        })
    }

    fn metas(&self) -> Result<BTreeMap<u32, ServiceMeta>, MapError> {
        Ok(self.content.metas.clone())
    }

    fn put_meta(&mut self, service: u32, meta: &ServiceMeta) -> Result<(), MapError> {
        if let Some(gathered) = &mut self.gathered {
            gathered.metas.push((service, *meta));
            return Ok(());
        }
        self.write("write", names::META, |content| {
            content.metas.insert(service, *meta);
        })
    }

    fn delete_meta(&mut self, service: u32) -> Result<(), MapError> {
        self.write("delete", names::META, |content| {
            content.metas.remove(&service);
        })
    }

    fn ranges(&self) -> Result<BTreeSet<(u32, IpNet)>, MapError> {
        Ok(self.content.ranges.clone())
    }

    fn put_range(&mut self, service: u32, range: IpNet) -> Result<(), MapError> {
        self.write("write", ranges(Family::of(range.addr())), |content| {
            content.ranges.insert((service, range));
        })
    }

    fn delete_range(&mut self, service: u32, range: IpNet) -> Result<(), MapError> {
        self.write("delete", ranges(Family::of(range.addr())), |content| {
            content.ranges.remove(&(service, range));
        })
    }

    fn cluster_network(&self, family: Family) -> Result<Option<IpNet>, MapError> {
        Ok(self.content.networks.get(&family).copied())
    }

    fn put_cluster_network(&mut self, network: IpNet) -> Result<(), MapError> {
        self.write("write", names::CONFIG, |content| {
            content.networks.insert(Family::of(network.addr()), network);
        })
    }

    fn gather(&mut self) {
        self.gathered = Some(Gathered::default());
    }

    fn flush(&mut self) -> Result<(), MapError> {
        let gathered = self.gathered.take().unwrap_or_default();
        gathered.put_each(self)
    }
}
