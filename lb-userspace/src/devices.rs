//! Which devices are the node's edges, and which addresses are the node's.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::IpAddr,
};

use ipnet::IpNet;
use wildmatch::WildMatch;

use crate::{
    args::DeviceArgs,
    netlink::{Address, Changes, Link, Monitor, Netlink},
};

/// Names that CNIs give to the host side of a pod's link: bridge, ptp, flannel,
/// kindnet, kube-router and Weave (`veth`), Calico (`cali`), Cilium (`lxc`),
/// the cloud providers' (`eni` AWS, `azv` Azure, `gke` Google).
///
/// With a bridge these are its ports, and that is right: replies between two
/// pods of one bridge never reach the bridge itself.
pub const DEFAULT_POD_DEVICES: [&str; 6] = ["veth*", "cali*", "lxc*", "eni*", "azv*", "gke*"];

/// The dummy device on which kube-proxy in IPVS mode keeps every `ClusterIP`;
/// these are no addresses of the node.
const IPVS_DEVICE: &str = "kube-ipvs0";

/// What a device is to the load balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Towards other nodes and the outside.
    Uplink,
    /// Host side of a pod's link.
    Pod,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Uplink => "uplink",
            Self::Pod => "pod",
        })
    }
}

/// A device that the programs belong on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub name: String,
    pub role: Role,
}

/// How devices and addresses are chosen.
#[derive(Debug)]
pub struct Rules {
    /// Empty: the devices that carry a default route.
    uplinks: Vec<WildMatch>,
    pods: Vec<WildMatch>,
    /// Empty: every address.
    nodeport_addresses: Vec<IpNet>,
}

impl Rules {
    pub fn new(args: &DeviceArgs) -> Self {
        let globs = |globs: &[String]| globs.iter().map(|glob| WildMatch::new(glob)).collect();
        Self {
            uplinks: globs(&args.uplink),
            pods: globs(&args.pod_device),
            nodeport_addresses: args.nodeport_addresses.clone(),
        }
    }

    /// The devices that belong to the node's edge, by index. A device that is
    /// both is an uplink, which has more hooks.
    pub fn select(&self, links: &[Link], default_routes: &BTreeSet<u32>) -> BTreeMap<u32, Device> {
        let role = |link: &Link| {
            let uplink = if self.uplinks.is_empty() {
                default_routes.contains(&link.index)
            } else {
                matches_any(&self.uplinks, &link.name)
            };
            if uplink {
                Some(Role::Uplink)
            } else {
                matches_any(&self.pods, &link.name).then_some(Role::Pod)
            }
        };
        let edges = links
            .iter()
            .filter(|link| !link.loopback)
            .filter_map(|link| {
                let device = Device {
                    name: link.name.clone(),
                    role: role(link)?,
                };
                Some((link.index, device))
            });
        edges.collect()
    }

    /// The addresses on which `NodePort`s answer.
    pub fn node_addresses(&self, links: &[Link], addresses: &[Address]) -> BTreeSet<IpAddr> {
        let foreign: BTreeSet<u32> = links
            .iter()
            .filter(|link| link.loopback || link.name == IPVS_DEVICE)
            .map(|link| link.index)
            .collect();
        let usable = addresses.iter().filter(|address| {
            address.global && is_in_use(address.flags) && !foreign.contains(&address.device)
        });
        usable
            .map(|address| address.addr)
            .filter(|addr| self.is_wanted(*addr))
            .collect()
    }

    fn is_wanted(&self, addr: IpAddr) -> bool {
        let networks = &self.nodeport_addresses;
        networks.is_empty() || networks.iter().any(|network| network.contains(&addr))
    }
}

fn matches_any(globs: &[WildMatch], name: &str) -> bool {
    globs.iter().any(|glob| glob.matches(name))
}

/// Whether the kernel answers on an address with these flags and prefers it no
/// less than others.
const fn is_in_use(flags: u32) -> bool {
    let unconfirmed = flags & libc::IFA_F_TENTATIVE != 0 && flags & libc::IFA_F_OPTIMISTIC == 0;
    !unconfirmed && flags & (libc::IFA_F_DADFAILED | libc::IFA_F_DEPRECATED) == 0
}

/// The node's edge at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edge {
    /// By index of the device.
    pub devices: BTreeMap<u32, Device>,
    /// On which `NodePort`s answer.
    pub addresses: BTreeSet<IpAddr>,
}

/// Follows the node's edge.
#[derive(Debug)]
pub struct Watcher {
    rules: Rules,
    netlink: Netlink,
    monitor: Monitor,
    links: Vec<Link>,
    addresses: Vec<Address>,
    /// The devices that carry a default route, or did since the start.
    default_routes: BTreeSet<u32>,
}

impl Watcher {
    /// Must be called inside a tokio runtime.
    pub fn open(rules: Rules) -> io::Result<Self> {
        // The monitor first, so that no change falls between it and the listing.
        let monitor = Monitor::open()?;
        let netlink = Netlink::open()?;
        Ok(Self {
            links: netlink.links()?,
            addresses: netlink.addresses()?,
            default_routes: netlink.default_routes()?,
            rules,
            netlink,
            monitor,
        })
    }

