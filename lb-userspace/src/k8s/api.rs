//! The way to the API server.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::{
    Request, Response, Uri,
    body::{self, Bytes},
    header::RETRY_AFTER,
    http::uri::Authority,
    rt::{Read, Write},
};
use hyper_util::{
    client::legacy::{
        self,
        connect::{Connection as Connected, HttpConnector, proxy::Tunnel},
    },
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder, ConfigExt as _},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tower::{BoxError, Service, ServiceBuilder, service_fn};

/// A connection on which nothing is heard is asked after so long whether it
/// lives, and three times more as long after each other. A server that is gone
/// without a word is known to be within half a minute, not at the end of the
/// watch.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;
/// What was sent is acknowledged within this time.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Of a refusal so many bytes are read.
const REFUSAL: usize = 64 * 1024;

/// Where it is written which server there is, and who klb is to it: in a
/// kubeconfig file, or for a pod in its service account.
#[derive(Clone, Debug)]
pub struct Connection {
    kubeconfig: Option<PathBuf>,
    pub(super) patience: Patience,
}

/// How long a server is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// A list that makes no progress for so long is begun anew. A stream brings
    /// objects one by one; some servers from before there were any understand
    /// the request as another one and stay silent.
    pub stream_stall: Duration,
    /// A page comes as a whole.
    pub page_stall: Duration,
    /// So many times sooner than another client would klb try again what failed:
    /// more than once in tests only.
    pub haste: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            stream_stall: Duration::from_secs(30),
            page_stall: Duration::from_secs(300),
            haste: 1,
        }
    }
}

impl Connection {
    /// By a kubeconfig file, or as a pod.
    pub fn new(kubeconfig: Option<&Path>) -> Self {
        Self {
            kubeconfig: kubeconfig.map(Path::to_owned),
            patience: Patience::default(),
        }
    }

    /// Waits for the server in another way.
    #[cfg(test)]
    pub(crate) const fn with_patience(mut self, patience: Patience) -> Self {
        self.patience = patience;
        self
    }

    /// A client from what is written now. Nothing is sent yet.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or there is none and this is no pod.
    pub async fn client(&self) -> anyhow::Result<Client> {
        let Some(path) = &self.kubeconfig else {
            return Ok(client(&Config::incluster()?, tcp())?);
        };
        let kubeconfig = Kubeconfig::read_from(path)?;
        let proxy = proxy(&kubeconfig).transpose()?;
        let options = KubeConfigOptions::default();
        let config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        Ok(match proxy {
            Some(proxy) => client(&config, Tunnel::new(proxy, tcp()))?,
            None => client(&config, tcp())?,
        })
    }
}

/// What the cluster in use says of a proxy, if it does.
fn proxy(kubeconfig: &Kubeconfig) -> Option<anyhow::Result<Uri>> {
    let current = kubeconfig.current_context.as_ref()?;
    let contexts = kubeconfig.contexts.iter();
    let context = contexts.filter(|context| context.name == *current);
    let context = context
        .into_iter()
        .find_map(|named| named.context.as_ref())?;
    let clusters = kubeconfig.clusters.iter();
    let cluster = clusters.filter(|cluster| cluster.name == context.cluster);
    let cluster = cluster
        .into_iter()
        .find_map(|named| named.cluster.as_ref())?;
    let text = cluster
        .proxy_url
        .as_deref()
        .filter(|text| !text.is_empty())?;
    // Without the text, which may hold a password.
    Some(proxy_url(text).context("proxy-url"))
}

fn proxy_url(text: &str) -> anyhow::Result<Uri> {
    let url: Uri = text.parse()?;
    ensure!(
        url.scheme_str() == Some("http"),
        "klb speaks to proxies by http:// only"
    );
    let authority = url.authority().map(Authority::as_str);
    ensure!(
        !authority.is_some_and(|authority| authority.contains('@')),
        "klb has no way to say who it is to a proxy"
    );
    Ok(url)
}

fn tcp() -> HttpConnector {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    tcp.set_keepalive(Some(KEEPALIVE));
    tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    tcp.set_keepalive_retries(Some(KEEPALIVE_PROBES));
    tcp.set_tcp_user_timeout(Some(SEND_TIMEOUT));
    tcp
}

/// kube's own stack of layers has no keep-alive, and logs errors that are logged
/// here where they are dealt with. It may also wait in silence for a server that
/// is too busy, which is for those to do who wait for an answer.
fn client<C>(config: &Config, connector: C) -> Result<Client, kube::Error>
where
    C: Service<Uri, Error: Into<BoxError>, Future: Send> + Clone + Send + Sync + 'static,
    C::Response: Connected + Read + Write + Send + Unpin + 'static,
{
    let tls = config.rustls_https_connector_with_connector(connector)?;
    let http: legacy::Client<_, Body> = legacy::Builder::new(TokioExecutor::new()).build(tls);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .and_then(tell_when_to_come_again)
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(ClientBuilder::new(service, &config.default_namespace).build())
}

