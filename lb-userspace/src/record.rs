//! What the agent knows of itself, in a file of its state folder: for commands
//! that are asked how it is, also when it has gone.
//!
//! Whoever has something to tell leaves it in the [`Recorder`], and a task
//! writes it soon. Nobody waits for that, and without news nothing is written.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    process,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::sleep};
use tracing::warn;

use crate::{
    datapath::kernel::Counter,
    k8s::{convert::ObjectError, document::DocumentError},
    model::{NamespacedName, ObjectRef},
};

/// Between two writes, at least.
const PACE: Duration = Duration::from_millis(250);

/// How many of many are written.
const SHOWN: usize = 16;

/// The file, as it was written last. Times are in seconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// The agent's process, as its lock has it.
    pub pid: u32,
    pub version: String,
    pub written: u64,
    /// The first full state was in the maps, and every hook attached.
    pub ready: bool,
    /// Sockets are to be served.
    pub sockets: bool,
    /// When the maps were last written.
    pub synced: Option<u64>,
    /// Services that are not in the maps as they should be.
    pub failing: Few<Failing>,
    /// What is not heard of, and why.
    pub unheard: Vec<Unheard>,
    /// What cannot be understood; the last ones.
    pub skipped: Few<Fault>,
    /// What had been refused at some times of the last minute and at the last one
    /// before it, in order, without those at which nothing was new.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<Refused>,
}

/// For how long it is remembered what had been refused, in seconds.
pub const MINUTE: u64 = 60;

/// What had been refused until then, since klb is in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refused {
    pub at: u64,
    pub counts: Vec<Refusals>,
}

/// How many packets, or calls, a hook refused for a reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refusals {
    pub hook: String,
    pub reason: String,
    pub count: u64,
}

impl From<&Counter> for Refusals {
    fn from(counter: &Counter) -> Self {
        Self {
            hook: counter.hook.name().to_owned(),
            reason: counter.reason.name().to_owned(),
            count: counter.count,
        }
    }
}

/// Some of many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Few<T> {
    /// Of all.
    pub count: usize,
    pub some: Vec<T>,
}

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self {
            count: 0,
            some: Vec::new(),
        }
    }
}

/// A Service that keeps its previous state in the maps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failing {
    pub namespace: String,
    pub name: String,
    pub error: String,
}

/// A source, or a kind of objects, of which nothing is heard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unheard {
    pub what: String,
    pub since: u64,
    pub error: String,
}

/// An object, or a document of a manifest, that makes no sense. What it
/// described before stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fault {
    /// `null` for what does not say what it describes, here and below.
    pub kind: Option<String>,
    /// Empty for what is in none.
    pub namespace: Option<String>,
    pub name: Option<String>,
    /// Path of the field.
    pub field: Option<String>,
    pub message: String,
    /// Of a manifest.
    pub file: Option<String>,
    /// Which document of the file, the first being 1.
    pub document: Option<usize>,
    /// All else that the object says is followed.
    pub in_part: bool,
    pub since: u64,
}

impl Fault {
    /// All of a file.
    pub fn of_file(file: &Path, error: &io::Error) -> Self {
        Self {
            file: Some(file.display().to_string()),
            message: error.to_string(),
            ..Self::default()
        }
    }

    /// In a document of a file, counted from 0.
    pub fn in_file(file: &Path, index: usize, error: &DocumentError) -> Self {
        Self {
            field: error.field.clone(),
            message: error.message.clone(),
            file: Some(file.display().to_string()),
            document: Some(index + 1),
            ..Self::of(error.object.as_ref())
        }
    }

    /// The fault, of something that is followed otherwise.
    #[must_use]
    pub fn in_part(self) -> Self {
        Self {
            in_part: true,
            ..self
        }
    }

    fn of(object: Option<&ObjectRef>) -> Self {
        Self {
            kind: object.map(|object| object.kind.to_string()),
            namespace: object.map(|object| object.id.namespace().to_owned()),
            name: object.map(|object| object.id.name().to_owned()),
            ..Self::default()
        }
    }

