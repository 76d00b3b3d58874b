//! Plans → what stands in the maps. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use lb_common::{
    Port,
    service::{
        BackendRef, FRONTEND_DROP, FRONTEND_LOCAL_POLICY, FRONTEND_MAGLEV, Name, ServiceEntry,
        ServiceMeta,
    },
};

use super::PortId;
use crate::{
    datapath::{Family, SlotValue},
    maglev,
    model::{NamespacedName, Policy, Protocol, ServicePort},
    plan::{Backend, Choice, FrontendPlan, PortPlan, Verdict},
};

/// Addresses of every backend that must live: those that a slot names. Whoever
/// answers in a family of which the port has no frontend (another Service may
/// have it) is in no slot, and a restart would not know it.
pub(super) fn wanted_backends(plan: &PortPlan) -> BTreeSet<SocketAddr> {
    let frontends = plan.frontends.iter();
    let families: BTreeSet<_> = frontends
        .clone()
        .map(|frontend| Family::of(frontend.key.addr))
        .collect();
    let listed = frontends.flat_map(|frontend| {
        let inner = frontend.inner.iter().flat_map(|inner| inner.iter());
        frontend.backends.iter().chain(inner)
    });
    let alive = plan.alive.iter();
    let alive = alive.filter(|backend| families.contains(&Family::of(backend.addr.ip())));
    listed.chain(alive).map(|backend| backend.addr).collect()
}

/// The living backends of the frontend's family that it does not lead to, as
/// many as an entry can count.
pub(crate) fn parked(frontend: &FrontendPlan, alive: &[Backend]) -> Vec<Backend> {
    let listed: BTreeSet<_> = frontend.backends.iter().collect();
    let family = Family::of(frontend.key.addr);
    alive
        .iter()
        .filter(|backend| Family::of(backend.addr.ip()) == family && !listed.contains(backend))
        .take(u16::MAX.into())
        .copied()
        .collect()
}

/// The slots of a range, from which one is taken for each new flow: a Maglev
/// table if there is room for all in it, else the backends in the order of
/// their ids.
pub(super) fn slots(
    backends: &[Backend],
    choice: Choice,
    known: &BTreeMap<SocketAddr, BackendRef>,
) -> Vec<SlotValue> {
    let in_order = ordered_slots(backends, known);
    let Some(size) = table_size(in_order.len(), choice) else {
        return in_order;
    };
    let addresses: Vec<_> = in_order.iter().map(|slot| slot.addr).collect();
    let table = maglev::table(&addresses, size).into_iter();
    table.map(|index| in_order[index]).collect()
}

/// Slots of the Maglev table for so many backends, where they get one.
pub(crate) fn table_size(backends: usize, choice: Choice) -> Option<u32> {
    match choice {
        Choice::Maglev(size) => (2..=size as usize).contains(&backends).then_some(size),
        Choice::Random | Choice::Affinity(_) => None,
    }
}

/// A slot for each backend, in the order of their ids.
pub(super) fn ordered_slots(
    backends: &[Backend],
    known: &BTreeMap<SocketAddr, BackendRef>,
) -> Vec<SlotValue> {
    let values = backends.iter().filter_map(|backend| {
        Some(SlotValue {
            addr: backend.addr,
            local: backend.local,
            backend: *known.get(&backend.addr)?,
        })
    });
    let mut values: Vec<_> = values.collect();
    values.sort_by_key(|slot| slot.backend.id);
    values
}

/// The entry of a frontend, but for the slots that it leads to.
pub(crate) fn entry(frontend: &FrontendPlan, choice: Choice, service: u32) -> ServiceEntry {
    let mut flags = frontend.flags;
    if frontend.policy == Policy::Local {
        flags |= FRONTEND_LOCAL_POLICY;
    }
    if frontend.verdict == Verdict::Drop {
        flags |= FRONTEND_DROP;
    }
    let affinity = match choice {
        Choice::Affinity(seconds) => seconds,
        Choice::Random => 0,
        Choice::Maglev(_) => {
            flags |= FRONTEND_MAGLEV;
            0
        }
    };
    ServiceEntry {
        service,
        affinity,
        kind: frontend.kind as u8,
        flags,
        ..ServiceEntry::default()
    }
}

/// `None` if a name is longer than a map holds; the conversion has refused such
/// names.
pub(super) fn meta(id: &PortId, port: &ServicePort) -> Option<ServiceMeta> {
    Some(ServiceMeta {
        namespace: Name::new(id.service.namespace())?,
        name: Name::new(id.service.name())?,
        port_name: Name::new(&id.name)?,
        port: Port::from(port.port),
        protocol: port.protocol.number(),
        pad: 0,
    })
}

pub(super) fn port_id(meta: &ServiceMeta) -> Option<PortId> {
    Some(PortId {
        service: NamespacedName::new(meta.namespace.as_str(), meta.name.as_str()),
        name: meta.port_name.as_str().to_owned(),
        protocol: Protocol::from_number(meta.protocol)?,
    })
}

/// The smallest network that holds another one and an address of its family.
pub(super) fn cover(network: Option<IpNet>, addr: IpAddr) -> IpNet {
    let Some(mut network) = network else {
        return addr.into();
    };
    while !network.contains(&addr) {
        match network.supernet() {
            Some(wider) => network = wider,
            None => break,
        }
    }
    network
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_grows_as_little_as_it_can() {
        let mut network = None;
        for (addr, expected) in [
            ("10.96.0.1", "10.96.0.1/32"),
            ("10.96.0.1", "10.96.0.1/32"),
            ("10.96.0.2", "10.96.0.0/30"),
            ("10.96.7.9", "10.96.0.0/21"),
            ("192.168.0.1", "0.0.0.0/0"),
        ] {
            let grown = cover(network, addr.parse().expect("an address"));
            assert_eq!(grown.to_string(), expected);
            network = Some(grown);
        }
        let one = "fd00:10:96::1".parse().expect("an address");
        let other = "fd00:10:96::f".parse().expect("an address");
        assert_eq!(
            cover(Some(cover(None, one)), other).to_string(),
            "fd00:10:96::/124"
        );
    }

    #[test]
    fn a_table_stands_where_all_backends_fit_in() {
        let backends: Vec<_> = (1..=4)
            .map(|n| Backend {
                addr: SocketAddr::from(([10, 244, 0, n], 80)),
                local: false,
            })
            .collect();
        let known = (1..=4)
            .map(|n| {
                let id = u32::from(5 - n);
                (
                    SocketAddr::from(([10, 244, 0, n], 80)),
                    BackendRef { id, generation: 1 },
                )
            })
            .collect();
        let ids = |count: usize, choice| {
            let slots = slots(&backends[..count], choice, &known);
            slots.iter().map(|slot| slot.backend.id).collect::<Vec<_>>()
        };
        assert_eq!(ids(4, Choice::Random), [1, 2, 3, 4]);
        assert_eq!(ids(4, Choice::Affinity(60)), [1, 2, 3, 4]);
        assert_eq!(ids(4, Choice::Maglev(7)).len(), 7);
        assert_eq!(ids(4, Choice::Maglev(3)), [1, 2, 3, 4]);
        assert_eq!(ids(1, Choice::Maglev(7)), [4]);
        assert_eq!(ids(0, Choice::Maglev(7)), [0; 0]);
    }
}
