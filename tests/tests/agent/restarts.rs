//! The agent ends, in whatever way, and comes back: traffic does not notice.

use std::{collections::BTreeMap, time::Duration};

use lb_common::names;
use lb_tests::{
    agent::{Agent, Hooks, raw_dump},
    helper::Stream,
    topology::Family,
    traffic::Protocol,
    world::{Frontend, World, echo, endpoints},
};

/// Connections without end, from everywhere, by every hook.
pub(crate) struct Streams(Vec<(String, Stream)>);

impl Streams {
    pub(crate) fn start(world: &World) -> Self {
        let pod = &world.cluster.client.host;
        let clients = [
            ("pod, socket", pod.clone(), Frontend::ClusterIp),
            ("pod, TC", pod.without_cgroup(), Frontend::ClusterIp),
            (
                "outside, XDP",
                world.cluster.outside.clone(),
                Frontend::NodePort,
            ),
        ];
        let mut streams = Vec::new();
        for (name, host, kind) in clients {
            for (family, protocol, held) in [
                (Family::V4, Protocol::Tcp, false),
                (Family::V6, Protocol::Tcp, true),
                (Family::V6, Protocol::Udp, false),
            ] {
                let request = world.request(kind, family, protocol);
                let name = format!("{name}, {family} {protocol:?}, held: {held}");
                streams.push((name, host.stream(&request, held)));
            }
        }
        Self(streams)
    }

    /// Waits until each has gone on for a while.
    pub(crate) fn go_on(&self) {
        for (_, stream) in &self.0 {
            stream.await_more(10);
        }
    }

    /// Ends them; none of their connections may have failed.
    pub(crate) fn assert_flawless(self) {
        for (name, stream) in self.0 {
            let reports = stream.stop();
            let sent = reports.len();
            let failed: Vec<_> = reports
                .into_iter()
                .filter_map(|report| report.outcome.result().err())
                .collect();
            assert!(failed.is_empty(), "{name}: of {sent} failed {failed:?}");
        }
    }
}

fn ends_and_comes_back(end: fn(&mut Agent)) {
    let mut world = crate::world(Hooks::ALL);
    let streams = Streams::start(&world);
    streams.go_on();
    for _ in 0..3 {
        end(&mut world.agent);
        streams.go_on();
        world.agent.start();
        streams.go_on();
    }
    streams.assert_flawless();
}

#[test]
fn kill_9() {
    ends_and_comes_back(Agent::kill);
}

#[test]
fn sigterm() {
    ends_and_comes_back(Agent::terminate);
}

/// The same where TC filters are no links, and have to be found and replaced.
#[test]
fn kill_9_with_clsact() {
    let mut world = crate::world(Hooks::CLSACT);
    let request = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    let stream = world.cluster.outside.stream(&request, false);
    stream.await_more(10);
    for _ in 0..3 {
        world.agent.kill();
        world.agent.start();
        stream.await_more(10);
    }
    Streams(vec![("outside, clsact".to_owned(), stream)]).assert_flawless();
    let devices = world.agent.status().devices;
    let filters = world.cluster.node.place.netns();
    for device in devices.iter().filter_map(|device| device.name.as_deref()) {
        for side in ["ingress", "egress"] {
            let list = filters.output("tc", &["filter", "show", "dev", device, side]);
            let programs = list.matches("direct-action").count();
            assert_eq!(programs, 1, "{device} {side}: {list}");
        }
    }
}

/// Killed at any moment of its start, it finds its way the next time.
#[test]
fn killed_while_it_starts() {
    let mut world = crate::world(Hooks::ALL);
    let streams = Streams::start(&world);
    let before = world.agent.backends("echo");
    world.agent.terminate();
    for milliseconds in [1, 5, 10, 20, 40, 80, 160] {
        world.agent.spawn();
        std::thread::sleep(Duration::from_millis(milliseconds));
        world.agent.kill();
    }
    world.agent.start();
    streams.go_on();
    assert_eq!(world.agent.backends("echo"), before);
    streams.assert_flawless();
    let mut warnings = world.agent.status().warnings;
    // So many connections may well fill a table.
    warnings.retain(|warning| !warning.contains("% full"));
    assert_eq!(warnings, [""; 0]);
}

