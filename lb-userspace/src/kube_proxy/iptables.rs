//! kube-proxy's chains in the tables of iptables, and the jumps to them.
//!
//! Of kube-proxy in the modes iptables and ipvs. Both kinds of tables are looked
//! at, those of the kernel's iptables (`legacy`) and those in nftables (`nft`):
//! a node that was switched from one to the other may have some in each.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
};

use super::{Error, Family, tool};

/// Chains by table.
const CHAINS: [(&str, &[&str]); 3] = [
    (
        "nat",
        &[
            "KUBE-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-POSTROUTING",
            "KUBE-MARK-MASQ",
            "KUBE-PROXY-CANARY",
            // Of the mode ipvs.
            "KUBE-NODE-PORT",
            "KUBE-LOAD-BALANCER",
        ],
    ),
    (
        "filter",
        &[
            "KUBE-SERVICES",
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-FORWARD",
            "KUBE-NODEPORTS",
            "KUBE-PROXY-FIREWALL",
            "KUBE-PROXY-CANARY",
            // Of the mode ipvs.
            "KUBE-NODE-PORT",
            "KUBE-SOURCE-RANGES-FIREWALL",
            "KUBE-IPVS-FILTER",
            "KUBE-IPVS-OUT-FILTER",
        ],
    ),
    ("mangle", &["KUBE-PROXY-CANARY"]),
];

/// Beginnings of the names of chains of Services and endpoints, in `nat`.
const PREFIXES: [&str; 6] = [
    "KUBE-SVC-",
    "KUBE-SVL-",
    "KUBE-FW-",
    "KUBE-EXT-",
    "KUBE-SEP-",
    "KUBE-XLB-",
];

fn is_kube_proxys(table: &str, chain: &str) -> bool {
    let mut tables = CHAINS.iter().filter(|(name, _)| *name == table);
    let by_name = tables.any(|(_, chains)| chains.contains(&chain));
    by_name || table == "nat" && PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

/// What is to be removed from the tables of one program.
#[derive(Debug)]
pub(super) struct Removal {
    /// `iptables-restore` or one of its kind.
    restore: PathBuf,
    /// `iptables`, `ip6tables-legacy` and so on, for people.
    name: String,
    pub(super) family: Family,
    /// Whether rules that stay translate addresses.
    pub(super) others_translate: bool,
    tables: Vec<TableRemoval>,
}

/// What is to be removed from one table.
#[derive(Debug, Default, PartialEq, Eq)]
struct TableRemoval {
    name: String,
    /// With the number of their rules.
    chains: BTreeMap<String, usize>,
    /// Rules in other chains, as `iptables-save` writes them.
    jumps: Vec<String>,
    /// Chains that somebody else's chain leads to, with its name; also by way of
    /// another such chain.
    kept: BTreeMap<String, String>,
}

/// Looks with every such program that is installed.
pub(super) fn find() -> Result<Vec<Removal>, Error> {
    let mut removals = Vec::new();
    for (family, program) in [(Family::V4, "iptables"), (Family::V6, "ip6tables")] {
        let kinds = ["-nft", "-legacy"].map(|kind| format!("{program}{kind}"));
        let mut names: Vec<_> = kinds.into_iter().filter(|name| is_there(name)).collect();
        if names.is_empty() && is_there(program) {
            names.push(program.to_owned());
        }
        for name in names {
            removals.extend(read(family, name)?);
        }
    }
    Ok(removals)
}

fn is_there(name: &str) -> bool {
    tool::find(&format!("{name}-save")).is_some()
}

/// `None` if only half of the program is there.
fn read(family: Family, name: String) -> Result<Option<Removal>, Error> {
    let programs = ["save", "restore"].map(|verb| tool::find(&format!("{name}-{verb}")));
    let [Some(save), Some(restore)] = programs else {
        return Ok(None);
    };
    let text = tool::output(&save, &[]).map_err(|error| Error::new(show(&save), error))?;
    let tables = parse(&text);
    Ok(Some(Removal {
        restore,
        name,
        family,
        others_translate: tables.iter().any(Table::others_translate),
        tables: tables.iter().map(Table::removal).collect(),
    }))
}

fn show(program: &Path) -> String {
    program.display().to_string()
}

/// One table of what `iptables-save` prints.
#[derive(Debug, Default)]
struct Table<'a> {
    name: &'a str,
    /// Those that the kernel brings.
    hooks: BTreeSet<&'a str>,
    chains: BTreeSet<&'a str>,
    /// Chain and the whole line.
    rules: Vec<(&'a str, &'a str)>,
}

fn parse(text: &str) -> Vec<Table<'_>> {
    let mut tables = Vec::<Table<'_>>::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(Table {
                name,
                ..Table::default()
            });
            continue;
        }
        let Some(table) = tables.last_mut() else {
            continue;
        };
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next()) {
            (Some("-A"), Some(chain)) => table.rules.push((chain, line)),
            (Some(word), Some(policy)) => {
                if let Some(chain) = word.strip_prefix(':') {
                    // Only a chain of the kernel's has a policy.
                    let chains = if policy == "-" {
                        &mut table.chains
                    } else {
                        &mut table.hooks
                    };
                    chains.insert(chain);
                }
            }
            _ => {}
        }
    }
    tables
}

