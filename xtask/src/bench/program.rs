//! What the programs cost, in nanoseconds for a packet, by `BPF_PROG_TEST_RUN`:
//! klb's against the floor's, which only do what cannot be left out.

mod cases;
mod connect;
mod contest;
mod flows;
mod moves;

use std::path::PathBuf;

use lb_common::Hook;
use lb_tests::{cgroup::Cgroup, netns::Netns, scope::Scope, sweep, topology::Family};

use self::{cases::Case, contest::Contest};
use super::{NAME, Name, Options, progress, report::Figure};

/// The figures that are measured here.
pub(super) const NAMES: &[Name] = &[Name::Established, Name::NewFlow, Name::Connect, Name::Flows];

/// Rounds, if nothing else is said.
const ROUNDS: usize = 15;

/// Flows of a case, at most, in a quick run.
const QUICK_FLOWS: u32 = 16_384;

/// Where packets come out that are routed: a device with a neighbour for every
/// backend.
const DEVICE: &str = "out";

/// Measures each case at both hooks and in both families.
///
/// # Panics
/// If a program does not load, or what comes out of it is not what should.
pub(super) fn measure(options: &Options, done: &mut dyn FnMut(Figure)) {
    let name = format!("{NAME}-programs");
    sweep::remove(&name);
    let scope = Scope::named(&name, false);
    let netns = Netns::new(scope.name().to_owned());
    prepare(&netns);
    if options.wants(Name::Established) || options.wants(Name::NewFlow) {
        netns
            .within(|| packets(options))
            .into_iter()
            .for_each(&mut *done);
    }
    if options.wants(Name::Connect) {
        let group = Cgroup::new(scope.name());
        let _inside = group.enter();
        let path = group.path().to_owned();
        let figures = netns.within(|| connections(options, path));
        figures.into_iter().for_each(&mut *done);
    }
    if options.wants(Name::Flows) {
        progress("flows that move");
        done(netns.within(moves::figure));
    }
}

fn packets(options: &Options) -> Vec<Figure> {
    let mut contest = Contest::new(options.services);
    // To open that many flows takes longer than all else.
    let most = if options.quick { QUICK_FLOWS } else { u32::MAX };
    let cases = cases::ALL.iter().filter(|case| case.flows <= most);
    let cases = cases.filter(|case| options.wants(case.figure));
    let hooks = [Hook::Xdp, Hook::TcIngress];
    cases
        .flat_map(|case| hooks.map(|hook| (case, hook)))
        .map(|(case, hook)| figure(&mut contest, case, hook, options))
        .collect()
}

fn connections(options: &Options, group: PathBuf) -> Vec<Figure> {
    let mut contest = connect::Contest::new(options.services, group);
    let mut figures = Vec::new();
    for whom in connect::Whom::ALL {
        for family in Family::ALL {
            progress(format_args!("connect(), {family}"));
            figures.push(contest.figure(family, whom, options.rounds(ROUNDS)));
        }
    }
    figures
}

fn figure(contest: &mut Contest, case: &Case, hook: Hook, options: &Options) -> Figure {
    progress(format_args!("{hook:?}: {}", case.title));
    contest.figure(case, hook, options.rounds(ROUNDS))
}

/// A device that packets can be routed to.
fn prepare(netns: &Netns) {
    netns.sysctl("net/ipv4/conf/all/forwarding", "1");
    netns.sysctl("net/ipv6/conf/all/forwarding", "1");
    netns.ip(&format!(
        "link add {DEVICE} type veth peer name far\n\
         link set {DEVICE} up\n\
         link set far up\n\
         addr add 10.1.255.254/16 dev {DEVICE}\n\
         addr add fd00:1::ffff/64 dev {DEVICE}\n\
         route add default dev {DEVICE}\n\
         route add ::/0 dev {DEVICE}"
    ));
    for number in 1..=flows::BACKENDS {
        let (v4, v6) = flows::backend_addresses(number);
        netns.ip(&format!(
            "neigh replace {v4} lladdr 02:00:00:00:01:01 dev {DEVICE} nud permanent\n\
             neigh replace {v6} lladdr 02:00:00:00:01:01 dev {DEVICE} nud permanent"
        ));
    }
}
