//! Plans → what stands in the maps. Pure.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::{
    Port,
    service::{
        BackendRef, FRONTEND_DROP, FRONTEND_LOCAL_POLICY, FRONTEND_MAGLEV, Name, ServiceEntry,
        ServiceMeta,
    },
};

use crate::{
    datapath::{Family, SlotValue},
    maglev,
    model::{NamespacedName, Policy, Protocol},
    plan::{Backend, Choice, FrontendPlan, PortPlan, Verdict},
};

/// Addresses of every backend that must live, in order: those that a slot names.
/// Whoever answers in a family of which the port has no frontend (another Service
/// may have it) is in no slot, and a restart would not know it.
pub(super) fn wanted_backends(plan: &PortPlan) -> Vec<SocketAddr> {
    let frontends = plan.frontends.iter();
    let has_frontend = |family| {
        let mut frontends = frontends.clone();
        frontends.any(|frontend| Family::of(frontend.key.addr) == family)
    };
    let (v4, v6) = (has_frontend(Family::V4), has_frontend(Family::V6));
    let alive = plan.alive.iter().filter(|backend| match backend.addr {
        SocketAddr::V4(_) => v4,
        SocketAddr::V6(_) => v6,
    });
    let lists =
        frontends.flat_map(|frontend| [&frontend.backends].into_iter().chain(&frontend.inner));
    // Most share the memory of that.
    let others = lists.filter(|list| !Arc::ptr_eq(list, &plan.alive));
    let listed = others.flat_map(|list| list.iter());
    let mut wanted: Vec<_> = alive.chain(listed).map(|backend| backend.addr).collect();
    wanted.sort_unstable();
    wanted.dedup();
    wanted
}

/// What a frontend leads to.
#[derive(Clone, Debug)]
pub(super) struct Window {
    /// Those that get new flows, and behind them those that are parked.
    pub slots: Vec<SlotValue>,
    pub parked: u16,
}

/// The windows of a port's frontends, each of which is worked out once for those
/// that follow one another with the same list: a Maglev table takes a millisecond.
#[derive(Debug, Default)]
pub(super) struct Windows<'a> {
    outer: Option<(&'a FrontendPlan, Window)>,
    inner: Option<(&'a Arc<[Backend]>, Vec<SlotValue>)>,
}

impl<'a> Windows<'a> {
    /// For clients outside.
    pub(super) fn outer(
        &mut self,
        frontend: &'a FrontendPlan,
        plan: &PortPlan,
        known: &[Known],
    ) -> &Window {
        let is_same = |last: &FrontendPlan| {
            Family::of(last.key.addr) == Family::of(frontend.key.addr)
                && Arc::ptr_eq(&last.backends, &frontend.backends)
        };
        self.outer = self.outer.take().filter(|(last, _)| is_same(last));
        let (_, window) = self.outer.get_or_insert_with(|| {
            let mut slots = slots(&frontend.backends, plan.choice, known);
            let parked = ordered_slots(&parked(frontend, &plan.alive), known);
            let count = u16::try_from(parked.len()).unwrap_or(u16::MAX);
            slots.extend(parked);
            (
                frontend,
                Window {
                    slots,
                    parked: count,
                },
            )
        });
        window
    }

    /// For clients on this node, where theirs are others.
    pub(super) fn inner(
        &mut self,
        list: &'a Arc<[Backend]>,
        choice: Choice,
        known: &[Known],
    ) -> &[SlotValue] {
        self.inner = self
            .inner
            .take()
            .filter(|(last, _)| Arc::ptr_eq(last, list));
        let (_, slots) = self
            .inner
            .get_or_insert_with(|| (list, slots(list, choice, known)));
        slots
    }
}

/// The living backends of the frontend's family that it does not lead to, as
/// many as an entry can count.
pub(crate) fn parked(frontend: &FrontendPlan, alive: &[Backend]) -> Vec<Backend> {
    let family = Family::of(frontend.key.addr);
    let is_listed = |backend| frontend.backends.binary_search(backend).is_ok();
    alive
        .iter()
        .filter(|backend| Family::of(backend.addr.ip()) == family && !is_listed(backend))
        .take(u16::MAX.into())
        .copied()
        .collect()
}

/// A backend of a port, by its address.
pub(super) type Known = (SocketAddr, BackendRef);

/// Where the backend of an address is among those of a port, or where it belongs.
pub(super) fn place_of(known: &[Known], addr: SocketAddr) -> Result<usize, usize> {
    known.binary_search_by_key(&addr, |(addr, _)| *addr)
}

/// The slots of a range, from which one is taken for each new flow: a Maglev
/// table if there is room for all in it, else the backends in the order of
/// their ids.
pub(super) fn slots(backends: &[Backend], choice: Choice, known: &[Known]) -> Vec<SlotValue> {
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
pub(super) fn ordered_slots(backends: &[Backend], known: &[Known]) -> Vec<SlotValue> {
    let mut values = Vec::with_capacity(backends.len());
    values.extend(backends.iter().filter_map(|backend| {
        let place = place_of(known, backend.addr).ok()?;
        Some(SlotValue {
            addr: backend.addr,
            local: backend.local,
            backend: known[place].1,
        })
    }));
    values.sort_unstable_by_key(|slot| slot.backend.id);
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

/// What a Service port is called. `None` if a name is longer than a map holds; the
/// conversion has refused such names.
pub(super) fn meta(
    service: &NamespacedName,
    name: &str,
    protocol: Protocol,
    port: u16,
) -> Option<ServiceMeta> {
    Some(ServiceMeta {
        namespace: Name::new(service.namespace())?,
        name: Name::new(service.name())?,
        port_name: Name::new(name)?,
        port: Port::from(port),
        protocol: protocol.number(),
        pad: 0,
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
        let known: Vec<_> = (1..=4)
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
