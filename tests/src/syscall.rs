//! bpf(2), for what aya has no call of.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

const PROG_TEST_RUN: i32 = 10;

/// A flag of [`test_run`]: the packet comes with the kernel's sum of all of it
/// (`CHECKSUM_COMPLETE`), which has to be that of the packet when the program is done,
/// or the run fails with `EBADMSG` (Linux 6.12, commit a3cfe84cca28).
pub const TEST_CHECKSUM_COMPLETE: u32 = 1 << 2;

/// Runs a program on a frame, once. Returns the frame as it is then.
///
/// # Errors
/// The kernel's; `EINVAL` for flags that it does not know.
///
/// # Panics
/// If the frame is larger than a packet can be.
pub fn test_run(program: impl AsFd, frame: &[u8], flags: u32) -> io::Result<Vec<u8>> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        result: u32,
        length_in: u32,
        length_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        context_in: u32,
        context_out: u32,
        contexts: [u64; 2],
        flags: u32,
        cpu: u32,
    }
    let mut out = vec![0; frame.len() + 256];
    let mut attributes = Attributes {
        program: program.as_fd().as_raw_fd().cast_unsigned(),
        result: 0,
        length_in: u32::try_from(frame.len()).expect("a packet"),
        length_out: u32::try_from(out.len()).expect("a packet"),
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat: 1,
        duration: 0,
        context_in: 0,
        context_out: 0,
        contexts: [0; 2],
        flags,
        cpu: 0,
    };
    // SAFETY: both buffers live through the call and are as long as it says.
    unsafe { bpf(PROG_TEST_RUN, &mut attributes) }?;
    out.truncate(attributes.length_out as usize);
    Ok(out)
}

/// As [`bpf`], for commands that return a file descriptor.
///
/// # Safety
/// As for [`bpf`].
pub(crate) unsafe fn open<T>(command: i32, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller vouches for the attributes, and the descriptor is new.
    unsafe { bpf(command, attributes).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// One call of bpf(2).
///
/// # Safety
/// `attributes` must be the beginning of `union bpf_attr` as `command` reads it,
/// and the addresses in it valid for what the kernel reads and writes there.
///
/// # Errors
/// The kernel's.
pub(crate) unsafe fn bpf<T>(command: i32, attributes: &mut T) -> io::Result<RawFd> {
    let size = size_of::<T>();
    // SAFETY: the caller vouches for the contents, and the size bounds what the
    // kernel reads.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(RawFd::try_from(result).expect("a descriptor or zero"))
}
