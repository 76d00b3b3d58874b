//! Plans and the content of the maps, told in the same words. Pure, but for
//! [`Content::read`].

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use lb_common::service::{
    FRONTEND_DROP, FRONTEND_ECHO, FRONTEND_LOCAL_POLICY, FRONTEND_MAGLEV, FRONTEND_REFUSE,
    FRONTEND_SOURCE_RANGES, FrontendKind, ServiceEntry, is_living,
};
use serde::Serialize;

use crate::{
    commands::{Names, PortId, get::Ranges},
    datapath::{Family, FrontendKey, MapError, Maps, SlotValue},
    model::NamespacedName,
    plan::{Backend, FrontendPlan, PortPlan, ServicePlan},
    reconcile::{entry, parked, table_size},
};

/// Values of a frontend by the names of its fields. Most fields have one value.
type Fields = BTreeMap<&'static str, BTreeSet<String>>;

/// A frontend, as it should be or as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Frontend {
    service: PortId,
    fields: Fields,
}

/// What the maps hold, in words.
pub(super) struct Content {
    frontends: BTreeMap<FrontendKey, Frontend>,
    /// Service ports that have a name.
    ports: BTreeSet<PortId>,
}

/// How something differs from what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    /// It should be in the maps, and is not.
    Missing,
    /// It is in the maps, and should not be.
    More,
    Differs,
}

impl State {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::More => "more",
            Self::Differs => "differs",
        }
    }
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Difference {
    #[serde(flatten)]
    pub(super) service: PortId,
    /// `ADDRESS:PORT/PROTOCOL`, or an address whose own entry it is; none where
    /// it is about the name of the Service port.
    pub(super) frontend: Option<String>,
    pub(super) state: State,
    pub(super) changes: Vec<Change>,
}

/// What of a field is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Change {
    pub(super) field: &'static str,
    /// What should be there and is not.
    pub(super) missing: Vec<String>,
    /// What is there and should not be.
    pub(super) more: Vec<String>,
}

/// What the maps should hold and what they hold, side by side. Services that
/// are held stay as they are, whatever that is.
pub(super) fn differences<'a>(
    plans: impl Iterator<Item = &'a ServicePlan>,
    found: &Content,
    held: &BTreeSet<NamespacedName>,
) -> Vec<Difference> {
    let wanted = Content::of_plans(plans);
    let is_held = |port: &PortId| held.contains(&NamespacedName::new(&port.namespace, &port.name));
    let keys: BTreeSet<_> = wanted
        .frontends
        .keys()
        .chain(found.frontends.keys())
        .collect();
    let mut differences = Vec::new();
    for key in keys {
        let (wanted, found) = (wanted.frontends.get(key), found.frontends.get(key));
        if wanted.is_none() && found.is_some_and(|found| is_held(&found.service)) {
            continue;
        }
        differences.extend(difference(key, wanted, found));
    }
    differences.extend(differences_of_names(&wanted.ports, &found.ports, |port| {
        is_held(port) || differences.iter().any(|other| other.service == *port)
    }));
    differences.sort_by(|a, b| (&a.service, &a.frontend).cmp(&(&b.service, &b.frontend)));
    differences
}

/// Of Service ports none of whose frontends tells it already.
fn differences_of_names(
    wanted: &BTreeSet<PortId>,
    found: &BTreeSet<PortId>,
    is_told: impl Fn(&PortId) -> bool,
) -> Vec<Difference> {
    let untold = wanted.symmetric_difference(found);
    let untold = untold.filter(|port| !is_told(port));
    untold
        .map(|port| Difference {
            service: port.clone(),
            frontend: None,
            state: if wanted.contains(port) {
                State::Missing
            } else {
                State::More
            },
            changes: Vec::new(),
        })
        .collect()
}

