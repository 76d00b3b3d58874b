//! What load balancers, the kubelet and operators are told, by the real agent.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    time::Duration,
};

use lb_tests::{
    agent::Hooks,
    apiserver::ApiServer,
    manifests::{self, NODE, Service},
    process::Place,
    topology::{Addresses, Family},
    wait,
    web::{self, Page},
    world::{PODS, World, endpoints},
};
use serde_json::{Value, json};

use crate::metrics::METRICS;

/// How long a change may take to be seen; a port that is taken is tried again
/// every other second.
const CHANGE: Duration = Duration::from_secs(20);
const HEALTHZ: u16 = 10256;
const CHECK: u16 = 30_555;
const WEIGHT: &str = "x-load-balancing-endpoint-weight";

/// The node's manifest with more in its `metadata` and `spec`.
fn node(metadata: &str, spec: &str) -> String {
    let name = format!("  name: {NODE}\n");
    let node = manifests::node().replace(&name, &format!("{name}{metadata}"));
    format!("{node}{spec}")
}

/// A node that the autoscaler is about to remove.
fn tainted() -> String {
    let taint = "{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}";
    node("", &format!("spec:\n  taints: [{taint}]\n"))
}

/// Asks on the node itself.
fn probe(world: &World, path: &str) -> io::Result<Page> {
    let server = SocketAddr::from((Ipv4Addr::LOCALHOST, HEALTHZ));
    web::get(&world.cluster.node.place, server, path)
}

/// Waits for a status of `/healthz`. Whatever it is, the agent is alive.
fn await_healthz(world: &World, what: &str, status: u16) -> Value {
    let page = wait::until(what, CHANGE, || {
        let page = probe(world, "/healthz").ok()?;
        (page.status == status).then_some(page)
    });
    let livez = probe(world, "/livez").expect("an answer");
    assert_eq!(livez.status, 200, "{what}: {livez:?}");
    assert_eq!(livez.json().get("nodeEligible"), None);
    page.json()
}

#[test]
fn a_node_that_leaves_is_out_of_service_and_alive() {
    let (mut world, server) = crate::api::world(Hooks::SOCKET);
    world.agent.start();
    let page = world.agent.page(HEALTHZ, "/healthz");
    assert_eq!(page.status, 200, "ready, and healthy: {page:?}");
    for (header, value) in [
        ("content-type", "application/json"),
        ("x-content-type-options", "nosniff"),
    ] {
        assert_eq!(page.headers[header], value, "{page:?}");
    }
    let body = page.json();
    assert_eq!(body["nodeEligible"], true, "{body}");
    assert_eq!(body["lastUpdated"], body["currentTime"], "{body}");
    for family in ["IPv4", "IPv6"] {
        assert_eq!(body["status"][family]["healthy"], true, "{body}");
    }
    server.put_yaml(&tainted());
    let body = await_healthz(&world, "a taint", 503);
    assert_eq!(body["nodeEligible"], false, "{body}");
    assert_eq!(body["healthy"], true, "{body}");
    server.put_yaml(&manifests::node());
    await_healthz(&world, "no taint", 200);
    server.put_yaml(&node("  deletionTimestamp: 2024-01-01T00:00:00Z\n", ""));
    await_healthz(&world, "a deletion", 503);
    server.put_yaml(&manifests::node());
    await_healthz(&world, "a node", 200);
    server.delete("nodes", "", NODE);
    await_healthz(&world, "no node", 503);
}

#[test]
fn manifests_need_not_have_the_node() {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    let manifests = world.agent.manifests.clone();
    manifests.remove("node.yaml");
    world.agent.start();
    await_healthz(&world, "no manifest of the node", 200);
    manifests.put("node.yaml", &tainted());
    await_healthz(&world, "a taint", 503);
    manifests.remove("node.yaml");
    await_healthz(&world, "no manifest any more", 200);
}

