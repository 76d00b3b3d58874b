//! A cluster of one node, in namespaces.
//!
//! ```text
//!  outside ──────────────── up0 node pod9 ────── client
//!  192.168.50.2    192.168.50.1      pod5 ────── pod-1  10.244.0.5
//!  fd00:50::2        fd00:50::1      …                  fd00:10:244::5
//! ```
//!
//! Pods hang on routed veths, as with Calico: the pod has its addresses as /32
//! and /128 and a link-local gateway that is no address of anybody, the node a
//! route for each. Processes of node and pods are in the cluster's control
//! group, those of the host outside are not.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    rc::Rc,
    time::Duration,
};

use crate::{
    cgroup::Cgroup,
    helper::{Helper, Stream, await_server},
    icmp,
    netns::Netns,
    process::{Place, Process},
    scope::Scope,
    traffic::{Answer, Failure, Request, Step},
};

/// The node's device towards the outside.
pub const UPLINK: &str = "up0";
/// The host sides of the pods' links.
pub const POD_DEVICES: &str = "pod*";

/// What every pod takes for its gateway, and the link-local address that the
/// kernel derives from it.
const GATEWAY_MAC: &str = "ee:ee:ee:ee:ee:ee";
const GATEWAY_V4: &str = "169.254.1.1";
const GATEWAY_V6: &str = "fe80::ecee:eeff:feee:eeee";

/// Addresses of Services: routed to the node by the host outside.
const SERVICES_V4: &str = "10.96.0.0/12";
const SERVICES_V6: &str = "fd00:10:96::/112";
/// Addresses of pods, likewise.
const PODS_V4: &str = "10.244.0.0/24";
const PODS_V6: &str = "fd00:10:244::/64";

/// Of those, the pods of a second node: 130 to 139, as they are written.
const SECOND_PODS_V4: &str = "10.244.0.128/25";
const SECOND_PODS_V6: &str = "fd00:10:244::100/120";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// An address of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Addresses {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

impl Addresses {
    pub const NODE: Self = Self {
        v4: Ipv4Addr::new(192, 168, 50, 1),
        v6: Ipv6Addr::new(0xfd00, 0x50, 0, 0, 0, 0, 0, 1),
    };
    pub const OUTSIDE: Self = Self {
        v4: Ipv4Addr::new(192, 168, 50, 2),
        v6: Ipv6Addr::new(0xfd00, 0x50, 0, 0, 0, 0, 0, 2),
    };

    /// Of a second node, and of the host outside on the link to it.
    pub const NODE_2: Self = Self {
        v4: Ipv4Addr::new(192, 168, 51, 1),
        v6: Ipv6Addr::new(0xfd00, 0x51, 0, 0, 0, 0, 0, 1),
    };
    pub const OUTSIDE_2: Self = Self {
        v4: Ipv4Addr::new(192, 168, 51, 2),
        v6: Ipv6Addr::new(0xfd00, 0x51, 0, 0, 0, 0, 0, 2),
    };

    /// Those of the pod with that number: 12 is `10.244.0.12` and, as it is
    /// written, `fd00:10:244::12`.
    ///
    /// # Panics
    /// If the number is too large for a pod.
    pub fn pod(number: u8) -> Self {
        let written = format!("fd00:10:244::{number}");
        Self {
            v4: Ipv4Addr::new(10, 244, 0, number),
            v6: written.parse().expect("an address"),
        }
    }

    /// Those of a Service, in the same way.
    ///
    /// # Panics
    /// If the number is too large.
    pub fn service(number: u8) -> Self {
        let written = format!("fd00:10:96::{number}");
        Self {
            v4: Ipv4Addr::new(10, 96, 0, number),
            v6: written.parse().expect("an address"),
        }
    }

    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    pub fn port(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(family), port)
    }
}

/// A place with addresses, from which requests are sent.
#[derive(Clone, Debug)]
pub struct Host {
    pub place: Place,
    pub addresses: Addresses,
    helper: Helper,
}

impl Host {
    /// Asks once.
    ///
    /// # Errors
    /// Why no answer came.
    pub fn ask(&self, request: &Request) -> Result<Answer, Failure> {
        self.helper.ask(&self.place, request)
    }

    /// Asks one time after the other; see [`Helper::ask_often`].
    pub fn ask_often(&self, request: &Request, count: u32) -> Vec<Result<Answer, Failure>> {
        self.helper.ask_often(&self.place, request, count)
    }

