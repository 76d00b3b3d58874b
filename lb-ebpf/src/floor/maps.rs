//! The floor's maps: filled by the benchmark, but for flows and sockets.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LruHashMap, ProgramArray},
    macros::btf_map,
};
use lb_common::{
    Addr4, Addr6, Port,
    flow::Tuple,
    names::size,
    service::{ServiceEntry, ServiceKey, Slot},
    socket::{SocketEntry, SocketKey},
};

use crate::shared::{Frame, Way};

const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

pub type Services<A> = HashMap<ServiceKey<A>, ServiceEntry, { size::SERVICES }, ON_DEMAND>;
pub type Slots<A> = Array<Slot<A>, { size::SLOTS }>;
pub type Flows<A> = LruHashMap<Tuple<A>, Target<A>, { size::FLOWS }>;
pub type Sockets<A> = LruHashMap<SocketKey<A>, SocketEntry<A>, { size::SOCKETS }>;
pub type Ways<A> = HashMap<A, Way, { size::DEVICES }, ON_DEMAND>;

/// What a packet's destination, or its source, is replaced by.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Target<A> {
    pub addr: A,
    pub port: Port,
    /// 1 if it is the source.
    pub is_source: u16,
}

#[btf_map(name = "floor_svc4")]
pub static SERVICES4: Services<Addr4> = Services::new();
#[btf_map(name = "floor_svc6")]
pub static SERVICES6: Services<Addr6> = Services::new();

#[btf_map(name = "floor_slot4")]
pub static SLOTS4: Slots<Addr4> = Slots::new();
#[btf_map(name = "floor_slot6")]
pub static SLOTS6: Slots<Addr6> = Slots::new();

#[btf_map(name = "floor_flow4")]
pub static FLOWS4: Flows<Addr4> = Flows::new();
#[btf_map(name = "floor_flow6")]
pub static FLOWS6: Flows<Addr6> = Flows::new();

#[btf_map(name = "floor_sock4")]
pub static SOCKETS4: Sockets<Addr4> = Sockets::new();
#[btf_map(name = "floor_sock6")]
pub static SOCKETS6: Sockets<Addr6> = Sockets::new();

/// Destination → way. That of the unspecified address is for all others.
#[btf_map(name = "floor_way4")]
pub static WAYS4: Ways<Addr4> = Ways::new();
#[btf_map(name = "floor_way6")]
pub static WAYS6: Ways<Addr6> = Ways::new();

#[btf_map(name = "floor_frame")]
pub static FRAME: Array<Frame, 1> = Array::new();

/// Packets that were taken in, by the last byte of the address that they were
/// for.
#[btf_map(name = "floor_taken")]
pub static TAKEN: Array<u64, 256> = Array::new();

/// The program that gets the packet.
#[btf_map(name = "floor_next_xdp")]
pub static NEXT_XDP: ProgramArray<1> = ProgramArray::new();
#[btf_map(name = "floor_next_tc")]
pub static NEXT_TC: ProgramArray<1> = ProgramArray::new();
