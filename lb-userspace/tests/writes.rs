//! How many entries a change writes: by the Service that it is of, however many
//! others there are.

mod objects;

use std::{collections::BTreeSet, time::Instant};

use lb_userspace::{
    datapath::memory::MemoryMaps,
    index::Index,
    plan::{ServicePlan, Settings},
    reconcile::Reconciler,
};

use self::objects::{service, slice};

/// Index and maps of many Services, with five endpoints each.
struct Cluster {
    index: Index,
    reconciler: Reconciler<MemoryMaps>,
}

impl Cluster {
    fn new(services: u32) -> Self {
        let maps = MemoryMaps {
            service_capacity: usize::MAX,
            slot_capacity: 1 << 20,
            backend_capacity: 1 << 20,
            ..MemoryMaps::default()
        };
        let mut this = Self {
            index: Index::new("node", Settings::default()),
            reconciler: Reconciler::restore(maps).expect("memory can be read"),
        };
        for number in 0..services {
            this.index.apply(service(number));
            this.index.apply(slice(number, 0..5));
        }
        this.write();
        this
    }

    /// Writes what has changed: the plans, and the number of entries.
    fn write(&mut self) -> (Vec<ServicePlan>, u64) {
        let changes = self.index.take_changes().into_iter();
        let plans: Vec<_> = changes.map(|(plan, _)| plan).collect();
        let report = self.reconciler.apply(&plans, Instant::now());
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        (plans, report.writes)
    }
}

#[test]
fn a_changed_slice_writes_what_is_its_services() {
    let mut clusters = [1_000, 50_000].map(Cluster::new);
    let mut before: BTreeSet<u32> = (0..5).collect();
    for after in [
        BTreeSet::from([0, 1, 2, 3, 5]),
        (0..90).collect(),
        (0..100).collect(),
        (50..60).collect(),
        (60..70).collect(),
        BTreeSet::new(),
        BTreeSet::from([1]),
    ] {
        let came = after.difference(&before).count();
        let went = before.difference(&after).count();
        let written = clusters.each_mut().map(|cluster| {
            cluster.index.apply(slice(7, after.iter().copied()));
            let (plans, writes) = cluster.write();
            assert_eq!(plans.len(), 1, "one Service has changed");
            let ports = &plans[0].ports;
            let frontends: usize = ports.iter().map(|port| port.frontends.len()).sum();
            // A slot for each endpoint, an entry for each frontend, and the one
            // thing more: a number for each backend that came or went.
            let exactly = after.len() + frontends + came + went;
            assert_eq!(writes, exactly as u64, "{before:?} to {after:?}");
            writes
        });
        assert_eq!(written[0], written[1], "{before:?} to {after:?}");
        before = after;
    }
}