/// The chain that a rule leads to: nothing may follow one that is no target of
/// the kernel's. A comment that ends so has a quotation mark behind it.
fn target(rule: &str) -> Option<&str> {
    let (before, target) = rule.rsplit_once(' ')?;
    matches!(before.rsplit_once(' '), Some((_, "-j" | "-g"))).then_some(target)
}

impl Table<'_> {
    fn removal(&self) -> TableRemoval {
        let owned = self.chains.iter().copied();
        let mut owned: BTreeSet<_> = owned
            .filter(|chain| is_kube_proxys(self.name, chain))
            .collect();
        let kept = self.kept(&owned);
        owned.retain(|chain| !kept.contains_key(*chain));
        let leads_to_owned = |rule: &str| target(rule).is_some_and(|chain| owned.contains(chain));
        let rules_of = |chain: &str| self.rules.iter().filter(|(of, _)| *of == chain).count();
        let jumps = self.rules.iter();
        let jumps = jumps.filter(|(chain, rule)| !owned.contains(chain) && leads_to_owned(rule));
        TableRemoval {
            name: self.name.to_owned(),
            jumps: jumps.map(|(_, rule)| (*rule).to_owned()).collect(),
            chains: owned
                .iter()
                .map(|chain| ((*chain).to_owned(), rules_of(chain)))
                .collect(),
            kept,
        }
    }

    /// Whether a rule translates addresses that is not kube-proxy's.
    fn others_translate(&self) -> bool {
        const TARGETS: [&str; 4] = ["MASQUERADE", "DNAT", "SNAT", "REDIRECT"];
        let mut rules = self.rules.iter();
        rules.any(|(chain, rule)| {
            let mut words = rule.split_ascii_whitespace();
            let target = words.find(|word| *word == "-j").and_then(|_| words.next());
            !is_kube_proxys(self.name, chain) && target.is_some_and(|it| TARGETS.contains(&it))
        })
    }

    /// The chains of kube-proxy's that others rely on: jumps from the kernel's
    /// chains are its own, those from chains of others are not.
    fn kept(&self, owned: &BTreeSet<&str>) -> BTreeMap<String, String> {
        let mut kept = BTreeMap::<String, String>::new();
        loop {
            let is_user = |chain: &str| {
                let is_strange = !owned.contains(chain) && !self.hooks.contains(chain);
                is_strange || kept.contains_key(chain)
            };
            let users = self.rules.iter().filter(|(chain, _)| is_user(chain));
            let used = users.filter_map(|(user, rule)| Some((target(rule)?, *user)));
            let new = used
                .filter(|(chain, _)| owned.contains(chain) && !kept.contains_key(*chain))
                .map(|(chain, user)| (chain.to_owned(), user.to_owned()));
            let new: Vec<_> = new.collect();
            if new.is_empty() {
                return kept;
            }
            kept.extend(new);
        }
    }
}

impl TableRemoval {
    fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// What `iptables-restore --noflush` reads: a chain that is named is
    /// emptied, and all of it happens at once.
    fn script(&self) -> String {
        let chains = self.chains.keys();
        let empty = chains.clone().map(|chain| format!(":{chain} - [0:0]\n"));
        let unlink = self
            .jumps
            .iter()
            .map(|rule| rule.replacen("-A", "-D", 1) + "\n");
        let delete = chains.map(|chain| format!("-X {chain}\n"));
        let lines: String = empty.chain(unlink).chain(delete).collect();
        format!("*{}\n{lines}COMMIT\n", self.name)
    }
}

impl Removal {
    pub(super) fn is_empty(&self) -> bool {
        self.tables.iter().all(TableRemoval::is_empty)
    }

    pub(super) fn apply(&self) -> Result<(), Error> {
        let tables = self.tables.iter().filter(|table| !table.is_empty());
        for table in tables {
            // `-w` is for the lock that the legacy kind takes.
            tool::feed(&self.restore, &["--noflush", "-w", "5"], &table.script()).map_err(
                |error| {
                    Error::new(
                        format!("{}, table {}", show(&self.restore), table.name),
                        error,
                    )
                },
            )?;
        }
        Ok(())
    }

    pub(super) fn summary(&self) -> String {
        let chains: usize = self.tables.iter().map(|table| table.chains.len()).sum();
        let jumps: usize = self.tables.iter().map(|table| table.jumps.len()).sum();
        format!(
            "{}: {chains} chains, {jumps} rules that lead to them",
            self.name
        )
    }

    pub(super) fn kept(&self) -> impl Iterator<Item = String> {
        self.tables.iter().flat_map(|table| {
            let kept = table.kept.iter();
            kept.map(|(chain, user)| {
                let Self { name, .. } = self;
                format!("{name} {}: chain {chain}, which {user} uses", table.name)
            })
        })
    }
}

