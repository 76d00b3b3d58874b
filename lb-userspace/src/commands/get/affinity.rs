//! `klb get affinity`: which client keeps which backend.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde::Serialize;

use super::{Names, PortId, seconds, selection::Selection};
use crate::{
    commands::table::Table,
    datapath::{
        MapError, Maps as _,
        kernel::{Client, KernelMaps},
    },
};

#[derive(Debug, Serialize)]
pub(super) struct List {
    affinity: Vec<Row>,
}

impl List {
    pub(super) fn is_empty(&self) -> bool {
        self.affinity.is_empty()
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Row {
    #[serde(flatten)]
    service: PortId,
    client: IpAddr,
    /// `null` if it has gone: the client's next flow gets another one.
    backend: Option<SocketAddr>,
    /// Seconds since the client's last new flow.
    idle_seconds: u32,
    /// Seconds after which it is free, if it opens none.
    left_seconds: u32,
}

/// Those that keep something still.
pub(super) fn read(maps: &KernelMaps, selection: &Selection<'_>) -> Result<List, MapError> {
    let names = Names::read(maps)?;
    let services = maps.services()?.into_values();
    let limits: BTreeMap<_, _> = services
        .map(|entry| (entry.service, entry.affinity))
        .collect();
    let members = maps.members()?;
    let rows = maps.clients()?.into_iter().filter_map(|client| {
        let Client {
            client,
            service,
            life,
            idle,
        } = client;
        Some(Row {
            service: names.port(service),
            client,
            backend: members.get(&life).map(|member| member.addr),
            idle_seconds: idle,
            left_seconds: limits.get(&service)?.checked_sub(idle)?,
        })
    });
    let mut affinity: Vec<_> = rows
        .filter(|row| selection.has_service(&row.service))
        .filter(|row| selection.has_client_address(row.client))
        .filter(|row| selection.has_any_backend(row.backend.into_iter()))
        .collect();
    affinity.sort();
    Ok(List { affinity })
}

pub(super) fn table(list: &List) -> Table {
    let mut table = Table::new(&["NAMESPACE", "SERVICE", "CLIENT", "BACKEND", "IDLE", "LEFT"]);
    for row in &list.affinity {
        let backend = row.backend.map(|backend| backend.to_string());
        table.row([
            row.service.namespace.clone(),
            row.service.service(),
            row.client.to_string(),
            backend.unwrap_or_else(|| "(gone)".to_owned()),
            seconds(row.idle_seconds),
            seconds(row.left_seconds),
        ]);
    }
    table
}
