//! The flow table: one entry for each direction of a translated connection.
//!
//! An entry maps the tuple of a packet as it arrives to the tuple with which it
//! leaves. Forward and reply entry mirror each other: the key of the one is the
//! reversed translation of the other. So each finds the other without storing
//! its key, and a translation of source and destination at once (masquerade)
//! needs nothing more.

use crate::{
    addr::{Address, Port},
    checksum::Delta,
    service::BackendRef,
};

/// Source, destination and protocol of a packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple<A> {
    pub src: A,
    pub dst: A,
    pub src_port: Port,
    pub dst_port: Port,
    /// IP protocol number.
    pub protocol: u8,
    /// Two fields: an array of three bytes is cleared by a call of `memset`.
    pub pad: u8,
    pub pad2: u16,
}

impl<A: Address> Tuple<A> {
    #[inline(always)]
    pub const fn new(src: A, dst: A, src_port: Port, dst_port: Port, protocol: u8) -> Self {
        Self {
            src,
            dst,
            src_port,
            dst_port,
            protocol,
            pad: 0,
            pad2: 0,
        }
    }

    /// The tuple of the answer.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self::new(
            self.dst,
            self.src,
            self.dst_port,
            self.src_port,
            self.protocol,
        )
    }
}

/// A [`FlowEntry::direction`]: from the client, translated where its packets
/// come in.
pub const FORWARD: u8 = 0;
/// From the backend, translated where its packets go out to the client.
pub const REPLY: u8 = 1;
/// From the client, translated already; masqueraded where its packets go out
/// to the backend.
pub const MASQUERADE: u8 = 2;
/// From the backend, to the node's own address; given the client's where its
/// packets come in.
pub const UNMASQUERADE: u8 = 3;

/// Whether the packets of such an entry are translated where they come in, or
/// else where they go out.
#[inline(always)]
pub const fn is_for_ingress(direction: u8) -> bool {
    matches!(direction, FORWARD | UNMASQUERADE)
}

/// Whether the client sent the packets of such an entry, or else the backend.
#[inline(always)]
pub const fn is_from_client(direction: u8) -> bool {
    direction & 1 == 0
}

/// What has been seen in one direction of a flow.
pub mod seen {
    /// A packet at all (UDP), or one that was neither SYN nor RST (TCP).
    pub const DATA: u8 = 1 << 0;
    pub const SYN: u8 = 1 << 1;
    pub const FIN: u8 = 1 << 2;
    pub const RST: u8 = 1 << 3;
    /// The client has acknowledged the backend's SYN, whose number it can only
    /// know if that reached it.
    pub const ACKED: u8 = 1 << 4;
}

/// Whether both sides of a connection have shown that the other's packets reach
/// them. A sender that forges its address cannot make it look so.
#[inline(always)]
pub const fn is_confirmed(one: u8, other: u8) -> bool {
    one & other & seen::DATA != 0 || (one | other) & seen::ACKED != 0
}

/// One direction of a flow: the value of the flow table.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEntry<A> {
    /// The tuple with which the packet leaves.
    pub src: A,
    pub dst: A,
    pub src_port: Port,
    pub dst_port: Port,
    /// [`FORWARD`], [`REPLY`], [`MASQUERADE`] or [`UNMASQUERADE`].
    pub direction: u8,
    /// What has been seen in this direction: bits of [`seen`].
    pub seen: u8,
    /// What has been seen in the other; written by the other direction's
    /// packets, and a byte of its own so that neither store undoes the other.
    pub seen_peer: u8,
    /// Bits of `FLOW_*`; the same in both entries but for [`FLOW_ALSO_YOUNG`]
    /// and [`FLOW_PORT_TAKEN`].
    pub flags: u8,
    pub service: u32,
    pub backend: BackendRef,
    /// TCP: initial sequence number of the client's SYN. A SYN with another
    /// one is another connection, and so is a SYN-ACK that does not
    /// acknowledge it.
    pub isn: u32,
    /// TCP: the number with which the client acknowledges the backend's SYN, once
    /// that has been seen.
    pub syn_ack: u32,
    /// Seconds of the monotonic clock at the last packet of either direction,
    /// at most one second late.
    pub last_seen: u32,
    /// Where the client's packets come in: index of the device, and
    /// [`EDGE_XDP`] if XDP translates them.
    pub edge: u32,
}

