//! "Port unreachable": what a client is told at once instead of waiting, as by
//! kube-proxy's `reject`.

use lb_common::{Reason, checksum::fold};

use crate::{
    clock,
    family::Family,
    icmp::ICMP_HEADER,
    maps::ANSWERS,
    packet::{Packet, Refused},
    parse::{L3, QUOTABLE},
};

/// Answers that one CPU gives in a second. Whoever sends from forged addresses
/// shall not make the node flood their owners.
const ANSWERS_PER_SECOND: u32 = 1000;

/// How many were given in the current second.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Answers {
    /// Of the monotonic clock.
    pub second: u32,
    pub count: u32,
}

/// Makes an ICMP error of the packet, and sends it back to where it came from.
/// Returns `reason`, unless it cannot be done.
#[inline(never)]
pub fn unreachable<P: Packet, F: Family>(packet: &P, reason: Reason) -> Reason {
    if !may_answer() {
        return Reason::AnswerLimit;
    }
    let Ok(parsed) = F::parse(packet) else {
        return Reason::RewriteFailed;
    };
    let quoted = parsed.quotable_length();
    match try_unreachable::<P, F>(packet, quoted) {
        Ok(()) => reason,
        Err(Refused) => Reason::RewriteFailed,
    }
}

#[inline(always)]
fn may_answer() -> bool {
    let Some(answers) = ANSWERS.get_ptr_mut(0) else {
        return false;
    };
    let now = clock::seconds();
    // SAFETY: the entry is this CPU's.
    let answers = unsafe { &mut *answers };
    if answers.second != now {
        answers.second = now;
        answers.count = 0;
    }
    answers.count = answers.count.wrapping_add(1);
    answers.count <= ANSWERS_PER_SECOND
}

/// `quoted` is how much of the packet the answer carries, in bytes from its IP
/// header on.
#[inline(always)]
fn try_unreachable<P: Packet, F: Family>(packet: &P, quoted: usize) -> Result<(), Refused> {
    let addresses = F::addresses(packet).ok_or(Refused)?;
    packet.cut(L3 + quoted)?;
    packet.make_room(F::HEADER + ICMP_HEADER)?;
    let icmp = L3 + F::HEADER;
    let (kind, code) = F::PORT_UNREACHABLE;
    let start = u32::from(u16::from_ne_bytes([kind, code]));
    let mut sum =
        F::pseudo_sum(&addresses, (ICMP_HEADER + quoted) as u16).wrapping_add(start.into());
    sum = sum.wrapping_add(sum_of(packet, icmp + ICMP_HEADER, quoted)?);
    let checksum = u32::from(!fold(sum)) << 16;
    // On a machine of either byte order type and code come first.
    #[cfg(target_endian = "big")]
    let (start, checksum) = (start << 16, checksum >> 16);
    packet.patch(icmp, [start | checksum, 0])?;
    F::write_header(packet, &addresses, (ICMP_HEADER + quoted) as u16)?;
    send_back(packet)
}

/// The sum of a part of the packet; `length` is a multiple of 4.
#[inline(always)]
fn sum_of<P: Packet>(packet: &P, start: usize, length: usize) -> Result<u64, Refused> {
    /// The longest that is quoted.
    const WORDS: usize = QUOTABLE >> 2;
    let mut sum = 0_u64;
    for word in 0..WORDS {
        if word << 2 >= length {
            break;
        }
        let value = packet.load(start + (word << 2)).ok_or(Refused)?;
        sum = sum.wrapping_add(value.into());
    }
    Ok(sum)
}

/// Sends the packet out of the device by which it came in.
#[inline(always)]
pub fn send_back<P: Packet>(packet: &P) -> Result<(), Refused> {
    #[repr(C, align(4))]
    #[derive(Clone, Copy)]
    struct Macs {
        words: [u32; 3],
    }
    let macs: Macs = packet.read(0).ok_or(Refused)?;
    let [a, b, c] = macs.words;
    // Two addresses of six bytes each change places.
    let swapped = if cfg!(target_endian = "little") {
        [b >> 16 | c << 16, c >> 16 | a << 16, a >> 16 | b << 16]
    } else {
        [b << 16 | c >> 16, c << 16 | a >> 16, a << 16 | b >> 16]
    };
    packet.write(0, Macs { words: swapped })?;
    packet.send_back()
}
