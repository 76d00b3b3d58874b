//! The settings that the programs go by, for people.

use lb_common::{
    flow::State,
    node::{CONFIG_BYPASS, Config},
};
use serde::Serialize;

use crate::{
    commands::table::Table,
    datapath::{Family, MapError, Maps as _, kernel::KernelMaps},
};

/// What `klb_config` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Settings {
    pub(super) routing: &'static str,
    /// `FIRST-LAST`; none if nothing can be masqueraded.
    masquerade_ports: Option<String>,
    /// In which ports of a `ClusterIP` that nobody has are refused.
    cluster_networks: Vec<String>,
    timeouts: Vec<Timeout>,
}

/// How long a flow may be silent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Timeout {
    state: &'static str,
    seconds: u32,
}

impl Settings {
    pub(super) fn read(maps: &KernelMaps) -> Result<Self, MapError> {
        let mut networks = Vec::new();
        for family in Family::ALL {
            let network = maps.cluster_network(family)?;
            networks.extend(network.map(|network| network.to_string()));
        }
        Ok(Self::new(&maps.config()?, networks))
    }

    pub(super) fn new(config: &Config, cluster_networks: Vec<String>) -> Self {
        let last = u32::from(config.first_port) + u32::from(config.port_count);
        let timeouts = State::ALL.map(|state| Timeout {
            state: state.name(),
            seconds: state.timeout(&config.timeouts),
        });
        Self {
            routing: if config.flags & CONFIG_BYPASS == 0 {
                "kernel"
            } else {
                "bypass"
            },
            masquerade_ports: (config.port_count > 0)
                .then(|| format!("{}-{}", config.first_port, last - 1)),
            cluster_networks,
            timeouts: timeouts.into(),
        }
    }

    pub(super) fn table(&self) -> Table {
        let mut table = Table::new(&["SETTING", "VALUE"]);
        let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
        let none = || "none".to_owned();
        row("routing", self.routing.to_owned());
        row(
            "masquerade ports",
            self.masquerade_ports.clone().unwrap_or_else(none),
        );
        let networks = match &self.cluster_networks[..] {
            [] => none(),
            networks => networks.join(" "),
        };
        row("ClusterIPs within", networks);
        for Timeout { state, seconds } in &self.timeouts {
            row(&format!("timeout {state}"), format!("{seconds}s"));
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_shown_as_flags_spell_them() {
        let config = Config {
            first_port: 50_000,
            port_count: 15_536,
            flags: CONFIG_BYPASS,
            timeouts: State::TIMEOUTS,
            ..Config::default()
        };
        let settings = Settings::new(&config, vec!["10.96.0.0/16".to_owned()]);
        let page = settings.table().to_string();
        for (setting, value) in [
            ("routing", "bypass"),
            ("masquerade ports", "50000-65535"),
            ("ClusterIPs within", "10.96.0.0/16"),
            ("timeout established", "86400s"),
        ] {
            let mut lines = page.lines();
            let line = lines.find(|line| line.starts_with(setting));
            assert!(line.is_some_and(|line| line.ends_with(value)), "{page}");
        }
        let nothing = Settings::new(&Config::default(), Vec::new());
        assert_eq!(nothing.masquerade_ports, None);
    }
}