/// Bit of [`FlowEntry::flags`]: a second flow, of [`MASQUERADE`] entries, gives
/// this one's packets an address of the node.
pub const FLOW_MASQUERADED: u8 = 1 << 0;
/// Bit of [`FlowEntry::flags`]: there was data behind the SYN (TCP Fast Open).
pub const FLOW_SYN_DATA: u8 = 1 << 1;

/// Bit of [`FlowEntry::flags`], of a connection among the confirmed: it stands
/// among the young as well, where it was before. Each entry has it for itself.
pub const FLOW_ALSO_YOUNG: u8 = 1 << 2;

/// Bit of [`FlowEntry::flags`], of an entry from the client: the backend has told
/// that it knows another connection with these ports.
pub const FLOW_PORT_TAKEN: u8 = 1 << 3;

/// Bit of [`FlowEntry::edge`]. Device indices are positive `int`s.
pub const EDGE_XDP: u32 = 1 << 31;

impl<A: Address> FlowEntry<A> {
    /// The tuple with which a packet of this entry leaves.
    #[inline(always)]
    pub const fn translated(&self, protocol: u8) -> Tuple<A> {
        Tuple::new(self.src, self.dst, self.src_port, self.dst_port, protocol)
    }

    /// Key of the other direction's entry.
    #[inline(always)]
    pub const fn peer_key(&self, protocol: u8) -> Tuple<A> {
        self.translated(protocol).reversed()
    }

    /// The other direction's entry, given the key of this one.
    #[inline(always)]
    #[must_use]
    pub const fn mirrored(&self, key: &Tuple<A>) -> Self {
        Self {
            src: key.dst,
            dst: key.src,
            src_port: key.dst_port,
            dst_port: key.src_port,
            direction: self.direction ^ 1,
            seen: self.seen_peer,
            seen_peer: self.seen,
            flags: self.flags,
            service: self.service,
            backend: self.backend,
            isn: self.isn,
            syn_ack: self.syn_ack,
            last_seen: self.last_seen,
            edge: self.edge,
        }
    }

    /// Whether this entry is the other direction of the flow that has `key`
    /// in its direction.
    #[inline(always)]
    pub fn mirrors(&self, key: &Tuple<A>) -> bool {
        self.src.same(&key.dst)
            && self.dst.same(&key.src)
            && self.src_port.get() == key.dst_port.get()
            && self.dst_port.get() == key.src_port.get()
    }

    /// What the translation of a packet with `key` does to its checksums.
    #[inline(always)]
    pub fn address_delta(&self, key: &Tuple<A>) -> Delta {
        Delta::new()
            .address(&key.src, &self.src)
            .address(&key.dst, &self.dst)
    }

    /// As [`Self::address_delta`], for the ports.
    #[inline(always)]
    pub fn port_delta(&self, key: &Tuple<A>) -> Delta {
        Delta::new().ports([key.src_port, key.dst_port], [self.src_port, self.dst_port])
    }

    /// The ports with which a packet of this entry leaves, as they follow each
    /// other in a header.
    #[inline(always)]
    pub const fn ports(&self) -> u32 {
        let ([a, b], [c, d]) = (self.src_port.octets, self.dst_port.octets);
        u32::from_ne_bytes([a, b, c, d])
    }

    /// The state of the flow that this entry is one direction of.
    #[inline(always)]
    pub const fn state(&self, protocol: u8) -> State {
        State::of(protocol, self.seen, self.seen_peer)
    }

