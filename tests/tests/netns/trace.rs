//! `klb trace` beside real traffic.

use std::{
    fs,
    io::{self, PipeReader, PipeWriter, Read as _, Write as _},
    process::{Command, Stdio},
    time::Duration,
};

use lb_common::{Hook, Reason, names};
use lb_tests::{
    agent::{Agent, Hooks, klb_path},
    process::Process,
    topology::{Family, UPLINK},
    traffic::Protocol,
    wait,
    world::{Frontend, World},
};
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// Longer than anything takes that is to happen.
const LIMIT: Duration = Duration::from_secs(20);

/// A trace that listens already.
pub(crate) fn listening(agent: &Agent, flags: &[&str]) -> Process {
    let mut trace = agent.start_klb(&[&["trace"], flags].concat());
    trace.wait_for_stderr("sign that it listens", LIMIT, |line| {
        line.contains("listening")
    });
    trace
}

/// Ends a trace, and returns what it has shown.
pub(crate) fn ended(mut trace: Process) -> (Vec<String>, String) {
    trace.signal(Signal::SIGINT);
    let status = trace.wait(LIMIT);
    assert!(status.success(), "{trace:?}");
    (trace.stdout().lines(), trace.stderr().text())
}

fn ask(world: &World, kind: Frontend, family: Family, protocol: Protocol) {
    let request = world.request(kind, family, protocol);
    world.cluster.outside.ask(&request).expect("an answer");
}

#[test]
fn a_connection_is_shown_there_and_back() {
    for (hooks, hook) in [(Hooks::TC, Hook::TcIngress), (Hooks::XDP, Hook::Xdp)] {
        let world = crate::world(hooks);
        for family in Family::ALL {
            let client = world.cluster.outside.addresses.ip(family).to_string();
            let flags = ["--service", "default/echo:http", "--address", &client];
            let trace = listening(&world.agent, &flags);
            ask(&world, Frontend::NodePort, family, Protocol::Udp);
            ask(&world, Frontend::NodePort, family, Protocol::Tcp);
            let frontend = world.frontend(Frontend::NodePort, family, Protocol::Tcp);
            let has = |words: &[&str]| {
                let lines = trace.stdout().lines();
                let found = lines
                    .iter()
                    .any(|line| words.iter().all(|word| line.contains(word)));
                found.then_some(())
            };
            let (new, to) = (hook.name(), format!("→ {frontend} ⇒"));
            let said = [
                new,
                UPLINK,
                "new_flow TCP",
                &client,
                &to,
                "default/echo:http",
            ];
            wait::until("the first packet", LIMIT, || has(&said));
            let from = format!("⇒ {frontend} →");
            let said = ["tc-egress", UPLINK, "reply TCP", &from, "default/echo:http"];
            wait::until("an answer", LIMIT, || has(&said));
            let (lines, summary) = ended(trace);
            assert!(lines.iter().all(|line| line.contains(" TCP ")), "{lines:?}");
            let shown = format!("{} shown, 0 lost", lines.len());
            assert!(summary.contains(&shown), "{summary}");
        }
    }
}

#[test]
fn a_call_is_shown_with_its_process() {
    let world = crate::world(Hooks::SOCKET);
    let trace = listening(&world.agent, &["-o", "json", "--count", "2"]);
    let client = &world.cluster.client.host;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let request = world.request(Frontend::ClusterIp, Family::V6, protocol);
        client.ask(&request).expect("an answer");
    }
    let mut trace = trace;
    assert!(trace.wait(LIMIT).success(), "it ends after two: {trace:?}");
    let events: Vec<Value> = trace
        .stdout()
        .lines()
        .iter()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let calls: Vec<_> = events
        .iter()
        .map(|event| &event["process"]["call"])
        .collect();
    assert_eq!(calls, ["connect", "sendmsg"]);
    for (event, protocol) in events.iter().zip([Protocol::Tcp, Protocol::Udp]) {
        let frontend = world.frontend(Frontend::ClusterIp, Family::V6, protocol);
        assert_eq!(event["hook"], "socket");
        assert_eq!(event["reason"], "new_flow");
        assert_eq!(event["before"]["dst"]["address"], frontend.ip().to_string());
        assert_eq!(event["before"]["dst"]["port"], frontend.port());
        assert_eq!(event["service"]["name"], "echo");
        let pod = event["after"]["dst"]["address"]
            .as_str()
            .expect("an address");
        assert!(pod.starts_with("fd00:10:244::"), "{event}");
        let name = event["process"]["name"].as_str().expect("a name");
        assert!(
            "klb-traffic".starts_with(name) && !name.is_empty(),
            "{event}"
        );
    }
}

