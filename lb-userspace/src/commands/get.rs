//! `klb get`: what the maps hold.

mod affinity;
mod document;
mod selection;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use lb_common::{
    flow::State,
    service::{
        BackendRef, FRONTEND_DROP, FRONTEND_LOCAL_POLICY, FRONTEND_MAGLEV, FRONTEND_SOURCE_RANGES,
        FrontendKind, ServiceEntry,
    },
};
use serde::Serialize;

use self::{document::Document, selection::Selection};
use super::{
    Names, PortId, look::Tone, open_maps, open_pins, print, protocol_name,
    require_agents_namespace, status::MapRow, table::Table,
};
use crate::{
    args::{GetArgs, What},
    datapath::{
        Family, FrontendKey, MapError, Maps, SlotValue,
        inspect::{self, DeviceHooks},
        kernel::{Flow, KernelMaps, Socket},
        pins::Pins,
        traffic::{Totals, TrafficTable},
    },
};

/// Backends of a frontend that a table names before it counts the rest.
const SHOWN_BACKENDS: usize = 4;

/// Before the verdict, where there is no backend to name.
const NOBODY: &str = "none: ";

/// Runs `klb get`.
pub fn run(args: &GetArgs) -> anyhow::Result<()> {
    let selection = Selection::new(args)?;
    if args.watch {
        return watch::run(args, || read(args, &selection));
    }
    print(args.output, &read(args, &selection)?, |document, look| {
        document.table(args.output).shown(look)
    })
}

/// What is there now. The maps are opened every time: those of before may have
/// been removed meanwhile.
fn read(args: &GetArgs, selection: &Selection<'_>) -> anyhow::Result<Document> {
    let pins = open_pins(&args.paths)?;
    let maps = open_maps(&pins)?;
    let document = match args.what {
        What::Services => get_services(selection, &maps)?,
        What::Backends => get_backends(selection, &maps, &pins)?,
        What::Flows => get_flows(selection, &maps)?,
        What::Sockets => get_sockets(selection, &maps)?,
        What::Affinity => Document::Affinity(affinity::read(&maps, selection)?),
        What::Maps => get_maps(selection, &maps)?,
        What::Devices => get_devices(selection, &maps, &pins)?,
    };
    // Who watches may wait for it to come.
    if document.is_empty() && !args.watch {
        let ports: Vec<_> = maps.metas()?.values().map(PortId::from).collect();
        selection.require_known(ports.iter())?;
    }
    Ok(document)
}

fn get_services(selection: &Selection<'_>, maps: &KernelMaps) -> anyhow::Result<Document> {
    let mut services = services(maps, |port| selection.has_service(port))?;
    services.retain_mut(|row| {
        row.frontends.retain(|frontend| {
            let addr = SocketAddr::new(frontend.address, frontend.port);
            let inner = frontend.inner_backends.iter().flatten();
            let backends = frontend.backends.iter().chain(inner);
            selection.has_vip(addr) && selection.has_any_backend(backends.map(Endpoint::socket))
        });
        !row.frontends.is_empty()
    });
    Ok(Document::Services(ServiceList { services }))
}

fn get_backends(
    selection: &Selection<'_>,
    maps: &KernelMaps,
    pins: &Pins,
) -> anyhow::Result<Document> {
    let mut backends = backends(maps, |port| selection.has_service(port))?;
    backends.retain(|row| selection.has_backend(SocketAddr::new(row.address, row.port)));
    add_traffic(&mut backends, &TrafficTable::open(pins)?)?;
    Ok(Document::Backends(BackendList { backends }))
}

fn add_traffic(backends: &mut [BackendRow], traffic: &TrafficTable) -> Result<(), MapError> {
    for row in backends {
        let life = BackendRef {
            id: row.id,
            generation: row.generation,
        };
        if traffic.counts(life) {
            row.traffic = Some(traffic.read(life)?.into());
        }
    }
    Ok(())
}

/// A Service port as `klb get services` has it, and its backends as `klb get
/// backends` has them.
#[derive(Debug, Serialize)]
pub(crate) struct PortDetail {
    service: ServiceRow,
    backends: Vec<BackendRow>,
}

