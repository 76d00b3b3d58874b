//! The answer for a call at a socket, where nothing can be run.

use std::{collections::HashSet, net::SocketAddr};

use lb_common::{
    Hook, Reason,
    flow::{SCTP, UDP},
    reason::Effect,
    service::FRONTEND_DROP,
};

use super::{
    Scene, Target,
    choice::Caller,
    place::{Facts, Place},
    report::{Report, Rewrite},
    socket,
    verdict::{Case, Verdict},
    walk::{Exit, Step, effect_name},
};
use crate::{
    datapath::{features::Features, trial::Ends},
    netlink::Route,
};

impl Scene {
    pub(super) fn at_socket(&self, facts: &Facts, place: Place) -> anyhow::Result<Report> {
        let question = &self.question;
        if question.protocol == SCTP {
            let why = "the kernel has no hook for the calls of SCTP: its packets are translated at \
                devices, and those of the node's own processes not at all";
            return self.unseen(place, why.to_owned());
        }
        if !facts.sockets_are_served {
            let why = "no socket hook is attached (--socket-lb off, or no control group was \
                found), so the call goes on as it is; its packets may meet klb at a device";
            return self.unseen(place, why.to_owned());
        }
        let ends = question.ends(&HashSet::new());
        let tables = self.tables()?;
        let call = socket::Call {
            from: question.from.ip,
            is_of_node: self.source == Route::Here || question.from.ip.is_loopback(),
            to: question.to,
            protocol: question.protocol,
        };
        let served = tables.serve(call);
        let target = match (&served, tables.frontend(call)) {
            (Ok(served), _) => Some((served.key, served.entry, served.client)),
            (Err(_), Ok((key, entry))) => Some((key, entry, Some(call.from))),
            (Err(_), Err(_)) => None,
        };
        let caller = Caller {
            addr: call.from,
            is_inside: true,
            at_socket: true,
        };
        let target = target.map(|(key, entry, client)| self.target(key, entry, caller, client));
        let target = target.transpose()?;
        let mut report = self.begin(place, ends, "call", target.as_ref())?;
        let (reason, backend) = match (served, &target) {
            (Ok(_), Some(target)) => report.choose(target),
            (Ok(_), None) => (Reason::NotService, None),
            (Err(reason), _) => (reason, None),
        };
        report.notes.extend(notes(call, &tables, reason));
        report.steps.push(step(ends, reason, backend));
        report.verdict = Verdict::new(&Case {
            reason,
            at_socket: true,
            from: ends.src,
            to: ends.dst,
            protocol: question.protocol,
            policy: report.policy.as_ref(),
            backend,
            backend_of: &report.backend_of,
            exit: &Exit::Unasked,
            egress_missing: false,
        });
        Ok(report)
    }
}

/// The hook, as if it had run.
fn step(ends: Ends, reason: Reason, backend: Option<SocketAddr>) -> Step {
    let goes_on = matches!(reason.effect(), Effect::Pass | Effect::Translate);
    Step {
        hook: Hook::Socket.name(),
        device: None,
        run: false,
        reason: reason.name(),
        description: reason.description().trim_start(),
        effect: effect_name(reason.effect()),
        way: if goes_on { "on" } else { "dropped" },
        becomes: backend.map(|dst| Ends { dst, ..ends }),
    }
}

/// What is worth knowing besides.
fn notes(call: socket::Call, tables: &socket::Tables<'_>, reason: Reason) -> Vec<String> {
    let mut notes = vec![
        "evaluated from the tables, not run: the kernel runs no such program for a trial"
            .to_owned(),
    ];
    if !call.is_of_node && tables.pod(call.from).is_none() {
        notes.push(format!(
            "{} is neither the node nor a pod whose network namespace klb knows",
            call.from
        ));
    }
    if reason == Reason::NoSuchPort && call.protocol == UDP && !call.is_of_node {
        notes.push(
            "connect() succeeds, for it sends nothing; what the socket sends is refused".to_owned(),
        );
    }
    let is_refused = matches!(reason.effect(), Effect::Refuse | Effect::Answer);
    if is_refused && Features::probe().set_retval == Some(false) {
        notes.push(
            "this kernel lets no hook choose an error (it came with 5.18): the call goes on, and \
             its packets are refused where they leave the pod"
                .to_owned(),
        );
    }
    notes
}

impl Report {
    /// What the hook chooses, and which backend, if that is certain.
    fn choose(&mut self, target: &Target) -> (Reason, Option<SocketAddr>) {
        let ranges = target.policy.source_ranges.as_ref();
        if ranges.is_some_and(|ranges| !ranges.allowed) {
            return (Reason::SourceRange, None);
        }
        let (certain, by) = match (&target.affinity, &target.candidates[..]) {
            (_, []) if target.entry.flags & FRONTEND_DROP != 0 => {
                return (Reason::NoLocalBackend, None);
            }
            (_, []) => return (Reason::NoBackend, None),
            (_, [only]) => (Some(only.addr()), "only"),
            (Some(kept), _) if kept.in_force => (kept.backend, "affinity"),
            _ => (None, "random"),
        };
        if let Some(backend) = certain {
            self.take(backend, by);
            let was = Ends {
                src: self.packet.from,
                dst: self.packet.to,
            };
            let becomes = Ends {
                dst: backend,
                ..was
            };
            self.rewrite = Rewrite::new(was, becomes);
        }
        (Reason::NewFlow, certain)
    }
}

#[cfg(test)]
mod tests {
    use lb_common::flow::TCP;

    use super::*;

    #[test]
    fn a_step_that_was_not_run_says_so() {
        let addr = |text: &str| text.parse().expect("an address");
        let ends = Ends {
            src: addr("10.244.0.9:40000"),
            dst: addr("10.96.0.10:80"),
        };
        let backend = addr("10.244.0.5:3000");
        let went_on = step(ends, Reason::NewFlow, Some(backend));
        assert_eq!((went_on.run, went_on.way), (false, "on"));
        assert_eq!(went_on.becomes.map(|ends| ends.dst), Some(backend));
        let refused = step(ends, Reason::NoBackend, None);
        assert_eq!((refused.way, refused.effect), ("dropped", "answer"));
    }

    #[test]
    fn whom_klb_does_not_know_is_told_so() {
        let config = lb_common::node::Config::default();
        let (services, pods) = Default::default();
        let tables = socket::Tables {
            services: &services,
            config: &config,
            cluster_network: None,
            pods: &pods,
            node: None,
        };
        let call = |is_of_node| socket::Call {
            from: "10.244.0.77".parse().expect("an address"),
            is_of_node,
            to: "10.96.0.10:80".parse().expect("an address"),
            protocol: TCP,
        };
        let notes = |is_of_node| notes(call(is_of_node), &tables, Reason::NotService);
        assert_eq!((notes(true).len(), notes(false).len()), (1, 2));
    }
}
