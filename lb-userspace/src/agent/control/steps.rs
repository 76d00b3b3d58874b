//! The agent's core, one write after the other, at times that a test chooses.

use std::{
    io,
    sync::{Mutex, PoisonError},
};

use prometheus_client::{encoding::text::encode, registry::Registry};

use super::*;
use crate::{
    datapath::{Family, FrontendKey, memory::MemoryMaps},
    model::{
        Endpoint, EndpointPort, EndpointSlice, Kind, Object, ObjectRef, Policy, Protocol, Service,
        ServicePort,
    },
    plan::Settings,
};

type SharedMaps = Arc<Mutex<MemoryMaps>>;

/// The core and its maps.
struct Steps {
    maps: SharedMaps,
    registry: Registry,
    control: Control<SharedMaps>,
    now: Instant,
}

impl Steps {
    /// With what the maps hold, and what there is now.
    fn start(maps: &SharedMaps, objects: impl IntoIterator<Item = Object>) -> Self {
        let mut registry = Registry::default();
        let links = Links {
            metrics: ControlMetrics::register(&mut registry),
            addresses: watch::channel(BTreeSet::new()).1,
            opted_out: watch::channel(None).0,
            orphans: Arc::default(),
            synced: watch::channel(false).0,
            health: Reporter::default(),
            events: Events::default(),
            recorder: Recorder::default(),
        };
        let pace = Pace {
            batch_delay: Duration::ZERO,
            verify_interval: Duration::from_secs(3600),
        };
        let index = Index::new("here", Settings::default());
        let control = Control::new(index, Arc::clone(maps), links, pace).expect("maps");
        let mut this = Self {
            maps: Arc::clone(maps),
            registry,
            control,
            now: Instant::now(),
        };
        this.hear(objects);
        this.control.begin();
        this
    }

    fn hear(&mut self, objects: impl IntoIterator<Item = Object>) {
        let events = objects.into_iter().map(Event::Apply);
        self.control.take_in(events.collect());
    }

    /// Writes, so much later.
    fn write_after(&mut self, millis: u64) -> Outcome {
        self.now += Duration::from_millis(millis);
        self.control.reconcile(self.now)
    }

    fn change_maps<T>(&self, change: impl FnOnce(&mut MemoryMaps) -> T) -> T {
        change(&mut self.maps.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn writes(&self) -> u64 {
        self.change_maps(|maps| maps.writes)
    }

    /// The frontends in the maps, by last octets.
    fn frontends(&self) -> Vec<u8> {
        self.change_maps(|maps| {
            let keys = maps.content.services.keys();
            let ports = keys.filter(|key| key.port == 80);
            ports.map(last_octet).collect()
        })
    }

    fn metric(&self, name: &str) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("encoded");
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("{name}: {text}")).to_owned()
    }
}

fn last_octet(key: &FrontendKey) -> u8 {
    match key.addr {
        IpAddr::V4(addr) => addr.octets()[3],
        IpAddr::V6(addr) => panic!("{addr}"),
    }
}

fn name(number: u8) -> NamespacedName {
    NamespacedName::new("default", format!("service-{number}"))
}

pub(super) fn service(number: u8) -> Object {
    Object::Service(Service {
        id: name(number),
        created: 0,
        cluster_ips: vec![[10, 96, 0, number].into()],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        affinity: None,
        algorithm: None,
        internal_policy: Policy::Cluster,
        external_policy: Policy::Cluster,
        health_check_port: None,
        ports: vec![ServicePort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
    })
}

/// The endpoints of a Service, by last octets.
pub(super) fn slice(number: u8, endpoints: &[u8]) -> Object {
    let endpoints = endpoints.iter().map(|last| Endpoint {
        addr: [10, 244, number, *last].into(),
        node: None,
        ready: true,
        serving: true,
        terminating: false,
        hints: None,
    });
    Object::EndpointSlice(EndpointSlice {
        id: NamespacedName::new("default", format!("slice-{number}")),
        service: name(number).name().to_owned(),
        family: Family::V4,
        ports: vec![EndpointPort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 3000,
        }],
        endpoints: endpoints.collect(),
        triggered: None,
    })
}

