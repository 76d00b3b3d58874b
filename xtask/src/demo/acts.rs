//! The acts of the demo, in order.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use lb_common::{Hook, names};
use lb_tests::{
    agent::Endpoint,
    helper::Stream,
    topology::{Addresses, Cluster, Family, Host},
    traffic::{self, Protocol, Report, Request},
    wait,
};

use super::{
    NAME, PODS, Stage, manifest,
    page::{self, Checks},
};

/// Requests to one address. With three pods, one of them is missed once in
/// 10^10 runs.
const REQUESTS: u32 = 60;
/// How long each waits for its answer.
const PATIENCE: Duration = Duration::from_secs(2);
const HTTP: u16 = 80;
const NODE_PORT: u16 = 30080;

pub(super) fn show_cluster(cluster: &Cluster) {
    let row = |name: &str, addresses: Addresses, what: &str| {
        page::line(format_args!(
            "{name:<8} {:<13} {:<17} {what}",
            addresses.v4, addresses.v6
        ));
    };
    row("outside", Addresses::OUTSIDE, "a host beyond the uplink");
    row("node-1", Addresses::NODE, "runs klb; its uplink is up0");
    row("client", cluster.client.host.addresses, "a pod");
    for pod in &cluster.pods {
        row(
            &pod.name,
            pod.host.addresses,
            "a pod that serves HTTP on port 3000",
        );
    }
}

/// Clients whose sockets klb sees: no packet of theirs needs to be changed.
pub(super) fn inside(checks: &mut Checks, stage: &Stage) {
    let service = Addresses::service(1);
    page::section("Client pod → my-app-service (ClusterIP)");
    ask(
        checks,
        stage,
        &stage.cluster.client.host,
        service,
        HTTP,
        Hook::Socket,
    );
    page::section("Node → my-app-service (ClusterIP)");
    ask(
        checks,
        stage,
        &stage.cluster.node,
        service,
        HTTP,
        Hook::Socket,
    );
}

/// A client whose packets klb sees, first with XDP off and then with it.
pub(super) fn outside(checks: &mut Checks, stage: &mut Stage) {
    let node = Addresses::NODE;
    page::section("Outside → my-app-nodeport (NodePort), over TC");
    ask(
        checks,
        stage,
        &stage.cluster.outside,
        node,
        NODE_PORT,
        Hook::TcIngress,
    );

    page::section("Outside → my-app-nodeport (NodePort), over XDP");
    let started = Instant::now();
    stage.agent.terminate();
    stage.agent.hooks.xdp = "auto";
    stage.agent.start();
    page::line(format_args!(
        "agent restarted with XDP on, in {} ms",
        started.elapsed().as_millis()
    ));
    ask(
        checks,
        stage,
        &stage.cluster.outside,
        node,
        NODE_PORT,
        Hook::Xdp,
    );
}

/// Sends requests to an address of each family; each must be answered, by way
/// of that hook, and every pod must have its share.
fn ask(checks: &mut Checks, stage: &Stage, client: &Host, to: Addresses, port: u16, hook: Hook) {
    let mut pods = BTreeMap::new();
    for family in Family::ALL {
        let to = to.port(family, port);
        let before = stage.agent.status().new_flows();
        let request = Request::new(Protocol::Tcp, to).timeout(PATIENCE);
        let answers = client.ask_often(&request, REQUESTS);
        let after = stage.agent.status().new_flows();
        let sent = answers.len();
        let mut answered = 0;
        for answer in answers.into_iter().flatten() {
            answered += usize::from(answer.from == to);
            *pods.entry(answer.name).or_insert(0) += 1;
        }
        let by: Vec<_> = Hook::ALL
            .into_iter()
            .filter(|hook| after.get(hook) > before.get(hook))
            .collect();
        let hooks: Vec<_> = by.iter().map(|hook| hook.name()).collect();
        checks.check(
            format_args!(
                "http://{to}/  {answered} of {sent} answered, by way of {}",
                hooks.join(", ")
            ),
            answered == sent && by == [hook],
        );
    }
    page::bars(&pods);
    checks.check(
        "every pod answered",
        pods.keys().eq(PODS.map(|(name, _)| name)),
    );
}

/// What is in the kernel, as klb and as bpftool show it.
pub(super) fn maps(checks: &mut Checks, stage: &Stage) {
    for (what, lines) in [
        ("services", 20),
        ("backends", 20),
        ("flows", 5),
        ("devices", 20),
    ] {
        page::section(&format!("klb get {what}"));
        let said = stage.agent.klb(&["get", what]);
        page::excerpt(&said.stdout, lines);
        checks.check(format_args!("klb get {what}"), said.status.success());
    }
    let pin = stage.agent.pins().join(names::SERVICES4);
    let pin = pin.display().to_string();
    page::section(&format!("bpftool map dump pinned {pin}"));
    let node = stage.cluster.node.place.netns();
    let dump = node.output("bpftool", &["map", "dump", "pinned", &pin]);
    page::excerpt(&dump, 24);
    checks.check(
        "the dump shows names of fields",
        dump.contains("\"slot_count\""),
    );
}

