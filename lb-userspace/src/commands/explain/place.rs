//! Where a packet is met: at which device, or at a socket.

use std::collections::BTreeMap;

use anyhow::bail;
use serde::Serialize;

use crate::{
    datapath::inspect::DeviceHooks,
    devices::Role,
    netlink::{Link, Route},
};

/// What `--at` says for the hook of `connect()` and `sendmsg()`.
const SOCKET: &str = "socket";

/// Where, and why there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Place {
    /// `device` or `socket`.
    pub(super) hook: &'static str,
    /// `null` at a socket.
    pub(super) device: Option<String>,
    pub(super) index: Option<u32>,
    /// `null` where klb is not.
    pub(super) role: Option<String>,
    /// It was not said, but found.
    pub(super) assumed: bool,
    pub(super) why: String,
    #[serde(skip)]
    pub(super) hooks: Option<DeviceHooks>,
}

/// What is known about the source, and about the node's devices.
#[derive(Debug)]
pub(super) struct Facts {
    /// Where the node would send an answer to it.
    pub(super) route: Route,
    /// It is the address of a pod of this node.
    pub(super) is_pod: bool,
    pub(super) sockets_are_served: bool,
    /// Those that klb is on.
    pub(super) served: Vec<DeviceHooks>,
    pub(super) links: Vec<Link>,
    /// Which bridge each port belongs to.
    pub(super) masters: BTreeMap<u32, u32>,
}

impl Facts {
    /// # Errors
    ///
    /// If there is no device of the name that is asked for.
    pub(super) fn place(&self, at: Option<&str>) -> anyhow::Result<Place> {
        match at {
            None => Ok(self.assumed()),
            Some(SOCKET) => Ok(Place::socket("you said so", false)),
            Some(name) => match self.links.iter().find(|link| link.name == name) {
                Some(link) => Ok(self.device(link.index, "you said so".to_owned(), false)),
                None => bail!("there is no device {name} here; {}", self.devices()),
            },
        }
    }

    fn assumed(&self) -> Place {
        match self.route {
            Route::Here => Place::socket(
                "the source is the node's own: what its processes send meets no other hook",
                true,
            ),
            Route::By(index) if self.is_served(index) => {
                let why = "the node's route to the source leads there".to_owned();
                self.device(index, why, true)
            }
            Route::By(_) if self.is_pod && self.sockets_are_served => Place::socket(
                "the source is a pod of this node, on whose device klb is not",
                true,
            ),
            Route::By(index) => self.behind(index),
            Route::Nowhere => self.uplink(),
        }
    }

    /// A device without programs, unless it is a bridge and its ports have them.
    fn behind(&self, index: u32) -> Place {
        if let Some(port) = self.port_of(index) {
            let bridge = self.name(index);
            let why = format!("a port of {bridge}, to which the route to the source leads");
            return self.device(port, why, true);
        }
        let why = format!(
            "the node's route to the source leads there; {}",
            self.devices()
        );
        self.device(index, why, true)
    }

    fn uplink(&self) -> Place {
        let mut served = self.served.iter();
        let uplink = served.find(|device| device.role == Some(Role::Uplink) && device.is_ingress());
        let nowhere = "the node has no route to the source";
        if let Some(uplink) = uplink {
            let why = format!("{nowhere}, and this is its uplink");
            return self.device(uplink.index, why, true);
        }
        Place {
            hook: "device",
            device: None,
            index: None,
            role: None,
            assumed: true,
            why: format!("{nowhere}, and no uplink; {}", self.devices()),
            hooks: None,
        }
    }

    fn device(&self, index: u32, why: String, assumed: bool) -> Place {
        let mut served = self.served.iter();
        let hooks = served.find(|device| device.index == index).cloned();
        Place {
            hook: "device",
            device: Some(self.name(index)),
            index: Some(index),
            role: hooks
                .as_ref()
                .and_then(|hooks| hooks.role)
                .map(|role| role.to_string()),
            assumed,
            why,
            hooks,
        }
    }

    fn is_served(&self, index: u32) -> bool {
        let mut served = self.served.iter();
        served.any(|device| device.index == index && device.is_ingress())
    }

    /// A port of a bridge on which klb is: all are alike to it.
    fn port_of(&self, bridge: u32) -> Option<u32> {
        let ports = self.masters.iter();
        let ports = ports.filter(|(_, master)| **master == bridge);
        ports
            .map(|(port, _)| *port)
            .find(|port| self.is_served(*port))
    }

