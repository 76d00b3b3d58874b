//! Backends that are on another node for all that klb knows, and pods that are
//! their own backend: the whole way through the node's stack.

use lb_common::{Hook, Reason};
use lb_tests::{
    agent::Hooks,
    manifests::NODE,
    topology::{Addresses, Family},
    traffic::{Protocol, Request},
    world::{ENDPOINTS_FILE, Frontend, World, endpoints},
};

/// Makes this pod the only endpoint, said to be on another node: packets to it
/// go through the stack all the same, and out of its device.
pub(crate) fn only_remote(world: &World, name: &str, number: u8) {
    let manifest = endpoints(&world.service, &[(name, number)]).to_string();
    let elsewhere = manifest.replace(&format!("nodeName: {NODE}"), "nodeName: node-2");
    assert_ne!(manifest, elsewhere);
    world.agent.manifests.put(ENDPOINTS_FILE, &elsewhere);
    let only = |port: u16| Addresses::pod(number).port(Family::V4, port);
    world.agent.await_services("one endpoint", |services| {
        let ours = services.iter().filter(|service| service.name == "echo");
        ours.flat_map(|service| &service.frontends)
            .filter(|frontend| frontend.address.is_ipv4())
            .all(|frontend| {
                let backends: Vec<_> = frontend.backends.iter().collect();
                matches!(backends[..], [one] if one.socket() == only(one.port))
            })
    });
}

#[test]
fn a_remote_backend_sees_the_node_and_answers_through_it() {
    for hooks in [Hooks::TC, Hooks::CLSACT, Hooks::ALL] {
        let world = crate::world(hooks);
        only_remote(&world, "pod-2", 6);
        // A port that comes twice would be one flow.
        let mut ports = 42_000..;
        for family in Family::ALL {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                for frontend in [Frontend::NodePort, Frontend::ClusterIp] {
                    let request = world.request(frontend, family, protocol);
                    for size in [100, 20_000] {
                        let size = if protocol == Protocol::Udp {
                            1300
                        } else {
                            size
                        };
                        let port = ports.next().expect("no end");
                        let request = request.clone().size(size).from_port(port);
                        let answer = world.cluster.outside.ask(&request);
                        let answer = answer.expect("an answer");
                        assert_eq!(answer.name, "pod-2");
                        assert_eq!(answer.from, world.frontend(frontend, family, protocol));
                        assert_eq!(answer.seen.ip(), Addresses::NODE.ip(family));
                        assert!((50_000..=65_535).contains(&answer.seen.port()));
                    }
                }
            }
        }
        let status = world.agent.status();
        assert_eq!(
            status.count(Hook::TcIngress, Reason::NewMasqueradedFlow),
            16
        );
    }
}

#[test]
fn a_pod_reaches_itself_through_a_service() {
    for (hooks, routing) in [
        (Hooks::TC, "kernel"),
        (Hooks::CLSACT, "kernel"),
        (Hooks::TC, "bypass"),
    ] {
        let mut world = crate::stopped_world(hooks);
        world.agent.flags.push(format!("--routing={routing}"));
        world.agent.start();
        world.put_endpoints(&[("pod-1", 5)]);
        world.agent.await_services("one endpoint", |services| {
            services
                .iter()
                .flat_map(|service| &service.frontends)
                .all(|frontend| frontend.backends.len() == 1)
        });
        let pod = &world.cluster.pod("pod-1").host;
        for family in Family::ALL {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let to = world.frontend(Frontend::ClusterIp, family, protocol);
                let answer = pod.ask(&Request::new(protocol, to)).expect("an answer");
                assert_eq!(answer.name, "pod-1");
                assert_eq!(answer.from, to);
                assert_eq!(answer.seen.ip(), Addresses::NODE.ip(family));
            }
        }
    }
}
