//! What a Service asks for besides backends, seen by real clients at every hook.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use lb_common::{Hook, Reason};
use lb_tests::{
    agent::Hooks,
    topology::{Family, Host},
    traffic::{Failure, Protocol, Request},
    world::{Frontend, SERVICE_FILE, World},
};

/// A refusal is told at once, and not after a time-out. Between namespaces the answer may
/// come while `connect()` still holds its socket; the kernel then ignores it
/// (`LockDroppedIcmps`), and the SYN is sent again after a second, and after three.
pub(crate) const AT_ONCE: Duration = Duration::from_secs(5);

/// A world whose Service has more in its `spec`.
pub(crate) fn world_with(hooks: Hooks, spec: &str) -> World {
    let mut world = crate::stopped_world(hooks);
    let manifest = world.service.to_string();
    let extended = manifest.replace("spec:\n", &format!("spec:\n{spec}"));
    assert_ne!(manifest, extended);
    world.agent.manifests.put(SERVICE_FILE, &extended);
    world.agent.start();
    world
}

/// The pods that answer some requests in a row.
fn answering(client: &Host, requests: impl Iterator<Item = Request>) -> BTreeSet<String> {
    requests
        .map(|request| client.ask(&request).expect("an answer").name)
        .collect()
}

#[test]
fn a_client_keeps_its_backend_whatever_frontend_and_hook() {
    for hooks in [Hooks::TC, Hooks::XDP, Hooks::ALL] {
        let world = world_with(hooks, "  sessionAffinity: ClientIP\n");
        let clients = [&world.cluster.client.host, &world.cluster.outside];
        for (client, family) in clients
            .into_iter()
            .flat_map(|client| Family::ALL.map(|family| (client, family)))
        {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let requests = (0..12).map(|n| {
                    let frontend = if n % 2 == 0 {
                        Frontend::ClusterIp
                    } else {
                        Frontend::NodePort
                    };
                    world.request(frontend, family, protocol)
                });
                let pods = answering(client, requests);
                assert_eq!(pods.len(), 1, "{hooks:?} {family} {protocol:?}: {pods:?}");
            }
        }
    }
}

#[test]
fn the_nodes_own_processes_keep_their_backend() {
    let world = world_with(Hooks::ALL, "  sessionAffinity: ClientIP\n");
    for family in Family::ALL {
        let requests = (0..12).map(|_| world.request(Frontend::ClusterIp, family, Protocol::Tcp));
        let pods = answering(&world.cluster.node, requests);
        assert_eq!(pods.len(), 1, "{family}: {pods:?}");
    }
}

/// Asserts that a client is refused at once.
fn assert_refused(client: &Host, request: Request, what: &str) {
    let request = request.connected().timeout(AT_ONCE);
    let told = client.ask(&request).expect_err("nobody to answer");
    assert_eq!(told, Failure::Refused, "{what} {request:?}");
}

/// Everybody whom klb serves by these hooks.
fn clients(world: &World) -> Vec<&Host> {
    let mut clients = vec![&world.cluster.client.host, &world.cluster.outside];
    if world.agent.hooks == Hooks::ALL {
        clients.push(&world.cluster.node);
    }
    clients
}

#[test]
fn without_endpoints_clients_are_refused_at_once() {
    for hooks in [Hooks::TC, Hooks::CLSACT, Hooks::XDP, Hooks::ALL] {
        let world = crate::world(hooks);
        world.put_endpoints(&[]);
        world.agent.await_services("no endpoint", |services| {
            services
                .iter()
                .flat_map(|service| &service.frontends)
                .all(|frontend| frontend.verdict == "reject")
        });
        let what = format!("{hooks:?}");
        for client in clients(&world) {
            for family in Family::ALL {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    for kind in [Frontend::ClusterIp, Frontend::NodePort] {
                        let request = world.request(kind, family, protocol);
                        assert_refused(client, request, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn other_ports_of_a_cluster_ip_are_refused_at_once() {
    for hooks in [Hooks::TC, Hooks::XDP, Hooks::ALL] {
        let world = crate::world(hooks);
        for client in clients(&world) {
            for family in Family::ALL {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    let mut to = world.frontend(Frontend::ClusterIp, family, protocol);
                    to.set_port(81);
                    assert_refused(client, Request::new(protocol, to), &format!("{hooks:?}"));
                }
            }
        }
    }
}

#[test]
fn node_ports_answer_on_loopback() {
    let world = crate::world(Hooks::ALL);
    for family in Family::ALL {
        let loopback = match family {
            Family::V4 => "127.0.0.1",
            Family::V6 => "::1",
        };
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let mut to = world.frontend(Frontend::NodePort, family, protocol);
            to.set_ip(loopback.parse().expect("an address"));
            for request in [
                Request::new(protocol, to),
                Request::new(protocol, to).connected(),
            ] {
                let answer = world.cluster.node.ask(&request).expect("an answer");
                assert_eq!(answer.from, to, "the process sees whom it named");
            }
            // The loopback of a pod is the pod's.
            let pod = &world.cluster.client.host;
            let told = pod.ask(&Request::new(protocol, to).connected());
            assert_eq!(told.expect_err("nobody listens"), Failure::Refused);
        }
        // Nobody has this one, and it is not klb that says so.
        let port = SocketAddr::new(loopback.parse().expect("an address"), 31_999);
        let told = world.cluster.node.ask(&Request::new(Protocol::Tcp, port));
        assert_eq!(told.expect_err("nobody listens"), Failure::Refused);
    }
    let refused = world.agent.status().count(Hook::Socket, Reason::NoSuchPort);
    assert_eq!(refused, 0);
}

/// What kube-proxy's users ask for who want `NodePort`s for the node alone.
#[test]
fn node_ports_may_answer_on_loopback_only() {
    let mut world = crate::stopped_world(Hooks::ALL);
    let networks = "--nodeport-addresses=127.0.0.0/8,::1/128";
    world.agent.flags.push(networks.to_owned());
    world.agent.start();
    for (family, loopback) in [(Family::V4, "127.0.0.1"), (Family::V6, "::1")] {
        let request = world.request(Frontend::NodePort, family, Protocol::Tcp);
        let told = world.cluster.outside.ask(&request);
        assert_eq!(told.expect_err("nobody answers"), Failure::Refused);
        let to = SocketAddr::new(loopback.parse().expect("an address"), request.to.port());
        let answer = world.cluster.node.ask(&Request::new(Protocol::Tcp, to));
        assert_eq!(answer.expect("an answer").from, to);
    }
}

#[test]
fn pods_can_be_left_to_tc() {
    let mut hooks = Hooks::ALL;
    hooks.socket_lb = "host";
    let world = crate::world(hooks);
    let request = world.any_request();
    world.cluster.node.ask(&request).expect("an answer");
    world.cluster.client.host.ask(&request).expect("an answer");
    let status = world.agent.status();
    assert_eq!(status.count(Hook::Socket, Reason::NewFlow), 1);
    assert!(status.count(Hook::Socket, Reason::SocketNotServed) > 0);
    assert_eq!(status.count(Hook::TcIngress, Reason::NewFlow), 1);
}
