//! The living flows, of which a trial gets those that matter to its packet.

use std::collections::HashSet;

use aya::Pod;
use lb_common::{
    Addr4, Addr6, Port,
    flow::{FLOW_MASQUERADED, FlowEntry, State, Timeouts, Tuple},
    names,
    service::BackendRef,
};

use super::{Ends, Trial, TrialError};
use crate::datapath::{
    Family, MapError,
    kernel::{Hash, MapAddr, monotonic_seconds, socket_addr},
    pins::Pins,
};

/// An entry of a table of flows, whatever the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// A packet as it comes.
    pub key: Ends,
    /// As it leaves.
    pub becomes: Ends,
    /// IP protocol number.
    pub protocol: u8,
    /// As [`FlowEntry::direction`].
    pub direction: u8,
    /// A second flow gives its packets an address of the node.
    pub is_masqueraded: bool,
    /// Service port, the key of the names.
    pub service: u32,
    /// Which life of the backend it is of.
    pub life: BackendRef,
    pub state: State,
    /// Seconds since the last packet of either direction.
    pub idle: u32,
    /// It has been silent for too long, and only waits for its place to be used.
    pub is_over: bool,
}

/// The entries of one family.
pub struct LiveFlows {
    tables: Tables,
    /// When they were read, in seconds of the monotonic clock.
    now: u32,
    timeouts: Timeouts,
}

enum Tables {
    V4(FamilyTables<Addr4>),
    V6(FamilyTables<Addr6>),
}

type Row<A> = (Tuple<A>, FlowEntry<A>);

/// In the order in which the programs look.
struct FamilyTables<A> {
    confirmed: Vec<Row<A>>,
    young: Vec<Row<A>>,
}

impl LiveFlows {
    /// Reads those of a family; `timeouts` are those of the settings.
    pub fn read(pins: &Pins, family: Family, timeouts: Timeouts) -> Result<Self, TrialError> {
        Ok(Self {
            tables: match family {
                Family::V4 => Tables::V4(FamilyTables::read(pins, names::FLOWS4, names::YOUNG4)?),
                Family::V6 => Tables::V6(FamilyTables::read(pins, names::FLOWS6, names::YOUNG6)?),
            },
            now: monotonic_seconds(),
            timeouts,
        })
    }

