//! kube-proxy's tables in nftables.

use std::{fmt, io};

use serde_json::Value;

use super::{Error, Family, tool};

/// As kube-proxy calls it, in each family.
const NAME: &str = "kube-proxy";

/// What a rule says that translates addresses: in nftables' words, and as the
/// name of a target of iptables.
const TRANSLATIONS: [&str; 8] = [
    "masquerade",
    "snat",
    "dnat",
    "redirect",
    "MASQUERADE",
    "SNAT",
    "DNAT",
    "REDIRECT",
];

/// A table, whosever it is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    family: String,
    name: String,
}

/// A table of kube-proxy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) family: Family,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nftables: table {} {NAME}", self.family.name())
    }
}

pub(super) fn find() -> Result<Vec<Table>, Error> {
    let tables = list()?;
    let own = Family::ALL.into_iter().filter(|family| {
        let mut tables = tables.iter();
        tables.any(|table| table.is_kube_proxys() && table.family == family.name())
    });
    Ok(own.map(|family| Table { family }).collect())
}

/// Whether another table translates addresses of a family, of those that
/// iptables does not list.
pub(super) fn others_translate(family: Family, with_iptables: bool) -> Result<bool, Error> {
    let Some(program) = tool::find("nft") else {
        return Ok(false);
    };
    for table in list()? {
        let is_of = table.family == family.name() || table.family == "inet";
        if !is_of || table.is_kube_proxys() || with_iptables && table.is_of_iptables() {
            continue;
        }
        let Listed { family, name } = &table;
        let text = tool::output(&program, &["-s", "list", "table", family, name]);
        let text = text.map_err(|error| Error::new("nft list table", error))?;
        if translates(&text) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn translates(text: &str) -> bool {
    let mut words = text.split(|letter: char| !letter.is_ascii_alphabetic());
    words.any(|word| TRANSLATIONS.contains(&word))
}

impl Listed {
    fn is_kube_proxys(&self) -> bool {
        self.name == NAME && self.family != "inet"
    }

    /// Those in which iptables keeps its rules in nftables.
    fn is_of_iptables(&self) -> bool {
        ["nat", "filter", "mangle", "raw", "security"].contains(&self.name.as_str())
            && self.family != "inet"
    }
}

fn list() -> Result<Vec<Listed>, Error> {
    let Some(program) = tool::find("nft") else {
        return Ok(Vec::new());
    };
    let tables = tool::output(&program, &["-j", "list", "tables"]).and_then(|text| parse(&text));
    tables.map_err(|error| Error::new("nft list tables", error))
}

fn parse(text: &str) -> io::Result<Vec<Listed>> {
    let document: Value = serde_json::from_str(text)?;
    let objects = document["nftables"].as_array().into_iter().flatten();
    let tables = objects.filter_map(|object| object.get("table"));
    let listed = tables.filter_map(|table| {
        let text = |field: &str| table[field].as_str().map(str::to_owned);
        Some(Listed {
            family: text("family")?,
            name: text("name")?,
        })
    });
    Ok(listed.collect())
}

/// All at once.
pub(super) fn delete(tables: &[Table]) -> Result<(), Error> {
    let Some(program) = tool::find("nft").filter(|_| !tables.is_empty()) else {
        return Ok(());
    };
    let lines = tables.iter();
    let lines = lines.map(|table| format!("delete table {} {NAME}\n", table.family.name()));
    tool::feed(&program, &["-f", "-"], &lines.collect::<String>())
        .map(drop)
        .map_err(|error| Error::new("nft delete table", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_kube_proxys_tables_are_found() {
        let text = r#"{"nftables": [
            {"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
            {"table": {"family": "ip", "name": "nat", "handle": 1}},
            {"table": {"family": "ip", "name": "kube-proxy", "handle": 2}},
            {"table": {"family": "inet", "name": "kube-proxy", "handle": 3}},
            {"table": {"family": "ip6", "name": "kube-proxy-mine", "handle": 5}}]}"#;
        let tables = parse(text).expect("JSON");
        let of = |holds: fn(&Listed) -> bool| tables.iter().map(holds).collect::<Vec<_>>();
        assert_eq!(of(Listed::is_kube_proxys), [false, true, false, false]);
        assert_eq!(of(Listed::is_of_iptables), [true, false, false, false]);
        assert_eq!(parse(r#"{"nftables": []}"#).expect("JSON"), []);
        assert!(parse("nonsense").is_err());
    }

    #[test]
    fn a_translation_is_known_by_a_word() {
        for (text, expected) in [
            ("chain a { oifname \"eth0\" masquerade random }", true),
            ("xt target \"MASQUERADE\"", true),
            ("ip daddr 192.0.2.1 dnat to 10.0.0.1", true),
            (
                "chain a { type nat hook postrouting priority srcnat; }",
                false,
            ),
            ("jump CNI-HOSTPORT-MASQ", false),
        ] {
            assert_eq!(translates(text), expected, "{text}");
        }
    }
}
