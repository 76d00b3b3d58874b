//! Random histories: objects come, change, make no sense and go, news of them is
//! late, comes twice or not at all until a new list, the server is away, the agent
//! is killed, in the middle of a write too, writes fail, maps are full. At no
//! moment does a reader of the maps see half of a change, or anything new of a
//! Service that nothing happened to, whatever happens to others or to the agent;
//! and in the end the maps say what they would if nothing had ever gone wrong.
//!
//! `KLB_SEED=N cargo test histories` plays a run again; `KLB_HISTORIES=N` plays
//! so many.

mod objects;

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

use self::objects::{name, services, slice_name, slices, zone_name};
use super::*;
use crate::{
    datapath::{
        Family, FrontendKey,
        memory::{Content, MemoryMaps},
    },
    model::{EndpointSlice, Kind, Node, Object, ObjectRef, Service},
    plan::Settings,
};

/// Histories in one run of the test.
const HISTORIES: u32 = 2000;

const NODE: &str = "here";

#[derive(Clone, Debug)]
enum Step {
    Put(Object),
    Delete(ObjectRef),
    /// An object makes no sense any more; with it goes, or does not, whom it
    /// concerns.
    Spoil(ObjectRef, bool),
    /// So many of the news of a kind arrive, and are acted upon.
    Deliver(Kind, usize),
    /// The last thing heard of a kind is heard again.
    Repeat(Kind),
    /// All news of a kind that have not arrived are lost; then comes a list.
    Relist(Kind),
    /// The server is not to be reached from now on, or is again.
    Away(bool),
    /// The node has these addresses, by last octets.
    Addresses(BTreeSet<u8>),
    /// The node is in this zone.
    Zone(Option<u8>),
    Kill,
    /// All news arrive, and the agent is killed after so many writes.
    KillAfter(u64),
    /// After so many writes one fails.
    FailAfter(u64),
    /// After so many writes there is no room for so many others.
    FullAfter(u64, u64),
    /// So many frontends have room.
    Room(usize),
    Verify,
}

fn steps() -> impl Strategy<Value = Step> {
    let kind = || prop_oneof![Just(Kind::Service), Just(Kind::EndpointSlice)];
    let reference = || {
        let service = (1u8..6).prop_map(|number| (Kind::Service, name(number)));
        let slice = (1u8..8).prop_map(|number| (Kind::EndpointSlice, slice_name(number)));
        prop_oneof![service, slice].prop_map(|(kind, id)| ObjectRef { kind, id })
    };
    prop_oneof![
        6 => services().prop_map(|service| Step::Put(Object::Service(service))),
        9 => slices().prop_map(|slice| Step::Put(Object::EndpointSlice(slice))),
        3 => reference().prop_map(Step::Delete),
        3 => (reference(), any::<bool>()).prop_map(|(reference, known)| Step::Spoil(reference, known)),
        12 => (kind(), 1usize..4).prop_map(|(kind, count)| Step::Deliver(kind, count)),
        1 => kind().prop_map(Step::Repeat),
        2 => kind().prop_map(Step::Relist),
        1 => prop::bool::weighted(0.3).prop_map(Step::Away),
        1 => prop::collection::btree_set(1u8..4, 0..3).prop_map(Step::Addresses),
        1 => prop::option::of(1u8..3).prop_map(Step::Zone),
        2 => Just(Step::Kill),
        1 => (0u64..12).prop_map(Step::KillAfter),
        2 => (0u64..12).prop_map(Step::FailAfter),
        1 => (0u64..12, 1u64..4).prop_map(|(count, times)| Step::FullAfter(count, times)),
        1 => prop_oneof![0usize..20, Just(1024)].prop_map(Step::Room),
        1 => Just(Step::Verify),
    ]
}

/// The Service that an object is of.
fn owner(object: &Object) -> NamespacedName {
    match object {
        Object::EndpointSlice(EndpointSlice { id, service, .. }) => {
            NamespacedName::new(id.namespace(), service)
        }
        Object::Service(Service { id, .. }) => id.clone(),
        other => panic!("{other:?}"),
    }
}

