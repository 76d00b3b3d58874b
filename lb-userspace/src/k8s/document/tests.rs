use super::*;
use crate::{
    datapath::Family,
    model::{Algorithm, Policy, Protocol},
};

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1, 'fd00:10:96::1']
  ipFamilies: [IPv4, IPv6]
  ports:
  - {name: http, port: 80, targetPort: web, nodePort: 30080}
  - {name: dns, port: 53, protocol: UDP}
";

const SLICE: &str = "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-1
  namespace: shop
  labels: {kubernetes.io/service-name: web}
addressType: IPv4
ports:
- {name: http, port: 3000, protocol: TCP}
endpoints:
- addresses: [10.244.0.5]
  nodeName: node-a
  conditions: {ready: true}
  hints: {forZones: [{name: zone-a}]}
- addresses: [10.244.0.6]
  conditions: {ready: false, serving: true, terminating: true}
";

/// The one result of a text with one document.
fn read(text: &str) -> Outcome {
    let mut results: Vec<_> = read_all(text).into_iter().flatten().collect();
    assert_eq!(results.len(), 1, "{text}");
    results.remove(0)
}

fn read_service(text: &str) -> crate::model::Service {
    match read(text).expect("a good document").objects.remove(0) {
        Object::Service(service) => service,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_service_is_read() {
    let service = read_service(SERVICE);
    assert_eq!(service.id, NamespacedName::new("shop", "web"));
    assert_eq!(service.cluster_ips.len(), 2);
    assert_eq!(service.external_policy, Policy::Cluster);
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|port| (port.name.as_str(), port.protocol, port.port, port.node_port))
        .collect();
    assert_eq!(
        ports,
        [
            ("http", Protocol::Tcp, 80, Some(30080)),
            ("dns", Protocol::Udp, 53, None)
        ]
    );
}

#[test]
fn a_slice_is_read() {
    let document = read(SLICE).expect("a good document");
    let [Object::EndpointSlice(slice)] = &document.objects[..] else {
        panic!("{document:?}");
    };
    assert_eq!((slice.service.as_str(), slice.family), ("web", Family::V4));
    let [ready, draining] = &slice.endpoints[..] else {
        panic!("{slice:?}");
    };
    assert!(ready.ready && ready.serving && !ready.terminating);
    assert!(
        ready
            .hints
            .as_ref()
            .expect("hints")
            .zones
            .contains("zone-a")
    );
    assert_eq!(ready.node.as_deref(), Some("node-a"));
    assert!(!draining.ready && draining.serving && draining.terminating);
    assert_eq!(draining.node, None);
}

#[test]
fn a_node_is_read() {
    let text = "{apiVersion: v1, kind: Node, metadata: {name: a, labels: {topology.kubernetes.io/zone: z}}}";
    let document = read(text).expect("a good document");
    let [Object::Node(node)] = &document.objects[..] else {
        panic!("{document:?}");
    };
    assert_eq!(node.zone.as_deref(), Some("z"));
}

/// A document with one thing replaced.
fn edited(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from}");
    text.replacen(from, to, 1)
}

#[test]
fn what_is_none_of_klbs_business() {
    let rows = [
        edited(SERVICE, "clusterIP: 10.96.0.1", "clusterIP: None"),
        edited(SERVICE, "spec:", "spec:\n  type: ExternalName"),
        edited(
            SERVICE,
            "namespace: shop}",
            "namespace: shop, labels: {service.kubernetes.io/service-proxy-name: other}}",
        ),
        edited(SLICE, "kubernetes.io/service-name: web", "a: b"),
        edited(
            SLICE,
            "labels: {",
            "labels: {service.kubernetes.io/headless: '', ",
        ),
        "{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 1}]}}".into(),
        "{apiVersion: apps/v1, kind: Deployment, metadata: {name: a}}".into(),
        "{apiVersion: v1, kind: ConfigMap, metadata: {}}".into(),
        "{apiVersion: serving.knative.dev/v1, kind: Service, metadata: {name: a}}".into(),
    ];
    for text in rows {
        let document = read(&text).unwrap_or_else(|error| panic!("{text}\n{error:?}"));
        assert_eq!(document, Document::default(), "{text}");
    }
}

