//! Which of a Service's endpoints real clients get, over every hook, by what
//! its slices and its settings say.

use std::{collections::BTreeSet, time::Duration};

use lb_tests::{
    agent::Hooks,
    manifests::{self, NODE},
    topology::{Addresses, Family, Host},
    traffic::{Failure, Outcome, Protocol, Request},
    wait,
    world::{ENDPOINTS_FILE, Frontend, PODS, SERVICE_FILE, World, endpoints},
};

/// Asked so often, three pods have all answered but once in 10¹⁵ times.
const ATTEMPTS: u32 = 90;
/// How often some of them may stay unheard before that is looked at.
const ROUND: u32 = 15;

/// Who asks, in both families.
fn requests(
    world: &World,
    clients: Vec<(Host, Frontend)>,
    protocol: Protocol,
) -> Vec<(Host, Request)> {
    let requests = clients.into_iter().flat_map(|(client, kind)| {
        Family::ALL.map(|family| (client.clone(), world.request(kind, family, protocol)))
    });
    requests.collect()
}

/// Those whom the socket hook serves, and those whom TC and XDP do.
fn clients(world: &World) -> [Vec<(Host, Frontend)>; 2] {
    let (node, pod) = (&world.cluster.node, &world.cluster.client.host);
    let sockets = [node.clone(), pod.clone()];
    let packets = [
        (pod.without_cgroup(), Frontend::ClusterIp),
        (world.cluster.outside.clone(), Frontend::NodePort),
    ];
    let sockets = sockets.map(|client| (client, Frontend::ClusterIp));
    [sockets.into(), packets.into()]
}

/// Every request over the socket hook.
fn sockets(world: &World) -> Vec<(Host, Request)> {
    let [sockets, _] = clients(world);
    let mut both = requests(world, sockets.clone(), Protocol::Tcp);
    both.extend(requests(world, sockets, Protocol::Udp));
    both
}

/// Asserts that these pods answer, all of them and no others. Not over UDP at TC
/// and XDP: what comes from a port that was used before stays where it was.
fn assert_answering(world: &World, pods: &[&str]) {
    let expected: BTreeSet<_> = pods.iter().map(|&pod| pod.to_owned()).collect();
    let [_, packets] = clients(world);
    let packets = requests(world, packets, Protocol::Tcp).into_iter();
    for (client, request) in sockets(world).into_iter().chain(packets) {
        let mut seen = BTreeSet::new();
        for _ in 0..ATTEMPTS / ROUND {
            let answers = client.ask_often(&request, ROUND).into_iter();
            seen.extend(answers.map(|answer| answer.expect("an answer").name));
            if seen == expected {
                break;
            }
        }
        assert_eq!(seen, expected, "{request:?}");
    }
}

/// Puts the slices with something changed in them, and waits until these pods
/// are every frontend's backends.
fn put_slices(world: &World, change: impl Fn(&str) -> String, pods: &[&str]) {
    let manifest = endpoints(&world.service, &PODS).to_string();
    world
        .agent
        .manifests
        .put(ENDPOINTS_FILE, &change(&manifest));
    let numbers = PODS.into_iter().filter(|(name, _)| pods.contains(name));
    let addresses = numbers.map(|(_, number)| Addresses::pod(number));
    let addresses: BTreeSet<_> = addresses
        .flat_map(|pod| Family::ALL.map(|family| pod.ip(family)))
        .collect();
    world.agent.await_services("the endpoints", |services| {
        let mut frontends = services.iter().flat_map(|service| &service.frontends);
        frontends.all(|frontend| {
            let backends = &frontend.backends;
            let are_known = backends.iter().all(|b| addresses.contains(&b.address));
            are_known && backends.len() == pods.len()
        })
    });
}

/// Gives every pod a hint, in the words of a slice.
fn hint(manifest: &str, hints: [&str; 3]) -> String {
    let mut manifest = manifest.to_owned();
    for ((name, _), hint) in PODS.into_iter().zip(hints) {
        let target = format!("name: {name}}}\n");
        let hinted = format!("{target}  hints: {{{hint}}}\n");
        manifest = manifest.replace(&target, &hinted);
    }
    manifest
}

