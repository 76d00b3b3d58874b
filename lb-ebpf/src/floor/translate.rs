//! Frontend → backend, and back.

use core::hint::black_box;

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::bpf_get_prandom_u32,
};
use lb_common::{
    Port,
    checksum::Delta,
    flow::{TCP, Tuple, UDP},
    service::{ServiceEntry, ServiceKey, Slot},
};

use crate::{
    family::{Family, L3, V4, V6},
    maps::Target,
    packet::{Packet, Refused},
};

/// Where the `EtherType` stands, and how they lie in memory.
const ETHER_TYPE: usize = L3 - size_of::<u16>();
const IPV4: u16 = 0x0800_u16.to_be();
const IPV6: u16 = 0x86dd_u16.to_be();

/// Which packets of a flow are translated.
pub trait Directions {
    const REPLIES: bool;
}

/// Those to a frontend; all others cost one lookup.
pub struct Forward;
/// Those of the answer too, at the cost of a lookup for all others.
pub struct Both;

impl Directions for Forward {
    const REPLIES: bool = false;
}

impl Directions for Both {
    const REPLIES: bool = true;
}

/// A packet that has been translated.
#[derive(Clone, Copy)]
pub enum Translated {
    V4,
    V6,
}

/// Translates the packet, if it is of a flow or opens one.
#[inline(always)]
pub fn run<P: Packet, D: Directions>(packet: &P) -> Option<Translated> {
    match packet.read::<u16>(ETHER_TYPE)? {
        IPV4 => run_family::<P, D, V4>(packet).map(|()| Translated::V4),
        IPV6 => run_family::<P, D, V6>(packet).map(|()| Translated::V6),
        _ => None,
    }
}

#[inline(always)]
fn run_family<P: Packet, D: Directions, F: Family>(packet: &P) -> Option<()> {
    let tuple = parse::<P, F>(packet)?;
    let key = ServiceKey::new(tuple.dst, tuple.dst_port, tuple.protocol);
    // SAFETY: only the benchmark writes this map, before the program runs.
    let service = unsafe { F::services().get(&key) };
    if service.is_none() && !D::REPLIES {
        return None;
    }
    // SAFETY: the copy is made at once.
    let target = match unsafe { F::flows().get(&tuple).copied() } {
        Some(target) => target,
        None => open::<F>(&tuple, service?)?,
    };
    rewrite::<P, F>(packet, &tuple, target).ok()
}

/// Reads what a packet's flow is known by.
#[inline(always)]
pub fn read<P: Packet>(packet: &P) {
    match packet.read::<u16>(ETHER_TYPE) {
        Some(IPV4) => use_up(&parse::<P, V4>(packet)),
        Some(IPV6) => use_up(&parse::<P, V6>(packet)),
        _ => {}
    }
}

/// What nobody looks at the compiler would leave out.
#[inline(always)]
fn use_up<T>(value: &T) {
    black_box(value);
}

#[inline(always)]
fn parse<P: Packet, F: Family>(packet: &P) -> Option<Tuple<F::Addr>> {
    if packet.read::<u64>(F::PORTS).is_none() {
        packet.make_readable(F::PORTS + 20);
    }
    if !F::is_plain(packet)? {
        return None;
    }
    let protocol: u8 = packet.read(F::PROTOCOL)?;
    if !matches!(protocol, TCP | UDP) {
        return None;
    }
    let src = packet.read(F::SRC)?;
    let dst = packet.read(F::DST)?;
    let [src_port, dst_port]: [Port; 2] = packet.read(F::PORTS)?;
    Some(Tuple::new(src, dst, src_port, dst_port, protocol))
}

/// Chooses a backend, and writes both directions.
#[inline(always)]
fn open<F: Family>(tuple: &Tuple<F::Addr>, service: &ServiceEntry) -> Option<Target<F::Addr>> {
    let slot = choose::<F>(service)?;
    let target = Target {
        addr: slot.addr,
        port: slot.port,
        is_source: 0,
    };
    F::flows()
        .insert(tuple, &target, u64::from(BPF_NOEXIST))
        .ok()?;
    let reply = Tuple::new(
        slot.addr,
        tuple.src,
        slot.port,
        tuple.src_port,
        tuple.protocol,
    );
    let origin = Target {
        addr: tuple.dst,
        port: tuple.dst_port,
        is_source: 1,
    };
    F::flows()
        .insert(&reply, &origin, u64::from(BPF_ANY))
        .ok()?;
    Some(target)
}

/// One of a frontend's slots, at random.
#[inline(always)]
pub fn choose<F: Family>(service: &ServiceEntry) -> Option<&'static Slot<F::Addr>> {
    // SAFETY: the helper takes nothing and may be called from every program.
    let random = unsafe { bpf_get_prandom_u32() };
    let n = (u64::from(random) * u64::from(service.slot_count)) >> 32;
    F::slots().get(service.first_slot.wrapping_add(n as u32))
}

#[inline(always)]
fn rewrite<P: Packet, F: Family>(
    packet: &P,
    tuple: &Tuple<F::Addr>,
    target: Target<F::Addr>,
) -> Result<(), Refused> {
    if target.is_source == 0 {
        replace::<P, F, false>(packet, tuple, target)
    } else {
        replace::<P, F, true>(packet, tuple, target)
    }
}

#[inline(always)]
fn replace<P: Packet, F: Family, const SOURCE: bool>(
    packet: &P,
    tuple: &Tuple<F::Addr>,
    target: Target<F::Addr>,
) -> Result<(), Refused> {
    let (addr, port, addr_at, port_at) = if SOURCE {
        (tuple.src, tuple.src_port, F::SRC, F::PORTS)
    } else {
        (tuple.dst, tuple.dst_port, F::DST, F::PORTS + 2)
    };
    let address = Delta::new().address(&addr, &target.addr);
    let ports = Delta::new().ports([port, Port::default()], [target.port, Port::default()]);
    if let Some(offset) = F::HEADER_CHECKSUM {
        packet.fix_header(offset, address)?;
    }
    if tuple.protocol == TCP {
        packet.fix_transport(F::PORTS + 16, false, address, ports)?;
    } else {
        packet.fix_transport(F::PORTS + 6, true, address, ports)?;
    }
    packet.write(addr_at, target.addr)?;
    packet.write(port_at, target.port)
}
