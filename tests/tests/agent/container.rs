//! klb in a container that is not privileged, as `deploy/base` makes it: nobody
//! can write to its root, nor to its `/proc/sys`; the node's is below `/host`,
//! and the state folder is a mount.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use lb_tests::{
    agent::{Hooks, klb_path},
    world::World,
};

use crate::reserved_ports::reserved;

/// What a runtime does before it starts klb. The root is the machine's, folder
/// by folder.
const CONTAINER: &str = r#"#!/bin/sh
exec unshare --mount sh -e -c '
    klb=$1 folder=$2
    shift 2
    mkdir -p "$folder/state"
    mount --make-rprivate /
    mount -t tmpfs tmpfs /mnt
    for entry in /*; do
        if [ -L "$entry" ]; then
            cp -P "$entry" /mnt
        elif [ -d "$entry" ] && [ "$entry" != /mnt ]; then
            mkdir "/mnt$entry"
            mount --rbind "$entry" "/mnt$entry"
        fi
    done
    mkdir -p /mnt/host/proc/sys/net
    mount --bind /proc/sys/net /mnt/host/proc/sys/net
    mount --bind /proc/sys /mnt/proc/sys
    mount --bind "$folder" "/mnt$folder"
    mount --bind "$folder/state" "/mnt$folder/state"
    for place in "" /proc/sys "$folder"; do
        mount -o remount,bind,ro "/mnt$place"
    done
    exec chroot /mnt "$klb" "$@"
' container "#;

/// A program that is klb in a container.
fn container(world: &World) -> PathBuf {
    let folder = world.cluster.scope().folder();
    let path = folder.join("klb-in-container");
    let quoted = |path: &Path| format!("'{}'", path.display());
    let klb = klb_path().canonicalize().expect("klb is built");
    let script = format!("{CONTAINER}{} {} \"$@\"\n", quoted(&klb), quoted(&folder));
    fs::write(&path, script).expect("a file");
    fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("its owner");
    path
}

#[test]
fn ports_are_reserved_and_all_is_cleaned_up() {
    let mut world = crate::stopped_world(Hooks::ALL);
    world.agent.program = container(&world);
    world.agent.start();
    assert_eq!(reserved(&world), "50000-65535");
    let request = world.any_request();
    world.cluster.client.host.ask(&request).expect("an answer");
    world.agent.terminate();
    let said = world.agent.klb(&["cleanup"]);
    assert!(said.status.success(), "{said:?}");
    assert_eq!(reserved(&world), "");
    let state = fs::read_dir(world.agent.state()).expect("the mount stays");
    assert_eq!(state.count(), 0);
}
