//! What is attached where, found from pins, links and filters; needs no agent.

use std::{collections::BTreeSet, io};

use lb_common::{names, node::Config};

use super::{
    clsact::Owner,
    pins::{DeviceHook, LinkPin, Pins, ROLE_MARKS},
    sys::{self, Target},
};
use crate::{
    devices::{Listing, Role},
    netlink::{Link, Netlink},
    netns::words,
};

/// A device with something of klb's on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceHooks {
    pub index: u32,
    /// `None` for a device that has gone and is not cleaned up yet, or that is
    /// in another network namespace.
    pub name: Option<String>,
    pub role: Option<Role>,
    pub xdp: Option<&'static str>,
    pub tc_ingress: Option<&'static str>,
    pub tc_egress: Option<&'static str>,
}

/// Lists the devices that klb is on.
pub fn devices(pins: &Pins) -> io::Result<Vec<DeviceHooks>> {
    let netlink = Netlink::open()?;
    let owner = Owner::new(pins);
    let links = netlink.links()?;
    let marks = pins.marks()?;
    let devices = pins.devices()?.into_iter().map(|index| {
        let link = links.iter().find(|link| link.index == index);
        let role = ROLE_MARKS
            .into_iter()
            .find_map(|(role, mark)| marks.contains(&(index, mark)).then_some(role));
        let filters = owner.filters(&netlink, index)?;
        let tc = |hook| {
            let filter = filters.iter().any(|(side, _)| side.hook() == hook);
            tcx(pins, index, hook).or(filter.then_some("clsact"))
        };
        Ok(DeviceHooks {
            index,
            name: link.map(|link| link.name.clone()),
            role,
            xdp: link.and_then(|link| xdp(pins, link)),
            tc_ingress: tc(DeviceHook::TcIngress),
            tc_egress: tc(DeviceHook::TcEgress),
        })
    });
    devices.collect()
}

/// Whether this is another network namespace than the agent's, so that indices of
/// devices mean others here. Before Linux 5.14 nobody knows.
pub fn is_elsewhere(config: &Config) -> io::Result<bool> {
    let here = Netlink::open()?.netns_cookie().map(words);
    Ok(config.host_netns != [0, 0] && here.is_ok_and(|here| here != config.host_netns))
}

/// The devices of this network namespace that klb cannot be on, though it should.
pub fn unservable_devices() -> io::Result<BTreeSet<String>> {
    Ok(Listing::read(&Netlink::open()?)?.unservable())
}

/// The socket hooks that are attached, by name.
pub fn sockets(pins: &Pins) -> Vec<String> {
    let pins_of_sockets = names::SOCKET_PROGRAMS.map(LinkPin::Socket).into_iter();
    let attached = pins_of_sockets.filter(|pin| {
        let target = target(pins, *pin).map(|(target, _)| target);
        matches!(target, Some(Target::Cgroup(id)) if id != 0)
    });
    attached.map(|pin| pin.to_string()).collect()
}

fn tcx(pins: &Pins, index: u32, hook: DeviceHook) -> Option<&'static str> {
    let (target, _) = target(pins, LinkPin::Device(hook, index))?;
    (target == Target::Device(index)).then_some("tcx")
}

/// The mode is not in the link, but with the device's program.
fn xdp(pins: &Pins, link: &Link) -> Option<&'static str> {
    let (target, program) = target(pins, LinkPin::Device(DeviceHook::Xdp, link.index))?;
    let xdp = link.xdp.filter(|xdp| xdp.program_id == program)?;
    (target == Target::Device(link.index)).then_some(if xdp.native { "native" } else { "generic" })
}

/// Target and program of a pinned link.
fn target(pins: &Pins, pin: LinkPin) -> Option<(Target, u32)> {
    let link = sys::open_pin(&pins.link(pin)).ok()?;
    let info = sys::link_info(link).ok()?;
    Some((info.target, info.program_id))
}
