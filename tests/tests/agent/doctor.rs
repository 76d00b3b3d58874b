//! `klb doctor`: before klb is there, with it, and after its agent has died.

use aya::programs::{Xdp, XdpMode};
use lb_common::names;
use lb_tests::{
    agent::{Hooks, Said},
    program,
    topology::{POD_DEVICES, UPLINK},
    world::World,
};
use serde_json::Value;

fn doctor(world: &World, flags: &[&str]) -> Said {
    let devices = ["doctor", "--uplink", UPLINK, "--pod-device", POD_DEVICES];
    world.agent.klb(&[&devices, flags].concat())
}

/// Level and finding of a check.
fn check(said: &Said, name: &str) -> (String, String) {
    let report: Value = serde_json::from_str(&said.stdout).expect("JSON");
    let checks = report["checks"].as_array().expect("a list");
    let check = checks.iter().find(|check| check["name"] == name);
    let check = check.unwrap_or_else(|| panic!("no {name} in {report}"));
    let text = |field: &str| check[field].as_str().expect("text").to_owned();
    (text("level"), text("finding"))
}

fn assert_level(said: &Said, name: &str, level: &str) {
    assert_eq!(check(said, name).0, level, "{name}: {said:?}");
}

#[test]
fn what_is_expected_depends_on_when_it_is_asked() {
    let mut world = crate::stopped_world(Hooks::ALL);
    let said = doctor(&world, &["--preflight", "-o", "json"]);
    assert_eq!(said.status.code(), Some(0), "{said:?}");
    for name in ["kernel", "BTF", "devices", "MTU", "traces of klb", "klb"] {
        assert_level(&said, name, "ok");
    }
    assert!(check(&said, "devices").1.contains(UPLINK), "{said:?}");
    let said = doctor(&world, &["-o", "json"]);
    assert_eq!(said.status.code(), Some(1), "no agent: {said:?}");
    assert_level(&said, "agent", "fail");

    world.agent.start();
    let said = doctor(&world, &["-o", "json"]);
    assert_eq!(said.status.code(), Some(0), "{said:?}");
    for name in ["agent", "hooks", "masquerade ports", "kube-proxy"] {
        assert_level(&said, name, "ok");
    }
    let said = doctor(&world, &["--preflight", "-o", "json"]);
    assert_level(&said, "traces of klb", "warn");

    world.agent.kill();
    let said = doctor(&world, &[]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    let line = said.stdout.lines().find(|line| line.starts_with("fail"));
    assert!(line.is_some_and(|line| line.contains("agent")), "{said:?}");
    assert!(said.stdout.contains("→ see its log"), "{said:?}");
}

#[test]
fn what_is_wrong_with_the_node_is_found() {
    let world = crate::stopped_world(Hooks::ALL);
    let node = world.cluster.node.place.netns();
    node.output("nft", &["add", "table", "ip", "kube-proxy"]);
    node.sysctl("net/ipv4/ip_forward", "0");
    node.ip("link set up0 mtu 1400\n");
    let said = doctor(&world, &["-o", "json"]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    assert_level(&said, "kube-proxy's rules", "warn");
    assert_level(&said, "forwarding", "fail");
    assert_level(&said, "MTU", "warn");
    let (_, finding) = check(&said, "kube-proxy's rules");
    assert!(finding.contains("table ip kube-proxy"), "{finding}");
}

/// An offload is wrong only where something of klb's is in its way.
#[test]
fn offloads_are_looked_at_where_they_matter() {
    let mut world = crate::stopped_world(Hooks::ALL);
    let node = world.cluster.node.place.netns();
    let findings = |world: &World, flags: &[&str]| -> Vec<String> {
        let said = doctor(world, &[&["-o", "json"], flags].concat());
        let report: Value = said.json();
        let checks = report["checks"].as_array().expect("a list").iter();
        let checks = checks.filter(|check| check["name"] == "offloads");
        let findings = checks.map(|check| check["finding"].as_str().expect("text").to_owned());
        findings.collect()
    };
    let has = |findings: &[String], text: &str| findings.iter().any(|it| it.contains(text));
    node.output("ethtool", &["-K", UPLINK, "gro", "on"]);
    let before = findings(&world, &["--preflight"]);
    assert!(!has(&before, "GRO is off"), "{before:?}");
    node.output("ethtool", &["-K", UPLINK, "gro", "off"]);
    let off = findings(&world, &["--preflight"]);
    assert!(has(&off, &format!("GRO is off at {UPLINK}")), "{off:?}");

    // With bypass XDP sends to pods, whose devices take frames if GRO is on at
    // their other end.
    let pod = world.cluster.pods[0].host.place.netns();
    pod.output("ethtool", &["-K", "eth0", "gro", "on"]);
    world.agent.flags.push("--routing=bypass".to_owned());
    world.agent.start();
    let told = findings(&world, &[]);
    assert!(
        has(&told, "3 of 4 devices of pods take no frames"),
        "{told:?}"
    );
    world.agent.terminate();
    world.agent.flags.retain(|flag| flag != "--routing=bypass");
    world.agent.start();
    let told = findings(&world, &[]);
    assert!(!has(&told, "take no frames"), "nobody sends any: {told:?}");
}

/// Of two programs for XDP a device runs one.
#[test]
fn a_program_of_somebody_else_is_found_at_an_uplink() {
    let world = crate::stopped_world(Hooks::ALL);
    let node = world.cluster.node.place.netns();
    let said = doctor(&world, &["--preflight", "-o", "json"]);
    assert!(!said.stdout.contains("somebody else"), "{said:?}");
    let mut object = program::load();
    let program = object.program_mut(names::XDP).expect("in the object");
    program::load_program(program).expect("accepted");
    let program: &mut Xdp = program.try_into().expect("a program for XDP");
    node.within(|| program.attach(UPLINK, XdpMode::Driver))
        .expect("attached");
    let said = doctor(&world, &["--preflight", "-o", "json"]);
    assert_level(&said, "XDP", "warn");
    assert!(check(&said, "XDP").1.contains(UPLINK), "{said:?}");
}
