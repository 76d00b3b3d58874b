//! Ends connected UDP sockets whose backend has gone.
//!
//! What was translated at a socket is not looked at again: a process that has
//! connected a UDP socket would send to a dead pod for ever. The kernel can end
//! such a socket (`SOCK_DESTROY`); the process is told `ECONNABORTED` and connects
//! anew. Sockets that are not connected find another backend by themselves, with
//! the next datagram.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    thread,
};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};
use nix::sched::{CloneFlags, setns};

/// Where the network namespaces of pods are found by name: container runtimes
/// and CNIs keep them there.
const NAMESPACES: &str = "/run/netns";

/// A socket that still sends to a backend that has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// The kernel's id of the socket (`SO_COOKIE`), unique on the machine.
    pub cookie: u64,
    pub backend: SocketAddr,
}

/// Ends the sockets, in the node's network namespace and those of its pods.
/// Returns how many there were.
///
/// # Errors
///
/// What the kernel says in the node's namespace: `Unsupported` where it cannot
/// end sockets (`CONFIG_INET_DIAG_DESTROY`). A namespace that is just going away
/// is none.
pub fn terminate(orphans: &[Orphan]) -> io::Result<usize> {
    if orphans.is_empty() {
        return Ok(0);
    }
    let here = terminate_here(orphans)?;
    Ok(here + terminate_in_pods(orphans, Path::new(NAMESPACES)))
}

fn terminate_in_pods(orphans: &[Orphan], folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| File::open(entry.path()).ok());
    // A thread enters a namespace and never comes back.
    thread::scope(|scope| {
        let ended = files.map(|file| {
            let thread = scope.spawn(move || {
                setns(file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
                terminate_here(orphans)
            });
            thread
                .join()
                .map_or(0, |ended: io::Result<usize>| ended.unwrap_or(0))
        });
        ended.sum()
    })
}

/// In the network namespace of this thread.
fn terminate_here(orphans: &[Orphan]) -> io::Result<usize> {
    let mut ended = 0;
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        for socket in connected(family)? {
            let is_one = orphans.iter().any(|orphan| {
                orphan.cookie == socket.cookie() && orphan.backend == socket.remote()
            });
            if is_one {
                destroy(&socket)?;
                ended += 1;
            }
        }
    }
    Ok(ended)
}

/// `struct inet_diag_sockid`: both ends, the device and the cookie.
const SOCKET_ID: usize = 48;

/// A connected UDP socket, as the kernel names it.
#[derive(Clone, Copy)]
struct Connected {
    family: u8,
    id: [u8; SOCKET_ID],
}

impl Connected {
    /// `struct inet_diag_msg`.
    fn parse(message: &[u8]) -> Option<Self> {
        Some(Self {
            family: *message.first()?,
            id: message.get(4..4 + SOCKET_ID)?.try_into().ok()?,
        })
    }

    fn cookie(&self) -> u64 {
        let word = |at: usize| {
            let bytes = [
                self.id[at],
                self.id[at + 1],
                self.id[at + 2],
                self.id[at + 3],
            ];
            u64::from(u32::from_ne_bytes(bytes))
        };
        word(44) << 32 | word(40)
    }

    /// The other end; an IPv4 address in an IPv6 socket as IPv4.
    fn remote(&self) -> SocketAddr {
        let port = u16::from_be_bytes([self.id[2], self.id[3]]);
        let mut octets = [0; 16];
        octets.copy_from_slice(&self.id[20..36]);
        let addr = if i32::from(self.family) == libc::AF_INET {
            let [a, b, c, d, ..] = octets;
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        } else {
            IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
        };
        SocketAddr::new(addr, port)
    }
}

/// Every connected UDP socket of a family.
fn connected(family: u8) -> io::Result<Vec<Connected>> {
    let none = [0; SOCKET_ID];
    let flags = NLM_F_REQUEST | NLM_F_DUMP;
    let replies = request(SOCK_DIAG_BY_FAMILY, flags, family, &none)?;
    Ok(replies
        .iter()
        .filter_map(|reply| Connected::parse(reply))
        .collect())
}

fn destroy(socket: &Connected) -> io::Result<()> {
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    match request(SOCK_DESTROY, flags, socket.family, &socket.id) {
        // It was closed meanwhile.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result.map(drop),
    }
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

/// Sends a `struct inet_diag_req_v2` about connected UDP sockets; returns the
/// bodies of the replies.
fn request(kind: u16, flags: u16, family: u8, id: &[u8; SOCKET_ID]) -> io::Result<Vec<Vec<u8>>> {
    /// The state in which a UDP socket is while it is connected.
    const TCP_ESTABLISHED: u32 = 1;
    const HEADER: usize = 16;
    let mut message = Vec::new();
    let length = HEADER + 8 + SOCKET_ID;
    message.extend((length as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([family, libc::IPPROTO_UDP as u8, 0, 0]);
    message.extend((1_u32 << TCP_ESTABLISHED).to_ne_bytes());
    message.extend(id);

    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.send(&message, 0)?;
    let mut replies = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        if take_in(&datagram, &mut replies)? {
            return Ok(replies);
        }
    }
}

/// Takes the messages of a datagram; returns whether that was the last.
fn take_in(mut datagram: &[u8], replies: &mut Vec<Vec<u8>>) -> io::Result<bool> {
    const HEADER: usize = 16;
    while datagram.len() >= HEADER {
        let length = u32::from_ne_bytes([datagram[0], datagram[1], datagram[2], datagram[3]]);
        let length = (length as usize).clamp(HEADER, datagram.len());
        let (message, rest) = datagram.split_at(length);
        datagram = rest;
        let body = &message[HEADER..];
        match libc::c_int::from(u16::from_ne_bytes([message[4], message[5]])) {
            libc::NLMSG_DONE => return Ok(true),
            libc::NLMSG_ERROR => {
                let code = body.get(..4).and_then(|code| code.try_into().ok());
                return match code.map_or(-libc::EIO, i32::from_ne_bytes) {
                    0 => Ok(true),
                    code => Err(io::Error::from_raw_os_error(-code)),
                };
            }
            _ => replies.push(body.to_vec()),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::fd::AsRawFd as _};

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
        for (here, there) in [("127.0.0.1:0", "127.0.0.1:9"), ("[::1]:0", "[::1]:9")] {
            let socket = UdpSocket::bind(here).expect("bound");
            let is_listed = |socket: &UdpSocket| {
                let families = [libc::AF_INET as u8, libc::AF_INET6 as u8];
                let mut all = families
                    .iter()
                    .flat_map(|family| connected(*family).expect("listed"));
                all.find(|found| found.cookie() == cookie(socket))
            };
            assert!(is_listed(&socket).is_none(), "not connected");
            socket.connect(there).expect("connected");
            let found = is_listed(&socket).expect("listed");
            assert_eq!(found.remote(), there.parse().expect("an address"));
        }
    }
}
