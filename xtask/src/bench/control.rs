//! The control plane: from the API to the maps, at the sizes that clusters have.

use std::{
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use lb_tests::{
    agent::{Agent, Hooks},
    apiserver::ApiServer,
    manifests,
    scope::Scope,
    topology::{Cluster, Options},
    wait,
};
use serde_json::{Value, json};

use super::NAME;
use crate::{demo, process::step};

/// Services, and endpoints of each.
const SIZES: [(u32, u32); 3] = [(10_000, 10), (2_000, 100), (50_000, 2)];
/// Changes of one Service's endpoints.
const CHANGES: u32 = 500;
/// Services that are rolled, each with all its endpoints replaced.
const ROLLED: u32 = 1_000;
const IDLE: Duration = Duration::from_secs(10);
/// For whatever is waited for.
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) fn run() {
    for (services, endpoints) in SIZES {
        step(format_args!("{services} Services of {endpoints} endpoints"));
        measure(services, endpoints);
    }
}

fn measure(services: u32, endpoints: u32) {
    let options = Options {
        helper: demo::helper(),
        offloads: false,
    };
    let cluster = Cluster::new(Scope::named(NAME, false), options);
    let server = cluster.node.place.netns().within(ApiServer::start);
    server.put_yaml(&manifests::node());
    for number in 0..services {
        server.put(service(number));
        server.put(slice(number, endpoints, 0));
    }
    server.forget_history();
    let mut agent = Agent::new(&cluster, Hooks::SOCKET);
    agent.kubeconfig = Some(server.kubeconfig(&cluster.scope().folder()));
    agent.flags = vec!["--map-services=262144".to_owned()];

    agent.start();
    row(
        "first start, all listed → in the maps",
        listed_to_written(&mut agent),
    );
    row("entries written", total(&mut agent, "writes="));
    row("peak memory", memory(&mut agent, "VmHWM"));
    agent.terminate();
    agent.start();
    row(
        "second start, entries written",
        total(&mut agent, "writes="),
    );
    row(
        "second start, all listed → compared",
        listed_to_written(&mut agent),
    );
    row("peak memory", memory(&mut agent, "VmHWM"));
    one_by_one(&mut agent, &server, services, endpoints);
    storm(&mut agent, &server, services, endpoints);
    idle(&mut agent);
}

/// One slice changes, and again when that is in the maps.
fn one_by_one(agent: &mut Agent, server: &ApiServer, services: u32, endpoints: u32) {
    let (before, cpu) = (reconciled(agent).len(), cpu(agent));
    for change in 0..CHANGES {
        let number = change * 7 % services;
        server.put(slice(number, endpoints, 1 + change));
        await_reconciled(agent, before + change as usize + 1);
    }
    let spent = self::cpu(agent).saturating_sub(cpu);
    let lines = reconciled(agent).split_off(before);
    let mut took: Vec<_> = lines
        .iter()
        .map(|line| duration(field(line, "took=")))
        .collect();
    took.sort();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100];
    let writes = lines
        .iter()
        .map(|line| number(field(line, "writes=")))
        .max();
    row(
        "one change, maps written in (p50, p99)",
        format!("{:?}, {:?}", at(50), at(99)),
    );
    row(
        "one change, all of the agent's CPU",
        format!("{:?}", spent / CHANGES),
    );
    row("one change, most entries written", writes.unwrap_or(0));
}

/// Many Services get other endpoints within ten seconds.
fn storm(agent: &mut Agent, server: &ApiServer, services: u32, endpoints: u32) {
    let rolled = ROLLED.min(services);
    let (started, cpu) = (Instant::now(), cpu(agent));
    let first = memory(agent, "VmRSS");
    let steps = 5;
    for step in 0..steps {
        for number in 0..rolled {
            server.put(slice(number, endpoints, CHANGES + 1 + step));
        }
        let rest = (started + Duration::from_secs(10) * (step + 1) / steps)
            .saturating_duration_since(Instant::now());
        std::thread::sleep(rest);
    }
    let last = Ipv4Addr::from(endpoint(rolled - 1, endpoints, 0, CHANGES + steps));
    agent.await_services("the last change to be there", |services| {
        let mut frontends = services.iter().flat_map(|service| &service.frontends);
        frontends.any(|frontend| {
            frontend
                .backends
                .iter()
                .any(|backend| backend.address == last)
        })
    });
    let spent = self::cpu(agent).saturating_sub(cpu);
    let share = 100.0 * spent.as_secs_f64() / started.elapsed().as_secs_f64();
    row("storm, CPU", format!("{share:.0} % of a core"));
    row(
        "storm, memory",
        format!("{first} → {}", memory(agent, "VmRSS")),
    );
}

