//! Figures 11 and 12: the control plane, from the API to the kernel.
//!
//! klb's own work is what its process takes of a CPU, from the bytes of an event
//! to its line in the log: the scheduler counts it in nanoseconds, whoever else
//! is running. Of a rule set it is the time that its tool takes.

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use lb_tests::{
    agent::{Agent, Hooks},
    apiserver::ApiServer,
    netns::Netns,
    scope::Scope,
    sweep,
    topology::{Cluster, Options as ClusterOptions},
    wait,
};

use nix::{
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};

use super::{
    NAME, Name, Options, progress,
    report::{Figure, Row, Target},
    rules,
    services::{self, Service, Services},
    stats::quantile,
};
use crate::{paths, traffic};

const SMALL: u32 = 1_000;
const LARGE: u32 = 50_000;
/// The most that rule sets are tried with, of either kind.
const MOST_FOR_RULES: u32 = 10_000;
/// The default of `--map-services` has room for three times as many.
const MOST_FOR_DEFAULTS: u32 = 10_000;
const ROUNDS: usize = 9;
/// Of starts, which take seconds each.
const STARTS: usize = 3;
/// Changes of klb's in a round, one after the other: 1,800 in all. What else
/// the machine does is seen in the tail of some rounds, and seldom of most.
const CHANGES: u32 = 200;
/// Services that are rolled, each with all its endpoints replaced.
const ROLLED: u32 = 1_000;
/// Between two rolls, and how many there are.
const ROLL: Duration = Duration::from_secs(2);
const ROLLS: u32 = 5;
const QUICK_ROLLS: u32 = 2;
const IDLE: Duration = Duration::from_secs(60);
/// What the last change brings with it is over then: backends are looked for
/// once more after a second, and threads that had work wait for ten for more.
const SETTLED: Duration = Duration::from_secs(12);
/// For whatever is waited for.
const PATIENCE: Duration = Duration::from_secs(120);

/// Measures the figures that are wanted.
pub(super) fn measure(options: &Options, done: &mut dyn FnMut(Figure)) {
    let mut sizes = vec![SMALL, options.services];
    if !options.quick {
        sizes.push(LARGE);
    }
    sizes.sort_unstable();
    sizes.dedup();
    let mut kept = Kept::default();
    if options.wants(Name::ColdStart) {
        let figures = cold_start(options, &sizes, &mut kept);
        figures.into_iter().for_each(&mut *done);
    }
    if options.wants(Name::Change) {
        changes(options, &sizes, kept).into_iter().for_each(done);
    }
}

/// What a start has left that changes are measured with, too: to load the rules
/// again would take as long again.
#[derive(Default)]
struct Kept {
    agents: Vec<Klb>,
    sets: Vec<Rules>,
}

impl Kept {
    /// An agent that has started.
    fn agent(&mut self, count: u32) -> Klb {
        let place = self
            .agents
            .iter()
            .position(|klb| klb.services.count == count);
        place.map_or_else(
            || {
                let mut klb = Klb::new(count);
                klb.start();
                klb
            },
            |place| self.agents.swap_remove(place),
        )
    }

    /// Rules that are loaded.
    fn rules(&mut self, kind: Kind, count: u32) -> Rules {
        let is_same = |rules: &Rules| rules.kind == kind && rules.services.count == count;
        let place = self.sets.iter().position(is_same);
        place.map_or_else(
            || {
                progress(format_args!("{}, {count} Services", kind.name()));
                let rules = Rules::new(kind, count);
                rules.load();
                rules
            },
            |place| self.sets.swap_remove(place),
        )
    }
}

/// An API server with Services, and an agent that hears of them.
struct Klb {
    services: Services,
    // Before the cluster: it cleans up in the node's namespace.
    agent: Agent,
    server: ApiServer,
    cluster: Cluster,
    /// How far its log was read.
    read: u64,
}