impl PortDetail {
    /// `None` if there is no such port.
    pub(crate) fn read(
        maps: &impl Maps,
        traffic: &TrafficTable,
        wanted: &PortId,
    ) -> Result<Option<Self>, MapError> {
        let Some(service) = services(maps, |port| port == wanted)?.pop() else {
            return Ok(None);
        };
        let mut backends = backends(maps, |port| port == wanted)?;
        add_traffic(&mut backends, traffic)?;
        Ok(Some(Self { service, backends }))
    }
}

fn get_flows(selection: &Selection<'_>, maps: &KernelMaps) -> anyhow::Result<Document> {
    let names = Names::read(maps)?;
    let rows = maps.flows()?.into_iter();
    let mut flows: Vec<_> = rows.map(|flow| FlowRow::new(&flow, &names)).collect();
    flows.retain(|row| {
        selection.has_service(&row.service)
            && selection.has_vip(row.frontend)
            && selection.has_backend(row.backend)
            && selection.has_client(row.client)
    });
    flows.sort_by(|a, b| a.order().cmp(&b.order()));
    Ok(Document::Flows(FlowList { flows }))
}

fn get_sockets(selection: &Selection<'_>, maps: &KernelMaps) -> anyhow::Result<Document> {
    let names = Names::read(maps)?;
    let rows = maps.sockets()?.into_iter();
    let mut sockets: Vec<_> = rows.map(|socket| SocketRow::new(&socket, &names)).collect();
    sockets.retain(|row| {
        selection.has_service(&row.service)
            && selection.has_vip(row.frontend)
            && selection.has_backend(row.backend)
    });
    sockets.sort_by(|a, b| a.order().cmp(&b.order()));
    Ok(Document::Sockets(SocketList { sockets }))
}

fn get_devices(
    selection: &Selection<'_>,
    maps: &KernelMaps,
    pins: &Pins,
) -> anyhow::Result<Document> {
    require_agents_namespace(&maps.config()?)?;
    let mut devices = devices(pins)?;
    devices.retain(|device| selection.has_name(device.name.as_deref().unwrap_or_default()));
    Ok(Document::Devices(DeviceList { devices }))
}

fn get_maps(selection: &Selection<'_>, maps: &KernelMaps) -> anyhow::Result<Document> {
    let fill = maps.fill()?.into_iter();
    let fill = fill.filter(|fill| selection.has_name(fill.map));
    let maps = fill.map(MapRow::from).collect();
    Ok(Document::Maps(MapList { maps }))
}

#[derive(Debug, Serialize)]
struct MapList {
    maps: Vec<MapRow>,
}

/// `klb get services -o json`, on which other programs rely.
#[derive(Debug, Serialize)]
struct ServiceList {
    services: Vec<ServiceRow>,
}

