//! Figures 1 to 7: requests over real sockets, and packets, by every way.

use std::{collections::BTreeMap, time::Duration};

use lb_tests::{
    apiserver::ApiServer,
    measure::{Measured, Test},
};

use super::{
    Name, Options,
    packets::Traffic,
    progress,
    report::{Figure, Row, Target},
    services::Services,
    site::{Site, Way},
};

/// Of one way in one round.
const ROUND: Duration = Duration::from_millis(300);
const ROUNDS: usize = 9;
/// A node that has many Services.
const MANY: u32 = 50_000;
/// More than this no rule set of nftables is tried with: ten times as many
/// take an hour.
const MOST_FOR_NFTABLES: u32 = 10_000;

const DIRECT: &str = "direct";
const IPTABLES: &str = "iptables";
const NFTABLES: &str = "nftables";
const SOCKET: &str = "klb, socket";
const TC: &str = "klb, TC";
const BYPASS: &str = "klb, TC, bypass";
const XDP: &str = "klb, XDP, bypass";
const ALL: &str = "klb, all hooks";
/// What nobody can spare who has programs at klb's hooks.
const EMPTY: &str = "empty programs";
const HEADERS: &str = "programs that read headers";
const FLOOR_SOCKET: &str = "floor, socket";
const FLOOR_TC: &str = "floor, TC, bypass";
const FLOOR_XDP: &str = "floor, XDP";

