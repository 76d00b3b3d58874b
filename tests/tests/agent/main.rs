//! The agent as an operator meets it: files in a folder, signals, commands, and
//! what stays in the kernel.

mod api;
mod cleanup;
mod commands;
mod configuration;
mod container;
mod dashboard;
mod dashboard_page;
mod diff;
mod doctor;
mod drift;
mod dumps;
mod golden;
mod health;
mod idle;
mod isolation;
mod manifests;
mod metrics;
mod policies;
mod privileges;
mod real_api;
mod reserved_ports;
mod restarts;
mod rollout;
mod schemas;
mod service_manager;
mod top;
mod traffic;
mod upgrades;
mod wrong_input;

use lb_tests::{agent::Hooks, world::World};

/// A world whose agent does not run yet.
fn stopped_world(hooks: Hooks) -> World {
    World::new(env!("CARGO_BIN_EXE_klb-traffic"), hooks)
}

/// A world whose agent is ready.
fn world(hooks: Hooks) -> World {
    let mut world = stopped_world(hooks);
    world.agent.start();
    world
}
