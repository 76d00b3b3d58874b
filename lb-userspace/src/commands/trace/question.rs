//! The command line → what the programs are asked for.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use lb_common::{
    Addr4, Addr6, Address as _, Hook, Port, Reason,
    node::Network,
    reason::Effect,
    service::ServiceMeta,
    trace::{TRACE_SERVICES, Trace, bit_of_hook, bit_of_reason, bits_of_effect},
};

use crate::{
    args::{End, PacketProtocol, ServiceEnd, TraceArgs},
    commands::{WrongUsage, effect_name},
};

/// Every effect.
const EFFECTS: [Effect; 5] = [
    Effect::Pass,
    Effect::Translate,
    Effect::Refuse,
    Effect::Keep,
    Effect::Answer,
];

/// What `--reason` understands: reasons, and effects for all reasons that have
/// them.
pub fn reason_names() -> impl Iterator<Item = &'static str> {
    let effects = EFFECTS.into_iter().map(effect_name);
    effects.chain(Reason::ALL.iter().map(|reason| reason.name()))
}

/// Its bits of [`Trace::reasons`].
fn reason_bits(name: &str) -> u64 {
    let effect = EFFECTS
        .into_iter()
        .find(|effect| effect_name(*effect) == name);
    if let Some(effect) = effect {
        return bits_of_effect(effect);
    }
    let mut reasons = Reason::ALL.iter();
    let reason = reasons.find(|reason| reason.name() == name);
    reason.map_or(0, |reason| bit_of_reason(*reason))
}

/// All but what goes on as it came, and klb's own frames that carry a fragment.
fn usual_reasons() -> u64 {
    let all = Reason::ALL.iter();
    let all = all.fold(0, |bits, reason| bits | bit_of_reason(*reason));
    all & !bits_of_effect(Effect::Pass) & !bit_of_reason(Reason::FragmentReleased)
}

/// As the programs take it; without Services, whose ids may change.
pub(super) fn question(args: &TraceArgs) -> Trace {
    let (from, from_port) = end(args.from);
    let (to, to_port) = end(args.to);
    let hooks = Hook::ALL.into_iter().filter(|hook| {
        let mut wanted = args.hook.iter().map(String::as_str);
        args.hook.is_empty() || wanted.any(|name| name == hook.name())
    });
    let reasons = args.reason.iter().map(|name| reason_bits(name));
    Trace {
        reasons: if args.reason.is_empty() {
            usual_reasons()
        } else {
            reasons.fold(0, |bits, more| bits | more)
        },
        hooks: hooks.fold(0, |bits, hook| bits | bit_of_hook(hook)),
        snaplen: args.pcap.as_ref().map_or(0, |_file| args.snaplen.into()),
        address: args.address.map_or_else(Network::default, network),
        from,
        to,
        port: args.port.unwrap_or(0).into(),
        from_port,
        to_port,
        protocol: args.proto.map_or(0, PacketProtocol::number),
        ..Trace::default()
    }
}

fn end(end: Option<End>) -> (Network<Addr6>, Port) {
    end.map_or_else(Default::default, |end| {
        (network(end.ip.into()), end.port.unwrap_or(0).into())
    })
}

/// A network as the programs compare addresses with it: of IPv6, in which IPv4 is
/// mapped.
fn network(network: IpNet) -> Network<Addr6> {
    const MAPPED: u8 = 96;
    let prefix = match network {
        IpNet::V4(network) => MAPPED + network.prefix_len(),
        IpNet::V6(network) => network.prefix_len(),
    };
    let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
    Network {
        addr: match network.network() {
            IpAddr::V4(addr) => Addr4::from(addr).mapped(),
            IpAddr::V6(addr) => addr.into(),
        },
        mask: Addr6 {
            octets: mask.to_be_bytes(),
        },
    }
}

/// The ids of the Service that is asked for: it has one for each port.
///
/// # Errors
///
/// [`WrongUsage`] if it has more ports than the programs compare with.
pub(super) fn ids(
    service: &ServiceEnd,
    metas: &BTreeMap<u32, ServiceMeta>,
) -> Result<Vec<u32>, WrongUsage> {
    let ids: Vec<u32> = metas
        .iter()
        .filter(|(_, meta)| is_of(service, meta))
        .map(|(id, _)| *id)
        .collect();
    if ids.len() > TRACE_SERVICES {
        return Err(WrongUsage(format!(
            "{service} has {} ports, and {TRACE_SERVICES} can be told apart: name one",
            ids.len()
        )));
    }
    Ok(ids)
}

