//! The kinds of packets that are timed.

use lb_common::{
    Hook,
    flow::TCP,
    service::{FRONTEND_MAGLEV, ServiceEntry},
};
use lb_tests::{
    packet::{Packet, flags},
    topology::Family,
};

use super::flows;
use crate::bench::Name;

/// One kind of packet, and what klb's program may cost for it.
pub(super) struct Case {
    pub(super) figure: Name,
    pub(super) title: &'static str,
    pub(super) traffic: Traffic,
    pub(super) service: Service,
    /// Flows that take turns.
    pub(super) flows: u32,
    /// The packet leaves by the route, or else goes up the stack.
    pub(super) is_routed: bool,
    /// How many flows may begin among the confirmed: all, as where clients answer, or
    /// none.
    pub(super) credit: u32,
    /// Most that klb may cost, as a ratio to the floor.
    pub(super) target: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Traffic {
    /// The first packet of a connection to nobody's address, at this port.
    StrangerFirst(u16),
    /// Another packet of it.
    StrangerLater,
    Established,
    New,
}

/// Which Service is asked; each has a port.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Service {
    Plain,
    Affinity,
    Maglev,
    /// Its one backend is on another node: its packets are masqueraded.
    Remote,
}

/// Slots of the Maglev table: klb's default.
const TABLE: usize = 1021;

impl Service {
    pub(super) const ALL: [Self; 4] = [Self::Plain, Self::Affinity, Self::Maglev, Self::Remote];

    pub(super) const fn port(self) -> u16 {
        80 + self as u16
    }

    /// What its entry says besides.
    pub(super) fn change(self, entry: &mut ServiceEntry) {
        match self {
            Self::Plain | Self::Remote => {}
            Self::Affinity => entry.affinity = 10_800,
            Self::Maglev => entry.flags |= FRONTEND_MAGLEV,
        }
    }

    /// The backends, slot by slot.
    pub(super) fn slots(self, family: Family) -> Vec<std::net::SocketAddr> {
        let backends = flows::backends(family);
        match self {
            Self::Plain | Self::Affinity => backends,
            Self::Maglev => backends.into_iter().cycle().take(TABLE).collect(),
            Self::Remote => backends.into_iter().take(1).collect(),
        }
    }
}

impl Case {
    /// The packet, before it becomes one of a client's.
    pub(super) fn packet(&self, hook: Hook, family: Family) -> Packet {
        let dst = match (self.traffic, hook) {
            (Traffic::StrangerFirst(port), _) => flows::stranger(family, port),
            (Traffic::StrangerLater, _) => flows::stranger(family, flows::SERVED),
            // Masqueraded where it goes out, to the backend already.
            (_, Hook::TcEgress) => flows::backends(family)[0],
            _ => flows::frontend(family, self.service.port()),
        };
        let kind = match self.traffic {
            Traffic::StrangerFirst(_) | Traffic::New => flags::SYN,
            Traffic::StrangerLater | Traffic::Established => flags::ACK,
        };
        Packet::tcp(flows::no_client(family), dst, kind).payload([7; 40])
    }

    /// The packet that opens the flows which are timed.
    pub(super) fn opener(&self, family: Family) -> Packet {
        let dst = flows::frontend(family, self.service.port());
        Packet::tcp(flows::no_client(family), dst, flags::SYN).payload([7; 40])
    }

    pub(super) const fn is_for_service(&self) -> bool {
        matches!(self.traffic, Traffic::Established | Traffic::New)
    }

    /// Whether the packet gets a source of the node's.
    pub(super) fn is_masqueraded(&self, hook: Hook) -> bool {
        self.service == Service::Remote && matches!(hook, Hook::Xdp | Hook::TcEgress)
    }

    /// The hook where the work is: TC masquerades where packets go out.
    pub(super) fn hook(&self, hook: Hook) -> Hook {
        if self.service == Service::Remote && hook == Hook::TcIngress {
            Hook::TcEgress
        } else {
            hook
        }
    }
}

/// Checks that every packet is one for TCP.
pub(super) const PROTOCOL: u8 = TCP;

const BASE: Case = Case {
    figure: Name::Established,
    title: "",
    traffic: Traffic::Established,
    service: Service::Plain,
    flows: 4096,
    is_routed: false,
    credit: 0,
    target: None,
};

const NEW: Case = Case {
    figure: Name::NewFlow,
    traffic: Traffic::New,
    flows: 16_384,
    credit: u32::MAX,
    ..BASE
};

pub(super) const ALL: &[Case] = &[
    Case {
        title: "no service, first packet",
        traffic: Traffic::StrangerFirst(flows::SERVED),
        target: Some(1.3),
        ..BASE
    },
    Case {
        title: "no service, first packet, a port that nothing has",
        traffic: Traffic::StrangerFirst(flows::NOT_SERVED),
        target: Some(1.3),
        ..BASE
    },
    Case {
        title: "no service, later packet",
        traffic: Traffic::StrangerLater,
        target: Some(1.3),
        ..BASE
    },
    Case {
        title: "1 flow to a local backend",
        flows: 1,
        target: Some(1.3),
        ..BASE
    },
    Case {
        title: "4096 flows to local backends",
        target: Some(1.3),
        ..BASE
    },
    Case {
        title: "65536 flows to local backends",
        flows: 65_536,
        target: Some(1.3),
        ..BASE
    },
    Case {
        title: "1 flow, out by the route",
        flows: 1,
        is_routed: true,
        target: Some(1.25),
        ..BASE
    },
    Case {
        title: "4096 flows, out by the route",
        is_routed: true,
        target: Some(1.25),
        ..BASE
    },
    Case {
        title: "65536 flows, out by the route",
        flows: 65_536,
        is_routed: true,
        target: Some(1.25),
        ..BASE
    },
    Case {
        title: "4096 flows, masqueraded",
        service: Service::Remote,
        is_routed: true,
        ..BASE
    },
    Case {
        title: "new flow to a local backend",
        target: Some(1.4),
        ..NEW
    },
    Case {
        title: "new flow, out by the route",
        is_routed: true,
        target: Some(1.4),
        ..NEW
    },
    Case {
        title: "new flow, affinity",
        service: Service::Affinity,
        ..NEW
    },
    Case {
        title: "new flow, Maglev",
        service: Service::Maglev,
        ..NEW
    },
    Case {
        title: "new flow of a client that does not answer",
        credit: 0,
        ..NEW
    },
];
