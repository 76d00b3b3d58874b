//! What becomes of the packet, in plain words.

use std::net::SocketAddr;

use lb_common::{Reason, flow::UDP, reason::Effect};
use serde::Serialize;

use super::{choice::Policy, walk::Exit};
use crate::commands::{PortId, protocol_name};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Verdict {
    /// `forwarded`, `refused`, `dropped`, `untouched` or `unseen`.
    pub(super) outcome: &'static str,
    /// As the counters have it; `null` if no program sees the packet.
    pub(super) reason: Option<&'static str>,
    pub(super) explanation: String,
}

/// All that the words depend on.
#[derive(Debug)]
pub(super) struct Case<'a> {
    pub(super) reason: Reason,
    pub(super) at_socket: bool,
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) protocol: u8,
    pub(super) policy: Option<&'a Policy>,
    /// The backend that it is sent to.
    pub(super) backend: Option<SocketAddr>,
    /// Those that have the address as a backend's.
    pub(super) backend_of: &'a [PortId],
    pub(super) exit: &'a Exit,
    pub(super) egress_missing: bool,
}

impl Verdict {
    /// No program of klb's is there.
    pub(super) fn unseen(explanation: String) -> Self {
        Self {
            outcome: "unseen",
            reason: None,
            explanation,
        }
    }

    pub(super) fn new(case: &Case<'_>) -> Self {
        let outcome = match (case.reason.effect(), case.at_socket) {
            (Effect::Translate, _) => "forwarded",
            (Effect::Answer, _) | (Effect::Refuse, true) => "refused",
            (Effect::Refuse, false) => "dropped",
            (Effect::Pass | Effect::Keep, _) => "untouched",
        };
        Self {
            outcome,
            reason: Some(case.reason.name()),
            explanation: case.words(),
        }
    }
}

