//! The calls of bpf(2) that aya 0.14 does not offer: what a link is attached
//! to, replacing a link's program whatever its kind (aya does it for XDP and TC
//! only), and reading and writing many entries of a map at once.

use std::{
    ffi::{CString, c_void},
    io,
    mem::size_of,
    num::NonZeroUsize,
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr::NonNull,
};

use aya::{Pod, sys::BpfHelper};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

// Numbers of `enum bpf_cmd` in the kernel's `linux/bpf.h`.
const MAP_DELETE_ELEM: libc::c_int = 3;
const MAP_GET_NEXT_KEY: libc::c_int = 4;
const PROG_LOAD: libc::c_int = 5;
const OBJ_GET: libc::c_int = 7;
const PROG_TEST_RUN: libc::c_int = 10;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const MAP_LOOKUP_BATCH: libc::c_int = 24;
const MAP_UPDATE_BATCH: libc::c_int = 26;
const LINK_UPDATE: libc::c_int = 29;
const LINK_DETACH: libc::c_int = 34;

// Numbers of `enum bpf_link_type`.
const LINK_TYPE_CGROUP: u32 = 3;
const LINK_TYPE_XDP: u32 = 6;
const LINK_TYPE_TCX: u32 = 11;

/// What a link holds its program to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Index of the device; 0 once the device has gone.
    Device(u32),
    /// Id of the control group, which is its inode number; 0 once it has gone.
    Cgroup(u64),
    /// A kind of link that klb does not make.
    Other,
}

/// What the kernel tells about a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkInfo {
    pub program_id: u32,
    pub target: Target,
}

/// `struct bpf_link_info`, as far as klb reads it.
#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program_id: u32,
    pad: u32,
    /// A union by `kind`. Cgroup: a `u64` id. XDP and tcx: a `u32` index.
    target: [u32; 2],
    attach_type: u32,
    tail: u32,
}

impl From<&RawLinkInfo> for LinkInfo {
    fn from(raw: &RawLinkInfo) -> Self {
        let [first, second] = raw.target;
        let mut id = [0; 8];
        id[..4].copy_from_slice(&first.to_ne_bytes());
        id[4..].copy_from_slice(&second.to_ne_bytes());
        Self {
            program_id: raw.program_id,
            target: match raw.kind {
                LINK_TYPE_CGROUP => Target::Cgroup(u64::from_ne_bytes(id)),
                LINK_TYPE_XDP | LINK_TYPE_TCX => Target::Device(first),
                _ => Target::Other,
            },
        }
    }
}

/// One call of bpf(2).
///
/// # Safety
///
/// `attr` must be the beginning of `union bpf_attr` as `command` reads it, and
/// the addresses in it must be valid for what the kernel reads and writes there.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<RawFd> {
    // SAFETY: the caller vouches for the contents, and the size bounds what the
    // kernel reads.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as RawFd)
}

/// Opens what is pinned at a path.
///
/// # Errors
///
/// `ENOENT` if nothing is pinned there, `EPERM` without privileges.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Attr {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    // SAFETY: the path ends with a zero and outlives the call.
    let fd = unsafe { bpf(OBJ_GET, &mut attr) }?;
    // SAFETY: the call made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Asks the kernel about a link.
pub(super) fn link_info(link: impl AsFd) -> io::Result<LinkInfo> {
    #[repr(C)]
    struct Attr {
        fd: RawFd,
        length: u32,
        info: u64,
    }
    let mut info = RawLinkInfo::default();
    let mut attr = Attr {
        fd: link.as_fd().as_raw_fd(),
        length: size_of::<RawLinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: `info` has the length that is given and outlives the call.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(LinkInfo::from(&info))
}

/// Replaces the program of a link. No packet and no call meets the hook without
/// one.
///
/// # Errors
///
/// `ENOLINK` if what the link was attached to has gone.
pub(super) fn update_link(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link: RawFd,
        program: RawFd,
        flags: u32,
        old_program: u32,
    }
    let mut attr = Attr {
        link: link.as_fd().as_raw_fd(),
        program: program.as_fd().as_raw_fd(),
        flags: 0,
        old_program: 0,
    };
    // SAFETY: the attributes hold numbers only.
    unsafe { bpf(LINK_UPDATE, &mut attr) }.map(drop)
}

/// Takes a link's program off its hook, at once: a link that loses its last
/// reference does so some time later.
pub(super) fn detach_link(link: impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link: RawFd,
    }
    let mut attr = Attr {
        link: link.as_fd().as_raw_fd(),
    };
    // SAFETY: the attributes hold a number only.
    unsafe { bpf(LINK_DETACH, &mut attr) }.map(drop)
}

/// A program that calls a helper without arguments, and returns what that says.
pub(super) struct HelperCall(OwnedFd);