fn difference(
    key: &FrontendKey,
    wanted: Option<&Frontend>,
    found: Option<&Frontend>,
) -> Option<Difference> {
    let (state, service) = match (wanted, found) {
        (Some(wanted), Some(found)) if wanted == found => return None,
        (Some(wanted), Some(_)) => (State::Differs, &wanted.service),
        (Some(wanted), None) => (State::Missing, &wanted.service),
        (None, Some(found)) => (State::More, &found.service),
        (None, None) => return None,
    };
    let nothing = Fields::new();
    let fields = |side: Option<&Frontend>| side.map(|side| side.fields.clone());
    let (mut wanted_fields, mut found_fields) = (
        fields(wanted).unwrap_or_else(|| nothing.clone()),
        fields(found).unwrap_or(nothing),
    );
    if let (Some(wanted), Some(found)) = (wanted, found)
        && wanted.service != found.service
    {
        wanted_fields.insert("service", one(wanted.service.to_string()));
        found_fields.insert("service", one(found.service.to_string()));
    }
    Some(Difference {
        service: service.clone(),
        frontend: Some(key.to_string()),
        state,
        changes: changes(&wanted_fields, &found_fields),
    })
}

fn changes(wanted: &Fields, found: &Fields) -> Vec<Change> {
    let names: BTreeSet<_> = wanted.keys().chain(found.keys()).collect();
    let none = BTreeSet::new();
    let changes = names.into_iter().map(|field| {
        let wanted = wanted.get(field).unwrap_or(&none);
        let found = found.get(field).unwrap_or(&none);
        Change {
            field,
            missing: wanted.difference(found).cloned().collect(),
            more: found.difference(wanted).cloned().collect(),
        }
    });
    changes
        .filter(|change| !change.missing.is_empty() || !change.more.is_empty())
        .collect()
}

impl Content {
    /// What the maps hold now.
    pub(super) fn read(maps: &impl Maps) -> Result<Self, MapError> {
        let names = Names::read(maps)?;
        let generations = maps.backends()?;
        let lives = |slot: &SlotValue| {
            let SlotValue { backend, .. } = slot;
            is_living(backend.generation)
                && generations.get(&backend.id) == Some(&backend.generation)
        };
        let sources = maps.ranges()?;
        let networks = Family::ALL.map(|family| maps.cluster_network(family));
        let networks = networks.into_iter().collect::<Result<Vec<_>, _>>()?;
        let mut ranges = Ranges::default();
        let mut frontends = BTreeMap::new();
        for (key, entry) in maps.services()? {
            let family = Family::of(key.addr);
            let count = entry.slot_count.saturating_add(entry.parked.into());
            let outer = ranges.read(maps, family, entry.first_slot, count)?.to_vec();
            let inner = ranges.inner(maps, key, &entry)?;
            let (listed, resting) = outer.split_at(entry.slot_count as usize);
            let words = |slots: &[SlotValue]| {
                let words = slots.iter().map(|slot| word(slot.into(), lives(slot)));
                words.collect()
            };
            let mut fields = fields_of(&entry);
            fields.insert(BACKENDS, words(listed));
            fields.insert(INNER, words(inner));
            fields.insert(RESTING, words(resting));
            fields.insert(TABLE, one(entry.slot_count.to_string()));
            if entry.flags & FRONTEND_SOURCE_RANGES != 0 {
                let own = sources.iter().filter(|(port, _)| *port == entry.service);
                fields.insert(SOURCES, networks_of(family, own.map(|(_, range)| range)));
            }
            if entry.flags & FRONTEND_REFUSE != 0 {
                let mut networks = networks.iter().flatten();
                let is_in = networks.any(|network| network.contains(&key.addr));
                fields.insert(REFUSES, one(if is_in { YES } else { NO }.to_owned()));
            }
            let service = names.port(entry.service);
            frontends.insert(key, Frontend { service, fields });
        }
        Ok(Self {
            frontends,
            ports: names.metas.values().map(PortId::from).collect(),
        })
    }

