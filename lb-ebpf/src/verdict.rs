//! Outcome → what the hook returns. The only place that knows the numbers of
//! the kernel, and the only one that counts.

use aya_ebpf::{
    bindings::{
        TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    },
    helpers::bpf_set_retval,
};
use lb_common::{
    Hook, Reason,
    reason::{Effect, counter_index},
};

use crate::{
    edge::{Outcome, Way},
    maps, socket,
};

/// Counts the reason.
#[inline(always)]
fn settle(hook: Hook, reason: Reason) -> Effect {
    if let Some(counter) = maps::COUNTERS.get_ptr_mut(counter_index(hook, reason)) {
        // SAFETY: the entry belongs to this CPU, and a program is not
        // interrupted by itself.
        unsafe { *counter = (*counter).wrapping_add(1) };
    }
    reason.effect()
}

#[inline(always)]
pub fn xdp(outcome: Outcome) -> u32 {
    match (settle(Hook::Xdp, outcome.reason), outcome.way) {
        (_, Way::Back) => XDP_TX,
        (_, Way::Elsewhere) => XDP_REDIRECT,
        (Effect::Pass | Effect::Translate, Way::On) => XDP_PASS,
        (Effect::Refuse | Effect::Keep | Effect::Answer, Way::On) => XDP_DROP,
    }
}

/// "Unspecified" and not "OK" lets the programs that others have put on the
/// device run after this one.
#[inline(always)]
pub fn tc(hook: Hook, outcome: Outcome) -> i32 {
    match (settle(hook, outcome.reason), outcome.way) {
        (_, Way::Back | Way::Elsewhere) => TC_ACT_REDIRECT,
        (Effect::Pass | Effect::Translate, Way::On) => TC_ACT_UNSPEC,
        (Effect::Refuse | Effect::Keep | Effect::Answer, Way::On) => TC_ACT_SHOT,
    }
}

/// A refused call fails with `ECONNREFUSED` and nothing else: other errors
/// have frozen clients inside the kernel (NFS, SMB). Where the kernel cannot
/// say so, the call goes on to the packet's edge and is answered there.
#[inline(always)]
pub fn socket(reason: Reason) -> i32 {
    const PROCEED: i32 = 1;
    const REFUSE: i32 = 0;
    const ECONNREFUSED: i32 = 111;
    let refused = matches!(
        settle(Hook::Socket, reason),
        Effect::Refuse | Effect::Answer
    );
    if !refused || !socket::can_choose_error() {
        return PROCEED;
    }
    // SAFETY: the loader sets `HAS_SET_RETVAL` only where the helper exists;
    // elsewhere the verifier prunes this call.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}