fn is_of(service: &ServiceEnd, meta: &ServiceMeta) -> bool {
    let is_port =
        |port: &str| meta.port_name.as_str() == port || meta.port.get().to_string() == port;
    meta.namespace.as_str() == service.namespace
        && meta.name.as_str() == service.name
        && service.port.as_deref().is_none_or(is_port)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use lb_common::{flow, service::Name, trace::Ends};

    use super::*;
    use crate::args::{Cli, Command};

    fn args(flags: &[&str]) -> TraceArgs {
        let line = ["klb", "trace"].iter().chain(flags);
        match Cli::try_parse_from(line).expect("valid").command {
            Command::Trace(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn ends(src: &str, dst: &str) -> Ends {
        let addr = |text: &str| match text.parse().expect("an address") {
            IpAddr::V4(addr) => Addr4::from(addr).mapped(),
            IpAddr::V6(addr) => addr.into(),
        };
        Ends {
            src: addr(src),
            dst: addr(dst),
            src_port: 40_000.into(),
            dst_port: 80.into(),
        }
    }

    #[test]
    fn without_flags_it_is_all_that_klb_had_a_part_in() {
        let trace = question(&args(&[]));
        for reason in Reason::ALL {
            let usual = reason.effect() != Effect::Pass && *reason != Reason::FragmentReleased;
            assert_eq!(trace.has_reason(*reason), usual, "{reason:?}");
        }
        assert!(Hook::ALL.into_iter().all(|hook| trace.has_hook(hook)));
        assert_eq!(trace.snaplen, 0, "no frames without a file");
    }

    #[test]
    fn reasons_and_hooks_are_those_that_are_named() {
        let flags = [
            "--reason",
            "refuse,no_backend",
            "--reason",
            "not_service",
            "--hook",
            "xdp",
        ];
        let trace = question(&args(&flags));
        for reason in Reason::ALL {
            let named = reason.effect() == Effect::Refuse
                || [Reason::NoBackend, Reason::NotService].contains(reason);
            assert_eq!(trace.has_reason(*reason), named, "{reason:?}");
        }
        assert!(trace.has_hook(Hook::Xdp) && !trace.has_hook(Hook::TcIngress));
    }

    #[test]
    fn addresses_of_both_families_are_compared_as_written() {
        let v4 = ends("192.0.2.9", "10.96.0.1");
        let v6 = ends("2001:db8::9", "fd00::1");
        for (flags, is_v4, is_v6) in [
            (&["--from", "192.0.2.9"][..], true, false),
            (&["--from", "192.0.2.9:40000"], true, false),
            (&["--from", "192.0.2.9:40001"], false, false),
            (&["--to", "[fd00::1]:80"], false, true),
            (&["--to", "192.0.2.9"], false, false),
            (&["--address", "192.0.2.0/24"], true, false),
            (&["--address", "10.96.0.1"], true, false),
            (&["--address", "2001:db8::/32"], false, true),
            (&["--address", "0.0.0.0/0"], true, false),
            (&["--port", "80"], true, true),
            (&["--port", "443"], false, false),
            (&["--proto", "udp"], false, false),
            (
                &[
                    "--from",
                    "192.0.2.9",
                    "--to",
                    "10.96.0.1:80",
                    "--proto",
                    "tcp",
                ],
                true,
                false,
            ),
        ] {
            let trace = question(&args(flags));
            let none = Ends::default();
            assert_eq!(trace.is_about(0, flow::TCP, &v4, &none), is_v4, "{flags:?}");
            assert_eq!(trace.is_about(0, flow::TCP, &v6, &none), is_v6, "{flags:?}");
        }
    }

    #[test]
    fn a_service_is_all_of_its_ports_or_one() {
        let meta = |name: &str, port_name: &str, port: u16| ServiceMeta {
            namespace: Name::new("default").expect("a name"),
            name: Name::new(name).expect("a name"),
            port_name: Name::new(port_name).expect("a name"),
            port: port.into(),
            protocol: flow::TCP,
            pad: 0,
        };
        let metas = BTreeMap::from([
            (1, meta("web", "http", 80)),
            (2, meta("web", "https", 443)),
            (3, meta("dns", "", 53)),
        ]);
        let ids = |text: &str| {
            let service = text.parse().expect("a Service");
            ids(&service, &metas).expect("few ports")
        };
        assert_eq!(ids("default/web"), [1, 2]);
        assert_eq!(ids("default/web:http"), [1]);
        assert_eq!(ids("default/web:443"), [2]);
        assert_eq!(ids("default/dns:53"), [3]);
        assert!(ids("other/web").is_empty());
        let many: BTreeMap<_, _> = (0..65).map(|id| (id, meta("web", "", id as u16))).collect();
        let service = "default/web".parse().expect("a Service");
        let error = super::ids(&service, &many).expect_err("too many");
        assert!(error.to_string().contains("65 ports"), "{error}");
    }
}