    fn of_plans<'a>(plans: impl Iterator<Item = &'a ServicePlan>) -> Self {
        let mut this = Self {
            frontends: BTreeMap::new(),
            ports: BTreeSet::new(),
        };
        for plan in plans {
            for port in &plan.ports {
                let service = PortId {
                    namespace: plan.service.namespace().to_owned(),
                    name: plan.service.name().to_owned(),
                    port_name: port.port.name.clone(),
                };
                for frontend in &port.frontends {
                    let fields = fields_of_plan(port, frontend);
                    let service = service.clone();
                    let frontend_in_words = Frontend { service, fields };
                    this.frontends.insert(frontend.key, frontend_in_words);
                }
                this.ports.insert(service);
            }
        }
        this
    }

    /// The Services that have something in the maps, with their frontends.
    pub(super) fn services(&self) -> BTreeMap<NamespacedName, BTreeSet<FrontendKey>> {
        let mut services = BTreeMap::<_, BTreeSet<_>>::new();
        let id = |port: &PortId| NamespacedName::new(&port.namespace, &port.name);
        for port in &self.ports {
            services.entry(id(port)).or_default();
        }
        for (key, frontend) in &self.frontends {
            let keys = services.entry(id(&frontend.service)).or_default();
            keys.insert(*key);
        }
        services
    }
}

const BACKENDS: &str = "backends";
/// For clients on this node.
const INNER: &str = "backends for clients here";
/// That old UDP flows stay with.
const RESTING: &str = "backends for old flows";
const TABLE: &str = "slots";
const SOURCES: &str = "source ranges";
const REFUSES: &str = "refuses other ports";
const YES: &str = "yes";
const NO: &str = "no";

fn fields_of_plan(port: &PortPlan, frontend: &FrontendPlan) -> Fields {
    let family = Family::of(frontend.key.addr);
    let entry = entry(frontend, port.choice, 0);
    let mut fields = fields_of(&entry);
    let words = |backends: &[Backend]| backends.iter().map(|it| word(*it, true)).collect();
    let inner = frontend.inner.as_ref().unwrap_or(&frontend.backends);
    fields.insert(BACKENDS, words(&frontend.backends));
    fields.insert(INNER, words(inner));
    fields.insert(RESTING, words(&parked(frontend, &port.alive)));
    let backends = frontend.backends.len();
    let slots = table_size(backends, port.choice).map_or(backends, |size| size as usize);
    fields.insert(TABLE, one(slots.to_string()));
    if entry.flags & FRONTEND_SOURCE_RANGES != 0 {
        fields.insert(SOURCES, networks_of(family, port.sources.iter()));
    }
    if entry.flags & FRONTEND_REFUSE != 0 {
        fields.insert(REFUSES, one(YES.to_owned()));
    }
    fields
}

/// What an entry says, but for where it leads.
fn fields_of(entry: &ServiceEntry) -> Fields {
    let has = |flag| entry.flags & flag != 0;
    let kind = FrontendKind::from_number(entry.kind).map_or("Unknown", FrontendKind::name);
    let algorithm = if has(FRONTEND_MAGLEV) {
        "maglev"
    } else {
        "random"
    };
    let of = |flag, yes: &'static str, no: &'static str| if has(flag) { yes } else { no };
    let values = [
        ("kind", kind),
        ("algorithm", algorithm),
        ("policy", of(FRONTEND_LOCAL_POLICY, "Local", "Cluster")),
        ("without backends", of(FRONTEND_DROP, "drop", "refuse")),
        ("answers pings", of(FRONTEND_ECHO, YES, NO)),
        ("for everybody", of(FRONTEND_SOURCE_RANGES, NO, YES)),
    ];
    let values = values.map(|(field, value)| (field, one(value.to_owned())));
    let mut fields = Fields::from(values);
    fields.insert("affinity seconds", one(entry.affinity.to_string()));
    fields
}

impl From<&SlotValue> for Backend {
    fn from(slot: &SlotValue) -> Self {
        Self {
            addr: slot.addr,
            local: slot.local,
        }
    }
}

fn word(backend: Backend, lives: bool) -> String {
    let here = if backend.local { " (here)" } else { "" };
    let dead = if lives { "" } else { " (dead)" };
    format!("{}{here}{dead}", backend.addr)
}

fn networks_of<'a>(family: Family, ranges: impl Iterator<Item = &'a IpNet>) -> BTreeSet<String> {
    let ranges = ranges.filter(|range| Family::of(range.addr()) == family);
    // The maps know no bits behind the prefix.
    ranges.map(|range| range.trunc().to_string()).collect()
}

fn one(value: String) -> BTreeSet<String> {
    BTreeSet::from([value])
}

#[cfg(test)]
mod tests;
