//! The answer for a packet that comes in by a device: the programs are run.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::bail;
use lb_common::{
    Reason,
    flow::{FORWARD, SCTP, State, UNMASQUERADE},
    node::DEVICE_POD,
    reason::Effect,
};

use super::{
    Scene, Target,
    choice::{Caller, Candidate},
    frame::{self, Kind},
    place::{Facts, Place},
    report::{Flow, Masquerade, Report, Rewrite},
    verdict::{Case, Verdict},
    walk::{Exit, Ground, Walk},
};
use crate::{
    datapath::{
        MapError, Maps as _,
        inspect::DeviceHooks,
        pins::Pins,
        trial::{Ends, Entry, LiveFlows, Trial},
    },
    privileges,
};

impl Scene {
    pub(super) fn at_device(
        &self,
        pins: &Pins,
        facts: &Facts,
        place: Place,
        hooks: &DeviceHooks,
    ) -> anyhow::Result<Report> {
        let missing = privileges::missing_for_programs();
        if let [first, ..] = missing[..] {
            bail!(
                "the programs cannot be tried without {first}: run klb as root, or with the \
                 capabilities that the agent has"
            );
        }
        let question = &self.question;
        let protocol = question.protocol;
        let mut flows = LiveFlows::read(pins, question.family(), self.config.timeouts)?;
        let in_use = flows.ports_in_use(|entry| {
            entry.key.src.ip() == question.from.ip
                && entry.key.dst == question.to
                && entry.protocol == protocol
        });
        let ends = question.ends(&in_use);
        let found = flows.find(ends, protocol);
        let current = found.filter(goes_on);
        let kind = if current.is_some() {
            Kind::Later
        } else {
            Kind::Opening
        };
        let target = self.target_at_device(place.index)?;
        let mut report = self.begin(place, ends, kind.name(protocol), target.as_ref())?;
        let backends: BTreeSet<_> = report.candidates.iter().map(Candidate::addr).collect();
        // What a new flow has to get along with: those of this client with the
        // same backends, and the ports that are taken towards them.
        flows.keep_related(ends, protocol, |entry| {
            backends.contains(&entry.key.src)
                && (entry.direction == UNMASQUERADE || entry.key.dst.ip() == ends.src.ip())
        });
        let mut trial = Trial::new(pins, &flows)?;
        if let Some(client) = target.as_ref().and_then(|target| target.client.as_ref()) {
            trial.keep(client)?;
        }
        let walk = Ground {
            trial: &mut trial,
            netlink: &self.netlink,
            devices: &facts.served,
            place: hooks,
            is_masqueraded: current.is_some_and(|entry| entry.is_masqueraded),
        }
        .walk(ends, &frame::build(ends, protocol, kind))?;
        match (current, found) {
            (Some(entry), _) => report.flow = Some(self.flow(&entry)?),
            (None, Some(over)) => report.notes.push(format!(
                "an earlier flow from this port is over: {}, idle for {}s",
                over.state.name(),
                over.idle
            )),
            (None, None) => {}
        }
        self.tell(&mut report, ends, walk);
        let is_from_pod = self.is_inside(Some(hooks.index)) && facts.is_pod;
        if is_from_pod && facts.sockets_are_served && target.is_some() && protocol != SCTP {
            report.notes.push(
                "what a process of this pod calls is translated at its socket before (--at socket)"
                    .to_owned(),
            );
        }
        Ok(report)
    }

    /// The frontend that a packet is for where it comes in by a device.
    pub(super) fn target_at_device(&self, device: Option<u32>) -> Result<Option<Target>, MapError> {
        let key = self.question.frontend();
        // A packet with such a receiver is a lie, and no program believes it.
        let entry = self.services.get(&key);
        let Some(entry) = entry.filter(|_| !key.addr.is_loopback()) else {
            return Ok(None);
        };
        let caller = Caller {
            addr: self.question.from.ip,
            is_inside: self.is_inside(device),
            at_socket: false,
        };
        self.target(key, *entry, caller, Some(caller.addr))
            .map(Some)
    }

