//! How the C library keeps memory that nobody uses.

/// Has it given back, which has to be said before there is a second thread.
///
/// By itself the library gives each thread a heap of its own, and the answers to
/// three scrapes of 10,000 Services, made by three threads, took the agent from 87
/// to 159 MB for good; with this, six take it from 68 to 81. Threads that have to
/// wait for each other do not show: none but one has much to allocate.
pub(super) fn be_frugal() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [
        (libc::M_ARENA_MAX, 1),
        // Bytes at the end of the heap that are kept: more than a change needs, which
        // would have to ask for its pages each time (0.61 ms in place of 0.53).
        (libc::M_TRIM_THRESHOLD, 16 << 20),
        // What is larger has pages of its own, however large those were that were
        // given back before.
        (libc::M_MMAP_THRESHOLD, 4 << 20),
    ] {
        // SAFETY: it takes numbers, and there is no other thread yet. What it does
        // not know it refuses, and all stays as it is.
        unsafe { libc::mallopt(option, value) };
    }
}