    /// The same, whenever it was found.
    fn is(&self, other: &Self) -> bool {
        let timeless = |fault: &Self| Self {
            since: 0,
            ..fault.clone()
        };
        timeless(self) == timeless(other)
    }
}

impl From<&ObjectError> for Fault {
    fn from(error: &ObjectError) -> Self {
        Self {
            field: Some(error.field.clone()),
            message: error.message.clone(),
            ..Self::of(Some(&error.object))
        }
    }
}

impl Record {
    /// Where it is in a state folder.
    pub fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("agent.json")
    }

    /// What an agent wrote last; `None` if none has.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or is none of an agent's.
    pub fn read(state_dir: &Path) -> io::Result<Option<Self>> {
        match fs::read_to_string(Self::path(state_dir)) {
            Ok(text) => Ok(Some(serde_json::from_str(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes it, if it is there.
    ///
    /// # Errors
    ///
    /// If it stays.
    pub fn remove(state_dir: &Path) -> io::Result<()> {
        let path = Self::path(state_dir);
        for path in [unfinished(&path), path] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// What is written before it takes the place of the file.
fn unfinished(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Takes what is to be written. Copies are one.
#[derive(Clone, Debug, Default)]
pub struct Recorder(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    known: watch::Sender<Known>,
    /// Where to write to; nowhere if nobody asks.
    path: Option<PathBuf>,
    /// Held while it is written. That it cannot be was said.
    writing: Mutex<bool>,
}

#[derive(Debug, Default)]
struct Known {
    ready: bool,
    sockets: bool,
    synced: Option<u64>,
    failing: BTreeMap<NamespacedName, String>,
    unheard: BTreeMap<String, Unheard>,
    /// Of objects from the API.
    objects: BTreeMap<ObjectRef, Vec<Fault>>,
    /// Of manifests.
    files: Vec<Fault>,
    refused: Vec<Refused>,
}

impl Recorder {
    /// For an agent with this state folder, which serves sockets or does not.
    pub fn new(state_dir: &Path, sockets: bool) -> Self {
        let known = Known {
            sockets,
            ..Known::default()
        };
        Self(Arc::new(Shared {
            known: watch::Sender::new(known),
            path: Some(Record::path(state_dir)),
            writing: Mutex::default(),
        }))
    }

    /// The agent is ready. This is written before the call returns, so that
    /// whoever is told of it finds it so.
    pub fn ready(&self) {
        self.0.known.send_modify(|known| known.ready = true);
        self.write_now();
    }

    /// The maps were written, except for those Services that failed, each with
    /// its error.
    pub fn synced<'a>(&self, failing: impl Iterator<Item = (&'a NamespacedName, &'a str)>) {
        let failing = failing.map(|(service, error)| (service.clone(), error.to_owned()));
        let failing = failing.collect();
        self.0.known.send_modify(|known| {
            known.synced = Some(now());
            known.failing = failing;
        });
    }

    /// All that is wrong with an object; nothing if it is well or has gone.
    pub fn object(&self, object: &ObjectRef, faults: Vec<Fault>) {
        self.0.known.send_if_modified(|known| {
            if faults.is_empty() {
                return known.objects.remove(object).is_some();
            }
            let old = known.objects.entry(object.clone()).or_default();
            replace(old, faults)
        });
    }

    /// All that is wrong with the manifests.
    pub fn files(&self, faults: Vec<Fault>) {
        self.0
            .known
            .send_if_modified(|known| replace(&mut known.files, faults));
    }

    /// Something is not heard of.
    pub fn unheard(&self, what: &str, error: &impl ToString) {
        let error = error.to_string();
        self.0.known.send_if_modified(|known| {
            let fresh = || Unheard {
                what: what.to_owned(),
                since: now(),
                error: String::new(),
            };
            let unheard = known.unheard.entry(what.to_owned()).or_insert_with(fresh);
            let is_new = unheard.error != error;
            unheard.error = error;
            is_new
        });
    }

    /// What the counters of refusals say now.
    pub fn counted(&self, counters: &[Counter]) {
        let refusals = counters.iter().filter(|counter| counter.count > 0);
        let refused = Refused {
            at: now(),
            counts: refusals.map(Refusals::from).collect(),
        };
        self.0
            .known
            .send_if_modified(|known| add(&mut known.refused, refused));
    }

    /// It is heard of again, or still.
    pub fn heard(&self, what: &str) {
        self.0
            .known
            .send_if_modified(|known| known.unheard.remove(what).is_some());
    }

    /// Writes whenever there is news, for ever.
    pub async fn keep(self) {
        let mut news = self.0.known.subscribe();
        loop {
            news.mark_unchanged();
            self.write_now();
            sleep(PACE).await;
            if news.changed().await.is_err() {
                return;
            }
        }
    }

    /// Writes what is known now. A failure is logged: nobody's Services depend
    /// on it.
    pub fn write_now(&self) {
        let Some(path) = &self.0.path else {
            return;
        };
        let mut failing = (self.0.writing.lock()).unwrap_or_else(PoisonError::into_inner);
        let text = serde_json::to_vec(&self.record());
        let written = text.map_err(io::Error::from).and_then(|text| {
            let unfinished = unfinished(path);
            fs::write(&unfinished, text)?;
            fs::rename(unfinished, path)
        });
        let failed = written.is_err();
        if let Err(error) = written
            && !*failing
        {
            warn!(path = %path.display(), %error, "klb status will not know how this agent is");
        }
        *failing = failed;
    }

    /// As it would be written.
    pub(crate) fn record(&self) -> Record {
        let known = self.0.known.borrow();
        let failing = known.failing.iter().map(|(service, error)| Failing {
            namespace: service.namespace().to_owned(),
            name: service.name().to_owned(),
            error: error.clone(),
        });
        let mut faults: Vec<&Fault> = known.objects.values().flatten().collect();
        faults.extend(&known.files);
        // The last ones first.
        faults.sort_by_key(|fault| std::cmp::Reverse(fault.since));
        Record {
            pid: process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            written: now(),
            ready: known.ready,
            sockets: known.sockets,
            synced: known.synced,
            failing: Few {
                count: known.failing.len(),
                some: failing.take(SHOWN).collect(),
            },
            unheard: known.unheard.values().cloned().collect(),
            skipped: Few {
                count: faults.len(),
                some: faults.into_iter().take(SHOWN).cloned().collect(),
            },
            refused: known.refused.clone(),
        }
    }
}

/// Adds what had been refused at a later time, if it is more; whether it is. What
/// no minute needs any more is forgotten.
fn add(known: &mut Vec<Refused>, new: Refused) -> bool {
    if known.last().is_some_and(|last| last.counts == new.counts) {
        return false;
    }
    let past = known.iter().rposition(|old| old.at + MINUTE <= new.at);
    known.drain(..past.unwrap_or(0));
    known.push(new);
    true
}

/// Puts faults in the place of others; whether that is news. What was known
/// before is as old as it was.
fn replace(old: &mut Vec<Fault>, mut new: Vec<Fault>) -> bool {
    for fault in &mut new {
        let known = old.iter().find(|known| known.is(fault));
        fault.since = known.map_or_else(now, |known| known.since);
    }
    let is_news = *old != new;
    *old = new;
    is_news
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Kind;

    fn object(name: &str) -> ObjectRef {
        ObjectRef::service(&NamespacedName::new("shop", name))
    }

    fn fault(name: &str, message: &str) -> Fault {
        Fault::from(&ObjectError {
            object: object(name),
            field: "spec.ports[0].port".to_owned(),
            message: message.to_owned(),
        })
    }

    #[test]
    fn what_is_told_is_what_commands_read() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert_eq!(Record::read(folder.path()).expect("no file"), None);
        let recorder = Recorder::new(folder.path(), true);
        let service = NamespacedName::new("shop", "web");
        recorder.synced([(&service, "no room")].into_iter());
        recorder.unheard("Service", &"refused");
        recorder.object(&object("web"), vec![fault("web", "is not a port")]);
        recorder.ready();
        let record = Record::read(folder.path()).expect("read").expect("a file");
        assert!(record.ready && record.sockets && record.synced.is_some());
        assert_eq!((record.pid, record.failing.count), (process::id(), 1));
        assert_eq!(record.failing.some[0].error, "no room");
        assert_eq!(record.unheard[0].what, "Service");
        let skipped = &record.skipped.some[0];
        assert_eq!(skipped.kind.as_deref(), Some("Service"));
        assert_eq!(skipped.namespace.as_deref(), Some("shop"));
        assert_eq!(skipped.name.as_deref(), Some("web"));
        assert_eq!(skipped.field.as_deref(), Some("spec.ports[0].port"));

        recorder.synced(std::iter::empty());
        recorder.heard("Service");
        recorder.object(&object("web"), Vec::new());
        recorder.write_now();
        let record = Record::read(folder.path()).expect("read").expect("a file");
        assert_eq!((record.failing.count, record.skipped.count), (0, 0));
        assert_eq!(record.unheard, []);
        Record::remove(folder.path()).expect("removed");
        Record::remove(folder.path()).expect("nothing there");
        let mut left = fs::read_dir(folder.path()).expect("listed");
        assert!(left.next().is_none());
    }

    #[test]
    fn of_what_was_refused_a_minute_and_the_time_before_it_is_remembered() {
        let refused = |at, count| Refused {
            at,
            counts: vec![Refusals {
                count,
                ..Refusals::default()
            }],
        };
        let mut known = Vec::new();
        for (at, count, is_news) in [
            (100, 1, true),
            (110, 1, false),
            (120, 2, true),
            (130, 3, true),
            (190, 3, false),
            (200, 4, true),
        ] {
            assert_eq!(add(&mut known, refused(at, count)), is_news, "{at}");
        }
        assert_eq!(known, [refused(130, 3), refused(200, 4)]);
    }

    #[test]
    fn the_same_fault_is_as_old_as_it_was_and_no_news() {
        let mut known = vec![Fault {
            since: 7,
            ..fault("web", "is not a port")
        }];
        assert!(!replace(&mut known, vec![fault("web", "is not a port")]));
        assert_eq!(known[0].since, 7);
        assert!(replace(&mut known, vec![fault("web", "is missing")]));
        assert!(known[0].since > 7);
    }

    #[test]
    fn of_many_the_last_are_written() {
        let recorder = Recorder::default();
        for number in 0..3 * SHOWN {
            let name = format!("s-{number}");
            recorder.object(&object(&name), vec![fault(&name, "is missing")]);
        }
        let late = Fault::of(Some(&ObjectRef {
            kind: Kind::Node,
            id: NamespacedName::new("", "node-1"),
        }));
        recorder.0.known.send_modify(|known| {
            known.files = vec![Fault {
                since: u64::MAX,
                ..late.clone()
            }];
        });
        let skipped = recorder.record().skipped;
        assert_eq!((skipped.count, skipped.some.len()), (3 * SHOWN + 1, SHOWN));
        assert_eq!(skipped.some[0].kind.as_deref(), Some("Node"));
    }

    #[test]
    fn a_record_of_another_version_is_read_as_far_as_it_goes() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let text = r#"{"ready": true, "mood": "fine"}"#;
        fs::write(Record::path(folder.path()), text).expect("written");
        let record = Record::read(folder.path()).expect("read").expect("a file");
        assert!(record.ready);
        fs::write(Record::path(folder.path()), "{").expect("written");
        Record::read(folder.path()).expect_err("no record");
    }

    #[tokio::test]
    async fn news_are_written_by_themselves() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let recorder = Recorder::new(folder.path(), false);
        let keeping = tokio::spawn(recorder.clone().keep());
        let record = || Record::read(folder.path()).expect("read");
        let wait = async {
            while record().is_none() {
                sleep(Duration::from_millis(2)).await;
            }
            recorder.files(vec![fault("web", "is missing")]);
            while record().is_none_or(|record| record.skipped.count == 0) {
                sleep(Duration::from_millis(2)).await;
            }
        };
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, wait).await.expect("in time");
        keeping.abort();
    }
}
