//! The border between the agent and the kernel.
//!
//! [`Maps`] is all that the control plane knows about it: reading, writing and
//! deleting entries. The kernel's maps implement it, and so does memory, for
//! tests.

pub mod attach;
pub mod cgroup;
mod clock;
mod clsact;
pub mod features;
pub mod gather;
pub mod inspect;
pub mod kernel;
mod known;
pub mod layouts;
pub mod load;
pub mod memory;
pub mod pins;
mod served;
mod sys;
pub mod trace;
pub mod traffic;
pub mod trial;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ipnet::IpNet;
use lb_common::service::{BackendRef, ServiceEntry, ServiceMeta};

/// IPv4 or IPv6; each has frontends and slots of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    pub const fn of(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// Key of a frontend in the service maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendKey {
    pub addr: IpAddr,
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

impl FrontendKey {
    /// Key of what is said of an address itself, whatever the port.
    pub const fn of_address(addr: IpAddr) -> Self {
        Self {
            addr,
            port: 0,
            protocol: 0,
        }
    }

    /// Whether it is one of those.
    pub const fn is_address(&self) -> bool {
        self.port == 0 && self.protocol == 0
    }
}

/// What stands in one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotValue {
    pub addr: SocketAddr,
    /// The backend runs on this node.
    pub local: bool,
    pub backend: BackendRef,
}

/// A map operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {map}: {}{source}", self.in_words())]
pub struct MapError {
    /// `read`, `write` or `delete`.
    pub operation: &'static str,
    /// Name of the map, as in `lb_common::names`.
    pub map: &'static str,
    pub source: io::Error,
}

impl MapError {
    /// Whether the map has no room for another entry (`E2BIG`, and `ENOSPC`
    /// from allocators above the maps).
    pub fn is_full(&self) -> bool {
        matches!(
            self.source.raw_os_error(),
            Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM)
        )
    }

    /// What goes before the kernel's words for it, where they mean another thing:
    /// it calls a full map a list of arguments that is too long.
    fn in_words(&self) -> &'static str {
        match self.source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => "the map is full: ",
            _ => "",
        }
    }
}

/// The maps that the agent fills. Every method is one operation on one entry,
/// or a listing of one map; order is the caller's business.
pub trait Maps {
    fn services(&self) -> Result<BTreeMap<FrontendKey, ServiceEntry>, MapError>;
    fn put_service(&mut self, key: FrontendKey, entry: &ServiceEntry) -> Result<(), MapError>;
    /// Deleting what is not there succeeds.
    fn delete_service(&mut self, key: FrontendKey) -> Result<(), MapError>;

    /// Number of slots that the family's map has.
    fn slot_capacity(&self, family: Family) -> u32;
    fn slot(&self, family: Family, index: u32) -> Result<SlotValue, MapError>;
    /// The address must be of `family`.
    fn put_slot(&mut self, family: Family, index: u32, value: &SlotValue) -> Result<(), MapError>;

    /// Backend ids that were ever used, with their generation: odd for one that
    /// lives, even for one that is gone.
    fn backends(&self) -> Result<BTreeMap<u32, u32>, MapError>;
    /// Number of backend ids that the map has.
    fn backend_capacity(&self) -> u32;
    /// Sets the generation of an id.
    fn put_backend(&mut self, id: u32, generation: u32) -> Result<(), MapError>;

    fn metas(&self) -> Result<BTreeMap<u32, ServiceMeta>, MapError>;
    fn put_meta(&mut self, service: u32, meta: &ServiceMeta) -> Result<(), MapError>;
    /// Deleting what is not there succeeds.
    fn delete_meta(&mut self, service: u32) -> Result<(), MapError>;

    /// The networks that may use marked frontends, by Service port.
    fn ranges(&self) -> Result<BTreeSet<(u32, IpNet)>, MapError>;
    fn put_range(&mut self, service: u32, range: IpNet) -> Result<(), MapError>;
    /// Deleting what is not there succeeds.
    fn delete_range(&mut self, service: u32, range: IpNet) -> Result<(), MapError>;

    /// The network in which the ports of a `ClusterIP` that nobody has are
    /// refused.
    fn cluster_network(&self, family: Family) -> Result<Option<IpNet>, MapError>;
    /// Sets it for the network's own family.
    fn put_cluster_network(&mut self, network: IpNet) -> Result<(), MapError>;

