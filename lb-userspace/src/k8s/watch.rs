//! Following one kind of objects through the API, for ever: written once, for
//! all kinds.
//!
//! kube's watcher lists, follows, resumes where it was after a disconnect, and
//! lists again when the server has forgotten that point (410). Here is what it
//! leaves open: an object that cannot be understood takes nothing else with it,
//! what a new list lacks is deleted, a server without streaming lists is asked
//! for pages, one that is busy when it says so, and nothing that makes no sense
//! is skipped over.

use std::{
    borrow::Cow, collections::BTreeMap, fmt, marker::PhantomData, mem, pin::pin, time::Duration,
};

use futures::StreamExt as _;
use k8s_openapi::{ClusterResourceScope, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Client,
    runtime::{
        utils::Backoff as _,
        watcher::{self, Config, DefaultBackoff, InitialListStrategy, watcher},
    },
};
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::value::RawValue;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{
    api::{Connection, Route},
    convert::{Converted, ObjectError},
    events::Reason,
    resource::{self, Resource},
    source::Ears,
};
use crate::{
    model::{Concern, Kind, NamespacedName, Object, ObjectRef},
    record::Fault,
};

/// Objects on one page of a list, where the server offers no stream.
const PAGE: u32 = 250;

/// However long a server says that it is busy, it is asked again after this time:
/// meanwhile the node does not hear of what happens.
const BUSY: Duration = Duration::from_secs(300);

/// After so many failures in a row, which take minutes, it is read again where
/// the server is and who klb is to it.
const RECONNECT: u32 = 10;

/// After so many failures in a row of a watch that begins where the last one
/// ended, that point is given up.
const GIVE_UP: u32 = 3;

/// Of which objects of a kind to hear.
#[derive(Clone, Debug, Default)]
pub(super) struct Selectors {
    pub labels: Option<String>,
    pub fields: Option<String>,
}

/// What is heard of one kind.
#[derive(Debug)]
pub(super) enum News {
    Apply(Object),
    /// Deleted, or none of klb's business any more.
    Gone(ObjectRef),
    /// It is there and makes no sense, and never did.
    Unreadable(ObjectRef, Concern),
    /// All that there is was told.
    Listed(Kind),
}

/// Who is told.
#[derive(Clone, Debug)]
pub(super) struct Audience {
    pub news: mpsc::Sender<News>,
    pub ears: Ears,
}

impl Audience {
    /// Tells operators what of an object makes no sense.
    fn complain(&self, object: &ObjectRef, error: &ObjectError) {
        let note = format!("{}: {}", error.field, error.message);
        self.ears
            .events
            .tell(Reason::InvalidObject, object.clone(), note);
    }

    /// Notes all that makes no sense of an object; nothing if it is well.
    fn note(&self, object: &ObjectRef, faults: Vec<Fault>) {
        self.ears.recorder.object(object, faults);
    }
}

/// Nobody listens any more.
struct Deaf;

/// Follows the objects of one kind until nobody listens.
pub(super) async fn follow<R: Resource + 'static>(
    connection: Connection,
    client: Client,
    selectors: Selectors,
    audience: Audience,
) {
    let mut follower = Follower::<R>::new(connection, client, audience);
    let mut config = Config {
        label_selector: selectors.labels,
        field_selector: selectors.fields,
        page_size: Some(PAGE),
        ..Config::default().streaming_lists()
    };
    loop {
        match follower.follow(&config).await {
            Ok(Again::List) => {}
            Ok(Again::InPages) => config.initial_list_strategy = InitialListStrategy::ListWatch,
            Ok(Again::InStream) => {
                config.initial_list_strategy = InitialListStrategy::StreamingList;
            }
            Err(Deaf) => return,
        }
    }
}

/// Why a list is begun anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    List,
    /// The server has no streaming lists.
    InPages,
    /// A list in pages is long over, and the server may be another one.
    InStream,
}

/// What is known of one kind.
struct Follower<R> {
    connection: Connection,
    client: Client,
    /// Of that client.
    route: Route,
    backoff: DefaultBackoff,
    audience: Audience,
    objects: BTreeMap<NamespacedName, Known>,
    /// Errors since the server answered last.
    failures: u32,
    kind: PhantomData<fn() -> R>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    told: Told,
    /// It was in the list that is being read.
    listed: bool,
}

/// As what something that is there was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// It is none of klb's business.
    Nothing,
    Object,
    Unreadable,
}

