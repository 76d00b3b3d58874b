//! Real sockets and real devices: what crosses hooks, namespaces and stacks.

mod asymmetric;
mod balancers;
mod bypass;
mod choice;
mod combinations;
mod datagrams;
mod devices;
mod devices_addresses;
mod devices_frames;
mod devices_kinds;
mod explain;
mod explain_exactly;
mod explain_nothing_changes;
mod kernels;
mod kernels_devices;
mod kernels_nfs;
mod kernels_sctp;
mod kit;
mod leftovers;
mod lifecycle;
mod masquerade;
mod matrix;
mod orphans;
mod pmtu;
mod policies;
mod ports;
mod reveal;
mod sctp;
mod sockets;
mod strangers;
mod takeover;
mod trace;
mod two_nodes;
mod wire;

use std::{env, path::PathBuf};

use lb_tests::{agent::Hooks, topology::Options, world::World};

/// `klb-traffic`: `KLB_TRAFFIC`, or where cargo has put it.
fn helper() -> PathBuf {
    let built = env!("CARGO_BIN_EXE_klb-traffic");
    env::var_os("KLB_TRAFFIC").map_or_else(|| built.into(), PathBuf::from)
}

/// A world whose agent is ready.
fn world(hooks: Hooks) -> World {
    world_with_offloads(hooks, false)
}

/// As [`world`]; with `offloads`, checksums stay unfinished and TCP sends
/// packets larger than a frame.
fn world_with_offloads(hooks: Hooks, offloads: bool) -> World {
    let options = Options {
        helper: helper(),
        offloads,
    };
    let mut world = World::with_options(options, hooks);
    world.agent.start();
    world
}

/// A world whose agent does not run yet.
fn stopped_world(hooks: Hooks) -> World {
    World::new(helper(), hooks)
}
