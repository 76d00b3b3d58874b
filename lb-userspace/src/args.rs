//! The command line: what is understood, its defaults, and what is refused.
//!
//! What is an agent's flag here is a variable of the environment and a field of
//! the configuration file too; `config.rs` sees to that.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{NonEmptyStringValueParser, PossibleValuesParser},
};
use ipnet::IpNet;
use lb_common::{
    Hook,
    flow::{self, State, Timeouts},
    names::{LAYOUT, size},
    trace::TRACE_BYTES,
};

use crate::{
    commands::trace::reason_names,
    datapath::pins::Pins,
    maglev,
    metrics::Detail,
    model::Algorithm,
    plan::{Ping, Settings},
};

/// Service load balancer for Kubernetes, in eBPF.
#[derive(Debug, Parser)]
#[command(name = "klb", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run on a node: fill the maps, attach the programs, follow changes
    Agent(Box<AgentArgs>),
    /// List what the kernel's maps hold; needs no agent
    Get(GetArgs),
    /// Show whether all is well: agent, hooks, maps, counters
    Status(StatusArgs),
    /// Show which Services are busy now, and with which backends
    Top(TopArgs),
    /// Say what would happen to a packet now, and why
    #[command(
        long_about = "Say what would happen to a packet now, and why: which frontend it is for, \
            whether the client may, which backends there are and with what odds, what is \
            rewritten, and what becomes of it.\n\n\
            The programs themselves are run on such a packet, in the kernel and by the live tables \
            of Services, but with tables of flows, affinity and counters that are thrown away: \
            nothing is sent, and nothing that is live changes. A flow that the packet is of, and \
            the backend that the client keeps, are copied there before. The hook at sockets cannot \
            be run so: what it would do is found from the same tables."
    )]
    Explain(ExplainArgs),
    /// Show what happens to packets and calls, while it happens
    #[command(
        long_about = "Show what happens to packets and calls, while it happens: translated, \
            answered, refused or dropped, and why.\n\n\
            The programs tell only while this listens, and only what is asked for: all filters are \
            in the kernel. What they tell goes through a ring of 1 MiB; what does not fit is lost \
            and counted, and no packet waits for it."
    )]
    Trace(Box<TraceArgs>),
    /// Compare what the maps should hold with what they hold
    Diff(DiffArgs),
    /// Look whether this node is fit for klb, and klb well on it
    Doctor(DoctorArgs),
    /// Remove everything that klb put into the kernel, and nothing else
    Cleanup(CleanupArgs),
    /// Print what a shell completes command lines of klb with
    Completions(CompletionsArgs),
}

/// Where klb keeps things; the same for every command.
#[derive(Args, Clone, Debug)]
pub struct Paths {
    /// Folder on a BPF file system for pinned maps and links
    #[arg(
        long,
        value_name = "DIR",
        env = "KLB_BPFFS",
        default_value = "/sys/fs/bpf/klb"
    )]
    pub bpffs: PathBuf,
    /// Folder for the agent's lock, and for what it notes of itself
    #[arg(
        long,
        value_name = "DIR",
        env = "KLB_STATE_DIR",
        default_value = "/run/klb"
    )]
    pub state_dir: PathBuf,
    /// Name of the folder below --bpffs, by which klb's of different layouts tell each other's
    /// maps apart: for tests of upgrades
    #[arg(long, value_name = "NAME", hide = true, default_value = LAYOUT)]
    pub layout: String,
}

impl Paths {
    /// What is pinned.
    pub fn pins(&self) -> Pins {
        Pins::of_layout(&self.bpffs, &self.layout)
    }
}

#[derive(Args, Debug)]
#[command(
    next_line_help = true,
    after_help = "Each flag is a variable of the environment too, and a field of the file that \
        --config names: --map-flows is KLB_MAP_FLOWS, and `map-flows`. A flag goes before a \
        variable, a variable before the file, the file before the default.\n\n\
        Flags of kube-proxy, and its KubeProxyConfiguration as the file, are understood where klb \
        has the same, and refused with a sentence where leaving them out would change what comes \
        of it: see docs/configuration.md.\n\n\
        Exit status: 0 after SIGTERM or SIGINT, which leave the datapath as it is; 1 if something \
        keeps the agent from its work that will not pass by itself; 2 for wrong usage.\n\n\
        Examples:\n  \
        # In a pod of the DaemonSet: the rest is in variables\n  \
        klb agent\n  \
        # On a node, with a kubeconfig\n  \
        klb agent --node-name node-1 --kubeconfig /etc/kubernetes/klb.conf\n  \
        # Without a cluster, from a folder of manifests\n  \
        klb agent --node-name node-1 --manifests deploy/examples/demo --uplink eth0"
)]
pub struct AgentArgs {
    /// Name of this node, as in the Node object
    #[arg(
        long,
        value_name = "NAME",
        env = "NODE_NAME",
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub node_name: String,
    /// YAML file with a field for each flag, by the name of the flag; or a file of
    /// kube-proxy's. Read once, at the start
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Read Services, EndpointSlices and Nodes from the YAML files in a folder, and follow changes
    #[arg(long, value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// How to reach the Kubernetes API; without this and without --manifests as the service account
    /// of the pod in which klb runs
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    pub kubeconfig: Option<PathBuf>,

    #[command(flatten)]
    pub paths: Paths,