impl Klb {
    fn new(count: u32) -> Self {
        progress(format_args!("klb, {count} Services"));
        let scope = format!("{NAME}-control-{count}");
        sweep::remove(&scope);
        let options = ClusterOptions {
            helper: traffic::helper(),
            offloads: true,
        };
        let cluster = Cluster::new(Scope::named(&scope, false), options);
        let services = Services { count };
        let server = cluster.node.place.netns().within(|| services.served());
        let agent = Self::agent(&cluster, &server, services);
        Self {
            services,
            agent,
            server,
            cluster,
            read: 0,
        }
    }

    fn agent(cluster: &Cluster, server: &ApiServer, services: Services) -> Agent {
        let mut agent = Agent::new(cluster, Hooks::SOCKET);
        agent.program = paths::klb();
        agent.kubeconfig = Some(server.kubeconfig(&cluster.scope().folder()));
        if services.count > MOST_FOR_DEFAULTS {
            agent.flags = vec!["--map-services=262144".to_owned()];
        }
        agent
    }

    /// Starts with nothing in the maps.
    fn start(&mut self) -> Start {
        self.agent = Self::agent(&self.cluster, &self.server, self.services);
        self.agent.start();
        let own = cpu(&mut self.agent);
        let text = self.agent.log().text();
        // What it wrote is no change.
        self.read = text.rfind('\n').map_or(0, |end| end as u64 + 1);
        let line = reconciled(&text).next().expect("it has written");
        let wrote = duration(field(line, "wrote="));
        let kinds = ["Service", "EndpointSlice", "Node"].map(|kind| format!("kind={kind} "));
        let listed = text.lines().filter(|line| line.contains(" listed "));
        let listed = listed.filter(|line| kinds.iter().any(|kind| line.contains(kind)));
        let listed = listed.map(time_of_day).fold(0.0, f64::max);
        Start {
            wrote,
            after_list: Duration::from_secs_f64((time_of_day(line) - listed).max(0.0)),
            own,
            peak: memory(&mut self.agent, "VmHWM"),
        }
    }

    /// The lines about writes since this was last asked for, as soon as there
    /// are any.
    fn await_written(&mut self) -> Vec<String> {
        let (agent, read) = (&mut self.agent, &mut self.read);
        wait::until("a change to be written", PATIENCE, || {
            let text = agent.log().text_from(*read);
            let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
            let lines: Vec<_> = reconciled(whole).map(str::to_owned).collect();
            (!lines.is_empty()).then(|| {
                *read += whole.len() as u64;
                lines
            })
        })
    }

    /// Has this Service get the endpoints of another round; returns what that
    /// took of a CPU, in milliseconds.
    fn change(&mut self, number: u32, round: u32) -> f64 {
        let before = cpu(&mut self.agent);
        self.server.put(services::other(number, round).slice());
        self.await_written();
        let after = cpu(&mut self.agent);
        milliseconds(after.saturating_sub(before))
    }
}

/// What a start took.
struct Start {
    /// Writing the maps, in CPU time.
    wrote: Duration,
    /// From the end of the last list until everything was written.
    after_list: Duration,
    /// All of the agent's CPU time until it was ready.
    own: Duration,
    /// MiB.
    peak: f64,
}

/// A network namespace for a rule set.
struct Rules {
    services: Services,
    kind: Kind,
    folder: PathBuf,
    netns: Netns,
    _scope: Scope,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Iptables,
    Legacy,
    Nftables,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Legacy => "iptables-legacy",
            Self::Nftables => "nftables",
        }
    }
}

impl Rules {
    fn new(kind: Kind, count: u32) -> Self {
        let scope = format!("{NAME}-{}-{count}", kind.name());
        sweep::remove(&scope);
        let scope = Scope::named(&scope, false);
        Self {
            services: Services { count },
            kind,
            folder: scope.folder(),
            netns: Netns::new(format!("{}-node", scope.name())),
            _scope: scope,
        }
    }

    /// Loads all rules; returns how long that took, in milliseconds.
    fn load(&self) -> f64 {
        let texts = match self.kind {
            Kind::Iptables | Kind::Legacy => vec![rules::iptables(self.services)],
            Kind::Nftables => rules::nftables(self.services),
        };
        texts.iter().map(|text| self.run(text, false)).sum()
    }

