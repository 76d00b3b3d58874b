//! klb itself on this node.

use lb_common::names;

use super::check::Check;
use crate::{
    args::DoctorArgs,
    datapath::{inspect, load::require_object, pins::Lock},
    kube_proxy::process,
};

#[derive(Clone, Debug)]
pub(super) struct Facts {
    preflight: bool,
    /// The BPF programs are in this binary.
    has_programs: bool,
    /// An agent has run here and was not cleaned up after.
    is_pinned: bool,
    pid: Option<String>,
    /// Status with which `/readyz` answers, at the usual port.
    readyz: Option<u16>,
    /// Number of socket hooks that are attached.
    sockets: usize,
    /// Names of devices that lack one of the TC programs.
    unattached: Vec<String>,
}

impl Facts {
    pub(super) fn gather(args: &DoctorArgs) -> Self {
        let pins = args.paths.pins();
        let devices = inspect::devices(&pins).unwrap_or_default().into_iter();
        let lacking =
            devices.filter(|device| device.tc_ingress.is_none() || device.tc_egress.is_none());
        Self {
            preflight: args.preflight,
            has_programs: require_object().is_ok(),
            is_pinned: pins.root().exists(),
            pid: Lock::holder(&args.paths.state_dir).ok().flatten(),
            readyz: process::status("/readyz").ok(),
            sockets: inspect::sockets(&pins).len(),
            unattached: lacking.filter_map(|device| device.name).collect(),
        }
    }

    pub(super) fn checks(&self) -> Vec<Check> {
        let mut checks = vec![self.programs()];
        if self.preflight {
            checks.push(self.traces());
            return checks;
        }
        checks.push(self.agent());
        if self.is_pinned {
            checks.push(self.hooks());
        }
        checks
    }

    fn programs(&self) -> Check {
        const NAME: &str = "klb";
        let version = env!("CARGO_PKG_VERSION");
        if self.has_programs {
            return Check::ok(NAME, format!("{version}, with its programs"));
        }
        Check::fail(
            NAME,
            format!("{version}, built without its programs"),
            "build it by cargo xtask build",
        )
    }

    fn traces(&self) -> Check {
        const NAME: &str = "traces of klb";
        match (&self.pid, self.is_pinned) {
            (Some(pid), _) => Check::warn(
                NAME,
                format!("an agent runs already, with process id {pid}"),
                "klb doctor, without --preflight",
            ),
            (None, true) => Check::warn(
                NAME,
                "an earlier klb has left its maps, which the next one takes over",
                "klb cleanup, if that is not wanted",
            ),
            (None, false) => Check::ok(NAME, "none"),
        }
    }

    fn agent(&self) -> Check {
        const NAME: &str = "agent";
        const LOGS: &str = "see its log: kubectl -n kube-system logs daemonset/klb";
        match (&self.pid, self.readyz) {
            (None, _) if self.is_pinned => Check::fail(
                NAME,
                "none runs: traffic flows, but changes of Services are not followed",
                LOGS,
            ),
            (None, _) => Check::fail(
                NAME,
                "none runs and none has, with this --bpffs and --state-dir",
                "install klb; before that, see klb doctor --preflight",
            ),
            (Some(pid), Some(200)) => Check::ok(NAME, format!("ready, with process id {pid}")),
            (Some(pid), Some(status)) => Check::fail(
                NAME,
                format!("runs with process id {pid} and is not ready: /readyz says {status}"),
                LOGS,
            ),
            (Some(pid), None) => Check::warn(
                NAME,
                format!(
                    "runs with process id {pid}; whether it is ready is not told on 127.0.0.1:10256"
                ),
                "ask where its --healthz-bind says",
            ),
        }
    }

    fn hooks(&self) -> Check {
        const NAME: &str = "hooks";
        let all = names::SOCKET_PROGRAMS.len();
        let fix = "see the agent's log, and klb get devices";
        if !self.unattached.is_empty() {
            let devices = self.unattached.join(", ");
            return Check::fail(NAME, format!("a TC program lacks on {devices}"), fix);
        }
        if (1..all).contains(&self.sockets) {
            let finding = format!("only {} of {all} socket hooks are attached", self.sockets);
            return Check::fail(NAME, finding, fix);
        }
        let sockets = if self.sockets == 0 {
            "not served"
        } else {
            "served"
        };
        Check::ok(NAME, format!("on all devices; sockets are {sockets}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::check::Level::{self, Fail, Ok as Fine, Warn};

    fn facts() -> Facts {
        Facts {
            preflight: false,
            has_programs: true,
            is_pinned: true,
            pid: Some("7".to_owned()),
            readyz: Some(200),
            sockets: names::SOCKET_PROGRAMS.len(),
            unattached: Vec::new(),
        }
    }

    fn nothing() -> Facts {
        Facts {
            is_pinned: false,
            pid: None,
            readyz: None,
            sockets: 0,
            ..facts()
        }
    }

    /// The names of checks that are not ok.
    fn bad(facts: &Facts) -> Vec<(&'static str, Level)> {
        let checks = facts.checks().into_iter();
        checks
            .filter(|check| check.level != Fine)
            .map(|check| (check.name, check.level))
            .collect()
    }

    #[test]
    fn what_is_expected_depends_on_when_it_is_asked() {
        let before = |facts| Facts {
            preflight: true,
            ..facts
        };
        for (facts, expected) in [
            (facts(), &[][..]),
            (before(nothing()), &[]),
            (before(facts()), &[("traces of klb", Warn)]),
            (
                before(Facts {
                    pid: None,
                    ..facts()
                }),
                &[("traces of klb", Warn)],
            ),
            (nothing(), &[("agent", Fail)]),
            (
                Facts {
                    pid: None,
                    ..facts()
                },
                &[("agent", Fail)],
            ),
            (
                Facts {
                    readyz: Some(503),
                    ..facts()
                },
                &[("agent", Fail)],
            ),
            (
                Facts {
                    readyz: None,
                    ..facts()
                },
                &[("agent", Warn)],
            ),
            (
                Facts {
                    sockets: 0,
                    ..facts()
                },
                &[],
            ),
            (
                Facts {
                    sockets: 1,
                    ..facts()
                },
                &[("hooks", Fail)],
            ),
            (
                Facts {
                    has_programs: false,
                    ..facts()
                },
                &[("klb", Fail)],
            ),
            (
                Facts {
                    unattached: vec!["eth0".to_owned()],
                    ..facts()
                },
                &[("hooks", Fail)],
            ),
        ] {
            assert_eq!(bad(&facts), expected, "{facts:?}");
        }
    }
}