    /// Where translated packets go
    #[arg(long, value_enum, default_value_t = Routing::Kernel)]
    pub routing: Routing,
    /// How a backend is chosen for a new flow; the annotation `klb/algorithm` of a Service goes before
    #[arg(long, value_enum, default_value_t = Algorithm::Random)]
    pub algorithm: Algorithm,
    /// Slots of a Maglev table, a prime; each Service port takes so many of --map-slots, and one
    /// with more endpoints goes without a table
    #[arg(
        long,
        value_name = "N",
        default_value_t = maglev::DEFAULT_SIZE,
        value_parser = table_size
    )]
    pub maglev_table_size: u32,
    /// Which addresses of Services that have endpoints answer pings
    #[arg(long, value_enum, default_value_t = Ping::LoadBalancer)]
    pub ping: Ping,
    /// Ports of the node that stand for clients whose backend is on another node
    #[arg(long, value_name = "FIRST-LAST", default_value = "50000-65535")]
    pub masquerade_ports: PortRange,

    /// Where /healthz, /livez and /readyz answer; an address without a port has 10256
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "0.0.0.0:10256",
        value_parser = |text: &str| bind_address(text, 10256)
    )]
    pub healthz_bind: SocketAddr,
    /// Where /metrics answers; an address without a port has 10249
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:10249",
        value_parser = |text: &str| bind_address(text, 10249)
    )]
    pub metrics_bind: SocketAddr,
    /// What /metrics tells of the traffic of Services: each backend takes six time series, and so
    /// does each Service port
    #[arg(long, value_enum, default_value_t = Detail::Services)]
    pub traffic_metrics: Detail,
    /// Whether a page with the state of the node is shown beside /metrics, to those who are on the
    /// node
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub dashboard: Switch,

    /// For how long changes are gathered, at most, before they are written; up to 1s
    #[arg(long, value_name = "TIME", default_value = "10ms", value_parser = batch_delay)]
    pub batch_delay: Duration,
    /// For how long the programs of a klb with another layout of its maps must have had nothing to
    /// translate before they are removed, after an upgrade or a downgrade
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = interval)]
    pub layout_drain: Duration,
    /// How often the maps are compared with what they should hold
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = interval)]
    pub verify_interval: Duration,

    /// How log lines on stderr look; `RUST_LOG` sets what is logged
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    // Groups with a heading of their own come last: what follows one would be
    // listed below its heading.
    #[command(flatten)]
    pub devices: DeviceArgs,
    #[command(flatten)]
    pub hooks: HookArgs,
    #[command(flatten)]
    pub timeouts: TimeoutArgs,
    #[command(flatten)]
    pub sizes: MapSizes,

    /// What the log is to say of how these settings came about
    #[arg(skip)]
    pub notes: Vec<String>,
}

/// Ports from the first to the last, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    pub const fn first(self) -> u16 {
        self.first
    }

    pub const fn ports(self) -> RangeInclusive<u16> {
        self.first..=self.last
    }

    /// Number of ports.
    pub const fn count(self) -> u16 {
        self.last - self.first + 1
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ports = text.split_once('-').and_then(|(first, last)| {
            let range = Self {
                first: first.trim().parse().ok()?,
                last: last.trim().parse().ok()?,
            };
            (range.first > 0 && range.first <= range.last).then_some(range)
        });
        ports.ok_or_else(|| "wanted is FIRST-LAST, of 1 to 65535".to_owned())
    }
}

/// After how much silence a flow is over. Those of kube-proxy where it has one,
/// else those of the kernel's connection tracking.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Timeouts, such as 90s, 1h or 1h 30m")]
pub struct TimeoutArgs {
    /// TCP before both sides have sent something; SCTP as TCP, here and below
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = seconds)]
    pub timeout_tcp_opening: u32,
    /// TCP while it is open
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = seconds)]
    pub timeout_tcp_established: u32,
    /// TCP that one side has closed
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = seconds)]
    pub timeout_tcp_close_wait: u32,
    /// TCP that both sides have closed
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = seconds)]
    pub timeout_tcp_time_wait: u32,
    /// TCP after a reset
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = seconds)]
    pub timeout_tcp_reset: u32,
    /// UDP that had no answer yet
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = seconds)]
    pub timeout_udp: u32,
    /// UDP with packets in both directions
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = seconds)]
    pub timeout_udp_stream: u32,
}

impl TimeoutArgs {
    /// As the programs read them.
    pub fn by_state(&self) -> Timeouts {
        State::ALL.map(|state| match state {
            State::Opening => self.timeout_tcp_opening,
            State::Established => self.timeout_tcp_established,
            State::HalfClosed => self.timeout_tcp_close_wait,
            State::Closed => self.timeout_tcp_time_wait,
            State::Reset => self.timeout_tcp_reset,
            State::Unreplied => self.timeout_udp,
            State::Replied => self.timeout_udp_stream,
        })
    }
}

/// A time in whole seconds. The programs count with sign.
fn seconds(text: &str) -> Result<u32, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    i32::try_from(time.as_secs())
        .ok()
        .filter(|seconds| *seconds > 0)
        .map(i32::cast_unsigned)
        .ok_or_else(|| "wanted is a second or more, and less than 68 years".to_owned())
}

/// A time between one run and the next.
fn interval(text: &str) -> Result<Duration, String> {
    seconds(text).map(|seconds| Duration::from_secs(seconds.into()))
}

/// A time between one look at the maps and the next.
fn look_interval(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time < Duration::from_millis(100) {
        return Err("wanted is 100ms or more".to_owned());
    }
    Ok(time)
}

