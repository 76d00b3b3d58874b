//! `klb get` and `klb status`: they read the kernel's maps, whether an agent
//! runs or not.

use std::{fs, os::unix::process::ExitStatusExt as _, process::Command, thread, time::Duration};

use lb_tests::{
    agent::{Agent, Hooks, klb_path},
    process::Process,
    topology::Family,
    traffic::Protocol,
    wait,
    world::{Frontend, SERVICE_FILE, World, echo},
};
use nix::sys::signal::Signal;
use serde_json::json;

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
    world.agent.kill();
    use_it(&world);
    assert_eq!(world.agent.backends("echo"), with_agent);
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
}

/// They are the kernel's to tell, with nothing of the agent's left but its pins.
#[test]
fn names_need_no_agent_and_no_file() {
    let mut world = crate::stopped_world(Hooks::ALL);
    put_lasting_affinity(&world);
    world.agent.start();
    use_it(&world);
    let request = world.request(Frontend::ClusterIp, Family::V4, Protocol::Udp);
    world.cluster.node.ask(&request).expect("an answer");
    let lists = ["services", "backends", "flows", "sockets", "affinity"];
    let names = |world: &World, list| -> Vec<_> {
        let rows = rows(world, list, &[]).into_iter();
        let rows =
            rows.map(|row| ["namespace", "name", "port_name"].map(|field| row[field].clone()));
        rows.collect()
    };
    let with_agent = lists.map(|list| names(&world, list));
    for (list, names) in lists.iter().zip(&with_agent) {
        assert!(!names.is_empty(), "{list}");
        for [namespace, name, port] in names {
            assert_eq!(
                (namespace, name),
                (&json!("default"), &json!("echo")),
                "{list}"
            );
            assert!(port == "http" || port == "datagrams", "{list}: {port}");
        }
    }
    for stop in [Agent::terminate, Agent::kill] {
        stop(&mut world.agent);
        fs::remove_dir_all(world.agent.state()).expect("the state folder");
        let without = lists.map(|list| names(&world, list));
        assert_eq!(without, with_agent);
        let said = world
            .agent
            .klb(&["get", "services", "echo:http", "-n", "default"]);
        assert!(said.stdout.contains("default     echo:http"), "{said:?}");
        world.agent.start();
    }
}

/// An agent that was stopped on purpose is none that follows changes, either.
#[test]
fn status_tells_by_its_exit_whether_all_is_well() {
    let mut world = crate::world(Hooks::ALL);
    let status = world.agent.status();
    assert!(status.healthy && status.agent.running, "{status:?}");
    assert!(status.noted.is_some_and(|noted| noted.ready));
    let said = world.agent.klb(&["status"]);
    assert_eq!(said.status.code(), Some(0), "{said:?}");
    assert!(said.stdout.starts_with("health    healthy\n"), "{said:?}");

    // Somebody takes a hook away.
    let hook = world.agent.pins().join("links/connect4");
    fs::remove_file(&hook).expect("a pinned link");
    let status = world.agent.status();
    assert!(!status.healthy);
    assert_eq!(
        status.problems,
        ["only some of the socket hooks are attached"]
    );

    world.agent.terminate();
    world.agent.start();
    assert!(world.agent.status().healthy, "mended by a start");
    for stop in [Agent::terminate, Agent::kill] {
        stop(&mut world.agent);
        let status = world.agent.status();
        assert!(!status.healthy && !status.agent.running, "{status:?}");
        let [problem] = &status.problems[..] else {
            panic!("{status:?}");
        };
        assert!(problem.contains("traffic flows"), "{problem}");
        let said = world.agent.klb(&["status"]);
        assert_eq!(said.status.code(), Some(1), "{said:?}");
        assert!(said.stderr.is_empty(), "the report is all: {said:?}");
        assert!(said.stdout.contains("ago"), "how old it is: {said:?}");
        assert!(said.stdout.contains("klb_svc4"), "all the same: {said:?}");
        world.agent.start();
    }
}

