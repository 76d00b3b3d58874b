//! Which backends a client may get, with what odds, and whom they see.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use lb_common::service::{
    BackendRef, FRONTEND_LOCAL_POLICY, FRONTEND_MAGLEV, FRONTEND_SOURCE_RANGES, FrontendKind,
    ServiceEntry,
};
use serde::Serialize;

use crate::{
    commands::get::Ranges,
    datapath::{FrontendKey, MapError, Maps, SlotValue, kernel::Client},
};

/// What decides which clients may come, and which backends they get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Policy {
    /// `inside` or `outside`.
    pub(super) client: &'static str,
    /// The field of the Service.
    pub(super) field: &'static str,
    /// `Cluster` or `Local`.
    pub(super) value: &'static str,
    /// `random` or `maglev`.
    pub(super) algorithm: &'static str,
    /// `null` if anybody may come.
    pub(super) source_ranges: Option<SourceRanges>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct SourceRanges {
    pub(super) ranges: Vec<IpNet>,
    /// The client is in one of them.
    pub(super) allowed: bool,
}

impl Policy {
    pub(super) fn new(
        entry: &ServiceEntry,
        client: IpAddr,
        is_inside: bool,
        ranges: &BTreeSet<(u32, IpNet)>,
    ) -> Self {
        let own = ranges.iter().filter(|(service, range)| {
            *service == entry.service && range.addr().is_ipv4() == client.is_ipv4()
        });
        let ranges: Vec<_> = own.map(|(_, range)| *range).collect();
        Self {
            client: if is_inside { "inside" } else { "outside" },
            field: if entry.kind == FrontendKind::ClusterIp as u8 {
                "internalTrafficPolicy"
            } else {
                "externalTrafficPolicy"
            },
            value: if entry.flags & FRONTEND_LOCAL_POLICY == 0 {
                "Cluster"
            } else {
                "Local"
            },
            algorithm: if entry.flags & FRONTEND_MAGLEV == 0 {
                "random"
            } else {
                "maglev"
            },
            source_ranges: (entry.flags & FRONTEND_SOURCE_RANGES != 0).then(|| SourceRanges {
                allowed: ranges.iter().any(|range| range.contains(&client)),
                ranges,
            }),
        }
    }

    pub(super) fn text(&self) -> String {
        let Self {
            client,
            field,
            value,
            source_ranges,
            algorithm: _,
        } = self;
        let mut text = format!("{field} {value}; the client counts as {client}");
        if let Some(SourceRanges { ranges, allowed }) = source_ranges {
            let ranges: Vec<_> = ranges.iter().map(ToString::to_string).collect();
            let among = if *allowed { "is in" } else { "is in none of" };
            let ranges = match &ranges[..] {
                [] => "no network of its family".to_owned(),
                ranges => ranges.join(", "),
            };
            for part in [", and ", among, " loadBalancerSourceRanges: ", &ranges] {
                text += part;
            }
        }
        text
    }
}

/// A backend that the client may get.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Candidate {
    pub(super) address: IpAddr,
    pub(super) port: u16,
    /// It is on this node.
    pub(super) local: bool,
    pub(super) id: u32,
    #[serde(skip)]
    pub(super) life: BackendRef,
    /// Of the slots, those that are its own.
    pub(super) slots: u32,
    /// The odds: its part of all slots.
    pub(super) share: f64,
    /// Whose address it sees: that of the `client`, or of the `node`.
    pub(super) sees: &'static str,
}

impl Candidate {
    pub(super) const fn addr(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }

    pub(super) const fn place(&self) -> &'static str {
        if self.local { "local" } else { "remote" }
    }
}

/// Who asks, as far as the choice depends on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) addr: IpAddr,
    /// A pod or a process of this node.
    pub(super) is_inside: bool,
    /// It asks at its socket, which is its own edge: nobody is masqueraded.
    pub(super) at_socket: bool,
}

/// The backends behind a frontend for a client, in the order of their slots.
pub(super) fn candidates(
    maps: &impl Maps,
    key: FrontendKey,
    entry: &ServiceEntry,
    caller: Caller,
) -> Result<Vec<Candidate>, MapError> {
    let mut ranges = Ranges::default();
    let slots = if caller.is_inside {
        ranges.inner(maps, key, entry)?
    } else {
        ranges.outer(maps, key, entry)?
    };
    let mut counts = BTreeMap::<SlotValue, u32>::new();
    for slot in slots {
        *counts.entry(*slot).or_default() += 1;
    }
    let all = slots.len() as u32;
    let mut candidates: Vec<_> = counts
        .into_iter()
        .map(|(slot, slots)| Candidate {
            address: slot.addr.ip(),
            port: slot.addr.port(),
            local: slot.local,
            id: slot.backend.id,
            life: slot.backend,
            slots,
            share: f64::from(slots) / f64::from(all),
            sees: if must_masquerade(entry, slot, caller) {
                "node"
            } else {
                "client"
            },
        })
        .collect();
    candidates.sort_by_key(|candidate| candidate.id);
    Ok(candidates)
}

