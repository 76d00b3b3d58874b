//! The cluster as far as it is known: objects by name, Services joined with
//! their slices, and which Services a change concerns.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::IpAddr,
    time::SystemTime,
};

use lb_common::service::FrontendKind;

use crate::{
    datapath::FrontendKey,
    health::{Checks, HealthCheck},
    model::{EndpointSlice, Event, Kind, NamespacedName, Object, ObjectRef, Service},
    plan::{NodeFacts, ServicePlan, Settings, plan},
    pods::Pods,
};

/// Everything that the sources told, and what of it is new.
#[derive(Debug, Default)]
pub struct Index {
    node: NodeFacts,
    /// In boxes: the nodes of such a map are half empty.
    services: BTreeMap<NamespacedName, Box<Service>>,
    /// By name of the Service; those of one in the order of their names.
    slices: BTreeMap<NamespacedName, Vec<EndpointSlice>>,
    /// Slice → its Service.
    slice_owners: BTreeMap<NamespacedName, NamespacedName>,
    /// The first of a key has it.
    claims: BTreeSet<(FrontendKey, Claim)>,
    /// Service → what it claims, in order.
    claimed: BTreeMap<NamespacedName, (Claim, Box<[FrontendKey]>)>,
    dirty: BTreeSet<NamespacedName>,
    /// Services that stay as they are in the maps, with their frontends there.
    held: BTreeMap<NamespacedName, BTreeSet<FrontendKey>>,
    pods: Pods,
    /// Whether this node is about to go, if there is such a Node.
    leaving: Option<bool>,
    checks: Checks,
}

/// A Service's wish for a frontend. The least one has it: the oldest Service,
/// and of two equally old ones the first by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    created: i64,
    service: NamespacedName,
}

impl Claim {
    /// One that no other goes before.
    fn first() -> Self {
        Self {
            created: i64::MIN,
            service: NamespacedName::new("", ""),
        }
    }
}

/// A frontend that a Service does not get because another one has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    pub key: FrontendKey,
    pub owner: NamespacedName,
}

impl Index {
    pub fn new(node_name: impl Into<String>, settings: Settings) -> Self {
        let node_name = node_name.into();
        Self {
            pods: Pods::new(&node_name),
            node: NodeFacts {
                name: node_name,
                settings,
                ..NodeFacts::default()
            },
            ..Self::default()
        }
    }

    /// Takes in an object, new or changed. One that is told again as it was, as
    /// all are by a new list, changes nothing.
    pub fn apply(&mut self, object: Object) {
        match object {
            Object::Service(service) => {
                let known = self.services.get(&service.id);
                if known.is_some_and(|known| **known == service) {
                    return;
                }
                self.dirty.insert(service.id.clone());
                self.services.insert(service.id.clone(), Box::new(service));
            }
            Object::EndpointSlice(slice) => {
                if self.slice(&slice.id) == Some(&slice) {
                    return;
                }
                // A slice may have moved to another Service.
                self.delete_slice(&slice.id);
                let service = NamespacedName::new(slice.id.namespace(), &slice.service);
                self.dirty.insert(service.clone());
                self.slice_owners.insert(slice.id.clone(), service.clone());
                let slices = self.slices.entry(service).or_default();
                let place = slices.partition_point(|other| other.id < slice.id);
                // Most Services have one.
                slices.reserve_exact(1);
                slices.insert(place, slice);
            }
            Object::Node(node) => {
                if node.name == self.node.name {
                    self.leaving = Some(node.leaving);
                    self.set_zone(node.zone);
                }
            }
            Object::Pod(pod) => self.pods.apply(pod),
            Object::Namespace(namespace) => self.pods.apply_namespace(namespace),
        }
    }

    fn slice(&self, id: &NamespacedName) -> Option<&EndpointSlice> {
        let service = self.slice_owners.get(id)?;
        self.slices
            .get(service)?
            .iter()
            .find(|slice| slice.id == *id)
    }

    /// What the slice that an event is about was written for when it was heard
    /// of last.
    pub fn trigger(&self, event: &Event) -> Option<SystemTime> {
        let Event::Apply(Object::EndpointSlice(slice)) = event else {
            return None;
        };
        self.slice(&slice.id)?.triggered
    }

    fn set_zone(&mut self, zone: Option<String>) {
        if self.node.zone != zone {
            self.node.zone = zone;
            self.dirty.extend(self.services.keys().cloned());
        }
    }

    /// Whether this node is about to go; `None` if there is no such Node.
    pub fn leaving(&self) -> Option<bool> {
        self.leaving
    }

    /// What load balancers ask for, as of the last [`Self::take_changes`].
    pub fn checks(&self) -> &Checks {
        &self.checks
    }