    /// Changes the endpoints of a Service; returns how long that took, in
    /// milliseconds.
    fn change(&self, before: &Service, after: &Service) -> f64 {
        let text = match self.kind {
            Kind::Iptables | Kind::Legacy => rules::iptables_change(self.services, before, after),
            Kind::Nftables => rules::nftables_change(before, after),
        };
        self.run(&text, true)
    }

    fn run(&self, text: &str, keep: bool) -> f64 {
        let path = self.folder.join("rules");
        fs::write(&path, text).expect("a folder of our own");
        let file = path.display().to_string();
        let (program, first) = match self.kind {
            Kind::Iptables => ("iptables-nft-restore", "--noflush"),
            Kind::Legacy => ("iptables-legacy-restore", "--noflush"),
            Kind::Nftables => ("nft", "-f"),
        };
        let mut arguments = vec![first, &*file];
        if self.kind != Kind::Nftables && !keep {
            arguments.remove(0);
        }
        let started = Instant::now();
        self.netns.output(program, &arguments);
        milliseconds(started.elapsed())
    }
}

fn cold_start(options: &Options, sizes: &[u32], kept: &mut Kept) -> [Figure; 2] {
    let title = "start with nothing in the kernel: time to program it";
    let mut figure = Figure::new("12", title, "ms").plot("start.svg");
    let mut memory = Figure::new("12", "the agent's memory, at most, by Services", "MiB");
    let rounds = options.rounds(STARTS);
    for &count in sizes.iter().filter(|count| **count != SMALL) {
        let mut klb = Klb::new(count);
        let starts: Vec<_> = (0..rounds).map(|_| klb.start()).collect();
        let row = |name, value: fn(&Start) -> f64| {
            Row::new("", starts.iter().map(value).collect()).of_services(name, count)
        };
        let bound = if count > 10_000 { 300.0 } else { 50.0 };
        let maps = row("klb, map writes", |start| milliseconds(start.wrote));
        let mut maps = maps.target(Target::at_most(bound).of_value());
        if count == 10_000 {
            maps = maps
                .target(Target::at_most(1.0 / 200.0).to("nftables, 10000"))
                .target(Target::at_most(1.0 / 10.0).to("iptables-legacy, 10000"));
        }
        let after_list = row("klb, list to maps", |start| milliseconds(start.after_list));
        let own = row("klb, all CPU until ready", |start| milliseconds(start.own));
        figure.rows.extend([maps, after_list, own]);
        memory.rows.push(row("klb", |start| start.peak));
        if options.wants(Name::Change) {
            kept.agents.push(klb);
        } else {
            drop(klb);
        }
        for kind in [Kind::Iptables, Kind::Legacy, Kind::Nftables] {
            if kind == Kind::Nftables && count > MOST_FOR_RULES {
                continue;
            }
            let (row, rules) = rule_set(kind, count, rounds);
            figure.rows.push(row);
            if options.wants(Name::Change) && changes_rules(kind, count) {
                kept.sets.push(rules);
            }
        }
        figure.note_load();
    }
    memory.load = figure.load;
    [figure, memory]
}

/// The same start for a kind of rule set, which is there then.
fn rule_set(kind: Kind, count: u32, rounds: usize) -> (Row, Rules) {
    progress(format_args!("{}, {count} Services", kind.name()));
    // Those that take a quarter of a minute are as clear after one.
    let rounds = if count > MOST_FOR_RULES { 1 } else { rounds };
    let mut rules = Rules::new(kind, count);
    let mut times = vec![rules.load()];
    while times.len() < rounds {
        // The one before first: they have one name.
        drop(rules);
        rules = Rules::new(kind, count);
        times.push(rules.load());
    }
    let row = Row::new("", times).of_services(kind.name(), count);
    (row, rules)
}

/// Whether changes of such a rule set are measured.
fn changes_rules(kind: Kind, count: u32) -> bool {
    kind != Kind::Legacy && count <= MOST_FOR_RULES
}

