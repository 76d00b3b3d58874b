//! What the control plane does, in numbers. Where kube-proxy measures the same,
//! the name is kube-proxy's (`pkg/proxy/metrics/metrics.go`), so that dashboards
//! go on working.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicI64, AtomicU64},
    time::{Duration, SystemTime},
};

use lb_common::service::FrontendKind;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family as Labelled,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use tracing::warn;

use crate::{
    datapath::Family,
    model::{Event, Kind, NamespacedName, Object, Policy},
    plan::{FrontendPlan, ServicePlan, Verdict},
    reconcile::{Drift, Report},
};

type Seconds = Gauge<f64, AtomicU64>;

/// What is measured where the maps are written. Copies count together.
#[derive(Clone, Debug)]
pub struct ControlMetrics {
    sync: Histogram,
    /// Of that, the first write of a run, which has everything in it; and the
    /// others.
    full_sync: Histogram,
    partial_sync: Histogram,
    is_full: bool,
    last_sync: Seconds,
    last_queued: Seconds,
    programming: Histogram,
    services: Changes,
    endpoints: Changes,
    no_local_endpoints: Labelled<NoLocal, Gauge>,
    writes: Counter,
    failed: Gauge,
    repairs: Repairs,
    verifications: Labelled<Verification, Counter>,
    started: SystemTime,
    /// Slices' triggers, until what they were written for is in the maps.
    triggers: BTreeMap<NamespacedName, Vec<SystemTime>>,
    /// Services of which some frontend has endpoints elsewhere only.
    nowhere_local: BTreeMap<NamespacedName, BTreeMap<NoLocal, i64>>,
}

/// What somebody else had changed in maps. Copies count together.
#[derive(Clone, Debug, Default)]
pub struct Repairs(Labelled<OfMap, Counter>);

impl Repairs {
    /// So many entries of a map were mended.
    pub fn count(&self, map: &'static str, entries: u64) {
        if entries > 0 {
            warn!(
                map,
                entries, "somebody else changed a map; it is as it should be again"
            );
            self.0.get_or_create(&OfMap { map }).inc_by(entries);
        }
    }
}

/// How a comparison of the maps with what they should hold ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Verification {
    result: &'static str,
}

/// Changes of one kind of objects.
#[derive(Clone, Debug, Default)]
struct Changes {
    total: Counter,
    pending: Gauge<i64, AtomicI64>,
}

/// Which policy finds nobody here.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
struct NoLocal {
    traffic_policy: &'static str,
    ip_family: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfMap {
    map: &'static str,
}

impl ControlMetrics {
    /// Makes them part of what `/metrics` tells.
    pub fn register(registry: &mut Registry) -> Self {
        let this = Self {
            // 1 ms to 16 s, as kube-proxy's.
            sync: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            full_sync: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            partial_sync: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            is_full: true,
            last_sync: Seconds::default(),
            last_queued: Seconds::default(),
            programming: Histogram::new(programming_buckets()),
            services: Changes::default(),
            endpoints: Changes::default(),
            no_local_endpoints: Labelled::default(),
            writes: Counter::default(),
            failed: Gauge::default(),
            repairs: Repairs::default(),
            verifications: Labelled::default(),
            started: SystemTime::now(),
            triggers: BTreeMap::new(),
            nowhere_local: BTreeMap::new(),
        };
        this.register_kube_proxys(registry.sub_registry_with_prefix("kubeproxy"));
        let own = registry.sub_registry_with_prefix("klb");
        own.register(
            "map_writes",
            "Entries of maps that were written or deleted",
            this.writes.clone(),
        );
        own.register(
            "services_failed",
            "Services that are not in the maps as they should be",
            this.failed.clone(),
        );
        own.register(
            "drift_repaired",
            "Entries of maps that somebody else had changed, and that were mended",
            this.repairs.0.clone(),
        );
        own.register(
            "verifications",
            "Comparisons of the maps with what they should hold, by result",
            this.verifications.clone(),
        );
        this
    }

