//! `klb explain`: what would happen to a packet now, and why.
//!
//! The programs are run on it as they are (`datapath/trial.rs`); what they went by
//! is read from the same maps and told beside it.

mod call;
mod choice;
mod device;
mod frame;
mod frontend;
mod place;
mod question;
mod report;
mod socket;
mod verdict;
mod walk;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
};

use anyhow::Context as _;
use ipnet::IpNet;
use lb_common::{
    node::{Config, Device, Netns},
    service::ServiceEntry,
};

use self::{
    choice::{Caller, Candidate, Kept, Policy, candidates},
    frame::Kind,
    frontend::{Frontend, Services, nearest},
    place::{Facts, Place},
    question::Question,
    report::{Backend, Packet, Report},
    verdict::Verdict,
};
use super::{
    Names, PortId, WrongUsage, open_maps, open_pins, print, protocol_name, require_agents_namespace,
};
use crate::{
    args::ExplainArgs,
    datapath::{
        FrontendKey, MapError, Maps as _,
        inspect::{self, DeviceHooks},
        kernel::{Client, DeviceTable, KernelMaps, NetnsTable},
        pins::Pins,
        trial::Ends,
    },
    netlink::{Netlink, Route},
};

/// Runs `klb explain`.
pub fn run(args: &ExplainArgs) -> anyhow::Result<()> {
    let question = Question::new(args)?;
    let pins = open_pins(&args.paths)?;
    let scene = Scene::read(&pins, question)?;
    let facts = scene.facts(&pins)?;
    let place = facts.place(args.at.as_deref())?;
    let report = scene.report(&pins, &facts, place)?;
    print(args.output, &report, |report, _look| report.page())
}

/// Whether there is an answer to what is asked, before anything is done for it.
///
/// # Errors
///
/// If there is no such packet.
pub(crate) fn check(args: &ExplainArgs) -> Result<(), WrongUsage> {
    Question::new(args).map(|_question| ())
}

/// What the question is about, and all that the maps say.
struct Scene {
    question: Question,
    maps: KernelMaps,
    services: Services,
    names: Names,
    ranges: BTreeSet<(u32, IpNet)>,
    config: Config,
    /// By index; 0 is the node.
    devices: BTreeMap<u32, Device>,
    pods: BTreeMap<[u32; 2], Netns>,
    netlink: Netlink,
    /// Where the source is, seen from the node.
    source: Route,
}

/// The frontend that a packet is for, and who may get it.
struct Target {
    key: FrontendKey,
    entry: ServiceEntry,
    policy: Policy,
    candidates: Vec<Candidate>,
    client: Option<Client>,
    affinity: Option<Kept>,
}

impl Scene {
    fn read(pins: &Pins, question: Question) -> anyhow::Result<Self> {
        let maps = open_maps(pins)?;
        let config = maps.config()?;
        require_agents_namespace(&config)?;
        let netlink = Netlink::open().context("asking the kernel for devices")?;
        let source = netlink.route(question.from.ip, None);
        Ok(Self {
            services: maps.services()?,
            names: Names::read(&maps)?,
            ranges: maps.ranges()?,
            config,
            devices: DeviceTable::open(pins)?.read()?,
            pods: NetnsTable::open(pins)?.read()?,
            // What the kernel cannot answer leads nowhere.
            source: source.unwrap_or(Route::Nowhere),
            netlink,
            maps,
            question,
        })
    }

    fn facts(&self, pins: &Pins) -> anyhow::Result<Facts> {
        Ok(Facts {
            route: self.source,
            is_pod: self.tables()?.pod(self.question.from.ip).is_some(),
            sockets_are_served: !inspect::sockets(pins).is_empty(),
            served: inspect::devices(pins)?,
            links: self.netlink.links()?,
            masters: self.netlink.masters()?,
        })
    }