/// What the agent writes, as the kernel has it.
fn written(agent: &Agent) -> BTreeMap<&'static str, Vec<String>> {
    use names::{BACKENDS, META, SERVICES4, SERVICES6, SLOTS4, SLOTS6};
    [SERVICES4, SERVICES6, SLOTS4, SLOTS6, BACKENDS, META]
        .into_iter()
        .map(|map| (map, raw_dump(&agent.pins().join(map))))
        .collect()
}

/// How many entries the agent wrote since it was started, by its log.
fn writes(agent: &mut Agent) -> u64 {
    let log = agent.log().text();
    let reconciled = log.lines().filter(|line| line.contains("reconciled"));
    let counts = reconciled.map(|line| {
        let mut words = line.split_whitespace();
        let count = words.find_map(|word| word.strip_prefix("writes="));
        count.and_then(|count| count.parse::<u64>().ok())
    });
    counts
        .sum::<Option<u64>>()
        .unwrap_or_else(|| panic!("a line without a number of writes in\n{log}"))
}

/// A start that finds nothing changed finds the maps right: same ids, same
/// slots, same generations, though none of them is written down anywhere else.
#[test]
fn a_second_start_changes_nothing() {
    let mut world = crate::stopped_world(Hooks::ALL);
    for number in 10..30_u8 {
        let service = echo(
            &format!("more-{number}"),
            number,
            30000 + 2 * u16::from(number),
        );
        let text = format!(
            "{service}---\n{}",
            endpoints(&service, &lb_tests::world::PODS)
        );
        world.agent.manifests.put(&format!("{number}.yaml"), &text);
    }
    world.agent.start();
    let first = written(&world.agent);
    assert!(first.values().all(|map| !map.is_empty()));
    assert!(writes(&mut world.agent) > 0);
    for end in [Agent::terminate, Agent::kill] {
        end(&mut world.agent);
        world.agent.start();
        assert_eq!(writes(&mut world.agent), 0);
        assert_eq!(written(&world.agent), first);
    }
}

#[test]
fn what_went_while_it_was_away_is_removed() {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    let gone = echo("gone", 6, 30140);
    let text = format!("{gone}---\n{}", endpoints(&gone, &lb_tests::world::PODS));
    world.agent.manifests.put("gone.yaml", &text);
    world.agent.start();
    // Two ports at a ClusterIP, the node and its loopback, in two families.
    assert_eq!(world.agent.backends("gone").len(), 12);
    let kept = world.agent.backends("echo");

    world.agent.kill();
    world.agent.manifests.remove("gone.yaml");
    assert_eq!(
        world.agent.backends("gone").len(),
        12,
        "nobody was there to see it"
    );
    world.agent.start();
    assert_eq!(world.agent.backends("gone").len(), 0);
    assert_eq!(world.agent.backends("echo"), kept);
}

/// Two agents on one node would undo each other's work.
#[test]
fn a_second_agent_is_refused() {
    let mut world = crate::world(Hooks::SOCKET);
    let manifests = world.agent.manifests.path().display().to_string();
    let said = world
        .agent
        .klb(&["agent", "--node-name", "x", "--manifests", &manifests]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    let words = format!("runs already (pid {})", world.agent.process().id());
    assert!(said.stderr.contains(&words), "{said:?}");
    // Nor does another folder for its lock help.
    let node = &world.cluster.node.place;
    let mut command = node.command(&world.agent.program);
    let [bpffs, pins, state_dir, state] = world.agent.paths();
    command.args(["agent", "--node-name", "x", "--manifests", &manifests]);
    command.args([bpffs, pins, state_dir, format!("{state}-2")]);
    let mut second = node.start("second agent", command);
    assert!(!second.wait(Duration::from_secs(20)).success());
    let said = second.stderr().text();
    assert!(said.contains("runs already with these pins"), "{said}");
}
