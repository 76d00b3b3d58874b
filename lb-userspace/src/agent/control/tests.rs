//! The agent's core, driven over HTTP by a server that speaks the Kubernetes
//! API, into maps in memory.

use std::sync::{Mutex, PoisonError};

use lb_tests::{
    apiserver::{ApiServer, BadEvent, Refusal},
    proxy::Tunnels,
};
use prometheus_client::{encoding::text::encode, registry::Registry};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::*;
use crate::{
    datapath::{FrontendKey, memory::MemoryMaps},
    health::{Now, View},
    k8s::{
        api::{Connection, Patience},
        source::{ApiSource, Ears},
    },
    metrics::ApiMetrics,
    plan::Settings,
};

type SharedMaps = Arc<Mutex<MemoryMaps>>;

/// How long a change may take. The first retry comes after a second or two.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server, and an agent's core that follows it.
struct Fixture {
    server: ApiServer,
    folder: TempDir,
    maps: SharedMaps,
    control: Option<JoinHandle<()>>,
    synced: watch::Receiver<bool>,
    opted_out: watch::Receiver<Option<BTreeSet<IpAddr>>>,
    health: View,
    pace: Pace,
    patience: Patience,
    registry: Registry,
    recorder: Recorder,
}

impl Fixture {
    fn new(server: ApiServer) -> Self {
        let (_, synced) = watch::channel(false);
        let (_, opted_out) = watch::channel(None);
        Self {
            server,
            folder: TempDir::new().expect("a temporary folder"),
            maps: Arc::default(),
            control: None,
            synced,
            opted_out,
            health: Reporter::default().view(),
            pace: Pace {
                batch_delay: Duration::from_millis(10),
                verify_interval: Duration::from_secs(600),
            },
            patience: Patience::default(),
            registry: Registry::default(),
            recorder: Recorder::default(),
        }
    }

    /// With two Services of two backends each, in the maps.
    async fn ready() -> Self {
        let mut fixture = Self::new(ApiServer::start());
        fixture.put_two();
        fixture.start().await;
        fixture.await_backends(1, &[1, 2]).await;
        fixture.await_backends(2, &[3, 4]).await;
        fixture.await_synced().await;
        fixture
    }

    fn put_two(&self) {
        self.server.put(node());
        self.server.put(service("one", 1));
        self.server.put(service("two", 2));
        self.server.put(slice("one", &[1, 2]));
        self.server.put(slice("two", &[3, 4]));
    }

    /// Starts the core with what the maps hold.
    async fn start(&mut self) {
        let (synced, is_synced) = watch::channel(false);
        let (opted_out, who) = watch::channel(None);
        let (node_addresses, addresses) = watch::channel(BTreeSet::new());
        (self.synced, self.opted_out) = (is_synced, who);
        let kubeconfig = self.folder.path().join("kubeconfig");
        if !kubeconfig.exists() {
            self.server.kubeconfig(self.folder.path());
        }
        let connection = Connection::new(Some(&kubeconfig)).with_patience(self.patience);
        let (events, post) = Events::new(connection.clone(), "node-1");
        tokio::spawn(post);
        let health = Reporter::default();
        self.health = health.view();
        self.registry = Registry::default();
        let ears = Ears {
            events: events.clone(),
            metrics: ApiMetrics::register(&mut self.registry),
            recorder: self.recorder.clone(),
        };
        let links = Links {
            metrics: ControlMetrics::register(&mut self.registry),
            addresses,
            opted_out,
            orphans: Arc::default(),
            synced,
            health,
            events: events.clone(),
            recorder: self.recorder.clone(),
        };
        let index = Index::new("node-1", Settings::default());
        let maps = Arc::clone(&self.maps);
        let control = Control::new(index, maps, links, self.pace).expect("maps");
        let client = connection.client().await.expect("a kubeconfig");
        let source = ApiSource::start(connection, ears, &client, "node-1", true);
        let source = Source::Api(Box::new(source));
        self.control = Some(tokio::spawn(async move {
            // Nobody may go from whom the core hears.
            let _node_addresses = node_addresses;
            control.run(source).await.expect("it goes on");
        }));
    }

    /// Ends it at any point, as `kill -9` does.
    async fn kill(&mut self) {
        let control = self.control.take().expect("it runs");
        control.abort();
        assert!(
            control.await.expect_err("aborted").is_cancelled(),
            "no panic"
        );
    }

