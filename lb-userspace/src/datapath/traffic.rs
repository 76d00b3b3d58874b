//! What flows through backends, as the programs count it.

use std::ops::{Add, AddAssign, Sub};

use aya::maps::{MapData, PerCpuArray};
use lb_common::{names, service::BackendRef, traffic::Traffic};

use super::{
    MapError,
    kernel::{map_error, typed},
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
