//! One Service and its endpoints → what the maps should say about it. Pure.
//!
//! Which endpoints a frontend leads to is kube-proxy's `CategorizeEndpoints`
//! (`pkg/proxy/topology.go`); the names are the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use lb_common::service::FrontendKind;

use crate::{
    datapath::{Family, FrontendKey},
    model::{Endpoint, EndpointSlice, NamespacedName, Policy, Service, ServicePort},
};

/// What is to be known of the node on which klb runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    pub name: String,
    pub zone: Option<String>,
    /// Addresses at which `NodePort`s answer.
    pub addresses: BTreeSet<IpAddr>,
}

/// A backend of one Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend {
    pub addr: SocketAddr,
    /// It runs on this node.
    pub local: bool,
}

/// What becomes of a client's first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Forward,
    /// No backend anywhere: refuse.
    Reject,
    /// A `Local` policy, and backends elsewhere only: drop.
    Drop,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendPlan {
    pub key: FrontendKey,
    pub kind: FrontendKind,
    pub policy: Policy,
    pub verdict: Verdict,
    /// In order; empty unless the verdict is to forward.
    pub backends: Vec<Backend>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPlan {
    pub port: ServicePort,
    pub frontends: Vec<FrontendPlan>,
    /// Every endpoint that still answers, whether or not new flows may go
    /// there: established UDP flows stay with these, and leave all others.
    pub alive: BTreeSet<Backend>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    pub service: NamespacedName,
    pub ports: Vec<PortPlan>,
}

/// What the maps should say about a Service.
pub fn plan(service: &Service, slices: &[&EndpointSlice], node: &NodeFacts) -> ServicePlan {
    // An address may be external IP, load balancer's and the node's at once; the
    // first that claims it has it.
    let mut claimed = BTreeSet::new();
    let ports = service.ports.iter().map(|port| {
        let mut result = PortPlan {
            port: port.clone(),
            frontends: Vec::new(),
            alive: BTreeSet::new(),
        };
        for family in Family::ALL {
            if let Some(cluster_ip) = service.cluster_ip(family) {
                let endpoints = collect(slices, port, family);
                plan_family(service, cluster_ip, &endpoints, node, &mut result);
            }
        }
        result
            .frontends
            .retain(|frontend| claimed.insert(frontend.key));
        result
    });
    ServicePlan {
        service: service.id.clone(),
        ports: ports.collect(),
    }
}

/// Frontends of one port in the family of its `ClusterIP`.
fn plan_family(
    service: &Service,
    cluster_ip: IpAddr,
    endpoints: &Endpoints<'_>,
    node: &NodeFacts,
    result: &mut PortPlan,
) {
    let family = Family::of(cluster_ip);
    let lists = categorize(service, endpoints, node);
    let port = &result.port;
    let mut add = |kind, addr, number, policy| {
        let (verdict, backends) = lists.choose(policy);
        result.frontends.push(FrontendPlan {
            key: FrontendKey {
                addr,
                port: number,
                protocol: port.protocol.number(),
            },
            kind,
            policy,
            verdict,
            backends,
        });
    };
    let of_family = |ip: &&IpAddr| Family::of(**ip) == family;
    let (internal, external) = (service.internal_policy, service.external_policy);
    add(FrontendKind::ClusterIp, cluster_ip, port.port, internal);
    for ip in service.external_ips.iter().filter(of_family) {
        add(FrontendKind::ExternalIp, *ip, port.port, external);
    }
    for ip in service.load_balancer_ips.iter().filter(of_family) {
        add(FrontendKind::LoadBalancer, *ip, port.port, external);
    }
    if let Some(node_port) = port.node_port {
        for ip in node.addresses.iter().filter(of_family) {
            add(FrontendKind::NodePort, *ip, node_port, external);
        }
    }
    let alive = endpoints.iter().filter(|(_, endpoint)| endpoint.serving);
    result
        .alive
        .extend(alive.map(|(addr, endpoint)| backend(*addr, endpoint, node)));
}

/// Endpoints of one port and family, by address.
type Endpoints<'a> = BTreeMap<SocketAddr, &'a Endpoint>;

/// The endpoints of a port by its name. An address that occurs twice counts
/// once: one that is not terminating beats one that is, else the later wins.
fn collect<'a>(slices: &[&'a EndpointSlice], port: &ServicePort, family: Family) -> Endpoints<'a> {
    let mut endpoints = Endpoints::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        let matching = slice
            .ports
            .iter()
            .filter(|other| other.name == port.name && other.protocol == port.protocol);
        for number in matching.map(|port| port.port) {
            for endpoint in &slice.endpoints {
                let known = endpoints
                    .entry(SocketAddr::new(endpoint.addr, number))
                    .or_insert(endpoint);
                if known.terminating || !endpoint.terminating {
                    *known = endpoint;
                }
            }
        }
    }
    endpoints
}