    fn name(&self, index: u32) -> String {
        let link = self.links.iter().find(|link| link.index == index);
        link.map_or_else(|| index.to_string(), |link| link.name.clone())
    }

    /// Where klb is, in a sentence.
    pub(super) fn devices(&self) -> String {
        let names = self
            .served
            .iter()
            .filter_map(|device| device.name.as_deref());
        let names: Vec<_> = names.collect();
        if names.is_empty() {
            "klb is on no device".to_owned()
        } else {
            format!("klb is on {}", names.join(", "))
        }
    }
}

impl Place {
    fn socket(why: &str, assumed: bool) -> Self {
        Self {
            hook: SOCKET,
            device: None,
            index: None,
            role: None,
            assumed,
            why: why.to_owned(),
            hooks: None,
        }
    }

    pub(super) fn is_socket(&self) -> bool {
        self.hook == SOCKET
    }

    /// As a line of a page.
    pub(super) fn text(&self) -> String {
        let place = match (&self.device, &self.role) {
            (None, _) if self.is_socket() => "a socket".to_owned(),
            (None, _) => "no device".to_owned(),
            (Some(device), None) => device.clone(),
            (Some(device), Some(role)) => format!("{device}, {} {role}", article(role)),
        };
        if self.assumed {
            format!("{place} (assumed: {})", self.why)
        } else {
            place
        }
    }
}

fn article(word: &str) -> &'static str {
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) {
        "an"
    } else {
        "a"
    }
}

impl DeviceHooks {
    /// Whether klb sees what comes in.
    pub(super) const fn is_ingress(&self) -> bool {
        self.xdp.is_some() || self.tc_ingress.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.to_owned(),
            loopback: false,
            ethernet: true,
            kind: None,
            xdp: None,
            leads_to: None,
        }
    }

    fn hooks(index: u32, name: &str, role: Role) -> DeviceHooks {
        DeviceHooks {
            index,
            name: Some(name.to_owned()),
            role: Some(role),
            xdp: None,
            tc_ingress: Some("tcx"),
            tc_egress: Some("tcx"),
        }
    }

    fn facts(route: Route) -> Facts {
        Facts {
            route,
            is_pod: false,
            sockets_are_served: true,
            served: vec![hooks(5, "veth5", Role::Pod), hooks(2, "eth0", Role::Uplink)],
            links: vec![
                link(2, "eth0"),
                link(3, "docker0"),
                link(4, "cni0"),
                link(5, "veth5"),
            ],
            masters: BTreeMap::from([(5, 4)]),
        }
    }

    #[test]
    fn a_packet_comes_from_where_its_answer_would_go() {
        for (route, at) in [
            (Route::By(2), "eth0, an uplink"),
            (Route::By(5), "veth5, a pod"),
            (Route::By(4), "veth5, a pod"),
            (Route::By(3), "docker0 (assumed"),
            (Route::Nowhere, "eth0, an uplink"),
            (Route::Here, "a socket"),
        ] {
            let place = facts(route).place(None).expect("found");
            assert!(place.assumed);
            assert!(place.text().starts_with(at), "{route:?}: {}", place.text());
        }
        let place = facts(Route::By(3)).place(None).expect("found");
        assert!(place.hooks.is_none() && place.why.contains("klb is on veth5, eth0"));
    }

    #[test]
    fn a_pod_whose_device_has_no_program_calls_by_its_socket() {
        let mut facts = facts(Route::By(3));
        facts.is_pod = true;
        assert!(facts.place(None).expect("found").is_socket());
        facts.sockets_are_served = false;
        assert!(!facts.place(None).expect("found").is_socket());
    }

    #[test]
    fn what_is_asked_for_is_taken_and_must_be_there() {
        let facts = facts(Route::By(2));
        let place = facts.place(Some("docker0")).expect("a device");
        assert_eq!((place.index, place.assumed), (Some(3), false));
        assert!(facts.place(Some("socket")).expect("a hook").is_socket());
        let error = facts.place(Some("eth9")).expect_err("refused").to_string();
        assert!(error.contains("eth9") && error.contains("eth0"), "{error}");
    }

    #[test]
    fn without_any_device_nothing_is_assumed_of_one() {
        let facts = Facts {
            served: Vec::new(),
            ..facts(Route::Nowhere)
        };
        let place = facts.place(None).expect("an answer");
        assert_eq!((place.hook, place.device), ("device", None));
    }
}
