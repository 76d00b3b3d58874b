//! kube-proxy's settings, told in klb's.
//!
//! What has a counterpart is taken over. What has none, and does not change what
//! a user gets, is named in the log. What would change it is refused.

use std::{collections::BTreeMap, net::IpAddr};

use clap::{Arg, ArgAction, ArgMatches, parser::ValueSource};
use serde_yaml_ng::{Mapping, Value};

use super::{
    Setting,
    file::{name_of, texts},
    id,
};

pub(super) const KIND: &str = "KubeProxyConfiguration";
pub(super) const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";

/// A setting of kube-proxy's.
pub(super) struct Field {
    /// In its file; empty if it is a flag only.
    pub(super) path: &'static str,
    /// Its long name; empty if it is in the file only.
    pub(super) flag: &'static str,
    /// Whether the flag alone means `true`.
    switch: bool,
    pub(super) rule: Rule,
}

/// What klb makes of a setting.
pub(super) enum Rule {
    /// It is this flag. Nothing, zero and `false` are the default.
    Is(&'static str),
    /// It means nothing to klb, and this is why.
    Without(&'static str),
    /// It must not be left out, and this is what to do instead.
    Refused(&'static str),
    /// It depends on the value; in words, and in code.
    By(
        #[cfg_attr(
            not(test),
            expect(dead_code, reason = "for the documentation, which a test makes")
        )]
        &'static str,
        fn(&str) -> Meaning,
    ),
}

/// What klb makes of a value.
pub(super) enum Meaning {
    /// As without it.
    Default,
    /// Nothing, which is said, and why.
    Nothing(&'static str),
    /// These values of these flags.
    Is(Vec<(&'static str, String)>),
    Refused(&'static str),
    /// Nothing, if `--nodeport-addresses` says something; else this has to be
    /// done.
    WantsNetworks(&'static str),
}

use Rule::{By, Is, Refused, Without};

const fn both(path: &'static str, flag: &'static str, rule: Rule) -> Field {
    Field {
        path,
        flag,
        switch: false,
        rule,
    }
}

const fn field(path: &'static str, rule: Rule) -> Field {
    both(path, "", rule)
}

const fn flag(flag: &'static str, rule: Rule) -> Field {
    both("", flag, rule)
}

const fn switch(path: &'static str, flag: &'static str, rule: Rule) -> Field {
    Field {
        switch: true,
        ..both(path, flag, rule)
    }
}

const BIND_ADDRESS: &str = "bindAddress";

const ALL_ADDRESSES: &str = "klb serves the addresses of all the node's devices";
const NO_RULES: &str = "klb has no rules to write anew: a change is a few writes of map entries";
const NO_MARKS: &str = "klb marks no packets";
const BY_DEVICE: &str = "klb knows pods by their devices: see `--pod-device`";
const OWN_TABLE: &str = "klb keeps its connections in a table of its own, as large as `--map-flows` \
    says, and leaves the kernel's alone";
const ALWAYS_WATCHES: &str =
    "klb follows the API server without pauses, and asks for as little as can be";
const NOT_ANY_MORE: &str = "kube-proxy does nothing with it either, in its latest versions";
const LOG: &str = "`RUST_LOG` says what is logged";
const MASQUERADE_ALL: &str = "remove it: klb masquerades where answers would not come back through \
    this node, and nowhere else, so that backends see who their clients are";
const NODE_NAME: &str = "`--node-name`, in lower case";
const SERVES_ALWAYS: &str = "klb cannot do without it: name an address where nobody else comes, \
    such as 127.0.0.1";
const PORTS_ALONE: &str = "refused: name the address too, in `--healthz-bind` or `--metrics-bind`";
const NO_PORT_ALONE: &str = "name the address too, in --healthz-bind or --metrics-bind";

/// Every field of kube-proxy's file and every flag of its.
#[rustfmt::skip] // A table.
pub(super) const FIELDS: &[Field] = &[
    both(BIND_ADDRESS, "bind-address", By(
        "an IPv6 address makes `--healthz-bind` `::` and `--metrics-bind` `::1`, unless they are \
            given; nothing else: klb serves the addresses of all the node's devices",
        bind_address,
    )),
    switch("bindAddressHardFail", "bind-address-hard-fail", Without(
        "an address that is taken is tried again until it is free; the Services do not depend on it",
    )),
    field("clientConnection.acceptContentTypes", Without(ALWAYS_WATCHES)),
    both("clientConnection.burst", "kube-api-burst", Without(ALWAYS_WATCHES)),
    both("clientConnection.contentType", "kube-api-content-type", Without(ALWAYS_WATCHES)),
    field("clientConnection.kubeconfig", Is("kubeconfig")),
    both("clientConnection.qps", "kube-api-qps", Without(ALWAYS_WATCHES)),
    both("clusterCIDR", "cluster-cidr", Without(BY_DEVICE)),
    both("configSyncPeriod", "config-sync-period", Without(ALWAYS_WATCHES)),
    both("conntrack.maxPerCore", "conntrack-max-per-core", Without(OWN_TABLE)),
    both("conntrack.min", "conntrack-min", Without(OWN_TABLE)),
    switch("conntrack.tcpBeLiberal", "conntrack-tcp-be-liberal", Without(
        "klb drops no packet for its sequence number",
    )),
    both("conntrack.tcpCloseWaitTimeout", "conntrack-tcp-timeout-close-wait", Is("timeout-tcp-close-wait")),
    both("conntrack.tcpEstablishedTimeout", "conntrack-tcp-timeout-established", Is("timeout-tcp-established")),
    both("conntrack.udpStreamTimeout", "conntrack-udp-timeout-stream", Is("timeout-udp-stream")),
    both("conntrack.udpTimeout", "conntrack-udp-timeout", Is("timeout-udp")),
    both("detectLocal.bridgeInterface", "pod-bridge-interface", Without(
        "the ports of the bridge are pods' devices: see `--pod-device`",
    )),
    both("detectLocal.interfaceNamePrefix", "pod-interface-name-prefix", By(
        "`--pod-device`, with a `*` behind, if the mode is `InterfaceNamePrefix`",
        |prefix| given(prefix, |prefix| vec![("pod-device", format!("{prefix}*"))]),
    )),
    both("detectLocalMode", "detect-local-mode", Without(BY_DEVICE)),
    switch("enableProfiling", "profiling", Without("klb has no profiler inside")),
    both("featureGates", "feature-gates", Without("klb has no feature gates")),
    field("healthzBindAddress", Is("healthz-bind")),
    flag("healthz-bind-address", By(
        "`--healthz-bind`; refused if it is empty",
        |addr| address("healthz-bind", addr),
    )),
    both("hostnameOverride", "hostname-override", By(NODE_NAME, |name| {
        given(name.trim(), |name| vec![("node-name", name.to_lowercase())])
    })),
    switch("iptables.localhostNodePorts", "iptables-localhost-nodeports", By(
        "`false` asks for `--nodeport-addresses`: loopback answers if one of the networks has it",
        localhost_node_ports,
    )),
    field("iptables.masqueradeAll", Refused(MASQUERADE_ALL)),
    both("iptables.masqueradeBit", "iptables-masquerade-bit", Without(NO_MARKS)),
    both("iptables.minSyncPeriod", "iptables-min-sync-period", Without(NO_RULES)),
    field("iptables.snatNodeInternalIP", Refused(
        "remove it: klb masquerades with the address of the device by which a packet leaves",
    )),
    both("iptables.syncPeriod", "iptables-sync-period", Without(NO_RULES)),
    both("ipvs.excludeCIDRs", "ipvs-exclude-cidrs", Without("klb does not touch IPVS")),
    both("ipvs.minSyncPeriod", "ipvs-min-sync-period", Without(NO_RULES)),
    both("ipvs.scheduler", "ipvs-scheduler", By(
        "`sh` and `mh` are refused, for a client would lose its backend; of the others nothing is \
            left: each backend is as likely as the others",
        scheduler,
    )),
    switch("ipvs.strictARP", "ipvs-strict-arp", Without(
        "klb puts no addresses on devices, so nobody answers ARP for them",
    )),
    both("ipvs.syncPeriod", "ipvs-sync-period", Without(NO_RULES)),
    both("ipvs.tcpFinTimeout", "ipvs-tcpfin-timeout", Is("timeout-tcp-close-wait")),
    both("ipvs.tcpTimeout", "ipvs-tcp-timeout", Is("timeout-tcp-established")),
    both("ipvs.udpTimeout", "ipvs-udp-timeout", Is("timeout-udp-stream")),
    both("logging.flushFrequency", "log-flush-frequency", Without("klb's log is never held back")),
    both("logging.format", "logging-format", Is("log-format")),
    field("logging.options", Without(LOG)),
    both("logging.verbosity", "v", Without(LOG)),
    both("logging.vmodule", "vmodule", Without(LOG)),
    field("metricsBindAddress", Is("metrics-bind")),
    flag("metrics-bind-address", By(
        "`--metrics-bind`; refused if it is empty",
        |addr| address("metrics-bind", addr),
    )),
    both("mode", "proxy-mode", By(
        "`iptables` and `ipvs` mean nothing: klb takes the place of each; `nftables` asks for \
            `--nodeport-addresses`, for in that mode kube-proxy does not answer on every address; \
            others are refused",
        mode,
    )),
    field("nftables.masqueradeAll", Refused(MASQUERADE_ALL)),
    field("nftables.masqueradeBit", Without(NO_MARKS)),
    field("nftables.minSyncPeriod", Without(NO_RULES)),
    field("nftables.syncPeriod", Without(NO_RULES)),
    field("nodePortAddresses", Is("nodeport-addresses")),
    both("oomScoreAdj", "oom-score-adj", Without(
        "the kubelet sets it, by the priority class of the pod; systemd by `OOMScoreAdjust=`",
    )),
    field("portRange", Without(NOT_ANY_MORE)),
    field("resourceContainer", Without(NOT_ANY_MORE)),
    both("showHiddenMetricsForVersion", "show-hidden-metrics-for-version", Without("klb hides no metrics")),
    field("udpIdleTimeout", Without(NOT_ANY_MORE)),
    field("windowsRunAsService", Refused("klb runs on Linux only")),
    field("winkernel.enableDSR", Refused("klb runs on Linux only")),
    field("winkernel.forwardHealthCheckVip", Refused("klb runs on Linux only")),
    field("winkernel.networkName", Refused("klb runs on Linux only")),
    field("winkernel.rootHnsEndpointName", Refused("klb runs on Linux only")),
    field("winkernel.sourceVip", Refused("klb runs on Linux only")),
    switch("", "cleanup", Refused("run `klb cleanup`; for kube-proxy's rules its own `--cleanup`")),
    flag(
        "healthz-port",
        By(PORTS_ALONE, |_| Meaning::Refused(NO_PORT_ALONE)),
    ),
    switch("", "init-only", Refused("leave it out: klb gives up privileges by itself")),
    switch("", "logtostderr", Without("klb logs there, and nowhere else")),
    switch("", "masquerade-all", Refused(MASQUERADE_ALL)),
    flag("master", Refused("name the server in the kubeconfig")),
    flag(
        "metrics-port",
        By(PORTS_ALONE, |_| Meaning::Refused(NO_PORT_ALONE)),
    ),
    flag("write-config-to", Refused("docs/configuration.md lists everything")),
];

impl Field {
    fn id(&self) -> String {
        // Not a name that a flag of klb's could have.
        format!("kube-proxy {}", self.flag)
    }

    fn arg(&self) -> Arg {
        let arg = Arg::new(self.id()).long(self.flag).hide(true);
        let arg = arg.action(ArgAction::Append).allow_hyphen_values(true);
        match self.flag {
            "v" => arg.short('v'),
            _ if self.switch => arg
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true"),
            _ => arg,
        }
    }
}

/// kube-proxy's flags that klb has not under the same name.
pub(super) fn flags() -> impl Iterator<Item = Arg> {
    FIELDS
        .iter()
        .filter(|field| !field.flag.is_empty())
        .map(Field::arg)
}

/// What settings of kube-proxy's come to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Translation {
    pub(super) settings: Vec<Setting>,
    /// What means nothing to klb, by why it does.
    unused: BTreeMap<&'static str, Vec<String>>,
    /// What to do if nobody says which networks `NodePort`s answer in.
    pub(super) wants_networks: Option<String>,
}

impl Translation {
    /// Adds what is not settings.
    pub(super) fn take_in(&mut self, other: Self) -> Vec<Setting> {
        for (why, names) in other.unused {
            self.unused.entry(why).or_default().extend(names);
        }
        self.wants_networks = self.wants_networks.take().or(other.wants_networks);
        other.settings
    }

    /// For the log.
    pub(super) fn note(&self) -> Option<String> {
        let unused = self.unused.iter();
        let unused: Vec<_> = unused
            .map(|(why, names)| format!("{} ({why})", names.join(", ")))
            .collect();
        (!unused.is_empty()).then(|| {
            format!(
                "settings of kube-proxy's that mean nothing to klb: {}",
                unused.join("; ")
            )
        })
    }

    fn add(&mut self, name: &str, meaning: Meaning) -> Result<(), String> {
        match meaning {
            Meaning::Default => {}
            Meaning::Nothing(why) => self.unused.entry(why).or_default().push(name.to_owned()),
            Meaning::Is(flags) => {
                for (flag, value) in flags {
                    self.set(name, flag, vec![value])?;
                }
            }
            Meaning::Refused(sentence) => return Err(format!("{name}: {sentence}")),
            Meaning::WantsNetworks(sentence) => {
                self.wants_networks = Some(format!("{name}: {sentence}"));
            }
        }
        Ok(())
    }

    fn set(&mut self, name: &str, flag: &str, values: Vec<String>) -> Result<(), String> {
        match self.settings.iter().find(|setting| setting.flag == flag) {
            Some(other) if other.values == values => {}
            Some(other) => {
                let other = &other.field;
                return Err(format!(
                    "{other} and {name}: klb has one setting for both, --{flag}"
                ));
            }
            None => self.settings.push(Setting {
                field: name.to_owned(),
                flag: flag.to_owned(),
                values,
            }),
        }
        Ok(())
    }
}

/// A setting as it was found: under which name, and its values.
type Found<'a> = (&'a Field, String, Vec<String>);

/// # Errors
///
/// A sentence that names the flag.
pub(super) fn of_flags(matches: &ArgMatches) -> Result<Translation, String> {
    let found = FIELDS.iter().filter(|field| !field.flag.is_empty());
    let found = found.filter_map(|field| {
        let values = matches.get_many::<String>(&field.id())?;
        Some((
            field,
            format!("--{}", field.flag),
            values.cloned().collect(),
        ))
    });
    let mut translation = translate(&found.collect::<Vec<_>>())?;
    let is_given = |flag: &str| matches.value_source(&id(flag)) == Some(ValueSource::CommandLine);
    // This one is about defaults only.
    let bind = |setting: &Setting| setting.field == "--bind-address" && is_given(&setting.flag);
    translation.settings.retain(|setting| !bind(setting));
    Ok(translation)
}

/// # Errors
///
/// A sentence that names the field.
pub(super) fn of_file(fields: &Mapping) -> Result<Translation, String> {
    let mut found = Vec::new();
    find("", fields, &mut found)?;
    translate(&found)
}

/// Lists the fields below a path, in order.
fn find(above: &str, fields: &Mapping, found: &mut Vec<Found<'_>>) -> Result<(), String> {
    for (name, value) in fields {
        let path = format!("{above}{}", name_of(name)?);
        if matches!(path.as_str(), "apiVersion" | "kind") {
            continue;
        }
        let below = format!("{path}.");
        if let Some(field) = FIELDS.iter().find(|field| field.path == path) {
            found.push((field, path, leaves(value)));
        } else if !FIELDS.iter().any(|field| field.path.starts_with(&below)) {
            return Err(format!("{path}: a {KIND} has no such field"));
        } else if let Value::Mapping(fields) = value {
            find(&below, fields, found)?;
        } else if !value.is_null() {
            return Err(format!("{path}: wanted are fields"));
        }
    }
    Ok(())
}

/// All that a value says.
fn leaves(value: &Value) -> Vec<String> {
    match value {
        Value::Mapping(fields) => fields.iter().flat_map(|(_, value)| leaves(value)).collect(),
        Value::Tagged(tagged) => leaves(&tagged.value),
        _ => texts(value).unwrap_or_default(),
    }
}

fn translate(found: &[Found<'_>]) -> Result<Translation, String> {
    let word = |path: &str| {
        let mut named = found.iter().filter(|(field, ..)| field.path == path);
        named
            .find_map(|(.., values)| values.last())
            .map_or("", String::as_str)
    };
    let (mode, local_mode) = (word("mode"), word("detectLocalMode"));
    let mut translation = Translation::default();
    for (field, name, values) in found {
        if !is_in_force(field.path, mode, local_mode) {
            continue;
        }
        let is_default = values.iter().all(|value| is_zero(value));
        match &field.rule {
            By(_, meaning) => {
                for value in values {
                    translation.add(name, meaning(value))?;
                }
            }
            _ if is_default => {}
            Is(flag) => translation.set(name, flag, values.clone())?,
            Without(why) => translation.add(name, Meaning::Nothing(why))?,
            Refused(sentence) => translation.add(name, Meaning::Refused(sentence))?,
        }
    }
    translation
        .settings
        .extend(implied(found, &translation.settings));
    Ok(translation)
}

/// Where probes and metrics answer by default on a node whose addresses are
/// IPv6.
fn implied(found: &[Found<'_>], settings: &[Setting]) -> Vec<Setting> {
    let mut found = found
        .iter()
        .filter(|(field, ..)| field.path == BIND_ADDRESS);
    let Some((_, name, values)) = found.next() else {
        return Vec::new();
    };
    let mut addresses = values.iter().filter_map(|value| value.parse().ok());
    if !addresses.any(|address: IpAddr| address.is_ipv6()) {
        return Vec::new();
    }
    let defaults = [("healthz-bind", "::"), ("metrics-bind", "::1")];
    let missing = defaults
        .into_iter()
        .filter(|(flag, _)| settings.iter().all(|setting| setting.flag != *flag));
    let implied = missing.map(|(flag, address)| Setting {
        field: name.clone(),
        flag: flag.to_owned(),
        values: vec![address.to_owned()],
    });
    implied.collect()
}

/// Whether kube-proxy looks at a field. A flag without a field always counts.
fn is_in_force(path: &str, mode: &str, local_mode: &str) -> bool {
    match path.split_once('.').unwrap_or_default() {
        ("iptables", _) => matches!(mode, "" | "iptables" | "ipvs"),
        ("ipvs", _) => mode == "ipvs",
        ("nftables", _) => mode == "nftables",
        ("winkernel", _) => mode == "kernelspace",
        ("detectLocal", "bridgeInterface") => local_mode == "BridgeInterface",
        ("detectLocal", _) => local_mode == "InterfaceNamePrefix",
        _ => true,
    }
}

/// What Go calls a zero value, for which kube-proxy takes its default.
fn is_zero(text: &str) -> bool {
    matches!(text, "" | "0" | "false")
        || humantime::parse_duration(text).is_ok_and(|time| time.is_zero())
}

fn given(text: &str, flags: impl Fn(&str) -> Vec<(&'static str, String)>) -> Meaning {
    if text.is_empty() {
        return Meaning::Default;
    }
    Meaning::Is(flags(text))
}

fn address(flag: &'static str, text: &str) -> Meaning {
    match given(text, |text| vec![(flag, text.to_owned())]) {
        Meaning::Default => Meaning::Refused(SERVES_ALWAYS),
        meaning => meaning,
    }
}

/// See [`implied`].
fn bind_address(text: &str) -> Meaning {
    match text.parse::<IpAddr>() {
        Ok(address) if address.is_unspecified() => Meaning::Default,
        Err(_) if text.is_empty() => Meaning::Default,
        Ok(_) => Meaning::Nothing(ALL_ADDRESSES),
        Err(_) => Meaning::Refused("wanted is an address"),
    }
}

fn localhost_node_ports(text: &str) -> Meaning {
    match text {
        "false" => Meaning::WantsNetworks(
            "klb answers NodePorts on loopback addresses, unless --nodeport-addresses names \
             networks without them: name those of the node",
        ),
        _ => Meaning::Default,
    }
}

fn mode(text: &str) -> Meaning {
    match text {
        "" => Meaning::Default,
        "iptables" | "ipvs" => Meaning::Nothing("klb takes the place of every mode"),
        "nftables" => Meaning::WantsNetworks(
            "in this mode kube-proxy answers NodePorts on the primary addresses of the node only, \
             klb on all: name the networks wanted in --nodeport-addresses, or 0.0.0.0/0,::/0",
        ),
        "kernelspace" => Meaning::Refused("klb runs on Linux only"),
        _ => Meaning::Refused("kube-proxy has no such mode"),
    }
}

fn scheduler(text: &str) -> Meaning {
    match text {
        "" | "rr" => Meaning::Default,
        "sh" | "mh" => Meaning::Refused(
            "klb does not choose by the client's address unless the Service says \
             `sessionAffinity: ClientIP`: say so there, and remove this",
        ),
        _ => Meaning::Nothing("with klb every backend is as likely as the others"),
    }
}
