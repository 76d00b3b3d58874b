//! The agent's HTTP endpoints: probes and metrics.
//!
//! They serve whoever watches the agent; the datapath never depends on them. A
//! port that is taken is tried again until it is free.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::sleep,
};
use tracing::{debug, error, info};

use crate::metrics::Metrics;

/// Between two attempts to bind.
const RETRY: Duration = Duration::from_secs(2);
/// For a client to send its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// What an endpoint answers.
struct Answer {
    status: StatusCode,
    kind: &'static str,
    body: String,
}

impl Answer {
    fn text(status: StatusCode, body: &str) -> Self {
        Self {
            status,
            kind: "text/plain; charset=utf-8",
            body: format!("{body}\n"),
        }
    }

    fn not_found() -> Self {
        Self::text(StatusCode::NOT_FOUND, "not found")
    }
}

/// Serves `/healthz` and `/livez`, which say that the agent runs, and `/readyz`,
/// which says that its maps and hooks are what the cluster asks for.
pub async fn serve_probes(bind: SocketAddr, ready: watch::Receiver<bool>) {
    let answer = move |path: &str| match path {
        "/healthz" | "/livez" => Answer::text(StatusCode::OK, "ok"),
        "/readyz" if *ready.borrow() => Answer::text(StatusCode::OK, "ok"),
        "/readyz" => Answer::text(StatusCode::SERVICE_UNAVAILABLE, "not ready"),
        _ => Answer::not_found(),
    };
    serve("health", bind, answer).await;
}

/// Serves `/metrics`.
pub async fn serve_metrics(bind: SocketAddr, metrics: Metrics) {
    let answer = move |path: &str| {
        if path != "/metrics" {
            return Answer::not_found();
        }
        match metrics.encode() {
            Ok(body) => Answer {
                status: StatusCode::OK,
                kind: Metrics::CONTENT_TYPE,
                body,
            },
            Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    };
    serve("metrics", bind, answer).await;
}

async fn serve<F>(what: &'static str, bind: SocketAddr, answer: F)
where
    F: Fn(&str) -> Answer + Send + Sync + 'static,
{
    let listener = listen(what, bind).await;
    let answer = Arc::new(answer);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve_client(stream, Arc::clone(&answer)));
            }
            Err(error) => {
                // As when there is no descriptor left: give others time to close.
                error!(what, %error, "accepting a client failed");
                sleep(RETRY).await;
            }
        }
    }
}

async fn listen(what: &'static str, bind: SocketAddr) -> TcpListener {
    loop {
        match TcpListener::bind(bind).await {
            Ok(listener) => {
                info!(what, address = %bind, "listening");
                return listener;
            }
            Err(error) => {
                error!(what, address = %bind, %error, "cannot listen; trying again");
                sleep(RETRY).await;
            }
        }
    }
}

async fn serve_client<F>(stream: TcpStream, answer: Arc<F>)
where
    F: Fn(&str) -> Answer + Send + Sync + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer(request.uri().path());
        async move { Ok::<_, Infallible>(response(answer)) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        debug!(%error, "a client went away");
    }
}

fn response(answer: Answer) -> Response<Full<Bytes>> {
    let Answer { status, kind, body } = answer;
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net,
    };

    use super::*;

    /// Asks as a plain client, in a thread of its own.
    async fn get(addr: SocketAddr, path: &'static str) -> String {
        let asked = tokio::task::spawn_blocking(move || {
            let mut stream = loop {
                match net::TcpStream::connect(addr) {
                    Ok(stream) => break stream,
                    Err(_) => std::thread::yield_now(),
                }
            };
            let request = format!("GET {path} HTTP/1.1\r\nHost: klb\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).expect("sent");
            let mut response = String::new();
            stream.read_to_string(&mut response).expect("answered");
            response
        });
        asked.await.expect("no panic")
    }

    #[tokio::test]
    async fn probes_follow_readiness() {
        let reserved = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = reserved.local_addr().expect("bound");
        drop(reserved);
        let (set_ready, ready) = watch::channel(false);
        let server = tokio::spawn(serve_probes(addr, ready));
        let test = async {
            for (path, status) in [
                ("/healthz", 200),
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
        };
        tokio::time::timeout(Duration::from_secs(10), test)
            .await
            .expect("answers in time");
        server.abort();
    }
}
