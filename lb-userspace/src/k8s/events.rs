//! Events: what an operator sees in `kubectl describe` and `kubectl get events`.
//!
//! They are a courtesy. All of them are in the log too; nobody waits for one to
//! be posted, the same is not said over and over, and one that cannot be posted
//! is counted and forgotten.

use std::{
    collections::HashMap,
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::warn;

use super::api::Connection;
use crate::model::{Kind, NamespacedName, ObjectRef};

/// Who the events are from.
const CONTROLLER: &str = "klb";
/// Notices that were not posted yet, at most.
const QUEUE: usize = 64;
/// Notices that are remembered, at most.
const MEMORY: usize = 1024;
/// What stays as it is is said again after so long: soon enough for the
/// [`Recorder`], which makes it part of the same Event.
const REPEAT: Duration = Duration::from_secs(300);
/// Between two requests: what kube-proxy's client keeps to.
const PACE: Duration = Duration::from_millis(200);
/// How long a notice may take to be posted.
const PATIENCE: Duration = Duration::from_secs(15);
/// The API server takes no longer note (1 KiB).
const NOTE: usize = 1000;

/// Why there is an event. Those that kube-proxy has are called as there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The agent has started.
    Starting,
    /// `/healthz` has no port.
    FailedToStartProxierHealthcheck,
    /// `/metrics` has no port.
    FailedToStartMetricServer,
    /// A `healthCheckNodePort` cannot be had.
    FailedToStartServiceHealthcheck,
    /// An older Service has a frontend.
    FrontendConflict,
    /// The maps do not take the Service.
    FailedToProgramService,
    /// The object cannot be understood.
    InvalidObject,
}

impl Reason {
    const fn name(self) -> &'static str {
        match self {
            Self::Starting => "Starting",
            Self::FailedToStartProxierHealthcheck => "FailedToStartProxierHealthcheck",
            Self::FailedToStartMetricServer => "FailedToStartMetricServer",
            Self::FailedToStartServiceHealthcheck => "FailedToStartServiceHealthcheck",
            Self::FrontendConflict => "FrontendConflict",
            Self::FailedToProgramService => "FailedToProgramService",
            Self::InvalidObject => "InvalidObject",
        }
    }

    /// What was tried.
    const fn action(self) -> &'static str {
        match self {
            Self::Starting => "StartKlb",
            Self::FailedToStartProxierHealthcheck
            | Self::FailedToStartMetricServer
            | Self::FailedToStartServiceHealthcheck => "Listen",
            Self::FrontendConflict | Self::FailedToProgramService => "ProgramService",
            Self::InvalidObject => "ReadObject",
        }
    }

    const fn severity(self) -> EventType {
        match self {
            Self::Starting => EventType::Normal,
            _ => EventType::Warning,
        }
    }
}

/// What is to be told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Notice {
    about: ObjectRef,
    reason: Reason,
    note: String,
}

/// Takes what is to be told. Never waits.
#[derive(Clone, Debug, Default)]
pub struct Events {
    node: Arc<str>,
    /// `None` where there is nobody to tell.
    post: Option<(mpsc::Sender<Notice>, Arc<Shared>)>,
}

#[derive(Debug, Default)]
struct Shared {
    told: Mutex<Told>,
    dropped: AtomicU64,
}

/// What was told lately.
#[derive(Debug, Default)]
struct Told(HashMap<Notice, Instant>);

/// Whether a notice is worth a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Worth {
    New,
    Told,
    /// There is too much of it.
    TooMuch,
}

impl Told {
    /// Judges a notice, and remembers it if it is new.
    fn judge(&mut self, notice: &Notice, now: Instant) -> Worth {
        let is_recent = |since: &Instant| now.saturating_duration_since(*since) < REPEAT;
        if self.0.get(notice).is_some_and(is_recent) {
            return Worth::Told;
        }
        if self.0.len() >= MEMORY {
            self.0.retain(|_, since| is_recent(since));
        }
        if self.0.len() >= MEMORY {
            return Worth::TooMuch;
        }
        self.0.insert(notice.clone(), now);
        Worth::New
    }
}