/// As [`look_interval`], of which a number alone is seconds.
fn top_interval(text: &str) -> Result<Duration, String> {
    match text.parse::<u32>() {
        Ok(seconds) => look_interval(&format!("{seconds}s")),
        Err(_no_number) => look_interval(text),
    }
}

/// A time that nobody notices.
fn batch_delay(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time > Duration::from_secs(1) {
        return Err("wanted is a second or less".to_owned());
    }
    Ok(time)
}

/// An address to listen on, as kube-proxy understands it: without a port it has
/// the usual one.
fn bind_address(text: &str, port: u16) -> Result<SocketAddr, String> {
    let alone = text
        .parse()
        .ok()
        .map(|ip: IpAddr| SocketAddr::new(ip, port));
    alone.or_else(|| text.parse().ok()).ok_or_else(|| {
        format!("wanted is an address with or without a port, such as 0.0.0.0:{port} or ::")
    })
}

/// A network of the node's addresses; the words that kube-proxy has for some are
/// told in networks.
fn nodeport_network(text: &str) -> Result<IpNet, String> {
    match text {
        "primary" => Err(
            "klb does not ask the Node object which addresses are its primary ones: \
             name the networks that they are in, such as 192.0.2.0/24"
                .to_owned(),
        ),
        "localhost" => Err("write 127.0.0.0/8,::1/128".to_owned()),
        "all" => Err("write 0.0.0.0/0,::/0, or leave it out".to_owned()),
        _ => text
            .parse()
            .map_err(|error: ipnet::AddrParseError| error.to_string()),
    }
}

/// A size of Maglev tables.
fn table_size(text: &str) -> Result<u32, String> {
    let size = text.parse().ok();
    size.filter(|size| *size <= maglev::MAX_SIZE && maglev::is_prime(*size))
        .ok_or_else(|| format!("wanted is a prime up to {}", maglev::MAX_SIZE))
}

/// Which devices are the node's edges.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Devices")]
pub struct DeviceArgs {
    /// Devices towards other nodes and the outside, by name with `*` and `?`; may be repeated
    /// [default: those that carry a default route, or did since the start]
    #[arg(long, value_name = "GLOB", value_delimiter = ',')]
    pub uplink: Vec<String>,
    /// Host sides of pods' links, by name with `*` and `?`; may be repeated
    #[arg(
        long,
        value_name = "GLOB",
        value_delimiter = ',',
        default_values = crate::devices::DEFAULT_POD_DEVICES
    )]
    pub pod_device: Vec<String>,
    /// Answer `NodePort`s only on the node's addresses in these networks; may be repeated
    /// [default: all addresses of the node]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = nodeport_network)]
    pub nodeport_addresses: Vec<IpNet>,
}

/// Which hooks are used, and how.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Hooks")]
pub struct HookArgs {
    /// XDP on uplinks; auto is native where the driver has it, else generic
    #[arg(long, value_enum, default_value_t = XdpChoice::Auto)]
    pub xdp: XdpChoice,
    /// How TC programs are attached; auto is tcx where the kernel has it (6.6)
    #[arg(long, value_enum, default_value_t = TcChoice::Auto)]
    pub tc: TcChoice,
    /// Whose sockets are translated: those of the host and of pods, or none
    #[arg(long, value_enum, default_value_t = SocketLb::All)]
    pub socket_lb: SocketLb,
    /// Root of the control groups whose sockets are translated
    /// [default: where a cgroup2 file system is mounted]
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
    /// Folder in which network namespaces of pods have names; those of processes that the agent
    /// sees are found besides
    #[arg(long, value_name = "DIR", default_value = "/run/netns")]
    pub netns_dir: PathBuf,
}

/// Number of entries of the maps. A map that is already pinned keeps its size
/// until `klb cleanup`.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Map sizes")]
pub struct MapSizes {
    /// Frontends, for each family
    #[arg(long, value_name = "N", default_value_t = size::SERVICES as u32, value_parser = entries())]
    pub map_services: u32,
    /// Backend slots of all frontends together, for each family
    #[arg(long, value_name = "N", default_value_t = size::SLOTS as u32, value_parser = entries())]
    pub map_slots: u32,
    /// Backends
    #[arg(long, value_name = "N", default_value_t = size::BACKENDS as u32, value_parser = entries())]
    pub map_backends: u32,
    /// Service ports
    #[arg(long, value_name = "N", default_value_t = size::META as u32, value_parser = entries())]
    pub map_service_ports: u32,
    /// Flow entries, for each family; a flow has two
    #[arg(long, value_name = "N", default_value_t = size::FLOWS as u32, value_parser = entries())]
    pub map_flows: u32,
    /// Flow entries that no answer has confirmed yet, for each family
    #[arg(long, value_name = "N", default_value_t = size::YOUNG as u32, value_parser = entries())]
    pub map_young_flows: u32,
    /// Clients of Services with session affinity, for each family
    #[arg(long, value_name = "N", default_value_t = size::AFFINITY as u32, value_parser = entries())]
    pub map_affinity: u32,
    /// Networks that may use load balancers' addresses, for each family
    #[arg(long, value_name = "N", default_value_t = size::RANGES as u32, value_parser = entries())]
    pub map_source_ranges: u32,
    /// Socket entries, for each family; a socket has up to two
    #[arg(long, value_name = "N", default_value_t = size::SOCKETS as u32, value_parser = entries())]
    pub map_sockets: u32,
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            map_services: size::SERVICES as u32,
            map_slots: size::SLOTS as u32,
            map_backends: size::BACKENDS as u32,
            map_service_ports: size::META as u32,
            map_flows: size::FLOWS as u32,
            map_young_flows: size::YOUNG as u32,
            map_affinity: size::AFFINITY as u32,
            map_source_ranges: size::RANGES as u32,
            map_sockets: size::SOCKETS as u32,
        }
    }
}

