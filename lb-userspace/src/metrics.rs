//! What `/metrics` tells, read from the maps when it is asked.

mod api;
mod control;
#[cfg(test)]
mod docs;
mod kept;
mod probes;
mod traffic;

use std::{collections::BTreeMap, fmt, sync::Arc, time::Instant};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};
use tracing::warn;

use self::kept::Kept;
pub(crate) use self::traffic::Reading;
pub use self::{
    api::ApiMetrics,
    control::{ControlMetrics, Repairs},
    probes::ProbeMetrics,
    traffic::{Detail, ServiceTraffic},
};
use crate::{
    datapath::{
        MapError,
        inspect::{self, DeviceHooks},
        kernel::{Counter, Counters, Fill, KernelMaps},
        load::LoadError,
        pins::Pins,
    },
    k8s::events::Events,
};

/// The metrics of one pin folder.
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    /// `Content-Type` of [`Self::encode`].
    pub const CONTENT_TYPE: &'static str =
        "application/openmetrics-text; version=1.0.0; charset=utf-8";

    /// Those of a pin folder, with so much detail of the traffic of its Services;
    /// the parts are for those who have something to count.
    pub fn new(
        pins: &Pins,
        traffic: Arc<ServiceTraffic>,
        detail: Detail,
    ) -> Result<(Self, Parts), LoadError> {
        let counters = Counters::open(pins)?;
        let maps = KernelMaps::open(pins)?;
        let pins = pins.clone();
        let mut registry = Registry::default();
        let parts = Parts::register(&mut registry);
        let own = registry.sub_registry_with_prefix("klb");
        own.register_collector(Box::new(Outcomes { counters }));
        let evicting = Kept::default();
        own.register_collector(Box::new(State {
            maps,
            pins,
            evicting,
        }));
        own.register_collector(Box::new(traffic::Told { traffic, detail }));
        Ok((Self { registry }, parts))
    }

    /// Tells of events, too, which come to be after the metrics.
    pub fn tell_of(&mut self, events: Events) {
        let own = self.registry.sub_registry_with_prefix("klb");
        own.register_collector(Box::new(Told { events }));
    }

    /// Those of a registry alone.
    #[cfg(test)]
    pub(crate) const fn of(registry: Registry) -> Self {
        Self { registry }
    }

    /// The metrics in the text format. Reads whole maps.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// What others count.
#[derive(Clone, Debug)]
pub struct Parts {
    pub control: ControlMetrics,
    pub api: ApiMetrics,
    pub probes: ProbeMetrics,
}

impl Parts {
    /// Makes them part of what `/metrics` tells.
    fn register(registry: &mut Registry) -> Self {
        Self {
            control: ControlMetrics::register(registry),
            api: ApiMetrics::register(registry),
            probes: ProbeMetrics::register(registry),
        }
    }
}

/// What the kernel holds when it is asked.
struct State {
    maps: KernelMaps,
    pins: Pins,
    /// Fill of maps with many entries.
    evicting: Kept<Vec<Fill>>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").finish_non_exhaustive()
    }
}

impl Collector for State {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        match self.fill() {
            Ok(fill) => encode_fill(&mut encoder, &fill)?,
            Err(error) => warn!(%error, "metrics without maps"),
        }
        encode_sockets(&mut encoder, &inspect::sockets(&self.pins))?;
        match inspect::devices(&self.pins) {
            Ok(devices) => encode_devices(&mut encoder, &devices),
            Err(error) => {
                warn!(%error, "metrics without devices");
                Ok(())
            }
        }
    }
}

impl State {
    fn fill(&self) -> Result<Vec<Fill>, MapError> {
        let mut fill = self.maps.fill_of_services()?;
        let evicting = || self.maps.fill_of_evicting();
        fill.append(&mut self.evicting.get(Instant::now(), evicting)?);
        Ok(fill)
    }
}

/// What operators were told, or were not.
#[derive(Debug)]
struct Told {
    events: Events,
}

impl Collector for Told {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        encode_events(&mut encoder, self.events.dropped())
    }
}

fn encode_events(encoder: &mut DescriptorEncoder<'_>, dropped: u64) -> Result<(), fmt::Error> {
    let help = "Events that reached nobody";
    let family = encoder.encode_descriptor("events_dropped", help, None, MetricType::Counter)?;
    ConstCounter::new(dropped).encode(family)
}

fn encode_sockets(encoder: &mut DescriptorEncoder<'_>, hooks: &[String]) -> Result<(), fmt::Error> {
    let help = "Hooks of sockets that a program is attached to";
    let mut family =
        encoder.encode_descriptor("attached_socket_hooks", help, None, MetricType::Gauge)?;
    for hook in hooks {
        let labels = [("hook", hook.as_str())];
        let metric = family.encode_family(&labels)?;
        ConstGauge::new(1_i64).encode(metric)?;
    }
    Ok(())
}

