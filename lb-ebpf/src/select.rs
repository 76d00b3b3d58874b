//! Service → backend.

use aya_ebpf::{bindings::BPF_ANY, helpers::bpf_get_prandom_u32};
use lb_common::{
    Reason,
    flow::Tuple,
    service::{Affinity, AffinityKey, BackendRef, FRONTEND_DROP, ServiceEntry, Slot},
};

use crate::{
    config,
    family::{Family, is_alive},
};

/// The slots that a client may get.
#[derive(Clone, Copy)]
pub struct Window {
    pub first: u32,
    pub count: u32,
}

impl Window {
    /// # Errors
    /// The reason to refuse the client for, if there is no slot.
    #[inline(always)]
    pub fn of(service: &ServiceEntry, client_is_inside: bool) -> Result<Self, Reason> {
        let window = if client_is_inside {
            Self {
                first: service.inner_first_slot,
                count: service.inner_slot_count,
            }
        } else {
            Self {
                first: service.first_slot,
                count: service.slot_count,
            }
        };
        match (window.count, service.flags & FRONTEND_DROP) {
            (0, 0) => Err(Reason::NoBackend),
            (0, _) => Err(Reason::NoLocalBackend),
            _ => Ok(window),
        }
    }

    /// One of the slots: the higher `number`, the later. Uniform in `number`
    /// without a division (Lemire, "Fast random integer generation in an
    /// interval").
    #[inline(always)]
    pub fn slot<F: Family>(self, number: u32) -> Result<&'static Slot<F::Addr>, Reason> {
        let n = (u64::from(number) * u64::from(self.count)) >> 32;
        F::slot(self.first.wrapping_add(n as u32))
    }
}

/// A number that nobody knows beforehand.
#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: the helper takes nothing and may be called from every program.
    unsafe { bpf_get_prandom_u32() }
}

/// A number as good as random, and the same for one packet at every hook: what
/// XDP leaves to TC because its backend is remote must get that backend there
/// too, or backends of this node would get more than their share.
#[inline(always)]
pub fn draw(hash: u32, isn: u32) -> u32 {
    mix(
        mix(hash, isn),
        config::get().map_or(0, |config| config.secret),
    )
}

/// What a Maglev table is asked for: the same on every node, so without the
/// address of the frontend, which for a `NodePort` is the node's.
#[inline(always)]
pub fn hash<A: lb_common::Address>(tuple: &Tuple<A>) -> u32 {
    let [a, b, c, d] = tuple.src.words();
    let ports = u32::from(tuple.src_port.get()) << 16 | u32::from(tuple.dst_port.get());
    mix(
        mix(mix(mix(mix(u32::from(tuple.protocol), ports), a), b), c),
        d,
    )
}

/// A step of `MurmurHash3` (Appleby, public domain) with its final mixing, so
/// that every bit counts in the high ones, which choose the slot.
#[inline(always)]
const fn mix(hash: u32, word: u32) -> u32 {
    let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15);
    let mut hash = hash ^ word.wrapping_mul(0x1b87_3593);
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

/// The slot of the backend that the client keeps (`sessionAffinity`), if it may
/// still have it: used within the time, living, and in the window.
#[inline(never)]
pub fn kept<F: Family>(
    key: &AffinityKey<F::Addr>,
    window: Window,
    timeout: u32,
    now: u32,
) -> Option<&'static Slot<F::Addr>> {
    // SAFETY: the copy is made at once.
    let affinity = unsafe { F::affinities().get(key).copied() }?;
    let idle = now.wrapping_sub(affinity.last_used).cast_signed();
    if idle > timeout.cast_signed() || !is_alive(affinity.backend) {
        return None;
    }
    bisect::<F>(window, affinity.backend)
}

/// Notes which backend the client has got, and that it came just now.
#[inline(never)]
pub fn keep<F: Family>(key: &AffinityKey<F::Addr>, backend: BackendRef, now: u32) {
    let affinity = Affinity {
        backend,
        last_used: now,
    };
    // The table pushes out the oldest; there is nothing to do about a failure.
    let _ = F::affinities().insert(key, &affinity, u64::from(BPF_ANY));
}

/// The slot of a backend, by its id, of which the slots of a window are in
/// ascending order.
#[inline(always)]
fn bisect<F: Family>(window: Window, backend: BackendRef) -> Option<&'static Slot<F::Addr>> {
    /// Enough for 2¹⁸ slots, more than a map has by default.
    const STEPS: u32 = 18;
    let (mut low, mut high) = (window.first, window.first.wrapping_add(window.count));
    for _ in 0..STEPS {
        if low >= high {
            return None;
        }
        let middle = low.wrapping_add(high.wrapping_sub(low) >> 1);
        let slot = F::slots().get(middle)?;
        if slot.backend.id == backend.id {
            return (slot.backend.generation == backend.generation).then_some(slot);
        }
        if slot.backend.id < backend.id {
            low = middle.wrapping_add(1);
        } else {
            high = middle;
        }
    }
    None
}
