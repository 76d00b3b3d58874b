//! `klb get` and `klb status`: they read the kernel's maps, whether an agent
//! runs or not.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::ExitStatusExt as _,
    process::Command,
    thread,
    time::Duration,
};

use lb_tests::{
    agent::{Hooks, klb_path},
    process::Process,
    topology::Family,
    traffic::Protocol,
    wait, web,
    world::{Frontend, SERVICE_FILE, World},
};
use nix::sys::signal::Signal;

/// For what takes no time as a rule.
const TIME: Duration = Duration::from_secs(20);

const WHAT: [&str; 5] = ["services", "backends", "flows", "devices", "maps"];

/// Leaves a flow in the tables.
fn use_it(world: &World) {
    let client = world.cluster.client.host.without_cgroup();
    for family in Family::ALL {
        let request = world.request(Frontend::ClusterIp, family, Protocol::Udp);
        client.ask(&request).expect("an answer");
    }
}

#[test]
fn all_of_them_work_without_an_agent() {
    let mut world = crate::world(Hooks::ALL);
    use_it(&world);
    let with_agent = world.agent.backends("echo");
    assert!(world.agent.status().agent.running);
    world.agent.kill();
    use_it(&world);
    assert_eq!(world.agent.backends("echo"), with_agent);
    let status = world.agent.status();
    assert!(!status.agent.running);
    assert!(
        status
            .warnings
            .iter()
            .any(|warning| warning.contains("no agent"))
    );
    let words = [
        (
            "services",
            vec!["echo", "10.96.0.1", "fd00:10:96::1", "30080", "10.244.0.5"],
        ),
        ("backends", vec!["10.244.0.6", "fd00:10:244::7", "3053"]),
        ("flows", vec!["10.96.0.1", "10.244.0.9", "fd00:10:244::9"]),
        ("devices", vec!["up0", "pod5", "pod9"]),
        ("maps", vec!["klb_svc4", "klb_flow6"]),
    ];
    for (what, words) in words {
        let said = world.agent.klb(&["get", what]);
        assert!(said.status.success(), "{said:?}");
        for word in words {
            assert!(said.stdout.contains(word), "no {word} in\n{}", said.stdout);
        }
    }
    let said = world.agent.klb(&["status"]);
    assert!(said.status.success(), "{said:?}");
}

#[test]
fn json_is_one_document() {
    let world = crate::world(Hooks::ALL);
    use_it(&world);
    for what in WHAT {
        let said = world.agent.klb(&["get", what, "-o", "json"]);
        let document: serde_json::Value =
            serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"));
        let list = document[what].as_array();
        assert!(list.is_some_and(|list| !list.is_empty()), "{document}");
    }
}

#[test]
fn a_namespace_selects() {
    let world = crate::world(Hooks::SOCKET);
    for (namespace, shown) in [("default", true), ("elsewhere", false)] {
        let said = world.agent.klb(&["get", "services", "-n", namespace]);
        assert_eq!(said.stdout.contains("echo"), shown, "{said:?}");
    }
}

/// The rows of a listing.
fn rows(world: &World, what: &str, flags: &[&str]) -> Vec<serde_json::Value> {
    let said = world
        .agent
        .klb(&[&["get", what, "-o", "json"], flags].concat());
    let document: serde_json::Value = serde_json::from_str(&said.stdout)
        .unwrap_or_else(|error| panic!("{flags:?}: {error}: {said:?}"));
    document[what].as_array().expect("a list").clone()
}

