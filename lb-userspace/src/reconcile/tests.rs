use std::{
    io,
    sync::{Arc, Mutex},
};

use lb_common::service::{
    FRONTEND_DROP, FRONTEND_MAGLEV, FRONTEND_SOURCE_RANGES, FrontendKind, is_living,
};
use proptest::prelude::*;

use super::*;
use crate::{
    datapath::memory::{Content, MemoryMaps},
    model::Policy,
    plan::{Backend, Choice, Verdict},
};

fn name(text: &str) -> NamespacedName {
    NamespacedName::new("default", text)
}

fn backend(n: u8) -> Backend {
    Backend {
        addr: SocketAddr::from(([10, 244, 0, n], 3000)),
        local: n.is_multiple_of(2),
    }
}

fn key(n: u8) -> FrontendKey {
    FrontendKey {
        addr: [10, 96, 0, n].into(),
        port: 80,
        protocol: 6,
    }
}

/// A frontend with its backends, by last octets.
fn frontend(n: u8, backends: &[u8]) -> FrontendPlan {
    FrontendPlan {
        key: key(n),
        kind: FrontendKind::ClusterIp,
        policy: Policy::Cluster,
        verdict: if backends.is_empty() {
            Verdict::Reject
        } else {
            Verdict::Forward
        },
        backends: backends.iter().copied().map(backend).collect(),
        inner: None,
        flags: 0,
    }
}

