//! The agent, in reading order: what is started, who owns what, how it ends.
//!
//! Two tasks do the work. One owns the programs and keeps them on the node's
//! devices (`edge`), the other owns the desired state and the maps
//! (`control`). A small one knows which pods there are (`namespaces`).
//! Everything else watches them.

mod backoff;
mod control;
mod edge;
mod failures;
mod heap;
mod layouts;
mod namespaces;
mod orphans;
mod refusals;
mod settings;

use std::{io, path::PathBuf, sync::Arc};

use anyhow::{Context as _, bail};
use lb_common::names;
use sd_notify::NotifyState;
use tokio::{
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};
use tracing::{info, warn};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use self::control::{Control, Pace};
use crate::{
    args::{AgentArgs, HookArgs, LogFormat, SocketLb, Switch, TcChoice, XdpChoice},
    dashboard::{Dashboard, Subject},
    datapath::{
        attach::{self, Hooks, TcMode},
        cgroup,
        features::Features,
        kernel::{Counters, DeviceTable, KernelMaps, NetnsTable},
        load::{
            LoadError, load_maps, load_programs, load_xdp, prepare_pins, raise_memlock_limit,
            require_object,
        },
        pins::{Lock, Pins},
    },
    devices::{Rules, Watcher},
    health::{self, Listen, NodeObject, View},
    index::Index,
    k8s::{
        api::Connection,
        events::{Events, Reason},
        manifests::ManifestSource,
        source::{ApiSource, Ears, Source},
    },
    metrics::{ApiMetrics, Metrics, ServiceTraffic},
    netns::Namespaces,
    privileges,
    record::Recorder,
    sysctl::{self, Reservation},
};

/// Runs until a signal ends it. The datapath goes on without it.
///
/// # Errors
///
/// Whatever keeps the agent from its work and will not pass by itself. What may
/// pass is logged and tried again.
pub fn run(args: &AgentArgs) -> anyhow::Result<()> {
    heap::be_frugal();
    start_log(args.log_format);
    for note in &args.notes {
        warn!("{note}");
    }
    give_up_privileges()?;
    // Two: a write of ten thousand Services must not hold up a probe.
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let result = runtime.block_on(serve(args));
    // What may still run is of no use any more, a reader of manifests say.
    runtime.shutdown_background();
    result
}

/// Before there is a second thread; see [`privileges`].
fn give_up_privileges() -> anyhow::Result<()> {
    // Takes a capability that is of no use afterwards.
    raise_memlock_limit();
    for (capability, consequence) in privileges::reduce()? {
        warn!(%capability, consequence, "missing");
    }
    Ok(())
}

async fn serve(args: &AgentArgs) -> anyhow::Result<()> {
    let signals = Signals::listen()?;
    let _lock = Lock::take(&args.paths.state_dir)?;
    let pins = args.paths.pins();
    let _pins_lock = prepare_pins(&pins)?;
    let recorder = begin_record(args);
    reserve_ports(args);
    let (hooks, maps) = start_datapath(args, &pins)?;
    tokio::spawn(refusals::follow(Counters::open(&pins)?, recorder.clone()));
    let traffic = Arc::new(ServiceTraffic::open(&pins)?);
    let (mut metrics, parts) = Metrics::new(&pins, Arc::clone(&traffic), args.traffic_metrics)?;
    let (source, events) = open_source(args, parts.api, recorder.clone()).await?;
    metrics.tell_of(events.clone());
    events.tell_node(Reason::Starting, "");
    let watcher = Watcher::open(Rules::new(&args.devices)).context("reading the node's devices")?;

    let (addresses, node_addresses) = watch::channel(watcher.edge().addresses);
    let (attached, hooks_ready) = watch::channel(false);
    let (complete, all_hooks_ready) = watch::channel(false);
    let (in_charge, is_in_charge) = watch::channel(false);
    let (synced, maps_ready) = watch::channel(false);
    let (opted_out, who_opted_out) = watch::channel(None);
    let (known, pods_ready) = watch::channel(false);
    let (set_ready, ready) = watch::channel(false);

    let in_place = [hooks_ready, maps_ready.clone()];
    let others = hooks.others().to_vec();
    let others = layouts::follow(others, in_place, in_charge, args.layout_drain);
    tokio::spawn(others);
    let edge = edge::follow(
        hooks,
        DeviceTable::open(&pins)?,
        watcher,
        is_in_charge,
        edge::Reports {
            repairs: parts.control.repairs(),
            addresses,
            attached,
            complete,
        },
        args.verify_interval,
    );
    let pods = Namespaces::open(&args.hooks.netns_dir).context("the own network namespace")?;
    let (pods, news) = (Arc::new(pods), orphans::News::new(args.hooks.socket_lb));
    let table = NetnsTable::open(&pins)?;
    let repairs = parts.control.repairs();
    let namespaces = namespaces::follow(Arc::clone(&pods), table, who_opted_out, known, repairs);
    let orphans = orphans::follow(KernelMaps::open(&pins)?, pods, Arc::clone(&news));
    let reporter = health::Reporter::new(match args.manifests {
        Some(_) => NodeObject::Optional,
        None => NodeObject::Required,
    });
    let view = reporter.view();
    let listen = if args.devices.nodeport_addresses.is_empty() {
        Listen::everywhere()
    } else {
        Listen::At(node_addresses.clone())
    };
    let links = control::Links {
        addresses: node_addresses,
        opted_out,
        orphans: news,
        synced,
        health: reporter,
        events: events.clone(),
        recorder: recorder.clone(),
        metrics: parts.control,
    };
    let pace = Pace {
        batch_delay: args.batch_delay,
        verify_interval: args.verify_interval,
    };
    let index = Index::new(&args.node_name, args.settings());
    let control = Control::new(index, maps, links, pace)?.run(source);
    let dashboard = dashboard(args, &ready, &view, traffic)?;
    let probes = health::serve_probes(
        args.healthz_bind,
        ready,
        view.clone(),
        events.clone(),
        parts.probes,
    );
    tokio::spawn(probes);
    tokio::spawn(health::serve_checks(view, listen, events.clone()));
    let address = args.metrics_bind;
    tokio::spawn(health::serve_metrics(address, metrics, dashboard, events));
    tokio::spawn(announce(
        [all_hooks_ready, maps_ready, pods_ready],
        set_ready,
        recorder.clone(),
    ));

    tokio::select! {
        signal = signals.next() => info!(signal, "stopping; the datapath stays as it is"),
        ended = tokio::spawn(edge) => ended??,
        ended = tokio::spawn(control) => ended??,
        ended = tokio::spawn(namespaces) => ended??,
        ended = tokio::spawn(orphans) => ended?,
    }
    notify(NotifyState::Stopping);
    recorder.write_now();
    Ok(())
}

