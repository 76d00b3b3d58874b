//! The node's ports that stand for masqueraded clients, kept from the sockets
//! of its processes.
//!
//! The kernel gives none of `net.ipv4.ip_local_reserved_ports` (which goes for
//! IPv6 too) to a socket that asks for any port. The list may have entries of
//! others: what klb added to it is remembered, so that no more is taken out.

use std::{
    collections::BTreeSet,
    fmt::{self, Write as _},
    fs::{self, File},
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
};

use lb_common::node::Config;

const SYSCTL: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Where a container has the node's `/proc/sys/net` (`deploy/base`): its own is
/// read-only unless it is privileged. Which network namespace a list is of is
/// not for the path to say, but for who opens it.
const NODES_SYSCTL: &str = "/host/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Longer than any list: every second port, with five digits and a comma.
const LONGEST: usize = 256 * 1024;

/// A set of ports, written as the kernel writes it: `8080,50000-65535`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ports(BTreeSet<u16>);

impl FromStr for Ports {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Self> {
        let mut ports = BTreeSet::new();
        for item in text.trim().split(',').filter(|item| !item.is_empty()) {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let (Ok(first), Ok(last)) = (first.parse::<u16>(), last.parse()) else {
                let message = format!("{item} is no port or range");
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            };
            ports.extend(first..=last);
        }
        Ok(Self(ports))
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ports = self.0.iter().copied().peekable();
        let mut separator = "";
        while let Some(first) = ports.next() {
            let mut last = first;
            while let Some(next) = ports.next_if(|port| Some(*port) == last.checked_add(1)) {
                last = next;
            }
            write!(f, "{separator}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

/// The reservation of one agent, in the network namespace of the caller.
#[derive(Debug)]
pub struct Reservation {
    sysctl: PathBuf,
    /// Where it is remembered which ports klb added.
    added: PathBuf,
}

impl Reservation {
    pub fn new(state_dir: &Path) -> Self {
        let nodes = Path::new(NODES_SYSCTL);
        Self {
            sysctl: if nodes.exists() {
                nodes
            } else {
                SYSCTL.as_ref()
            }
            .to_owned(),
            added: state_dir.join("reserved-ports"),
        }
    }

    /// Reserves these ports, and no longer those of an earlier call.
    pub fn make(&self, ports: RangeInclusive<u16>) -> io::Result<()> {
        let (reserved, added) = (read_list(&self.sysctl)?, self.added()?);
        let others = &reserved.0 - &added.0;
        let missing = Ports(&ports.collect::<BTreeSet<u16>>() - &others);
        // At every moment what is remembered covers what was added.
        self.remember(&Ports(&added.0 | &missing.0))?;
        write_list(&self.sysctl, &reserved, &Ports(&others | &missing.0))?;
        self.remember(&missing)
    }

    /// Takes out what was added.
    pub fn release(&self) -> io::Result<()> {
        let added = self.added()?;
        if !added.0.is_empty() {
            let reserved = read_list(&self.sysctl)?;
            write_list(&self.sysctl, &reserved, &Ports(&reserved.0 - &added.0))?;
        }
        match fs::remove_file(&self.added) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn added(&self) -> io::Result<Ports> {
        match fs::read_to_string(&self.added) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Ports::default()),
            text => text?.parse(),
        }
    }

    fn remember(&self, added: &Ports) -> io::Result<()> {
        let unfinished = self.added.with_extension("new");
        fs::write(&unfinished, added.to_string())?;
        fs::rename(unfinished, &self.added)
    }
}

/// Reads the whole list: the kernel gives it to the first read alone, however
/// little that asks for.
fn read_list(sysctl: &Path) -> io::Result<Ports> {
    let mut text = vec![0; LONGEST];
    let length = File::open(sysctl)?.read(&mut text)?;
    String::from_utf8_lossy(&text[..length]).parse()
}

fn write_list(sysctl: &Path, old: &Ports, new: &Ports) -> io::Result<()> {
    if old == new {
        return Ok(());
    }
    // An empty write changes nothing, an empty line empties the list.
    fs::write(sysctl, format!("{new}\n"))
}

/// The ports that the programs use; none if nothing can be masqueraded.
pub fn ports(config: &Config) -> RangeInclusive<u16> {
    match config.port_count.checked_sub(1) {
        Some(more) => config.first_port..=config.first_port.saturating_add(more),
        None => RangeInclusive::new(1, 0),
    }
}

/// What is wrong with these ports being klb's, in the network namespace of the
/// caller: for people, and empty if all is well.
pub fn complaints(ports: &RangeInclusive<u16>) -> Vec<String> {
    let mut complaints = Vec::new();
    let (first, last) = (ports.start(), ports.end());
    match read_list(Path::new(SYSCTL)) {
        Ok(reserved) if ports.clone().all(|port| reserved.0.contains(&port)) => {}
        Ok(_) => complaints.push(format!(
            "the ports {first}-{last} are not all in net.ipv4.ip_local_reserved_ports: \
             the kernel may give one of them to a process of this node"
        )),
        Err(error) => complaints.push(format!("{SYSCTL}: {error}")),
    }
    complaints.extend(users_of(ports));
    complaints
}

/// As [`complaints`], of those only who use the ports now.
pub fn users_of(ports: &RangeInclusive<u16>) -> Option<String> {
    match sockets_on(ports) {
        Ok(sockets) if sockets.is_empty() => None,
        Ok(sockets) => Some(in_use(&sockets)),
        Err(error) => Some(format!("the node's sockets cannot be listed: {error}")),
    }
}

fn in_use(sockets: &BTreeSet<(&'static str, SocketAddr)>) -> String {
    const SHOWN: usize = 3;
    let mut list = String::new();
    for (protocol, addr) in sockets.iter().take(SHOWN) {
        // Writing to a String does not fail.
        let _ok = write!(list, " {addr}/{protocol}");
    }
    if sockets.len() > SHOWN {
        list.push_str(" …");
    }
    format!(
        "processes of this node use ports that stand for masqueraded clients \
         (see --masquerade-ports), and may miss answers of backends:{list}"
    )
}

/// Sockets that are bound to one of the ports, but for TCP connections: those
/// that were made before the reservation end by themselves.
fn sockets_on(ports: &RangeInclusive<u16>) -> io::Result<BTreeSet<(&'static str, SocketAddr)>> {
    const LISTENING: &str = "0A";
    let mut sockets = BTreeSet::new();
    for (table, protocol) in [
        ("tcp", "TCP"),
        ("tcp6", "TCP"),
        ("udp", "UDP"),
        ("udp6", "UDP"),
    ] {
        let text = match fs::read_to_string(Path::new("/proc/self/net").join(table)) {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            text => text?,
        };
        let bound = text.lines().skip(1).filter_map(parse_socket);
        sockets.extend(
            bound
                .filter(|(addr, state)| {
                    ports.contains(&addr.port()) && (protocol == "UDP" || *state == LISTENING)
                })
                .map(|(addr, _)| (protocol, addr)),
        );
    }
    Ok(sockets)
}

/// Own address and state of a socket, of a line of `/proc/net/tcp` and the like.
fn parse_socket(line: &str) -> Option<(SocketAddr, &str)> {
    let mut fields = line.split_whitespace().skip(1);
    let (addr, port) = fields.next()?.split_once(':')?;
    let state = fields.nth(1)?;
    let port = u16::from_str_radix(port, 16).ok()?;
    Some((SocketAddr::new(parse_address(addr)?, port), state))
}

/// The kernel writes addresses as words of this machine.
fn parse_address(text: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = u32::from_str_radix(text.get(at * 8..at * 8 + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    match text.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut octets = [0; 16];
            for (at, chunk) in octets.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at)?);
            }
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_as_the_kernel_does() {
        for text in ["", "80", "80-81", "1,3-5,7,65534-65535"] {
            let ports: Ports = text.parse().expect("ports");
            assert_eq!(ports.to_string(), text);
        }
        assert_eq!(
            "80,81\n".parse::<Ports>().expect("ports").to_string(),
            "80-81"
        );
        assert!("80-".parse::<Ports>().is_err());
    }

    /// A reservation whose list is a plain file.
    fn reservation(folder: &Path, list: &str) -> Reservation {
        let reservation = Reservation {
            sysctl: folder.join("list"),
            ..Reservation::new(folder)
        };
        fs::write(&reservation.sysctl, list).expect("written");
        reservation
    }

    fn list(reservation: &Reservation) -> String {
        read_list(&reservation.sysctl).expect("a list").to_string()
    }

    #[test]
    fn what_others_reserved_stays() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let reservation = reservation(folder.path(), "8080,50005-50010\n");
        reservation.make(50_000..=50_020).expect("made");
        assert_eq!(list(&reservation), "8080,50000-50020");
        reservation.make(50_000..=50_020).expect("made again");
        reservation.release().expect("released");
        assert_eq!(list(&reservation), "8080,50005-50010");
        assert!(!reservation.added.exists());
        reservation.release().expect("a second time");
        assert_eq!(list(&reservation), "8080,50005-50010");
    }

    #[test]
    fn another_range_takes_the_place_of_the_first() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let reservation = reservation(folder.path(), "\n");
        reservation.make(50_000..=50_009).expect("made");
        reservation.make(50_005..=50_019).expect("made");
        assert_eq!(list(&reservation), "50005-50019");
        reservation.release().expect("released");
        assert_eq!(list(&reservation), "");
    }