    /// Whether a pod is behind the device.
    fn is_inside(&self, device: Option<u32>) -> bool {
        let device = device.and_then(|device| self.devices.get(&device));
        device.is_some_and(|device| device.flags & DEVICE_POD != 0)
    }

    /// Tells what happened on the walk.
    fn tell(&self, report: &mut Report, ends: Ends, walk: Walk) {
        let is_forwarded = walk.reason.effect() == Effect::Translate;
        let backend = walk.came.filter(|_| is_forwarded).map(|came| came.dst);
        if let Some(backend) = backend {
            let flow = report.flow.as_ref();
            let is_of_flow = flow.is_some_and(|flow| flow.backend == backend)
                && !matches!(walk.reason, Reason::NewFlow | Reason::NewMasqueradedFlow);
            let kept = report.affinity.as_ref();
            let is_kept = kept.is_some_and(|kept| kept.in_force && kept.backend == Some(backend));
            let by = if is_of_flow {
                "flow"
            } else if report.candidates.len() == 1 {
                "only"
            } else if is_kept {
                "affinity"
            } else {
                let policy = report.policy.as_ref();
                policy.map_or("random", |policy| policy.algorithm)
            };
            report.take(backend, by);
        }
        if is_forwarded && let Some(left) = walk.left {
            report.rewrite = Rewrite::new(ends, left);
            report.masquerade = self.masquerade(ends, left, &walk.exit);
            if report.masquerade.is_none() && left.src != ends.src {
                report.notes.push(format!(
                    "the client's port is taken towards this backend, by another connection: it \
                     becomes {}",
                    left.src.port()
                ));
            }
        }
        report.verdict = Verdict::new(&Case {
            reason: walk.reason,
            at_socket: false,
            from: ends.src,
            to: ends.dst,
            protocol: self.question.protocol,
            policy: report.policy.as_ref(),
            backend,
            backend_of: &report.backend_of,
            exit: &walk.exit,
            egress_missing: walk.egress_missing,
        });
        report.steps = walk.steps;
        report.notes.extend(walk.notes);
    }

    fn flow(&self, entry: &Entry) -> Result<Flow, MapError> {
        let generations = self.maps.backends()?;
        Ok(Flow {
            state: entry.state.name(),
            idle_seconds: entry.idle,
            becomes: entry.becomes,
            backend: if entry.direction == FORWARD {
                entry.becomes.dst
            } else {
                entry.key.src
            },
            backend_lives: generations.get(&entry.life.id) == Some(&entry.life.generation),
        })
    }

    fn masquerade(&self, ends: Ends, left: Ends, exit: &Exit) -> Option<Masquerade> {
        if left.src.ip() == ends.src.ip() {
            return None;
        }
        let address = left.src.ip();
        let need = if left.dst.ip() == ends.src.ip() {
            "the client is the backend itself, and would not send the answer to anybody else"
        } else {
            "the backend is on another node, and must answer through this one"
        };
        let whose = match exit {
            Exit::By(index, name) if self.has_address(*index, address) => {
                format!("the address of {name}, by which it leaves")
            }
            _ => "an address of the node's own".to_owned(),
        };
        Some(Masquerade {
            address,
            port: left.src.port(),
            why: format!("{need}; {whose}"),
        })
    }

    /// Whether the programs know the address as that of a device.
    fn has_address(&self, index: u32, address: IpAddr) -> bool {
        let device = self.devices.get(&index);
        device.is_some_and(|device| match address {
            IpAddr::V4(_) => IpAddr::from(device.addr4) == address,
            IpAddr::V6(_) => IpAddr::from(device.addr6) == address,
        })
    }
}

/// Whether a flow lives, and the next packet from its port is of it: who has
/// closed a connection opens another.
fn goes_on(entry: &Entry) -> bool {
    !entry.is_over && !matches!(entry.state, State::Closed | State::Reset)
}