/// A Service port.
#[derive(Debug, Serialize)]
struct ServiceRow {
    #[serde(flatten)]
    service: PortId,
    port: u16,
    protocol: String,
    /// How a backend is chosen for a new flow.
    algorithm: &'static str,
    /// Seconds for which a client keeps its backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    affinity_seconds: Option<u32>,
    frontends: Vec<FrontendRow>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct FrontendRow {
    kind: &'static str,
    address: IpAddr,
    port: u16,
    policy: &'static str,
    verdict: &'static str,
    backends: BTreeSet<Endpoint>,
    /// For clients on this node, where theirs are others.
    #[serde(skip_serializing_if = "Option::is_none")]
    inner_backends: Option<BTreeSet<Endpoint>>,
    /// Which clients may come, where not all may.
    #[serde(skip_serializing_if = "Option::is_none")]
    source_ranges: Option<Vec<IpNet>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Endpoint {
    address: IpAddr,
    port: u16,
}

impl Endpoint {
    fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(addr: SocketAddr) -> Self {
        Self {
            address: addr.ip(),
            port: addr.port(),
        }
    }
}

/// The slot ranges of a family's frontends, each read once: frontends of a
/// Service share theirs.
#[derive(Default)]
pub(super) struct Ranges {
    slots: BTreeMap<(Family, u32, u32), Vec<SlotValue>>,
}

impl Ranges {
    /// What new flows of clients outside get.
    pub(super) fn outer(
        &mut self,
        maps: &impl Maps,
        key: FrontendKey,
        entry: &ServiceEntry,
    ) -> Result<&[SlotValue], MapError> {
        let family = Family::of(key.addr);
        self.read(maps, family, entry.first_slot, entry.slot_count)
    }

    /// As [`Self::outer`], of clients on this node.
    pub(super) fn inner(
        &mut self,
        maps: &impl Maps,
        key: FrontendKey,
        entry: &ServiceEntry,
    ) -> Result<&[SlotValue], MapError> {
        let family = Family::of(key.addr);
        self.read(maps, family, entry.inner_first_slot, entry.inner_slot_count)
    }

    pub(super) fn read(
        &mut self,
        maps: &impl Maps,
        family: Family,
        first: u32,
        count: u32,
    ) -> Result<&[SlotValue], MapError> {
        match self.slots.entry((family, first, count)) {
            btree_map::Entry::Occupied(known) => Ok(known.into_mut()),
            btree_map::Entry::Vacant(unknown) => {
                let slots = first..first.saturating_add(count);
                let slots = slots.map(|index| maps.slot(family, index));
                Ok(unknown.insert(slots.collect::<Result<_, _>>()?))
            }
        }
    }
}

/// Those Service ports that are wanted, and their frontends, as the kernel has
/// them.
fn services(
    maps: &impl Maps,
    is_wanted: impl Fn(&PortId) -> bool,
) -> Result<Vec<ServiceRow>, MapError> {
    let names = Names::read(maps)?;
    let mut wanted = Wanted::new(&names, is_wanted);
    let mut ranges = Ranges::default();
    let sources = maps.ranges()?;
    let mut services = BTreeMap::<u32, (ServiceEntry, Vec<FrontendRow>)>::new();
    for (key, entry) in maps.services()? {
        // What is said of an address itself is no frontend.
        if entry.kind == FrontendKind::Address as u8 || !wanted.has(entry.service) {
            continue;
        }
        let backends = endpoints(ranges.outer(maps, key, &entry)?);
        let inner = endpoints(ranges.inner(maps, key, &entry)?);
        let mut row = frontend_row(key, &entry, backends, inner);
        if entry.flags & FRONTEND_SOURCE_RANGES != 0 {
            row.source_ranges = Some(sources_of(&sources, key, &entry));
        }
        let service = services.entry(entry.service);
        let (_, frontends) = service.or_insert_with(|| (entry, Vec::new()));
        frontends.push(row);
    }
    let rows = services
        .into_iter()
        .map(|(service, (entry, mut frontends))| {
            frontends.sort();
            let meta = names.metas.get(&service);
            ServiceRow {
                service: names.port(service),
                port: meta.map_or(0, |meta| meta.port.get()),
                protocol: meta.map_or_else(String::new, |meta| protocol_name(meta.protocol)),
                algorithm: if entry.flags & FRONTEND_MAGLEV == 0 {
                    "random"
                } else {
                    "maglev"
                },
                affinity_seconds: (entry.affinity > 0).then_some(entry.affinity),
                frontends,
            }
        });
    let mut rows: Vec<ServiceRow> = rows.collect();
    rows.sort_by(|a, b| (&a.service, a.port, &a.protocol).cmp(&(&b.service, b.port, &b.protocol)));
    Ok(rows)
}

/// Which Service ports somebody wants to see, by id: a name is compared once,
/// however many frontends have it.
struct Wanted<'a, F> {
    names: &'a Names,
    choose: F,
    known: BTreeMap<u32, bool>,
}

impl<'a, F: Fn(&PortId) -> bool> Wanted<'a, F> {
    const fn new(names: &'a Names, choose: F) -> Self {
        Self {
            names,
            choose,
            known: BTreeMap::new(),
        }
    }

    fn has(&mut self, service: u32) -> bool {
        let Self {
            names,
            choose,
            known,
        } = self;
        let found = known.entry(service);
        *found.or_insert_with(|| choose(&names.port(service)))
    }
}

fn endpoints(slots: &[SlotValue]) -> BTreeSet<Endpoint> {
    slots.iter().map(|slot| slot.addr.into()).collect()
}

/// Those of the frontend's family.
fn sources_of(
    sources: &BTreeSet<(u32, IpNet)>,
    key: FrontendKey,
    entry: &ServiceEntry,
) -> Vec<IpNet> {
    let sources = sources.iter();
    sources
        .filter(|(service, _)| *service == entry.service)
        .map(|(_, range)| *range)
        .filter(|range| Family::of(range.addr()) == Family::of(key.addr))
        .collect()
}

fn frontend_row(
    key: FrontendKey,
    entry: &ServiceEntry,
    backends: BTreeSet<Endpoint>,
    inner: BTreeSet<Endpoint>,
) -> FrontendRow {
    FrontendRow {
        kind: FrontendKind::from_number(entry.kind).map_or("Unknown", FrontendKind::name),
        address: key.addr,
        port: key.port,
        policy: if entry.flags & FRONTEND_LOCAL_POLICY == 0 {
            "Cluster"
        } else {
            "Local"
        },
        verdict: verdict(entry),
        source_ranges: None,
        inner_backends: (inner != backends).then_some(inner),
        backends,
    }
}

/// What happens to a new flow.
const fn verdict(entry: &ServiceEntry) -> &'static str {
    if entry.slot_count > 0 {
        "forward"
    } else if entry.flags & FRONTEND_DROP != 0 {
        "drop"
    } else {
        "reject"
    }
}