impl Shared {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It did not reach anybody, and may be told again at once.
    fn miss(&self, notice: &Notice) {
        self.told().0.remove(notice);
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

impl Events {
    /// For a node whose objects come from elsewhere: nobody is told anything.
    pub fn nowhere(node: &str) -> Self {
        Self {
            node: node.into(),
            post: None,
        }
    }

    /// Events for the API server, and what posts them until nobody has any more.
    pub fn new(connection: Connection, node: &str) -> (Self, impl Future<Output = ()> + use<>) {
        let (sender, notices) = mpsc::channel(QUEUE);
        let shared = Arc::<Shared>::default();
        let poster = Poster {
            connection,
            node: node.to_owned(),
            recorder: None,
            shared: Arc::clone(&shared),
            failing: false,
            reported: 0,
        };
        let this = Self {
            node: node.into(),
            post: Some((sender, shared)),
        };
        (this, poster.post_all(notices))
    }

    /// Name of the node that the agent is on.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Tells something of an object.
    pub fn tell(&self, reason: Reason, about: ObjectRef, note: impl Into<String>) {
        let Some((sender, shared)) = &self.post else {
            return;
        };
        let notice = Notice {
            about,
            reason,
            note: shorten(note.into()),
        };
        let worth = shared.told().judge(&notice, Instant::now());
        match worth {
            Worth::Told => {}
            Worth::TooMuch => shared.miss(&notice),
            Worth::New => {
                if let Err(error) = sender.try_send(notice) {
                    shared.miss(&error.into_inner());
                }
            }
        }
    }

    /// Tells something of a Service.
    pub fn tell_service(&self, reason: Reason, service: &NamespacedName, note: impl Into<String>) {
        self.tell(reason, ObjectRef::service(service), note);
    }

    /// Tells something of the node.
    pub fn tell_node(&self, reason: Reason, note: impl Into<String>) {
        self.tell(reason, ObjectRef::node(&self.node), note);
    }

    /// How many events reached nobody.
    pub fn dropped(&self) -> u64 {
        let shared = self.post.as_ref().map(|(_, shared)| shared);
        shared.map_or(0, |shared| shared.dropped.load(Ordering::Relaxed))
    }
}

/// Cuts a note at a character.
fn shorten(mut note: String) -> String {
    if note.len() > NOTE {
        let cut = (0..=NOTE).rev().find(|index| note.is_char_boundary(*index));
        note.truncate(cut.unwrap_or(0));
    }
    note
}

/// Posts, one at a time.
struct Poster {
    connection: Connection,
    node: String,
    recorder: Option<(Client, Recorder)>,
    shared: Arc<Shared>,
    /// The last thing that happened was an error, and that was said.
    failing: bool,
    /// Of the events that reached nobody, how many were told in the log.
    reported: u64,
}

impl Poster {
    async fn post_all(mut self, mut notices: mpsc::Receiver<Notice>) {
        let mut pace = interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while let Some(notice) = notices.recv().await {
            pace.tick().await;
            let posted = timeout(PATIENCE, self.post(&notice)).await;
            match posted.unwrap_or_else(|_elapsed| Err(anyhow::anyhow!("no answer"))) {
                Ok(()) => self.succeeded(),
                Err(error) => self.failed(&notice, &error),
            }
        }
    }

    fn succeeded(&mut self) {
        self.failing = false;
        let dropped = self.shared.dropped.load(Ordering::Relaxed);
        if dropped > self.reported {
            warn!(count = dropped - self.reported, "events were not posted");
            self.reported = dropped;
        }
    }

    fn failed(&mut self, notice: &Notice, error: &anyhow::Error) {
        if !mem::replace(&mut self.failing, true) {
            let reason = notice.reason.name();
            warn!(about = %notice.about, reason, error = format!("{error:#}"), "an event is not posted, nor may others be");
        }
        self.shared.miss(notice);
        // Credentials may be renewed, or the server have moved.
        self.recorder = None;
    }

    async fn post(&mut self, notice: &Notice) -> anyhow::Result<()> {
        let (client, recorder) = match &mut self.recorder {
            Some(recorder) => recorder,
            place @ None => {
                let client = self.connection.client().await?;
                let reporter = Reporter {
                    controller: CONTROLLER.to_owned(),
                    instance: Some(self.node.clone()),
                };
                place.insert((client.clone(), Recorder::new(client, reporter)))
            }
        };
        let regarding = regarding(client, &notice.about).await;
        let event = Event {
            type_: notice.reason.severity(),
            reason: notice.reason.name().to_owned(),
            note: Some(notice.note.clone()).filter(|note| !note.is_empty()),
            action: notice.reason.action().to_owned(),
            secondary: None,
        };
        recorder.publish(&event, &regarding).await?;
        Ok(())
    }
}

/// Names the object as others do who look for its events. `kubectl describe`
/// goes by the UID, which for a Node is its name by convention.
async fn regarding(client: &Client, about: &ObjectRef) -> ObjectReference {
    let resource = resource(about.kind);
    let name = about.id.name();
    let uid = match about.kind {
        Kind::Node => Some(name.to_owned()),
        Kind::Namespace => None,
        Kind::Service | Kind::EndpointSlice | Kind::Pod => {
            let api: Api<DynamicObject> =
                Api::namespaced_with(client.clone(), about.id.namespace(), &resource);
            let object = api.get_metadata(name).await;
            // An event without is better than none.
            object.ok().and_then(|object| object.metadata.uid)
        }
    };
    ObjectReference {
        api_version: Some(resource.api_version),
        kind: Some(resource.kind),
        name: Some(name.to_owned()),
        namespace: about
            .kind
            .is_namespaced()
            .then(|| about.id.namespace().to_owned()),
        uid,
        ..ObjectReference::default()
    }
}

fn resource(kind: Kind) -> ApiResource {
    let group = match kind {
        Kind::EndpointSlice => "discovery.k8s.io",
        Kind::Service | Kind::Node | Kind::Pod | Kind::Namespace => "",
    };
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, "v1", &kind.to_string()))
}

