//! `klb diff`: what the maps should hold against what they hold.
//!
//! What they should hold is found as the agent finds it, from the same source by
//! the same functions, in this process: whether or not an agent runs, and
//! whatever it believes to have written.

mod compare;

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde::Serialize;
use tokio::{runtime, time::timeout};
use tracing::level_filters::LevelFilter;

use self::compare::{Change, Content, Difference, State};
use super::{
    look::{Look, Tone},
    open_maps, open_pins, print,
    table::Table,
};
use crate::{
    args::DiffArgs,
    datapath::kernel::KernelMaps,
    devices::{Listing, Rules},
    index::Index,
    k8s::{
        api::Connection,
        events::Events,
        manifests::ManifestSource,
        source::{ApiSource, Ears, Source},
    },
    metrics::ApiMetrics,
    model::{Concern, Event, NamespacedName, Scope},
    netlink::Netlink,
    plan::ServicePlan,
    record::Recorder,
};

/// Runs `klb diff`. The exit status tells whether there is a difference.
pub fn run(args: &DiffArgs) -> anyhow::Result<ExitCode> {
    // Says what in a manifest makes no sense, and why a server cannot be heard.
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::WARN)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .init();
    let maps = open_maps(&open_pins(&args.paths)?)?;
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let report = runtime.block_on(report(args, &maps));
    runtime.shutdown_background();
    let report = report?;
    print(args.output, &report, table)?;
    Ok(if report.differences.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// `klb diff -o json`, on which other programs rely.
#[derive(Debug, Serialize)]
struct Report {
    /// Services that the source describes, or did until they changed.
    services: usize,
    /// Those that were not compared: what describes them cannot be understood,
    /// so they stay as they are.
    held: Vec<String>,
    differences: Vec<Difference>,
}

/// Compares until all is equal or the time for it is over: an agent that is
/// about to write a change is no fault of anything.
async fn report(args: &DiffArgs, maps: &KernelMaps) -> anyhow::Result<Report> {
    /// Between two looks, if nothing is heard.
    const PAUSE: Duration = Duration::from_millis(100);
    let (mut source, mut desired) = (open_source(args).await?, Desired::new(args)?);
    let limit = Duration::from_secs(args.timeout.into());
    timeout(limit, desired.read_everything(&mut source))
        .await
        .with_context(|| format!("not all was told of Services within {limit:?}"))?;
    let deadline = Instant::now() + Duration::from_secs(args.wait.into());
    loop {
        let content = Content::read(maps)?;
        desired.plan(&content)?;
        let report = desired.against(&content);
        if report.differences.is_empty() || Instant::now() >= deadline {
            return Ok(report);
        }
        if let Ok(events) = timeout(PAUSE, source.next()).await {
            desired.take_in(events);
        }
    }
}

async fn open_source(args: &DiffArgs) -> anyhow::Result<Source> {
    if let Some(folder) = &args.manifests {
        let source = ManifestSource::open(folder);
        let source = source.with_context(|| format!("--manifests {}", folder.display()))?;
        return Ok(Source::Manifests(Box::new(source)));
    }
    let connection = Connection::new(args.kubeconfig.as_deref());
    let client = connection.client().await;
    let client = client.with_context(|| match &args.kubeconfig {
        Some(file) => format!("--kubeconfig {}", file.display()),
        None => "this is no pod of a cluster: give --manifests or --kubeconfig".to_owned(),
    })?;
    let ears = Ears {
        events: Events::nowhere(&args.node_name),
        metrics: ApiMetrics::default(),
        recorder: Recorder::default(),
    };
    let source = ApiSource::start(connection, ears, &client, &args.node_name, false);
    Ok(Source::Api(Box::new(source)))
}

/// What the maps should hold.
struct Desired {
    rules: Rules,
    index: Index,
    plans: BTreeMap<NamespacedName, ServicePlan>,
    /// Whom it concerns that something cannot be understood.
    unknown: BTreeSet<Concern>,
}

impl Desired {
    fn new(args: &DiffArgs) -> anyhow::Result<Self> {
        let mut this = Self {
            rules: Rules::new(&args.devices()),
            index: Index::new(&args.node_name, args.settings()),
            plans: BTreeMap::new(),
            unknown: BTreeSet::new(),
        };
        this.read_addresses()?;
        Ok(this)
    }

    /// The node's addresses, at which `NodePort`s answer.
    fn read_addresses(&mut self) -> anyhow::Result<()> {
        let listing = Netlink::open().and_then(|netlink| Listing::read(&netlink));
        let listing = listing.context("reading the node's addresses")?;
        let addresses = self.rules.node_addresses(&listing);
        self.index.set_node_addresses(addresses);
        Ok(())
    }

    async fn read_everything(&mut self, source: &mut Source) {
        while !self.take_in(source.next().await) {}
    }

    /// Returns whether all has been told now.
    fn take_in(&mut self, events: Vec<Event>) -> bool {
        let mut is_complete = false;
        for event in events {
            match event {
                Event::Apply(object) => self.index.apply(object),
                Event::Delete(object) => self.index.delete(&object),
                Event::Unknown(unknown) => self.unknown = unknown,
                Event::Synced(scope) => is_complete |= scope == Scope::Services,
            }
        }
        is_complete
    }

    /// Plans anew what has changed.
    fn plan(&mut self, found: &Content) -> anyhow::Result<()> {
        self.read_addresses()?;
        let services = found.services();
        let held = services.into_iter().filter(|(id, _)| self.must_stay(id));
        let held = held.collect();
        for service in self.index.hold(held) {
            self.plans.remove(&service);
        }
        for (plan, _) in self.index.take_changes() {
            self.plans.insert(plan.service.clone(), plan);
        }
        Ok(())
    }

    /// Whether the agent leaves a Service as it is; see `Control::must_stay`.
    fn must_stay(&self, service: &NamespacedName) -> bool {
        self.unknown.contains(&Concern::Service(service.clone()))
            || self.unknown.contains(&Concern::Anyone) && !self.index.knows_all_of(service)
    }

    fn against(&self, found: &Content) -> Report {
        let held: BTreeSet<_> = self.index.held().cloned().collect();
        let plans = self.plans.values();
        Report {
            services: plans.clone().filter(|plan| !plan.ports.is_empty()).count(),
            differences: compare::differences(plans, found, &held),
            held: held.iter().map(ToString::to_string).collect(),
        }
    }
}

/// Nothing at all if there is no difference.
fn table(report: &Report, look: Look) -> String {
    if report.differences.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["NAMESPACE", "SERVICE", "FRONTEND", "STATE", "DIFFERENCE"]);
    for difference in &report.differences {
        let changes: Vec<_> = difference.changes.iter().map(change).collect();
        table.row([
            difference.service.namespace.clone(),
            difference.service.service(),
            difference.frontend.clone().unwrap_or_default(),
            difference.state.name().to_owned(),
            match difference.state {
                State::Missing | State::Differs => changes.join("; "),
                // What it was is of no use to anybody.
                State::More => String::new(),
            },
        ]);
    }
    let table = table.judged(&["STATE"], |_| Some(Tone::Bad));
    table.shown(look)
}