type SharedMaps = Arc<Mutex<MemoryMaps>>;

/// A frontend, and where clients outside and inside are led.
type Ways = BTreeMap<FrontendKey, [Vec<SocketAddr>; 2]>;

/// What one kind's watch has to tell.
#[derive(Clone, Debug, Default)]
struct Watch {
    news: Vec<Event>,
    last: Option<Event>,
}

/// The cluster, what is known of it, and the maps.
struct World {
    objects: BTreeMap<ObjectRef, Object>,
    /// Objects that make no sense at present, with whom they concern.
    spoiled: BTreeMap<ObjectRef, Concern>,
    watches: BTreeMap<Kind, Watch>,
    is_away: bool,
    addresses: BTreeSet<IpAddr>,
    zone: Option<u8>,
    maps: SharedMaps,
    control: Control<SharedMaps>,
    /// The agent has read everything since its start.
    has_begun: bool,
    /// Objects as the agent heard of them last.
    heard: BTreeMap<ObjectRef, Object>,
    /// What it has found there and never understood.
    unknown: BTreeMap<ObjectRef, Concern>,
    /// Of that, what an earlier agent had heard.
    inherited: BTreeMap<ObjectRef, Object>,
    /// What an earlier agent could not write, and what nobody has heard of since.
    unfinished: BTreeSet<NamespacedName>,
    now: Instant,
    /// What a reader saw that must not be.
    seen: Option<String>,
}