/// A server that is too busy says in a header when to come again, which nobody
/// hears of who gets a [`kube::Error`]. Writes it into the body, where a server
/// may say it, too.
async fn tell_when_to_come_again<B>(
    response: Response<B>,
) -> Result<Response<Either<B, Full<Bytes>>>, BoxError>
where
    B: body::Body<Data = Bytes, Error: Into<BoxError>>,
{
    let header = response.headers().get(RETRY_AFTER);
    let seconds = header.and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    let code = response.status();
    let Some(seconds) = seconds.filter(|_| !code.is_success()) else {
        return Ok(response.map(Either::Left));
    };
    let (head, body) = response.into_parts();
    let body = Limited::new(body, REFUSAL).collect().await?.to_bytes();
    let status = serde_json::from_slice(&body).ok();
    let mut status = status.filter(Value::is_object).unwrap_or_else(
        || json!({ "status": "Failure", "message": String::from_utf8_lossy(&body).trim() }),
    );
    status["code"] = json!(code.as_u16());
    status["details"]["retryAfterSeconds"] = json!(seconds);
    let body = Full::from(status.to_string());
    Ok(Response::from_parts(head, Either::Right(body)))
}

/// What a client sends by, to be changed under it: whoever follows objects goes
/// on from where he was, also at another server or as somebody else.
#[derive(Clone)]
pub(super) struct Route(Arc<Mutex<Client>>);

impl Route {
    /// That of a client, and a client that takes it.
    pub(super) fn new(client: Client) -> (Self, Client) {
        let namespace = client.default_namespace().to_owned();
        let this = Self(Arc::new(Mutex::new(client)));
        let route = this.clone();
        let service = service_fn(move |request: Request<Body>| {
            let client = route.0.lock().unwrap_or_else(PoisonError::into_inner);
            let client = client.clone();
            async move { client.send(request).await }
        });
        (this, Client::new(service, namespace))
    }

    /// From now on everything is sent by this client.
    pub(super) fn change(&self, client: Client) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = client;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy_of(url: &str) -> String {
        let kubeconfig = json!({
            "clusters": [{ "name": "a", "cluster": { "server": "https://a", "proxy-url": url } }],
            "contexts": [{ "name": "b", "context": { "cluster": "a", "user": "c" } }],
            "current-context": "b",
        });
        let kubeconfig = serde_json::from_value(kubeconfig).expect("a kubeconfig");
        match proxy(&kubeconfig) {
            None => "none".to_owned(),
            Some(Ok(url)) => url.to_string(),
            Some(Err(error)) => format!("{error:#}"),
        }
    }

    #[test]
    fn a_proxy_is_used_or_refused() {
        assert_eq!(proxy_of(""), "none");
        assert_eq!(proxy_of("http://proxy:3128"), "http://proxy:3128/");
        for (url, why) in [
            (
                "socks5://proxy",
                "proxy-url: klb speaks to proxies by http:// only",
            ),
            ("http://me:secret@proxy", "klb has no way to say who it is"),
        ] {
            assert!(proxy_of(url).contains(why), "{}", proxy_of(url));
        }
    }

    #[tokio::test]
    async fn what_a_busy_server_says_is_said_in_the_body() {
        let answer = |code: u16, header: Option<&str>, body: &'static str| {
            let mut response = Response::builder().status(code);
            if let Some(header) = header {
                response = response.header(RETRY_AFTER, header);
            }
            let body = Full::<Bytes>::from(body);
            tell_when_to_come_again(response.body(body).expect("a response"))
        };
        for (code, header, body, said) in [
            (200, Some("3"), "fine", "fine"),
            (429, None, "no", "no"),
            (429, Some("Wed, 21 Oct 2015 07:28:00 GMT"), "no", "no"),
        ] {
            let response = answer(code, header, body).await.expect("a response");
            let bytes = response.into_body().collect().await.expect("a body");
            let bytes = bytes.to_bytes();
            assert_eq!(bytes, said);
        }
        for (body, message) in [
            ("Too many requests\n", "Too many requests"),
            (
                r#"{"kind":"Status","message":"later","details":{"name":"x"}}"#,
                "later",
            ),
        ] {
            let response = answer(429, Some("3"), body).await.expect("a response");
            let bytes = response.into_body().collect().await.expect("a body");
            let bytes = bytes.to_bytes();
            let status: Value = serde_json::from_slice(&bytes).expect("JSON");
            assert_eq!(status["message"], message);
            assert_eq!(status["code"], 429);
            assert_eq!(status["details"]["retryAfterSeconds"], 3);
        }
    }
}
