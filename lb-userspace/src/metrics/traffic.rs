//! What flows through Services and backends.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use clap::ValueEnum;
use lb_common::service::{BackendRef, ServiceMeta};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};
use tracing::warn;

use crate::{
    commands::protocol_name,
    datapath::{
        MapError, Maps as _,
        kernel::{KernelMaps, Member},
        load::LoadError,
        pins::Pins,
        traffic::{History, Totals, TrafficTable},
    },
};

/// How much is told of each Service: the number of time series follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Detail {
    /// Nothing
    Off,
    /// Six series for each Service port
    Services,
    /// And six for each backend of each
    Backends,
}

/// Reads what has flowed when it is asked, for all who ask in an agent.
pub struct ServiceTraffic {
    maps: KernelMaps,
    table: TrafficTable,
    history: Mutex<History>,
}

/// What has flowed since the agent has started, and through whom.
pub(crate) struct Reading {
    /// What Service ports are called, by id.
    pub(crate) ports: BTreeMap<u32, ServiceMeta>,
    pub(crate) members: BTreeMap<BackendRef, Member>,
    /// By id of the Service port.
    pub(crate) services: BTreeMap<u32, Totals>,
}

/// All that one answer tells.
struct Snapshot {
    reading: Reading,
    backends: BTreeMap<BackendRef, Totals>,
    active: BTreeMap<BackendRef, i64>,
    /// Of flows that have outlived their backends, and of backends without
    /// counters of their own.
    rest: Totals,
}

impl ServiceTraffic {
    /// Counts of Services begin now, as those of every process that starts; those
    /// of backends are the kernel's.
    pub fn open(pins: &Pins) -> Result<Self, LoadError> {
        let this = Self {
            maps: KernelMaps::open(pins)?,
            table: TrafficTable::open(pins)?,
            history: Mutex::default(),
        };
        if let Err(error) = this.read() {
            warn!(%error, "what has flowed through backends is not known");
        }
        this.history().retain_services(|_| false);
        Ok(this)
    }

    pub(crate) fn read(&self) -> Result<Reading, MapError> {
        let members = self.maps.members()?;
        let ports = self.maps.metas()?;
        let mut history = self.history();
        history.update(&members, |backend| self.table.read(backend))?;
        history.retain_services(|service| ports.contains_key(&service));
        Ok(Reading {
            services: history.services().clone(),
            ports,
            members,
        })
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn snapshot(&self) -> Result<Snapshot, MapError> {
        let mut active = BTreeMap::new();
        for flow in self.maps.flows()? {
            *active.entry(flow.life).or_default() += 1;
        }
        let reading = self.read()?;
        let history = self.history();
        Ok(Snapshot {
            backends: history.backends().collect(),
            reading,
            active,
            rest: self.table.rest()?,
        })
    }
}

/// Tells it on `/metrics`, in some detail.
pub(super) struct Told {
    pub(super) traffic: Arc<ServiceTraffic>,
    pub(super) detail: Detail,
}

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Told").finish_non_exhaustive()
    }
}

impl Collector for Told {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        if self.detail == Detail::Off {
            return Ok(());
        }
        match self.traffic.snapshot() {
            Ok(snapshot) => snapshot.encode(&mut encoder, self.detail),
            Err(error) => {
                warn!(%error, "metrics without traffic of Services");
                Ok(())
            }
        }
    }
}