fn control(maps: &SharedMaps, addresses: &BTreeSet<IpAddr>) -> Control<SharedMaps> {
    let links = Links {
        metrics: ControlMetrics::register(&mut Registry::default()),
        addresses: watch::channel(addresses.clone()).1,
        opted_out: watch::channel(None).0,
        orphans: Arc::default(),
        synced: watch::channel(false).0,
        health: Reporter::default(),
        events: Events::default(),
        recorder: Recorder::default(),
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
            spoiled: BTreeMap::new(),
            watches: [Kind::Service, Kind::EndpointSlice]
                .map(|kind| (kind, Watch::default()))
                .into(),
            is_away: false,
            addresses: BTreeSet::new(),
            zone: None,
            control: control(&maps, &BTreeSet::new()),
            maps,
            has_begun: false,
            heard: BTreeMap::new(),
            unknown: BTreeMap::new(),
            inherited: BTreeMap::new(),
            unfinished: BTreeSet::new(),
            now: Instant::now(),
            seen: None,
        };
        world.begin();
        world
    }

    fn node(&self) -> Event {
        Event::Apply(Object::Node(Node {
            name: NODE.to_owned(),
            zone: self.zone.map(zone_name),
            leaving: false,
        }))
    }

    /// The agent lists everything, and writes for the first time.
    fn begin(&mut self) {
        let mut before = std::mem::take(&mut self.inherited);
        before.append(&mut self.heard);
        self.unknown.clear();
        self.has_begun = true;
        self.control.take_in(vec![self.node()]);
        for kind in [Kind::Service, Kind::EndpointSlice] {
            *self.watch(kind) = Watch::default();
            self.relist(kind);
            let news = std::mem::take(&mut self.watch(kind).news);
            self.hear(news);
        }
        self.tell_unknown();
        self.control.begin();
        let mut touched = self.differences(&before);
        touched.append(&mut self.unfinished);
        before.retain(|reference, _| self.unknown.contains_key(reference));
        self.inherited = before;
        self.reconcile(Some(&touched));
    }

    /// The Services of which an agent that starts hears anything else than the
    /// last one did.
    fn differences(&self, before: &BTreeMap<ObjectRef, Object>) -> BTreeSet<NamespacedName> {
        let mut touched = BTreeSet::new();
        for reference in before.keys().chain(self.objects.keys()) {
            let (old, new) = (before.get(reference), self.heard.get(reference));
            let stays = match self.unknown.get(reference) {
                // Nobody knows to whom to leave what.
                Some(Concern::Anyone | Concern::NoOne) => false,
                // It keeps what it had, if that was its own.
                Some(Concern::Service(service)) => old.is_none_or(|old| owner(old) == *service),
                None => old == new,
            };
            if !stays {
                let object = self.objects.get(reference);
                touched.extend(old.into_iter().chain(new).chain(object).map(owner));
            }
        }
        touched
    }

    fn watch(&mut self, kind: Kind) -> &mut Watch {
        self.watches.get_mut(&kind).expect("two kinds")
    }

    /// What a list brings: all there is, and that nothing else is.
    fn relist(&mut self, kind: Kind) {
        let mut news = Vec::new();
        for (reference, object) in &self.objects {
            if reference.kind != kind {
                continue;
            }
            match self.spoiled.get(reference) {
                None => news.push(Event::Apply(object.clone())),
                // What it described stays.
                Some(_) if self.heard.contains_key(reference) => {}
                Some(concern) => {
                    self.unknown.insert(reference.clone(), concern.clone());
                }
            }
        }
        let known = self.heard.keys().chain(self.unknown.keys());
        let gone = known.filter(|known| known.kind == kind && !self.objects.contains_key(known));
        news.extend(gone.cloned().map(Event::Delete));
        self.watch(kind).news = news;
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Put(object) => {
                let reference = object.reference();
                self.spoiled.remove(&reference);
                let news = Event::Apply(object.clone());
                self.watch(reference.kind).news.push(news);
                self.objects.insert(reference, object);
            }
            Step::Delete(reference) => {
                self.spoiled.remove(&reference);
                if self.objects.remove(&reference).is_some() {
                    let news = Event::Delete(reference.clone());
                    self.watch(reference.kind).news.push(news);
                }
            }
            Step::Spoil(reference, is_known) => {
                if let Some(object) = self.objects.get(&reference) {
                    let concern = if is_known || reference.kind == Kind::Service {
                        Concern::Service(owner(object))
                    } else {
                        Concern::Anyone
                    };
                    self.spoiled.insert(reference, concern);
                }
            }
            Step::Away(is_away) => {
                self.is_away = is_away;
                if !is_away && !self.has_begun {
                    self.begin();
                }
            }
            Step::Deliver(..) | Step::Repeat(_) | Step::Relist(_) | Step::KillAfter(_)
                if self.is_away => {}
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
            Step::Addresses(octets) => self.set_addresses(&octets),
            Step::Zone(zone) => {
                self.zone = zone;
                if self.has_begun {
                    self.control.take_in(vec![self.node()]);
                    self.reconcile(None);
                }
            }
            Step::Kill => self.kill(),
            Step::KillAfter(count) => {
                self.fail(count, u64::MAX, || io::ErrorKind::Other.into());
                let watches = self.watches.values_mut();
                let news = watches.flat_map(|watch| std::mem::take(&mut watch.news));
                let news = news.collect();
                self.act(news);
                self.kill();
            }
            Step::FailAfter(count) => self.fail(count, 1, || io::ErrorKind::Other.into()),
            Step::FullAfter(count, times) => {
                self.fail(count, times, || io::Error::from_raw_os_error(libc::E2BIG));
            }
            Step::Room(frontends) => lock(&self.maps).service_capacity = frontends,
            Step::Verify => {
                lock(&self.maps).fault = None;
                let drift = self.control.reconciler.verify().expect("nothing to write");
                let complaint = (!drift.is_empty()).then(|| format!("nobody else wrote {drift:?}"));
                self.seen = self.seen.take().or(complaint);
            }
        }
    }

    fn set_addresses(&mut self, octets: &BTreeSet<u8>) {
        let addresses = octets.iter().map(|last| [192, 168, 50, *last].into());
        self.addresses = addresses.collect();
        let index = &mut self.control.index;
        index.set_node_addresses(self.addresses.clone());
        let known = self.heard.values().chain(self.inherited.values());
        let services = known.filter_map(|object| match object {
            Object::Service(service) => Some(service),
            _ => None,
        });
        let concerned = services.filter(|service| service.concerns_node_addresses());
        let mut touched = concerned.map(|service| service.id.clone()).collect();
        if self.has_begun {
            self.reconcile(Some(&touched));
        } else {
            // An agent that has not begun hears of it then.
            self.unfinished.append(&mut touched);
        }
    }

    /// After so many writes so many others fail.
    fn fail(&self, count: u64, times: u64, error: fn() -> io::Error) {
        let mut maps = lock(&self.maps);
        let failing = maps.writes + count..(maps.writes + count).saturating_add(times);
        maps.fault = Some(Box::new(move |write| {
            if failing.contains(&write) {
                return Err(error());
            }
            Ok(())
        }));
    }

    /// Starts another agent, which goes on as soon as it can read everything.
    fn kill(&mut self) {
        lock(&self.maps).fault = None;
        let failed = self.failed();
        self.unfinished.extend(failed);
        // More may be known of these when the next one lists everything.
        let held = self.control.index.held();
        self.unfinished.extend(held.cloned());
        self.control = control(&self.maps, &self.addresses);
        self.has_begun = false;
        if !self.is_away {
            self.begin();
        }
    }

    fn failed(&self) -> BTreeSet<NamespacedName> {
        let never = self.now + Duration::from_secs(3600);
        self.control.failures.due(never).cloned().collect()
    }

    fn act(&mut self, news: Vec<Event>) {
        let mut touched = self.hear(news);
        // More may be known of these now.
        touched.extend(self.control.index.held().cloned());
        self.tell_unknown();
        self.reconcile(Some(&touched));
    }

    /// Tells the agent, and returns the Services that it concerns: of a slice
    /// that moves both.
    fn hear(&mut self, news: Vec<Event>) -> BTreeSet<NamespacedName> {
        let mut touched = BTreeSet::new();
        for event in &news {
            let (reference, object) = match event {
                Event::Apply(object) => (object.reference(), Some(object)),
                Event::Delete(reference) => (reference.clone(), None),
                other => panic!("{other:?}"),
            };
            self.unknown.remove(&reference);
            let inherited = self.inherited.remove(&reference);
            let old = match object {
                Some(object) => self.heard.insert(reference, object.clone()),
                None => self.heard.remove(&reference),
            };
            let objects = inherited.iter().chain(&old).chain(object);
            touched.extend(objects.map(owner));
        }
        self.control.take_in(news);
        touched
    }

    fn tell_unknown(&mut self) {
        let unknown: BTreeSet<_> = self.unknown.values().cloned().collect();
        if unknown != self.control.unknown {
            self.control.take_in(vec![Event::Unknown(unknown)]);
        }
    }

    /// Writes what has changed, and looks at the maps after every write. What
    /// Services other than these have, and keep, may not change meanwhile; but
    /// what failed before may.
    fn reconcile(&mut self, touched: Option<&BTreeSet<NamespacedName>>) {
        let before = ways(&lock(&self.maps).content);
        let owners = self.owners();
        let failed = self.failed();
        let history = Arc::new(Mutex::new(vec![before]));
        let recorder = Arc::clone(&history);
        lock(&self.maps).observer = Some(Box::new(move |content| {
            lock(&recorder).push(ways(content));
        }));
        // So much later that whatever failed is tried again.
        self.now += Duration::from_secs(60);
        let outcome = self.control.reconcile(self.now);
        lock(&self.maps).observer = None;
        let owners_now = self.owners();
        let untouched = |key: &FrontendKey| {
            let (owner, now) = (owners.get(key), owners_now.get(key));
            // It may go to another Service, which could not be written perhaps.
            let stays = owner == now || now.is_none() && outcome == Outcome::Complete;
            let owner = owner.filter(|_| stays);
            let touched = |owner| touched.is_none_or(|touched| touched.contains(owner));
            owner.is_some_and(|owner| !touched(owner) && !failed.contains(owner))
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

    /// Everything makes sense and is heard, and nothing fails any more.
    fn settle(&mut self) {
        lock(&self.maps).fault = None;
        self.step(Step::Room(1024));
        self.step(Step::Away(false));
        for reference in std::mem::take(&mut self.spoiled).into_keys() {
            let object = self.objects[&reference].clone();
            self.step(Step::Put(object));
        }
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
    straight.zone = world.zone;
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
