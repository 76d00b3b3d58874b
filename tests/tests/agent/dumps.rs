//! `bpftool map dump pinned`: the debugger of those who have no klb at hand.

use std::time::Duration;

use lb_common::names;
use lb_tests::{
    agent::Hooks,
    topology::Family,
    traffic::Protocol,
    world::{Frontend, World},
};
use nix::time::{ClockId, clock_gettime};
use serde_json::Value;

/// The maps that have entries here, with a field of key and of value; none
/// where that is just a number.
const FIELDS: [(&str, Option<&str>, Option<&str>); 17] = [
    (names::SERVICES4, Some("addr"), Some("slot_count")),
    (names::SERVICES6, Some("addr"), Some("slot_count")),
    (names::SLOTS4, None, Some("addr")),
    (names::SLOTS6, None, Some("addr")),
    (names::RANGES4, Some("data"), None),
    (names::RANGES6, Some("data"), None),
    (names::BACKENDS, None, None),
    (names::META, None, Some("namespace")),
    (names::FLOWS4, Some("src_port"), Some("last_seen")),
    (names::FLOWS6, Some("src_port"), Some("last_seen")),
    (names::YOUNG4, Some("src_port"), Some("last_seen")),
    (names::YOUNG6, Some("src_port"), Some("last_seen")),
    (names::SOCKETS4, Some("cookie"), Some("addr")),
    (names::SOCKETS6, Some("cookie"), Some("addr")),
    (names::CONFIG, None, Some("timeouts")),
    (names::TRACE, None, Some("until")),
    (names::COUNTERS, None, None),
];

/// A Service that not everybody may use.
const RANGED: &str = "\
apiVersion: v1
kind: Service
metadata: {name: ranged, namespace: default}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.77
  clusterIPs: [10.96.0.77, 'fd00:10:96::77']
  loadBalancerSourceRanges: [192.0.2.0/24, '2001:db8::/32']
  ports: [{port: 80}]
status: {loadBalancer: {ingress: [{ip: 203.0.113.77}, {ip: '2001:db8:1::77'}]}}
";

/// The elements of a map as bpftool formats them by the map's type information.
fn formatted(world: &World, map: &str) -> Vec<Value> {
    let pin = world.agent.pins().join(map).display().to_string();
    let node = world.cluster.node.place.netns();
    let text = node.output("bpftool", &["-j", "map", "dump", "pinned", &pin]);
    let elements: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    let mut formatted = elements
        .into_iter()
        .map(|mut element| element["formatted"].take());
    let first = formatted.next().unwrap_or_else(|| panic!("{map} is empty"));
    assert!(!first.is_null(), "{map} has no type information");
    std::iter::once(first).chain(formatted).collect()
}

#[test]
fn every_map_shows_the_names_of_its_fields() {
    let mut world = crate::stopped_world(Hooks::ALL);
    world.agent.manifests.put("ranged.yaml", RANGED);
    world.agent.start();
    let pod = &world.cluster.client.host;
    for family in Family::ALL {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let request = world.request(Frontend::ClusterIp, family, protocol);
            for client in [pod, &pod.without_cgroup()] {
                client.ask(&request).expect("an answer");
            }
        }
    }
    for (map, key, value) in FIELDS {
        let elements = formatted(&world, map);
        let element = &elements[0];
        let part = |part: &str, field: Option<&str>| match field {
            Some(field) => !element[part][field].is_null(),
            None => element[part].is_number() || element["values"].is_array(),
        };
        assert!(
            part("key", key),
            "{map}: no {key:?} in the key of {element}"
        );
        assert!(
            part("value", value),
            "{map}: no {value:?} in the value of {element}"
        );
    }
}

/// So that whoever reads a dump can compare them with the time since the node has booted.
#[test]
fn flows_have_the_time_of_the_monotonic_clock() {
    let world = crate::world(Hooks::TC);
    let begun = uptime();
    for family in Family::ALL {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let request = world.request(Frontend::NodePort, family, protocol);
            world.cluster.outside.ask(&request).expect("an answer");
        }
    }
    // Either may be in its next second already.
    let expected = begun.as_secs() - 1..=uptime().as_secs() + 1;
    for map in [names::FLOWS4, names::FLOWS6, names::YOUNG4, names::YOUNG6] {
        for element in formatted(&world, map) {
            let seen = element["value"]["last_seen"].as_u64().expect("a time");
            assert!(
                expected.contains(&seen),
                "{map}: not {expected:?}: {element}"
            );
        }
    }
}

fn uptime() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .expect("a clock")
        .into()
}
