//! Which addresses and ports have flows, so that what is of no flow need not be
//! looked for in the tables of flows.
//!
//! Each packet of a flow is sent to, or by, what the client takes for its server
//! or what that is translated to. When a packet was last sent so is noted by a
//! hash of that address and port. Others may share the hash, which costs them a
//! lookup in vain.

use crate::addr::{Address, Port};

/// An entry of `klb_known`: when a packet of a flow was last seen, in seconds of
/// the monotonic clock, or 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// One from the flow's client to this address and port.
    pub to: u32,
    /// One from this address and port to the flow's client.
    pub from: u32,
}

/// Binary logarithm of the number of entries of `klb_known`: of ten thousand
/// servers that are used in the time in which a flow may be silent, one in
/// fourteen others is looked for in vain.
pub const KNOWN_BITS: u32 = 17;

/// The entry of an address and port.
#[inline(always)]
pub fn place<A: Address>(addr: &A, port: Port) -> u32 {
    let mixed = addr.folded().wrapping_mul(0x9e37_79b1);
    let mixed = (mixed ^ mixed >> 15).wrapping_add(u32::from(port.get()));
    mixed.wrapping_mul(0x85eb_ca6b) >> (u32::BITS - KNOWN_BITS)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, net::Ipv4Addr};

    use super::*;
    use crate::{Addr4, Addr6};

    /// The servers of a cluster differ in few bits.
    #[test]
    fn neighbours_have_places_of_their_own() {
        let mut places = [HashSet::new(), HashSet::new()];
        let ports = [53, 80, 443, 8080];
        for number in 0..4096 {
            let v4 = Addr4::from(Ipv4Addr::from_bits(0x0a00_0000 + number));
            let v6 = Addr6::from_words([0xfd00_u32.to_be(), 0, 0, number.to_be()]);
            for port in ports.map(Port::from) {
                places[0].insert(place(&v4, port));
                places[1].insert(place(&v6, port));
            }
        }
        // Of 16,384 thrown into 131,072 at random 939 meet another.
        for places in places {
            assert!(places.len() > 15_000, "{}", places.len());
        }
    }
}