/// Indices mean other devices there: a wrong name is worse than none.
#[test]
fn devices_of_another_namespace_are_not_named() {
    let world = crate::world(Hooks::TC);
    let outside = |arguments: &[&str]| {
        let mut command = Command::new(klb_path());
        let command = command.args(arguments).args(world.agent.paths());
        command.output().expect("klb runs")
    };
    let explain = ["explain", "--from", "10.244.0.9", "--to", "10.96.0.1:80"];
    for command in [&["get", "devices"][..], &explain] {
        let said = outside(command);
        assert_eq!(said.status.code(), Some(1), "{said:?}");
        let stderr = String::from_utf8_lossy(&said.stderr);
        assert!(stderr.contains("another network namespace"), "{said:?}");
    }
    let said = outside(&["status", "-o", "json"]);
    let status: serde_json::Value = serde_json::from_slice(&said.stdout).expect("JSON");
    assert_eq!(status["devices"], serde_json::json!([]));
    let warnings = status["warnings"].to_string();
    assert!(warnings.contains("another network namespace"), "{warnings}");
}

#[test]
fn addresses_and_names_select() {
    let world = crate::world(Hooks::TC);
    use_it(&world);
    for (what, flags, count) in [
        ("services", &["--vip", "10.96.0.1:80"][..], 1),
        ("services", &["--vip", "10.96.0.1"], 2),
        ("services", &["--backend", "10.244.0.5:3053"], 1),
        ("services", &["--service", "echo:http"], 1),
        ("services", &["--service", "ech"], 0),
        ("backends", &["--service", "echo:datagrams"], 6),
        ("backends", &["--backend", "fd00:10:244::5"], 2),
        ("flows", &["--client", "10.244.0.9"], 1),
        (
            "flows",
            &["--client", "10.244.0.9", "--vip", "10.96.0.2"],
            0,
        ),
        ("flows", &["--vip", "[fd00:10:96::1]:53"], 1),
    ] {
        let rows = rows(&world, what, flags);
        assert_eq!(rows.len(), count, "{what} {flags:?}: {rows:?}");
    }
    let said = world
        .agent
        .klb(&["get", "services", "--client", "10.0.0.1"]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    assert!(said.stderr.contains("--client selects"), "{said:?}");
    let said = world.agent.klb(&["get", "flows", "--client", "here"]);
    assert_eq!(said.status.code(), Some(2), "{said:?}");
}

#[test]
fn wide_tells_more_and_yaml_is_for_programs() {
    let world = crate::world(Hooks::TC);
    use_it(&world);
    let traffic = rows(&world, "backends", &["--service", "echo:datagrams"]);
    let flows = traffic.iter().map(|row| row["traffic"]["flows"].as_u64());
    assert_eq!(flows.flatten().sum::<u64>(), 2, "{traffic:?}");
    for (what, words) in [
        ("backends", &["FLOWS", "BYTES-OUT", "10.244.0.6:3053"][..]),
        (
            "services",
            &[
                "ALGORITHM",
                "random",
                "10.244.0.5:3000,10.244.0.6:3000,10.244.0.7:3000",
            ],
        ),
    ] {
        let said = world.agent.klb(&["get", what, "-o", "wide"]);
        for word in words {
            assert!(said.stdout.contains(word), "no {word} in\n{}", said.stdout);
        }
    }
    let said = world.agent.klb(&["get", "flows", "-o", "yaml"]);
    assert!(
        said.stdout.starts_with("flows:\n- namespace: default\n"),
        "{said:?}"
    );
}

/// Nothing is said twice, and Ctrl-C ends it.
#[test]
fn a_watch_tells_of_changes() {
    let world = crate::world(Hooks::TC);
    let line = ["get", "backends", "--watch", "--interval", "100ms"];
    let mut watch = world.agent.start_klb(&line);
    let tables = |watch: &Process| watch.stdout().text().matches("NAMESPACE").count();
    wait::until("the first table", TIME, || {
        (tables(&watch) == 1).then_some(())
    });
    assert!(watch.stdout().text().contains("10.244.0.6"));
    thread::sleep(Duration::from_millis(500));
    assert_eq!(tables(&watch), 1, "{watch:?}");
    world.put_endpoints(&[("pod5", 5)]);
    let last = wait::until("another table", TIME, || {
        let text = watch.stdout().text();
        let (_, last) = text.rsplit_once("NAMESPACE")?;
        (!last.contains("10.244.0.6")).then(|| last.to_owned())
    });
    assert!(last.contains("10.244.0.5"), "{last}");
    watch.signal(Signal::SIGINT);
    let status = watch.wait(TIME);
    assert_eq!(status.signal(), Some(libc::SIGINT), "{status}");
}

/// A second look tells what goes on, and one alone says nothing of it.
#[test]
fn status_tells_what_is_counted_now() {
    let mut world = crate::world(Hooks::TC);
    use_it(&world);
    // Nobody else is needed for it.
    world.agent.kill();
    let counters = |flags: &[&str], meanwhile: &dyn Fn()| {
        let line = [&["status", "-o", "json"], flags].concat();
        let mut status = world.agent.start_klb(&line);
        while status.status().is_none() {
            meanwhile();
        }
        let text = status.stdout().text();
        let document: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        document["counters"].as_array().expect("a list").clone()
    };
    let busy = counters(&["--over", "2s"], &|| use_it(&world));
    let is_now = |counter: &serde_json::Value| {
        let rate = counter["per_second"].as_f64().expect("a rate");
        counter["effect"] == "translate" && rate > 0.0
    };
    assert!(busy.iter().any(is_now), "{busy:?}");
    let one_look = counters(&[], &|| thread::sleep(Duration::from_millis(10)));
    assert!(!one_look.is_empty());
    let says_nothing = |counter: &serde_json::Value| counter.get("per_second").is_none();
    assert!(one_look.iter().all(says_nothing), "{one_look:?}");
}

#[test]
fn affinity_tells_who_keeps_whom() {
    let mut world = crate::stopped_world(Hooks::TC);
    let affinity = "spec:\n  sessionAffinity: ClientIP\n  \
                    sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}\n";
    let manifest = world.service.to_string().replace("spec:\n", affinity);
    world.agent.manifests.put(SERVICE_FILE, &manifest);
    world.agent.start();
    use_it(&world);
    let all = rows(&world, "affinity", &[]);
    assert_eq!(all.len(), 2, "{all:?}");
    let [row] = &rows(&world, "affinity", &["--client", "10.244.0.9"])[..] else {
        panic!("one of each family: {all:?}");
    };
    assert_eq!(row["port_name"], "datagrams", "{row}");
    let backend = row["backend"].as_str().expect("a backend");
    assert!(backend.starts_with("10.244.0."), "{row}");
    assert!(
        row["left_seconds"].as_u64().is_some_and(|left| left <= 60),
        "{row}"
    );
    world.agent.age_affinity(61);
    assert_eq!(rows(&world, "affinity", &[]), [] as [serde_json::Value; 0]);
}

#[test]
fn exit_statuses_tell_failure_from_wrong_usage() {
    let world = crate::stopped_world(Hooks::SOCKET);
    for what in WHAT.iter().filter(|what| **what != "devices") {
        let said = world.agent.klb(&["get", what]);
        assert_eq!(said.status.code(), Some(1), "nothing is pinned: {said:?}");
        assert!(!said.stderr.is_empty(), "{said:?}");
    }
    let said = world.agent.klb(&["get", "weather"]);
    assert_eq!(said.status.code(), Some(2), "{said:?}");
    let both = ["--kubeconfig", "f", "--manifests", "d"];
    for wrong in [&both[..], &["--config", "/nowhere"]] {
        let line = [&["agent", "--node-name", "x"], wrong].concat();
        let said = world.agent.klb(&line);
        assert_eq!(said.status.code(), Some(2), "{said:?}");
    }
}

#[test]
fn readyz_answers_when_ready() {
    let world = crate::world(Hooks::ALL);
    let get = |port: u16, path: &str| {
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        web::get(&world.cluster.node.place, server, path).expect("an answer")
    };
    for path in ["/readyz", "/livez", "/healthz"] {
        let answer = get(10256, path);
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
    }
    use_it(&world);
    let metrics = get(10249, "/metrics").body;
    let line = "klb_outcomes_total{hook=\"tc-ingress\",reason=\"new_flow\"} 2";
    assert!(metrics.contains(line), "{metrics}");
}