#[test]
fn hints_are_heeded_where_every_endpoint_has_one() {
    const ZONE_A: &str = "forZones: [{name: a}]";
    const ZONE_B: &str = "forZones: [{name: b}]";
    const HERE: &str = "forNodes: [{name: node-1}]";
    const THERE: &str = "forNodes: [{name: node-2}]";
    let mut world = crate::stopped_world(Hooks::ALL);
    let name = format!("name: {NODE}\n");
    let labelled = format!("{name}  labels: {{topology.kubernetes.io/zone: a}}\n");
    let node = manifests::node().replace(&name, &labelled);
    world.agent.manifests.put("node.yaml", &node);
    world.agent.start();
    for (hints, answering) in [
        ([ZONE_A, ZONE_A, ZONE_B], &["pod-1", "pod-2"][..]),
        ([ZONE_A, "", ZONE_B], &["pod-1", "pod-2", "pod-3"]),
        ([THERE, THERE, HERE], &["pod-3"]),
        // Hints for others only.
        ([ZONE_B; 3], &["pod-1", "pod-2", "pod-3"]),
    ] {
        println!("{hints:?}");
        put_slices(&world, |manifest| hint(manifest, hints), answering);
        assert_answering(&world, answering);
    }
}

/// Sets the conditions of a pod's endpoints.
fn set_conditions(manifest: &str, pod: &str, conditions: [bool; 3]) -> String {
    let written = |[ready, serving, terminating]: [bool; 3]| {
        format!(
            "conditions: {{ready: {ready}, serving: {serving}, terminating: {terminating}}}\n  \
             nodeName: {NODE}\n  \
             targetRef: {{kind: Pod, namespace: default, name: {pod}}}\n"
        )
    };
    let (before, after) = (written(READY), written(conditions));
    assert!(manifest.contains(&before), "{manifest}");
    manifest.replace(&before, &after)
}

/// Whether an endpoint is ready, is serving, and is terminating.
const READY: [bool; 3] = [true, true, false];
const DRAINING: [bool; 3] = [false, true, true];
const GONE: [bool; 3] = [false, false, true];

fn with_conditions(manifest: &str, conditions: [[bool; 3]; 3]) -> String {
    let pods = PODS.into_iter().zip(conditions);
    pods.fold(manifest.to_owned(), |manifest, ((name, _), conditions)| {
        set_conditions(&manifest, name, conditions)
    })
}

/// What a rolling update of a Service with one replica relies on; connections
/// to a pod that is on its way out go on in any case.
#[test]
fn pods_on_their_way_out_serve_while_no_other_does() {
    let world = crate::world(Hooks::ALL);
    let put = |conditions, pods: &[&str]| {
        let change = |manifest: &str| with_conditions(manifest, conditions);
        put_slices(&world, change, pods);
        assert_answering(&world, pods);
    };
    put([DRAINING, GONE, GONE], &["pod-1"]);
    let everybody = clients(&world).concat();
    let streams: Vec<_> = requests(&world, everybody, Protocol::Tcp)
        .into_iter()
        .map(|(client, request)| client.stream(&request, true))
        .collect();
    for stream in &streams {
        stream.await_more(1);
    }
    put([DRAINING, GONE, READY], &["pod-3"]);
    for stream in streams {
        stream.await_more(5);
        for report in stream.stop() {
            match report.outcome {
                Outcome::Answer(answer) => assert_eq!(answer.name, "pod-1"),
                Outcome::Failure(failure) => panic!("{failure}"),
            }
        }
    }
}

/// A world in which clients keep their backend for a minute at the socket.
fn world_with_affinity() -> World {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    let manifest = world.service.to_string();
    let affinity = "spec:\n  sessionAffinity: ClientIP\n  \
                    sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}\n";
    let manifest = manifest.replace("spec:\n", affinity);
    world.agent.manifests.put(SERVICE_FILE, &manifest);
    world.agent.start();
    world
}

fn name(client: &Host, request: &Request) -> String {
    client.ask(request).expect("an answer").name
}

