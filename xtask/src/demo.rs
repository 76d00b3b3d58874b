//! `cargo xtask demo`: a cluster of network namespaces, real manifests, real
//! requests, and a check behind every claim.

mod acts;
mod page;

use std::{path::PathBuf, time::Instant};

use anyhow::{Result, ensure};
use lb_tests::{
    agent::{Agent, Hooks},
    scope::{self, Scope},
    sweep,
    topology::{Cluster, Options},
};

use self::page::Checks;
use crate::{guard, paths, process, traffic};

/// The name of all that the demo makes.
const NAME: &str = "klb-demo";
/// Names and numbers of the pods behind the Services.
const PODS: [(&str, u8); 3] = [("pod-1", 5), ("pod-2", 6), ("pod-3", 7)];

/// Builds the helper program and plays the demo. With `keep`, the cluster stays
/// until [`remove`].
///
/// # Errors
/// If a check fails, or on Ctrl-C.
pub(crate) fn run(keep: bool) -> Result<()> {
    ensure!(process::is_root(), "network namespaces and BPF need root");
    traffic::build_helper()?;
    if sweep::exists(NAME) {
        process::step("Removing what an earlier demo left");
        remove()?;
    }
    guard::guarded("the demo", || play(keep))?
}

/// Removes a demo that was kept.
///
/// # Errors
/// If one is being played.
pub(crate) fn remove() -> Result<()> {
    ensure!(process::is_root(), "network namespaces and BPF need root");
    ensure!(
        !scope::is_held(NAME),
        "a demo is running; Ctrl-C there ends it"
    );
    sweep::remove(NAME);
    ensure!(
        !sweep::exists(NAME),
        "something of {NAME} could not be removed"
    );
    Ok(())
}

/// Everything that is there while the demo is played.
struct Stage {
    // Before the cluster: it cleans up in the node's namespace.
    agent: Agent,
    cluster: Cluster,
}

fn play(keep: bool) -> Result<()> {
    let started = Instant::now();
    let mut checks = Checks::default();
    let mut stage = set_up(&mut checks, keep);
    acts::inside(&mut checks, &stage);
    acts::outside(&mut checks, &mut stage);
    acts::maps(&mut checks, &stage);
    acts::rollout(&mut checks, &mut stage);
    page::section("Done");
    page::line(format_args!(
        "after {:.1} s",
        started.elapsed().as_secs_f32()
    ));
    if keep && checks.all_passed() {
        acts::keep(&stage);
        // Their guards would end it all.
        std::mem::forget(stage);
    } else {
        drop(stage);
        checks.check("nothing is left behind", !sweep::exists(NAME));
    }
    checks.verdict()
}

/// The cluster, the manifests and the agent, with XDP off.
fn set_up(checks: &mut Checks, keep: bool) -> Stage {
    page::section("A cluster of network namespaces");
    let options = Options {
        helper: traffic::helper(),
        offloads: false,
    };
    let mut cluster = Cluster::new(Scope::named(NAME, keep), options);
    cluster.add_pods(&PODS);
    acts::show_cluster(&cluster);

    page::section("klb agent, on deploy/examples/demo");
    let mut agent = Agent::new(
        &cluster,
        Hooks {
            xdp: "off",
            ..Hooks::ALL
        },
    );
    agent.program = paths::klb();
    for file in ["node.yaml", "services.yaml", "endpointslices.yaml"] {
        agent.manifests.put(file, &manifest(file));
    }
    let started = Instant::now();
    agent.start();
    checks.check(
        format_args!("ready after {} ms", started.elapsed().as_millis()),
        true,
    );
    Stage { agent, cluster }
}

/// One of the demo's manifests.
///
/// # Panics
/// If it is not there.
fn manifest(file: &str) -> String {
    let path = folder().join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn folder() -> PathBuf {
    paths::workspace().join("deploy/examples/demo")
}
