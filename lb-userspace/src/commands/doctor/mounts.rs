//! File systems of the kernel's: for pins, and for control groups.

use std::path::{Path, PathBuf};

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::check::Check;
use crate::datapath::cgroup;

#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// Folder for pins.
    bpffs: PathBuf,
    /// Whether it is, or would be, on a BPF file system.
    is_bpffs: bool,
    cgroup: Option<Cgroup>,
}

/// A mounted cgroup2 file system.
#[derive(Clone, Debug)]
struct Cgroup {
    root: PathBuf,
    is_hosts: bool,
}

impl Facts {
    pub(super) fn gather(bpffs: &Path) -> Self {
        // klb makes the folder itself.
        let existing = bpffs.ancestors().find(|folder| folder.exists());
        let kind = existing.and_then(|folder| statfs(folder).ok());
        Self {
            bpffs: bpffs.to_owned(),
            is_bpffs: kind.is_some_and(|kind| kind.filesystem_type() == BPF_FS_MAGIC),
            cgroup: cgroup::find_root().ok().map(|root| Cgroup {
                is_hosts: cgroup::is_hosts_root(&root),
                root,
            }),
        }
    }

    pub(super) fn checks(&self) -> Vec<Check> {
        vec![self.pins(), self.cgroups()]
    }

    fn pins(&self) -> Check {
        const NAME: &str = "BPF file system";
        let folder = self.bpffs.display();
        if self.is_bpffs {
            return Check::ok(NAME, format!("{folder} is on one"));
        }
        Check::warn(
            NAME,
            format!("{folder} is on none; the agent mounts /sys/fs/bpf if it has CAP_SYS_ADMIN"),
            "mount -t bpf bpf /sys/fs/bpf on the host; in a pod, mount the host's with \
             mountPropagation Bidirectional",
        )
    }

    fn cgroups(&self) -> Check {
        const NAME: &str = "cgroup v2";
        match &self.cgroup {
            None => Check::fail(
                NAME,
                "no cgroup2 file system is mounted: sockets cannot be served",
                "mount -t cgroup2 none /sys/fs/cgroup/unified; in a pod, mount the host's \
                 /sys/fs/cgroup; or run the agent with --socket-lb off",
            ),
            Some(Cgroup { root, is_hosts }) if *is_hosts => {
                Check::ok(NAME, format!("{} is the host's root", root.display()))
            }
            Some(Cgroup { root, .. }) => Check::warn(
                NAME,
                format!(
                    "{} is a container's root: sockets outside of it are not served",
                    root.display()
                ),
                "mount the host's /sys/fs/cgroup into the pod, or name its root with --cgroup",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::check::Level::{Fail, Ok, Warn};

    #[test]
    fn each_mount_is_judged_alone() {
        let cgroup = |is_hosts| {
            Some(Cgroup {
                root: "/sys/fs/cgroup".into(),
                is_hosts,
            })
        };
        for (is_bpffs, cgroup, levels) in [
            (true, cgroup(true), [Ok, Ok]),
            (false, cgroup(true), [Warn, Ok]),
            (true, cgroup(false), [Ok, Warn]),
            (true, None, [Ok, Fail]),
        ] {
            let facts = Facts {
                bpffs: "/sys/fs/bpf/klb".into(),
                is_bpffs,
                cgroup,
            };
            let checks = facts.checks().into_iter();
            let found: Vec<_> = checks.map(|check| check.level).collect();
            assert_eq!(found, levels, "{facts:?}");
        }
    }

    #[test]
    fn a_folder_that_is_not_there_yet_is_where_it_would_be() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let facts = Facts::gather(&folder.path().join("not/there"));
        assert!(!facts.is_bpffs);
    }
}
