//! What klb needs to know of a cluster, in plain types: no Kubernetes, no maps.

use std::{cmp::Ordering, collections::BTreeSet, fmt, net::IpAddr, sync::Arc, time::SystemTime};

use ipnet::IpNet;
use lb_common::flow::{SCTP, TCP, UDP};

use crate::datapath::Family;

/// Namespace and name. Copies share one text: there are many of each.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct NamespacedName {
    /// Both, with a slash between them.
    text: Arc<str>,
    /// Where the slash is.
    slash: u32,
}

impl NamespacedName {
    /// An object that is in no namespace has the empty one.
    pub fn new(namespace: impl AsRef<str>, name: impl AsRef<str>) -> Self {
        let (namespace, name) = (namespace.as_ref(), name.as_ref());
        Self {
            text: format!("{namespace}/{name}").into(),
            slash: namespace.len() as u32,
        }
    }

    pub fn namespace(&self) -> &str {
        &self.text[..self.slash as usize]
    }

    pub fn name(&self) -> &str {
        &self.text[self.slash as usize + 1..]
    }
}

impl Ord for NamespacedName {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.namespace(), self.name()).cmp(&(other.namespace(), other.name()))
    }
}

impl PartialOrd for NamespacedName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

/// A protocol that klb balances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// The IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => TCP,
            Self::Udp => UDP,
            Self::Sctp => SCTP,
        }
    }

    /// The protocol with this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            TCP => Some(Self::Tcp),
            UDP => Some(Self::Udp),
            SCTP => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A traffic policy: all endpoints, or those of this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    #[default]
    Cluster,
    Local,
}

/// How a backend is chosen for a new flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Algorithm {
    /// Each as likely as the others
    #[default]
    Random,
    /// By the client's address and port: the same on every node
    Maglev,
}

/// A Service that has frontends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub id: NamespacedName,
    /// Seconds since 1970; of two Services that claim one frontend the older
    /// has it. A manifest has no such time, and counts as new.
    pub created: i64,
    /// At most one of each family. The Service exists for these families only.
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    pub load_balancer_ips: Vec<IpAddr>,
    /// Who may use the load balancer's addresses, in the families that are
    /// named; everybody in the others.
    pub source_ranges: Vec<IpNet>,
    /// `sessionAffinity: ClientIP`: seconds for which a client that opens no
    /// flow keeps its backend.
    pub affinity: Option<u32>,
    /// What the Service asks for; the agent's own choice without.
    pub algorithm: Option<Algorithm>,
    pub internal_policy: Policy,
    /// `Local` only where it has a meaning: on a Service that can be reached
    /// from outside.
    pub external_policy: Policy,
    /// Where load balancers ask whether this node has endpoints of its own.
    pub health_check_port: Option<u16>,
    pub ports: Vec<ServicePort>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty if the Service has one port without a name.
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: Option<u16>,
}

impl Service {
    /// The Service's own address of a family.
    pub fn cluster_ip(&self, family: Family) -> Option<IpAddr> {
        let mut ips = self.cluster_ips.iter();
        ips.find(|ip| Family::of(**ip) == family).copied()
    }

    /// Whether clients outside of the cluster have a way in.
    pub fn is_externally_accessible(&self) -> bool {
        !self.external_ips.is_empty() || !self.load_balancer_ips.is_empty() || self.has_node_ports()
    }

    /// Whether what the maps say depends on the node's addresses.
    pub fn concerns_node_addresses(&self) -> bool {
        self.has_node_ports() || !self.load_balancer_ips.is_empty()
    }

    fn has_node_ports(&self) -> bool {
        self.ports.iter().any(|port| port.node_port.is_some())
    }
}

/// Some of a Service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    pub id: NamespacedName,
    /// Name of the Service, in the same namespace.
    pub service: String,
    pub family: Family,
    pub ports: Vec<EndpointPort>,
    pub endpoints: Vec<Endpoint>,
    /// When that was seen which the slice was written for.
    pub triggered: Option<SystemTime>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPort {
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub addr: IpAddr,
    pub node: Option<Box<str>>,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// Most have none.
    pub hints: Option<Box<Hints>>,
}

/// For whom the endpoint is meant, as the EndpointSlice controller suggests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    pub zones: BTreeSet<String>,
    pub nodes: BTreeSet<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// It is being deleted, or will be soon.
    pub leaving: bool,
}

/// A pod that has addresses of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub id: NamespacedName,
    pub node: String,
    pub ips: Vec<IpAddr>,
    /// Whether its sockets are served, if it says so.
    pub socket_lb: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    pub name: String,
    /// As that of a [`Pod`], for those that say nothing.
    pub socket_lb: Option<bool>,
}

/// Anything that a source brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    Service(Service),
    EndpointSlice(EndpointSlice),
    Node(Node),
    Pod(Pod),
    Namespace(Namespace),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Service,
    EndpointSlice,
    Node,
    Pod,
    Namespace,
}

impl Kind {
    /// Whether objects of this kind are in a namespace.
    pub const fn is_namespaced(self) -> bool {
        !matches!(self, Self::Node | Self::Namespace)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::Namespace => "Namespace",
        })
    }
}

/// Names an object. One that is in no namespace has the empty one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectRef {
    pub kind: Kind,
    pub id: NamespacedName,
}

impl ObjectRef {
    /// Names a Service.
    pub fn service(id: &NamespacedName) -> Self {
        Self {
            kind: Kind::Service,
            id: id.clone(),
        }
    }

    /// Names a Node.
    pub fn node(name: &str) -> Self {
        Self {
            kind: Kind::Node,
            id: NamespacedName::new("", name),
        }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.kind.is_namespaced() {
            return write!(f, "{} {}", self.kind, self.id.name());
        }
        write!(f, "{} {}", self.kind, self.id)
    }
}

impl Object {
    /// How it is named.
    pub fn reference(&self) -> ObjectRef {
        let (kind, id) = match self {
            Self::Service(service) => (Kind::Service, service.id.clone()),
            Self::EndpointSlice(slice) => (Kind::EndpointSlice, slice.id.clone()),
            Self::Node(node) => (Kind::Node, NamespacedName::new("", &node.name)),
            Self::Pod(pod) => (Kind::Pod, pod.id.clone()),
            Self::Namespace(namespace) => {
                (Kind::Namespace, NamespacedName::new("", &namespace.name))
            }
        };
        ObjectRef { kind, id }
    }
}

/// Whom it concerns that something cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Concern {
    Service(NamespacedName),
    /// It may be any Service.
    Anyone,
    /// No Service is worse off for it.
    NoOne,
}

/// What a source tells, whichever it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Apply(Object),
    Delete(ObjectRef),
    /// What there is and cannot be understood, and never could. Replaces what
    /// was told so before.
    Unknown(BTreeSet<Concern>),
    /// Everything that there is of a scope has been told; from now on what was
    /// not told does not exist.
    Synced(Scope),
}

/// What is waited for before it is acted upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Services, their slices, and this node.
    Services,
    /// This node's pods, and the namespaces.
    Pods,
}

impl Kind {
    /// The scope that objects of this kind belong to.
    pub const fn scope(self) -> Scope {
        match self {
            Self::Service | Self::EndpointSlice | Self::Node => Scope::Services,
            Self::Pod | Self::Namespace => Scope::Pods,
        }
    }
}
