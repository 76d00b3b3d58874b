//! Kubernetes objects → model: which objects count, and what of them.
//!
//! The rules are kube-proxy's (`ShouldSkipService`, `GetClusterIPByFamily`,
//! `newBaseServiceInfo`, `addEndpoints`). Besides, what the API server would
//! have refused is refused here, since a manifest has not been there.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use lb_common::service::NAME_LEN;

use super::objects;
use crate::{
    datapath::Family,
    model::{
        Algorithm, Endpoint, EndpointPort, EndpointSlice, Hints, Kind, Namespace, NamespacedName,
        Node, Object, ObjectRef, Pod, Policy, Protocol, Service, ServicePort,
    },
};

/// A Service with this label, whatever its value, is another proxy's.
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
pub(super) const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// The autoscaler is about to remove the node (KEP-3836).
const LEAVING_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
/// When the endpoints controller saw what it wrote the slice for.
const TRIGGER_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// klb's own: `random` or `maglev`, whatever `--algorithm` says.
const ALGORITHM_ANNOTATION: &str = "klb/algorithm";
/// On a Pod or a Namespace: "false" leaves sockets to the packet hooks.
const SOCKET_LB_ANNOTATION: &str = "klb/socket-lb";

/// What the API server fills in (`timeoutSeconds`).
const DEFAULT_AFFINITY: i32 = 10_800;
const MAX_AFFINITY: i32 = 86_400;

/// What is wrong with an object, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {field}: {message}")]
pub struct ObjectError {
    pub object: ObjectRef,
    /// Path of the field, like `spec.ports[1].port`.
    pub field: String,
    pub message: String,
}

/// An object as klb sees it: `None` if it is none of klb's business; and what
/// in it is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    pub object: Option<Object>,
    pub warnings: Vec<ObjectError>,
}

/// Collects the errors of one object with its name.
struct Context {
    object: ObjectRef,
    warnings: Vec<ObjectError>,
}

impl Context {
    fn new(kind: Kind, id: NamespacedName) -> Self {
        Self {
            object: ObjectRef { kind, id },
            warnings: Vec::new(),
        }
    }

    fn error(&self, field: impl Into<String>, message: impl Into<String>) -> ObjectError {
        ObjectError {
            object: self.object.clone(),
            field: field.into(),
            message: message.into(),
        }
    }

    fn warn(&mut self, field: impl Into<String>, message: impl Into<String>) {
        let warning = self.error(field, message);
        self.warnings.push(warning);
    }

    fn done(self, object: impl Into<Option<Object>>) -> Converted {
        Converted {
            object: object.into(),
            warnings: self.warnings,
        }
    }

    fn port(&self, field: &str, value: i32) -> Result<u16, ObjectError> {
        u16::try_from(value)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| self.error(field, format!("{value} is not between 1 and 65535")))
    }

    fn ip(&self, field: &str, value: &str) -> Result<IpAddr, ObjectError> {
        value
            .parse()
            .map_err(|_not_an_ip| self.error(field, format!("{value:?} is not an IP address")))
    }

    fn protocol(&self, field: &str, value: Option<&str>) -> Result<Protocol, ObjectError> {
        match value.unwrap_or("TCP") {
            "TCP" => Ok(Protocol::Tcp),
            "UDP" => Ok(Protocol::Udp),
            "SCTP" => Ok(Protocol::Sctp),
            other => Err(self.error(field, format!("{other:?} is not TCP, UDP or SCTP"))),
        }
    }

    /// Names become fixed fields of a map.
    fn short(&self, field: &str, value: &str) -> Result<(), ObjectError> {
        if value.len() > NAME_LEN {
            return Err(self.error(field, format!("longer than {NAME_LEN} characters")));
        }
        Ok(())
    }
}

