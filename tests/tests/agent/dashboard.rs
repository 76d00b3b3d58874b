//! What the dashboard tells a program, and whom it tells nothing.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use lb_tests::{
    agent::Hooks,
    process::Place,
    topology::{Addresses, Family},
    wait,
    web::{self, Page, Question},
    world::World,
};
use serde_json::Value;

use crate::{metrics::METRICS, privileges::DOCUMENTED};

/// For an answer for which programs are loaded, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// For an answer that is not an earlier one: those are kept for twenty times as long as
/// they took to make.
const NEW: Duration = Duration::from_secs(60);

/// Of the dashboard, as a browser on the node asks.
fn question(path: &str) -> Question<'_> {
    Question {
        host: "localhost:10249",
        patience: PATIENCE,
        ..Question::get(path)
    }
}

fn ask(place: &Place, question: &Question<'_>) -> Page {
    let server = SocketAddr::from((Ipv4Addr::LOCALHOST, METRICS));
    web::await_answer(place, server, question)
}

/// What a path tells on the node.
fn told(world: &World, path: &str) -> Value {
    let page = ask(&world.cluster.node.place, &question(path));
    assert_eq!(page.status, 200, "{path}: {page:?}");
    assert_eq!(page.headers["content-type"], "application/json", "{path}");
    page.json()
}

/// What a command prints.
fn printed(world: &World, command: &[&str]) -> Value {
    let said = world.agent.klb(&[command, &["-o", "json"]].concat());
    assert!(said.status.success(), "{command:?}: {said:?}");
    serde_json::from_str(&said.stdout).expect("JSON")
}

/// Without times, which are others a second later: an agent also notes anew what it is,
/// a moment after it is ready.
fn lasting(value: &Value) -> Value {
    let mut value = value.clone();
    if let Some(fields) = value.as_object_mut() {
        for time in ["age_seconds", "over_seconds", "synced", "written"] {
            fields.remove(time);
        }
    }
    value
}

const PORT: &str = "/api/service?namespace=default&name=echo&port_name=http";

/// With no more privileges than are documented.
#[test]
fn it_tells_what_the_commands_tell() {
    let mut world = crate::stopped_world(Hooks::ALL);
    world.agent.capabilities = Some(DOCUMENTED);
    world.agent.start();

    let status = told(&world, "/api/status");
    assert_eq!(status["node"], "node-1");
    assert_eq!(
        (&status["ready"], &status["healthy"]),
        (&true.into(), &true.into())
    );
    let command = printed(&world, &["status"]);
    for (field, value) in command.as_object().expect("an object") {
        // What passes meanwhile, and what is in an agent's log as well.
        if !["counters", "maps", "warnings"].contains(&field.as_str()) {
            assert_eq!(lasting(&status[field]), lasting(value), "{field}");
        }
    }
    for field in ["name", "entries", "max_entries", "evicts"] {
        assert!(!status["maps"][0][field].is_null(), "{field}: {status}");
    }

    let port = told(&world, PORT);
    let services = printed(&world, &["get", "services", "--service", "echo:http"]);
    assert_eq!(port["service"], services["services"][0]);
    let backends = printed(&world, &["get", "backends", "--service", "echo:http"]);
    assert_eq!(port["backends"], backends["backends"]);

    let list = told(&world, "/api/services?filter=echo+http");
    assert_eq!((&list["total"], &list["matching"]), (&2.into(), &1.into()));
    let row = &list["services"][0];
    let frontends = port["service"]["frontends"].as_array().map_or(0, Vec::len);
    for (field, value) in [
        ("namespace", Value::from("default")),
        ("name", "echo".into()),
        ("port_name", "http".into()),
        ("port", 80.into()),
        ("protocol", "TCP".into()),
        ("frontend", "10.96.0.1:80".into()),
        ("frontends", frontends.into()),
        ("without_backend", 0.into()),
        ("backends", 6.into()),
    ] {
        assert_eq!(row[field], value, "{field}: {list}");
    }

    let explained = told(
        &world,
        "/api/explain?from=192.168.50.2&to=192.168.50.1:30080",
    );
    let line = ["--from", "192.168.50.2", "--to", "192.168.50.1:30080"];
    let command = world.agent.explain(&line);
    for field in ["packet", "at", "frontend", "policy", "candidates", "notes"] {
        assert_eq!(explained[field], command[field], "{field}");
    }
    assert_eq!(explained["verdict"]["outcome"], "forwarded", "{explained}");
    let refused = told(
        &world,
        "/api/explain?from=10.244.0.9&to=10.96.0.1:81&proto=udp&at=socket",
    );
    assert_eq!(refused["verdict"]["reason"], "no_such_port", "{refused}");
}

