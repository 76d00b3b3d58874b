//! Addresses and ports as they stand in a packet.

use core::{
    mem::transmute,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::node::Network;

/// An address family's address: what a generic key or entry is generic over.
pub trait Address: Copy + Eq + 'static {
    /// The address as 32-bit words in memory order, for checksums; an IPv4
    /// address fills the first word only and the rest is zero, which adds
    /// nothing to a sum.
    fn words(&self) -> [u32; 4];

    /// The address as an IPv6 one: an IPv4 address is mapped (RFC 4291, 2.5.5.2).
    fn mapped(&self) -> Addr6;

    /// The words mixed into one, for hashes.
    #[inline(always)]
    fn folded(&self) -> u32 {
        let [a, b, c, d] = self.words();
        a ^ b.rotate_left(8) ^ c.rotate_left(16) ^ d.rotate_left(24)
    }

    /// As `==`, but word by word: on bytes it is a call of `memcmp`, one more
    /// frame on a BPF stack that has none to spare.
    #[inline(always)]
    fn same(&self, other: &Self) -> bool {
        let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (self.words(), other.words());
        (a0 ^ b0) | (a1 ^ b1) | (a2 ^ b2) | (a3 ^ b3) == 0
    }

    /// Whether this is no address at all.
    #[inline(always)]
    fn is_zero(&self) -> bool {
        let [w0, w1, w2, w3] = self.words();
        w0 | w1 | w2 | w3 == 0
    }

    /// Whether the address is in the network.
    #[inline(always)]
    fn is_in(&self, network: &Network<Self>) -> bool
    where
        Self: Sized,
    {
        let ([a0, a1, a2, a3], [m0, m1, m2, m3]) = (self.words(), network.mask.words());
        let [n0, n1, n2, n3] = network.addr.words();
        // Mostly the first word tells that it is not.
        if m0 != 0 && (a0 & m0) ^ n0 != 0 {
            return false;
        }
        if network.mask.is_zero() {
            return !network.addr.is_zero();
        }
        ((a0 & m0) ^ n0) | ((a1 & m1) ^ n1) | ((a2 & m2) ^ n2) | ((a3 & m3) ^ n3) == 0
    }
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

    #[inline(always)]
    fn mapped(&self) -> Addr6 {
        Addr6::from_words([0, 0, 0xffff_u32.to_be(), u32::from_ne_bytes(self.octets)])
    }
}

impl Address for Addr6 {
    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        // SAFETY: both are 16 bytes, for which every value is valid.
        unsafe { transmute::<Self, [u32; 4]>(*self) }
    }

    #[inline(always)]
    fn mapped(&self) -> Self {
        *self
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
