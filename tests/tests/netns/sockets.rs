//! What only sockets have: who the caller is, and who wants to be left alone.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use lb_common::{Hook, Reason, names};
use lb_tests::{
    agent::{Hooks, raw_dump},
    manifests::NODE,
    topology::{Addresses, Family, Host, Pod},
    traffic::{Failure, Protocol, Request},
    wait,
    world::{Frontend, SERVICE_FILE, World},
};

/// How long a change of the node's pods may take to be seen.
const SEEN: Duration = Duration::from_secs(5);

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

/// The load balancer's addresses, which are routed nowhere.
fn load_balancer(family: Family) -> SocketAddr {
    match family {
        Family::V4 => "203.0.113.10:80",
        Family::V6 => "[2001:db8:1::10]:80",
    }
    .parse()
    .expect("an address")
}

#[test]
fn source_ranges_hold_at_the_sockets_of_pods() {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    let Addresses { v4, v6 } = world.cluster.client.host.addresses;
    let ranges = format!("  loadBalancerSourceRanges: [{v4}/32, '{v6}/128']\n");
    let manifest = world.service.to_string();
    let manifest = manifest.replace("spec:\n", &format!("spec:\n{ranges}"));
    let manifest = manifest.replace("type: NodePort", "type: LoadBalancer");
    let ips = Family::ALL.map(|family| format!("{{ip: '{}'}}", load_balancer(family).ip()));
    let status = format!(
        "status: {{loadBalancer: {{ingress: [{}]}}}}\n",
        ips.join(", ")
    );
    world
        .agent
        .manifests
        .put(SERVICE_FILE, &(manifest + &status));
    world.agent.start();
    let (inside, outside) = (&world.cluster.client, world.cluster.pod("pod-1"));
    for family in Family::ALL {
        let request = Request::new(Protocol::Tcp, load_balancer(family));
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
