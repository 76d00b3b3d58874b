//! `klb cleanup --kube-proxy`: what kube-proxy left goes, nothing of anybody
//! else's does, and connections that it began go on.

use std::{fmt::Write as _, fs, path::PathBuf, time::Duration};

use lb_tests::{
    agent::{Hooks, Said},
    process::Process,
    topology::{Addresses, Family},
    world::World,
};

use crate::takeover;

/// How long the command may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Tables that a CNI and an administrator may have, in nftables.
const OTHERS: &str = "
table ip cni {
  chain outgoing { type nat hook postrouting priority 100; oifname nowhere0 masquerade; }
}
table ip6 cni {
  chain outgoing { type nat hook postrouting priority 100; oifname nowhere0 masquerade; }
}
table inet kube-proxy {
  chain mine { counter; }
}
table ip kube-proxy-of-mine {
  chain services { counter; }
}
";

/// Chains of kubelet's and of others', in iptables. There is a rule in each of
/// the kernel's chains: one that comes with the first rule stays after the last.
const OTHER_CHAINS: &str = "*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:MINE - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -m comment --comment \"not -j KUBE-SERVICES\" -j MINE
-A FORWARD -j MINE
-A OUTPUT -j MINE
-A KUBE-FIREWALL -m comment --comment \"block incoming localnet connections\" -m mark --mark 0x8000/0x8000 -j DROP
-A MINE -j RETURN
COMMIT
*nat
:KUBE-MARK-DROP - [0:0]
:CNI-MASQUERADE - [0:0]
:MINE - [0:0]
-A PREROUTING -j MINE
-A OUTPUT -j MINE
-A POSTROUTING -j CNI-MASQUERADE
-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
-A CNI-MASQUERADE -o nowhere0 -j MASQUERADE
COMMIT
";

fn node_file(world: &World, name: &str, text: &str) -> PathBuf {
    let file = world.cluster.scope().new_file(name);
    fs::write(&file, text).expect("a folder of our own");
    file
}

fn run(world: &World, program: &str, arguments: &[&str]) -> String {
    world.cluster.node.place.netns().output(program, arguments)
}

/// Everything in nftables and in both kinds of iptables; without what counts.
fn rules(world: &World) -> String {
    let mut rules = run(world, "nft", &["-s", "list", "ruleset"]);
    for program in ["iptables-save", "ip6tables-save"] {
        let saved = run(world, program, &[]);
        let lines = saved.lines().filter(|line| !line.starts_with('#'));
        rules.extend(lines.map(|line| format!("{}\n", line.split(" [").next().unwrap_or(line))));
    }
    rules
}

fn cleanup(world: &World, flags: &[&str]) -> Said {
    world
        .agent
        .klb(&[&["cleanup", "--kube-proxy"], flags].concat())
}

/// From the time before kube-proxy to that after it, with klb taking over and
/// connections that began under kube-proxy.
fn leaves_no_more_than_was_there(others: fn(&World), kube_proxy: fn(&World), sign: &str) {
    let mut world = crate::stopped_world(Hooks::ALL);
    others(&world);
    let before = rules(&world);
    kube_proxy(&world);
    takeover::assert_served_by_kube_proxy(&world);
    let streams = takeover::connections(&world);
    world.agent.start();
    takeover::assert_served_by_klb(&world);

    let with_kube_proxy = rules(&world);
    let said = cleanup(&world, &["--dry-run"]);
    assert!(
        said.status.success() && said.stdout.contains(sign),
        "{said:?}"
    );
    assert_eq!(rules(&world), with_kube_proxy, "nothing is removed yet");

    let said = cleanup(&world, &[]);
    assert!(said.status.success(), "{said:?}");
    assert_eq!(rules(&world), before);
    takeover::assert_go_on(&streams);
    takeover::assert_served_by_klb(&world);
    takeover::stop(streams);

    let said = cleanup(&world, &[]);
    assert!(said.status.success(), "a second time: {said:?}");
    assert!(said.stderr.contains("nothing of kube-proxy"), "{said:?}");
    assert_eq!(rules(&world), before);
}

#[test]
fn of_nftables() {
    let others = |world: &World| {
        let file = node_file(world, "others.nft", OTHERS);
        run(world, "nft", &["-f", &file.display().to_string()]);
    };
    leaves_no_more_than_was_there(others, takeover::kube_proxy, "table ip6 kube-proxy");
}

