//! How much memory the desired state takes, to the byte, and how often a change
//! asks for some: budgets, since a cluster's nodes have better uses for theirs.

mod objects;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::{BTreeMap, BTreeSet},
    hint::black_box,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use ipnet::IpNet;
use lb_common::service::{ServiceEntry, ServiceMeta};
use lb_userspace::{
    datapath::{Family, FrontendKey, MapError, Maps, SlotValue},
    index::Index,
    plan::{ServicePlan, Settings},
    reconcile::Reconciler,
};

use self::objects::{service, slice};

/// Counts what is in use, and how often more was asked for.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static ASKED: AtomicUsize = AtomicUsize::new(0);

/// The counters are of the whole process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

// SAFETY: everything is the system allocator's work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(block(layout.size()), Ordering::Relaxed);
        ASKED.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(block(layout.size()), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Bytes that glibc takes for so many: a word in front, in steps of two words.
fn block(size: usize) -> usize {
    (size + 8).next_multiple_of(16).max(32)
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Maps that hold nothing: theirs is the kernel's memory.
struct NoMaps;

impl Maps for NoMaps {
    fn services(&self) -> Result<BTreeMap<FrontendKey, ServiceEntry>, MapError> {
        Ok(BTreeMap::new())
    }
    fn put_service(&mut self, _: FrontendKey, _: &ServiceEntry) -> Result<(), MapError> {
        Ok(())
    }
    fn delete_service(&mut self, _: FrontendKey) -> Result<(), MapError> {
        Ok(())
    }
    fn slot_capacity(&self, _: Family) -> u32 {
        1 << 20
    }
    fn slot(&self, _: Family, _: u32) -> Result<SlotValue, MapError> {
        unreachable!("no entry leads to one")
    }
    fn put_slot(&mut self, _: Family, _: u32, _: &SlotValue) -> Result<(), MapError> {
        Ok(())
    }
    fn backends(&self) -> Result<BTreeMap<u32, u32>, MapError> {
        Ok(BTreeMap::new())
    }
    fn backend_capacity(&self) -> u32 {
        1 << 20
    }
    fn put_backend(&mut self, _: u32, _: u32) -> Result<(), MapError> {
        Ok(())
    }
    fn metas(&self) -> Result<BTreeMap<u32, ServiceMeta>, MapError> {
        Ok(BTreeMap::new())
    }
    fn put_meta(&mut self, _: u32, _: &ServiceMeta) -> Result<(), MapError> {
        Ok(())
    }
    fn delete_meta(&mut self, _: u32) -> Result<(), MapError> {
        Ok(())
    }
    fn ranges(&self) -> Result<BTreeSet<(u32, IpNet)>, MapError> {
        Ok(BTreeSet::new())
    }
    fn put_range(&mut self, _: u32, _: IpNet) -> Result<(), MapError> {
        Ok(())
    }
    fn delete_range(&mut self, _: u32, _: IpNet) -> Result<(), MapError> {
        Ok(())
    }
    fn cluster_network(&self, _: Family) -> Result<Option<IpNet>, MapError> {
        Ok(None)
    }
    fn put_cluster_network(&mut self, _: IpNet) -> Result<(), MapError> {
        Ok(())
    }
}

/// Bytes for each Service: of the index, and of the memory of what was written.
fn footprint(services: u32, endpoints: u32) -> (usize, usize) {
    let before = IN_USE.load(Ordering::Relaxed);
    let mut index = Index::new("node", Settings::default());
    for number in 0..services {
        index.apply(service(number));
        index.apply(slice(number, 0..endpoints));
    }
    let plans: Vec<ServicePlan> = index
        .take_changes()
        .into_iter()
        .map(|(plan, _)| plan)
        .collect();
    let planned = IN_USE.load(Ordering::Relaxed);
    let mut reconciler = Reconciler::restore(NoMaps).expect("nothing to read");
    let report = reconciler.apply(&plans, Instant::now());
    assert!(report.failed.is_empty());
    let written = IN_USE.load(Ordering::Relaxed);
    drop(plans);
    let without_plans = IN_USE.load(Ordering::Relaxed);
    let of_plans = written - without_plans;
    black_box((&index, &reconciler));
    let services = services as usize;
    (
        (planned - before - of_plans) / services,
        (written - planned) / services,
    )
}

#[test]
fn a_service_takes_no_more_than_it_may() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (services, endpoints, index, reconciler) in
        [(10_000, 10, 2_200, 1_440), (2_000, 100, 9_500, 9_600)]
    {
        let taken = footprint(services, endpoints);
        println!("{services} × {endpoints}: {taken:?}");
        assert!(
            taken.0 <= index && taken.1 <= reconciler,
            "{services} × {endpoints}: {taken:?}"
        );
    }
}

/// How often a change of all endpoints of one Service, of so many, asks for
/// memory: from the decoded event to the last write.
fn allocations_of_a_change(services: u32) -> usize {
    const ENDPOINTS: u32 = 3;
    let mut index = Index::new("node", Settings::default());
    for number in 0..services {
        index.apply(service(number));
        index.apply(slice(number, 0..ENDPOINTS));
    }
    let mut reconciler = Reconciler::restore(NoMaps).expect("nothing to read");
    let mut write = |index: &mut Index| {
        let changes = index.take_changes().into_iter();
        let plans: Vec<ServicePlan> = changes.map(|(plan, _)| plan).collect();
        let report = reconciler.apply(&plans, Instant::now());
        assert!(report.failed.is_empty());
    };
    write(&mut index);
    let changed = slice(services / 2, 50..50 + ENDPOINTS);
    let before = ASKED.load(Ordering::Relaxed);
    index.apply(changed);
    write(&mut index);
    ASKED.load(Ordering::Relaxed) - before
}

#[test]
fn a_change_asks_for_memory_as_often_whatever_the_size() {
    // A node of a map may be split where the change falls.
    const SPREAD: usize = 8;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let counts = [1_000, 10_000, 50_000].map(allocations_of_a_change);
    println!("{counts:?}");
    assert!(counts.iter().all(|count| *count <= 60), "{counts:?}");
    let (least, most) = (counts.iter().min(), counts.iter().max());
    let spread = most.zip(least).map(|(most, least)| most - least);
    assert!(spread <= Some(SPREAD), "{counts:?}");
}
