//! This CPU's credit for connections that are opened among the confirmed.

use lb_common::Credit;

use crate::maps::CREDIT;

/// Takes one, at a second of the monotonic clock, if there is one.
#[inline(always)]
pub fn take(now: u32) -> bool {
    own().is_some_and(|credit| credit.take(now))
}

/// Adds one, for a connection that was confirmed.
#[inline(always)]
pub fn give() {
    if let Some(credit) = own() {
        credit.give();
    }
}

#[inline(always)]
fn own() -> Option<&'static mut Credit> {
    let credit = CREDIT.get_ptr_mut(0)?;
    // SAFETY: the entry belongs to this CPU, and a packet program is not
    // interrupted by another; each asks for it where it does not hold it yet.
    Some(unsafe { &mut *credit })
}