impl<R: Resource + 'static> Follower<R> {
    fn new(connection: Connection, client: Client, audience: Audience) -> Self {
        let (route, client) = Route::new(client);
        Self {
            connection,
            client,
            route,
            backoff: DefaultBackoff::default(),
            audience,
            objects: BTreeMap::new(),
            failures: 0,
            kind: PhantomData,
        }
    }

    /// From a list on, until it is to be begun anew.
    async fn follow(&mut self, config: &Config) -> Result<Again, Deaf> {
        let mut events = pin!(watcher(
            Api::<Received<R>>::all(self.client.clone()),
            config.clone()
        ));
        let in_pages = config.initial_list_strategy == InitialListStrategy::ListWatch;
        let patience = self.connection.patience;
        let stall = if in_pages {
            patience.page_stall
        } else {
            patience.stream_stall
        };
        let (mut listing, mut begun) = (true, false);
        loop {
            // A watch may be silent for as long as the server likes.
            let patience = if listing { stall } else { Duration::MAX };
            let error = match timeout(patience, events.next()).await {
                Ok(Some(Ok(event))) => {
                    match event {
                        watcher::Event::Init if in_pages && !listing => {
                            return Ok(Again::InStream);
                        }
                        // Cut short, which the watcher does not call an error.
                        watcher::Event::Init if mem::replace(&mut begun, true) => {
                            self.wait(Duration::ZERO).await;
                        }
                        watcher::Event::InitDone => (listing, begun) = (false, false),
                        _ => {}
                    }
                    listing |= begun;
                    self.take(event).await?;
                    if !listing {
                        self.succeeded();
                    }
                    continue;
                }
                Ok(Some(Err(error))) => error,
                Ok(None) => return Ok(Again::List),
                Err(_elapsed) => {
                    warn!(kind = %R::KIND, "a list from the API server makes no progress");
                    return Ok(Again::InPages);
                }
            };
            if listing && is_no_stream(&error) {
                debug!(kind = %R::KIND, "no streaming lists; asking for pages");
                return Ok(Again::InPages);
            }
            self.failed(&error);
            self.wait(busy_for(&error)).await;
            if is_unauthorized(&error) || self.failures.is_multiple_of(RECONNECT) {
                self.reconnect().await;
            }
            if is_gap(&error) || is_ended(&error) && self.failures >= GIVE_UP {
                return Ok(Again::List);
            }
        }
    }

    /// Waits before another try, longer from one to the next, and at least for as
    /// long as the server is busy.
    async fn wait(&mut self, busy: Duration) {
        let wait = self.backoff.next().unwrap_or(BUSY);
        sleep(busy + wait / self.connection.patience.haste).await;
    }

    /// Credentials may have been renewed, or the server have moved. Whatever was
    /// heard until now is known all the same.
    async fn reconnect(&self) {
        match self.connection.client().await {
            Ok(client) => self.route.change(client),
            Err(error) => {
                warn!(%error, "what says how to reach the API server cannot be read; going on with what it said before");
            }
        }
    }

    fn succeeded(&mut self) {
        self.backoff.reset();
        if mem::take(&mut self.failures) > 0 {
            info!(kind = %R::KIND, "the API server answers again");
            self.audience.ears.recorder.heard(&R::KIND.to_string());
        }
    }

    fn failed(&mut self, error: &watcher::Error) {
        self.failures += 1;
        let ears = &self.audience.ears;
        ears.metrics.failed(R::KIND);
        ears.recorder.unheard(&R::KIND.to_string(), error);
        warn!(kind = %R::KIND, %error, "following the API server; all stays as it was, trying again");
    }

    async fn take(&mut self, event: watcher::Event<Received<R>>) -> Result<(), Deaf> {
        match event {
            watcher::Event::Init => {
                for known in self.objects.values_mut() {
                    known.listed = false;
                }
                Ok(())
            }
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                self.apply(object).await
            }
            watcher::Event::InitDone => {
                let objects = self.objects.iter();
                let gone = objects.filter(|(_, known)| !known.listed);
                let gone: Vec<_> = gone.map(|(id, _)| id.clone()).collect();
                for id in gone {
                    self.forget(id).await?;
                }
                self.audience.ears.metrics.listed(R::KIND);
                self.count();
                debug!(kind = %R::KIND, objects = self.objects.len(), "listed");
                self.tell(News::Listed(R::KIND)).await
            }
            watcher::Event::Delete(object) => self.forget(object.id()).await,
        }
    }

    async fn apply(&mut self, object: Received<R>) -> Result<(), Deaf> {
        let id = object.id();
        let reference = reference::<R>(&id);
        let known = self.objects.entry(id).or_insert(Known {
            told: Told::Nothing,
            listed: true,
        });
        known.listed = true;
        let news = match object.content {
            Ok(Converted { object, warnings }) => {
                let faults = warnings
                    .iter()
                    .map(|warning| Fault::from(warning).in_part());
                self.audience.note(&reference, faults.collect());
                for warning in &warnings {
                    warn!("{warning}");
                    self.audience.complain(&reference, warning);
                }
                match object {
                    Some(object) => {
                        known.told = Told::Object;
                        News::Apply(object)
                    }
                    None if mem::replace(&mut known.told, Told::Nothing) == Told::Nothing => {
                        return Ok(());
                    }
                    None => News::Gone(reference),
                }
            }
            Err(error) => {
                warn!("skipped, what it described stays: {error}");
                self.audience.note(&reference, vec![Fault::from(&error)]);
                self.audience.complain(&reference, &error);
                if known.told == Told::Object {
                    return Ok(());
                }
                known.told = Told::Unreadable;
                News::Unreadable(reference, object.concern)
            }
        };
        self.count();
        self.tell(news).await
    }

    async fn forget(&mut self, id: NamespacedName) -> Result<(), Deaf> {
        self.objects.remove(&id);
        self.count();
        let reference = reference::<R>(&id);
        self.audience.note(&reference, Vec::new());
        self.tell(News::Gone(reference)).await
    }

    fn count(&self) {
        let metrics = &self.audience.ears.metrics;
        metrics.follows(R::KIND, self.objects.len());
    }

    async fn tell(&self, news: News) -> Result<(), Deaf> {
        self.audience.news.send(news).await.map_err(|_closed| Deaf)
    }
}