fn backend(addr: SocketAddr, endpoint: &Endpoint, node: &NodeFacts) -> Backend {
    Backend {
        addr,
        local: endpoint.node.as_ref() == Some(&node.name),
    }
}

/// The lists that policies choose from.
struct Lists {
    cluster: Vec<Backend>,
    local: Vec<Backend>,
    /// There is an endpoint that some node may use.
    has_any: bool,
}

impl Lists {
    fn choose(&self, policy: Policy) -> (Verdict, Vec<Backend>) {
        let list = match policy {
            Policy::Cluster => &self.cluster,
            Policy::Local => &self.local,
        };
        let verdict = match (list.is_empty(), self.has_any) {
            (false, _) => Verdict::Forward,
            (true, true) => Verdict::Drop,
            (true, false) => Verdict::Reject,
        };
        (verdict, list.clone())
    }
}

fn categorize(service: &Service, endpoints: &Endpoints<'_>, node: &NodeFacts) -> Lists {
    let uses_cluster =
        service.internal_policy == Policy::Cluster || service.is_externally_accessible();
    let uses_local =
        service.internal_policy == Policy::Local || service.external_policy == Policy::Local;
    let select = |wanted: &dyn Fn(&Endpoint) -> bool| -> Vec<Backend> {
        let chosen = endpoints.iter().filter(|(_, endpoint)| wanted(endpoint));
        chosen
            .map(|(addr, endpoint)| backend(*addr, endpoint, node))
            .collect()
    };
    let is_local = |endpoint: &Endpoint| endpoint.node.as_ref() == Some(&node.name);
    let is_draining = |endpoint: &Endpoint| endpoint.serving && endpoint.terminating;

    let mut lists = Lists {
        cluster: Vec::new(),
        local: Vec::new(),
        has_any: false,
    };
    if uses_cluster {
        let topology = Topology::of(endpoints, node);
        lists.cluster = select(&|endpoint| endpoint.ready && topology.allows(endpoint, node));
        if lists.cluster.is_empty() {
            lists.cluster = select(&is_draining);
        }
        lists.has_any = !lists.cluster.is_empty();
    }
    if uses_local {
        let usable = |endpoint: &Endpoint| endpoint.ready || is_draining(endpoint);
        lists.has_any |= endpoints.values().any(|endpoint| usable(endpoint));
        lists.local = select(&|endpoint| endpoint.ready && is_local(endpoint));
        if lists.local.is_empty() {
            lists.local = select(&|endpoint| is_draining(endpoint) && is_local(endpoint));
        }
    }
    lists
}

/// Which hints are in force (`topologyModeFromHints`).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Topology {
    Ignored,
    SameNode,
    SameZone,
}

impl Topology {
    fn of(endpoints: &Endpoints<'_>, node: &NodeFacts) -> Self {
        let ready = || endpoints.values().filter(|endpoint| endpoint.ready);
        if ready().next().is_none() {
            return Self::Ignored;
        }
        // Hints are obeyed only where every endpoint has one: else the
        // controller is in the middle of writing or removing them.
        let in_force = |mode: Self, has_hint: fn(&Endpoint) -> bool| {
            ready().all(|endpoint| has_hint(endpoint))
                && ready().any(|endpoint| mode.allows(endpoint, node))
        };
        if in_force(Self::SameNode, |endpoint| !endpoint.hints.nodes.is_empty()) {
            Self::SameNode
        } else if in_force(Self::SameZone, |endpoint| !endpoint.hints.zones.is_empty()) {
            Self::SameZone
        } else {
            Self::Ignored
        }
    }

    fn allows(self, endpoint: &Endpoint, node: &NodeFacts) -> bool {
        match self {
            Self::Ignored => true,
            Self::SameNode => endpoint.hints.nodes.contains(&node.name),
            Self::SameZone => {
                let zone = node.zone.as_ref();
                zone.is_some_and(|zone| endpoint.hints.zones.contains(zone))
            }
        }
    }
}

#[cfg(test)]
mod tests;
