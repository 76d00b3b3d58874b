//! Fragments follow their first one, which alone has the ports.
//!
//! One that comes before it is kept. When the first comes, it is copied into the
//! device's ingress as often as there are fragments that wait, and in each of
//! these *carriers* the frame becomes that of such a fragment: a program cannot
//! make a packet, but it can write over a copy of one.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use lb_common::{
    Address, Port, Reason,
    flow::Tuple,
    node::{EARLY_PLACES, Early, EarlyKey, FragmentKey, FragmentPorts},
    service::ServiceKey,
};

use crate::{
    family::Family,
    maps::EARLY,
    open::device,
    packet::{Packet, Refused},
    parse::{Fragment, Parsed},
};

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

/// Keeps a fragment whose first has not come yet, if it may be klb's at all: sent
/// to an address of a Service or of the node.
#[inline(never)]
pub fn keep<P: Packet, F: Family>(packet: &P) -> Reason {
    let Ok(parsed) = F::parse_fragment(packet) else {
        return Reason::Fragment;
    };
    if parsed.fragment != Fragment::Later || !may_be_ours::<F>(packet.ifindex(), &parsed.tuple.dst)
    {
        return Reason::Fragment;
    }
    match store::<P, F>(packet, &parsed) {
        Ok(()) => Reason::FragmentKept,
        Err(Refused) => Reason::Fragment,
    }
}

#[inline(always)]
fn may_be_ours<F: Family>(ifindex: u32, dst: &F::Addr) -> bool {
    let is_at = |index| device(index).is_some_and(|device| F::device_address(device).same(dst));
    is_at(0) || is_at(ifindex) || F::service(&ServiceKey::new(*dst, Port::default(), 0)).is_some()
}

#[inline(always)]
fn store<P: Packet, F: Family>(packet: &P, parsed: &Parsed<F::Addr>) -> Result<(), Refused> {
    let early = EARLY.get_ptr_mut(0).ok_or(Refused)?;
    // SAFETY: the memory is this CPU's.
    let early: &mut Early = unsafe { &mut *early };
    early.length = packet.save(&mut early.bytes)?;
    let mut key = EarlyKey {
        packet: key(&parsed.tuple, parsed.id),
        place: 0,
    };
    for place in 0..EARLY_PLACES {
        key.place = place;
        if F::earlies()
            .insert(&key, &*early, u64::from(BPF_NOEXIST))
            .is_ok()
        {
            return Ok(());
        }
    }
    Err(Refused)
}

/// The first fragment of a packet has come: sends a carrier for each that waits
/// for it. They were put into the first places that were free.
#[inline(never)]
pub fn send_carriers<P: Packet, F: Family>(packet: &P, tuple: &Tuple<F::Addr>, id: u32) {
    let mut key = EarlyKey {
        packet: key(tuple, id),
        place: 0,
    };
    for place in 0..EARLY_PLACES {
        key.place = place;
        // SAFETY: only its being there is of interest.
        if unsafe { F::earlies().get(&key) }.is_none() {
            break;
        }
        // A fragment without a carrier is lost, as any fragment may be.
        let _ = packet.send_carrier();
    }
}

/// A carrier becomes one of the fragments that wait, and comes in once more.
#[inline(never)]
pub fn unload<P: Packet, F: Family>(packet: &P) -> Reason {
    let Ok(parsed) = F::parse_fragment(packet) else {
        return Reason::RewriteFailed;
    };
    let mut key = EarlyKey {
        packet: key(&parsed.tuple, parsed.id),
        place: 0,
    };
    for place in 0..EARLY_PLACES {
        key.place = place;
        // SAFETY: a frame that is written over while it is sent arrives broken,
        // as it may on any wire, and its receiver's checksum tells.
        let Some(early) = (unsafe { F::earlies().get(&key) }) else {
            continue;
        };
        let replaced = packet.replace(&early.bytes, early.length);
        let _ = F::earlies().remove(&key);
        return match replaced {
            Ok(()) => Reason::FragmentReleased,
            Err(Refused) => Reason::RewriteFailed,
        };
    }
    // Another carrier has had it.
    Reason::RewriteFailed
}