/// Room for so many entries of the service map.
fn maps_for(services: usize) -> SharedMaps {
    Arc::new(Mutex::new(MemoryMaps {
        service_capacity: services,
        ..MemoryMaps::default()
    }))
}

/// How many entries a Service takes.
fn entries_of_one() -> usize {
    let maps = SharedMaps::default();
    let mut steps = Steps::start(&maps, [service(1), slice(1, &[1])]);
    steps.write_after(0);
    steps.change_maps(|maps| maps.content.services.len())
}

/// Whatever else happens, it is tried again in its own time only.
#[test]
fn a_service_without_room_costs_others_nothing() {
    let maps = maps_for(entries_of_one());
    let mut steps = Steps::start(&maps, [service(1), slice(1, &[1])]);
    assert_eq!(steps.write_after(0), Outcome::Complete);
    let change = |steps: &mut Steps, last: u8| {
        let before = steps.writes();
        steps.hear([slice(1, &[last])]);
        let outcome = steps.write_after(1);
        (outcome, steps.writes() - before)
    };
    let (_, alone) = change(&mut steps, 2);
    steps.hear([service(2), slice(2, &[1])]);
    assert_eq!(steps.write_after(0), Outcome::NoRoom);
    assert_eq!(steps.metric("klb_services_failed"), "1");
    for last in 3..50 {
        let (outcome, writes) = change(&mut steps, last);
        assert_eq!((outcome, writes), (Outcome::NoRoom, alone), "change {last}");
    }
    // All but the one are written.
    let pending = |kind: &str| format!("kubeproxy_sync_proxy_rules_{kind}_changes_pending");
    assert_eq!(steps.metric(&pending("endpoint")), "0");
    assert_eq!(steps.metric(&pending("service")), "1");
    steps.change_maps(|maps| maps.service_capacity *= 2);
    assert_eq!(steps.write_after(100), Outcome::Complete);
    assert_eq!(steps.frontends(), [1, 2]);
    assert_eq!(steps.metric("klb_services_failed"), "0");
    assert_eq!(steps.metric(&pending("service")), "0");
}

#[test]
fn what_is_told_again_as_it_was_is_no_change() {
    let maps = SharedMaps::default();
    let mut steps = Steps::start(&maps, [service(1), slice(1, &[1])]);
    steps.write_after(0);
    steps.hear([service(1), slice(1, &[1])]);
    assert!(steps.control.index.take_changes().is_empty());
    steps.hear([slice(1, &[2])]);
    assert_eq!(steps.control.index.take_changes().len(), 1);
}

/// While something cannot be understood that may be about any Service, one that
/// this run has written follows what it is told.
#[test]
fn an_inherited_service_that_was_written_goes_when_it_is_deleted() {
    let maps = SharedMaps::default();
    let all = || [service(1), slice(1, &[1]), service(2), slice(2, &[1])];
    Steps::start(&maps, all()).write_after(0);
    let mut steps = Steps::start(&maps, all());
    let unknown = BTreeSet::from([Concern::Anyone]);
    steps.control.take_in(vec![Event::Unknown(unknown)]);
    steps.write_after(0);
    let gone = ObjectRef {
        kind: Kind::EndpointSlice,
        id: NamespacedName::new("default", "slice-1"),
    };
    let gone = [gone, ObjectRef::service(&name(1))].map(Event::Delete);
    steps.control.take_in(gone.into());
    steps.write_after(0);
    assert_eq!(steps.frontends(), [2]);
}

/// A Service of which nothing was heard is not taken for deleted as long as
/// something may be about it.
#[test]
fn an_inherited_service_that_nobody_described_stays() {
    let maps = SharedMaps::default();
    let all = || [service(1), slice(1, &[1]), service(2), slice(2, &[1])];
    Steps::start(&maps, all()).write_after(0);
    let mut steps = Steps::start(&maps, [service(1), service(2), slice(2, &[1])]);
    let unknown = BTreeSet::from([Concern::Anyone]);
    steps.control.take_in(vec![Event::Unknown(unknown)]);
    let before = steps.writes();
    steps.write_after(0);
    assert_eq!(steps.writes(), before, "all stays as it was");
    steps.control.take_in(vec![Event::Unknown(BTreeSet::new())]);
    steps.write_after(0);
    assert!(steps.writes() > before, "it has no endpoints");
}

