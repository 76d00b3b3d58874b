//! Which packet is asked about.

use std::{collections::HashSet, net::SocketAddr};

use crate::{
    args::{End, ExplainArgs},
    commands::WrongUsage,
    datapath::{Family, FrontendKey, trial::Ends},
};

/// From here on a port is looked for if none is given.
const FIRST_PORT: u16 = 40_000;

/// As it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) from: End,
    pub(super) to: SocketAddr,
    pub(super) protocol: u8,
}

impl Question {
    /// # Errors
    ///
    /// If there is no such packet.
    pub(super) fn new(args: &ExplainArgs) -> Result<Self, WrongUsage> {
        let from = End {
            ip: args.from.ip.to_canonical(),
            port: args.from.port,
        };
        let to = SocketAddr::new(args.to.ip().to_canonical(), args.to.port());
        if Family::of(from.ip) != Family::of(to.ip()) {
            return Err(WrongUsage(format!(
                "{} and {} are of different families, and a packet is of one",
                from.ip,
                to.ip()
            )));
        }
        if to.port() == 0 || from.port == Some(0) {
            return Err(WrongUsage("0 is no port".to_owned()));
        }
        Ok(Self {
            from,
            to,
            protocol: args.proto.number(),
        })
    }

    pub(super) const fn family(&self) -> Family {
        Family::of(self.to.ip())
    }

    /// The frontend that it would be for.
    pub(super) const fn frontend(&self) -> FrontendKey {
        FrontendKey {
            addr: self.to.ip(),
            port: self.to.port(),
            protocol: self.protocol,
        }
    }

    /// The ends of the packet: from the port that is given, or from the first one
    /// that is not in use.
    pub(super) fn ends(&self, ports_in_use: &HashSet<u16>) -> Ends {
        let free = || (FIRST_PORT..=u16::MAX).find(|port| !ports_in_use.contains(port));
        let port = self.from.port.or_else(free).unwrap_or(FIRST_PORT);
        Ends {
            src: SocketAddr::new(self.from.ip, port),
            dst: self.to,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn question(line: &[&str]) -> Result<Question, WrongUsage> {
        let line = ["klb", "explain"].iter().chain(line);
        match Cli::try_parse_from(line).expect("valid").command {
            Command::Explain(args) => Question::new(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_packet_is_of_one_family_and_has_ports() {
        for (from, to, expected) in [
            ("192.0.2.9", "[fd00::1]:80", Err("different families")),
            ("fd00::9", "192.0.2.1:80", Err("different families")),
            ("192.0.2.9", "192.0.2.1:0", Err("no port")),
            ("192.0.2.9:0", "192.0.2.1:80", Err("no port")),
            ("192.0.2.9", "192.0.2.1:80", Ok(Family::V4)),
            ("::ffff:192.0.2.9", "192.0.2.1:80", Ok(Family::V4)),
            ("[fd00::9]:1", "[fd00::1]:80", Ok(Family::V6)),
        ] {
            let found = question(&["--from", from, "--to", to]);
            match (found, expected) {
                (Ok(found), Ok(family)) => assert_eq!(found.family(), family),
                (Err(found), Err(part)) => assert!(found.to_string().contains(part), "{found}"),
                (found, _) => panic!("{from} {to}: {found:?}"),
            }
        }
    }

    #[test]
    fn a_port_that_is_not_given_has_no_flow_yet() {
        let to = ["--to", "192.0.2.1:80"];
        let asked = question(&[&["--from", "192.0.2.9"], &to[..]].concat()).expect("valid");
        assert_eq!(asked.ends(&HashSet::new()).src.port(), 40_000);
        let in_use = HashSet::from([40_000, 40_001, 40_003]);
        assert_eq!(asked.ends(&in_use).src.port(), 40_002);
        let asked = question(&[&["--from", "192.0.2.9:40001"], &to[..]].concat()).expect("valid");
        assert_eq!(asked.ends(&in_use).src.port(), 40_001);
    }
}
