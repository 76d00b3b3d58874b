//! `klb get`: what the maps hold.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    net::{IpAddr, SocketAddr},
};

use lb_common::service::{
    BackendRef, FRONTEND_DROP, FRONTEND_LOCAL_POLICY, FrontendKind, ServiceEntry,
};
use serde::Serialize;

use super::{Names, PortId, names, open_maps, print, protocol_name, table::Table};
use crate::{
    args::{GetArgs, What},
    datapath::{
        Family, FrontendKey, MapError, Maps, SlotValue,
        inspect::{self, DeviceHooks},
        kernel::{Flow, Socket},
        pins::Pins,
    },
};

/// Backends of a frontend that a table names before it counts the rest.
const SHOWN_BACKENDS: usize = 4;

/// Runs `klb get`.
pub fn run(args: &GetArgs) -> anyhow::Result<()> {
    let namespace = args.namespace.as_deref();
    if args.what == What::Devices {
        let document = DeviceList {
            devices: devices(&Pins::new(&args.paths.bpffs))?,
        };
        return print(args.output, &document, |list| {
            device_table(&list.devices).to_string()
        });
    }
    let (_, maps) = open_maps(&args.paths)?;
    let names = names(&maps)?;
    match args.what {
        What::Services => {
            let mut services = services(&maps)?;
            services.retain(|service| service.service.is_in(namespace));
            print(args.output, &ServiceList { services }, service_table)
        }
        What::Backends => {
            let mut backends = backends(&maps)?;
            backends.retain(|backend| backend.service.is_in(namespace));
            print(args.output, &BackendList { backends }, backend_table)
        }
        What::Flows => {
            let flows = maps
                .flows()?
                .into_iter()
                .map(|flow| FlowRow::new(&flow, &names));
            let mut flows: Vec<FlowRow> =
                flows.filter(|flow| flow.service.is_in(namespace)).collect();
            flows.sort_by(|a, b| (&a.service, a.client).cmp(&(&b.service, b.client)));
            print(args.output, &FlowList { flows }, flow_table)
        }
        What::Sockets => {
            let sockets = maps.sockets()?.into_iter();
            let sockets = sockets.map(|socket| SocketRow::new(&socket, &names));
            let mut sockets: Vec<SocketRow> = sockets
                .filter(|socket| socket.service.is_in(namespace))
                .collect();
            sockets.sort_by(|a, b| (&a.service, a.cookie).cmp(&(&b.service, b.cookie)));
            print(args.output, &SocketList { sockets }, socket_table)
        }
        What::Devices => unreachable!("handled above, since it reads no map"),
    }
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Endpoint {
    address: IpAddr,
    port: u16,
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
struct Ranges {
    slots: BTreeMap<(Family, u32, u32), Vec<SlotValue>>,
}

impl Ranges {
    fn read(
        &mut self,
        maps: &impl Maps,
        key: FrontendKey,
        entry: &ServiceEntry,
    ) -> Result<&[SlotValue], MapError> {
        let family = Family::of(key.addr);
        match self
            .slots
            .entry((family, entry.first_slot, entry.slot_count))
        {
            btree_map::Entry::Occupied(known) => Ok(known.into_mut()),
            btree_map::Entry::Vacant(unknown) => {
                let end = entry.first_slot.saturating_add(entry.slot_count);
                let slots = (entry.first_slot..end).map(|index| maps.slot(family, index));
                Ok(unknown.insert(slots.collect::<Result<_, _>>()?))
            }
        }
    }
}

/// The Service ports and their frontends, as the kernel has them.
fn services(maps: &impl Maps) -> Result<Vec<ServiceRow>, MapError> {
    let names = Names {
        metas: maps.metas()?,
    };
    let mut ranges = Ranges::default();
    let mut frontends = BTreeMap::<u32, Vec<FrontendRow>>::new();
    for (key, entry) in maps.services()? {
        let slots = ranges.read(maps, key, &entry)?;
        frontends
            .entry(entry.service)
            .or_default()
            .push(frontend_row(key, &entry, slots));
    }
    let rows = frontends.into_iter().map(|(service, mut frontends)| {
        frontends.sort();
        let meta = names.metas.get(&service);
        ServiceRow {
            service: names.port(service),
            port: meta.map_or(0, |meta| meta.port.get()),
            protocol: meta.map_or_else(String::new, |meta| protocol_name(meta.protocol)),
            frontends,
        }
    });
    let mut rows: Vec<ServiceRow> = rows.collect();
    rows.sort_by(|a, b| (&a.service, a.port, &a.protocol).cmp(&(&b.service, b.port, &b.protocol)));
    Ok(rows)
}

fn frontend_row(key: FrontendKey, entry: &ServiceEntry, slots: &[SlotValue]) -> FrontendRow {
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
        backends: slots.iter().map(|slot| slot.addr.into()).collect(),
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

fn service_table(list: &ServiceList) -> String {
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
    table.to_string()
}

fn backend_summary(frontend: &FrontendRow) -> String {
    if frontend.backends.is_empty() {
        return format!("none: {}", frontend.verdict);
    }
    let shown = frontend.backends.iter().take(SHOWN_BACKENDS);
    let mut parts: Vec<String> = shown
        .map(|backend| SocketAddr::new(backend.address, backend.port).to_string())
        .collect();
    if frontend.backends.len() > SHOWN_BACKENDS {
        parts.push(format!(
            "and {} more",
            frontend.backends.len() - SHOWN_BACKENDS
        ));
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
}

/// The backends in the slots of frontends, each once per Service port.
fn backends(maps: &impl Maps) -> Result<Vec<BackendRow>, MapError> {
    let names = Names {
        metas: maps.metas()?,
    };
    let mut ranges = Ranges::default();
    let mut rows = BTreeSet::new();
    for (key, entry) in maps.services()? {
        for slot in ranges.read(maps, key, &entry)? {
            let BackendRef { id, generation } = slot.backend;
            rows.insert(BackendRow {
                service: names.port(entry.service),
                protocol: protocol_name(key.protocol),
                address: slot.addr.ip(),
                port: slot.addr.port(),
                local: slot.local,
                id,
                generation,
            });
        }
    }
    Ok(rows.into_iter().collect())
}

fn backend_table(list: &BackendList) -> String {
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
    table.to_string()
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
}

fn flow_table(list: &FlowList) -> String {
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
    table.to_string()
}

/// A time as kubectl shortens it: `45s`, `12m`, `3h`.
fn seconds(seconds: u32) -> String {
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
}

fn socket_table(list: &SocketList) -> String {
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
    table.to_string()
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
    table
}