#[cfg(test)]
mod tests {
    use lb_tests::apiserver::ApiServer;
    use serde_json::{Value, json};
    use tempfile::TempDir;
    use tokio::task::JoinHandle;

    use super::*;

    fn service(name: &str) -> NamespacedName {
        NamespacedName::new("default", name)
    }

    fn notice(note: &str) -> Notice {
        Notice {
            about: ObjectRef::service(&service("s")),
            reason: Reason::FrontendConflict,
            note: note.to_owned(),
        }
    }

    #[test]
    fn the_same_is_told_again_after_a_while_only() {
        let mut told = Told::default();
        let start = Instant::now();
        for (note, after, worth) in [
            ("a", 0, Worth::New),
            ("a", 1, Worth::Told),
            ("b", 1, Worth::New),
            ("a", 299, Worth::Told),
            ("a", 300, Worth::New),
            ("a", 301, Worth::Told),
        ] {
            let now = start + Duration::from_secs(after);
            assert_eq!(told.judge(&notice(note), now), worth, "{note} {after}");
        }
    }

    #[test]
    fn what_is_remembered_has_a_limit() {
        let mut told = Told::default();
        let start = Instant::now();
        for number in 0..MEMORY {
            let worth = told.judge(&notice(&number.to_string()), start);
            assert_eq!(worth, Worth::New);
        }
        assert_eq!(told.judge(&notice("more"), start), Worth::TooMuch);
        assert_eq!(told.judge(&notice("more"), start + REPEAT), Worth::New);
        assert_eq!(told.0.len(), 1);
    }

    #[test]
    fn a_long_note_is_cut_between_characters() {
        assert_eq!(shorten("short".to_owned()), "short");
        let note = shorten("é".repeat(600) + "x");
        assert_eq!(note, "é".repeat(500));
        let note = shorten("x".to_owned() + &"é".repeat(600));
        assert_eq!(note.len(), 999);
    }

    #[test]
    fn names_are_those_that_operators_know() {
        for reason in [
            Reason::Starting,
            Reason::FailedToStartProxierHealthcheck,
            Reason::FailedToStartMetricServer,
            Reason::FailedToStartServiceHealthcheck,
            Reason::FrontendConflict,
            Reason::FailedToProgramService,
            Reason::InvalidObject,
        ] {
            assert_eq!(format!("{reason:?}"), reason.name());
        }
        assert_eq!(resource(Kind::EndpointSlice).plural, "endpointslices");
        assert_eq!(resource(Kind::Service).plural, "services");
    }

