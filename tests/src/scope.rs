//! The name that everything of one test carries, and its folder.

use std::{
    cell::Cell,
    env,
    fs::{self, File},
    marker::PhantomData,
    path::{Path, PathBuf},
    process,
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
};

use nix::fcntl::{Flock, FlockArg};

use crate::sweep;

/// What the names of tests begin with.
pub const TEST_PREFIX: &str = "klbt-";

/// Name and folder of one test, or of the demo. Dropping it removes the folder.
///
/// Not `Send`, as nothing that is made from it: a process of the kit is killed
/// when the thread ends that started it.
#[derive(Debug)]
pub struct Scope {
    name: String,
    lasting: bool,
    next_file: Cell<u32>,
    /// Held while the process lives that made the scope.
    _lock: Flock<File>,
    _not_send: PhantomData<*const ()>,
}

impl Scope {
    /// A scope that no other test has. The first one of a process removes what
    /// tests left that were killed.
    pub fn test() -> Self {
        static SWEEP: Once = Once::new();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        SWEEP.call_once(sweep::dead_tests);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self::named(&format!("{TEST_PREFIX}{}-{number}", process::id()), false)
    }

    /// A scope with a name that people can type. What is started in a `lasting`
    /// scope outlives this process, unless its guards drop.
    ///
    /// # Panics
    /// If there is one of that name already.
    pub fn named(name: &str, lasting: bool) -> Self {
        let folder = folder(name);
        fs::create_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let lock = lock(&folder).expect("nobody else knows the new folder");
        Self {
            name: name.to_owned(),
            lasting,
            next_file: Cell::new(0),
            _lock: lock,
            _not_send: PhantomData,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether processes go on when this one ends.
    pub fn is_lasting(&self) -> bool {
        self.lasting
    }

    /// The scope's own folder, for logs and manifests.
    pub fn folder(&self) -> PathBuf {
        folder(&self.name)
    }

    /// A path in the folder that was not given out before.
    pub fn new_file(&self, name: &str) -> PathBuf {
        let number = self.next_file.get();
        self.next_file.set(number + 1);
        self.folder().join(format!("{number:02}-{name}"))
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(self.folder()) {
            eprintln!("{}: {error}", self.folder().display());
        }
    }
}

/// Whether the process lives that made the scope of that name.
pub fn is_held(scope: &str) -> bool {
    let folder = folder(scope);
    folder.exists() && lock(&folder).is_none()
}

fn lock(folder: &Path) -> Option<Flock<File>> {
    Flock::lock(File::open(folder).ok()?, FlockArg::LockExclusiveNonblock).ok()
}

/// Folder of the scope of that name.
pub(crate) fn folder(scope: &str) -> PathBuf {
    env::temp_dir().join(scope)
}

/// Where the scope of that name pins.
pub(crate) fn pin_folder(scope: &str) -> PathBuf {
    Path::new("/sys/fs/bpf").join(scope)
}
