//! What goes on between the agent and the API server.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::model::Kind;

/// Copies count together.
#[derive(Clone, Debug, Default)]
pub struct ApiMetrics {
    errors: Family<OfKind, Counter>,
    lists: Family<OfKind, Counter>,
    objects: Family<OfKind, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: String,
}

impl From<Kind> for OfKind {
    fn from(kind: Kind) -> Self {
        Self {
            kind: kind.to_string(),
        }
    }
}

impl ApiMetrics {
    /// Makes them part of what `/metrics` tells.
    pub fn register(registry: &mut Registry) -> Self {
        let this = Self::default();
        let own = registry.sub_registry_with_prefix("klb");
        own.register(
            "api_errors",
            "Failures to list or follow objects of a kind",
            this.errors.clone(),
        );
        own.register(
            "api_lists",
            "Lists of objects of a kind that were read to their end",
            this.lists.clone(),
        );
        own.register(
            "api_objects",
            "Objects of a kind that are followed",
            this.objects.clone(),
        );
        this
    }

    /// Listing or following failed.
    pub fn failed(&self, kind: Kind) {
        self.errors.get_or_create(&kind.into()).inc();
    }

    /// A list was read to its end.
    pub fn listed(&self, kind: Kind) {
        self.lists.get_or_create(&kind.into()).inc();
    }

    /// So many objects are there now.
    pub fn follows(&self, kind: Kind, objects: usize) {
        let gauge = self.objects.get_or_create(&kind.into());
        gauge.set(i64::try_from(objects).unwrap_or(i64::MAX));
    }
}