    /// The addresses of this node's pods whose sockets are to be left alone.
    pub fn opted_out(&self) -> BTreeSet<IpAddr> {
        self.pods.opted_out()
    }

    /// Forgets an object. Forgetting what is not known changes nothing.
    pub fn delete(&mut self, object: &ObjectRef) {
        match object.kind {
            Kind::Service => {
                self.services.remove(&object.id);
                self.dirty.insert(object.id.clone());
            }
            Kind::EndpointSlice => self.delete_slice(&object.id),
            Kind::Node => {
                if object.id.name() == self.node.name {
                    self.leaving = None;
                    self.set_zone(None);
                }
            }
            Kind::Pod => self.pods.delete(&object.id),
            Kind::Namespace => self.pods.delete_namespace(object.id.name()),
        }
    }

    fn delete_slice(&mut self, id: &NamespacedName) {
        let Some(service) = self.slice_owners.remove(id) else {
            return;
        };
        if let Entry::Occupied(mut slices) = self.slices.entry(service.clone()) {
            slices.get_mut().retain(|slice| slice.id != *id);
            if slices.get().is_empty() {
                slices.remove();
            }
        }
        self.dirty.insert(service);
    }

    /// Sets the addresses at which `NodePort`s answer.
    pub fn set_node_addresses(&mut self, addresses: BTreeSet<IpAddr>) {
        if self.node.addresses == addresses {
            return;
        }
        self.node.addresses = addresses;
        let affected = self
            .services
            .values()
            .filter(|service| service.concerns_node_addresses());
        self.dirty
            .extend(affected.map(|service| service.id.clone()));
    }

    /// Whether a Service is known, and where any of its endpoints are.
    pub fn knows_all_of(&self, service: &NamespacedName) -> bool {
        self.services.contains_key(service) && self.slices.contains_key(service)
    }

    /// Marks a Service for another try.
    pub fn mark(&mut self, service: NamespacedName) {
        self.dirty.insert(service);
    }

    /// Has these Services, and no others, stay as they are in the maps, with the
    /// frontends that they have there. Nothing is planned for them, and they
    /// claim nothing else. Returns those that are new among them.
    pub fn hold(
        &mut self,
        held: BTreeMap<NamespacedName, BTreeSet<FrontendKey>>,
    ) -> Vec<NamespacedName> {
        let is_new = |service: &&NamespacedName| !self.held.contains_key(*service);
        let new: Vec<_> = held.keys().filter(is_new).cloned().collect();
        let let_go = self
            .held
            .keys()
            .filter(|service| !held.contains_key(*service));
        self.dirty.extend(let_go.chain(&new).cloned());
        self.held = held;
        new
    }

    /// The Services that stay as they are in the maps.
    pub fn held(&self) -> impl Iterator<Item = &NamespacedName> {
        self.held.keys()
    }

    /// The Services that changed since the last call, with what the maps should
    /// say about them now; a Service that is gone has a plan without ports.
    ///
    /// A frontend that two Services claim is in the plan of one; the other's
    /// conflict is told beside it. A claim that is given up concerns the Service
    /// that gets the frontend then, so its plan is among the results too.
    pub fn take_changes(&mut self) -> Vec<(ServicePlan, Vec<Conflict>)> {
        let mut plans = BTreeMap::new();
        while let Some(id) = self.dirty.pop_first() {
            self.check(&id);
            // Services that another one gave a frontend to, or took one from,
            // became dirty by that; those planned already need no other plan.
            if let Some(keys) = self.held.get(&id) {
                self.claim(&id, &keys.clone());
            } else if let Entry::Vacant(place) = plans.entry(id) {
                let plan = self.plan(place.key());
                self.claim(&plan.service, &frontends(&plan));
                place.insert(plan);
            }
        }
        plans
            .into_values()
            .map(|plan| self.arbitrate(plan))
            .collect()
    }

    /// Looks what load balancers are to be told of a Service.
    fn check(&mut self, id: &NamespacedName) {
        let service = self.services.get(id);
        // Most have no port for it, and nobody looks at their slices.
        let asked = service.filter(|service| service.health_check_port.is_some());
        let check = asked
            .and_then(|service| HealthCheck::of(service, &self.slices_of(id), &self.node.name));
        match check {
            Some(check) => drop(self.checks.insert(id.clone(), check)),
            None => drop(self.checks.remove(id)),
        }
    }

    fn slices_of(&self, service: &NamespacedName) -> Vec<&EndpointSlice> {
        let slices = self.slices.get(service);
        slices.into_iter().flatten().collect()
    }

    fn plan(&self, id: &NamespacedName) -> ServicePlan {
        match self.services.get(id) {
            Some(service) => plan(service, &self.slices_of(id), &self.node),
            None => ServicePlan {
                service: id.clone(),
                ports: Vec::new(),
            },
        }
    }