/// Whether new flows get anywhere.
fn verdict_tone(backends: &str) -> Tone {
    if backends.starts_with(NOBODY) {
        Tone::Bad
    } else {
        Tone::Good
    }
}

fn service_table(list: &ServiceList) -> Table {
    let mut table = Table::new(&[
        "NAMESPACE",
        "SERVICE",
        "PORT",
        "KIND",
        "FRONTEND",
        "POLICY",
        "BACKENDS",
    ]);
    for row in &list.services {
        for frontend in &row.frontends {
            table.row([
                row.service.namespace.clone(),
                row.service.service(),
                format!("{}/{}", row.port, row.protocol),
                frontend.kind.to_owned(),
                SocketAddr::new(frontend.address, frontend.port).to_string(),
                frontend.policy.to_owned(),
                backend_summary(frontend),
            ]);
        }
    }
    table.judged(&["BACKENDS"], |backends| Some(verdict_tone(backends)))
}

/// A line for each frontend, with all its backends.
fn wide_service_table(list: &ServiceList) -> Table {
    let mut table = Table::new(&[
        "NAMESPACE",
        "SERVICE",
        "PORT",
        "KIND",
        "FRONTEND",
        "POLICY",
        "ALGORITHM",
        "AFFINITY",
        "SOURCES",
        "BACKENDS",
        "FROM-HERE",
    ]);
    for row in &list.services {
        for frontend in &row.frontends {
            let ranges = frontend.source_ranges.iter().flatten();
            let ranges: Vec<_> = ranges.map(ToString::to_string).collect();
            let inner = frontend.inner_backends.as_ref();
            table.row([
                row.service.namespace.clone(),
                row.service.service(),
                format!("{}/{}", row.port, row.protocol),
                frontend.kind.to_owned(),
                SocketAddr::new(frontend.address, frontend.port).to_string(),
                frontend.policy.to_owned(),
                row.algorithm.to_owned(),
                row.affinity_seconds.map(seconds).unwrap_or_default(),
                ranges.join(","),
                match frontend.backends.len() {
                    0 => format!("{NOBODY}{}", frontend.verdict),
                    _ => all_of(&frontend.backends),
                },
                inner.map(all_of).unwrap_or_default(),
            ]);
        }
    }
    table.judged(&["BACKENDS"], |backends| Some(verdict_tone(backends)))
}

fn all_of(backends: &BTreeSet<Endpoint>) -> String {
    let backends = backends.iter().map(|backend| backend.socket().to_string());
    backends.collect::<Vec<_>>().join(",")
}

fn backend_summary(frontend: &FrontendRow) -> String {
    let outer = if frontend.backends.is_empty() {
        format!("{NOBODY}{}", frontend.verdict)
    } else {
        shortened(&frontend.backends)
    };
    match &frontend.inner_backends {
        Some(inner) => format!("{outer}; from here: {}", shortened(inner)),
        None => outer,
    }
}

/// Some of many.
fn shortened(backends: &BTreeSet<Endpoint>) -> String {
    let shown = backends.iter().take(SHOWN_BACKENDS);
    let mut parts: Vec<String> = shown
        .map(|backend| SocketAddr::new(backend.address, backend.port).to_string())
        .collect();
    if backends.len() > SHOWN_BACKENDS {
        parts.push(format!("and {} more", backends.len() - SHOWN_BACKENDS));
    }
    parts.join(", ")
}

