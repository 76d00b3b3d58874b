//! At which ports anything is served: what spares most packets and calls that are of
//! no Service a look into a large table.

use lb_common::{Port, Served};

use crate::{maps::SERVED, opaque};

/// Whether a frontend or a backend has this port, or has had it.
#[inline(always)]
pub fn is_served(port: Port) -> bool {
    let Some(served) = SERVED.get_ptr(0) else {
        return true;
    };
    let (at, bit) = Served::place(port);
    // For the verifier, which before 6.2 does not know how large a number can be
    // whose bytes were swapped; the compiler does, and would leave it out.
    let at = at.wrapping_add(opaque::zero() as usize) & (size_of::<Served>() - 1);
    // SAFETY: one byte of the entry, which only the agent writes, and by which it
    // never takes a port away.
    let byte = unsafe { *served.cast::<u8>().add(at) };
    byte & bit != 0
}
