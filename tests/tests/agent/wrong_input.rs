//! What is asked wrongly, or where klb cannot answer: one clear sentence, and an
//! exit status that tells.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use lb_tests::{
    agent::{Agent, Hooks, Said, klb_path},
    manifests::NODE,
    world::World,
};

const EXPLAIN: [&str; 5] = ["explain", "--from", "10.244.0.9", "--to", "10.96.0.1:80"];

/// All commands that read maps, and the status with which each fails.
fn readers(world: &World) -> Vec<(Vec<String>, i32)> {
    let manifests = world.agent.manifests.path().display().to_string();
    let diff = ["diff", "--node-name", NODE, "--manifests", &manifests];
    let lists = [
        "services", "backends", "flows", "sockets", "affinity", "devices", "maps",
    ];
    let lists = lists.map(|list| ["get", list]);
    let mut readers: Vec<(&[&str], i32)> = lists.iter().map(|line| (&line[..], 1)).collect();
    readers.extend([(&["status"][..], 1), (&EXPLAIN, 1), (&diff, 2)]);
    let owned = |line: &[&str]| line.iter().map(ToString::to_string).collect();
    readers
        .into_iter()
        .map(|(line, status)| (owned(line), status))
        .collect()
}

/// One line that says it, and nothing else.
fn assert_sentence(line: &[String], said: &Said, status: i32, words: &[&str]) {
    assert_eq!(said.status.code(), Some(status), "{line:?}: {said:?}");
    assert_eq!(said.stdout, "", "{line:?}");
    assert_eq!(said.stderr.lines().count(), 1, "{line:?}: {said:?}");
    assert!(said.stderr.starts_with("klb: "), "{line:?}: {said:?}");
    for word in words {
        assert!(said.stderr.contains(word), "{line:?}: {word}: {said:?}");
    }
}

fn assert_all_say(world: &World, words: &[&str]) {
    for (line, status) in readers(world) {
        let words_of_line: Vec<&str> = line.iter().map(String::as_str).collect();
        let said = world.agent.klb(&words_of_line);
        assert_sentence(&line, &said, status, words);
    }
}

#[test]
fn where_nothing_is_pinned() {
    let world = crate::stopped_world(Hooks::SOCKET);
    assert_all_say(&world, &["nothing of klb is pinned at"]);
    let said = world.agent.klb(&["cleanup"]);
    assert_eq!(said.status.code(), Some(0), "nothing to do: {said:?}");
    let said = world.agent.klb(&["doctor"]);
    assert_eq!(said.status.code(), Some(1), "that is a finding: {said:?}");
    assert!(said.stdout.contains("none runs and none has"), "{said:?}");
}

#[test]
fn where_the_maps_are_another_klbs() {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    world.agent.flags.push("--layout=v0".to_owned());
    world.agent.start();
    assert_all_say(&world, &["are of layout v0, and this klb's is v1"]);
    world.agent.terminate();
    // By another name only: its maps are the same.
    let pins = world.agent.pins();
    let other = pins.with_file_name("v0");
    fs::rename(&other, &pins).expect("a folder");
    assert!(world.agent.klb(&["get", "services"]).status.success());
    let spoiled = pins.join("klb_config");
    fs::remove_file(&spoiled).expect("a pinned map");
    pin_map_of_another_shape(&spoiled);
    assert_all_say(&world, &["are not as this klb's are", "klb_config"]);
}

fn pin_map_of_another_shape(pin: &Path) {
    let pin = pin.display().to_string();
    let mut command = std::process::Command::new("bpftool");
    command.args(["map", "create", &pin, "type", "array", "key", "4"]);
    command.args(["value", "7", "entries", "1", "name", "klb_config"]);
    let output = command.output().expect("bpftool runs");
    assert!(output.status.success(), "{output:?}");
}

/// `klb` as a user who may do nothing.
fn as_nobody(world: &World, program: &Path, line: &[String]) -> Said {
    let place = &world.cluster.node.place;
    let mut command = place.command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.args(["--bounding-set=-all", "--inh-caps=-all"]);
    command.arg(program).args(line).args(world.agent.paths());
    let mut process = place.start("klb-nobody", command);
    Said {
        status: process.wait(Duration::from_secs(60)),
        stdout: process.stdout().text(),
        stderr: process.stderr().text(),
    }
}

