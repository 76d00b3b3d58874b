//! From one layout of the maps to another, and back, under traffic. What another
//! layout is to this klb, a pin folder with another name is as well: neither
//! reads what is in there.

use std::{
    fs,
    time::{Duration, Instant},
};

use aya::maps::{Array, Map, MapData};
use lb_common::{names, node::RARE_BITS};
use lb_tests::{
    agent::Hooks,
    topology::Family,
    traffic::Protocol,
    wait,
    world::{Frontend, World},
};

use crate::restarts::Streams;

/// For a folder to go that nobody needs any more.
const PATIENCE: Duration = Duration::from_secs(60);

/// Of `--layout-drain`, where a folder shall go.
const DRAIN: Duration = Duration::from_secs(4);

/// Of the same, where it shall stay, whatever it has to translate.
const LONG: Duration = Duration::from_secs(3600);

fn layout(world: &mut World, name: &str, drain: Duration) {
    let flags = &mut world.agent.flags;
    flags.retain(|flag| !flag.starts_with("--layout"));
    flags.push(format!("--layout={name}"));
    flags.push(format!("--layout-drain={}s", drain.as_secs()));
}

/// Layouts that something is pinned for.
fn pinned(world: &World) -> Vec<String> {
    let bpffs = world.agent.pins();
    let folders = fs::read_dir(bpffs.parent().expect("a folder of layouts"));
    let names = folders.expect("readable").map(|folder| {
        let name = folder.expect("readable").file_name();
        name.to_string_lossy().into_owned()
    });
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

fn to_another_layout_and_back(hooks: Hooks) {
    let mut world = crate::stopped_world(hooks);
    layout(&mut world, "v1", LONG);
    world.agent.start();
    let streams = Streams::start(&world);
    streams.go_on();
    // The last time with connections that were opened in the layout that is left.
    for (from, to, drain) in [("v1", "v2", LONG), ("v2", "v1", LONG), ("v1", "v2", DRAIN)] {
        world.agent.terminate();
        layout(&mut world, to, drain);
        world.agent.start();
        streams.go_on();
        assert_eq!(pinned(&world), ["v1", "v2"], "{hooks:?}");
        let said = world.agent.klb(&["status", "--layout", to]);
        let warning = format!("connections of a klb with layout {from} go on");
        assert!(said.stdout.contains(&warning), "{said:?}");
        let said = world.agent.klb(&["get", "services", "--layout", from]);
        assert!(
            !said.stdout.contains("echo"),
            "nothing begins there: {said:?}"
        );
    }
    let since = Instant::now();
    while since.elapsed() < 2 * DRAIN {
        streams.go_on();
    }
    assert_eq!(pinned(&world), ["v1", "v2"], "{hooks:?}: it is in use");
    streams.assert_flawless();
    wait::until("the other layout to go", PATIENCE, || {
        (pinned(&world) == ["v2"]).then_some(())
    });
    let request = world.request(Frontend::NodePort, Family::V4, Protocol::Tcp);
    world.cluster.outside.ask(&request).expect("an answer");
    let said = world.agent.klb(&["status", "--layout", "v2"]);
    assert!(!said.stdout.contains("layout v1"), "{said:?}");
}

#[test]
fn with_links() {
    to_another_layout_and_back(Hooks::ALL);
}

#[test]
fn with_filters() {
    to_another_layout_and_back(Hooks::CLSACT);
}

#[test]
fn with_generic_xdp() {
    to_another_layout_and_back(Hooks::XDP_GENERIC);
}

/// A klb without these maps has pinned the flows.
#[test]
fn from_a_klb_that_did_not_note_what_has_flows() {
    let mut world = crate::stopped_world(Hooks::ALL);
    world.agent.start();
    let streams = Streams::start(&world);
    streams.go_on();
    world.agent.terminate();
    for map in [names::KNOWN, names::SERVED] {
        fs::remove_file(world.agent.pins().join(map)).expect("it is pinned");
    }
    world.agent.start();
    streams.go_on();
    streams.assert_flawless();
}

/// A klb that went by the table alone has not noted what it put there.
#[test]
fn connections_are_looked_for_among_the_young_after_a_start() {
    let mut world = crate::stopped_world(Hooks::ALL);
    world.agent.start();
    world.agent.terminate();
    let pin = world.agent.pins().join(names::RARE);
    let noted = || {
        let data = MapData::from_pin(&pin).expect("it is pinned");
        let rare: Array<_, u32> = Map::from_map_data(data)
            .and_then(TryInto::try_into)
            .expect("an array of numbers");
        rare.iter().filter(|last| matches!(last, Ok(1..))).count()
    };
    assert_eq!(noted(), 0, "there were no flows");
    world.agent.start();
    assert_eq!(noted(), 1 << RARE_BITS);
}

/// Who looks with a newer klb at what an older one has pinned.
#[test]
fn commands_read_the_maps_of_a_klb_that_had_fewer() {
    let mut world = crate::stopped_world(Hooks::ALL);
    world.agent.start();
    for map in [names::KNOWN, names::SERVED] {
        fs::remove_file(world.agent.pins().join(map)).expect("it is pinned");
    }
    for command in [
        ["status"].as_slice(),
        &["get", "services"],
        &["get", "flows"],
    ] {
        let said = world.agent.klb(command);
        assert!(said.status.success(), "{command:?}: {said:?}");
    }
}

#[test]
fn cleanup_removes_every_layout() {
    let mut world = crate::stopped_world(Hooks::ALL);
    for name in ["v1", "v2"] {
        layout(&mut world, name, LONG);
        world.agent.start();
        world.agent.terminate();
    }
    assert_eq!(pinned(&world), ["v1", "v2"]);
    let said = world.agent.klb(&["cleanup"]);
    assert!(said.status.success(), "{said:?}");
    let bpffs = world.agent.pins();
    assert!(!bpffs.parent().expect("a folder").exists());
}