impl HelperCall {
    /// # Errors
    ///
    /// `EINVAL` if the kernel has no such helper, `EPERM` without privileges.
    pub(super) fn new(helper: BpfHelper) -> io::Result<Self> {
        #[repr(C)]
        struct Attr {
            kind: u32,
            instruction_count: u32,
            instructions: u64,
            license: u64,
            log: [u32; 4],
        }
        /// `BPF_PROG_TYPE_SCHED_CLS`.
        const CLASSIFIER: u32 = 3;
        // `BPF_JMP | BPF_CALL` of the helper, and `BPF_JMP | BPF_EXIT`: the number of
        // the helper is the upper half of the word, in the byte order of the machine.
        let call = [0x85_u32.to_le(), helper as u32];
        let instructions = [call, [0x95_u32.to_le(), 0]];
        let mut attr = Attr {
            kind: CLASSIFIER,
            instruction_count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log: [0; 4],
        };
        // SAFETY: there are so many instructions, the licence ends with a zero, and
        // both outlive the call.
        let fd = unsafe { bpf(PROG_LOAD, &mut attr) }?;
        // SAFETY: the kernel has just made this descriptor, which nobody else has.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The lower half of what it says.
    pub(super) fn run(&self) -> io::Result<u32> {
        #[repr(C)]
        struct Attr {
            program: RawFd,
            result: u32,
            length_in: u32,
            length_out: u32,
            data_in: u64,
            data_out: u64,
            repeat: u32,
            duration: u32,
        }
        // Of a packet that it does not look at.
        let frame = [0_u8; 64];
        let mut attr = Attr {
            program: self.0.as_raw_fd(),
            result: 0,
            length_in: frame.len() as u32,
            length_out: 0,
            data_in: frame.as_ptr() as u64,
            data_out: 0,
            repeat: 1,
            duration: 0,
        };
        // SAFETY: the frame has that length and outlives the call, and nothing is
        // written but to the attributes.
        unsafe { bpf(PROG_TEST_RUN, &mut attr) }?;
        Ok(attr.result)
    }
}

/// Removes all entries of a hash map whose keys have so many bytes. Returns how
/// many there were.
pub(super) fn clear(map: impl AsFd, key_size: usize) -> io::Result<usize> {
    /// As it is for both calls.
    #[repr(C)]
    struct Attr {
        fd: u32,
        pad: u32,
        key: u64,
        next_key: u64,
        flags: u64,
    }
    let mut key = vec![0_u8; key_size];
    for removed in 0.. {
        let fd = map.as_fd().as_raw_fd().cast_unsigned();
        let buffer = key.as_mut_ptr() as u64;
        // Without a key the first one is told.
        let mut first = Attr {
            fd,
            pad: 0,
            key: 0,
            next_key: buffer,
            flags: 0,
        };
        // SAFETY: the buffer has room for a key.
        match unsafe { bpf(MAP_GET_NEXT_KEY, &mut first) } {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(removed),
            result => result?,
        };
        let mut entry = Attr {
            fd,
            pad: 0,
            key: buffer,
            next_key: 0,
            flags: 0,
        };
        // SAFETY: the buffer holds a key.
        match unsafe { bpf(MAP_DELETE_ELEM, &mut entry) } {
            // Somebody else was faster.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            result => drop(result?),
        }
    }
    unreachable!("more entries than there are numbers");
}

/// What the calls about many entries of a map take.
#[repr(C)]
struct BatchAttr {
    position: u64,
    next_position: u64,
    keys: u64,
    values: u64,
    count: u32,
    fd: RawFd,
    element_flags: u64,
    flags: u64,
}

/// Writes these entries of a hash map or an array, in order (Linux 5.6).
///
/// # Errors
///
/// That of the first entry that cannot be written; those before it are. `K` and
/// `V` are as in [`read_all`].
pub(super) fn write_many<K: Pod, V: Pod>(
    map: impl AsFd,
    keys: &[K],
    values: &[V],
) -> io::Result<()> {
    let count = keys.len().min(values.len());
    if count == 0 {
        return Ok(());
    }
    let mut attr = BatchAttr {
        position: 0,
        next_position: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: u32::try_from(count).map_err(io::Error::other)?,
        fd: map.as_fd().as_raw_fd(),
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: both slices have `count` elements of the map, and outlive the call.
    unsafe { bpf(MAP_UPDATE_BATCH, &mut attr) }.map(drop)
}

/// Writes these entries of an array by storing them, as one that was made so
/// (`BPF_F_MMAPABLE`) allows. Each is there before any call that follows.
///
/// # Errors
///
/// If the array was not made so; nothing is written then. `V` is as in
/// [`read_all`], and the array has all these entries.
pub(super) fn store_many<V: Pod>(map: impl AsFd, keys: &[u32], values: &[V]) -> io::Result<()> {
    /// What the kernel's entries of arrays are aligned to.
    const ALIGNMENT: usize = 8;
    let (Some(first), Some(last)) = (keys.iter().min(), keys.iter().max()) else {
        return Ok(());
    };
    let entry = size_of::<V>().next_multiple_of(ALIGNMENT);
    let window = Window::open(map, *first as usize * entry, (*last as usize + 1) * entry)?;
    for (key, value) in keys.iter().zip(values) {
        window.store(*key as usize * entry, value);
    }
    Ok(())
}

/// Some bytes of an array, in our memory.
struct Window {
    memory: NonNull<c_void>,
    length: NonZeroUsize,
    /// Of its first byte in the array.
    offset: usize,
}

impl Window {
    /// Those from `start` on that are before `end`, and the rest of their pages.
    fn open(map: impl AsFd, start: usize, end: usize) -> io::Result<Self> {
        /// A multiple of every machine's.
        const PAGE: usize = 1 << 16;
        let offset = start / PAGE * PAGE;
        let length = NonZeroUsize::new(end - offset).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let at = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: new memory, at an address of the kernel's choice.
        let memory = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, map, at) }?;
        Ok(Self {
            memory,
            length,
            offset,
        })
    }

