//! Fragments follow their first one, which alone has the ports.

use aya_ebpf::bindings::BPF_ANY;
use lb_common::{
    Address,
    flow::Tuple,
    node::{FragmentKey, FragmentPorts},
};

use crate::family::Family;

#[inline(always)]
const fn key<A: Address>(tuple: &Tuple<A>, id: u32) -> FragmentKey<A> {
    FragmentKey {
        src: tuple.src,
        dst: tuple.dst,
        id,
        protocol: tuple.protocol,
        pad: 0,
        pad2: 0,
    }
}

/// The ports of the packet that a later fragment is of; its tuple has none.
#[inline(never)]
pub fn ports<F: Family>(tuple: &Tuple<F::Addr>, id: u32) -> Option<&'static FragmentPorts> {
    // SAFETY: an entry may be replaced while it is read, by that of a packet
    // with the same identification: as likely as fragments that are put
    // together wrongly (RFC 4963).
    unsafe { F::fragments().get(&key(tuple, id)) }
}

/// Notes the ports for the fragments that follow the one with this tuple.
#[inline(never)]
pub fn note<F: Family>(tuple: &Tuple<F::Addr>, id: u32) {
    let ports = FragmentPorts {
        src_port: tuple.src_port,
        dst_port: tuple.dst_port,
    };
    // Without an entry the fragments that follow pass untouched, and are
    // counted as lost.
    let _ = F::fragments().insert(&key(tuple, id), &ports, u64::from(BPF_ANY));
}
