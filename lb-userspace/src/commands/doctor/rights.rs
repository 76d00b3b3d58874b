//! What this process may do, which is what an agent may that is started so.

use std::fs;

use caps::{CapSet, Capability, CapsHashSet};

use super::check::{Check, Level};
use crate::privileges::KEPT;

/// Without these the agent does not start; `CAP_SYS_ADMIN` stands for all but
/// the second.
const REQUIRED: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
];

#[derive(Clone, Debug)]
pub(super) struct Facts {
    missing: CapsHashSet,
    /// `kernel.unprivileged_bpf_disabled`
    unprivileged_bpf_disabled: Option<String>,
}

impl Facts {
    pub(super) fn gather() -> Self {
        let effective = caps::read(None, CapSet::Effective).unwrap_or_default();
        let wanted = KEPT.into_iter().map(|(capability, _)| capability);
        let setting = fs::read_to_string("/proc/sys/kernel/unprivileged_bpf_disabled");
        Self {
            missing: wanted
                .filter(|capability| !effective.contains(capability))
                .collect(),
            unprivileged_bpf_disabled: setting.ok().map(|text| text.trim().to_owned()),
        }
    }

    pub(super) fn checks(&self) -> Vec<Check> {
        let setting = self.unprivileged_bpf_disabled.as_deref();
        let unprivileged = setting.map(unprivileged_bpf);
        self.capabilities()
            .into_iter()
            .chain(unprivileged)
            .collect()
    }

    fn capabilities(&self) -> Vec<Check> {
        const NAME: &str = "capabilities";
        let administers = !self.missing.contains(&Capability::CAP_SYS_ADMIN);
        let is_missed = |capability: &Capability| {
            let stands_for = administers && *capability != Capability::CAP_NET_ADMIN;
            self.missing.contains(capability) && !(REQUIRED.contains(capability) && stands_for)
        };
        let missed = KEPT.iter().filter(|(capability, _)| is_missed(capability));
        let checks: Vec<_> = missed
            .map(|(capability, consequence)| Check {
                level: if REQUIRED.contains(capability) {
                    Level::Fail
                } else {
                    Level::Warn
                },
                ..Check::warn(
                    NAME,
                    format!("no {capability}: {consequence}"),
                    "run klb as root, in a pod with the capabilities of docs/privileges.md",
                )
            })
            .collect();
        if checks.is_empty() {
            return vec![Check::ok(NAME, "all that the agent keeps")];
        }
        checks
    }
}

fn unprivileged_bpf(disabled: &str) -> Check {
    const NAME: &str = "unprivileged BPF";
    if disabled == "0" {
        return Check::warn(
            NAME,
            "every user of this node may load BPF programs; klb does not need that",
            "sysctl -w kernel.unprivileged_bpf_disabled=1",
        );
    }
    Check::ok(NAME, "is off, and klb does not need it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::check::Level::{Fail, Ok, Warn};

    #[test]
    fn capabilities_are_missed_by_what_they_are_for() {
        use Capability::{CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN, CAP_SYS_PTRACE};
        for (missing, levels) in [
            (&[][..], &[Ok][..]),
            (&[CAP_SYS_PTRACE], &[Warn]),
            // As on kernels before 5.8.
            (&[CAP_BPF, CAP_PERFMON], &[Ok]),
            (&[CAP_BPF, CAP_SYS_ADMIN], &[Fail, Warn]),
            (&[CAP_NET_ADMIN], &[Fail]),
        ] {
            let facts = Facts {
                missing: missing.iter().copied().collect(),
                unprivileged_bpf_disabled: None,
            };
            let checks = facts.checks().into_iter();
            let found: Vec<_> = checks.map(|check| check.level).collect();
            assert_eq!(found, levels, "{facts:?}");
        }
    }

    #[test]
    fn unprivileged_programs_are_a_warning() {
        for (value, level) in [("0", Warn), ("1", Ok), ("2", Ok)] {
            assert_eq!(unprivileged_bpf(value).level, level, "{value}");
        }
    }
}
