//! What the running kernel can do beyond the floor, found by trying.
//!
//! Never by version: distributions take features back into older kernels, and
//! leave others out by configuration.

use aya::{
    programs::{ProgramType, SchedClassifier, TcAttachType},
    sys::{BpfHelper, is_helper_supported},
};
use serde::Serialize;

use super::clock;
use crate::{netlink::Netlink, termination};

/// What was found. `None` where it could not be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Features {
    /// TC programs by link, with an order among programs (6.6).
    pub tcx: Option<bool>,
    /// `bpf_set_retval`: a socket hook may choose the error that the caller
    /// sees (5.18).
    pub set_retval: Option<bool>,
    /// XDP for packets of several buffers (5.18), without which no driver takes
    /// a program at an MTU of 9000. Known by the helper that came with it.
    pub xdp_frags: Option<bool>,
    /// Ticks tell the time, which programs need not ask for then.
    pub coarse_clock: Option<bool>,
    /// Sockets can be ended from outside (`CONFIG_INET_DIAG_DESTROY`, which most
    /// distributions set).
    pub sock_destroy: Option<bool>,
    /// Network namespaces tell their cookies (5.14).
    pub netns_cookie: Option<bool>,
}

impl Features {
    /// Needs the privileges to load programs.
    pub fn probe() -> Self {
        Self {
            tcx: tcx(),
            set_retval: is_helper_supported(
                ProgramType::CgroupSockAddr,
                BpfHelper::BPF_FUNC_set_retval,
            )
            .ok(),
            xdp_frags: is_helper_supported(ProgramType::Xdp, BpfHelper::BPF_FUNC_xdp_get_buff_len)
                .ok(),
            coarse_clock: clock::ticks().ok().map(|ticks| ticks.is_some()),
            sock_destroy: termination::is_possible(),
            netns_cookie: netns_cookie(),
        }
    }
}

fn netns_cookie() -> Option<bool> {
    Some(Netlink::open().ok()?.netns_cookie().is_ok())
}

/// Asks which programs are on `lo`, which every network namespace has; a kernel
/// without tcx does not understand the question.
fn tcx() -> Option<bool> {
    match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
        Ok(_) => Some(true),
        Err(aya::programs::ProgramError::SyscallError(error)) => {
            let refused = error.io_error.raw_os_error() == Some(libc::EINVAL);
            refused.then_some(false)
        }
        Err(_) => None,
    }
}