/// A Service.
///
/// # Errors
///
/// Names the field that the API server would have refused.
pub fn service(id: NamespacedName, service: &objects::Service) -> Result<Converted, ObjectError> {
    let mut context = Context::new(Kind::Service, id);
    context.short("metadata.namespace", context.object.id.namespace())?;
    context.short("metadata.name", context.object.id.name())?;
    let Some(spec) = &service.spec else {
        return Err(context.error("spec", "is missing"));
    };
    let labels = service.metadata.labels.as_ref();
    let is_others = labels.is_some_and(|labels| labels.contains_key(PROXY_NAME_LABEL));
    let is_external_name = spec.kind.as_deref() == Some("ExternalName");
    if is_others || is_external_name || is_headless(spec) {
        return Ok(context.done(None));
    }
    let cluster_ips = cluster_ips(&context, spec)?;
    let ports = service_ports(&context, spec)?;
    let annotations = service.metadata.annotations.as_ref();
    let created = service.metadata.creation_timestamp.as_ref();
    let mut result = Service {
        id: context.object.id.clone(),
        created: created.map_or(i64::MAX, |time| time.0.as_second()),
        external_ips: external_ips(&context, spec)?,
        load_balancer_ips: load_balancer_ips(&context, service)?,
        source_ranges: source_ranges(&context, spec)?,
        affinity: affinity(&context, spec)?,
        algorithm: annotations.and_then(|annotations| algorithm(&mut context, annotations)),
        internal_policy: policy(
            &context,
            "spec.internalTrafficPolicy",
            spec.internal_traffic_policy.as_deref(),
        )?,
        external_policy: policy(
            &context,
            "spec.externalTrafficPolicy",
            spec.external_traffic_policy.as_deref(),
        )?,
        health_check_port: health_check_port(&context, spec)?,
        cluster_ips,
        ports,
    };
    // kube-proxy and the API server leave out addresses of a family that the
    // Service does not have.
    let families: Vec<_> = result
        .cluster_ips
        .iter()
        .map(|ip| Family::of(*ip))
        .collect();
    for ips in [&mut result.external_ips, &mut result.load_balancer_ips] {
        ips.retain(|ip| families.contains(&Family::of(*ip)));
    }
    if !result.is_externally_accessible() {
        result.external_policy = Policy::Cluster;
    }
    Ok(context.done(Object::Service(result)))
}

/// Where load balancers ask whether this node has endpoints: of a Service of
/// type `LoadBalancer` whose policy is `Local` only.
fn health_check_port(
    context: &Context,
    spec: &objects::ServiceSpec,
) -> Result<Option<u16>, ObjectError> {
    let is_balanced = spec.kind.as_deref() == Some("LoadBalancer");
    let is_local = spec.external_traffic_policy.as_deref() == Some("Local");
    let port = spec.health_check_node_port.filter(|port| *port != 0);
    port.filter(|_| is_balanced && is_local)
        .map(|port| context.port("spec.healthCheckNodePort", port))
        .transpose()
}

fn is_headless(spec: &objects::ServiceSpec) -> bool {
    let first = spec.cluster_ips.iter().flatten().next();
    matches!(
        spec.cluster_ip.as_ref().or(first).map(String::as_str),
        None | Some("" | "None")
    )
}

/// One address for each family that the Service says it has.
fn cluster_ips(context: &Context, spec: &objects::ServiceSpec) -> Result<Vec<IpAddr>, ObjectError> {
    let listed = spec.cluster_ips.as_deref().unwrap_or_default();
    let single = spec.cluster_ip.as_slice();
    let (field, texts) = if listed.is_empty() {
        ("spec.clusterIP", single)
    } else {
        ("spec.clusterIPs", listed)
    };
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let mut ips: Vec<IpAddr> = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let field = if listed.is_empty() {
            field.to_owned()
        } else {
            format!("{field}[{index}]")
        };
        let ip = context.ip(&field, text)?;
        if ips.iter().any(|other| Family::of(*other) == Family::of(ip)) {
            return Err(context.error(field, "a second address of one family"));
        }
        let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        if families.get(index).is_none_or(|named| named == family) {
            ips.push(ip);
        }
    }
    Ok(ips)
}

