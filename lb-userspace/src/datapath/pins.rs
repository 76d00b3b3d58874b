//! What klb keeps on the BPF file system, and who may change it.
//!
//! ```text
//! <bpffs>/v1/klb_svc4 …          maps, by name
//! <bpffs>/v1/links/connect4 …    socket links, by hook
//! <bpffs>/v1/links/tc_in-12 …    device links, by hook and index of the device
//! <bpffs>/v1/devices/12-uplink … facts about a device, as empty folders
//! ```
//!
//! A device is known by its index: a name may belong to another device
//! tomorrow, and the BPF file system refuses names with a dot, as VLAN devices
//! have.

use std::{
    collections::BTreeSet,
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    str::FromStr,
};

use lb_common::names;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use tracing::debug;

use super::sys;
use crate::devices::Role;

/// What the names of all maps begin with.
const MAP_PREFIX: &str = "klb_";

/// The pin folder of one layout.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

/// A hook that a link is pinned for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinkPin {
    /// By name of the program.
    Socket(&'static str),
    /// By hook and index of the device.
    Device(DeviceHook, u32),
}

/// The hooks of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DeviceHook {
    Xdp,
    TcIngress,
    TcEgress,
}

/// A fact about a device that outlives the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mark {
    /// klb treats it as an uplink.
    Uplink,
    /// klb treats it as a tunnel to other nodes.
    Overlay,
    /// klb treats it as the host side of a pod's link.
    Pod,
    /// klb put the `clsact` qdisc there, and so may remove it.
    Clsact,
}

/// The mark of each role.
pub(super) const ROLE_MARKS: [(Role, Mark); 3] = [
    (Role::Uplink, Mark::Uplink),
    (Role::Overlay, Mark::Overlay),
    (Role::Pod, Mark::Pod),
];

impl DeviceHook {
    pub const ALL: [Self; 3] = [Self::Xdp, Self::TcIngress, Self::TcEgress];

    /// Name of the program for this hook.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Xdp => names::XDP,
            Self::TcIngress => names::TC_INGRESS,
            Self::TcEgress => names::TC_EGRESS,
        }
    }
}

impl Mark {
    const ALL: [Self; 4] = [Self::Uplink, Self::Overlay, Self::Pod, Self::Clsact];

    const fn name(self) -> &'static str {
        match self {
            Self::Uplink => "uplink",
            Self::Overlay => "overlay",
            Self::Pod => "pod",
            Self::Clsact => "clsact",
        }
    }
}

/// The name of a program without the prefix that tells whose it is.
fn short(program: &'static str) -> &'static str {
    program.strip_prefix("klb_").unwrap_or(program)
}

impl fmt::Display for LinkPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(program) => f.write_str(short(program)),
            Self::Device(hook, index) => write!(f, "{}-{index}", short(hook.program())),
        }
    }
}

impl FromStr for LinkPin {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        if let Some(program) = names::SOCKET_PROGRAMS
            .into_iter()
            .find(|p| short(p) == name)
        {
            return Ok(Self::Socket(program));
        }
        let (hook, index) = name.rsplit_once('-').ok_or(())?;
        let hook = DeviceHook::ALL
            .into_iter()
            .find(|h| short(h.program()) == hook);
        match (hook, index.parse()) {
            (Some(hook), Ok(index)) => Ok(Self::Device(hook, index)),
            _ => Err(()),
        }
    }
}

impl Pins {
    /// The pins of this klb's layout below the folder that `--bpffs` names.
    pub fn new(bpffs: &Path) -> Self {
        Self::of_layout(bpffs, names::LAYOUT)
    }

    /// Those of a layout.
    pub fn of_layout(bpffs: &Path, layout: &str) -> Self {
        Self::at(bpffs.join(layout))
    }

