//! The kernel: its version, what it is built with, and its clock.

use std::{fs, path::Path};

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{is_map_supported, is_program_supported},
};

use super::check::{Check, Level};
use crate::datapath::features::Features;

/// The oldest kernel on which every program is tested.
const OLDEST: (u32, u32) = (5, 10);

/// Clocks that take microseconds to be read, and each packet reads one.
const SLOW_CLOCKS: [&str; 4] = ["hpet", "acpi_pm", "jiffies", "refined-jiffies"];

#[derive(Clone, Debug)]
pub(super) struct Facts {
    release: String,
    btf: bool,
    /// `net.core.bpf_jit_enable`, which only the first network namespace has.
    jit: Option<String>,
    /// `net.core.bpf_jit_harden`, likewise.
    jit_harden: Option<String>,
    /// `kernel.bpf_stats_enabled`
    stats: Option<String>,
    clock: Option<String>,
    config: Vec<Part>,
    features: Features,
}

/// What the kernel has to be built with, and whether it is, as far as that could
/// be tried.
#[derive(Clone, Debug)]
struct Part {
    options: &'static str,
    is_there: Option<bool>,
    /// What becomes of klb without.
    cost: &'static str,
    /// How bad that is.
    level: Level,
}

/// Found by trying: where there is a file with the options at all, it is not
/// in a pod.
fn config() -> Vec<Part> {
    let program = |kind| is_program_supported(kind).ok();
    let map = |kind| is_map_supported(kind).ok();
    let all_of = |parts: &[Option<bool>]| parts.iter().copied().collect::<Option<Vec<_>>>();
    vec![
        Part {
            options: "CONFIG_BPF_SYSCALL and CONFIG_NET",
            is_there: all_of(&[
                program(ProgramType::SchedClassifier),
                map(MapType::LruHash),
                map(MapType::LpmTrie),
            ])
            .map(|all| all.into_iter().all(|part| part)),
            cost: "no program of klb's can be loaded",
            level: Level::Fail,
        },
        Part {
            options: "CONFIG_CGROUP_BPF",
            is_there: program(ProgramType::CgroupSockAddr),
            cost: "sockets cannot be served: run the agent with --socket-lb off, and processes of \
                   the node itself do not reach Services by klb",
            level: Level::Fail,
        },
        Part {
            options: "CONFIG_NET (XDP)",
            is_there: program(ProgramType::Xdp),
            cost: "run the agent with --xdp off",
            level: Level::Warn,
        },
    ]
}

impl Facts {
    pub(super) fn gather() -> Self {
        let read = |path: &str| Some(fs::read_to_string(path).ok()?.trim().to_owned());
        Self {
            release: read("/proc/sys/kernel/osrelease").unwrap_or_default(),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            jit: read("/proc/sys/net/core/bpf_jit_enable"),
            jit_harden: read("/proc/sys/net/core/bpf_jit_harden"),
            stats: read("/proc/sys/kernel/bpf_stats_enabled"),
            config: config(),
            clock: read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            features: Features::probe(),
        }
    }

    pub(super) fn checks(&self) -> Vec<Check> {
        let jit = self.jit.as_deref().map(jit);
        let clock = self.clock.as_deref().map(clock);
        let slowing = self.slowing();
        [
            version(&self.release),
            built_with(&self.config),
            btf(self.btf),
        ]
        .into_iter()
        .chain(jit)
        .chain(slowing)
        .chain(features(self.features))
        .chain(clock)
        .collect()
    }
}

impl Facts {
    /// Settings that cost every run of a program some time.
    fn slowing(&self) -> Vec<Check> {
        let harden = self.jit_harden.as_deref() == Some("2");
        let harden = harden.then(|| {
            Check::warn(
                "BPF JIT",
                "hides the constants of all programs, those of root included, which makes them \
                 longer and slower",
                "sysctl -w net.core.bpf_jit_harden=1, which does so for those of others",
            )
        });
        let stats = self.stats.as_deref() == Some("1");
        let stats = stats.then(|| {
            Check::warn(
                "BPF statistics",
                "every run of a program is timed, which takes some twenty nanoseconds each",
                "sysctl -w kernel.bpf_stats_enabled=0, once nobody measures any more",
            )
        });
        harden.into_iter().chain(stats).collect()
    }
}

