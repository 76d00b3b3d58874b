//! Who else balances load on this node.

use std::collections::BTreeSet;

use aya::programs::loaded_programs;

use super::check::Check;
use crate::{
    errors::Chain,
    kube_proxy::{Leftovers, process},
};

#[derive(Clone, Debug)]
pub(super) struct Facts {
    preflight: bool,
    /// How a kube-proxy shows.
    kube_proxy: Option<String>,
    /// What is there of kube-proxy's rules, or why nobody knows.
    rules: Result<Vec<String>, String>,
    /// Names of all loaded BPF programs.
    programs: BTreeSet<String>,
}

impl Facts {
    pub(super) fn gather(preflight: bool) -> Self {
        let rules = Leftovers::find().map(|leftovers| leftovers.summary());
        let programs = loaded_programs().filter_map(Result::ok);
        let names = programs.filter_map(|info| Some(info.name_as_str()?.to_owned()));
        Self {
            preflight,
            kube_proxy: process::find(),
            rules: rules.map_err(|error| Chain(&error).to_string()),
            programs: names.collect(),
        }
    }

    pub(super) fn checks(&self) -> Vec<Check> {
        vec![
            self.kube_proxy(),
            self.rules(),
            self.cilium(),
            self.calico(),
        ]
    }

    fn kube_proxy(&self) -> Check {
        const NAME: &str = "kube-proxy";
        match &self.kube_proxy {
            None => Check::ok(NAME, "none runs here"),
            Some(sign) if self.preflight => Check::ok(
                NAME,
                format!("{sign}; klb takes over from it while both run"),
            ),
            Some(sign) => Check::warn(
                NAME,
                format!("{sign}; klb goes before it"),
                "uninstall it, for it costs memory and time: kubectl -n kube-system delete \
                 daemonset kube-proxy",
            ),
        }
    }

    fn rules(&self) -> Check {
        const NAME: &str = "kube-proxy's rules";
        match &self.rules {
            Err(error) => Check::warn(NAME, format!("not known: {error}"), "run it as root"),
            Ok(rules) if rules.is_empty() => Check::ok(NAME, "none"),
            Ok(rules) if self.preflight || self.kube_proxy.is_some() => {
                Check::ok(NAME, rules.join("; "))
            }
            Ok(rules) => Check::warn(
                NAME,
                format!("nobody keeps these up to date: {}", rules.join("; ")),
                "klb cleanup --kube-proxy, on the node",
            ),
        }
    }

    fn cilium(&self) -> Check {
        const NAME: &str = "Cilium";
        let names = self.named(&["cil_"]);
        // The kernel keeps 15 letters of a name.
        if names.iter().any(|name| name.starts_with("cil_sock")) {
            return Check::warn(
                NAME,
                format!(
                    "translates Services at sockets, as klb does: {}",
                    names.join(", ")
                ),
                "let one of them do it: kubeProxyReplacement=false in Cilium's configuration",
            );
        }
        if names.is_empty() {
            return Check::ok(NAME, "no program of it is loaded");
        }
        Check::ok(NAME, format!("beside klb: {}", names.join(", ")))
    }

    fn calico(&self) -> Check {
        const NAME: &str = "Calico";
        let names = self.named(&["cali_", "calico_"]);
        if names.is_empty() {
            return Check::ok(NAME, "no program of it is loaded");
        }
        Check::warn(
            NAME,
            format!(
                "its eBPF data plane serves Services, too: {}",
                names.join(", ")
            ),
            "let one of them do it: linuxDataplane: Iptables or Nftables in Calico's Installation",
        )
    }

    /// The loaded programs whose names begin so.
    fn named(&self, prefixes: &[&str]) -> Vec<&str> {
        let names = self.programs.iter().map(String::as_str);
        let is_named = |name: &&str| prefixes.iter().any(|prefix| name.starts_with(prefix));
        names.filter(is_named).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::check::Level::{self, Ok as Fine, Warn};

    fn facts() -> Facts {
        Facts {
            preflight: false,
            kube_proxy: None,
            rules: Ok(Vec::new()),
            programs: BTreeSet::from(["klb_tc_in".to_owned(), "sd_devices".to_owned()]),
        }
    }

    fn levels(facts: &Facts) -> Vec<Level> {
        let checks = facts.checks().into_iter();
        checks.map(|check| check.level).collect()
    }

    #[test]
    fn kube_proxy_is_no_fault_before_klb_is_there() {
        let rules = Ok(vec!["nftables: table ip kube-proxy".to_owned()]);
        let sign = Some("kube-proxy runs".to_owned());
        for (preflight, kube_proxy, rules, expected) in [
            (false, None, Ok(Vec::new()), [Fine, Fine]),
            (true, sign.clone(), rules.clone(), [Fine, Fine]),
            (false, sign, rules.clone(), [Warn, Fine]),
            (false, None, rules.clone(), [Fine, Warn]),
            (true, None, rules, [Fine, Fine]),
            (true, None, Err("no right".to_owned()), [Fine, Warn]),
        ] {
            let facts = Facts {
                preflight,
                kube_proxy,
                rules,
                ..facts()
            };
            assert_eq!(levels(&facts)[..2], expected, "{facts:?}");
        }
    }

    #[test]
    fn others_are_known_by_their_programs() {
        for (programs, expected) in [
            (&["klb_tc_in"][..], [Fine, Fine]),
            (&["cil_from_contai", "cil_from_netdev"], [Fine, Fine]),
            (&["cil_from_contai", "cil_sock4_conne"], [Warn, Fine]),
            (&["cali_tc_preambl"], [Fine, Warn]),
            (&["calico_connect_"], [Fine, Warn]),
        ] {
            let programs = programs.iter().map(ToString::to_string).collect();
            let facts = Facts {
                programs,
                ..facts()
            };
            assert_eq!(levels(&facts)[2..], expected, "{facts:?}");
        }
    }
}
