//! Maglev's table: which backend a client gets, as every node would say it, and
//! as few as possible others when backends come and go (Eisenbud et al.,
//! "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016).

use std::net::{IpAddr, SocketAddr};

/// Slots of a table that nobody has chosen a size for: enough for ten backends
/// to differ by one slot in a hundred.
pub const DEFAULT_SIZE: u32 = 1021;

/// Larger tables differ no less in practice, and fill the slot array.
pub const MAX_SIZE: u32 = 65_521;

/// A slot that no backend has taken yet.
const FREE: u32 = u32::MAX;

/// A backend's order of preference among the slots, which all are in it since
/// their number is prime.
struct Preference {
    index: u32,
    next: u32,
    skip: u32,
}

impl Preference {
    fn new(index: usize, addr: SocketAddr, size: u32) -> Self {
        let (hash, size) = (hash(addr), u64::from(size));
        Self {
            index: index as u32,
            next: ((hash >> 32) % size) as u32,
            skip: ((hash & 0xffff_ffff) % (size - 1) + 1) as u32,
        }
    }

    /// The first slot of the preference that is free. A slot is looked at a dozen
    /// times in the mean, so there is no division here.
    fn take(&mut self, slots: &mut [u32]) {
        let size = slots.len() as u32;
        while slots[self.next as usize] != FREE {
            self.next += self.skip;
            if self.next >= size {
                self.next -= size;
            }
        }
        slots[self.next as usize] = self.index;
    }
}

/// The table: for each slot the index of its backend. `size` is a prime, and not
/// less than there are backends.
///
/// The backends take turns, in the order of their addresses: each takes the
/// first slot of its preference that is free.
pub fn table(backends: &[SocketAddr], size: u32) -> Vec<usize> {
    let mut order: Vec<_> = backends.iter().copied().enumerate().collect();
    order.sort_by_key(|(_, addr)| *addr);
    let mut preferences: Vec<_> = order
        .into_iter()
        .map(|(index, addr)| Preference::new(index, addr, size))
        .collect();
    if preferences.is_empty() {
        return Vec::new();
    }
    let mut slots = vec![FREE; size as usize];
    let mut free = slots.len();
    while free > 0 {
        for preference in preferences.iter_mut().take(free) {
            preference.take(&mut slots);
        }
        free -= preferences.len().min(free);
    }
    slots.into_iter().map(|index| index as usize).collect()
}

/// The same on every machine and in every version of klb: FNV-1a, and the
/// finalizer of `SplitMix64` for its weak high bits.
fn hash(addr: SocketAddr) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    match addr.ip() {
        IpAddr::V4(ip) => add(&ip.octets()),
        IpAddr::V6(ip) => add(&ip.octets()),
    }
    add(&addr.port().to_be_bytes());
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// Whether a number of slots lets every preference reach all of them.
pub fn is_prime(number: u32) -> bool {
    let mut divisors = (2..).take_while(|divisor| divisor * divisor <= number);
    number >= 2 && divisors.all(|divisor| !number.is_multiple_of(divisor))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(count: u8) -> Vec<SocketAddr> {
        (1..=count)
            .map(|n| SocketAddr::from(([10, 244, n / 16, n], 3000)))
            .collect()
    }

    /// Slots by index of the backend.
    fn shares(table: &[usize], count: u8) -> Vec<usize> {
        let share = |backend| table.iter().filter(|slot| **slot == backend).count();
        (0..usize::from(count)).map(share).collect()
    }

    #[test]
    fn every_backend_has_its_share_within_a_few_percent() {
        for count in [1, 2, 3, 7, 50, 200] {
            let table = table(&backends(count), DEFAULT_SIZE);
            assert_eq!(table.len(), DEFAULT_SIZE as usize);
            let shares = shares(&table, count);
            let (least, most) = (shares.iter().min(), shares.iter().max());
            let (least, most) = (least.expect("a share"), most.expect("a share"));
            assert!(most - least <= 1, "{count} backends: {least} to {most}");
        }
        assert_eq!(table(&[], DEFAULT_SIZE), [0; 0]);
        assert_eq!(shares(&table(&backends(7), 7), 7), [1; 7]);
    }

    #[test]
    fn nodes_agree_in_whatever_order_they_learned() {
        let backends = backends(9);
        let mut reversed = backends.clone();
        reversed.reverse();
        let (one, other) = (
            table(&backends, DEFAULT_SIZE),
            table(&reversed, DEFAULT_SIZE),
        );
        for (one, other) in one.into_iter().zip(other) {
            assert_eq!(backends[one], reversed[other]);
        }
    }

    /// A table of another version of klb, in the middle of an upgrade, must say
    /// the same.
    #[test]
    fn the_table_is_the_same_in_every_version() {
        let backends: Vec<SocketAddr> = ["10.244.0.5:80", "10.244.1.6:80", "[fd00::7]:80"]
            .map(|addr| addr.parse().expect("an address"))
            .into();
        assert_eq!(
            table(&backends, 13),
            [2, 0, 2, 0, 1, 1, 0, 1, 2, 0, 0, 2, 1]
        );
    }

    #[test]
    fn few_clients_move_when_a_backend_goes() {
        for count in [3_u8, 10, 50] {
            let all = backends(count);
            let before = table(&all, DEFAULT_SIZE);
            for gone in 0..usize::from(count) {
                let mut rest = all.clone();
                rest.remove(gone);
                let after = table(&rest, DEFAULT_SIZE);
                let moved = before.iter().zip(&after);
                let moved = moved.filter(|(before, after)| all[**before] != rest[**after]);
                // Those of the backend that has gone must, and few others.
                let size = DEFAULT_SIZE as usize;
                let limit = size / usize::from(count) + 1 + size / 16;
                let moved = moved.count();
                assert!(
                    moved <= limit,
                    "{gone} of {count}: {moved} of at most {limit}"
                );
            }
        }
    }

    #[test]
    fn primes_are_known() {
        let primes: Vec<u32> = (0..30).filter(|number| is_prime(*number)).collect();
        assert_eq!(primes, [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]);
        assert!(is_prime(DEFAULT_SIZE) && is_prime(65_521) && !is_prime(65_533));
    }
}