#[derive(Debug, Serialize)]
struct BackendList {
    backends: Vec<BackendRow>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct BackendRow {
    #[serde(flatten)]
    service: PortId,
    protocol: String,
    address: IpAddr,
    port: u16,
    local: bool,
    id: u32,
    generation: u32,
    /// `null` for one that has no counters of its own.
    traffic: Option<Traffic>,
}

/// What a backend has had since it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Traffic {
    flows: u64,
    packets_in: u64,
    bytes_in: u64,
    packets_out: u64,
    bytes_out: u64,
}

impl From<Totals> for Traffic {
    fn from(totals: Totals) -> Self {
        let Totals {
            flows,
            packets_in,
            bytes_in,
            packets_out,
            bytes_out,
        } = totals;
        Self {
            flows,
            packets_in,
            bytes_in,
            packets_out,
            bytes_out,
        }
    }
}

/// The backends in the slots of frontends, each once per Service port that is
/// wanted.
fn backends(
    maps: &impl Maps,
    is_wanted: impl Fn(&PortId) -> bool,
) -> Result<Vec<BackendRow>, MapError> {
    let names = Names::read(maps)?;
    let mut wanted = Wanted::new(&names, is_wanted);
    let mut ranges = Ranges::default();
    let mut slots = BTreeMap::<u32, BTreeSet<SlotValue>>::new();
    for (key, entry) in maps.services()? {
        if !wanted.has(entry.service) {
            continue;
        }
        let of_service = slots.entry(entry.service).or_default();
        of_service.extend(ranges.outer(maps, key, &entry)?);
        of_service.extend(ranges.inner(maps, key, &entry)?);
    }
    let mut rows = BTreeSet::new();
    for (service, slots) in slots {
        let meta = names.metas.get(&service);
        rows.extend(slots.into_iter().map(|slot| BackendRow {
            service: names.port(service),
            protocol: meta.map_or_else(String::new, |meta| protocol_name(meta.protocol)),
            address: slot.addr.ip(),
            port: slot.addr.port(),
            local: slot.local,
            id: slot.backend.id,
            generation: slot.backend.generation,
            traffic: None,
        }));
    }
    Ok(rows.into_iter().collect())
}

fn backend_table(list: &BackendList) -> Table {
    let mut table = Table::new(&["NAMESPACE", "SERVICE", "PROTOCOL", "BACKEND", "LOCAL", "ID"]);
    for backend in &list.backends {
        table.row([
            backend.service.namespace.clone(),
            backend.service.service(),
            backend.protocol.clone(),
            SocketAddr::new(backend.address, backend.port).to_string(),
            if backend.local { "yes" } else { "no" }.to_owned(),
            backend.id.to_string(),
        ]);
    }
    table
}

fn wide_backend_table(list: &BackendList) -> Table {
    let mut table = Table::new(&[
        "NAMESPACE",
        "SERVICE",
        "PROTOCOL",
        "BACKEND",
        "LOCAL",
        "ID",
        "LIFE",
        "FLOWS",
        "PACKETS-IN",
        "BYTES-IN",
        "PACKETS-OUT",
        "BYTES-OUT",
    ]);
    for backend in &list.backends {
        let count = |of: fn(&Traffic) -> u64| {
            let count = backend.traffic.as_ref().map(of);
            count.map(|count| count.to_string()).unwrap_or_default()
        };
        table.row([
            backend.service.namespace.clone(),
            backend.service.service(),
            backend.protocol.clone(),
            SocketAddr::new(backend.address, backend.port).to_string(),
            if backend.local { "yes" } else { "no" }.to_owned(),
            backend.id.to_string(),
            backend.generation.to_string(),
            count(|traffic| traffic.flows),
            count(|traffic| traffic.packets_in),
            count(|traffic| traffic.bytes_in),
            count(|traffic| traffic.packets_out),
            count(|traffic| traffic.bytes_out),
        ]);
    }
    table
}

#[derive(Debug, Serialize)]
struct FlowList {
    flows: Vec<FlowRow>,
}

#[derive(Debug, Serialize)]
struct FlowRow {
    #[serde(flatten)]
    service: PortId,
    protocol: String,
    client: SocketAddr,
    frontend: SocketAddr,
    backend: SocketAddr,
    state: &'static str,
    idle_seconds: u32,
}

