//! Ends connected UDP sockets whose backend has gone, and those of the node that
//! were connected to a frontend before it was one.
//!
//! What was translated at a socket is not looked at again: a process that has
//! connected a UDP socket would send to a dead pod for ever. The kernel can end
//! such a socket (`SOCK_DESTROY`): it is connected no more, and its process is
//! told so by the call that waits or comes next (`ECONNABORTED`, or
//! `EDESTADDRREQ` if that is a `send()`). Sockets that are not connected find
//! another backend by themselves, with the next datagram.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

use netlink_packet_core::NLM_F_ACK;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use crate::{
    netlink::{Netlink, word},
    netns::Namespaces,
};

/// A socket that still sends to a backend that has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Orphan {
    /// The kernel's id of the socket (`SO_COOKIE`), unique on the machine.
    pub cookie: u64,
    pub backend: SocketAddr,
}

/// Ends the sockets, in the node's network namespace and those of its pods; and
/// in the node's those that are connected to an address itself that has become a
/// frontend: no hook sees their datagrams, while a pod's are translated where they
/// leave it. Returns how many there were.
///
/// # Errors
///
/// What the kernel says in the node's namespace: `EOPNOTSUPP` where it cannot
/// end sockets. A namespace that is just going away is none.
pub fn terminate(
    orphans: &BTreeSet<Orphan>,
    frontends: &BTreeSet<SocketAddr>,
    namespaces: &Namespaces,
) -> io::Result<usize> {
    let is_orphan = |socket: &Orphan| orphans.contains(socket);
    let mut ended = 0;
    if !orphans.is_empty() || !frontends.is_empty() {
        ended += terminate_here(|socket| is_orphan(socket) || frontends.contains(&socket.backend))?;
    }
    if !orphans.is_empty() {
        let in_pods = namespaces.in_pods(|_| terminate_here(is_orphan));
        ended += in_pods.into_iter().sum::<usize>();
    }
    Ok(ended)
}

/// In the network namespace of this thread.
fn terminate_here(is_meant: impl Fn(&Orphan) -> bool) -> io::Result<usize> {
    let netlink = Netlink::of_protocol(NETLINK_SOCK_DIAG)?;
    let mut ended = 0;
    for socket in connected(&netlink)? {
        if is_meant(&socket.as_orphan()) && destroy(&netlink, &socket)? {
            ended += 1;
        }
    }
    Ok(ended)
}

/// Whether the kernel can end UDP sockets (`CONFIG_INET_DIAG_DESTROY`, and the
/// module `udp_diag`), found by ending one of our own; `None` if that could not
/// be tried.
pub fn is_possible() -> Option<bool> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
    let addr = socket.local_addr().ok()?;
    // To itself, so that nobody else hears of it.
    socket.connect(addr).ok()?;
    let netlink = Netlink::of_protocol(NETLINK_SOCK_DIAG).ok()?;
    let sockets = match connected(&netlink) {
        Ok(sockets) => sockets,
        // Nor can it list them, without the module for that.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Some(false),
        Err(_) => return None,
    };
    let mut sockets = sockets.into_iter();
    let ours = sockets.find(|socket| socket.as_orphan().backend == addr);
    Some(ours.is_some_and(|socket| destroy(&netlink, &socket).is_ok()))
}

// `linux/sock_diag.h`
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

/// `struct inet_diag_sockid`: ports, addresses of 16 bytes each, device, cookie.
const SOCKET_ID: usize = 48;

/// A connected UDP socket, as the kernel names it.
#[derive(Clone, Copy)]
struct Connected {
    family: u8,
    id: [u8; SOCKET_ID],
}

impl Connected {
    /// From the beginning of a `struct inet_diag_msg`.
    fn parse(message: &[u8]) -> Option<Self> {
        Some(Self {
            family: *message.first()?,
            id: message.get(4..4 + SOCKET_ID)?.try_into().ok()?,
        })
    }

    /// By cookie and other end; an IPv4 address in an IPv6 socket as IPv4.
    fn as_orphan(&self) -> Orphan {
        let word = |at| word(&self.id, at).map_or(0, u64::from);
        let mut octets = [0; 16];
        octets.copy_from_slice(&self.id[20..36]);
        let addr = if i32::from(self.family) == libc::AF_INET {
            let [a, b, c, d, ..] = octets;
            IpAddr::from([a, b, c, d])
        } else {
            Ipv6Addr::from(octets).to_canonical()
        };
        let port = u16::from_be_bytes([self.id[2], self.id[3]]);
        Orphan {
            cookie: word(44) << 32 | word(40),
            backend: SocketAddr::new(addr, port),
        }
    }
}

/// Every connected UDP socket.
fn connected(netlink: &Netlink) -> io::Result<Vec<Connected>> {
    let mut sockets = Vec::new();
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        let body = request(family, &[0; SOCKET_ID]);
        let replies = netlink.dump(SOCK_DIAG_BY_FAMILY, &body)?;
        sockets.extend(replies.iter().filter_map(|reply| Connected::parse(reply)));
    }
    Ok(sockets)
}

/// Whether the socket was still there to be ended.
fn destroy(netlink: &Netlink, socket: &Connected) -> io::Result<bool> {
    let body = request(socket.family, &socket.id);
    match netlink.request(SOCK_DESTROY, NLM_F_ACK, &body) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        result => result.map(|_| true),
    }
}

/// `struct inet_diag_req_v2` about connected UDP sockets.
fn request(family: u8, id: &[u8; SOCKET_ID]) -> Vec<u8> {
    /// The state in which a UDP socket is while it is connected.
    const TCP_ESTABLISHED: u32 = 1;
    let mut body = vec![family, libc::IPPROTO_UDP as u8, 0, 0];
    body.extend((1_u32 << TCP_ESTABLISHED).to_ne_bytes());
    body.extend(id);
    body
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    fn cookie(socket: &UdpSocket) -> u64 {
        let (mut cookie, mut size) = (0_u64, 8);
        // SAFETY: the descriptor is open, and number and size live through the
        // call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut size,
            )
        };
        assert_eq!(result, 0);
        cookie
    }

    #[test]
    fn the_kernel_lists_connected_sockets_by_cookie_and_remote() {
        let netlink = Netlink::of_protocol(NETLINK_SOCK_DIAG).expect("a socket");
        for (here, there, remote) in [
            ("127.0.0.1:0", "127.0.0.1:9", "127.0.0.1:9"),
            ("[::1]:0", "[::1]:9", "[::1]:9"),
            ("[::]:0", "[::ffff:127.0.0.1]:9", "127.0.0.1:9"),
        ] {
            let socket = UdpSocket::bind(here).expect("bound");
            let orphan = Orphan {
                cookie: cookie(&socket),
                backend: remote.parse().expect("an address"),
            };
            let is_listed = || {
                let sockets = connected(&netlink).expect("listed");
                sockets.iter().any(|socket| socket.as_orphan() == orphan)
            };
            assert!(!is_listed(), "not connected");
            socket.connect(there).expect("connected");
            assert!(is_listed(), "{there}");
        }
    }

    #[test]
    fn short_messages_are_survived() {
        let message = [0; 4 + SOCKET_ID];
        for length in 0..message.len() {
            assert!(Connected::parse(&message[..length]).is_none());
        }
        assert!(Connected::parse(&message).is_some());
    }
}