/// The page beside the metrics, unless it is off.
fn dashboard(
    args: &AgentArgs,
    ready: &watch::Receiver<bool>,
    view: &View,
    traffic: Arc<ServiceTraffic>,
) -> Result<Option<Dashboard>, LoadError> {
    if args.dashboard == Switch::Off {
        return Ok(None);
    }
    let subject = Subject {
        node_name: &args.node_name,
        paths: &args.paths,
        bound: args.metrics_bind,
        ready: ready.clone(),
        view: view.clone(),
    };
    Dashboard::new(subject, traffic).map(Some)
}

/// Where Services come from, a folder or the API server; and who is told what an
/// operator should know.
async fn open_source(
    args: &AgentArgs,
    metrics: ApiMetrics,
    recorder: Recorder,
) -> anyhow::Result<(Source, Events)> {
    if let Some(folder) = &args.manifests {
        let source = ManifestSource::open(folder);
        let source = source.with_context(|| format!("--manifests {}", folder.display()))?;
        let events = Events::nowhere(&args.node_name);
        let source = Box::new(source.noted_by(recorder));
        return Ok((Source::Manifests(source), events));
    }
    let connection = Connection::new(args.kubeconfig.as_deref());
    let client = connection.client().await;
    let client = client.with_context(|| match &args.kubeconfig {
        Some(file) => format!("--kubeconfig {}", file.display()),
        None => "without --kubeconfig and --manifests the agent has to run in a pod".to_owned(),
    })?;
    // Who opted out matters to the hooks of pods' sockets only.
    let with_pods = args.hooks.socket_lb == SocketLb::All;
    let (events, post) = Events::new(connection.clone(), &args.node_name);
    tokio::spawn(post);
    let source = ApiSource::start(
        connection,
        Ears {
            events: events.clone(),
            metrics,
            recorder,
        },
        &client,
        &args.node_name,
        with_pods,
    );
    Ok((Source::Api(Box::new(source)), events))
}

/// What commands are to know of this agent.
fn begin_record(args: &AgentArgs) -> Recorder {
    let serves_sockets = args.hooks.socket_lb != SocketLb::Off;
    let recorder = Recorder::new(&args.paths.state_dir, serves_sockets);
    tokio::spawn(recorder.clone().keep());
    recorder
}

/// Keeps the masquerade ports from the node's processes, which goes before the
/// first use of one.
fn reserve_ports(args: &AgentArgs) {
    let ports = args.masquerade_ports.ports();
    if let Err(error) = Reservation::new(&args.paths.state_dir).make(ports.clone()) {
        warn!(%error, "the masquerade ports are not reserved");
    }
    for complaint in sysctl::complaints(&ports) {
        warn!("{complaint}");
    }
}