/// The kernel refuses maps without entries.
fn entries() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Routing {
    /// Up the stack, through netfilter and policies
    Kernel,
    /// Straight to the next hop's device: faster, and past the node's netfilter
    Bypass,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum XdpChoice {
    Auto,
    Native,
    Generic,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TcChoice {
    Auto,
    Tcx,
    Clsact,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SocketLb {
    /// Of the node and of pods
    All,
    /// Of the node only; those of pods are left to TC
    Host,
    /// Of nobody
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Exit status: 0, also if nothing is of what was asked for; 1 if there is no Service, device or map of \
the name, unless with --watch, or if the maps cannot be read; 2 for wrong usage.

Examples:
  # Where a Service leads to, with every backend
  klb get services web -o wide
  # Who is behind a load balancer's address
  klb get services --vip 203.0.113.7:443
  # How much each backend of a Service has had
  klb get backends -n shop web:http -o wide
  # The connections of a client, and those to a backend
  klb get flows --client 192.0.2.9
  klb get flows --backend 10.244.0.5:3000
  # What changes while endpoints come and go
  klb get backends web --watch
  # For a script
  klb get maps -o json | jq '.maps[] | select(.entries > .max_entries / 2) | .name'")]
pub struct GetArgs {
    /// What to list
    #[arg(value_enum)]
    pub what: What,
    /// Only what is of this name: with `devices` a device, with `maps` a map, else a Service or one
    /// of its ports
    #[arg(value_name = "NAME[:PORT]", conflicts_with = "service")]
    pub name: Option<String>,
    /// Only what belongs to Services of this namespace
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Only what belongs to Services of this name, or to one of their ports
    #[arg(long, value_name = "NAME[:PORT]")]
    pub service: Option<String>,
    /// Only what has this address as a frontend's
    #[arg(long, value_name = "ADDR[:PORT]")]
    pub vip: Option<End>,
    /// Only what has this address as a backend's
    #[arg(long, value_name = "ADDR[:PORT]")]
    pub backend: Option<End>,
    /// Only what has this address as a client's
    #[arg(long, value_name = "ADDR[:PORT]")]
    pub client: Option<End>,
    /// For people, with more columns or less, or for programs
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// Go on, and print all of it again whenever something has changed
    #[arg(short, long)]
    pub watch: bool,
    /// How often to look for changes; 100ms or more
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = look_interval, requires = "watch")]
    pub interval: Duration,
    #[command(flatten)]
    pub paths: Paths,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// Frontends and where they lead
    #[value(alias = "service", alias = "svc")]
    Services,
    /// Backends that new flows may get
    #[value(alias = "backend")]
    Backends,
    /// Connections and exchanges that packet hooks translate
    #[value(alias = "flow")]
    Flows,
    /// Translations made at sockets, which the packet hooks never see
    #[value(alias = "socket")]
    Sockets,
    /// Which clients keep which backends, by sessionAffinity
    Affinity,
    /// Devices with klb's programs on them
    #[value(alias = "device")]
    Devices,
    /// How full the maps are
    #[value(alias = "map")]
    Maps,
}

impl What {
    /// As on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::Backends => "backends",
            Self::Flows => "flows",
            Self::Sockets => "sockets",
            Self::Affinity => "affinity",
            Self::Devices => "devices",
            Self::Maps => "maps",
        }
    }
}

/// An address, with a port or any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub ip: IpAddr,
    pub port: Option<u16>,
}

impl FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let alone = text.parse().map(|ip| Self { ip, port: None });
        let with_port = || {
            text.parse().map(|addr: SocketAddr| Self {
                ip: addr.ip(),
                port: Some(addr.port()),
            })
        };
        alone
            .or_else(|_no_address: std::net::AddrParseError| with_port())
            .map_err(|_neither| {
                "wanted is an address with or without a port, such as 10.0.0.1, 10.0.0.1:80, \
                 fd00::1 or [fd00::1]:80"
                    .to_owned()
            })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    /// A table that tells more
    Wide,
    Json,
    Yaml,
}