/// A Service for which load balancers ask each node at a port.
fn balanced(service: &Service, port: u16) -> String {
    let kind = format!(
        "type: LoadBalancer\n  externalTrafficPolicy: Local\n  healthCheckNodePort: {port}\n"
    );
    let text = service.to_string();
    let balanced = text.replace("type: NodePort\n", &kind);
    assert_ne!(balanced, text);
    balanced
}

/// A world whose Service has such a port.
fn balanced_world(hooks: Hooks) -> (World, ApiServer) {
    let (world, server) = crate::api::world(hooks);
    server.put_yaml(&balanced(&world.service, CHECK));
    (world, server)
}

/// Waits until the node tells clients at a place of so many endpoints.
fn await_weight(place: &Place, server: SocketAddr, weight: usize) {
    let what = format!("{weight} endpoints at {server}");
    let page = wait::until(&what, CHANGE, || {
        let page = web::get(place, server, "/").ok()?;
        (page.headers[WEIGHT] == weight.to_string()).then_some(page)
    });
    let status = if weight == 0 { 503 } else { 200 };
    assert_eq!(page.status, status, "{page:?}");
    let body = page.json();
    assert_eq!(body["localEndpoints"], weight, "{body}");
    assert_eq!(body["serviceProxyHealthy"], true, "{body}");
    assert_eq!(body["service"]["name"], "echo", "{body}");
}

fn await_refusal(place: &Place, server: SocketAddr) {
    wait::until("nobody to listen", CHANGE, || {
        let refusal = web::get(place, server, "/").err()?;
        (refusal.kind() == io::ErrorKind::ConnectionRefused).then_some(())
    });
}

#[test]
fn balancers_learn_how_many_endpoints_a_node_has() {
    let (mut world, server) = balanced_world(Hooks::ALL);
    world.agent.start();
    let outside = &world.cluster.outside.place;
    let at = |family, port| Addresses::NODE.port(family, port);
    for pods in [&PODS[..], &PODS[1..2], &[], &PODS[..2]] {
        server.put_yaml(&endpoints(&world.service, pods).to_string());
        for family in Family::ALL {
            await_weight(outside, at(family, CHECK), pods.len());
        }
    }
    // One that terminates still answers, and gets nothing new.
    let terminating = endpoints(&world.service, &PODS[..2]).to_string().replacen(
        "ready: true, serving: true, terminating: false",
        "ready: false, serving: true, terminating: true",
        1,
    );
    server.put_yaml(&terminating);
    await_weight(outside, at(Family::V4, CHECK), 1);
    await_weight(outside, at(Family::V6, CHECK), 2);
    server.put_yaml(&balanced(&world.service, CHECK + 1));
    await_weight(outside, at(Family::V6, CHECK + 1), 2);
    await_refusal(outside, at(Family::V6, CHECK));
    server.delete("services", "default", "echo");
    await_refusal(outside, at(Family::V6, CHECK + 1));
}

#[test]
fn balancers_ask_where_node_ports_answer() {
    let (mut world, _server) = balanced_world(Hooks::ALL);
    let v4 = Addresses::NODE.ip(Family::V4);
    world
        .agent
        .flags
        .push(format!("--nodeport-addresses={v4}/32"));
    world.agent.start();
    let node = &world.cluster.node.place;
    await_weight(node, SocketAddr::new(v4, CHECK), PODS.len());
    for elsewhere in [Ipv4Addr::LOCALHOST.into(), Addresses::NODE.ip(Family::V6)] {
        await_refusal(node, SocketAddr::new(elsewhere, CHECK));
    }
}

/// Waits until an operator can see an event.
fn await_event(server: &ApiServer, reason: &str) -> Value {
    let is_it = |event: &Value| event["reason"] == reason;
    wait::until(reason, CHANGE, || server.posted().into_iter().find(is_it))
}

/// Takes a port, at all IPv4 addresses.
fn listen(place: &Place, port: u16) -> TcpListener {
    let listener = place
        .netns()
        .within(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)));
    listener.expect("a free port")
}

