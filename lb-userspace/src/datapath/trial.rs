//! A trial: what the programs would do with a packet, without doing it.
//!
//! The object is loaded once more. What the programs go by and never write (the
//! maps of Services, settings, devices) are the pinned maps; all that they write
//! is new, goes when the trial is over, and holds what was copied there. The
//! kernel runs a program on a frame that is no packet of anybody
//! (`BPF_PROG_TEST_RUN`): where it is told to send it, it sends nothing.

mod flows;

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, MapData, PerCpuArray},
    programs::{
        Program, ProgramError, SchedClassifier, TestRun as _, TestRunOptions, TestRunResult, Xdp,
    },
};
use lb_common::{
    Addr4, Addr6, Hook, Reason, names,
    reason::counter_index,
    service::{Affinity, AffinityKey},
};
use serde::Serialize;

pub use self::flows::{Entry, LiveFlows};
use super::{
    MapError,
    features::Features,
    kernel::{Client, map_error, monotonic_seconds, typed},
    known,
    load::{self, LoadError, open_map},
    pins::Pins,
};

/// The maps that the programs only read.
const PINNED: [&str; 12] = [
    names::SERVICES4,
    names::SERVICES6,
    names::SLOTS4,
    names::SLOTS6,
    names::BACKENDS,
    names::META,
    names::SERVED,
    names::RANGES4,
    names::RANGES6,
    names::CONFIG,
    names::DEVICES,
    names::NETNS,
];

/// Entries of a table of flows beyond those that are copied there: every CPU of a
/// large machine may put some hundred aside for itself.
const ROOM: usize = 8192;

/// Both ends of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Ends {
    pub src: SocketAddr,
    pub dst: SocketAddr,
}

impl Ends {
    /// Those of the answer.
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
        }
    }
}

/// What a program has the kernel do with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It goes on to what comes behind the hook.
    GoOn,
    Drop,
    /// Back out of the device by which it came.
    Back,
    /// Out of a device of the program's choice.
    Redirect,
}

impl Action {
    const fn of_xdp(code: u32) -> Self {
        match code {
            2 => Self::GoOn,
            3 => Self::Back,
            4 => Self::Redirect,
            _ => Self::Drop,
        }
    }

    const fn of_tc(code: u32) -> Self {
        match code {
            2 => Self::Drop,
            7 => Self::Redirect,
            _ => Self::GoOn,
        }
    }
}

/// What one run did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub action: Action,
    pub reason: Reason,
    pub frame: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("this kernel runs no XDP program on a frame of a certain device (it came with 5.15)")]
    NoXdp,
    #[error("running {program}")]
    Run {
        program: &'static str,
        source: io::Error,
    },
    #[error("{program} ran and counted no reason")]
    NoReason { program: &'static str },
}

/// The packet programs, for one packet.
pub struct Trial {
    ebpf: Ebpf,
    /// The hooks whose programs are loaded, which takes most of the time.
    verified: BTreeSet<Hook>,
}

impl Trial {
    /// With the flows that are given.
    pub fn new(pins: &Pins, flows: &LiveFlows) -> Result<Self, TrialError> {
        load::require_object()?;
        load::raise_memlock_limit();
        let room = u32::try_from(2 * flows.len() + ROOM).unwrap_or(u32::MAX);
        let entries = |map: &str| match map {
            names::FLOWS4 | names::FLOWS6 | names::YOUNG4 | names::YOUNG6 => Some(room),
            names::AFFINITY4 | names::AFFINITY6 => Some(ROOM as u32),
            names::FRAGMENTS4
            | names::FRAGMENTS6
            | names::EARLY4
            | names::EARLY6
            | names::SOCKETS4
            | names::SOCKETS6 => Some(16),
            // Nobody listens to a trial. A page is the least that a ring may have.
            names::EVENTS => Some(4096),
            // All is counted in entry 0.
            names::TRAFFIC => Some(1),
            _ => None,
        };
        let mut this = Self {
            ebpf: load::load_apart(pins, &PINNED, entries, Features::probe())?,
            verified: BTreeSet::new(),
        };
        flows.copy_to(&mut this)?;
        known::believe_all(&this.ebpf)?;
        known::believe_in_young(&this.ebpf)?;
        this.copy_port_cursors(pins)?;
        Ok(this)
    }

