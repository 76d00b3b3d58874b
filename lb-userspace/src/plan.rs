//! One Service and its endpoints → what the maps should say about it. Pure.
//!
//! Which endpoints a frontend leads to is kube-proxy's `CategorizeEndpoints`
//! (`pkg/proxy/topology.go`); the names are the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::service::{FRONTEND_ECHO, FRONTEND_REFUSE, FRONTEND_SOURCE_RANGES, FrontendKind};

use crate::{
    datapath::{Family, FrontendKey},
    maglev,
    model::{
        Algorithm, Endpoint, EndpointSlice, Hints, NamespacedName, Policy, Service, ServicePort,
    },
};

/// What the operator wants of all Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    pub algorithm: Algorithm,
    /// Slots of a Maglev table; a prime.
    pub maglev_table: u32,
    pub ping: Ping,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::Random,
            maglev_table: maglev::DEFAULT_SIZE,
            ping: Ping::LoadBalancer,
        }
    }
}

/// Which addresses of Services that have endpoints answer pings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Ping {
    /// Those of load balancers
    LoadBalancer,
    /// Those, and every `ClusterIP`
    All,
    /// None
    Off,
}

/// What is to be known of the node on which klb runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    pub name: String,
    pub zone: Option<String>,
    /// Addresses at which `NodePort`s answer.
    pub addresses: BTreeSet<IpAddr>,
    pub settings: Settings,
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

