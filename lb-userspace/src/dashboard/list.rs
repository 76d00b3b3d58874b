//! The list of Service ports: as many as somebody can look at, of however many
//! there are.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use lb_common::service::{FrontendKind, ServiceEntry, ServiceMeta};
use serde::Serialize;

use super::{Refusal, query::Query};
use crate::{
    commands::{PortId, port_of, protocol_name},
    datapath::{FrontendKey, traffic::Totals},
    metrics::Reading,
};

/// Rows of an answer, if nothing else is asked for, and at most.
const ROWS: usize = 200;
const MAX_ROWS: usize = 500;

/// After so long without a question, what was counted says nothing of now.
const PAST: Duration = Duration::from_secs(30);

/// By what rows are sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Column {
    Name,
    Backends,
    Flows,
    Packets,
    Bytes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Order {
    Ascending,
    Descending,
}

/// Which rows somebody wants to see, and in which order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Selection {
    /// Each of them is somewhere in a row; in small letters.
    words: Vec<String>,
    column: Column,
    order: Order,
    limit: usize,
}

impl Selection {
    pub(super) fn of(query: &mut Query) -> Result<Self, Refusal> {
        const COLUMNS: [(&str, Column); 5] = [
            ("name", Column::Name),
            ("backends", Column::Backends),
            ("flows", Column::Flows),
            ("packets", Column::Packets),
            ("bytes", Column::Bytes),
        ];
        const ORDERS: [(&str, Order); 2] = [("asc", Order::Ascending), ("desc", Order::Descending)];
        let filter = query.text("filter").unwrap_or_default().to_lowercase();
        let column = query.one_of("sort", &COLUMNS)?.unwrap_or(Column::Name);
        let usual = match column {
            Column::Name => Order::Ascending,
            _ => Order::Descending,
        };
        let limit = format!("a number from 1 to {MAX_ROWS}");
        let rows = query.of_form("limit", &limit)?.unwrap_or(ROWS);
        if !(1..=MAX_ROWS).contains(&rows) {
            return Err(Refusal::wrong(format!("limit: wanted is {limit}")));
        }
        Ok(Self {
            words: filter.split_whitespace().map(str::to_owned).collect(),
            column,
            order: query.one_of("order", &ORDERS)?.unwrap_or(usual),
            limit: rows,
        })
    }

    fn has(&self, row: &Row) -> bool {
        self.words.iter().all(|word| row.words.contains(word))
    }
}

/// A Service port in the list.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Row {
    #[serde(flatten)]
    service: PortId,
    port: u16,
    protocol: String,
    /// One of its frontends, a `ClusterIP` if it has one.
    frontend: SocketAddr,
    frontends: usize,
    /// Of the frontends, those that have no backend for new flows from outside.
    without_backend: usize,
    /// All of them, those included that get no new flows.
    backends: usize,
    /// `null` until there were two looks at the counters.
    #[serde(flatten)]
    rates: Rates,
    /// What is looked for, in small letters.
    #[serde(skip)]
    words: String,
}

/// What came in a second, to and from backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Rates {
    #[serde(rename = "flows_per_second")]
    flows: Option<f64>,
    #[serde(rename = "packets_per_second")]
    packets: Option<f64>,
    #[serde(rename = "bytes_per_second")]
    bytes: Option<f64>,
}

impl Rates {
    fn new(totals: Totals, over: Duration) -> Self {
        let rate = |count: u64| {
            #[expect(
                clippy::cast_precision_loss,
                reason = "nobody counts 2^53 packets in a while"
            )]
            let rate = count as f64 / over.as_secs_f64().max(f64::EPSILON);
            Some((rate * 100.0).round() / 100.0)
        };
        Self {
            flows: rate(totals.flows),
            packets: rate(totals.packets_in + totals.packets_out),
            bytes: rate(totals.bytes_in + totals.bytes_out),
        }
    }
}

/// What was counted at an earlier look.
#[derive(Debug)]
pub(super) struct Past {
    at: Instant,
    /// When it was time for another look.
    until: Instant,
    services: BTreeMap<u32, Totals>,
}

impl Past {
    pub(super) const fn new(at: Instant, until: Instant, services: BTreeMap<u32, Totals>) -> Self {
        Self {
            at,
            until,
            services,
        }
    }
}

