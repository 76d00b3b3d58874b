//! Every `-o json` is as its schema in `docs/schemas` says, and has nothing that
//! the schema does not describe, with an agent, after it was stopped, and after
//! it was killed.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use lb_common::names;
use lb_tests::{
    agent::{Agent, Hooks, Said, spoil},
    manifests::NODE,
    topology::Family,
    traffic::Protocol,
    wait,
    world::{Frontend, SERVICE_FILE, World},
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// For what takes no time as a rule.
const TIME: Duration = Duration::from_secs(20);

/// A schema that allows nothing else than what it describes. What programs are
/// given does not say so: a later klb may tell more.
fn strict(name: &str) -> Value {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schemas");
    let path = folder.join(format!("{name}.json"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut schema: Value = serde_json::from_str(&text).expect("JSON");
    close(&mut schema);
    schema
}

fn close(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("properties").is_some_and(Value::is_object) {
                fields.insert("additionalProperties".to_owned(), false.into());
            }
            fields.values_mut().for_each(close);
        }
        Value::Array(values) => values.iter_mut().for_each(close),
        _ => {}
    }
}

fn assert_valid(name: &str, said: &Said) -> Value {
    let document: Value = said.json();
    assert_described(name, &document);
    document
}

fn assert_described(name: &str, document: &Value) {
    let schema = jsonschema::validator_for(&strict(name)).expect("a schema");
    let complaints: Vec<_> = schema
        .iter_errors(document)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(complaints.is_empty(), "{name}: {complaints:#?}: {document}");
}

/// Flows, sockets, clients and all else that there is something to tell of.
fn use_it(world: &World) {
    let client = world.cluster.client.host.without_cgroup();
    for family in Family::ALL {
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let request = world.request(Frontend::ClusterIp, family, protocol);
            client.ask(&request).expect("an answer");
            world.cluster.node.ask(&request).expect("an answer");
        }
    }
}

/// A Service with affinity, source ranges, and backends of this node only for
/// some of its frontends.
fn put_everything(world: &World) {
    let spec = "spec:\n  sessionAffinity: ClientIP\n  internalTrafficPolicy: Cluster\n  \
                externalTrafficPolicy: Local\n  externalIPs: [203.0.113.7]\n  \
                loadBalancerSourceRanges: [192.0.2.0/24]\n";
    let manifest = world.service.to_string();
    let manifest = manifest
        .replace("spec:\n", spec)
        .replace("type: NodePort", "type: LoadBalancer");
    let status = "status:\n  loadBalancer:\n    ingress: [{ip: 203.0.113.8}]\n";
    let manifests = &world.agent.manifests;
    manifests.put(SERVICE_FILE, &format!("{manifest}{status}"));
}

fn assert_all(world: &World) {
    let klb = |line: &[&str]| world.agent.klb(&[line, &["-o", "json"]].concat());
    for list in [
        "services", "backends", "flows", "sockets", "affinity", "devices", "maps",
    ] {
        let document = assert_valid(&format!("get-{list}"), &klb(&["get", list]));
        let rows = document[list].as_array().expect("a list");
        assert!(!rows.is_empty(), "{list}: {document}");
    }
    assert_valid("status", &klb(&["status"]));
    assert_valid("status", &klb(&["status", "--over", "1s"]));
    assert_valid("doctor", &klb(&["doctor"]));
    assert_valid("doctor", &klb(&["doctor", "--preflight"]));
    for (from, to, more) in [
        ("10.244.0.9", "10.96.0.1:80", &[][..]),
        ("10.244.0.9", "10.96.0.1:80", &["--at", "socket"]),
        (
            "[fd00:10:244::9]:4000",
            "[fd00:10:96::1]:53",
            &["--proto=udp"],
        ),
        // For nobody; for a pod itself; by a balancer's address.
        ("10.244.0.9", "10.96.0.1:81", &[]),
        ("10.244.0.9", "10.244.0.5:3000", &[]),
        ("192.0.2.200", "203.0.113.8:80", &[]),
        ("10.244.0.5", "10.96.0.1:80", &[]),
    ] {
        let line = [&["explain", "--from", from, "--to", to], more].concat();
        assert_valid("explain", &klb(&line));
    }
    let manifests = world.agent.manifests.path().display().to_string();
    let diff = ["diff", "--node-name", NODE, "--manifests", &manifests];
    assert_valid("diff", &klb(&diff));
    let top = assert_valid("top", &klb(&["top", "--interval=1s"]));
    assert_ne!(top["services"], serde_json::json!([]));
}

/// Lines of packets and of calls.
fn assert_trace(world: &World) {
    let line = ["trace", "-o", "json", "--reason", "translate,answer,pass"];
    let mut trace = world.agent.start_klb(&line);
    trace.wait_for_stderr("sign that it listens", TIME, |line| {
        line.contains("listening")
    });
    use_it(world);
    trace.signal(Signal::SIGINT);
    assert!(trace.wait(TIME).success(), "{trace:?}");
    let lines = trace.stdout().lines();
    let events: Vec<Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    for event in &events {
        assert_described("trace", event);
    }
    let hooks: BTreeSet<_> = events.iter().map(|event| event["hook"].as_str()).collect();
    assert!(
        hooks.contains(&Some("socket")) && hooks.len() > 2,
        "{hooks:?}"
    );
}

#[test]
fn json_is_as_its_schema_says() {
    let mut world = crate::stopped_world(Hooks::ALL);
    put_everything(&world);
    world.agent.start();
    use_it(&world);
    assert_all(&world);
    assert_trace(&world);
    for stop in [Agent::terminate, Agent::kill] {
        stop(&mut world.agent);
        assert_all(&world);
        world.agent.start();
        // Flows that are over are forgotten two minutes later.
        use_it(&world);
    }
    // Something to tell of what is wrong.
    let broken = world.service.to_string().replace("port: 80\n", "port: 0\n");
    world.agent.manifests.put("broken.yaml", &broken);
    wait::until("it to be noted", TIME, || {
        let noted = world.agent.status().noted?;
        (noted.skipped.count == 1).then_some(())
    });
    world.agent.kill();
    spoil(&world.agent.pins().join(names::SERVICES4));
    let klb = |line: &[&str]| world.agent.klb(&[line, &["-o", "json"]].concat());
    let status = assert_valid("status", &klb(&["status"]));
    assert_eq!(status["noted"]["skipped"]["count"], 1, "{status}");
    let manifests = world.agent.manifests.path().display().to_string();
    let diff = [
        "diff",
        "--node-name",
        NODE,
        "--manifests",
        &manifests,
        "--wait=1s",
    ];
    let diff = assert_valid("diff", &klb(&diff));
    assert_ne!(diff["differences"], serde_json::json!([]));
}