    /// Takes steps with one UDP socket; see [`Helper::take`].
    pub fn take(&self, steps: &[Step], mapped: bool) -> Vec<Result<Answer, Failure>> {
        self.helper.take(&self.place, steps, mapped)
    }

    /// Starts a server on other ports than usual, and waits until it listens.
    pub fn serve(&self, name: &str, http: u16, udp: u16) -> Process {
        let mut server = self.helper.serve_on(&self.place, name, http, udp);
        await_server(&mut server);
        server
    }

    /// Asks until there is an answer.
    ///
    /// # Errors
    /// The last failure within that time.
    pub fn await_answer(&self, request: &Request, within: Duration) -> Result<Answer, Failure> {
        self.helper.await_answer(&self.place, request, within)
    }

    /// Starts asking again and again; see [`Helper::stream`].
    pub fn stream(&self, request: &Request, held: bool) -> Stream {
        self.helper.stream(&self.place, request, held)
    }

    /// Starts asking again and again over one socket; see [`Helper::insist`].
    pub fn insist(&self, request: &Request) -> Stream {
        self.helper.insist(&self.place, request)
    }

    /// Whether a ping is answered in time.
    pub fn ping(&self, to: IpAddr, within: Duration) -> bool {
        let netns = self.place.netns();
        // Whoever may open a socket for pings: root, too, only by its group.
        netns.sysctl("net/ipv4/ping_group_range", "0 0");
        netns.within(|| icmp::ping(to, within)).is_ok()
    }

    /// This host, with its processes outside of the cluster's control group.
    #[must_use]
    pub fn without_cgroup(&self) -> Self {
        Self {
            place: self.place.without_cgroup(),
            ..self.clone()
        }
    }

    /// Lets the stack or the device finish checksums.
    fn set_offload(&self, device: &str, on: bool) {
        let state = if on { "on" } else { "off" };
        let netns = self.place.netns();
        netns.output("ethtool", &["-K", device, "tx", state]);
    }
}

/// A pod, its device on the node and, once started, its server.
#[derive(Debug)]
pub struct Pod {
    // Before the namespace: a process holds it.
    server: Option<Process>,
    pub host: Host,
    pub name: String,
    pub device: String,
}

impl Pod {
    /// The address of its link, made from its IPv4 address.
    fn mac(&self) -> String {
        let [a, b, c, d] = self.host.addresses.v4.octets();
        format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
    }
}

/// How a cluster is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where `klb-traffic` is.
    pub helper: PathBuf,
    /// Leave transport checksums to devices. They go unfinished through veths
    /// and no receiver verifies them, so this is off unless a test is about it.
    pub offloads: bool,
}

/// A node, a host outside, and pods. Removed on drop.
#[derive(Debug)]
pub struct Cluster {
    pub pods: Vec<Pod>,
    /// A pod that serves nothing.
    pub client: Pod,
    pub node: Host,
    pub outside: Host,
    options: Options,
    cgroup: Rc<Cgroup>,
    scope: Rc<Scope>,
}

/// A second node behind the host outside, which is the router between the two;
/// with pods of its own. Removed on drop.
#[derive(Debug)]
pub struct SecondNode {
    pub pods: Vec<Pod>,
    pub node: Host,
    cgroup: Rc<Cgroup>,
}

impl SecondNode {
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }
}

/// The client pod's number.
const CLIENT: u8 = 9;

impl Cluster {
    /// A cluster with a client pod and no other.
    pub fn new(scope: Scope, options: Options) -> Self {
        let scope = Rc::new(scope);
        let cgroup = Rc::new(Cgroup::new(scope.name()));
        let builder = Builder {
            scope: &scope,
            cgroup: &cgroup,
            options: &options,
        };
        let node = builder.node(Addresses::NODE);
        let outside = builder.outside(&node);
        let client = builder.pod(&node, "client", CLIENT);
        Self {
            pods: Vec::new(),
            client,
            node,
            outside,
            options,
            cgroup,
            scope,
        }
    }