impl From<Output> for Format {
    fn from(output: Output) -> Self {
        match output {
            Output::Table => Self::Table,
            Output::Json => Self::Json,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Without --at, a packet comes in by the device that the node's route to its source leads to, or by \
a port of it where that is a bridge; by an uplink if there is no route. What comes from one of the \
node's own addresses, or from a pod on whose device klb is not, is taken for a call at a socket. \
The answer says what was assumed.

A packet of TCP is a SYN, and one of SCTP an INIT, unless it belongs to a connection that lives: \
then it is one in the middle of it. The backend is drawn for this packet; another connection may \
get another one, by the odds that are named.

Exit status: 0 if there is an answer, whatever becomes of the packet; 1 if there is none; 2 for \
wrong usage.

Examples:
  # Why does a client outside get no answer from a NodePort?
  klb explain --from 192.0.2.9 --to 192.0.2.1:30080
  # A pod asks for a name, by a packet and by a call at its socket
  klb explain --from 10.244.0.9 --to 10.96.0.10:53 --proto udp
  klb explain --from 10.244.0.9 --to 10.96.0.10:53 --proto udp --at socket
  # Where does the next packet of a connection go?
  klb explain --from 192.0.2.9:54321 --to 203.0.113.7:443
  # For a script
  klb explain --from 192.0.2.9 --to 203.0.113.7:443 -o json | jq -r .verdict.reason")]
pub struct ExplainArgs {
    /// Who sends it; without a port, from one that has no connection to there
    #[arg(long, value_name = "ADDR[:PORT]")]
    pub from: End,
    /// What it is sent to; an IPv6 address is in brackets
    #[arg(long, value_name = "ADDR:PORT")]
    pub to: SocketAddr,
    /// What it speaks
    #[arg(long, value_enum, default_value_t = PacketProtocol::Tcp)]
    pub proto: PacketProtocol,
    /// Where it is met: by which device it comes in, or `socket` for what a process calls
    #[arg(long, value_name = "DEVICE|socket", value_parser = NonEmptyStringValueParser::new())]
    pub at: Option<String>,
    /// For people or for programs
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    #[command(flatten)]
    pub paths: Paths,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Each line is a packet at a hook, or a call of a process: time, hook, device or process, reason, \
protocol, both ends as they were and, behind ⇒, as they are from there on, and the Service. A \
packet that two hooks translate is on two lines. Reasons are those that `klb status` counts by.

All filters must fit. Addresses and ports are looked for before and after translation, so one can \
ask for a pod or for a Service's address. A call has no sender yet, so --from excludes calls. Of an \
ICMP error the ends are those of the answer to the packet that it is about.

One klb trace can listen at a time on a node; a second one says who does.

Exit status: 0 also when nothing was shown; 1 if the programs cannot be asked; 2 for wrong usage.

Examples:
  # All that klb has a part in
  klb trace
  # What is refused or dropped, and why
  klb trace --reason refuse,answer
  # A client's packets to one Service, there and back
  klb trace --service default/web --address 192.0.2.9
  # Why klb leaves packets of a client alone: those that it passes are told where asked for
  klb trace --address 192.0.2.9 --reason pass
  # The next ten new flows, for a script
  klb trace --reason new_flow --count 10 -o json | jq -r .after.dst.address
  # Packets before and after translation, for Wireshark or tcpdump
  klb trace --port 80 --pcap web.pcapng
  klb trace --port 80 --pcap - | tcpdump -nr -")]
pub struct TraceArgs {
    /// Only what is sent from there
    #[arg(long, value_name = "ADDR[:PORT]")]
    pub from: Option<End>,
    /// Only what is sent to there
    #[arg(long, value_name = "ADDR[:PORT]")]
    pub to: Option<End>,
    /// Only what is from or to this address or network
    #[arg(long, value_name = "ADDR|CIDR", value_parser = address_or_network)]
    pub address: Option<IpNet>,
    /// Only what is from or to this port
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// Only what is for this Service, or for one port of it
    #[arg(long, value_name = "NAMESPACE/NAME[:PORT]")]
    pub service: Option<ServiceEnd>,
    /// Only what speaks this; of an ICMP error, what it is about
    #[arg(long, value_enum)]
    pub proto: Option<PacketProtocol>,
    /// Only what happens for these reasons, or all that have this effect (translate, answer,
    /// refuse, keep, pass); without this all but what goes on as it came
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        value_parser = PossibleValuesParser::new(reason_names()),
        hide_possible_values = true
    )]
    pub reason: Vec<String>,
    /// Only what happens at these hooks
    #[arg(
        long,
        value_name = "HOOK",
        value_delimiter = ',',
        value_parser = PossibleValuesParser::new(Hook::ALL.map(Hook::name))
    )]
    pub hook: Vec<String>,
    /// End after so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// For people, or one JSON document on each line
    #[arg(short, long, value_enum, default_value_t = TraceOutput::Text)]
    pub output: TraceOutput,
    /// Write the packets, before and after, to this file too (pcapng); `-` is stdout, without lines
    #[arg(long, value_name = "FILE")]
    pub pcap: Option<PathBuf>,
    /// Bytes of each packet that are written, 2048 at most; of what XDP sees 128 before Linux 5.18, in words of 8
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 256,
        value_parser = clap::value_parser!(u16).range(1..=TRACE_BYTES as i64),
        requires = "pcap"
    )]
    pub snaplen: u16,
    #[command(flatten)]
    pub paths: Paths,
}

/// How a trace is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TraceOutput {
    Text,
    Json,
}

/// A Service, or one of its ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEnd {
    pub namespace: String,
    pub name: String,
    /// Name or number.
    pub port: Option<String>,
}

impl fmt::Display for ServiceEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)?;
        match &self.port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}

impl FromStr for ServiceEnd {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WANTED: &str = "wanted is NAMESPACE/NAME or NAMESPACE/NAME:PORT, such as \
            default/web or default/web:http";
        let (namespace, rest) = text.split_once('/').ok_or(WANTED)?;
        let (name, port) = match rest.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (rest, None),
        };
        if [namespace, name].contains(&"") || port == Some("") || rest.contains('/') {
            return Err(WANTED);
        }
        Ok(Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            port: port.map(ToOwned::to_owned),
        })
    }
}

