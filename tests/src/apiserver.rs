//! A server that speaks as much of the Kubernetes API as an agent hears: lists
//! in pages, streaming lists, watches with bookmarks, selectors, and all the
//! ways in which these go wrong. For faults that a real server cannot be made to
//! show; what a real one does is shown by tests against a real one.
//!
//! Everything happens when a test says so, nothing by the clock.

mod http;
mod store;
mod tls;

use std::{
    collections::BTreeSet,
    fs,
    io::ErrorKind,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use socket2::SockRef;

use self::{
    http::Connection,
    store::{Name, Store},
    tls::Authority,
};
use crate::wait;

/// How long a request may take to come.
const REQUEST: Duration = Duration::from_secs(20);

/// The server. Dropping it closes all connections.
#[derive(Debug)]
pub struct ApiServer {
    shared: Arc<Shared>,
    listener: TcpListener,
    address: SocketAddr,
    authority: Option<Authority>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Something is new in the state.
    news: Condvar,
}

#[derive(Debug, Default)]
struct State {
    store: Store,
    faults: Faults,
    /// Requests since the start: method, and path with its query.
    requests: Vec<String>,
    /// Events that watches were sent: type and kind.
    sent: Vec<String>,
    /// Objects that were sent to the server.
    posted: Vec<Value>,
    /// Connections of an earlier number are closed.
    generation: u64,
    /// Whom the server lets in; everybody if there is none.
    token: Option<String>,
    ended: bool,
}

/// What goes wrong until a test says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// No streaming lists, as servers before 1.27.
    NoStreams,
    /// As servers that take a streaming list for another request: no word of
    /// where it ends.
    EndlessLists,
    /// New connections are closed at once.
    Down,
    /// Bodies come byte by byte.
    Slow,
    /// The next request for a page that is not the first one is refused.
    LostPage,
    /// A watch that begins at a forgotten version is refused as a whole.
    GoneAtOnce,
}

/// What goes wrong.
#[derive(Debug, Default)]
struct Faults {
    present: BTreeSet<Fault>,
    /// Kinds that nobody may see.
    forbidden: Vec<String>,
    /// The next requests are refused so.
    refusals: Vec<Refusal>,
    /// In the place of the next events of a kind.
    next_events: Option<(String, BadEvent, usize)>,
}

impl Faults {
    fn has(&self, fault: Fault) -> bool {
        self.present.contains(&fault)
    }

    fn set(&mut self, fault: Fault, present: bool) {
        if present {
            self.present.insert(fault);
        } else {
            self.present.remove(&fault);
        }
    }
}

/// How a request is refused.
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    pub status: u16,
    /// Seconds after which the client may come again.
    pub retry_after: Option<u32>,
}

/// What a watch sends in the place of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadEvent {
    /// Its first half; then the connection ends.
    Half,
    /// A line that is no JSON.
    Garbage,
    /// An error with this code; then the connection ends.
    Error(u16),
}

impl ApiServer {
    /// A server that speaks plain HTTP, at an address of the calling thread's
    /// network namespace.
    ///
    /// # Panics
    /// If there is no free port.
    pub fn start() -> Self {
        Self::listen(None)
    }

    /// As [`Self::start`], over TLS with a certificate of its own.
    pub fn start_tls() -> Self {
        Self::listen(Some(Authority::new()))
    }

    /// Another address of the same server, in the network namespace of the
    /// calling thread. When one of the two is dropped, both are closed.
    #[must_use]
    pub fn mirror(&self) -> Self {
        Self::serve(Arc::clone(&self.shared), None)
    }

    fn listen(authority: Option<Authority>) -> Self {
        Self::serve(Arc::default(), authority)
    }