    pub fn scope(&self) -> &Rc<Scope> {
        &self.scope
    }

    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    fn builder(&self) -> Builder<'_> {
        Builder {
            scope: &self.scope,
            cgroup: &self.cgroup,
            options: &self.options,
        }
    }

    /// Adds pods that serve, and waits until they do.
    pub fn add_pods(&mut self, pods: &[(&str, u8)]) {
        let mut added: Vec<Pod> = pods
            .iter()
            .map(|(name, number)| {
                let mut pod = self.builder().pod(&self.node, name, *number);
                pod.server = Some(self.helper().serve(&pod.host.place, name));
                pod
            })
            .collect();
        for pod in &mut added {
            await_server(pod.server.as_mut().expect("started above"));
        }
        self.pods.append(&mut added);
    }

    /// Adds a second node with pods that serve, and waits until they do. Their
    /// numbers are from 130 to 139: those are routed there.
    ///
    /// # Panics
    /// If a pod does not serve.
    pub fn second_node(&self, pods: &[(&str, u8)]) -> SecondNode {
        let scope = Rc::new(Scope::test());
        let cgroup = Rc::new(Cgroup::new(scope.name()));
        let builder = Builder {
            scope: &scope,
            cgroup: &cgroup,
            options: &self.options,
        };
        let node = builder.node(Addresses::NODE_2);
        builder.plug_second(&node, &self.node, &self.outside);
        let pods = pods.iter().map(|(name, number)| {
            let mut pod = builder.pod(&node, name, *number);
            let mut server = self.helper().serve(&pod.host.place, name);
            await_server(&mut server);
            pod.server = Some(server);
            pod
        });
        SecondNode {
            pods: pods.collect(),
            node,
            cgroup,
        }
    }

    /// A namespace for a pod, which [`Self::plug`] connects.
    pub fn unplugged_pod(&self, name: &str, number: u8) -> Pod {
        self.builder().unplugged_pod(name, number)
    }

    /// Gives a pod its device.
    pub fn plug(&self, pod: &Pod) {
        Builder::plug(&self.node, pod);
    }

    /// Connects the node with the host outside once more, after the link was
    /// removed.
    pub fn plug_uplink(&self) {
        self.builder().plug_uplink(&self.node, &self.outside);
    }

    /// Gives the uplink its addresses, and the host outside its routes, on the
    /// devices that have the names of the two ends now.
    pub fn address_uplink(&self) {
        Builder::address_uplink(&self.node, &self.outside);
    }

    /// Removes a pod as a kubelet does: processes, then namespace and device.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn remove_pod(&mut self, name: &str) {
        let index = self.pods.iter().position(|pod| pod.name == name);
        let pod = self
            .pods
            .remove(index.unwrap_or_else(|| panic!("no pod {name}")));
        drop(pod);
    }

    /// # Panics
    /// If there is none of that name.
    pub fn pod(&self, name: &str) -> &Pod {
        let pod = self.pods.iter().find(|pod| pod.name == name);
        pod.unwrap_or_else(|| panic!("no pod {name}"))
    }

    fn helper(&self) -> Helper {
        Helper::new(&self.options.helper)
    }
}

/// What building a part of the cluster needs.
struct Builder<'a> {
    scope: &'a Rc<Scope>,
    cgroup: &'a Rc<Cgroup>,
    options: &'a Options,
}

