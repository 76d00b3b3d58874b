//! Every map, "key → value, written by whom". The functions that use one are
//! in [`crate::family`] and in the module of its subject.
//!
//! Sizes are defaults; the agent's loader sets those that its flags name.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf},
    macros::btf_map,
};
use lb_common::{
    Addr4, Addr6, Credit, Served,
    flow::{FlowEntry, Tuple},
    known::{KNOWN_BITS, Known},
    names::size,
    node::{
        Config, Device, Early, EarlyKey, FragmentKey, FragmentPorts, Netns, RARE_BITS, ROUTE_BITS,
        Route,
    },
    reason::COUNTERS as COUNTER_COUNT,
    service::{Affinity, AffinityKey, ServiceEntry, ServiceKey, ServiceMeta, Slot, SourceRange},
    socket::{SocketEntry, SocketKey},
    trace::{Event, Trace, Tracing},
    traffic::Traffic,
};

use crate::answer::Answers;

/// Written by the agent only, so that memory follows the number of Services
/// and no program ever waits for an allocation.
const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

/// The agent stores into them at a start, which is a call of the kernel for some
/// thousand entries. (Before Linux 5.5 there is no such flag.)
const MAPPED: usize = BPF_F_MMAPABLE as usize;

pub type Services<A> = HashMap<ServiceKey<A>, ServiceEntry, { size::SERVICES }, ON_DEMAND>;
pub type Slots<A> = Array<Slot<A>, { size::SLOTS }, MAPPED>;
pub type Flows<A> = LruHashMap<Tuple<A>, FlowEntry<A>, { size::FLOWS }>;
pub type Young<A> = LruHashMap<Tuple<A>, FlowEntry<A>, { size::YOUNG }>;
pub type Affinities<A> = LruHashMap<AffinityKey<A>, Affinity, { size::AFFINITY }>;
pub type Ranges<A> = LpmTrie<SourceRange<A>, u32, { size::RANGES }>;
pub type Fragments<A> = LruHashMap<FragmentKey<A>, FragmentPorts, { size::FRAGMENTS }>;
pub type Earlies<A> = LruHashMap<EarlyKey<A>, Early, { size::EARLY }>;
pub type Routes<A> = PerCpuArray<Route<A>, { 1 << ROUTE_BITS }>;
/// Words, so that it is aligned for everything that is put there.
pub type Scratch = [u64; 64];
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
pub static BACKENDS: Array<u32, { size::BACKENDS }, MAPPED> = Array::new();

/// Service id → names; the agent, and no program reads it.
#[btf_map(name = "klb_meta")]
pub static META: HashMap<u32, ServiceMeta, { size::META }, ON_DEMAND> = HashMap::new();

/// Tuple of a packet → its translation, an entry per direction; the packet
/// programs.
#[btf_map(name = "klb_flow4")]
pub static FLOWS4: Flows<Addr4> = Flows::new();
#[btf_map(name = "klb_flow6")]
pub static FLOWS6: Flows<Addr6> = Flows::new();

/// As the two before, for datagrams, and for connections that begin without
/// credit: whoever forges senders pushes out such flows only.
#[btf_map(name = "klb_young4")]
pub static YOUNG4: Young<Addr4> = Young::new();
#[btf_map(name = "klb_young6")]
pub static YOUNG6: Young<Addr6> = Young::new();

/// How many connections may yet be opened among the confirmed, by CPU; the packet
/// programs.
#[btf_map(name = "klb_credit")]
pub static CREDIT: PerCpuArray<Credit, 1> = PerCpuArray::new();

/// A bit for each port at which anything is served, in the one entry; the agent.
#[btf_map(name = "klb_served")]
pub static SERVED: Array<Served, 1> = Array::new();

/// By a hash of an address and port → when a packet of a flow was last seen to and
/// from there; the packet programs.
#[btf_map(name = "klb_known")]
pub static KNOWN: Array<Known, { 1 << KNOWN_BITS }> = Array::new();

/// Client and Service port → backend; all programs.
#[btf_map(name = "klb_affin4")]
pub static AFFINITY4: Affinities<Addr4> = Affinities::new();
#[btf_map(name = "klb_affin6")]
pub static AFFINITY6: Affinities<Addr6> = Affinities::new();

