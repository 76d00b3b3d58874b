//! Whether the maps follow the cluster, and whether the node is to get traffic.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant, SystemTime},
};

use serde::Serialize;
use tokio::sync::watch;

use super::{checks::Checks, http::Answer};
use crate::{datapath::Family, model::NamespacedName, plan::ServicePlan};

/// An update that waits for so long to be written makes its families unhealthy:
/// two of kube-proxy's periods.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What Go calls a time that was never set.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// How far the maps are, as probes see it.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// The node stays in the cluster, as far as is known.
    eligible: bool,
    families: BTreeMap<Family, FamilyProgress>,
}

#[derive(Clone, Copy, Debug, Default)]
struct FamilyProgress {
    /// When all that was known had been written last.
    updated: Option<SystemTime>,
    /// Since when the oldest of the updates waits that are not.
    waiting: Option<Instant>,
}

/// Whether there is a Node object to go by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodeObject {
    /// A node without one is no part of the cluster.
    #[default]
    Required,
    /// A node without one is as good as any: a folder of manifests need not have
    /// it.
    Optional,
}

impl NodeObject {
    /// Whether load balancers may send traffic to the node. `leaving` says
    /// whether it is about to go; `None` if there is no such object.
    fn is_eligible(self, leaving: Option<bool>) -> bool {
        match leaving {
            Some(leaving) => !leaving,
            None => self == Self::Optional,
        }
    }
}

/// Tells what the servers answer by. Belongs to the task that writes the maps.
#[derive(Debug, Default)]
pub struct Reporter {
    node: NodeObject,
    progress: watch::Sender<Progress>,
    checks: watch::Sender<Checks>,
    waiting: BTreeMap<NamespacedName, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    since: Instant,
    families: BTreeSet<Family>,
}

/// What the servers answer by.
#[derive(Clone, Debug)]
pub struct View {
    pub(super) progress: watch::Receiver<Progress>,
    pub(super) checks: watch::Receiver<Checks>,
}

impl View {
    /// Whether at a moment no update waits for too long.
    pub fn is_healthy(&self, now: Now) -> bool {
        self.progress.borrow().is_healthy(now)
    }
}

impl Reporter {
    pub fn new(node: NodeObject) -> Self {
        Self {
            node,
            ..Self::default()
        }
    }

    pub fn view(&self) -> View {
        View {
            progress: self.progress.subscribe(),
            checks: self.checks.subscribe(),
        }
    }

    /// The Services' plans are about to be written.
    pub fn begin(&mut self, plans: &[ServicePlan]) {
        let now = Instant::now();
        for plan in plans {
            let waiting = self.waiting.entry(plan.service.clone());
            let waiting = waiting.or_insert_with(|| Waiting {
                since: now,
                families: BTreeSet::new(),
            });
            waiting.families.append(&mut families(plan));
        }
        self.publish();
    }

    /// They were written, except for those that failed and will be tried again.
    pub fn finish(&mut self, failed: &BTreeSet<NamespacedName>) {
        self.waiting.retain(|service, _| failed.contains(service));
        let now = SystemTime::now();
        self.progress.send_modify(|progress| {
            for family in Family::ALL {
                let progress = progress.families.entry(family).or_default();
                if !self
                    .waiting
                    .values()
                    .any(|waiting| waiting.families.contains(&family))
                {
                    progress.updated = Some(now);
                }
            }
        });
        self.publish();
    }

    fn publish(&self) {
        self.progress.send_modify(|progress| {
            for family in Family::ALL {
                let waiting = self.waiting.values();
                let waiting = waiting.filter(|waiting| waiting.families.contains(&family));
                let since = waiting.map(|waiting| waiting.since).min();
                progress.families.entry(family).or_default().waiting = since;
            }
        });
    }

    /// What is known of the node, and what load balancers ask for.
    pub fn tell(&self, leaving: Option<bool>, checks: &Checks) {
        let eligible = self.node.is_eligible(leaving);
        self.progress
            .send_modify(|progress| progress.eligible = eligible);
        self.checks.send_if_modified(|told| {
            let changed = told != checks;
            if changed {
                told.clone_from(checks);
            }
            changed
        });
    }
}

/// In which families a plan changes something. Whose frontends are gone may have
/// had any.
fn families(plan: &ServicePlan) -> BTreeSet<Family> {
    let frontends = plan.ports.iter().flat_map(|port| &port.frontends);
    let families: BTreeSet<_> = frontends
        .map(|frontend| Family::of(frontend.key.addr))
        .collect();
    if families.is_empty() {
        return BTreeSet::from(Family::ALL);
    }
    families
}

/// A moment: of the clock that measures how long something took, and of the one
/// on the wall.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    pub instant: Instant,
    pub time: SystemTime,
}

impl Now {
    pub fn get() -> Self {
        Self {
            instant: Instant::now(),
            time: SystemTime::now(),
        }
    }
}