#[test]
fn errors_name_the_object_and_the_field() {
    let rows = [
        (SERVICE, "port: 80", "port: 0", "spec.ports[0].port"),
        (SERVICE, "port: 80", "port: 65536", "spec.ports[0].port"),
        (SERVICE, "port: 80", "port: web", "spec.ports[0].port"),
        (SERVICE, "port: 53", "port: -1", "spec.ports[1].port"),
        (
            SERVICE,
            "nodePort: 30080",
            "nodePort: 99999",
            "spec.ports[0].nodePort",
        ),
        (SERVICE, "name: dns, ", "", "spec.ports[1].name"),
        (SERVICE, "name: dns", "name: http", "spec.ports[1].name"),
        (
            SERVICE,
            "port: 53, protocol: UDP",
            "port: 80",
            "spec.ports[1].port",
        ),
        (
            SERVICE,
            "protocol: UDP",
            "protocol: QUIC",
            "spec.ports[1].protocol",
        ),
        (
            SERVICE,
            "clusterIPs: [10.96.0.1",
            "clusterIPs: [10.96.0.256",
            "spec.clusterIPs[0]",
        ),
        (
            SERVICE,
            "'fd00:10:96::1'",
            "10.96.0.2",
            "spec.clusterIPs[1]",
        ),
        (
            SERVICE,
            "spec:",
            "spec:\n  externalTrafficPolicy: Near",
            "spec.externalTrafficPolicy",
        ),
        (
            SERVICE,
            "spec:",
            "spec:\n  externalIPs: [here]",
            "spec.externalIPs[0]",
        ),
        (SLICE, "port: 3000", "port: 70000", "ports[0].port"),
        (
            SLICE,
            "[10.244.0.6]",
            "[10.244.0]",
            "endpoints[1].addresses[0]",
        ),
        (
            SLICE,
            "[10.244.0.6]",
            "['fd00::6']",
            "endpoints[1].addresses[0]",
        ),
        (SLICE, "[10.244.0.6]", "[]", "endpoints[1].addresses[0]"),
        (
            SLICE,
            "addressType: IPv4",
            "addressType: IPX",
            "addressType",
        ),
        (
            SLICE,
            "ready: true",
            "ready: perhaps",
            "endpoints[0].conditions.ready",
        ),
    ];
    for (text, from, to, field) in rows {
        assert_error(&edited(text, from, to), field);
    }
}

#[test]
fn what_nobody_can_promise_is_an_error() {
    for (fields, field) in [
        ("sessionAffinity: Cookie", "spec.sessionAffinity"),
        (
            "sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}",
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
        ),
        (
            "sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}",
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
        ),
        (
            "loadBalancerSourceRanges: [10.0.0.0/8, 10.0.0.0/33]",
            "spec.loadBalancerSourceRanges[1]",
        ),
        (
            "loadBalancerSourceRanges: [10.0.0.1]",
            "spec.loadBalancerSourceRanges[0]",
        ),
    ] {
        let text = edited(SERVICE, "spec:", &format!("spec:\n  {fields}"));
        assert_error(&text, field);
    }
}

/// The text has an error, in this field.
fn assert_error(text: &str, field: &str) {
    let error = read(text).expect_err(text);
    assert_eq!(
        error.field.as_deref(),
        Some(field),
        "{}\n{text}",
        error.message
    );
    let object = error.object.expect("known by name").to_string();
    assert!(object == "Service shop/web" || object == "EndpointSlice shop/web-1");
}

#[test]
fn without_a_name_the_error_says_what_is_missing() {
    for (text, field) in [
        ("{kind: Service}", "apiVersion"),
        ("{apiVersion: v1}", "kind"),
        ("{apiVersion: v1, kind: Service, spec: {}}", "metadata.name"),
        (
            "{apiVersion: v2, kind: Service, metadata: {name: a}}",
            "apiVersion",
        ),
        ("[1, 2]", "kind"),
    ] {
        let error = read(text).expect_err(text);
        assert_eq!(error.field.as_deref(), Some(field), "{text}");
    }
    let error = read("kind: {").expect_err("no YAML");
    assert!(
        error.message.starts_with("no valid YAML"),
        "{}",
        error.message
    );
}

#[test]
fn sctp_is_a_protocol_like_the_others() {
    let service = read_service(&edited(SERVICE, "protocol: UDP", "protocol: SCTP"));
    assert_eq!(service.ports[1].protocol, Protocol::Sctp);
}

#[test]
fn a_client_keeps_its_backend_for_as_long_as_it_says() {
    for (affinity, config, seconds) in [
        ("None", "", None),
        ("ClientIP", "", Some(10_800)),
        ("ClientIP", "clientIP: {timeoutSeconds: 1}", Some(1)),
        (
            "ClientIP",
            "clientIP: {timeoutSeconds: 86400}",
            Some(86_400),
        ),
        // Without the affinity the time has no meaning.
        ("None", "clientIP: {timeoutSeconds: 5}", None),
    ] {
        let fields =
            format!("spec:\n  sessionAffinity: {affinity}\n  sessionAffinityConfig: {{{config}}}");
        let service = read_service(&edited(SERVICE, "spec:", &fields));
        assert_eq!(service.affinity, seconds, "{fields}");
    }
}

#[test]
fn who_may_use_a_load_balancer_is_read_with_blanks_and_host_bits() {
    let text = edited(
        SERVICE,
        "spec:",
        "spec:\n  loadBalancerSourceRanges: [' 10.0.0.1/8 ', 'fd00::/8']",
    );
    let ranges = read_service(&text).source_ranges;
    assert_eq!(
        ranges.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.0.0/8", "fd00::/8"]
    );
}