/// What has no room, and what makes no sense.
#[test]
fn status_names_what_is_not_followed() {
    let mut world = crate::stopped_world(Hooks::TC);
    let flags = &mut world.agent.flags;
    flags.retain(|flag| !flag.starts_with("--map-services"));
    flags.push("--map-services=32".to_owned());
    world.agent.start();
    assert!(world.agent.status().problems.is_empty());
    let broken = world
        .service
        .to_string()
        .replace("port: 80\n", "port: 80000\n");
    let manifests = &world.agent.manifests;
    let addresses: Vec<_> = (1..=32).map(|last| format!("203.0.113.{last}")).collect();
    let addresses = format!("spec:\n  externalIPs: [{}]\n", addresses.join(", "));
    let wide = echo("wide", 2, 30090).to_string();
    manifests.put("wide.yaml", &wide.replace("spec:\n", &addresses));
    manifests.put(SERVICE_FILE, &broken);
    let noted = wait::until("both to be noted", TIME, || {
        let noted = world.agent.status().noted?;
        (noted.skipped.count > 0 && noted.failing.count > 0).then_some(noted)
    });
    let [skipped] = &noted.skipped.some[..] else {
        panic!("{noted:?}");
    };
    for (field, value) in [
        ("kind", "Service"),
        ("namespace", "default"),
        ("name", "echo"),
        ("field", "spec.ports[0].port"),
    ] {
        assert_eq!(skipped[field], value, "{noted:?}");
    }
    assert_eq!(noted.failing.some[0]["name"], "wide", "{noted:?}");
    let assert_said = |agent: &Agent| {
        let said = agent.klb(&["status"]);
        assert_eq!(said.status.code(), Some(1), "{said:?}");
        for words in [
            "default     echo   spec.ports[0].port   all",
            "1 object or manifest makes no sense",
            "1 Service is in the maps not as it should be",
        ] {
            assert!(said.stdout.contains(words), "{words}: {}", said.stdout);
        }
    };
    assert_said(&world.agent);
    world.agent.kill();
    assert_said(&world.agent);
    let said = world.agent.klb(&["status"]);
    assert!(said.stdout.contains("as the agent noted"), "{said:?}");

    // Nothing of it is left to an agent that finds all well.
    world.agent.manifests.remove("wide.yaml");
    let service = world.service.to_string();
    world.agent.manifests.put(SERVICE_FILE, &service);
    world.agent.start();
    let status = world.agent.status();
    assert!(status.healthy, "{status:?}");
    assert_eq!(status.noted.expect("noted").skipped.count, 0);
}

/// The agent counts what is refused, so that a minute can be told without waiting
/// for one.
#[test]
fn status_tells_what_was_refused_lately() {
    let mut world = crate::world(Hooks::TC);
    let lately = |world: &World| -> serde_json::Value {
        world
            .agent
            .klb(&["status", "-o", "json"])
            .json::<serde_json::Value>()["lately"]
            .clone()
    };
    let before = lately(&world);
    assert_eq!(before["refused"], serde_json::json!([]), "{before}");
    let said = world.agent.klb(&["status"]);
    assert!(said.stdout.contains("\nrefused   nothing in the last "));

    world.put_endpoints(&[]);
    world.agent.await_services("no endpoint", |services| {
        let mut frontends = services.iter().flat_map(|service| &service.frontends);
        frontends.all(|frontend| frontend.backends.is_empty())
    });
    let request = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    let outcome = world.cluster.outside.ask(&request);
    outcome.expect_err("nobody is there to answer");
    let after = lately(&world);
    let [refused] = &after["refused"].as_array().expect("a list")[..] else {
        panic!("{after}");
    };
    assert_eq!(refused["hook"], "tc-ingress", "{after}");
    assert_eq!(refused["reason"], "no_backend", "{after}");

    world.agent.kill();
    assert!(lately(&world).is_null());
    let said = world.agent.klb(&["status"]);
    assert!(
        said.stdout
            .contains("\nrefused   not known without an agent")
    );
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
        ("services", &["echo"], 2),
        ("flows", &["echo:http"], 0),
        ("devices", &["up0"], 1),
        ("maps", &["klb_flow6"], 1),
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
    for (what, name) in [("services", "ech"), ("flows", "ech"), ("maps", "klb_svc5")] {
        let said = world.agent.klb(&["get", what, name]);
        assert_eq!(said.status.code(), Some(1), "{said:?}");
        assert!(said.stderr.contains(name), "{said:?}");
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
    let busy = counters(&["--over", "5s"], &|| use_it(&world));
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

/// Gives the Service affinity that lasts for so many seconds.
fn put_affinity(world: &World, seconds: u32) {
    let affinity = format!(
        "spec:\n  sessionAffinity: ClientIP\n  \
         sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {seconds}}}}}\n"
    );
    let manifest = world.service.to_string().replace("spec:\n", &affinity);
    world.agent.manifests.put(SERVICE_FILE, &manifest);
}

/// Gives the Service affinity that outlasts every test, whatever is restarted in it.
pub(crate) fn put_lasting_affinity(world: &World) {
    put_affinity(world, 10_800);
}

#[test]
fn affinity_tells_who_keeps_whom() {
    let mut world = crate::stopped_world(Hooks::TC);
    // A machine has mostly been up for longer: what is aged by more would be of later.
    put_affinity(&world, 60);
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
    for path in ["/readyz", "/livez", "/healthz"] {
        let answer = world.agent.page(10256, path);
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
    }
    use_it(&world);
    let metrics = world.agent.page(10249, "/metrics").body;
    let line = "klb_outcomes_total{hook=\"tc-ingress\",reason=\"new_flow\"} 2";
    assert!(metrics.contains(line), "{metrics}");
}
