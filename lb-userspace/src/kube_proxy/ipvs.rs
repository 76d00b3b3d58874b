//! kube-proxy's virtual servers in IPVS, and the device that has their
//! addresses.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use super::{Error, tool};
use crate::netlink::Netlink;

const TABLE: &str = "/proc/net/ip_vs";
/// A dummy device of kube-proxy's.
pub(super) const DEVICE: &str = "kube-ipvs0";

/// A virtual server.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Server {
    protocol: &'static str,
    addr: SocketAddr,
    backends: BTreeSet<SocketAddr>,
}

/// What is kube-proxy's.
#[derive(Debug, Default)]
pub(super) struct Ipvs {
    servers: Vec<Server>,
    /// Index of the device.
    device: Option<u32>,
}

pub(super) fn find() -> Result<Ipvs, Error> {
    let netlink = Netlink::open().map_err(|error| Error::new("netlink", error))?;
    let links = netlink.links();
    let links = links.map_err(|error| Error::new("listing devices", error))?;
    let device = links.iter().find(|link| link.name == DEVICE);
    let Some(device) = device.map(|link| link.index) else {
        return Ok(Ipvs::default());
    };
    let addresses = netlink.addresses();
    let addresses = addresses.map_err(|error| Error::new("listing addresses", error))?;
    let of_device = addresses.iter().filter(|address| address.device == device);
    let of_device = of_device.map(|address| address.addr).collect();
    let text = match fs::read_to_string(TABLE) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        text => text.map_err(|error| Error::new(TABLE, error))?,
    };
    Ok(Ipvs {
        servers: kube_proxys(parse(&text), &of_device),
        device: Some(device),
    })
}

/// Those at the addresses of its device, and those at other addresses (the
/// node's, for a `NodePort`) that lead to the same backends as one of them.
fn kube_proxys(servers: Vec<Server>, addresses: &BTreeSet<IpAddr>) -> Vec<Server> {
    let is_at_device = |server: &&Server| addresses.contains(&server.addr.ip());
    let known = servers.iter().filter(is_at_device);
    let known: BTreeSet<_> = known.map(|server| server.backends.clone()).collect();
    let is_own = |server: &Server| {
        is_at_device(&server) || !server.backends.is_empty() && known.contains(&server.backends)
    };
    servers.into_iter().filter(is_own).collect()
}

/// Lines of `TCP  0A600001:0050 rr` and below each `  -> 0AF40005:0BB8 Masq 1 …`;
/// addresses of IPv6 are in brackets, in groups as people write them.
fn parse(text: &str) -> Vec<Server> {
    let mut servers = Vec::<Server>::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (first, second) = (words.next(), words.next());
        let Some(addr) = second.and_then(parse_address) else {
            continue;
        };
        match first {
            Some("->") => {
                if let Some(server) = servers.last_mut() {
                    server.backends.insert(addr);
                }
            }
            Some(word) => {
                let mut protocols = ["TCP", "UDP", "SCTP"].into_iter();
                servers.extend(
                    protocols
                        .find(|protocol| *protocol == word)
                        .map(|protocol| Server {
                            protocol,
                            addr,
                            backends: BTreeSet::new(),
                        }),
                );
            }
            None => {}
        }
    }
    servers
}

fn parse_address(text: &str) -> Option<SocketAddr> {
    let (addr, port) = text.rsplit_once(':')?;
    let addr = match addr.strip_prefix('[') {
        Some(addr) => IpAddr::V6(addr.strip_suffix(']')?.parse().ok()?),
        None => Ipv4Addr::from(u32::from_str_radix(addr, 16).ok()?).into(),
    };
    Some(SocketAddr::new(addr, u16::from_str_radix(port, 16).ok()?))
}

impl Ipvs {
    pub(super) const fn is_empty(&self) -> bool {
        self.servers.is_empty() && self.device.is_none()
    }

    pub(super) fn summary(&self) -> Vec<String> {
        let servers = match self.servers.len() {
            0 => None,
            count => Some(format!("IPVS: {count} virtual servers")),
        };
        let device = self.device.map(|_| format!("device {DEVICE}"));
        servers.into_iter().chain(device).collect()
    }

    pub(super) fn harm(&self) -> Option<String> {
        let harm = "connections that IPVS serves end with its virtual servers";
        (!self.servers.is_empty()).then(|| harm.to_owned())
    }

    pub(super) fn remove(&self) -> Result<(), Error> {
        if !self.servers.is_empty() {
            let program = tool::find("ipvsadm").ok_or_else(|| {
                let missing = io::Error::from(io::ErrorKind::NotFound);
                Error::new("ipvsadm, by which virtual servers are removed", missing)
            })?;
            let lines: String = self.servers.iter().map(Server::deletion).collect();
            tool::feed(&program, &["--restore"], &lines)
                .map_err(|error| Error::new("ipvsadm --restore", error))?;
        }
        let Some(device) = self.device else {
            return Ok(());
        };
        Netlink::open()
            .and_then(|netlink| netlink.delete_link(device))
            .map_err(|error| Error::new(format!("removing {DEVICE}"), error))
    }
}

impl Server {
    /// A line for `ipvsadm --restore`.
    fn deletion(&self) -> String {
        let flag = match self.protocol {
            "TCP" => "-t",
            "UDP" => "-u",
            _ => "--sctp-service",
        };
        format!("-D {flag} {}\n", self.addr)
    }
}

impl fmt::Display for Ipvs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Server { protocol, addr, .. } in &self.servers {
            writeln!(f, "IPVS: virtual server {addr}/{protocol}")?;
        }
        if self.device.is_some() {
            writeln!(f, "device {DEVICE}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTED: &str = "IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:0050 rr
  -> 0AF40005:0BB8      Masq    1      0          0
  -> 0AF40006:0BB8      Masq    1      0          0
TCP  C0A83201:7580 rr
  -> 0AF40006:0BB8      Masq    1      0          0
  -> 0AF40005:0BB8      Masq    1      0          0
UDP  [fd00:0010:0096:0000:0000:0000:0000:0001]:0035 rr
  -> [fd00:0010:0244:0000:0000:0000:0000:0005]:0BED      Masq    1      0          0
TCP  C0A83201:0050 wlc
  -> C0000205:0050      Route   1      0          0
TCP  C0A83201:0051 wlc
FWM  00000001 wlc
";

    #[test]
    fn the_node_ports_of_its_services_are_kube_proxys_and_other_servers_are_not() {
        let addresses =
            ["10.96.0.1", "fd00:10:96::1"].map(|addr| addr.parse().expect("an address"));
        let servers = kube_proxys(parse(LISTED), &addresses.into());
        let lines: String = servers.iter().map(Server::deletion).collect();
        assert_eq!(
            lines,
            "-D -t 10.96.0.1:80\n-D -t 192.168.50.1:30080\n-D -u [fd00:10:96::1]:53\n"
        );
        assert_eq!(kube_proxys(parse(LISTED), &BTreeSet::new()), []);
    }
}