    /// Gives the trial the backend that a client keeps.
    pub fn keep(&mut self, client: &Client) -> Result<(), MapError> {
        let affinity = Affinity {
            backend: client.life,
            last_used: monotonic_seconds().wrapping_sub(client.idle),
        };
        let service = client.service;
        match client.client {
            IpAddr::V4(addr) => {
                let client = Addr4::from(addr);
                let key = AffinityKey { client, service };
                self.put(names::AFFINITY4, &[(key, affinity)])
            }
            IpAddr::V6(addr) => {
                let client = Addr6::from(addr);
                let key = AffinityKey { client, service };
                self.put(names::AFFINITY6, &[(key, affinity)])
            }
        }
    }

    /// Runs a hook's program on a frame of a device. What it writes stays for the
    /// runs after it.
    ///
    /// # Errors
    ///
    /// [`TrialError::NoXdp`] where the kernel can do without.
    pub fn run(&mut self, hook: Hook, device: u32, frame: &[u8]) -> Result<Run, TrialError> {
        let program = program_name(hook);
        if self.verified.insert(hook) {
            load::load_programs(&mut self.ebpf, &[program])?;
        }
        let before = self.counters(hook)?;
        let mut out = vec![0; frame.len() + 256];
        let result = self.test_run(hook, device, frame, &mut out);
        let result = result.map_err(|error| match io_error(error) {
            error if hook == Hook::Xdp && error.raw_os_error() == Some(libc::EINVAL) => {
                TrialError::NoXdp
            }
            source => TrialError::Run { program, source },
        })?;
        out.truncate(result.data_size_out as usize);
        let after = self.counters(hook)?;
        let counted = Reason::ALL.iter().zip(before.iter().zip(&after));
        let mut counted = counted.filter(|(_, (before, after))| before != after);
        let (reason, _) = counted.next().ok_or(TrialError::NoReason { program })?;
        Ok(Run {
            action: if hook == Hook::Xdp {
                Action::of_xdp(result.return_value)
            } else {
                Action::of_tc(result.return_value)
            },
            reason: *reason,
            frame: out,
        })
    }

    fn test_run(
        &self,
        hook: Hook,
        device: u32,
        frame: &[u8],
        out: &mut [u8],
    ) -> Result<TestRunResult, ProgramError> {
        let context = if hook == Hook::Xdp {
            xdp_context(device, frame.len())
        } else {
            tc_context(device)
        };
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(out),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let program = self.ebpf.program(program_name(hook));
        let program = program.ok_or(ProgramError::NotLoaded)?;
        match program {
            Program::Xdp(_) => <&Xdp>::try_from(program)?.test_run(options),
            _ => <&SchedClassifier>::try_from(program)?.test_run(options),
        }
    }

    /// How often a hook has counted each reason, in the order of [`Reason::ALL`].
    fn counters(&self, hook: Hook) -> Result<Vec<u64>, MapError> {
        let name = names::COUNTERS;
        let counters: PerCpuArray<_, u64> = of_type(self.ebpf.map(name), name)?;
        let counters = Reason::ALL.iter().map(|reason| {
            let values = counters.get(&counter_index(hook, *reason), 0);
            let values = values.map_err(|error| map_error("read", name, error))?;
            Ok(values.iter().sum())
        });
        counters.collect()
    }

    /// Writes entries of a hash map of the trial's own.
    fn put<K: Pod, V: Pod>(
        &mut self,
        name: &'static str,
        entries: &[(K, V)],
    ) -> Result<(), MapError> {
        let mut map: HashMap<_, K, V> = of_type(self.ebpf.map_mut(name), name)?;
        entries.iter().try_for_each(|(key, value)| {
            let result = map.insert(key, value, 0);
            result.map_err(|error| map_error("write", name, error))
        })
    }

