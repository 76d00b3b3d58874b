//! klb and the floor, on the same packets, by turns.

use std::{io, net::SocketAddr};

use aya::{
    maps::ProgramArray,
    programs::{Program, ProgramFd, TestRun as _, TestRunOptions},
};
use lb_common::{
    Hook,
    flow::State,
    node::{CONFIG_BYPASS, Config, DEVICE_XDP, Device},
};
use lb_tests::{
    packet::{self, Packet},
    program::{Backend, Datapath, TC_GO_ON, TC_REDIRECT, XDP_PASS, XDP_REDIRECT},
    topology::Family,
};

use super::{
    DEVICE,
    cases::{Case, PROTOCOL, Service, Traffic},
    flows,
};
use crate::bench::{
    floor::{self, Floor, set, shared},
    report::{Figure, Row, Target},
};

/// Runs whose time is taken together, each of them of a new flow.
const NEW_FLOWS: u32 = 10_000;
/// The same of established flows, and how often each flow has its turn at least:
/// the first packet finds nothing in the caches, because a test run of XDP waits
/// for all CPUs before it begins.
const REPEAT: u32 = 50_000;
const TURNS: u32 = 4;

/// Flows that are opened before they are made established: far fewer than klb's
/// table of young ones holds.
const AT_ONCE: u32 = 16_384;

/// Most that a packet of IPv6 may cost klb, as a ratio to one of IPv4.
const V6_TARGET: f64 = 1.15;

/// What the floor's packet of IPv6 is known to cost, as a ratio to one of IPv4:
/// about the same, and with a route, which the kernel finds more slowly, up to
/// twice.
const FLOOR6_BAND: (f64, f64) = (0.8, 2.1);

/// The rows of a figure.
const FLOOR: &str = "floor";
const KLB: &str = "klb";
const FLOOR6: &str = "floor, IPv6";
const KLB6: &str = "klb, IPv6";

/// Whose program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    /// A program that does nothing, to be taken off the others' time.
    Nobody,
    Floor,
    Klb,
}

/// Both, with the same Services in their maps.
pub(super) struct Contest {
    klb: Datapath,
    floor: Floor,
}

impl Contest {
    /// Fills the maps with so many Services of either family besides those that
    /// are asked.
    ///
    /// # Panics
    /// If something cannot be loaded or filled.
    pub(super) fn new(services: u32) -> Self {
        let mut this = Self {
            klb: Datapath::of_default_size(),
            floor: Floor::load().expect("the floor's object"),
        };
        for family in Family::ALL {
            for service in Service::ALL {
                let frontend = flows::frontend(family, service.port());
                let is_local = service != Service::Remote;
                this.serve(frontend, &service.slots(family), is_local);
                this.klb
                    .change_frontend(PROTOCOL, frontend, |entry| service.change(entry));
            }
            let backends = flows::backends(family);
            for number in 0..services {
                this.serve(flows::other_frontend(family, number), &backends, true);
            }
        }
        this
    }

    fn serve(&mut self, frontend: SocketAddr, backends: &[SocketAddr], local: bool) {
        self.floor
            .serve(PROTOCOL, frontend, backends)
            .expect("room in the floor's maps");
        let backends: Vec<_> = backends
            .iter()
            .map(|&addr| Backend { addr, local })
            .collect();
        self.klb.serve(PROTOCOL, frontend, &backends);
    }

    /// Measures both in both families.
    ///
    /// # Panics
    /// If what comes out of a program is not what should.
    pub(super) fn figure(&mut self, case: &Case, hook: Hook, rounds: usize) -> Figure {
        let hook = case.hook(hook);
        self.configure(case);
        for family in Family::ALL {
            for who in [Who::Floor, Who::Klb] {
                self.open_flows(who, case, hook, family);
                self.check(who, case, hook, family);
            }
        }
        let [mut floor, mut klb, mut floor6, mut klb6] = [const { Vec::new() }; 4];
        for _ in 0..rounds {
            for (family, floor, klb) in [
                (Family::V4, &mut floor, &mut klb),
                (Family::V6, &mut floor6, &mut klb6),
            ] {
                let nothing = self.time(Who::Nobody, case, hook, family);
                floor.push(self.time(Who::Floor, case, hook, family) - nothing);
                klb.push(self.time(Who::Klb, case, hook, family) - nothing);
            }
        }
        let title = format!("{}: {}", name(hook), case.title);
        let mut figure = Figure::new(number(case), title, "ns").to(FLOOR);
        let aim = |row: Row, to| match case.target {
            Some(bound) => row.target(Target::at_most(bound).to(to)),
            None => row,
        };
        figure.rows = vec![
            Row::new(FLOOR, floor),
            aim(Row::new(KLB, klb), FLOOR),
            Row::new(FLOOR6, floor6).band(FLOOR6_BAND.0, FLOOR6_BAND.1),
            aim(Row::new(KLB6, klb6), FLOOR6).target(Target::at_most(V6_TARGET).to(KLB)),
        ];
        figure.note_load();
        figure
    }