/// Service port and client → 1 if it may use its load balancer address; the
/// agent.
#[btf_map(name = "klb_range4")]
pub static RANGES4: Ranges<Addr4> = Ranges::new();
#[btf_map(name = "klb_range6")]
pub static RANGES6: Ranges<Addr6> = Ranges::new();

/// Fragmented packet → its ports; the packet programs.
#[btf_map(name = "klb_frag4")]
pub static FRAGMENTS4: Fragments<Addr4> = Fragments::new();
#[btf_map(name = "klb_frag6")]
pub static FRAGMENTS6: Fragments<Addr6> = Fragments::new();

/// Fragment that came before its first → its frame; the TC programs.
#[btf_map(name = "klb_early4")]
pub static EARLY4: Earlies<Addr4> = Earlies::new();
#[btf_map(name = "klb_early6")]
pub static EARLY6: Earlies<Addr6> = Earlies::new();

/// By a hash: when something rare last happened, in seconds of the monotonic clock;
/// the packet programs, and the agent at a start.
#[btf_map(name = "klb_rare")]
pub static RARE: Array<u32, { 1 << RARE_BITS }> = Array::new();

/// Memory for such a frame, by CPU; the TC programs.
#[btf_map(name = "klb_early")]
pub static EARLY: PerCpuArray<Early, 1> = PerCpuArray::new();

/// Settings, in the one entry; the agent.
#[btf_map(name = "klb_config")]
pub static CONFIG: Array<Config, 1> = Array::new();

/// Device index → device; the agent.
#[btf_map(name = "klb_device")]
pub static DEVICES: HashMap<u32, Device, { size::DEVICES }, ON_DEMAND> = HashMap::new();

/// By a hash of two addresses and a device → the way between them that the kernel
/// told last, by CPU; the packet programs.
#[btf_map(name = "klb_route4")]
pub static ROUTES4: Routes<Addr4> = Routes::new();
#[btf_map(name = "klb_route6")]
pub static ROUTES6: Routes<Addr6> = Routes::new();

/// By backend: which of the node's ports was tried last; the TC programs.
#[btf_map(name = "klb_cursor")]
pub static PORT_CURSORS: Array<u32, 1024> = Array::new();

/// Cookie of a network namespace, low and high word → pod; the agent.
#[btf_map(name = "klb_netns")]
pub static NETNS: HashMap<[u32; 2], Netns, { size::NETNS }, ON_DEMAND> = HashMap::new();

/// Socket and remote address → the other remote address; the socket programs.
#[btf_map(name = "klb_sock4")]
pub static SOCKETS4: Sockets<Addr4> = Sockets::new();
#[btf_map(name = "klb_sock6")]
pub static SOCKETS6: Sockets<Addr6> = Sockets::new();

/// Answers given in this second, by CPU; the TC programs.
#[btf_map(name = "klb_answers")]
pub static ANSWERS: PerCpuArray<Answers, 1> = PerCpuArray::new();

/// Memory of the program that runs, by CPU; the packet programs.
#[btf_map(name = "klb_scratch")]
pub static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// What is to be told, in the one entry; `klb trace`.
#[btf_map(name = "klb_trace")]
pub static TRACE: Array<Trace, 1> = Array::new();

/// What is told; all programs.
#[btf_map(name = "klb_events")]
pub static EVENTS: RingBuf<Event, { size::EVENTS }> = RingBuf::new();

/// Memory for an event of the program that runs, by CPU; the packet programs.
#[btf_map(name = "klb_tracing")]
pub static TRACING: PerCpuArray<Tracing, 1> = PerCpuArray::new();

/// Hook and reason → runs, by CPU; every program.
#[btf_map(name = "klb_count")]
pub static COUNTERS: PerCpuArray<u64, { COUNTER_COUNT as usize }> = PerCpuArray::new();

/// Backend id → what flows through it, by CPU; every program.
#[btf_map(name = "klb_traffic")]
pub static TRAFFIC: PerCpuArray<Traffic, { size::BACKENDS }> = PerCpuArray::new();