#[test]
fn who_may_not() {
    let world = crate::world(Hooks::SOCKET);
    // Where nobody gets at it.
    let program = world.cluster.scope().folder().join("klb");
    fs::copy(klb_path(), &program).expect("a copy");
    let folder = world.cluster.scope().folder();
    for path in [&program, &folder] {
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(path, mode).expect("its owner");
    }
    let words = ["ermi", "run klb as root", "docs/privileges.md"];
    for (line, status) in readers(&world) {
        let said = as_nobody(&world, &program, &line);
        assert_sentence(&line, &said, status, &words);
    }
    let cleanup = vec!["cleanup".to_owned(), "--force".to_owned()];
    let said = as_nobody(&world, &program, &cleanup);
    assert_sentence(&cleanup, &said, 1, &words);
    let said = as_nobody(&world, &program, &["doctor".to_owned()]);
    assert_eq!(said.status.code(), Some(1), "that is a finding: {said:?}");
    assert!(said.stdout.contains("fail  capabilities"), "{said:?}");
    assert!(world.agent.status().healthy, "nothing was done");
}

#[test]
fn what_is_asked_for_is_not_there() {
    let world = crate::world(Hooks::TC);
    for (line, words) in [
        (&["get", "services", "ech"][..], &["no Service ech is"][..]),
        (
            &["get", "flows", "echo", "-n", "elsewhere"],
            &["no Service echo of namespace elsewhere"],
        ),
        (&["get", "devices", "eth9"], &["no device eth9"]),
        (&["get", "maps", "klb_svc5"], &["no map klb_svc5"]),
        (
            &["get", "maps", "--client", "10.0.0.1"],
            &["--client selects of flows, affinity only"],
        ),
        (&[&EXPLAIN[..], &["--at", "eth9"]].concat(), &["eth9"]),
        (
            &["cleanup"],
            &["stop the agent first", "an agent runs already"],
        ),
    ] {
        let owned: Vec<_> = line.iter().map(ToString::to_string).collect();
        assert_sentence(&owned, &world.agent.klb(line), 1, words);
    }
}

/// What no klb could know what to do with is told by the parser, with the flag
/// and what is wanted.
#[test]
fn what_makes_no_sense_is_wrong_usage() {
    let world = crate::stopped_world(Hooks::SOCKET);
    let usage = |agent: &Agent, line: &[&str]| {
        let said = agent.klb_elsewhere(line);
        assert_eq!(said.status.code(), Some(2), "{line:?}: {said:?}");
        assert_eq!(said.stdout, "", "{line:?}");
        said.stderr
    };
    for (line, words) in [
        (&["get"][..], &["<WHAT>"][..]),
        (&["get", "weather"], &["weather", "services"]),
        (
            &["get", "flows", "--client", "here"],
            &["--client", "wanted is an address"],
        ),
        (&["get", "flows", "--vip", "10.0.0.1:80000"], &["--vip"]),
        (
            &["get", "services", "a", "--service", "b"],
            &["cannot be used with"],
        ),
        (&["get", "services", "-o", "xml"], &["xml", "json"]),
        (&["get", "services", "--interval", "1s"], &["--watch"]),
        (&["status", "--over", "soon"], &["--over"]),
        (&["explain", "--from", "10.0.0.1"], &["--to"]),
        (
            &["explain", "--from", "10.0.0.1", "--to", "10.96.0.1"],
            &["--to"],
        ),
        (
            &["explain", "--from", "fd00::1", "--to", "10.96.0.1:80"],
            &["fd00::1"],
        ),
        (&["doctor", "--uplink"], &["--uplink"]),
        (&["cleanup", "--dry-run"], &["--kube-proxy"]),
        (&["completions", "sh"], &["bash"]),
        (&["diff"], &["--node-name"]),
        (&["agent"], &["--node-name"]),
        (&["fly"], &["fly"]),
    ] {
        let stderr = usage(&world.agent, line);
        for word in words {
            assert!(stderr.contains(word), "{line:?}: {word}: {stderr}");
        }
    }
}