impl Case<'_> {
    fn words(&self) -> String {
        match self.reason {
            Reason::NotService => self.no_frontend(),
            Reason::NoBackend => {
                format!("no backend of the Service serves: {}", self.how_refused())
            }
            Reason::NoSuchPort => format!(
                "{} is a ClusterIP, and no Service has port {}/{} there: {}",
                self.to.ip(),
                self.to.port(),
                protocol_name(self.protocol),
                self.how_refused()
            ),
            Reason::NoLocalBackend => {
                let field = self
                    .policy
                    .map_or("the traffic policy", |policy| policy.field);
                let end = if self.at_socket {
                    self.how_refused()
                } else {
                    "dropped without an answer, for a load balancer to try another node".to_owned()
                };
                format!("{field} is Local, and the Service's backends are on other nodes: {end}")
            }
            Reason::SourceRange => {
                let from = self.from.ip();
                let end = if self.at_socket {
                    self.how_refused()
                } else {
                    "dropped without an answer".to_owned()
                };
                format!("{from} is in none of the Service's loadBalancerSourceRanges: {end}")
            }
            Reason::SocketNotServed => "calls from there are not translated at the socket; \
                their packets are, at the device"
                .to_owned(),
            reason if reason.effect() == Effect::Translate => self.forwarded(),
            reason => reason.description().trim_start().to_owned(),
        }
    }

    fn no_frontend(&self) -> String {
        let to = format!("{}/{}", self.to, protocol_name(self.protocol));
        match self.backend_of {
            [] => format!("no Service is at {to}: it is left to the node as it came"),
            [service, ..] => format!(
                "{to} is a backend of {service}, and not a Service: it is asked directly, and klb \
                 leaves that alone"
            ),
        }
    }

    /// What a client is told.
    fn how_refused(&self) -> String {
        match (self.at_socket, self.protocol) {
            (true, UDP) => "the call fails with ECONNREFUSED".to_owned(),
            (true, _) => "connect() fails with ECONNREFUSED".to_owned(),
            (false, _) => "answered with ICMP \"port unreachable\", which the client sees as \
                 \"connection refused\""
                .to_owned(),
        }
    }

    fn forwarded(&self) -> String {
        let backend = self.backend.map_or_else(
            || "one of the candidates, by their odds".to_owned(),
            |backend| backend.to_string(),
        );
        if self.at_socket {
            return format!("the socket is connected to {backend}, and shown the Service");
        }
        let sent = format!("sent to {backend}");
        if self.egress_missing {
            return format!(
                "{sent}, but with the client's own address, for klb is not where it leaves the \
                 node: the answer may not come back this way"
            );
        }
        match self.exit {
            Exit::By(_, device) => format!("{sent}, out of {device}"),
            Exit::Here => format!("{sent}, on the node itself"),
            Exit::Nowhere => format!(
                "it would be sent to {backend}, but the node has no route there: the client is \
                 told so, or nothing"
            ),
            Exit::Sent => format!("{sent}, past the node's stack"),
            Exit::Unasked => sent,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(reason: Reason, at_socket: bool, exit: &Exit) -> Verdict {
        let addr = |text: &str| text.parse().expect("an address");
        Verdict::new(&Case {
            reason,
            at_socket,
            from: addr("192.0.2.9:40000"),
            to: addr("10.96.0.10:81"),
            protocol: lb_common::flow::TCP,
            policy: None,
            backend: (reason.effect() == Effect::Translate).then(|| addr("10.244.0.5:3000")),
            backend_of: &[],
            exit,
            egress_missing: false,
        })
    }

    #[test]
    fn every_reason_has_a_verdict_and_a_sentence() {
        for reason in Reason::ALL {
            for at_socket in [false, true] {
                let verdict = verdict(*reason, at_socket, &Exit::Unasked);
                let text = &verdict.explanation;
                assert!(
                    !text.is_empty() && !text.starts_with(' '),
                    "{reason:?}: {text}"
                );
                assert_eq!(verdict.reason, Some(reason.name()));
            }
        }
    }

    #[test]
    fn what_a_client_notices_depends_on_where_it_asks() {
        for (reason, at_socket, name, part) in [
            (
                Reason::NewFlow,
                false,
                "forwarded",
                "sent to 10.244.0.5:3000",
            ),
            (
                Reason::NewFlow,
                true,
                "forwarded",
                "the socket is connected to",
            ),
            (Reason::NoBackend, false, "refused", "port unreachable"),
            (Reason::NoBackend, true, "refused", "ECONNREFUSED"),
            (
                Reason::NoLocalBackend,
                false,
                "dropped",
                "without an answer",
            ),
            (Reason::NoLocalBackend, true, "refused", "ECONNREFUSED"),
            (Reason::SourceRange, false, "dropped", "192.0.2.9"),
            (Reason::SourceRange, true, "refused", "ECONNREFUSED"),
            (Reason::NoSuchPort, false, "refused", "port 81/TCP"),
            (Reason::NotService, false, "untouched", "10.96.0.10:81/TCP"),
            (Reason::SocketNotServed, true, "untouched", "at the device"),
        ] {
            let verdict = verdict(reason, at_socket, &Exit::Unasked);
            assert_eq!(verdict.outcome, name, "{reason:?}");
            assert!(
                verdict.explanation.contains(part),
                "{}",
                verdict.explanation
            );
        }
    }

    #[test]
    fn where_it_leaves_is_part_of_it() {
        for (exit, part) in [
            (Exit::By(3, "pod5".to_owned()), "out of pod5"),
            (Exit::Here, "on the node itself"),
            (Exit::Nowhere, "no route there"),
            (Exit::Sent, "past the node's stack"),
        ] {
            let verdict = verdict(Reason::NewFlow, false, &exit);
            assert!(
                verdict.explanation.contains(part),
                "{}",
                verdict.explanation
            );
        }
    }

    #[test]
    fn a_device_without_klb_is_part_of_it_where_it_matters() {
        let exit = Exit::By(3, "tun0".to_owned());
        let addr = |text: &str| text.parse().expect("an address");
        let case = |egress_missing| Case {
            reason: Reason::NewMasqueradedFlow,
            at_socket: false,
            from: addr("192.0.2.9:40000"),
            to: addr("192.0.2.1:30080"),
            protocol: lb_common::flow::TCP,
            policy: None,
            backend: Some(addr("10.244.1.5:3000")),
            backend_of: &[],
            exit: &exit,
            egress_missing,
        };
        for (egress_missing, part) in [(false, "out of tun0"), (true, "may not come back")] {
            let text = Verdict::new(&case(egress_missing)).explanation;
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_backend_that_is_asked_directly_is_known_as_one() {
        let exit = Exit::Unasked;
        let service = PortId {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            port_name: "http".to_owned(),
        };
        let to = "10.244.0.5:3000".parse().expect("an address");
        let case = Case {
            reason: Reason::NotService,
            at_socket: false,
            from: to,
            to,
            protocol: lb_common::flow::TCP,
            policy: None,
            backend: None,
            backend_of: &[service],
            exit: &exit,
            egress_missing: false,
        };
        let text = Verdict::new(&case).explanation;
        assert!(text.contains("a backend of shop/web:http"), "{text}");
    }
}