/// A network, or an address as the network of itself.
fn address_or_network(text: &str) -> Result<IpNet, String> {
    let network = text.parse().map(|addr: IpAddr| addr.into());
    let network = network.or_else(|_no_address: std::net::AddrParseError| text.parse());
    network.map_err(|_neither| {
        "wanted is an address or a network, such as 10.0.0.1, 10.0.0.0/8 or fd00::/64".to_owned()
    })
}

/// What klb balances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PacketProtocol {
    Tcp,
    Udp,
    Sctp,
}

impl PacketProtocol {
    /// As an IP header has it.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => flow::TCP,
            Self::Udp => flow::UDP,
            Self::Sctp => flow::SCTP,
        }
    }
}

#[derive(Args, Debug)]
#[command(after_help = "\
Exit status: 0 if Services are served as they should be, 1 if not, or if that cannot be known. \
What keeps them from it are the problems: no agent runs or it is not ready, Services are not in the \
maps as they should be, nothing is heard of the cluster for a minute, hooks are missing, a map is \
full, or what no healthy node counts is counted during --over. With an agent that was stopped on \
purpose traffic flows, and the node is not healthy all the same: nobody follows changes. Warnings \
and limits are no problems. The report is printed either way.

Examples:
  # All there is
  klb status
  # Whether this node is well, for a script
  klb status > /dev/null || echo \"see klb status\"
  klb status -o json | jq -r '.problems[]'
  # What goes wrong now: refusals of the next five seconds come first among the counters
  klb status --over 5s
  # For a script: packets a second that are refused, by reason
  klb status --over 5s -o json | jq '.counters[] | select(.effect == \"refuse\") | {reason, per_second}'")]
pub struct StatusArgs {
    /// Read the counters twice, so much time apart, and tell what each grows by in a second
    #[arg(long, value_name = "TIME", value_parser = interval)]
    pub over: Option<Duration>,
    /// For people or for programs
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    #[command(flatten)]
    pub paths: Paths,
}

#[derive(Args, Debug)]
#[command(after_help = "\
On a terminal this is a live view; its last line names the keys, and ? says what the columns mean. \
Where stdout is none, the counters are read twice, and what they grew by is printed once.

A connection that is translated at a socket is counted when it begins, and its packets meet no \
program: what is said of packets, bytes and flows is of those that packet hooks translate.

Examples:
  # What is busy now, live
  klb top
  # One namespace, by bytes, looked at every five seconds
  klb top -n shop --sort bytes --interval 5
  # Who gets how much of a Service, once
  klb top --once --service web:http
  # For a script: Services that are refused by a backend now
  klb top -o json | jq -r '.services[] | select(any(.backends[]; .flows.reset > 0)) | .name'")]
pub struct TopArgs {
    /// How often to look, in seconds or as in 500ms; 100ms or more
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = top_interval)]
    pub interval: Duration,
    /// What comes first
    #[arg(long, value_enum, default_value_t = Sort::Connections)]
    pub sort: Sort,
    /// Only Services of this namespace
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Only Services of this name, or one of their ports
    #[arg(long, value_name = "NAME[:PORT]")]
    pub service: Option<String>,
    /// Look for one interval, print, and end
    #[arg(long)]
    pub once: bool,
    /// For people or for programs; JSON is printed once
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    #[command(flatten)]
    pub paths: Paths,
}

/// By what rows are sorted, the largest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// Begun in a second
    Connections,
    /// In a second, both ways
    Packets,
    /// In a second, both ways
    Bytes,
    /// That packets are translated by now
    Flows,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Nothing is printed if the maps hold what they should. The settings have to be those of the \
agent, by flags or by the variables of the environment that it has, too.

Exit status: 0 if nothing differs, 1 if something does, 2 if that cannot be known.

Examples:
  # In the agent's pod, which has a service account and NODE_NAME
  klb diff
  # On a node whose agent reads a folder
  klb diff --node-name node-1 --manifests /etc/klb/manifests
  # For a script: the Services of which anything differs
  klb diff -o json | jq -r '.differences[] | .namespace + \"/\" + .name' | sort -u")]
pub struct DiffArgs {
    /// Name of this node, as in the Node object
    #[arg(
        long,
        value_name = "NAME",
        env = "NODE_NAME",
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub node_name: String,
    /// The folder from which the agent reads Services
    #[arg(long, value_name = "DIR", env = "KLB_MANIFESTS")]
    pub manifests: Option<PathBuf>,
    /// How to reach the Kubernetes API; without this and without --manifests as the service account
    /// of the pod in which klb runs
    #[arg(
        long,
        value_name = "FILE",
        env = "KLB_KUBECONFIG",
        conflicts_with = "manifests"
    )]
    pub kubeconfig: Option<PathBuf>,
    /// The agent's --algorithm
    #[arg(long, value_enum, env = "KLB_ALGORITHM", default_value_t = Algorithm::Random)]
    pub algorithm: Algorithm,
    /// The agent's --maglev-table-size
    #[arg(
        long,
        value_name = "N",
        env = "KLB_MAGLEV_TABLE_SIZE",
        default_value_t = maglev::DEFAULT_SIZE,
        value_parser = table_size
    )]
    pub maglev_table_size: u32,
    /// The agent's --ping
    #[arg(long, value_enum, env = "KLB_PING", default_value_t = Ping::LoadBalancer)]
    pub ping: Ping,
    /// The agent's --nodeport-addresses
    #[arg(
        long,
        value_name = "CIDR",
        env = "KLB_NODEPORT_ADDRESSES",
        value_delimiter = ',',
        value_parser = nodeport_network
    )]
    pub nodeport_addresses: Vec<IpNet>,
    /// For how long what differs may still become equal: an agent may be about to write it
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = seconds)]
    pub wait: u32,
    /// How long it may take until all Services are told
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = seconds)]
    pub timeout: u32,
    /// For people or for programs
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    #[command(flatten)]
    pub paths: Paths,
}

