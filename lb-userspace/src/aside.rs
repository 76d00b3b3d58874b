//! Work that takes a while, on a thread that has others to serve.

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    task::block_in_place,
};

/// Does what takes a while, so that others go on meanwhile. Where there is one
/// thread only, as in tests of time, nobody does.
pub(crate) fn aside<T>(work: impl FnOnce() -> T) -> T {
    let flavor = Handle::try_current().map(|handle| handle.runtime_flavor());
    match flavor {
        Ok(RuntimeFlavor::CurrentThread) => work(),
        _ => block_in_place(work),
    }
}
