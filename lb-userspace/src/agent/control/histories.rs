//! Random histories: objects come, change and go, news of them is late, comes
//! twice or not at all until a new list, the agent is killed, writes fail. At no
//! moment does a reader of the maps see half of a change, or anything new of a
//! Service that nothing happened to; and in the end the maps say what they would
//! if nothing had ever gone wrong.
//!
//! `KLB_SEED=N cargo test histories` plays a run again; `KLB_HISTORIES=N` plays
//! so many.

use std::{
    env, io,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

use prometheus_client::registry::Registry;
use proptest::{
    prelude::*,
    test_runner::{RngAlgorithm, TestError, TestRng, TestRunner},
};

use super::*;
use crate::{
    datapath::{
        Family, FrontendKey,
        memory::{Content, MemoryMaps},
    },
    model::{
        Algorithm, Endpoint, EndpointPort, EndpointSlice, Kind, Node, Object, ObjectRef, Policy,
        Protocol, Service, ServicePort,
    },
    plan::Settings,
};

/// Histories in one run of the test.
const HISTORIES: u32 = 2000;

const NODE: &str = "here";

#[derive(Clone, Debug)]
enum Step {
    Put(Object),
    Delete(ObjectRef),
    /// So many of the news of a kind arrive, and are acted upon.
    Deliver(Kind, usize),
    /// The last thing heard of a kind is heard again.
    Repeat(Kind),
    /// All news of a kind that have not arrived are lost; then comes a list.
    Relist(Kind),
    /// The node has these addresses, by last octets.
    Addresses(BTreeSet<u8>),
    Kill,
    /// After so many writes one fails.
    FailAfter(u64),
    Verify,
}

fn name(number: u8) -> NamespacedName {
    NamespacedName::new("default", format!("service-{number}"))
}

fn services() -> impl Strategy<Value = Service> {
    let policy = || prop_oneof![3 => Just(Policy::Cluster), 1 => Just(Policy::Local)];
    let ports = prop::collection::btree_map(1u8..4, prop::option::weighted(0.3, 0u16..4), 1..3);
    let choice = (
        prop::option::weighted(0.2, 10u32..12),
        prop::option::weighted(0.2, Just(Algorithm::Maglev)),
    );
    // Few addresses and node ports, so that Services get into each other's way.
    (
        1u8..6,
        1u8..7,
        0i64..3,
        ports,
        (policy(), policy()),
        choice,
        any::<bool>(),
    )
        .prop_map(
            |(
                number,
                address,
                created,
                ports,
                (internal, external),
                (affinity, algorithm),
                balanced,
            )| Service {
                id: name(number),
                created,
                cluster_ips: vec![[10, 96, 0, address].into()],
                external_ips: Vec::new(),
                load_balancer_ips: if balanced {
                    vec![[203, 0, 113, address].into()]
                } else {
                    Vec::new()
                },
                source_ranges: if balanced {
                    vec!["192.0.2.0/24".parse().expect("a network")]
                } else {
                    Vec::new()
                },
                affinity,
                algorithm,
                internal_policy: internal,
                external_policy: external,
                health_check_port: None,
                ports: ports
                    .into_iter()
                    .map(|(port, node_port)| ServicePort {
                        name: format!("p{port}"),
                        protocol: if port == 3 {
                            Protocol::Udp
                        } else {
                            Protocol::Tcp
                        },
                        port: port.into(),
                        node_port: node_port.map(|port| 30000 + port),
                    })
                    .collect(),
            },
        )
}

fn slices() -> impl Strategy<Value = EndpointSlice> {
    let endpoint = (1u8..9, any::<bool>(), 0u8..10).prop_map(|(last, local, health)| Endpoint {
        addr: [10, 244, 0, last].into(),
        node: Some(if local { NODE } else { "there" }.into()),
        ready: health > 2,
        serving: health > 0,
        terminating: matches!(health, 1 | 2),
        hints: None,
    });
    // A slice may move from one Service to another.
    let endpoints = prop::collection::vec(endpoint, 0..5);
    (1u8..8, 1u8..6, endpoints).prop_map(|(slice, service, endpoints)| EndpointSlice {
        id: NamespacedName::new("default", format!("slice-{slice}")),
        service: name(service).name().to_owned(),
        family: Family::V4,
        ports: [
            ("p1", Protocol::Tcp),
            ("p2", Protocol::Tcp),
            ("p3", Protocol::Udp),
        ]
        .into_iter()
        .map(|(name, protocol)| EndpointPort {
            name: name.to_owned(),
            protocol,
            port: 3000,
        })
        .collect(),
        endpoints,
        triggered: None,
    })
}

fn steps() -> impl Strategy<Value = Step> {
    let kind = || prop_oneof![Just(Kind::Service), Just(Kind::EndpointSlice)];
    let service = (1u8..6).prop_map(|number| ObjectRef {
        kind: Kind::Service,
        id: name(number),
    });
    let slice = (1u8..8).prop_map(|number| ObjectRef {
        kind: Kind::EndpointSlice,
        id: NamespacedName::new("default", format!("slice-{number}")),
    });
    prop_oneof![
        6 => services().prop_map(|service| Step::Put(Object::Service(service))),
        9 => slices().prop_map(|slice| Step::Put(Object::EndpointSlice(slice))),
        3 => prop_oneof![service, slice].prop_map(Step::Delete),
        12 => (kind(), 1usize..4).prop_map(|(kind, count)| Step::Deliver(kind, count)),
        1 => kind().prop_map(Step::Repeat),
        2 => kind().prop_map(Step::Relist),
        1 => prop::collection::btree_set(1u8..4, 0..3).prop_map(Step::Addresses),
        1 => Just(Step::Kill),
        2 => (0u64..12).prop_map(Step::FailAfter),
        1 => Just(Step::Verify),
    ]
}

type SharedMaps = Arc<Mutex<MemoryMaps>>;

/// A frontend, and where clients outside and inside are led.
type Ways = BTreeMap<FrontendKey, [Vec<SocketAddr>; 2]>;

/// What one kind's watch has to tell.
#[derive(Clone, Debug, Default)]
struct Watch {
    news: Vec<Event>,
    /// What was told, and is there as far as anybody knows.
    told: BTreeSet<ObjectRef>,
    last: Option<Event>,
}

/// The cluster, what is known of it, and the maps.
struct World {
    objects: BTreeMap<ObjectRef, Object>,
    watches: BTreeMap<Kind, Watch>,
    addresses: BTreeSet<IpAddr>,
    maps: SharedMaps,
    control: Control<SharedMaps>,
    /// Slice → Service, as far as it was heard.
    slices: BTreeMap<ObjectRef, NamespacedName>,
    /// Nothing of what was heard is left to be written.
    clean: bool,
    now: Instant,
    /// What a reader saw that must not be.
    seen: Option<String>,
}

fn control(maps: &SharedMaps, addresses: &BTreeSet<IpAddr>) -> Control<SharedMaps> {
    let links = Links {
        metrics: ControlMetrics::register(&mut Registry::default()),
        addresses: watch::channel(addresses.clone()).1,
        opted_out: watch::channel(None).0,
        ended: Arc::default(),
        synced: watch::channel(false).0,
        health: Reporter::default(),
        events: Events::default(),
    };
    let settings = Settings {
        maglev_table: 7,
        ..Settings::default()
    };
    let index = Index::new(NODE, settings);
    let pace = Pace {
        batch_delay: Duration::ZERO,
        verify_interval: Duration::from_secs(3600),
    };
    Control::new(index, Arc::clone(maps), links, pace).expect("maps")
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where every frontend leads to.
///
/// # Errors
///
/// If a reader would meet something half-written.
fn ways(content: &Content) -> Result<Ways, String> {
    let keys = content.services.keys();
    keys.map(|key| {
        let addresses = |slots: Vec<crate::datapath::SlotValue>| {
            slots
                .iter()
                .map(|slot| slot.addr)
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect()
        };
        let outside = addresses(content.resolve(key)?);
        Ok((*key, [outside, addresses(content.resolve_inside(key)?)]))
    })
    .collect()
}

/// The first thing in a history of the maps that no reader may see.
fn complaint(
    history: &[Result<Ways, String>],
    is_untouched: impl Fn(&FrontendKey) -> bool,
) -> Option<String> {
    let first = history.first()?.as_ref().ok()?;
    let kept: Vec<_> = first.iter().filter(|(key, _)| is_untouched(key)).collect();
    history.iter().find_map(|ways| {
        let ways = match ways {
            Ok(ways) => ways,
            Err(complaint) => return Some(complaint.clone()),
        };
        let changed = kept.iter().find(|(key, way)| ways.get(*key) != Some(*way));
        changed.map(|(key, way)| format!("{key} led to {way:?}, then {:?}", ways.get(*key)))
    })
}

impl World {
    fn new() -> Self {
        let maps = SharedMaps::default();
        let mut world = Self {
            objects: BTreeMap::new(),
            watches: [Kind::Service, Kind::EndpointSlice]
                .map(|kind| (kind, Watch::default()))
                .into(),
            addresses: BTreeSet::new(),
            control: control(&maps, &BTreeSet::new()),
            maps,
            slices: BTreeMap::new(),
            clean: true,
            now: Instant::now(),
            seen: None,
        };
        world.begin();
        world
    }

    /// As when the agent has listed everything.
    fn begin(&mut self) {
        self.control.take_in(vec![Event::Apply(Object::Node(Node {
            name: NODE.to_owned(),
            zone: None,
            leaving: false,
        }))]);
        self.slices.clear();
        for kind in [Kind::Service, Kind::EndpointSlice] {
            *self.watch(kind) = Watch::default();
            self.relist(kind);
            let news = std::mem::take(&mut self.watch(kind).news);
            self.touched(&news);
            self.control.take_in(news);
        }
        self.control.begin();
    }

    fn watch(&mut self, kind: Kind) -> &mut Watch {
        self.watches.get_mut(&kind).expect("two kinds")
    }

    /// What a list brings: all there is, and that nothing else is.
    fn relist(&mut self, kind: Kind) {
        let objects = self
            .objects
            .iter()
            .filter(|(reference, _)| reference.kind == kind);
        let objects: Vec<_> = objects
            .map(|(reference, object)| (reference.clone(), object.clone()))
            .collect();
        let watch = self.watch(kind);
        watch.news.clear();
        for (_, object) in &objects {
            watch.news.push(Event::Apply(object.clone()));
        }
        let there: BTreeSet<_> = objects
            .into_iter()
            .map(|(reference, _)| reference)
            .collect();
        watch
            .news
            .extend(watch.told.difference(&there).cloned().map(Event::Delete));
        watch.told = there;
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Put(object) => {
                let reference = object.reference();
                let watch = self.watch(reference.kind);
                watch.told.insert(reference.clone());
                watch.news.push(Event::Apply(object.clone()));
                self.objects.insert(reference, object);
            }
            Step::Delete(reference) => {
                if self.objects.remove(&reference).is_some() {
                    self.watch(reference.kind)
                        .news
                        .push(Event::Delete(reference));
                }
            }
            Step::Deliver(kind, count) => {
                let watch = self.watch(kind);
                let count = count.min(watch.news.len());
                let news: Vec<_> = watch.news.drain(..count).collect();
                watch.last = news.last().cloned().or(watch.last.take());
                self.act(news);
            }
            Step::Repeat(kind) => {
                let last = self.watch(kind).last.clone();
                self.act(last.into_iter().collect());
            }
            Step::Relist(kind) => {
                self.relist(kind);
                let watch = self.watch(kind);
                watch.last = None;
                let news = std::mem::take(&mut watch.news);
                self.act(news);
            }
            Step::Addresses(octets) => {
                self.addresses = octets
                    .iter()
                    .map(|last| [192, 168, 50, *last].into())
                    .collect();
                self.control
                    .index
                    .set_node_addresses(self.addresses.clone());
                self.reconcile(None);
            }
            Step::Kill => {
                lock(&self.maps).fault = None;
                self.control = control(&self.maps, &self.addresses);
                self.begin();
                self.reconcile(None);
            }
            Step::FailAfter(count) => {
                let mut maps = lock(&self.maps);
                let at = maps.writes + count;
                maps.fault = Some(Box::new(move |write| {
                    let failure = (write == at).then(|| io::ErrorKind::Other.into());
                    failure.map_or(Ok(()), Err)
                }));
            }
            Step::Verify => {
                let drift = self.control.reconciler.verify().expect("nothing to write");
                let complaint = (!drift.is_empty()).then(|| format!("nobody else wrote {drift:?}"));
                self.seen = self.seen.take().or(complaint);
            }
        }
    }

    fn act(&mut self, news: Vec<Event>) {
        let touched = self.touched(&news);
        self.control.take_in(news);
        self.reconcile(Some(&touched));
    }

    /// The Services that news concern: of a slice that moves both.
    fn touched(&mut self, news: &[Event]) -> BTreeSet<NamespacedName> {
        let mut touched = BTreeSet::new();
        for event in news {
            let (reference, service) = match event {
                Event::Apply(Object::EndpointSlice(slice)) => {
                    let service = NamespacedName::new(slice.id.namespace(), &slice.service);
                    (
                        Object::EndpointSlice(slice.clone()).reference(),
                        Some(service),
                    )
                }
                Event::Apply(object) => (object.reference(), None),
                Event::Delete(reference) => (reference.clone(), None),
                other => panic!("{other:?}"),
            };
            if reference.kind == Kind::Service {
                touched.insert(reference.id);
                continue;
            }
            touched.extend(self.slices.remove(&reference));
            if let Some(service) = service {
                touched.insert(service.clone());
                self.slices.insert(reference, service);
            }
        }
        touched
    }

    /// Writes what has changed, and looks at the maps after every write. What
    /// Services other than these have, and keep, may not change meanwhile.
    fn reconcile(&mut self, touched: Option<&BTreeSet<NamespacedName>>) {
        let before = ways(&lock(&self.maps).content);
        let owners = self.owners();
        let history = Arc::new(Mutex::new(vec![before]));
        let recorder = Arc::clone(&history);
        lock(&self.maps).observer = Some(Box::new(move |content| {
            lock(&recorder).push(ways(content));
        }));
        // So much later that whatever failed is tried again.
        self.now += Duration::from_secs(60);
        let outcome = self.control.reconcile(self.now);
        lock(&self.maps).observer = None;
        let was_clean = std::mem::replace(&mut self.clean, outcome == Outcome::Complete);
        let owners_now = self.owners();
        let untouched = |key: &FrontendKey| {
            let owner = owners.get(key);
            let keeps = owner.is_some() && owner == owners_now.get(key);
            was_clean
                && keeps
                && touched
                    .is_some_and(|touched| owner.is_some_and(|owner| !touched.contains(owner)))
        };
        let complaint = complaint(&lock(&history), untouched);
        self.seen = self.seen.take().or(complaint);
    }

    /// Whose frontends the maps say they are.
    fn owners(&self) -> BTreeMap<FrontendKey, NamespacedName> {
        let maps = lock(&self.maps);
        let content = &maps.content;
        let owner = |service: u32| {
            let meta = content.metas.get(&service)?;
            Some(NamespacedName::new(
                meta.namespace.as_str(),
                meta.name.as_str(),
            ))
        };
        let services = content.services.iter();
        services
            .filter_map(|(key, entry)| Some((*key, owner(entry.service)?)))
            .collect()
    }

    /// Everything is heard, and nothing fails any more.
    fn settle(&mut self) {
        lock(&self.maps).fault = None;
        for kind in [Kind::Service, Kind::EndpointSlice] {
            let news = std::mem::take(&mut self.watch(kind).news);
            self.act(news);
        }
        for _ in 0..3 {
            self.reconcile(None);
        }
    }

    /// What a reader can tell of the maps, without numbers that nobody chose.
    fn picture(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        let maps = lock(&self.maps);
        let content = &maps.content;
        let entries: BTreeMap<_, _> = content
            .services
            .iter()
            .map(|(key, entry)| {
                (
                    *key,
                    (
                        entry.kind,
                        entry.flags,
                        entry.affinity,
                        entry.parked,
                        entry.slot_count,
                    ),
                )
            })
            .collect();
        let names: BTreeSet<_> = content
            .metas
            .values()
            .map(|meta| format!("{meta:?}"))
            .collect();
        let ranges: Vec<_> = content.ranges.iter().map(|(_, range)| *range).collect();
        let living = content
            .backends
            .values()
            .filter(|generation| lb_common::service::is_living(**generation))
            .count();
        (ways(content), entries, names, ranges, living)
    }
}

fn play(history: &[Step]) -> Result<(), TestCaseError> {
    let mut world = World::new();
    for step in history {
        world.step(step.clone());
        prop_assert!(world.seen.is_none(), "{step:?}: {:?}", world.seen);
    }
    world.settle();
    let mut straight = World::new();
    straight.addresses.clone_from(&world.addresses);
    straight.objects.clone_from(&world.objects);
    straight.step(Step::Kill);
    straight.settle();
    prop_assert_eq!(world.picture(), straight.picture());
    // The network of all addresses of Services shrinks at a start only.
    world.step(Step::Kill);
    let before = lock(&world.maps).writes;
    world.step(Step::Kill);
    prop_assert_eq!(
        lock(&world.maps).writes,
        before,
        "a start with nothing new writes nothing"
    );
    Ok(())
}

#[test]
fn every_history_ends_well() {
    let seed = number("KLB_SEED").unwrap_or_else(any_seed);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = ProptestConfig {
        cases: number("KLB_HISTORIES").map_or(HISTORIES, |count| count as u32),
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let histories = prop::collection::vec(steps(), 1..40);
    match runner.run(&histories, |history| play(&history)) {
        Ok(()) => {}
        Err(TestError::Fail(reason, history)) => {
            panic!("KLB_SEED={seed}: {reason}\n{history:#?}")
        }
        Err(TestError::Abort(reason)) => panic!("KLB_SEED={seed}: {reason}"),
    }
}

/// Another one in every run.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(0)
}

fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is no number: {text}")),
    )
}
