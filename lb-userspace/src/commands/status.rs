//! `klb status`: whether all is well, on one page.

pub(super) mod counters;
mod findings;
mod noted;
mod settings;

use std::{collections::BTreeSet, io, process::ExitCode, time::Duration};

use lb_common::{flow::SCTP, names};
use serde::Serialize;

use self::{
    findings::Findings,
    noted::{Lately, Noted},
    settings::Settings,
};
use super::{
    ELSEWHERE,
    get::{DeviceRow, device_table, devices},
    look::{Look, Tone},
    open_maps, open_pins, print,
    table::Table,
};
use crate::{
    args::{Paths, StatusArgs},
    datapath::{
        Maps as _,
        features::Features,
        inspect,
        kernel::{Fill, KernelMaps, NetnsTable},
        layouts,
        pins::{Lock, Pins},
    },
    devices::UNSERVABLE,
    sysctl,
};

/// Characters of a bar that shows how full a map is.
const BAR_WIDTH: usize = 10;
/// What each stands for, in percent.
const BAR_STEP: usize = 100 / BAR_WIDTH;

/// Maps that give up their oldest entries for new ones.
const EVICTING: [&str; 10] = [
    names::FLOWS4,
    names::FLOWS6,
    names::YOUNG4,
    names::YOUNG6,
    names::AFFINITY4,
    names::AFFINITY6,
    names::FRAGMENTS4,
    names::FRAGMENTS6,
    names::SOCKETS4,
    names::SOCKETS6,
];

