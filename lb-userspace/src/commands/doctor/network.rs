//! The node's devices and what its stack does with packets.

use std::{collections::BTreeSet, fs, path::Path};

use lb_common::node::{CONFIG_BYPASS, Config};

use super::{
    check::Check,
    offloads::{self, Circumstances},
};
use crate::{
    args::DoctorArgs,
    datapath::{inspect, kernel::KernelMaps},
    devices::{Listing, Role, Rules, UNSERVABLE},
    ethtool::Offloads,
    netlink::{FrameTakers, Netlink},
    sysctl,
};

/// From this share on, in percent, the table of connections is worth a warning.
const NEARLY_FULL: u64 = 90;

#[derive(Clone, Debug)]
pub(super) struct Facts {
    preflight: bool,
    /// Devices that klb would be on, or why they are not known.
    devices: Result<Vec<Device>, String>,
    around: Circumstances,
    /// Names of uplinks with an XDP program that is not klb's.
    others_xdp: Vec<String>,
    unservable: BTreeSet<String>,
    /// `net.ipv4.ip_forward` and `net.ipv6.conf.all.forwarding`.
    forwarding: [Option<bool>; 2],
    /// Whether the node has an address of IPv6.
    has_v6: bool,
    conntrack: Option<Conntrack>,
    /// What is wrong with the ports for masqueraded clients.
    ports: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) role: Role,
    pub(super) mtu: Option<u32>,
    /// The strictest that goes for it: 0 off, 1 strict, 2 loose. Of those of all
    /// devices and its own the kernel takes the greater number.
    pub(super) rp_filter: Option<u8>,
    pub(super) offloads: Offloads,
}

/// The kernel's table of connections.
#[derive(Clone, Copy, Debug)]
struct Conntrack {
    count: u64,
    max: u64,
}

/// What stands in a file below `/proc/sys/net`.
fn setting<T: std::str::FromStr>(path: &str) -> Option<T> {
    let text = fs::read_to_string(Path::new("/proc/sys/net").join(path)).ok()?;
    text.trim().parse().ok()
}

impl Facts {
    pub(super) fn gather(args: &DoctorArgs) -> Self {
        let listing = Netlink::open().and_then(|netlink| Listing::read(&netlink));
        let rules = Rules::new(&args.devices);
        let addresses = listing.as_ref().map(|node| rules.node_addresses(node));
        let is_on = |path| setting::<u8>(path).map(|value| value != 0);
        let devices = listing
            .as_ref()
            .map_err(ToString::to_string)
            .and_then(|node| devices(&rules, node).map_err(|error| error.to_string()));
        // Before there is an agent nobody has chosen anything.
        let config = config(args).filter(|_| !args.preflight);
        let known = devices.as_deref().unwrap_or_default();
        let own_xdp = own_xdp(args);
        let others_xdp = listing
            .as_ref()
            .map_or_else(|_| Vec::new(), |node| others_xdp(node, known, &own_xdp));
        Self {
            preflight: args.preflight,
            around: circumstances(args, known, own_xdp, config).unwrap_or_default(),
            others_xdp,
            devices,
            unservable: inspect::unservable_devices().unwrap_or_default(),
            forwarding: [is_on("ipv4/ip_forward"), is_on("ipv6/conf/all/forwarding")],
            has_v6: addresses.is_ok_and(|own| own.iter().any(std::net::IpAddr::is_ipv6)),
            conntrack: setting("netfilter/nf_conntrack_count")
                .zip(setting("netfilter/nf_conntrack_max"))
                .map(|(count, max)| Conntrack { count, max }),
            ports: complaints(args),
        }
    }

