//! News of a folder, from the kernel.
//!
//! Only of what may change what its files say. A watch for everything also tells
//! that something was opened: whoever reads the folder for such news makes the
//! next himself, and never rests.

use std::{
    ffi::OsStr,
    io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
};
use tokio::io::{Interest, unix::AsyncFd};

/// What comes, goes, or gets another name.
const NAMES: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVE);
/// And what is written, and what becomes of the folder itself.
const INSIDE: AddWatchFlags = NAMES
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF);

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// A file is being written.
    BeingWritten(PathBuf),
    /// One was written and closed; or it has come, gone, or got another name.
    Changed(PathBuf),
    /// The folder has come, gone, or is another one.
    Replaced,
    /// More than the kernel could keep: anything.
    Lost,
}

/// A folder that is watched.
pub(super) struct Watch {
    kernel: AsyncFd<Handle>,
    folder: PathBuf,
    inside: WatchDescriptor,
    /// For the day when the folder is replaced as a whole.
    above: Option<WatchDescriptor>,
}

/// The kernel's side of it.
struct Handle(Inotify);

impl AsRawFd for Handle {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watch {
    /// Everything that happens after this call is told. The path is not resolved:
    /// a link to a folder may be made to point to another. Must be called inside
    /// a tokio runtime.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let inside = inotify.add_watch(folder, INSIDE | AddWatchFlags::IN_ONLYDIR)?;
        let above = folder
            .parent()
            .map(|parent| inotify.add_watch(parent, NAMES));
        let above = above.transpose()?;
        let handle = Handle(inotify);
        // SAFETY: the handle owns its descriptor, and keeps it as long as the
        // registration that owns the handle.
        let kernel = unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE) }?;
        Ok(Self {
            kernel,
            folder: folder.to_owned(),
            inside,
            above,
        })
    }

    /// Waits until something happens; takes all that has. That may be none of the
    /// folder's business.
    ///
    /// Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> io::Result<Vec<News>> {
        let mut guard = self.kernel.readable().await?;
        let events = drain(&guard.get_inner().0)?;
        guard.clear_ready();
        drop(guard);
        Ok(self.understand(&events))
    }

    /// What has happened, without waiting for more.
    pub(super) fn take(&mut self) -> io::Result<Vec<News>> {
        let events = drain(&self.kernel.get_ref().0)?;
        Ok(self.understand(&events))
    }

    fn understand(&mut self, events: &[InotifyEvent]) -> Vec<News> {
        let news = events.iter().filter_map(|event| self.read(event));
        let news: Vec<_> = news.collect();
        if news.contains(&News::Replaced) {
            self.follow();
        }
        news
    }

    /// What an event means, if anything.
    fn read(&self, event: &InotifyEvent) -> Option<News> {
        let name = event.name.as_deref();
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            Some(News::Lost)
        } else if Some(event.wd) == self.above {
            (name.is_some() && name == self.folder.file_name()).then_some(News::Replaced)
        } else if event.wd != self.inside {
            // Of a folder that was here before.
            None
        } else if let Some(path) = name.map(|name: &OsStr| self.folder.join(name)) {
            Some(if event.mask.contains(AddWatchFlags::IN_MODIFY) {
                News::BeingWritten(path)
            } else {
                News::Changed(path)
            })
        } else {
            let itself = AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF;
            event.mask.intersects(itself).then_some(News::Replaced)
        }
    }

    /// Watches the folder that is there now. While there is none all stays as it
    /// was.
    fn follow(&mut self) {
        let inotify = &self.kernel.get_ref().0;
        let found = inotify.add_watch(&self.folder, INSIDE | AddWatchFlags::IN_ONLYDIR);
        let Ok(inside) = found else { return };
        if inside != self.inside {
            // Of a folder that has gone there is none any more.
            match inotify.rm_watch(self.inside) {
                Ok(()) | Err(Errno::EINVAL) => {}
                Err(error) => tracing::debug!(%error, "a folder is watched for nothing"),
            }
            self.inside = inside;
        }
    }
}

/// Takes every event that waits.
fn drain(inotify: &Inotify) -> io::Result<Vec<InotifyEvent>> {
    let mut events = Vec::new();
    loop {
        match inotify.read_events() {
            Ok(more) => events.extend(more),
            Err(Errno::EAGAIN) => return Ok(events),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    /// A folder with one file, in one of its own.
    fn folder() -> (TempDir, PathBuf, Watch) {
        let above = TempDir::new().expect("a temporary folder");
        let folder = above.path().join("folder");
        fs::create_dir(&folder).expect("a folder");
        fs::write(folder.join("a"), "a").expect("a file");
        let watch = Watch::open(&folder).expect("a folder to watch");
        (above, folder, watch)
    }

    #[tokio::test]
    async fn reading_is_no_news() {
        let (above, folder, mut watch) = folder();
        for _ in 0..3 {
            assert_eq!(fs::read_dir(&folder).expect("a folder").count(), 1);
            assert_eq!(fs::read_dir(above.path()).expect("a folder").count(), 1);
            assert_eq!(fs::read_to_string(folder.join("a")).expect("a file"), "a");
        }
        // The kernel tells what happens before the call returns that does it.
        assert_eq!(watch.take().expect("read"), []);
        fs::write(folder.join("a"), "b").expect("a file");
        let a = || folder.join("a");
        // Emptied, written, closed; of equal news in a row the kernel keeps one.
        let news = [News::BeingWritten(a()), News::Changed(a())];
        assert_eq!(watch.next().await.expect("read"), news);
        assert_eq!(watch.take().expect("read"), []);
    }

    #[tokio::test]
    async fn what_happens_beside_the_folder_is_none_of_its_news() {
        let (above, folder, mut watch) = folder();
        fs::write(above.path().join("other"), "b").expect("a file");
        assert_eq!(watch.next().await.expect("read"), []);
        fs::rename(&folder, above.path().join("away")).expect("renamed");
        let news = watch.next().await.expect("read");
        assert_eq!(news, [News::Replaced, News::Replaced]);
        fs::create_dir(&folder).expect("a folder");
        assert_eq!(watch.next().await.expect("read"), [News::Replaced]);
        // The one that was here before is none of it any more.
        fs::write(above.path().join("away/a"), "b").expect("a file");
        fs::write(folder.join("c"), "").expect("a file");
        let c = || folder.join("c");
        let news = [News::Changed(c()), News::Changed(c())];
        assert_eq!(watch.next().await.expect("read"), news);
    }
}