/// A way, and a number of Services.
type Key = (&'static str, u32);

/// All clusters that are measured.
#[derive(Default)]
struct Bed {
    sites: BTreeMap<Key, Site>,
    /// By the number of Services.
    apis: BTreeMap<u32, ApiServer>,
}

/// What is known of a figure.
struct Known {
    /// What a way is to reach.
    target: fn(&str) -> Option<f64>,
    /// What these are known to take.
    nftables: (f64, f64),
    floor: (f64, f64),
}

/// Measures the figures that are wanted.
pub(super) fn measure(options: &Options, done: &mut dyn FnMut(Figure)) {
    let mut bed = Bed::default();
    let count = options.services;
    for (name, measure) in [
        (Name::NewConnection, new_connection as Part),
        (Name::RoundTrip, round_trip),
        (Name::NodePort, node_port),
        (Name::Datagram, datagram),
        (Name::Flatness, flatness),
        (Name::Tax, tax),
        (Name::Packets, packets),
    ] {
        if options.wants(name) {
            measure(&mut bed, options, count)
                .into_iter()
                .for_each(&mut *done);
        }
    }
}

type Part = fn(&mut Bed, &Options, u32) -> Vec<Figure>;

fn new_connection(bed: &mut Bed, options: &Options, count: u32) -> Vec<Figure> {
    let title = format!("new connection to a ClusterIP, {count} Services, p50");
    let known = Known {
        target: |name| match name {
            SOCKET => Some(1.01),
            BYPASS => Some(0.96),
            _ => None,
        },
        nftables: (1.12, 1.28),
        floor: (0.88, 0.97),
    };
    let figure = Figure::new("1", title, "µs").to(DIRECT);
    vec![requests(bed, options, count, figure, Test::Connect, &known)]
}

fn round_trip(bed: &mut Bed, options: &Options, count: u32) -> Vec<Figure> {
    let title = format!("round trip over a connection to a ClusterIP, {count} Services, p50");
    let known = Known {
        target: |name| match name {
            SOCKET => Some(1.015),
            TC => Some(1.09),
            BYPASS => Some(0.93),
            _ => None,
        },
        nftables: (1.06, 1.18),
        floor: (0.84, 0.95),
    };
    let figure = Figure::new("2", title, "µs").to(DIRECT);
    vec![requests(
        bed,
        options,
        count,
        figure,
        Test::RoundTrip,
        &known,
    )]
}

fn datagram(bed: &mut Bed, options: &Options, count: u32) -> Vec<Figure> {
    let title = format!("UDP request by a socket of its own, {count} Services, p50");
    let known = Known {
        target: |name| matches!(name, SOCKET | BYPASS).then_some(1.015),
        nftables: (1.07, 1.3),
        floor: (0.93, 1.03),
    };
    let figure = Figure::new("4", title, "µs").to(DIRECT);
    vec![requests(
        bed,
        options,
        count,
        figure,
        Test::Datagram,
        &known,
    )]
}

/// Requests of the client pod.
fn requests(
    bed: &mut Bed,
    options: &Options,
    count: u32,
    figure: Figure,
    test: Test,
    known: &Known,
) -> Figure {
    let keys = [
        DIRECT,
        IPTABLES,
        NFTABLES,
        SOCKET,
        TC,
        BYPASS,
        FLOOR_SOCKET,
        FLOOR_TC,
    ];
    let keys = keys.map(|name| key(name, count));
    let (mut figure, measured) =
        bed.rounds(figure, options, &keys, |site| site.measure(test, ROUND));
    figure.rows = rows(&keys, &measured, p50, known.target);
    vouch(&mut figure, known);
    figure
}

fn node_port(bed: &mut Bed, options: &Options, count: u32) -> Vec<Figure> {
    let title = format!("new connection from outside to a NodePort, {count} Services");
    let keys = [DIRECT, IPTABLES, NFTABLES, TC, BYPASS, XDP, FLOOR_TC];
    let keys = keys.map(|name| key(name, count));
    let figure = Figure::new("3", format!("{title}, p50"), "µs").to(DIRECT);
    let (mut figure, measured) = bed.rounds(figure, options, &keys, |site| {
        site.measure_from_outside(Test::Connect, ROUND)
    });
    let mut tail = Figure::new("3", format!("{title}, p99.9"), "µs").to(DIRECT);
    tail.load = figure.load;
    let known = Known {
        target: |name| (name == BYPASS).then_some(1.0),
        nftables: (1.15, 1.33),
        floor: (0.94, 1.03),
    };
    figure.rows = rows(&keys, &measured, p50, known.target);
    vouch(&mut figure, &known);
    let target = |name: &str| matches!(name, BYPASS | XDP).then_some(1.3);
    tail.rows = rows(&keys, &measured, p999, target);
    vec![figure, tail]
}

/// New connections, against the number of Services.
fn flatness(bed: &mut Bed, options: &Options, count: u32) -> Vec<Figure> {
    // Whatever grows shows between the ends; those between them draw the curve.
    let (most, mut sizes) = if options.quick {
        (count, vec![1, count])
    } else {
        let most = MANY.max(count);
        (most, vec![1, 1000, count, most])
    };
    sizes.retain(|size| *size <= most);
    sizes.sort_unstable();
    sizes.dedup();
    let mut keys = vec![key(DIRECT, 1)];
    for name in [IPTABLES, NFTABLES, SOCKET, BYPASS] {
        let sizes = sizes.iter().copied();
        let sizes = sizes.filter(|size| name != NFTABLES || *size <= MOST_FOR_NFTABLES);
        keys.extend(sizes.map(|size| key(name, size)));
    }
    let title = "new connection to a ClusterIP, against the number of Services, p50";
    let figure = Figure::new("5", title, "µs")
        .to(DIRECT)
        .plot("services.svg");
    let (mut figure, measured) = bed.rounds(figure, options, &keys, |site| {
        site.measure(Test::Connect, ROUND)
    });
    figure.rows = rows(&keys, &measured, p50, |_| None);
    for (row, (name, size)) in figure.rows.iter_mut().zip(&keys) {
        if *name == DIRECT {
            continue;
        }
        *row = row.clone().of_services(name, *size);
        let target = match *name {
            SOCKET => Target::at_most(1.01).to("klb, socket, 1"),
            BYPASS => Target::at_most(1.01).to("klb, TC, bypass, 1"),
            _ => continue,
        };
        if *size == most {
            *row = row.clone().target(target);
        }
    }
    vec![figure]
}

/// What traffic pays that is of no Service, on a node with many.
fn tax(bed: &mut Bed, options: &Options, count: u32) -> Vec<Figure> {
    let many = if options.quick { count } else { MANY };
    let keys = [
        key(DIRECT, 1),
        key(IPTABLES, count),
        key(NFTABLES, count.min(MOST_FOR_NFTABLES)),
        key(EMPTY, 0),
        key(HEADERS, 0),
        key(ALL, many),
    ];
    let title = format!("new connection to a pod, through a node with {many} Services, p50");
    let figure = Figure::new("6", title, "µs").to(DIRECT);
    let (mut figure, measured) = bed.rounds(figure, options, &keys, |site| {
        site.measure_direct(Test::Connect, ROUND)
    });
    figure.rows = rows(&keys, &measured, p50, |name| (name == ALL).then_some(1.01));
    for (row, (name, size)) in figure.rows.iter_mut().zip(&keys) {
        if *size > 0 {
            *row = row.clone().of_services(name, *size);
        }
    }
    vec![figure]
}

/// Packets per second from outside.
fn packets(bed: &mut Bed, options: &Options, count: u32) -> Vec<Figure> {
    let names = [
        DIRECT, IPTABLES, NFTABLES, TC, BYPASS, XDP, FLOOR_TC, FLOOR_XDP,
    ];
    let keys = names.map(|name| key(name, count));
    bed.set_up_all(&keys);
    let title = format!("packets per second and CPU to a NodePort, 1024 flows, {count} Services");
    let mut figure = Figure::new("7", title, "Mpps")
        .to(DIRECT)
        .plot("packets.svg");
    progress(format_args!("figure 7: {}", figure.title));
    let mut traffic = Traffic::through(keys.iter().map(|key| &bed.sites[key]));
    let mut measured = vec![Vec::new(); keys.len()];
    for _ in 0..options.rounds(ROUNDS) {
        for (key, measured) in keys.iter().zip(&mut measured) {
            measured.push(traffic.measure(&bed.sites[key], ROUND));
        }
        figure.note_load();
    }
    figure.rows = names
        .into_iter()
        .zip(measured)
        .map(|(name, rounds)| {
            let row = Row::new(name, rounds);
            match name {
                NFTABLES => row.band(0.42, 0.6),
                BYPASS => row.target(Target::at_least(1.25)),
                XDP => row
                    .target(Target::at_least(6.0).to(NFTABLES))
                    .target(Target::at_least(2.9)),
                _ => row,
            }
        })
        .collect();
    vec![figure]
}

/// Without a load balancer it does not matter how many Services there are.
fn key(name: &'static str, count: u32) -> Key {
    (name, if name == DIRECT { 0 } else { count })
}

fn way(name: &str) -> Way {
    match name {
        IPTABLES => Way::Iptables,
        NFTABLES => Way::Nftables,
        SOCKET => Way::SOCKET,
        TC => Way::TC,
        BYPASS => Way::BYPASS,
        XDP => Way::XDP,
        ALL => Way::ALL,
        EMPTY => Way::Empty,
        HEADERS => Way::Headers,
        FLOOR_SOCKET => Way::FloorSocket,
        FLOOR_TC => Way::FloorTc,
        FLOOR_XDP => Way::FloorXdp,
        _ => Way::Direct,
    }
}

impl Bed {
    /// Sets up what is not there yet: first the agents, which start while rules are
    /// loaded.
    fn set_up_all(&mut self, keys: &[Key]) {
        let (agents, others): (Vec<Key>, Vec<Key>) =
            keys.iter().partition(|(name, _)| way(name).asks_api());
        for key in agents.iter().chain(&others) {
            self.set_up(*key);
        }
        for key in agents {
            if let Some(site) = self.sites.get_mut(&key) {
                site.await_ready();
            }
        }
    }

    fn set_up(&mut self, (name, count): Key) {
        if self.sites.contains_key(&(name, count)) {
            return;
        }
        let services = Services { count };
        let way = way(name);
        if way.asks_api() && !self.apis.contains_key(&count) {
            progress(format_args!("an API server with {count} Services"));
            self.apis.insert(count, services.served());
        }
        progress(format_args!("setting up: {name}, {count} Services"));
        let tag = format!("{}-{count}", self.sites.len());
        let site = Site::new(name, &tag, way, services, self.apis.get(&count));
        self.sites.insert((name, count), site);
    }

    /// Measures by turns: a round is a look at every one.
    fn rounds(
        &mut self,
        mut figure: Figure,
        options: &Options,
        keys: &[Key],
        measure: impl Fn(&Site) -> Measured,
    ) -> (Figure, Vec<Vec<Measured>>) {
        self.set_up_all(keys);
        progress(format_args!("figure {}: {}", figure.name, figure.title));
        let mut measured = vec![Vec::new(); keys.len()];
        for _ in 0..options.rounds(ROUNDS) {
            for (key, measured) in keys.iter().zip(&mut measured) {
                measured.push(measure(&self.sites[key]));
            }
            figure.note_load();
        }
        (figure, measured)
    }
}

fn rows(
    keys: &[Key],
    measured: &[Vec<Measured>],
    value: impl Fn(&Measured) -> f64,
    target: impl Fn(&str) -> Option<f64>,
) -> Vec<Row> {
    let rows = keys.iter().zip(measured).map(|((name, _), measured)| {
        let row = Row::new(*name, measured.iter().map(&value).collect());
        match target(name) {
            Some(bound) => row.target(Target::at_most(bound)),
            None => row,
        }
    });
    rows.collect()
}

/// Has the rows that are well known vouch for the figure.
fn vouch(figure: &mut Figure, known: &Known) {
    for row in &mut figure.rows {
        let (low, high) = match &*row.name {
            NFTABLES => known.nftables,
            FLOOR_TC => known.floor,
            _ => continue,
        };
        *row = row.clone().band(low, high);
    }
}

/// In microseconds.
fn p50(measured: &Measured) -> f64 {
    f64::from(measured.p50) / 1000.0
}

fn p999(measured: &Measured) -> f64 {
    f64::from(measured.p999) / 1000.0
}
