//! Which devices are the node's edges, and which addresses are the node's.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use lb_common::{
    Addr4, Addr6,
    node::{DEVICE_PEER, DEVICE_POD, Device as Entry},
};
use wildmatch::WildMatch;

use crate::{
    args::DeviceArgs,
    netlink::{Address, Changes, FrameTakers, Link, Monitor, Netlink},
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

/// The loopback addresses at which the node's own processes may name a
/// `NodePort`.
const LOOPBACK: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

/// What is said of a device in [`Listing::unservable`].
pub const UNSERVABLE: &str = "a device without Ethernet headers cannot be served: \
     packets of Services that come or go by it are not translated";

/// What a device is to the load balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Towards other nodes and the outside.
    Uplink,
    /// A tunnel towards other nodes; like an uplink, but without XDP.
    Overlay,
    /// Host side of a pod's link.
    Pod,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Uplink => "uplink",
            Self::Overlay => "overlay",
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
    /// uplink and pod device is an uplink, which has more hooks.
    ///
    /// Without rules of the user's, uplinks are the devices with a default route
    /// and those with an address of the node that are hardware or stand for it:
    /// other nodes may be reached by any. So a bond is an uplink and its members
    /// are not, and no bridge of containers or virtual machines is. Tunnels with
    /// Ethernet headers are edges in any case.
    pub fn select(&self, node: &Listing) -> BTreeMap<u32, Device> {
        let role = |link: &Link| {
            let uplink = if self.uplinks.is_empty() {
                node.default_routes.contains(&link.index)
                    || is_hardware(link) && node.has_address(link.index)
            } else {
                matches_any(&self.uplinks, &link.name)
            };
            if uplink {
                Some(Role::Uplink)
            } else if matches_any(&self.pods, &link.name) {
                Some(Role::Pod)
            } else {
                is_overlay(link).then_some(Role::Overlay)
            }
        };
        // The programs look for an IP header behind an Ethernet header.
        let edges = node
            .links
            .iter()
            .filter(|link| is_servable(link))
            .filter_map(|link| {
                let device = Device {
                    name: link.name.clone(),
                    role: role(link)?,
                };
                Some((link.index, device))
            });
        edges.collect()
    }

    /// The addresses on which `NodePort`s answer: those of the node that are
    /// reachable from elsewhere, of which a router's may well be on the loopback
    /// device; and, for the node's own processes, `127.0.0.1` and `::1`.
    pub fn node_addresses(&self, node: &Listing) -> BTreeSet<IpAddr> {
        let ipvs = node.links.iter().find(|link| link.name == IPVS_DEVICE);
        let ipvs = ipvs.map(|link| link.index);
        let usable = node.addresses.iter().filter(|address| {
            (address.global || LOOPBACK.contains(&address.addr))
                && is_in_use(address.flags)
                && Some(address.device) != ipvs
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

/// Kinds of tunnels whose inner frames have Ethernet headers.
const OVERLAYS: [&str; 4] = ["vxlan", "geneve", "gretap", "ip6gretap"];
/// Kinds of devices that stand for hardware.
const AGGREGATES: [&str; 3] = ["bond", "team", "vlan"];
/// Kinds of devices that are one end of a pair.
const PAIRS: [&str; 2] = ["veth", "netkit"];

fn is_one_of(link: &Link, kinds: &[&str]) -> bool {
    let kind = link.kind.as_deref();
    kind.is_some_and(|kind| kinds.contains(&kind))
}

fn is_hardware(link: &Link) -> bool {
    link.kind.is_none() || is_one_of(link, &AGGREGATES)
}

fn is_servable(link: &Link) -> bool {
    !link.loopback && link.ethernet
}

fn is_overlay(link: &Link) -> bool {
    is_one_of(link, &OVERLAYS)
}

/// What there is on the node.
#[derive(Debug, Default)]
pub struct Listing {
    pub links: Vec<Link>,
    pub addresses: Vec<Address>,
    /// The devices that carry a default route, or did since the start.
    pub default_routes: BTreeSet<u32>,
}

impl Listing {
    pub fn read(netlink: &Netlink) -> io::Result<Self> {
        Ok(Self {
            links: netlink.links()?,
            addresses: netlink.addresses()?,
            default_routes: netlink.default_routes()?,
        })
    }

    fn has_address(&self, device: u32) -> bool {
        let mut addresses = self.addresses.iter();
        addresses.any(|address| address.device == device && address.global)
    }

    /// The devices that the programs cannot be on although packets of Services
    /// may come or go by them: their frames have no Ethernet headers.
    pub fn unservable(&self) -> BTreeSet<String> {
        let links = self.links.iter().filter(|link| {
            !link.loopback
                && !is_servable(link)
                && (self.default_routes.contains(&link.index) || self.has_address(link.index))
        });
        links.map(|link| link.name.clone()).collect()
    }

    /// What the programs are to know of the devices, by index; 0 is the node,
    /// which has the addresses of its uplinks.
    pub fn device_table(&self, edges: &BTreeMap<u32, Device>) -> BTreeMap<u32, Entry> {
        let mut table = BTreeMap::new();
        for link in self.links.iter().filter(|link| !link.loopback) {
            let is_pod = edges
                .get(&link.index)
                .is_some_and(|device| device.role == Role::Pod);
            let mut entry = self.sources(|device| device == link.index);
            if is_pod {
                entry.flags |= DEVICE_POD;
                if is_one_of(link, &PAIRS) {
                    entry.flags |= DEVICE_PEER;
                }
            }
            if entry != Entry::default() {
                table.insert(link.index, entry);
            }
        }
        let is_uplink = |device: u32| {
            let edge = edges.get(&device);
            edge.is_some_and(|device| device.role == Role::Uplink)
        };
        table.insert(0, self.own_sources(is_uplink));
        table
    }

    /// With which addresses packets leave that are sent here: those of the
    /// devices with a default route, else of the devices that are `preferred`,
    /// else of any.
    pub fn own_sources(&self, preferred: impl Fn(u32) -> bool) -> Entry {
        let mut entry = self.sources(|device| self.default_routes.contains(&device));
        entry = first_of(&entry, &self.sources(preferred));
        first_of(&entry, &self.sources(|_| true))
    }

    /// The first address of each family that some devices have for packets of
    /// the node's own.
    fn sources(&self, of: impl Fn(u32) -> bool) -> Entry {
        let mut entry = Entry::default();
        let usable = self.addresses.iter().filter(|address| {
            address.global
                && is_in_use(address.flags)
                && address.flags & libc::IFA_F_SECONDARY == 0
                && !is_link_local(address.addr)
                && of(address.device)
        });
        for address in usable {
            match address.addr {
                IpAddr::V4(addr) if entry.addr4 == Addr4::default() => entry.addr4 = addr.into(),
                IpAddr::V6(addr) if entry.addr6 == Addr6::default() => entry.addr6 = addr.into(),
                _ => {}
            }
        }
        entry
    }
}

/// Whether no router would carry an answer to this address.
const fn is_link_local(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    }
}

/// The addresses of `one`, and where it has none those of `other`.
fn first_of(one: &Entry, other: &Entry) -> Entry {
    let mut entry = *one;
    if entry.addr4 == Addr4::default() {
        entry.addr4 = other.addr4;
    }
    if entry.addr6 == Addr6::default() {
        entry.addr6 = other.addr6;
    }
    entry
}

/// The node's edge at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edge {
    /// By index of the device.
    pub devices: BTreeMap<u32, Device>,
    /// What the programs are to know of devices.
    pub table: BTreeMap<u32, Entry>,
    /// On which `NodePort`s answer.
    pub addresses: BTreeSet<IpAddr>,
    /// See [`Listing::unservable`].
    pub unservable: BTreeSet<String>,
    /// Indices of the devices that take frames from XDP, if the kernel tells.
    pub frame_takers: Option<BTreeSet<u32>>,
}

/// Follows the node's edge.
#[derive(Debug)]
pub struct Watcher {
    rules: Rules,
    netlink: Netlink,
    monitor: Monitor,
    node: Listing,
    frames: Option<FrameTakers>,
    frame_takers: Option<BTreeSet<u32>>,
}

impl Watcher {
    /// Must be called inside a tokio runtime.
    pub fn open(rules: Rules) -> io::Result<Self> {
        // The monitor first, so that no change falls between it and the listing.
        let frames = FrameTakers::open()?;
        let monitor = Monitor::open(frames.as_ref())?;
        let netlink = Netlink::open()?;
        Ok(Self {
            frame_takers: list(frames.as_ref())?,
            frames,
            node: Listing::read(&netlink)?,
            rules,
            netlink,
            monitor,
        })
    }

    /// The edge as it was last listed.
    pub fn edge(&self) -> Edge {
        let devices = self.rules.select(&self.node);
        Edge {
            table: self.node.device_table(&devices),
            devices,
            addresses: self.rules.node_addresses(&self.node),
            unservable: self.node.unservable(),
            frame_takers: self.frame_takers.clone(),
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
            self.node.links = self.netlink.links()?;
        }
        if changes.links || changes.frames {
            self.frame_takers = list(self.frames.as_ref())?;
        }
        // The kernel does not announce every address that goes with a device.
        if changes.links || changes.addresses {
            self.node.addresses = self.netlink.addresses()?;
        }
        if changes.default_routes {
            // A device stays an uplink when its default route goes: routes flap,
            // and without its programs the node would answer the packets of
            // living connections with resets.
            let routes = self.netlink.default_routes()?;
            self.node.default_routes.extend(routes);
        }
        Ok(())
    }
}

/// The devices that take frames from XDP, if the kernel tells.
fn list(frames: Option<&FrameTakers>) -> io::Result<Option<BTreeSet<u32>>> {
    frames.map(FrameTakers::list).transpose()
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
            ethernet: *name != "lo",
            kind: Some("dummy".to_owned()),
            xdp: None,
            leads_to: None,
        };
        names.iter().enumerate().map(link).collect()
    }

    fn node(names: &[&str], default_routes: &[u32]) -> Listing {
        Listing {
            links: links(names),
            addresses: Vec::new(),
            default_routes: default_routes.iter().copied().collect(),
        }
    }

    fn address(device: u32, addr: &str, global: bool, flags: u32) -> Address {
        Address {
            device,
            addr: addr.parse().expect("address"),
            global,
            flags,
        }
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
        let devices = rules(&[], &[]).select(&node(&NODE, &[1, 2]));
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
        let devices = rules(&["eth?.*", "veth3*"], &[]).select(&node(&NODE, &[2]));
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
        let devices = rules(&["*"], &[]).select(&node(&["lo", "eth0"], &[]));
        assert_eq!(roles(&devices), [("eth0", Role::Uplink)]);
    }

    #[test]
    fn node_addresses_are_the_ones_that_answer() {
        let mut node = node(&["lo", "eth0", IPVS_DEVICE], &[]);
        node.addresses = vec![
            address(1, "127.0.0.1", false, 0),
            address(1, "127.0.0.53", false, 0),
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
            let found = rules(&[], networks).node_addresses(&node);
            found.iter().map(ToString::to_string).collect()
        };
        assert_eq!(
            node_addresses(&[]),
            [
                "10.1.1.1",
                "127.0.0.1",
                "192.0.2.1",
                "2001:db8::1",
                "2001:db8::5"
            ]
        );
        assert_eq!(node_addresses(&["192.0.2.0/24"]), ["192.0.2.1"]);
        assert_eq!(node_addresses(&["10.2.0.0/16"]), [""; 0]);
        assert_eq!(
            node_addresses(&["127.0.0.0/8", "192.0.2.0/24"]),
            ["127.0.0.1", "192.0.2.1"]
        );
    }

    fn set_kinds(node: &mut Listing, kinds: &[Option<&str>]) {
        for (link, kind) in node.links.iter_mut().zip(kinds) {
            link.kind = kind.map(str::to_owned);
            link.ethernet = !matches!(link.name.as_str(), "lo" | "wg0");
        }
    }

    #[test]
    fn a_bond_is_an_edge_and_what_it_is_made_of_is_not() {
        let names = [
            "lo", "eth0", "eth1", "bond0", "bond0.7", "docker0", "virbr0", "tap0",
        ];
        let mut node = node(&names, &[4]);
        let (bridge, tun) = (Some("bridge"), Some("tun"));
        let (bond, vlan) = (Some("bond"), Some("vlan"));
        set_kinds(
            &mut node,
            &[None, None, None, bond, vlan, bridge, bridge, tun],
        );
        node.addresses = vec![
            address(4, "10.1.0.1", true, 0),
            address(5, "10.7.0.1", true, 0),
            address(6, "172.17.0.1", true, 0),
            address(7, "192.168.122.1", true, 0),
            address(8, "10.8.0.1", true, 0),
        ];
        let devices = rules(&[], &[]).select(&node);
        let expected = [("bond0", Role::Uplink), ("bond0.7", Role::Uplink)];
        assert_eq!(roles(&devices), expected);
    }

    #[test]
    fn devices_without_ethernet_headers_are_named_if_packets_may_go_by_them() {
        let mut node = node(&["lo", "eth0", "wg0"], &[2]);
        set_kinds(&mut node, &[None, None, Some("wireguard")]);
        assert_eq!(node.unservable(), BTreeSet::new());
        node.addresses = vec![
            address(1, "10.9.0.1", true, 0),
            address(3, "10.2.0.1", true, 0),
        ];
        assert_eq!(node.unservable(), BTreeSet::from(["wg0".to_owned()]));
        assert_eq!(
            roles(&rules(&["*"], &[]).select(&node)),
            [("eth0", Role::Uplink)]
        );
    }

    #[test]
    fn nothing_is_masqueraded_by_an_address_that_no_answer_finds() {
        let mut node = node(&["lo", "nodelocaldns", "eth0"], &[3]);
        node.addresses = vec![
            address(1, "10.9.0.1", true, 0),
            address(2, "169.254.20.10", true, 0),
        ];
        let table = node.device_table(&BTreeMap::new());
        let [10, 9, 0, 1] = table[&0].addr4.octets else {
            panic!("{table:?}");
        };
        assert_eq!(table.get(&2), None);
    }

    #[test]
    fn hardware_with_an_address_and_tunnels_are_edges_without_a_rule() {
        let mut node = node(&["lo", "eth0", "eth1", "eth2", "flannel.1", "wg0"], &[2]);
        let kinds = [None, None, None, None, Some("vxlan"), Some("wireguard")];
        set_kinds(&mut node, &kinds);
        node.addresses = vec![
            address(3, "10.1.0.1", true, 0),
            address(4, "fe80::1", false, 0),
            address(6, "10.2.0.1", true, 0),
        ];
        let devices = rules(&[], &[]).select(&node);
        let expected = [
            ("eth0", Role::Uplink),
            ("eth1", Role::Uplink),
            ("flannel.1", Role::Overlay),
        ];
        assert_eq!(roles(&devices), expected);
        // Who names uplinks means these.
        let devices = rules(&["eth2"], &[]).select(&node);
        let expected = [("eth2", Role::Uplink), ("flannel.1", Role::Overlay)];
        assert_eq!(roles(&devices), expected);
    }

    #[test]
    fn the_table_has_sources_and_what_is_behind_a_device() {
        let mut node = node(&["lo", "eth0", "eth1", "veth1", "cali2"], &[3]);
        node.links[3].kind = Some("veth".to_owned());
        node.addresses = vec![
            address(1, "127.0.0.1", false, 0),
            address(2, "10.1.0.1", true, 0),
            address(2, "2001:db8::1", true, 0),
            address(3, "10.2.0.9", true, libc::IFA_F_SECONDARY),
            address(3, "10.2.0.1", true, 0),
        ];
        let devices = rules(&["eth*"], &[]).select(&node);
        let table = node.device_table(&devices);
        let entry = |addr4: [u8; 4], addr6: &str, flags| Entry {
            addr4: Addr4 { octets: addr4 },
            addr6: addr6.parse::<Ipv6Addr>().expect("IPv6").into(),
            flags,
        };
        let expected = BTreeMap::from([
            (0, entry([10, 2, 0, 1], "2001:db8::1", 0)),
            (2, entry([10, 1, 0, 1], "2001:db8::1", 0)),
            (3, entry([10, 2, 0, 1], "::", 0)),
            (4, entry([0; 4], "::", DEVICE_POD | DEVICE_PEER)),
            (5, entry([0; 4], "::", DEVICE_POD)),
        ]);
        assert_eq!(table, expected);
    }
}
