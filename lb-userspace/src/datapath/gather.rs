//! Entries that are written together: a call for each of the hundred thousand
//! that a large cluster has takes longer than all the rest of a start.

use lb_common::service::{ServiceEntry, ServiceMeta};

use super::{Family, FrontendKey, MapError, Maps, SlotValue};

/// What is to be put, by map. Written in the order of the fields, nobody who
/// reads ever finds an entry that leads to what is not there.
#[derive(Debug, Default)]
pub struct Gathered {
    pub backends: Vec<(u32, u32)>,
    pub slots: Vec<(Family, u32, SlotValue)>,
    pub metas: Vec<(u32, ServiceMeta)>,
    pub services: Vec<(FrontendKey, ServiceEntry)>,
    /// Why something that was gathered before is not written.
    pub failure: Option<MapError>,
}

impl Gathered {
    /// Entries of which no more are kept back: more are hardly faster, and take
    /// memory.
    const MANY: usize = 4096;

    /// Whether it is time to write.
    pub fn is_full(&self) -> bool {
        let Self {
            backends,
            slots,
            metas,
            services,
            failure: _,
        } = self;
        backends.len() + slots.len() + metas.len() + services.len() >= Self::MANY
    }

    /// Writes all of it, one by one.
    ///
    /// # Errors
    ///
    /// The first one, or that of what was gathered before.
    pub fn put_each(self, maps: &mut impl Maps) -> Result<(), MapError> {
        let Self {
            backends,
            slots,
            metas,
            services,
            failure,
        } = self;
        if let Some(error) = failure {
            return Err(error);
        }
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
