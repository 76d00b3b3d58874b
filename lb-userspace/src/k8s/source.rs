//! Where objects come from: a folder of manifests or the API server.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic,
};

use kube::Client;
use tokio::{sync::mpsc, task::JoinSet};

use super::{
    api::Connection,
    events::Events,
    manifests::ManifestSource,
    objects,
    watch::{self, Audience, News, Selectors},
};
use crate::{
    metrics::ApiMetrics,
    model::{Concern, Event, Kind, ObjectRef, Scope},
    record::Recorder,
};

/// What was heard and not yet taken, at most. Then the server has to wait.
const QUEUE: usize = 1024;

/// Tells of objects.
pub enum Source {
    Manifests(Box<ManifestSource>),
    Api(Box<ApiSource>),
    /// Whatever a test tells.
    #[cfg(test)]
    Test(mpsc::UnboundedReceiver<Vec<Event>>),
}

impl Source {
    /// The next changes, in the order in which they happened to each object;
    /// never empty. Each [`Scope`] is told to be complete once.
    ///
    /// Cancelling the future loses nothing.
    pub async fn next(&mut self) -> Vec<Event> {
        match self {
            Self::Manifests(source) => source.next().await,
            Self::Api(source) => source.next().await,
            #[cfg(test)]
            Self::Test(source) => source.recv().await.expect("the test goes on"),
        }
    }
}

/// Who else hears how following the server goes.
#[derive(Clone, Debug)]
pub struct Ears {
    /// For operators: what makes no sense.
    pub events: Events,
    pub metrics: ApiMetrics,
    /// For commands.
    pub recorder: Recorder,
}

/// The API server as the source of objects.
pub struct ApiSource {
    connection: Connection,
    ears: Ears,
    news: mpsc::Receiver<News>,
    watches: JoinSet<()>,
    /// What was not listed yet.
    waiting: BTreeMap<Scope, BTreeSet<Kind>>,
    unknown: BTreeMap<ObjectRef, Concern>,
}

impl ApiSource {
    /// Begins to follow what concerns a node; its pods, too, if that is asked
    /// for.
    ///
    /// The client is one that the connection gave.
    pub fn start(
        connection: Connection,
        ears: Ears,
        client: &Client,
        node_name: &str,
        with_pods: bool,
    ) -> Self {
        let (sender, news) = mpsc::channel(QUEUE);
        let selectors = |labels: Option<&str>, fields: Option<String>| Selectors {
            labels: labels.map(str::to_owned),
            fields,
        };
        let mut this = Self {
            connection,
            ears,
            news,
            watches: JoinSet::new(),
            waiting: BTreeMap::from([
                (Scope::Services, BTreeSet::new()),
                (Scope::Pods, BTreeSet::new()),
            ]),
            unknown: BTreeMap::new(),
        };
        // Those of kube-proxy: what other proxies serve, and what nobody does,
        // is not sent at all.
        this.follow::<objects::Service>(
            client,
            &sender,
            selectors(
                Some("!service.kubernetes.io/service-proxy-name"),
                Some("spec.clusterIP!=None".to_owned()),
            ),
        );
        this.follow::<objects::EndpointSlice>(
            client,
            &sender,
            selectors(Some("!service.kubernetes.io/headless"), None),
        );
        let own = format!("metadata.name={node_name}");
        this.follow::<objects::Node>(client, &sender, selectors(None, Some(own)));
        if with_pods {
            let own = format!("spec.nodeName={node_name}");
            this.follow::<objects::Pod>(client, &sender, selectors(None, Some(own)));
            // Which of them opt out an annotation says, which no selector can.
            this.follow::<objects::Namespace>(client, &sender, Selectors::default());
        }
        this
    }

    fn follow<R: super::resource::Resource + 'static>(
        &mut self,
        client: &Client,
        news: &mpsc::Sender<News>,
        selectors: Selectors,
    ) {
        let waiting = self.waiting.entry(R::KIND.scope()).or_default();
        waiting.insert(R::KIND);
        let watch = watch::follow::<R>(
            self.connection.clone(),
            client.clone(),
            selectors,
            Audience {
                news: news.clone(),
                ears: self.ears.clone(),
            },
        );
        self.watches.spawn(watch);
    }

    async fn next(&mut self) -> Vec<Event> {
        let mut events = self.synced();
        while events.is_empty() {
            let mut news = Vec::new();
            tokio::select! {
                _ = self.news.recv_many(&mut news, QUEUE) => {}
                Some(ended) = self.watches.join_next() => {
                    if let Err(error) = ended {
                        panic::resume_unwind(error.into_panic());
                    }
                }
            }
            events = self.take(news);
        }
        events
    }

    fn take(&mut self, news: Vec<News>) -> Vec<Event> {
        let mut events = Vec::with_capacity(news.len());
        let before = self.unknown.clone();
        for news in news {
            match news {
                News::Apply(object) => {
                    self.unknown.remove(&object.reference());
                    events.push(Event::Apply(object));
                }
                News::Gone(reference) => {
                    self.unknown.remove(&reference);
                    events.push(Event::Delete(reference));
                }
                News::Unreadable(reference, concern) => {
                    self.unknown.insert(reference, concern);
                }
                News::Listed(kind) => {
                    if let Some(waiting) = self.waiting.get_mut(&kind.scope()) {
                        waiting.remove(&kind);
                    }
                }
            }
        }
        if self.unknown != before {
            events.push(Event::Unknown(self.unknown.values().cloned().collect()));
        }
        events.append(&mut self.synced());
        events
    }

    /// The scopes that have become complete.
    fn synced(&mut self) -> Vec<Event> {
        let mut complete = Vec::new();
        self.waiting.retain(|scope, waiting| {
            if waiting.is_empty() {
                complete.push(Event::Synced(*scope));
            }
            !waiting.is_empty()
        });
        complete
    }
}