    /// Has masquerade try the port that it would try next.
    fn copy_port_cursors(&mut self, pins: &Pins) -> Result<(), TrialError> {
        let name = names::PORT_CURSORS;
        let live: Array<MapData, u32> = typed(open_map(pins, name)?, name)?;
        let mut own: Array<_, u32> = of_type(self.ebpf.map_mut(name), name)?;
        for index in 0..live.len().min(own.len()) {
            let number = live.get(&index, 0);
            let number = number.map_err(|error| map_error("read", name, error))?;
            // As they are.
            if number == 0 {
                continue;
            }
            let result = own.set(index, number, 0);
            result.map_err(|error| map_error("write", name, error))?;
        }
        Ok(())
    }
}

const fn program_name(hook: Hook) -> &'static str {
    match hook {
        Hook::Xdp => names::XDP,
        Hook::TcIngress => names::TC_INGRESS,
        Hook::TcEgress => names::TC_EGRESS,
        // None of these can be run so.
        Hook::Socket => names::CONNECT4,
    }
}

/// A map of the object as what it is.
fn of_type<T, U>(map: Option<T>, name: &'static str) -> Result<U, MapError>
where
    U: TryFrom<T, Error = aya::maps::MapError>,
{
    let absent = || aya::maps::MapError::InvalidName {
        name: name.to_owned(),
    };
    map.ok_or_else(absent)
        .and_then(U::try_from)
        .map_err(|error| map_error("open", name, error))
}

/// `struct __sk_buff` up to the index of the device, the rest being zero.
fn tc_context(device: u32) -> Vec<u8> {
    /// Fields before it.
    const FIELDS: usize = 10;
    let mut context = vec![0; FIELDS * size_of::<u32>()];
    context.extend(device.to_ne_bytes());
    context
}

/// `struct xdp_md`: the frame from 0 to its end, no metadata, and the device with
/// its first queue.
fn xdp_context(device: u32, length: usize) -> Vec<u8> {
    let fields = [0, length as u32, 0, device, 0, 0];
    fields.into_iter().flat_map(u32::to_ne_bytes).collect()
}

fn io_error(error: ProgramError) -> io::Error {
    match error {
        ProgramError::SyscallError(error) => error.io_error,
        error => io::Error::other(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_programs_return_is_read_as_the_kernel_reads_it() {
        use Action::{Back, Drop, GoOn, Redirect};
        let xdp = [0, 1, 2, 3, 4, 9].map(Action::of_xdp);
        assert_eq!(xdp, [Drop, Drop, GoOn, Back, Redirect, Drop]);
        let tc = [u32::MAX, 0, 2, 7].map(Action::of_tc);
        assert_eq!(tc, [GoOn, GoOn, Drop, Redirect]);
    }

    /// Somebody has to decide about each new map.
    #[test]
    fn maps_that_programs_write_are_never_the_live_ones() {
        let written = [
            names::FLOWS4,
            names::FLOWS6,
            names::YOUNG4,
            names::YOUNG6,
            names::CREDIT,
            names::AFFINITY4,
            names::AFFINITY6,
            names::FRAGMENTS4,
            names::FRAGMENTS6,
            names::EARLY4,
            names::EARLY6,
            names::EARLY,
            names::RARE,
            names::KNOWN,
            names::SOCKETS4,
            names::SOCKETS6,
            names::ROUTES4,
            names::ROUTES6,
            names::PORT_CURSORS,
            names::ANSWERS,
            names::SCRATCH,
            names::TRACE,
            names::EVENTS,
            names::TRACING,
            names::COUNTERS,
            names::TRAFFIC,
        ];
        for name in names::MAPS {
            assert!(PINNED.contains(&name) != written.contains(&name), "{name}");
        }
    }

    #[test]
    fn contexts_name_the_device_where_the_kernel_looks() {
        assert_eq!(tc_context(7)[40..], 7_u32.to_ne_bytes());
        assert_eq!(xdp_context(7, 64)[12..16], 7_u32.to_ne_bytes());
    }
}
