//! A pod is replaced by another while requests run, as in a rollout: no request
//! fails, and the new pod gets its share.

use std::{collections::BTreeSet, net::IpAddr};

use lb_tests::{
    agent::Hooks,
    topology::{Addresses, Family},
    traffic::{Answer, Protocol},
    world::Frontend,
};

fn replace_a_pod(hooks: Hooks, from_outside: bool) {
    let mut world = crate::world(hooks);
    let cluster = &world.cluster;
    let (client, kind) = if from_outside {
        (cluster.outside.clone(), Frontend::NodePort)
    } else {
        (cluster.client.host.clone(), Frontend::ClusterIp)
    };
    let streams = [(Family::V4, Protocol::Tcp), (Family::V6, Protocol::Udp)]
        .map(|(family, protocol)| client.stream(&world.request(kind, family, protocol), false));
    let go_on = |answers| streams.iter().for_each(|stream| stream.await_more(answers));
    go_on(20);

    world.cluster.add_pods(&[("pod-4", 12)]);
    world.put_endpoints(&[("pod-1", 5), ("pod-4", 12), ("pod-3", 7)]);
    let new = Addresses::pod(12);
    let is_new = |addr: IpAddr| Family::ALL.iter().any(|family| new.ip(*family) == addr);
    world.agent.await_services("the new pod", |services| {
        let mut frontends = services.iter().flat_map(|port| &port.frontends);
        // Of every port: the next is written when one has been.
        frontends.all(|frontend| {
            let mut backends = frontend.backends.iter();
            backends.any(|known| is_new(known.socket().ip()))
        })
    });
    // A pod that is to go is given time to answer what it has been asked.
    go_on(20);
    world.cluster.remove_pod("pod-2");
    let replaced = lb_tests::traffic::now();
    // That none of so many is of one pod among three does not happen.
    go_on(60);

    for stream in streams {
        let reports = stream.stop();
        let mut later = BTreeSet::new();
        for report in reports {
            let Answer { name, .. } = report.outcome.result().expect("no request fails");
            if report.at > replaced {
                later.insert(name);
            }
        }
        assert!(!later.contains("pod-2"), "an answer of a pod that has gone");
        assert!(
            later.contains("pod-4"),
            "no answer of the new pod: {later:?}"
        );
    }
}

#[test]
fn for_sockets() {
    replace_a_pod(Hooks::SOCKET, false);
}

#[test]
fn for_pods_over_tc() {
    replace_a_pod(Hooks::TC, false);
}

#[test]
fn for_the_outside_over_tc() {
    replace_a_pod(Hooks::TC, true);
}

#[test]
fn for_the_outside_over_xdp() {
    replace_a_pod(Hooks::XDP, true);
}