fn changes(options: &Options, sizes: &[u32], mut kept: Kept) -> Vec<Figure> {
    let agents = sizes.iter().map(|count| kept.agent(*count));
    let mut agents: Vec<_> = agents.collect();
    let mut sets = Vec::new();
    for &count in sizes {
        for kind in [Kind::Iptables, Kind::Nftables] {
            if changes_rules(kind, count) {
                sets.push(kept.rules(kind, count));
            }
        }
    }
    let mut figures = vec![one_by_one(options, &mut agents, &sets)];
    drop(sets);
    if let Some(klb) = agents.last_mut() {
        figures.push(storm(options, klb));
    }
    if !options.quick {
        figures.push(idle(&mut agents));
    }
    figures
}

/// One slice changes, and again when that is in the kernel.
fn one_by_one(options: &Options, agents: &mut [Klb], sets: &[Rules]) -> Figure {
    let title = "one EndpointSlice changes: own work until it is in the kernel";
    let mut figure = Figure::new("11", title, "ms").plot("change.svg");
    progress(format_args!("figure 11: {title}"));
    let mut usual = vec![Vec::new(); agents.len()];
    let (mut slow, mut slowest) = (usual.clone(), usual.clone());
    let mut rule_sets = vec![Vec::new(); sets.len()];
    for round in 0..u32::try_from(options.rounds(ROUNDS)).expect("few") {
        for (place, klb) in agents.iter_mut().enumerate() {
            let times = (0..CHANGES).map(|change| {
                let number = (round * CHANGES + change) * 7 % (klb.services.count - 1);
                klb.change(number, 1 + round)
            });
            let mut times: Vec<_> = times.collect();
            times.sort_by(f64::total_cmp);
            usual[place].push(quantile(&times, 50));
            slow[place].push(quantile(&times, 99));
            slowest[place].push(quantile(&times, 100));
        }
        for (rules, times) in sets.iter().zip(&mut rule_sets) {
            let number = round * 7;
            let (before, after) = (services::other(number, 0), services::other(number, 1));
            times.push(rules.change(&before, &after));
        }
        figure.note_load();
    }
    for (place, klb) in agents.iter().enumerate() {
        let count = klb.services.count;
        let row = |name, values: &[Vec<f64>]| {
            Row::new("", values[place].clone()).of_services(name, count)
        };
        let mut usual = row("klb", &usual);
        if count == 10_000 {
            usual = usual.target(Target::at_most(1.0 / 150.0).to("nftables, 10000"));
        }
        if count == LARGE {
            usual = usual.target(Target::at_most(1.2).to("klb, 1000"));
        }
        let slow = row("klb, p99 of 200", &slow);
        let slow = slow.target(Target::at_most(1.0).of_value());
        figure
            .rows
            .extend([usual, slow, row("klb, slowest of 200", &slowest)]);
    }
    for (rules, times) in sets.iter().zip(rule_sets) {
        let row = Row::new("", times).of_services(rules.kind.name(), rules.services.count);
        figure.rows.push(row);
    }
    figure
}

/// Many Services get other endpoints, and again every two seconds.
fn storm(options: &Options, klb: &mut Klb) -> Figure {
    let count = klb.services.count;
    let rolled = ROLLED.min(count - 1);
    let steps = if options.quick { QUICK_ROLLS } else { ROLLS };
    let seconds = (ROLL * steps).as_secs();
    let title = format!("{rolled} of {count} Services rolled {steps} times in {seconds} s");
    progress(format_args!("figure 11: {title}"));
    let mut figure = Figure::new("11", title, "% of a CPU");
    let (started, before) = (Instant::now(), cpu(&mut klb.agent));
    let round = |step: u32| 100 + step;
    for step in 0..steps {
        for number in 0..rolled {
            klb.server.put(services::other(number, round(step)).slice());
        }
        sleep((started + ROLL * (step + 1)).saturating_duration_since(Instant::now()));
    }
    await_endpoints(klb, rolled, round(steps - 1));
    let spent = cpu(&mut klb.agent).saturating_sub(before);
    let busy = share(spent, started.elapsed());
    figure
        .rows
        .push(Row::new("klb, while they are rolled", vec![busy]));
    figure.note_load();
    figure
}

