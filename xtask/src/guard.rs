//! Running what is built from the test kit: it panics with a sentence where
//! something is not as it should be; the panic, and Ctrl-C as well, unwinds
//! through the guards that remove what was made.

use std::{
    any::Any,
    panic::{self, AssertUnwindSafe},
};

use anyhow::{Result, anyhow};
use lb_tests::wait;

/// Runs `work`; `what` names it in messages.
///
/// # Errors
/// What a panic said, or that it was interrupted.
pub(crate) fn guarded<T>(what: &str, work: impl FnOnce() -> T) -> Result<T> {
    wait::interrupt_on_signals();
    panic::set_hook(Box::new(|_| {}));
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    drop(panic::take_hook());
    result.map_err(|cause| {
        if wait::is_interrupted() {
            anyhow!("interrupted; nothing of {what} is left")
        } else {
            anyhow!("{}\nnothing of {what} is left", message(what, &*cause))
        }
    })
}

/// What a panic says.
fn message(what: &str, cause: &(dyn Any + Send)) -> String {
    let text = cause.downcast_ref::<String>().cloned();
    let text = text.or_else(|| cause.downcast_ref::<&str>().map(|&text| text.to_owned()));
    text.unwrap_or_else(|| format!("{what} broke off"))
}