    async fn await_synced(&mut self) {
        let synced = timeout(PATIENCE, self.synced.wait_for(|synced| *synced));
        synced.await.expect("in time").expect("control lives");
    }

    /// Waits until a Service leads to these backends, by last octets.
    async fn await_backends(&self, service: u8, wanted: &[u8]) {
        let what = format!("Service {service} to lead to {wanted:?}");
        self.await_maps(&what, |maps| backends(maps, service) == wanted)
            .await;
    }

    async fn await_maps(&self, what: &str, are_they: impl Fn(&MemoryMaps) -> bool) {
        let awaited = async {
            while !are_they(&self.maps.lock().unwrap_or_else(PoisonError::into_inner)) {
                sleep(Duration::from_millis(2)).await;
            }
        };
        let control = self.control.as_ref().expect("it runs");
        if timeout(PATIENCE, awaited).await.is_err() {
            let maps = self.maps.lock().expect("maps");
            panic!(
                "waited for {what}: {:?}, ended: {}",
                maps.content,
                control.is_finished()
            );
        }
    }

    fn change_maps(&self, change: impl FnOnce(&mut MemoryMaps)) {
        change(&mut self.maps.lock().expect("maps"));
    }

    /// Whether the core will be called healthy a minute from now, if nothing
    /// happens until then.
    fn will_be_healthy(&self) -> bool {
        let now = Now::get();
        self.health.is_healthy(Now {
            instant: now.instant + Duration::from_secs(61),
            ..now
        })
    }

    async fn await_health(&self, healthy: bool) {
        let change = async {
            while self.will_be_healthy() != healthy {
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(PATIENCE, change).await.expect("another health");
    }

    /// Waits until an operator is told something: reason, of what, and a part
    /// of the note.
    async fn await_event(&self, reason: &str, about: &str, note: &str) {
        let is_it = |event: &Value| {
            let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str);
            text("/reason") == Some(reason)
                && text("/regarding/name") == Some(about)
                && text("/note").is_some_and(|text| text.contains(note))
        };
        let told = async {
            while !self.server.posted().iter().any(is_it) {
                sleep(Duration::from_millis(2)).await;
            }
        };
        let in_time = timeout(PATIENCE, told).await.is_ok();
        assert!(in_time, "{reason} of {about}: {:?}", self.server.posted());
    }

    fn writes(&self) -> u64 {
        self.maps.lock().expect("maps").writes
    }

    /// What `/metrics` says of something; the name with its labels.
    fn metric(&self, name: &str) -> Option<String> {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("encoded");
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map(str::to_owned)
    }

    /// Waits until `/metrics` says so.
    async fn await_metric(&self, name: &str, value: &str) {
        let told = async {
            while self.metric(name).as_deref() != Some(value) {
                sleep(Duration::from_millis(2)).await;
            }
        };
        let in_time = timeout(PATIENCE, told).await.is_ok();
        assert!(in_time, "{name} to be {value}: {:?}", self.metric(name));
    }

    /// Failures to follow objects of a kind.
    fn errors(&self, kind: &str) -> u32 {
        let count = self.metric(&format!("klb_api_errors_total{{kind=\"{kind}\"}}"));
        count.map_or(0, |count| count.parse().expect("a number"))
    }

    /// Requests for slices whose queries have this in them.
    fn asked_for_slices(&self, with: &str) -> usize {
        let requests = self.server.requests().into_iter();
        let requests = requests.filter(|request| request.contains("/endpointslices?"));
        requests.filter(|request| request.contains(with)).count()
    }

    /// Requests for a list of a kind, in whichever way.
    fn lists(&self, kind: &str) -> usize {
        let requests = self.server.requests().into_iter();
        requests
            .filter(|request| request.contains(&format!("/{kind}?")))
            .filter(|request| {
                !request.contains("watch=true") || request.contains("sendInitialEvents=true")
            })
            .filter(|request| !request.contains("continue="))
            .count()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(control) = &self.control {
            control.abort();
        }
    }
}

fn node() -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-1" } })
}

fn service(name: &str, number: u8) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": name, "namespace": "default", "managedFields": [{ "manager": "kubectl" }] },
        "spec": {
            "clusterIP": format!("10.96.0.{number}"),
            "selector": { "app": name },
            "ports": [{ "port": 80, "targetPort": 3000 }],
        },
    })
}

