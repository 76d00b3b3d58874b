//! `klb` in a cluster: the agent, and the commands that read what it left in
//! the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::Duration,
};

use aya::maps::{Map, MapData};
use lb_common::{Addr4, Addr6, Hook, Reason, names, service::AffinityKey};
use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::{
    cgroup::Cgroup,
    manifests::{Folder, NODE},
    netns::tool,
    process::{Output, Place, Process},
    program,
    pty::Terminal,
    scope,
    topology::{Cluster, POD_DEVICES, SecondNode, UPLINK},
    wait,
    web::{self, Page, Question},
};

/// How long a start or an end may take. Both wait for the kernel's RCU grace
/// periods, which last for seconds on a machine that is busy with other things.
const START: Duration = Duration::from_secs(60);
/// Seconds instead of [`START`], for a machine that is emulated: there the verifier
/// alone takes 45, beside other work.
const START_SECONDS: &str = "KLB_TEST_START_SECONDS";
/// How long a change may take to be seen.
const CHANGE: Duration = Duration::from_secs(20);

fn start_limit() -> Duration {
    let seconds = env::var(START_SECONDS)
        .ok()
        .and_then(|text| text.parse().ok());
    seconds.map_or(START, Duration::from_secs)
}

/// `klb`: `KLB_BIN`, or where `cargo xtask build` puts it.
pub fn klb_path() -> PathBuf {
    let built = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/release/klb");
    env::var_os("KLB_BIN").map_or_else(|| PathBuf::from(built), PathBuf::from)
}

/// Which hooks the agent uses, in the words of its flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hooks {
    pub socket_lb: &'static str,
    pub xdp: &'static str,
    pub tc: &'static str,
    /// Whether there is any device to be attached to: there is no other way to
    /// be without TC.
    pub devices: bool,
}

impl Hooks {
    pub const ALL: Self = Self {
        socket_lb: "all",
        xdp: "auto",
        tc: "auto",
        devices: true,
    };
    pub const SOCKET: Self = Self {
        devices: false,
        ..Self::ALL
    };
    pub const TC: Self = Self {
        socket_lb: "off",
        xdp: "off",
        ..Self::ALL
    };
    /// The way of kernels before 6.6.
    pub const CLSACT: Self = Self {
        tc: "clsact",
        ..Self::TC
    };
    /// With TC for the replies.
    pub const XDP: Self = Self {
        xdp: "native",
        ..Self::TC
    };
    /// The way of devices whose driver has no XDP.
    pub const XDP_GENERIC: Self = Self {
        xdp: "generic",
        ..Self::TC
    };

    fn flags(self) -> [&'static str; 10] {
        let Self {
            socket_lb,
            xdp,
            tc,
            devices,
        } = self;
        let (uplink, pod_device) = if devices {
            (UPLINK, POD_DEVICES)
        } else {
            ("none", "none")
        };
        [
            "--uplink",
            uplink,
            "--pod-device",
            pod_device,
            "--socket-lb",
            socket_lb,
            "--xdp",
            xdp,
            "--tc",
            tc,
        ]
    }
}

/// An agent on the cluster's node, with folders of its own. Dropping it removes
/// all that klb put into the kernel.
#[derive(Debug)]
pub struct Agent {
    process: Option<Process>,
    place: Place,
    node_name: &'static str,
    /// Where `klb` is; [`klb_path`] unless told otherwise.
    pub program: PathBuf,
    /// For its next start.
    pub hooks: Hooks,
    /// More flags, likewise.
    pub flags: Vec<String>,
    /// All that it may do, in the words of `setpriv`, likewise; everything if
    /// there are none.
    pub capabilities: Option<&'static str>,
    /// Variables of its environment, likewise.
    pub variables: Vec<(String, String)>,
    /// Where the API server is, for an agent that reads from one, likewise.
    pub kubeconfig: Option<PathBuf>,
    /// Whose processes' sockets are served.
    pub cgroup: PathBuf,
    pins: PathBuf,
    pub manifests: Folder,
}

impl Agent {
    /// An agent that does not run yet.
    pub fn new(cluster: &Cluster, hooks: Hooks) -> Self {
        Self::on(&cluster.node.place, cluster.cgroup(), NODE, hooks)
    }

    /// As [`Self::new`], on a second node.
    pub fn second(second: &SecondNode, hooks: Hooks) -> Self {
        Self::on(&second.node.place, second.cgroup(), "node-2", hooks)
    }