    fn configure(&mut self, case: &Case) {
        self.klb.configure(&Config {
            timeouts: State::TIMEOUTS,
            first_port: 32_768,
            port_count: 32_000,
            flags: if case.is_routed { CONFIG_BYPASS } else { 0 },
            ..Config::default()
        });
        self.klb.set_credit(case.credit);
        self.klb.forget_what_was_rare();
        // As the agent says of a device whose driver runs XDP.
        let index = nix::net::if_::if_nametoindex(DEVICE).expect("made for this");
        let device = Device {
            flags: DEVICE_XDP,
            ..Device::default()
        };
        self.klb.set_device(index, device);
    }

    /// Makes the flows that packets are of, and no others.
    fn open_flows(&mut self, who: Who, case: &Case, hook: Hook, family: Family) {
        self.forget(who, family);
        if case.traffic != Traffic::Established {
            return;
        }
        // Only bypass opens masqueraded flows at XDP; TC does anyway.
        let opening_hook = if hook == Hook::TcEgress {
            Hook::TcIngress
        } else {
            hook
        };
        let opener = case.opener(family);
        let mut open = 0;
        while open < case.flows {
            let more = AT_ONCE.min(case.flows - open);
            self.replay(who, case, opening_hook, &opener, open, more);
            if who == Who::Klb {
                flows::establish(&mut self.klb, family);
            }
            open += more;
        }
    }

    fn forget(&mut self, who: Who, family: Family) {
        match who {
            Who::Nobody => {}
            Who::Floor => self.floor.forget(family).expect("a table of flows"),
            Who::Klb => self.klb.clear_flows(family),
        }
    }

    /// Looks at the packet of the first, of another and of the last flow.
    fn check(&mut self, who: Who, case: &Case, hook: Hook, family: Family) {
        let sent = case.packet(hook, family);
        for number in [0, case.flows / 2, case.flows - 1] {
            let (action, frame) = self.replay_one(who, case, hook, &sent, number);
            assert_eq!(action, expected(case, hook), "{who:?}: {}", case.title);
            let seen = packet::read(&frame);
            let client = flows::client(family, number);
            let context = format!("{who:?}, {hook:?}, {}: {seen:?}", case.title);
            assert_eq!(seen.payload, [7; 40], "{context}");
            if who == Who::Klb && case.is_masqueraded(hook) {
                assert!(seen.src != client && seen.src.port() >= 32_768, "{context}");
            } else {
                assert_eq!(seen.src, client, "{context}");
            }
            if case.is_for_service() {
                let backends = case.service.slots(family);
                assert!(backends.contains(&seen.dst), "{context}");
            } else {
                assert_eq!(seen.dst, sent.dst, "{context}");
            }
        }
    }

    /// Nanoseconds of one packet, with the replay.
    fn time(&mut self, who: Who, case: &Case, hook: Hook, family: Family) -> f64 {
        let sent = case.packet(hook, family);
        if case.traffic == Traffic::New {
            self.forget(who, family);
            return self.replay(who, case, hook, &sent, 0, NEW_FLOWS);
        }
        // The first packet of a flow in a second has more to do: klb's flows have
        // theirs before, since in so short a test it would be one of twelve.
        self.replay(who, case, hook, &sent, 0, case.flows);
        self.replay(who, case, hook, &sent, 0, REPEAT.max(TURNS * case.flows))
    }

