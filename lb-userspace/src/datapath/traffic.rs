//! What flows through backends, as the programs count it.

use std::{
    collections::BTreeMap,
    ops::{Add, AddAssign, Sub},
};

use aya::maps::{MapData, PerCpuArray};
use lb_common::{names, service::BackendRef, traffic::Traffic};

use super::{
    MapError,
    kernel::{Member, map_error, typed},
    load::{LoadError, open_map},
    pins::Pins,
};

/// Counters of all CPUs together; see [`Traffic`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub flows: u64,
    pub packets_in: u64,
    pub bytes_in: u64,
    pub packets_out: u64,
    pub bytes_out: u64,
}

impl From<&Traffic> for Totals {
    fn from(traffic: &Traffic) -> Self {
        Self {
            flows: traffic.flows,
            packets_in: traffic.packets_in,
            bytes_in: traffic.bytes_in,
            packets_out: traffic.packets_out,
            bytes_out: traffic.bytes_out,
        }
    }
}

impl Totals {
    fn with(self, other: Self, operation: fn(u64, u64) -> u64) -> Self {
        Self {
            flows: operation(self.flows, other.flows),
            packets_in: operation(self.packets_in, other.packets_in),
            bytes_in: operation(self.bytes_in, other.bytes_in),
            packets_out: operation(self.packets_out, other.packets_out),
            bytes_out: operation(self.bytes_out, other.bytes_out),
        }
    }
}

impl Add for Totals {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        self.with(other, u64::wrapping_add)
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// What has come since; nothing where a counter went back, which none does.
impl Sub for Totals {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self.with(other, u64::saturating_sub)
    }
}

/// The counters of one pin folder.
pub struct TrafficTable {
    entries: PerCpuArray<MapData, Traffic>,
}

impl TrafficTable {
    pub fn open(pins: &Pins) -> Result<Self, LoadError> {
        let data = open_map(pins, names::TRAFFIC)?;
        Ok(Self {
            entries: typed(data, names::TRAFFIC)?,
        })
    }

    /// Whether a backend has counters of its own: the first ones have.
    pub fn counts(&self, backend: BackendRef) -> bool {
        (1..self.entries.len()).contains(&backend.id)
    }

    /// What has flowed through one life of a backend; nothing of one that has no
    /// counters of its own.
    pub fn read(&self, backend: BackendRef) -> Result<Totals, MapError> {
        if !self.counts(backend) {
            return Ok(Totals::default());
        }
        self.sum(backend.id, backend.generation)
    }

    /// What has flowed through all others.
    pub fn rest(&self) -> Result<Totals, MapError> {
        self.sum(0, 0)
    }

    /// A CPU that has not met this life has the counters of an earlier one.
    fn sum(&self, id: u32, generation: u32) -> Result<Totals, MapError> {
        let values = self.entries.get(&id, 0);
        let values = values.map_err(|error| map_error("read", names::TRAFFIC, error))?;
        let same = values.iter().filter(|value| value.generation == generation);
        Ok(same.fold(Totals::default(), |sum, value| sum + Totals::from(value)))
    }
}

/// What a Service's counters must keep although its backends come and go: they
/// never count back.
#[derive(Debug, Default)]
pub struct History {
    services: BTreeMap<u32, Totals>,
    /// What was read of each backend, and whose it was.
    backends: BTreeMap<BackendRef, (u32, Totals)>,
}

impl History {
    /// Takes in what the backends' counters say now. `members` says whose they
    /// are; of one that has gone the last count is taken, and then it is
    /// forgotten.
    /// # Errors
    ///
    /// That of `read`.
    pub fn update<E>(
        &mut self,
        members: &BTreeMap<BackendRef, Member>,
        read: impl Fn(BackendRef) -> Result<Totals, E>,
    ) -> Result<(), E> {
        for (&backend, member) in members {
            let known = (member.service, Totals::default());
            self.backends.entry(backend).or_insert(known);
        }
        for (&backend, (service, last)) in &mut self.backends {
            let now = read(backend)?;
            *self.services.entry(*service).or_default() += now - *last;
            *last = now;
        }
        self.backends
            .retain(|backend, _| members.contains_key(backend));
        Ok(())
    }

    /// What each Service has had since it is known, by its number.
    pub const fn services(&self) -> &BTreeMap<u32, Totals> {
        &self.services
    }

    /// What each backend has had since it came.
    pub fn backends(&self) -> impl Iterator<Item = (BackendRef, Totals)> {
        let backends = self.backends.iter();
        backends.map(|(&backend, (_, totals))| (backend, *totals))
    }

    /// Lets the counts of other Services begin anew; those of their backends go
    /// on.
    pub fn retain_services(&mut self, keep: impl Fn(u32) -> bool) {
        self.services.retain(|service, _| keep(*service));
    }

    /// Forgets a Service whose number is another's now, with its backends.
    pub fn forget(&mut self, service: u32) {
        self.services.remove(&service);
        self.backends.retain(|_, (of, _)| *of != service);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::SocketAddr;

    use super::*;

    pub(crate) const fn backend(id: u32) -> BackendRef {
        BackendRef { id, generation: 1 }
    }

    pub(crate) fn member(service: u32) -> Member {
        Member {
            service,
            addr: SocketAddr::from(([10, 244, 0, 5], 3000)),
        }
    }

    fn flows(flows: u64) -> Totals {
        Totals {
            flows,
            ..Totals::default()
        }
    }

    #[test]
    fn a_service_never_counts_back_when_backends_go() {
        let mut history = History::default();
        let mut update = |members: &[u32], counts: &[(u32, u64)]| {
            let members = members.iter().map(|id| (backend(*id), member(7)));
            let counts: BTreeMap<_, _> = counts.iter().copied().collect();
            let read = |backend: BackendRef| {
                Ok::<_, ()>(flows(counts.get(&backend.id).copied().unwrap_or(0)))
            };
            history.update(&members.collect(), read).expect("readable");
            history.services[&7].flows
        };
        assert_eq!(update(&[1, 2], &[(1, 10), (2, 5)]), 15);
        assert_eq!(update(&[1, 2], &[(1, 12), (2, 5)]), 17);
        // It has gone, and what came before it went is counted.
        assert_eq!(update(&[2], &[(1, 13), (2, 5)]), 18);
        assert_eq!(update(&[2], &[(1, 13), (2, 6)]), 19);
        // One that comes anew counts from nothing.
        assert_eq!(update(&[2, 3], &[(2, 6), (3, 1)]), 20);
    }

    #[test]
    fn a_number_that_is_anothers_now_counts_from_nothing() {
        let mut history = History::default();
        let members = |id| BTreeMap::from([(backend(id), member(7))]);
        let read = |backend: BackendRef| Ok::<_, ()>(flows(10 * u64::from(backend.id)));
        history.update(&members(1), read).expect("readable");
        history.forget(7);
        history.update(&members(2), read).expect("readable");
        assert_eq!(history.services()[&7], flows(20), "none of the first one's");
    }
}
