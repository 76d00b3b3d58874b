//! Entries that are written together: a call for each of the hundred thousand
//! that a large cluster has takes longer than all the rest of a start.

use lb_common::service::{ServiceEntry, ServiceMeta};

use super::{Family, FrontendKey, MapError, Maps, SlotValue};

/// Entries of all maps of which no more are kept back: more are hardly faster, and
/// take memory.
pub(super) const MANY: usize = 4096;

/// Entries of one of the kernel's maps, as a call takes them.
#[derive(Debug)]
pub(super) struct Batch<K, V> {
    keys: Vec<K>,
    values: Vec<V>,
}

impl<K, V> Default for Batch<K, V> {
    fn default() -> Self {
        Self {
            keys: Vec::new(),
            values: Vec::new(),
        }
    }
}

impl<K, V> Batch<K, V> {
    pub(super) fn push(&mut self, key: K, value: V) {
        self.keys.push(key);
        self.values.push(value);
    }

    pub(super) fn keys(&self) -> &[K] {
        &self.keys
    }

    /// As many as keys.
    pub(super) fn values(&self) -> &[V] {
        &self.values
    }

    /// Forgets them, and keeps their memory for those to come.
    pub(super) fn clear(&mut self) {
        self.keys.clear();
        self.values.clear();
    }
}

/// What is to be put into maps in memory, by map. Written in the order of the
/// fields, nobody who reads ever finds an entry that leads to what is not there.
#[derive(Debug, Default)]
pub struct Gathered {
    pub backends: Vec<(u32, u32)>,
    pub slots: Vec<(Family, u32, SlotValue)>,
    pub metas: Vec<(u32, ServiceMeta)>,
    pub services: Vec<(FrontendKey, ServiceEntry)>,
}

impl Gathered {
    /// Writes all of it, one by one.
    pub fn put_each(self, maps: &mut impl Maps) -> Result<(), MapError> {
        let Self {
            backends,
            slots,
            metas,
            services,
        } = self;
        for (id, generation) in backends {
            maps.put_backend(id, generation)?;
        }
        for (family, index, value) in slots {
            maps.put_slot(family, index, &value)?;
        }
        for (id, meta) in metas {
            maps.put_meta(id, &meta)?;
        }
        for (key, entry) in services {
            maps.put_service(key, &entry)?;
        }
        Ok(())
    }
}