    pub(super) fn checks(&self) -> Vec<Check> {
        let mut checks = match &self.devices {
            Ok(devices) => {
                let own = [which(devices), mtu(devices), rp_filter(devices)];
                let offloads = offloads::checks(devices, &self.around);
                own.into_iter().chain(offloads).collect()
            }
            Err(error) => vec![Check::fail(
                "devices",
                format!("cannot be listed: {error}"),
                "run klb in the node's network namespace, with CAP_NET_ADMIN",
            )],
        };
        let unservable = self.unservable.iter();
        checks.extend(unservable.map(|device| {
            let finding = format!("{device}: {UNSERVABLE}");
            Check::warn("devices", finding, "send Services by another device")
        }));
        checks.extend(self.others_xdp());
        checks.push(self.forwarding());
        checks.extend(self.conntrack.map(conntrack));
        checks.extend(self.ports());
        checks
    }

    fn others_xdp(&self) -> Option<Check> {
        if self.others_xdp.is_empty() {
            return None;
        }
        let finding = format!(
            "a program of somebody else's is on {}: klb's cannot be there beside it, and TC does \
             its work, which takes longer",
            self.others_xdp.join(", ")
        );
        let fix = "remove the other one (ip link set dev DEVICE xdp off), or run the agent with \
                   --xdp off";
        Some(Check::warn("XDP", finding, fix))
    }

    fn forwarding(&self) -> Check {
        const NAME: &str = "forwarding";
        let [v4, v6] = self.forwarding;
        if v4 == Some(false) {
            return Check::fail(
                NAME,
                "off: packets for pods and other nodes are not sent on",
                "sysctl -w net.ipv4.ip_forward=1, and a file in /etc/sysctl.d",
            );
        }
        if v6 == Some(false) && self.has_v6 {
            return Check::warn(
                NAME,
                "off for IPv6: its packets for pods and other nodes are not sent on",
                "sysctl -w net.ipv6.conf.all.forwarding=1, if the cluster has IPv6",
            );
        }
        Check::ok(NAME, "on")
    }

    fn ports(&self) -> Vec<Check> {
        const NAME: &str = "masquerade ports";
        if self.ports.is_empty() {
            let finding = if self.preflight {
                "no process of the node is in the way"
            } else {
                "kept from the node's processes"
            };
            return vec![Check::ok(NAME, finding)];
        }
        let fix = "have the processes use others, or give the agent others by --masquerade-ports";
        let complaints = self.ports.iter();
        complaints
            .map(|complaint| Check::warn(NAME, complaint, fix))
            .collect()
    }
}

fn devices(rules: &Rules, node: &Listing) -> std::io::Result<Vec<Device>> {
    let mtus = Netlink::open()?.mtus()?;
    let all = setting::<u8>("ipv4/conf/all/rp_filter");
    let devices = rules.select(node).into_iter().map(|(index, device)| {
        let own = setting::<u8>(&format!("ipv4/conf/{}/rp_filter", device.name));
        Device {
            index,
            offloads: Offloads::read(&device.name).unwrap_or_default(),
            mtu: mtus.get(&index).copied(),
            rp_filter: all.into_iter().chain(own).max(),
            name: device.name,
            role: device.role,
        }
    });
    Ok(devices.collect())
}

/// What an agent has set.
fn config(args: &DoctorArgs) -> Option<Config> {
    let maps = KernelMaps::open(&args.paths.pins()).ok()?;
    maps.config().ok()
}

/// Indices of devices with klb's XDP program on them.
fn own_xdp(args: &DoctorArgs) -> BTreeSet<u32> {
    let devices = inspect::devices(&args.paths.pins()).unwrap_or_default();
    let with_xdp = devices.into_iter().filter(|device| device.xdp.is_some());
    with_xdp.map(|device| device.index).collect()
}

fn others_xdp(node: &Listing, devices: &[Device], own: &BTreeSet<u32>) -> Vec<String> {
    let uplinks = devices.iter().filter(|device| device.role == Role::Uplink);
    let uplinks: BTreeSet<u32> = uplinks.map(|device| device.index).collect();
    let links = node.links.iter().filter(|link| {
        link.xdp.is_some() && uplinks.contains(&link.index) && !own.contains(&link.index)
    });
    links.map(|link| link.name.clone()).collect()
}