impl Builder<'_> {
    fn host(&self, role: &str, addresses: Addresses, cgroup: Option<&Rc<Cgroup>>) -> Host {
        let netns = Netns::new(format!("{}-{role}", self.scope.name()));
        Host {
            place: Place::new(self.scope, netns, cgroup),
            addresses,
            helper: Helper::new(&self.options.helper),
        }
    }

    fn node(&self, addresses: Addresses) -> Host {
        let node = self.host("node", addresses, Some(self.cgroup));
        let netns = node.place.netns();
        netns.sysctl("net/ipv4/ip_forward", "1");
        netns.sysctl("net/ipv6/conf/all/forwarding", "1");
        // The strictest that a distribution ships: a packet must come from
        // where its source is routed to.
        netns.sysctl("net/ipv4/conf/all/rp_filter", "1");
        node
    }

    fn outside(&self, node: &Host) -> Host {
        let outside = self.host("outside", Addresses::OUTSIDE, None);
        self.plug_uplink(node, &outside);
        outside
    }

    fn plug_uplink(&self, node: &Host, outside: &Host) {
        node.place.netns().ip(&format!(
            "link add {UPLINK} type veth peer name eth0 netns {}\n",
            outside.place.netns().name(),
        ));
        Self::address_uplink(node, outside);
        self.set_offloads(node, UPLINK, outside);
    }

    fn address_uplink(node: &Host, outside: &Host) {
        let (here, there) = (Addresses::NODE, Addresses::OUTSIDE);
        node.place.netns().ip(&format!(
            "addr add {}/24 dev {UPLINK}\n\
             addr add {}/64 dev {UPLINK} nodad\n\
             link set {UPLINK} up\n",
            here.v4, here.v6,
        ));
        let mut commands = format!(
            "addr add {}/24 dev eth0\n\
             addr add {}/64 dev eth0 nodad\n\
             link set eth0 up\n",
            there.v4, there.v6,
        );
        for (network, via) in [
            (SERVICES_V4, IpAddr::from(here.v4)),
            (PODS_V4, here.v4.into()),
            (SERVICES_V6, here.v6.into()),
            (PODS_V6, here.v6.into()),
        ] {
            writeln!(commands, "route add {network} via {via}").expect("a string grows");
        }
        outside.place.netns().ip(&commands);
    }

    /// Connects a second node with the host outside, and has that forward.
    fn plug_second(&self, second: &Host, first: &Host, outside: &Host) {
        let router = outside.place.netns();
        router.sysctl("net/ipv4/ip_forward", "1");
        router.sysctl("net/ipv6/conf/all/forwarding", "1");
        let (here, there) = (Addresses::NODE_2, Addresses::OUTSIDE_2);
        second.place.netns().ip(&format!(
            "link add {UPLINK} type veth peer name eth1 netns {}\n\
             addr add {}/24 dev {UPLINK}\n\
             addr add {}/64 dev {UPLINK} nodad\n\
             link set {UPLINK} up\n\
             route add 0.0.0.0/0 via {}\n\
             route add ::/0 via {}\n",
            router.name(),
            here.v4,
            here.v6,
            there.v4,
            there.v6,
        ));
        router.ip(&format!(
            "addr add {}/24 dev eth1\n\
             addr add {}/64 dev eth1 nodad\n\
             link set eth1 up\n\
             route add {SECOND_PODS_V4} via {}\n\
             route add {SECOND_PODS_V6} via {}\n",
            there.v4, there.v6, here.v4, here.v6,
        ));
        let Addresses { v4, v6 } = Addresses::OUTSIDE;
        first.place.netns().ip(&format!(
            "route add 0.0.0.0/0 via {v4}\n\
             route add ::/0 via {v6}\n"
        ));
        if !self.options.offloads {
            second.set_offload(UPLINK, false);
            outside.set_offload("eth1", false);
        }
    }

    fn pod(&self, node: &Host, name: &str, number: u8) -> Pod {
        let pod = self.unplugged_pod(name, number);
        Self::plug(node, &pod);
        self.set_offloads(node, &pod.device, &pod.host);
        pod
    }

    fn unplugged_pod(&self, name: &str, number: u8) -> Pod {
        Pod {
            server: None,
            host: self.host(name, Addresses::pod(number), Some(self.cgroup)),
            name: name.to_owned(),
            device: format!("pod{number}"),
        }
    }

    fn plug(node: &Host, pod: &Pod) {
        let (device, netns) = (&pod.device, pod.host.place.netns());
        let Addresses { v4, v6 } = pod.host.addresses;
        let mac = pod.mac();
        // The node knows its neighbour: a first ARP request can be lost while
        // the link comes up, and the second is a second later.
        node.place.netns().ip(&format!(
            "link add {device} address {GATEWAY_MAC} type veth \
             peer name eth0 address {mac} netns {}\n\
             link set {device} up\n\
             neigh add {v4} lladdr {mac} dev {device} nud permanent\n\
             neigh add {v6} lladdr {mac} dev {device} nud permanent\n\
             route add {v4}/32 dev {device}\n\
             route add {v6}/128 dev {device}\n",
            netns.name(),
        ));
        netns.ip(&format!(
            "addr add {v4}/32 dev eth0\n\
             addr add {v6}/128 dev eth0 nodad\n\
             link set eth0 up\n\
             neigh add {GATEWAY_V4} lladdr {GATEWAY_MAC} dev eth0 nud permanent\n\
             neigh add {GATEWAY_V6} lladdr {GATEWAY_MAC} dev eth0 nud permanent\n\
             route add {GATEWAY_V4} dev eth0 scope link\n\
             route add 0.0.0.0/0 via {GATEWAY_V4} dev eth0\n\
             route add ::/0 via {GATEWAY_V6} dev eth0\n"
        ));
    }

    /// For both ends of a link.
    fn set_offloads(&self, node: &Host, device: &str, peer: &Host) {
        if !self.options.offloads {
            node.set_offload(device, false);
            peer.set_offload("eth0", false);
        }
    }
}
