//! The addresses of load balancers: who may use them, who answers a ping, and
//! those that are the balancer's own.

use std::{fmt::Write as _, net::IpAddr, time::Duration};

use lb_common::{Hook, Reason};
use lb_tests::{
    agent::Hooks,
    manifests::Service,
    packet::{Packet, flags},
    topology::{Addresses, Family, Host},
    traffic::{Failure, Protocol, Request},
    wait,
    wire::RawSocket,
    world::{Frontend, SERVICE_FILE, World},
};

use crate::strangers::gateway;

/// How long nothing is heard where nobody answers.
const SILENCE: Duration = Duration::from_millis(300);
/// How long a change may take to be seen.
const SEEN: Duration = Duration::from_secs(20);

/// The load balancer's addresses, which are routed nowhere.
const BALANCER: [&str; 2] = ["203.0.113.10", "2001:db8:1::10"];

pub(crate) fn address(family: Family) -> IpAddr {
    let [v4, v6] = BALANCER;
    let text = match family {
        Family::V4 => v4,
        Family::V6 => v6,
    };
    text.parse().expect("an address")
}

/// A Service with these addresses, more in its `spec`, and more said of each
/// address.
pub(crate) fn manifest(service: &Service, spec: &str, of_address: &str) -> String {
    let manifest = service.to_string();
    let mut manifest = manifest.replace("spec:\n", &format!("spec:\n{spec}"));
    manifest = manifest.replace("type: NodePort", "type: LoadBalancer");
    manifest += "status:\n  loadBalancer:\n    ingress:\n";
    for ip in BALANCER {
        writeln!(manifest, "    - {{ip: '{ip}'{of_address}}}").expect("a string grows");
    }
    manifest
}

/// A world whose Service has such addresses, which the host outside has a route
/// to. The agent does not run yet.
fn stopped_world(hooks: Hooks, spec: &str, of_address: &str) -> World {
    let world = crate::stopped_world(hooks);
    let manifest = manifest(&world.service, spec, of_address);
    world.agent.manifests.put(SERVICE_FILE, &manifest);
    let outside = world.cluster.outside.place.netns();
    for family in Family::ALL {
        let (addr, via) = (address(family), Addresses::NODE.ip(family));
        outside.ip(&format!("route add {addr} via {via}\n"));
    }
    world
}

fn request(family: Family) -> Request {
    Request::new(Protocol::Tcp, (address(family), 80).into())
}

/// One that nobody answers, or that is tried again until somebody does.
fn brief_request(family: Family) -> Request {
    request(family).timeout(SILENCE)
}

/// Whether a ping is answered. One that should be is waited for longer.
fn ping(host: &Host, to: IpAddr, expected: bool) -> bool {
    host.ping(to, if expected { SEEN } else { SILENCE })
}

#[test]
fn pings_of_services_with_endpoints_are_answered_as_the_flag_says() {
    for (hooks, flag) in [
        (Hooks::TC, None),
        (Hooks::CLSACT, None),
        (Hooks::XDP, None),
        (Hooks::ALL, Some("--ping=all")),
        (Hooks::TC, Some("--ping=off")),
    ] {
        let mut world = stopped_world(hooks, "", "");
        world.agent.flags.extend(flag.map(str::to_owned));
        world.agent.start();
        let cluster = &world.cluster;
        let answers = |[balancer, cluster_ip]: [bool; 2]| {
            let clients = [&cluster.client.host, &cluster.outside].into_iter();
            let clients = clients.flat_map(|client| Family::ALL.map(|family| (client, family)));
            let answers = clients.map(|(client, family)| {
                let frontend = world.frontend(Frontend::ClusterIp, family, Protocol::Tcp);
                [(address(family), balancer), (frontend.ip(), cluster_ip)]
                    .map(|(to, expected)| ping(client, to, expected))
            });
            answers.collect::<Vec<_>>()
        };
        let expected = match flag {
            None => [true, false],
            Some("--ping=all") => [true, true],
            Some(_) => [false, false],
        };
        assert_eq!(answers(expected), [expected; 4], "{hooks:?} {flag:?}");
        world.put_endpoints(&[]);
        world.agent.await_services("no endpoint", |services| {
            let mut frontends = services.iter().flat_map(|service| &service.frontends);
            frontends.all(|frontend| frontend.verdict == "reject")
        });
        // Addresses are written after all frontends.
        let what = format!("{hooks:?} {flag:?}: pings without an endpoint to end");
        wait::until(&what, SEEN, || {
            (answers([false; 2]) == [[false; 2]; 4]).then_some(())
        });
    }
}

/// Ranges that hold the client outside, in both families.
fn ranges(hosts: Addresses) -> String {
    let Addresses { v4, v6 } = hosts;
    format!("  loadBalancerSourceRanges: [{v4}/32, '{v6}/128']\n")
}