impl FlowRow {
    fn new(flow: &Flow, names: &Names) -> Self {
        Self {
            service: names.port(flow.service),
            protocol: protocol_name(flow.protocol),
            client: flow.client,
            frontend: flow.frontend,
            backend: flow.backend,
            state: flow.state.name(),
            idle_seconds: flow.idle,
        }
    }

    /// No two living flows have all of it in common, so that a list is in the
    /// same order however the kernel tells of them.
    fn order(&self) -> (&PortId, SocketAddr, SocketAddr, SocketAddr, &str) {
        let Self {
            service, client, ..
        } = self;
        (
            service,
            *client,
            self.frontend,
            self.backend,
            &self.protocol,
        )
    }
}

fn state_tone(state: &str) -> Option<Tone> {
    let state = State::ALL.into_iter().find(|known| known.name() == state)?;
    match state {
        State::Established | State::Replied => Some(Tone::Good),
        State::Reset => Some(Tone::Bad),
        // As every flow begins and ends.
        State::Opening | State::HalfClosed | State::Closed | State::Unreplied => None,
    }
}

fn flow_table(list: &FlowList) -> Table {
    let mut table = Table::new(&[
        "PROTOCOL",
        "CLIENT",
        "FRONTEND",
        "BACKEND",
        "NAMESPACE",
        "SERVICE",
        "STATE",
        "IDLE",
    ]);
    for flow in &list.flows {
        table.row([
            flow.protocol.clone(),
            flow.client.to_string(),
            flow.frontend.to_string(),
            flow.backend.to_string(),
            flow.service.namespace.clone(),
            flow.service.service(),
            flow.state.to_owned(),
            seconds(flow.idle_seconds),
        ]);
    }
    table.judged(&["STATE"], state_tone)
}

/// A time as kubectl shortens it: `45s`, `12m`, `3h`.
pub(super) fn seconds(seconds: u32) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        _ => format!("{}h", seconds / 3600),
    }
}

#[derive(Debug, Serialize)]
struct SocketList {
    sockets: Vec<SocketRow>,
}

#[derive(Debug, Serialize)]
struct SocketRow {
    #[serde(flatten)]
    service: PortId,
    protocol: String,
    cookie: u64,
    frontend: SocketAddr,
    backend: SocketAddr,
}

impl SocketRow {
    fn new(socket: &Socket, names: &Names) -> Self {
        Self {
            service: names.port(socket.service),
            protocol: protocol_name(socket.protocol),
            cookie: socket.cookie,
            frontend: socket.frontend,
            backend: socket.backend,
        }
    }

    /// As a flow's. Cookies come last: each CPU has a stock of its own, so they tell
    /// nothing of who was first.
    fn order(&self) -> (&PortId, SocketAddr, SocketAddr, &str, u64) {
        let Self {
            service, cookie, ..
        } = self;
        (
            service,
            self.frontend,
            self.backend,
            &self.protocol,
            *cookie,
        )
    }
}

fn socket_table(list: &SocketList) -> Table {
    let mut table = Table::new(&[
        "PROTOCOL",
        "COOKIE",
        "FRONTEND",
        "BACKEND",
        "NAMESPACE",
        "SERVICE",
    ]);
    for socket in &list.sockets {
        table.row([
            socket.protocol.clone(),
            format!("{:x}", socket.cookie),
            socket.frontend.to_string(),
            socket.backend.to_string(),
            socket.service.namespace.clone(),
            socket.service.service(),
        ]);
    }
    table
}

#[derive(Debug, Serialize)]
struct DeviceList {
    devices: Vec<DeviceRow>,
}

/// A device and how each of its hooks is attached; `null` where it is not.
#[derive(Clone, Debug, Serialize)]
pub(super) struct DeviceRow {
    pub(super) name: Option<String>,
    pub(super) index: u32,
    pub(super) role: Option<String>,
    pub(super) tc_ingress: Option<&'static str>,
    pub(super) tc_egress: Option<&'static str>,
    pub(super) xdp: Option<&'static str>,
}

impl From<DeviceHooks> for DeviceRow {
    fn from(device: DeviceHooks) -> Self {
        Self {
            name: device.name,
            index: device.index,
            role: device.role.map(|role| role.to_string()),
            tc_ingress: device.tc_ingress,
            tc_egress: device.tc_egress,
            xdp: device.xdp,
        }
    }
}

