//! Two nodes with klb on each, and a router between them: what enters by one
//! for a pod of the other goes there, and comes back the way it went.

use std::{collections::BTreeSet, net::IpAddr};

use lb_tests::{
    agent::{Agent, Hooks},
    manifests::NODE,
    topology::{Addresses, Family, Host, SecondNode},
    traffic::{Protocol, Request},
    world::{ENDPOINTS_FILE, Frontend, SERVICE_FILE, World, endpoints},
};

/// Name and number of a pod of the second node.
pub(crate) const FAR: (&str, u8) = ("far-1", 130);
/// Of another there, which is never an endpoint.
const FAR_CLIENT: (&str, u8) = ("far-2", 131);
/// Of a pod of the first.
pub(crate) const NEAR: (&str, u8) = ("pod-1", 5);

pub(crate) struct TwoNodes {
    // Before the nodes: they clean up in the nodes' namespaces.
    agent: Agent,
    pub(crate) world: World,
    pub(crate) second: SecondNode,
}

impl TwoNodes {
    /// With one endpoint behind the Service.
    pub(crate) fn new(hooks: Hooks, endpoint: (&str, u8)) -> Self {
        Self::with_flags(hooks, endpoint, &[])
    }

    /// With more flags for both agents.
    pub(crate) fn with_flags(hooks: Hooks, endpoint: (&str, u8), flags: &[&str]) -> Self {
        let mut world = crate::stopped_world(hooks);
        world
            .agent
            .flags
            .extend(flags.iter().map(|&flag| flag.to_owned()));
        world.agent.start();
        let second = world.cluster.second_node(&[FAR, FAR_CLIENT]);
        let mut agent = Agent::second(&second, hooks);
        agent.flags.clone_from(&world.agent.flags);
        let mut manifest = endpoints(&world.service, &[endpoint]).to_string();
        if endpoint == FAR {
            manifest = manifest.replace(&format!("nodeName: {NODE}"), "nodeName: node-2");
        }
        agent
            .manifests
            .put(SERVICE_FILE, &world.service.to_string());
        for folder in [&agent.manifests, &world.agent.manifests] {
            folder.put(ENDPOINTS_FILE, &manifest);
        }
        agent.start();
        for agent in [&agent, &world.agent] {
            agent.await_services("one endpoint", |services| {
                let frontends = services.iter().flat_map(|service| &service.frontends);
                let mut addresses = frontends.flat_map(|frontend| &frontend.backends);
                addresses.all(|backend| {
                    Family::ALL
                        .map(|family| Addresses::pod(endpoint.1).ip(family))
                        .contains(&backend.address)
                })
            });
        }
        Self {
            agent,
            world,
            second,
        }
    }

    /// Of both nodes.
    pub(crate) fn agents(&self) -> [&Agent; 2] {
        [&self.world.agent, &self.agent]
    }

    /// The pod of the second node that is never an endpoint.
    pub(crate) fn far_client(&self) -> &Host {
        &self.second.pods[1].host
    }

    /// Asks for the Service, and returns who the endpoint saw.
    pub(crate) fn ask(&self, client: &Host, request: &Request, endpoint: &str) -> IpAddr {
        let answer = client.ask(request).unwrap_or_else(|failure| {
            let status = self.agent.status();
            panic!(
                "{request:?}: {failure:?}; the second node: {:?}",
                status.counters
            )
        });
        assert_eq!(answer.name, endpoint, "{request:?}");
        answer.seen.ip()
    }
}

/// Every family and protocol, with more than a packet where that is possible.
fn requests(world: &World, kind: Frontend, node: Addresses) -> Vec<(Family, Request)> {
    let both = |family| {
        [
            (family, Protocol::Tcp, 20_000),
            (family, Protocol::Udp, 1300),
        ]
    };
    let all = Family::ALL.into_iter().flat_map(both);
    all.map(|(family, protocol, size)| {
        let mut to = world.frontend(kind, family, protocol);
        if kind == Frontend::NodePort {
            to.set_ip(node.ip(family));
        }
        (family, Request::new(protocol, to).size(size))
    })
    .collect()
}

const ALL_HOOKS: [Hooks; 3] = [Hooks::ALL, Hooks::TC, Hooks::CLSACT];

