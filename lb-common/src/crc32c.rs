//! SCTP's checksum, updated instead of recomputed.
//!
//! A CRC is linear: changing some bytes changes it by the CRC (without initial
//! and final inversion) of the difference, followed by as many zero bytes as
//! there are behind. Numbers are polynomials over GF(2), the highest bit being
//! the coefficient of x⁰, as hardware and RFC 9260 (appendix A) have it.

/// The polynomial of Castagnoli.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Products with x⁸ to the power of 2ᵏ, for every k that a 16-bit length needs,
/// of every value of every half-byte, the lowest first: 8 KiB that save nine in
/// ten of the steps of a multiplication.
static PRODUCTS: [[[u32; 16]; 8]; 16] = products();

const fn products() -> [[[u32; 16]; 8]; 16] {
    // x⁸
    let mut power = 1 << 23;
    let mut products = [[[0; 16]; 8]; 16];
    let mut k = 0;
    while k < 16 {
        let mut place = 0;
        while place < 8 {
            let mut value = 0;
            while value < 16 {
                products[k][place][value] = multiply((value as u32) << (4 * place), power);
                value += 1;
            }
            place += 1;
        }
        power = multiply(power, power);
        k += 1;
    }
    products
}

/// The product modulo the polynomial.
const fn multiply(mut a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 0;
    while bit < u32::BITS {
        if a >> 31 == 1 {
            product ^= b;
        }
        a <<= 1;
        b = (b >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(b & 1));
        bit += 1;
    }
    product
}

/// What to XOR the checksum field with when the first four bytes of a packet of
/// `length` bytes change from `from` to `to`. All three are as they lie in
/// memory, read as little-endian numbers.
#[inline(always)]
pub fn delta(from: u32, to: u32, length: u16) -> u32 {
    let mut difference = from ^ to;
    let mut length = u32::from(length);
    for products in &PRODUCTS {
        let mut product = 0;
        let mut rest = difference;
        for half_byte in products {
            product ^= half_byte[(rest & 0xf) as usize];
            rest >>= 4;
        }
        // A branch here would be sixteen for the verifier, one after the other:
        // 65,536 ways through.
        difference ^= (product ^ difference) & 0_u32.wrapping_sub(length & 1);
        length >>= 1;
    }
    difference
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The checksum, computed bit by bit.
    fn full(bytes: &[u8]) -> u32 {
        let step = |crc: u32, byte: &u8| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                (crc >> 1) ^ (POLYNOMIAL * (crc & 1))
            })
        };
        !bytes.iter().fold(!0, step)
    }

    #[test]
    fn the_full_checksum_is_the_known_one() {
        // RFC 3720, appendix B.4.
        assert_eq!(full(&[0; 32]), 0x8a91_36aa);
        assert_eq!(full(b"123456789"), 0xe306_9283);
    }

    proptest! {
        #[test]
        fn the_updated_checksum_is_the_full_one(
            mut bytes in prop::collection::vec(any::<u8>(), 4..3000), to in any::<[u8; 4]>()
        ) {
            let before = full(&bytes);
            let from = [bytes[0], bytes[1], bytes[2], bytes[3]];
            bytes[..4].copy_from_slice(&to);
            let length = u16::try_from(bytes.len()).expect("short");
            let delta = delta(u32::from_le_bytes(from), u32::from_le_bytes(to), length);
            prop_assert_eq!(before ^ delta, full(&bytes));
        }
    }
}
