//! The agent's HTTP endpoints: probes, health checks of Services, and metrics, with
//! the dashboard beside them.
//!
//! They serve whoever watches the agent; the datapath never depends on them. A
//! port that is taken is tried again until it is free.

mod checks;
pub(crate) mod http;
mod progress;

use std::{future, net::SocketAddr, sync::Arc};

use hyper::StatusCode;
use tokio::{net::TcpListener, sync::watch, time::sleep};
use tracing::{error, info};

use self::http::{Answer, Asked, RETRY, serve};
pub use self::{
    checks::{Checks, HealthCheck, Listen, serve_checks},
    progress::{NodeObject, Now, Progress, Reporter, View},
};
use crate::{
    aside::aside,
    dashboard::Dashboard,
    k8s::events::{Events, Reason},
    metrics::{Metrics, ProbeMetrics},
};

/// Serves `/healthz`, which says whether the node is to get traffic, `/livez`,
/// which says whether the agent does its work, and `/readyz`, which says that
/// its maps and hooks were once what the cluster asks for.
pub async fn serve_probes(
    address: SocketAddr,
    ready: watch::Receiver<bool>,
    view: View,
    events: Events,
    metrics: ProbeMetrics,
) {
    let answer = move |asked: Asked| {
        let path = asked.path();
        let answer = match path {
            "/healthz" => view.progress.borrow().healthz(Now::get()),
            "/livez" => view.progress.borrow().livez(Now::get()),
            "/readyz" if *ready.borrow() => Answer::text(StatusCode::OK, "ok"),
            "/readyz" => Answer::text(StatusCode::SERVICE_UNAVAILABLE, "not ready"),
            _ => Answer::not_found(),
        };
        metrics.answered(path, answer.status);
        future::ready(answer)
    };
    let reason = Reason::FailedToStartProxierHealthcheck;
    let listener = listen("health", address, &events, reason).await;
    serve("health", listener, answer).await;
}

/// Serves `/metrics`, and the dashboard beside it, where there is one.
pub async fn serve_metrics(
    address: SocketAddr,
    metrics: Metrics,
    dashboard: Option<Dashboard>,
    events: Events,
) {
    let (metrics, dashboard) = (Arc::new(metrics), Arc::new(dashboard));
    let answer = move |asked: Asked| {
        let (metrics, dashboard) = (Arc::clone(&metrics), Arc::clone(&dashboard));
        async move {
            if asked.path() == "/metrics" {
                return scrape(&metrics);
            }
            match &*dashboard {
                Some(dashboard) => dashboard.answer(&asked).await,
                None => Answer::not_found(),
            }
        }
    };
    let reason = Reason::FailedToStartMetricServer;
    let listener = listen("metrics", address, &events, reason).await;
    serve("metrics", listener, answer).await;
}

/// Reads whole maps, while a probe may wait.
fn scrape(metrics: &Metrics) -> Answer {
    match aside(|| metrics.encode()) {
        Ok(body) => Answer::new(StatusCode::OK, Metrics::CONTENT_TYPE, body),
        Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

async fn listen(
    what: &'static str,
    address: SocketAddr,
    events: &Events,
    reason: Reason,
) -> TcpListener {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                info!(what, %address, "listening");
                return listener;
            }
            Err(error) => {
                error!(what, %address, %error, "cannot listen; trying again");
                events.tell_node(reason, format!("{address}: {error}"));
                sleep(RETRY).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Mutex, mpsc},
        time::Duration,
    };

    use prometheus_client::{
        collector::Collector,
        encoding::{DescriptorEncoder, EncodeMetric as _, text::encode},
        metrics::{MetricType, gauge::ConstGauge},
        registry::Registry,
    };

    use super::{
        http::client::{free_address, get},
        *,
    };

    /// A metric that takes as long as a test wants.
    #[derive(Debug)]
    struct Slow {
        begun: mpsc::Sender<()>,
        over: Mutex<mpsc::Receiver<()>>,
    }

    impl Collector for Slow {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
            self.begun.send(()).expect("the test goes on");
            let over = self.over.lock().expect("one scrape");
            let answered = over.recv_timeout(Duration::from_secs(5)).is_ok();
            let family = encoder.encode_descriptor("answered", "", None, MetricType::Gauge)?;
            ConstGauge::new(i64::from(answered)).encode(family)
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_probe_is_answered_while_the_maps_are_read() {
        let (probes, scrapes) = (free_address(), free_address());
        let (begun, has_begun) = mpsc::channel();
        let (probed, over) = mpsc::channel();
        let over = Mutex::new(over);
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Slow { begun, over }));
        let metrics = serve_metrics(scrapes, Metrics::of(registry), None, Events::default());
        let view = Reporter::new(NodeObject::Optional).view();
        let probe_metrics = ProbeMetrics::register(&mut Registry::default());
        let ready = watch::channel(true).1;
        let probe = serve_probes(probes, ready, view, Events::default(), probe_metrics);
        let servers = [tokio::spawn(metrics), tokio::spawn(probe)];
        assert!(get(probes, "/livez").await.starts_with("HTTP/1.1 200"));
        let scrape = tokio::spawn(get(scrapes, "/metrics"));
        let begun = tokio::task::spawn_blocking(move || has_begun.recv());
        begun.await.expect("no panic").expect("a scrape");
        assert!(get(probes, "/livez").await.starts_with("HTTP/1.1 200"));
        probed.send(()).expect("a scrape that waits");
        let page = scrape.await.expect("no panic");
        assert!(page.contains("answered 1"), "{page}");
        for server in servers {
            server.abort();
        }
    }

    #[tokio::test]
    async fn probes_follow_readiness_and_the_node() {
        let addr = free_address();
        let (set_ready, ready) = watch::channel(false);
        let reporter = Reporter::new(NodeObject::Required);
        let mut registry = Registry::default();
        let metrics = ProbeMetrics::register(&mut registry);
        let server = serve_probes(addr, ready, reporter.view(), Events::default(), metrics);
        let server = tokio::spawn(server);
        let test = async {
            for (path, status) in [
                ("/healthz", 503),
                ("/livez", 200),
                ("/readyz", 503),
                ("/x", 404),
            ] {
                let response = get(addr, path).await;
                assert!(
                    response.starts_with(&format!("HTTP/1.1 {status}")),
                    "{path}: {response}"
                );
            }
            set_ready.send(true).expect("somebody listens");
            assert!(get(addr, "/readyz").await.starts_with("HTTP/1.1 200"));
            reporter.tell(Some(false), &Checks::new());
            let response = get(addr, "/healthz").await;
            assert!(response.starts_with("HTTP/1.1 200"), "{response}");
            for header in [
                "content-type: application/json\r\n",
                "x-content-type-options: nosniff\r\n",
            ] {
                assert!(response.contains(header), "{response}");
            }
            let mut text = String::new();
            encode(&mut text, &registry).expect("encoded");
            for line in [
                "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
                "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
                "kubeproxy_proxy_livez_total{code=\"200\"} 1",
            ] {
                assert!(text.contains(line), "{line}: {text}");
            }
        };
        tokio::time::timeout(Duration::from_secs(10), test)
            .await
            .expect("answers in time");
        server.abort();
    }
}