fn service_ports(
    context: &Context,
    spec: &objects::ServiceSpec,
) -> Result<Vec<ServicePort>, ObjectError> {
    let specs = spec.ports.as_deref().unwrap_or_default();
    if specs.is_empty() {
        return Err(context.error("spec.ports", "is missing or empty"));
    }
    let mut ports: Vec<ServicePort> = Vec::new();
    for (index, spec) in specs.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let name = spec.name.clone().unwrap_or_default();
        context.short(&field("name"), &name)?;
        if name.is_empty() && specs.len() > 1 {
            return Err(context.error(field("name"), "is missing, and there are several ports"));
        }
        let port = context.port(&field("port"), spec.port)?;
        let node_port = match spec.node_port {
            None | Some(0) => None,
            Some(port) => Some(context.port(&field("nodePort"), port)?),
        };
        let protocol = context.protocol(&field("protocol"), spec.protocol.as_deref())?;
        for other in &ports {
            if other.name == name {
                return Err(context.error(field("name"), format!("{name:?} occurs twice")));
            }
            if (other.port, other.protocol) == (port, protocol) {
                return Err(context.error(field("port"), format!("{port}/{protocol} occurs twice")));
            }
        }
        ports.push(ServicePort {
            name,
            protocol,
            port,
            node_port,
        });
    }
    Ok(ports)
}

fn external_ips(
    context: &Context,
    spec: &objects::ServiceSpec,
) -> Result<Vec<IpAddr>, ObjectError> {
    let texts = spec.external_ips.iter().flatten().enumerate();
    texts
        .map(|(index, text)| context.ip(&format!("spec.externalIPs[{index}]"), text))
        .collect()
}

/// Addresses at which klb stands in for the load balancer. With `ipMode:
/// Proxy` the balancer wants the traffic itself; a host name is its business.
fn load_balancer_ips(
    context: &Context,
    service: &objects::Service,
) -> Result<Vec<IpAddr>, ObjectError> {
    let status = service.status.as_ref();
    let balancer = status.and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_deref());
    let mut ips = Vec::new();
    for (index, ingress) in ingress.unwrap_or_default().iter().enumerate() {
        let is_vip = ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP");
        let Some(ip) = ingress.ip.as_ref().filter(|ip| !ip.is_empty() && is_vip) else {
            continue;
        };
        let field = format!("status.loadBalancer.ingress[{index}].ip");
        ips.push(context.ip(&field, ip)?);
    }
    Ok(ips)
}

fn source_ranges(
    context: &Context,
    spec: &objects::ServiceSpec,
) -> Result<Vec<IpNet>, ObjectError> {
    let texts = spec.load_balancer_source_ranges.iter().flatten();
    let ranges = texts.enumerate().map(|(index, text)| {
        // The API server lets blanks through.
        let range = text.trim().parse::<IpNet>();
        range.map(|range| range.trunc()).map_err(|_not_a_network| {
            context.error(
                format!("spec.loadBalancerSourceRanges[{index}]"),
                format!("{text:?} is not a network"),
            )
        })
    });
    ranges.collect()
}

fn affinity(context: &Context, spec: &objects::ServiceSpec) -> Result<Option<u32>, ObjectError> {
    match spec.session_affinity.as_deref() {
        None | Some("None" | "") => return Ok(None),
        Some("ClientIP") => {}
        Some(other) => {
            let message = format!("{other:?} is not ClientIP or None");
            return Err(context.error("spec.sessionAffinity", message));
        }
    }
    let config = spec.session_affinity_config.as_ref();
    let client_ip = config.and_then(|config| config.client_ip.as_ref());
    let seconds = client_ip.and_then(|client_ip| client_ip.timeout_seconds);
    let seconds = seconds.unwrap_or(DEFAULT_AFFINITY);
    if !(1..=MAX_AFFINITY).contains(&seconds) {
        return Err(context.error(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!("{seconds} is not between 1 and {MAX_AFFINITY}"),
        ));
    }
    Ok(Some(seconds.cast_unsigned()))
}