    #[test]
    fn an_agent_killed_between_two_writes_leaves_nothing() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let reservation = reservation(folder.path(), "50001\n");
        let added: Ports = "50000,50002-50009".parse().expect("ports");
        reservation.remember(&added).expect("remembered");
        reservation.make(50_000..=50_009).expect("made");
        reservation.release().expect("released");
        assert_eq!(list(&reservation), "50001");
    }

    #[test]
    fn sockets_are_read_from_the_kernels_tables() {
        let line = "   0: 0100007F:C350 00000000:0000 0A 00000000:00000000 00:00000000";
        let addr = "127.0.0.1:50000".parse().expect("an address");
        assert_eq!(parse_socket(line), Some((addr, "0A")));
        let line = " 1: 000000FD000000000000000001000000:0035 0:0 07";
        let addr = "[fd00::1]:53".parse().expect("an address");
        assert_eq!(parse_socket(line), Some((addr, "07")));
        assert_eq!(parse_socket("garbage"), None);
    }

    #[test]
    fn a_socket_on_a_port_of_klbs_is_found() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let addr = socket.local_addr().expect("an address");
        let found = sockets_on(&(addr.port()..=addr.port())).expect("a listing");
        assert!(found.contains(&("UDP", addr)), "{found:?}");
        assert!(in_use(&found).contains(&addr.to_string()));
    }
}