/// The endpoints of a Service, by last octets.
fn slice(service: &str, endpoints: &[u8]) -> Value {
    let endpoints: Vec<_> = endpoints
        .iter()
        .map(|n| json!({ "addresses": [format!("10.244.0.{n}")], "conditions": { "ready": true } }))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-1"),
            "namespace": "default",
            "labels": { "kubernetes.io/service-name": service },
        },
        "addressType": "IPv4",
        "ports": [{ "port": 3000 }],
        "endpoints": endpoints,
    })
}

/// Where a Service leads to, by last octets; empty if it is not there.
fn backends(maps: &MemoryMaps, service: u8) -> Vec<u8> {
    let key = FrontendKey {
        addr: [10, 96, 0, service].into(),
        port: 80,
        protocol: 6,
    };
    let slots = maps.content.resolve(&key).unwrap_or_default();
    let addresses: BTreeSet<_> = slots.iter().map(|slot| slot.addr.ip()).collect();
    let octets = addresses.into_iter().map(|addr| match addr {
        IpAddr::V4(addr) => addr.octets()[3],
        IpAddr::V6(addr) => panic!("{addr}"),
    });
    octets.collect()
}

macro_rules! async_test {
    ($(#[$attribute:meta])* $name:ident $body:block) => {
        $(#[$attribute])*
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() $body
    };
}

async_test! { the_maps_follow_the_server {
    let fixture = Fixture::ready().await;
    fixture.server.put(slice("one", &[2, 5]));
    fixture.await_backends(1, &[2, 5]).await;
    fixture.server.put(service("three", 3));
    fixture.server.put(slice("three", &[6]));
    fixture.await_backends(3, &[6]).await;
    fixture.server.delete("services", "default", "two");
    fixture.await_backends(2, &[]).await;
    assert_eq!(fixture.lists("services"), 1);
}}

async_test! { only_what_matters_is_asked_for {
    let fixture = Fixture::ready().await;
    for (kind, selector) in [
        ("/api/v1/services?", "labelSelector=!service.kubernetes.io/service-proxy-name"),
        ("/api/v1/services?", "fieldSelector=spec.clusterIP!=None"),
        ("/apis/discovery.k8s.io/v1/endpointslices?", "labelSelector=!service.kubernetes.io/headless"),
        ("/api/v1/nodes?", "fieldSelector=metadata.name=node-1"),
        ("/api/v1/pods?", "fieldSelector=spec.nodeName=node-1"),
        ("/api/v1/namespaces?", "allowWatchBookmarks=true"),
    ] {
        fixture.server.await_request(selector, |request| request.contains(kind) && request.contains(selector));
    }
}}

async_test! { a_service_that_goes_to_another_proxy_is_gone {
    let fixture = Fixture::ready().await;
    let mut others = service("one", 1);
    others["metadata"]["labels"] = json!({ "service.kubernetes.io/service-proxy-name": "mesh" });
    fixture.server.put(others);
    fixture.await_backends(1, &[]).await;
    fixture.server.put(service("one", 1));
    fixture.await_backends(1, &[1, 2]).await;
}}

async_test! { a_server_without_streaming_lists_is_asked_for_pages {
    let mut fixture = Fixture::new(ApiServer::start());
    fixture.server.set_streaming(false);
    fixture.put_two();
    for n in 0..255 {
        fixture.server.put(slice(&format!("of-nobody-{n}"), &[9]));
    }
    fixture.start().await;
    fixture.await_backends(1, &[1, 2]).await;
    fixture.await_backends(2, &[3, 4]).await;
    fixture.server.await_request("the second page", |request| {
        request.contains("/endpointslices?") && request.contains("continue=page")
    });
    fixture.server.put(slice("one", &[2]));
    fixture.await_backends(1, &[2]).await;
}}

async_test! { a_cut_watch_goes_on_where_it_was {
    let fixture = Fixture::ready().await;
    fixture.server.cut();
    fixture.server.put(slice("one", &[7]));
    fixture.await_backends(1, &[7]).await;
    assert_eq!(fixture.lists("endpointslices"), 1, "nothing was listed again");
}}

async_test! { bookmarks_move_the_point_to_go_on_from {
    let fixture = Fixture::ready().await;
    fixture.server.bookmark("services");
    // A watch from the last event that it heard would be told so.
    fixture.server.forget_history();
    fixture.server.cut();
    fixture.server.put(service("three", 3));
    fixture.server.put(slice("three", &[9]));
    fixture.await_backends(3, &[9]).await;
    assert_eq!(fixture.lists("services"), 1, "nothing was listed again");
}}

async_test! { half_an_event_is_heard_again {
    let fixture = Fixture::ready().await;
    fixture.server.spoil_next_event("endpointslices", BadEvent::Half);
    fixture.server.put(slice("one", &[7]));
    fixture.await_backends(1, &[7]).await;
    assert_eq!(fixture.lists("endpointslices"), 1, "nothing was listed again");
}}

async_test! { after_nonsense_everything_is_listed_again {
    let fixture = Fixture::ready().await;
    fixture.server.spoil_next_event("endpointslices", BadEvent::Garbage);
    fixture.server.put(slice("one", &[7]));
    fixture.await_backends(1, &[7]).await;
    assert_eq!(fixture.lists("endpointslices"), 2);
}}

async_test! { what_happened_in_a_gap_is_made_up_for {
    let fixture = Fixture::ready().await;
    fixture.server.set_down(true);
    fixture.server.put(slice("one", &[8]));
    fixture.server.delete("services", "default", "two");
    fixture.server.put(service("three", 3));
    fixture.server.put(slice("three", &[9]));
    fixture.server.forget_history();
    fixture.server.set_down(false);
    fixture.await_backends(1, &[8]).await;
    fixture.await_backends(2, &[]).await;
    fixture.await_backends(3, &[9]).await;
    assert_eq!(fixture.lists("services"), 2, "the old point was forgotten");
}}

async_test! { while_the_server_is_away_all_stays_as_it_is {
    let mut fixture = Fixture::ready().await;
    fixture.server.set_down(true);
    let before = fixture.writes();
    fixture.kill().await;
    fixture.start().await;
    // The lists fail: nothing may be taken for deleted.
    fixture.server.refuse_next(3, Refusal { status: 500, retry_after: None });
    fixture.server.set_down(false);
    fixture.await_synced().await;
    assert_eq!(fixture.writes(), before, "nothing has changed");
    fixture.server.put(slice("one", &[7]));
    fixture.await_backends(1, &[7]).await;
}}

async_test! { a_server_that_is_away_at_the_start_is_waited_for {
    let mut fixture = Fixture::new(ApiServer::start());
    fixture.server.set_down(true);
    fixture.start().await;
    fixture.put_two();
    fixture.server.set_down(false);
    fixture.await_backends(1, &[1, 2]).await;
}}

async_test! {
/// It is not taken for one that has no streams, though it is busy for longer
/// than a stream may be silent.
a_busy_server_is_asked_again_when_it_says {
    for status in [429, 503] {
        let mut fixture = Fixture::new(ApiServer::start());
        fixture.patience.stream_stall = Duration::from_secs(2);
        fixture.put_two();
        fixture.server.refuse_next(10, Refusal { status, retry_after: Some(1) });
        fixture.start().await;
        fixture.await_backends(1, &[1, 2]).await;
        let requests = fixture.server.requests().len();
        assert!(requests < 30, "{requests} requests to a busy server");
        assert!(fixture.errors("EndpointSlice") > 0, "refusals are counted");
        assert_eq!(fixture.asked_for_slices("limit="), 0, "{status}");
    }
}}

async_test! { a_long_outage_costs_no_list {
    let mut fixture = Fixture::new(ApiServer::start());
    fixture.patience.haste = 1000;
    fixture.put_two();
    fixture.start().await;
    fixture.await_backends(2, &[3, 4]).await;
    fixture.server.set_down(true);
    let kinds = ["Service", "EndpointSlice", "Node"];
    while kinds.iter().any(|kind| fixture.errors(kind) < 25) {
        sleep(Duration::from_millis(2)).await;
    }
    fixture.server.put(slice("one", &[7]));
    fixture.server.set_down(false);
    fixture.await_backends(1, &[7]).await;
    assert_eq!(fixture.lists("endpointslices"), 1, "nothing was listed again");
    assert_eq!(fixture.lists("services"), 1, "nothing was listed again");
}}

async_test! { a_watch_that_ends_by_an_error_goes_on_where_it_was {
    let fixture = Fixture::ready().await;
    fixture.server.spoil_next_event("endpointslices", BadEvent::Error(500));
    fixture.server.put(slice("one", &[7]));
    fixture.await_backends(1, &[7]).await;
    assert_eq!(fixture.lists("endpointslices"), 1, "nothing was listed again");
    assert_eq!(fixture.errors("EndpointSlice"), 1);
}}

async_test! { a_watch_that_always_ends_by_an_error_is_given_up {
    let mut fixture = Fixture::new(ApiServer::start());
    fixture.patience.haste = 1000;
    fixture.put_two();
    fixture.start().await;
    fixture.await_backends(2, &[3, 4]).await;
    fixture.server.spoil_events("endpointslices", BadEvent::Error(500), 3);
    fixture.server.put(slice("one", &[7]));
    fixture.await_backends(1, &[7]).await;
    assert_eq!(fixture.lists("endpointslices"), 2);
}}

async_test! { a_point_that_is_refused_as_a_whole_is_given_up {
    let fixture = Fixture::ready().await;
    fixture.server.set_gone_at_once(true);
    fixture.server.set_down(true);
    fixture.server.put(slice("one", &[8]));
    fixture.server.forget_history();
    fixture.server.set_down(false);
    fixture.await_backends(1, &[8]).await;
    assert_eq!(fixture.lists("endpointslices"), 2, "the old point was forgotten");
}}

async_test! { a_page_that_is_lost_begins_the_list_anew {
    let mut fixture = Fixture::new(ApiServer::start());
    fixture.patience.haste = 1000;
    fixture.server.set_streaming(false);
    fixture.server.lose_next_page();
    fixture.put_two();
    for n in 0..255 {
        fixture.server.put(slice(&format!("of-nobody-{n}"), &[9]));
    }
    fixture.start().await;
    fixture.await_backends(2, &[3, 4]).await;
    assert_eq!(fixture.errors("EndpointSlice"), 1);
    assert_eq!(fixture.asked_for_slices("continue="), 2);
    assert_eq!(fixture.asked_for_slices("sendInitialEvents=true"), 1, "pages stay");
}}

async_test! {
/// And for a stream again when everything is listed anew: it may have been slow,
/// or be another server by then.
a_server_that_stays_silent_is_asked_for_pages {
    let mut fixture = Fixture::new(ApiServer::start());
    fixture.patience.stream_stall = Duration::from_secs(3);
    fixture.patience.haste = 1000;
    fixture.server.set_endless_lists(true);
    fixture.put_two();
    fixture.start().await;
    fixture.await_backends(2, &[3, 4]).await;
    assert_eq!(fixture.asked_for_slices("sendInitialEvents=true"), 1);
    assert_eq!(fixture.asked_for_slices("limit="), 1);
    fixture.server.set_endless_lists(false);
    fixture.server.set_down(true);
    fixture.server.put(slice("one", &[7]));
    fixture.server.forget_history();
    fixture.server.set_down(false);
    fixture.await_backends(1, &[7]).await;
    assert_eq!(fixture.asked_for_slices("sendInitialEvents=true"), 2);
    assert_eq!(fixture.asked_for_slices("limit="), 1);
}}

async_test! { a_proxy_is_used_that_the_kubeconfig_names {
    let mut fixture = Fixture::new(ApiServer::start_tls());
    let proxy = Tunnels::start();
    let path = fixture.server.kubeconfig(fixture.folder.path());
    let text = std::fs::read(&path).expect("a kubeconfig");
    let mut config: Value = serde_json::from_slice(&text).expect("JSON");
    let cluster = &mut config["clusters"][0]["cluster"];
    cluster["proxy-url"] = json!(format!("http://{}", proxy.address));
    let server = cluster["server"].as_str().expect("a server").to_owned();
    std::fs::write(&path, config.to_string()).expect("a file");
    fixture.put_two();
    fixture.start().await;
    fixture.await_backends(1, &[1, 2]).await;
    let asked = proxy.asked();
    assert!(asked.len() >= 3, "all goes through the proxy: {asked:?}");
    assert!(asked.iter().all(|to| server.ends_with(to)), "{asked:?}");
}}

async_test! { slow_bytes_are_waited_for {
    let mut fixture = Fixture::new(ApiServer::start());
    fixture.server.set_slow(true);
    fixture.put_two();
    fixture.start().await;
    fixture.await_backends(2, &[3, 4]).await;
    fixture.server.put(slice("two", &[3]));
    fixture.await_backends(2, &[3]).await;
}}

async_test! { a_token_that_has_expired_is_read_again {
    let mut fixture = Fixture::new(ApiServer::start_tls());
    fixture.server.require_token(fixture.folder.path(), "first");
    fixture.put_two();
    fixture.start().await;
    fixture.await_backends(1, &[1, 2]).await;
    fixture.server.require_token(fixture.folder.path(), "second");
    fixture.server.put(slice("one", &[7]));
    fixture.await_backends(1, &[7]).await;
    assert_eq!(fixture.lists("endpointslices"), 1, "nothing was listed again");
}}

async_test! { an_object_that_makes_no_sense_takes_nothing_along {
    let fixture = Fixture::ready().await;
    let mut nonsense = slice("one", &[5]);
    nonsense["endpoints"] = json!("many");
    fixture.server.put(nonsense);
    let mut never = service("never", 9);
    never["spec"]["ports"] = json!([{ "port": 0 }]);
    fixture.server.put(never);
    fixture.server.put(slice("two", &[6]));
    fixture.await_backends(2, &[6]).await;
    let maps = fixture.maps.lock().expect("maps");
    assert_eq!(backends(&maps, 1), [1, 2], "what it described stays");
    assert_eq!(backends(&maps, 9), [0; 0]);
}}

async_test! { an_object_that_makes_no_sense_keeps_what_an_earlier_run_knew {
    let mut fixture = Fixture::ready().await;
    fixture.kill().await;
    let mut nonsense = slice("one", &[5]);
    nonsense["endpoints"] = json!("many");
    fixture.server.put(nonsense);
    fixture.server.put(slice("two", &[6]));
    fixture.start().await;
    fixture.await_backends(2, &[6]).await;
    assert_eq!(backends(&fixture.maps.lock().expect("maps"), 1), [1, 2]);
    fixture.server.put(slice("one", &[7]));
    fixture.await_backends(1, &[7]).await;
}}

async_test! { an_object_that_made_no_sense_and_is_nobodys_business_is_gone {
    let mut fixture = Fixture::ready().await;
    fixture.kill().await;
    let mut nonsense = service("one", 1);
    nonsense["spec"]["ports"] = json!("many");
    fixture.server.put(nonsense);
    fixture.start().await;
    fixture.await_synced().await;
    assert_eq!(backends(&fixture.maps.lock().expect("maps"), 1), [1, 2]);
    fixture.server.put(json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": "one", "namespace": "default" },
        "spec": { "type": "ExternalName", "externalName": "elsewhere.example" },
    }));
    fixture.await_backends(1, &[]).await;
}}