fn circumstances(
    args: &DoctorArgs,
    devices: &[Device],
    own_xdp: BTreeSet<u32>,
    config: Option<Config>,
) -> std::io::Result<Circumstances> {
    let netlink = Netlink::open()?;
    let links = netlink.links()?.into_iter();
    let vlans = links.filter(|link| link.kind.as_deref() == Some("vlan"));
    let lower = netlink.lower()?;
    let below_vlans = vlans.filter_map(|vlan| lower.get(&vlan.index).copied());
    let uplinks = devices.iter().filter(|device| device.role == Role::Uplink);
    let bypasses = config.is_some_and(|config| config.flags & CONFIG_BYPASS != 0);
    let takers = FrameTakers::open()?.filter(|_| bypasses);
    Ok(Circumstances {
        // By default an agent puts XDP onto every uplink.
        xdp: if args.preflight {
            uplinks.map(|device| device.index).collect()
        } else {
            own_xdp
        },
        below_vlans: below_vlans.collect(),
        frame_takers: takers.map(|takers| takers.list()).transpose()?,
    })
}

/// Before there is an agent nobody has reserved the ports.
fn complaints(args: &DoctorArgs) -> Vec<String> {
    if let Some(config) = config(args).filter(|_| !args.preflight) {
        return sysctl::complaints(&sysctl::ports(&config));
    }
    let users = sysctl::users_of(&args.masquerade_ports.ports());
    users.into_iter().collect()
}

fn which(devices: &[Device]) -> Check {
    const NAME: &str = "devices";
    let of = |role: Role| {
        let names = devices.iter().filter(|device| device.role == role);
        names.map(|device| device.name.as_str()).collect::<Vec<_>>()
    };
    let (uplinks, pods) = (of(Role::Uplink), of(Role::Pod));
    if uplinks.is_empty() {
        return Check::warn(
            NAME,
            "none leads outside: only clients on this node are served",
            "name them with --uplink",
        );
    }
    let uplinks = uplinks.join(", ");
    Check::ok(NAME, format!("uplinks {uplinks}; {} of pods", pods.len()))
}

fn mtu(devices: &[Device]) -> Check {
    const NAME: &str = "MTU";
    let mtus = |role: Role| {
        let devices = devices.iter().filter(move |device| device.role == role);
        devices.filter_map(|device| Some((device.mtu?, device.name.as_str())))
    };
    let narrow = mtus(Role::Uplink).min();
    let wide = mtus(Role::Pod).max();
    match (narrow, wide) {
        (Some((uplink, uplink_name)), Some((pod, pod_name))) if pod > uplink => Check::warn(
            NAME,
            format!(
                "{pod_name}, of a pod, has {pod}, and {uplink_name} has {uplink}: answers of pods \
                 have to be made smaller on their way"
            ),
            "give pods no more than the uplink carries: the CNI's setting mtu",
        ),
        (Some((uplink, _)), _) => Check::ok(NAME, format!("no pod has more than {uplink}")),
        (None, _) => Check::ok(NAME, "there is no uplink"),
    }
}

fn rp_filter(devices: &[Device]) -> Check {
    const NAME: &str = "rp_filter";
    let outside = devices.iter().filter(|device| device.role != Role::Pod);
    let outside: Vec<_> = outside.collect();
    let strict = outside.iter().filter(|device| device.rp_filter == Some(1));
    let strict: Vec<_> = strict.map(|device| device.name.as_str()).collect();
    if strict.is_empty() {
        return Check::ok(NAME, "is not strict on any way out");
    }
    let strict = strict.join(", ");
    // By one way out comes whatever would go by it.
    if outside.len() == 1 {
        return Check::ok(
            NAME,
            format!("is strict on {strict}, which is the only way out"),
        );
    }
    Check::warn(
        NAME,
        format!(
            "is strict on {strict}: clients whose way back leads by another device are not answered"
        ),
        "make it loose: sysctl -w net.ipv4.conf.DEVICE.rp_filter=2, for `all` too",
    )
}