fn idle(agent: &mut Agent) {
    let before = cpu(agent);
    std::thread::sleep(IDLE);
    let spent = cpu(agent).saturating_sub(before);
    let share = 100.0 * spent.as_secs_f64() / IDLE.as_secs_f64();
    row("idle, CPU", format!("{share:.2} % of a core"));
}

fn row(what: &str, value: impl std::fmt::Display) {
    println!("{what:<44} {value}");
}

fn service(number: u32) -> Value {
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 1)) + number);
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": format!("service-{number}"), "namespace": "bench" },
        "spec": { "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ports": [{ "port": 80 }] },
    })
}

/// The address of an endpoint; another one in every round.
fn endpoint(service: u32, endpoints: u32, index: u32, round: u32) -> u32 {
    let first = u32::from(Ipv4Addr::new(10, 128, 0, 1));
    first + (service * endpoints + index + round * 7_919) % (1 << 22)
}

fn slice(number: u32, endpoints: u32, round: u32) -> Value {
    let list: Vec<_> = (0..endpoints)
        .map(|index| {
            let address = Ipv4Addr::from(endpoint(number, endpoints, index, round));
            json!({
                "addresses": [address],
                "conditions": { "ready": true, "serving": true, "terminating": false },
                "nodeName": format!("node-{}", index + 2),
                "targetRef": { "kind": "Pod", "name": format!("pod-{index}"), "namespace": "bench" },
                "zone": "z",
            })
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("service-{number}-1"),
            "namespace": "bench",
            "labels": { "kubernetes.io/service-name": format!("service-{number}") },
        },
        "addressType": "IPv4",
        "ports": [{ "port": 8080, "protocol": "TCP", "name": "" }],
        "endpoints": list,
    })
}

/// The log's lines about writes.
fn reconciled(agent: &mut Agent) -> Vec<String> {
    let text = agent.log().text();
    let lines = text.lines().filter(|line| line.contains(" reconciled "));
    lines.map(str::to_owned).collect()
}

fn await_reconciled(agent: &mut Agent, count: usize) {
    wait::until("a change to be written", PATIENCE, || {
        (reconciled(agent).len() >= count).then_some(())
    });
}

/// From the end of the last list to the end of the first write.
fn listed_to_written(agent: &mut Agent) -> String {
    let text = agent.log().text();
    let kinds = ["Service", "EndpointSlice", "Node"].map(|kind| format!("kind={kind} "));
    let listed = text.lines().filter(|line| line.contains(" listed "));
    let listed = listed.filter(|line| kinds.iter().any(|kind| line.contains(kind)));
    let listed = listed.map(time_of_day).fold(0.0, f64::max);
    let written = reconciled(agent);
    let written = time_of_day(written.first().expect("it was written"));
    format!("{:.3} s", written - listed)
}

/// Seconds since midnight, from the time that a line begins with.
fn time_of_day(line: &str) -> f64 {
    let time = line.split(['T', 'Z']).nth(1).unwrap_or_default();
    let parts = time
        .split(':')
        .map(|part| part.parse::<f64>().unwrap_or(f64::NAN));
    parts.fold(0.0, |sum, part| sum * 60.0 + part)
}

fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let mut words = line.split_whitespace();
    words
        .find_map(|word| word.strip_prefix(name))
        .unwrap_or_default()
}

fn number(text: &str) -> u64 {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn total(agent: &mut Agent, name: &str) -> u64 {
    reconciled(agent)
        .iter()
        .map(|line| number(field(line, name)))
        .sum()
}

/// As `Duration` is written in a log.
fn duration(text: &str) -> Duration {
    let digits = text.trim_end_matches(|c: char| c.is_alphabetic() || c == 'µ');
    let count: f64 = digits
        .parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"));
    let unit = match &text[digits.len()..] {
        "ns" => 1e-9,
        "µs" => 1e-6,
        "ms" => 1e-3,
        _ => 1.0,
    };
    Duration::from_secs_f64(count * unit)
}

fn memory(agent: &mut Agent, field: &str) -> String {
    let path = format!("/proc/{}/status", agent.process().id());
    let text = fs::read_to_string(path).expect("the agent runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let kilobytes = number(
        line.unwrap_or_default()
            .trim_matches(|c: char| !c.is_ascii_digit()),
    );
    format!("{} MiB", kilobytes / 1024)
}

/// CPU time that the agent has used (proc(5), `stat`, fields 14 and 15).
fn cpu(agent: &mut Agent) -> Duration {
    let path = format!("/proc/{}/stat", agent.process().id());
    let text = fs::read_to_string(path).expect("the agent runs");
    let rest = text.rsplit(')').next().unwrap_or_default();
    let ticks: u64 = rest.split_whitespace().skip(11).take(2).map(number).sum();
    Duration::from_millis(ticks * 10)
}
