//! What flows now: the difference of two readings.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use lb_common::{reason::Effect, service::BackendRef};
use serde::Serialize;

use super::meter::{FlowCount, FlowCounts, Reading};
use crate::{
    args::Sort,
    commands::{
        PortId, effect_name, protocol_name,
        status::counters::{self, per_second},
    },
    datapath::traffic::Totals,
};

/// Of a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Rates {
    pub(super) connections: f64,
    pub(super) packets_in: f64,
    pub(super) packets_out: f64,
    pub(super) bytes_in: f64,
    pub(super) bytes_out: f64,
}

impl Rates {
    /// A counter that went back has counted nothing.
    fn between(before: Totals, now: Totals, time: Duration) -> Self {
        let more = now - before;
        let rate = |count| per_second(count, time);
        Self {
            connections: rate(more.flows),
            packets_in: rate(more.packets_in),
            packets_out: rate(more.packets_out),
            bytes_in: rate(more.bytes_in),
            bytes_out: rate(more.bytes_out),
        }
    }

    /// Both ways.
    pub(super) fn packets(&self) -> f64 {
        self.packets_in + self.packets_out
    }

    /// Both ways.
    pub(super) fn bytes(&self) -> f64 {
        self.bytes_in + self.bytes_out
    }
}

/// What rows are sorted by, of a Service or a backend.
#[expect(clippy::cast_precision_loss, reason = "no table has 2^53 flows")]
pub(super) fn figure(sort: Sort, rates: &Rates, flows: FlowCount) -> f64 {
    match sort {
        Sort::Connections => rates.connections,
        Sort::Packets => rates.packets(),
        Sort::Bytes => rates.bytes(),
        Sort::Flows => flows.active as f64,
    }
}

/// A Service port.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct ServiceRow {
    /// Its number in the maps, by which it is found again.
    #[serde(skip)]
    pub(super) id: u32,
    #[serde(flatten)]
    pub(super) port: PortId,
    pub(super) protocol: String,
    pub(super) per_second: Rates,
    pub(super) flows: FlowCount,
    pub(super) backends: Vec<BackendRow>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct BackendRow {
    #[serde(skip)]
    pub(super) life: BackendRef,
    pub(super) address: std::net::IpAddr,
    pub(super) port: u16,
    /// Its part of what the Service has of that by which rows are sorted; 0 if
    /// nobody has any.
    pub(super) share: f64,
    /// `null` for one that has no counters of its own.
    pub(super) per_second: Option<Rates>,
    pub(super) flows: FlowCount,
}

impl BackendRow {
    pub(super) const fn addr(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }

    pub(super) fn figure(&self, sort: Sort) -> f64 {
        figure(sort, &self.per_second.unwrap_or_default(), self.flows)
    }
}

impl ServiceRow {
    pub(super) fn figure(&self, sort: Sort) -> f64 {
        figure(sort, &self.per_second, self.flows)
    }
}

/// Everything that one look tells.
#[derive(Clone, Debug, Default)]
pub(super) struct Picture {
    pub(super) services: Vec<ServiceRow>,
    /// Of flows that have outlived their backends, and of backends without
    /// counters of their own.
    pub(super) unattributed: Rates,
    /// What was refused, dropped or answered instead of translated.
    pub(super) refusals: Vec<counters::Row>,
}

impl Picture {
    pub(super) fn between(before: &Reading, now: &Reading, flows: &FlowCounts) -> Self {
        let time = now.at.saturating_duration_since(before.at);
        let renamed = before.renamed(&now.ports);
        let mut backends = backends_by_service(before, now, flows, time);
        let services = now.ports.iter().map(|(&id, meta)| {
            let was_another = renamed.contains(&id);
            let before = before.services.get(&id).filter(|_| !was_another);
            let total = now.services.get(&id).copied().unwrap_or_default();
            ServiceRow {
                id,
                port: PortId::from(meta),
                protocol: protocol_name(meta.protocol),
                per_second: Rates::between(before.copied().unwrap_or_default(), total, time),
                flows: flows.services.get(&id).copied().unwrap_or_default(),
                backends: backends.remove(&id).unwrap_or_default(),
            }
        });
        Self {
            services: services.collect(),
            unattributed: Rates::between(before.rest, now.rest, time),
            refusals: refusals(before, now, time),
        }
    }

