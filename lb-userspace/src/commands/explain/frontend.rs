//! Which frontend a packet is for, or which it may have been meant for.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use lb_common::service::{FRONTEND_REFUSE, FrontendKind, ServiceEntry};
use serde::Serialize;

use crate::{
    commands::{Names, PortId, get::Ranges, protocol_name},
    datapath::{Family, FrontendKey, MapError, Maps},
};

/// So many frontends are named where none matches.
const NEAREST: usize = 5;

/// The frontends, by what they are at.
pub(super) type Services = BTreeMap<FrontendKey, ServiceEntry>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Frontend {
    #[serde(flatten)]
    pub(super) service: PortId,
    pub(super) kind: &'static str,
    pub(super) address: IpAddr,
    pub(super) port: u16,
    pub(super) protocol: String,
}

impl Frontend {
    pub(super) fn new(key: FrontendKey, entry: &ServiceEntry, names: &Names) -> Self {
        Self {
            service: names.port(entry.service),
            kind: FrontendKind::from_number(entry.kind).map_or("Unknown", FrontendKind::name),
            address: key.addr,
            port: key.port,
            protocol: protocol_name(key.protocol),
        }
    }

    pub(super) fn text(&self) -> String {
        format!(
            "{} {}/{} of {}",
            self.kind,
            SocketAddr::new(self.address, self.port),
            self.protocol,
            self.service
        )
    }
}

/// A frontend that a packet is nearly for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Near {
    #[serde(flatten)]
    pub(super) frontend: Frontend,
    /// In what it is another.
    pub(super) differs: Difference,
}

/// The first is the nearest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Difference {
    Protocol,
    /// And the port that was asked for is that of the backends.
    TargetPort,
    Port,
    Address,
}

impl Difference {
    pub(super) const fn text(self) -> &'static str {
        match self {
            Self::Protocol => "another protocol",
            Self::TargetPort => "another port: yours is the one that its backends listen on",
            Self::Port => "another port",
            Self::Address => "another address",
        }
    }
}

/// The frontends that are most like `wanted`, the nearest first.
pub(super) fn nearest(
    maps: &impl Maps,
    services: &Services,
    names: &Names,
    wanted: FrontendKey,
) -> Result<Vec<Near>, MapError> {
    let mut ranges = Ranges::default();
    let mut found = BTreeSet::new();
    for (key, entry) in services {
        if entry.kind == FrontendKind::Address as u8
            || Family::of(key.addr) != Family::of(wanted.addr)
        {
            continue;
        }
        let difference = match (key.addr == wanted.addr, key.port == wanted.port) {
            (true, true) => Difference::Protocol,
            (true, false) => {
                let slots = ranges.inner(maps, *key, entry)?.iter();
                let mut ports = slots.map(|slot| slot.addr.port());
                if key.protocol == wanted.protocol && ports.any(|port| port == wanted.port) {
                    Difference::TargetPort
                } else {
                    Difference::Port
                }
            }
            (false, true) if key.protocol == wanted.protocol => Difference::Address,
            (false, _) => continue,
        };
        let distance = (
            key.protocol != wanted.protocol,
            Reverse(common_bits(key.addr, wanted.addr)),
            key.port.abs_diff(wanted.port),
        );
        found.insert((difference, distance, *key));
    }
    let nearest = found
        .into_iter()
        .take(NEAREST)
        .filter_map(|(differs, _, key)| {
            let frontend = Frontend::new(key, services.get(&key)?, names);
            Some(Near { frontend, differs })
        });
    Ok(nearest.collect())
}

/// How many bits two addresses of one family begin with alike.
fn common_bits(one: IpAddr, other: IpAddr) -> u32 {
    match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        (IpAddr::V6(one), IpAddr::V6(other)) => (one.to_bits() ^ other.to_bits()).leading_zeros(),
        _ => 0,
    }
}

/// Whether the address refuses what comes to ports that nobody has: it is a
/// `ClusterIP`.
pub(super) fn refuses_other_ports(services: &Services, addr: IpAddr) -> bool {
    let address = services.get(&FrontendKey::of_address(addr));
    address.is_some_and(|entry| entry.flags & FRONTEND_REFUSE != 0)
}

#[cfg(test)]
mod tests {
    use lb_common::{
        flow::{TCP, UDP},
        service::BackendRef,
    };

    use super::*;
    use crate::datapath::{SlotValue, memory::MemoryMaps};