    fn register_kube_proxys(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "sync_proxy_rules_duration",
            "How long a write of changes to the maps took",
            Unit::Seconds,
            self.sync.clone(),
        );
        registry.register_with_unit(
            "sync_full_proxy_rules_duration",
            "How long the first write took, of everything",
            Unit::Seconds,
            self.full_sync.clone(),
        );
        registry.register_with_unit(
            "sync_partial_proxy_rules_duration",
            "How long the writes after the first one took",
            Unit::Seconds,
            self.partial_sync.clone(),
        );
        registry.register_with_unit(
            "sync_proxy_rules_last_timestamp",
            "When changes were written last",
            Unit::Seconds,
            self.last_sync.clone(),
        );
        registry.register_with_unit(
            "sync_proxy_rules_last_queued_timestamp",
            "When a change was heard of last",
            Unit::Seconds,
            self.last_queued.clone(),
        );
        registry.register_with_unit(
            "network_programming_duration",
            "From the change of an endpoint to the maps",
            Unit::Seconds,
            self.programming.clone(),
        );
        for (name, changes) in [("service", &self.services), ("endpoint", &self.endpoints)] {
            registry.register(
                format!("sync_proxy_rules_{name}_changes"),
                "Changes heard of",
                changes.total.clone(),
            );
            registry.register(
                format!("sync_proxy_rules_{name}_changes_pending"),
                "Changes that are not written yet",
                changes.pending.clone(),
            );
        }
        registry.register(
            "sync_proxy_rules_no_local_endpoints_total",
            "Service ports with a policy Local and no endpoint on this node",
            self.no_local_endpoints.clone(),
        );
    }

    /// Something was heard. `told` is what a slice was written for when it was
    /// heard of last: an endpoint changes once, however often its slice is told.
    pub fn heard(&mut self, event: &Event, told: Option<SystemTime>) {
        let kind = match event {
            Event::Apply(Object::EndpointSlice(slice)) => {
                // What happened before says nothing about this agent.
                let trigger = slice.triggered.filter(|time| *time >= self.started);
                let trigger = trigger.filter(|time| Some(*time) != told);
                if let Some(trigger) = trigger {
                    let service = NamespacedName::new(slice.id.namespace(), &slice.service);
                    self.triggers.entry(service).or_default().push(trigger);
                }
                Kind::EndpointSlice
            }
            Event::Apply(object) => object.reference().kind,
            Event::Delete(object) => object.kind,
            Event::Unknown(_) | Event::Synced(_) => return,
        };
        let changes = match kind {
            Kind::Service => &self.services,
            Kind::EndpointSlice => &self.endpoints,
            Kind::Node | Kind::Pod | Kind::Namespace => return,
        };
        changes.total.inc();
        changes.pending.inc();
        self.last_queued.set(since_1970());
    }

    /// Plans were written.
    pub fn written(&mut self, plans: &[ServicePlan], report: &Report, took: Duration) {
        self.writes.inc_by(report.writes);
        self.sync.observe(took.as_secs_f64());
        let kind = if std::mem::take(&mut self.is_full) {
            &self.full_sync
        } else {
            &self.partial_sync
        };
        kind.observe(took.as_secs_f64());
        if report.failed.is_empty() || report.failed.len() < plans.len() {
            self.last_sync.set(since_1970());
        }
        let failed: BTreeSet<_> = report.failed.iter().map(|(service, _)| service).collect();
        let now = SystemTime::now();
        for plan in plans {
            self.count_local(plan);
            if failed.contains(&plan.service) {
                continue;
            }
            for trigger in self.triggers.remove(&plan.service).into_iter().flatten() {
                let took = now.duration_since(trigger).unwrap_or_default();
                self.programming.observe(took.as_secs_f64());
            }
        }
    }

    /// So many Services are not in the maps as they should be, after a write of
    /// all that was heard. Each counts as a change of its own that waits.
    pub fn failing(&self, services: usize) {
        let services = i64::try_from(services).unwrap_or(i64::MAX);
        self.failed.set(services);
        self.services.pending.set(services);
        self.endpoints.pending.set(0);
    }

    /// The maps were compared with what they should hold, if that could be.
    pub fn verified(&self, drift: Option<&Drift>) {
        let result = if drift.is_some() { "done" } else { "failed" };
        let counter = self.verifications.get_or_create(&Verification { result });
        counter.inc();
        for (map, entries) in drift.into_iter().flatten() {
            self.repairs.count(map, *entries);
        }
    }

    /// For those who own a map of their own.
    pub fn repairs(&self) -> Repairs {
        self.repairs.clone()
    }