#[test]
fn it_follows_what_happens() {
    let world = crate::world(Hooks::ALL);
    let client = world.cluster.client.host.without_cgroup();
    let request = world.any_request();
    let path = "/api/services?sort=flows&limit=1";
    let first = told(&world, path);
    assert_eq!(first["services"][0]["flows_per_second"], Value::Null);
    let busy = wait::until("connections a second", NEW, || {
        client.ask(&request).expect("an answer");
        let list = told(&world, path);
        let rate = list["services"][0]["flows_per_second"].as_f64();
        rate.is_some_and(|rate| rate > 0.0).then_some(list)
    });
    let row = &busy["services"][0];
    assert_eq!(row["port_name"], "http", "{busy}");
    assert!(row["packets_per_second"].as_f64() > row["flows_per_second"].as_f64());
    assert!(busy["over_seconds"].as_f64() >= Some(1.0), "{busy}");
    let flows: u64 = told(&world, PORT)["backends"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|backend| backend["traffic"]["flows"].as_u64())
        .sum();
    assert!(flows > 0);
    // However many ask, they are told what was read for one of them.
    let times = [(); 50].map(|()| told(&world, "/api/status")["at_seconds"].to_string());
    let mut different = times.to_vec();
    different.dedup();
    assert!(different.len() < 25, "{different:?}");
}

/// It listens everywhere, as where Prometheus comes from elsewhere.
#[test]
fn it_is_for_the_node_alone_and_changes_nothing() {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    let everywhere = "--metrics-bind=0.0.0.0".to_owned();
    world.agent.flags.push(everywhere);
    world.agent.start();
    let node = &world.cluster.node.place;
    let page = ask(node, &question("/"));
    assert_eq!(page.status, 200, "{page:?}");
    for (header, value) in [
        ("content-type", "text/html; charset=utf-8"),
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("cache-control", "no-store"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-resource-policy", "same-origin"),
    ] {
        assert_eq!(page.headers[header], value, "{header}");
    }
    let policy = &page.headers["content-security-policy"];
    assert!(policy.starts_with("default-src 'none'; script-src 'sha256-"));
    assert!(!page.headers.contains_key("set-cookie"));
    let head = ask(
        node,
        &Question {
            method: "HEAD",
            ..question("/")
        },
    );
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    assert_eq!(head.headers["content-length"], page.body.len().to_string());

    let cross_site = [("Sec-Fetch-Site", "cross-site")];
    for (changed, status) in [
        (
            Question {
                method: "POST",
                ..question("/api/status")
            },
            405,
        ),
        (
            Question {
                host: "evil.example:10249",
                ..question("/")
            },
            403,
        ),
        (
            Question {
                headers: &cross_site,
                ..question("/api/services")
            },
            403,
        ),
    ] {
        let page = ask(node, &changed);
        assert_eq!(page.status, status, "{changed:?}: {page:?}");
        assert!(page.json()["error"].is_string(), "{page:?}");
        assert_eq!(page.headers.contains_key("allow"), status == 405);
    }

    let outside = &world.cluster.outside.place;
    let server = Addresses::NODE.port(Family::V4, METRICS);
    let page = web::ask(outside, server, &question("/api/status")).expect("an answer");
    assert_eq!(page.status, 403, "{page:?}");
    let page = web::get(outside, server, "/metrics").expect("an answer");
    assert_eq!(page.status, 200, "whom it does not concern");

    what_makes_no_sense_is_refused(node);
    assert_eq!(ask(node, &question("/nothing")).status, 404);
}

fn what_makes_no_sense_is_refused(node: &Place) {
    for (path, status, part) in [
        ("/api/service?namespace=default", 400, "name is missing"),
        (
            "/api/service?namespace=default&name=no",
            404,
            "no such Service",
        ),
        ("/api/services?sort=colour", 400, "sort: wanted is one of"),
        ("/api/services?limit=501", 400, "limit: wanted is"),
        ("/api/services?a=b", 400, "no parameter a"),
        ("/api/status?a=b", 400, "no parameter a"),
        ("/api/explain", 400, "from is missing"),
        (
            "/api/explain?from=x&to=10.96.0.1:80",
            400,
            "from: wanted is",
        ),
        (
            "/api/explain?from=10.0.0.1&to=[fd00::1]:80",
            400,
            "different families",
        ),
        (
            "/api/explain?from=10.0.0.1&to=10.96.0.1:80&at=no",
            400,
            "no device",
        ),
        ("/api/nothing", 404, "there is no /api/nothing"),
    ] {
        let page = ask(node, &question(path));
        assert_eq!(page.status, status, "{path}: {page:?}");
        let body = page.json();
        let sentence = body["error"].as_str().expect("a sentence");
        assert!(sentence.contains(part), "{path}: {sentence}");
        assert!(!sentence.contains('\n'), "{path}: {sentence}");
    }
}

/// And one that is off tells nothing.
#[test]
fn an_agent_that_has_not_heard_of_anything_says_so() {
    let (mut world, server) = crate::api::world(Hooks::SOCKET);
    server.set_down(true);
    world.agent.spawn();
    world.agent.await_log("a server for metrics", |line| {
        line.contains("listening") && line.contains("metrics")
    });
    let status = told(&world, "/api/status");
    assert_eq!(status["ready"], false, "{status}");
    assert_eq!(told(&world, "/api/services")["total"], 0);
    server.set_down(false);
    world.agent.await_log("ready", |line| {
        line.split_whitespace().any(|word| word == "ready")
    });
    wait::until("readiness", NEW, || {
        let status = told(&world, "/api/status");
        (status["ready"] == true).then_some(())
    });
    world.agent.kill();
    world.agent.flags.push("--dashboard=off".to_owned());
    world.agent.start();
    for (path, status) in [("/", 404), ("/api/status", 404), ("/metrics", 200)] {
        let page = ask(&world.cluster.node.place, &question(path));
        assert_eq!(page.status, status, "{path}: {page:?}");
    }
}
