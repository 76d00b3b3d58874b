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

use tokio::time::sleep;
use tracing::{error, warn};

use super::{
    document::{self, DocumentError},
    folder::{News, Watch},
};
use crate::{
    model::{Concern, Event, Object, ObjectRef, Scope},
    record::{Fault, Recorder},
};

/// How long changes are gathered before the folder is read.
const GATHER: Duration = Duration::from_millis(5);

/// How long after reading it is known which files were being written: the kernel
/// tells of a change after it has made it.
const SETTLE: Duration = Duration::from_millis(2);

/// A file that is being written is left alone until it is closed; but no longer
/// than this, should the news of it be lost.
const LONGEST_WRITE: Duration = Duration::from_secs(2);

/// How long a moment is waited for in which nothing happens in the folder.
const LONGEST_UNREST: Duration = Duration::from_millis(100);

/// What nothing is heard of while the folder cannot be read.
const MANIFESTS: &str = "manifests";

/// A folder of manifests.
pub struct ManifestSource {
    folder: Folder,
    watch: Watch,
    /// Files that are being written, since when.
    open: HashMap<PathBuf, Instant>,
    /// Files that are empty and were not, since when.
    empty: HashMap<PathBuf, Instant>,
    /// Files that something happened to since the folder was last read.
    touched: BTreeSet<PathBuf>,
    /// There is something to read.
    due: bool,
    synced: bool,
}