/// The backends of all, each once.
fn of_all(frontends: &[FrontendPlan]) -> Arc<[Backend]> {
    let backends = frontends.iter().flat_map(|f| f.backends.iter().copied());
    backends.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Has more endpoints answer than are listed.
fn keep_alive(port: &mut PortPlan, numbers: impl IntoIterator<Item = u8>) {
    let more = numbers.into_iter().map(backend);
    let alive: BTreeSet<_> = port.alive.iter().copied().chain(more).collect();
    port.alive = alive.into_iter().collect();
}

/// A Service with one port.
fn service(service: &str, frontends: Vec<FrontendPlan>) -> ServicePlan {
    ServicePlan {
        service: name(service),
        ports: vec![PortPlan {
            port: ServicePort {
                name: "http".to_owned(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: None,
            },
            choice: Choice::Random,
            sources: BTreeSet::new(),
            alive: of_all(&frontends),
            frontends,
        }],
    }
}

fn gone(service: &str) -> ServicePlan {
    ServicePlan {
        service: name(service),
        ports: Vec::new(),
    }
}

/// Last octets of backends, in order.
fn octets(slots: &[SlotValue]) -> Vec<u8> {
    let addresses: BTreeSet<_> = slots.iter().map(|slot| slot.addr.ip()).collect();
    addresses.into_iter().map(last_octet).collect()
}

fn last_octet(addr: IpAddr) -> u8 {
    match addr {
        IpAddr::V4(addr) => addr.octets()[3],
        IpAddr::V6(_) => unreachable!("these tests speak IPv4"),
    }
}

/// What a program would find for a client outside, by last octets.
fn found(content: &Content, n: u8) -> Vec<u8> {
    octets(&content.resolve(&key(n)).expect("a whole range"))
}

/// As [`found`], for a client on this node.
fn found_inside(content: &Content, n: u8) -> Vec<u8> {
    octets(&content.resolve_inside(&key(n)).expect("a whole range"))
}

fn reconciler() -> Reconciler<MemoryMaps> {
    Reconciler::restore(MemoryMaps::default()).expect("memory can be read")
}

/// Starts again with what the maps hold.
fn restarted(old: Reconciler<MemoryMaps>) -> Reconciler<MemoryMaps> {
    let mut maps = old.maps;
    (maps.fault, maps.observer) = (None, None);
    Reconciler::restore(maps).expect("memory can be read")
}

fn apply(reconciler: &mut Reconciler<MemoryMaps>, plans: &[ServicePlan]) -> u64 {
    let report = reconciler.apply(plans, Instant::now());
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    report.writes
}

#[test]
fn only_what_changed_is_written() {
    let mut r = reconciler();
    let web = service("web", vec![frontend(1, &[1, 2]), frontend(2, &[1, 2])]);
    // Two backends, two slots that both frontends share, a name, two entries.
    assert_eq!(apply(&mut r, std::slice::from_ref(&web)), 7);
    assert_eq!(apply(&mut r, std::slice::from_ref(&web)), 0);
    assert_eq!(found(&r.maps.content, 1), [1, 2]);
    // One backend replaced: a backend, two slots, two entries, one backend gone.
    let web = service("web", vec![frontend(1, &[2, 3]), frontend(2, &[2, 3])]);
    assert_eq!(apply(&mut r, &[web]), 6);
    assert_eq!(found(&r.maps.content, 2), [2, 3]);
    // Gone: two entries, the name, two backends.
    assert_eq!(apply(&mut r, &[gone("web")]), 5);
    let Content {
        services,
        metas,
        backends,
        slots: _,
        ranges,
        networks: _,
    } = &r.maps.content;
    assert!(services.is_empty() && metas.is_empty() && ranges.is_empty());
    assert!(!backends.values().any(|generation| is_living(*generation)));
}

/// Sockets that were connected to them before are not translated.
#[test]
fn frontends_of_udp_that_are_new_are_told_once() {
    let mut r = reconciler();
    let mut of_udp = frontend(2, &[1]);
    of_udp.key.protocol = UDP;
    let expected = SocketAddr::new(of_udp.key.addr, of_udp.key.port);
    let web = [service("web", vec![frontend(1, &[1]), of_udp])];
    assert_eq!(r.apply(&web, Instant::now()).begun, [expected]);
    assert!(r.apply(&web, Instant::now()).begun.is_empty());
    let mut r = restarted(r);
    assert!(r.apply(&web, Instant::now()).begun.is_empty());
}

#[test]
fn a_second_start_writes_nothing() {
    let mut r = reconciler();
    let plans = [
        service("web", vec![frontend(1, &[1, 2]), frontend(2, &[2])]),
        service("empty", vec![frontend(3, &[])]),
    ];
    apply(&mut r, &plans);
    let before = r.maps.content.clone();
    let mut r = restarted(r);
    assert_eq!(r.services(), BTreeSet::from([name("web"), name("empty")]));
    assert_eq!(apply(&mut r, &plans), 0);
    assert_eq!(r.maps.content, before);
}

#[test]
fn what_became_stale_meanwhile_is_removed() {
    let mut r = reconciler();
    apply(
        &mut r,
        &[
            service("web", vec![frontend(1, &[1])]),
            service("old", vec![frontend(2, &[2])]),
        ],
    );
    let mut r = restarted(r);
    assert_eq!(
        r.maps.content.services.len(),
        2,
        "nothing goes before a plan says so"
    );
    apply(
        &mut r,
        &[service("web", vec![frontend(1, &[1])]), gone("old")],
    );
    assert_eq!(
        r.maps.content.services.keys().copied().collect::<Vec<_>>(),
        [key(1)]
    );
    assert_eq!(r.maps.content.metas.len(), 1);
}

#[test]
fn entries_that_make_no_sense_are_replaced_or_removed() {
    let mut r = reconciler();
    apply(
        &mut r,
        &[service("web", vec![frontend(1, &[1]), frontend(2, &[1])])],
    );
    let content = &mut r.maps.content;
    // Without a name; beyond the array; a backend that does not live.
    let entry = content.services[&key(1)];
    content.services.insert(
        key(9),
        ServiceEntry {
            service: 77,
            ..entry
        },
    );
    content.services.insert(
        key(1),
        ServiceEntry {
            first_slot: 5000,
            ..entry
        },
    );
    let stray = content.backends.len() as u32 + 5;
    content.backends.insert(stray, 3);
    let mut r = restarted(r);
    apply(
        &mut r,
        &[service("web", vec![frontend(1, &[1]), frontend(2, &[1])])],
    );
    assert_eq!(found(&r.maps.content, 1), [1]);
    assert_eq!(found(&r.maps.content, 2), [1]);
    assert_eq!(r.maps.content.services.len(), 2);
    assert!(!is_living(r.maps.content.backends[&stray]));
}

#[test]
fn a_range_rests_before_it_is_used_again() {
    let maps = MemoryMaps {
        slot_capacity: 4,
        ..MemoryMaps::default()
    };
    let mut r = Reconciler::restore(maps).expect("memory can be read");
    let start = Instant::now();
    let web = |backends: &[u8]| service("web", vec![frontend(1, backends)]);
    assert!(r.apply(&[web(&[1, 2])], start).failed.is_empty());
    assert!(r.apply(&[web(&[3, 4])], start).failed.is_empty());
    // Both ranges are in use or at rest.
    let report = r.apply(&[web(&[5, 6])], start);
    assert!(report.failed.len() == 1 && report.failed[0].1.is_full());
    assert_eq!(found(&r.maps.content, 1), [3, 4], "keeps what it had");
    assert!(r.apply(&[web(&[5, 6])], start + GRACE).failed.is_empty());
    assert_eq!(found(&r.maps.content, 1), [5, 6]);
}

#[test]
fn a_full_map_stops_one_service_and_no_other() {
    let maps = MemoryMaps {
        slot_capacity: 3,
        ..MemoryMaps::default()
    };
    let mut r = Reconciler::restore(maps).expect("memory can be read");
    let plans = [
        service("big", vec![frontend(1, &[1, 2, 3, 4])]),
        service("small", vec![frontend(2, &[5, 6])]),
    ];
    let report = r.apply(&plans, Instant::now());
    let failed: Vec<_> = report
        .failed
        .iter()
        .map(|(service, _)| service.name())
        .collect();
    assert_eq!(failed, ["big"]);
    assert_eq!(found(&r.maps.content, 2), [5, 6]);
}

/// A Service that has no room takes nothing that it cannot use, however often its
/// endpoints change, and what it had stays in force.
#[test]
fn a_service_without_room_leaves_no_trace() {
    let mut r = reconciler();
    let now = Instant::now();
    let grown = |backends: &[u8]| {
        let mut plan = service("web", vec![frontend(1, backends), frontend(2, backends)]);
        plan.ports[0].port.protocol = Protocol::Udp;
        plan
    };
    let mut first = grown(&[1, 2]);
    first.ports[0].frontends.truncate(1);
    apply(&mut r, &[first]);
    r.maps.service_capacity = 1;
    let trace = |r: &mut Reconciler<MemoryMaps>| {
        r.release_retired(now + GRACE);
        let backends = r.maps.content.backends.values();
        let living = backends
            .filter(|generation| is_living(**generation))
            .count();
        (
            r.slots[&Family::V4].free(),
            living,
            r.maps.content.metas.len(),
        )
    };
    let mut before = None;
    for change in 0_u16..1000 {
        let pair = [10, 11].map(|first| first + (change % 200) as u8);
        let plans = [grown(&pair), service("new", vec![frontend(3, &pair)])];
        let report = r.apply(&plans, now);
        assert!(report.failed.iter().all(|(_, error)| error.is_full()));
        assert_eq!(report.failed.len(), 2);
        assert_eq!(
            found(&r.maps.content, 1),
            pair,
            "the entry that is there changes"
        );
        let trace = trace(&mut r);
        assert_eq!(*before.get_or_insert(trace), trace, "change {change}");
    }
    r.maps.service_capacity = 3;
    apply(
        &mut r,
        &[grown(&[7]), service("new", vec![frontend(3, &[8])])],
    );
    assert_eq!(found(&r.maps.content, 2), [7]);
    assert_eq!(found(&r.maps.content, 3), [8]);
}

/// Enough for the first write to be one of many entries.
fn many() -> Vec<ServicePlan> {
    let numbers = 1..=u8::try_from(MANY).expect("few");
    numbers
        .map(|n| service(&format!("s-{n}"), vec![frontend(n, &[n, n + 1])]))
        .collect()
}

/// Every frontend that a reader finds leads to backends that live.
fn resolve_all(content: &Content) {
    for key in content.services.keys() {
        content.resolve(key).expect("a whole range");
    }
}

#[test]
fn what_is_written_together_is_never_found_half() {
    let mut r = reconciler();
    r.maps.observer = Some(Box::new(resolve_all));
    // Two backends, two slots, a name and an entry for each.
    assert_eq!(apply(&mut r, &many()), 6 * MANY as u64);
    assert_eq!(r.maps.content.services.len(), MANY);
    assert_eq!(r.maps.writes, 6 * MANY as u64);
    r.maps.observer = None;
    assert_eq!(apply(&mut r, &many()), 0);
    let mut r = restarted(r);
    assert_eq!(apply(&mut r, &many()), 0);
}

#[test]
fn what_cannot_be_written_together_is_written_one_by_one() {
    for failing in [1, 3 * MANY as u64, 6 * MANY as u64] {
        let mut r = reconciler();
        r.maps.observer = Some(Box::new(resolve_all));
        r.maps.fault = Some(Box::new(move |number| {
            if number == failing {
                return Err(io::ErrorKind::Other.into());
            }
            Ok(())
        }));
        apply(&mut r, &many());
        assert_eq!(r.maps.content.services.len(), MANY);
        assert_eq!(apply(&mut r, &many()), 0);
    }
}

#[test]
fn a_map_that_is_full_at_once_holds_what_it_can() {
    let maps = MemoryMaps {
        service_capacity: MANY - 1,
        ..MemoryMaps::default()
    };
    let mut r = Reconciler::restore(maps).expect("memory can be read");
    let report = r.apply(&many(), Instant::now());
    let failed: Vec<_> = report.failed.iter().map(|(service, _)| service).collect();
    assert_eq!(failed, [&name(&format!("s-{MANY}"))]);
    assert_eq!(r.maps.content.services.len(), MANY - 1);
}

#[test]
fn a_frontend_that_changes_hands_is_never_without_an_entry() {
    let mut r = reconciler();
    apply(&mut r, &[service("old", vec![frontend(1, &[1])])]);
    r.maps.observer = Some(Box::new(|content| {
        content
            .resolve(&key(1))
            .unwrap_or_else(|error| panic!("{error}"));
    }));
    // In one batch, in either order.
    apply(
        &mut r,
        &[gone("old"), service("new", vec![frontend(1, &[2])])],
    );
    assert_eq!(found(&r.maps.content, 1), [2]);
    apply(
        &mut r,
        &[service("old", vec![frontend(1, &[3])]), gone("new")],
    );
    assert_eq!(found(&r.maps.content, 1), [3]);
}

#[test]
fn an_endpoint_that_only_serves_keeps_its_life() {
    let mut r = reconciler();
    apply(&mut r, &[service("web", vec![frontend(1, &[1, 2])])]);
    let life = |r: &Reconciler<MemoryMaps>| r.maps.content.slots[&(Family::V4, 0)].backend;
    let first = life(&r);
    // Out of the list, but still answering.
    let mut draining = service("web", vec![frontend(1, &[2])]);
    keep_alive(&mut draining.ports[0], [1]);
    apply(&mut r, &[draining]);
    assert_eq!(r.maps.content.backends[&first.id], first.generation);
    apply(&mut r, &[service("web", vec![frontend(1, &[2])])]);
    assert!(!is_living(r.maps.content.backends[&first.id]));
}

#[test]
fn a_restart_knows_whose_the_unlisted_backends_are() {
    let mut r = reconciler();
    let mut web = service("web", vec![frontend(1, &[1])]);
    keep_alive(&mut web.ports[0], [2]);
    let mut none_ready = service("none-ready", vec![frontend(2, &[])]);
    keep_alive(&mut none_ready.ports[0], [3]);
    let plans = [web, none_ready];
    apply(&mut r, &plans);
    let before = r.maps.content.clone();
    let mut r = restarted(r);
    assert_eq!(apply(&mut r, &plans), 0);
    assert_eq!(r.maps.content, before);
    assert_eq!(
        found(&r.maps.content, 1),
        [1],
        "what is parked gets no flows"
    );
}

#[test]
fn the_slots_of_a_stray_frontend_stay_until_it_is_gone() {
    let mut r = reconciler();
    apply(&mut r, &[service("web", vec![frontend(1, &[1, 2])])]);
    r.maps.content.metas.clear();
    let mut r = restarted(r);
    r.maps.observer = Some(Box::new(|content| {
        let Some(entry) = content.services.get(&key(1)) else {
            return;
        };
        let slots = (entry.first_slot..entry.first_slot + entry.slot_count)
            .map(|index| content.slots[&(Family::V4, index)].addr);
        assert_eq!(
            slots.collect::<Vec<_>>(),
            [backend(1).addr, backend(2).addr]
        );
    }));
    apply(&mut r, &[service("other", vec![frontend(9, &[7, 8])])]);
    assert!(!r.maps.content.services.contains_key(&key(1)));
}

#[test]
fn a_frontend_can_be_replaced_in_a_full_map() {
    let mut r = reconciler();
    apply(&mut r, &[service("web", vec![frontend(1, &[1])])]);
    // Room for one frontend: a second one fails while the first is there.
    r.maps.service_capacity = 1;
    apply(&mut r, &[service("web", vec![frontend(2, &[1])])]);
    assert_eq!(
        r.maps.content.services.keys().copied().collect::<Vec<_>>(),
        [key(2)]
    );
    let report = r.apply(&[service("more", vec![frontend(3, &[1])])], Instant::now());
    assert!(report.failed[0].1.is_full());
}

#[test]
fn services_are_told_apart_by_more_than_their_number() {
    let mut r = reconciler();
    apply(
        &mut r,
        &[
            service("a", vec![frontend(1, &[1])]),
            service("b", vec![frontend(2, &[1])]),
        ],
    );
    let entries = &r.maps.content.services;
    assert_ne!(entries[&key(1)].service, entries[&key(2)].service);
    let lives: BTreeSet<_> = r
        .maps
        .content
        .slots
        .values()
        .map(|slot| slot.backend.id)
        .collect();
    assert_eq!(lives.len(), 2, "one pod is another backend of each Service");
}

#[test]
fn clients_inside_get_a_range_of_their_own_where_theirs_differs() {
    let mut r = reconciler();
    let mut web = service("web", vec![frontend(1, &[1, 2]), frontend(2, &[2])]);
    web.ports[0].frontends[1].inner = Some([backend(1), backend(2)].into());
    // Two backends, three slots, of which the first two are for those inside of
    // the second frontend, too; a name, two entries.
    assert_eq!(apply(&mut r, std::slice::from_ref(&web)), 9);
    assert_eq!(found(&r.maps.content, 2), [2]);
    assert_eq!(found_inside(&r.maps.content, 2), [1, 2]);
    let (one, two) = (
        r.maps.content.services[&key(1)],
        r.maps.content.services[&key(2)],
    );
    assert_eq!(two.inner_first_slot, one.first_slot);
    assert_eq!(two.parked, 1, "the one that is for those inside only");
    let mut r = restarted(r);
    assert_eq!(apply(&mut r, std::slice::from_ref(&web)), 0);
    // None on this node any more.
    web.ports[0].frontends[1].backends = Arc::default();
    web.ports[0].frontends[1].verdict = Verdict::Drop;
    apply(&mut r, &[web]);
    assert_eq!(found(&r.maps.content, 2), [0; 0]);
    assert_eq!(found_inside(&r.maps.content, 2), [1, 2]);
    let entry = r.maps.content.services[&key(2)];
    assert_eq!(entry.flags, FRONTEND_DROP);
}

#[test]
fn a_range_of_those_inside_only_is_kept_and_taken_over() {
    let mut r = reconciler();
    let mut web = service("web", vec![frontend(1, &[1])]);
    web.ports[0].frontends[0].inner = Some([backend(2), backend(3)].into());
    apply(&mut r, std::slice::from_ref(&web));
    assert_eq!(apply(&mut r, std::slice::from_ref(&web)), 0);
    let mut r = restarted(r);
    assert_eq!(apply(&mut r, std::slice::from_ref(&web)), 0);
    assert_eq!(found_inside(&r.maps.content, 1), [2, 3]);
    // Another Service does not get its slots.
    let later = Instant::now() + GRACE * 2;
    let other = service("other", vec![frontend(2, &[7, 8, 9])]);
    assert!(r.apply(&[other], later).failed.is_empty());
    assert_eq!(found_inside(&r.maps.content, 1), [2, 3]);
}

#[test]
fn slots_are_in_the_order_of_ids() {
    let mut r = reconciler();
    apply(&mut r, &[service("web", vec![frontend(1, &[5, 6])])]);
    apply(&mut r, &[service("web", vec![frontend(1, &[1, 5, 6, 7])])]);
    let slots = r.maps.content.resolve(&key(1)).expect("a whole range");
    assert!(slots.is_sorted_by_key(|slot| slot.backend.id), "{slots:?}");
    assert_eq!(last_octet(slots[0].addr.ip()), 5);
}

#[test]
fn the_way_to_choose_is_in_the_entry() {
    for (choice, flags, affinity, slots) in [
        (Choice::Random, 0, 0, 2),
        (Choice::Affinity(60), 0, 60, 2),
        (Choice::Maglev(7), FRONTEND_MAGLEV, 0, 7),
    ] {
        let mut r = reconciler();
        let mut web = service("web", vec![frontend(1, &[1, 2])]);
        web.ports[0].choice = choice;
        keep_alive(&mut web.ports[0], [3]);
        apply(&mut r, std::slice::from_ref(&web));
        let entry = r.maps.content.services[&key(1)];
        assert_eq!((entry.flags, entry.affinity), (flags, affinity));
        assert_eq!((entry.slot_count, entry.parked), (slots, 1), "{choice:?}");
        assert_eq!(found(&r.maps.content, 1), [1, 2]);
        let mut r = restarted(r);
        assert_eq!(apply(&mut r, &[web]), 0, "{choice:?}");
    }
}

fn network(text: &str) -> IpNet {
    text.parse().expect("a network")
}

/// A Service whose one frontend is for some clients only.
fn restricted(sources: &[&str]) -> ServicePlan {
    let mut web = service("web", vec![frontend(1, &[1])]);
    web.ports[0].sources = sources.iter().copied().map(network).collect();
    if !sources.is_empty() {
        web.ports[0].frontends[0].flags = FRONTEND_SOURCE_RANGES;
    }
    web
}

#[test]
fn who_may_come_is_there_before_the_frontend_asks_and_goes_after_it() {
    let mut r = reconciler();
    r.maps.observer = Some(Box::new(|content| {
        let entries = content.services.values();
        for entry in entries.filter(|entry| entry.flags & FRONTEND_SOURCE_RANGES != 0) {
            let mut ranges = content.ranges.iter();
            assert!(ranges.any(|(service, _)| *service == entry.service));
        }
    }));
    let ranges = |r: &Reconciler<MemoryMaps>| -> Vec<String> {
        let ranges = r.maps.content.ranges.iter();
        ranges.map(|(_, range)| range.to_string()).collect()
    };
    apply(&mut r, &[restricted(&["10.0.0.0/8", "fd00::/8"])]);
    assert_eq!(ranges(&r), ["10.0.0.0/8", "fd00::/8"]);
    let mut r = restarted(r);
    assert_eq!(apply(&mut r, &[restricted(&["10.0.0.0/8", "fd00::/8"])]), 0);
    apply(&mut r, &[restricted(&["10.0.0.0/8", "192.168.0.0/16"])]);
    assert_eq!(ranges(&r), ["10.0.0.0/8", "192.168.0.0/16"]);
    apply(&mut r, &[restricted(&[])]);
    assert_eq!(ranges(&r), [""; 0]);
    apply(&mut r, &[restricted(&["10.0.0.0/8"])]);
    apply(&mut r, &[gone("web")]);
    assert_eq!(ranges(&r), [""; 0]);
}

#[test]
fn ranges_of_nobody_are_removed_and_never_become_somebodys() {
    let mut r = reconciler();
    r.maps.content.ranges.insert((1, network("0.0.0.0/0")));
    let mut r = restarted(r);
    r.maps.observer = Some(Box::new(|content| {
        let mut owners = content.services.values();
        assert!(!owners.any(|entry| entry.service == 1));
    }));
    apply(&mut r, &[restricted(&["10.0.0.0/8"])]);
    assert_eq!(r.maps.content.ranges.len(), 1);
}

/// What is said of a frontend's address.
fn address(n: u8) -> FrontendPlan {
    FrontendPlan {
        key: FrontendKey::of_address(key(n).addr),
        kind: FrontendKind::Address,
        flags: FRONTEND_REFUSE,
        ..frontend(n, &[])
    }
}

#[test]
fn the_cluster_network_grows_before_the_address_and_shrinks_at_a_restart() {
    let mut r = reconciler();
    r.maps.observer = Some(Box::new(|content| {
        for (key, entry) in &content.services {
            let network = content.networks.get(&Family::V4);
            let holds = network.is_some_and(|network| network.contains(&key.addr));
            assert!(holds || entry.flags & FRONTEND_REFUSE == 0, "{key}");
        }
    }));
    let network = |r: &Reconciler<MemoryMaps>| r.maps.content.networks[&Family::V4].to_string();
    let plan = |name, n| service(name, vec![frontend(n, &[1]), address(n)]);
    apply(&mut r, &[plan("a", 1)]);
    assert_eq!(network(&r), "10.96.0.1/32");
    apply(&mut r, &[plan("b", 2), plan("c", 200)]);
    assert_eq!(network(&r), "10.96.0.0/24");
    apply(&mut r, &[gone("c")]);
    assert_eq!(network(&r), "10.96.0.0/24");
    let mut r = restarted(r);
    apply(&mut r, &[plan("a", 1), plan("b", 2)]);
    assert_eq!(network(&r), "10.96.0.0/30");
}

/// Else a client of kube-proxy's, say, is refused at a port whose turn comes a
/// moment later.
#[test]
fn an_address_refuses_no_port_that_is_about_to_come() {
    let mut web = service("web", vec![address(1), frontend(1, &[1])]);
    let mut second = web.ports[0].clone();
    second.port.name = "metrics".to_owned();
    let second_key = FrontendKey { port: 81, ..key(1) };
    second.frontends = vec![FrontendPlan {
        key: second_key,
        ..frontend(1, &[1])
    }];
    web.ports.push(second);
    for together in [false, true] {
        let mut r = reconciler();
        r.maps.observer = Some(Box::new(move |content| {
            if content.services.contains_key(&address(1).key) {
                for key in [key(1), second_key] {
                    assert!(content.services.contains_key(&key), "{key}");
                }
            }
        }));
        let mut plans = if together { many() } else { Vec::new() };
        plans.retain(|plan| plan.service != name("s-1"));
        plans.push(web.clone());
        plans.extend(together.then(|| service("last", vec![frontend(255, &[1])])));
        apply(&mut r, &plans);
        assert!(r.maps.content.services.contains_key(&address(1).key));
    }
}

#[test]
fn an_address_changes_its_speaker_without_a_gap() {
    let mut r = reconciler();
    let mut web = service("web", vec![frontend(1, &[1]), address(1)]);
    let mut second = web.ports[0].clone();
    second.port.name = "metrics".to_owned();
    second.frontends = vec![frontend(2, &[2])];
    web.ports.push(second);
    apply(&mut r, std::slice::from_ref(&web));
    r.maps.observer = Some(Box::new(|content| {
        assert!(content.services.contains_key(&address(1).key));
    }));
    let speaker = web.ports[0].frontends.pop().expect("the address");
    web.ports[1].frontends.push(speaker);
    apply(&mut r, std::slice::from_ref(&web));
    let entries = &r.maps.content.services;
    assert_eq!(entries[&address(1).key].service, entries[&key(2)].service);
}

/// What a Service of a random history gets.
#[derive(Clone, Debug)]
struct Wish {
    frontends: BTreeMap<u8, FrontendWish>,
    choice: Choice,
    /// Backends that answer, besides those that are led to.
    parked: BTreeSet<u8>,
    sources: BTreeSet<u8>,
}

/// Backends, by number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct FrontendWish {
    outer: Vec<u8>,
    inner: Option<Vec<u8>>,
}

impl FrontendWish {
    /// What a program finds, for clients outside and inside.
    fn leads(&self) -> Leads {
        let inner = self.inner.as_ref().unwrap_or(&self.outer);
        (self.outer.clone(), inner.clone())
    }
}

impl Wish {
    /// Numbers of all backends that live.
    fn living(&self) -> BTreeSet<u8> {
        if self.frontends.is_empty() {
            return BTreeSet::new();
        }
        let led_to = self.frontends.values().flat_map(|frontend| {
            let (outer, inner) = frontend.leads();
            outer.into_iter().chain(inner)
        });
        led_to.chain(self.parked.iter().copied()).collect()
    }

    fn sources(&self) -> BTreeSet<IpNet> {
        let sources = self.sources.iter().filter(|_| !self.frontends.is_empty());
        sources
            .map(|n| network(&format!("10.{n}.0.0/16")))
            .collect()
    }

    /// Frontends of a Service are its own: three for each number. The first
    /// comes with its address, the second is for some clients only.
    fn plan(&self, number: u8) -> ServicePlan {
        let service_name = format!("s{number}");
        if self.frontends.is_empty() {
            return gone(&service_name);
        }
        let mut frontends = Vec::new();
        for (n, wish) in &self.frontends {
            let mut plan = frontend(number * 3 + n, &wish.outer);
            let inner = wish.inner.as_ref();
            plan.inner = inner.map(|inner| inner.iter().copied().map(backend).collect());
            if *n == 1 && !self.sources.is_empty() {
                plan.flags = FRONTEND_SOURCE_RANGES;
            }
            frontends.push(plan);
            if *n == 0 {
                frontends.push(address(number * 3));
            }
        }
        let mut plan = service(&service_name, frontends);
        let port = &mut plan.ports[0];
        port.choice = self.choice;
        port.sources = self.sources();
        keep_alive(port, self.parked.iter().copied());
        plan
    }
}

/// What clients outside and inside get of a frontend.
type Leads = (Vec<u8>, Vec<u8>);

/// One step of a random history.
#[derive(Clone, Debug)]
enum Step {
    /// These Services, by number, are to be so.
    Apply(BTreeMap<u8, Wish>),
    Restart,
    /// The write after so many fails.
    FailAfter(u64),
}

fn frontend_wish() -> impl Strategy<Value = FrontendWish> {
    let backends =
        || prop::collection::btree_set(1u8..12, 0..6).prop_map(|set| set.into_iter().collect());
    (backends(), prop::option::of(backends()))
        .prop_map(|(outer, inner)| FrontendWish { outer, inner })
}

fn wish() -> impl Strategy<Value = Wish> {
    let choice = prop_oneof![
        Just(Choice::Random),
        Just(Choice::Affinity(60)),
        Just(Choice::Maglev(7)),
    ];
    (
        prop::collection::btree_map(0u8..3, frontend_wish(), 0..3),
        choice,
        prop::collection::btree_set(1u8..12, 0..4),
        prop::collection::btree_set(0u8..4, 0..3),
    )
        .prop_map(|(frontends, choice, parked, sources)| Wish {
            frontends,
            choice,
            parked,
            sources,
        })
}

fn step() -> impl Strategy<Value = Step> {
    let services = prop::collection::btree_map(0u8..4, wish(), 1..4);
    prop_oneof![
        6 => services.prop_map(Step::Apply),
        1 => Just(Step::Restart),
        1 => (0u64..12).prop_map(Step::FailAfter),
    ]
}

/// Everything that frontends may lead to, and who may come, by any wish so far.
#[derive(Debug, Default)]
struct Legal {
    leads: BTreeMap<FrontendKey, BTreeSet<Leads>>,
    sources: BTreeMap<FrontendKey, BTreeSet<BTreeSet<IpNet>>>,
}

impl Legal {
    fn allow(&mut self, number: u8, wish: &Wish) {
        for (n, frontend) in &wish.frontends {
            let key = key(number * 3 + n);
            let leads = self.leads.entry(key).or_default();
            leads.insert(frontend.leads());
            let sources = self.sources.entry(key).or_default();
            sources.insert(wish.sources());
        }
    }

    /// What must hold after every single write.
    fn check(&self, content: &Content) {
        for (key, entry) in &content.services {
            if entry.kind == FrontendKind::Address as u8 {
                let network = content.networks.get(&Family::V4);
                assert!(network.is_some_and(|network| network.contains(&key.addr)));
                continue;
            }
            let outer = content.resolve(key).expect("a whole range");
            let inner = content.resolve_inside(key).expect("a whole range");
            if entry.flags & FRONTEND_MAGLEV == 0 {
                for slots in [&outer, &inner] {
                    assert!(slots.is_sorted_by_key(|slot| slot.backend.id));
                }
            }
            let leads = (octets(&outer), octets(&inner));
            assert!(self.leads[key].contains(&leads), "{key} leads to {leads:?}");
            if entry.flags & FRONTEND_SOURCE_RANGES != 0 {
                let ranges = content.ranges.iter();
                let present: BTreeSet<_> = ranges
                    .filter(|(service, _)| *service == entry.service)
                    .map(|(_, range)| *range)
                    .collect();
                let mut whole = self.sources[key]
                    .iter()
                    .filter(|sources| !sources.is_empty());
                assert!(whole.any(|sources| present.is_superset(sources)), "{key}");
            }
        }
    }
}

/// Fails one write, after so many as the countdown says.
fn fail_once(countdown: &Arc<Mutex<Option<u64>>>) -> io::Result<()> {
    let mut left = countdown.lock().expect("not poisoned");
    let now = left.as_ref().is_some_and(|left| *left == 0);
    *left = left.and_then(|left| left.checked_sub(1));
    if now {
        return Err(io::Error::from_raw_os_error(libc::EIO));
    }
    Ok(())
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a network")
}

/// A Service with everything that a map can hold of one.
fn full_service() -> ServicePlan {
    let mut plan = service("full", vec![frontend(1, &[1, 2]), frontend(2, &[])]);
    plan.ports[0].sources.insert(net("192.0.2.0/24"));
    plan.ports[0].frontends[0].flags = FRONTEND_REFUSE | FRONTEND_SOURCE_RANGES;
    plan
}

#[test]
fn maps_that_nobody_touched_are_left_alone() {
    let mut r = reconciler();
    apply(
        &mut r,
        &[full_service(), service("other", vec![frontend(3, &[3])])],
    );
    apply(&mut r, &[service("other", vec![frontend(3, &[4])])]);
    let before = r.maps.writes;
    assert_eq!(r.verify().expect("read"), Drift::new());
    assert_eq!(r.maps.writes, before);
}

/// Spoils the maps, and has them verified.
fn mended(spoil: impl FnOnce(&mut Content)) -> Drift {
    let mut r = reconciler();
    apply(&mut r, &[full_service()]);
    let before = r.maps.content.clone();
    spoil(&mut r.maps.content);
    assert_ne!(r.maps.content, before, "it was spoiled");
    let drift = r.verify().expect("read and written");
    assert_eq!(r.maps.content, before);
    drift
}

#[test]
fn what_somebody_else_changed_is_mended_and_counted() {
    use lb_common::names::{CONFIG, META, RANGES4, SERVICES4, SLOTS4};
    type Spoil = fn(&mut Content);
    let cases: [(&str, Spoil); 10] = [
        (SERVICES4, |content| content.services.clear()),
        (SERVICES4, |content| {
            let entry = content.services.get_mut(&key(1)).expect("a frontend");
            entry.slot_count = 0;
        }),
        (SERVICES4, |content| {
            let entry = content.services[&key(1)];
            content.services.insert(key(9), entry);
        }),
        (SLOTS4, |content| {
            let slot = content.slots.values_mut().next().expect("a slot");
            slot.addr.set_port(1);
        }),
        (META, |content| content.metas.clear()),
        (META, |content| {
            let meta = *content.metas.values().next().expect("a name");
            content.metas.insert(77, meta);
        }),
        (RANGES4, |content| content.ranges.clear()),
        (RANGES4, |content| {
            content.ranges.insert((77, net("198.51.100.0/24")));
        }),
        (CONFIG, |content| {
            content.networks.insert(Family::V4, net("10.0.0.0/8"));
        }),
        (names::BACKENDS, |content| {
            for generation in content.backends.values_mut() {
                *generation += 1;
            }
        }),
    ];
    for (map, spoil) in cases {
        let drift = mended(spoil);
        let maps: Vec<_> = drift.keys().copied().collect();
        assert_eq!(maps, [map], "{drift:?}");
    }
}

#[test]
fn a_backend_of_nobody_is_ended_and_its_id_not_used_as_it_was() {
    let mut r = reconciler();
    apply(&mut r, &[service("a", vec![frontend(1, &[1])])]);
    r.maps.content.backends.insert(2, 5);
    assert_eq!(
        r.verify().expect("mended"),
        Drift::from([(names::BACKENDS, 1)])
    );
    assert_eq!(r.maps.content.backends[&2], 6);
    apply(&mut r, &[service("a", vec![frontend(1, &[1, 2])])]);
    assert_eq!(r.maps.content.backends[&2], 7, "a generation it never had");
}

#[test]
fn mending_goes_on_where_a_write_failed() {
    let mut r = reconciler();
    apply(&mut r, &[full_service()]);
    let before = r.maps.content.clone();
    r.maps.content.services.clear();
    r.maps.content.metas.clear();
    let first = r.maps.writes;
    r.maps.fault = Some(Box::new(move |write| {
        if write == first + 2 {
            Err(io::ErrorKind::Other.into())
        } else {
            Ok(())
        }
    }));
    r.verify().expect_err("a write fails");
    r.verify().expect("mended");
    assert_eq!(r.maps.content, before);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens, the maps end up as the plans say, and after every
    /// single write each frontend that is there leads to whole sets of living
    /// backends, for the clients of some plan: one that some plan gave it.
    #[test]
    fn every_history_ends_as_planned(steps in prop::collection::vec(step(), 1..25)) {
        let mut r = reconciler();
        let mut now = Instant::now();
        let mut wanted: BTreeMap<u8, Wish> = BTreeMap::new();
        let legal: Arc<Mutex<Legal>> = Arc::default();
        let fail_in = Arc::new(Mutex::new(None::<u64>));
        for step in steps {
            now += GRACE;
            let is_restart = matches!(step, Step::Restart);
            match step {
                Step::Apply(services) => {
                    for (number, wish) in services {
                        legal.lock().expect("not poisoned").allow(number, &wish);
                        wanted.insert(number, wish);
                    }
                }
                Step::Restart => r = restarted(r),
                Step::FailAfter(count) => *fail_in.lock().expect("not poisoned") = Some(count),
            }
            let legal = Arc::clone(&legal);
            r.maps.observer = Some(Box::new(move |content| {
                legal.lock().expect("not poisoned").check(content);
            }));
            let countdown = Arc::clone(&fail_in);
            r.maps.fault = Some(Box::new(move |_write| fail_once(&countdown)));
            let plans: Vec<_> = wanted.iter().map(|(number, wish)| wish.plan(*number)).collect();
            let before = r.maps.content.clone();
            let report = r.apply(&plans, now);
            if is_restart {
                // The network may shrink.
                let networks = r.maps.content.networks.clone();
                prop_assert_eq!(&r.maps.content, &Content { networks, ..before });
            }
            if !report.failed.is_empty() {
                // One fault, one failure; the next try succeeds.
                let report = r.apply(&plans, now);
                prop_assert!(report.failed.is_empty(), "{:?}", report.failed);
            }
            check_outcome(&r.maps.content, &wanted);
        }
    }
}

/// What must hold after a batch.
fn check_outcome(content: &Content, wanted: &BTreeMap<u8, Wish>) {
    let mut expected = BTreeMap::new();
    let mut sources = 0;
    for (number, wish) in wanted {
        for (n, frontend) in &wish.frontends {
            expected.insert(key(number * 3 + n), frontend.leads());
        }
        sources += wish.sources().len();
    }
    let keys = content.services.keys().filter(|key| key.port != 0);
    let actual: BTreeMap<_, _> = keys
        .map(|key| {
            let n = last_octet(key.addr);
            (*key, (found(content, n), found_inside(content, n)))
        })
        .collect();
    assert_eq!(actual, expected);
    let living = content.backends.values();
    let living = living.filter(|generation| is_living(**generation)).count();
    let wanted_lives: usize = wanted.values().map(|wish| wish.living().len()).sum();
    assert_eq!(living, wanted_lives, "no life is lost or left");
    assert_eq!(content.ranges.len(), sources, "no range is lost or left");
}