    fn replay(
        &mut self,
        who: Who,
        case: &Case,
        hook: Hook,
        sent: &Packet,
        first: u32,
        repeat: u32,
    ) -> f64 {
        let frame = sent.bytes();
        self.prepare(who, case, hook, &frame, first);
        let options = TestRunOptions {
            data_in: Some(&frame),
            repeat,
            ..TestRunOptions::default()
        };
        let (_, _, nanoseconds) = self.test_run(hook, options);
        nanoseconds
    }

    /// The action, and the frame as it comes out.
    fn replay_one(
        &mut self,
        who: Who,
        case: &Case,
        hook: Hook,
        sent: &Packet,
        number: u32,
    ) -> (u32, Vec<u8>) {
        let frame = sent.bytes();
        self.prepare(who, case, hook, &frame, number);
        let mut out = vec![0; frame.len() + 64];
        let options = TestRunOptions {
            data_in: Some(&frame),
            data_out: Some(&mut out),
            ..TestRunOptions::default()
        };
        let (action, length, _) = self.test_run(hook, options);
        out.truncate(length);
        (action, out)
    }

    /// Puts frame and program in place.
    fn prepare(&mut self, who: Who, case: &Case, hook: Hook, frame: &[u8], first: u32) {
        let program = self.program(who, case, hook).expect("a loaded program");
        let mut head = [0; shared::WORDS];
        for (word, bytes) in head.iter_mut().zip(frame.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
        }
        let frame = shared::Frame {
            head,
            count: first,
            mask: case.flows - 1,
            is_v6: u32::from(frame[12] == 0x86),
            pad: 0,
        };
        let map = self.floor.map("floor_frame").expect("in the object");
        set(map, 0, frame).expect("an index within the map");
        let next = if hook == Hook::Xdp {
            "floor_next_xdp"
        } else {
            "floor_next_tc"
        };
        let map = self.floor.map(next).expect("in the object");
        let mut next = ProgramArray::try_from(map).expect("an array of programs");
        next.set(0, &program, 0).expect("a program of that hook");
    }

    /// The program that does the case's work.
    fn program(&mut self, who: Who, case: &Case, hook: Hook) -> io::Result<ProgramFd> {
        let name = match (who, hook == Hook::Xdp, case.is_routed) {
            (Who::Klb, ..) => {
                let program = self.klb.program(hook);
                return program.fd().expect("loaded").try_clone();
            }
            (Who::Nobody, true, _) => floor::XDP_NOTHING,
            (Who::Nobody, false, _) => floor::TC_NOTHING,
            (Who::Floor, true, false) => floor::XDP,
            (Who::Floor, true, true) => floor::XDP_FIB,
            (Who::Floor, false, false) => floor::TC,
            (Who::Floor, false, true) => floor::TC_FIB,
        };
        let program = self.floor.loaded(name).expect("a program of the floor's");
        program.fd().expect("loaded").try_clone()
    }

    /// Action, length of the frame, nanoseconds of a run.
    fn test_run(&mut self, hook: Hook, options: TestRunOptions<'_>) -> (u32, usize, f64) {
        let name = if hook == Hook::Xdp {
            "floor_replay_x"
        } else {
            "floor_replay_t"
        };
        let program = self.floor.loaded(name).expect("the replay");
        let result = match program {
            Program::Xdp(program) => program.test_run(options),
            Program::SchedClassifier(program) => program.test_run(options),
            _ => unreachable!("the replay is of one of these kinds"),
        };
        let result = result.expect("a test run");
        let length = usize::try_from(result.data_size_out).expect("fits");
        (
            result.return_value,
            length,
            result.duration.as_secs_f64() * 1e9,
        )
    }
}

const fn expected(case: &Case, hook: Hook) -> u32 {
    let is_sent = case.is_routed && case.is_for_service();
    match (hook, is_sent) {
        (Hook::Xdp, false) => XDP_PASS,
        (Hook::Xdp, true) => XDP_REDIRECT,
        (Hook::TcIngress, true) => TC_REDIRECT,
        _ => TC_GO_ON,
    }
}

const fn name(hook: Hook) -> &'static str {
    match hook {
        Hook::Xdp => "XDP",
        Hook::TcEgress => "TC out",
        _ => "TC",
    }
}

fn number(case: &Case) -> &'static str {
    if case.traffic == Traffic::New {
        "9"
    } else {
        "8"
    }
}