async_test! { a_second_start_writes_nothing {
    let mut fixture = Fixture::ready().await;
    let before = fixture.writes();
    fixture.kill().await;
    fixture.start().await;
    fixture.await_synced().await;
    assert_eq!(fixture.writes(), before);
}}

async_test! { changes_that_come_together_are_written_together {
    let fixture = Fixture::ready().await;
    let before = fixture.writes();
    // The same slice a hundred times: each write is one of a few batches.
    for n in 0..100 {
        fixture.server.put(slice("one", &[10 + n]));
    }
    fixture.await_backends(1, &[109]).await;
    let each_alone = 100 * 4;
    let writes = fixture.writes() - before;
    assert!(writes < each_alone / 2, "{writes} writes");
}}

async_test! { pods_that_opt_out_are_told_once_they_are_known {
    let mut fixture = Fixture::new(ApiServer::start());
    fixture.put_two();
    let pod = |name: &str, last: u8, annotations: Value| json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "namespace": "mesh", "annotations": annotations },
        "spec": { "nodeName": "node-1", "containers": [{ "name": "main" }] },
        "status": { "podIPs": [{ "ip": format!("10.244.0.{last}") }] },
    });
    fixture.server.put(pod("in", 21, json!({ "klb/socket-lb": "true" })));
    fixture.server.put(pod("silent", 22, json!({})));
    fixture.server.put(json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": { "name": "mesh", "annotations": { "klb/socket-lb": "false" } },
    }));
    fixture.start().await;
    let wanted = Some(BTreeSet::from([[10, 244, 0, 22].into()]));
    let told = timeout(PATIENCE, fixture.opted_out.wait_for(|told| *told == wanted));
    told.await.expect("in time").expect("control lives");
}}