    /// Stores a value at an offset in the array.
    ///
    /// # Panics
    ///
    /// If the window does not reach there.
    fn store<V: Pod>(&self, at: usize, value: &V) {
        let at = at - self.offset;
        assert!(at + size_of::<V>() <= self.length.get());
        // SAFETY: within the memory, which nobody else in this process knows; what
        // programs read of it meanwhile they read word by word.
        unsafe { self.memory.byte_add(at).cast::<V>().write_unaligned(*value) };
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: nothing points there any more. It fails for other arguments only.
        let _ = unsafe { munmap(self.memory, self.length.get()) };
    }
}

/// Reads all entries of a hash map or an array.
///
/// The kernel walks bucket by bucket, so that a map that changes meanwhile is
/// read in one pass; by `BPF_MAP_GET_NEXT_KEY` the walk starts anew at every
/// entry that goes, and may never end on a busy flow table.
///
/// # Errors
///
/// That of the call. `K` and `V` of other sizes than the map's are refused by
/// the types that the caller opened the map with.
pub(super) fn read_all<K: Pod, V: Pod>(map: impl AsFd) -> io::Result<Vec<(K, V)>> {
    let mut entries = Vec::new();
    read_in_parts(map, |keys: &mut Vec<K>, values: &mut Vec<V>| {
        entries.extend(keys.drain(..).zip(values.drain(..)));
    })?;
    Ok(entries)
}

/// As [`read_all`], keeping none: the number of entries.
pub(super) fn count<K: Pod, V: Pod>(map: impl AsFd) -> io::Result<usize> {
    let mut count = 0;
    read_in_parts(map, |keys: &mut Vec<K>, _: &mut Vec<V>| count += keys.len())?;
    Ok(count)
}

/// Reads some thousand entries after the other.
fn read_in_parts<K: Pod, V: Pod>(
    map: impl AsFd,
    mut take: impl FnMut(&mut Vec<K>, &mut Vec<V>),
) -> io::Result<()> {
    // More than a bucket ever holds, or the call fails with ENOSPC.
    const CHUNK: usize = 4096;

    let mut keys = Vec::<K>::with_capacity(CHUNK);
    let mut values = Vec::<V>::with_capacity(CHUNK);
    // Opaque to us. Four bytes for hash maps, a key for arrays: four as well.
    let mut position = None::<u32>;
    loop {
        let mut next_position = 0_u32;
        let mut attr = BatchAttr {
            position: position
                .as_ref()
                .map_or(0, |position| &raw const *position as u64),
            next_position: (&raw mut next_position) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: CHUNK as u32,
            fd: map.as_fd().as_raw_fd(),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: both vectors have room for `count` elements of the map, and
        // the positions outlive the call.
        let result = unsafe { bpf(MAP_LOOKUP_BATCH, &mut attr) };
        let last = match result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        let count = (attr.count as usize).min(CHUNK);
        // SAFETY: the kernel has written `count` elements to each, and any bytes
        // are a valid `K` and `V`.
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        take(&mut keys, &mut values);
        if last {
            return Ok(());
        }
        position = Some(next_position);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_names_its_target_by_its_kind() {
        let raw = |kind| RawLinkInfo {
            kind,
            program_id: 9,
            target: [7, 0],
            ..RawLinkInfo::default()
        };
        for (kind, target) in [
            (LINK_TYPE_TCX, Target::Device(7)),
            (LINK_TYPE_XDP, Target::Device(7)),
            (LINK_TYPE_CGROUP, Target::Cgroup(7)),
            (1, Target::Other),
        ] {
            let info = LinkInfo::from(&raw(kind));
            assert_eq!((info.program_id, info.target), (9, target));
        }
    }
}