    fn on(place: &Place, cgroup: &Cgroup, node_name: &'static str, hooks: Hooks) -> Self {
        mount_bpffs();
        let scope = place.scope();
        Self {
            process: None,
            place: place.clone(),
            node_name,
            program: klb_path(),
            hooks,
            flags: Vec::new(),
            capabilities: None,
            variables: Vec::new(),
            kubeconfig: None,
            cgroup: cgroup.path().to_owned(),
            pins: scope::pin_folder(scope.name()),
            manifests: Folder::create(scope.folder().join("manifests")),
        }
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Panics
    /// If it does not become ready; the message has its log.
    pub fn start(&mut self) {
        self.spawn();
        self.await_ready();
    }

    /// Waits until it is ready.
    ///
    /// # Panics
    /// If it does not become so; the message has its log.
    pub fn await_ready(&mut self) {
        self.await_log("ready", |line| {
            line.split_whitespace().any(|word| word == "ready")
        });
    }

    /// Starts it.
    ///
    /// # Panics
    /// If it runs already.
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "it runs");
        let mut command = self.confined();
        command.args(["agent", "--node-name", self.node_name]);
        match &self.kubeconfig {
            Some(path) => command.arg("--kubeconfig").arg(path),
            None => command.arg("--manifests").arg(self.manifests.path()),
        };
        command.args(self.hooks.flags()).args(&self.flags);
        command.arg("--cgroup").arg(&self.cgroup);
        command.args(self.paths());
        // What the message of a failing test shows, and some tests read.
        command.env("RUST_LOG", "info,lb_userspace=debug");
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        self.process = Some(self.place.start("agent", command));
    }

    /// What an agent that is ready tells on its node.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn page(&self, port: u16, path: &str) -> Page {
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        web::await_answer(&self.place, server, &Question::get(path))
    }

    /// `klb`, with the capabilities that it is to have.
    fn confined(&self) -> Command {
        let Some(capabilities) = self.capabilities else {
            return self.place.command(&self.program);
        };
        let mut command = self.place.command("setpriv");
        let bounding_set = format!("--bounding-set=-all,{capabilities}");
        command.arg(bounding_set).arg(&self.program);
        command
    }

    /// The flags by which every command finds this agent's things.
    pub fn paths(&self) -> [String; 4] {
        let path = |path: &Path| path.display().to_string();
        [
            "--bpffs".to_owned(),
            path(&self.pins),
            "--state-dir".to_owned(),
            path(&self.state()),
        ]
    }

    /// Its `--state-dir`.
    pub fn state(&self) -> PathBuf {
        self.place.scope().folder().join("state")
    }

    /// Where it pins, with the layout's version.
    pub fn pins(&self) -> PathBuf {
        self.pins.join(names::LAYOUT)
    }

    /// The running process.
    ///
    /// # Panics
    /// If it does not run.
    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("the agent runs")
    }

    /// What it has logged since it was started.
    pub fn log(&mut self) -> &Output {
        self.process().stderr()
    }

    /// Waits for a line of the log.
    ///
    /// # Panics
    /// If it does not come.
    pub fn await_log(&mut self, what: &str, is_it: impl Fn(&str) -> bool) -> String {
        self.process().wait_for_stderr(what, start_limit(), is_it)
    }

    /// `kill -9`: it has no chance to do anything.
    ///
    /// # Panics
    /// If it had ended before.
    pub fn kill(&mut self) {
        let status = self.end(Signal::SIGKILL);
        assert_eq!(
            status.signal(),
            Some(libc::SIGKILL),
            "ended before: {status}"
        );
    }

    /// SIGTERM: as when a pod is replaced.
    ///
    /// # Panics
    /// If it does not end well.
    pub fn terminate(&mut self) {
        let status = self.end(Signal::SIGTERM);
        assert!(status.success(), "after SIGTERM: {status}");
    }

    fn end(&mut self, signal: Signal) -> ExitStatus {
        let mut process = self.process.take().expect("the agent runs");
        process.signal(signal);
        process.wait(start_limit())
    }

    /// Runs another command of `klb`, with this agent's folders.
    pub fn klb(&self, arguments: &[&str]) -> Said {
        let paths = self.paths();
        let paths = paths.iter().map(String::as_str);
        self.klb_elsewhere(&arguments.iter().copied().chain(paths).collect::<Vec<_>>())
    }

    /// As [`Self::klb`], with the folders that the arguments name.
    pub fn klb_elsewhere(&self, arguments: &[&str]) -> Said {
        let mut process = self.spawn_klb(arguments);
        Said {
            status: process.wait(start_limit()),
            stdout: process.stdout().text(),
            stderr: process.stderr().text(),
        }
    }

    /// As [`Self::klb`], for a command that goes on.
    pub fn start_klb(&self, arguments: &[&str]) -> Process {
        let paths = self.paths();
        let paths = paths.iter().map(String::as_str);
        self.spawn_klb(&arguments.iter().copied().chain(paths).collect::<Vec<_>>())
    }

    /// As [`Self::klb`], on a terminal of so many rows and columns.
    pub fn klb_on_terminal(&self, arguments: &[&str], rows: u16, columns: u16) -> Terminal {
        let mut command = self.place.command(&self.program);
        command.args(arguments).args(self.paths());
        // Whatever the tests' own is.
        command.env("TERM", "xterm-256color").env_remove("NO_COLOR");
        Terminal::start(command, rows, columns)
    }

    fn spawn_klb(&self, arguments: &[&str]) -> Process {
        let mut command = self.place.command(&self.program);
        command.args(arguments);
        self.place.start("klb", command)
    }

    /// A command's JSON.
    ///
    /// # Panics
    /// If it fails or prints something else.
    fn json<T: for<'de> Deserialize<'de>>(&self, arguments: &[&str]) -> T {
        let said = self.klb(&[arguments, &["-o", "json"]].concat());
        assert!(said.status.success(), "klb {arguments:?}: {said:?}");
        said.json()
    }

    /// `klb get services`
    pub fn services(&self) -> Vec<ServicePort> {
        let list: ServiceList = self.json(&["get", "services"]);
        list.services
    }

    /// The backends of every frontend of a Service, by address and port; empty
    /// if there is no such Service.
    pub fn backends(&self, service: &str) -> BTreeMap<SocketAddr, BTreeSet<SocketAddr>> {
        let services = self.services();
        let ports = services.iter().filter(|port| port.name == service);
        let frontends = ports.flat_map(|port| &port.frontends);
        frontends
            .map(|frontend| {
                let backends = frontend.backends.iter().map(Endpoint::socket).collect();
                let addr = SocketAddr::new(frontend.address, frontend.port);
                (addr, backends)
            })
            .collect()
    }

    /// Waits until the kernel's maps are as wanted.
    ///
    /// # Panics
    /// If they do not become so; `what` says what was wanted.
    pub fn await_services(&self, what: &str, are_they: impl Fn(&[ServicePort]) -> bool) {
        wait::until(what, CHANGE, || are_they(&self.services()).then_some(()));
    }

    /// Makes every client with affinity look as if it had last come so long ago.
    ///
    /// # Panics
    /// If the maps cannot be changed.
    pub fn age_affinity(&self, seconds: u32) {
        let open = |name| {
            let data = MapData::from_pin(self.pins().join(name)).expect("a pinned map");
            Map::from_map_data(data).expect("a map of a known kind")
        };
        program::age_affinity::<AffinityKey<Addr4>>(&mut open(names::AFFINITY4), seconds);
        program::age_affinity::<AffinityKey<Addr6>>(&mut open(names::AFFINITY6), seconds);
    }

    /// `klb explain`
    pub fn explain(&self, arguments: &[&str]) -> serde_json::Value {
        self.json(&[&["explain"], arguments].concat())
    }

    /// `klb status`
    ///
    /// # Panics
    /// If its exit status says something else than its report.
    pub fn status(&self) -> Status {
        let said = self.klb(&["status", "-o", "json"]);
        let status: Status = said.json();
        assert_eq!(
            said.status.code(),
            Some(i32::from(!status.healthy)),
            "{said:?}"
        );
        status
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.process.take());
        if !self.pins.exists() {
            return;
        }
        let mut command = self.place.command(&self.program);
        let cleanup = command
            .args(["cleanup", "--force"])
            .args(self.paths())
            .output();
        if !cleanup.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("klb cleanup: {cleanup:?}");
        }
        if self.pins.exists()
            && let Err(error) = fs::remove_dir_all(&self.pins)
        {
            eprintln!("{}: {error}", self.pins.display());
        }
    }
}

