//! What `connect()` costs: real calls of UDP sockets, by turns without a program,
//! with the floor's and with klb's.

use std::{fs::File, net::SocketAddr, path::PathBuf, time::Instant};

use aya::programs::{CgroupAttachMode, CgroupSockAddr, cgroup_sock_addr::CgroupSockAddrLinkId};
use lb_common::{
    flow::{State, UDP},
    names,
    node::Config,
};
use lb_tests::{
    netns,
    program::{Backend, Datapath},
    topology::Family,
};
use socket2::{Domain, Socket, Type};

use super::flows;
use crate::bench::{
    floor::{self, Floor},
    report::{Figure, Row, Target},
    stats::median,
};

/// Sockets that are connected one after the other, each once, in so short a time
/// that mostly nobody interrupts; and how many such times a round has, of which
/// the middle one counts.
const SOCKETS: u32 = 100;
const BATCHES: u32 = 31;

/// What a program that does nothing is known to add, as a ratio to the floor. It
/// is far less if the host has other programs of this kind in any group: then
/// calls without one pay for them too.
const HIT_BAND: (f64, f64) = (0.18, 0.4);
const MISS_BAND: (f64, f64) = (0.6, 1.0);

/// The rows of a figure.
const NONE: &str = "no program, in all";
const EMPTY: &str = "empty program";
const PLAIN: &str = "floor without note";
const FLOOR: &str = "floor";
const KLB: &str = "klb";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Nobody,
    Floor(&'static str),
    Klb,
}

/// Both, with the same Services in their maps.
pub(super) struct Contest {
    klb: Datapath,
    floor: Floor,
    /// The control group that this process is in.
    group: PathBuf,
}

/// Whom a process names.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Whom {
    Service,
    Stranger,
    OtherPort,
}

impl Whom {
    pub(super) const ALL: [Self; 3] = [Self::Service, Self::Stranger, Self::OtherPort];
}

impl Contest {
    /// Fills the maps with so many Services of either family besides the one that
    /// is asked.
    ///
    /// # Panics
    /// If something cannot be loaded or filled.
    pub(super) fn new(services: u32, group: PathBuf) -> Self {
        let mut this = Self {
            klb: Datapath::of_default_size(),
            floor: Floor::load().expect("the floor's object"),
            group,
        };
        this.klb.configure(&Config {
            timeouts: State::TIMEOUTS,
            host_netns: netns::cookie().unwrap_or_default(),
            ..Config::default()
        });
        for family in Family::ALL {
            this.serve(flows::frontend(family, flows::SERVED), family);
            for number in 0..services {
                this.serve(flows::other_frontend(family, number), family);
            }
        }
        this
    }

    fn serve(&mut self, frontend: SocketAddr, family: Family) {
        let addresses = flows::backends(family);
        self.floor
            .serve(UDP, frontend, &addresses)
            .expect("room in the floor's maps");
        let backends: Vec<_> = addresses
            .into_iter()
            .map(|addr| Backend { addr, local: true })
            .collect();
        self.klb.serve(UDP, frontend, &backends);
    }

    /// Measures calls to the Service, or to nobody's address.
    ///
    /// # Panics
    /// If a socket is not connected to what it should be.
    pub(super) fn figure(&mut self, family: Family, whom: Whom, rounds: usize) -> Figure {
        let is_hit = whom == Whom::Service;
        let (what, to) = match whom {
            Whom::Service => ("a Service", flows::frontend(family, flows::SERVED)),
            Whom::Stranger => ("no service", flows::stranger(family, flows::SERVED)),
            Whom::OtherPort => (
                "no service, at a port that nothing has",
                flows::stranger(family, flows::NOT_SERVED),
            ),
        };
        let index = usize::from(family == Family::V6);
        let contestants = [
            (EMPTY, Who::Floor(floor::CONNECT_NOTHING[index])),
            (PLAIN, Who::Floor(floor::CONNECT_PLAIN[index])),
            (FLOOR, Who::Floor(floor::CONNECT[index])),
            (KLB, Who::Klb),
        ];
        for (_, who) in contestants {
            self.check(who, family, to, is_hit);
        }
        let mut none = Vec::new();
        let mut added = contestants.map(|_| Vec::new());
        for _ in 0..rounds {
            let without = self.time(Who::Nobody, family, to);
            none.push(without);
            for ((_, who), added) in contestants.iter().zip(&mut added) {
                added.push(self.time(*who, family, to) - without);
            }
        }
        let title = format!("{family}: connect() to {what}, added");
        let mut figure = Figure::new("10", title, "ns").to(FLOOR);
        let (bound, band) = if is_hit {
            (1.12, HIT_BAND)
        } else {
            (1.03, MISS_BAND)
        };
        figure.rows.push(Row::new(NONE, none));
        for ((name, _), rounds) in contestants.into_iter().zip(added) {
            let row = Row::new(name, rounds);
            figure.rows.push(match name {
                KLB => row.target(Target::at_most(bound)),
                EMPTY => row.band(band.0, band.1),
                _ => row,
            });
        }
        figure.note_load();
        figure
    }

    fn check(&mut self, who: Who, family: Family, to: SocketAddr, is_hit: bool) {
        let link = self.attach(who, family);
        let socket = socket(to);
        socket.connect(&to.into()).expect("a route");
        let peer = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
        let peer = peer.expect("a connected socket");
        let is_empty = matches!(who, Who::Floor(name) if floor::CONNECT_NOTHING.contains(&name));
        if is_hit && !is_empty {
            assert!(flows::backends(family).contains(&peer), "{who:?}: {peer}");
        } else {
            assert_eq!(peer, to, "{who:?}");
        }
        self.detach(who, family, link);
    }

    /// Nanoseconds of a call.
    fn time(&mut self, who: Who, family: Family, to: SocketAddr) -> f64 {
        let link = self.attach(who, family);
        let address = to.into();
        let times = (0..BATCHES).map(|_| {
            let sockets: Vec<_> = (0..SOCKETS).map(|_| socket(to)).collect();
            let started = Instant::now();
            for socket in &sockets {
                socket.connect(&address).expect("a route");
            }
            started.elapsed().as_secs_f64()
        });
        let middle = median(times);
        self.detach(who, family, link);
        middle * 1e9 / f64::from(SOCKETS)
    }

    fn attach(&mut self, who: Who, family: Family) -> Option<CgroupSockAddrLinkId> {
        match who {
            Who::Nobody => None,
            Who::Floor(name) => {
                let link = self.floor.attach_connect(name, &self.group);
                Some(link.expect("the floor's program at the group"))
            }
            Who::Klb => {
                let group = File::open(&self.group).expect("the group");
                let link = self.klb(family).attach(group, CgroupAttachMode::Single);
                Some(link.expect("klb's program at the group"))
            }
        }
    }

    fn detach(&mut self, who: Who, family: Family, link: Option<CgroupSockAddrLinkId>) {
        let Some(link) = link else { return };
        match who {
            Who::Nobody => {}
            Who::Floor(name) => self.floor.detach(name, link).expect("attached"),
            Who::Klb => self.klb(family).detach(link).expect("attached"),
        }
    }

    fn klb(&mut self, family: Family) -> &mut CgroupSockAddr {
        let name = match family {
            Family::V4 => names::CONNECT4,
            Family::V6 => names::CONNECT6,
        };
        let program = self.klb.program_mut(name);
        floor::load(program).expect("klb's program");
        program.try_into().expect("a program of sockets")
    }
}

/// A socket without a port.
fn socket(to: SocketAddr) -> Socket {
    Socket::new(Domain::for_address(to), Type::DGRAM, None).expect("a socket")
}
