//! `klb diff`: what should be in the maps against what is.

use std::{fs, path::Path, process::Command};

use lb_common::{Addr4, Addr6, names, service::Slot};
use lb_tests::{
    agent::{Hooks, Said, spoil},
    manifests::{NODE, many},
    topology::Family,
    traffic::Protocol,
    world::{Frontend, PODS, World},
};
use serde_json::Value;

/// Runs it against the folder of the world's agent.
fn diff(world: &World, flags: &[&str]) -> Said {
    let folder = world.agent.manifests.path().display().to_string();
    let source = ["diff", "--node-name", NODE, "--manifests", &*folder];
    world.agent.klb(&[&source, flags].concat())
}

fn assert_equal(said: &Said) {
    assert_eq!(said.status.code(), Some(0), "{said:?}");
    assert_eq!(said.stdout, "");
}

#[test]
fn nothing_differs_until_nobody_follows() {
    let mut world = crate::world(Hooks::TC);
    assert_equal(&diff(&world, &[]));
    world.agent.kill();
    assert_equal(&diff(&world, &[]));
    world.put_endpoints(&PODS[1..]);
    let said = diff(&world, &["--wait", "1s"]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    for word in [
        "echo:http",
        "10.96.0.1:80/TCP",
        "backends: -10.244.0.5:3000",
    ] {
        assert!(said.stdout.contains(word), "no {word} in\n{}", said.stdout);
    }
    world.agent.start();
    assert_equal(&diff(&world, &[]));
}

/// An agent that believes to know what it wrote does not matter.
#[test]
fn spoiled_maps_are_told_while_the_agent_runs() {
    let world = crate::world(Hooks::TC);
    spoil(&world.agent.pins().join(names::SERVICES4));
    let said = diff(&world, &["--wait", "1s", "-o", "json"]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    let report: Value = serde_json::from_str(&said.stdout).expect("JSON");
    let differences = report["differences"].as_array().expect("a list");
    let cluster_ip = differences
        .iter()
        .find(|difference| difference["frontend"] == "10.96.0.1:80/TCP");
    let cluster_ip = cluster_ip.unwrap_or_else(|| panic!("{report}"));
    assert_eq!(cluster_ip["state"], "differs", "{report}");
    assert_eq!(cluster_ip["namespace"], "default", "{report}");
}

#[test]
fn an_api_server_is_asked_as_the_agent_does() {
    let (mut world, _server) = crate::api::world(Hooks::TC);
    world.agent.start();
    let file = world.agent.kubeconfig.clone().expect("a file");
    let file = file.display().to_string();
    let line = ["diff", "--node-name", NODE, "--kubeconfig", &*file];
    assert_equal(&world.agent.klb(&line));
}

/// Which is no answer, so the exit status is neither of the two.
#[test]
fn trouble_has_an_exit_status_of_its_own() {
    let world = crate::stopped_world(Hooks::TC);
    let said = diff(&world, &[]);
    assert_eq!(said.status.code(), Some(2), "nothing is pinned: {said:?}");
    assert!(said.stderr.contains("nothing of klb is pinned"), "{said:?}");
}

/// Pins an array as it was before the agent stored into it.
fn make_array(pin: &Path, value: usize, entries: &str) {
    let name = pin.file_name().expect("a name");
    let made = Command::new("bpftool")
        .args(["map", "create"])
        .arg(pin)
        .args(["type", "array", "key", "4", "value", &value.to_string()])
        .args(["entries", entries, "name"])
        .arg(name)
        .output()
        .expect("bpftool");
    assert!(made.status.success(), "{made:?}");
}

#[test]
fn many_services_are_written_at_once_into_the_arrays_of_any_klb() {
    for is_old in [false, true] {
        let mut world = crate::stopped_world(Hooks::TC);
        world.agent.manifests.put("many.yaml", &many(100));
        if is_old {
            let pins = world.agent.pins();
            fs::create_dir_all(&pins).expect("a folder of pins");
            make_array(&pins.join(names::SLOTS4), size_of::<Slot<Addr4>>(), "4096");
            make_array(&pins.join(names::SLOTS6), size_of::<Slot<Addr6>>(), "4096");
            make_array(&pins.join(names::BACKENDS), size_of::<u32>(), "1024");
        }
        world.agent.start();
        assert_equal(&diff(&world, &[]));
        let request = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
        world.cluster.outside.ask(&request).expect("an answer");
    }
}
