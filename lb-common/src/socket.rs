//! Translations made at a socket.

use crate::{addr::Port, service::BackendRef};

/// One remote address as one socket sees it.
///
/// With direction [`SOCKET_FORWARD`] the remote is the frontend that the
/// process named in a datagram, and the entry tells the backend that it was
/// given; this is what keeps a UDP socket with its backend from datagram to
/// datagram. (One that is connected knows by itself.) With [`SOCKET_REVERSE`] the remote is the backend, and the entry tells which
/// frontend to show for it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketKey<A> {
    /// The kernel's id of the socket (`SO_COOKIE`), low word first. As one
    /// `u64` it would align the IPv6 key to 8 bytes and leave a hole at its end.
    pub cookie: [u32; 2],
    pub addr: A,
    pub port: Port,
    pub protocol: u8,
    pub direction: u8,
}

pub const SOCKET_FORWARD: u8 = 0;
pub const SOCKET_REVERSE: u8 = 1;

/// The other side of a [`SocketKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketEntry<A> {
    pub addr: A,
    pub port: Port,
    pub pad: u16,
    pub service: u32,
    pub backend: BackendRef,
}