/// All Service ports, as they were at one look.
#[derive(Debug)]
pub(super) struct Listing {
    rows: Vec<Row>,
    /// The time that rates are of.
    over: Option<Duration>,
}

/// What is told of it.
#[derive(Debug, Serialize)]
pub(super) struct Excerpt<'a> {
    total: usize,
    /// Of these, those that the filter lets through.
    matching: usize,
    over_seconds: Option<f64>,
    services: Vec<&'a Row>,
}

impl Listing {
    /// `past` is what was counted at the look before, if there was one.
    pub(super) fn new(
        services: &BTreeMap<FrontendKey, ServiceEntry>,
        reading: &Reading,
        past: Option<&Past>,
        now: Instant,
    ) -> Self {
        let past = past
            .filter(|past| past.at < now && now <= past.until + PAST)
            .map(|past| (now.saturating_duration_since(past.at), &past.services));
        let mut backends = BTreeMap::<u32, usize>::new();
        for member in reading.members.values() {
            *backends.entry(member.service).or_default() += 1;
        }
        let rates = |service: u32| {
            let count = |counts: &BTreeMap<u32, Totals>| counts.get(&service).copied();
            past.map_or_else(Rates::default, |(over, before)| {
                let now = count(&reading.services).unwrap_or_default();
                Rates::new(now - count(before).unwrap_or_default(), over)
            })
        };
        let mut rows = BTreeMap::<u32, (u8, Row)>::new();
        for (key, entry) in services {
            // What is said of an address itself is no frontend.
            if entry.kind == FrontendKind::Address as u8 {
                continue;
            }
            let service = entry.service;
            let row = rows.entry(service);
            let (kind, row) = row.or_insert_with(|| {
                let mut row = Row::new(service, *key, &reading.ports);
                row.backends = backends.get(&service).copied().unwrap_or_default();
                row.rates = rates(service);
                (entry.kind, row)
            });
            row.add(*key, entry);
            if entry.kind < *kind {
                (*kind, row.frontend) = (entry.kind, SocketAddr::new(key.addr, key.port));
            }
        }
        let mut rows: Vec<_> = rows.into_values().map(|(_, row)| row).collect();
        rows.sort_by(|a, b| (&a.service, a.port).cmp(&(&b.service, b.port)));
        Self {
            rows,
            over: past.map(|(over, _)| over),
        }
    }

    pub(super) fn select(&self, selection: &Selection) -> Excerpt<'_> {
        let rows = self.rows.iter();
        let mut rows: Vec<_> = rows.filter(|row| selection.has(row)).collect();
        let matching = rows.len();
        // They are in the order of their names, and a sort leaves equals alone.
        let number: fn(&Row) -> f64 = match selection.column {
            Column::Name => |_same| 0.0,
            #[expect(clippy::cast_precision_loss, reason = "there are fewer")]
            Column::Backends => |row| row.backends as f64,
            Column::Flows => |row| row.rates.flows.unwrap_or_default(),
            Column::Packets => |row| row.rates.packets.unwrap_or_default(),
            Column::Bytes => |row| row.rates.bytes.unwrap_or_default(),
        };
        match (selection.column, selection.order) {
            (Column::Name, Order::Ascending) => {}
            (Column::Name, Order::Descending) => rows.reverse(),
            (_, Order::Ascending) => rows.sort_by(|a, b| number(a).total_cmp(&number(b))),
            (_, Order::Descending) => rows.sort_by(|a, b| number(b).total_cmp(&number(a))),
        }
        rows.truncate(selection.limit);
        Excerpt {
            total: self.rows.len(),
            matching,
            over_seconds: self.over.map(|over| over.as_secs_f64()),
            services: rows,
        }
    }
}

impl Row {
    /// Without what its frontends add.
    fn new(service: u32, key: FrontendKey, ports: &BTreeMap<u32, ServiceMeta>) -> Self {
        let meta = ports.get(&service);
        let port = meta.map_or(0, |meta| meta.port.get());
        let protocol = meta.map_or_else(String::new, |meta| protocol_name(meta.protocol));
        let service = port_of(ports, service);
        Self {
            words: format!("{service} {port}/{protocol}").to_lowercase(),
            service,
            port,
            protocol,
            frontend: SocketAddr::new(key.addr, key.port),
            frontends: 0,
            without_backend: 0,
            backends: 0,
            rates: Rates::default(),
        }
    }

