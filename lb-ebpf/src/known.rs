//! Which packets may be of a flow. Those that are of none, which on most nodes are
//! most, are spared two lookups in large tables, of buckets that no cache holds.

use lb_common::{
    Address, Port,
    flow::{State, Tuple, is_from_client},
    known::{Known, place},
};

use crate::{clock, config, maps::KNOWN, rare, served::is_served};

/// Notes that there is a flow with this key, whose entry has this direction. To be
/// called before the entry is written, and whenever its time is: seldom, so it is
/// not inlined.
#[inline(never)]
pub fn note<A: Address>(key: &Tuple<A>, direction: u8, now: u32) {
    if is_from_client(direction) {
        if let Some(entry) = entry(&key.dst, key.dst_port) {
            // SAFETY: one store of a number, of which every later one will do.
            unsafe { (*entry).to = now };
        }
    } else if let Some(entry) = entry(&key.src, key.src_port) {
        // SAFETY: as before.
        unsafe { (*entry).from = now };
    }
}

/// The time, in seconds of the monotonic clock, if there may be a flow with this
/// key. If not there is none, or none that has not been silent for far too long.
#[inline(always)]
pub fn now_if_flow<A: Address>(key: &Tuple<A>) -> Option<u32> {
    let to = last(&key.dst, key.dst_port).to;
    if to != 0 {
        let now = clock::seconds();
        if is_recent(to, now) {
            return Some(now);
        }
    }
    let from = last(&key.src, key.src_port).from;
    if from == 0 {
        return None;
    }
    let now = clock::seconds();
    is_recent(from, now).then_some(now)
}

/// Whether a flow may ever have had packets to or from where this one is sent.
#[inline(always)]
pub fn is_server<A: Address>(key: &Tuple<A>) -> bool {
    let last = last(&key.dst, key.dst_port);
    last.to | last.from != 0
}

/// Whether there may be a flow whose answers have this key.
#[inline(always)]
pub fn may_be_answer<A: Address>(key: &Tuple<A>) -> bool {
    let from = last(&key.src, key.src_port).from;
    from != 0 && is_recent(from, clock::seconds())
}

/// For [`rare`], which has one note for all of them: that a connection was written
/// among the young, or went on there.
const YOUNG: u32 = 0;

/// Notes that a connection is among the young. To be called before it is written
/// there, and whenever its time is.
#[inline(always)]
pub fn note_young(now: u32) {
    rare::note(YOUNG, now);
}

/// Whether any connection may be among the young. As long as clients answer there are
/// none for most of the time, so that a new one, which is in neither table, is spared
/// the look into this one, and its answers' key another.
///
/// One that is silent for longer than an opening connection may be is over, so it is
/// not looked for any more.
#[inline(always)]
pub fn are_any_young(now: u32) -> bool {
    let opening = State::Opening.timeout(config::timeouts());
    // The time of an entry is up to a second behind.
    rare::is_noted(YOUNG, now, opening.wrapping_add(1))
}

#[inline(always)]
fn last<A: Address>(addr: &A, port: Port) -> Known {
    const NEVER: Known = Known { to: 0, from: 0 };
    if !is_served(port) {
        return NEVER;
    }
    // SAFETY: each of its numbers is one load.
    entry(addr, port).map_or(NEVER, |entry| unsafe { *entry })
}

#[inline(always)]
fn entry<A: Address>(addr: &A, port: Port) -> Option<*mut Known> {
    KNOWN.get_ptr_mut(place(addr, port))
}

/// Whether a flow may have lasted since. The sum of all timeouts is more than the
/// longest of them, which is allowed, and takes no comparison of each: ways that
/// the verifier would have to walk.
#[inline(always)]
fn is_recent(noted: u32, now: u32) -> bool {
    // Most packets: the settings need not be asked.
    if noted == now {
        return true;
    }
    let timeouts = config::timeouts().iter().copied().map(i64::from);
    let sum = timeouts.fold(0, i64::wrapping_add);
    // Signed: another CPU's time may be later than this one's.
    i64::from(now.wrapping_sub(noted).cast_signed()) <= sum
}
