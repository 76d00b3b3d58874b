//! What klb's BPF programs and its agent share: the types in the maps and the
//! pure functions that both sides must agree on.
//!
//! Two rules hold everywhere in this crate.
//!
//! *Byte order.* Addresses and ports are bytes in network order, in [`Addr4`],
//! [`Addr6`] and [`Port`], which convert from and to the types of `core::net`
//! and `u16`. Every other number is in the byte order of the host.
//!
//! *Layout.* A type that is a key or a value of a map is `repr(C)`, has no
//! implicit padding and no bit pattern that is invalid, so that it may cross
//! the border between kernel and userspace as plain bytes. `layout` asserts it
//! at compile time.
//!
//! Nothing here can panic or allocate: the BPF verifier refuses both.
#![cfg_attr(not(test), no_std)]

pub mod addr;
pub mod checksum;
pub mod clock;
pub mod crc32c;
pub mod credit;
pub mod flow;
pub mod known;
mod layout;
pub mod names;
pub mod node;
pub mod reason;
pub mod served;
pub mod service;
pub mod socket;
pub mod trace;
pub mod traffic;

pub use addr::{Addr4, Addr6, Address, Port};
pub use credit::Credit;
pub use reason::{Hook, Reason};
pub use served::Served;
