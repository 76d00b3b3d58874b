//! As much of an HTTP server as probes need.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{CONTENT_TYPE, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt};
use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
    time::sleep,
};
use tracing::{debug, error};

/// Between two attempts at what failed and may pass.
pub(super) const RETRY: Duration = Duration::from_secs(2);
/// For a client to send its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Clients that the kernel lets wait.
const BACKLOG: u32 = 128;

/// What an endpoint answers.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub status: StatusCode,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub body: String,
}

impl Answer {
    pub(super) fn new(status: StatusCode, kind: &'static str, body: String) -> Self {
        Self {
            status,
            headers: vec![(CONTENT_TYPE, HeaderValue::from_static(kind))],
            body,
        }
    }

    pub(super) fn text(status: StatusCode, body: &str) -> Self {
        Self::new(status, "text/plain; charset=utf-8", format!("{body}\n"))
    }

    /// 200 or 503, and why, as kube-proxy says it.
    pub(super) fn health(healthy: bool, body: &impl Serialize) -> Self {
        let status = if healthy {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        match serde_json::to_string(body) {
            Ok(body) => Self::new(status, "application/json", body)
                .with(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
            Err(error) => Self::text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }

    #[must_use]
    pub(super) fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    pub(super) fn not_found() -> Self {
        Self::text(StatusCode::NOT_FOUND, "not found")
    }

    fn into_response(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from(self.body)));
        *response.status_mut() = self.status;
        response.headers_mut().extend(self.headers);
        response
    }
}

/// Listens for one family: that of IPv4 may have a socket of its own at the same
/// port.
pub(super) fn bind_family(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    // What is left of connections of an earlier run is in nobody's way.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Answers every request by its path, for ever. Dropping the future closes all
/// connections.
pub(super) async fn serve<F>(what: &'static str, listener: TcpListener, answer: F)
where
    F: Fn(&str) -> Answer + Send + Sync + 'static,
{
    let answer = Arc::new(answer);
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    clients.spawn(serve_client(stream, Arc::clone(&answer)));
                }
                Err(error) => {
                    // As when there is no descriptor left: give others time to close.
                    error!(what, %error, "accepting a client failed");
                    sleep(RETRY).await;
                }
            },
            Some(_ended) = clients.join_next() => {}
        }
    }
}

async fn serve_client<F>(stream: TcpStream, answer: Arc<F>)
where
    F: Fn(&str) -> Answer + Send + Sync + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer(request.uri().path());
        async move { Ok::<_, Infallible>(answer.into_response()) }
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

#[cfg(test)]
pub(super) mod client {
    use std::{
        io::{Read as _, Write as _},
        net::TcpStream,
    };

    use super::*;

    /// Asks as a plain client, in a thread of its own; again until somebody
    /// listens.
    pub(in super::super) async fn get(addr: SocketAddr, path: &'static str) -> String {
        loop {
            match try_get(addr, path).await {
                Ok(answer) => return answer,
                Err(_nobody) => tokio::task::yield_now().await,
            }
        }
    }

    /// Asks once.
    pub(in super::super) async fn try_get(
        addr: SocketAddr,
        path: &'static str,
    ) -> io::Result<String> {
        let asked = tokio::task::spawn_blocking(move || {
            let mut stream = TcpStream::connect(addr)?;
            let request = format!("GET {path} HTTP/1.1\r\nHost: klb\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes())?;
            let mut response = String::new();
            stream.read_to_string(&mut response)?;
            Ok(response)
        });
        asked.await.expect("no panic")
    }

    /// An address of the loopback device that nobody has.
    pub(in super::super) fn free_address() -> SocketAddr {
        let reserved = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        reserved.local_addr().expect("bound")
    }
}