/// The devices, uplinks first.
pub(super) fn devices(pins: &Pins) -> std::io::Result<Vec<DeviceRow>> {
    let mut devices = inspect::devices(pins)?;
    devices.sort_by(|a, b| (a.role, &a.name, a.index).cmp(&(b.role, &b.name, b.index)));
    Ok(devices.into_iter().map(DeviceRow::from).collect())
}

pub(super) fn device_table(devices: &[DeviceRow]) -> Table {
    let mut table = Table::new(&["DEVICE", "INDEX", "ROLE", "TC-INGRESS", "TC-EGRESS", "XDP"]);
    for device in devices {
        let hook = |hook: Option<&str>| hook.unwrap_or_default().to_owned();
        table.row([
            device.name.clone().unwrap_or_else(|| "(gone)".to_owned()),
            device.index.to_string(),
            device.role.clone().unwrap_or_default(),
            hook(device.tc_ingress),
            hook(device.tc_egress),
            hook(device.xdp),
        ]);
    }
    let judge = |hook: &str| Some(if hook == "-" { Tone::Bad } else { Tone::Good });
    // XDP is for uplinks, and not for all of them.
    table.judged(&["TC-INGRESS", "TC-EGRESS"], judge)
}

#[cfg(test)]
mod tests {
    use lb_common::{
        Port, flow,
        service::{BackendRef, Name, ServiceMeta},
    };
    use serde_json::json;

    use super::*;
    use crate::datapath::memory::MemoryMaps;

    /// A Service port with a ClusterIP, a NodePort that shares its slots, a
    /// LoadBalancer IP without local backends, and an external IP without any;
    /// and what is said of the ClusterIP itself.
    fn maps() -> MemoryMaps {
        let mut maps = MemoryMaps::default();
        let name = |text| Name::new(text).expect("short enough");
        let meta = ServiceMeta {
            namespace: name("shop"),
            name: name("web"),
            port_name: name("http"),
            port: Port::from(80),
            protocol: flow::TCP,
            pad: 0,
        };
        maps.put_meta(7, &meta).expect("written");
        for (index, backend) in ["10.244.0.6:3000", "10.244.0.5:3000", "10.244.0.5:3000"]
            .iter()
            .enumerate()
        {
            let addr: SocketAddr = backend.parse().expect("address");
            let slot = SlotValue {
                addr,
                local: addr.ip().to_string().ends_with('5'),
                backend: BackendRef {
                    id: u32::from(addr.ip().to_string().ends_with('5')) + 1,
                    generation: 1,
                },
            };
            maps.put_slot(Family::V4, 4 + index as u32, &slot)
                .expect("written");
        }
        for (addr, port, kind, flags, slot_count, inner_slot_count) in [
            ("10.96.0.1", 80, FrontendKind::ClusterIp, 0, 3, 3),
            ("10.96.0.1", 0, FrontendKind::Address, 0, 3, 3),
            ("192.0.2.1", 30080, FrontendKind::NodePort, 0, 3, 3),
            (
                "203.0.113.1",
                80,
                FrontendKind::LoadBalancer,
                FRONTEND_LOCAL_POLICY | FRONTEND_DROP | FRONTEND_SOURCE_RANGES,
                0,
                1,
            ),
            ("198.51.100.1", 80, FrontendKind::ExternalIp, 0, 0, 0),
        ] {
            let key = FrontendKey {
                addr: addr.parse().expect("address"),
                port,
                protocol: flow::TCP,
            };
            let entry = ServiceEntry {
                first_slot: 4,
                slot_count,
                inner_first_slot: 4,
                inner_slot_count,
                service: 7,
                affinity: 60,
                kind: kind as u8,
                flags,
                ..ServiceEntry::default()
            };
            maps.put_service(key, &entry).expect("written");
        }
        for (service, range) in [(7, "192.0.2.0/24"), (7, "fd00::/8"), (8, "10.0.0.0/8")] {
            let range = range.parse().expect("a network");
            maps.put_range(service, range).expect("written");
        }
        maps
    }