impl DiffArgs {
    /// What goes for all Services.
    pub const fn settings(&self) -> Settings {
        Settings {
            algorithm: self.algorithm,
            maglev_table: self.maglev_table_size,
            ping: self.ping,
        }
    }

    /// As the agent has them, as far as they matter to Services.
    pub fn devices(&self) -> DeviceArgs {
        DeviceArgs {
            nodeport_addresses: self.nodeport_addresses.clone(),
            ..DeviceArgs::default()
        }
    }
}

#[derive(Args, Debug)]
#[command(after_help = "\
Each check is ok, warn (klb works, but not as well or not as somebody may think) or fail \
(Services are not served, or not all), with what was found and what helps.

Exit status: 0 if nothing fails, 1 if something does.

Examples:
  # On a node that has no klb yet
  klb doctor --preflight
  # When something is wrong
  klb doctor
  # For a script: all that is not well
  klb doctor -o json | jq -r '.checks[] | select(.level != \"ok\") | .finding'")]
pub struct DoctorArgs {
    /// Before klb is installed: nothing of it is expected
    #[arg(long)]
    pub preflight: bool,
    /// The agent's --masquerade-ports, where there is no agent yet that says
    #[arg(
        long,
        value_name = "FIRST-LAST",
        env = "KLB_MASQUERADE_PORTS",
        default_value = "50000-65535"
    )]
    pub masquerade_ports: PortRange,
    /// For people or for programs
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    #[command(flatten)]
    pub paths: Paths,
    #[command(flatten)]
    pub devices: DeviceArgs,
}

#[expect(clippy::struct_excessive_bools, reason = "each is a flag")]
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  # Before klb is uninstalled for good: wait until its connections have ended
  klb cleanup --drain
  # After kube-proxy was uninstalled: see what it left, and remove it
  klb cleanup --kube-proxy --dry-run
  klb cleanup --kube-proxy")]
pub struct CleanupArgs {
    /// Go on although an agent runs, which will go wrong until it is restarted; or although a
    /// kube-proxy does, which will write its rules anew, or connections end that need its rules
    #[arg(long)]
    pub force: bool,
    /// Remove what kube-proxy left in iptables, nftables and IPVS, and nothing of klb's. Needs the
    /// node's own iptables-save, nft and ipvsadm where these were used
    #[arg(long, conflicts_with = "drain")]
    pub kube_proxy: bool,
    /// Only list what would be removed
    #[arg(long, requires = "kube_proxy")]
    pub dry_run: bool,
    /// First leave new connections to whoever comes behind klb, and wait until those of klb's
    /// have ended
    #[arg(long, conflicts_with = "force")]
    pub drain: bool,
    /// How long to wait for them
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = seconds, requires = "drain")]
    pub timeout: u32,
    #[command(flatten)]
    pub paths: Paths,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  # Now, in this bash (or zsh)
  source <(klb completions bash)
  # bash, for good (needs the package bash-completion)
  klb completions bash > /usr/share/bash-completion/completions/klb
  # zsh, for good: in any folder of $fpath
  klb completions zsh > /usr/local/share/zsh/site-functions/_klb
  # fish, for good
  klb completions fish > ~/.config/fish/completions/klb.fish")]
pub struct CompletionsArgs {
    /// Whose script to print
    #[arg(value_enum)]
    pub shell: Shell,
}

