use std::{
    io,
    sync::{Arc, Mutex},
};

use lb_common::service::{FrontendKind, is_living};
use proptest::prelude::*;

use super::*;
use crate::datapath::memory::{Content, MemoryMaps};

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
    }
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
            alive: frontends.iter().flat_map(|f| f.backends.clone()).collect(),
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

/// What a program would find for a frontend, by last octets.
fn found(content: &Content, n: u8) -> Vec<u8> {
    let slots = content
        .resolve(&key(n))
        .unwrap_or_else(|error| panic!("{error}"));
    let octet = |slot: &SlotValue| match slot.addr.ip() {
        std::net::IpAddr::V4(addr) => addr.octets()[3],
        std::net::IpAddr::V6(_) => unreachable!("these tests speak IPv4"),
    };
    slots.iter().map(octet).collect()
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
    } = &r.maps.content;
    assert!(services.is_empty() && metas.is_empty());
    assert!(!backends.values().any(|generation| is_living(*generation)));
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
        .map(|(service, _)| service.name.as_str())
        .collect();
    assert_eq!(failed, ["big"]);
    assert_eq!(found(&r.maps.content, 2), [5, 6]);
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
    draining.ports[0].alive.insert(backend(1));
    apply(&mut r, &[draining]);
    assert_eq!(r.maps.content.backends[&first.id], first.generation);
    apply(&mut r, &[service("web", vec![frontend(1, &[2])])]);
    assert!(!is_living(r.maps.content.backends[&first.id]));
}

#[test]
fn a_restart_knows_whose_the_unlisted_backends_are() {
    let mut r = reconciler();
    let mut web = service("web", vec![frontend(1, &[1])]);
    web.ports[0].alive.insert(backend(2));
    let mut none_ready = service("none-ready", vec![frontend(2, &[])]);
    none_ready.ports[0].alive.insert(backend(3));
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

/// A Service's frontends with their backends, by number.
type Frontends = Vec<(u8, Vec<u8>)>;

/// Every set of backends that a frontend may have.
type Legal = BTreeMap<FrontendKey, BTreeSet<Vec<u8>>>;

/// One step of a random history.
#[derive(Clone, Debug)]
enum Step {
    /// These Services, by number, get these frontends and backends.
    Apply(Vec<(u8, Frontends)>),
    Restart,
    /// The write after so many fails.
    FailAfter(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let backends = prop::collection::btree_set(1u8..12, 0..6)
        .prop_map(|set| set.into_iter().collect::<Vec<_>>());
    let frontends = prop::collection::btree_map(0u8..3, backends, 0..3)
        .prop_map(|map| map.into_iter().collect::<Vec<_>>());
    let services = prop::collection::btree_map(0u8..4, frontends, 1..4)
        .prop_map(|map| map.into_iter().collect::<Vec<_>>());
    prop_oneof![
        6 => services.prop_map(Step::Apply),
        1 => Just(Step::Restart),
        1 => (0u64..12).prop_map(Step::FailAfter),
    ]
}

/// Frontends of a Service are its own: three for each number.
fn random_plan(number: u8, frontends: &[(u8, Vec<u8>)]) -> ServicePlan {
    let service_name = format!("s{number}");
    if frontends.is_empty() {
        return gone(&service_name);
    }
    let frontends = frontends
        .iter()
        .map(|(n, backends)| frontend(number * 3 + n, backends))
        .collect();
    service(&service_name, frontends)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens, the maps end up as the plans say, and after every
    /// single write each frontend that is there leads to a whole set of living
    /// backends: one that some plan gave it.
    #[test]
    fn every_history_ends_as_planned(steps in prop::collection::vec(step(), 1..25)) {
        let mut r = reconciler();
        let mut now = Instant::now();
        let mut wanted: BTreeMap<u8, Frontends> = BTreeMap::new();
        // Every set of backends that a frontend may have at the moment.
        let legal: Arc<Mutex<Legal>> = Arc::default();
        let fail_in = Arc::new(Mutex::new(None::<u64>));
        for step in steps {
            now += GRACE;
            match step {
                Step::Apply(services) => {
                    for (number, frontends) in services {
                        let mut legal = legal.lock().expect("not poisoned");
                        for (n, backends) in &frontends {
                            legal.entry(key(number * 3 + n)).or_default().insert(backends.clone());
                        }
                        wanted.insert(number, frontends);
                    }
                }
                Step::Restart => r = restarted(r),
                Step::FailAfter(count) => *fail_in.lock().expect("not poisoned") = Some(count),
            }
            let legal = Arc::clone(&legal);
            r.maps.observer = Some(Box::new(move |content| {
                let legal = legal.lock().expect("not poisoned");
                for entry in content.services.keys() {
                    let slots = content.resolve(entry).unwrap_or_else(|error| panic!("{error}"));
                    let octets: Vec<u8> = slots.iter().map(|slot| match slot.addr.ip() {
                        std::net::IpAddr::V4(addr) => addr.octets()[3],
                        std::net::IpAddr::V6(_) => unreachable!("IPv4 only"),
                    }).collect();
                    assert!(legal[entry].contains(&octets), "{entry} leads to {octets:?}");
                }
            }));
            let countdown = Arc::clone(&fail_in);
            r.maps.fault = Some(Box::new(move |_write| {
                let mut left = countdown.lock().expect("not poisoned");
                match *left {
                    Some(0) => {
                        *left = None;
                        Err(io::Error::from_raw_os_error(libc::EIO))
                    }
                    Some(count) => {
                        *left = Some(count - 1);
                        Ok(())
                    }
                    None => Ok(()),
                }
            }));
            let plans: Vec<_> = wanted.iter().map(|(n, f)| random_plan(*n, f)).collect();
            let report = r.apply(&plans, now);
            if !report.failed.is_empty() {
                // One fault, one failure; the next try succeeds.
                let report = r.apply(&plans, now);
                prop_assert!(report.failed.is_empty(), "{:?}", report.failed);
            }
            let mut expected = BTreeMap::new();
            for (number, frontends) in &wanted {
                for (n, backends) in frontends {
                    expected.insert(key(number * 3 + n), backends.clone());
                }
            }
            let actual: BTreeMap<_, _> = r.maps.content.services.keys().map(|entry| {
                let std::net::IpAddr::V4(addr) = entry.addr else { unreachable!("IPv4 only") };
                (*entry, found(&r.maps.content, addr.octets()[3]))
            }).collect();
            prop_assert_eq!(actual, expected);
            let living = r.maps.content.backends.values().filter(|g| is_living(**g)).count();
            let wanted_lives: usize = wanted.values().map(|frontends| {
                frontends.iter().flat_map(|(_, backends)| backends).collect::<BTreeSet<_>>().len()
            }).sum();
            prop_assert_eq!(living, wanted_lives, "no life is lost or left");
        }
    }
}
