//! What the agent may do, once it runs: no more than it needs.
//!
//! A thread inherits what the one that starts it may do. So all is given up
//! before there is a second thread.

use std::io;

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};
use nix::sys::prctl;

/// What the agent keeps, and what becomes of it without.
///
/// `docs/privileges.md` tells how this was found.
pub const KEPT: [(Capability, &str); 6] = [
    (Capability::CAP_BPF, "maps and programs cannot be loaded"),
    (
        Capability::CAP_NET_ADMIN,
        "programs cannot be attached, and no socket be ended",
    ),
    (Capability::CAP_PERFMON, "the verifier refuses the programs"),
    (
        Capability::CAP_SYS_ADMIN,
        "pods' network namespaces cannot be entered, nor TC filters of an earlier run be known \
         as klb's, nor a BPF file system be mounted",
    ),
    (
        Capability::CAP_SYS_PTRACE,
        "pods are known only where their network namespaces have names",
    ),
    (
        Capability::CAP_NET_BROADCAST,
        "changes of pods' addresses are seen late",
    ),
];

/// What this process lacks to load and run packet programs.
pub fn missing_for_programs() -> Vec<Capability> {
    missing_of(&caps::read(None, CapSet::Effective).unwrap_or_default())
}

/// `CAP_SYS_ADMIN` stands for the two that are for BPF.
fn missing_of(effective: &CapsHashSet) -> Vec<Capability> {
    let administers = effective.contains(&Capability::CAP_SYS_ADMIN);
    [
        (Capability::CAP_BPF, administers),
        (Capability::CAP_PERFMON, administers),
        (Capability::CAP_NET_ADMIN, false),
    ]
    .into_iter()
    .filter(|(capability, is_stood_for)| !is_stood_for && !effective.contains(capability))
    .map(|(capability, _)| capability)
    .collect()
}

/// Gives up everything else, for this thread and all that it will start, and
/// everything that a program could get by being executed.
///
/// Returns what the agent lacks: it may do with less than all of [`KEPT`].
///
/// # Errors
///
/// If the kernel does not let it; nobody needs privileges to give some up, but
/// for those that other programs could get.
pub fn reduce() -> Result<Vec<(Capability, &'static str)>, Error> {
    let kept: CapsHashSet = KEPT.into_iter().map(|(capability, _)| capability).collect();
    let permitted = caps::read(None, CapSet::Permitted)?;
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    // While CAP_SETPCAP is there, which it takes.
    limit_programs(&kept, &permitted)?;
    let rest: CapsHashSet = permitted.intersection(&kept).copied().collect();
    caps::set(None, CapSet::Effective, &rest)?;
    caps::set(None, CapSet::Permitted, &rest)?;
    prctl::set_no_new_privs().map_err(io::Error::from)?;
    let missing = KEPT.into_iter();
    Ok(missing
        .filter(|(capability, _)| !rest.contains(capability))
        .collect())
}

/// Bounds what programs that are executed may get. Without `CAP_SETPCAP` that
/// stays as it is; they get no more than this one has all the same, as nobody
/// does who must have no new privileges.
fn limit_programs(kept: &CapsHashSet, permitted: &CapsHashSet) -> Result<(), CapsError> {
    let bounding = caps::read(None, CapSet::Bounding)?;
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for capability in bounding.difference(kept) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    Ok(())
}

/// Why nothing was given up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("giving up capabilities")]
    Capabilities(#[from] CapsError),
    #[error("giving up new privileges")]
    NewPrivileges(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;

    #[test]
    fn programs_take_three_capabilities_or_two() {
        use Capability::{CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN};
        for (effective, missing) in [
            (&[CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON][..], &[][..]),
            (&[CAP_SYS_ADMIN, CAP_NET_ADMIN], &[]),
            (&[CAP_SYS_ADMIN], &[CAP_NET_ADMIN]),
            (&[CAP_NET_ADMIN], &[CAP_BPF, CAP_PERFMON]),
            (&[], &[CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN]),
        ] {
            let effective = effective.iter().copied().collect();
            assert_eq!(missing_of(&effective), missing, "{effective:?}");
        }
    }

    /// In a thread of its own: the other tests keep what they have.
    #[test]
    fn a_thread_keeps_what_is_listed_and_hands_no_more_on() {
        let status = thread::spawn(|| {
            reduce().expect("given up");
            let read = || fs::read_to_string("/proc/thread-self/status").expect("a status");
            thread::spawn(read).join().expect("a status")
        });
        let status = status.join().expect("a status");
        let field = |name: &str| {
            let mut lines = status.lines();
            let line = lines
                .find_map(|line| line.strip_prefix(name))
                .expect("a field");
            u64::from_str_radix(line.trim(), 16).expect("a number")
        };
        let kept = KEPT
            .iter()
            .fold(0, |mask, (capability, _)| mask | capability.bitmask());
        assert_eq!(field("CapEff:") & !kept, 0);
        assert_eq!(field("CapPrm:") & !kept, 0);
        assert_eq!((field("CapInh:"), field("CapAmb:")), (0, 0));
        assert_eq!(field("NoNewPrivs:"), 1);
    }
}