/// A shell that can complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl AgentArgs {
    /// What goes for all Services.
    pub const fn settings(&self) -> Settings {
        Settings {
            algorithm: self.algorithm,
            maglev_table: self.maglev_table_size,
            ping: self.ping,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn agent(flags: &[&str]) -> Result<Box<AgentArgs>, clap::Error> {
        let line = ["klb", "agent", "--node-name", "n"].iter().chain(flags);
        match Cli::try_parse_from(line)?.command {
            Command::Agent(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples() {
        let mut cli = Cli::command();
        for command in cli.get_subcommands_mut() {
            let help = command.render_long_help().to_string();
            let name = command.get_name();
            let (_, examples) = help.split_once("Examples:\n").expect(name);
            assert!(examples.contains(&format!("klb {name}")), "{name}");
        }
    }

    #[test]
    fn every_flag_has_a_help_text() {
        let cli = Cli::command();
        for command in cli.get_subcommands() {
            for argument in command.get_arguments() {
                let described = argument.get_help().is_some() || argument.is_hide_set();
                assert!(described, "{} {}", command.get_name(), argument.get_id());
            }
        }
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let args = agent(&["--manifests", "d"]).expect("valid");
        assert_eq!(args.healthz_bind.to_string(), "0.0.0.0:10256");
        assert_eq!(args.metrics_bind.to_string(), "127.0.0.1:10249");
        assert_eq!(args.paths.bpffs.to_str(), Some("/sys/fs/bpf/klb"));
        assert_eq!(args.paths.state_dir.to_str(), Some("/run/klb"));
        assert_eq!(args.dashboard, Switch::On);
        assert_eq!(args.hooks.xdp, XdpChoice::Auto);
        assert_eq!(args.hooks.socket_lb, SocketLb::All);
        assert!(args.devices.uplink.is_empty());
        assert!(args.devices.pod_device.contains(&"veth*".to_owned()));
    }

    #[test]
    fn timeouts_and_ports_are_what_the_programs_have_without_flags() {
        let args = agent(&[]).expect("valid");
        assert_eq!(args.timeouts.by_state(), State::TIMEOUTS);
        let ports = args.masquerade_ports;
        assert_eq!((ports.first(), ports.count()), (50_000, 15_536));
        let all = "1-65535".parse::<PortRange>().expect("a range");
        assert_eq!((all.first(), all.count()), (1, 65_535));
        let args = agent(&["--timeout-udp", "1m 5s", "--timeout-tcp-reset", "3s"]).expect("valid");
        let timeouts = args.timeouts.by_state();
        assert_eq!(State::Unreplied.timeout(&timeouts), 65);
        assert_eq!(State::Reset.timeout(&timeouts), 3);
    }

    #[test]
    fn an_address_without_a_port_has_the_usual_one() {
        for (text, healthz) in [
            ("0.0.0.0", "0.0.0.0:10256"),
            ("::", "[::]:10256"),
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("[::1]:80", "[::1]:80"),
        ] {
            let args = agent(&["--healthz-bind", text]).expect("valid");
            assert_eq!(args.healthz_bind.to_string(), healthz);
        }
        let args = agent(&["--metrics-bind", "127.0.0.1"]).expect("valid");
        assert_eq!(args.metrics_bind.port(), 10249);
    }

    #[test]
    fn times_may_be_short_where_they_are_for_batches() {
        let args = agent(&[]).expect("valid");
        assert_eq!(args.batch_delay, Duration::from_millis(10));
        assert_eq!(args.verify_interval, Duration::from_secs(600));
        for (text, milliseconds) in [("0ms", 0), ("1s", 1000)] {
            let args = agent(&["--batch-delay", text]).expect("valid");
            assert_eq!(args.batch_delay, Duration::from_millis(milliseconds));
        }
    }

    #[test]
    fn a_number_alone_is_an_interval_in_seconds() {
        for (text, expected) in [
            ("2", Some(2000)),
            ("2s", Some(2000)),
            ("500ms", Some(500)),
            ("0", None),
            ("50ms", None),
            ("-1", None),
        ] {
            let interval = top_interval(text).ok();
            assert_eq!(interval, expected.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn words_of_kube_proxys_for_networks_are_refused_with_networks() {
        for (word, network) in [
            ("primary", "192.0.2.0/24"),
            ("localhost", "127.0.0.0/8"),
            ("all", "::/0"),
        ] {
            let error = agent(&["--nodeport-addresses", word]).expect_err("refused");
            assert!(error.to_string().contains(network), "{error}");
        }
    }

    #[test]
    fn lists_may_be_repeated_or_separated_by_commas() {
        let args = agent(&["--uplink", "eth*,bond0", "--uplink", "ens?"]).expect("valid");
        assert_eq!(args.devices.uplink, ["eth*", "bond0", "ens?"]);
        let args = agent(&["--nodeport-addresses", "10.0.0.0/8,fd00::/8"]).expect("valid");
        assert_eq!(args.devices.nodeport_addresses.len(), 2);
    }

    #[test]
    fn a_trace_is_asked_for_in_words_that_make_sense() {
        for (flags, makes_sense) in [
            (&["--from", "10.0.0.1", "--to", "[fd00::1]:80"][..], true),
            (&["--address", "10.0.0.0/8"], true),
            (&["--address", "fd00::1"], true),
            (&["--address", "10.0.0.0/33"], false),
            (&["--port", "0"], false),
            (&["--service", "default/web:http"], true),
            (&["--service", "web"], false),
            (&["--service", "/web"], false),
            (&["--service", "a/b/c"], false),
            (&["--service", "default/web:"], false),
            (&["--reason", "new_flow,refuse"], true),
            (&["--reason", "nonsense"], false),
            (&["--hook", "xdp,socket"], true),
            (&["--hook", "tc"], false),
            (&["--count", "0"], false),
            (&["--snaplen", "64"], false),
            (&["--snaplen", "64", "--pcap", "f"], true),
            (&["--snaplen", "2049", "--pcap", "f"], false),
        ] {
            let line = ["klb", "trace"].iter().chain(flags);
            assert_eq!(Cli::try_parse_from(line).is_ok(), makes_sense, "{flags:?}");
        }
    }

    #[test]
    fn nonsense_is_wrong_usage() {
        for flags in [
            &["--xdp", "sometimes"][..],
            &["--nodeport-addresses", "10.0.0.0/33"],
            &["--healthz-bind", "here"],
            &["--healthz-bind", ""],
            &["--healthz-bind", "10256"],
            &["--batch-delay", "1001ms"],
            &["--verify-interval", "0s"],
            &["--kubeconfig", "f", "--manifests", "d"],
            &["--map-flows", "0"],
            &["--masquerade-ports", "50000"],
            &["--masquerade-ports", "0-10"],
            &["--masquerade-ports", "20-10"],
            &["--masquerade-ports", "60000-65536"],
            &["--timeout-udp", "500ms"],
            &["--timeout-udp", "soon"],
            &["--timeout-tcp-established", "100years"],
            &["--maglev-table-size", "1024"],
            &["--maglev-table-size", "65537"],
        ] {
            assert_eq!(
                agent(flags).expect_err("refused").exit_code(),
                2,
                "{flags:?}"
            );
        }
    }
}
