//! A cluster that is measured: one for each way to do the work, all of them
//! there at once.

use std::{
    ffi::CString,
    fs,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    time::Duration,
};

use lb_tests::{
    agent::{Agent, Hooks},
    apiserver::ApiServer,
    helper::{Helper, await_server},
    measure::{Measured, Test},
    process::{Place, Process},
    scope::Scope,
    sweep,
    topology::{Addresses, Cluster, Options, UPLINK},
};

use super::{
    NAME,
    floor::{self, Floor},
    progress, rules,
    services::{PODS, Services},
};
use crate::{paths, traffic};

/// All clients and servers run here: a request costs the sum of all work that it
/// causes, and no wake-up of another CPU.
pub(super) const CPU: usize = 1;

/// Who balances the load.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way {
    /// Nobody: clients ask pods.
    Direct,
    Iptables,
    Nftables,
    Klb {
        hooks: Hooks,
        /// `kernel` or `bypass`.
        routing: &'static str,
    },
    /// Nobody, with programs that do nothing at each of klb's hooks.
    Empty,
    /// The same, but that those of TC read each packet's headers.
    Headers,
    /// The least that can be done: at the socket, or for packets.
    FloorSocket,
    FloorTc,
    FloorXdp,
}

impl Way {
    pub(super) const SOCKET: Self = Self::Klb {
        hooks: Hooks::SOCKET,
        routing: "kernel",
    };
    pub(super) const TC: Self = Self::Klb {
        hooks: Hooks::TC,
        routing: "kernel",
    };
    pub(super) const BYPASS: Self = Self::Klb {
        hooks: Hooks::TC,
        routing: "bypass",
    };
    pub(super) const XDP: Self = Self::Klb {
        hooks: Hooks::XDP,
        routing: "bypass",
    };
    /// All hooks, as klb is if nothing is said.
    pub(super) const ALL: Self = Self::Klb {
        hooks: Hooks::ALL,
        routing: "kernel",
    };

    /// Whether it hears of Services from an API server.
    pub(super) const fn asks_api(self) -> bool {
        matches!(self, Self::Klb { .. })
    }
}

/// A cluster with its servers and, on its node, who balances the load.
pub(super) struct Site {
    pub(super) name: &'static str,
    pub(super) services: Services,
    way: Way,
    floor: Option<Floor>,
    // Before the cluster: they clean up in its namespaces.
    agent: Option<Agent>,
    api: Option<ApiServer>,
    _servers: Vec<Process>,
    pub(super) cluster: Cluster,
}

impl Site {
    /// Builds it. `tag` is for the names of what it makes.
    ///
    /// # Panics
    /// If something is not as it should be.
    pub(super) fn new(
        name: &'static str,
        tag: &str,
        way: Way,
        services: Services,
        api: Option<&ApiServer>,
    ) -> Self {
        let scope = format!("{NAME}-{tag}");
        sweep::remove(&scope);
        let options = Options {
            helper: traffic::helper(),
            offloads: true,
        };
        let mut cluster = Cluster::new(Scope::named(&scope, false), options);
        let outside = cluster.outside.place.netns();
        // What comes from a wire has its checksum, and XDP wants it.
        outside.output("ethtool", &["-K", "eth0", "tx", "off"]);
        let servers = add_servers(&mut cluster);
        let mut site = Self {
            name,
            services,
            way,
            floor: None,
            agent: None,
            api: None,
            _servers: servers,
            cluster,
        };
        site.program(api);
        site
    }

    fn node(&self) -> &Place {
        &self.cluster.node.place
    }

    /// Has the load balanced.
    fn program(&mut self, api: Option<&ApiServer>) {
        match self.way {
            Way::Direct => {}
            Way::Iptables => {
                let file = self.file("rules", &rules::iptables(self.services));
                self.node().netns().output("iptables-restore", &[&file]);
            }
            Way::Nftables => {
                for batch in rules::nftables(self.services) {
                    let file = self.file("rules", &batch);
                    self.node().netns().output("nft", &["-f", &file]);
                }
            }
            Way::Empty | Way::Headers | Way::FloorSocket | Way::FloorTc | Way::FloorXdp => {
                let floor = self.load_floor();
                self.floor = Some(floor.unwrap_or_else(|error| panic!("the floor: {error:#}")));
            }
            Way::Klb { hooks, routing } => {
                self.start_klb(hooks, routing, api.expect("klb asks an API server"));
            }
        }
    }

    fn start_klb(&mut self, hooks: Hooks, routing: &str, api: &ApiServer) {
        let api = self.node().netns().within(|| api.mirror());
        let mut agent = Agent::new(&self.cluster, hooks);
        agent.program = paths::klb();
        agent.kubeconfig = Some(api.kubeconfig(&self.cluster.scope().folder()));
        agent.flags = vec![
            format!("--routing={routing}"),
            "--map-services=262144".to_owned(),
        ];
        agent.spawn();
        self.agent = Some(agent);
        self.api = Some(api);
    }

    /// Waits until the load is balanced: an agent starts while other clusters are
    /// built.
    pub(super) fn await_ready(&mut self) {
        if let Some(agent) = &mut self.agent {
            agent.await_ready();
        }
    }

