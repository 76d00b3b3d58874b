//! klb's test kit.
//!
//! Two ways to look at the same BPF object:
//! - [`packet`] and [`program`] put one packet through one program and read
//!   what came out;
//! - everything else builds a small cluster from network namespaces, runs
//!   `klb agent` in it and sends real traffic.
//!
//! Whatever the second half makes carries the name of its [`scope::Scope`] and
//! is removed when its guard drops, also after a panic. What a test leaves that
//! was killed is removed by the next one ([`sweep`]).
//!
//! The kit panics with a sentence instead of returning errors: to a test, a
//! namespace that cannot be made and a Service that does not answer are the
//! same kind of news.

pub mod agent;
pub mod apiserver;
pub mod browser;
pub mod cgroup;
mod clock;
pub mod cpu;
pub mod fragments;
pub mod helper;
pub mod icmp;
pub mod lookups;
pub mod manifests;
pub mod measure;
mod netlink;
pub mod netns;
pub mod openmetrics;
pub mod packet;
pub mod private;
pub mod process;
pub mod program;
pub mod proxy;
pub mod pty;
pub mod scope;
pub mod stack;
pub mod sweep;
pub mod syscall;
pub mod told;
pub mod topology;
pub mod traffic;
pub mod wait;
pub mod web;
pub mod wire;
pub mod world;