    /// Those in a folder.
    pub(super) const fn at(root: PathBuf) -> Self {
        Self { root }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes the folders. Those that exist are left as they are.
    pub fn create(&self) -> io::Result<()> {
        fs::create_dir_all(self.links_folder())?;
        fs::create_dir_all(self.devices_folder())
    }

    /// Names of the maps that are pinned, those included that only another layout
    /// has.
    pub(super) fn pinned(&self) -> io::Result<Vec<String>> {
        let mut names = entries(&self.root)?;
        names.retain(|name| name.starts_with(MAP_PREFIX));
        Ok(names)
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn link(&self, pin: LinkPin) -> PathBuf {
        self.links_folder().join(pin.to_string())
    }

    /// Where a link is pinned before it takes the place of another. A name that
    /// [`Self::links`] does not list.
    pub(super) fn new_link(&self, pin: LinkPin) -> PathBuf {
        self.links_folder().join(format!("{pin}_new"))
    }

    /// The links that are pinned; none where the folder is missing.
    pub fn links(&self) -> io::Result<BTreeSet<LinkPin>> {
        let names = entries(&self.links_folder())?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Takes a link off its hook and removes its pin. What is not there counts
    /// as removed.
    pub fn remove_link(&self, pin: LinkPin) -> io::Result<()> {
        let path = self.link(pin);
        // Whatever stands in the way of detaching at once, the link ends with
        // its pin.
        if let Err(error) = gone_is_fine(sys::open_pin(&path).and_then(sys::detach_link)) {
            debug!(path = %path.display(), %error, "not detached before it is unpinned");
        }
        gone_is_fine(fs::remove_file(path))
    }

    /// Removes what a start that was interrupted left behind.
    pub(super) fn remove_unfinished(&self) -> io::Result<()> {
        for name in entries(&self.links_folder())? {
            if name.ends_with("_new") {
                gone_is_fine(fs::remove_file(self.links_folder().join(name)))?;
            }
        }
        Ok(())
    }

    /// Sets a mark; whether it is new.
    pub(super) fn mark(&self, device: u32, mark: Mark) -> io::Result<bool> {
        match fs::create_dir(self.mark_path(device, mark)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn unmark(&self, device: u32, mark: Mark) -> io::Result<()> {
        gone_is_fine(fs::remove_dir(self.mark_path(device, mark)))
    }

    pub(super) fn unmark_all(&self, device: u32) -> io::Result<()> {
        Mark::ALL
            .into_iter()
            .try_for_each(|mark| self.unmark(device, mark))
    }

    /// Every mark, by device.
    pub fn marks(&self) -> io::Result<BTreeSet<(u32, Mark)>> {
        let names = entries(&self.devices_folder())?;
        Ok(names.iter().filter_map(|name| parse_mark(name)).collect())
    }

    /// The devices that something of klb is, or was, attached to.
    pub fn devices(&self) -> io::Result<BTreeSet<u32>> {
        let mut devices: BTreeSet<u32> =
            self.marks()?.into_iter().map(|(index, _)| index).collect();
        devices.extend(self.links()?.into_iter().filter_map(|pin| match pin {
            LinkPin::Device(_, index) => Some(index),
            LinkPin::Socket(_) => None,
        }));
        Ok(devices)
    }

    /// Removes the folder with all that klb pins there: links, marks and maps.
    /// Anything else stays, and with it the folder it is in. Returns how many
    /// pins were removed.
    pub fn remove_all(&self) -> io::Result<usize> {
        let mut removed = 0;
        self.remove_unfinished()?;
        for pin in self.links()? {
            self.remove_link(pin)?;
            removed += 1;
        }
        for (device, mark) in self.marks()? {
            self.unmark(device, mark)?;
        }
        // Of hooks that only another layout knows.
        for name in entries(&self.links_folder())? {
            gone_is_fine(fs::remove_file(self.links_folder().join(name)))?;
            removed += 1;
        }
        for name in self.pinned()? {
            gone_is_fine(fs::remove_file(self.map(&name)))?;
            removed += 1;
        }
        for folder in [
            self.links_folder(),
            self.devices_folder(),
            self.root.clone(),
        ] {
            remove_if_empty(&folder)?;
        }
        self.root.parent().map_or(Ok(()), remove_if_empty)?;
        Ok(removed)
    }

    pub(super) fn links_folder(&self) -> PathBuf {
        self.root.join("links")
    }

    fn devices_folder(&self) -> PathBuf {
        self.root.join("devices")
    }

    fn mark_path(&self, device: u32, mark: Mark) -> PathBuf {
        self.devices_folder()
            .join(format!("{device}-{}", mark.name()))
    }
}

fn parse_mark(name: &str) -> Option<(u32, Mark)> {
    let (device, mark) = name.split_once('-')?;
    let mark = Mark::ALL.into_iter().find(|m| m.name() == mark)?;
    Some((device.parse().ok()?, mark))
}

/// Names in a folder; none if it is missing.
fn entries(folder: &Path) -> io::Result<Vec<String>> {
    let listing = match fs::read_dir(folder) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    listing
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn remove_if_empty(folder: &Path) -> io::Result<()> {
    match fs::remove_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        result => gone_is_fine(result),
    }
}

/// Held by the one process that changes a pin folder.
#[derive(Debug)]
pub struct Lock {
    /// The lock goes with the descriptor, however the process ends.
    _file: File,
}

/// The pins, held by this process: an agent with another `--state-dir` would
/// write the same maps.
#[derive(Debug)]
pub struct PinsLock {
    _folder: Flock<File>,
}

impl PinsLock {
    /// Takes the lock, at once or not at all. The folder is there.
    ///
    /// # Errors
    ///
    /// [`LockError::Pinned`] if somebody holds it.
    pub fn take(pins: &Pins) -> Result<Self, LockError> {
        let path = pins.root().to_owned();
        let folder = match File::open(&path) {
            Ok(folder) => folder,
            Err(source) => return Err(LockError::Io { path, source }),
        };
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(folder) => Ok(Self { _folder: folder }),
            Err((_, nix::Error::EWOULDBLOCK)) => Err(LockError::Pinned { path }),
            Err((_, error)) => Err(LockError::Io {
                path,
                source: error.into(),
            }),
        }
    }
}

/// Why the lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("an agent runs already (pid {pid}): it holds {}", path.display())]
    Held { pid: String, path: PathBuf },
    #[error(
        "an agent runs already with these pins, {}, and another --state-dir", path.display()
    )]
    Pinned { path: PathBuf },
    #[error("lock {}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl Lock {
    /// Takes the lock, at once or not at all.
    ///
    /// # Errors
    ///
    /// [`LockError::Held`] names the process that holds it.
    pub fn take(state_dir: &Path) -> Result<Self, LockError> {
        let path = Self::path(state_dir);
        let io_error = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        fs::create_dir_all(state_dir).map_err(io_error)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io_error)?;
        match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&whole_file())) {
            Ok(_) => {}
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => {
                return Err(LockError::Held {
                    pid: read_pid(&mut file),
                    path,
                });
            }
            Err(error) => return Err(io_error(error.into())),
        }
        write_pid(&mut file).map_err(io_error)?;
        Ok(Self { _file: file })
    }

    /// Process id of the holder, if there is one. Taking no lock itself, this
    /// never stands in the way of an agent that starts.
    pub fn holder(state_dir: &Path) -> Result<Option<String>, LockError> {
        let path = Self::path(state_dir);
        let io_error = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error(error)),
        };
        let mut lock = whole_file();
        fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock))
            .map_err(|error| io_error(error.into()))?;
        let held = i32::from(lock.l_type) != libc::F_UNLCK;
        Ok(held.then(|| read_pid(&mut file)))
    }

    /// The file that is locked.
    pub fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("agent.lock")
    }
}

