//! What `klb get` has read, of whatever kind.

use serde::Serialize;
use serde_json::Value;

use super::{
    BackendList, DeviceList, FlowList, MapList, ServiceList, SocketList, affinity, backend_table,
    device_table, flow_table, service_table, socket_table, wide_backend_table, wide_service_table,
};
use crate::{
    args::Format,
    commands::{status::map_table, table::Table},
};

/// What time alone changes, as columns and as fields.
const PASSING: [&str; 2] = ["IDLE", "LEFT"];
const PASSING_FIELDS: [&str; 2] = ["idle_seconds", "left_seconds"];

#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Document {
    Services(ServiceList),
    Backends(BackendList),
    Flows(FlowList),
    Sockets(SocketList),
    Affinity(affinity::List),
    Devices(DeviceList),
    Maps(MapList),
}

impl Document {
    pub(super) fn table(&self, output: Format) -> Table {
        let is_wide = output == Format::Wide;
        match self {
            Self::Services(list) if is_wide => wide_service_table(list),
            Self::Services(list) => service_table(list),
            Self::Backends(list) if is_wide => wide_backend_table(list),
            Self::Backends(list) => backend_table(list),
            Self::Flows(list) => flow_table(list),
            Self::Sockets(list) => socket_table(list),
            Self::Affinity(list) => affinity::table(list),
            Self::Devices(list) => device_table(&list.devices),
            Self::Maps(list) => map_table(&list.maps),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Services(list) => list.services.is_empty(),
            Self::Backends(list) => list.backends.is_empty(),
            Self::Flows(list) => list.flows.is_empty(),
            Self::Sockets(list) => list.sockets.is_empty(),
            Self::Affinity(list) => list.is_empty(),
            Self::Devices(list) => list.devices.is_empty(),
            Self::Maps(list) => list.maps.is_empty(),
        }
    }

    /// What makes it another one to those who see it so. That a flow has been
    /// idle for a second more is no news.
    pub(super) fn essence(&self, output: Format) -> anyhow::Result<String> {
        Ok(match output {
            Format::Table | Format::Wide => self.table(output).without(&PASSING).to_string(),
            Format::Json | Format::Yaml => lasting(serde_json::to_value(self)?).to_string(),
        })
    }
}

/// A document without what time alone changes.
fn lasting(value: Value) -> Value {
    match value {
        Value::Array(values) => values.into_iter().map(lasting).collect(),
        Value::Object(fields) => {
            let fields = fields.into_iter();
            let fields = fields.filter(|(name, _)| !PASSING_FIELDS.contains(&name.as_str()));
            fields.map(|(name, value)| (name, lasting(value))).collect()
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::FlowRow, *};
    use crate::commands::PortId;

    fn flow(state: &'static str, idle_seconds: u32) -> Document {
        let end = |text: &str| text.parse().expect("an address");
        let service = PortId {
            namespace: "default".to_owned(),
            name: "web".to_owned(),
            port_name: String::new(),
        };
        let flows = vec![FlowRow {
            service,
            protocol: "TCP".to_owned(),
            client: end("192.0.2.9:1024"),
            frontend: end("10.96.0.1:80"),
            backend: end("10.244.0.5:3000"),
            state,
            idle_seconds,
        }];
        Document::Flows(FlowList { flows })
    }

    #[test]
    fn time_that_passes_is_no_news() {
        for output in [Format::Table, Format::Wide, Format::Json, Format::Yaml] {
            let essence = |flow: Document| flow.essence(output).expect("text");
            let before = essence(flow("established", 1));
            assert_eq!(before, essence(flow("established", 200)), "{output:?}");
            assert_ne!(before, essence(flow("reset", 1)), "{output:?}");
        }
        let shown = flow("established", 200).table(Format::Table).to_string();
        assert!(shown.contains("3m"), "shown all the same: {shown}");
    }
}