fn reference<R: Resource>(id: &NamespacedName) -> ObjectRef {
    ObjectRef {
        kind: R::KIND,
        id: id.clone(),
    }
}

/// Whether the server understands no request for a streaming list (before
/// 1.27, and where the feature is off). It says `Invalid` then.
fn is_no_stream(error: &watcher::Error) -> bool {
    let watcher::Error::WatchStartFailed(kube::Error::Api(status)) = error else {
        return false;
    };
    matches!(status.code, 400 | 422)
}

/// What a server says in the place of an answer.
fn refusal(error: &watcher::Error) -> Option<&kube::core::Status> {
    use watcher::Error::{InitialListFailed, WatchError, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchError(status) => Some(status),
        _ => None,
    }
}

fn is_unauthorized(error: &watcher::Error) -> bool {
    refusal(error).is_some_and(|status| status.code == 401)
}

/// For how long a server says that it has no time.
fn busy_for(error: &watcher::Error) -> Duration {
    let details = refusal(error).and_then(|status| status.details.as_ref());
    let seconds = details.map_or(0, |details| details.retry_after_seconds);
    Duration::from_secs(seconds.into()).min(BUSY)
}

/// Whether a watch was ended by an error, which a server may do again and again
/// for the point where the watch begins.
fn is_ended(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchError(_))
}

/// Whether something was said that is lost with this error, so that only a list
/// can tell what it was. All others the watcher resumes from where it was.
fn is_gap(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, NoResourceVersion, WatchFailed, WatchStartFailed};
    match error {
        WatchFailed(kube::Error::SerdeError(_) | kube::Error::Api(_))
        | InitialListFailed(_)
        | NoResourceVersion => true,
        // The watcher begins anew only if an event says that its point is
        // forgotten, and not if the whole request is refused so.
        WatchStartFailed(kube::Error::Api(status)) => status.code == 410,
        _ => false,
    }
}

/// An object as the server sends it, read at once: nothing is kept that klb
/// does not go by.
pub(super) struct Received<R> {
    /// Name and version.
    metadata: ObjectMeta,
    concern: Concern,
    content: Result<Converted, ObjectError>,
    kind: PhantomData<fn() -> R>,
}

impl<R> Received<R> {
    fn id(&self) -> NamespacedName {
        id(&self.metadata)
    }
}

fn id(metadata: &ObjectMeta) -> NamespacedName {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    NamespacedName::new(text(&metadata.namespace), text(&metadata.name))
}

/// As much of an object as every one has.
#[derive(Deserialize)]
struct Head {
    metadata: HeadMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HeadMetadata {
    name: String,
    namespace: Option<String>,
    resource_version: Option<String>,
    labels: Option<BTreeMap<String, String>>,
}

impl<'de, R: Resource> Deserialize<'de> for Received<R> {
    /// Fails only for what has no name.
    ///
    /// Works on a text in which the type of an event stands before its object,
    /// as every server writes it (`metav1.WatchEvent`, in Go's order of fields).
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Box::<RawValue>::deserialize(deserializer)?;
        let head: Head = serde_json::from_str(text.get()).map_err(D::Error::custom)?;
        let HeadMetadata {
            name,
            namespace,
            resource_version,
            labels,
        } = head.metadata;
        let metadata = ObjectMeta {
            name: Some(name),
            namespace,
            resource_version,
            ..ObjectMeta::default()
        };
        let label = |name: &str| labels.as_ref()?.get(name).map(String::as_str);
        let id = id(&metadata);
        Ok(Self {
            concern: resource::concern(R::KIND, &id, label),
            content: resource::read::<R>(&mut serde_json::Deserializer::from_str(text.get()), id),
            metadata,
            kind: PhantomData,
        })
    }
}

impl<R> Clone for Received<R> {
    fn clone(&self) -> Self {
        Self {
            metadata: self.metadata.clone(),
            concern: self.concern.clone(),
            content: self.content.clone(),
            kind: PhantomData,
        }
    }
}

impl<R> fmt::Debug for Received<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.content.fmt(f)
    }
}

impl<R: Resource> kube::Resource for Received<R> {
    type DynamicType = ();
    /// All are followed in the whole cluster.
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        R::KIND.to_string().into()
    }

    fn group((): &()) -> Cow<'_, str> {
        match R::KIND {
            Kind::EndpointSlice => "discovery.k8s.io".into(),
            Kind::Service | Kind::Node | Kind::Pod | Kind::Namespace => "".into(),
        }
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        format!("{}s", R::KIND.to_string().to_lowercase()).into()
    }

    /// All that is of interest in a Namespace.
    fn metadata_api() -> bool {
        R::KIND == Kind::Namespace
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