    struct Fixture {
        server: ApiServer,
        events: Events,
        poster: JoinHandle<()>,
        _folder: TempDir,
    }

    impl Fixture {
        fn start() -> Self {
            let folder = TempDir::new().expect("a temporary folder");
            let server = ApiServer::start();
            let connection = Connection::new(Some(&server.kubeconfig(folder.path())));
            let (events, poster) = Events::new(connection, "node-1");
            Self {
                server,
                events,
                poster: tokio::spawn(poster),
                _folder: folder,
            }
        }

        async fn await_posted(&self, count: usize) -> Vec<Value> {
            let posted = async {
                while self.server.posted().len() < count {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            };
            let limit = Duration::from_secs(20);
            timeout(limit, posted).await.expect("posted in time");
            self.server.posted()
        }
    }

    impl Drop for Fixture {
        fn drop(&mut self) {
            self.poster.abort();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_event_names_its_object_and_says_what_happened() {
        let fixture = Fixture::start();
        fixture.server.put(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": "s", "namespace": "default", "uid": "0-8-15" },
        }));
        let reason = Reason::FailedToStartServiceHealthcheck;
        fixture.events.tell_service(reason, &service("s"), "taken");
        fixture.events.tell_node(Reason::Starting, "");
        let posted = fixture.await_posted(2).await;
        let event = |index: usize, pointer: &str| posted[index].pointer(pointer).cloned();
        for (index, pointer, value) in [
            (0, "/apiVersion", "events.k8s.io/v1"),
            (0, "/metadata/namespace", "default"),
            (0, "/regarding/apiVersion", "v1"),
            (0, "/regarding/kind", "Service"),
            (0, "/regarding/name", "s"),
            (0, "/regarding/namespace", "default"),
            (0, "/regarding/uid", "0-8-15"),
            (0, "/reason", "FailedToStartServiceHealthcheck"),
            (0, "/type", "Warning"),
            (0, "/note", "taken"),
            (0, "/action", "Listen"),
            (0, "/reportingController", "klb"),
            (0, "/reportingInstance", "node-1"),
            (1, "/regarding/kind", "Node"),
            (1, "/regarding/name", "node-1"),
            (1, "/regarding/uid", "node-1"),
            (1, "/reason", "Starting"),
            (1, "/type", "Normal"),
        ] {
            assert_eq!(
                event(index, pointer),
                Some(json!(value)),
                "{pointer} of {posted:?}"
            );
        }
        let path = "POST /apis/events.k8s.io/v1/namespaces/default/events?";
        let requests = fixture.server.requests();
        let posts = requests.iter().filter(|request| *request == path);
        assert_eq!(posts.count(), 2, "{requests:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_loop_of_retries_posts_once() {
        let fixture = Fixture::start();
        for _ in 0..1000 {
            let reason = Reason::FailedToProgramService;
            fixture.events.tell_service(reason, &service("s"), "full");
        }
        fixture.events.tell_node(Reason::Starting, "last");
        let posted = fixture.await_posted(2).await;
        assert_eq!(posted[1]["note"], "last");
        assert_eq!(fixture.events.dropped(), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn while_the_server_is_away_events_are_counted_and_nobody_waits() {
        let fixture = Fixture::start();
        fixture.server.set_down(true);
        let count = 10 * QUEUE as u64;
        let start = Instant::now();
        for number in 0..count {
            let reason = Reason::FailedToProgramService;
            let service = service(&format!("s-{number}"));
            fixture.events.tell_service(reason, &service, "full");
        }
        assert!(start.elapsed() < Duration::from_secs(10), "nobody waits");
        assert!(fixture.events.dropped() >= count - QUEUE as u64 - 1);
        assert!(fixture.server.posted().is_empty());
        fixture.server.set_down(false);
        fixture.await_posted(1).await;
    }

    #[tokio::test]
    async fn without_a_server_nothing_is_told() {
        let events = Events::nowhere("node-1");
        events.tell_node(Reason::Starting, "");
        assert_eq!((events.node(), events.dropped()), ("node-1", 0));
    }
}