    /// Leaves those that are asked for.
    pub(super) fn select(&mut self, namespace: Option<&str>, service: Option<&str>) {
        self.services.retain(|row| row.port.is(namespace, service));
    }

    /// The busiest come first; who is as busy as another, by name.
    pub(super) fn sort(&mut self, sort: Sort) {
        for service in &mut self.services {
            let sum: f64 = service.backends.iter().map(|row| row.figure(sort)).sum();
            for backend in &mut service.backends {
                backend.share = if sum > 0.0 {
                    backend.figure(sort) / sum
                } else {
                    0.0
                };
            }
            let backends = &mut service.backends;
            backends.sort_by(|a, b| {
                let by_figure = b.figure(sort).total_cmp(&a.figure(sort));
                by_figure.then_with(|| a.addr().cmp(&b.addr()))
            });
        }
        self.services.sort_by(|a, b| {
            let by_figure = b.figure(sort).total_cmp(&a.figure(sort));
            by_figure.then_with(|| (&a.port, &a.protocol).cmp(&(&b.port, &b.protocol)))
        });
    }

    /// Of all Services.
    pub(super) fn total(&self) -> (Rates, FlowCount) {
        let mut sum = (Rates::default(), FlowCount::default());
        for ServiceRow {
            per_second, flows, ..
        } in &self.services
        {
            let (rates, count) = &mut sum;
            rates.connections += per_second.connections;
            rates.packets_in += per_second.packets_in;
            rates.packets_out += per_second.packets_out;
            rates.bytes_in += per_second.bytes_in;
            rates.bytes_out += per_second.bytes_out;
            count.active += flows.active;
            count.reset += flows.reset;
            count.unanswered += flows.unanswered;
        }
        sum
    }
}

fn backends_by_service(
    before: &Reading,
    now: &Reading,
    flows: &FlowCounts,
    time: Duration,
) -> BTreeMap<u32, Vec<BackendRow>> {
    let mut services = BTreeMap::<u32, Vec<BackendRow>>::new();
    for (life, member) in &now.members {
        let total = now.backends.get(life);
        // One that was not there before has counted since it came.
        let earlier = before.backends.get(life).copied().unwrap_or_default();
        services
            .entry(member.service)
            .or_default()
            .push(BackendRow {
                life: *life,
                address: member.addr.ip(),
                port: member.addr.port(),
                share: 0.0,
                per_second: total.map(|total| Rates::between(earlier, *total, time)),
                flows: flows.backends.get(life).copied().unwrap_or_default(),
            });
    }
    services
}

