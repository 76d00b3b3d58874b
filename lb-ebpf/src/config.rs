//! The agent's settings.

use lb_common::{
    flow::{State, Timeouts},
    node::Config,
};

use crate::maps::CONFIG;

/// The settings, which the agent may change at any time. The lookup is of an
/// array with a constant index: the kernel compiles it into an address.
#[inline(always)]
pub fn get() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// Whether a flag of the settings is set.
#[inline(always)]
pub fn has(flag: u32) -> bool {
    get().is_some_and(|config| config.flags & flag != 0)
}

/// Seconds after which a silent flow is over.
#[inline(always)]
pub fn timeouts() -> &'static Timeouts {
    get().map_or(&State::TIMEOUTS, |config| &config.timeouts)
}