    /// Something under each label, which a metric without samples does not tell.
    #[cfg(test)]
    pub(super) fn sample(&self) {
        self.verified(Some(&Drift::from([("klb_svc4", 1)])));
        let label = NoLocal {
            traffic_policy: "external",
            ip_family: "IPv4",
        };
        self.no_local_endpoints.get_or_create(&label).set(1);
    }

    fn count_local(&mut self, plan: &ServicePlan) {
        let now = nowhere_local(plan);
        let before = if now.is_empty() {
            self.nowhere_local.remove(&plan.service)
        } else {
            self.nowhere_local.insert(plan.service.clone(), now.clone())
        };
        for (label, ports) in before.into_iter().flatten() {
            self.no_local_endpoints.get_or_create(&label).dec_by(ports);
        }
        for (label, ports) in now {
            self.no_local_endpoints.get_or_create(&label).inc_by(ports);
        }
    }
}

/// Of how many ports of a Service which policy finds nobody here.
fn nowhere_local(plan: &ServicePlan) -> BTreeMap<NoLocal, i64> {
    let mut ports = BTreeMap::new();
    for port in &plan.ports {
        let labels: BTreeSet<_> = port.frontends.iter().filter_map(no_local).collect();
        for label in labels {
            *ports.entry(label).or_default() += 1;
        }
    }
    ports
}

