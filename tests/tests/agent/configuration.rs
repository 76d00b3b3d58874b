//! Where settings come from, as the kernel has them in the end.

use std::{collections::BTreeMap, fs, net::IpAddr};

use lb_tests::{
    agent::{Agent, Hooks},
    topology::Family,
    traffic::Protocol,
    world::{Frontend, World},
};

/// Makes a file the agent's, at its next start.
fn put_config(world: &mut World, text: &str) {
    let path = world.cluster.scope().folder().join("klb.yaml");
    fs::write(&path, text).expect("written");
    let flag = format!("--config={}", path.display());
    world.agent.flags.push(flag);
}

/// The timeouts by which the programs go, in seconds.
fn timeouts(agent: &Agent) -> BTreeMap<String, u64> {
    let said = agent.klb(&["status", "-o", "json"]);
    let status: serde_json::Value = serde_json::from_str(&said.stdout).expect("JSON");
    let timeouts = status["settings"]["timeouts"].as_array().expect("a list");
    let entry = |timeout: &serde_json::Value| {
        let state = timeout["state"].as_str().expect("a name").to_owned();
        (state, timeout["seconds"].as_u64().expect("a number"))
    };
    timeouts.iter().map(entry).collect()
}

#[test]
fn a_flag_goes_before_the_environment_and_that_before_the_file() {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    world.agent.start();
    let default = timeouts(&world.agent);
    world.agent.terminate();
    put_config(
        &mut world,
        "timeout-udp: 41s\ntimeout-udp-stream: 42s\ntimeout-tcp-reset: 43s\n",
    );
    let variables = [
        ("KLB_TIMEOUT_UDP_STREAM", "52s"),
        ("KLB_TIMEOUT_TCP_RESET", "53s"),
    ];
    world.agent.variables = variables
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    world.agent.flags.push("--timeout-tcp-reset=63s".to_owned());
    world.agent.start();
    let mut timeouts = timeouts(&world.agent).into_iter();
    let mut changed = Vec::new();
    for (state, seconds) in default {
        let now = timeouts.next().expect("as many");
        assert_eq!(now.0, state);
        if now.1 != seconds {
            changed.push(now.1);
        }
    }
    changed.sort_unstable();
    assert_eq!(changed, [41, 52, 63]);
}

/// Its kubeconfig is not read, for a flag says where Services are.
#[test]
fn a_file_of_kube_proxys_will_do() {
    let mut world = crate::stopped_world(Hooks::TC);
    put_config(
        &mut world,
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
         clientConnection: {kubeconfig: /nowhere, burst: 0}\nclusterCIDR: 10.244.0.0/16\n\
         nodePortAddresses: [192.168.50.0/24]\nconntrack: {udpTimeout: 41s, min: null}\n",
    );
    world.agent.start();
    world.agent.await_log("what means nothing", |line| {
        line.contains("WARN") && line.contains("clusterCIDR")
    });
    assert!(
        timeouts(&world.agent)
            .values()
            .any(|seconds| *seconds == 41)
    );
    let frontends = world.agent.backends("echo").into_keys();
    let node_ports = frontends.filter(|frontend| frontend.port() > 30000);
    let node_ports: Vec<_> = node_ports.map(|frontend| frontend.ip()).collect();
    assert!(node_ports.iter().all(IpAddr::is_ipv4), "{node_ports:?}");
    let request = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    world.cluster.outside.ask(&request).expect("an answer");
}