/// The body of `/healthz` and `/livez`, in kube-proxy's words.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Health {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    status: BTreeMap<&'static str, FamilyHealth>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyHealth {
    last_updated: String,
    healthy: bool,
}

impl FamilyProgress {
    fn is_healthy(self, now: Now) -> bool {
        self.waiting
            .is_none_or(|since| now.instant.saturating_duration_since(since) <= TIMEOUT)
    }

    /// Now, if all is well: that is what kube-proxy says since it writes only
    /// what has changed.
    fn updated(self, now: Now) -> Option<SystemTime> {
        if self.is_healthy(now) {
            Some(now.time)
        } else {
            self.updated
        }
    }
}

impl Progress {
    /// Whether no update waits for too long, whatever becomes of the node.
    pub(super) fn is_healthy(&self, now: Now) -> bool {
        let mut families = self.families.values();
        families.all(|family| family.is_healthy(now))
    }

    /// What `/healthz` answers: whether the node is to get traffic.
    pub(super) fn healthz(&self, now: Now) -> Answer {
        let health = Health {
            node_eligible: Some(self.eligible),
            ..self.health(now)
        };
        Answer::health(health.healthy && self.eligible, &health)
    }

    /// What `/livez` answers: whether the agent does its work.
    pub(super) fn livez(&self, now: Now) -> Answer {
        let health = self.health(now);
        Answer::health(health.healthy, &health)
    }

    fn health(&self, now: Now) -> Health {
        let families = self.families.iter();
        // The oldest, as of all updates that wait.
        let updated = families.clone().map(|(_, family)| family.updated(now));
        let status = families.map(|(family, progress)| {
            let name = match family {
                Family::V4 => "IPv4",
                Family::V6 => "IPv6",
            };
            let health = FamilyHealth {
                last_updated: timestamp(progress.updated(now)),
                healthy: progress.is_healthy(now),
            };
            (name, health)
        });
        Health {
            last_updated: timestamp(updated.min().unwrap_or(Some(now.time))),
            current_time: timestamp(Some(now.time)),
            node_eligible: None,
            healthy: self.is_healthy(now),
            status: status.collect(),
        }
    }
}

fn timestamp(time: Option<SystemTime>) -> String {
    time.map_or_else(
        || NEVER.to_owned(),
        |time| humantime::format_rfc3339_nanos(time).to_string(),
    )
}

#[cfg(test)]
mod tests {
    use hyper::{StatusCode, header::CONTENT_TYPE};
    use serde_json::{Value, json};

    use super::*;

    const SERVICE: &str = "s";

    fn plan(families: &[Family]) -> ServicePlan {
        use crate::{
            model::{Policy, Protocol, ServicePort},
            plan::{Choice, FrontendPlan, PortPlan, Verdict},
        };
        let frontends = families.iter().map(|family| FrontendPlan {
            key: crate::datapath::FrontendKey {
                addr: match family {
                    Family::V4 => [10, 96, 0, 1].into(),
                    Family::V6 => [0xfd00, 0, 0, 0, 0, 0, 0, 1].into(),
                },
                port: 80,
                protocol: Protocol::Tcp.number(),
            },
            kind: lb_common::service::FrontendKind::ClusterIp,
            policy: Policy::Cluster,
            verdict: Verdict::Reject,
            backends: Vec::new().into(),
            inner: None,
            flags: 0,
        });
        let port = PortPlan {
            port: ServicePort {
                name: String::new(),
                protocol: Protocol::Tcp,
                port: 80,
                node_port: None,
            },
            choice: Choice::Random,
            sources: BTreeSet::new(),
            frontends: frontends.collect(),
            alive: Vec::new().into(),
        };
        ServicePlan {
            service: NamespacedName::new("default", SERVICE),
            ports: vec![port],
        }
    }

    fn json(answer: &Answer) -> Value {
        serde_json::from_slice(&answer.body).expect("JSON")
    }

    fn failed() -> BTreeSet<NamespacedName> {
        BTreeSet::from([NamespacedName::new("default", SERVICE)])
    }

    /// Now, and some seconds later.
    fn after(seconds: u64) -> Now {
        let now = Now::get();
        let passed = Duration::from_secs(seconds);
        Now {
            instant: now.instant + passed,
            time: now.time + passed,
        }
    }

