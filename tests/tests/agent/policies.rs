//! What a Service asks for besides backends, and what flags ask for, as the
//! kernel's maps have it.

use std::time::Duration;

use lb_common::names;
use lb_tests::{
    agent::{Agent, Hooks, raw_dump},
    manifests::NODE,
    wait,
};
use serde_json::{Value, json};

/// How long a change may take to reach the maps.
const CHANGE: Duration = Duration::from_secs(20);

/// A Service with everything: one endpoint is here, the other is not.
fn balanced(ranges: &str) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: balanced, namespace: shop}}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.77
  clusterIPs: [10.96.0.77, 'fd00:10:96::77']
  externalTrafficPolicy: Local
  sessionAffinity: ClientIP
  sessionAffinityConfig: {{clientIP: {{timeoutSeconds: 77}}}}
  loadBalancerSourceRanges: {ranges}
  ports:
  - {{port: 7000, protocol: SCTP}}
status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.7}}, {{ip: '2001:db8::7'}}]}}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: balanced-1
  namespace: shop
  labels: {{kubernetes.io/service-name: balanced}}
addressType: IPv4
ports:
- {{name: '', port: 7001, protocol: SCTP}}
endpoints:
- {{addresses: [10.244.0.5], nodeName: {NODE}}}
- {{addresses: [10.244.9.9], nodeName: elsewhere}}
"
    )
}

/// `klb get services -o json` of a namespace.
fn services(agent: &Agent, namespace: &str) -> Vec<Value> {
    let said = agent.klb(&["get", "services", "-n", namespace, "-o", "json"]);
    let mut document: Value = serde_json::from_str(&said.stdout).expect("JSON");
    let services = document["services"].as_array_mut();
    std::mem::take(services.expect("a list"))
}

/// The frontend of a Service port at an address.
fn frontend<'a>(service: &'a Value, address: &str) -> &'a Value {
    let mut frontends = service["frontends"].as_array().expect("a list").iter();
    let frontend = frontends.find(|frontend| frontend["address"] == address);
    frontend.unwrap_or_else(|| panic!("no {address} in {service}"))
}

fn await_ranges(agent: &Agent, ranges: &Value) {
    wait::until(&format!("the source ranges to be {ranges}"), CHANGE, || {
        let services = services(agent, "shop");
        let found = services
            .first()
            .map(|service| &frontend(service, "203.0.113.7")["source_ranges"]);
        (found == Some(ranges)).then_some(())
    });
}

/// What no other test of restarts has in its maps.
fn written(agent: &Agent) -> Vec<Vec<String>> {
    use names::{CONFIG, RANGES4, RANGES6, SERVICES4, SERVICES6, SLOTS4};
    [SERVICES4, SERVICES6, SLOTS4, RANGES4, RANGES6, CONFIG]
        .map(|map| raw_dump(&agent.pins().join(map)))
        .into()
}

#[test]
fn what_a_service_asks_for_is_in_the_maps_and_survives_a_restart() {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    let ranges = "[198.51.100.0/24, ' 192.0.2.7/32 ', '2001:db8:9::/48']";
    let manifests = world.agent.manifests.clone();
    manifests.put("balanced.yaml", &balanced(ranges));
    world.agent.start();

    let agent = &mut world.agent;
    let [service] = &services(agent, "shop")[..] else {
        panic!("one port");
    };
    assert_eq!(service["protocol"], "SCTP");
    assert_eq!(service["affinity_seconds"], 77);
    let (here, elsewhere) = (
        json!({"address": "10.244.0.5", "port": 7001}),
        json!({"address": "10.244.9.9", "port": 7001}),
    );
    let cluster_ip = frontend(service, "10.96.0.77");
    assert_eq!(cluster_ip["backends"], json!([here, elsewhere]));
    assert_eq!(cluster_ip["inner_backends"], Value::Null);
    assert_eq!(cluster_ip["source_ranges"], Value::Null);
    let balancer = frontend(service, "203.0.113.7");
    assert_eq!(balancer["policy"], "Local");
    assert_eq!(balancer["backends"], json!([here]));
    assert_eq!(balancer["inner_backends"], json!([here, elsewhere]));
    let balancer = frontend(service, "2001:db8::7");
    assert_eq!(balancer["source_ranges"], json!(["2001:db8:9::/48"]));
    await_ranges(agent, &json!(["192.0.2.7/32", "198.51.100.0/24"]));

    let before = written(agent);
    assert!(before.iter().all(|map| !map.is_empty()));
    agent.kill();
    agent.start();
    assert_eq!(written(agent), before);

    manifests.put("balanced.yaml", &balanced("[198.51.100.0/25]"));
    await_ranges(agent, &json!(["198.51.100.0/25"]));
    manifests.put("balanced.yaml", &balanced("[]"));
    await_ranges(agent, &Value::Null);
    for map in [names::RANGES4, names::RANGES6] {
        let left = raw_dump(&agent.pins().join(map));
        assert!(left.is_empty(), "{map}: {left:?}");
    }
}

#[test]
fn flags_reach_the_programs() {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    let flags = "--masquerade-ports=40000-40009 --timeout-udp=7s --algorithm=maglev \
                 --maglev-table-size=101 --nodeport-addresses=192.168.0.0/16";
    world
        .agent
        .flags
        .extend(flags.split(' ').map(str::to_owned));
    world.agent.start();
    let said = world.agent.klb(&["status", "-o", "json"]);
    let status: Value = serde_json::from_str(&said.stdout).expect("JSON");
    let settings = &status["settings"];
    assert_eq!(settings["masquerade_ports"], "40000-40009");
    assert_eq!(
        settings["cluster_networks"],
        json!(["10.96.0.1/32", "fd00:10:96::1/128"])
    );
    let timeouts = settings["timeouts"].as_array().expect("a list");
    assert!(timeouts.contains(&json!({"state": "unreplied", "seconds": 7})));
    for service in services(&world.agent, "default") {
        assert_eq!(service["algorithm"], "maglev");
        for frontend in service["frontends"].as_array().expect("a list") {
            let backends = frontend["backends"].as_array().expect("a list");
            assert_eq!(backends.len(), 3, "each once: {frontend}");
        }
    }
    // Two ports in each family.
    let maps = status["maps"].as_array().expect("a list");
    for name in [names::SLOTS4, names::SLOTS6] {
        let slots = maps.iter().find(|map| map["name"] == name);
        assert_eq!(slots.expect("listed")["entries"], 2 * 101);
    }
}
