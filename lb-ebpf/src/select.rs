//! Service → backend.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use lb_common::{
    Reason,
    service::{ServiceEntry, Slot},
};

use crate::family::Family;

/// A backend for a new flow: one of the frontend's slots, each as likely as
/// the others.
#[inline(always)]
pub fn backend<F: Family>(service: &ServiceEntry) -> Result<&'static Slot<F::Addr>, Reason> {
    if service.slot_count == 0 {
        return Err(Reason::NoBackend);
    }
    // SAFETY: the helper takes nothing and may be called from every program.
    let random = unsafe { bpf_get_prandom_u32() };
    // The high half of the product is uniform below `slot_count`, without a
    // division (Lemire, "Fast random integer generation in an interval").
    let n = (u64::from(random) * u64::from(service.slot_count)) >> 32;
    F::slot(service.first_slot.wrapping_add(n as u32))
}