/// The worst of what is missing.
fn built_with(parts: &[Part]) -> Check {
    const NAME: &str = "kernel config";
    let missing = parts.iter().filter(|part| part.is_there == Some(false));
    if let Some(worst) = missing.max_by_key(|part| part.level) {
        return Check {
            level: worst.level,
            ..Check::fail(
                NAME,
                format!("without {}: {}", worst.options, worst.cost),
                "a kernel with these, which all large distributions have",
            )
        };
    }
    if parts.iter().any(|part| part.is_there.is_none()) {
        return Check::warn(
            NAME,
            "could not be tried without the right to load programs",
            "run klb doctor as root",
        );
    }
    Check::ok(NAME, "programs for TC, XDP and sockets can be loaded")
}

fn version(release: &str) -> Check {
    const NAME: &str = "kernel";
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    let mut next = || numbers.next()?.parse::<u32>().ok();
    match (next(), next()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST => Check::ok(NAME, release),
        (Some(_), Some(_)) => Check::fail(
            NAME,
            format!("{release} is older than {}.{}", OLDEST.0, OLDEST.1),
            "a newer kernel",
        ),
        _ => Check::warn(
            NAME,
            format!("{release:?} is no version that klb understands"),
            format!("see that it is {}.{} or newer", OLDEST.0, OLDEST.1),
        ),
    }
}

fn btf(is_there: bool) -> Check {
    const NAME: &str = "BTF";
    if is_there {
        return Check::ok(NAME, "/sys/kernel/btf/vmlinux is there");
    }
    Check::fail(
        NAME,
        "there is no /sys/kernel/btf/vmlinux",
        "a kernel with CONFIG_DEBUG_INFO_BTF=y, which all large distributions have; in a pod, \
         /sys of the host",
    )
}

