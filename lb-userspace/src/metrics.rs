//! What `/metrics` tells, read from the maps when it is asked.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, text::encode},
    metrics::{MetricType, counter::ConstCounter},
    registry::Registry,
};
use tracing::warn;

use crate::datapath::kernel::{Counter, Counters};

/// The metrics of one pin folder.
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    /// `Content-Type` of [`Self::encode`].
    pub const CONTENT_TYPE: &'static str =
        "application/openmetrics-text; version=1.0.0; charset=utf-8";

    pub fn new(counters: Counters) -> Self {
        let mut registry = Registry::with_prefix("klb");
        registry.register_collector(Box::new(Outcomes { counters }));
        Self { registry }
    }

    /// The metrics in the text format.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
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
