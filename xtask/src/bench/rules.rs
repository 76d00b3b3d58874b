//! Rule sets of the shape that kube-proxy makes, for iptables and for nftables,
//! and what it sends when one Service gets another endpoint.
//!
//! As of kube-proxy 1.36, for IPv4, with its defaults: `NodePort`s on the node's
//! first address, traffic from outside masqueraded. Names of chains are shorter
//! than kube-proxy's hashes; the kernel looks none of them up per packet.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr},
};

use lb_tests::topology::Addresses;

use super::services::{Port, Service, Services};

/// Where pods are, for both: who is not from here is masqueraded.
const PODS: &str = "10.244.0.0/16";
/// The Services' addresses.
const CLUSTER_IPS: &str = "10.96.0.0/12";
/// Services in one transaction of nftables: the kernel's work on a transaction
/// grows with the square of its size.
const BATCH: usize = 1000;

/// Appends a line to a text.
macro_rules! line {
    ($text:expr, $($arguments:tt)*) => {
        writeln!($text, $($arguments)*).expect("a string grows")
    };
}

/// All that `iptables-restore` reads.
pub(super) fn iptables(services: Services) -> String {
    let mut chains = nat_chains();
    let mut rules = String::new();
    let mut heads = String::new();
    let mut node_ports = String::new();
    for service in services.all() {
        for port in &service.ports {
            heads += &iptables_head(&service, port);
            node_ports += &iptables_node_port(&service, port);
            iptables_port(&mut chains, &mut rules, &service, port);
        }
    }
    format!("{FILTER}*nat\n{chains}{HOOKS}{node_ports}{heads}{LAST_HEAD}{rules}COMMIT\n")
}

/// What `iptables-restore --noflush` reads when the endpoints of one Service
/// change: its chains, and the lists of all Services, which are written anew.
pub(super) fn iptables_change(services: Services, before: &Service, after: &Service) -> String {
    let mut chains = ":KUBE-NODEPORTS - [0:0]\n:KUBE-SERVICES - [0:0]\n".to_owned();
    let mut rules = String::new();
    let mut heads = String::new();
    let mut node_ports = String::new();
    for service in services.all() {
        for port in &service.ports {
            heads += &iptables_head(&service, port);
            node_ports += &iptables_node_port(&service, port);
        }
    }
    for port in &after.ports {
        iptables_port(&mut chains, &mut rules, after, port);
    }
    let mut gone = String::new();
    for port in &before.ports {
        for endpoint in &before.endpoints {
            if !after.endpoints.contains(endpoint) {
                let chain = separate(before, port, *endpoint);
                line!(chains, ":{chain} - [0:0]");
                line!(gone, "-X {chain}");
            }
        }
    }
    format!("*nat\n{chains}{node_ports}{heads}{LAST_HEAD}{rules}{gone}COMMIT\n")
}

const FILTER: &str = "\
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A INPUT -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

const HOOKS: &str = "\
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
";

/// Behind all Services.
const LAST_HEAD: &str = "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n";

fn nat_chains() -> String {
    let names = ["NODEPORTS", "SERVICES", "MARK-MASQ", "POSTROUTING"];
    names.map(|name| format!(":KUBE-{name} - [0:0]\n")).concat()
}

/// The Service's line in the list that every new connection walks.
fn iptables_head(service: &Service, port: &Port) -> String {
    let Port {
        protocol, number, ..
    } = port;
    format!(
        "-A KUBE-SERVICES -d {}/32 -p {protocol} -m comment --comment \"bench/{} cluster IP\" \
         -m {protocol} --dport {number} -j {}\n",
        service.address,
        service.name,
        chain("SVC", service, port)
    )
}

fn iptables_node_port(service: &Service, port: &Port) -> String {
    let Some(node_port) = port.on_nodes else {
        return String::new();
    };
    let protocol = port.protocol;
    let external = chain("EXT", service, port);
    format!(
        "-A KUBE-NODEPORTS -p {protocol} -m comment --comment bench/{} \
         -m {protocol} --dport {node_port} -j {external}\n",
        service.name
    )
}