/// The most frequent come first.
fn refusals(before: &Reading, now: &Reading, time: Duration) -> Vec<counters::Row> {
    const REFUSE: &str = effect_name(Effect::Refuse);
    let mut rows = counters::growing(&before.counters, &now.counters, time);
    rows.retain(|row| row.is_refusal && row.per_second.is_some_and(|rate| rate > 0.0));
    rows.sort_by(|a, b| {
        let by_effect = (a.effect != REFUSE).cmp(&(b.effect != REFUSE));
        let rate = |row: &counters::Row| row.per_second.unwrap_or_default();
        by_effect.then_with(|| rate(b).total_cmp(&rate(a)))
    });
    rows
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Instant;

    use lb_common::{
        Hook, Port, Reason,
        flow::TCP,
        service::{Name, ServiceMeta},
    };

    use super::*;
    use crate::datapath::kernel::{Counter, Member};

    fn meta(name: &str) -> ServiceMeta {
        ServiceMeta {
            namespace: Name::new("default").expect("fits"),
            name: Name::new(name).expect("fits"),
            port_name: Name::new("http").expect("fits"),
            port: Port::from(80),
            protocol: TCP,
            pad: 0,
        }
    }

    pub(in crate::commands::top) const fn life(id: u32) -> BackendRef {
        BackendRef { id, generation: 1 }
    }

    fn flows(flows: u64) -> Totals {
        Totals {
            flows,
            packets_in: 6 * flows,
            packets_out: 4 * flows,
            bytes_in: 1000 * flows,
            bytes_out: 9000 * flows,
        }
    }

    /// Two seconds after `began`: names by number, and of each backend whose it
    /// is and how many flows it has had.
    fn reading(at: Instant, ports: &[(u32, &str)], backends: &[(u32, u32, u64)]) -> Reading {
        let mut services = BTreeMap::<u32, Totals>::new();
        for (_, service, count) in backends {
            *services.entry(*service).or_default() += flows(*count);
        }
        let member = |(id, service, _): &(u32, u32, u64)| {
            let addr = SocketAddr::from(([10, 244, 0, *id as u8], 3000));
            let service = *service;
            (life(*id), Member { service, addr })
        };
        let totals = |(id, _, count): &(u32, u32, u64)| (life(*id), flows(*count));
        Reading {
            at,
            ports: ports.iter().map(|(id, name)| (*id, meta(name))).collect(),
            members: backends.iter().map(member).collect(),
            services,
            backends: backends.iter().map(totals).collect(),
            rest: Totals::default(),
            counters: Vec::new(),
        }
    }

    fn between(before: impl Fn(Instant) -> Reading, now: impl Fn(Instant) -> Reading) -> Picture {
        let began = Instant::now();
        let (before, now) = (before(began), now(began + Duration::from_secs(2)));
        let mut picture = Picture::between(&before, &now, &FlowCounts::default());
        picture.sort(Sort::Connections);
        picture
    }

    fn is(figure: f64, expected: f64) -> bool {
        (figure - expected).abs() < f64::EPSILON
    }

    fn connections(picture: &Picture) -> Vec<(&str, f64)> {
        let rows = picture.services.iter();
        rows.map(|row| (row.port.name.as_str(), row.per_second.connections))
            .collect()
    }

    #[test]
    fn rates_are_what_came_between_two_readings() {
        let ports = [(1, "web"), (2, "dns")];
        let picture = between(
            |at| reading(at, &ports, &[(5, 1, 100), (6, 1, 0), (7, 2, 3)]),
            |at| reading(at, &ports, &[(5, 1, 130), (6, 1, 10), (7, 2, 3)]),
        );
        assert_eq!(connections(&picture), [("web", 20.0), ("dns", 0.0)]);
        let web = &picture.services[0];
        assert_eq!(
            (web.per_second.packets_in, web.per_second.packets()),
            (120.0, 200.0)
        );
        assert!(is(web.per_second.bytes(), 200_000.0));
        let shares: Vec<_> = web.backends.iter().map(|row| row.share).collect();
        assert_eq!(shares, [0.75, 0.25]);
        assert!(is(picture.services[1].backends[0].share, 0.0), "of nothing");
        assert!(is(picture.total().0.connections, 20.0));
    }

    #[test]
    fn counters_that_go_back_have_counted_nothing() {
        let ports = [(1, "web")];
        let picture = between(
            |at| reading(at, &ports, &[(5, 1, 100)]),
            |at| reading(at, &ports, &[(5, 1, 7)]),
        );
        assert_eq!(connections(&picture), [("web", 0.0)]);
        let rates = picture.services[0].backends[0].per_second;
        assert_eq!(rates, Some(Rates::default()));
    }

    #[test]
    fn a_number_that_is_anothers_now_has_nothing_of_the_first_ones() {
        let picture = between(
            |at| reading(at, &[(1, "old")], &[(5, 1, 100)]),
            |at| reading(at, &[(1, "new")], &[(6, 1, 8)]),
        );
        assert_eq!(connections(&picture), [("new", 4.0)]);
        // A backend that came meanwhile has counted since.
        let backend = &picture.services[0].backends[0];
        assert!(is(backend.figure(Sort::Connections), 4.0));
    }

    #[test]
    fn one_without_counters_of_its_own_has_no_rates_but_flows() {
        let began = Instant::now();
        let reading = |seconds| {
            let at = began + Duration::from_secs(seconds);
            let mut reading = reading(at, &[(1, "web")], &[(5, 1, 100), (6, 1, 100)]);
            reading.backends.remove(&life(6));
            reading
        };
        let count = FlowCount {
            active: 3,
            ..FlowCount::default()
        };
        let flows = FlowCounts {
            services: BTreeMap::from([(1, count)]),
            backends: BTreeMap::from([(life(6), count)]),
        };
        let mut picture = Picture::between(&reading(0), &reading(1), &flows);
        picture.sort(Sort::Flows);
        let [first, second] = &picture.services[0].backends[..] else {
            panic!("{picture:?}");
        };
        assert_eq!(
            (first.life, first.per_second, first.share),
            (life(6), None, 1.0)
        );
        assert_eq!(second.per_second, Some(Rates::default()));
    }

    #[test]
    fn who_is_as_busy_is_sorted_by_name_whatever_was_before() {
        let ports = [(1, "c"), (2, "a"), (3, "d"), (4, "b")];
        let mut picture = between(
            |at| reading(at, &ports, &[(5, 3, 0)]),
            |at| reading(at, &ports, &[(5, 3, 1)]),
        );
        let names = |picture: &Picture| -> String {
            let rows = picture.services.iter();
            rows.map(|row| row.port.name.as_str()).collect()
        };
        assert_eq!(names(&picture), "dabc");
        picture.services.reverse();
        for sort in [Sort::Packets, Sort::Bytes, Sort::Connections] {
            picture.sort(sort);
            assert_eq!(names(&picture), "dabc", "{sort:?}");
        }
        picture.sort(Sort::Flows);
        assert_eq!(names(&picture), "abcd");
    }

    #[test]
    fn what_is_refused_now_is_told_and_nothing_else() {
        let counters = |counts: [u64; 4]| {
            let reasons = [
                Reason::NewFlow,
                Reason::NoBackend,
                Reason::SourceRange,
                Reason::BadSlot,
            ];
            let counters = reasons
                .into_iter()
                .zip(counts)
                .map(|(reason, count)| Counter {
                    hook: Hook::TcIngress,
                    reason,
                    count,
                });
            counters.collect()
        };
        let at = |at, counts| Reading {
            counters: counters(counts),
            ..reading(at, &[], &[])
        };
        let picture = between(|t| at(t, [0, 0, 0, 9]), |t| at(t, [50, 90, 3, 9]));
        let told = picture
            .refusals
            .iter()
            .map(|row| (row.reason, row.per_second));
        let expected = [("source_range", Some(1.5)), ("no_backend", Some(45.0))];
        assert_eq!(told.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn services_are_selected_by_namespace_and_name() {
        let ports = [(1, "web"), (2, "dns")];
        let picture = between(|at| reading(at, &ports, &[]), |at| reading(at, &ports, &[]));
        for (namespace, service, count) in [
            (None, None, 2),
            (Some("default"), None, 2),
            (Some("other"), None, 0),
            (None, Some("web"), 1),
            (Some("default"), Some("web:http"), 1),
            (None, Some("we"), 0),
        ] {
            let mut picture = picture.clone();
            picture.select(namespace, service);
            assert_eq!(picture.services.len(), count, "{namespace:?} {service:?}");
        }
    }
}
