//! Which of the rows somebody wants to see.

use std::net::{IpAddr, SocketAddr};

use anyhow::bail;

use crate::{
    args::{End, GetArgs, What},
    commands::PortId,
};

/// What is asked for; a row is shown if all of it holds.
pub(super) struct Selection<'a>(&'a GetArgs);

impl<'a> Selection<'a> {
    /// # Errors
    ///
    /// If something is asked for that these rows do not have: all of them would
    /// be shown, or none, and both be taken for an answer.
    pub(super) fn new(args: &'a GetArgs) -> anyhow::Result<Self> {
        use What::{Affinity, Backends, Flows, Services, Sockets};
        for (flag, is_given, those) in [
            (
                "--namespace",
                args.namespace.is_some(),
                &[Services, Backends, Flows, Sockets, Affinity][..],
            ),
            (
                "--service",
                args.service.is_some(),
                &[Services, Backends, Flows, Sockets, Affinity],
            ),
            ("--vip", args.vip.is_some(), &[Services, Flows, Sockets]),
            (
                "--backend",
                args.backend.is_some(),
                &[Services, Backends, Flows, Sockets, Affinity],
            ),
            ("--client", args.client.is_some(), &[Flows, Affinity]),
        ] {
            if is_given && !those.contains(&args.what) {
                let names: Vec<_> = those.iter().map(|what| what.name()).collect();
                bail!("{flag} selects of {} only", names.join(", "));
            }
        }
        Ok(Self(args))
    }

    /// By namespace and name; the name may be that of one port: `web:http`.
    pub(super) fn has_service(&self, port: &PortId) -> bool {
        port.is(self.0.namespace.as_deref(), self.name())
    }

    /// By the name of what is no Service's.
    pub(super) fn has_name(&self, name: &str) -> bool {
        self.name().is_none_or(|wanted| wanted == name)
    }

    /// The name that is asked for, in either way.
    fn name(&self) -> Option<&str> {
        self.0.name.as_deref().or(self.0.service.as_deref())
    }

    /// # Errors
    ///
    /// If something is asked for by name that is none of those that there are:
    /// nothing to be shown of it would be taken for an answer.
    pub(super) fn require_known<'p>(
        &self,
        mut ports: impl Iterator<Item = &'p PortId>,
    ) -> anyhow::Result<()> {
        let Some(name) = self.name() else {
            return Ok(());
        };
        match (self.0.what, self.0.namespace.as_deref()) {
            (What::Devices, _) => bail!("klb is on no device {name}"),
            (What::Maps, _) => bail!("there is no map {name}"),
            _ if ports.any(|port| self.has_service(port)) => Ok(()),
            (_, Some(namespace)) => {
                bail!("no Service {name} of namespace {namespace} is in the maps")
            }
            (_, None) => bail!("no Service {name} is in the maps"),
        }
    }

    pub(super) fn has_vip(&self, addr: SocketAddr) -> bool {
        self.0.vip.is_none_or(|vip| vip.is(addr))
    }

    pub(super) fn has_backend(&self, addr: SocketAddr) -> bool {
        self.0.backend.is_none_or(|backend| backend.is(addr))
    }

    /// Whether one of these may be asked for.
    pub(super) fn has_any_backend(&self, mut addrs: impl Iterator<Item = SocketAddr>) -> bool {
        let wanted = self.0.backend;
        wanted.is_none_or(|backend| addrs.any(|addr| backend.is(addr)))
    }

    pub(super) fn has_client(&self, addr: SocketAddr) -> bool {
        self.0.client.is_none_or(|client| client.is(addr))
    }

    /// Where only the address is known.
    pub(super) fn has_client_address(&self, addr: IpAddr) -> bool {
        self.0.client.is_none_or(|client| client.ip == addr)
    }
}

impl End {
    fn is(self, addr: SocketAddr) -> bool {
        self.ip == addr.ip() && self.port.is_none_or(|port| port == addr.port())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn args(line: &[&str]) -> GetArgs {
        let line = ["klb", "get"].iter().chain(line);
        match Cli::try_parse_from(line).expect("valid").command {
            Command::Get(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ends_are_matched_with_and_without_ports() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
        for (wanted, found) in [
            ("10.0.0.1", [true, true, false]),
            ("10.0.0.1:80", [true, false, false]),
            ("[fd00::1]:80", [false, false, true]),
            ("fd00::1", [false, false, true]),
            ("[fd00::1]:81", [false, false, false]),
        ] {
            let args = args(&["flows", "--client", wanted]);
            let selection = Selection::new(&args).expect("flows have clients");
            let all = ["10.0.0.1:80", "10.0.0.1:81", "[fd00::1]:80"];
            assert_eq!(
                all.map(|addr| selection.has_client(at(addr))),
                found,
                "{wanted}"
            );
        }
    }

    #[test]
    fn services_are_matched_by_name_with_and_without_port() {
        let port = PortId {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            port_name: "http".to_owned(),
        };
        for (flags, expected) in [
            (&[][..], true),
            (&["--service", "web"], true),
            (&["--service", "web:http"], true),
            (&["--service", "web:https"], false),
            (&["--service", "we"], false),
            (&["--service", "web", "-n", "shop"], true),
            (&["--service", "web", "-n", "other"], false),
            (&["web"], true),
            (&["web:http"], true),
            (&["we"], false),
        ] {
            let args = args(&[&["services"], flags].concat());
            let selection = Selection::new(&args).expect("services have names");
            assert_eq!(selection.has_service(&port), expected, "{flags:?}");
        }
    }

    #[test]
    fn a_name_that_there_is_not_is_no_answer() {
        let web = PortId {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            port_name: "http".to_owned(),
        };
        for (line, expected) in [
            (&["flows"][..], None),
            (&["flows", "web"], None),
            (&["flows", "web:http", "-n", "shop"], None),
            (&["flows", "wob"], Some("no Service wob is")),
            (&["flows", "--service", "wob"], Some("no Service wob is")),
            (&["flows", "web", "-n", "x"], Some("web of namespace x")),
            (&["devices", "eth7"], Some("no device eth7")),
            (&["maps", "klb_svc5"], Some("no map klb_svc5")),
        ] {
            let args = args(line);
            let selection = Selection::new(&args).expect("valid");
            let error = selection.require_known([&web].into_iter()).err();
            let error = error.map(|error| error.to_string());
            let as_expected = match (&error, expected) {
                (Some(error), Some(expected)) => error.contains(expected),
                (None, None) => true,
                _ => false,
            };
            assert!(as_expected, "{line:?}: {error:?}");
        }
    }

    #[test]
    fn what_rows_do_not_have_cannot_be_asked_for() {
        for line in [
            ["services", "--client", "10.0.0.1"],
            ["backends", "--vip", "10.0.0.1"],
            ["affinity", "--vip", "10.0.0.1"],
            ["maps", "--namespace", "x"],
            ["devices", "--service", "x"],
        ] {
            let args = args(&line);
            let error = Selection::new(&args).err().expect("refused").to_string();
            assert!(error.contains(line[1]), "{error}");
        }
    }
}
