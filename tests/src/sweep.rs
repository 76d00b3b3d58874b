//! Removing what a scope made, by its name alone: for scopes whose guards never
//! dropped, because their process was killed or because they were to last.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    cgroup,
    netns::{self, RUN_NETNS},
    scope,
};

/// Removes the scopes of tests whose process has ended.
pub fn dead_tests() {
    let dead: BTreeSet<String> = places()
        .iter()
        .flat_map(|place| names_in(place))
        .filter_map(|name| test_scope(&name))
        .filter(|(_, pid)| !Path::new(&format!("/proc/{pid}")).exists())
        .map(|(scope, _)| scope)
        .collect();
    for scope in dead {
        eprintln!("removing {scope}, left by a test that was killed");
        remove(&scope);
    }
}

/// Whether anything is there that carries the scope's name.
pub fn exists(scope: &str) -> bool {
    let folders = [
        scope::folder(scope),
        scope::pin_folder(scope),
        cgroup::root().join(scope),
    ];
    folders.iter().any(|folder| folder.exists()) || !namespaces(scope).is_empty()
}

/// Removes all that carries the scope's name: processes, namespaces with their
/// devices, pins, the control group, the folder. What is not there is fine; what
/// cannot be removed is said on stderr.
pub fn remove(scope: &str) {
    let cgroup = cgroup::root().join(scope);
    let namespaces = namespaces(scope);
    for pid in processes(&cgroup, &namespaces) {
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    for namespace in &namespaces {
        netns::delete(namespace);
    }
    for folder in [scope::pin_folder(scope), scope::folder(scope)] {
        if folder.exists()
            && let Err(error) = fs::remove_dir_all(&folder)
        {
            eprintln!("{}: {error}", folder.display());
        }
    }
    if cgroup.exists() {
        cgroup::remove(&cgroup);
    }
}

/// Folders whose entries carry names of scopes.
fn places() -> [PathBuf; 4] {
    [
        PathBuf::from(RUN_NETNS),
        scope::folder(""),
        scope::pin_folder(""),
        cgroup::root(),
    ]
}

/// `klbt-12-0-node` → (`klbt-12-0`, 12)
fn test_scope(name: &str) -> Option<(String, u32)> {
    let mut parts = name.strip_prefix(scope::TEST_PREFIX)?.split('-');
    let pid: u32 = parts.next()?.parse().ok()?;
    let number: u32 = parts.next()?.parse().ok()?;
    Some((format!("{}{pid}-{number}", scope::TEST_PREFIX), pid))
}

fn namespaces(scope: &str) -> Vec<String> {
    let prefix = format!("{scope}-");
    names_in(Path::new(RUN_NETNS))
        .into_iter()
        .filter(|name| name.starts_with(&prefix))
        .collect()
}

/// Processes in the control group or in one of the namespaces.
fn processes(cgroup: &Path, namespaces: &[String]) -> BTreeSet<i32> {
    let inside = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut found: BTreeSet<i32> = inside
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    let wanted: BTreeSet<u64> = namespaces.iter().filter_map(|n| netns::inode(n)).collect();
    let everybody = names_in(Path::new("/proc"));
    let pids = everybody.iter().filter_map(|name| name.parse::<i32>().ok());
    found.extend(
        pids.filter(|pid| {
            netns::inode_of_process(*pid).is_some_and(|inode| wanted.contains(&inode))
        }),
    );
    let own = i32::try_from(process::id()).expect("a pid");
    found.remove(&own);
    found
}

fn names_in(folder: &Path) -> Vec<String> {
    let Ok(listing) = fs::read_dir(folder) else {
        return Vec::new();
    };
    listing
        .filter_map(Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_of_tests_are_known_by_their_names() {
        let scope = Some(("klbt-12-3".to_owned(), 12));
        assert_eq!(test_scope("klbt-12-3-node"), scope);
        assert_eq!(test_scope("klbt-12-3"), scope);
        for other in ["klbt-12", "klbt-x-3", "klb-demo-node", "klb"] {
            assert_eq!(test_scope(other), None, "{other}");
        }
    }
}