#[test]
fn a_node_port_leads_to_a_pod_of_the_other_node_and_back() {
    for hooks in ALL_HOOKS {
        let nodes = TwoNodes::new(hooks, FAR);
        let world = &nodes.world;
        let outside = &world.cluster.outside;
        for (family, request) in requests(world, Frontend::NodePort, Addresses::NODE) {
            let seen = nodes.ask(outside, &request, FAR.0);
            assert_eq!(seen, Addresses::NODE.ip(family), "{request:?}");
        }
        // Where the pod is, it sees who asks.
        for (family, request) in requests(world, Frontend::NodePort, Addresses::NODE_2) {
            let seen = nodes.ask(outside, &request, FAR.0);
            assert_eq!(seen, Addresses::OUTSIDE_2.ip(family), "{request:?}");
        }
    }
}

#[test]
fn the_second_node_leads_to_the_first() {
    let nodes = TwoNodes::new(Hooks::ALL, NEAR);
    let world = &nodes.world;
    for (family, request) in requests(world, Frontend::NodePort, Addresses::NODE_2) {
        let seen = nodes.ask(&world.cluster.outside, &request, NEAR.0);
        assert_eq!(seen, Addresses::NODE_2.ip(family), "{request:?}");
    }
    let far = nodes.far_client();
    for client in [far.clone(), far.without_cgroup()] {
        for (family, request) in requests(world, Frontend::ClusterIp, Addresses::NODE) {
            let seen = nodes.ask(&client, &request, NEAR.0);
            assert_eq!(seen, far.addresses.ip(family), "{request:?}");
        }
    }
}

#[test]
fn a_pod_reaches_a_pod_of_the_other_node_and_is_seen() {
    for hooks in ALL_HOOKS {
        let nodes = TwoNodes::new(hooks, FAR);
        let pod = &nodes.world.cluster.client.host;
        for client in [pod.clone(), pod.without_cgroup()] {
            for (family, request) in requests(&nodes.world, Frontend::ClusterIp, Addresses::NODE) {
                let seen = nodes.ask(&client, &request, FAR.0);
                assert_eq!(seen, pod.addresses.ip(family), "{request:?}");
            }
        }
    }
}

/// Makes a pod of each node an endpoint, and the Service one with a Maglev
/// table.
pub(crate) fn spread_by_maglev(nodes: &TwoNodes) {
    let service = nodes.world.service.to_string();
    let annotated = service.replace(
        "metadata:\n",
        "metadata:\n  annotations: {klb/algorithm: maglev}\n",
    );
    let manifest = endpoints(&nodes.world.service, &[NEAR, FAR]).to_string();
    // Of the pods the last is on the other node.
    let (near, far) = manifest.split_once("---\n").expect("two documents");
    let documents = [near, far].map(|document| {
        let (before, after) = document.rsplit_once(NODE).expect("two endpoints");
        format!("{before}node-2{after}")
    });
    let manifest = documents.join("---\n");
    for agent in nodes.agents() {
        agent.manifests.put(SERVICE_FILE, &annotated);
        agent.manifests.put(ENDPOINTS_FILE, &manifest);
    }
    for agent in nodes.agents() {
        agent.await_services("both endpoints", |services| {
            let mut frontends = services.iter().flat_map(|service| &service.frontends);
            frontends.all(|frontend| {
                let backends = frontend.backends.iter().map(|backend| backend.address);
                backends.collect::<BTreeSet<_>>().len() == 2
            })
        });
    }
}

/// A router that spreads packets over nodes may send those of one connection to
/// another node any time.
#[test]
fn a_client_gets_the_same_pod_by_maglev_on_either_node() {
    for hooks in [Hooks::TC, Hooks::XDP] {
        let nodes = TwoNodes::new(hooks, NEAR);
        spread_by_maglev(&nodes);
        let outside = &nodes.world.cluster.outside;
        for family in Family::ALL {
            // To both nodes from one address.
            let (node, via) = (Addresses::NODE_2.ip(family), Addresses::OUTSIDE.ip(family));
            let router = outside.place.netns();
            router.ip(&format!("route add {node} dev eth1 src {via}\n"));
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let mut pods = BTreeSet::new();
                for port in 42_000..42_020 {
                    let [here, there] = [Addresses::NODE, Addresses::NODE_2].map(|node| {
                        let mut to = nodes.world.frontend(Frontend::NodePort, family, protocol);
                        to.set_ip(node.ip(family));
                        let request = Request::new(protocol, to).from_port(port);
                        outside.ask(&request).expect("an answer").name
                    });
                    assert_eq!(here, there, "{hooks:?} {family} {protocol:?} from {port}");
                    pods.insert(here);
                }
                assert_eq!(pods.len(), 2, "{hooks:?} {family} {protocol:?}: {pods:?}");
            }
        }
    }
}
