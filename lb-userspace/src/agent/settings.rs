//! The settings that the programs go by.

use std::{
    fs::File,
    io::{self, Read as _},
};

use anyhow::{Context as _, bail};
use lb_common::node::{CONFIG_BYPASS, CONFIG_HOST_SOCKETS_ONLY, Config};

use crate::{
    args::{AgentArgs, Routing, SocketLb},
    netlink::Netlink,
    netns::words,
};

/// What the flags say. The rest stays as an earlier run left it.
///
/// # Errors
///
/// If the kernel has no randomness to give.
pub(super) fn config(args: &AgentArgs, earlier: Config) -> anyhow::Result<Config> {
    let mut flags = 0;
    if args.routing == Routing::Bypass {
        flags |= CONFIG_BYPASS;
    }
    if args.hooks.socket_lb == SocketLb::Host {
        flags |= CONFIG_HOST_SOCKETS_ONLY;
    }
    let netns = netns_cookie();
    if let (SocketLb::Host, Err(error)) = (args.hooks.socket_lb, &netns) {
        bail!("--socket-lb host: the kernel does not tell network namespaces apart: {error}");
    }
    Ok(Config {
        first_port: args.masquerade_ports.first(),
        port_count: args.masquerade_ports.count(),
        flags,
        // Without it (before 5.14) no process counts as the node's.
        host_netns: netns.unwrap_or_default(),
        secret: match earlier.secret {
            0 => random().context("reading /dev/urandom")?,
            secret => secret,
        },
        timeouts: args.timeouts.by_state(),
        ..earlier
    })
}

/// The cookie of the agent's network namespace, which is the node's.
fn netns_cookie() -> io::Result<[u32; 2]> {
    Ok(words(Netlink::open()?.netns_cookie()?))
}

/// A number other than 0.
fn random() -> io::Result<u32> {
    let mut bytes = [0; 4];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u32::from_ne_bytes(bytes) | 1)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use lb_common::{Addr4, flow::State, node::Network};

    use super::*;
    use crate::args::{Cli, Command};

    fn config_of(flags: &[&str], earlier: Config) -> Config {
        let line = ["klb", "agent", "--node-name", "n"].iter().chain(flags);
        match Cli::try_parse_from(line).expect("valid").command {
            Command::Agent(args) => config(&args, earlier).expect("settings"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_replace_and_the_rest_is_kept() {
        let first = config_of(&[], Config::default());
        assert_ne!(first.secret, 0);
        assert_eq!(first.timeouts, State::TIMEOUTS);
        let network = Network {
            addr: Addr4 {
                octets: [10, 96, 0, 0],
            },
            mask: Addr4 {
                octets: [255, 255, 0, 0],
            },
        };
        let earlier = Config {
            cluster_net4: network,
            ..first
        };
        let flags = "--masquerade-ports 40000-40009 --timeout-udp 5s --routing bypass";
        let flags: Vec<_> = flags.split(' ').collect();
        let second = config_of(&flags, earlier);
        assert_eq!(second.flags & CONFIG_BYPASS, CONFIG_BYPASS);
        assert_eq!(config_of(&[], second).flags & CONFIG_BYPASS, 0);
        assert_eq!((second.first_port, second.port_count), (40_000, 10));
        assert_eq!(State::Unreplied.timeout(&second.timeouts), 5);
        assert_eq!(
            (second.secret, second.cluster_net4),
            (first.secret, network)
        );
    }
}