/// Opens the maps, loads the programs, and attaches those that are not bound to
/// a device.
fn start_datapath(args: &AgentArgs, pins: &Pins) -> anyhow::Result<(Hooks, KernelMaps)> {
    require_object()?;
    let HookArgs { xdp, tc, .. } = args.hooks;
    let features = Features::probe();
    info!(?features, "kernel");
    let tc = tc_mode(tc, features)?;
    let cgroup = cgroup_path(&args.hooks)?;
    let mut ebpf = load_maps(pins, &args.sizes, features)?;
    // Before the programs: the verifier has no kind words for maps of another
    // shape.
    let mut maps = KernelMaps::open(pins).context(
        "the maps that are pinned are not this klb's; `klb cleanup` makes way for new ones",
    )?;
    maps.learn_served(pins)?;
    let config = settings::config(args, maps.config()?)?;
    maps.set_config(&config)?;
    let mut programs = vec![names::TC_INGRESS, names::TC_EGRESS];
    if cgroup.is_some() {
        programs.extend(names::SOCKET_PROGRAMS);
    }
    load_programs(&mut ebpf, &programs)?;
    if xdp != XdpChoice::Off {
        load_xdp(&mut ebpf, xdp != XdpChoice::Generic)?;
    }
    let mut hooks = Hooks::new(ebpf, pins.clone(), tc, xdp)?;
    match cgroup {
        Some(path) => hooks.attach_sockets(&path)?,
        None => attach::detach_sockets(pins).context("detaching from sockets")?,
    }
    Ok((hooks, maps))
}

/// # Errors
///
/// If tcx is demanded of a kernel that has none.
fn tc_mode(choice: TcChoice, features: Features) -> anyhow::Result<TcMode> {
    match (choice, features.tcx) {
        (TcChoice::Clsact, _) | (TcChoice::Auto, None | Some(false)) => Ok(TcMode::Clsact),
        (TcChoice::Auto | TcChoice::Tcx, Some(true)) => Ok(TcMode::Tcx),
        (TcChoice::Tcx, _) => bail!("--tc tcx: this kernel has no tcx (it came with 6.6)"),
    }
}

/// Where sockets are translated; `None` if they are not.
fn cgroup_path(hooks: &HookArgs) -> io::Result<Option<PathBuf>> {
    match (hooks.socket_lb, &hooks.cgroup) {
        (SocketLb::Off, _) => Ok(None),
        (_, Some(path)) => Ok(Some(path.clone())),
        (_, None) => {
            let root = cgroup::find_root()?;
            if !cgroup::is_hosts_root(&root) {
                warn!(
                    path = %root.display(),
                    "this is a container's root of control groups: \
                     sockets outside are not translated; see --cgroup"
                );
            }
            Ok(Some(root))
        }
    }
}

/// Says that the agent is ready, once: when every hook is attached, the first
/// full state is in the maps and the pods are known.
async fn announce(
    parts: [watch::Receiver<bool>; 3],
    ready: watch::Sender<bool>,
    recorder: Recorder,
) {
    for mut part in parts {
        // A sender that has gone takes the agent with it.
        if part.wait_for(|done| *done).await.is_err() {
            return;
        }
    }
    recorder.ready();
    // Before it is said: whoever reads that may ask.
    ready.send_replace(true);
    info!("ready");
    notify(NotifyState::Ready);
}

/// Tells the service manager, where there is one.
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        warn!(%error, "the service manager was not told");
    }
}

/// The signals that end the agent. Listening begins before anything is started,
/// so that none is met by the default action half-way.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// The name of the signal that came.
    async fn next(mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .from_env_lossy();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(false).with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(tcx: Option<bool>) -> Features {
        Features {
            tcx,
            set_retval: None,
            xdp_frags: None,
            coarse_clock: None,
            sock_destroy: None,
            netns_cookie: None,
        }
    }

    #[test]
    fn tcx_is_used_where_it_is_and_never_pretended() {
        use TcChoice::{Auto, Clsact, Tcx};
        for (choice, tcx, mode) in [
            (Auto, Some(true), Some(TcMode::Tcx)),
            (Auto, Some(false), Some(TcMode::Clsact)),
            (Auto, None, Some(TcMode::Clsact)),
            (Clsact, Some(true), Some(TcMode::Clsact)),
            (Tcx, Some(true), Some(TcMode::Tcx)),
            (Tcx, Some(false), None),
        ] {
            assert_eq!(
                tc_mode(choice, features(tcx)).ok(),
                mode,
                "{choice:?} {tcx:?}"
            );
        }
    }

    #[tokio::test]
    async fn readiness_waits_for_every_part() {
        let (hooks, hooks_ready) = watch::channel(false);
        let (maps, maps_ready) = watch::channel(false);
        let (set_ready, ready) = watch::channel(false);
        let (pods, pods_ready) = watch::channel(true);
        let parts = [hooks_ready, maps_ready, pods_ready];
        let announced = tokio::spawn(announce(parts, set_ready, Recorder::default()));
        maps.send_replace(true);
        tokio::task::yield_now().await;
        assert!(!*ready.borrow(), "the hooks are missing");
        hooks.send_replace(true);
        announced.await.expect("announced");
        assert!(*ready.borrow() && *pods.borrow());
    }
}
