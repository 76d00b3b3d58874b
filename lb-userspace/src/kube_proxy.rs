//! What kube-proxy leaves in the kernel: found, shown and removed.
//!
//! Exactly what its own `--cleanup` takes for its own (`pkg/proxy/*/cleanup.go`
//! and `CleanupLeftovers` of Kubernetes): kubelet's chains, which begin with
//! `KUBE-` too, are not among it, nor is a rule of anybody else. The tables are
//! read and changed by the system's own programs, as kube-proxy does it: what is
//! not installed has not been used either.

mod iptables;
mod ipvs;
mod nftables;
pub mod process;
mod tool;

use std::{collections::BTreeSet, fmt, io};

use self::{iptables::Removal, ipvs::Ipvs, nftables::Table};
use crate::datapath::Family;

/// All that is there.
#[derive(Debug, Default)]
pub struct Leftovers {
    iptables: Vec<Removal>,
    nftables: Vec<Table>,
    ipvs: Ipvs,
}

/// Something that could not be done, and what it was.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct Error {
    what: String,
    source: io::Error,
}

impl Family {
    /// As nftables calls it.
    const fn name(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }
}

impl Error {
    fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self {
            what: what.into(),
            source: source.into(),
        }
    }
}

impl Leftovers {
    /// Looks in the network namespace of the caller.
    ///
    /// # Errors
    ///
    /// If what is there cannot be read; programs that are not installed count as
    /// never used.
    pub fn find() -> Result<Self, Error> {
        Ok(Self {
            iptables: iptables::find()?,
            nftables: nftables::find()?,
            ipvs: ipvs::find()?,
        })
    }

    pub fn is_empty(&self) -> bool {
        let Self {
            iptables,
            nftables,
            ipvs,
        } = self;
        iptables.iter().all(Removal::is_empty) && nftables.is_empty() && ipvs.is_empty()
    }

    /// Removes all of it. New connections to Services are served by whoever else
    /// is there. Established ones that went by iptables or nftables go on, as
    /// the kernel's connection tracking knows them; those by IPVS end.
    ///
    /// # Errors
    ///
    /// What could not be removed; everything before it has been.
    pub fn remove(&self) -> Result<(), Error> {
        self.iptables.iter().try_for_each(Removal::apply)?;
        nftables::delete(&self.nftables)?;
        self.ipvs.remove()
    }

    /// In a few words each: `iptables nat: 12 chains`.
    pub fn summary(&self) -> Vec<String> {
        let tables = self.iptables.iter().filter(|removal| !removal.is_empty());
        let tables = tables.map(Removal::summary);
        let nftables = self.nftables.iter().map(ToString::to_string);
        tables.chain(nftables).chain(self.ipvs.summary()).collect()
    }

    /// What its removal harms, in sentences.
    ///
    /// The kernel tracks connections, and translates those that it knows to be
    /// translated, only while a rule is there that asks for it. Most CNIs have
    /// one that masquerades pods.
    ///
    /// # Errors
    ///
    /// If the rules of others cannot be read.
    pub fn harm(&self) -> Result<Vec<String>, Error> {
        let iptables = self.iptables.iter().filter(|removal| !removal.is_empty());
        let families = iptables.map(|removal| removal.family);
        let nftables = self.nftables.iter().map(|table| table.family);
        let families: BTreeSet<_> = families.chain(nftables).collect();
        let mut harm: Vec<_> = self.ipvs.harm().into_iter().collect();
        for family in families {
            if !self.others_translate(family)? {
                harm.push(format!(
                    "no other rule of {} translates addresses: connections that kube-proxy has \
                     translated end with its rules",
                    family.name()
                ));
            }
        }
        Ok(harm)
    }

    fn others_translate(&self, family: Family) -> Result<bool, Error> {
        let mut iptables = self.iptables.iter().filter(|it| it.family == family);
        if iptables.any(|removal| removal.others_translate) {
            return Ok(true);
        }
        let with_iptables = self.iptables.iter().any(|it| it.family == family);
        nftables::others_translate(family, with_iptables)
    }

    /// Chains that stay since somebody else's rules use them.
    pub fn kept(&self) -> impl Iterator<Item = String> {
        self.iptables.iter().flat_map(Removal::kept)
    }
}

/// A line for each thing that would be removed.
impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iptables
            .iter()
            .try_for_each(|removal| removal.fmt(f))?;
        for table in &self.nftables {
            writeln!(f, "{table}")?;
        }
        self.ipvs.fmt(f)
    }
}