    /// Makes the settings, but for the networks, what they were set to last;
    /// whether they had become others. Maps without settings have none to mend.
    fn mend_settings(&mut self) -> Result<bool, MapError> {
        Ok(false)
    }

    /// Makes the ports at which anything is served what they were; whether they had
    /// become others.
    fn mend_served(&mut self) -> Result<bool, MapError> {
        Ok(false)
    }

    /// From now on, what is put may be kept back until [`Self::flush`], to be
    /// written together: ports that are served and backends first, then slots and
    /// names, then frontends.
    /// Nothing may be deleted meanwhile.
    fn gather(&mut self) {}
    /// Writes what was kept back, and keeps back nothing more. After an error
    /// nobody knows what is written.
    fn flush(&mut self) -> Result<(), MapError> {
        Ok(())
    }
}

/// Maps that somebody else holds, too: a test that looks at them, say.
impl<M: Maps> Maps for Arc<Mutex<M>> {
    fn services(&self) -> Result<BTreeMap<FrontendKey, ServiceEntry>, MapError> {
        lock(self).services()
    }

    fn put_service(&mut self, key: FrontendKey, entry: &ServiceEntry) -> Result<(), MapError> {
        lock(self).put_service(key, entry)
    }

    fn delete_service(&mut self, key: FrontendKey) -> Result<(), MapError> {
        lock(self).delete_service(key)
    }

    fn slot_capacity(&self, family: Family) -> u32 {
        lock(self).slot_capacity(family)
    }

    fn slot(&self, family: Family, index: u32) -> Result<SlotValue, MapError> {
        lock(self).slot(family, index)
    }

    fn put_slot(&mut self, family: Family, index: u32, value: &SlotValue) -> Result<(), MapError> {
        lock(self).put_slot(family, index, value)
    }

    fn backends(&self) -> Result<BTreeMap<u32, u32>, MapError> {
        lock(self).backends()
    }

    fn backend_capacity(&self) -> u32 {
        lock(self).backend_capacity()
    }

    fn put_backend(&mut self, id: u32, generation: u32) -> Result<(), MapError> {
        lock(self).put_backend(id, generation)
    }

    fn metas(&self) -> Result<BTreeMap<u32, ServiceMeta>, MapError> {
        lock(self).metas()
    }

    fn put_meta(&mut self, service: u32, meta: &ServiceMeta) -> Result<(), MapError> {
        lock(self).put_meta(service, meta)
    }

    fn delete_meta(&mut self, service: u32) -> Result<(), MapError> {
        lock(self).delete_meta(service)
    }

    fn ranges(&self) -> Result<BTreeSet<(u32, IpNet)>, MapError> {
        lock(self).ranges()
    }

    fn put_range(&mut self, service: u32, range: IpNet) -> Result<(), MapError> {
        lock(self).put_range(service, range)
    }

    fn delete_range(&mut self, service: u32, range: IpNet) -> Result<(), MapError> {
        lock(self).delete_range(service, range)
    }

    fn cluster_network(&self, family: Family) -> Result<Option<IpNet>, MapError> {
        lock(self).cluster_network(family)
    }

    fn put_cluster_network(&mut self, network: IpNet) -> Result<(), MapError> {
        lock(self).put_cluster_network(network)
    }

    fn mend_settings(&mut self) -> Result<bool, MapError> {
        lock(self).mend_settings()
    }

    fn mend_served(&mut self) -> Result<bool, MapError> {
        lock(self).mend_served()
    }

    fn gather(&mut self) {
        lock(self).gather();
    }

    fn flush(&mut self) -> Result<(), MapError> {
        lock(self).flush()
    }
}

/// What a panic of another holder left is as good as any.
fn lock<M>(maps: &Mutex<M>) -> MutexGuard<'_, M> {
    maps.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::of_address(self.addr) {
            return write!(f, "{}", self.addr);
        }
        let protocol = match self.protocol {
            lb_common::flow::TCP => "TCP",
            lb_common::flow::UDP => "UDP",
            lb_common::flow::SCTP => "SCTP",
            _ => "?",
        };
        write!(f, "{}/{protocol}", SocketAddr::new(self.addr, self.port))
    }
}
