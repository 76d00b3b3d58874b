//! The commands that look at the kernel and go: they work with no agent.

pub mod cleanup;
pub mod completions;
pub mod diff;
pub mod doctor;
pub mod explain;
pub mod get;
mod look;
pub mod status;
mod table;
pub mod top;
pub mod trace;

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Write as _},
};

use anyhow::{Context as _, bail};
use lb_common::{flow, node::Config, reason::Effect, service::ServiceMeta};
use serde::Serialize;

use self::look::Look;
use crate::{
    args::{Format, Paths},
    datapath::{MapError, Maps, inspect, kernel::KernelMaps, layouts, pins::Pins},
    errors::is_forbidden,
};

/// What was asked makes no sense, though each word of it does.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongUsage(String);

/// What to do where indices mean other devices.
const ELSEWHERE: &str = "the agent's devices are in another network namespace, by default the \
    node's: run klb there";

/// # Errors
/// If this is another network namespace than the agent's.
fn require_agents_namespace(config: &Config) -> anyhow::Result<()> {
    if inspect::is_elsewhere(config)? {
        bail!("{ELSEWHERE}");
    }
    Ok(())
}

/// The pins of an agent that has run.
fn open_pins(paths: &Paths) -> anyhow::Result<Pins> {
    let pins = paths.pins();
    let root = pins.root();
    if !root
        .try_exists()
        .with_context(|| root.display().to_string())?
    {
        let others = layouts::others(&pins)
            .with_context(|| root.display().to_string())?
            .iter()
            .map(layouts::name)
            .collect::<Vec<_>>();
        if !others.is_empty() {
            bail!(
                "the maps below {} are of layout {}, and this klb's is {}: use one of the agent's \
                 version",
                paths.bpffs.display(),
                others.join(" and "),
                layouts::name(&pins)
            );
        }
        bail!(
            "nothing of klb is pinned at {}: no agent has run with this --bpffs",
            root.display()
        );
    }
    Ok(pins)
}

/// The maps that are pinned.
fn open_maps(pins: &Pins) -> anyhow::Result<KernelMaps> {
    KernelMaps::open(pins).map_err(|error| {
        let is_forbidden = is_forbidden(&error);
        let error = anyhow::Error::new(error);
        if is_forbidden {
            return error;
        }
        error.context(format!(
            "the maps at {} are not as this klb's are: use one of the agent's version",
            pins.root().display()
        ))
    })
}

/// Prints a document as asked.
fn print<T: Serialize>(
    output: impl Into<Format>,
    document: &T,
    text: impl FnOnce(&T, Look) -> String,
) -> anyhow::Result<()> {
    print_text(&rendered(output, document, text)?)
}

/// A document as asked, for stdout.
fn rendered<T: Serialize>(
    output: impl Into<Format>,
    document: &T,
    text: impl FnOnce(&T, Look) -> String,
) -> anyhow::Result<String> {
    Ok(match output.into() {
        Format::Table | Format::Wide => text(document, Look::of_stdout()),
        Format::Json => serde_json::to_string_pretty(document)? + "\n",
        Format::Yaml => serde_yaml_ng::to_string(document)?,
    })
}

fn print_text(text: &str) -> anyhow::Result<()> {
    write_text(text).map(|_somebody_reads| ())
}

/// Whether somebody reads on: the reader may have seen enough, as with `| head`.
fn write_text(text: &str) -> anyhow::Result<bool> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        result => result.map(|()| true).context("writing to stdout"),
    }
}

/// A Service port, as people call it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct PortId {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) port_name: String,
}

impl PortId {
    /// `name`, or `name:port`.
    fn service(&self) -> String {
        match self.port_name.as_str() {
            "" => self.name.clone(),
            port => format!("{}:{port}", self.name),
        }
    }

    /// By namespace and name, as far as they are given; the name may be that of
    /// one port: `web:http`.
    fn is(&self, namespace: Option<&str>, service: Option<&str>) -> bool {
        let is_named = |wanted: &str| self.name == wanted || self.service() == wanted;
        namespace.is_none_or(|wanted| self.namespace == wanted) && service.is_none_or(is_named)
    }
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.service())
    }
}

impl From<&ServiceMeta> for PortId {
    fn from(meta: &ServiceMeta) -> Self {
        Self {
            namespace: meta.namespace.as_str().to_owned(),
            name: meta.name.as_str().to_owned(),
            port_name: meta.port_name.as_str().to_owned(),
        }
    }
}

/// What the Service ports are called.
struct Names {
    metas: BTreeMap<u32, ServiceMeta>,
}

impl Names {
    fn read(maps: &impl Maps) -> Result<Self, MapError> {
        Ok(Self {
            metas: maps.metas()?,
        })
    }

    fn port(&self, service: u32) -> PortId {
        port_of(&self.metas, service)
    }
}

/// What a Service port is called.
pub(crate) fn port_of(metas: &BTreeMap<u32, ServiceMeta>, service: u32) -> PortId {
    metas.get(&service).map_or_else(
        // Between the writes of an agent that starts or was killed.
        || PortId {
            namespace: String::new(),
            name: format!("unknown-{service}"),
            port_name: String::new(),
        },
        PortId::from,
    )
}

/// What a reason means for a packet, in a word.
pub const fn effect_name(effect: Effect) -> &'static str {
    match effect {
        Effect::Pass => "pass",
        Effect::Translate => "translate",
        Effect::Refuse => "refuse",
        Effect::Keep => "keep",
        Effect::Answer => "answer",
    }
}

/// A protocol as Kubernetes spells it.
pub fn protocol_name(protocol: u8) -> String {
    match protocol {
        flow::TCP => "TCP".to_owned(),
        flow::UDP => "UDP".to_owned(),
        flow::SCTP => "SCTP".to_owned(),
        other => other.to_string(),
    }
}