    #[test]
    fn a_node_is_eligible_unless_it_leaves_or_is_not_there() {
        use NodeObject::{Optional, Required};
        for (object, leaving, eligible) in [
            (Required, Some(false), true),
            (Required, Some(true), false),
            (Required, None, false),
            (Optional, Some(false), true),
            (Optional, Some(true), false),
            (Optional, None, true),
        ] {
            assert_eq!(
                object.is_eligible(leaving),
                eligible,
                "{object:?} {leaving:?}"
            );
            let mut reporter = Reporter::new(object);
            reporter.tell(leaving, &Checks::new());
            reporter.finish(&BTreeSet::new());
            let progress = reporter.view().progress.borrow().clone();
            let status = if eligible { 200 } else { 503 };
            let healthz = progress.healthz(after(0));
            assert_eq!(healthz.status.as_u16(), status, "{object:?} {leaving:?}");
            assert_eq!(json(&healthz)["nodeEligible"], eligible);
            assert_eq!(json(&healthz)["healthy"], true);
            let livez = progress.livez(after(0));
            assert_eq!(livez.status, StatusCode::OK, "the node does not matter");
            assert_eq!(json(&livez).get("nodeEligible"), None);
        }
    }

    #[test]
    fn nothing_is_said_of_a_node_before_it_is_known() {
        let view = Reporter::new(NodeObject::Optional).view();
        let progress = view.progress.borrow();
        assert_eq!(progress.healthz(after(0)).status.as_u16(), 503);
        assert_eq!(progress.livez(after(0)).status.as_u16(), 200);
        assert_eq!(json(&progress.livez(after(0))).get("status"), None);
    }

    #[test]
    fn the_body_is_kube_proxys() {
        let now = Now {
            instant: Instant::now(),
            time: SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 5),
        };
        let progress = Progress {
            eligible: true,
            families: Family::ALL
                .map(|family| (family, FamilyProgress::default()))
                .into(),
        };
        let answer = progress.healthz(now);
        let time = "2023-11-14T22:13:20.000000005Z";
        let family = json!({ "lastUpdated": time, "healthy": true });
        let body = json!({
            "lastUpdated": time,
            "currentTime": time,
            "nodeEligible": true,
            "healthy": true,
            "status": { "IPv4": family, "IPv6": family },
        });
        assert_eq!(json(&answer), body);
        let headers: BTreeMap<_, _> = answer
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.to_str().expect("text")))
            .collect();
        assert_eq!(headers[CONTENT_TYPE.as_str()], "application/json");
        assert_eq!(headers["x-content-type-options"], "nosniff");
    }

    #[test]
    fn an_update_that_waits_for_a_minute_makes_its_families_unhealthy() {
        for (families, seconds, v4, v6) in [
            (&[Family::V4][..], 59, true, true),
            (&[Family::V4], 61, false, true),
            (&[Family::V6], 61, true, false),
            (&[Family::V4, Family::V6], 61, false, false),
            // Gone: it may have had either.
            (&[], 61, false, false),
        ] {
            let mut reporter = Reporter::default();
            reporter.tell(Some(false), &Checks::new());
            reporter.begin(&[plan(families)]);
            let progress = reporter.view().progress.borrow().clone();
            let now = after(seconds);
            let answer = progress.livez(now);
            let body = json(&answer);
            let healthy = v4 && v6;
            assert_eq!(answer.status.is_success(), healthy, "{body}");
            assert_eq!(body["status"]["IPv4"]["healthy"], v4, "{families:?} {body}");
            assert_eq!(body["status"]["IPv6"]["healthy"], v6, "{families:?} {body}");
            assert_eq!(body["healthy"], healthy);
            let time = humantime::format_rfc3339_nanos(now.time).to_string();
            let last = if healthy { &time } else { NEVER };
            assert_eq!(body["lastUpdated"], last);
            assert_eq!(progress.healthz(now).status.is_success(), healthy);
        }
    }

    #[test]
    fn a_retry_does_not_make_an_update_younger_and_a_success_ends_it() {
        let mut reporter = Reporter::default();
        let healthy = |reporter: &Reporter| {
            let view = reporter.view();
            let progress = view.progress.borrow();
            progress.is_healthy(after(61))
        };
        reporter.begin(&[plan(&Family::ALL)]);
        let since = reporter.waiting.values().next().expect("it waits").since;
        reporter.finish(&failed());
        reporter.begin(&[plan(&Family::ALL)]);
        let waiting = reporter.waiting.values().next().expect("it waits");
        assert_eq!(waiting.since, since);
        assert!(!healthy(&reporter));
        reporter.finish(&BTreeSet::new());
        assert!(healthy(&reporter));
    }

    #[test]
    fn an_unhealthy_family_says_when_it_was_up_to_date() {
        let mut reporter = Reporter::default();
        reporter.begin(&[plan(&[Family::V4])]);
        reporter.finish(&BTreeSet::new());
        let updated = reporter.view().progress.borrow().families[&Family::V4].updated;
        reporter.begin(&[plan(&[Family::V4])]);
        reporter.finish(&failed());
        let body = json(&reporter.view().progress.borrow().livez(after(61)));
        assert_eq!(body["status"]["IPv4"]["lastUpdated"], timestamp(updated));
        assert_eq!(body["lastUpdated"], timestamp(updated));
        assert_eq!(body["status"]["IPv6"]["lastUpdated"], body["currentTime"]);
    }
}