async_test! { who_may_not_list_pods_still_serves {
    // A role from before pods were needed.
    let mut fixture = Fixture::new(ApiServer::start());
    fixture.put_two();
    fixture.server.forbid("pods");
    fixture.start().await;
    fixture.await_backends(1, &[1, 2]).await;
    assert_eq!(*fixture.opted_out.borrow(), None, "nobody knows who opted out");
}}

async_test! { what_somebody_else_wrote_is_mended_in_time {
    let mut fixture = Fixture::new(ApiServer::start());
    fixture.pace.verify_interval = Duration::from_millis(20);
    fixture.put_two();
    fixture.start().await;
    fixture.await_backends(1, &[1, 2]).await;
    fixture.maps.lock().expect("maps").content.services.clear();
    fixture.await_backends(1, &[1, 2]).await;
    fixture.await_backends(2, &[3, 4]).await;
}}

async_test! { operators_are_told_of_frontends_that_two_services_want {
    let fixture = Fixture::ready().await;
    // As old as the other, and later by name.
    fixture.server.put(service("young", 1));
    let note = "default/one, an older Service, has 10.96.0.1:80/TCP";
    fixture.await_event("FrontendConflict", "young", note).await;
}}

async_test! { operators_are_told_of_objects_that_make_no_sense {
    let fixture = Fixture::ready().await;
    let mut bad = service("one", 1);
    bad["spec"]["ports"][0]["port"] = json!(123_456);
    fixture.server.put(bad);
    let note = "spec.ports[0].port: 123456 is not between 1 and 65535";
    fixture.await_event("InvalidObject", "one", note).await;
    let mut odd = service("two", 2);
    odd["metadata"]["annotations"] = json!({ "klb/algorithm": "best" });
    fixture.server.put(odd);
    let note = "\"best\" is not random or maglev";
    fixture.await_event("InvalidObject", "two", note).await;
    // Commands know of both, until they are well or have gone.
    let skipped = || fixture.recorder.record().skipped;
    let found = |name: &str| {
        let faults = skipped().some.into_iter();
        let mut faults = faults.filter(|fault| fault.name.as_deref() == Some(name));
        faults.next().unwrap_or_else(|| panic!("{name} in {:?}", skipped()))
    };
    assert_eq!((skipped().count, found("one").in_part), (2, false));
    assert_eq!(found("one").field.as_deref(), Some("spec.ports[0].port"));
    assert!(found("two").in_part);
    fixture.server.put(service("one", 1));
    fixture.server.delete("services", "default", "two");
    fixture.await_maps("nothing to be wrong", |_| skipped().count == 0).await;
}}

