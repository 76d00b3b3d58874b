//! The folder of manifests, and what the kernel's maps make of its changes.

use std::{collections::BTreeSet, net::SocketAddr};

use lb_tests::{
    agent::{Agent, Hooks, ServicePort},
    manifests::Service,
    topology::{Addresses, Family},
    traffic::{Failure, Protocol, Request},
    world::{ENDPOINTS_FILE, SERVICE_FILE, World, echo, endpoints},
};

/// Names of the Services in the maps.
fn names(services: &[ServicePort]) -> BTreeSet<&str> {
    services.iter().map(|port| port.name.as_str()).collect()
}

fn await_names(agent: &Agent, wanted: &[&str]) {
    let wanted: BTreeSet<&str> = wanted.iter().copied().collect();
    let what = format!("the Services to be {wanted:?}");
    agent.await_services(&what, |services| names(services) == wanted);
}

/// Waits until the Service leads to these pods, everywhere.
fn await_pods(world: &World, service: &Service, pods: &[(&str, u8)]) {
    let what = format!("the pods of {} to be {pods:?}", service.name);
    world.agent.await_services(&what, |services| {
        let ports = services.iter().filter(|port| port.name == service.name);
        let mut frontends = ports.flat_map(|port| &port.frontends).peekable();
        frontends.peek().is_some()
            && frontends.all(|frontend| {
                let backends = frontend.backends.iter().map(|backend| backend.address);
                let family = if frontend.address.is_ipv4() {
                    Family::V4
                } else {
                    Family::V6
                };
                let wanted = pods
                    .iter()
                    .map(|(_, number)| Addresses::pod(*number).ip(family));
                backends.collect::<BTreeSet<_>>() == wanted.collect()
            })
    });
}

/// `service` and its endpoints as one file of three documents.
fn in_one_file(service: &Service, pods: &[(&str, u8)]) -> String {
    format!("---\n{service}---\n{}", endpoints(service, pods))
}

#[test]
fn a_service_has_every_frontend() {
    let world = crate::world(Hooks::TC);
    let services = world.agent.services();
    assert_eq!(services.len(), 2, "a row for each port");
    for port in &services {
        assert_eq!(
            (port.namespace.as_str(), port.name.as_str()),
            ("default", "echo")
        );
        let frontends: BTreeSet<_> = port
            .frontends
            .iter()
            .map(|frontend| (frontend.kind.as_str(), frontend.address))
            .collect();
        for family in Family::ALL {
            for (kind, addresses) in [
                ("ClusterIP", world.service.addresses),
                ("NodePort", Addresses::NODE),
            ] {
                let wanted = (kind, addresses.ip(family));
                assert!(
                    frontends.contains(&wanted),
                    "no {wanted:?} in {frontends:?}"
                );
            }
        }
        for frontend in &port.frontends {
            assert_eq!(frontend.verdict, "forward");
            assert_eq!(frontend.policy, "Cluster");
            assert_eq!(frontend.backends.len(), 3, "{frontend:?}");
        }
    }
}

#[test]
fn files_come_change_and_go() {
    let world = crate::world(Hooks::SOCKET);
    let manifests = &world.agent.manifests;
    let second = echo("second", 2, 30090);
    await_names(&world.agent, &["echo"]);

    manifests.put("second.yaml", &in_one_file(&second, &[("pod-1", 5)]));
    await_pods(&world, &second, &[("pod-1", 5)]);
    await_names(&world.agent, &["echo", "second"]);

    // In place, as an editor may, and by rename, as most do.
    manifests.overwrite("second.yaml", &in_one_file(&second, &[("pod-2", 6)]));
    await_pods(&world, &second, &[("pod-2", 6)]);
    manifests.put("second.yaml", &in_one_file(&second, &[("pod-3", 7)]));
    await_pods(&world, &second, &[("pod-3", 7)]);
    let to = second.addresses.port(Family::V4, 80);
    let answer = world.cluster.node.ask(&Request::new(Protocol::Tcp, to));
    assert_eq!(answer.expect("an answer").name, "pod-3");

    manifests.remove("second.yaml");
    await_names(&world.agent, &["echo"]);
    let answer = world.cluster.node.ask(&Request::new(Protocol::Tcp, to));
    assert_eq!(
        answer,
        Err(Failure::Unreachable),
        "after the Service has gone"
    );
}

