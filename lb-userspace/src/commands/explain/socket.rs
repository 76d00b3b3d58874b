//! What the hooks at a socket would do, which cannot be run without a socket: the
//! same steps as in `lb-ebpf/src/socket.rs`, by the same tables.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use lb_common::{
    Reason,
    node::{CONFIG_HOST_SOCKETS_ONLY, Config, Device, NETNS_OPTED_OUT, Netns},
    service::{FRONTEND_SOURCE_RANGES, ServiceEntry},
};

use super::frontend::{Services, refuses_other_ports};
use crate::datapath::FrontendKey;

/// All that decides about a call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tables<'a> {
    pub(super) services: &'a Services,
    pub(super) config: &'a Config,
    /// Of the family of the call.
    pub(super) cluster_network: Option<IpNet>,
    /// By the cookie of its network namespace.
    pub(super) pods: &'a BTreeMap<[u32; 2], Netns>,
    /// What is known of the node itself.
    pub(super) node: Option<&'a Device>,
}

/// A call of `connect()` or `sendmsg()`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) from: IpAddr,
    /// A process of the node itself makes it.
    pub(super) is_of_node: bool,
    pub(super) to: SocketAddr,
    pub(super) protocol: u8,
}

/// A call that gets a backend, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Served {
    pub(super) key: FrontendKey,
    pub(super) entry: ServiceEntry,
    /// The address that the caller is known by; `None` for one in a network
    /// namespace that the agent does not know.
    pub(super) client: Option<IpAddr>,
}