#[test]
fn a_port_that_somebody_has_is_told_and_had_later() {
    let (mut world, server) = balanced_world(Hooks::SOCKET);
    let node = world.cluster.node.place.clone();
    let somebody = listen(&node, CHECK);
    world.agent.start();
    let started = await_event(&server, "Starting");
    assert_eq!(started["type"], "Normal");
    assert_eq!(started["regarding"]["uid"], NODE, "{started}");
    let event = await_event(&server, "FailedToStartServiceHealthcheck");
    assert_eq!(event["type"], "Warning");
    assert_eq!(event["regarding"]["kind"], "Service", "{event}");
    assert_eq!(event["regarding"]["name"], "echo", "{event}");
    let note = event["note"].as_str().expect("a note");
    for word in [NODE, "default/echo", "30555", "in use"] {
        assert!(note.contains(word), "no {word} in {note}");
    }
    drop(somebody);
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, CHECK));
    await_weight(&node, local, PODS.len());
}

#[test]
fn probes_without_a_port_are_told_and_served_later() {
    let (mut world, server) = crate::api::world(Hooks::SOCKET);
    let somebody = listen(&world.cluster.node.place, HEALTHZ);
    world.agent.start();
    let event = await_event(&server, "FailedToStartProxierHealthcheck");
    assert_eq!(event["type"], "Warning");
    assert_eq!(event["regarding"]["kind"], "Node", "{event}");
    assert_eq!(event["regarding"]["name"], NODE, "{event}");
    drop(somebody);
    await_healthz(&world, "a port for probes", 200);
}

#[test]
fn metrics_without_a_port_are_told_and_served_later() {
    let (mut world, server) = crate::api::world(Hooks::SOCKET);
    let somebody = listen(&world.cluster.node.place, METRICS);
    world.agent.start();
    let event = await_event(&server, "FailedToStartMetricServer");
    assert_eq!(event["type"], "Warning");
    assert_eq!(event["regarding"]["name"], NODE, "{event}");
    drop(somebody);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, METRICS));
    wait::until("a port for metrics", CHANGE, || {
        let page = web::get(&world.cluster.node.place, address, "/metrics").ok()?;
        (page.status == 200).then_some(())
    });
}

#[test]
fn a_full_map_is_told_and_does_not_take_the_node_out_of_service() {
    let (mut world, server) = crate::api::world(Hooks::SOCKET);
    let flags = world.agent.flags.iter_mut();
    for flag in flags.filter(|flag| flag.starts_with("--map-services=")) {
        "--map-services=1".clone_into(flag);
    }
    world.agent.start();
    let event = await_event(&server, "FailedToProgramService");
    assert_eq!(event["regarding"]["name"], "echo", "{event}");
    await_healthz(&world, "a node as good as it can be", 200);
}

/// All of them are written together at the start, which fails, and one by one then.
#[test]
fn of_many_services_a_full_map_holds_what_it_can() {
    const MANY: usize = 100;
    let (mut world, server) = crate::api::world(Hooks::SOCKET);
    for number in 0..MANY {
        let address = format!("10.96.200.{number}");
        server.put(json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": format!("many-{number}"), "namespace": "default" },
            "spec": {
                "clusterIP": address,
                "clusterIPs": [address],
                "ports": [{ "port": 80 }],
            },
        }));
    }
    let flags = world.agent.flags.iter_mut();
    for flag in flags.filter(|flag| flag.starts_with("--map-services=")) {
        flag.replace_range(.., &format!("--map-services={MANY}"));
    }
    world.agent.start();
    await_event(&server, "FailedToProgramService");
    await_healthz(&world, "a node as good as it can be", 200);
    let services = world.agent.services();
    let ports = services
        .iter()
        .filter(|port| port.name.starts_with("many-"));
    let served = ports.filter(|port| !port.frontends.is_empty()).count();
    // Each takes an entry for its port, and one for its address.
    assert!((MANY / 3..=MANY / 2).contains(&served), "{served}");
}