#[test]
fn source_ranges_hold_for_clients_outside_and_for_pods() {
    for (hooks, hook) in [(Hooks::TC, Hook::TcIngress), (Hooks::XDP, Hook::Xdp)] {
        let cluster_wide = ranges(Addresses::OUTSIDE);
        let mut world = stopped_world(hooks, &cluster_wide, "");
        world.agent.start();
        let (outside, pod) = (&world.cluster.outside, &world.cluster.client.host);
        for family in Family::ALL {
            let answer = outside.ask(&request(family)).expect("an answer");
            assert_eq!(answer.seen.ip(), outside.addresses.ip(family));
            assert_eq!(pod.ask(&brief_request(family)), Err(Failure::TimedOut));
            // Other frontends of the Service are not protected.
            for kind in [Frontend::ClusterIp, Frontend::NodePort] {
                let request = world.request(kind, family, Protocol::Tcp);
                pod.ask(&request).expect("an answer");
            }
        }
        let pods_only = manifest(&world.service, &ranges(pod.addresses), "");
        world.agent.manifests.put(SERVICE_FILE, &pods_only);
        for family in Family::ALL {
            wait::until("the pod to be let in", SEEN, || {
                pod.ask(&brief_request(family)).ok()
            });
            // What was allowed goes after what comes has been written.
            wait::until("the host outside to be shut out", SEEN, || {
                let answer = outside.ask(&brief_request(family));
                (answer == Err(Failure::TimedOut)).then_some(())
            });
            let request = world.request(Frontend::NodePort, family, Protocol::Tcp);
            outside.ask(&request).expect("an answer");
        }
        let dropped = world.agent.status().count(hook, Reason::SourceRange);
        assert!(dropped >= 2, "{hooks:?}: {dropped}");
    }
}

/// What a balancer passes on with its own address, where the ranges let the node
/// in (SEMANTICS, section 7).
#[test]
fn balancers_that_send_from_their_own_address_are_let_in_with_the_node() {
    for (owner, is_let_in) in [(Addresses::NODE, true), (Addresses::OUTSIDE, false)] {
        let mut world = stopped_world(Hooks::TC, &ranges(owner), "");
        world.agent.start();
        let outside = &world.cluster.outside;
        for family in Family::ALL {
            // The stack gets to know its neighbour.
            let request = world.request(Frontend::NodePort, family, Protocol::Tcp);
            outside.ask(&request).expect("an answer");
        }
        let before = world.agent.status();
        let device = outside.place.netns().within(|| RawSocket::open("eth0"));
        let node = gateway(outside);
        for family in Family::ALL {
            let address = address(family);
            let packet = Packet::tcp((address, 40_000).into(), (address, 80).into(), flags::SYN);
            let mut frame = packet.bytes();
            frame[..6].copy_from_slice(&node);
            device.send(&frame).expect("sent");
        }
        wait::until("the packets to be judged", SEEN, || {
            let status = world.agent.status();
            let count = |reason| {
                let count =
                    |status: &lb_tests::agent::Status| status.count(Hook::TcIngress, reason);
                count(&status) - count(&before)
            };
            let judged = [Reason::NewFlow, Reason::SourceRange].map(count);
            let expected = if is_let_in { [2, 0] } else { [0, 2] };
            (judged == expected).then_some(())
        });
    }
}

/// With `ipMode: Proxy` the way leads through the balancer, which is the host
/// outside here.
#[test]
fn a_balancer_that_is_a_proxy_is_left_alone() {
    let mut world = crate::stopped_world(Hooks::ALL);
    let proxied = manifest(&world.service, "", ", ipMode: Proxy");
    world.agent.manifests.put(SERVICE_FILE, &proxied);
    let (node, outside) = (&world.cluster.node, &world.cluster.outside);
    for family in Family::ALL {
        let (addr, via) = (address(family), outside.addresses.ip(family));
        let flags = if family == Family::V6 { "nodad" } else { "" };
        let outside = outside.place.netns();
        outside.ip(&format!("addr add {addr} dev lo {flags}\n"));
        let node = node.place.netns();
        node.ip(&format!("route add {addr} via {via}\n"));
    }
    let _balancer = outside.serve("balancer", 80, 53);
    world.agent.start();
    let pod = &world.cluster.client.host;
    let clients = [pod, &pod.without_cgroup(), node];
    for (client, family) in clients
        .into_iter()
        .flat_map(|client| Family::ALL.map(|family| (client, family)))
    {
        let answer = client.ask(&request(family)).expect("an answer");
        assert_eq!(answer.name, "balancer");
    }
    let direct = manifest(&world.service, "", ", ipMode: VIP");
    world.agent.manifests.put(SERVICE_FILE, &direct);
    for (client, family) in clients
        .into_iter()
        .flat_map(|client| Family::ALL.map(|family| (client, family)))
    {
        wait::until("a pod's answer", SEEN, || {
            let answer = client.ask(&brief_request(family)).ok()?;
            (answer.name != "balancer").then_some(())
        });
    }
}
