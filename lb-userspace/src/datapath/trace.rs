//! Listening to the programs: what `klb trace` asks for is written to their
//! settings, and what they tell is read from their ring.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
};

use aya::maps::{Array, HashMap, MapData, PerCpuArray, RingBuf};
use lb_common::{
    names,
    service::ServiceMeta,
    trace::{Event, Trace, Tracing},
};
use nix::fcntl::{Flock, FlockArg};

use super::{
    MapError,
    kernel::{map_error, monotonic_seconds, typed},
    load::{LoadError, open_map},
    pins::Pins,
};

/// Seconds after which programs stop to tell, unless that is put off.
pub const LEASE: u32 = 3;

/// Why nobody can listen.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(
        "the programs that are attached are of a klb without `klb trace` ({} is not there): \
         restart the agent with this klb", path.display()
    )]
    Older { path: PathBuf },
    #[error("another klb trace is listening (pid {owner}), and there can be one at a time")]
    Taken { owner: u32 },
    #[error("lock {}", path.display())]
    Lock { path: PathBuf, source: io::Error },
}

/// What the programs told: an event, and as much of the frame as was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    pub event: Event,
    /// As it came in, and as it went on; empty if it did not.
    pub before: Vec<u8>,
    pub after: Vec<u8>,
}

impl Told {
    /// Of the bytes of one entry of the ring; `None` if they are none of this
    /// layout.
    fn read(bytes: &[u8]) -> Option<Self> {
        let (head, frames) = bytes.split_at_checked(size_of::<Event>())?;
        // SAFETY: there are as many bytes as an event has, for which all values
        // are valid.
        let event: Event = unsafe { head.as_ptr().cast::<Event>().read_unaligned() };
        let (before, rest) = frames.split_at_checked(event.captured.into())?;
        Some(Self {
            before: before.to_vec(),
            after: rest.get(..event.captured_after.into())?.to_vec(),
            event,
        })
    }
}

/// The one that listens. Programs tell until it is dropped.
pub struct Listener {
    asked: Array<MapData, Trace>,
    tracing: PerCpuArray<MapData, Tracing>,
    metas: HashMap<MapData, u32, ServiceMeta>,
    ring: RingBuf<MapData>,
    trace: Trace,
    /// What had been lost before.
    lost: u64,
    _lock: Flock<File>,
}

impl Listener {
    /// Opens what is pinned; the programs are asked for nothing yet.
    ///
    /// # Errors
    ///
    /// [`TraceError::Taken`] if somebody listens already.
    pub fn open(pins: &Pins) -> Result<Self, TraceError> {
        let path = pins.map(names::TRACE);
        if !path.exists() {
            return Err(TraceError::Older { path });
        }
        let asked: Array<_, Trace> = typed(open_map(pins, names::TRACE)?, names::TRACE)?;
        let lock = take_lock(pins, &asked)?;
        let mut this = Self {
            asked,
            tracing: typed(open_map(pins, names::TRACING)?, names::TRACING)?,
            metas: typed(open_map(pins, names::META)?, names::META)?,
            ring: typed(open_map(pins, names::EVENTS)?, names::EVENTS)?,
            trace: Trace::default(),
            lost: 0,
            _lock: lock,
        };
        this.lost = this.all_lost()?;
        Ok(this)
    }

    /// Asks the programs for this, or for something else from now on, and puts off
    /// the end.
    pub fn ask(&mut self, trace: &Trace) -> Result<(), MapError> {
        let owner = std::process::id();
        self.trace = Trace {
            // Another one than that of whoever listened before, so that what was
            // told to it is not taken for this one's.
            id: owner ^ monotonic_seconds().rotate_left(16) | 1,
            owner,
            ..*trace
        };
        self.put_off()
    }

    /// Asks for these Services from now on, and puts off the end.
    pub fn ask_for(&mut self, services: &[u32]) -> Result<(), MapError> {
        let asked = &mut self.trace.services;
        let count = services.len().min(asked.len());
        asked[..count].copy_from_slice(&services[..count]);
        asked[count..].fill(0);
        // Of Services that have gone nothing is told.
        self.trace.service_count = count.max(1) as u32;
        self.put_off()
    }

    /// Has the programs go on for as long as a trace lasts by itself.
    pub fn put_off(&mut self) -> Result<(), MapError> {
        // 0 is nobody.
        self.trace.until = monotonic_seconds().wrapping_add(LEASE).max(1);
        self.write()
    }

    fn write(&mut self) -> Result<(), MapError> {
        let result = self.asked.set(0, self.trace, 0);
        result.map_err(|error| map_error("write", names::TRACE, error))
    }

    /// What is there to be read.
    pub fn take(&mut self) -> Option<Told> {
        while let Some(entry) = self.ring.next() {
            if let Some(told) = Told::read(&entry)
                && told.event.trace == self.trace.id
            {
                return Some(told);
            }
        }
        None
    }

    /// Another descriptor of the ring, to wait by: it is readable when there is
    /// something to be read.
    pub fn waiting(&self) -> io::Result<OwnedFd> {
        self.ring.as_fd().try_clone_to_owned()
    }

    /// Events for which there was no room since this listens.
    pub fn lost(&self) -> Result<u64, MapError> {
        Ok(self.all_lost()?.wrapping_sub(self.lost))
    }

    fn all_lost(&self) -> Result<u64, MapError> {
        let values = self.tracing.get(&0, 0);
        let values = values.map_err(|error| map_error("read", names::TRACING, error))?;
        Ok(values
            .iter()
            .map(|cpu| cpu.lost.wrapping_add(cpu.lost_calls))
            .fold(0, u64::wrapping_add))
    }

    /// What a Service is called.
    pub fn meta(&self, service: u32) -> Option<ServiceMeta> {
        self.metas.get(&service, 0).ok()
    }

    /// What all are called, by id.
    pub fn metas(&self) -> Result<BTreeMap<u32, ServiceMeta>, MapError> {
        let metas: Result<_, _> = self.metas.iter().collect();
        metas.map_err(|error| map_error("read", names::META, error))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.trace = Trace::default();
        // Without this it ends by itself.
        drop(self.write());
    }
}

/// The lock goes with the process, however that ends. It is on a folder that
/// nobody else locks.
fn take_lock(pins: &Pins, asked: &Array<MapData, Trace>) -> Result<Flock<File>, TraceError> {
    let path = pins.links_folder();
    let folder = File::open(&path).map_err(|source| TraceError::Lock {
        path: path.clone(),
        source,
    })?;
    match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::Error::EWOULDBLOCK)) => Err(TraceError::Taken {
            owner: asked.get(&0, 0).map_or(0, |trace| trace.owner),
        }),
        Err((_, error)) => Err(TraceError::Lock {
            path,
            source: error.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_read_with_both_frames() {
        let event = Event {
            captured: 2,
            captured_after: 3,
            ..Event::default()
        };
        // SAFETY: an event is plain bytes.
        let mut bytes: Vec<u8> = unsafe {
            std::slice::from_raw_parts((&raw const event).cast(), size_of::<Event>()).to_vec()
        };
        bytes.extend([1, 2, 3, 4, 5]);
        let told = Told::read(&bytes).expect("an event");
        assert_eq!(
            (&told.before[..], &told.after[..]),
            (&[1, 2][..], &[3, 4, 5][..])
        );
        assert_eq!(Told::read(&bytes[..bytes.len() - 1]), None, "cut off");
        assert_eq!(Told::read(&bytes[..100]), None);
    }
}