/// Whether the backend must see an address of this node, as the programs decide
/// it: `open.rs` says why.
fn must_masquerade(entry: &ServiceEntry, slot: SlotValue, caller: Caller) -> bool {
    if caller.at_socket {
        return false;
    }
    if slot.local {
        return slot.addr.ip() == caller.addr;
    }
    let keeps_source =
        entry.kind == FrontendKind::ClusterIp as u8 || entry.flags & FRONTEND_LOCAL_POLICY != 0;
    !(keeps_source && caller.is_inside)
}

/// A part of all, as people say it.
pub(super) fn odds(slots: u32, all: u32) -> String {
    if slots == 0 || all == 0 {
        return "never".to_owned();
    }
    if all.is_multiple_of(slots) {
        return format!("1/{}", all / slots);
    }
    format!("{:.1}%", 100.0 * f64::from(slots) / f64::from(all))
}

/// The backend that a client keeps (`sessionAffinity: ClientIP`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Kept {
    /// How long a client that opens no connection keeps its backend.
    pub(super) seconds: u32,
    /// `null` if it keeps none, or one that has gone.
    pub(super) backend: Option<SocketAddr>,
    /// Since its last new connection.
    pub(super) idle_seconds: Option<u32>,
    /// Until it is free, if it opens none.
    pub(super) left_seconds: Option<u32>,
    /// It gets that one again.
    pub(super) in_force: bool,
    pub(super) why: &'static str,
}

impl Kept {
    /// `None` for a frontend without affinity.
    pub(super) fn new(
        entry: &ServiceEntry,
        client: Option<&Client>,
        candidates: &[Candidate],
    ) -> Option<Self> {
        let seconds = entry.affinity;
        if seconds == 0 {
            return None;
        }
        let Some(client) = client else {
            return Some(Self {
                seconds,
                backend: None,
                idle_seconds: None,
                left_seconds: None,
                in_force: false,
                why: "this client keeps no backend yet: it will keep the one that it gets",
            });
        };
        let mut candidates = candidates.iter();
        let own = candidates.find(|candidate| candidate.life == client.life);
        let left = seconds.checked_sub(client.idle);
        Some(Self {
            seconds,
            backend: own.map(Candidate::addr),
            idle_seconds: Some(client.idle),
            left_seconds: left,
            in_force: own.is_some() && left.is_some(),
            why: match (own, left) {
                (Some(_), Some(_)) => "this client keeps its backend",
                (None, _) => "the backend that it kept is none of the candidates any more",
                (_, None) => "its time is over: it has opened no connection for too long",
            },
        })
    }

    /// Of a caller whose address is not known; `None` as for [`Self::new`].
    pub(super) fn unknown(entry: &ServiceEntry) -> Option<Self> {
        (entry.affinity > 0).then_some(Self {
            seconds: entry.affinity,
            backend: None,
            idle_seconds: None,
            left_seconds: None,
            in_force: false,
            why: "what this caller keeps, it keeps by its network namespace, and not by its address",
        })
    }

