//! Numbers of which the verifier shall know nothing.
//!
//! It walks through a program once for everything that it knows to be different:
//! what follows on a packet that is whole, and on one that is not, is walked twice
//! if it knows which by then. What is combined with a number that it does not
//! know, it does not know; then the two are one. (Of what is compared again and
//! again, like the protocol, it should know: else it walks through ways that there
//! are not.)

use core::mem::transmute;

use lb_common::Reason;

/// 0, as nobody ever writes it. It is in a section that may be written, or the
/// verifier would read it.
#[unsafe(no_mangle)]
static mut ZERO: u32 = 0;

/// The number 0.
#[inline(always)]
pub fn zero() -> u32 {
    // SAFETY: nobody writes it. Volatile, so that the compiler does not know it
    // either.
    unsafe { (&raw const ZERO).read_volatile() }
}

/// The same error, or 0.
#[inline(always)]
pub fn error(result: Result<(), i32>) -> i32 {
    result.err().unwrap_or(0) ^ zero().cast_signed()
}

/// The same reason.
#[inline(always)]
pub fn reason(reason: Reason) -> Reason {
    // SAFETY: it is the same value.
    unsafe { transmute::<u32, Reason>(reason as u32 ^ zero()) }
}
