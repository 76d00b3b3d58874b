//! Who runs last where there is not enough time for all.

use tokio::sync::oneshot;
use tracing::debug;

/// How far behind, in the kernel's words: a tenth of what the others get.
const NICE: libc::c_int = 10;

/// Does work behind everything else that the agent does, in a thread of its own;
/// `None` if there is none to be had, or the work has panicked.
pub(super) async fn behind<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (done, result) = oneshot::channel();
    let thread = std::thread::Builder::new().name("dashboard".to_owned());
    let started = thread.spawn(move || {
        // The calling thread.
        step_back(0);
        // Whoever asked may have gone.
        drop(done.send(work()));
    });
    if let Err(error) = started {
        debug!(%error, "no thread for the dashboard");
        return None;
    }
    result.await.ok()
}

/// Puts a thread behind the others, by its id, if it is not there already.
pub(super) fn step_back(thread: u32) {
    // SAFETY: takes numbers, and changes nothing.
    if unsafe { libc::getpriority(libc::PRIO_PROCESS, thread) } >= NICE {
        return;
    }
    // SAFETY: takes numbers, and changes when a thread runs, nothing else.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, thread, NICE) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        debug!(%error, "the dashboard runs like everybody else");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn niceness() -> i32 {
        // SAFETY: takes numbers, and changes nothing.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
    }

    #[tokio::test]
    async fn work_runs_behind_and_the_others_do_not() {
        let before = niceness();
        assert_eq!(behind(niceness).await, Some(NICE.max(before)));
        assert_eq!(niceness(), before);
    }

    #[tokio::test]
    async fn work_that_panics_ends_nothing_else() {
        let panicked: Option<()> = behind(|| panic!("as a test wants it")).await;
        assert_eq!(panicked, None);
    }
}
