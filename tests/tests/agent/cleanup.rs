//! `klb cleanup` leaves the kernel as it was: all that is klb's goes, and
//! nothing else.

use std::path::Path;

use lb_tests::{
    agent::Hooks,
    topology::Family,
    traffic::{Failure, Protocol},
    world::{Frontend, World},
};

/// What klb may touch, as text. Other tests' cgroups and devices are not in it.
fn kernel_state(world: &World) -> String {
    let node = world.cluster.node.place.netns();
    let mut state = node.output("tc", &["qdisc", "show"]);
    state += &node.output("bpftool", &["net", "show"]);
    let devices = node.output("ip", &["-o", "link", "show"]);
    for device in devices.lines() {
        let name = device.split([' ', '@']).nth(1).expect("a name");
        let name = name.trim_end_matches(':');
        for side in ["ingress", "egress"] {
            state += &node.output("tc", &["filter", "show", "dev", name, side]);
        }
    }
    state += &devices;
    state += &node.output("sysctl", &["-a", "--pattern", "^net.ipv[46]"]);
    let cgroup = world.cluster.cgroup().path().display().to_string();
    state += &node.output("bpftool", &["cgroup", "show", &cgroup]);
    state
}

fn leaves_nothing(hooks: Hooks) {
    let mut world = crate::stopped_world(hooks);
    let before = kernel_state(&world);
    world.agent.start();
    let request = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    world.cluster.client.host.ask(&request).expect("an answer");
    assert_ne!(kernel_state(&world), before);

    let said = world.agent.klb(&["cleanup"]);
    assert_eq!(said.status.code(), Some(1), "an agent runs: {said:?}");
    world
        .cluster
        .client
        .host
        .ask(&request)
        .expect("still an answer");

    world.agent.terminate();
    let pins = world.agent.pins();
    assert!(pins.exists());
    let said = world.agent.klb(&["cleanup"]);
    assert!(said.status.success(), "{said:?}");
    assert_eq!(kernel_state(&world), before);
    assert!(
        !pins.parent().is_some_and(Path::exists),
        "{}",
        pins.display()
    );
    let state = world.agent.state();
    assert!(!state.exists(), "{}", state.display());
    let answer = world.cluster.client.host.ask(&request);
    assert_eq!(answer, Err(Failure::Refused), "after klb has gone");

    let said = world.agent.klb(&["cleanup"]);
    assert!(said.status.success(), "a second time: {said:?}");
}

#[test]
fn of_everything() {
    leaves_nothing(Hooks::ALL);
}

#[test]
fn of_clsact() {
    leaves_nothing(Hooks::CLSACT);
}

#[test]
fn of_generic_xdp() {
    leaves_nothing(Hooks::XDP_GENERIC);
}

/// Neither cleanup nor a second agent that has another `--state-dir` touches
/// the pins of an agent that runs.
#[test]
fn another_state_folder_is_no_way_around_the_lock() {
    let mut world = crate::stopped_world(Hooks::ALL);
    world.agent.start();
    let unfinished = world.agent.pins().join("links/connect4_new");
    std::fs::create_dir(&unfinished).expect("a pin of the agent that runs");
    let [bpffs, pins, state_dir, _] = world.agent.paths();
    let other = world.cluster.scope().folder().join("other-state");
    let other = other.display().to_string();
    let paths = [&*bpffs, &*pins, &*state_dir, &*other];
    let manifests = world.agent.manifests.path().display().to_string();
    let agent = ["agent", "--node-name=node-1", "--manifests", &*manifests];
    for command in [&["cleanup"][..], &agent] {
        let said = world.agent.klb_elsewhere(&[command, &paths].concat());
        assert_eq!(said.status.code(), Some(1), "{said:?}");
        assert!(said.stderr.contains("another --state-dir"), "{said:?}");
    }
    assert!(unfinished.exists(), "it belongs to the agent that runs");
    std::fs::remove_dir(&unfinished).expect("it is there");
    let request = world.any_request();
    world.cluster.client.host.ask(&request).expect("an answer");
}

/// Filters that somebody else put beside klb's, and the qdisc that they need.
#[test]
fn other_filters_stay() {
    let mut world = crate::stopped_world(Hooks::CLSACT);
    let node = world.cluster.node.clone();
    let tc = |arguments: &[&str]| node.place.netns().output("tc", arguments);
    // A program of one instruction: "return 0", which matches nothing.
    let add_filter = |device, side, pref| {
        let place = ["filter", "add", "dev", device, side, "pref", pref];
        tc(&[&place[..], &["bpf", "bytecode", "1,6 0 0 0"]].concat());
    };
    tc(&["qdisc", "add", "dev", "pod5", "clsact"]);
    add_filter("pod5", "ingress", "77");
    let before = kernel_state(&world);
    world.agent.start();
    // On a device to which klb brought the qdisc.
    add_filter("pod6", "egress", "78");
    world.agent.terminate();
    let said = world.agent.klb(&["cleanup"]);
    assert!(said.status.success(), "{said:?}");
    let filters = tc(&["filter", "show", "dev", "pod6", "egress"]);
    assert!(filters.contains("pref 78"), "{filters}");
    assert!(!filters.contains("klb"), "{filters}");
    tc(&["qdisc", "del", "dev", "pod6", "clsact"]);
    assert_eq!(kernel_state(&world), before);
}
