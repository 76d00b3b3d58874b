//! Packets through the real object, one at a time, by `BPF_PROG_TEST_RUN`.
//!
//! A row of a table says which hook a packet enters, why the program did what
//! it did, and the packet that came out. Every packet that comes out translated
//! is read by a reader that verifies every checksum in full.

mod budget;
mod direct;
mod headers;
mod icmp;
mod known;
mod lifecycle;
mod lookups;
mod masquerade;
mod policy;
mod properties;
mod sums;
mod trace;
mod traffic;
mod translate;
mod untouched;
mod world;