    pub fn len(&self) -> usize {
        match &self.tables {
            Tables::V4(tables) => tables.confirmed.len() + tables.young.len(),
            Tables::V6(tables) => tables.confirmed.len() + tables.young.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The entry that a program finds for a packet.
    pub fn find(&self, key: Ends, protocol: u8) -> Option<Entry> {
        let mut found = None;
        self.visit(|entry| {
            if entry.key == key && entry.protocol == protocol {
                found.get_or_insert(*entry);
            }
        });
        found
    }

    /// The ports from which a client has, or had, a flow to an address and port.
    pub fn ports_in_use(&self, matches: impl Fn(&Entry) -> bool) -> HashSet<u16> {
        let mut ports = HashSet::new();
        self.visit(|entry| {
            if matches(entry) {
                ports.insert(entry.key.src.port());
            }
        });
        ports
    }

    /// Forgets all flows but that of a packet, that of its answer, and those that
    /// `rivals` names: whose places a new flow may want.
    pub fn keep_related(&mut self, packet: Ends, protocol: u8, rivals: impl Fn(&Entry) -> bool) {
        let mut wanted = HashSet::from([packet, packet.reversed()]);
        let mut also = HashSet::new();
        // The other direction, and the second flow of one that is masqueraded.
        let relatives = |entry: &Entry| [entry.key, entry.becomes, entry.becomes.reversed()];
        self.visit(|entry| {
            if entry.protocol == protocol && (wanted.contains(&entry.key) || rivals(entry)) {
                also.extend(relatives(entry));
            }
        });
        wanted.extend(also.drain());
        self.visit(|entry| {
            if entry.protocol == protocol && wanted.contains(&entry.key) {
                also.extend(relatives(entry));
            }
        });
        wanted.extend(also);
        let keep = |entry: &Entry| entry.protocol == protocol && wanted.contains(&entry.key);
        let (now, timeouts) = (self.now, self.timeouts);
        match &mut self.tables {
            Tables::V4(tables) => tables.retain(|row| keep(&entry(row, now, &timeouts))),
            Tables::V6(tables) => tables.retain(|row| keep(&entry(row, now, &timeouts))),
        }
    }

    /// Puts them into the tables of a trial.
    pub(super) fn copy_to(&self, trial: &mut Trial) -> Result<(), MapError> {
        match &self.tables {
            Tables::V4(tables) => {
                trial.put(names::FLOWS4, &tables.confirmed)?;
                trial.put(names::YOUNG4, &tables.young)
            }
            Tables::V6(tables) => {
                trial.put(names::FLOWS6, &tables.confirmed)?;
                trial.put(names::YOUNG6, &tables.young)
            }
        }
    }

    fn visit(&self, mut see: impl FnMut(&Entry)) {
        let (now, timeouts) = (self.now, &self.timeouts);
        match &self.tables {
            Tables::V4(tables) => tables.visit(|row| see(&entry(row, now, timeouts))),
            Tables::V6(tables) => tables.visit(|row| see(&entry(row, now, timeouts))),
        }
    }
}

impl<A: MapAddr> FamilyTables<A>
where
    Tuple<A>: Pod,
    FlowEntry<A>: Pod,
{
    fn read(pins: &Pins, confirmed: &'static str, young: &'static str) -> Result<Self, TrialError> {
        // What moves meanwhile is in both rather than in none.
        let young = Hash::open(pins, young)?.read_all()?;
        let confirmed = Hash::open(pins, confirmed)?.read_all()?;
        Ok(Self { confirmed, young })
    }

    fn visit(&self, see: impl FnMut(&Row<A>)) {
        self.confirmed.iter().chain(&self.young).for_each(see);
    }

    fn retain(&mut self, keep: impl Fn(&Row<A>) -> bool) {
        self.confirmed.retain(&keep);
        self.young.retain(&keep);
    }
}

fn entry<A: MapAddr>((key, entry): &Row<A>, now: u32, timeouts: &Timeouts) -> Entry {
    let ends = |src: A, src_port: Port, dst: A, dst_port: Port| Ends {
        src: socket_addr(src, src_port),
        dst: socket_addr(dst, dst_port),
    };
    Entry {
        key: ends(key.src, key.src_port, key.dst, key.dst_port),
        becomes: ends(entry.src, entry.src_port, entry.dst, entry.dst_port),
        protocol: key.protocol,
        direction: entry.direction,
        is_masqueraded: entry.flags & FLOW_MASQUERADED != 0,
        service: entry.service,
        life: entry.backend,
        state: entry.state(key.protocol),
        idle: now.saturating_sub(entry.last_seen),
        is_over: entry.expired(key.protocol, now, timeouts),
    }
}

#[cfg(test)]
mod tests {
    use lb_common::flow::{FORWARD, MASQUERADE, TCP, seen};

    use super::*;

    fn ends(src: &str, dst: &str) -> Ends {
        let addr = |text: &str| text.parse().expect("an address");
        Ends {
            src: addr(src),
            dst: addr(dst),
        }
    }

    fn tuple(ends: Ends) -> Tuple<Addr4> {
        let addr = |ip| Addr4::from_ip(ip).expect("IPv4");
        Tuple::new(
            addr(ends.src.ip()),
            addr(ends.dst.ip()),
            ends.src.port().into(),
            ends.dst.port().into(),
            TCP,
        )
    }

    /// Both entries of a flow.
    fn flow(key: Ends, becomes: Ends, direction: u8) -> [Row<Addr4>; 2] {
        let (key, to) = (tuple(key), tuple(becomes));
        let entry = FlowEntry {
            src: to.src,
            dst: to.dst,
            src_port: to.src_port,
            dst_port: to.dst_port,
            direction,
            seen: seen::SYN,
            seen_peer: 0,
            flags: 0,
            service: 7,
            backend: BackendRef::default(),
            isn: 0,
            syn_ack: 0,
            last_seen: 100,
            edge: 2,
        };
        [(key, entry), (entry.peer_key(TCP), entry.mirrored(&key))]
    }

    fn live(young: Vec<Row<Addr4>>) -> LiveFlows {
        LiveFlows {
            tables: Tables::V4(FamilyTables {
                confirmed: Vec::new(),
                young,
            }),
            now: 110,
            timeouts: State::TIMEOUTS,
        }
    }

    fn masqueraded(client: &str, port: &str) -> Vec<Row<Addr4>> {
        let (frontend, backend) = ("192.0.2.1:30080", "10.244.1.5:3000");
        let first = flow(ends(client, frontend), ends(client, backend), FORWARD);
        let second = flow(ends(client, backend), ends(port, backend), MASQUERADE);
        [first, second].concat()
    }

    #[test]
    fn a_flow_is_kept_with_all_four_entries() {
        let mut flows = live(
            [
                masqueraded("192.0.2.9:4000", "192.0.2.1:50000"),
                masqueraded("192.0.2.8:4000", "192.0.2.1:50001"),
            ]
            .concat(),
        );
        let packet = ends("192.0.2.9:4000", "192.0.2.1:30080");
        let found = flows.find(packet, TCP).expect("there");
        assert_eq!((found.idle, found.is_over), (10, false));
        assert_eq!(found.state, State::Opening);
        flows.keep_related(packet, TCP, |_| false);
        assert_eq!(flows.len(), 4);
        assert_eq!(flows.find(packet, TCP), Some(found));
    }

    #[test]
    fn rivals_are_kept_with_their_other_direction() {
        let other = masqueraded("192.0.2.8:4000", "192.0.2.1:50001");
        let mut flows = live(other);
        let packet = ends("192.0.2.9:4000", "192.0.2.1:30080");
        let backend = "10.244.1.5:3000".parse().expect("an address");
        let of_node = |entry: &Entry| {
            entry.key.src == backend && entry.key.dst.to_string() == "192.0.2.1:50001"
        };
        let all = flows.len();
        flows.keep_related(packet, TCP, of_node);
        assert_eq!((all, flows.len()), (4, 4));
        flows.keep_related(packet, TCP, |_| false);
        assert!(flows.is_empty());
    }

    #[test]
    fn ports_of_a_client_are_known() {
        let flows = live(masqueraded("192.0.2.9:4000", "192.0.2.1:50000"));
        let to = "192.0.2.1:30080".parse().expect("an address");
        let ports = flows.ports_in_use(|entry| entry.key.dst == to);
        assert_eq!(ports, HashSet::from([4000]));
    }
}
