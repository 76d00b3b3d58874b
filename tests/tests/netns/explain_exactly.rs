//! What can be known beforehand, `klb explain` says exactly: the backend, and the
//! address and port that it sees.

use std::{net::SocketAddr, time::Duration};

use lb_common::Hook;
use lb_tests::{
    agent::{Agent, Hooks},
    program::Datapath,
    topology::{Addresses, Family, UPLINK},
    traffic::{Failure, Protocol, Request},
    world::{Frontend, PODS, SERVICE_FILE},
};
use serde_json::Value;

use crate::{
    balancers,
    explain::flag,
    masquerade::only_remote,
    policies::world_with,
    ports::only_one_pod,
    sctp,
    two_nodes::{FAR, NEAR, TwoNodes, spread_by_maglev},
};

/// What is said of a packet that comes in by the uplink.
fn at_uplink(agent: &Agent, from: SocketAddr, request: &Request) -> Value {
    explain(agent, from, request.to, flag(request.protocol), UPLINK)
}

fn explain(agent: &Agent, from: SocketAddr, to: SocketAddr, proto: &str, at: &str) -> Value {
    let (from, to) = (from.to_string(), to.to_string());
    agent.explain(&["--from", &from, "--to", &to, "--proto", proto, "--at", at])
}

fn addr(value: &Value) -> SocketAddr {
    let text = value
        .as_str()
        .unwrap_or_else(|| panic!("no address: {value}"));
    text.parse().expect("an address")
}

fn outcome(said: &Value) -> [&str; 2] {
    ["outcome", "reason"].map(|field| said["verdict"][field].as_str().unwrap_or("none"))
}