/// Everything that `klb status` shows.
#[derive(Debug, Serialize)]
pub(crate) struct Status {
    /// Services are served as they should be, as far as is known here.
    healthy: bool,
    /// Why not.
    problems: Vec<String>,
    version: &'static str,
    layout: String,
    /// Names of other layouts, of a klb before or after this one, whose
    /// connections go on.
    draining: Vec<String>,
    pins: String,
    agent: Agent,
    /// What the agent noted last, also if it has gone; `null` if it has not.
    noted: Option<Noted>,
    kernel: Kernel,
    /// Names of the socket hooks that are attached.
    sockets: Vec<String>,
    /// Pods whose network namespaces the socket programs know.
    pods: usize,
    settings: Settings,
    devices: Vec<DeviceRow>,
    maps: Vec<MapRow>,
    /// For how long the counters were looked at, in seconds, if for a while.
    #[serde(skip_serializing_if = "Option::is_none")]
    counters_over_seconds: Option<u64>,
    /// Those above zero.
    counters: Vec<counters::Row>,
    /// What was refused in the last minute; `null` if no agent has counted.
    lately: Option<Lately>,
    /// What does not work here, or works otherwise than one may think.
    limits: Vec<String>,
    /// What is to be looked at, and keeps no Service from being served.
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Agent {
    running: bool,
    pid: Option<String>,
}

#[derive(Debug, Serialize)]
struct Kernel {
    release: String,
    #[serde(flatten)]
    features: Features,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct MapRow {
    name: &'static str,
    entries: usize,
    max_entries: u32,
    /// Whether a full map gives up its oldest entries for new ones.
    evicts: bool,
}

/// Runs `klb status`. The exit status tells whether all is well.
pub fn run(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let pins = open_pins(&args.paths)?;
    let maps = open_maps(&pins)?;
    let pid = Lock::holder(&args.paths.state_dir)?;
    let noted = Noted::read(&args.paths.state_dir, pid.as_deref());
    let agent = Agent {
        running: pid.is_some(),
        pid,
    };
    let status = gather(&pins, &maps, (agent, noted), Features::probe(), args.over)?;
    print(args.output, &status, page)?;
    Ok(if status.healthy {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Status {
    /// As an agent tells it of itself. What the kernel can do is given: to find out
    /// is to load programs, which the audit log of the node may have a line for.
    pub(crate) fn of_agent(
        paths: &Paths,
        pins: &Pins,
        maps: &KernelMaps,
        features: Features,
    ) -> anyhow::Result<Self> {
        let pid = Some(std::process::id().to_string());
        let noted = Noted::read(&paths.state_dir, pid.as_deref());
        let agent = Agent { running: true, pid };
        gather(pins, maps, (agent, noted), features, None)
    }
}

fn gather(
    pins: &Pins,
    maps: &KernelMaps,
    (agent, noted): (Agent, io::Result<Option<Noted>>),
    features: Features,
    over: Option<Duration>,
) -> anyhow::Result<Status> {
    // Takes its time, and all else is to be of now.
    let counters = counters::read(pins, over)?;
    let mut status = Status {
        healthy: true,
        problems: Vec::new(),
        version: env!("CARGO_PKG_VERSION"),
        layout: layouts::name(pins),
        draining: layouts::others(pins)?.iter().map(layouts::name).collect(),
        pins: pins.root().display().to_string(),
        agent,
        noted: noted.as_ref().ok().cloned().flatten(),
        kernel: Kernel {
            release: kernel_release(),
            features,
        },
        sockets: inspect::sockets(pins),
        pods: NetnsTable::open(pins)?.read()?.len(),
        settings: Settings::read(maps)?,
        devices: Vec::new(),
        maps: maps.fill()?.into_iter().map(MapRow::from).collect(),
        counters_over_seconds: over.map(|over| over.as_secs()),
        lately: None,
        counters,
        limits: Vec::new(),
        warnings: Vec::new(),
    };
    if status.agent.running {
        let noted = status.noted.as_ref();
        status.lately = noted.and_then(|noted| noted.lately(&status.counters));
    }
    let uses_sctp = maps.metas()?.values().any(|meta| meta.protocol == SCTP);
    let config = maps.config()?;
    let is_elsewhere = inspect::is_elsewhere(&config)?;
    let mut unservable = BTreeSet::new();
    if !is_elsewhere {
        status.devices = devices(pins)?;
        unservable = inspect::unservable_devices()?;
    }
    let unservable = unservable.into_iter();
    status.limits = limits(&status, uses_sctp)
        .into_iter()
        .map(str::to_owned)
        .chain(unservable.map(|device| format!("{device}: {UNSERVABLE}")))
        .collect();
    let Findings {
        problems,
        mut warnings,
    } = Findings::of(&status);
    if let Err(error) = noted {
        warnings.push(format!("what the agent noted cannot be read: {error}"));
    }
    if is_elsewhere {
        warnings.push(ELSEWHERE.to_owned());
    } else {
        warnings.extend(sysctl::complaints(&sysctl::ports(&config)));
    }
    Ok(Status {
        healthy: problems.is_empty(),
        problems,
        warnings,
        ..status
    })
}

impl From<Fill> for MapRow {
    fn from(fill: Fill) -> Self {
        let Fill {
            map: name,
            entries,
            max_entries,
        } = fill;
        Self {
            name,
            entries,
            max_entries,
            evicts: EVICTING.contains(&name),
        }
    }
}

impl MapRow {
    fn percent(&self) -> usize {
        self.entries * 100 / (self.max_entries as usize).max(1)
    }

    /// How full it is, to the eye: an entry shows, and so does a free place.
    fn bar(&self) -> String {
        let full = (self.percent() / BAR_STEP).min(BAR_WIDTH);
        let full = full.max(usize::from(self.entries > 0));
        format!("[{:<BAR_WIDTH$}]", "#".repeat(full))
    }
}

fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// What this kernel, these settings and these Services cannot have.
fn limits(status: &Status, uses_sctp: bool) -> Vec<&'static str> {
    let sockets_are_served = !status.sockets.is_empty();
    [
        (
            uses_sctp,
            "SCTP of the node's own processes is not translated: the kernel has no hook for it",
        ),
        (
            status.settings.routing == "bypass",
            "routing is bypass: translated packets do not pass the node's netfilter",
        ),
        (
            sockets_are_served && status.kernel.features.set_retval == Some(false),
            "this kernel lets no hook choose an error (it came with 5.18): \
             a Service without endpoints refuses by ICMP, not at connect(), and a process of the \
             node itself waits until its time is over",
        ),
        (
            status.devices.iter().any(|device| device.xdp.is_some())
                && status.kernel.features.xdp_frags == Some(false),
            "this kernel gives XDP no packets of several buffers (it came with 5.18): \
             with jumbo frames XDP is not native",
        ),
        (
            sockets_are_served && status.kernel.features.sock_destroy == Some(false),
            "this kernel cannot end sockets (CONFIG_INET_DIAG_DESTROY, module udp_diag): \
             a process with a connected UDP socket stays with a backend that has gone",
        ),
        (
            sockets_are_served && status.kernel.features.netns_cookie == Some(false),
            "this kernel does not tell network namespaces apart (it came with 5.14): at sockets \
             no pod can opt out, NodePorts are not on loopback, and affinity is not that of packets",
        ),
        (
            !sockets_are_served,
            "sockets are not served: processes of the node itself do not reach Services by klb",
        ),
    ]
    .into_iter()
    .filter_map(|(holds, limit)| holds.then_some(limit))
    .collect()
}

fn page(status: &Status, look: Look) -> String {
    let mut page = String::new();
    let health = if status.healthy {
        look.paint(Some(Tone::Good), "healthy")
    } else {
        let problems = format!("not healthy: {}", status.problems.join("; "));
        look.paint(Some(Tone::Bad), &problems)
    };
    let agent = match &status.agent.pid {
        Some(pid) => look.paint(Some(Tone::Good), &format!("running, pid {pid}")),
        None => look.paint(Some(Tone::Bad), "not running"),
    };
    let sync = status.noted.as_ref().map_or_else(
        || "not known: no agent has noted anything".to_owned(),
        |noted| noted.summary(status.agent.running),
    );
    let refused = match &status.lately {
        Some(lately) => lately.summary(),
        None => "not known without an agent; --over 5s tells what is refused now".to_owned(),
    };
    let sockets = match status.sockets.len() {
        0 => "off".to_owned(),
        _ => status.sockets.join(" "),
    };
    for (label, text) in [
        ("health", health),
        (
            "klb",
            format!(
                "{}, layout {}, pins {}",
                status.version, status.layout, status.pins
            ),
        ),
        ("agent", agent),
        ("sync", sync),
        ("refused", refused),
        (
            "kernel",
            format!(
                "{}, {}",
                status.kernel.release,
                features(status.kernel.features)
            ),
        ),
        ("sockets", sockets),
        (
            "pods",
            format!("{} known by network namespace", status.pods),
        ),
    ] {
        line(&mut page, &format!("{label:<9} {text}"));
    }
    section(&mut page, "settings", 1, &status.settings.table(), look);
    section(
        &mut page,
        "devices",
        status.devices.len(),
        &device_table(&status.devices),
        look,
    );
    section(
        &mut page,
        "maps",
        status.maps.len(),
        &map_table(&status.maps),
        look,
    );
    section(
        &mut page,
        &format!("counters  {}", counters::note(status.counters_over_seconds)),
        status.counters.len(),
        &counters::table(&status.counters),
        look,
    );
    if let Some(noted) = &status.noted {
        for (title, rows, table) in noted.tables() {
            section(&mut page, title, rows, &table, look);
        }
    }
    sentences(&mut page, "limits", &status.limits);
    let painted = |sentences: &[String]| -> Vec<String> {
        let sentences = sentences.iter();
        let painted = sentences.map(|text| look.paint(Some(Tone::Bad), text));
        painted.collect()
    };
    sentences(&mut page, "warnings", &painted(&status.warnings));
    sentences(&mut page, "problems", &painted(&status.problems));
    page
}

fn sentences(page: &mut String, title: &str, sentences: &[impl AsRef<str>]) {
    let empty = if sentences.is_empty() { "  none" } else { "" };
    line(page, &format!("\n{title}{empty}"));
    for sentence in sentences {
        line(page, &format!("  {}", sentence.as_ref()));
    }
}

fn features(features: Features) -> String {
    let word = |name: &str, found: Option<bool>| match found {
        Some(true) => format!("{name} yes"),
        Some(false) => format!("{name} no"),
        None => format!("{name} unknown"),
    };
    let Features {
        tcx,
        set_retval,
        xdp_frags,
        coarse_clock,
        sock_destroy,
        netns_cookie,
    } = features;
    [
        word("tcx", tcx),
        word("bpf_set_retval", set_retval),
        word("xdp.frags", xdp_frags),
        word("coarse clock", coarse_clock),
        word("SOCK_DESTROY", sock_destroy),
        word("netns cookies", netns_cookie),
    ]
    .join(", ")
}

fn line(page: &mut String, text: &str) {
    page.push_str(text);
    page.push('\n');
}

fn section(page: &mut String, title: &str, rows: usize, table: &Table, look: Look) {
    let empty = if rows == 0 { "  none" } else { "" };
    line(page, &format!("\n{title}{empty}"));
    if rows > 0 {
        page.push_str(&table.clone().indented(2).shown(look));
    }
}

pub(super) fn map_table(maps: &[MapRow]) -> Table {
    let mut table = Table::new(&["MAP", "ENTRIES", "MAX", "FULL"]);
    for map in maps {
        table.row([
            map.name.to_owned(),
            map.entries.to_string(),
            map.max_entries.to_string(),
            format!("{} {:>3}%", map.bar(), map.percent()),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use lb_common::node::Config;

    use super::*;

    pub(super) fn map(map: &'static str, entries: usize, max_entries: u32) -> MapRow {
        MapRow::from(Fill {
            map,
            entries,
            max_entries,
        })
    }

    pub(super) fn status() -> Status {
        Status {
            healthy: true,
            problems: Vec::new(),
            version: "1.2.3",
            layout: "v1".to_owned(),
            draining: Vec::new(),
            pins: "/sys/fs/bpf/klb/v1".to_owned(),
            agent: Agent {
                running: true,
                pid: Some("42".to_owned()),
            },
            noted: None,
            kernel: Kernel {
                release: "6.1.0".to_owned(),
                features: Features {
                    tcx: Some(false),
                    set_retval: Some(true),
                    xdp_frags: Some(true),
                    coarse_clock: Some(true),
                    sock_destroy: Some(true),
                    netns_cookie: Some(true),
                },
            },
            sockets: names::SOCKET_PROGRAMS
                .iter()
                .map(ToString::to_string)
                .collect(),
            pods: 0,
            settings: Settings::new(&Config::default(), Vec::new()),
            devices: Vec::new(),
            maps: vec![map(names::SERVICES4, 3, 100)],
            counters_over_seconds: None,
            counters: Vec::new(),
            lately: None,
            limits: Vec::new(),
            warnings: Vec::new(),
        }
    }

    #[test]
    fn limits_are_said_where_they_matter() {
        let mut status = status();
        assert_eq!(limits(&status, false), [""; 0]);
        assert!(limits(&status, true)[0].starts_with("SCTP"));
        status.kernel.features.set_retval = Some(false);
        assert!(limits(&status, false)[0].contains("5.18"));
        status.kernel.features.set_retval = Some(true);
        status.kernel.features.sock_destroy = Some(false);
        assert!(limits(&status, false)[0].contains("CONFIG_INET_DIAG_DESTROY"));
        status.kernel.features.sock_destroy = Some(true);
        status.kernel.features.netns_cookie = Some(false);
        assert!(limits(&status, false)[0].contains("5.14"));
        status.kernel.features.netns_cookie = Some(true);
        status.kernel.features.xdp_frags = Some(false);
        assert_eq!(limits(&status, false), [""; 0], "without XDP");
        status.devices.push(DeviceRow {
            name: Some("eth0".to_owned()),
            index: 2,
            role: None,
            tc_ingress: Some("tcx"),
            tc_egress: Some("tcx"),
            xdp: Some("generic"),
        });
        assert!(limits(&status, false)[0].contains("jumbo"));
        status.devices.clear();
        status.sockets.clear();
        status.settings.routing = "bypass";
        let [bypass, sockets] = limits(&status, false)[..] else {
            panic!("{:?}", limits(&status, false));
        };
        assert!(bypass.contains("netfilter") && sockets.contains("sockets"));
    }

    #[test]
    fn a_bar_shows_an_entry_and_a_free_place() {
        let bar = |entries| {
            let map = map(names::SERVICES4, entries, 1000);
            (map.bar(), map_table(&[map]).to_string())
        };
        assert_eq!(bar(0).0, "[          ]");
        assert_eq!(bar(1).0, "[#         ]");
        assert_eq!(bar(430).0, "[####      ]");
        assert_eq!(bar(999).0, "[######### ]");
        assert_eq!(bar(1000).0, "[##########]");
        assert!(bar(430).1.contains("[####      ]  43%"), "{}", bar(430).1);
    }

    #[test]
    fn a_healthy_node_says_so() {
        let page = page(&status(), Look::PLAIN);
        assert!(page.starts_with("health    healthy\n"), "{page}");
        assert!(page.contains("problems  none"), "{page}");
        assert!(page.contains("running, pid 42"), "{page}");
        assert!(page.contains("tcx no, bpf_set_retval yes"), "{page}");
        assert!(page.contains("warnings  none"), "{page}");
    }

    #[test]
    fn problems_come_first_and_last() {
        let status = Status {
            healthy: false,
            problems: vec!["no agent runs".to_owned(), "eth0 lacks".to_owned()],
            ..status()
        };
        let page = page(&status, Look::PLAIN);
        let first = "health    not healthy: no agent runs; eth0 lacks\n";
        assert!(page.starts_with(first), "{page}");
        let last = "\nproblems\n  no agent runs\n  eth0 lacks\n";
        assert!(page.ends_with(last), "{page}");
    }
}