    pub(super) fn text(&self) -> String {
        let Self {
            seconds,
            backend,
            left_seconds,
            in_force,
            why,
            idle_seconds: _,
        } = self;
        match (backend, left_seconds, in_force) {
            (Some(backend), Some(left), true) => {
                format!("{why}, {backend}, for another {left}s of {seconds}s")
            }
            _ => format!("for {seconds}s; {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use lb_common::flow::TCP;

    use super::*;
    use crate::datapath::{Family, memory::MemoryMaps};

    const OUTSIDE: Caller = Caller {
        addr: IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 9)),
        is_inside: false,
        at_socket: false,
    };

    fn slot(last: u8, local: bool) -> SlotValue {
        SlotValue {
            addr: SocketAddr::from(([10, 244, 0, last], 3000)),
            local,
            backend: BackendRef {
                id: last.into(),
                generation: 1,
            },
        }
    }

    fn entry(slots: u32, inner: u32) -> ServiceEntry {
        ServiceEntry {
            first_slot: 0,
            slot_count: slots,
            inner_first_slot: 0,
            inner_slot_count: inner,
            service: 7,
            kind: FrontendKind::NodePort as u8,
            ..ServiceEntry::default()
        }
    }

    fn found(slots: &[SlotValue], entry: &ServiceEntry, caller: Caller) -> Vec<Candidate> {
        let mut maps = MemoryMaps::default();
        for (index, slot) in slots.iter().enumerate() {
            maps.put_slot(Family::V4, index as u32, slot)
                .expect("written");
        }
        let key = FrontendKey {
            addr: IpAddr::from([192, 0, 2, 1]),
            port: 30080,
            protocol: TCP,
        };
        candidates(&maps, key, entry, caller).expect("read")
    }

    #[test]
    fn odds_are_those_of_the_slots() {
        let slots = [slot(5, true), slot(6, false), slot(5, true)];
        let found = found(&slots, &entry(3, 3), OUTSIDE);
        let odds: Vec<_> = found.iter().map(|found| odds(found.slots, 3)).collect();
        assert_eq!(odds, ["66.7%", "1/3"]);
        let sum: f64 = found.iter().map(|found| found.share).sum();
        assert!((sum - 1.0).abs() < 1e-9);
    }

    #[test]
    fn odds_are_said_as_people_say_them() {
        for (slots, all, text) in [
            (1, 1, "1/1"),
            (1, 3, "1/3"),
            (2, 6, "1/3"),
            (340, 1021, "33.3%"),
            (0, 3, "never"),
        ] {
            assert_eq!(odds(slots, all), text);
        }
    }

    #[test]
    fn clients_inside_have_a_window_of_their_own() {
        let slots = [slot(5, true), slot(6, false)];
        let inside = Caller {
            is_inside: true,
            ..OUTSIDE
        };
        let entry = entry(1, 2);
        assert_eq!(found(&slots, &entry, OUTSIDE).len(), 1);
        assert_eq!(found(&slots, &entry, inside).len(), 2);
    }

    #[test]
    fn the_node_is_seen_where_answers_must_come_back_to_it() {
        let cluster_ip = ServiceEntry {
            kind: FrontendKind::ClusterIp as u8,
            ..entry(2, 2)
        };
        let local = ServiceEntry {
            flags: FRONTEND_LOCAL_POLICY,
            ..entry(2, 2)
        };
        let inside = Caller {
            is_inside: true,
            ..OUTSIDE
        };
        let at_socket = Caller {
            at_socket: true,
            ..inside
        };
        let hairpin = Caller {
            addr: IpAddr::from([10, 244, 0, 5]),
            ..inside
        };
        let slots = [slot(5, true), slot(6, false)];
        for (entry, caller, sees) in [
            (entry(2, 2), OUTSIDE, ["client", "node"]),
            (cluster_ip, OUTSIDE, ["client", "node"]),
            (entry(2, 2), inside, ["client", "node"]),
            (cluster_ip, inside, ["client", "client"]),
            (local, inside, ["client", "client"]),
            (cluster_ip, hairpin, ["node", "client"]),
            (entry(2, 2), at_socket, ["client", "client"]),
        ] {
            let found = found(&slots, &entry, caller);
            let found: Vec<_> = found.iter().map(|found| found.sees).collect();
            assert_eq!(found, sees, "{caller:?}");
        }
    }

    #[test]
    fn source_ranges_are_those_of_the_service_and_the_family() {
        let ranges: BTreeSet<_> = [(7, "192.0.2.0/24"), (7, "fd00::/8"), (8, "0.0.0.0/0")]
            .map(|(service, range)| (service, range.parse().expect("a network")))
            .into();
        let guarded = ServiceEntry {
            flags: FRONTEND_SOURCE_RANGES,
            ..entry(1, 1)
        };
        for (client, allowed, ranges_named) in [
            ("192.0.2.9", true, 1),
            ("198.51.100.9", false, 1),
            ("fd00::9", true, 1),
            ("2001:db8::9", false, 1),
        ] {
            let client = client.parse().expect("an address");
            let policy = Policy::new(&guarded, client, false, &ranges);
            let found = policy.source_ranges.clone().expect("guarded");
            assert_eq!((found.allowed, found.ranges.len()), (allowed, ranges_named));
            assert_eq!(policy.text().contains("in none of"), !allowed);
        }
        let anybody = Policy::new(&entry(1, 1), OUTSIDE.addr, false, &ranges);
        assert_eq!(anybody.source_ranges, None);
    }

    #[test]
    fn a_client_keeps_its_backend_while_all_of_it_holds() {
        let sticky = ServiceEntry {
            affinity: 60,
            ..entry(2, 2)
        };
        let candidates = found(&[slot(5, true), slot(6, false)], &sticky, OUTSIDE);
        let client = |id, idle| Client {
            client: OUTSIDE.addr,
            service: 7,
            life: BackendRef { id, generation: 1 },
            idle,
        };
        for (client, in_force, part) in [
            (
                Some(client(5, 10)),
                true,
                "10.244.0.5:3000, for another 50s",
            ),
            (Some(client(5, 60)), true, "for another 0s"),
            (Some(client(5, 61)), false, "its time is over"),
            (Some(client(9, 10)), false, "none of the candidates"),
            (None, false, "keeps no backend yet"),
        ] {
            let kept = Kept::new(&sticky, client.as_ref(), &candidates).expect("affinity");
            assert_eq!(kept.in_force, in_force, "{client:?}");
            assert!(kept.text().contains(part), "{}", kept.text());
        }
        assert_eq!(Kept::new(&entry(2, 2), None, &candidates), None);
    }
}