fn encode_fill(encoder: &mut DescriptorEncoder<'_>, fill: &[Fill]) -> Result<(), fmt::Error> {
    type Value = fn(&Fill) -> i64;
    let gauges: [(_, _, Value); 2] = [
        ("map_entries", "Entries in use, by map", |fill| {
            i64::try_from(fill.entries).unwrap_or(i64::MAX)
        }),
        ("map_capacity", "Entries that a map has room for", |fill| {
            fill.max_entries.into()
        }),
    ];
    for (name, help, value) in gauges {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for fill in fill {
            let labels = [("map", fill.map)];
            let metric = family.encode_family(&labels)?;
            ConstGauge::new(value(fill)).encode(metric)?;
        }
    }
    Ok(())
}

fn encode_devices(
    encoder: &mut DescriptorEncoder<'_>,
    devices: &[DeviceHooks],
) -> Result<(), fmt::Error> {
    let mut counts = BTreeMap::<[(&str, &str); 2], i64>::new();
    for device in devices {
        let hooks = [
            ("xdp", device.xdp),
            ("tc_ingress", device.tc_ingress),
            ("tc_egress", device.tc_egress),
        ];
        for (hook, how) in hooks {
            if let Some(how) = how {
                *counts.entry([("hook", hook), ("how", how)]).or_default() += 1;
            }
        }
    }
    let help = "Devices that a program is attached to, by hook and way";
    let mut family =
        encoder.encode_descriptor("attached_devices", help, None, MetricType::Gauge)?;
    for (labels, count) in counts {
        let metric = family.encode_family(&labels)?;
        ConstGauge::new(count).encode(metric)?;
    }
    Ok(())
}

/// The counters by hook and reason.
struct Outcomes {
    counters: Counters,
}

impl fmt::Debug for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outcomes").finish_non_exhaustive()
    }
}

impl Collector for Outcomes {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        match self.counters.read() {
            Ok(counters) => encode_outcomes(encoder, &counters),
            Err(error) => {
                warn!(%error, "metrics without counters");
                Ok(())
            }
        }
    }
}

fn encode_outcomes(
    mut encoder: DescriptorEncoder<'_>,
    counters: &[Counter],
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(
        "outcomes",
        "Packets, or calls at sockets, by hook and by what became of them",
        None,
        MetricType::Counter,
    )?;
    for counter in counters {
        let labels = [
            ("hook", counter.hook.name()),
            ("reason", counter.reason.name()),
        ];
        let metric = family.encode_family(&labels)?;
        ConstCounter::new(counter.count).encode(metric)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use lb_common::{Hook, Reason};

    use super::*;

    #[derive(Debug)]
    struct Fixed(Vec<Counter>);

    impl Collector for Fixed {
        fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
            encode_outcomes(encoder, &self.0)
        }
    }

    #[test]
    fn maps_and_devices_are_told_as_they_are() {
        #[derive(Debug)]
        struct Fixed(Vec<Fill>, Vec<DeviceHooks>);
        impl Collector for Fixed {
            fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
                encode_fill(&mut encoder, &self.0)?;
                encode_devices(&mut encoder, &self.1)
            }
        }
        let fill = Fill {
            map: "klb_svc4",
            entries: 3,
            max_entries: 10,
        };
        let device = |index, xdp| DeviceHooks {
            index,
            name: None,
            role: None,
            xdp,
            tc_ingress: Some("tcx"),
            tc_egress: None,
        };
        let devices = vec![device(1, Some("native")), device(2, None)];
        let mut registry = Registry::with_prefix("klb");
        registry.register_collector(Box::new(Fixed(vec![fill], devices)));
        let text = Metrics { registry }.encode().expect("encoded");
        for line in [
            "klb_map_entries{map=\"klb_svc4\"} 3",
            "klb_map_capacity{map=\"klb_svc4\"} 10",
            "klb_attached_devices{hook=\"xdp\",how=\"native\"} 1",
            "klb_attached_devices{hook=\"tc_ingress\",how=\"tcx\"} 2",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(!text.contains("tc_egress"), "{text}");
    }

    #[test]
    fn outcomes_are_labelled_by_hook_and_reason() {
        let mut registry = Registry::with_prefix("klb");
        registry.register_collector(Box::new(Fixed(vec![Counter {
            hook: Hook::Xdp,
            reason: Reason::NewFlow,
            count: 7,
        }])));
        let text = Metrics { registry }.encode().expect("encoded");
        let line = "klb_outcomes_total{hook=\"xdp\",reason=\"new_flow\"} 7";
        assert!(text.contains(line), "{text}");
    }
}