/// How a command ended, and what it said.
#[derive(Debug)]
pub struct Said {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Said {
    /// Stdout, as the one JSON document that it is.
    ///
    /// # Panics
    /// If it is something else.
    pub fn json<T: for<'de> Deserialize<'de>>(&self) -> T {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

#[derive(Debug, Deserialize)]
struct ServiceList {
    services: Vec<ServicePort>,
}

/// A port of a Service, as `klb get services` has it.
#[derive(Clone, Debug, Deserialize)]
pub struct ServicePort {
    pub namespace: String,
    pub name: String,
    pub port_name: String,
    pub port: u16,
    pub protocol: String,
    pub frontends: Vec<Frontend>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Frontend {
    pub kind: String,
    pub address: IpAddr,
    pub port: u16,
    pub policy: String,
    pub verdict: String,
    pub backends: Vec<Endpoint>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Endpoint {
    pub address: IpAddr,
    pub port: u16,
}

impl Endpoint {
    pub fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }
}

/// What of `klb status` the tests look at.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    pub healthy: bool,
    /// Why it is not.
    pub problems: Vec<String>,
    pub agent: Running,
    /// What the agent noted last.
    pub noted: Option<Noted>,
    /// Its release, and what it can do, by name.
    pub kernel: BTreeMap<String, serde_json::Value>,
    pub devices: Vec<Device>,
    pub counters: Vec<Counter>,
    /// What does not work here.
    pub limits: Vec<String>,
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Noted {
    pub age_seconds: u64,
    pub ready: bool,
    pub failing: Few,
    pub skipped: Few,
}

/// Some of many.
#[derive(Clone, Debug, Deserialize)]
pub struct Few {
    pub count: usize,
    pub some: Vec<serde_json::Value>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Running {
    pub running: bool,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Device {
    pub index: u32,
    pub name: Option<String>,
    pub role: Option<String>,
    pub tc_ingress: Option<String>,
    pub tc_egress: Option<String>,
    pub xdp: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Counter {
    pub hook: String,
    pub reason: String,
    pub count: u64,
}

impl Status {
    /// How often a hook counted a reason.
    pub fn count(&self, hook: Hook, reason: Reason) -> u64 {
        let mut counters = self.counters.iter();
        let counter =
            counters.find(|counter| counter.hook == hook.name() && counter.reason == reason.name());
        counter.map_or(0, |counter| counter.count)
    }

    /// The hooks that chose a backend, and how often.
    pub fn new_flows(&self) -> BTreeMap<Hook, u64> {
        Hook::ALL
            .into_iter()
            .map(|hook| (hook, self.count(hook, Reason::NewFlow)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

/// All elements of a pinned map that are not zero, in hexadecimal and in order.
///
/// # Panics
/// If bpftool fails.
pub fn raw_dump(pin: &Path) -> Vec<String> {
    let mut lines: Vec<String> = raw_elements(pin)
        .into_iter()
        .map(|element| format!("{}: {}", element.key.concat(), element.value.concat()))
        .collect();
    lines.sort();
    // From an element that has gone bpftool has no way on, and begins anew.
    lines.dedup();
    lines
}

/// Writes zeros over all elements of a pinned map, as nobody should.
///
/// # Panics
/// If bpftool fails.
pub fn spoil(pin: &Path) {
    for RawElement { key, value } in raw_elements(pin) {
        let zeros = vec!["0"; value.len()];
        let output = tool("bpftool")
            .args(["map", "update", "pinned"])
            .arg(pin)
            .arg("key")
            .args(key)
            .arg("value")
            .args(zeros)
            .output()
            .unwrap_or_else(|error| panic!("bpftool: {error}"));
        assert!(output.status.success(), "bpftool: {output:?}");
    }
}

fn raw_elements(pin: &Path) -> Vec<RawElement> {
    let output = tool("bpftool")
        .args(["-j", "map", "dump", "pinned"])
        .arg(pin)
        .output()
        .unwrap_or_else(|error| panic!("bpftool: {error}"));
    assert!(output.status.success(), "bpftool: {output:?}");
    let dumped: Vec<Dumped> = serde_json::from_slice(&output.stdout).expect("JSON");
    let elements = dumped.into_iter().filter_map(Dumped::element);
    elements
        .filter(|element| element.value.iter().any(|byte| byte != "0x00"))
        .collect()
}

struct RawElement {
    key: Vec<String>,
    value: Vec<String>,
}

/// An element as bpftool prints it.
#[derive(Deserialize)]
struct Dumped {
    key: Vec<String>,
    value: DumpedValue,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum DumpedValue {
    Bytes(Vec<String>),
    /// What the kernel said in its place.
    Error {
        error: String,
    },
}

impl Dumped {
    /// `None` if it has gone between the looks at its key and at its value.
    fn element(self) -> Option<RawElement> {
        let Self { key, value } = self;
        match value {
            DumpedValue::Bytes(value) => Some(RawElement { key, value }),
            DumpedValue::Error { error } => {
                assert_eq!(error, "No such file or directory", "bpftool: {key:?}");
                None
            }
        }
    }
}

/// Mounts the BPF file system where it belongs, unless it is there. Agents do so
/// themselves; but two that start at once would mount it over each other.
fn mount_bpffs() {
    use nix::{
        fcntl::{Flock, FlockArg},
        mount::{MsFlags, mount},
    };
    const BPFFS: &str = "/sys/fs/bpf";
    let is_mounted = || {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("proc is mounted");
        mounts
            .lines()
            .any(|line| line.split(' ').nth(1) == Some(BPFFS))
    };
    if is_mounted() {
        return;
    }
    let folder = fs::File::open(BPFFS).unwrap_or_else(|error| panic!("{BPFFS}: {error}"));
    let _one_at_a_time = Flock::lock(folder, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .expect("a lock");
    if !is_mounted() {
        mount(
            Some("bpf"),
            BPFFS,
            Some("bpf"),
            MsFlags::empty(),
            Some("mode=0700"),
        )
        .unwrap_or_else(|error| panic!("mounting {BPFFS}: {error}"));
    }
}