#[test]
fn affinity_at_the_socket_ends_after_its_timeout_and_is_refreshed() {
    let world = world_with_affinity();
    for (client, request) in sockets(&world) {
        let first = name(&client, &request);
        for _ in 0..4 {
            world.agent.age_affinity(40);
            assert_eq!(name(&client, &request), first, "{request:?}");
        }
        // Three pods: always the same once in 3²⁰ times.
        let is_new = (0..20).any(|_| {
            world.agent.age_affinity(61);
            name(&client, &request) != first
        });
        assert!(is_new, "{request:?}: always {first}");
    }
}

#[test]
fn affinity_at_the_socket_leaves_a_backend_that_has_gone() {
    let world = world_with_affinity();
    for (client, request) in sockets(&world) {
        let all = PODS.map(|(name, _)| name);
        put_slices(&world, str::to_owned, &all);
        let first = name(&client, &request);
        let change = |manifest: &str| {
            let conditions = all.map(|name| if name == first { GONE } else { READY });
            with_conditions(manifest, conditions)
        };
        let rest: Vec<_> = all.into_iter().filter(|name| *name != first).collect();
        put_slices(&world, change, &rest);
        let second = name(&client, &request);
        assert_ne!(second, first, "{request:?}");
        // And stays there when the first is back.
        put_slices(&world, str::to_owned, &all);
        for _ in 0..10 {
            assert_eq!(name(&client, &request), second, "{request:?}");
        }
    }
}

/// The clients keep one socket each, from before to after.
fn first_endpoints_come(world: &World, has_service: bool) {
    let everybody = clients(world).concat();
    let requests = requests(world, everybody, Protocol::Udp).into_iter();
    let asking = requests.flat_map(|(client, request)| {
        // What is not answered must not hold up the rest.
        let request = request.timeout(Duration::from_millis(100));
        [request.clone(), request.connected()].map(|request| (client.clone(), request))
    });
    // Packets of the node's own pass no hook: its socket stays as it was connected.
    let is_ours = |client: &Host, request: &Request| {
        has_service || !request.connected || client.addresses != Addresses::NODE
    };
    let asking = asking.filter(|(client, request)| is_ours(client, request));
    let streams: Vec<_> = asking
        .map(|(client, request)| {
            let stream = client.insist(&request);
            (request, stream)
        })
        .collect();
    for (request, stream) in &streams {
        // Only a connected socket is told of an ICMP error, if not always within its limit.
        let is_refused = has_service && request.connected;
        let what = format!("a failure, refused: {is_refused}, of {request:?}");
        wait::until(&what, Duration::from_secs(10), || {
            let reports = stream.reports().into_iter();
            let mut failures =
                reports.map(|report| report.outcome.result().expect_err("nobody to answer"));
            failures
                .any(|failure| !is_refused || failure == Failure::Refused)
                .then_some(())
        });
    }
    let manifests = &world.agent.manifests;
    manifests.put(SERVICE_FILE, &world.service.to_string());
    world.put_endpoints(&PODS);
    for (request, stream) in streams {
        let come = wait::attempt(Duration::from_secs(10), || {
            let reports = stream.reports();
            let mut outcomes = reports.iter().map(|report| &report.outcome);
            outcomes
                .any(|outcome| matches!(outcome, Outcome::Answer(_)))
                .then_some(())
        });
        assert!(come.is_some(), "{request:?} {stream:?}");
    }
}

/// A resolver that was started before DNS had a pod.
#[test]
fn a_socket_from_before_the_first_endpoint_is_served_later() {
    let mut world = crate::stopped_world(Hooks::ALL);
    world.put_endpoints(&[]);
    world.agent.start();
    first_endpoints_come(&world, true);
}

#[test]
fn a_socket_from_before_the_service_is_served_later() {
    let mut world = crate::stopped_world(Hooks::ALL);
    world.agent.manifests.remove(SERVICE_FILE);
    world.put_endpoints(&[]);
    // So that sockets of the node, too, can be connected to nobody.
    let node = world.cluster.node.place.netns();
    for family in Family::ALL {
        let via = Addresses::OUTSIDE.ip(family);
        node.ip(&format!("route add default via {via}\n"));
    }
    world.agent.start();
    first_endpoints_come(&world, false);
}