    fn add(&mut self, key: FrontendKey, entry: &ServiceEntry) {
        self.frontends += 1;
        self.without_backend += usize::from(entry.slot_count == 0);
        self.words.push(' ');
        self.words += &SocketAddr::new(key.addr, key.port).to_string();
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{
        Port,
        flow::TCP,
        service::{BackendRef, Name},
    };
    use serde_json::{Value, json};

    use super::*;
    use crate::datapath::kernel::Member;

    /// Services with frontends and backends.
    #[derive(Default)]
    struct World {
        services: BTreeMap<FrontendKey, ServiceEntry>,
        ports: BTreeMap<u32, ServiceMeta>,
        members: BTreeMap<BackendRef, Member>,
    }

    impl World {
        fn service(&mut self, id: u32, name: &str, backends: u32) {
            let text = |text: &str| Name::new(text).expect("fits");
            let meta = ServiceMeta {
                namespace: text("shop"),
                name: text(name),
                port_name: text("http"),
                port: Port::from(80),
                protocol: TCP,
                pad: 0,
            };
            self.ports.insert(id, meta);
            for _ in 0..backends {
                let life = BackendRef {
                    id: self.members.len() as u32 + 1,
                    generation: 1,
                };
                let addr = SocketAddr::from(([10, 244, 0, 5], 3000));
                self.members.insert(life, Member { service: id, addr });
            }
        }

        fn frontend(&mut self, id: u32, addr: &str, kind: FrontendKind, slot_count: u32) {
            let addr: SocketAddr = addr.parse().expect("an address");
            let key = FrontendKey {
                addr: addr.ip(),
                port: addr.port(),
                protocol: TCP,
            };
            let entry = ServiceEntry {
                service: id,
                kind: kind as u8,
                slot_count,
                ..ServiceEntry::default()
            };
            self.services.insert(key, entry);
        }

        fn listing(&self, flows: &[(u32, u64)], past: Option<&Past>, now: Instant) -> Listing {
            let reading = Reading {
                ports: self.ports.clone(),
                members: self.members.clone(),
                services: totals(flows),
            };
            Listing::new(&self.services, &reading, past, now)
        }
    }

    fn totals(flows: &[(u32, u64)]) -> BTreeMap<u32, Totals> {
        let totals = |flows| Totals {
            flows,
            packets_in: 3 * flows,
            packets_out: 2 * flows,
            ..Totals::default()
        };
        flows
            .iter()
            .map(|(id, flows)| (*id, totals(*flows)))
            .collect()
    }

    fn shop() -> World {
        use FrontendKind::{Address, ClusterIp, NodePort};
        let mut world = World::default();
        world.service(1, "web", 2);
        world.frontend(1, "10.96.0.1:80", ClusterIp, 2);
        world.frontend(1, "10.96.0.1:0", Address, 2);
        world.frontend(1, "10.0.0.1:30080", NodePort, 0);
        world.service(2, "cart", 1);
        world.frontend(2, "[fd00::2]:80", ClusterIp, 1);
        world.service(3, "Mail", 3);
        world.frontend(3, "10.96.0.3:80", ClusterIp, 3);
        world
    }

    fn selection(query: &str) -> Selection {
        let mut query = Query::parse(query).expect("parameters");
        Selection::of(&mut query).expect("a selection")
    }

    fn told(listing: &Listing, query: &str) -> Value {
        serde_json::to_value(listing.select(&selection(query))).expect("JSON")
    }

    fn names(listing: &Listing, query: &str) -> Vec<String> {
        let selection = selection(query);
        let rows = listing.select(&selection).services.into_iter();
        rows.map(|row| row.service.name.clone()).collect()
    }

    #[test]
    fn a_row_tells_of_all_frontends() {
        let listing = shop().listing(&[], None, Instant::now());
        let document = told(&listing, "filter=web");
        assert_eq!(
            document,
            json!({"total": 3, "matching": 1, "over_seconds": null, "services": [{
                "namespace": "shop", "name": "web", "port_name": "http",
                "port": 80, "protocol": "TCP",
                "frontend": "10.96.0.1:80", "frontends": 2, "without_backend": 1,
                "backends": 2,
                "flows_per_second": null, "packets_per_second": null, "bytes_per_second": null,
            }]})
        );
    }

    #[test]
    fn rates_are_of_the_time_since_the_last_look() {
        let world = shop();
        let now = Instant::now();
        let until = now + Duration::from_secs(60);
        let past = Past::new(now, until, totals(&[(1, 10)]));
        let later = now + Duration::from_secs(4);
        let listing = world.listing(&[(1, 30), (2, 2)], Some(&past), later);
        let document = told(&listing, "sort=flows");
        let rows = &document["services"];
        for (row, flows, packets) in [(0, 5.0, 25.0), (1, 0.5, 2.5), (2, 0.0, 0.0)] {
            assert_eq!(rows[row]["flows_per_second"], flows, "{document}");
            assert_eq!(rows[row]["packets_per_second"], packets, "{document}");
        }
        assert_eq!(document["over_seconds"], 4.0);
        // Nobody has looked for a while.
        let later = until + PAST + Duration::from_secs(1);
        let listing = world.listing(&[(1, 30)], Some(&past), later);
        let document = told(&listing, "");
        assert_eq!(document["over_seconds"], Value::Null);
        assert_eq!(document["services"][0]["flows_per_second"], Value::Null);
    }

    #[test]
    fn rows_are_found_by_words_and_addresses() {
        let listing = shop().listing(&[], None, Instant::now());
        for (query, found) in [
            ("", &["Mail", "cart", "web"][..]),
            ("filter=MAIL", &["Mail"]),
            ("filter=shop/c", &["cart"]),
            ("filter=shop+web", &["web"]),
            ("filter=web+cart", &[]),
            ("filter=fd00::2", &["cart"]),
            ("filter=:30080", &["web"]),
            ("filter=80/tcp", &["Mail", "cart", "web"]),
        ] {
            assert_eq!(names(&listing, query), found, "{query}");
        }
    }

    #[test]
    fn rows_come_in_the_order_that_is_asked_for() {
        let now = Instant::now();
        let past = Past::new(now, now, BTreeMap::new());
        let later = now + Duration::from_secs(1);
        let listing = shop().listing(&[(2, 7), (3, 1)], Some(&past), later);
        for (query, found) in [
            ("sort=name", ["Mail", "cart", "web"]),
            ("sort=name&order=desc", ["web", "cart", "Mail"]),
            ("sort=backends", ["Mail", "web", "cart"]),
            ("sort=backends&order=asc", ["cart", "web", "Mail"]),
            ("sort=flows", ["cart", "Mail", "web"]),
            ("sort=packets&order=asc", ["web", "Mail", "cart"]),
        ] {
            assert_eq!(names(&listing, query), found, "{query}");
        }
    }

    #[test]
    fn of_many_rows_some_are_told_and_the_rest_counted() {
        let mut world = World::default();
        for id in 0..10_000_u32 {
            world.service(id, &format!("service-{id:05}"), 0);
            let addr = format!("10.96.{}.{}:80", id / 250, id % 250);
            world.frontend(id, &addr, FrontendKind::ClusterIp, 0);
        }
        let listing = world.listing(&[], None, Instant::now());
        let document = told(&listing, "filter=service-000&limit=10");
        assert_eq!(document["total"], 10_000);
        assert_eq!(document["matching"], 100);
        assert_eq!(document["services"].as_array().map(Vec::len), Some(10));
        let document = told(&listing, "");
        assert_eq!(document["services"].as_array().map(Vec::len), Some(ROWS));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (query, part) in [
            ("sort=colour", "sort: wanted is one of name, backends"),
            ("order=up", "order: wanted is one of asc, desc"),
            ("limit=0", "limit: wanted is a number from 1 to 500"),
            ("limit=501", "limit: wanted"),
            ("limit=many", "limit: wanted"),
        ] {
            let mut query = Query::parse(query).expect("parameters");
            let refusal = Selection::of(&mut query).expect_err("refused");
            assert!(refusal.sentence.contains(part), "{refusal:?}");
        }
    }
}
