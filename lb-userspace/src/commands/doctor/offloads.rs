//! What devices do with packets before and behind klb's programs.

use std::collections::BTreeSet;

use super::{check::Check, network::Device};
use crate::{devices::Role, ethtool::Offloads};

const NAME: &str = "offloads";

/// What is known besides the devices themselves.
#[derive(Clone, Debug, Default)]
pub(super) struct Circumstances {
    /// Indices of devices that have an XDP program of klb's, or may get one.
    pub(super) xdp: BTreeSet<u32>,
    /// Indices of devices that VLANs are on.
    pub(super) below_vlans: BTreeSet<u32>,
    /// Indices of the devices that take frames from XDP; `None` where the kernel
    /// does not tell, and where nobody sends any (`--routing kernel`).
    pub(super) frame_takers: Option<BTreeSet<u32>>,
}

/// One check for each kind of trouble, or one that says that there is none.
pub(super) fn checks(devices: &[Device], around: &Circumstances) -> Vec<Check> {
    let troubles = [
        lro(devices),
        gro(devices),
        rx_checksum(devices),
        rx_vlan(devices, around),
        frames(devices, around),
    ];
    let troubles: Vec<_> = troubles.into_iter().flatten().collect();
    if troubles.is_empty() {
        return vec![Check::ok(NAME, "none is in the way")];
    }
    troubles
}

/// Names of those uplinks of which something holds.
fn uplinks(devices: &[Device], holds: impl Fn(&Device, Offloads) -> bool) -> Option<String> {
    let uplinks = devices.iter().filter(|device| device.role == Role::Uplink);
    let those = uplinks.filter(|device| holds(device, device.offloads));
    let names: Vec<_> = those.map(|device| device.name.as_str()).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// The kernel turns it off where it forwards and where XDP is generic; it can be
/// turned on again behind its back.
fn lro(devices: &[Device]) -> Option<Check> {
    let names = uplinks(devices, |_, offloads| offloads.lro == Some(true))?;
    Some(Check::warn(
        NAME,
        format!(
            "LRO is on at {names}: what it puts together cannot be taken apart for pods and other \
             nodes, and few drivers run XDP beside it"
        ),
        "ethtool -K DEVICE lro off; GRO does the same, and can be undone",
    ))
}

fn gro(devices: &[Device]) -> Option<Check> {
    let names = uplinks(devices, |_, offloads| offloads.gro == Some(false))?;
    Some(Check::warn(
        NAME,
        format!("GRO is off at {names}: each packet of a connection is handled by itself"),
        "ethtool -K DEVICE gro on",
    ))
}

fn rx_checksum(devices: &[Device]) -> Option<Check> {
    let names = uplinks(devices, |_, offloads| offloads.rx_checksum == Some(false))?;
    Some(Check::warn(
        NAME,
        format!("checksums of what comes in at {names} are left to the CPU"),
        "ethtool -K DEVICE rx on, if the device can",
    ))
}

/// XDP sees a frame of a VLAN without its tag there, as if it were the device's
/// own, and answers without.
fn rx_vlan(devices: &[Device], around: &Circumstances) -> Option<Check> {
    let names = uplinks(devices, |device, offloads| {
        offloads.rx_vlan == Some(true)
            && around.xdp.contains(&device.index)
            && around.below_vlans.contains(&device.index)
    })?;
    Some(Check::warn(
        NAME,
        format!(
            "{names} takes the tags of VLANs out of frames before XDP sees them, and there are \
             VLANs on it: their packets look like its own"
        ),
        "ethtool -K DEVICE rxvlan off, or run the agent with --xdp off",
    ))
}

fn frames(devices: &[Device], around: &Circumstances) -> Option<Check> {
    let takers = around.frame_takers.as_ref()?;
    if around.xdp.is_empty() {
        return None;
    }
    let pods = devices.iter().filter(|device| device.role == Role::Pod);
    let (taking, others): (Vec<_>, Vec<_>) = pods.partition(|pod| takers.contains(&pod.index));
    if others.is_empty() {
        return None;
    }
    Some(Check::warn(
        NAME,
        format!(
            "{} of {} devices of pods take no frames from XDP: with --routing bypass their packets \
             go by the stack, which takes longer than without XDP",
            others.len(),
            others.len() + taking.len()
        ),
        "have the CNI turn GRO on in pods (ethtool -K eth0 gro on there), or run the agent with \
         --xdp off",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::check::Level::{Ok as Fine, Warn};

    fn device(index: u32, role: Role, offloads: Offloads) -> Device {
        Device {
            index,
            name: format!("dev{index}"),
            role,
            mtu: Some(1500),
            rp_filter: Some(0),
            offloads,
        }
    }

    const WELL: Offloads = Offloads {
        rx_checksum: Some(true),
        gro: Some(true),
        lro: Some(false),
        rx_vlan: Some(true),
    };

    #[test]
    fn each_offload_is_judged_where_it_matters() {
        let (lro, off) = (Some(true), Some(false));
        let plain = Circumstances::default;
        let vlans = |xdp: &[u32]| Circumstances {
            xdp: xdp.iter().copied().collect(),
            below_vlans: BTreeSet::from([2]),
            frame_takers: None,
        };
        for (offloads, around, expected) in [
            (WELL, plain(), None),
            (Offloads::default(), plain(), None),
            (Offloads { lro, ..WELL }, plain(), Some("LRO is on at dev2")),
            (
                Offloads { gro: off, ..WELL },
                plain(),
                Some("GRO is off at dev2"),
            ),
            (
                Offloads {
                    rx_checksum: off,
                    ..WELL
                },
                plain(),
                Some("checksums of what comes in at dev2"),
            ),
            (WELL, vlans(&[]), None),
            (WELL, vlans(&[2]), Some("dev2 takes the tags")),
            (
                Offloads {
                    rx_vlan: off,
                    ..WELL
                },
                vlans(&[2]),
                None,
            ),
        ] {
            // Of a pod's own device nothing is asked.
            let devices = [
                device(2, Role::Uplink, offloads),
                device(3, Role::Pod, Offloads { lro, ..offloads }),
            ];
            let checks = checks(&devices, &around);
            let [check] = &checks[..] else {
                panic!("{checks:?}");
            };
            let level = if expected.is_some() { Warn } else { Fine };
            assert_eq!(check.level, level, "{check:?}");
            let text = expected.unwrap_or("none");
            assert!(check.finding.starts_with(text), "{check:?}");
        }
    }

    #[test]
    fn pods_are_asked_for_frames_where_xdp_sends_some() {
        let devices = [
            device(2, Role::Uplink, WELL),
            device(3, Role::Pod, WELL),
            device(4, Role::Pod, WELL),
        ];
        let around = |xdp: &[u32], takers: Option<&[u32]>| Circumstances {
            xdp: xdp.iter().copied().collect(),
            below_vlans: BTreeSet::new(),
            frame_takers: takers.map(|takers| takers.iter().copied().collect()),
        };
        for (around, expected) in [
            (around(&[2], None), "none"),
            (around(&[], Some(&[])), "none"),
            (around(&[2], Some(&[3, 4])), "none"),
            (around(&[2], Some(&[3])), "1 of 2 devices of pods"),
            (around(&[2], Some(&[])), "2 of 2 devices of pods"),
        ] {
            let checks = checks(&devices, &around);
            assert!(checks[0].finding.starts_with(expected), "{checks:?}");
        }
    }
}
