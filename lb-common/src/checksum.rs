//! The Internet checksum, updated instead of recomputed (RFC 1624).
//!
//! A checksum of this kind is a one's complement sum of 16-bit words. Such a
//! sum does not care whether words are read in network or host order, as long
//! as reading and writing agree (RFC 1071, section 2), so everything here
//! works on words as they lie in memory.

use crate::addr::{Address, Port};

/// The difference that a rewrite makes to a checksum: the one's complement sum
/// of what was added, less what was removed.
///
/// It is the number that the kernel's `bpf_csum_diff` yields and that
/// `bpf_l3_csum_replace` and `bpf_l4_csum_replace` take with size 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta(u64);

impl Delta {
    /// No difference yet.
    #[inline(always)]
    pub const fn new() -> Self {
        Self(0)
    }

    /// Notes that a 32-bit word changed.
    ///
    /// A sum of 64 bits cannot overflow for any header: 2³² words would have to
    /// be added.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, from: u32, to: u32) -> Self {
        Self(self.0.wrapping_add(!from as u64).wrapping_add(to as u64))
    }

    /// Notes that an address changed.
    #[inline(always)]
    #[must_use]
    pub fn address<A: Address>(self, from: &A, to: &A) -> Self {
        let ([f0, f1, f2, f3], [t0, t1, t2, t3]) = (from.words(), to.words());
        // An IPv4 address has zeros in the last three words, and `!0 + 0` is
        // the other zero of one's complement: it changes nothing.
        let delta = self.word(f0, t0);
        if size_of::<A>() == size_of::<u32>() {
            return delta;
        }
        delta.word(f1, t1).word(f2, t2).word(f3, t3)
    }

    /// Notes that the two ports changed; they are one word in the packet.
    #[inline(always)]
    #[must_use]
    pub fn ports(self, from: [Port; 2], to: [Port; 2]) -> Self {
        self.word(port_word(from), port_word(to))
    }

    /// The sum of two differences.
    #[inline(always)]
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }

    /// Whether it changes nothing.
    #[inline(always)]
    pub const fn is_nothing(self) -> bool {
        matches!(self.to_wsum(), 0 | u32::MAX)
    }

    /// Folded to 32 bits, as the kernel's helpers take it.
    #[inline(always)]
    pub const fn to_wsum(self) -> u32 {
        let once = (self.0 & 0xffff_ffff).wrapping_add(self.0 >> 32);
        (once & 0xffff_ffff).wrapping_add(once >> 32) as u32
    }

    /// The checksum field after the change, given the field before it
    /// (both as the two bytes lie in memory): HC' = ~(~HC + delta).
    #[inline(always)]
    pub const fn apply(self, checksum: u16) -> u16 {
        let not = !checksum;
        !fold(self.0.wrapping_add(not as u64))
    }
}

#[inline(always)]
fn port_word([a, b]: [Port; 2]) -> u32 {
    u32::from_ne_bytes([a.octets[0], a.octets[1], b.octets[0], b.octets[1]])
}

/// Folds a one's complement sum to 16 bits.
///
/// To 33 bits, 18, 17 and then 16: halves of 32 bits, of which BPF's machine needs two
/// instructions each, are taken once.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff).wrapping_add(sum >> 32);
    let sum = (sum & 0xffff).wrapping_add(sum >> 16);
    let sum = (sum & 0xffff).wrapping_add(sum >> 16);
    sum.wrapping_add(sum >> 16) as u16
}

