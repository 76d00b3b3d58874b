//! Maglev tables of 65537 slots, as the paper measures them (NSDI '16): how long
//! one takes to build, how even it is, and how much moves when a backend goes.
//! `cargo xtask bench maglev` runs it and reads the JSON that it prints.

use std::{hint::black_box, net::SocketAddr, time::Instant};

use lb_userspace::maglev;
use serde_json::json;

/// A prime.
const SIZE: u32 = 65_537;
const BACKENDS: [u16; 4] = [3, 10, 100, 1000];

fn main() {
    let rounds = std::env::args().nth(1).and_then(|text| text.parse().ok());
    let rounds: u32 = rounds.unwrap_or(11);
    for count in BACKENDS {
        println!("{}", measure(count, rounds));
    }
}

fn measure(count: u16, rounds: u32) -> serde_json::Value {
    let backends = backends(count);
    let table = maglev::table(&backends, SIZE);
    let build: Vec<_> = (0..rounds)
        .map(|_| milliseconds(|| maglev::table(black_box(&backends), SIZE)))
        .collect();
    let copy: Vec<_> = (0..rounds)
        .map(|_| milliseconds(|| black_box(&table).clone()))
        .collect();
    json!({
        "backends": count,
        "build": build,
        "copy": copy,
        "spread": spread(&table, count),
        "moved": moved(&backends, &table),
    })
}

fn backends(count: u16) -> Vec<SocketAddr> {
    (0..count)
        .map(|n| {
            let [high, low] = n.to_be_bytes();
            SocketAddr::from(([10, 244, high, low], 3000))
        })
        .collect()
}

fn milliseconds<T>(work: impl FnOnce() -> T) -> f64 {
    let started = Instant::now();
    black_box(work());
    started.elapsed().as_secs_f64() * 1e3
}

/// Slots of the backend that has most, less those of the one that has fewest.
fn spread(table: &[usize], count: u16) -> usize {
    let mut shares = vec![0; usize::from(count)];
    for backend in table {
        shares[*backend] += 1;
    }
    let (most, fewest) = (shares.iter().max(), shares.iter().min());
    most.unwrap_or(&0) - fewest.unwrap_or(&0)
}

/// The part of all slots that get another backend when one goes, without those
/// that were its own; the mean over some that go, in percent.
fn moved(backends: &[SocketAddr], table: &[usize]) -> f64 {
    const GO: usize = 5;
    let gone: Vec<_> = (0..GO).map(|step| step * backends.len() / GO).collect();
    let moved: usize = gone
        .iter()
        .map(|&gone| moved_by(gone, backends, table))
        .sum();
    let count = |number: usize| f64::from(u32::try_from(number).expect("few slots"));
    100.0 * count(moved) / count(GO * table.len())
}

fn moved_by(gone: usize, backends: &[SocketAddr], table: &[usize]) -> usize {
    let mut rest = backends.to_vec();
    rest.remove(gone);
    let after = maglev::table(&rest, SIZE);
    table
        .iter()
        .zip(&after)
        .filter(|(before, _)| **before != gone)
        .filter(|(before, after)| backends[**before] != rest[**after])
        .count()
}
