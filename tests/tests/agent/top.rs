//! `klb top`: live on a terminal, once where there is none.

use std::{
    io,
    process::{Command, Stdio},
    time::Duration,
};

use lb_tests::{
    agent::{Hooks, klb_path},
    topology::Family,
    traffic::Protocol,
    world::{Frontend, World},
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// For what takes no time as a rule.
const TIME: Duration = Duration::from_secs(20);

/// Clients outside, of a NodePort, as long as `top` looks.
fn once(world: &World, flags: &[&str]) -> String {
    let request = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    let clients = world.cluster.outside.stream(&request, false);
    clients.await_more(1);
    let line = [&["top", "--interval", "2"], flags].concat();
    let mut top = world.agent.start_klb(&line);
    assert!(top.wait(TIME).success(), "{top:?}");
    clients.stop();
    top.stdout().text()
}

fn json(world: &World, flags: &[&str]) -> Value {
    let text = once(world, &[&["-o", "json"], flags].concat());
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn a_pipe_gets_what_flows_now_without_an_agent() {
    let mut world = crate::world(Hooks::TC);
    world.agent.kill();
    let document = json(&world, &["--sort", "bytes"]);
    let services = document["services"].as_array().expect("a list");
    assert_eq!(services.len(), 2, "{document}");
    let busy = &services[0];
    assert_eq!(
        (&busy["name"], &busy["port_name"]),
        (&"echo".into(), &"http".into())
    );
    let rate = |of: &Value, name: &str| of["per_second"][name].as_f64().expect("a rate");
    let connections = rate(busy, "connections");
    assert!(connections >= 1.0, "{busy}");
    // SYN, ACK, request, FIN and their like.
    for name in ["packets_in", "packets_out"] {
        let packets = rate(busy, name) / connections;
        assert!((2.0..20.0).contains(&packets), "{busy}");
    }
    assert!(
        rate(busy, "bytes_out") > 54.0 * rate(busy, "packets_out"),
        "{busy}"
    );
    assert!(busy["flows"]["active"].as_u64() >= Some(1), "{busy}");
    let backends = busy["backends"].as_array().expect("a list");
    assert_eq!(backends.len(), 6, "{busy}");
    let share: f64 = backends
        .iter()
        .filter_map(|row| row["share"].as_f64())
        .sum();
    assert!((0.99..1.01).contains(&share), "{busy}");
    let of_backends: f64 = backends.iter().map(|row| rate(row, "connections")).sum();
    assert!((of_backends - connections).abs() < 1.0, "{busy}");
    assert!(rate(&services[1], "connections") < 0.1, "{document}");

    let text = once(&world, &["--service", "echo:http"]);
    for word in [
        "NAMESPACE",
        "BYTES/S",
        "echo:http",
        "10.244.0.5:3000",
        "SHARE",
    ] {
        assert!(text.contains(word), "{word} in {text}");
    }
    assert!(
        !text.contains("echo:datagrams") && !text.contains('\x1b'),
        "{text}"
    );
    assert!(!once(&world, &["-n", "elsewhere"]).contains("echo"));
}

#[test]
fn what_is_refused_is_told_by_reason() {
    let world = crate::world(Hooks::TC);
    world.put_endpoints(&[]);
    world.agent.await_services("no endpoint", |services| {
        let mut frontends = services.iter().flat_map(|service| &service.frontends);
        frontends.all(|frontend| frontend.backends.is_empty())
    });
    let mut top = world
        .agent
        .start_klb(&["top", "-o", "json", "--interval", "2"]);
    let request = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    while top.status().is_none() {
        world.cluster.outside.ask(&request).expect_err("refused");
    }
    let document: Value = serde_json::from_str(&top.stdout().text()).expect("JSON");
    let refused = document["refused"].as_array().expect("a list");
    assert!(
        refused.iter().any(|row| row["reason"] == "no_backend"),
        "{document}"
    );
}

#[test]
fn a_terminal_is_followed_and_given_back() {
    let world = crate::world(Hooks::TC);
    let request = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    let clients = world.cluster.outside.stream(&request, false);
    let line = ["top", "--interval", "500ms"];
    let mut terminal = world.agent.klb_on_terminal(&line, 24, 80);
    let busy = |text: &str| {
        let row = text
            .lines()
            .find(|line| line.starts_with("default/echo:http"));
        let rate = row.and_then(|row| row.split_whitespace().nth(2));
        rate.is_some_and(|rate| rate != "0")
    };
    let text = terminal.until("a rate", busy);
    assert!(terminal.is_taken() && terminal.is_colourful(), "{text}");
    let keys = text.lines().last().expect("the keys");
    for key in [
        "q quit",
        "↑↓ move",
        "Enter",
        "s sort",
        "/ filter",
        "p pause",
        "? help",
    ] {
        assert!(keys.contains(key), "{key} in {keys}");
    }
    terminal.press("\r");
    let text = terminal.await_text("10.244.0.5:3000");
    assert!(text.contains("SILENT"), "{text}");
    // Of a moment in which there were connections.
    terminal.await_text("█");
    terminal.press("\x1b");
    terminal.await_text("default/echo:datagrams");
    terminal.press("s?");
    terminal.await_text("by packets");
    terminal.await_text("sort by the next column");
    terminal.press("?/datag\r");
    terminal.until("the filter", |text| {
        text.contains("with \"datag\"") && !text.contains("echo:http")
    });
    terminal.resize(10, 40);
    terminal.until("a narrow line", |text| {
        text.lines().any(|line| line.ends_with("PKT/S")) && text.contains("echo:datagrams")
    });
    terminal.press("q");
    assert!(terminal.wait().success(), "{terminal:?}");
    assert!(terminal.is_given_back(), "{terminal:?}");
    clients.stop();
}

#[test]
fn whoever_ends_it_gets_the_terminal_back() {
    let world = crate::world(Hooks::SOCKET);
    for (signal, key, code) in [
        (Some(Signal::SIGTERM), "", 143),
        (Some(Signal::SIGHUP), "", 129),
        (None, "\x03", 0),
    ] {
        let mut terminal = world.agent.klb_on_terminal(&["top"], 24, 80);
        terminal.await_text("default/echo:http");
        terminal.press(key);
        if let Some(signal) = signal {
            terminal.signal(signal);
        }
        assert_eq!(terminal.wait().code(), Some(code), "{terminal:?}");
        assert!(terminal.is_given_back(), "{signal:?}: {terminal:?}");
    }
}

#[test]
fn maps_that_go_are_told_and_awaited() {
    let mut world = crate::world(Hooks::SOCKET);
    let mut terminal = world
        .agent
        .klb_on_terminal(&["top", "--interval", "200ms"], 24, 80);
    terminal.await_text("default/echo:http");
    world.agent.terminate();
    assert!(world.agent.klb(&["cleanup"]).status.success());
    terminal.await_text("klb_");
    assert!(
        terminal.text().contains("default/echo:http"),
        "what was, stays"
    );
    world.agent.start();
    terminal.until("no trouble", |text| !text.contains("klb_"));
    terminal.press("q");
    assert!(terminal.wait().success(), "{terminal:?}");
}

#[test]
fn what_is_missing_is_said_before_the_terminal_is_taken() {
    let world = crate::stopped_world(Hooks::SOCKET);
    let mut terminal = world.agent.klb_on_terminal(&["top"], 24, 80);
    assert_eq!(terminal.wait().code(), Some(1));
    let text = terminal.text();
    assert!(text.contains("nothing of klb is pinned"), "{text}");
    assert!(!terminal.is_taken() && terminal.is_given_back());
    for wrong in [["top", "--interval", "0"], ["top", "--sort", "name"]] {
        let said = world.agent.klb(&wrong);
        assert_eq!(said.status.code(), Some(2), "{said:?}");
    }
}

/// As with `| head`.
#[test]
fn a_reader_that_goes_is_no_failure() {
    let world = crate::world(Hooks::SOCKET);
    let mut command = Command::new(klb_path());
    command
        .args(["top", "--interval", "100ms"])
        .args(world.agent.paths());
    let (reader, writer) = io::pipe().expect("a pipe");
    drop(reader);
    command.stdout(writer).stderr(Stdio::piped());
    let child = command.spawn().expect("klb runs");
    let output = child.wait_with_output().expect("it ends");
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
}
