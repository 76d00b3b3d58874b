//! The flows that are replayed: their ends, and klb's entries for them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use aya::maps::HashMap;
use lb_common::{
    Addr4, Addr6, Address,
    flow::{FlowEntry, Tuple, seen},
    names,
};
use lb_tests::{program::Datapath, topology::Family};

use crate::bench::floor::{put, shared};

/// Backends of the Service that is asked.
pub(super) const BACKENDS: u8 = 3;

/// The frontend with this port, of those that packets are for.
pub(super) fn frontend(family: Family, port: u16) -> SocketAddr {
    address(
        family,
        Ipv4Addr::new(10, 96, 0, 10),
        Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10),
        port,
    )
}

/// A port that frontends have, and one that nothing has.
pub(super) const SERVED: u16 = 80;
pub(super) const NOT_SERVED: u16 = 9;

/// Nobody's frontend.
pub(super) fn stranger(family: Family, port: u16) -> SocketAddr {
    address(
        family,
        Ipv4Addr::new(10, 3, 0, 1),
        Ipv6Addr::new(0xfd00, 3, 0, 0, 0, 0, 0, 1),
        port,
    )
}

/// A frontend that fills the maps, as those of other Services do.
pub(super) fn other_frontend(family: Family, number: u32) -> SocketAddr {
    let v4 = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 100, 0, 0)) + number);
    let v6 = Ipv6Addr::from(
        u128::from(Ipv6Addr::new(0xfd00, 0x97, 0, 0, 0, 0, 0, 0)) + u128::from(number),
    );
    address(family, v4, v6, 80)
}

pub(super) fn backend_addresses(number: u8) -> (Ipv4Addr, Ipv6Addr) {
    (
        Ipv4Addr::new(10, 1, 0, number),
        Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, number.into()),
    )
}

pub(super) fn backends(family: Family) -> Vec<SocketAddr> {
    (1..=BACKENDS)
        .map(backend_addresses)
        .map(|(v4, v6)| address(family, v4, v6, 8080))
        .collect()
}

/// The client of the flow of that number.
pub(super) fn client(family: Family, number: u32) -> SocketAddr {
    let (port, low) = shared::flow(number);
    let [high, below] = low.to_be_bytes();
    address(
        family,
        Ipv4Addr::new(10, 9, high, below),
        Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, low),
        port,
    )
}

/// The client of no flow: what the replay makes all others from.
pub(super) fn no_client(family: Family) -> SocketAddr {
    address(
        family,
        Ipv4Addr::new(10, 9, 0, 0),
        Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 0),
        0,
    )
}

fn address(family: Family, v4: Ipv4Addr, v6: Ipv6Addr, port: u16) -> SocketAddr {
    let ip: IpAddr = match family {
        Family::V4 => v4.into(),
        Family::V6 => v6.into(),
    };
    SocketAddr::new(ip, port)
}

/// Makes established connections of all that klb has only seen begin.
///
/// # Panics
/// If a table takes no more.
pub(super) fn establish(datapath: &mut Datapath, family: Family) {
    match family {
        Family::V4 => move_young::<Addr4>(datapath, names::YOUNG4, names::FLOWS4),
        Family::V6 => move_young::<Addr6>(datapath, names::YOUNG6, names::FLOWS6),
    }
}

fn move_young<A: Address>(datapath: &mut Datapath, young: &str, confirmed: &str)
where
    Tuple<A>: aya::Pod,
    FlowEntry<A>: aya::Pod,
{
    let map: HashMap<_, Tuple<A>, FlowEntry<A>> =
        datapath.map(young).try_into().expect("a hash map");
    let entries: Vec<_> = map.iter().map(|entry| entry.expect("readable")).collect();
    for (key, mut entry) in entries {
        entry.seen = seen::SYN | seen::DATA;
        entry.seen_peer = entry.seen;
        put(datapath.map(confirmed), key, entry).expect("room for a flow");
    }
    let mut map: HashMap<_, Tuple<A>, FlowEntry<A>> =
        datapath.map(young).try_into().expect("a hash map");
    let keys: Vec<_> = map.keys().map(|key| key.expect("readable")).collect();
    for key in keys {
        map.remove(&key).expect("an entry to remove");
    }
}