    /// Whether the flow has been silent for longer than its state allows.
    /// `now` is in seconds of the monotonic clock, `timeouts` in seconds by
    /// [`State`].
    #[inline(always)]
    pub fn expired(&self, protocol: u8, now: u32, timeouts: &Timeouts) -> bool {
        // Most packets: the state need not be known.
        if now == self.last_seen {
            return false;
        }
        // Signed: another CPU may have written a `last_seen` that is later than
        // this CPU's `now`.
        let silent = now.wrapping_sub(self.last_seen).cast_signed();
        silent > self.state(protocol).timeout(timeouts).cast_signed()
    }
}

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;

/// Seconds of silence after which a flow is over, by [`State`].
pub type Timeouts = [u32; State::COUNT];

/// Where a flow is in its life.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// TCP before both sides have sent something after their SYN.
    Opening,
    Established,
    /// TCP after one FIN.
    HalfClosed,
    /// TCP after FINs from both sides.
    Closed,
    /// TCP after a RST.
    Reset,
    /// UDP without an answer yet.
    Unreplied,
    /// UDP with traffic in both directions.
    Replied,
}

impl State {
    /// Every state, by number.
    pub const ALL: [Self; 7] = [
        Self::Opening,
        Self::Established,
        Self::HalfClosed,
        Self::Closed,
        Self::Reset,
        Self::Unreplied,
        Self::Replied,
    ];
    pub const COUNT: usize = Self::ALL.len();

    /// Timeouts that hold without a flag: those of kube-proxy where it sets one
    /// (established 24 h, close-wait 1 h) and of `nf_conntrack` otherwise.
    pub const TIMEOUTS: Timeouts = [60, 24 * 60 * 60, 60 * 60, 120, 10, 30, 120];

    /// The state, from what each direction has sent.
    #[inline(always)]
    pub const fn of(protocol: u8, one: u8, other: u8) -> Self {
        let (either, both) = (one | other, one & other);
        if protocol == UDP {
            return if both & seen::DATA != 0 {
                Self::Replied
            } else {
                Self::Unreplied
            };
        }
        if either & seen::RST != 0 {
            Self::Reset
        } else if both & seen::FIN != 0 {
            Self::Closed
        } else if either & seen::FIN != 0 {
            Self::HalfClosed
        } else if is_confirmed(one, other) {
            Self::Established
        } else {
            Self::Opening
        }
    }

    /// Seconds of silence after which a flow in this state is over.
    #[inline(always)]
    pub fn timeout(self, timeouts: &Timeouts) -> u32 {
        // Without an index: a compiler that cannot see that it is in bounds
        // would add code that can panic.
        let [
            opening,
            established,
            half_closed,
            closed,
            reset,
            unreplied,
            replied,
        ] = *timeouts;
        match self {
            Self::Opening => opening,
            Self::Established => established,
            Self::HalfClosed => half_closed,
            Self::Closed => closed,
            Self::Reset => reset,
            Self::Unreplied => unreplied,
            Self::Replied => replied,
        }
    }

    /// Whether a new SYN with the same ports starts a connection of its own,
    /// free to go to another backend.
    ///
    /// In an established flow it does not: the backend answers it with a
    /// challenge ACK (RFC 5961), and a client that has really started anew
    /// resets the old connection by itself. So nobody can move a live
    /// connection by guessing its ports.
    #[inline(always)]
    pub const fn yields_to_syn(self) -> bool {
        !matches!(self, Self::Established)
    }

    /// As `klb get flows` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Established => "established",
            Self::HalfClosed => "half-closed",
            Self::Closed => "closed",
            Self::Reset => "reset",
            Self::Unreplied => "unreplied",
            Self::Replied => "replied",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Addr6;

    fn addr() -> impl Strategy<Value = Addr6> {
        any::<[u8; 16]>().prop_map(|octets| Addr6 { octets })
    }

    fn port() -> impl Strategy<Value = Port> {
        any::<u16>().prop_map(Port::from)
    }

