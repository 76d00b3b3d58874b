//! At which ports anything is served: what spares most packets and calls that are of
//! no Service a look into a large table.

use lb_common::{Port, Served};

use crate::maps::SERVED;

/// Whether a frontend or a backend has this port, or has had it.
#[inline(always)]
pub fn is_served(port: Port) -> bool {
    let Some(served) = SERVED.get_ptr(0) else {
        return true;
    };
    let (at, bit) = Served::place(port);
    // SAFETY: one byte of the entry, which only the agent writes, and by which it
    // never takes a port away.
    let byte = unsafe { *served.cast::<u8>().add(at) };
    byte & bit != 0
}
