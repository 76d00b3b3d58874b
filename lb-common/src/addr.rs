//! Addresses and ports as they stand in a packet.

use core::{
    mem::transmute,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// An address family's address: what a generic key or entry is generic over.
pub trait Address: Copy + Eq + 'static {
    /// The address as 32-bit words in memory order, for checksums; an IPv4
    /// address fills the first word only and the rest is zero, which adds
    /// nothing to a sum.
    fn words(&self) -> [u32; 4];
}

/// An IPv4 address, network byte order.
///
/// The alignment lets the compiler copy it as one word: with alignment 1 BPF
/// code moves every byte by itself.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Addr4 {
    pub octets: [u8; 4],
}

/// An IPv6 address, network byte order; aligned like [`Addr4`].
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Addr6 {
    pub octets: [u8; 16],
}

/// A port of TCP or UDP, network byte order.
#[repr(C, align(2))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port {
    pub octets: [u8; 2],
}

impl Address for Addr4 {
    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        [u32::from_ne_bytes(self.octets), 0, 0, 0]
    }
}

impl Address for Addr6 {
    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        // SAFETY: both are 16 bytes, for which every value is valid.
        unsafe { transmute::<Self, [u32; 4]>(*self) }
    }
}

impl Addr6 {
    /// The inverse of [`Address::words`].
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        // SAFETY: both are 16 bytes, for which every value is valid.
        unsafe { transmute::<[u32; 4], Self>(words) }
    }
}

impl Port {
    /// The port as a number in host order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be_bytes(self.octets)
    }
}

impl From<u16> for Port {
    #[inline(always)]
    fn from(port: u16) -> Self {
        Self {
            octets: port.to_be_bytes(),
        }
    }
}

impl From<Ipv4Addr> for Addr4 {
    #[inline(always)]
    fn from(addr: Ipv4Addr) -> Self {
        Self {
            octets: addr.octets(),
        }
    }
}

impl From<Ipv6Addr> for Addr6 {
    #[inline(always)]
    fn from(addr: Ipv6Addr) -> Self {
        Self {
            octets: addr.octets(),
        }
    }
}

impl From<Addr4> for Ipv4Addr {
    fn from(addr: Addr4) -> Self {
        Self::from(addr.octets)
    }
}

impl From<Addr6> for Ipv6Addr {
    fn from(addr: Addr6) -> Self {
        Self::from(addr.octets)
    }
}

impl From<Addr4> for IpAddr {
    fn from(addr: Addr4) -> Self {
        Self::V4(addr.into())
    }
}

impl From<Addr6> for IpAddr {
    fn from(addr: Addr6) -> Self {
        Self::V6(addr.into())
    }
}
