//! A folder of manifests as the source of objects: real Kubernetes YAML, read
//! when it changes.
//!
//! Level-triggered: after any event the whole folder is read again and compared
//! with what was told before. A document that cannot be understood is reported
//! and changes nothing: what it described before stays.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, ModifyKind},
};
use tokio::sync::mpsc;
use tracing::{error, warn};

use super::document::{self, Document, DocumentError};
use crate::model::{Event, Object, ObjectRef};

/// How long changes are gathered before the folder is read.
const GATHER: Duration = Duration::from_millis(5);

/// A file that is being written is left alone until it is closed; but no longer
/// than this, should the news of it be lost.
const LONGEST_WRITE: Duration = Duration::from_secs(2);

/// A folder of manifests.
pub struct ManifestSource {
    folder: Folder,
    /// Kept, since dropping it ends the events.
    watcher: RecommendedWatcher,
    changes: mpsc::UnboundedReceiver<notify::Result<notify::Event>>,
    /// Files that are being written, since when.
    open: HashMap<PathBuf, Instant>,
    synced: bool,
}

impl ManifestSource {
    /// Begins to watch. Nothing is read yet.
    ///
    /// # Errors
    ///
    /// If there is no such folder, or it cannot be watched.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let folder = fs::canonicalize(folder)?;
        if !folder.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        let (sender, changes) = mpsc::unbounded_channel();
        let mut watcher = notify::recommended_watcher(move |event| {
            // Nobody listens any more: the source was dropped.
            drop(sender.send(event));
        })
        .map_err(io::Error::other)?;
        watch(&mut watcher, &folder).map_err(io::Error::other)?;
        if let Some(parent) = folder.parent() {
            // For the day when the folder is replaced as a whole.
            watch(&mut watcher, parent).map_err(io::Error::other)?;
        }
        Ok(Self {
            folder: Folder::new(folder),
            watcher,
            changes,
            open: HashMap::new(),
            synced: false,
        })
    }

    /// The next changes, in no particular order; never empty. The first batch is
    /// everything there is, and ends with [`Event::Synced`].
    ///
    /// Cancelling the future loses nothing.
    pub async fn next(&mut self) -> Vec<Event> {
        if !self.synced {
            let mut events = self.folder.read(&BTreeSet::new());
            events.push(Event::Synced);
            self.synced = true;
            return events;
        }
        loop {
            self.wait_for_change().await;
            let being_written = self.being_written();
            let events = self.folder.read(&being_written);
            if !events.is_empty() {
                return events;
            }
        }
    }

    async fn wait_for_change(&mut self) {
        loop {
            let change = if self.open.is_empty() {
                self.changes.recv().await
            } else {
                let news = tokio::time::timeout(LONGEST_WRITE, self.changes.recv()).await;
                match news {
                    Ok(change) => change,
                    // A write that takes that long is taken as it is.
                    Err(_elapsed) => return,
                }
            };
            let Some(change) = change else {
                // The watcher's thread has ended, which it does with the
                // process only.
                return std::future::pending().await;
            };
            if self.note(change) {
                break;
            }
        }
        tokio::time::sleep(GATHER).await;
        while let Ok(change) = self.changes.try_recv() {
            self.note(change);
        }
    }

    /// Takes in one event; `true` if the folder is to be read now.
    fn note(&mut self, change: notify::Result<notify::Event>) -> bool {
        let event = match change {
            Ok(event) => event,
            Err(error) => {
                warn!(%error, "watching the manifests; the folder is read again");
                return true;
            }
        };
        if event.paths.contains(&self.folder.path) {
            // Replaced as a whole: the new one is another inode. While there
            // is none this fails, and everything stays as it was.
            drop(watch(&mut self.watcher, &self.folder.path));
            return true;
        }
        let inside = |path: &&PathBuf| path.parent() == Some(self.folder.path.as_path());
        let paths: Vec<_> = event.paths.iter().filter(inside).cloned().collect();
        match event.kind {
            EventKind::Modify(ModifyKind::Data(_)) => {
                let now = Instant::now();
                self.open.extend(paths.into_iter().map(|path| (path, now)));
                false
            }
            EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Create(_)
            | EventKind::Remove(_)
            | EventKind::Modify(ModifyKind::Name(_)) => {
                for path in &paths {
                    self.open.remove(path);
                }
                !paths.is_empty()
            }
            _ => event.need_rescan(),
        }
    }

    fn being_written(&mut self) -> BTreeSet<PathBuf> {
        self.open.retain(|_, since| since.elapsed() < LONGEST_WRITE);
        self.open.keys().cloned().collect()
    }
}

fn watch(watcher: &mut RecommendedWatcher, path: &Path) -> notify::Result<()> {
    watcher.watch(path, RecursiveMode::NonRecursive)
}

