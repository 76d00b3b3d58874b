//! As much of an HTTP server as probes and the dashboard need.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{CONTENT_TYPE, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS},
    http::request::Parts,
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

/// What a client asks, without the body that it may have.
#[derive(Debug)]
pub(crate) struct Asked {
    head: Parts,
    /// The node's own address that the client has reached.
    pub(crate) at: IpAddr,
}

impl Asked {
    /// For tests too: `at` is as a socket tells it.
    pub(crate) fn new(head: Parts, at: IpAddr) -> Self {
        let at = at.to_canonical();
        Self { head, at }
    }

    pub(crate) const fn method(&self) -> &Method {
        &self.head.method
    }

    pub(crate) fn path(&self) -> &str {
        self.head.uri.path()
    }

    /// What stands behind the question mark; nothing if there is none.
    pub(crate) fn query(&self) -> &str {
        self.head.uri.query().unwrap_or_default()
    }

    /// The host in the request's first line, where proxies have it.
    pub(crate) fn host(&self) -> Option<&str> {
        self.head.uri.host()
    }

    pub(crate) const fn headers(&self) -> &HeaderMap {
        &self.head.headers
    }
}

/// What an endpoint answers.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub status: StatusCode,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub body: Bytes,
}

impl Answer {
    pub(crate) fn new(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Self {
        Self {
            status,
            headers: vec![(CONTENT_TYPE, HeaderValue::from_static(kind))],
            body: body.into(),
        }
    }

    pub(crate) fn text(status: StatusCode, body: &str) -> Self {
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
    pub(crate) fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    pub(crate) fn not_found() -> Self {
        Self::text(StatusCode::NOT_FOUND, "not found")
    }

    fn into_response(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(self.body));
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

/// Answers every request, for ever. Dropping the future closes all connections.
pub(super) async fn serve<F, R>(what: &'static str, listener: TcpListener, answer: F)
where
    F: Fn(Asked) -> R + Send + Sync + 'static,
    R: Future<Output = Answer> + Send + 'static,
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

async fn serve_client<F, R>(stream: TcpStream, answer: Arc<F>)
where
    F: Fn(Asked) -> R + Send + Sync + 'static,
    R: Future<Output = Answer> + Send + 'static,
{
    let at = match stream.local_addr() {
        Ok(addr) => addr.ip(),
        Err(error) => return debug!(%error, "a client went away"),
    };
    let service = service_fn(move |request: Request<Incoming>| {
        let (head, _unread) = request.into_parts();
        let answer = answer(Asked::new(head, at));
        async move { Ok::<_, Infallible>(answer.await.into_response()) }
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
