//! What only sockets have: who the caller is, and who wants to be left alone.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use lb_common::{Hook, Reason, names};
use lb_tests::{
    agent::{Hooks, raw_dump},
    manifests::NODE,
    topology::{Addresses, Family, Host, Pod},
    traffic::{Failure, Outcome, Protocol, Report, Request, Step},
    wait,
    world::{Frontend, PODS, SERVICE_FILE, World, echo, endpoints},
};

use crate::{balancers, orphans::LOOKED_AT};

/// How long a change of the node's pods may take to be seen.
const SEEN: Duration = Duration::from_secs(20);

/// What the programs know of pods, as bytes: the address is part of them.
fn pods_known(world: &World) -> Vec<String> {
    raw_dump(&world.agent.pins().join(names::NETNS))
}

/// The bytes of an address as a dump shows them.
fn in_dump(addresses: Addresses) -> String {
    let bytes = addresses.v4.octets().into_iter();
    let bytes = bytes.chain(addresses.v6.octets());
    let bytes: Vec<_> = bytes.map(|byte| format!("0x{byte:02x}")).collect();
    bytes.concat()
}

fn await_pod(world: &World, addresses: Addresses, there: bool) {
    let wanted = in_dump(addresses);
    wait::until("a pod to come or go", SEEN, || {
        let is_there = pods_known(world).iter().any(|pod| pod.contains(&wanted));
        (is_there == there).then_some(())
    });
}

/// The pods that answer some requests.
fn answering(client: &Host, request: &Request) -> BTreeSet<String> {
    let answers = client.ask_often(request, 6).into_iter();
    answers
        .map(|answer| answer.expect("an answer").name)
        .collect()
}

#[test]
fn a_pod_has_the_same_address_at_the_socket_as_in_packets() {
    let mut world = crate::stopped_world(Hooks::ALL);
    let manifest = world.service.to_string();
    let manifest = manifest.replace("spec:\n", "spec:\n  sessionAffinity: ClientIP\n");
    world.agent.manifests.put(SERVICE_FILE, &manifest);
    world.agent.start();
    let pod = &world.cluster.client.host;
    for family in Family::ALL {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let request = world.request(Frontend::ClusterIp, family, protocol);
            let mut answering = answering(pod, &request);
            answering.extend(self::answering(&pod.without_cgroup(), &request));
            assert_eq!(answering.len(), 1, "{family} {protocol:?}: {answering:?}");
        }
    }
    let status = world.agent.status();
    assert!(status.count(Hook::Socket, Reason::NewFlow) > 0);
    assert!(status.count(Hook::TcIngress, Reason::NewFlow) > 0);
}

#[test]
fn pods_come_change_and_go() {
    let world = crate::world(Hooks::ALL);
    await_pod(&world, world.cluster.client.host.addresses, true);
    let late = world.cluster.unplugged_pod("late", 20);
    world.cluster.plug(&late);
    await_pod(&world, Addresses::pod(20), true);
    // An address that changes is none that a process of the node hears of.
    let (old, new) = (Addresses::pod(20), Addresses::pod(21));
    late.host.place.netns().ip(&format!(
        "addr add {}/32 dev eth0\naddr add {}/128 dev eth0 nodad\n\
         addr del {}/32 dev eth0\naddr del {}/128 dev eth0\n",
        new.v4, new.v6, old.v4, old.v6
    ));
    await_pod(&world, new, true);
    let before = pods_known(&world).len();
    drop(late);
    await_pod(&world, new, false);
    assert_eq!(pods_known(&world).len(), before - 1);
}

/// The namespaces of other tests are on the same machine, and those of nobody.
#[test]
fn only_pods_of_this_node_are_known() {
    let other = crate::world(Hooks::SOCKET);
    let world = crate::world(Hooks::SOCKET);
    // The host outside hangs on the node as a pod does.
    let expected = world.cluster.pods.len() + 2;
    for world in [&world, &other] {
        assert_eq!(pods_known(world).len(), expected, "{:?}", pods_known(world));
    }
}

/// Without a folder of names, namespaces are found by the processes in them.
#[test]
fn pods_without_a_name_are_known_by_their_processes() {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    world
        .agent
        .flags
        .push("--netns-dir=/run/nowhere".to_owned());
    world.agent.start();
    // The client pod and the host outside have no process that stays.
    assert_eq!(pods_known(&world).len(), world.cluster.pods.len());
    for pod in &world.cluster.pods {
        await_pod(&world, pod.host.addresses, true);
    }
}