/// The folded sum of the pseudo header that TCP and UDP include
/// (RFC 9293 3.1, RFC 8200 8.1). `length` is that of header and payload, in
/// bytes; the result is not complemented.
///
/// It is also what a kernel writes into the checksum field of a packet whose
/// checksum the device is to finish.
#[inline(always)]
pub fn pseudo_header<A: Address>(src: &A, dst: &A, protocol: u8, length: u16) -> u16 {
    let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (src.words(), dst.words());
    let mut sum = u64::from(s0)
        .wrapping_add(u64::from(d0))
        .wrapping_add(u64::from(u32::from(protocol).to_be()))
        .wrapping_add(u64::from(u32::from(length).to_be()));
    if size_of::<A>() != size_of::<u32>() {
        sum = sum
            .wrapping_add(u64::from(s1))
            .wrapping_add(u64::from(s2))
            .wrapping_add(u64::from(s3))
            .wrapping_add(u64::from(d1))
            .wrapping_add(u64::from(d2))
            .wrapping_add(u64::from(d3));
    }
    fold(sum)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::{Addr4, Addr6};

    /// The checksum of RFC 1071, computed the slow way.
    fn full(bytes: &[u8]) -> u16 {
        let sum = bytes
            .chunks(2)
            .map(|pair| u64::from(u16::from_ne_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
            .sum();
        !fold(sum)
    }

    /// Zero has two forms in one's complement, and a receiver takes both.
    fn canonical(checksum: u16) -> u16 {
        if checksum == 0xffff { 0 } else { checksum }
    }

    proptest! {
        #[test]
        fn incremental_equals_full_v4(
            mut bytes in prop::collection::vec(any::<u8>(), 8..200),
            to in any::<[u8; 4]>(),
        ) {
            let before = full(&bytes);
            let from: [u8; 4] = bytes[..4].try_into().expect("four bytes");
            bytes[..4].copy_from_slice(&to);
            let delta = Delta::new().address(&Addr4 { octets: from }, &Addr4 { octets: to });
            prop_assert_eq!(canonical(delta.apply(before)), canonical(full(&bytes)));
        }

        #[test]
        fn incremental_equals_full_v6_and_ports(
            mut bytes in prop::collection::vec(any::<u8>(), 20..200),
            to in any::<[u8; 16]>(),
            ports in any::<[u8; 4]>(),
        ) {
            let before = full(&bytes);
            let from: [u8; 16] = bytes[..16].try_into().expect("sixteen bytes");
            let old: [u8; 4] = bytes[16..20].try_into().expect("four bytes");
            bytes[..16].copy_from_slice(&to);
            bytes[16..20].copy_from_slice(&ports);
            let pair = |b: [u8; 4]| [Port { octets: [b[0], b[1]] }, Port { octets: [b[2], b[3]] }];
            let delta = Delta::new()
                .address(&Addr6 { octets: from }, &Addr6 { octets: to })
                .and(Delta::new().ports(pair(old), pair(ports)));
            prop_assert_eq!(canonical(delta.apply(before)), canonical(full(&bytes)));
        }

        #[test]
        fn there_and_back_is_the_identity(checksum in any::<u16>(), a in any::<[u8; 16]>(), b in any::<[u8; 16]>()) {
            let (a, b) = (Addr6 { octets: a }, Addr6 { octets: b });
            let there = Delta::new().address(&a, &b).apply(checksum);
            let back = Delta::new().address(&b, &a).apply(there);
            prop_assert_eq!(canonical(back), canonical(checksum));
        }
    }

    proptest! {
        #[test]
        fn what_is_nothing_changes_nothing(checksum in any::<u16>(), from in any::<[u16; 2]>(), to in any::<[u16; 2]>()) {
            let delta = |to: [u16; 2]| Delta::new().ports(from.map(Port::from), to.map(Port::from));
            prop_assert!(delta(from).is_nothing());
            let changed = delta(to);
            if changed.is_nothing() {
                prop_assert_eq!(canonical(changed.apply(checksum)), canonical(checksum));
            }
            prop_assert_eq!(changed.is_nothing(), from == to);
        }
    }

    /// The header of RFC 1071's worked example gives 0xddf2 (before the
    /// complement), and a pseudo header is a sum like any other.
    #[test]
    fn pseudo_header_is_the_sum_of_its_fields() {
        let (src, dst) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
        let mut bytes = Vec::from(src.octets());
        bytes.extend(dst.octets());
        bytes.extend([0, 6]);
        bytes.extend(40u16.to_be_bytes());
        assert_eq!(
            pseudo_header(&Addr4::from(src), &Addr4::from(dst), 6, 40),
            !full(&bytes)
        );

        let (src, dst) = (
            Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1),
            Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2),
        );
        let mut bytes = Vec::from(src.octets());
        bytes.extend(dst.octets());
        bytes.extend(40u32.to_be_bytes());
        bytes.extend([0, 0, 0, 17]);
        assert_eq!(
            pseudo_header(&Addr6::from(src), &Addr6::from(dst), 17, 40),
            !full(&bytes)
        );
    }
}
