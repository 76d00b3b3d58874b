//! A control group of a test's own: klb's socket programs see the processes in
//! it, and nobody else's.

use std::{
    fs::{self, File, OpenOptions},
    marker::PhantomData,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::wait;

/// Held as long as this process is in a group of a test: it is in one at a time.
static MOVED: Mutex<()> = Mutex::new(());

/// A control group; removed on drop, when its processes have ended.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    _not_send: PhantomData<*const ()>,
}

impl Cgroup {
    /// # Panics
    /// If it cannot be made.
    pub fn new(name: &str) -> Self {
        let path = root().join(name);
        fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self {
            path,
            _not_send: PhantomData,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file by which a process that writes `0` joins.
    ///
    /// # Panics
    /// If it cannot be opened.
    pub(crate) fn door(&self) -> File {
        let path = self.path.join("cgroup.procs");
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Moves this process into the group, until the guard drops. Whoever else wants it
    /// in another one waits until then.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn enter(&self) -> Inside<'_> {
        // Who panicked with it held has moved the process back.
        let alone = MOVED.lock().unwrap_or_else(PoisonError::into_inner);
        let own = fs::read_to_string("/proc/self/cgroup").expect("proc is mounted");
        let v2 = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let home = root().join(v2.expect("a group of version 2"));
        let inside = Inside {
            home,
            _of: self,
            _alone: alone,
        };
        join(&self.path);
        inside
    }
}

/// This process is in a group. Dropping it moves the process back.
#[derive(Debug)]
pub struct Inside<'a> {
    home: PathBuf,
    _of: &'a Cgroup,
    /// Let go when the process has been moved back.
    _alone: MutexGuard<'static, ()>,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        join(&self.home);
    }
}

fn join(group: &Path) {
    fs::write(group.join("cgroup.procs"), "0")
        .unwrap_or_else(|error| panic!("{}: {error}", group.display()));
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes a group. A process that was killed just now may still be in it.
pub(crate) fn remove(path: &Path) {
    let gone = wait::attempt(Duration::from_secs(20), || fs::remove_dir(path).ok());
    if gone.is_none() {
        eprintln!("{} has processes and stays", path.display());
    }
}

/// Where cgroup v2 is mounted: alone at `/sys/fs/cgroup`, or beside v1.
///
/// # Panics
/// If it is mounted nowhere.
pub fn root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("proc is mounted");
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(path))
        })
        .expect("cgroup v2 is mounted")
}
