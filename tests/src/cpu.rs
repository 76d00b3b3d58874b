//! The CPU that a thread runs on.

use std::io;

use nix::{
    sched::{CpuSet, sched_getcpu, sched_setaffinity},
    unistd::Pid,
};

/// Ties this thread to a CPU, for as long as it lives.
///
/// # Errors
/// If the kernel refuses.
pub(crate) fn tie(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set)?;
    Ok(())
}

/// Ties this thread to the CPU that it is on: some of what programs note is of one CPU,
/// and another one would begin anew.
///
/// # Panics
/// If the kernel refuses.
pub fn stay() {
    let cpu = sched_getcpu().expect("a thread is somewhere");
    tie(cpu).expect("it may stay where it is");
}