/// A pod's manifest.
fn manifest(pod: &Pod, annotations: &str) -> String {
    let Addresses { v4, v6 } = pod.host.addresses;
    format!(
        "apiVersion: v1\nkind: Pod\n\
         metadata: {{name: {}, namespace: default, annotations: {{{annotations}}}}}\n\
         spec: {{nodeName: {NODE}}}\n\
         status: {{phase: Running, podIPs: [{{ip: {v4}}}, {{ip: '{v6}'}}]}}\n",
        pod.name
    )
}

fn namespace(annotations: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\n\
         metadata: {{name: default, annotations: {{{annotations}}}}}\n"
    )
}

/// Waits until the client's sockets are served or not, and asks once more.
fn await_served(world: &World, by: Hook) {
    let request = world.any_request();
    wait::until("the annotation to be heeded", SEEN, || {
        let before = world.agent.status().count(by, Reason::NewFlow);
        let answer = world.cluster.client.host.ask(&request);
        answer.expect("an answer, whoever serves it");
        let after = world.agent.status().count(by, Reason::NewFlow);
        (after > before).then_some(())
    });
}

#[test]
fn a_pod_that_opted_out_is_served_by_tc() {
    const OUT: &str = "klb/socket-lb: 'false'";
    const IN: &str = "klb/socket-lb: 'true'";
    let world = crate::world(Hooks::ALL);
    let pod = &world.cluster.client;
    let manifests = &world.agent.manifests;
    await_served(&world, Hook::Socket);
    manifests.put("pod.yaml", &manifest(pod, OUT));
    await_served(&world, Hook::TcIngress);
    let status = world.agent.status();
    assert!(status.count(Hook::Socket, Reason::SocketNotServed) > 0);
    // The node's own processes are not the pod's.
    let before = status.count(Hook::Socket, Reason::NewFlow);
    let request = world.any_request();
    world.cluster.node.ask(&request).expect("an answer");
    let after = world.agent.status().count(Hook::Socket, Reason::NewFlow);
    assert_eq!(after, before + 1);
    manifests.remove("pod.yaml");
    await_served(&world, Hook::Socket);
    // By its namespace, and in again by itself.
    manifests.put("pod.yaml", &manifest(pod, ""));
    manifests.put("namespace.yaml", &namespace(OUT));
    await_served(&world, Hook::TcIngress);
    manifests.put("pod.yaml", &manifest(pod, IN));
    await_served(&world, Hook::Socket);
}

#[test]
fn opting_out_survives_a_restart_of_the_agent() {
    let mut world = crate::world(Hooks::ALL);
    let pod = manifest(&world.cluster.client, "klb/socket-lb: 'false'");
    world.agent.manifests.put("pod.yaml", &pod);
    await_served(&world, Hook::TcIngress);
    let stream = (world.cluster.client.host).stream(&world.any_request(), false);
    stream.await_more(1);
    let before = world.agent.status().count(Hook::Socket, Reason::NewFlow);
    world.agent.kill();
    stream.await_more(3);
    world.agent.start();
    stream.await_more(3);
    drop(stream.stop());
    let after = world.agent.status().count(Hook::Socket, Reason::NewFlow);
    assert_eq!(after, before, "the sockets were served for a moment");
}

#[test]
fn source_ranges_hold_at_the_sockets_of_pods() {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    let Addresses { v4, v6 } = world.cluster.client.host.addresses;
    let ranges = format!("  loadBalancerSourceRanges: [{v4}/32, '{v6}/128']\n");
    let manifest = balancers::manifest(&world.service, &ranges, "");
    world.agent.manifests.put(SERVICE_FILE, &manifest);
    world.agent.start();
    let (inside, outside) = (&world.cluster.client, world.cluster.pod("pod-1"));
    for family in Family::ALL {
        let to = (balancers::address(family), 80).into();
        let request = Request::new(Protocol::Tcp, to);
        inside.host.ask(&request).expect("an answer");
        let told = outside.host.ask(&request).expect_err("not in the ranges");
        assert_eq!(told, Failure::Refused);
        // Other frontends of the Service are not protected.
        let request = world.request(Frontend::ClusterIp, family, Protocol::Tcp);
        outside.host.ask(&request).expect("an answer");
    }
    let refused = world
        .agent
        .status()
        .count(Hook::Socket, Reason::SourceRange);
    assert_eq!(refused, 2);
}