/// The chains of a Service's port and of its endpoints, and their rules.
fn iptables_port(chains: &mut String, rules: &mut String, service: &Service, port: &Port) {
    let Port {
        protocol,
        number,
        target,
        ..
    } = port;
    let own = chain("SVC", service, port);
    line!(chains, ":{own} - [0:0]");
    if port.on_nodes.is_some() {
        let external = chain("EXT", service, port);
        line!(chains, ":{external} - [0:0]");
        line!(rules, "-A {external} -j KUBE-MARK-MASQ");
        line!(rules, "-A {external} -j {own}");
    }
    line!(
        rules,
        "-A {own} ! -s {PODS} -d {}/32 -p {protocol} -m {protocol} --dport {number} \
         -j KUBE-MARK-MASQ",
        service.address
    );
    let mut left = service.endpoints.len();
    for endpoint in &service.endpoints {
        let separate = separate(service, port, *endpoint);
        line!(chains, ":{separate} - [0:0]");
        if left > 1 {
            let part = 1.0 / f64::from(u32::try_from(left).expect("few"));
            line!(
                rules,
                "-A {own} -m statistic --mode random --probability {part:.11} -j {separate}"
            );
        } else {
            line!(rules, "-A {own} -j {separate}");
        }
        left -= 1;
        line!(rules, "-A {separate} -s {endpoint}/32 -j KUBE-MARK-MASQ");
        line!(
            rules,
            "-A {separate} -p {protocol} -m {protocol} -j DNAT --to-destination {endpoint}:{target}"
        );
    }
}

/// `KUBE-SVC-…`
fn chain(kind: &str, service: &Service, port: &Port) -> String {
    format!("KUBE-{kind}-{}-{}", u32::from(service.address), port.number)
}

/// `KUBE-SEP-…`, of a Service's endpoint.
fn separate(service: &Service, port: &Port, endpoint: Ipv4Addr) -> String {
    let service = u32::from(service.address);
    // A chain's name has 28 characters at most.
    format!(
        "KUBE-SEP-{:x}{:x}{:x}",
        service,
        u32::from(endpoint),
        port.number
    )
}

/// What `nft -f` reads, one text after the other.
pub(super) fn nftables(services: Services) -> Vec<String> {
    let all: Vec<_> = services.all().collect();
    let batches = all.chunks(BATCH).map(|batch| {
        let mut text = String::new();
        for service in batch {
            line!(
                text,
                "add element ip kube-proxy cluster-ips {{ {} }}",
                service.address
            );
            for port in &service.ports {
                nftables_port(&mut text, service, port);
            }
        }
        text
    });
    [nftables_base()].into_iter().chain(batches).collect()
}

/// What `nft -f` reads when the endpoints of one Service change.
pub(super) fn nftables_change(before: &Service, after: &Service) -> String {
    let mut text = String::new();
    for port in &after.ports {
        let own = nftables_chain("service", after, port);
        for endpoint in new_endpoints(before, after) {
            nftables_endpoint(&mut text, after, port, endpoint);
        }
        line!(text, "flush chain ip kube-proxy {own}");
        nftables_choice(&mut text, after, port);
        for endpoint in new_endpoints(after, before) {
            let gone = nftables_endpoint_chain(before, port, endpoint);
            line!(text, "flush chain ip kube-proxy {gone}");
            line!(text, "delete chain ip kube-proxy {gone}");
        }
    }
    text
}

/// Those that only `after` has.
fn new_endpoints(before: &Service, after: &Service) -> impl Iterator<Item = Ipv4Addr> {
    let endpoints = after.endpoints.iter().copied();
    endpoints.filter(|endpoint| !before.endpoints.contains(endpoint))
}

fn nftables_base() -> String {
    let node = IpAddr::from(Addresses::NODE.v4);
    format!(
        "table ip kube-proxy {{
           set cluster-ips {{ type ipv4_addr; }}
           set nodeport-ips {{ type ipv4_addr; elements = {{ {node} }}; }}
           map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
           map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
           map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
           map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
           map service-nodeports {{ type inet_proto . inet_service : verdict; }}

           chain mark-for-masquerade {{ meta mark set mark or 0x4000; }}
           chain masquerading {{
             meta mark and 0x4000 == 0 return
             meta mark set mark xor 0x4000
             masquerade fully-random
           }}
           chain services {{
             ip daddr . meta l4proto . th dport vmap @service-ips
             ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
           }}
           chain cluster-ips-check {{
             ip daddr @cluster-ips reject
             ip daddr {{ {CLUSTER_IPS} }} drop
           }}
           chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}
           chain service-endpoints-check {{
             ip daddr . meta l4proto . th dport vmap @no-endpoint-services
           }}
           chain nodeport-endpoints-check {{
             ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
           }}

           chain filter-prerouting-pre-dnat {{
             type filter hook prerouting priority -110;
             ct state new jump firewall-check
           }}
           chain filter-output-pre-dnat {{
             type filter hook output priority -110;
             ct state new jump firewall-check
           }}
           chain filter-forward {{
             type filter hook forward priority 0;
             ct state new jump service-endpoints-check
             ct state new jump cluster-ips-check
           }}
           chain filter-input {{
             type filter hook input priority 0;
             ct state new jump nodeport-endpoints-check
             ct state new jump service-endpoints-check
           }}
           chain filter-output {{
             type filter hook output priority 0;
             ct state new jump service-endpoints-check
             ct state new jump cluster-ips-check
           }}
           chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
           chain nat-output {{ type nat hook output priority -100; jump services; }}
           chain nat-postrouting {{
             type nat hook postrouting priority 100;
             jump masquerading
           }}
         }}\n"
    )
}