#[test]
fn a_refusal_is_shown_in_words() {
    let world = crate::world(Hooks::ALL);
    world.put_endpoints(&[]);
    world
        .agent
        .await_services("Services without backends", |services| {
            let mut frontends = services.iter().flat_map(|service| &service.frontends);
            frontends.all(|frontend| frontend.backends.is_empty())
        });
    let trace = listening(&world.agent, &["--reason", "refuse,answer"]);
    let request = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    world.cluster.outside.ask(&request).expect_err("refused");
    let request = world.request(Frontend::ClusterIp, Family::V4, Protocol::Tcp);
    world
        .cluster
        .client
        .host
        .ask(&request)
        .expect_err("refused");
    for hook in ["tc-ingress", "socket"] {
        wait::until("a refusal", LIMIT, || {
            let lines = trace.stdout().lines();
            let mut lines = lines.iter().filter(|line| line.contains(hook));
            lines.find(|line| {
                line.contains("no_backend") && line.contains("The Service has no backend")
            })?;
            Some(())
        });
    }
    ended(trace);
}

#[test]
fn tcpdump_reads_packets_before_and_after() {
    let world = crate::world(Hooks::TC);
    let path = world.cluster.scope().folder().join("trace.pcapng");
    let file = path.to_str().expect("a path");
    let flags = [
        "--pcap",
        file,
        "--hook",
        "tc-ingress",
        "--reason",
        "new_flow",
        "--count",
        "1",
    ];
    let mut trace = listening(&world.agent, &flags);
    ask(&world, Frontend::NodePort, Family::V4, Protocol::Tcp);
    assert!(trace.wait(LIMIT).success(), "{trace:?}");
    let said = Command::new("tcpdump").args(["-nvr", file]).output();
    let said = said.expect("there is a tcpdump");
    let text = String::from_utf8_lossy(&said.stdout);
    let sent: Vec<&str> = text.lines().filter(|line| line.contains(" > ")).collect();
    let frontend = world.frontend(Frontend::NodePort, Family::V4, Protocol::Tcp);
    let [before, after] = sent[..] else {
        panic!("two packets, not {text}");
    };
    let to = format!("> {}.{}", frontend.ip(), frontend.port());
    assert!(before.contains(&to), "{text}");
    assert!(
        after.contains("> 10.244.0.") && after.contains(".3000:"),
        "{text}"
    );
    let bytes = fs::read(&path).expect("the file");
    for words in [
        format!("{UPLINK} tc-ingress before"),
        "after: new_flow default/echo:http".into(),
    ] {
        let words = words.as_bytes();
        assert!(bytes.windows(words.len()).any(|window| window == words));
    }
}

/// A command that is killed cannot say that it does not listen any more.
#[test]
fn programs_stop_when_the_command_is_killed() {
    let world = crate::world(Hooks::TC);
    let mut trace = listening(&world.agent, &[]);
    trace.signal(Signal::SIGKILL);
    trace.wait(LIMIT);
    let ask = || ask(&world, Frontend::NodePort, Family::V4, Protocol::Tcp);
    wait::until("the end of the trace", LIMIT, || {
        ask();
        // The first packet after its end notes that.
        is_off(&world.agent).then_some(())
    });
    let told = world.agent.status().count(Hook::TcIngress, Reason::NewFlow);
    // Whoever comes next is not shown what the other one missed.
    let (lines, summary) = ended(listening(&world.agent, &["--reason", "new_flow"]));
    assert!(lines.is_empty() && told > 0, "{lines:?}");
    assert!(summary.contains("0 shown, 0 lost"), "{summary}");
}