    /// Replaces a Service's claims, and marks those whom the change concerns.
    fn claim(&mut self, service: &NamespacedName, new_keys: &BTreeSet<FrontendKey>) {
        let created = match self.services.get(service) {
            Some(service) => service.created,
            // Nobody knows, and it has them.
            None => i64::MIN,
        };
        let new = Claim {
            created,
            service: service.clone(),
        };
        let old = self.claimed.remove(service);
        let old_keys = old.iter().flat_map(|(_, keys)| keys);
        let keys: BTreeSet<_> = old_keys.chain(new_keys).copied().collect();
        for key in keys {
            let before = self.owner(&key).cloned();
            if let Some((old, _)) = &old {
                self.claims.remove(&(key, old.clone()));
            }
            if new_keys.contains(&key) {
                self.claims.insert((key, new.clone()));
            }
            let after = self.owner(&key);
            if before.as_ref() != after {
                let after = after.cloned();
                let concerned = before.into_iter().chain(after).map(|claim| claim.service);
                self.dirty
                    .extend(concerned.filter(|other| other != service));
            }
        }
        if !new_keys.is_empty() {
            let keys = new_keys.iter().copied().collect();
            self.claimed.insert(service.clone(), (new, keys));
        }
    }

    /// Whose a frontend is.
    fn owner(&self, key: &FrontendKey) -> Option<&Claim> {
        let claims = self.claims.range((*key, Claim::first())..);
        let mut claims = claims.take_while(|(other, _)| other == key);
        claims.next().map(|(_, claim)| claim)
    }

    /// Takes out of a plan what belongs to other Services.
    fn arbitrate(&self, mut plan: ServicePlan) -> (ServicePlan, Vec<Conflict>) {
        let mut conflicts = Vec::new();
        for port in &mut plan.ports {
            port.frontends.retain(|frontend| {
                let owner = self.owner(&frontend.key);
                let Some(other) = owner.filter(|owner| owner.service != plan.service) else {
                    return true;
                };
                // That several Services share an address is no conflict.
                if frontend.kind != FrontendKind::Address {
                    conflicts.push(Conflict {
                        key: frontend.key,
                        owner: other.service.clone(),
                    });
                }
                false
            });
        }
        (plan, conflicts)
    }
}

