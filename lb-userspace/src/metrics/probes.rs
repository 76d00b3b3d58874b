//! How often who asks was told what, by kube-proxy's names.

use hyper::StatusCode;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// Answers to probes. Copies count together.
#[derive(Clone, Debug, Default)]
pub struct ProbeMetrics {
    healthz: Family<Answer, Counter>,
    livez: Family<Answer, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    code: u16,
}

impl ProbeMetrics {
    /// Makes them part of what `/metrics` tells.
    pub fn register(registry: &mut Registry) -> Self {
        let this = Self::default();
        let kube_proxys = registry.sub_registry_with_prefix("kubeproxy");
        kube_proxys.register(
            "proxy_healthz",
            "Answers to /healthz, by status",
            this.healthz.clone(),
        );
        kube_proxys.register(
            "proxy_livez",
            "Answers to /livez, by status",
            this.livez.clone(),
        );
        this
    }

    /// A request for this path was answered so.
    pub fn answered(&self, path: &str, status: StatusCode) {
        let family = match path {
            "/healthz" => &self.healthz,
            "/livez" => &self.livez,
            _ => return,
        };
        let code = status.as_u16();
        family.get_or_create(&Answer { code }).inc();
    }
}
