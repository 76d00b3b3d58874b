//! `klb explain` looks, and touches nothing that is live.

use std::{collections::BTreeMap, fs};

use lb_common::{Reason, names};
use lb_tests::{
    agent::{Agent, Hooks, raw_dump},
    topology::{Family, UPLINK},
    traffic::Protocol,
    world::Frontend,
};

use crate::{explain::flag, policies::world_with};

/// What the neighbours of a network tell each other now and then is counted too.
const CHATTER: [Reason; 4] = [
    Reason::NotIp,
    Reason::OtherProtocol,
    Reason::NotService,
    // A report of listeners has an option.
    Reason::LeftToTc,
];

/// All that is pinned: names, the contents of maps but for counters, and what was
/// counted.
#[derive(Debug, PartialEq, Eq)]
struct Pinned {
    names: Vec<String>,
    maps: BTreeMap<&'static str, Vec<String>>,
    counters: BTreeMap<(String, String), u64>,
}

impl Pinned {
    fn read(agent: &Agent) -> Self {
        let folder = fs::read_dir(agent.pins()).expect("pins");
        let names = folder.map(|entry| entry.expect("readable").file_name());
        let mut names: Vec<_> = names
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        names.sort();
        let maps = names::MAPS.into_iter().filter(|map| {
            // Those of each CPU: memory of programs while they run, ways that the
            // kernel has told, and counters.
            ![
                names::COUNTERS,
                names::TRAFFIC,
                names::CREDIT,
                names::SCRATCH,
                names::ANSWERS,
                names::EARLY,
                names::ROUTES4,
                names::ROUTES6,
                names::TRACING,
                // A ring, which cannot be looked up; nothing is in it while
                // nobody listens.
                names::EVENTS,
            ]
            .contains(map)
        });
        let counters = agent.status().counters.into_iter();
        Self {
            maps: maps
                .map(|map| (map, raw_dump(&agent.pins().join(map))))
                .collect(),
            counters: counters
                .filter(|counter| {
                    let is_of = |reason: &Reason| counter.reason == reason.name();
                    !CHATTER.iter().any(is_of)
                })
                .map(|counter| ((counter.hook, counter.reason), counter.count))
                .collect(),
            names,
        }
    }
}

#[test]
fn all_that_is_pinned_stays_as_it_is() {
    let world = world_with(Hooks::ALL, "  sessionAffinity: ClientIP\n");
    let (outside, pod) = (&world.cluster.outside, &world.cluster.client);
    let mut questions = Vec::new();
    for family in Family::ALL {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let cluster_ip = world.request(Frontend::ClusterIp, family, protocol);
            let node_port = world
                .request(Frontend::NodePort, family, protocol)
                .from_port(42_800);
            // A flow, an affinity and a socket that are there already.
            outside.ask(&node_port).expect("an answer");
            pod.host.ask(&cluster_ip).expect("an answer");
            let mut nowhere = cluster_ip.to;
            nowhere.set_port(81);
            for (client, port, at) in [
                (outside, 42_800, UPLINK),
                (outside, 42_801, UPLINK),
                (&pod.host, 42_802, &*pod.device),
                (&pod.host, 42_803, "socket"),
            ] {
                let from = client.addresses.port(family, port).to_string();
                for to in [node_port.to, cluster_ip.to, nowhere] {
                    questions.push([
                        from.clone(),
                        to.to_string(),
                        flag(protocol).into(),
                        at.into(),
                    ]);
                }
            }
        }
    }
    let before = Pinned::read(&world.agent);
    let flows = &before.maps[names::YOUNG4];
    assert!(!flows.is_empty() && !before.maps[names::AFFINITY4].is_empty());
    assert!(!world.agent.status().new_flows().is_empty());
    for [from, to, proto, at] in &questions {
        world
            .agent
            .explain(&["--from", from, "--to", to, "--proto", proto, "--at", at]);
    }
    assert_eq!(Pinned::read(&world.agent), before);
}