/// `backends: -10.244.0.5:3000 +10.244.0.9:3000`, as in a patch that would make
/// the maps what they should be: minus is there and should not be.
fn change(change: &Change) -> String {
    let more = change.more.iter().map(|value| format!(" -{value}"));
    let missing = change.missing.iter().map(|value| format!(" +{value}"));
    let values: String = more.chain(missing).collect();
    format!("{}:{values}", change.field)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::PortId;

    fn difference(state: State, frontend: Option<&str>) -> Difference {
        Difference {
            service: PortId {
                namespace: "default".to_owned(),
                name: "web".to_owned(),
                port_name: "http".to_owned(),
            },
            frontend: frontend.map(str::to_owned),
            state,
            changes: vec![Change {
                field: "backends",
                missing: vec!["10.244.0.9:3000".to_owned()],
                more: vec!["10.244.0.5:3000".to_owned()],
            }],
        }
    }

    #[test]
    fn nothing_is_printed_where_nothing_differs() {
        let mut report = Report {
            services: 1,
            held: Vec::new(),
            differences: Vec::new(),
        };
        assert_eq!(table(&report, Look::PLAIN), "");
        report.differences = vec![
            difference(State::Differs, Some("10.96.0.1:80/TCP")),
            difference(State::More, None),
        ];
        assert_eq!(
            table(&report, Look::PLAIN),
            "NAMESPACE   SERVICE    FRONTEND           STATE     DIFFERENCE\n\
             default     web:http   10.96.0.1:80/TCP   differs   \
             backends: -10.244.0.5:3000 +10.244.0.9:3000\n\
             default     web:http   -                  more      -\n"
        );
        let json = serde_json::to_value(&report).expect("JSON");
        let first = &json["differences"][0];
        for (field, value) in [
            ("namespace", "default"),
            ("name", "web"),
            ("port_name", "http"),
            ("frontend", "10.96.0.1:80/TCP"),
            ("state", "differs"),
        ] {
            assert_eq!(first[field], value, "{field}");
        }
        assert_eq!(first["changes"][0]["missing"][0], "10.244.0.9:3000");
    }
}
