//! `docs/metrics.md` lists every metric. The lists are made from what is served;
//! `KLB_BLESS=1 cargo test -p lb-userspace --lib metrics::docs` writes them. That
//! nothing else is served is a test of the agent (`tests/tests/agent/metrics.rs`).

use std::{collections::BTreeMap, env, fmt::Write as _, fs};

use hyper::StatusCode;
use lb_common::{Hook, Reason};
use prometheus_client::registry::Registry;

use super::*;
use crate::{commands::effect_name, metrics::traffic::tests::Fixed as Traffic, model::Kind};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");

#[test]
fn the_page_lists_what_there_is() {
    let page = fs::read_to_string(PAGE).expect("the page");
    let metrics = Described::read(&everything());
    let list = |prefix: &str| table(metrics.iter().filter(|metric| metric.is_of(prefix)));
    let mut wanted = with_list(&page, "klb", &list("klb_"));
    wanted = with_list(&wanted, "kube-proxy", &list("kubeproxy_"));
    wanted = with_list(&wanted, "reasons", &reasons());
    if page != wanted && env::var_os("KLB_BLESS").is_some() {
        fs::write(PAGE, &wanted).expect("written");
        return;
    }
    assert_eq!(
        page, wanted,
        "metrics.md is out of date: set KLB_BLESS to have it written"
    );
}

/// A page with at least one sample of each metric.
fn everything() -> String {
    let mut registry = Registry::default();
    let parts = Parts::register(&mut registry);
    parts.control.sample();
    parts.api.failed(Kind::Service);
    parts.api.listed(Kind::Service);
    parts.api.follows(Kind::Service, 1);
    parts.probes.answered("/healthz", StatusCode::OK);
    parts.probes.answered("/livez", StatusCode::OK);
    let own = registry.sub_registry_with_prefix("klb");
    own.register_collector(Box::new(Kernel));
    own.register_collector(Box::new(Traffic(Detail::Backends)));
    Metrics::of(registry).encode().expect("encoded")
}

/// What collectors would read from the kernel.
#[derive(Debug)]
struct Kernel;

impl Collector for Kernel {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let fill = Fill {
            map: "klb_svc4",
            entries: 3,
            max_entries: 10,
        };
        let device = DeviceHooks {
            index: 1,
            name: None,
            role: None,
            xdp: Some("native"),
            tc_ingress: Some("tcx"),
            tc_egress: Some("tcx"),
        };
        let counter = Counter {
            hook: Hook::Xdp,
            reason: Reason::NewFlow,
            count: 7,
        };
        encode_fill(&mut encoder, &[fill])?;
        encode_sockets(&mut encoder, &["connect4".to_owned()])?;
        encode_devices(&mut encoder, &[device])?;
        encode_events(&mut encoder, 1)?;
        encode_outcomes(encoder, &[counter])
    }
}

/// A metric as its page tells of it.
#[derive(Debug, Default)]
struct Described {
    name: String,
    kind: String,
    help: String,
    labels: Vec<String>,
}

impl Described {
    /// By name.
    fn read(page: &str) -> Vec<Self> {
        let mut metrics = BTreeMap::<String, Self>::new();
        for line in page.lines() {
            let mut words = line.splitn(4, ' ');
            let words = [(); 4].map(|()| words.next().unwrap_or_default());
            match words {
                ["#", "HELP", name, help] => of(&mut metrics, name).help = help.to_owned(),
                ["#", "TYPE", name, kind] => of(&mut metrics, name).kind = kind.to_owned(),
                ["#", ..] => {}
                [sample, ..] => {
                    let (name, labels) = sample_of(sample, line);
                    if let Some(metric) = metrics.values_mut().find(|metric| metric.has(name)) {
                        metric.labels = labels;
                    }
                }
            }
        }
        metrics.into_values().collect()
    }

    fn is_of(&self, prefix: &str) -> bool {
        self.name.starts_with(prefix)
    }

    /// As queries name it.
    fn sample(&self) -> String {
        match self.kind.as_str() {
            "counter" => format!("{}_total", self.name),
            _ => self.name.clone(),
        }
    }

    fn has(&self, sample: &str) -> bool {
        self.sample() == sample
    }
}

fn of<'a>(metrics: &'a mut BTreeMap<String, Described>, name: &str) -> &'a mut Described {
    let metric = metrics.entry(name.to_owned()).or_default();
    name.clone_into(&mut metric.name);
    metric
}

/// The name of a sample, and those of its labels. No value of a label here has
/// a comma or a brace.
fn sample_of<'a>(first_word: &'a str, line: &str) -> (&'a str, Vec<String>) {
    let name = first_word
        .split_once('{')
        .map_or(first_word, |(name, _)| name);
    let labels = line
        .split_once('{')
        .and_then(|(_, rest)| rest.split_once('}'));
    let labels = labels.map_or("", |(labels, _)| labels);
    let names = labels.split(',').filter_map(|label| label.split_once('='));
    (name, names.map(|(name, _)| name.to_owned()).collect())
}

fn table<'a>(metrics: impl Iterator<Item = &'a Described>) -> String {
    let mut text = String::from("| name | type | labels | |\n|---|---|---|---|\n");
    for metric in metrics {
        let labels: Vec<_> = metric
            .labels
            .iter()
            .map(|label| format!("`{label}`"))
            .collect();
        let help = metric.help.trim_end_matches('.').replace('|', "\\|");
        writeln!(
            text,
            "| `{}` | {} | {} | {help} |",
            metric.sample(),
            metric.kind,
            labels.join(", ")
        )
        .expect("written");
    }
    text
}

fn reasons() -> String {
    let mut text = String::from("| `reason` | effect | |\n|---|---|---|\n");
    for reason in Reason::ALL {
        let effect = effect_name(reason.effect());
        let meaning = reason.description().trim().replace('|', "\\|");
        writeln!(text, "| `{}` | {effect} | {meaning} |", reason.name()).expect("written");
    }
    text
}

/// The page with another list between two marks.
fn with_list(page: &str, name: &str, list: &str) -> String {
    let (begin, end) = (
        format!("<!-- {name} -->\n"),
        format!("<!-- end of {name} -->"),
    );
    let (before, rest) = page.split_once(&begin).expect("a mark");
    let (_, after) = rest.split_once(&end).expect("its end");
    format!("{before}{begin}\n{list}\n{end}{after}")
}