/// How one of the backends is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    Random,
    /// At random, and then the same for so many seconds.
    Affinity(u32),
    /// By a table of so many slots.
    Maglev(u32),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendPlan {
    pub key: FrontendKey,
    pub kind: FrontendKind,
    pub policy: Policy,
    /// For clients outside.
    pub verdict: Verdict,
    /// In order; empty unless the verdict is to forward.
    pub backends: Arc<[Backend]>,
    /// For clients on this node, where theirs are others: a policy `Local` for
    /// traffic from outside does not bind them. Empty only if there are none.
    pub inner: Option<Arc<[Backend]>>,
    /// `FRONTEND_SOURCE_RANGES`, `FRONTEND_ECHO` and `FRONTEND_REFUSE`; the
    /// other flags follow from the rest.
    pub flags: u8,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPlan {
    pub port: ServicePort,
    pub choice: Choice,
    /// Whose clients may use the frontends that are marked so.
    pub sources: BTreeSet<IpNet>,
    pub frontends: Vec<FrontendPlan>,
    /// Every endpoint that still answers, whether or not new flows may go
    /// there: established UDP flows stay with these, and leave all others.
    /// In order, each once.
    pub alive: Arc<[Backend]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    pub service: NamespacedName,
    pub ports: Vec<PortPlan>,
}

/// What the maps should say about a Service.
pub fn plan(service: &Service, slices: &[&EndpointSlice], node: &NodeFacts) -> ServicePlan {
    let ports = service.ports.iter().map(|port| {
        let mut result = PortPlan {
            port: port.clone(),
            choice: choice(service, node.settings),
            sources: BTreeSet::new(),
            frontends: Vec::new(),
            alive: Arc::default(),
        };
        for family in Family::ALL {
            if let Some(cluster_ip) = service.cluster_ip(family) {
                let endpoints = collect(slices, port, family);
                plan_family(service, cluster_ip, &endpoints, node, &mut result);
            }
        }
        result
    });
    let mut ports: Vec<_> = ports.collect();
    keep_one_of_each(&mut ports);
    ServicePlan {
        service: service.id.clone(),
        ports,
    }
}

/// A client cannot keep its backend by two rules: affinity goes first.
fn choice(service: &Service, settings: Settings) -> Choice {
    match (
        service.affinity,
        service.algorithm.unwrap_or(settings.algorithm),
    ) {
        (Some(seconds), _) => Choice::Affinity(seconds),
        (None, Algorithm::Random) => Choice::Random,
        (None, Algorithm::Maglev) => Choice::Maglev(settings.maglev_table),
    }
}

/// An address may be external IP, load balancer's and the node's at once; the
/// first that claims it has it. For what is said of the address itself the
/// first port that leads somewhere speaks.
fn keep_one_of_each(ports: &mut [PortPlan]) {
    let mut owners = BTreeMap::new();
    for (port, plan) in ports.iter().enumerate() {
        for (index, frontend) in plan.frontends.iter().enumerate() {
            let leads_nowhere = frontend.verdict != Verdict::Forward;
            let speaks_late = frontend.kind == FrontendKind::Address && leads_nowhere;
            let claim = (speaks_late, port, index);
            let owner = owners.entry(frontend.key).or_insert(claim);
            *owner = claim.min(*owner);
        }
    }
    let kept: BTreeSet<_> = owners
        .into_values()
        .map(|(_, port, index)| (port, index))
        .collect();
    for (port, plan) in ports.iter_mut().enumerate() {
        let mut indices = 0..;
        plan.frontends.retain(|_| {
            indices
                .next()
                .is_some_and(|index| kept.contains(&(port, index)))
        });
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
    let sources = sources(service, family, node);
    let balancer_flags = if sources.is_empty() {
        0
    } else {
        FRONTEND_SOURCE_RANGES
    };
    let port = &result.port;
    let mut add = |kind, addr, number, policy, flags| {
        let key = FrontendKey {
            addr,
            port: number,
            protocol: port.protocol.number(),
        };
        result
            .frontends
            .push(lists.frontend(kind, key, policy, flags));
    };
    let of_family = |ip: &&IpAddr| Family::of(**ip) == family;
    let (internal, external) = (service.internal_policy, service.external_policy);
    add(FrontendKind::ClusterIp, cluster_ip, port.port, internal, 0);
    for ip in service.external_ips.iter().filter(of_family) {
        add(FrontendKind::ExternalIp, *ip, port.port, external, 0);
    }
    for ip in service.load_balancer_ips.iter().filter(of_family) {
        add(
            FrontendKind::LoadBalancer,
            *ip,
            port.port,
            external,
            balancer_flags,
        );
    }
    if let Some(node_port) = port.node_port {
        for ip in node.addresses.iter().filter(of_family) {
            add(FrontendKind::NodePort, *ip, node_port, external, 0);
        }
    }
    plan_addresses(service, cluster_ip, &lists, node, &mut result.frontends);
    result.sources.extend(sources);
    result.alive = lists.alive(&result.alive, endpoints, node);
}

/// What is said of a Service's addresses themselves. A ping is answered by
/// whoever would be led somewhere.
fn plan_addresses(
    service: &Service,
    cluster_ip: IpAddr,
    lists: &Lists,
    node: &NodeFacts,
    frontends: &mut Vec<FrontendPlan>,
) {
    let mut add = |addr, policy, flags| {
        let key = FrontendKey::of_address(addr);
        frontends.push(lists.frontend(FrontendKind::Address, key, policy, flags));
    };
    let ping = node.settings.ping;
    let echo = if ping == Ping::All { FRONTEND_ECHO } else { 0 };
    add(cluster_ip, service.internal_policy, FRONTEND_REFUSE | echo);
    let balancer = if ping == Ping::Off { 0 } else { FRONTEND_ECHO };
    let balancers = service.load_balancer_ips.iter().map(|ip| (*ip, balancer));
    // That an external address is one of a Service at all is what fragments are
    // kept for.
    let external = service.external_ips.iter().map(|ip| (*ip, 0));
    for (ip, flags) in balancers.chain(external) {
        // The node answers for its own addresses.
        if Family::of(ip) == Family::of(cluster_ip) && !node.addresses.contains(&ip) {
            add(ip, Policy::Cluster, flags);
        }
    }
}

/// Who may use the load balancer's addresses of a family; empty if everybody
/// may.
///
/// Where the node may, so may the addresses themselves: some balancers give
/// them to the node's devices, and what the node sends to itself comes from
/// there.
fn sources(service: &Service, family: Family, node: &NodeFacts) -> Vec<IpNet> {
    let ranges = service.source_ranges.iter().copied();
    let mut ranges: Vec<_> = ranges
        .filter(|range| Family::of(range.addr()) == family)
        .collect();
    if ranges.iter().any(|range| range.prefix_len() == 0) {
        return Vec::new();
    }
    let mut own = node.addresses.iter();
    if own.any(|own| ranges.iter().any(|range| range.contains(own))) {
        let balancers = service.load_balancer_ips.iter();
        let of_family = balancers.filter(|ip| Family::of(**ip) == family);
        ranges.extend(of_family.map(|ip| IpNet::from(*ip)));
    }
    ranges
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
        local: endpoint.node.as_deref() == Some(node.name.as_str()),
    }
}

/// The lists that policies choose from.
struct Lists {
    cluster: Arc<[Backend]>,
    local: Arc<[Backend]>,
    /// There is an endpoint that some node may use.
    has_any: bool,
}

impl Lists {
    /// Those of an earlier family, and all of this one that still answer. As a
    /// rule that is the list of all, and then shares its memory.
    fn alive(
        &self,
        others: &Arc<[Backend]>,
        endpoints: &Endpoints<'_>,
        node: &NodeFacts,
    ) -> Arc<[Backend]> {
        let serving = endpoints.iter().filter(|(_, endpoint)| endpoint.serving);
        let serving = serving.map(|(addr, endpoint)| backend(*addr, endpoint, node));
        if others.is_empty() && serving.clone().eq(self.cluster.iter().copied()) {
            return Arc::clone(&self.cluster);
        }
        // Addresses of IPv4 go before those of IPv6, as the families do.
        others.iter().copied().chain(serving).collect()
    }

    fn choose(&self, policy: Policy) -> (Verdict, Arc<[Backend]>) {
        let list = match policy {
            Policy::Cluster => &self.cluster,
            Policy::Local => &self.local,
        };
        let verdict = match (list.is_empty(), self.has_any) {
            (false, _) => Verdict::Forward,
            (true, true) => Verdict::Drop,
            (true, false) => Verdict::Reject,
        };
        (verdict, Arc::clone(list))
    }

    fn frontend(
        &self,
        kind: FrontendKind,
        key: FrontendKey,
        policy: Policy,
        flags: u8,
    ) -> FrontendPlan {
        let (verdict, backends) = self.choose(policy);
        // A policy for traffic from inside is for those inside.
        let is_external = !matches!(kind, FrontendKind::ClusterIp | FrontendKind::Address);
        FrontendPlan {
            key,
            kind,
            policy,
            verdict,
            backends,
            inner: (is_external && policy == Policy::Local).then(|| Arc::clone(&self.cluster)),
            flags,
        }
    }
}

fn categorize(service: &Service, endpoints: &Endpoints<'_>, node: &NodeFacts) -> Lists {
    let uses_cluster =
        service.internal_policy == Policy::Cluster || service.is_externally_accessible();
    let uses_local =
        service.internal_policy == Policy::Local || service.external_policy == Policy::Local;
    let select = |wanted: &dyn Fn(&Endpoint) -> bool| -> Arc<[Backend]> {
        let chosen = endpoints.iter().filter(|(_, endpoint)| wanted(endpoint));
        chosen
            .map(|(addr, endpoint)| backend(*addr, endpoint, node))
            .collect()
    };
    let is_local = |endpoint: &Endpoint| endpoint.node.as_deref() == Some(node.name.as_str());
    let is_draining = |endpoint: &Endpoint| endpoint.serving && endpoint.terminating;

    let mut lists = Lists {
        cluster: Arc::default(),
        local: Arc::default(),
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
        if in_force(Self::SameNode, |endpoint| {
            hints(endpoint).is_some_and(|hints| !hints.nodes.is_empty())
        }) {
            Self::SameNode
        } else if in_force(Self::SameZone, |endpoint| {
            hints(endpoint).is_some_and(|hints| !hints.zones.is_empty())
        }) {
            Self::SameZone
        } else {
            Self::Ignored
        }
    }

    fn allows(self, endpoint: &Endpoint, node: &NodeFacts) -> bool {
        match self {
            Self::Ignored => true,
            Self::SameNode => hints(endpoint).is_some_and(|hints| hints.nodes.contains(&node.name)),
            Self::SameZone => {
                let zone = node.zone.as_ref().zip(hints(endpoint));
                zone.is_some_and(|(zone, hints)| hints.zones.contains(zone))
            }
        }
    }
}

fn hints(endpoint: &Endpoint) -> Option<&Hints> {
    endpoint.hints.as_deref()
}

#[cfg(test)]
mod tests;