    /// The edge as it was last listed.
    pub fn edge(&self) -> Edge {
        Edge {
            devices: self.rules.select(&self.links, &self.default_routes),
            addresses: self.rules.node_addresses(&self.links, &self.addresses),
        }
    }

    /// Waits until something has changed, and lists it anew; tells what it was.
    ///
    /// Dropping the future loses no change.
    pub async fn changed(&mut self) -> io::Result<Changes> {
        let changes = self.monitor.changed().await?;
        self.list(changes)?;
        Ok(changes)
    }

    fn list(&mut self, changes: Changes) -> io::Result<()> {
        if changes.links {
            self.links = self.netlink.links()?;
        }
        // The kernel does not announce every address that goes with a device.
        if changes.links || changes.addresses {
            self.addresses = self.netlink.addresses()?;
        }
        if changes.default_routes {
            // A device stays an uplink when its default route goes: routes flap,
            // and without its programs the node would answer the packets of
            // living connections with resets.
            self.default_routes.extend(self.netlink.default_routes()?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(uplink: &[&str], nodeport_addresses: &[&str]) -> Rules {
        Rules::new(&DeviceArgs {
            uplink: uplink.iter().map(ToString::to_string).collect(),
            pod_device: DEFAULT_POD_DEVICES
                .iter()
                .map(ToString::to_string)
                .collect(),
            nodeport_addresses: nodeport_addresses
                .iter()
                .map(|net| net.parse().expect("network"))
                .collect(),
        })
    }

    fn links(names: &[&str]) -> Vec<Link> {
        let link = |(index, name): (usize, &&str)| Link {
            index: index as u32 + 1,
            name: (*name).to_owned(),
            loopback: *name == "lo",
            xdp: None,
        };
        names.iter().enumerate().map(link).collect()
    }

    fn roles(devices: &BTreeMap<u32, Device>) -> Vec<(&str, Role)> {
        devices
            .values()
            .map(|device| (device.name.as_str(), device.role))
            .collect()
    }

    const NODE: [&str; 6] = ["lo", "eth0", "eth1.100", "cni0", "veth3a", "cali12"];

    #[test]
    fn the_default_route_marks_the_uplink() {
        let devices = rules(&[], &[]).select(&links(&NODE), &BTreeSet::from([1, 2]));
        assert_eq!(
            roles(&devices),
            [
                ("eth0", Role::Uplink),
                ("veth3a", Role::Pod),
                ("cali12", Role::Pod)
            ]
        );
    }

    #[test]
    fn named_uplinks_take_the_place_of_the_default_route() {
        let devices = rules(&["eth?.*", "veth3*"], &[]).select(&links(&NODE), &BTreeSet::from([2]));
        assert_eq!(
            roles(&devices),
            [
                ("eth1.100", Role::Uplink),
                ("veth3a", Role::Uplink),
                ("cali12", Role::Pod)
            ]
        );
    }

    #[test]
    fn the_loopback_device_is_no_edge_whatever_matches() {
        let devices = rules(&["*"], &[]).select(&links(&["lo", "eth0"]), &BTreeSet::new());
        assert_eq!(roles(&devices), [("eth0", Role::Uplink)]);
    }

    #[test]
    fn node_addresses_are_the_ones_that_answer() {
        let links = links(&["lo", "eth0", IPVS_DEVICE]);
        let address = |device, addr: &str, global, flags| Address {
            device,
            addr: addr.parse().expect("address"),
            global,
            flags,
        };
        let addresses = [
            address(1, "10.1.1.1", true, 0),
            address(2, "192.0.2.1", true, 0),
            address(2, "2001:db8::1", true, libc::IFA_F_PERMANENT),
            address(2, "fe80::1", false, 0),
            address(2, "2001:db8::2", true, libc::IFA_F_DEPRECATED),
            address(
                2,
                "2001:db8::3",
                true,
                libc::IFA_F_TENTATIVE | libc::IFA_F_DADFAILED,
            ),
            address(2, "2001:db8::4", true, libc::IFA_F_TENTATIVE),
            address(
                2,
                "2001:db8::5",
                true,
                libc::IFA_F_TENTATIVE | libc::IFA_F_OPTIMISTIC,
            ),
            address(3, "10.96.0.1", true, 0),
        ];
        let node_addresses = |networks: &[&str]| -> Vec<String> {
            let found = rules(&[], networks).node_addresses(&links, &addresses);
            found.iter().map(ToString::to_string).collect()
        };
        assert_eq!(
            node_addresses(&[]),
            ["192.0.2.1", "2001:db8::1", "2001:db8::5"]
        );
        assert_eq!(node_addresses(&["192.0.2.0/24"]), ["192.0.2.1"]);
        assert_eq!(node_addresses(&["10.0.0.0/8"]), [""; 0]);
    }
}