/// Requests that go on while a pod is replaced.
struct Clients(Vec<(&'static str, Stream)>);

impl Clients {
    fn start(cluster: &Cluster) -> Self {
        let stream = |host: &Host, to| host.stream(&Request::new(Protocol::Tcp, to), false);
        let (inside, outside) = (&cluster.client.host, &cluster.outside);
        let service = Addresses::service(1);
        Self(vec![
            (
                "client pod, IPv4",
                stream(inside, service.port(Family::V4, HTTP)),
            ),
            (
                "client pod, IPv6",
                stream(inside, service.port(Family::V6, HTTP)),
            ),
            (
                "outside, IPv4",
                stream(outside, Addresses::NODE.port(Family::V4, NODE_PORT)),
            ),
            (
                "outside, IPv6",
                stream(outside, Addresses::NODE.port(Family::V6, NODE_PORT)),
            ),
        ])
    }

    /// Waits until each has had so many more answers.
    fn go_on(&self) {
        for (_, stream) in &self.0 {
            stream.await_more(50);
        }
    }
}

/// Replaces pod 2 by pod 4 under requests.
pub(super) fn rollout(checks: &mut Checks, stage: &mut Stage) {
    page::section("pod-2 is replaced by pod-4 (10.244.0.12), while requests run");
    let clients = Clients::start(&stage.cluster);
    clients.go_on();
    stage.cluster.add_pods(&[("pod-4", 12)]);

    let replaced = traffic::now();
    let slices = manifest("endpointslices.yaml")
        .replace("10.244.0.6", "10.244.0.12")
        .replace("fd00:10:244::6", "fd00:10:244::12")
        .replace("pod-2", "pod-4");
    stage.agent.manifests.put("endpointslices.yaml", &slices);
    await_backends(stage, &[5, 7, 12]);
    // Before a pod goes, it answers what it has been asked.
    clients.go_on();
    stage.cluster.remove_pod("pod-2");
    let removed = traffic::now();
    clients.go_on();

    let mut pods = BTreeMap::new();
    for (name, stream) in clients.0 {
        judge(checks, name, &stream.stop(), replaced, &mut pods);
    }
    page::line("answers since pod-2 has gone:");
    let after = pods.split_off(&removed);
    let mut counts = BTreeMap::new();
    for name in after.into_values().flatten() {
        *counts.entry(name).or_insert(0) += 1;
    }
    page::bars(&counts);
    checks.check(
        "pod-1, pod-3 and pod-4 answered, and nobody else",
        counts.keys().eq(["pod-1", "pod-3", "pod-4"]),
    );
}

/// Waits until every frontend leads to the pods with these numbers.
fn await_backends(stage: &Stage, numbers: &[u8]) {
    let wanted: BTreeSet<_> = numbers
        .iter()
        .flat_map(|number| Family::ALL.map(|family| Addresses::pod(*number).port(family, 3000)))
        .collect();
    wait::until("the new pod in the maps", Duration::from_secs(10), || {
        let services = stage.agent.services();
        let frontends = services.iter().flat_map(|port| &port.frontends);
        let backends = frontends.flat_map(|frontend| &frontend.backends);
        let found: BTreeSet<_> = backends.map(Endpoint::socket).collect();
        (found == wanted).then_some(())
    });
}

/// Says how one client fared, and adds who answered when to `pods`.
fn judge(
    checks: &mut Checks,
    client: &str,
    reports: &[Report],
    replaced: u64,
    pods: &mut BTreeMap<u64, Vec<String>>,
) {
    let mut failed = 0;
    let mut first = None;
    for report in reports {
        match report.outcome.clone().result() {
            Ok(answer) => {
                if answer.name == "pod-4" {
                    first = first.or(Some(report.at));
                }
                pods.entry(report.at).or_default().push(answer.name);
            }
            Err(_) => failed += 1,
        }
    }
    let after = first.and_then(|first| first.checked_sub(replaced));
    let after = after.map_or_else(
        || "never".to_owned(),
        |micros| format!("{}.{} ms", micros / 1000, micros % 1000 / 100),
    );
    checks.check(
        format_args!(
            "{client:<16}  {} sent, {failed} failed; first answer of pod-4 after {after}",
            reports.len()
        ),
        failed == 0 && first.is_some(),
    );
}

/// What to try with a demo that stays.
pub(super) fn keep(stage: &Stage) {
    let cgroup = stage.cluster.cgroup().path().display();
    let klb = stage.agent.program.display();
    let paths = stage.agent.paths().join(" ");
    let manifests = stage.agent.manifests.path().display();
    let pins = stage.agent.pins();
    page::section("It goes on. Try, as root:");
    for command in [
        format!("nsenter --net=/run/netns/{NAME}-outside curl http://192.168.50.1:30080/"),
        format!("nsenter --net=/run/netns/{NAME}-client curl http://10.96.0.1/"),
        format!(
            "sh -c 'echo 0 > {cgroup}/cgroup.procs && exec nsenter \
             --net=/run/netns/{NAME}-node curl http://10.96.0.1/'"
        ),
        format!("{klb} get services {paths}"),
        format!("{klb} status {paths}"),
        format!(
            "bpftool map dump pinned {}",
            pins.join(names::SERVICES4).display()
        ),
        format!("$EDITOR {manifests}/endpointslices.yaml"),
        "cargo xtask demo --remove".to_owned(),
    ] {
        page::line(command);
    }
}