/// The name of the pod that is said to be the backend.
fn chosen(said: &Value, pods: &[(&'static str, u8)]) -> &'static str {
    let address = said["backend"]["address"].as_str();
    let is = |(_, number): &(_, u8)| {
        let pod = Addresses::pod(*number);
        Family::ALL
            .map(|family| Some(pod.ip(family).to_string()))
            .iter()
            .any(|own| own.as_deref() == address)
    };
    let pod = pods.iter().find(|pod| is(pod));
    pod.unwrap_or_else(|| panic!("no pod: {said:#}")).0
}

fn steps(said: &Value) -> Vec<&str> {
    let steps = said["steps"].as_array().expect("a list").iter();
    steps
        .map(|step| step["hook"].as_str().expect("a hook"))
        .collect()
}

/// A request that is not waited for as long where no answer may come.
fn limited(request: Request, is_answered: bool) -> Request {
    if is_answered {
        request
    } else {
        request.timeout(Duration::from_millis(500))
    }
}

/// The hooks that a packet has to meet on its way through the stack, XDP first.
fn way(hooks: Hooks, is_masqueraded: bool) -> Vec<&'static str> {
    let all = [
        (Hook::Xdp, hooks.xdp != "off"),
        (Hook::TcIngress, true),
        (Hook::TcEgress, is_masqueraded),
    ];
    let met = all.into_iter().filter(|(_, is_met)| *is_met);
    met.map(|(hook, _)| hook.name()).collect()
}

/// By a Maglev table, by which the packet alone decides.
fn next_flow(hooks: Hooks, flags: &[&str]) {
    let nodes = TwoNodes::with_flags(hooks, NEAR, flags);
    spread_by_maglev(&nodes);
    let outside = &nodes.world.cluster.outside;
    let agent = &nodes.world.agent;
    // A veth takes what its peer's XDP program sends back only if it has a program of
    // its own.
    let mut bystander = Datapath::new();
    let router = outside.place.netns();
    router.within(|| bystander.attach(Hook::Xdp, "eth0"));
    let (mut local, mut remote) = (0, 0);
    for family in Family::ALL {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for port in 42_000..42_004 {
                let to = nodes.world.frontend(Frontend::NodePort, family, protocol);
                let request = Request::new(protocol, to).from_port(port);
                let from = outside.addresses.port(family, port);
                let said = at_uplink(agent, from, &request);
                let answer = outside.ask(&request).expect("an answer");
                assert_eq!(chosen(&said, &[NEAR, FAR]), answer.name, "{said:#}");
                if flags.is_empty() {
                    assert_eq!(steps(&said), way(hooks, answer.name == FAR.0), "{said:#}");
                }
                let source = addr(&said["rewrite"]["from"]["becomes"]);
                assert_eq!(source, answer.seen, "{said:#}");
                if answer.name == FAR.0 {
                    remote += 1;
                    let seen = SocketAddr::new(
                        said["masquerade"]["address"]
                            .as_str()
                            .and_then(|text| text.parse().ok())
                            .expect("an address"),
                        source.port(),
                    );
                    assert_eq!(seen, answer.seen);
                } else {
                    local += 1;
                    assert!(said["masquerade"].is_null(), "{said:#}");
                }
            }
        }
    }
    assert!(local > 0 && remote > 0, "{local} and {remote}");
}

#[test]
fn the_next_flow_over_tc() {
    next_flow(Hooks::TC, &[]);
}

#[test]
fn the_next_flow_over_xdp() {
    next_flow(Hooks::XDP, &[]);
}

#[test]
fn the_next_flow_past_the_stack() {
    next_flow(Hooks::TC, &["--routing=bypass"]);
    next_flow(Hooks::XDP, &["--routing=bypass"]);
}

#[test]
fn a_client_that_keeps_its_backend() {
    const MINUTE: &str = "  sessionAffinity: ClientIP\n  \
        sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}\n";
    let world = world_with(Hooks::TC, MINUTE);
    let outside = &world.cluster.outside;
    for family in Family::ALL {
        let request = world.request(Frontend::NodePort, family, Protocol::Tcp);
        let from = outside.addresses.port(family, 42_100);
        let before = at_uplink(&world.agent, from, &request);
        assert_eq!(before["affinity"]["in_force"], false, "{before:#}");
        let kept = outside.ask(&request).expect("an answer").name;
        for _ in 0..3 {
            let said = at_uplink(&world.agent, from, &request);
            assert_eq!(said["affinity"]["in_force"], true, "{said:#}");
            assert_eq!(said["backend"]["by"], "affinity", "{said:#}");
            assert_eq!(chosen(&said, &PODS), kept, "{said:#}");
            assert_eq!(outside.ask(&request).expect("an answer").name, kept);
        }
        world.agent.age_affinity(90);
        let said = at_uplink(&world.agent, from, &request);
        assert_eq!(said["affinity"]["in_force"], false, "{said:#}");
    }
}

#[test]
fn the_next_packet_of_a_connection() {
    for hooks in [Hooks::TC, Hooks::XDP] {
        let world = crate::world(hooks);
        let outside = &world.cluster.outside;
        for family in Family::ALL {
            let request = world
                .request(Frontend::NodePort, family, Protocol::Tcp)
                .from_port(42_200);
            let stream = outside.stream(&request, true);
            stream.await_more(3);
            let said = at_uplink(
                &world.agent,
                outside.addresses.port(family, 42_200),
                &request,
            );
            let answers = stream.stop().into_iter();
            let answer = answers
                .last()
                .and_then(|report| report.outcome.result().ok());
            let answer = answer.expect("an answer");
            assert_eq!(said["packet"]["kind"], "ACK", "{said:#}");
            assert_eq!(said["flow"]["state"], "established", "{said:#}");
            assert_eq!(said["backend"]["by"], "flow", "{said:#}");
            assert_eq!(outcome(&said), ["forwarded", "forward"], "{said:#}");
            assert_eq!(chosen(&said, &PODS), answer.name);
        }
    }
}

/// One port towards two frontends that lead to one pod.
#[test]
fn a_port_that_the_backend_knows_already() {
    let world = crate::world(Hooks::TC);
    only_one_pod(&world);
    let client = &world.cluster.client;
    let from = client.host.addresses.port(Family::V4, 42_300);
    let to = |kind| {
        let request = world.request(kind, Family::V4, Protocol::Udp);
        request.from_port(from.port())
    };
    let first = client.host.ask(&to(Frontend::ClusterIp));
    assert_eq!(first.expect("an answer").seen, from);
    let second = to(Frontend::NodePort);
    let said = explain(&world.agent, from, second.to, "udp", &client.device);
    let source = addr(&said["rewrite"]["from"]["becomes"]);
    assert_eq!(source.ip(), from.ip(), "{said:#}");
    assert_ne!(source.port(), from.port(), "{said:#}");
    let seen = client.host.ask(&second).expect("an answer").seen;
    assert_ne!(seen.port(), from.port());
}

/// One port for a connection by the Service and for one to the pod that it leads
/// to.
#[test]
fn a_connection_to_a_pod_beside_one_by_the_service() {
    let world = crate::world(Hooks::TC);
    only_one_pod(&world);
    let client = &world.cluster.client;
    let from = client.host.addresses.port(Family::V4, 42_350);
    let by_service = world.any_request().from_port(from.port());
    let stream = client.host.stream(&by_service, true);
    stream.await_more(3);
    let to = Addresses::pod(5).port(Family::V4, 3000);
    let said = explain(&world.agent, from, to, "tcp", &client.device);
    let source = addr(&said["rewrite"]["from"]["becomes"]);
    assert_ne!(source.port(), from.port(), "{said:#}");
    assert_eq!(addr(&said["rewrite"]["to"]["becomes"]), to, "{said:#}");
    let directly = Request::new(Protocol::Tcp, to).from_port(from.port());
    let answer = client.host.ask(&directly).expect("an answer");
    assert_ne!(answer.seen.port(), from.port());
    stream.await_more(3);
}

#[test]
fn when_no_port_of_the_node_is_left() {
    let mut world = crate::stopped_world(Hooks::TC);
    world
        .agent
        .flags
        .push("--masquerade-ports=50000-50001".to_owned());
    world.agent.start();
    only_remote(&world, "pod-2", 6);
    let outside = &world.cluster.outside;
    for (port, expected) in [
        (42_400, ["forwarded", "new_masqueraded_flow"]),
        (42_401, ["forwarded", "new_masqueraded_flow"]),
        (42_402, ["dropped", "masquerade_exhausted"]),
    ] {
        let request = world
            .request(Frontend::NodePort, Family::V4, Protocol::Udp)
            .from_port(port);
        let request = limited(request, expected[0] == "forwarded");
        let said = at_uplink(
            &world.agent,
            outside.addresses.port(Family::V4, port),
            &request,
        );
        assert_eq!(outcome(&said), expected, "{said:#}");
        match outside.ask(&request) {
            Ok(answer) => {
                let source = addr(&said["rewrite"]["from"]["becomes"]);
                assert_eq!(answer.seen, source, "{said:#}");
            }
            Err(Failure::TimedOut) => assert_eq!(expected[0], "dropped"),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_pod_that_is_its_own_backend() {
    let world = crate::world(Hooks::TC);
    only_one_pod(&world);
    let pod = world.cluster.pod("pod-1");
    for family in Family::ALL {
        let request = world
            .request(Frontend::ClusterIp, family, Protocol::Tcp)
            .from_port(42_500);
        let from = pod.host.addresses.port(family, 42_500);
        let said = explain(&world.agent, from, request.to, "tcp", &pod.device);
        let seen = pod.host.ask(&request).expect("an answer").seen;
        assert_eq!(addr(&said["rewrite"]["from"]["becomes"]), seen, "{said:#}");
        let why = said["masquerade"]["why"].as_str().expect("a sentence");
        assert!(why.contains("the backend itself"), "{why}");
    }
}

#[test]
fn sctp_too() {
    let world = crate::world(Hooks::TC);
    sctp::put(&world, &[sctp::POD], lb_tests::manifests::NODE);
    world.agent.await_services("SCTP", |services| {
        let mut sctp = services.iter().filter(|port| port.protocol == "SCTP");
        sctp.any(|port| port.frontends.iter().all(|f| f.backends.len() == 1))
    });
    for family in Family::ALL {
        let to = world.frontend(Frontend::ClusterIp, family, Protocol::Tcp);
        let from = world.cluster.outside.addresses.port(family, 42_600);
        let said = explain(&world.agent, from, to, "sctp", UPLINK);
        assert_eq!(outcome(&said), ["forwarded", "new_flow"], "{said:#}");
        assert_eq!(chosen(&said, &[sctp::POD]), sctp::POD.0);
        let said = explain(&world.agent, from, to, "sctp", "socket");
        assert_eq!(outcome(&said), ["unseen", "none"], "{said:#}");
    }
}

#[test]
fn who_is_not_in_the_source_ranges() {
    for (hooks, at, expected) in [
        (Hooks::TC, None, ["dropped", "source_range"]),
        (Hooks::SOCKET, Some("socket"), ["refused", "source_range"]),
    ] {
        let mut world = crate::stopped_world(hooks);
        let Addresses { v4, v6 } = world.cluster.client.host.addresses;
        let ranges = format!("  loadBalancerSourceRanges: [{v4}/32, '{v6}/128']\n");
        let manifest = balancers::manifest(&world.service, &ranges, "");
        world.agent.manifests.put(SERVICE_FILE, &manifest);
        world.agent.start();
        let (inside, outside) = (&world.cluster.client, world.cluster.pod("pod-1"));
        for family in Family::ALL {
            let request = Request::new(Protocol::Tcp, (balancers::address(family), 80).into());
            for (pod, is_let_in) in [(inside, true), (outside, false)] {
                let from = pod.host.addresses.port(family, 42_650);
                let at = at.unwrap_or(&pod.device);
                let said = explain(&world.agent, from, request.to, "tcp", at);
                let ranges = &said["policy"]["source_ranges"];
                assert_eq!(ranges["allowed"], is_let_in, "{said:#}");
                let answer = pod.host.ask(&limited(request.clone(), is_let_in));
                if is_let_in {
                    assert_eq!(outcome(&said), ["forwarded", "new_flow"], "{said:#}");
                    answer.expect("an answer");
                } else {
                    assert_eq!(outcome(&said), expected, "{said:#}");
                    assert!(answer.is_err(), "{answer:?}");
                }
            }
        }
    }
}

/// Who asks for what is not there is told what is.
#[test]
fn frontends_that_are_nearly_meant() {
    let world = crate::world(Hooks::ALL);
    let from = world.cluster.outside.addresses.port(Family::V4, 42_700);
    for (to, at, expected, differs) in [
        ("10.96.0.1:81", UPLINK, ["refused", "no_such_port"], "port"),
        (
            "10.96.0.1:3000",
            UPLINK,
            ["refused", "no_such_port"],
            "target_port",
        ),
        (
            "10.96.0.1:53",
            UPLINK,
            ["refused", "no_such_port"],
            "protocol",
        ),
        (
            "10.96.0.1:81",
            "socket",
            ["refused", "no_such_port"],
            "port",
        ),
        (
            "10.96.0.2:80",
            UPLINK,
            ["untouched", "not_service"],
            "address",
        ),
        (
            "192.168.50.1:30079",
            UPLINK,
            ["untouched", "not_service"],
            "port",
        ),
    ] {
        let to = to.parse().expect("an address");
        let said = explain(&world.agent, from, to, "tcp", at);
        assert_eq!(outcome(&said), expected, "{said:#}");
        assert!(said["frontend"].is_null(), "{said:#}");
        assert_eq!(said["nearest"][0]["differs"], differs, "{said:#}");
        assert_eq!(said["nearest"][0]["name"], "echo", "{said:#}");
    }
    let pod = Addresses::pod(5).port(Family::V4, 3000);
    let said = explain(&world.agent, from, pod, "tcp", UPLINK);
    assert_eq!(said["backend_of"][0]["port_name"], "http", "{said:#}");
}

#[test]
fn what_cannot_be_explained_is_said_in_a_sentence() {
    let world = crate::world(Hooks::TC);
    let to = ["--to", "10.96.0.1:80"];
    for (arguments, status, part) in [
        (&["--from", "fd00::1"][..], 2, "different families"),
        (&["--from", "nobody"], 2, "an address"),
        (&["--from", "192.0.2.9", "--at", "eth77"], 1, "klb is on"),
        (
            &["--from", "192.0.2.9", "--layout", "v0"],
            1,
            "are of layout v1",
        ),
    ] {
        let said = world.agent.klb(&[&["explain"], arguments, &to].concat());
        assert_eq!(said.status.code(), Some(status), "{said:?}");
        assert!(said.stdout.is_empty(), "{said:?}");
        assert!(said.stderr.contains(part), "{said:?}");
    }
    let mut powerless = world.cluster.node.place.command("setpriv");
    powerless
        .arg("--bounding-set=-all,+net_admin")
        .arg(&world.agent.program);
    powerless
        .args(["explain", "--from", "192.168.50.2"])
        .args(to);
    powerless.args(world.agent.paths());
    let said = powerless.output().expect("setpriv");
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    let said = String::from_utf8_lossy(&said.stderr);
    assert!(
        said.contains("without CAP_BPF") && said.lines().count() == 1,
        "{said}"
    );
}