fn no_local(frontend: &FrontendPlan) -> Option<NoLocal> {
    let traffic_policy = match frontend.kind {
        FrontendKind::Address => return None,
        FrontendKind::ClusterIp => "internal",
        FrontendKind::NodePort | FrontendKind::LoadBalancer | FrontendKind::ExternalIp => {
            "external"
        }
    };
    let ip_family = match Family::of(frontend.key.addr) {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    let is_missing = frontend.policy == Policy::Local && frontend.verdict == Verdict::Drop;
    is_missing.then_some(NoLocal {
        traffic_policy,
        ip_family,
    })
}

/// kube-proxy's: quarters of a second first, then seconds, then minutes.
fn programming_buckets() -> impl Iterator<Item = f64> {
    let steps = |first: u32, step: u32, count: u32| (0..count).map(move |n| first + n * step);
    let seconds = steps(1, 1, 59)
        .chain(steps(60, 5, 12))
        .chain(steps(120, 30, 7));
    [0.25, 0.5].into_iter().chain(seconds.map(f64::from))
}

fn since_1970() -> f64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use prometheus_client::encoding::text::encode;

    use super::*;
    use crate::{
        datapath::{FrontendKey, MapError},
        model::{EndpointSlice, ObjectRef, Protocol, ServicePort},
        plan::{Choice, PortPlan},
    };

    fn metrics() -> (Registry, ControlMetrics) {
        let mut registry = Registry::default();
        let metrics = ControlMetrics::register(&mut registry);
        (registry, metrics)
    }

    fn line(registry: &Registry, name: &str) -> Option<String> {
        let mut text = String::new();
        encode(&mut text, registry).expect("encoded");
        let mut lines = text.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map(str::to_owned)
    }

    fn plan(frontends: &[(FrontendKind, Policy, Verdict)]) -> ServicePlan {
        let frontend = |(index, (kind, policy, verdict)): (usize, &(_, _, _))| FrontendPlan {
            key: FrontendKey {
                addr: [10, 96, 0, index as u8].into(),
                port: 80,
                protocol: 6,
            },
            kind: *kind,
            policy: *policy,
            verdict: *verdict,
            backends: Arc::default(),
            inner: None,
            flags: 0,
        };
        ServicePlan {
            service: NamespacedName::new("default", "web"),
            ports: vec![PortPlan {
                port: ServicePort {
                    name: String::new(),
                    protocol: Protocol::Tcp,
                    port: 80,
                    node_port: None,
                },
                choice: Choice::Random,
                sources: BTreeSet::new(),
                frontends: frontends.iter().enumerate().map(frontend).collect(),
                alive: Arc::default(),
            }],
        }
    }

    #[test]
    fn ports_without_a_local_endpoint_are_counted_while_they_have_none() {
        use FrontendKind::{ClusterIp, LoadBalancer, NodePort};
        use Policy::{Cluster, Local};
        use Verdict::{Drop, Forward, Reject};
        let (registry, mut metrics) = metrics();
        let missing = |policy: &str| {
            let name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
            let labels = format!("{name}{{traffic_policy=\"{policy}\",ip_family=\"IPv4\"}}");
            line(&registry, &labels)
        };
        let mut write = |frontends: &[_]| {
            metrics.written(&[plan(frontends)], &Report::default(), Duration::ZERO);
        };
        write(&[
            (ClusterIp, Cluster, Forward),
            (NodePort, Local, Drop),
            (LoadBalancer, Local, Drop),
        ]);
        assert_eq!(
            missing("external").as_deref(),
            Some("1"),
            "a port counts once"
        );
        write(&[(ClusterIp, Local, Drop), (NodePort, Local, Reject)]);
        assert_eq!(
            missing("external").as_deref(),
            Some("0"),
            "there are none at all"
        );
        assert_eq!(missing("internal").as_deref(), Some("1"));
        write(&[]);
        assert_eq!(missing("internal").as_deref(), Some("0"));
    }

    #[test]
    fn a_change_is_pending_until_it_is_written() {
        let (registry, mut metrics) = metrics();
        let service = NamespacedName::new("default", "web");
        metrics.heard(&Event::Delete(ObjectRef::service(&service)), None);
        let pending = "kubeproxy_sync_proxy_rules_service_changes_pending";
        assert_eq!(line(&registry, pending).as_deref(), Some("1"));
        let error = MapError {
            operation: "write",
            map: "a map",
            source: std::io::ErrorKind::Other.into(),
        };
        let failed = Report {
            failed: vec![(service, error)],
            ..Report::default()
        };
        metrics.written(&[plan(&[])], &failed, Duration::ZERO);
        metrics.failing(1);
        let last = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
        assert_eq!(line(&registry, last).as_deref(), Some("0.0"));
        assert_eq!(line(&registry, pending).as_deref(), Some("1"));
        assert_eq!(line(&registry, "klb_services_failed").as_deref(), Some("1"));
        let report = Report {
            writes: 5,
            ..Report::default()
        };
        metrics.written(&[plan(&[])], &report, Duration::ZERO);
        metrics.failing(0);
        assert_ne!(line(&registry, last).as_deref(), Some("0.0"));
        assert_eq!(line(&registry, pending).as_deref(), Some("0"));
        let total = "kubeproxy_sync_proxy_rules_service_changes_total";
        assert_eq!(line(&registry, total).as_deref(), Some("1"));
        assert_eq!(
            line(&registry, "klb_map_writes_total").as_deref(),
            Some("5")
        );
        let syncs = "kubeproxy_sync_proxy_rules_duration_seconds_count";
        assert_eq!(line(&registry, syncs).as_deref(), Some("2"));
        for kind in ["full", "partial"] {
            let syncs = format!("kubeproxy_sync_{kind}_proxy_rules_duration_seconds_count");
            assert_eq!(line(&registry, &syncs).as_deref(), Some("1"), "{kind}");
        }
    }

    #[test]
    fn programming_is_measured_from_triggers_since_the_start() {
        let (registry, mut metrics) = metrics();
        let slice = |triggered| {
            Event::Apply(Object::EndpointSlice(EndpointSlice {
                id: NamespacedName::new("default", "web-1"),
                service: "web".to_owned(),
                family: Family::V4,
                ports: Vec::new(),
                endpoints: Vec::new(),
                triggered,
            }))
        };
        let long_ago = metrics.started - Duration::from_secs(1);
        let now = SystemTime::now();
        metrics.heard(&slice(None), None);
        metrics.heard(&slice(Some(long_ago)), None);
        metrics.heard(&slice(Some(now)), Some(long_ago));
        metrics.written(&[plan(&[])], &Report::default(), Duration::ZERO);
        metrics.written(&[plan(&[])], &Report::default(), Duration::ZERO);
        let count = "kubeproxy_network_programming_duration_seconds_count";
        assert_eq!(line(&registry, count).as_deref(), Some("1"));
        // A new list tells it once more, as does a change of something else.
        metrics.heard(&slice(Some(now)), Some(now));
        metrics.written(&[plan(&[])], &Report::default(), Duration::ZERO);
        assert_eq!(line(&registry, count).as_deref(), Some("1"));
    }

    #[test]
    fn what_was_mended_is_counted_by_map() {
        let (registry, metrics) = metrics();
        metrics.verified(Some(&Drift::from([("klb_svc4", 3)])));
        let repaired = "klb_drift_repaired_total{map=\"klb_svc4\"}";
        assert_eq!(line(&registry, repaired).as_deref(), Some("3"));
    }
}