/// Labels of one time series.
type Labels = Vec<(&'static str, String)>;

impl Snapshot {
    fn encode(&self, encoder: &mut DescriptorEncoder<'_>, detail: Detail) -> fmt::Result {
        let Reading {
            ports,
            members,
            services,
        } = &self.reading;
        let services: Vec<_> = ports
            .iter()
            .map(|(id, port)| (labels(port), services.get(id).copied()))
            .map(|(labels, totals)| (labels, totals.unwrap_or_default()))
            .collect();
        encode_totals(encoder, "service", &services)?;
        encode_gauge(encoder, "service_active_flows", &self.active_by_service())?;
        let rest = [(Labels::new(), self.rest)];
        encode_totals(encoder, "unattributed", &rest)?;
        if detail != Detail::Backends {
            return Ok(());
        }
        let of = |backend: &BackendRef| {
            let member = members.get(backend)?;
            Some(backend_labels(ports.get(&member.service)?, member.addr))
        };
        let backends: Vec<_> = self
            .backends
            .iter()
            .filter_map(|(backend, totals)| Some((of(backend)?, *totals)))
            .collect();
        encode_totals(encoder, "backend", &backends)?;
        let active: Vec<_> = members
            .keys()
            .filter_map(|backend| {
                let count = self.active.get(backend).copied();
                Some((of(backend)?, count.unwrap_or_default()))
            })
            .collect();
        encode_gauge(encoder, "backend_active_flows", &active)
    }

    fn active_by_service(&self) -> Vec<(Labels, i64)> {
        let Reading { ports, members, .. } = &self.reading;
        let mut counts: BTreeMap<u32, i64> = ports.keys().map(|id| (*id, 0)).collect();
        for (backend, count) in &self.active {
            let member = members.get(backend);
            if let Some(sum) = member.and_then(|member| counts.get_mut(&member.service)) {
                *sum += count;
            }
        }
        let named = counts.into_iter();
        named
            .filter_map(|(id, count)| Some((labels(ports.get(&id)?), count)))
            .collect()
    }
}

fn labels(port: &ServiceMeta) -> Labels {
    vec![
        ("namespace", port.namespace.as_str().to_owned()),
        ("service", port.name.as_str().to_owned()),
        ("port", port.port.get().to_string()),
        ("port_name", port.port_name.as_str().to_owned()),
        ("protocol", protocol_name(port.protocol)),
    ]
}

fn backend_labels(port: &ServiceMeta, addr: SocketAddr) -> Labels {
    let mut labels = labels(port);
    labels.push(("backend", addr.to_string()));
    labels
}

/// Counters of flows, packets and bytes, whose names begin with `of`.
fn encode_totals(
    encoder: &mut DescriptorEncoder<'_>,
    of: &str,
    rows: &[(Labels, Totals)],
) -> fmt::Result {
    /// A direction, if it has one, and the number.
    type Value = (Option<&'static str>, fn(&Totals) -> u64);
    type Kind = (&'static str, &'static str, Option<Unit>, &'static [Value]);
    const FLOWS: [Value; 1] = [(None, |totals| totals.flows)];
    const PACKETS: [Value; 2] = [
        (Some("in"), |totals| totals.packets_in),
        (Some("out"), |totals| totals.packets_out),
    ];
    const BYTES: [Value; 2] = [
        (Some("in"), |totals| totals.bytes_in),
        (Some("out"), |totals| totals.bytes_out),
    ];
    let kinds: [Kind; 3] = [
        (
            "flows",
            "Flows opened, at sockets and by packets",
            None,
            &FLOWS,
        ),
        (
            "packets",
            "Packets translated, to backends (in) and from them (out); none of what was translated at a socket",
            None,
            &PACKETS,
        ),
        (
            "traffic",
            "Bytes of the frames translated, likewise",
            Some(Unit::Bytes),
            &BYTES,
        ),
    ];
    for (kind, help, unit, values) in kinds {
        let name = format!("{of}_{kind}");
        let unit = unit.as_ref();
        let mut family = encoder.encode_descriptor(&name, help, unit, MetricType::Counter)?;
        for (labels, totals) in rows {
            for (direction, value) in values {
                let mut labels = labels.clone();
                labels.extend(direction.map(|direction| ("direction", direction.to_owned())));
                let metric = family.encode_family(&labels)?;
                ConstCounter::new(value(totals)).encode(metric)?;
            }
        }
    }
    Ok(())
}

fn encode_gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    rows: &[(Labels, i64)],
) -> fmt::Result {
    let help = "Flows that packets are translated by now; none of what was translated at a socket";
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, count) in rows {
        let metric = family.encode_family(labels)?;
        ConstGauge::new(*count).encode(metric)?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use lb_common::{Port, flow::TCP, service::Name};
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::datapath::traffic::tests::{backend, member};

    const fn flows(flows: u64) -> Totals {
        Totals {
            flows,
            packets_in: 2 * flows,
            bytes_in: 300 * flows,
            packets_out: 0,
            bytes_out: 0,
        }
    }

    #[derive(Debug)]
    pub(in crate::metrics) struct Fixed(pub(in crate::metrics) Detail);

    impl Collector for Fixed {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
            let port = ServiceMeta {
                namespace: Name::new("default").expect("fits"),
                name: Name::new("web").expect("fits"),
                port_name: Name::new("http").expect("fits"),
                port: Port::from(80),
                protocol: TCP,
                pad: 0,
            };
            let reading = Reading {
                ports: BTreeMap::from([(7, port)]),
                members: BTreeMap::from([(backend(1), member(7))]),
                services: BTreeMap::from([(7, flows(4))]),
            };
            let snapshot = Snapshot {
                reading,
                backends: BTreeMap::from([(backend(1), flows(3))]),
                active: BTreeMap::from([(backend(1), 2)]),
                rest: Totals::default(),
            };
            snapshot.encode(&mut encoder, self.0)
        }
    }

    fn text(detail: Detail) -> String {
        let mut registry = Registry::with_prefix("klb");
        registry.register_collector(Box::new(Fixed(detail)));
        super::super::Metrics { registry }
            .encode()
            .expect("encoded")
    }

    #[test]
    fn services_and_backends_are_named_as_far_as_is_asked() {
        const PORT: &str = "namespace=\"default\",service=\"web\",port=\"80\",port_name=\"http\",\
                            protocol=\"TCP\"";
        let all = text(Detail::Backends);
        for line in [
            format!("klb_service_flows_total{{{PORT}}} 4"),
            format!("klb_service_packets_total{{{PORT},direction=\"in\"}} 8"),
            format!("klb_service_traffic_bytes_total{{{PORT},direction=\"in\"}} 1200"),
            format!("klb_service_active_flows{{{PORT}}} 2"),
            format!("klb_backend_flows_total{{{PORT},backend=\"10.244.0.5:3000\"}} 3"),
            format!("klb_backend_active_flows{{{PORT},backend=\"10.244.0.5:3000\"}} 2"),
        ] {
            assert!(all.contains(&line), "{line}: {all}");
        }
        assert!(!text(Detail::Services).contains("klb_backend_"));
    }
}