impl ManifestSource {
    /// Begins to watch. Nothing is read yet.
    ///
    /// # Errors
    ///
    /// If there is no such folder, or it cannot be watched.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn open(folder: &Path) -> io::Result<Self> {
        // Not resolved: a link to a folder may be made to point to another.
        let folder = std::path::absolute(folder)?;
        if !fs::metadata(&folder)?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self {
            watch: Watch::open(&folder)?,
            folder: Folder::new(folder),
            open: HashMap::new(),
            empty: HashMap::new(),
            touched: BTreeSet::new(),
            due: true,
            synced: false,
        })
    }

    /// Has what makes no sense noted.
    #[must_use]
    pub fn noted_by(mut self, recorder: Recorder) -> Self {
        self.folder.recorder = recorder;
        self
    }

    /// The next changes, in no particular order; never empty. The first batch is
    /// everything there is, and ends with [`Event::Synced`] for every scope.
    ///
    /// Cancelling the future loses nothing.
    pub async fn next(&mut self) -> Vec<Event> {
        loop {
            while !self.due {
                self.wait_for_news().await;
            }
            let (texts, doubtful) = self.read_quietly().await;
            let mut events = self.folder.accept(texts, &doubtful);
            if !self.synced {
                events.extend([Scope::Services, Scope::Pods].map(Event::Synced));
                self.synced = true;
            }
            if !events.is_empty() {
                return events;
            }
        }
    }

    /// Reads the folder, if it can be at a moment when nothing happens in it: of
    /// two halves of a rename only one may have been there. Returns the files
    /// whose text is not to be believed, too.
    async fn read_quietly(&mut self) -> (io::Result<Texts>, BTreeSet<PathBuf>) {
        let deadline = Instant::now() + LONGEST_UNREST;
        loop {
            self.touched.clear();
            let being_written = self.being_written();
            let texts = self.folder.load(&being_written);
            // What happened meanwhile is known by now, or very soon.
            sleep(SETTLE).await;
            self.due = false;
            self.take_news().await;
            if self.touched.is_empty() || Instant::now() > deadline {
                let mut doubtful = self.being_written();
                doubtful.append(&mut self.touched);
                doubtful.extend(self.cut_short(texts.as_ref().ok()));
                return (texts, doubtful);
            }
        }
    }

    /// Files that are empty now and were not. To write a file anew most programs
    /// empty it first, so this is not believed before some time has passed.
    fn cut_short(&mut self, texts: Option<&Texts>) -> Vec<PathBuf> {
        let mut empty = HashMap::new();
        for (path, text) in texts.into_iter().flatten() {
            let is_empty = matches!(text, Some(Ok(text)) if text.is_empty());
            if is_empty && self.folder.describes_something(path) {
                let since = self.empty.get(path).copied();
                empty.insert(path.clone(), since.unwrap_or_else(Instant::now));
            }
        }
        self.empty = empty;
        let recent = self
            .empty
            .iter()
            .filter(|(_, since)| since.elapsed() < LONGEST_WRITE);
        recent.map(|(path, _)| path.clone()).collect()
    }

    /// Waits until something happens, and for what happens with it.
    async fn wait_for_news(&mut self) {
        let since = self.open.values().chain(self.empty.values()).min();
        let next = since.map(|since| *since + LONGEST_WRITE);
        let deadline = async {
            match next {
                Some(time) => tokio::time::sleep_until(time.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            news = self.watch.next() => self.note_all(news).await,
            // A write that takes that long is taken as it is.
            () = deadline => self.due = true,
        }
        if self.due {
            sleep(GATHER).await;
            self.take_news().await;
        }
    }

    async fn take_news(&mut self) {
        let news = self.watch.take();
        self.note_all(news).await;
    }

    /// Takes in what happened, and whether the folder is to be read for it.
    async fn note_all(&mut self, news: io::Result<Vec<News>>) {
        match news {
            Ok(news) => news.into_iter().for_each(|news| self.note(news)),
            Err(error) => {
                warn!(%error, "watching the manifests; the folder is read again");
                self.due = true;
                // Lest that is all that is done, should it go on.
                sleep(LONGEST_WRITE).await;
            }
        }
    }

    fn note(&mut self, news: News) {
        match news {
            News::BeingWritten(path) => {
                self.open.insert(path.clone(), Instant::now());
                self.touched.insert(path);
            }
            News::Changed(path) => {
                self.open.remove(&path);
                self.touched.insert(path);
                self.due = true;
            }
            News::Replaced | News::Lost => self.due = true,
        }
    }

    fn being_written(&mut self) -> BTreeSet<PathBuf> {
        self.open.retain(|_, since| since.elapsed() < LONGEST_WRITE);
        self.open.keys().cloned().collect()
    }
}

/// What was read of a folder.
struct Folder {
    path: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// What of a file makes no sense as it is now, where something does not.
    faults: BTreeMap<PathBuf, Vec<Fault>>,
    recorder: Recorder,
    /// As it was told.
    objects: BTreeMap<ObjectRef, Object>,
    /// Likewise.
    unknown: BTreeSet<Concern>,
    /// The folder could not be read, and that was said.
    unreadable: bool,
}

struct File {
    text: String,
    /// What its documents describe.
    objects: Vec<Object>,
    /// What documents described that cannot be understood any more.
    kept: Vec<Object>,
    /// Whom those concern that never could be.
    unknown: Vec<Concern>,
}

/// The files of a folder, each as far as it could be read; `None` for those that
/// were being written.
type Texts = BTreeMap<PathBuf, Option<io::Result<String>>>;

impl Folder {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            files: BTreeMap::new(),
            faults: BTreeMap::new(),
            recorder: Recorder::default(),
            objects: BTreeMap::new(),
            unknown: BTreeSet::new(),
            unreadable: false,
        }
    }

    /// Whether a file described any object when it was last read.
    fn describes_something(&self, path: &Path) -> bool {
        let file = self.files.get(path);
        file.is_some_and(|file| !file.objects.is_empty() || !file.kept.is_empty())
    }

    /// Reads the files, except for those that are being written.
    fn load(&self, being_written: &BTreeSet<PathBuf>) -> io::Result<Texts> {
        let read = |path: &PathBuf| {
            let is_whole = !being_written.contains(path);
            is_whole.then(|| fs::read_to_string(path))
        };
        let paths = self.list()?.into_iter();
        Ok(paths.map(|path| (path.clone(), read(&path))).collect())
    }

    /// Takes in what was read, except for files that turned out to be in the
    /// middle of a change, and returns what is new.
    fn accept(&mut self, texts: io::Result<Texts>, doubtful: &BTreeSet<PathBuf>) -> Vec<Event> {
        let texts = match texts {
            Ok(texts) => texts,
            Err(error) => {
                if !self.unreadable {
                    let folder = self.path.display();
                    error!(%folder, %error, "the manifests cannot be read; all stays as it was");
                }
                self.unreadable = true;
                self.recorder.unheard(MANIFESTS, &error);
                return Vec::new();
            }
        };
        self.unreadable = false;
        self.recorder.heard(MANIFESTS);
        self.faults.retain(|path, _| texts.contains_key(path));
        let mut old = std::mem::take(&mut self.files);
        let mut changed = false;
        for (path, text) in texts {
            let before = old.remove(&path);
            let (file, is_new) = match text {
                Some(text) if !doubtful.contains(&path) => self.read_file(&path, text, before),
                _ => (before, false),
            };
            changed |= is_new;
            self.files.extend(file.map(|file| (path, file)));
        }
        let faults = self.faults.values().flatten().cloned();
        self.recorder.files(faults.collect());
        if changed || !old.is_empty() {
            self.compare()
        } else {
            Vec::new()
        }
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
    fn read_file(
        &mut self,
        path: &Path,
        text: io::Result<String>,
        before: Option<File>,
    ) -> (Option<File>, bool) {
        let text = match text {
            Ok(text) => text,
            // Removed between listing and reading.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return (None, before.is_some());
            }
            Err(error) => {
                let file = path.display();
                error!(%file, %error, "a manifest cannot be read; what it described stays");
                let fault = Fault::of_file(path, &error);
                self.faults.insert(path.to_owned(), vec![fault]);
                return (before, false);
            }
        };
        if before.as_ref().is_some_and(|file| file.text == text) {
            return (before, false);
        }
        let before = before.map(|file| [file.objects, file.kept].concat());
        let mut file = File {
            objects: Vec::new(),
            kept: Vec::new(),
            unknown: Vec::new(),
            text,
        };
        let mut faults = Vec::new();
        let documents = document::read_all(&file.text).into_iter().enumerate();
        for (index, result) in
            documents.flat_map(|(i, results)| results.into_iter().map(move |r| (i, r)))
        {
            match result {
                Ok(document) => {
                    for warning in &document.warnings {
                        report_warning(path, index, warning);
                        faults.push(Fault::in_file(path, index, warning).in_part());
                    }
                    file.objects.extend(document.objects);
                }
                Err(error) => {
                    report_error(path, index, &error);
                    faults.push(Fault::in_file(path, index, &error));
                    let old = self.described_before(&error, before.as_deref());
                    if old.is_empty() {
                        file.unknown.push(error.concern);
                    }
                    file.kept.extend(old);
                }
            }
        }
        self.faults.insert(path.to_owned(), faults);
        (Some(file), true)
    }

    /// What a broken document described before: the object that it names, or,
    /// if it names none, whatever the file described.
    fn described_before(&self, error: &DocumentError, before: Option<&[Object]>) -> Vec<Object> {
        match &error.object {
            Some(reference) => self.objects.get(reference).cloned().into_iter().collect(),
            None => before.into_iter().flatten().cloned().collect(),
        }
    }

    /// Puts the files together, and compares with what was told.
    fn compare(&mut self) -> Vec<Event> {
        let mut objects: BTreeMap<ObjectRef, Object> = BTreeMap::new();
        for (path, file) in &self.files {
            for object in &file.objects {
                let reference = object.reference();
                if objects.contains_key(&reference) {
                    let file = path.display();
                    warn!(%file, object = %reference, "described twice; the first one counts");
                    continue;
                }
                objects.insert(reference, object.clone());
            }
        }
        // What is kept only fills gaps.
        for object in self.files.values().flat_map(|file| &file.kept) {
            objects
                .entry(object.reference())
                .or_insert_with(|| object.clone());
        }
        let gone = self
            .objects
            .keys()
            .filter(|reference| !objects.contains_key(*reference));
        let mut events: Vec<_> = gone.cloned().map(Event::Delete).collect();
        for (reference, object) in &objects {
            if self.objects.get(reference) != Some(object) {
                events.push(Event::Apply(object.clone()));
            }
        }
        self.objects = objects;
        let unknown = self.files.values().flat_map(|file| file.unknown.clone());
        let unknown = unknown.collect();
        if self.unknown != unknown {
            self.unknown.clone_from(&unknown);
            events.push(Event::Unknown(unknown));
        }
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
