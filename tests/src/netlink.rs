//! rtnetlink(7), for what the `ip` of Debian 12 cannot set.

use std::io;

use socket2::{Domain, Protocol, Socket, Type};

/// Attributes of a device (`linux/if_link.h`).
const IFLA_GSO_IPV4_MAX_SIZE: u16 = 63;
const IFLA_GRO_IPV4_MAX_SIZE: u16 = 64;

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;

/// Sets the length of the longest packet of IPv4 that the kernel hands to a device of the
/// current network namespace, and of the longest that it makes of its frames (Linux 6.3).
///
/// # Errors
/// The kernel's.
pub(crate) fn set_longest_ipv4(device: &str, bytes: u32) -> io::Result<()> {
    // `struct ifinfomsg`, with nothing in it: the device is named below.
    let mut body = vec![0; 16];
    let mut name = device.as_bytes().to_vec();
    name.push(0);
    attribute(&mut body, libc::IFLA_IFNAME, &name);
    attribute(&mut body, IFLA_GSO_IPV4_MAX_SIZE, &bytes.to_ne_bytes());
    attribute(&mut body, IFLA_GRO_IPV4_MAX_SIZE, &bytes.to_ne_bytes());
    request(libc::RTM_NEWLINK, &body)
}

/// Appends an attribute, filled up to words of four bytes.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).expect("a short value");
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Asks the kernel for something, and waits for its answer.
fn request(kind: u16, body: &[u8]) -> io::Result<()> {
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK).expect("low bits");
    let length = u32::try_from(HEADER + body.len()).expect("a short message");
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number and sender.
    message.extend([0; 8]);
    message.extend(body);
    let domain = Domain::from(libc::AF_NETLINK);
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::NETLINK_ROUTE)))?;
    socket.send(&message)?;
    let mut answer = [0; 4096];
    let length = io::Read::read(&mut &socket, &mut answer)?;
    // `struct nlmsgerr` begins with the error, or 0.
    let error = answer[..length].get(HEADER..HEADER + 4);
    match error
        .and_then(|bytes| bytes.try_into().ok())
        .map(i32::from_ne_bytes)
    {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