#[test]
fn a_service_chooses_its_algorithm_and_a_typing_error_is_said() {
    let annotated = |value| {
        let annotation = format!("namespace: shop, annotations: {{klb/algorithm: {value}}}}}");
        edited(SERVICE, "namespace: shop}", &annotation)
    };
    assert_eq!(read_service(SERVICE).algorithm, None);
    let maglev = read_service(&annotated("maglev"));
    assert_eq!(maglev.algorithm, Some(Algorithm::Maglev));
    let random = read_service(&annotated("random"));
    assert_eq!(random.algorithm, Some(Algorithm::Random));
    let document = read(&annotated("magelv")).expect("a document");
    assert_eq!(
        document.warnings[0].field.as_deref(),
        Some("metadata.annotations[klb/algorithm]")
    );
}

#[test]
fn external_addresses_count_as_kube_proxy_counts_them() {
    let text = edited(
        SERVICE,
        "spec:",
        "status: {loadBalancer: {ingress: [{ip: 203.0.113.1}, {ip: 203.0.113.2, ipMode: VIP}, {ip: 203.0.113.3, ipMode: Proxy}, {hostname: lb}]}}
spec:
  externalTrafficPolicy: Local
  externalIPs: [198.51.100.1]",
    );
    let service = read_service(&text);
    assert_eq!(service.load_balancer_ips.len(), 2);
    assert_eq!(service.external_ips.len(), 1);
    assert_eq!(service.external_policy, Policy::Local);
    // Not reachable from outside: the external policy has no meaning.
    let text = edited(SERVICE, ", nodePort: 30080", "");
    let text = edited(&text, "spec:", "spec:\n  externalTrafficPolicy: Local");
    assert_eq!(read_service(&text).external_policy, Policy::Cluster);
    // Addresses of a family that the Service does not have.
    let text = edited(SERVICE, ", 'fd00:10:96::1']", "]");
    let text = edited(&text, "spec:", "spec:\n  externalIPs: ['2001:db8::1']");
    assert!(read_service(&text).external_ips.is_empty());
}

#[test]
fn documents_are_cut_where_yaml_cuts_them() {
    let text =
        "# only a comment\n---\na: 1\n--- # next\nb: |\n  ---x\n---\n\n---\n{c: [}\n---\nd: 4";
    let results = read_all(text);
    assert_eq!(results.len(), 4, "{results:?}");
    let broken = results[2][0].as_ref().expect_err("broken");
    assert!(broken.message.starts_with("no valid YAML"));
}

#[test]
fn a_list_is_its_items_and_one_broken_item_leaves_the_others() {
    let item = |text: &str| text.replace('\n', "\n    ");
    let text = format!(
        "apiVersion: v1\nkind: List\nitems:\n  -{}\n  -{}\n  -{}",
        item(SERVICE),
        item(&edited(SERVICE, "port: 80", "port: 0")),
        item(SLICE),
    );
    let results = read_all(&text).remove(0);
    assert_eq!(results.len(), 3);
    assert!(results[0].is_ok() && results[1].is_err() && results[2].is_ok());
}

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, annotations: {klb/socket-lb: 'false'}}
spec: {nodeName: node-a}
status: {phase: Running, podIP: 10.244.0.5, podIPs: [{ip: 10.244.0.5}, {ip: 'fd00::5'}]}
";

#[test]
fn a_pod_says_whether_its_sockets_are_served() {
    let pod = |text: &str| {
        let mut objects = read(text).expect("a good document").objects;
        objects.pop().map(|object| match object {
            Object::Pod(pod) => pod,
            other => panic!("{other:?}"),
        })
    };
    let running = pod(POD).expect("a pod");
    assert_eq!(running.id, NamespacedName::new("shop", "web-1"));
    assert_eq!((running.node.as_str(), running.ips.len()), ("node-a", 2));
    assert_eq!(running.socket_lb, Some(false));
    let silent = pod(&POD.replace("klb/socket-lb: 'false'", "a: b"));
    assert_eq!(silent.expect("a pod").socket_lb, None);
    // Its addresses may be another pod's by now.
    for over in ["Succeeded", "Failed"] {
        assert_eq!(pod(&POD.replace("Running", over)), None);
    }
    assert_eq!(
        pod(&POD.replace("nodeName:", "hostNetwork: true, nodeName:")),
        None
    );
    assert_eq!(pod(&POD.replace("nodeName: node-a", "")), None);
}

#[test]
fn a_namespace_speaks_for_its_pods() {
    const NAMESPACE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {klb/socket-lb: 'false'}}
";
    let namespace = crate::model::Namespace {
        name: "shop".to_owned(),
        socket_lb: Some(false),
    };
    let document = read(NAMESPACE).expect("a good document");
    assert_eq!(document.objects, [Object::Namespace(namespace)]);
    let document = read(&NAMESPACE.replace("'false'", "'no'")).expect("a good document");
    assert!(document.warnings[0].message.contains("not true or false"));
    let object = document.objects[0].reference();
    assert_eq!(object.to_string(), "Namespace shop");
}