fn jit(value: &str) -> Check {
    const NAME: &str = "BPF JIT";
    match value {
        "0" => Check::warn(
            NAME,
            "off: programs are interpreted, which takes several times as long",
            "sysctl -w net.core.bpf_jit_enable=1, and a file in /etc/sysctl.d",
        ),
        "2" => Check::warn(
            NAME,
            "on, with a dump of every program in the kernel's log",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        _ => Check::ok(NAME, "on"),
    }
}

/// One for each that is missing and missed.
fn features(features: Features) -> Vec<Check> {
    const NAME: &str = "kernel features";
    let Features {
        tcx,
        set_retval,
        xdp_frags,
        sock_destroy,
        netns_cookie,
        coarse_clock,
    } = features;
    let all = [
        (
            "tcx (6.6)",
            tcx,
            "TC programs are attached by clsact, without an order among those of others",
        ),
        (
            "bpf_set_retval (5.18)",
            set_retval,
            "a Service without endpoints is refused by ICMP, not at connect()",
        ),
        (
            "xdp.frags (5.18)",
            xdp_frags,
            "XDP is not native on devices with jumbo frames",
        ),
        (
            "SOCK_DESTROY",
            sock_destroy,
            "connected UDP sockets stay with a backend that has gone",
        ),
        (
            "netns cookies (5.14)",
            netns_cookie,
            "pods cannot opt out of socket load balancing, and NodePorts are not on loopback",
        ),
        (
            "high-resolution timers",
            coarse_clock,
            "each packet of a flow takes some twenty nanoseconds more",
        ),
    ];
    let missing = all.iter().filter(|(_, found, _)| *found == Some(false));
    let missing = missing.map(|(feature, _, cost)| {
        let fix = "a newer kernel, or one with the option set, if that matters here";
        Check::warn(NAME, format!("no {feature}: {cost}"), fix)
    });
    let mut checks: Vec<_> = missing.collect();
    let unknown = all.iter().filter(|(_, found, _)| found.is_none());
    let unknown: Vec<_> = unknown.map(|(feature, ..)| *feature).collect();
    if !unknown.is_empty() {
        let finding = format!("not known: {}", unknown.join(", "));
        checks.push(Check::warn(NAME, finding, "run klb doctor as root"));
    }
    if checks.is_empty() {
        let names = all.map(|(feature, ..)| feature);
        checks.push(Check::ok(NAME, names.join(", ")));
    }
    checks
}

fn clock(source: &str) -> Check {
    const NAME: &str = "clock";
    if SLOW_CLOCKS.contains(&source) {
        return Check::warn(
            NAME,
            format!("{source} takes microseconds to be read, and each packet reads it"),
            "see why the kernel gave up the CPU's own clock: dmesg | grep -i clocksource",
        );
    }
    Check::ok(NAME, source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::check::Level::{self, Fail, Ok, Warn};

    const ALL: Features = Features {
        tcx: Some(true),
        set_retval: Some(true),
        xdp_frags: Some(true),
        sock_destroy: Some(true),
        netns_cookie: Some(true),
        coarse_clock: Some(true),
    };

    fn part(is_there: Option<bool>, level: Level) -> Part {
        Part {
            options: "CONFIG_CGROUP_BPF",
            is_there,
            cost: "sockets cannot be served",
            level,
        }
    }

    fn facts() -> Facts {
        Facts {
            release: "6.12.0-amd64".to_owned(),
            btf: true,
            jit: Some("1".to_owned()),
            jit_harden: Some("1".to_owned()),
            stats: Some("0".to_owned()),
            config: vec![part(Some(true), Fail), part(Some(true), Warn)],
            clock: Some("tsc".to_owned()),
            features: ALL,
        }
    }

    /// The names of checks that are not ok.
    fn bad(facts: &Facts) -> Vec<(&'static str, Level)> {
        let checks = facts.checks().into_iter();
        checks
            .filter(|check| check.level != Ok)
            .map(|check| (check.name, check.level))
            .collect()
    }

    #[test]
    fn a_kernel_is_fit_or_it_is_said_why_not() {
        assert_eq!(bad(&facts()), []);
        assert_eq!(facts().checks().len(), 6);
        let unknown = Facts {
            jit: None,
            clock: None,
            ..facts()
        };
        assert_eq!(
            bad(&unknown),
            [],
            "a namespace that does not tell is no fault"
        );
        let with_features = |features| Facts {
            features,
            ..facts()
        };
        for (facts, expected) in [
            (
                Facts {
                    btf: false,
                    ..facts()
                },
                ("BTF", Fail),
            ),
            (
                Facts {
                    jit: Some("0".to_owned()),
                    ..facts()
                },
                ("BPF JIT", Warn),
            ),
            (
                Facts {
                    clock: Some("hpet".to_owned()),
                    ..facts()
                },
                ("clock", Warn),
            ),
            (
                Facts {
                    jit_harden: Some("2".to_owned()),
                    ..facts()
                },
                ("BPF JIT", Warn),
            ),
            (
                Facts {
                    stats: Some("1".to_owned()),
                    ..facts()
                },
                ("BPF statistics", Warn),
            ),
            (
                Facts {
                    config: vec![part(Some(false), Warn), part(Some(false), Fail)],
                    ..facts()
                },
                ("kernel config", Fail),
            ),
            (
                Facts {
                    config: vec![part(None, Fail)],
                    ..facts()
                },
                ("kernel config", Warn),
            ),
            (
                with_features(Features {
                    tcx: Some(false),
                    ..ALL
                }),
                ("kernel features", Warn),
            ),
            (
                with_features(Features { tcx: None, ..ALL }),
                ("kernel features", Warn),
            ),
        ] {
            assert_eq!(bad(&facts), [expected], "{facts:?}");
        }
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        for (release, level) in [
            ("5.9.16", Fail),
            ("4.19.0-27-amd64", Fail),
            ("5.10.0-32-amd64", Ok),
            ("5.100.0", Ok),
            ("6.1.0", Ok),
            ("10.0-rc1", Ok),
            ("", Warn),
            ("gnu", Warn),
        ] {
            assert_eq!(version(release).level, level, "{release}");
        }
    }
}
