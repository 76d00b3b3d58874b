//! Loads the BPF object: maps from their pins or new, programs by the verifier.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, MapError, MapInfo},
    programs::{Program, ProgramError},
};
use lb_common::{clock::Ticks, names, traffic::Traffic};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::{
        resource::{RLIM_INFINITY, Resource, setrlimit},
        statfs::{BPF_FS_MAGIC, statfs},
    },
};
use tracing::{debug, warn};

use super::{
    clock,
    features::Features,
    known,
    pins::{LockError, Pins, PinsLock},
};
use crate::args::MapSizes;

/// The object that the build put into the binary; empty if it had none.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/klb.bpf.o"));

/// Where the BPF file system belongs.
const BPFFS_MOUNT: &str = "/sys/fs/bpf";

/// Lines of the verifier's log that an error carries: the last ones name the
/// instruction, and the whole may be megabytes.
const VERIFIER_LINES: usize = 12;

/// How often a program is loaded at most, and after which pause: what disturbs the
/// verifier may go on for seconds, in which five attempts in a row have failed.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 200 });

/// Why the object was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("this klb was built without its BPF programs: build it with `cargo xtask build`")]
    NoObject,
    #[error(
        "{} is not on a BPF file system, and only {BPFFS_MOUNT} is mounted by klb: \
         run `mount -t bpf bpf DIR` for a folder above it",
        path.display()
    )]
    NotBpffs { path: PathBuf },
    #[error("{action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(transparent)]
    Locked(#[from] LockError),
    #[error("loading the BPF object")]
    Object(#[source] EbpfError),
    #[error(transparent)]
    Write(#[from] super::MapError),
    #[error("map {name}")]
    Map {
        name: &'static str,
        source: MapError,
    },
    #[error("the BPF object has no program {0}")]
    MissingProgram(&'static str),
    #[error("program {name}")]
    Program {
        name: &'static str,
        source: ProgramError,
    },
    #[error("program {name}: {error}; the verifier's last words:\n{log}")]
    Verifier {
        name: &'static str,
        error: io::Error,
        log: String,
    },
}

/// Whether there is anything to load. To be asked first, so that a klb without
/// programs leaves no trace.
pub fn require_object() -> Result<(), LoadError> {
    if OBJECT.is_empty() {
        return Err(LoadError::NoObject);
    }
    Ok(())
}

/// Makes the pin folder, with a BPF file system below it.
///
/// # Errors
///
/// [`LoadError::NotBpffs`] for a folder elsewhere than below `/sys/fs/bpf` on
/// another file system.
pub fn prepare_pins(pins: &Pins) -> Result<PinsLock, LoadError> {
    let root = pins.root();
    if !is_bpffs(existing_ancestor(root)) {
        if !root.starts_with(BPFFS_MOUNT) {
            return Err(LoadError::NotBpffs { path: root.into() });
        }
        mount_bpffs(Path::new(BPFFS_MOUNT)).map_err(|source| LoadError::Io {
            action: "mounting a BPF file system at",
            path: BPFFS_MOUNT.into(),
            source,
        })?;
    }
    let io_error = |source| LoadError::Io {
        action: "preparing",
        path: root.into(),
        source,
    };
    pins.create().map_err(io_error)?;
    // What looks unfinished may be what another agent is about to finish.
    let lock = PinsLock::take(pins)?;
    pins.remove_unfinished().map_err(io_error)?;
    Ok(lock)
}

fn existing_ancestor(path: &Path) -> &Path {
    path.ancestors()
        .find(|ancestor| ancestor.exists())
        .unwrap_or(path)
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC)
}

/// Mounts, once: a second mount by another agent at the same moment would hide
/// what the first one has pinned.
fn mount_bpffs(path: &Path) -> io::Result<()> {
    let folder = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(path)?;
    let _lock = Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    if is_bpffs(path) {
        return Ok(());
    }
    mount(
        Some("bpf"),
        path,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )?;
    debug!(path = %path.display(), "BPF file system mounted");
    Ok(())
}

/// Makes the maps that are not pinned yet, and opens the others.
///
/// Where flows are pinned and what is known of them is not (an older klb had no
/// such map), programs are told to look for a flow of whatever comes.
///
/// The pin folder must be there ([`prepare_pins`]), and the limit be raised
/// ([`raise_memlock_limit`]).
pub fn load_maps(pins: &Pins, sizes: &MapSizes, features: Features) -> Result<Ebpf, LoadError> {
    let globals = Globals::new(features);
    let paths = names::MAPS.map(|name| (name, pins.map(name)));
    let mut loader = globals.loader();
    for (name, path) in &paths {
        loader.map_pin_path(name, path);
        if let Some(entries) = wanted_entries(sizes, name) {
            loader.map_max_entries(name, entries);
        }
    }
    let is_pinned = |name| pins.map(name).exists();
    let has_flows = is_pinned(names::FLOWS4);
    let knows_less = has_flows && !is_pinned(names::KNOWN);
    let ebpf = loader.load(OBJECT).map_err(LoadError::Object)?;
    if knows_less {
        known::believe_all(&ebpf)?;
    }
    if has_flows {
        known::believe_in_young(&ebpf)?;
    }
    for name in names::MAPS {
        warn_of_other_size(pins, sizes, name)?;
    }
    Ok(ebpf)
}

/// Makes the object once more: with the pinned maps that are named, which must be
/// there, and with others of its own that nobody else sees and that go with it, of
/// so many entries, or as many as the object says.
pub(super) fn load_apart(
    pins: &Pins,
    pinned: &[&'static str],
    entries: impl Fn(&str) -> Option<u32>,
    features: Features,
) -> Result<Ebpf, LoadError> {
    let globals = Globals::new(features);
    let mut loader = globals.loader();
    for name in names::MAPS {
        if pinned.contains(&name) {
            // What is not there would be made, and pinned.
            MapInfo::from_pin(pins.map(name)).map_err(|source| LoadError::Map { name, source })?;
            loader.map_pin_path(name, pins.map(name));
        } else if let Some(entries) = entries(name) {
            loader.map_max_entries(name, entries);
        }
    }
    loader.load(OBJECT).map_err(LoadError::Object)
}

/// What the programs are told about the kernel.
struct Globals {
    set_retval: u8,
    xdp_frags: u8,
    ticks: Option<Ticks>,
}

impl Globals {
    fn new(features: Features) -> Self {
        Self {
            set_retval: u8::from(features.set_retval == Some(true)),
            xdp_frags: u8::from(features.xdp_frags == Some(true)),
            // Without them programs ask for the time.
            ticks: clock::ticks().ok().flatten(),
        }
    }

    fn loader(&self) -> EbpfLoader<'_> {
        let mut loader = EbpfLoader::new();
        loader.override_global(names::HAS_SET_RETVAL, &self.set_retval, true);
        loader.override_global(names::HAS_XDP_FRAGS, &self.xdp_frags, true);
        if let Some(Ticks { length, first }) = &self.ticks {
            loader.override_global(names::TICK, length, true);
            loader.override_global(names::FIRST_TICK, first, true);
        }
        loader
    }
}

/// Has the kernel verify the named programs.
pub fn load_programs(ebpf: &mut Ebpf, programs: &[&'static str]) -> Result<(), LoadError> {
    programs
        .iter()
        .try_for_each(|name| load_program(ebpf, name))
}

/// Loads XDP for native or generic mode unless it is loaded; returns its name.
///
/// Native is for packets of several buffers too, where the kernel can. Generic
/// must not be: the kernel would give it a copy of the packet (Linux 6.9, commit
/// e6d5dbdd20aa) in which TC then takes the IP header for an Ethernet header.
pub fn load_xdp(ebpf: &mut Ebpf, native: bool) -> Result<&'static str, LoadError> {
    if native {
        match load_once(ebpf, names::XDP_FRAGS) {
            Ok(()) => return Ok(names::XDP_FRAGS),
            Err(error) => debug!(%error, "no XDP for packets of several buffers"),
        }
    }
    load_once(ebpf, names::XDP).map(|()| names::XDP)
}

fn load_once(ebpf: &mut Ebpf, name: &'static str) -> Result<(), LoadError> {
    match ebpf.program(name) {
        Some(Program::Xdp(program)) if program.fd().is_ok() => Ok(()),
        _ => load_program(ebpf, name),
    }
}

/// Before 5.11 the memory of maps counts against a limit that is 64 KiB by
/// default. A failure shows when a map is made.
pub fn raise_memlock_limit() {
    if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        debug!(%error, "the limit of locked memory stays");
    }
}

/// The number of entries that the flags ask for; `None` where the object knows
/// best.
fn wanted_entries(sizes: &MapSizes, name: &str) -> Option<u32> {
    match name {
        names::SERVICES4 | names::SERVICES6 => Some(sizes.map_services),
        names::SLOTS4 | names::SLOTS6 => Some(sizes.map_slots),
        names::BACKENDS => Some(sizes.map_backends),
        names::TRAFFIC => Some(traffic_entries(sizes.map_backends, cpus())),
        names::META => Some(sizes.map_service_ports),
        names::FLOWS4 | names::FLOWS6 => Some(sizes.map_flows),
        names::YOUNG4 | names::YOUNG6 => Some(sizes.map_young_flows),
        names::AFFINITY4 | names::AFFINITY6 => Some(sizes.map_affinity),
        names::RANGES4 | names::RANGES6 => Some(sizes.map_source_ranges),
        names::SOCKETS4 | names::SOCKETS6 => Some(sizes.map_sockets),
        _ => None,
    }
}

/// Bytes that the counters by backend may take, however many CPUs there are.
const TRAFFIC_BYTES: usize = 64 << 20;

/// Backends with counters of their own: all of them, unless there are so many
/// CPUs, each with its own counters, that it would take too much memory. What
/// has none is counted in entry 0.
fn traffic_entries(backends: u32, cpus: usize) -> u32 {
    let room = TRAFFIC_BYTES / (size_of::<Traffic>() * cpus);
    backends.min(u32::try_from(room).unwrap_or(u32::MAX)).max(1)
}

/// As many as the kernel makes a map per CPU for.
fn cpus() -> usize {
    aya::util::nr_cpus().unwrap_or(1).max(1)
}

/// A pinned map is kept with all it holds, whatever the flags say now.
fn warn_of_other_size(pins: &Pins, sizes: &MapSizes, name: &'static str) -> Result<(), LoadError> {
    let info =
        MapInfo::from_pin(pins.map(name)).map_err(|source| LoadError::Map { name, source })?;
    if let Some(wanted) = wanted_entries(sizes, name)
        && info.max_entries() != wanted
    {
        warn!(
            map = name,
            entries = info.max_entries(),
            wanted,
            "a map of another size is pinned and stays; `klb cleanup` makes way for a new one"
        );
    }
    Ok(())
}

/// Tries again what the verifier has given up because a signal came, which it answers
/// with `EAGAIN`; it is at work for up to half a second. (libbpf tries again, too; aya
/// does not.)
fn again_if_interrupted(
    mut load: impl FnMut() -> Result<(), ProgramError>,
) -> Result<(), ProgramError> {
    let is_interrupted = |error: &ProgramError| {
        matches!(
            error,
            ProgramError::LoadError { io_error, .. } | ProgramError::IOError(io_error)
                if io_error.kind() == io::ErrorKind::WouldBlock
        )
    };
    for _ in 1..ATTEMPTS {
        match load() {
            Err(error) if is_interrupted(&error) => {
                debug!("a signal has stopped the verifier");
                thread::sleep(PAUSE);
            }
            loaded => return loaded,
        }
    }
    load()
}

fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), LoadError> {
    let program = ebpf
        .program_mut(name)
        .ok_or(LoadError::MissingProgram(name))?;
    let loaded = again_if_interrupted(|| match &mut *program {
        Program::Xdp(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    });
    loaded.map_err(|error| match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => LoadError::Verifier {
            name,
            error: io_error,
            log: last_lines(&verifier_log.to_string(), VERIFIER_LINES),
        },
        source => LoadError::Program { name, source },
    })
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Opens a pinned map.
pub(super) fn open_map(pins: &Pins, name: &'static str) -> Result<MapData, LoadError> {
    MapData::from_pin(pins.map(name)).map_err(|source| LoadError::Map { name, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_long_log_is_kept() {
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines("a", 2), "a");
        assert_eq!(last_lines("", 2), "");
    }

    fn refused(error: nix::Error) -> Result<(), ProgramError> {
        Err(ProgramError::IOError(error.into()))
    }

    #[test]
    fn what_a_signal_has_interrupted_is_tried_again() {
        let mut calls = 0;
        let loaded = again_if_interrupted(|| {
            calls += 1;
            if calls < 3 {
                refused(nix::Error::EAGAIN)
            } else {
                Ok(())
            }
        });
        assert!(loaded.is_ok());
        assert_eq!(calls, 3);
    }

    #[test]
    fn not_for_ever_and_nothing_else() {
        for (error, expected) in [(nix::Error::EAGAIN, ATTEMPTS), (nix::Error::EACCES, 1)] {
            let mut calls = 0;
            let loaded = again_if_interrupted(|| {
                calls += 1;
                refused(error)
            });
            assert!(loaded.is_err());
            assert_eq!(calls, expected, "{error}");
        }
    }

    #[test]
    fn every_map_with_a_chosen_size_follows_its_flag() {
        let sizes = MapSizes {
            map_services: 1,
            map_slots: 2,
            map_backends: 3,
            map_service_ports: 4,
            map_flows: 5,
            map_young_flows: 6,
            map_affinity: 7,
            map_source_ranges: 8,
            map_sockets: 9,
        };
        let wanted = names::MAPS.map(|name| wanted_entries(&sizes, name));
        let wanted: Vec<u32> = wanted.into_iter().flatten().collect();
        assert_eq!(wanted, [1, 1, 2, 2, 3, 4, 8, 8, 5, 5, 6, 6, 7, 7, 9, 9, 3]);
    }

    #[test]
    fn counters_do_not_take_more_memory_on_larger_machines() {
        assert_eq!(traffic_entries(1000, 4), 1000);
        assert_eq!(traffic_entries(262_144, 2), 262_144);
        for cpus in [64, 512] {
            let bytes = traffic_entries(262_144, cpus) as usize * cpus * size_of::<Traffic>();
            assert!(
                (TRAFFIC_BYTES / 2..=TRAFFIC_BYTES).contains(&bytes),
                "{bytes}"
            );
        }
        assert_eq!(traffic_entries(262_144, usize::MAX / 64), 1);
    }

    #[test]
    fn a_folder_elsewhere_is_no_place_for_pins() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let error = prepare_pins(&Pins::new(folder.path())).expect_err("no BPF file system");
        assert!(matches!(error, LoadError::NotBpffs { .. }), "{error}");
    }
}