/// A Service that stays as it is takes nothing from others, and nobody takes from
/// it, though it may not be known how old it is.
#[test]
fn a_service_that_stays_keeps_its_frontends_and_no_others() {
    let maps = SharedMaps::default();
    let all = || [service(1), service(2)];
    Steps::start(&maps, all()).write_after(0);
    let moved_to = |number: u8, address: u8| match service(number) {
        Object::Service(service) => Object::Service(Service {
            cluster_ips: vec![[10, 96, 0, address].into()],
            ..service
        }),
        other => panic!("{other:?}"),
    };
    let owners = |steps: &Steps| {
        let reconciler = &steps.control.reconciler;
        [1, 2].map(|number| {
            let frontends = reconciler.frontends(&name(number)).into_iter();
            let ports = frontends.filter(|key| key.port == 80);
            ports.map(|key| last_octet(&key)).collect::<Vec<_>>()
        })
    };
    let unknown = || vec![Event::Unknown([Concern::Service(name(1))].into())];
    // The first claims the second one's address, and goes before it by name.
    let mut steps = Steps::start(&maps, [moved_to(1, 2), service(2)]);
    steps.control.take_in(unknown());
    steps.write_after(0);
    assert_eq!(owners(&steps), [vec![1], vec![2]]);
    // The second claims the first one's, of which nothing is known.
    let mut steps = Steps::start(&maps, [moved_to(2, 1)]);
    steps.control.take_in(unknown());
    steps.write_after(0);
    assert_eq!(owners(&steps), [vec![1], vec![]]);
    steps.control.take_in(vec![Event::Unknown(BTreeSet::new())]);
    steps.write_after(0);
    assert_eq!(owners(&steps), [vec![], vec![1]]);
}

/// What nobody owns is removed by another try if the first one failed.
#[test]
fn strays_are_removed_in_the_end() {
    let maps = SharedMaps::default();
    Steps::start(&maps, [service(1), slice(1, &[1])]).write_after(0);
    let mut steps = Steps::start(&maps, [service(1), slice(1, &[1])]);
    let stray = steps.change_maps(|maps| {
        let entry = *maps.content.services.values().next().expect("an entry");
        let key = FrontendKey {
            addr: [10, 96, 0, 99].into(),
            port: 80,
            protocol: 6,
        };
        let entry = lb_common::service::ServiceEntry {
            service: 77,
            ..entry
        };
        maps.content.services.insert(key, entry);
        key
    });
    steps = Steps::start(&maps, [service(1), slice(1, &[1])]);
    let is_there =
        |steps: &Steps| steps.change_maps(|maps| maps.content.services.contains_key(&stray));
    steps.change_maps(|maps| {
        maps.fault = Some(Box::new(|_| Err(io::Error::other("out of order"))));
    });
    assert_eq!(steps.write_after(0), Outcome::Failed);
    steps.change_maps(|maps| maps.fault = None);
    assert!(is_there(&steps));
    assert_eq!(steps.write_after(100), Outcome::Complete);
    assert!(!is_there(&steps));
}

/// A look that fails is not left at that until the next one would be.
#[test]
fn maps_that_cannot_be_mended_are_looked_at_again_soon() {
    let maps = SharedMaps::default();
    let mut steps = Steps::start(&maps, [service(1), slice(1, &[1])]);
    steps.write_after(0);
    steps.change_maps(|maps| {
        maps.content.services.clear();
        maps.fault = Some(Box::new(|_| Err(io::Error::other("out of order"))));
    });
    let verify_after = |steps: &mut Steps, millis| {
        steps.now += Duration::from_millis(millis);
        steps.control.verify(steps.now);
        (steps.control.verify_at - steps.now).as_millis()
    };
    let waits = [0, 100, 200, 400].map(|millis| verify_after(&mut steps, millis));
    assert_eq!(waits, [100, 200, 400, 800]);
    let count = |result: &str| format!("klb_verifications_total{{result=\"{result}\"}}");
    assert_eq!(steps.metric(&count("failed")), "4");
    steps.change_maps(|maps| maps.fault = None);
    assert_eq!(verify_after(&mut steps, 800), 3_600_000);
    assert_eq!(steps.metric(&count("done")), "1");
    assert_eq!(steps.frontends(), [1]);
}
