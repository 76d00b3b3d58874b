//! Fragments follow their first one, which alone has the ports.
//!
//! One that comes before it is kept. When the first comes, it is copied into the
//! same hook as often as there are fragments that wait, and in each of these
//! *carriers* the frame becomes that of such a fragment: a program cannot make a
//! packet, but it can write over a copy of one.
//!
//! Whether a fragment is klb's only its first can tell. So every first is noted,
//! and a fragment is kept only where the kernel would keep it for its first too:
//! at the edge of whoever puts the packet together, which is the node where it
//! comes in, or stands for, and a pod where it goes out.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use lb_common::{
    Address, Port, Reason,
    flow::Tuple,
    node::{DEVICE_POD, EARLY_PLACES, Early, EarlyKey, FragmentKey, FragmentPorts},
    service::ServiceKey,
};

use crate::{
    clock,
    edge::Side,
    family::Family,
    maps::EARLY,
    open::device,
    packet::{Packet, Refused},
    parse::{Fragment, Parsed},
    rare, route, trace,
};

/// Seconds that a fragment waits for its first: as long as the kernel has it wait
/// (`net.ipv4.ipfrag_time`).
const PATIENCE: u32 = 30;

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

/// The first fragment of a packet has come, with this tuple: notes the ports for
/// those that follow, and sends a carrier for each that waits.
///
/// In this order: one that comes meanwhile, on another CPU, finds the ports after
/// it has been put where this looks for it (see [`keep`]).
#[inline(never)]
pub fn meet_first<P: Packet, F: Family>(packet: &P, tuple: &Tuple<F::Addr>, id: u32, side: Side) {
    let ports = FragmentPorts {
        src_port: tuple.src_port,
        dst_port: tuple.dst_port,
    };
    let key = key(tuple, id);
    // Without an entry the fragments that follow pass untouched, and are
    // counted as lost.
    let _ = F::fragments().insert(&key, &ports, u64::from(BPF_ANY));
    if rare::is_noted(hash(&key), clock::seconds(), PATIENCE) {
        send_carriers::<P, F>(packet, key, side);
    }
}

/// Keeps a fragment whose first has not come yet, where that is due.
#[inline(never)]
pub fn keep<P: Packet, F: Family>(packet: &P, side: Side) -> Reason {
    let Ok(parsed) = F::parse_fragment(packet) else {
        return Reason::Fragment;
    };
    if parsed.fragment != Fragment::Later || !is_to_wait::<P, F>(packet, &parsed, side) {
        return Reason::Fragment;
    }
    let Ok(place) = store::<P, F>(packet, &parsed) else {
        return Reason::Fragment;
    };
    if ports::<F>(&parsed.tuple, parsed.id).is_none() || F::earlies().remove(&place).is_err() {
        return Reason::FragmentKept;
    }
    // The first has come meanwhile, and no carrier has taken this one.
    match packet.come_again(side) {
        Ok(()) => Reason::FragmentReleased,
        Err(Refused) => Reason::RewriteFailed,
    }
}

/// Whether this hook is the last one before somebody puts the packet together.
#[inline(always)]
fn is_to_wait<P: Packet, F: Family>(packet: &P, parsed: &Parsed<F::Addr>, side: Side) -> bool {
    match side {
        Side::In => {
            F::service(&ServiceKey::new(parsed.tuple.dst, Port::default(), 0)).is_some()
                || route::ends_here::<P, F>(packet, &parsed.tuple)
        }
        Side::Out => device(packet.ifindex()).is_some_and(|to| to.flags & DEVICE_POD != 0),
    }
}

#[inline(always)]
fn store<P: Packet, F: Family>(
    packet: &P,
    parsed: &Parsed<F::Addr>,
) -> Result<EarlyKey<F::Addr>, Refused> {
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
            rare::note(hash(&key.packet), clock::seconds());
            return Ok(key);
        }
    }
    Err(Refused)
}

/// For [`rare`]: first fragments are many, and those that come before them few.
#[inline(always)]
fn hash<A: Address>(key: &FragmentKey<A>) -> u32 {
    key.src.folded() ^ key.id
}

/// Sends a carrier for each fragment that waits. They were put into the first
/// places that were free.
#[inline(always)]
fn send_carriers<P: Packet, F: Family>(packet: &P, key: FragmentKey<F::Addr>, side: Side) {
    let mut key = EarlyKey {
        packet: key,
        place: 0,
    };
    for place in 0..EARLY_PLACES {
        key.place = place;
        // SAFETY: only its being there is of interest.
        if unsafe { F::earlies().get(&key) }.is_none() {
            break;
        }
        // A fragment without a carrier is lost, as any fragment may be.
        let _ = packet.send_carrier(side);
    }
    // They may have come by in between, where this one was remembered.
    trace::begin(packet);
}

/// A carrier becomes one of the fragments that wait, and comes to this hook once
/// more.
#[inline(never)]
pub fn unload<P: Packet, F: Family>(packet: &P, side: Side) -> Reason {
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
        // Whoever removes it has it, and it may be on its way already.
        if F::earlies().remove(&key).is_err() {
            break;
        }
        return match replaced.and_then(|()| packet.come_again(side)) {
            Ok(()) => Reason::FragmentReleased,
            Err(Refused) => Reason::RewriteFailed,
        };
    }
    // Another carrier has had it.
    Reason::RewriteFailed
}