    /// The floor's programs, attached.
    fn load_floor(&self) -> anyhow::Result<Floor> {
        let mut floor = Floor::load()?;
        for service in self.services.all() {
            for port in &service.ports {
                let backends = service.backends(port);
                let cluster_ip = service.cluster_ip(port.number).into();
                floor.serve(port.protocol_number(), cluster_ip, &backends)?;
                if port.on_nodes.is_some() {
                    let node_port = service.node_port(port.target).into();
                    floor.serve(port.protocol_number(), node_port, &backends)?;
                }
            }
        }
        let node = self.node().netns();
        let pods = self.cluster.pods.iter().chain([&self.cluster.client]);
        let pods: Vec<_> = pods
            .map(|pod| (pod.host.addresses.v4, pod.device.clone()))
            .collect();
        for (address, device) in &pods {
            floor.lead((*address).into(), node.within(|| index_of(device)), true)?;
        }
        let uplink = node.within(|| index_of(UPLINK));
        floor.lead(Ipv4Addr::UNSPECIFIED.into(), uplink, false)?;
        match self.way {
            Way::FloorSocket => {
                floor.attach_connect(floor::CONNECT[0], self.cluster.cgroup().path())?;
            }
            Way::FloorXdp => node.within(|| floor.attach_xdp(floor::XDP_FIB, UPLINK))?,
            way => {
                let devices = pods.iter().map(|(_, device)| device.as_str());
                for device in devices.chain([UPLINK]) {
                    node.within(|| match way {
                        Way::Empty => floor.attach_tc_both(floor::TC_NOTHING, device),
                        Way::Headers => floor.attach_tc_both(floor::TC_READ, device),
                        _ => floor.attach_tc(floor::TC_PEER, device),
                    })?;
                }
            }
        }
        if matches!(self.way, Way::Empty | Way::Headers) {
            floor.attach_connect(floor::CONNECT_NOTHING[0], self.cluster.cgroup().path())?;
            node.within(|| floor.attach_xdp(floor::XDP_NOTHING, UPLINK))?;
        }
        Ok(floor)
    }

    /// A file with this text.
    fn file(&self, name: &str, text: &str) -> String {
        let path = self.cluster.scope().new_file(name);
        fs::write(&path, text).expect("a folder of our own");
        path.display().to_string()
    }

    /// Times requests of the client pod to the Service, or to its pods where
    /// nobody balances.
    pub(super) fn measure(&self, test: Test, time: Duration) -> Measured {
        let target = self.services.target();
        let to = match self.way {
            Way::Direct => Self::pods(test.port()),
            _ => vec![target.cluster_ip(test.port()).into()],
        };
        self.ask(&self.cluster.client.host.place, test, &to, time)
    }

    /// Times requests of the host outside to the `NodePort`.
    pub(super) fn measure_from_outside(&self, test: Test, time: Duration) -> Measured {
        let target = self.services.target();
        let to = match self.way {
            Way::Direct => Self::pods(test.port()),
            _ => vec![target.node_port(test.port()).into()],
        };
        self.ask(&self.cluster.outside.place, test, &to, time)
    }

    /// Times requests of the client pod to pods, whoever balances.
    pub(super) fn measure_direct(&self, test: Test, time: Duration) -> Measured {
        let to = Self::pods(test.port());
        self.ask(&self.cluster.client.host.place, test, &to, time)
    }

    /// Whether clients ask pods.
    pub(super) const fn is_direct(&self) -> bool {
        matches!(self.way, Way::Direct)
    }

    /// Whether XDP sends frames straight to pods that take them.
    pub(super) fn redirects_frames(&self) -> bool {
        match self.way {
            Way::Klb { hooks, .. } => hooks.xdp != "off",
            way => matches!(way, Way::FloorXdp),
        }
    }

    /// Where packets from outside go: to the `NodePort`, or to a pod.
    pub(super) fn packets_to(&self) -> SocketAddrV4 {
        let port = Test::Datagram.port();
        if self.is_direct() {
            return SocketAddrV4::new(Addresses::pod(PODS[0]).v4, port);
        }
        self.services.target().node_port(port)
    }

    fn pods(port: u16) -> Vec<SocketAddr> {
        let addresses = PODS.map(|number| Addresses::pod(number).v4);
        let sockets = addresses.map(|address| SocketAddrV4::new(address, port).into());
        sockets.into()
    }

    /// A round in which a request hung, so that not every server was asked, is measured
    /// again, and that is said.
    ///
    /// # Panics
    /// If a server answered that is none of the Service's, or one of them never does.
    fn ask(&self, place: &Place, test: Test, to: &[SocketAddr], time: Duration) -> Measured {
        const ATTEMPTS: usize = 3;
        let helper = Helper::new(traffic::helper());
        let wanted = if test == Test::RoundTrip {
            1
        } else {
            PODS.len()
        };
        for _ in 0..ATTEMPTS {
            let measured = helper.measure(place, test, to, time, CPU);
            let known = measured.servers.keys().all(|number| PODS.contains(number));
            assert!(known, "{}: {measured:?}", self.name);
            if measured.servers.len() == wanted {
                return measured;
            }
            progress(format_args!("once more: {}: {measured:?}", self.name));
        }
        panic!("{}: a server does not answer", self.name);
    }
}

/// The number of a device of the current network namespace.
///
/// # Panics
/// If there is none of that name.
pub(super) fn index_of(device: &str) -> u32 {
    let name = CString::new(device).expect("no zero in it");
    // SAFETY: the name ends with a zero and lives through the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0, "no device {device}");
    index
}

fn add_servers(cluster: &mut Cluster) -> Vec<Process> {
    let helper = Helper::new(traffic::helper());
    let mut servers = Vec::new();
    for number in PODS {
        let pod = cluster.unplugged_pod(&format!("pod-{number}"), number);
        cluster.plug(&pod);
        servers.push(helper.serve_measure(&pod.host.place, number, CPU));
        cluster.pods.push(pod);
    }
    for server in &mut servers {
        await_server(server);
    }
    servers
}