/// Whether programs find that nobody listens.
fn is_off(agent: &Agent) -> bool {
    let dump = Command::new("bpftool")
        .args(["-j", "map", "dump", "pinned"])
        .arg(agent.pins().join(names::TRACE))
        .output()
        .expect("there is a bpftool");
    let dump: Value = serde_json::from_slice(&dump.stdout).expect("JSON");
    dump[0]["formatted"]["value"]["until"] == 0
}

/// Whoever reads that it listens may end it at once.
#[test]
fn it_says_that_it_listens_once_it_can_be_ended() {
    let world = crate::world(Hooks::TC);
    let (mut said, to) = full_pipe();
    let mut command = world.cluster.node.place.command(klb_path());
    command.arg("trace").args(world.agent.paths());
    command.stdout(Stdio::null()).stderr(to);
    let mut trace = command.spawn().expect("it starts");
    // This end of the pipe is closed with it.
    drop(command);
    wait::until("programs that tell", LIMIT, || {
        (!is_off(&world.agent)).then_some(())
    });
    // It has not said so yet: nothing more goes into the pipe.
    let pid = Pid::from_raw(trace.id().try_into().expect("a pid"));
    kill(pid, Signal::SIGINT).expect("it runs");
    let mut text = String::new();
    said.read_to_string(&mut text).expect("what it says");
    let status = trace.wait().expect("it ends");
    assert!(status.success(), "{status}: {}", text.trim());
    assert!(is_off(&world.agent), "it has said so itself");
}

/// A pipe that takes nothing until somebody reads.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = io::pipe().expect("a pipe");
    let size = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1)).expect("its size");
    let size = usize::try_from(size).expect("its size");
    writer.write_all(&vec![b'\n'; size]).expect("room for it");
    (reader, writer)
}

#[test]
fn one_listens_at_a_time_and_the_second_is_told_who() {
    let world = crate::world(Hooks::TC);
    let first = listening(&world.agent, &[]);
    let second = world.agent.klb(&["trace"]);
    assert_eq!(second.status.code(), Some(1), "{second:?}");
    let owner = format!("pid {}", first.id());
    assert!(second.stderr.contains(&owner), "{second:?}");
    ended(first);
    assert!(is_off(&world.agent), "it has said so itself");
    ended(listening(&world.agent, &[]));
}

#[test]
fn what_cannot_be_listened_to_is_said_in_a_sentence() {
    let world = crate::stopped_world(Hooks::TC);
    let said = world.agent.klb(&["trace"]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    assert!(said.stderr.contains("no agent has run"), "{said:?}");
    assert_eq!(said.stderr.trim().lines().count(), 1, "{said:?}");
    let mut world = world;
    world.agent.start();
    let said = world.agent.klb(&["trace", "--service", "default/nobody"]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    assert!(
        said.stderr.contains("no Service default/nobody"),
        "{said:?}"
    );
}

#[test]
fn it_ends_with_its_reader() {
    let world = crate::world(Hooks::TC);
    let place = &world.cluster.node.place;
    let klb = klb_path();
    let paths = world.agent.paths().join(" ");
    let script = format!("{} trace {paths} | head -n 1", klb.display());
    let mut shell = place.command("bash");
    shell.args(["-o", "pipefail", "-c", &script]);
    let mut trace = place.start("trace", shell);
    wait::until("the end of both", LIMIT, || {
        ask(&world, Frontend::NodePort, Family::V4, Protocol::Tcp);
        trace.status()
    });
    assert!(
        trace.status().is_some_and(|status| status.success()),
        "{trace:?}"
    );
    assert_eq!(trace.stdout().lines().len(), 1);
}