/// An exclusive lock of a file, owned by the open file description: unlike
/// flock(2) it can be asked for without being taken.
fn whole_file() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

/// The pid in a lock file, for a message; never used to find the process.
fn read_pid(file: &mut File) -> String {
    let mut text = String::new();
    match file.read_to_string(&mut text) {
        Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_pins_survive_their_name_and_have_no_dots() {
        let socket = names::SOCKET_PROGRAMS.into_iter().map(LinkPin::Socket);
        let device = DeviceHook::ALL
            .into_iter()
            .map(|hook| LinkPin::Device(hook, 4_000_000_000));
        for pin in socket.chain(device) {
            let name = pin.to_string();
            assert_eq!(name.parse(), Ok(pin));
            assert!(!name.contains('.'), "{name}");
        }
        for strange in ["tc_in", "tc_in-", "tc_in-x", "bind4", "tc_in-1_new", ""] {
            assert_eq!(strange.parse::<LinkPin>(), Err(()), "{strange}");
        }
    }

    #[test]
    fn marks_are_kept_by_device() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let pins = Pins::new(folder.path());
        assert!(pins.marks().expect("no folder yet").is_empty());
        pins.create().expect("created");
        assert!(pins.mark(3, Mark::Pod).expect("marked"));
        assert!(!pins.mark(3, Mark::Pod).expect("marked before"));
        pins.mark(3, Mark::Clsact).expect("marked");
        pins.mark(12, Mark::Uplink).expect("marked");
        assert_eq!(pins.devices().expect("listed"), BTreeSet::from([3, 12]));
        pins.unmark_all(3).expect("unmarked");
        pins.unmark_all(3).expect("nothing left to unmark");
        let left = pins.marks().expect("listed");
        assert_eq!(left, BTreeSet::from([(12, Mark::Uplink)]));
    }

    #[test]
    fn removal_takes_what_is_klbs_and_leaves_the_rest() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let bpffs = folder.path().join("klb");
        let pins = Pins::new(&bpffs);
        pins.create().expect("created");
        pins.mark(3, Mark::Pod).expect("marked");
        let touch = |path: PathBuf| fs::write(path, "").expect("written");
        touch(pins.map(names::SERVICES4));
        touch(pins.link(LinkPin::Device(DeviceHook::Xdp, 3)));
        touch(pins.new_link(LinkPin::Device(DeviceHook::Xdp, 3)));
        touch(pins.map("somebody_elses"));

        assert_eq!(pins.remove_all().expect("removed"), 2);
        assert!(pins.map("somebody_elses").exists());
        fs::remove_file(pins.map("somebody_elses")).expect("removed");
        assert_eq!(pins.remove_all().expect("removed"), 0);
        assert!(!bpffs.exists());
        assert_eq!(pins.remove_all().expect("nothing there"), 0);
    }

    #[test]
    fn the_lock_has_one_holder_who_is_named() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let state = folder.path().join("state");
        assert_eq!(Lock::holder(&state).expect("no file"), None);
        let lock = Lock::take(&state).expect("free");
        let pid = std::process::id().to_string();
        assert_eq!(Lock::holder(&state).expect("asked"), Some(pid.clone()));
        let refusal = Lock::take(&state).expect_err("held").to_string();
        assert!(refusal.contains(&pid), "{refusal}");
        drop(lock);
        assert_eq!(Lock::holder(&state).expect("asked"), None);
        Lock::take(&state).expect("free again");
    }
}
