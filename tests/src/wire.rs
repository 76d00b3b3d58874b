//! Raw frames on a device of the current network namespace.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

/// Every protocol, in network order.
const ETH_P_ALL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// A packet socket: sends frames as they are, and sees those that come in.
#[derive(Debug)]
pub struct RawSocket {
    socket: OwnedFd,
}

impl RawSocket {
    /// # Panics
    /// If there is no such device, or without the right to look.
    pub fn open(device: &str) -> Self {
        let name = CString::new(device).expect("a device name without zeros");
        // SAFETY: the name is a C string that lives through the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        assert_ne!(index, 0, "{device}: {}", io::Error::last_os_error());
        // SAFETY: no pointer is passed.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(ETH_P_ALL)) };
        assert!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
        // SAFETY: the descriptor is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all zeros is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ETH_P_ALL;
        address.sll_ifindex = index.cast_signed();
        // SAFETY: the address lives through the call and has the size given.
        let result = unsafe {
            libc::bind(
                fd,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        assert_eq!(result, 0, "{device}: {}", io::Error::last_os_error());
        Self { socket }
    }

    /// Sends a frame as it is.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: pointer and length are those of one slice.
        let sent = unsafe {
            libc::send(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
            )
        };
        match usize::try_from(sent) {
            Ok(length) if length == frame.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// The next frame that came in, or `None` if none did in time.
    ///
    /// # Panics
    /// If the device goes away.
    pub fn receive(&self, timeout: Duration) -> Option<Vec<u8>> {
        let end = Instant::now() + timeout;
        loop {
            let left = end.checked_duration_since(Instant::now())?;
            let mut poll = libc::pollfd {
                fd: self.socket.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            let milliseconds = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            // SAFETY: one element, which lives through the call.
            let ready = unsafe { libc::poll(&raw mut poll, 1, milliseconds.max(1)) };
            assert!(ready >= 0, "poll: {}", io::Error::last_os_error());
            if ready > 0
                && let Some(frame) = self.read_incoming()
            {
                return Some(frame);
            }
        }
    }

    /// One frame, unless it is one that this device sent.
    fn read_incoming(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 65_536];
        // SAFETY: all zeros is a valid address.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut from_length = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: the buffers live through the call and have the sizes given.
        let length = unsafe {
            libc::recvfrom(
                self.socket.as_raw_fd(),
                frame.as_mut_ptr().cast(),
                frame.len(),
                libc::MSG_DONTWAIT,
                (&raw mut from).cast(),
                &raw mut from_length,
            )
        };
        frame.truncate(usize::try_from(length).ok()?);
        (from.sll_pkttype != libc::PACKET_OUTGOING).then_some(frame)
    }
}
