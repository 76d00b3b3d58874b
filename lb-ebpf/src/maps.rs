//! Every map, "key → value, written by whom". The functions that use one are
//! in [`crate::family`] and in the module of its subject.
//!
//! Sizes are defaults; the agent's loader sets those that its flags name.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray},
    macros::btf_map,
};
use lb_common::{
    Addr4, Addr6,
    flow::{FlowEntry, Tuple},
    names::size,
    reason::COUNTERS as COUNTER_COUNT,
    service::{ServiceEntry, ServiceKey, ServiceMeta, Slot},
    socket::{SocketEntry, SocketKey},
};

/// Written by the agent only, so that memory follows the number of Services
/// and no program ever waits for an allocation.
const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

pub type Services<A> = HashMap<ServiceKey<A>, ServiceEntry, { size::SERVICES }, ON_DEMAND>;
pub type Slots<A> = Array<Slot<A>, { size::SLOTS }>;
pub type Flows<A> = LruHashMap<Tuple<A>, FlowEntry<A>, { size::FLOWS }>;
pub type Sockets<A> = LruHashMap<SocketKey<A>, SocketEntry<A>, { size::SOCKETS }>;

/// Frontend → slot range; the agent.
#[btf_map(name = "klb_svc4")]
pub static SERVICES4: Services<Addr4> = Services::new();
#[btf_map(name = "klb_svc6")]
pub static SERVICES6: Services<Addr6> = Services::new();

/// Slot number → backend; the agent.
#[btf_map(name = "klb_slot4")]
pub static SLOTS4: Slots<Addr4> = Slots::new();
#[btf_map(name = "klb_slot6")]
pub static SLOTS6: Slots<Addr6> = Slots::new();

/// Backend id → generation, odd while it lives; the agent.
#[btf_map(name = "klb_backend")]
pub static BACKENDS: Array<u32, { size::BACKENDS }> = Array::new();

/// Service id → names; the agent, and no program reads it.
#[btf_map(name = "klb_meta")]
pub static META: HashMap<u32, ServiceMeta, { size::META }, ON_DEMAND> = HashMap::new();

/// Tuple of a packet → its translation, an entry per direction; the packet
/// programs.
#[btf_map(name = "klb_flow4")]
pub static FLOWS4: Flows<Addr4> = Flows::new();
#[btf_map(name = "klb_flow6")]
pub static FLOWS6: Flows<Addr6> = Flows::new();

/// Socket and remote address → the other remote address; the socket programs.
#[btf_map(name = "klb_sock4")]
pub static SOCKETS4: Sockets<Addr4> = Sockets::new();
#[btf_map(name = "klb_sock6")]
pub static SOCKETS6: Sockets<Addr6> = Sockets::new();

/// Hook and reason → runs, by CPU; every program.
#[btf_map(name = "klb_count")]
pub static COUNTERS: PerCpuArray<u64, { COUNTER_COUNT as usize }> = PerCpuArray::new();