async_test! { a_write_that_fails_is_waited_for {
    let fixture = Fixture::ready().await;
    fixture.await_health(true).await;
    fixture.change_maps(|maps| {
        maps.fault = Some(Box::new(|_| Err(std::io::Error::other("out of order"))));
    });
    fixture.server.put(slice("one", &[5]));
    fixture.await_health(false).await;
    let reason = "FailedToProgramService";
    fixture.await_event(reason, "one", "out of order").await;
    fixture.change_maps(|maps| maps.fault = None);
    fixture.await_health(true).await;
}}

async_test! {
/// Every node would be taken out of service at once, and restarting the agent
/// makes no room.
a_service_without_room_does_not_make_the_node_unhealthy {
    let fixture = Fixture::ready().await;
    fixture.change_maps(|maps| maps.service_capacity = maps.content.services.len());
    fixture.server.put(service("three", 3));
    let reason = "FailedToProgramService";
    fixture.await_event(reason, "three", "klb_svc4").await;
    fixture.await_health(true).await;
}}

async_test! { what_goes_on_with_the_server_is_counted {
    let fixture = Fixture::ready().await;
    let [lists, objects, errors] = ["api_lists_total", "api_objects", "api_errors_total"]
        .map(|name| format!("klb_{name}{{kind=\"EndpointSlice\"}}"));
    assert_eq!(fixture.metric(&lists).as_deref(), Some("1"));
    assert_eq!(fixture.metric(&objects).as_deref(), Some("2"));
    assert_eq!(fixture.metric(&errors), None);
    fixture.server.spoil_next_event("endpointslices", BadEvent::Garbage);
    fixture.server.put(slice("three", &[7]));
    fixture.server.put(service("three", 3));
    fixture.await_backends(3, &[7]).await;
    assert_eq!(fixture.metric(&errors).as_deref(), Some("1"));
    // What a list brings is in the maps before it has come to its end.
    fixture.await_metric(&lists, "2").await;
    fixture.await_metric(&objects, "3").await;
}}