impl Tables<'_> {
    /// # Errors
    ///
    /// Why a call gets no backend, whichever there are.
    pub(super) fn serve(&self, call: Call) -> Result<Served, Reason> {
        let (key, entry) = self.frontend(call)?;
        let client = self.client(call)?;
        if entry.flags & FRONTEND_SOURCE_RANGES != 0 && client.is_none() {
            // Its packets have an address, and are looked at.
            return Err(Reason::SocketNotServed);
        }
        Ok(Served { key, entry, client })
    }

    /// The frontend that a call names.
    pub(super) fn frontend(&self, call: Call) -> Result<(FrontendKey, ServiceEntry), Reason> {
        let at = |addr| FrontendKey {
            addr,
            port: call.to.port(),
            protocol: call.protocol,
        };
        let addr = call.to.ip();
        let exact = at(addr);
        if let Some(entry) = self.services.get(&exact) {
            return Ok((exact, *entry));
        }
        if self
            .cluster_network
            .is_some_and(|network| network.contains(&addr))
        {
            return Err(if refuses_other_ports(self.services, addr) {
                Reason::NoSuchPort
            } else {
                Reason::NotService
            });
        }
        Err(Reason::NotService)
    }

    fn client(&self, call: Call) -> Result<Option<IpAddr>, Reason> {
        // The cookie is not known before Linux 5.14, and the node's then is like
        // any other.
        if call.is_of_node && self.config.host_netns != [0, 0] {
            return Ok(self.node_address(call.from));
        }
        if call.to.ip().is_loopback() {
            return Err(Reason::NotService);
        }
        if self.config.flags & CONFIG_HOST_SOCKETS_ONLY != 0 {
            return Err(Reason::SocketNotServed);
        }
        match self.pod(call.from) {
            Some(pod) if pod.flags & NETNS_OPTED_OUT != 0 => Err(Reason::SocketNotServed),
            Some(_) => Ok(Some(call.from)),
            None => Ok(None),
        }
    }

    /// The pod that has an address.
    pub(super) fn pod(&self, addr: IpAddr) -> Option<&Netns> {
        let has = |pod: &&Netns| match addr {
            IpAddr::V4(_) => IpAddr::from(pod.addr4) == addr,
            IpAddr::V6(_) => IpAddr::from(pod.addr6) == addr,
        };
        self.pods.values().find(has)
    }

    /// The node's own address of a family.
    fn node_address(&self, family: IpAddr) -> Option<IpAddr> {
        let node = self.node?;
        let addr = match family {
            IpAddr::V4(_) => IpAddr::from(node.addr4),
            IpAddr::V6(_) => IpAddr::from(node.addr6),
        };
        (!addr.is_unspecified()).then_some(addr)
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{
        flow::TCP,
        service::{FRONTEND_REFUSE, FrontendKind},
    };

    use super::*;

    const POD: &str = "10.244.0.9";
    const OPTED_OUT: &str = "10.244.0.8";
    const NODE: &str = "192.0.2.1";

    fn key(addr: &str) -> FrontendKey {
        let addr: SocketAddr = addr.parse().expect("an address");
        FrontendKey {
            addr: addr.ip(),
            port: addr.port(),
            protocol: TCP,
        }
    }

    fn addr4(text: &str) -> lb_common::Addr4 {
        let addr: std::net::Ipv4Addr = text.parse().expect("an address");
        addr.into()
    }

    fn serve(from: &str, to: &str, flags: u32, ranges: bool) -> Result<Served, Reason> {
        let entry = |kind: FrontendKind, flags| ServiceEntry {
            kind: kind as u8,
            flags,
            ..ServiceEntry::default()
        };
        let guard = if ranges { FRONTEND_SOURCE_RANGES } else { 0 };
        let services = Services::from([
            (key("10.96.0.10:80"), entry(FrontendKind::ClusterIp, guard)),
            (
                FrontendKey::of_address(IpAddr::from([10, 96, 0, 10])),
                entry(FrontendKind::Address, FRONTEND_REFUSE),
            ),
            (key("192.0.2.1:30080"), entry(FrontendKind::NodePort, 0)),
            (key("127.0.0.1:30080"), entry(FrontendKind::NodePort, 0)),
        ]);
        let pod = |addr, flags| Netns {
            addr4: addr4(addr),
            flags,
            ..Netns::default()
        };
        let pods = BTreeMap::from([
            ([2, 0], pod(POD, 0)),
            ([3, 0], pod(OPTED_OUT, NETNS_OPTED_OUT)),
        ]);
        let config = Config {
            flags,
            host_netns: [1, 0],
            ..Config::default()
        };
        let node = Device {
            addr4: addr4(NODE),
            ..Device::default()
        };
        let tables = Tables {
            services: &services,
            config: &config,
            cluster_network: Some("10.96.0.0/24".parse().expect("a network")),
            pods: &pods,
            node: Some(&node),
        };
        tables.serve(Call {
            from: from.parse().expect("an address"),
            is_of_node: from == NODE || from.starts_with("127."),
            to: to.parse().expect("an address"),
            protocol: TCP,
        })
    }

    #[test]
    fn a_call_is_served_by_whom_it_names_and_who_makes_it() {
        let host_only = CONFIG_HOST_SOCKETS_ONLY;
        let unknown = "10.244.0.77";
        for (from, to, flags, expected) in [
            (POD, "10.96.0.10:80", 0, Ok(Some(POD))),
            (NODE, "10.96.0.10:80", 0, Ok(Some(NODE))),
            ("127.0.0.1", "10.96.0.10:80", 0, Ok(Some(NODE))),
            (unknown, "10.96.0.10:80", 0, Ok(None)),
            (POD, "10.96.0.10:81", 0, Err(Reason::NoSuchPort)),
            (POD, "10.96.0.11:80", 0, Err(Reason::NotService)),
            (POD, "198.51.100.1:80", 0, Err(Reason::NotService)),
            (OPTED_OUT, "10.96.0.10:80", 0, Err(Reason::SocketNotServed)),
            (
                POD,
                "10.96.0.10:80",
                host_only,
                Err(Reason::SocketNotServed),
            ),
            (NODE, "10.96.0.10:80", host_only, Ok(Some(NODE))),
            (NODE, "127.0.0.1:30080", 0, Ok(Some(NODE))),
            (NODE, "127.0.0.1:443", 0, Err(Reason::NotService)),
            (POD, "127.0.0.1:30080", 0, Err(Reason::NotService)),
        ] {
            let found = serve(from, to, flags, false).map(|served| served.client);
            let expected = expected
                .map(|client: Option<&str>| client.map(|addr| addr.parse().expect("an address")));
            assert_eq!(found, expected, "{from} {to} {flags}");
        }
    }

    #[test]
    fn who_is_not_known_is_left_to_the_device_where_not_all_may_come() {
        let refused = serve("10.244.0.77", "10.96.0.10:80", 0, true);
        assert_eq!(refused, Err(Reason::SocketNotServed));
        assert!(serve(POD, "10.96.0.10:80", 0, true).is_ok());
    }
}