/// What was read of a folder.
struct Folder {
    path: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// As it was told.
    objects: BTreeMap<ObjectRef, Object>,
    /// The folder could not be read, and that was said.
    unreadable: bool,
}

struct File {
    text: String,
    documents: Vec<Document>,
}

impl Folder {
    const fn new(path: PathBuf) -> Self {
        Self {
            path,
            files: BTreeMap::new(),
            objects: BTreeMap::new(),
            unreadable: false,
        }
    }

    /// Reads the folder, except for the files that are being written, and
    /// returns what changed.
    fn read(&mut self, being_written: &BTreeSet<PathBuf>) -> Vec<Event> {
        let paths = match self.list() {
            Ok(paths) => paths,
            Err(error) => {
                if !self.unreadable {
                    let folder = self.path.display();
                    error!(%folder, %error, "the manifests cannot be read; all stays as it was");
                }
                self.unreadable = true;
                return Vec::new();
            }
        };
        self.unreadable = false;
        let mut old = std::mem::take(&mut self.files);
        let mut changed = false;
        for path in paths {
            let before = old.remove(&path);
            if being_written.contains(&path) {
                self.files.extend(before.map(|file| (path, file)));
                continue;
            }
            let (file, is_new) = self.read_file(&path, before);
            changed |= is_new;
            self.files.extend(file.map(|file| (path, file)));
        }
        if !changed && old.is_empty() {
            return Vec::new();
        }
        self.compare()
    }

    /// Files whose names end like a manifest's, in order.
    fn list(&self) -> io::Result<BTreeSet<PathBuf>> {
        let mut paths = BTreeSet::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            let is_hidden = path
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            let is_manifest = ["yaml", "yml", "json"]
                .iter()
                .any(|end| path.extension() == Some(OsStr::new(end)));
            if is_manifest && !is_hidden && !path.is_dir() {
                paths.insert(path);
            }
        }
        Ok(paths)
    }

    /// A file as it is now, or as it was if it cannot be read; and whether that
    /// is anything new.
    fn read_file(&self, path: &Path, before: Option<File>) -> (Option<File>, bool) {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            // Removed between listing and reading; its removal is an event too.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return (None, true),
            Err(error) => {
                let file = path.display();
                error!(%file, %error, "a manifest cannot be read; what it described stays");
                return (before, false);
            }
        };
        if before.as_ref().is_some_and(|file| file.text == text) {
            return (before, false);
        }
        let before = before.map(|file| file.documents).unwrap_or_default();
        let mut documents = Vec::new();
        for (index, outcome) in document::read_all(&text).into_iter().enumerate() {
            let mut kept = Document::default();
            for result in outcome {
                match result {
                    Ok(document) => {
                        for warning in &document.warnings {
                            report_warning(path, index, warning);
                        }
                        kept.extend(document);
                    }
                    Err(error) => {
                        report_error(path, index, &error);
                        self.keep_old(&error, before.get(index), &mut kept);
                    }
                }
            }
            documents.push(kept);
        }
        (Some(File { text, documents }), true)
    }

    /// What a broken document described before: the object that it names, or
    /// if it names none what the document in its place described.
    fn keep_old(&self, error: &DocumentError, before: Option<&Document>, kept: &mut Document) {
        match &error.object {
            Some(reference) => {
                kept.objects.extend(self.objects.get(reference).cloned());
            }
            None => kept
                .objects
                .extend(before.into_iter().flat_map(|document| document.objects.clone())),
        }
    }

    /// Puts the files together, and compares with what was told.
    fn compare(&mut self) -> Vec<Event> {
        let mut objects: BTreeMap<ObjectRef, Object> = BTreeMap::new();
        for (path, file) in &self.files {
            for object in file.documents.iter().flat_map(|document| &document.objects) {
                let reference = object.reference();
                if objects.contains_key(&reference) {
                    let file = path.display();
                    warn!(%file, object = %reference, "described twice; the first one counts");
                    continue;
                }
                objects.insert(reference, object.clone());
            }
        }
        let gone = self.objects.keys().filter(|reference| !objects.contains_key(*reference));
        let mut events: Vec<_> = gone.cloned().map(Event::Delete).collect();
        for (reference, object) in &objects {
            if self.objects.get(reference) != Some(object) {
                events.push(Event::Apply(object.clone()));
            }
        }
        self.objects = objects;
        events
    }
}

fn report_error(path: &Path, index: usize, error: &DocumentError) {
    let object = error.object.as_ref().map(tracing::field::display);
    error!(
        file = %path.display(),
        document = index + 1,
        object,
        field = error.field,
        "a manifest is skipped, what it described stays: {}",
        error.message
    );
}

fn report_warning(path: &Path, index: usize, warning: &DocumentError) {
    let object = warning.object.as_ref().map(tracing::field::display);
    warn!(
        file = %path.display(),
        document = index + 1,
        object,
        field = warning.field,
        "{}",
        warning.message
    );
}

#[cfg(test)]
mod tests;