    #[test]
    fn services_have_the_shape_that_other_programs_rely_on() {
        let list = ServiceList {
            services: services(&maps(), |_any| true).expect("read"),
        };
        let backends = json!([
            {"address": "10.244.0.5", "port": 3000},
            {"address": "10.244.0.6", "port": 3000},
        ]);
        let local = json!({
            "kind": "LoadBalancer", "address": "203.0.113.1", "port": 80,
            "policy": "Local", "verdict": "drop", "backends": [],
            "inner_backends": [{"address": "10.244.0.6", "port": 3000}],
            "source_ranges": ["192.0.2.0/24"],
        });
        let frontend = |kind, address, port, policy, verdict, backends| {
            json!({
                "kind": kind, "address": address, "port": port,
                "policy": policy, "verdict": verdict, "backends": backends,
            })
        };
        assert_eq!(
            serde_json::to_value(&list).expect("serialized"),
            json!({"services": [{
                "namespace": "shop",
                "name": "web",
                "port_name": "http",
                "port": 80,
                "protocol": "TCP",
                "algorithm": "random",
                "affinity_seconds": 60,
                "frontends": [
                    frontend("ClusterIP", "10.96.0.1", 80, "Cluster", "forward", backends.clone()),
                    frontend("ExternalIP", "198.51.100.1", 80, "Cluster", "reject", json!([])),
                    local,
                    frontend("NodePort", "192.0.2.1", 30080, "Cluster", "forward", backends),
                ],
            }]})
        );
    }

    #[test]
    fn a_table_names_a_frontend_per_line() {
        let list = ServiceList {
            services: services(&maps(), |_any| true).expect("read"),
        };
        let table = service_table(&list).to_string();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 5, "{table}");
        assert!(
            lines[1].starts_with("shop        web:http   80/TCP   ClusterIP"),
            "{table}"
        );
        assert!(
            lines[1].ends_with("10.244.0.5:3000, 10.244.0.6:3000"),
            "{table}"
        );
        assert!(lines[2].ends_with("none: reject"), "{table}");
        assert!(
            lines[3].ends_with("none: drop; from here: 10.244.0.6:3000"),
            "{table}"
        );
    }

    #[test]
    fn many_backends_are_counted() {
        let endpoint = |last: u8| Endpoint::from(SocketAddr::from(([10, 0, 0, last], 80)));
        let frontend = FrontendRow {
            kind: "ClusterIP",
            address: IpAddr::from([10, 96, 0, 1]),
            port: 80,
            policy: "Cluster",
            verdict: "forward",
            backends: (1..=6).map(endpoint).collect(),
            inner_backends: None,
            source_ranges: None,
        };
        assert_eq!(
            backend_summary(&frontend),
            "10.0.0.1:80, 10.0.0.2:80, 10.0.0.3:80, 10.0.0.4:80, and 2 more"
        );
    }

    #[test]
    fn a_backend_is_listed_once_however_many_slots_it_has() {
        let backends = backends(&maps(), |_any| true).expect("read");
        let rows: Vec<_> = backends
            .iter()
            .map(|row| (row.address.to_string(), row.local, row.id))
            .collect();
        assert_eq!(
            rows,
            [
                ("10.244.0.5".to_owned(), true, 2),
                ("10.244.0.6".to_owned(), false, 1)
            ]
        );
    }

    #[test]
    fn a_frontend_without_a_name_is_still_shown() {
        let mut maps = maps();
        maps.delete_meta(7).expect("deleted");
        let services = services(&maps, |_any| true).expect("read");
        assert_eq!(services[0].service.name, "unknown-7");
    }

    #[test]
    fn only_what_is_wanted_is_read() {
        let mut maps = maps();
        let key = FrontendKey {
            addr: [10, 96, 0, 2].into(),
            port: 80,
            protocol: flow::TCP,
        };
        let other = ServiceEntry {
            service: 8,
            first_slot: 4,
            slot_count: 1,
            ..ServiceEntry::default()
        };
        maps.put_service(key, &other).expect("written");
        let named = |name: &'static str| move |port: &PortId| port.name == name;
        for (name, services_found, backends_found) in
            [("web", 1, 2), ("unknown-8", 1, 1), ("other", 0, 0)]
        {
            let rows = services(&maps, named(name)).expect("read");
            assert_eq!(rows.len(), services_found, "{name}");
            assert!(rows.iter().all(|row| row.service.name == name), "{rows:?}");
            let rows = backends(&maps, named(name)).expect("read");
            assert_eq!(rows.len(), backends_found, "{name}");
        }
    }

    #[test]
    fn times_are_shortened() {
        let times = [0, 119, 120, 7199, 7200, 90_000].map(seconds);
        assert_eq!(times, ["0s", "119s", "2m", "119m", "2h", "25h"]);
    }
}