fn conntrack(Conntrack { count, max }: Conntrack) -> Check {
    const NAME: &str = "connection tracking";
    if max > 0 && count * 100 / max >= NEARLY_FULL {
        return Check::warn(
            NAME,
            format!("{count} of {max} connections: new ones are dropped once it is full"),
            "sysctl -w net.netfilter.nf_conntrack_max=…; klb itself needs none",
        );
    }
    Check::ok(NAME, format!("{count} of {max} connections"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::check::Level::{self, Fail, Ok as Fine, Warn};

    fn device(name: &str, role: Role, mtu: u32, rp_filter: u8) -> Device {
        Device {
            index: 2,
            name: name.to_owned(),
            role,
            mtu: Some(mtu),
            rp_filter: Some(rp_filter),
            offloads: Offloads::default(),
        }
    }

    fn facts(devices: &[Device]) -> Facts {
        Facts {
            preflight: true,
            devices: Ok(devices.to_vec()),
            around: Circumstances::default(),
            others_xdp: Vec::new(),
            unservable: BTreeSet::new(),
            forwarding: [Some(true); 2],
            has_v6: true,
            conntrack: None,
            ports: Vec::new(),
        }
    }

    /// The names of checks that are not ok.
    fn bad(facts: &Facts) -> Vec<(&'static str, Level)> {
        let checks = facts.checks().into_iter();
        checks
            .filter(|check| check.level != Fine)
            .map(|check| (check.name, check.level))
            .collect()
    }

    #[test]
    fn devices_are_judged_together() {
        use Role::{Overlay, Pod, Uplink};
        let uplink = || device("eth0", Uplink, 1500, 1);
        for (devices, expected) in [
            (vec![uplink(), device("veth1", Pod, 1500, 1)], &[][..]),
            (vec![uplink(), device("veth1", Pod, 1450, 0)], &[]),
            (
                vec![uplink(), device("veth1", Pod, 9000, 0)],
                &[("MTU", Warn)],
            ),
            (
                vec![uplink(), device("eth1", Uplink, 1500, 2)],
                &[("rp_filter", Warn)],
            ),
            (
                vec![uplink(), device("vxlan0", Overlay, 1450, 0)],
                &[("rp_filter", Warn)],
            ),
            (vec![device("veth1", Pod, 1500, 0)], &[("devices", Warn)]),
            (vec![], &[("devices", Warn)]),
        ] {
            assert_eq!(bad(&facts(&devices)), expected, "{devices:?}");
        }
    }

    #[test]
    fn everything_else_is_judged_alone() {
        let well = || facts(&[device("eth0", Role::Uplink, 1500, 0)]);
        let conntrack = |count, max| Facts {
            conntrack: Some(Conntrack { count, max }),
            ..well()
        };
        let forwarding = |v4, v6, has_v6| Facts {
            forwarding: [Some(v4), Some(v6)],
            has_v6,
            ..well()
        };
        for (facts, expected) in [
            (well(), &[][..]),
            (forwarding(false, true, true), &[("forwarding", Fail)]),
            (forwarding(true, false, true), &[("forwarding", Warn)]),
            (forwarding(true, false, false), &[]),
            (conntrack(10, 100), &[]),
            (conntrack(95, 100), &[("connection tracking", Warn)]),
            (conntrack(0, 0), &[]),
            (
                Facts {
                    ports: vec!["in use".to_owned()],
                    ..well()
                },
                &[("masquerade ports", Warn)],
            ),
            (
                Facts {
                    unservable: BTreeSet::from(["wg0".to_owned()]),
                    ..well()
                },
                &[("devices", Warn)],
            ),
            (
                Facts {
                    others_xdp: vec!["eth0".to_owned()],
                    ..well()
                },
                &[("XDP", Warn)],
            ),
            (
                Facts {
                    devices: Err("no right".to_owned()),
                    ..well()
                },
                &[("devices", Fail)],
            ),
        ] {
            assert_eq!(bad(&facts), expected, "{facts:?}");
        }
    }
}