fn frontends(plan: &ServicePlan) -> BTreeSet<FrontendKey> {
    let ports = plan.ports.iter();
    ports
        .flat_map(|port| port.frontends.iter().map(|frontend| frontend.key))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        datapath::Family,
        model::{Endpoint, EndpointPort, Node, Policy, Protocol, ServicePort},
    };

    fn service(name: &str, ip: [u8; 4], created: i64, node_port: Option<u16>) -> Object {
        Object::Service(Service {
            id: NamespacedName::new("default", name),
            created,
            cluster_ips: vec![ip.into()],
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
                node_port,
            }],
        })
    }

    fn slice(name: &str, service: &str) -> Object {
        Object::EndpointSlice(EndpointSlice {
            id: NamespacedName::new("default", name),
            service: service.to_owned(),
            family: Family::V4,
            ports: Vec::new(),
            endpoints: Vec::new(),
            triggered: None,
        })
    }

    /// Without what is said of addresses.
    fn frontend_count(plan: &ServicePlan) -> usize {
        let keys = frontends(plan).into_iter();
        keys.filter(|key| key.port != 0).count()
    }

    /// Names of the Services that changed, with the number of their frontends.
    fn changes(index: &mut Index) -> Vec<(String, usize)> {
        let plans = index.take_changes().into_iter();
        plans
            .map(|(plan, _)| (plan.service.name().to_owned(), frontend_count(&plan)))
            .collect()
    }

    fn changed(name: &str, frontends: usize) -> (String, usize) {
        (name.to_owned(), frontends)
    }

    #[test]
    fn a_change_concerns_its_service_and_no_other() {
        let mut index = Index::new("node", Settings::default());
        index.apply(service("a", [10, 96, 0, 1], 0, None));
        index.apply(service("b", [10, 96, 0, 2], 0, None));
        assert_eq!(changes(&mut index), [changed("a", 1), changed("b", 1)]);
        assert_eq!(changes(&mut index), []);
        index.apply(slice("a-1", "a"));
        assert_eq!(changes(&mut index), [changed("a", 1)]);
        // A slice that moves concerns both.
        index.apply(slice("a-1", "b"));
        assert_eq!(changes(&mut index), [changed("a", 1), changed("b", 1)]);
        let reference = slice("a-1", "b").reference();
        index.delete(&reference);
        index.delete(&reference);
        assert_eq!(changes(&mut index), [changed("b", 1)]);
        index.delete(&service("a", [0; 4], 0, None).reference());
        assert_eq!(changes(&mut index), [changed("a", 0)]);
    }

    #[test]
    fn node_addresses_concern_node_ports_only() {
        let mut index = Index::new("node", Settings::default());
        index.apply(service("a", [10, 96, 0, 1], 0, None));
        index.apply(service("b", [10, 96, 0, 2], 0, Some(30080)));
        changes(&mut index);
        let addresses = BTreeSet::from([[192, 168, 50, 1].into(), [172, 16, 0, 1].into()]);
        index.set_node_addresses(addresses.clone());
        assert_eq!(changes(&mut index), [changed("b", 3)]);
        index.set_node_addresses(addresses);
        assert_eq!(changes(&mut index), []);
    }

    #[test]
    fn the_zone_of_this_node_concerns_all() {
        let mut index = Index::new("node", Settings::default());
        index.apply(service("a", [10, 96, 0, 1], 0, None));
        changes(&mut index);
        let node = |name: &str, zone: Option<&str>| {
            Object::Node(Node {
                name: name.to_owned(),
                zone: zone.map(str::to_owned),
                leaving: false,
            })
        };
        index.apply(node("other", Some("z")));
        assert_eq!(changes(&mut index), []);
        index.apply(node("node", Some("z")));
        assert_eq!(changes(&mut index), [changed("a", 1)]);
        index.delete(&node("node", None).reference());
        assert_eq!(changes(&mut index), [changed("a", 1)]);
    }

    #[test]
    fn what_balancers_ask_for_follows_services_and_slices() {
        let mut index = Index::new("node", Settings::default());
        let with_port = |port| match service("a", [10, 96, 0, 1], 3, None) {
            Object::Service(service) => Object::Service(Service {
                health_check_port: port,
                ..service
            }),
            other => other,
        };
        let seen = |index: &mut Index| {
            index.take_changes();
            let checks = index.checks().values();
            checks
                .map(|check| (check.port, check.local[&Family::V4]))
                .collect::<Vec<_>>()
        };
        index.apply(with_port(Some(30_000)));
        index.apply(service("b", [10, 96, 0, 2], 0, None));
        assert_eq!(seen(&mut index), [(30_000, 0)]);
        let Object::EndpointSlice(mut local) = slice("a-1", "a") else {
            panic!("a slice");
        };
        local.ports.push(EndpointPort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 3000,
        });
        local.endpoints.push(Endpoint {
            addr: [10, 244, 0, 1].into(),
            node: Some("node".into()),
            ready: true,
            serving: true,
            terminating: false,
            hints: None,
        });
        index.apply(Object::EndpointSlice(local));
        assert_eq!(seen(&mut index), [(30_000, 1)]);
        index.apply(with_port(Some(30_001)));
        assert_eq!(seen(&mut index), [(30_001, 1)]);
        index.delete(&slice("a-1", "a").reference());
        assert_eq!(seen(&mut index), [(30_001, 0)]);
        index.apply(with_port(None));
        assert_eq!(seen(&mut index), []);
        index.apply(with_port(Some(30_001)));
        index.take_changes();
        index.delete(&with_port(None).reference());
        assert_eq!(seen(&mut index), []);
    }

    #[test]
    fn of_nodes_this_one_alone_is_remembered() {
        let mut index = Index::new("node", Settings::default());
        let node = |name: &str, leaving| {
            Object::Node(Node {
                name: name.to_owned(),
                zone: None,
                leaving,
            })
        };
        assert_eq!(index.leaving(), None);
        index.apply(node("other", true));
        assert_eq!(index.leaving(), None);
        for leaving in [true, false, true] {
            index.apply(node("node", leaving));
            assert_eq!(index.leaving(), Some(leaving));
        }
        index.delete(&node("other", true).reference());
        assert_eq!(index.leaving(), Some(true));
        index.delete(&node("node", true).reference());
        assert_eq!(index.leaving(), None);
    }

    #[test]
    fn the_older_of_two_services_has_the_frontend_and_leaves_it_to_the_other() {
        let ip = [10, 96, 0, 1];
        let mut index = Index::new("node", Settings::default());
        index.apply(service("young", ip, 20, None));
        assert_eq!(changes(&mut index), [changed("young", 1)]);
        index.apply(service("old", ip, 10, None));
        let result = index.take_changes();
        let owners: Vec<_> = result
            .iter()
            .map(|(plan, conflicts)| {
                let owner = conflicts.first().map(|conflict| conflict.owner.name());
                (plan.service.name(), frontend_count(plan), owner)
            })
            .collect();
        assert_eq!(owners, [("old", 1, None), ("young", 0, Some("old"))]);
        index.delete(&service("old", ip, 10, None).reference());
        assert_eq!(
            changes(&mut index),
            [changed("old", 0), changed("young", 1)]
        );
    }
}
