//! What the programs tell who listens, as the kernel hands it over.

use aya::maps::{Array, PerCpuArray, RingBuf};
use lb_common::{
    Hook, Reason, names,
    trace::{Event, Trace, Tracing, bit_of_hook, bit_of_reason},
};

use crate::program::Datapath;

/// An event with its frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    pub event: Event,
    pub before: Vec<u8>,
    pub after: Vec<u8>,
}

impl Told {
    fn read(bytes: &[u8]) -> Self {
        let (head, frames) = bytes.split_at(size_of::<Event>());
        // SAFETY: there are as many bytes as an event has, for which all values
        // are valid.
        let event: Event = unsafe { head.as_ptr().cast::<Event>().read_unaligned() };
        let (before, after) = frames.split_at(event.captured.into());
        assert_eq!(after.len(), usize::from(event.captured_after));
        Self {
            before: before.to_vec(),
            after: after.to_vec(),
            event,
        }
    }

    pub fn reason(&self) -> Reason {
        Reason::ALL[usize::from(self.event.reason)]
    }
}

/// All reasons at all hooks.
pub fn everything() -> Trace {
    let reasons = Reason::ALL.iter();
    Trace {
        reasons: reasons.fold(0, |bits, reason| bits | bit_of_reason(*reason)),
        hooks: Hook::ALL
            .iter()
            .fold(0, |bits, hook| bits | bit_of_hook(*hook)),
        id: 7,
        ..Trace::default()
    }
}

/// Seconds of the clock by which a trace ends.
pub fn now() -> u32 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the struct outlives the call, which only writes it.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    u32::try_from(time.tv_sec).expect("a machine that is up for less than a century")
}

impl Datapath {
    /// Listens for as long as no test takes.
    pub fn listen(&mut self, trace: &Trace) {
        self.listen_until(trace, now() + 600);
    }

    /// Listens until a second of [`now`].
    pub fn listen_until(&mut self, trace: &Trace, until: u32) {
        let trace = Trace { until, ..*trace };
        let mut map = Array::try_from(self.map(names::TRACE)).expect("an array");
        map.set(0, trace, 0).expect("an index within the map");
    }

    /// What is asked for.
    pub fn trace(&mut self) -> Trace {
        let map = Array::<_, Trace>::try_from(self.map(names::TRACE)).expect("an array");
        map.get(&0, 0).expect("an index within the map")
    }

    /// Takes what has been told.
    pub fn told(&mut self) -> Vec<Told> {
        let mut ring = RingBuf::try_from(self.map(names::EVENTS)).expect("a ring");
        let mut told = Vec::new();
        while let Some(entry) = ring.next() {
            told.push(Told::read(&entry));
        }
        told
    }

    /// How many events there was no room for.
    pub fn lost(&mut self) -> u64 {
        let map = PerCpuArray::<_, Tracing>::try_from(self.map(names::TRACING));
        let values = map.expect("a per-CPU array").get(&0, 0);
        let values = values.expect("an index within the map");
        values.iter().map(|cpu| cpu.lost).sum()
    }
}