    fn tables(&self) -> Result<socket::Tables<'_>, MapError> {
        Ok(socket::Tables {
            services: &self.services,
            config: &self.config,
            cluster_network: self.maps.cluster_network(self.question.family())?,
            pods: &self.pods,
            node: self.devices.get(&0),
        })
    }

    fn report(&self, pins: &Pins, facts: &Facts, place: Place) -> anyhow::Result<Report> {
        if place.is_socket() {
            return self.at_socket(facts, place);
        }
        if let Some(hooks) = place.hooks.clone().filter(DeviceHooks::is_ingress) {
            return self.at_device(pins, facts, place, &hooks);
        }
        let why = format!(
            "klb has no program where the packet comes in ({}), so it goes on as it came, \
             whatever Services there are",
            facts.devices()
        );
        self.unseen(place, why)
    }

    /// What is known without a program.
    fn begin(
        &self,
        place: Place,
        ends: Ends,
        kind: &'static str,
        target: Option<&Target>,
    ) -> anyhow::Result<Report> {
        let question = &self.question;
        let nearest = match target {
            Some(_) => Vec::new(),
            None => nearest(&self.maps, &self.services, &self.names, question.frontend())?,
        };
        Ok(Report {
            packet: Packet {
                protocol: protocol_name(question.protocol),
                kind,
                from: ends.src,
                to: ends.dst,
                port_assumed: question.from.port.is_none(),
            },
            at: place,
            frontend: target.map(|target| Frontend::new(target.key, &target.entry, &self.names)),
            nearest,
            backend_of: self.backend_of()?,
            policy: target.map(|target| target.policy.clone()),
            affinity: target.and_then(|target| target.affinity.clone()),
            candidates: target.map_or_else(Vec::new, |target| target.candidates.clone()),
            flow: None,
            steps: Vec::new(),
            backend: None,
            rewrite: None,
            masquerade: None,
            verdict: Verdict::unseen(String::new()),
            notes: Vec::new(),
        })
    }

    /// The Service ports that have the destination as a backend.
    fn backend_of(&self) -> Result<Vec<PortId>, MapError> {
        let question = &self.question;
        let members = self.maps.members()?.into_values();
        let services: BTreeSet<_> = members
            .filter(|member| member.addr == question.to)
            .map(|member| member.service)
            .filter(|service| {
                let meta = self.names.metas.get(service);
                meta.is_none_or(|meta| meta.protocol == question.protocol)
            })
            .collect();
        let ports = services.into_iter();
        Ok(ports.map(|service| self.names.port(service)).collect())
    }

    fn unseen(&self, place: Place, why: String) -> anyhow::Result<Report> {
        let ends = self.question.ends(&HashSet::new());
        let kind = Kind::Opening.name(self.question.protocol);
        let target = self.target_at_device(place.index)?;
        let mut report = self.begin(place, ends, kind, target.as_ref())?;
        report.verdict = Verdict::unseen(why);
        Ok(report)
    }

    /// `client` is the address under which a backend is kept.
    fn target(
        &self,
        key: FrontendKey,
        entry: ServiceEntry,
        caller: Caller,
        client: Option<IpAddr>,
    ) -> Result<Target, MapError> {
        let candidates = candidates(&self.maps, key, &entry, caller)?;
        let clients = if entry.affinity > 0 {
            self.maps.clients()?
        } else {
            Vec::new()
        };
        let mut clients = clients.into_iter();
        let kept = clients.find(|row| Some(row.client) == client && row.service == entry.service);
        let policy = Policy::new(
            &entry,
            client.unwrap_or(caller.addr),
            caller.is_inside,
            &self.ranges,
        );
        Ok(Target {
            key,
            policy,
            affinity: match client {
                Some(_) => Kept::new(&entry, kept.as_ref(), &candidates),
                None => Kept::unknown(&entry),
            },
            client: kept,
            candidates,
            entry,
        })
    }
}

impl Report {
    /// It gets this backend.
    fn take(&mut self, backend: SocketAddr, by: &'static str) {
        let mut candidates = self.candidates.iter();
        let own = candidates.find(|candidate| candidate.addr() == backend);
        self.backend = Some(Backend {
            address: backend.ip(),
            port: backend.port(),
            local: own.map(|own| own.local),
            by,
            share: own.map(|own| own.share),
        });
    }
}