impl fmt::Display for Removal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for table in &self.tables {
            let place = format!("{} {}", self.name, table.name);
            for rule in &table.jumps {
                writeln!(f, "{place}: rule {rule}")?;
            }
            for (chain, rules) in &table.chains {
                writeln!(f, "{place}: chain {chain} ({rules} rules)")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = r#"# Generated by iptables-save v1.8.9 (nf_tables)
*mangle
:PREROUTING ACCEPT [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*filter
:INPUT ACCEPT [10:1000]
:FORWARD DROP [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-SVC-IN-FILTER - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -m comment --comment "looks like -j KUBE-FORWARD" -j ACCEPT
-A INPUT -m comment --comment "ends like -j KUBE-FORWARD"
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-MARK-DROP - [0:0]
:KUBE-SVC-ERIFXISQEP7F7OF4 - [0:0]
:KUBE-SEP-YCLWSQVLOX6CYX3S - [0:0]
:MY-KUBE-SVC-CHAIN - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -j MY-KUBE-SVC-CHAIN
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 53 -j KUBE-SVC-ERIFXISQEP7F7OF4
-A KUBE-SVC-ERIFXISQEP7F7OF4 -j KUBE-SEP-YCLWSQVLOX6CYX3S
-A KUBE-SEP-YCLWSQVLOX6CYX3S -s 10.244.0.2/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-YCLWSQVLOX6CYX3S -p tcp -m tcp -j DNAT --to-destination 10.244.0.2:53
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
COMMIT
"#;

    fn removals(text: &str) -> Vec<TableRemoval> {
        parse(text).iter().map(Table::removal).collect()
    }

    #[test]
    fn kube_proxys_chains_go_and_kubelets_stay() {
        let [mangle, filter, nat] = &removals(SAVED)[..] else {
            panic!("three tables");
        };
        assert_eq!(
            mangle.script(),
            "*mangle\n:KUBE-PROXY-CANARY - [0:0]\n-X KUBE-PROXY-CANARY\nCOMMIT\n"
        );
        assert_eq!(
            filter.script(),
            "*filter\n:KUBE-FORWARD - [0:0]\n\
             -D FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD\n\
             -X KUBE-FORWARD\nCOMMIT\n"
        );
        let chains: Vec<_> = nat
            .chains
            .iter()
            .map(|(name, rules)| (&**name, *rules))
            .collect();
        assert_eq!(
            chains,
            [
                ("KUBE-MARK-MASQ", 1),
                ("KUBE-SEP-YCLWSQVLOX6CYX3S", 2),
                ("KUBE-SERVICES", 1),
                ("KUBE-SVC-ERIFXISQEP7F7OF4", 1),
            ]
        );
        assert_eq!(nat.jumps.len(), 2, "{:?}", nat.jumps);
        assert!(nat.kept.is_empty(), "{:?}", nat.kept);
    }

    #[test]
    fn what_others_use_stays() {
        let more = "-A MY-KUBE-SVC-CHAIN -p tcp -j KUBE-SVC-ERIFXISQEP7F7OF4\nCOMMIT\n";
        let (before, _) = SAVED.rsplit_once("COMMIT\n").expect("an end");
        let removals = removals(&format!("{before}{more}"));
        let nat = removals.last().expect("a table");
        let chains: Vec<_> = nat.chains.keys().collect();
        assert_eq!(chains, ["KUBE-SERVICES"]);
        let kept: Vec<_> = nat
            .kept
            .iter()
            .map(|(chain, user)| format!("{chain} {user}"))
            .collect();
        assert_eq!(
            kept,
            [
                "KUBE-MARK-MASQ KUBE-SEP-YCLWSQVLOX6CYX3S",
                "KUBE-SEP-YCLWSQVLOX6CYX3S KUBE-SVC-ERIFXISQEP7F7OF4",
                "KUBE-SVC-ERIFXISQEP7F7OF4 MY-KUBE-SVC-CHAIN",
            ]
        );
    }

    #[test]
    fn translations_of_others_are_told_from_kube_proxys() {
        let translates = |text: &str| parse(text).iter().any(Table::others_translate);
        assert!(!translates(SAVED));
        let (before, _) = SAVED.rsplit_once("COMMIT\n").expect("an end");
        for (rule, expected) in [
            ("-A MY-KUBE-SVC-CHAIN -o eth0 -j MASQUERADE --random", true),
            ("-A MY-KUBE-SVC-CHAIN -j ACCEPT", false),
            ("-A KUBE-MARK-MASQ -j MASQUERADE", false),
        ] {
            assert_eq!(
                translates(&format!("{before}{rule}\nCOMMIT\n")),
                expected,
                "{rule}"
            );
        }
    }

    #[test]
    fn there_is_nothing_to_do_where_kube_proxy_never_was() {
        let text =
            "*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n-A PREROUTING -j DOCKER\nCOMMIT\n";
        assert!(removals(text).iter().all(TableRemoval::is_empty));
        assert!(removals("").is_empty());
    }
}