fn algorithm(context: &mut Context, annotations: &BTreeMap<String, String>) -> Option<Algorithm> {
    match annotations.get(ALGORITHM_ANNOTATION)?.as_str() {
        "random" => Some(Algorithm::Random),
        "maglev" => Some(Algorithm::Maglev),
        other => {
            context.warn(
                format!("metadata.annotations[{ALGORITHM_ANNOTATION}]"),
                format!("{other:?} is not random or maglev; it is left out"),
            );
            None
        }
    }
}

fn policy(context: &Context, field: &str, value: Option<&str>) -> Result<Policy, ObjectError> {
    match value {
        None | Some("Cluster" | "") => Ok(Policy::Cluster),
        Some("Local") => Ok(Policy::Local),
        Some(other) => Err(context.error(field, format!("{other:?} is not Cluster or Local"))),
    }
}

/// An EndpointSlice.
///
/// # Errors
///
/// Names the field that the API server would have refused.
pub fn endpoint_slice(
    id: NamespacedName,
    slice: &objects::EndpointSlice,
) -> Result<Converted, ObjectError> {
    let context = Context::new(Kind::EndpointSlice, id);
    let labels = slice.metadata.labels.as_ref();
    let label = |name| labels.and_then(|labels| labels.get(name));
    let family = match slice.address_type.as_str() {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        "FQDN" => None,
        other => {
            let message = format!("{other:?} is not IPv4, IPv6 or FQDN");
            return Err(context.error("addressType", message));
        }
    };
    let (Some(service), Some(family), None) =
        (label(SERVICE_NAME_LABEL), family, label(HEADLESS_LABEL))
    else {
        return Ok(context.done(None));
    };
    let ports = endpoint_ports(&context, slice)?;
    let endpoints = endpoints(&context, slice, family)?;
    let annotations = slice.metadata.annotations.as_ref();
    let trigger = annotations.and_then(|annotations| annotations.get(TRIGGER_ANNOTATION));
    let result = EndpointSlice {
        id: context.object.id.clone(),
        service: service.clone(),
        family,
        ports,
        endpoints,
        // For a metric only, so nonsense is as good as nothing.
        triggered: trigger.and_then(|time| humantime::parse_rfc3339(time).ok()),
    };
    Ok(context.done(Object::EndpointSlice(result)))
}

fn endpoint_ports(
    context: &Context,
    slice: &objects::EndpointSlice,
) -> Result<Vec<EndpointPort>, ObjectError> {
    let mut ports = Vec::new();
    for (index, port) in slice.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("ports[{index}].{name}");
        // Without a number the port is "all ports", which is for consumers of
        // headless Services. The API server sets a name, if only an empty one.
        let Some(number) = port.port.filter(|number| *number != 0) else {
            continue;
        };
        let number = context.port(&field("port"), number)?;
        let protocol = context.protocol(&field("protocol"), port.protocol.as_deref())?;
        ports.push(EndpointPort {
            name: port.name.clone().unwrap_or_default(),
            protocol,
            port: number,
        });
    }
    Ok(ports)
}

fn endpoints(
    context: &Context,
    slice: &objects::EndpointSlice,
    family: Family,
) -> Result<Vec<Endpoint>, ObjectError> {
    let mut endpoints = Vec::new();
    for (index, endpoint) in slice.endpoints.iter().flatten().enumerate() {
        let field = format!("endpoints[{index}].addresses[0]");
        // All addresses of an endpoint are the same pod; the first is it.
        let Some(text) = endpoint.addresses.first() else {
            return Err(context.error(field, "is missing"));
        };
        let addr = context.ip(&field, text)?;
        if Family::of(addr) != family {
            let message = format!("{text} is not of type {}", slice.address_type);
            return Err(context.error(field, message));
        }
        let conditions = endpoint.conditions.as_ref();
        let condition = |value: Option<Option<bool>>, default| value.flatten().unwrap_or(default);
        endpoints.push(Endpoint {
            addr,
            node: endpoint.node_name.as_deref().map(Box::from),
            ready: condition(conditions.map(|c| c.ready), true),
            serving: condition(conditions.map(|c| c.serving), true),
            terminating: condition(conditions.map(|c| c.terminating), false),
            hints: hints(endpoint),
        });
    }
    Ok(endpoints)
}