/// A world with two Services; behind each is only one pod, of the names that are
/// returned.
fn world_of_two() -> (World, [&'static str; 2]) {
    let mut world = crate::stopped_world(Hooks::ALL);
    let other = echo("other", 2, 30_180);
    let manifests = &world.agent.manifests;
    world.put_endpoints(&PODS[..1]);
    manifests.put("other.yaml", &other.to_string());
    let pods = endpoints(&other, &PODS[1..2]);
    manifests.put("other-endpoints.yaml", &pods.to_string());
    world.agent.start();
    (world, [PODS[0].0, PODS[1].0])
}

/// What a client saw: who answered, from where, and whom its socket was
/// connected to.
fn seen(
    client: &Host,
    steps: &[Step],
    mapped: bool,
) -> Vec<(String, SocketAddr, Option<SocketAddr>)> {
    let outcomes = client.take(steps, mapped).into_iter();
    let answers =
        outcomes.map(|outcome| outcome.unwrap_or_else(|told| panic!("{steps:?}: {told}")));
    answers
        .map(|answer| (answer.name, answer.from, answer.peer))
        .collect()
}

const KINDS: [(Family, bool); 3] = [(Family::V4, false), (Family::V4, true), (Family::V6, false)];

#[test]
fn a_udp_socket_is_connected_again_and_again() {
    use Step::{Ask, Connect, Disconnect};
    let (world, [one, two]) = world_of_two();
    for (client, (family, mapped)) in [&world.cluster.client.host, &world.cluster.node]
        .into_iter()
        .flat_map(|client| KINDS.map(|kind| (client, kind)))
    {
        let first = world.frontend(Frontend::ClusterIp, family, Protocol::Udp);
        let same = world.frontend(Frontend::NodePort, family, Protocol::Udp);
        let second = Addresses::service(2).port(family, 53);
        let direct = Addresses::pod(PODS[0].1).port(family, 3053);
        let steps = [
            Connect(first),
            Ask,
            Connect(second),
            Ask,
            Connect(same),
            Ask,
            // The pod itself, which two frontends have led to.
            Connect(direct),
            Ask,
            Disconnect,
            Connect(second),
            Ask,
        ];
        let expected = [
            (one, first),
            (two, second),
            (one, same),
            (one, direct),
            (two, second),
        ];
        let expected = expected.map(|(name, to)| (name.to_owned(), to, Some(to)));
        assert_eq!(seen(client, &steps, mapped), expected, "{family} {mapped}");
    }
}

#[test]
fn one_udp_socket_talks_to_many() {
    use Step::AskOf;
    let (world, [one, two]) = world_of_two();
    for (family, mapped) in KINDS {
        let first = world.frontend(Frontend::ClusterIp, family, Protocol::Udp);
        let same = world.frontend(Frontend::NodePort, family, Protocol::Udp);
        let second = Addresses::service(2).port(family, 53);
        let direct = Addresses::pod(PODS[2].1).port(family, 3053);
        // In turn, twice: each is shown as it was named, also where two
        // frontends lead to one pod.
        let turn = [
            (one, first),
            (two, second),
            (one, same),
            (PODS[2].0, direct),
        ];
        let turns = [turn, turn].concat();
        let steps: Vec<_> = turns.iter().map(|(_, to)| AskOf(*to)).collect();
        let expected = turns
            .iter()
            .map(|(name, to)| ((*name).to_owned(), *to, None));
        let expected: Vec<_> = expected.collect();
        let client = &world.cluster.client.host;
        assert_eq!(seen(client, &steps, mapped), expected, "{family} {mapped}");
    }
}

#[test]
fn a_server_of_the_node_is_left_alone_on_a_port_without_a_service() {
    let world = crate::world(Hooks::ALL);
    let _server = world.cluster.node.serve("local", 31_999, 31_998);
    for family in Family::ALL {
        let loopback: IpAddr = match family {
            Family::V4 => [127, 0, 0, 1].into(),
            Family::V6 => [0, 0, 0, 0, 0, 0, 0, 1_u16].into(),
        };
        for ip in [loopback, Addresses::NODE.ip(family)] {
            for (protocol, port) in [(Protocol::Tcp, 31_999), (Protocol::Udp, 31_998)] {
                let to = SocketAddr::new(ip, port);
                let request = Request::new(protocol, to).connected();
                let answer = world.cluster.node.ask(&request).expect("an answer");
                assert_eq!((answer.name.as_str(), answer.peer), ("local", Some(to)));
            }
        }
    }
}

/// Sockets end with their backend, and no others do: not those that talk to the
/// same pod directly, nor those that are not connected.
#[test]
fn only_sockets_that_were_given_the_backend_end_with_it() {
    let world = crate::world(Hooks::ALL);
    world.put_endpoints(&PODS[..1]);
    let only = |count: usize| {
        world.agent.await_services("other endpoints", |services| {
            let mut frontends = services.iter().flat_map(|service| &service.frontends);
            frontends.all(|frontend| frontend.backends.len() == count)
        });
    };
    only(1);
    let pod = &world.cluster.client.host;
    let (family, protocol) = (Family::V4, Protocol::Udp);
    let service = world.request(Frontend::ClusterIp, family, protocol);
    let to = Addresses::pod(PODS[0].1).port(family, 3053);
    let direct = pod.stream(&Request::new(protocol, to).connected(), true);
    let unconnected = pod.stream(&service, true);
    let connected = pod.stream(&service.clone().connected(), true);
    let mapped = pod.stream(&service.mapped().connected(), true);
    let streams = [&direct, &unconnected, &connected, &mapped];
    for stream in streams {
        stream.await_more(1);
    }
    world.put_endpoints(&PODS[1..]);
    only(2);
    for stream in [&connected, &mapped] {
        wait::until("the process to be told", LOOKED_AT, || {
            (!failures(&stream.reports()).is_empty()).then_some(())
        });
    }
    for stream in streams {
        stream.await_more(20);
    }
    for stream in [direct, unconnected] {
        assert_eq!(failures(&stream.stop()), []);
    }
    for stream in [connected, mapped] {
        let told = failures(&stream.stop());
        assert!(told.len() == 1 && is_end(&told[0]), "{told:?}");
    }
}

fn failures(reports: &[Report]) -> Vec<Failure> {
    let failures = reports.iter().filter_map(|report| match &report.outcome {
        Outcome::Failure(failure) => Some(failure.clone()),
        Outcome::Answer(_) => None,
    });
    failures.collect()
}

/// What the kernel tells a process whose socket was ended, when it receives and
/// when it sends.
fn is_end(failure: &Failure) -> bool {
    let unsendable = io::Error::from_raw_os_error(libc::EDESTADDRREQ);
    [Failure::Broken, unsendable.into()].contains(failure)
}

/// The pod has gone, so nothing but the end of its socket wakes a process that
/// waits for an answer.
#[test]
fn a_process_that_waits_for_a_dead_pod_is_woken() {
    let mut world = crate::world(Hooks::ALL);
    world.put_endpoints(&PODS[..1]);
    world.agent.await_services("one endpoint", |services| {
        let mut frontends = services.iter().flat_map(|service| &service.frontends);
        frontends.all(|frontend| frontend.backends.len() == 1)
    });
    let streams = KINDS.map(|(family, mapped)| {
        let mut request = world.request(Frontend::ClusterIp, family, Protocol::Udp);
        request.mapped = mapped;
        let request = request.connected().timeout(2 * LOOKED_AT);
        world.cluster.client.host.stream(&request, true)
    });
    for stream in &streams {
        stream.await_more(1);
    }
    world.cluster.remove_pod(PODS[0].0);
    world.put_endpoints(&PODS[1..]);
    for stream in streams {
        // Less than a request waits for its answer.
        wait::until("an answer of another pod", LOOKED_AT, || {
            stream.reports().into_iter().find(|report| {
                matches!(&report.outcome, Outcome::Answer(answer) if answer.name != PODS[0].0)
            })
        });
        drop(stream.stop());
    }
}

#[test]
fn without_endpoints_a_connected_socket_ends_and_the_next_is_refused() {
    let world = crate::world(Hooks::ALL);
    let request = world.request(Frontend::ClusterIp, Family::V6, Protocol::Udp);
    let stream = world.cluster.client.host.stream(&request.connected(), true);
    stream.await_more(1);
    world.put_endpoints(&[]);
    let told = wait::until("two failures", LOOKED_AT, || {
        let told = failures(&stream.reports());
        (told.len() >= 2).then_some(told)
    });
    assert!(is_end(&told[0]), "{told:?}");
    assert_eq!(told[1], Failure::Refused);
}

/// Multipath TCP connects by a socket that the kernel makes for itself, as its
/// network file systems do; those connect in the root control group, which is not
/// a test's.
#[test]
fn sockets_of_the_kernel_are_served_and_refused_like_others() {
    let world = crate::world(Hooks::SOCKET);
    let client = &world.cluster.client.host;
    let ask = |family| {
        let request = world.request(Frontend::ClusterIp, family, Protocol::Tcp);
        client.ask(&request.multipath())
    };
    // Which every distribution's kernel has, and a machine may have off.
    if !Path::new("/proc/sys/net/mptcp/enabled").exists() {
        println!("skipped: the kernel has no multipath TCP");
        return;
    }
    client.place.netns().sysctl("net/mptcp/enabled", "1");
    for family in Family::ALL {
        let answer = ask(family).expect("an answer");
        assert_eq!(answer.seen.ip(), client.addresses.ip(family));
    }
    world.put_endpoints(&[]);
    wait::until("a refusal", SEEN, || {
        let told = Family::ALL.map(|family| ask(family).err());
        (told == [const { Some(Failure::Refused) }; 2]).then_some(())
    });
}