#[test]
fn the_order_of_files_does_not_matter() {
    let world = crate::stopped_world(Hooks::SOCKET);
    let mut world = world;
    let manifests = world.agent.manifests.clone();
    manifests.remove(SERVICE_FILE);
    world.agent.start();
    await_names(&world.agent, &[]);
    // The endpoints were there before their Service.
    manifests.put("0-late.yaml", &world.service.to_string());
    await_pods(&world, &world.service, &lb_tests::world::PODS);
}

#[test]
fn a_service_without_endpoints_refuses() {
    let world = crate::world(Hooks::ALL);
    world.put_endpoints(&[]);
    world
        .agent
        .await_services("every frontend to refuse", |services| {
            let mut frontends = services.iter().flat_map(|port| &port.frontends);
            frontends.all(|frontend| frontend.verdict == "reject")
        });
    let result = world.cluster.client.host.ask(&world.any_request());
    assert_eq!(result, Err(Failure::Refused));
}

/// A document that is wrong is named so that one finds it, and leaves what it
/// described before; the documents beside it count.
#[test]
fn a_broken_document_is_named_and_harms_nothing_else() {
    let mut world = crate::world(Hooks::SOCKET);
    let before = world.agent.backends("echo");
    let good = echo("good", 3, 30110);
    let broken = world
        .service
        .to_string()
        .replace("port: 80\n", "port: 80000\n");
    assert_ne!(broken, world.service.to_string());
    world
        .agent
        .manifests
        .put(SERVICE_FILE, &format!("{good}---\n{broken}"));
    let wanted = [
        SERVICE_FILE,
        "Service",
        "default/echo",
        "spec.ports[0].port",
        "2",
    ];
    let line = world
        .agent
        .await_log("a complaint about the document", |line| {
            wanted.iter().all(|word| line.contains(word))
        });
    assert!(line.contains("WARN") || line.contains("ERROR"), "{line}");
    await_names(&world.agent, &["echo", "good"]);
    assert_eq!(world.agent.backends("echo"), before);

    // Not even YAML.
    world
        .agent
        .manifests
        .put(ENDPOINTS_FILE, "kind: [EndpointSlice\n");
    world.agent.await_log("a complaint about the file", |line| {
        line.contains(ENDPOINTS_FILE)
    });
    assert_eq!(world.agent.backends("echo"), before);

    // Put right, it counts again.
    world
        .agent
        .manifests
        .put(SERVICE_FILE, &world.service.to_string());
    world.put_endpoints(&[("pod-2", 6)]);
    await_pods(&world, &world.service, &[("pod-2", 6)]);
    await_names(&world.agent, &["echo"]);
}

/// An agent that starts has no memory of what a broken document described; the
/// maps have.
#[test]
fn what_is_broken_when_the_agent_starts_stays() {
    let mut world = crate::world(Hooks::SOCKET);
    let before = world.agent.backends("echo");
    for (file, text) in [
        // It names the Service, or a Service's endpoints, or nobody.
        (
            SERVICE_FILE,
            world.service.to_string().replace("port: 80\n", "port: 0\n"),
        ),
        (ENDPOINTS_FILE, "kind: [EndpointSlice\n".to_owned()),
    ] {
        world.agent.kill();
        world.agent.manifests.put(file, &text);
        world.agent.start();
        world
            .agent
            .await_log("word of what stays", |line| line.contains("stays as it is"));
        assert_eq!(world.agent.backends("echo"), before, "{file}");
    }
    // Put right, it is followed again.
    world
        .agent
        .manifests
        .put(SERVICE_FILE, &world.service.to_string());
    world.put_endpoints(&[("pod-2", 6)]);
    await_pods(&world, &world.service, &[("pod-2", 6)]);
}

/// What the agent was told to leave alone.
#[test]
fn other_files_and_kinds_are_ignored() {
    let world = crate::world(Hooks::SOCKET);
    let manifests = &world.agent.manifests;
    let service = echo("ignored", 4, 30120);
    manifests.put("notes.txt", &service.to_string());
    manifests.put(".hidden.yaml", &service.to_string());
    let headless = service
        .to_string()
        .replace("clusterIP: 10.96.0.4", "clusterIP: None");
    let headless = headless.replace("[\"10.96.0.4\", \"fd00:10:96::4\"]", "[\"None\"]");
    let config = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: some\n";
    let last = echo("last", 5, 30130);
    manifests.put("z.yaml", &format!("{config}---\n{headless}---\n{last}"));
    await_names(&world.agent, &["echo", "last"]);
    let node_ports: BTreeSet<SocketAddr> = world.agent.backends("last").into_keys().collect();
    assert!(
        node_ports.contains(&Addresses::NODE.port(Family::V4, 30130)),
        "{node_ports:?}"
    );
}