fn hints(endpoint: &objects::Endpoint) -> Option<Box<Hints>> {
    let hints = endpoint.hints.as_ref()?;
    let names = |hints: &Option<Vec<objects::Hint>>| -> BTreeSet<_> {
        let hints = hints.iter().flatten();
        hints.map(|hint| hint.name.clone()).collect()
    };
    let hints = Hints {
        zones: names(&hints.for_zones),
        nodes: names(&hints.for_nodes),
    };
    (hints != Hints::default()).then(|| Box::new(hints))
}

/// A Node.
pub fn node(name: String, node: &objects::Node) -> Converted {
    let labels = node.metadata.labels.as_ref();
    let zone = labels.and_then(|labels| labels.get(ZONE_LABEL)).cloned();
    let mut taints = node.spec.iter().flat_map(|spec| &spec.taints).flatten();
    let is_leaving = |taint: &objects::Taint| taint.key == LEAVING_TAINT;
    Converted {
        object: Some(Object::Node(Node {
            name,
            zone: zone.filter(|zone| !zone.is_empty()),
            leaving: node.metadata.deletion_timestamp.is_some() || taints.any(is_leaving),
        })),
        warnings: Vec::new(),
    }
}

/// A Pod. One that has ended has no claim on its addresses any more, and one
/// with those of the node is no business of its own.
///
/// # Errors
///
/// Names the field that the API server would have refused.
pub fn pod(id: NamespacedName, pod: &objects::Pod) -> Result<Converted, ObjectError> {
    let mut context = Context::new(Kind::Pod, id);
    let spec = pod.spec.as_ref();
    let node = spec.and_then(|spec| spec.node_name.clone());
    let on_host = spec.is_some_and(|spec| spec.host_network == Some(true));
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref());
    let has_ended = matches!(phase, Some("Succeeded" | "Failed"));
    let texts = status.and_then(|status| status.pod_ips.as_deref());
    let ips = texts.unwrap_or_default().iter().enumerate();
    let ips = ips
        .map(|(index, ip)| context.ip(&format!("status.podIPs[{index}].ip"), &ip.ip))
        .collect::<Result<Vec<_>, _>>()?;
    let socket_lb = socket_lb(&mut context, pod.metadata.annotations.as_ref());
    let Some(node) = node.filter(|_| !on_host && !has_ended && !ips.is_empty()) else {
        return Ok(context.done(None));
    };
    let pod = Pod {
        id: context.object.id.clone(),
        node,
        ips,
        socket_lb,
    };
    Ok(context.done(Object::Pod(pod)))
}

/// A Namespace.
pub fn namespace(id: NamespacedName, namespace: &objects::Namespace) -> Converted {
    let mut context = Context::new(Kind::Namespace, id);
    let socket_lb = socket_lb(&mut context, namespace.metadata.annotations.as_ref());
    let namespace = Namespace {
        name: context.object.id.name().to_owned(),
        socket_lb,
    };
    context.done(Object::Namespace(namespace))
}

/// What the annotation says; one that cannot be understood is left out, after
/// saying so.
fn socket_lb(
    context: &mut Context,
    annotations: Option<&BTreeMap<String, String>>,
) -> Option<bool> {
    let value = annotations?.get(SOCKET_LB_ANNOTATION)?;
    let wanted = value.parse().ok();
    if wanted.is_none() {
        context.warn(
            format!("metadata.annotations[{SOCKET_LB_ANNOTATION}]"),
            format!("{value:?} is not true or false; it is left out"),
        );
    }
    wanted
}
