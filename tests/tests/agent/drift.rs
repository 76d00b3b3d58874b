//! Somebody else writes what is the agent's to write.

use std::time::Duration;

use lb_common::names;
use lb_tests::{
    agent::{Hooks, raw_dump, spoil},
    wait,
};

use crate::metrics::METRICS;

/// Maps whose content the agent knows to the byte.
const MAPS: [&str; 9] = [
    names::SERVICES4,
    names::SERVICES6,
    names::SLOTS4,
    names::SLOTS6,
    names::BACKENDS,
    names::META,
    names::SERVED,
    names::CONFIG,
    names::DEVICES,
];

#[test]
fn spoiled_maps_are_mended_and_counted() {
    let mut world = crate::stopped_world(Hooks::ALL);
    world.agent.flags.push("--verify-interval=1s".to_owned());
    world.agent.start();
    let pins = world.agent.pins();
    let before = MAPS.map(|map| raw_dump(&pins.join(map)));
    for (map, before) in MAPS.iter().zip(&before) {
        assert!(!before.is_empty(), "{map} is empty");
        spoil(&pins.join(map));
        wait::until(map, Duration::from_secs(20), || {
            (raw_dump(&pins.join(map)) == *before).then_some(())
        });
    }
    let request = world.any_request();
    world.cluster.client.host.ask(&request).expect("an answer");
    for map in MAPS {
        let counted = format!("klb_drift_repaired_total{{map=\"{map}\"}} ");
        // What was mended is counted a moment after.
        wait::until(&counted, Duration::from_secs(20), || {
            let metrics = world.agent.page(METRICS, "/metrics");
            metrics.body.contains(&counted).then_some(())
        });
    }
}