    prop_compose! {
        fn tuple()(src in addr(), dst in addr(), sp in port(), dp in port(), protocol in prop_oneof![Just(TCP), Just(UDP)]) -> Tuple<Addr6> {
            Tuple::new(src, dst, sp, dp, protocol)
        }
    }

    prop_compose! {
        fn entry()(to in tuple(), direction in 0u8..=1, seen in any::<u8>(), seen_peer in any::<u8>(), isn in any::<u32>(), syn_ack in any::<u32>()) -> FlowEntry<Addr6> {
            FlowEntry {
                src: to.src, dst: to.dst, src_port: to.src_port, dst_port: to.dst_port,
                direction, seen, seen_peer, flags: 0, service: 1,
                backend: BackendRef { id: 2, generation: 3 }, isn, syn_ack, last_seen: 4, edge: 5,
            }
        }
    }

    proptest! {
        #[test]
        fn the_mirror_of_the_mirror_is_the_entry(key in tuple(), entry in entry()) {
            let peer_key = entry.peer_key(key.protocol);
            let peer = entry.mirrored(&key);
            prop_assert!(peer.mirrors(&key));
            prop_assert_eq!(peer.peer_key(key.protocol), key);
            prop_assert_eq!(peer.mirrored(&peer_key), entry);
        }

        #[test]
        fn a_reply_undoes_the_translation(key in tuple(), entry in entry()) {
            // The backend swaps what it received; the reply entry must turn
            // that into the swap of what the client sent.
            let received = entry.translated(key.protocol);
            let answer = entry.mirrored(&key).translated(key.protocol);
            prop_assert_eq!(received.reversed(), entry.peer_key(key.protocol));
            prop_assert_eq!(answer, key.reversed());
        }
    }

    #[test]
    fn tcp_goes_through_its_states() {
        use seen::{ACKED, DATA, FIN, RST, SYN};
        for (client, backend, state) in [
            (SYN, 0, State::Opening),
            (SYN, SYN, State::Opening),
            (SYN | DATA, SYN, State::Opening),
            (SYN | DATA, SYN | DATA, State::Established),
            (SYN | DATA | ACKED, SYN, State::Established),
            (SYN | DATA | ACKED | FIN, SYN, State::HalfClosed),
            (SYN | DATA | FIN, SYN | DATA, State::HalfClosed),
            (SYN | DATA, SYN | DATA | FIN, State::HalfClosed),
            (SYN | DATA | FIN, SYN | DATA | FIN, State::Closed),
            (SYN, RST, State::Reset),
            (SYN | DATA | RST, SYN | DATA | FIN, State::Reset),
        ] {
            assert_eq!(State::of(TCP, client, backend), state);
            assert_eq!(State::of(TCP, backend, client), state);
        }
    }

    #[test]
    fn udp_is_replied_once_both_sides_spoke() {
        assert_eq!(State::of(UDP, seen::DATA, 0), State::Unreplied);
        assert_eq!(State::of(UDP, seen::DATA, seen::DATA), State::Replied);
    }

    #[test]
    fn a_flow_expires_after_its_timeout_and_not_before() {
        let mut entry = FlowEntry {
            src: Addr6::default(),
            dst: Addr6::default(),
            src_port: Port::from(1),
            dst_port: Port::from(2),
            direction: FORWARD,
            seen: seen::DATA,
            seen_peer: 0,
            flags: 0,
            service: 0,
            backend: BackendRef::default(),
            isn: 0,
            syn_ack: 0,
            last_seen: 1000,
            edge: 0,
        };
        assert!(!entry.expired(UDP, 1030, &State::TIMEOUTS));
        assert!(entry.expired(UDP, 1031, &State::TIMEOUTS));
        assert!(
            !entry.expired(UDP, 999, &State::TIMEOUTS),
            "a clock behind the writer's"
        );
        entry.seen_peer = seen::DATA;
        assert!(!entry.expired(UDP, 1120, &State::TIMEOUTS));
        assert!(entry.expired(UDP, 1121, &State::TIMEOUTS));
    }
}
