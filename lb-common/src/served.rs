//! At which ports anything is served, so that what is of other ports need not be
//! looked for.
//!
//! Whatever is translated has, at its client's other end, the port of a frontend or
//! of a backend. Of the 65,536 ports few are either, and a client's own hardly ever
//! is one. To look whether a port is takes a bit of 8 KiB, which caches hold; to look
//! for a frontend, a flow or a socket takes a bucket of a table of megabytes, which
//! they do not.

use crate::addr::Port;

/// The one entry of `klb_served`: a bit for each port that a frontend or a backend
/// has, or has had. The agent sets it before it writes either, and never clears one:
/// flows and sockets may outlive both.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    bytes: [u8; Self::BYTES],
}

impl Served {
    const BYTES: usize = 1 << (u16::BITS - 3);

    pub const NONE: Self = Self {
        bytes: [0; Self::BYTES],
    };

    /// Which byte is that of a port, and which bit in it.
    #[inline(always)]
    pub const fn place(port: Port) -> (usize, u8) {
        let port = port.get();
        ((port >> 3) as usize, 1 << (port & 7))
    }

    /// Adds a port; whether it was not there. 0, which the entry of an address has,
    /// is none.
    pub fn add(&mut self, port: Port) -> bool {
        if port.get() == 0 {
            return false;
        }
        let (at, bit) = Self::place(port);
        let Some(byte) = self.bytes.get_mut(at) else {
            return false;
        };
        let is_new = *byte & bit == 0;
        *byte |= bit;
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_port_has_a_bit_of_its_own() {
        let mut served = Served::NONE;
        for port in 1..=u16::MAX {
            assert!(served.add(port.into()), "{port}");
        }
        for port in [80, 0] {
            assert!(!served.add(port.into()), "{port}");
        }
        assert!(served.bytes.starts_with(&[0xfe, 0xff]));
        assert!(served.bytes[1..].iter().all(|byte| *byte == 0xff));
    }
}