    fn key(addr: &str, protocol: u8) -> FrontendKey {
        let addr: SocketAddr = addr.parse().expect("an address");
        FrontendKey {
            addr: addr.ip(),
            port: addr.port(),
            protocol,
        }
    }

    /// Frontends with one backend, which listens on port 8080.
    fn maps(frontends: &[(&str, u8)]) -> MemoryMaps {
        let mut maps = MemoryMaps::default();
        let slot = SlotValue {
            addr: "10.244.0.5:8080".parse().expect("an address"),
            local: true,
            backend: BackendRef {
                id: 1,
                generation: 1,
            },
        };
        maps.put_slot(Family::V4, 4, &slot).expect("written");
        for (addr, protocol) in frontends {
            let entry = ServiceEntry {
                first_slot: 4,
                slot_count: 1,
                inner_first_slot: 4,
                inner_slot_count: 1,
                kind: FrontendKind::ClusterIp as u8,
                ..ServiceEntry::default()
            };
            maps.put_service(key(addr, *protocol), &entry)
                .expect("written");
        }
        maps
    }

    fn near(frontends: &[(&str, u8)], wanted: &str) -> Vec<(String, Difference)> {
        let maps = maps(frontends);
        let services = maps.services().expect("read");
        let names = Names::read(&maps).expect("read");
        let near = nearest(&maps, &services, &names, key(wanted, TCP)).expect("read");
        near.into_iter()
            .map(|near| {
                let Frontend { address, port, .. } = near.frontend;
                let addr = SocketAddr::new(address, port);
                (format!("{addr}/{}", near.frontend.protocol), near.differs)
            })
            .collect()
    }

    #[test]
    fn the_nearest_frontend_comes_first() {
        use Difference::{Address, Port, Protocol, TargetPort};
        let frontends = [
            ("10.96.0.10:53", TCP),
            ("10.96.0.10:53", UDP),
            ("10.96.0.10:9153", TCP),
            ("10.96.0.11:8080", TCP),
            ("192.0.2.1:8080", TCP),
            ("10.96.7.7:443", TCP),
        ];
        for (wanted, expected) in [
            (
                "10.96.0.10:54",
                &[
                    ("10.96.0.10:53/TCP", Port),
                    ("10.96.0.10:9153/TCP", Port),
                    ("10.96.0.10:53/UDP", Port),
                ][..],
            ),
            (
                "10.96.0.10:8080",
                &[
                    ("10.96.0.10:9153/TCP", TargetPort),
                    ("10.96.0.10:53/TCP", TargetPort),
                    ("10.96.0.10:53/UDP", Port),
                    ("10.96.0.11:8080/TCP", Address),
                    ("192.0.2.1:8080/TCP", Address),
                ],
            ),
            ("10.96.7.8:443", &[("10.96.7.7:443/TCP", Address)]),
            ("10.1.1.1:1", &[]),
        ] {
            let found = near(&frontends, wanted);
            let found: Vec<_> = found.iter().map(|(at, how)| (at.as_str(), *how)).collect();
            assert_eq!(found, expected, "{wanted}");
        }
        let only_udp = near(&[("10.96.0.10:53", UDP)], "10.96.0.10:53");
        assert_eq!(only_udp, [("10.96.0.10:53/UDP".to_owned(), Protocol)]);
    }

    #[test]
    fn no_more_are_named_than_anybody_reads() {
        let ports: Vec<_> = (1..50).map(|port| format!("10.96.0.10:{port}")).collect();
        let frontends: Vec<_> = ports.iter().map(|addr| (addr.as_str(), TCP)).collect();
        assert_eq!(near(&frontends, "10.96.0.10:60").len(), NEAREST);
    }

    #[test]
    fn what_is_said_of_an_address_is_no_frontend() {
        let mut maps = maps(&[]);
        let addr = IpAddr::from([10, 96, 0, 10]);
        let entry = ServiceEntry {
            kind: FrontendKind::Address as u8,
            flags: FRONTEND_REFUSE,
            ..ServiceEntry::default()
        };
        maps.put_service(FrontendKey::of_address(addr), &entry)
            .expect("written");
        let services = maps.services().expect("read");
        let names = Names::read(&maps).expect("read");
        let near = nearest(&maps, &services, &names, key("10.96.0.10:53", TCP));
        assert_eq!(near.expect("read"), []);
        assert!(refuses_other_ports(&services, addr));
        assert!(!refuses_other_ports(
            &services,
            IpAddr::from([10, 96, 0, 11])
        ));
    }
}