/// Nothing happens, for a minute.
fn idle(agents: &mut [Klb]) -> Figure {
    let title = "nothing happens for a minute";
    progress(format_args!("figure 11: {title}"));
    let mut figure = Figure::new("11", title, "% of a CPU");
    sleep(SETTLED);
    let started = Instant::now();
    let before: Vec<_> = agents.iter_mut().map(|klb| cpu(&mut klb.agent)).collect();
    sleep(IDLE);
    for (klb, before) in agents.iter_mut().zip(before) {
        let spent = cpu(&mut klb.agent).saturating_sub(before);
        let row = Row::new("", vec![share(spent, started.elapsed())]);
        let row = row.of_services("klb, idle", klb.services.count);
        figure
            .rows
            .push(row.target(Target::at_most(0.1).of_value()));
    }
    figure.note_load();
    figure
}

/// Part of a CPU, in per cent.
fn share(spent: Duration, time: Duration) -> f64 {
    100.0 * spent.as_secs_f64() / time.as_secs_f64()
}

/// Waits until every one of the first `rolled` Services has the endpoints of
/// this round.
fn await_endpoints(klb: &Klb, rolled: u32, round: u32) {
    let wanted: Vec<_> = (0..rolled)
        .map(|number| services::other(number, round))
        .collect();
    klb.agent
        .await_services("the last of all changes", |services| {
            let mut found = std::collections::BTreeMap::<&str, BTreeSet<IpAddr>>::new();
            for port in services {
                let backends = port
                    .frontends
                    .iter()
                    .flat_map(|frontend| &frontend.backends);
                let backends = backends.map(|backend| backend.address);
                found.entry(&port.name).or_default().extend(backends);
            }
            wanted.iter().all(|service| {
                let endpoints = service
                    .endpoints
                    .iter()
                    .copied()
                    .map(IpAddr::from)
                    .collect();
                found.get(&*service.name) == Some(&endpoints)
            })
        });
}

/// The log's lines about writes.
fn reconciled(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| line.contains(" reconciled "))
}

/// CPU time that all threads of the agent have used, also those that have ended,
/// as the scheduler counts it.
fn cpu(agent: &mut Agent) -> Duration {
    let process = Pid::from_raw(agent.process().id().cast_signed());
    let time = clock_getcpuclockid(process).and_then(clock_gettime);
    time.expect("the agent runs").into()
}

/// A field of `/proc/PID/status`, in MiB.
fn memory(agent: &mut Agent, field: &str) -> f64 {
    let path = format!("/proc/{}/status", agent.process().id());
    let text = fs::read_to_string(path).expect("the agent runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let digits = line.map(|line| line.trim_matches(|c: char| !c.is_ascii_digit()));
    let kilobytes: f64 = digits
        .and_then(|digits| digits.parse().ok())
        .expect("a size");
    kilobytes / 1024.0
}

/// Seconds since midnight, from the time that a line begins with.
fn time_of_day(line: &str) -> f64 {
    let time = line.split(['T', 'Z']).nth(1).unwrap_or_default();
    let parts = time
        .split(':')
        .map(|part| part.parse::<f64>().unwrap_or(f64::NAN));
    parts.fold(0.0, |sum, part| sum * 60.0 + part)
}

fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let mut words = line.split_whitespace();
    words
        .find_map(|word| word.strip_prefix(name))
        .unwrap_or_default()
}

/// As `Duration` is written in a log.
fn duration(text: &str) -> Duration {
    let digits = text.trim_end_matches(|c: char| c.is_alphabetic() || c == 'µ');
    let count: f64 = digits
        .parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"));
    let unit = match &text[digits.len()..] {
        "ns" => 1e-9,
        "µs" => 1e-6,
        "ms" => 1e-3,
        _ => 1.0,
    };
    Duration::from_secs_f64(count * unit)
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
