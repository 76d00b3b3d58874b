//! Which connections may stand among the confirmed ones from their beginning.
//!
//! To move a connection from one table of flows to the other costs as much as to
//! open it. It is to be spared, without giving up what the two tables are for: that
//! whoever forges senders cannot push out what is confirmed. So there is a credit.
//! A connection that is opened among the confirmed takes one from it, and each that
//! is confirmed, wherever it stands, adds one. As long as clients answer it does not
//! run out; if they do not, all others begin among the young, and no more entries
//! are in vain in the table of the confirmed than there are connections in it that
//! deserve it, and one a second.

/// A CPU's credit: the one entry of `klb_credit`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// How many connections may yet be opened among the confirmed.
    pub left: u32,
    /// When one of them was last given without reason, so that there is a first; in
    /// seconds of the monotonic clock.
    pub given: u32,
}

impl Credit {
    /// As many connections of a CPU as may wait for their client's answer at once.
    pub const MOST: u32 = 256;

    /// Takes one, at a second of the monotonic clock, if there is one.
    #[inline(always)]
    pub const fn take(&mut self, now: u32) -> bool {
        if self.given < now {
            self.given = now;
            self.give();
        }
        if self.left == 0 {
            return false;
        }
        self.left = self.left.wrapping_sub(1);
        true
    }

    /// Adds one.
    #[inline(always)]
    pub const fn give(&mut self) {
        if self.left < Self::MOST {
            self.left = self.left.wrapping_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_that_answer_never_use_it_up() {
        let mut credit = Credit::default();
        assert!(credit.take(7), "one a second, for a beginning");
        for _ in 0..10_000 {
            credit.give();
            assert!(credit.take(7));
        }
        assert!(!credit.take(7));
    }

    #[test]
    fn those_who_do_not_get_as_many_as_others_earn() {
        let mut credit = Credit::default();
        let mut taken = 0;
        for second in 1..=100 {
            for _ in 0..1_000 {
                taken += u32::from(credit.take(second));
            }
            credit.give();
        }
        // One for each second, and one for each that was confirmed; the last of
        // those is still there.
        assert_eq!(taken, 100 + 99);
    }

    #[test]
    fn it_is_not_saved_up_for_ever() {
        let mut credit = Credit::default();
        for _ in 0..100_000 {
            credit.give();
        }
        let taken = (0..100_000).filter(|_| credit.take(0)).count();
        assert_eq!(taken, Credit::MOST as usize);
    }
}