    fn serve(shared: Arc<Shared>, authority: Option<Authority>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let server = Self {
            shared: Arc::clone(&shared),
            listener: listener.try_clone().expect("a file descriptor"),
            address,
            authority,
        };
        let tls = server.authority.as_ref().map(Authority::server_config);
        thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let (is_ended, is_down, generation) = {
                    let state = shared.lock();
                    let is_down = state.faults.has(Fault::Down);
                    (state.ended, is_down, state.generation)
                };
                if is_ended {
                    return;
                }
                if !is_down {
                    let (shared, tls) = (Arc::clone(&shared), tls.clone());
                    thread::spawn(move || serve(&shared, generation, stream, tls));
                }
            }
        });
        server
    }

    /// Writes a kubeconfig file for this server into a folder. With a token it
    /// names a file that has it; [`Self::require_token`] writes it.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn kubeconfig(&self, folder: &Path) -> PathBuf {
        let mut cluster = json!({ "server": format!("http://{}", self.address) });
        if let Some(authority) = &self.authority {
            let path = folder.join("ca.crt");
            fs::write(&path, authority.pem()).expect("a file");
            cluster = json!({
                "server": format!("https://{}", self.address),
                "certificate-authority": path,
            });
        }
        let token = folder.join("token");
        if !token.exists() {
            fs::write(&token, "nobody's").expect("a file");
        }
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "fake", "cluster": cluster }],
            "users": [{ "name": "klb", "user": { "tokenFile": token } }],
            "contexts": [{ "name": "fake", "context": { "cluster": "fake", "user": "klb" } }],
            "current-context": "fake",
        });
        let path = folder.join("kubeconfig");
        fs::write(&path, config.to_string()).expect("a file");
        path
    }

    /// Lets in only who has this token, and writes it where [`Self::kubeconfig`]
    /// says that it is. Connections that are open end.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn require_token(&self, folder: &Path, token: &str) {
        self.shared.change(|state| {
            state.token = Some(token.to_owned());
            state.generation += 1;
        });
        fs::write(folder.join("token"), token).expect("a file");
    }

    /// Creates an object, or replaces it.
    ///
    /// # Panics
    /// If it is no object of a kind that the server has.
    pub fn put(&self, object: Value) {
        self.shared.change(|state| state.store.put(object));
    }

    /// As [`Self::put`], for all documents of a text in YAML.
    ///
    /// # Panics
    /// If it is no YAML.
    pub fn put_yaml(&self, text: &str) {
        for document in serde_yaml_ng::Deserializer::from_str(text) {
            let object: Value = serde::Deserialize::deserialize(document).expect("YAML");
            if !object.is_null() {
                self.put(object);
            }
        }
    }

    /// Deletes an object, which must be there. `kind` is `services`, say; the
    /// namespace is empty for objects that are in none.
    ///
    /// # Panics
    /// If it is not there.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) {
        let name = Name::new(kind, namespace, name);
        self.shared.change(|state| state.store.delete(&name));
    }

    /// Forgets what happened until now: a watch that begins at an earlier version
    /// is told that it is too old.
    pub fn forget_history(&self) {
        self.shared.change(|state| state.store.forget_history());
    }

    /// Sends a bookmark to every watch, and waits until a watch of this kind
    /// was sent it.
    ///
    /// # Panics
    /// If there is no such watch.
    pub fn bookmark(&self, kind: &str) {
        self.shared.change(|state| {
            state.sent.clear();
            state.store.bookmark();
        });
        let wanted = format!("BOOKMARK {kind}");
        wait::until(&wanted, REQUEST, || {
            self.shared.lock().sent.contains(&wanted).then_some(())
        });
    }

    /// Lets nobody see the objects of a kind (`services`, say).
    pub fn forbid(&self, kind: &str) {
        self.shared
            .change(|state| state.faults.forbidden.push(kind.to_owned()));
    }

    /// Ends all connections.
    pub fn cut(&self) {
        self.shared.change(|state| state.generation += 1);
    }

    /// Goes away, with all connections, and comes back.
    pub fn set_down(&self, down: bool) {
        self.shared.change(|state| {
            state.faults.set(Fault::Down, down);
            state.generation += u64::from(down);
        });
    }

    /// Whether the server has streaming lists; it has if nothing is said.
    pub fn set_streaming(&self, streaming: bool) {
        self.shared
            .change(|state| state.faults.set(Fault::NoStreams, !streaming));
    }

    /// Whether streaming lists say where they end; they do if nothing is said.
    pub fn set_endless_lists(&self, endless: bool) {
        self.shared
            .change(|state| state.faults.set(Fault::EndlessLists, endless));
    }

    /// Forgets where the next list in pages goes on behind its first page.
    pub fn lose_next_page(&self) {
        self.shared
            .change(|state| state.faults.set(Fault::LostPage, true));
    }

    /// Whether a watch that begins at a forgotten version is refused as a whole,
    /// instead of by an event.
    pub fn set_gone_at_once(&self, at_once: bool) {
        self.shared
            .change(|state| state.faults.set(Fault::GoneAtOnce, at_once));
    }

    /// Whether bodies come byte by byte.
    pub fn set_slow(&self, slow: bool) {
        self.shared
            .change(|state| state.faults.set(Fault::Slow, slow));
    }

    /// Refuses the next requests.
    pub fn refuse_next(&self, count: usize, refusal: Refusal) {
        self.shared
            .change(|state| state.faults.refusals = vec![refusal; count]);
    }

    /// Sends something else in the place of the next event of a kind
    /// (`services`, say).
    pub fn spoil_next_event(&self, kind: &str, event: BadEvent) {
        self.spoil_events(kind, event, 1);
    }

    /// As [`Self::spoil_next_event`], so many times.
    pub fn spoil_events(&self, kind: &str, event: BadEvent, count: usize) {
        self.shared.change(|state| {
            state.faults.next_events = Some((kind.to_owned(), event, count));
        });
    }

    /// The requests since the start: method, and path with its query.
    pub fn requests(&self) -> Vec<String> {
        self.shared.lock().requests.clone()
    }

    /// Waits until a request has come, of all since the start, that is as
    /// wanted.
    ///
    /// # Panics
    /// If none comes.
    pub fn await_request(&self, what: &str, is_it: impl Fn(&str) -> bool) -> String {
        wait::until(what, REQUEST, || {
            self.requests().into_iter().find(|request| is_it(request))
        })
    }

    /// Objects that were sent to the server, of all kinds.
    pub fn posted(&self) -> Vec<Value> {
        self.shared.lock().posted.clone()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.shared.change(|state| {
            state.ended = true;
            state.generation += 1;
        });
        // `accept` fails then; nobody may be able to connect from here.
        drop(SockRef::from(&self.listener).shutdown(Shutdown::Both));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.news.notify_all();
        result
    }
}

/// Serves a client until it goes away, or is cut off with those of its generation.
fn serve(
    shared: &Arc<Shared>,
    generation: u64,
    stream: TcpStream,
    tls: Option<Arc<rustls::ServerConfig>>,
) {
    let mut connection = match Connection::new(stream, tls) {
        Ok(connection) => connection,
        Err(_closed) => return,
    };
    loop {
        match connection.serve_request(shared, generation) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if shared.lock().generation != generation {
                    return;
                }
            }
            Err(_gone) => return,
        }
    }
}