#[test]
fn of_iptables() {
    let others = |world: &World| {
        for family in Family::ALL {
            restore(world, family, OTHER_CHAINS);
        }
    };
    leaves_no_more_than_was_there(others, kube_proxy, "chain KUBE-SVC-HTTP");
}

fn restore(world: &World, family: Family, rules: &str) {
    let (program, file) = match family {
        Family::V4 => ("iptables-restore", "rules.v4"),
        Family::V6 => ("ip6tables-restore", "rules.v6"),
    };
    let file = node_file(world, file, rules).display().to_string();
    run(world, program, &["--noflush", &file]);
}

/// Rules as kube-proxy makes them in iptables, for the ports of the world's
/// Service.
fn kube_proxy(world: &World) {
    takeover::add_default_routes(world);
    for family in Family::ALL {
        restore(world, family, &iptables_rules(world, family));
    }
}

fn iptables_rules(world: &World, family: Family) -> String {
    let mut chains = String::new();
    let mut rules = String::new();
    let service = &world.service;
    for port in &service.ports {
        let protocol = port.protocol.kubernetes().to_lowercase();
        let name = port.name.to_uppercase();
        let is_of = format!("-p {protocol} -m {protocol}");
        let endpoints = [5, 6].map(|number| Addresses::pod(number).port(family, port.target));
        for chain in ["SVC", "EXT", "SEP"] {
            writeln!(chains, ":KUBE-{chain}-{name} - [0:0]").expect("a string grows");
        }
        writeln!(chains, ":KUBE-SEP-{name}-2 - [0:0]").expect("a string grows");
        let [first, second] = endpoints;
        writeln!(
            rules,
            "-A KUBE-SERVICES -d {cluster} {is_of} --dport {port} -m comment --comment \"default/echo:{name} cluster IP\" -j KUBE-SVC-{name}
-A KUBE-NODEPORTS {is_of} --dport {node_port} -j KUBE-EXT-{name}
-A KUBE-EXT-{name} -j KUBE-MARK-MASQ
-A KUBE-EXT-{name} -j KUBE-SVC-{name}
-A KUBE-SVC-{name} -m statistic --mode random --probability 0.5 -j KUBE-SEP-{name}
-A KUBE-SVC-{name} -j KUBE-SEP-{name}-2
-A KUBE-SEP-{name} {is_of} -j DNAT --to-destination {first}
-A KUBE-SEP-{name}-2 {is_of} -j DNAT --to-destination {second}",
            cluster = service.addresses.ip(family),
            port = port.port,
            node_port = port.node_port,
        )
        .expect("a string grows");
    }
    format!(
        "*mangle
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-PROXY-CANARY - [0:0]
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-PROXY-CANARY - [0:0]
{chains}-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MASQUERADE
{rules}-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
"
    )
}

/// A process that is called kube-proxy.
fn start_kube_proxy(world: &World) -> Process {
    let program = world.cluster.scope().folder().join("kube-proxy");
    fs::copy("/bin/sleep", &program).expect("a program that does nothing");
    let place = &world.cluster.node.place;
    let mut command = place.command(&program);
    command.arg("infinity");
    place.start("kube-proxy", command)
}

#[test]
fn not_while_it_runs_or_connections_need_it() {
    let world = crate::stopped_world(Hooks::ALL);
    takeover::kube_proxy(&world);
    let before = rules(&world);
    let process = start_kube_proxy(&world);
    let said = lb_tests::wait::until("the process to have its name", LIMIT, || {
        let said = cleanup(&world, &["--dry-run"]);
        assert!(said.status.success(), "{said:?}");
        let said = fs::read_to_string(format!("/proc/{}/comm", process.id())).expect("it runs");
        (said.trim_end() == "kube-proxy").then(|| cleanup(&world, &[]))
    });
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    assert!(said.stderr.contains("kube-proxy runs"), "{said:?}");
    assert_eq!(rules(&world), before);
    drop(process);
    // Nobody else has a rule that translates.
    let said = cleanup(&world, &[]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    assert!(said.stderr.contains("end with its rules"), "{said:?}");
    assert_eq!(rules(&world), before);
    let said = cleanup(&world, &["--force"]);
    assert!(said.status.success(), "{said:?}");
    assert!(!rules(&world).contains("table ip kube-proxy"));
}
