//! What the agent may do: no more than is documented, and that is enough.

use std::{fs, time::Duration};

use lb_common::names;
use lb_tests::{
    agent::{Hooks, raw_dump},
    topology::Family,
    traffic::Protocol,
    wait,
    world::{Frontend, World},
};

/// Those of `docs/privileges.md`, for `setpriv`.
pub(crate) const DOCUMENTED: &str =
    "+bpf,+net_admin,+perfmon,+sys_admin,+sys_ptrace,+net_broadcast";
/// The same as bits, in the order of `linux/capability.h`.
const BITS: [u32; 6] = [11, 12, 19, 21, 38, 39];

#[test]
fn every_thread_has_given_up_all_else() {
    let mut world = crate::world(Hooks::ALL);
    let documented: u64 = BITS.iter().map(|bit| 1 << bit).sum();
    let tasks = format!("/proc/{}/task", world.agent.process().id());
    let threads = fs::read_dir(tasks).expect("a process");
    let statuses = threads.filter_map(|thread| {
        // One that ends meanwhile has none.
        fs::read_to_string(thread.ok()?.path().join("status")).ok()
    });
    let statuses: Vec<_> = statuses.collect();
    assert!(statuses.len() > 2, "those of the runtime");
    for status in statuses {
        let field = |name: &str| {
            let mut lines = status.lines();
            let value = lines.find_map(|line| line.strip_prefix(name));
            u64::from_str_radix(value.expect("a field").trim(), 16).expect("a number")
        };
        for (set, capabilities) in [
            ("CapPrm:", documented),
            ("CapEff:", documented),
            ("CapBnd:", documented),
            ("CapInh:", 0),
            ("CapAmb:", 0),
            ("NoNewPrivs:", 1),
        ] {
            assert_eq!(field(set), capabilities, "{set} in {status}");
        }
    }
}

/// How many namespaces of pods the programs know.
fn pods_known(world: &World) -> usize {
    raw_dump(&world.agent.pins().join(names::NETNS)).len()
}

/// Started with these alone: it is a start, a pod that comes later, and a start
/// that finds what another one left.
fn the_documented_ones_suffice(hooks: Hooks) {
    let mut world = crate::stopped_world(hooks);
    world.agent.capabilities = Some(DOCUMENTED);
    // So that namespaces have to be found by processes of others.
    world
        .agent
        .flags
        .push("--netns-dir=/run/nowhere".to_owned());
    world.agent.start();
    let log = world.agent.log().text();
    assert!(!log.contains("CAP_"), "{log}");
    assert_eq!(pods_known(&world), world.cluster.pods.len());
    world.cluster.add_pods(&[("pod-4", 12)]);
    let wanted = world.cluster.pods.len();
    // If its process comes into the namespace after the last event of it, it is found by
    // the next look, which is in a minute.
    wait::until("the new pod to be known", Duration::from_secs(90), || {
        (pods_known(&world) == wanted).then_some(())
    });
    world.agent.kill();
    world.agent.start();
    let request = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    world.cluster.outside.ask(&request).expect("an answer");
    let said = world.agent.status();
    for device in said.devices.iter().filter(|device| device.role.is_some()) {
        assert!(device.tc_ingress.is_some(), "{device:?}");
    }
}

#[test]
fn the_documented_ones_suffice_with_all_hooks() {
    the_documented_ones_suffice(Hooks::ALL);
}

/// Where filters of an earlier run are known by their programs.
#[test]
fn the_documented_ones_suffice_with_clsact() {
    the_documented_ones_suffice(Hooks::CLSACT);
}

#[test]
fn what_is_missing_is_said() {
    let mut world = crate::stopped_world(Hooks::ALL);
    world.agent.capabilities = Some("+bpf,+net_admin,+perfmon");
    world.agent.start();
    for name in ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_NET_BROADCAST"] {
        let is_it = |line: &str| line.contains("WARN") && line.contains(name);
        world.agent.await_log(name, is_it);
    }
    world
        .cluster
        .client
        .host
        .ask(&world.any_request())
        .expect("an answer");
}