fn nftables_port(text: &mut String, service: &Service, port: &Port) {
    let Port {
        protocol, number, ..
    } = port;
    for endpoint in &service.endpoints {
        nftables_endpoint(text, service, port, *endpoint);
    }
    let own = nftables_chain("service", service, port);
    line!(text, "add chain ip kube-proxy {own}");
    nftables_choice(text, service, port);
    line!(
        text,
        "add element ip kube-proxy service-ips {{ {} . {protocol} . {number} : goto {own} }}",
        service.address
    );
    if let Some(node_port) = port.on_nodes {
        let external = nftables_chain("external", service, port);
        line!(text, "add chain ip kube-proxy {external}");
        line!(
            text,
            "add rule ip kube-proxy {external} jump mark-for-masquerade"
        );
        line!(text, "add rule ip kube-proxy {external} goto {own}");
        line!(
            text,
            "add element ip kube-proxy service-nodeports \
             {{ {protocol} . {node_port} : goto {external} }}"
        );
    }
}

/// How a Service's chain ends in one of an endpoint's.
fn nftables_choice(text: &mut String, service: &Service, port: &Port) {
    let own = nftables_chain("service", service, port);
    line!(
        text,
        "add rule ip kube-proxy {own} ip daddr {} ip saddr != {PODS} jump mark-for-masquerade",
        service.address
    );
    let choices = (0..)
        .zip(&service.endpoints)
        .map(|(index, endpoint): (u32, _)| {
            let chain = nftables_endpoint_chain(service, port, *endpoint);
            format!("{index} : goto {chain}")
        });
    let choices = choices.collect::<Vec<_>>().join(", ");
    let count = service.endpoints.len();
    line!(
        text,
        "add rule ip kube-proxy {own} numgen random mod {count} vmap {{ {choices} }}"
    );
}

fn nftables_endpoint(text: &mut String, service: &Service, port: &Port, endpoint: Ipv4Addr) {
    let Port {
        protocol, target, ..
    } = port;
    let chain = nftables_endpoint_chain(service, port, endpoint);
    line!(text, "add chain ip kube-proxy {chain}");
    line!(
        text,
        "add rule ip kube-proxy {chain} ip saddr {endpoint} jump mark-for-masquerade"
    );
    line!(
        text,
        "add rule ip kube-proxy {chain} meta l4proto {protocol} dnat to {endpoint}:{target}"
    );
}

fn nftables_chain(kind: &str, service: &Service, port: &Port) -> String {
    format!(
        "{kind}-bench/{}/{}/{}",
        service.name, port.protocol, port.name
    )
}

fn nftables_endpoint_chain(service: &Service, port: &Port, endpoint: Ipv4Addr) -> String {
    let chain = nftables_chain("endpoint", service, port);
    format!("{chain}__{endpoint}/{}", port.target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::services;

    const FEW: Services = Services { count: 12 };

    #[test]
    fn the_service_that_is_asked_is_last() {
        let text = iptables(FEW);
        let heads = text
            .lines()
            .filter(|line| line.starts_with("-A KUBE-SERVICES -d"));
        let heads: Vec<_> = heads.collect();
        assert_eq!(heads.len(), 11 + 3);
        assert!(heads[11..].iter().all(|head| head.contains("bench/target")));
        let longest = text.lines().filter_map(|line| line.strip_prefix(':'));
        let longest = longest.filter_map(|line| line.split(' ').next().map(str::len));
        assert!(longest.max() <= Some(28));
    }

    #[test]
    fn a_change_writes_one_service_and_the_list() {
        let (before, after) = (services::other(3, 0), services::other(3, 1));
        let text = iptables_change(FEW, &before, &after);
        let chains = text.lines().filter(|line| line.starts_with(":KUBE-SVC"));
        assert_eq!(chains.count(), 1);
        assert_eq!(text.matches("\n-X ").count(), 3);
        let text = nftables_change(&before, &after);
        assert_eq!(text.matches("delete chain").count(), 3);
        assert_eq!(text.matches("dnat to").count(), 3);
        assert!(!text.contains("element"));
    }
}
