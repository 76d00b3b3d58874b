//! The control group at whose sockets klb translates.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

/// A cgroup v2 folder, open.
#[derive(Debug)]
pub struct Cgroup {
    pub folder: File,
    /// The kernel's id of the group, by which links name it.
    pub id: u64,
}

impl Cgroup {
    /// # Errors
    ///
    /// `InvalidInput` if the folder is not on a cgroup2 file system.
    pub fn open(path: &Path) -> io::Result<Self> {
        let folder = File::open(path)?;
        if fstatfs(&folder)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a cgroup2 folder",
            ));
        }
        let id = folder.metadata()?.ino();
        Ok(Self { folder, id })
    }
}

/// Where a cgroup2 file system is mounted: `/sys/fs/cgroup`, or
/// `/sys/fs/cgroup/unified` beside cgroup v1.
///
/// In a container that is the host's root only if the host's is mounted there:
/// see [`is_hosts_root`].
///
/// # Errors
///
/// `NotFound` if none is mounted.
pub fn find_root() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    cgroup2_mount(&mounts).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "no cgroup2 file system is mounted; give --cgroup, or --socket-lb off",
        )
    })
}

/// Whether a cgroup2 mount shows the whole machine: only the very root lacks
/// this file, and a container's root is not it.
pub fn is_hosts_root(path: &Path) -> bool {
    !path.join("cgroup.events").exists()
}

fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (folder, kind) = (fields.next()?, fields.next()?);
        // The kernel writes a blank in a path as an octal number.
        (kind == "cgroup2").then(|| folder.replace("\\040", " ").into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_on_both_kinds_of_systems() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let pure = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\nproc /proc proc rw 0 0\n";
        let odd = "none /mnt/a\\040b cgroup2 rw 0 0\n";
        for (mounts, found) in [
            (hybrid, Some("/sys/fs/cgroup/unified")),
            (pure, Some("/sys/fs/cgroup")),
            (odd, Some("/mnt/a b")),
            ("proc /proc proc rw 0 0\n", None),
            ("", None),
        ] {
            assert_eq!(cgroup2_mount(mounts), found.map(PathBuf::from));
        }
    }

    #[test]
    fn another_folder_is_no_cgroup() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let error = Cgroup::open(folder.path()).expect_err("no cgroup2");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
