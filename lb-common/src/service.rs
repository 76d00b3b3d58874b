//! Frontends, the slot array and the backends behind it.

use crate::addr::Port;

/// A frontend: where a client sends to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey<A> {
    pub addr: A,
    pub port: Port,
    /// IP protocol number: 6 TCP, 17 UDP.
    pub protocol: u8,
    pub pad: u8,
}

impl<A> ServiceKey<A> {
    #[inline(always)]
    pub const fn new(addr: A, port: Port, protocol: u8) -> Self {
        Self {
            addr,
            port,
            protocol,
            pad: 0,
        }
    }
}

/// What a frontend leads to: a range of slots for clients from outside, and one
/// for those inside (pods and processes of this node). The two are the same
/// but for `externalTrafficPolicy: Local`, which does not bind those inside.
///
/// A range is written before the entry, and the entry is replaced whole, so
/// a reader sees either the old set of backends or the new one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceEntry {
    pub first_slot: u32,
    pub slot_count: u32,
    /// As the two before, for clients inside.
    pub inner_first_slot: u32,
    pub inner_slot_count: u32,
    /// The Service port this frontend belongs to; key of `klb_meta`.
    pub service: u32,
    /// `sessionAffinity: ClientIP`: seconds for which a client that opens no
    /// flow keeps its backend; 0 without affinity.
    pub affinity: u32,
    /// What kind of frontend it is: a [`FrontendKind`] as a number.
    pub kind: u8,
    /// Bits of `FRONTEND_*`.
    pub flags: u8,
    /// Slots behind the outer range, which no program reads: backends that
    /// still answer but get no new flows. An agent that starts learns from
    /// them whose the living ids are.
    pub parked: u16,
}

impl ServiceEntry {
    /// Whether clients inside get other slots than those from outside.
    #[inline(always)]
    pub const fn has_two_windows(&self) -> bool {
        self.first_slot != self.inner_first_slot || self.slot_count != self.inner_slot_count
    }
}

/// The frontend is governed by a traffic policy `Local`.
pub const FRONTEND_LOCAL_POLICY: u8 = 1 << 0;
/// With no slot: drop without an answer (a policy `Local` with backends on
/// other nodes only) instead of refusing.
pub const FRONTEND_DROP: u8 = 1 << 1;
/// Only clients in `klb_range4`/`klb_range6` may open flows
/// (`loadBalancerSourceRanges`).
pub const FRONTEND_SOURCE_RANGES: u8 = 1 << 2;
/// The range is a Maglev table: the slot is chosen by the client's address and
/// port, not at random.
pub const FRONTEND_MAGLEV: u8 = 1 << 3;
/// On an entry of kind [`FrontendKind::Address`]: pings are answered.
pub const FRONTEND_ECHO: u8 = 1 << 4;
/// On an entry of kind [`FrontendKind::Address`]: what comes to a port that no
/// frontend has is refused.
pub const FRONTEND_REFUSE: u8 = 1 << 5;

/// Part of `loadBalancerSourceRanges`: the data of a key in an LPM trie. All
/// bits of `service` are part of the prefix.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceRange<A> {
    /// [`ServiceEntry::service`].
    pub service: u32,
    pub addr: A,
}

/// Whose client keeps which backend (`sessionAffinity: ClientIP`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AffinityKey<A> {
    pub client: A,
    /// [`ServiceEntry::service`]: all frontends of a Service port share it.
    pub service: u32,
}

/// The backend that a client keeps.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    pub backend: BackendRef,
    /// Seconds of the monotonic clock at the client's last new flow.
    pub last_used: u32,
}

/// What makes an address and port a frontend. The numbers are stored in maps
/// and never change.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendKind {
    ClusterIp = 1,
    NodePort = 2,
    LoadBalancer = 3,
    ExternalIp = 4,
    /// Not a frontend but its address: the entry with port 0 and protocol 0,
    /// which says what becomes of packets to other ports of a `ClusterIP`
    /// (refused) and of pings.
    Address = 5,
}

impl FrontendKind {
    /// As `klb get services` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalIp => "ExternalIP",
            Self::Address => "Address",
        }
    }

    /// The kind that a map's entry names.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::ClusterIp),
            2 => Some(Self::NodePort),
            3 => Some(Self::LoadBalancer),
            4 => Some(Self::ExternalIp),
            5 => Some(Self::Address),
            _ => None,
        }
    }
}

/// One place in the slot array: a backend that a new flow may get.
///
/// The slots of a range are in the order of [`BackendRef::id`], unless it is a
/// Maglev table: a client's backend is found in it by bisection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot<A> {
    pub addr: A,
    pub port: Port,
    /// Bits of `SLOT_*`.
    pub flags: u16,
    pub backend: BackendRef,
}

/// The backend runs on this node.
pub const SLOT_LOCAL: u16 = 1 << 0;

/// Names one life of one backend of one Service port.
///
/// `klb_backend[id]` holds the generation that lives, an odd number, or an even
/// one if the backend has gone: that of its last life, plus one. Ids are used
/// again, generations of an id are not, so a flow that outlived its backend
/// never takes a later backend with the same id for its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendRef {
    /// Never 0, which is what an unused slot says.
    pub id: u32,
    pub generation: u32,
}

/// Whether this number, in `klb_backend`, says that the backend lives.
#[inline(always)]
pub const fn is_living(generation: u32) -> bool {
    generation & 1 == 1
}

/// Longest name of a namespace, Service or port (RFC 1123 label).
pub const NAME_LEN: usize = 63;

/// A DNS label in a map: padded with zeros.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Name {
    pub bytes: [u8; NAME_LEN + 1],
}

impl Name {
    /// The name, or `None` if it is longer than a DNS label may be.
    pub const fn new(name: &str) -> Option<Self> {
        let from = name.as_bytes();
        if from.len() > NAME_LEN {
            return None;
        }
        let mut bytes = [0; NAME_LEN + 1];
        let mut i = 0;
        while i < from.len() {
            bytes[i] = from[i];
            i += 1;
        }
        Some(Self { bytes })
    }

    /// The text up to the first zero; bytes that are no UTF-8 end it too.
    pub fn as_str(&self) -> &str {
        let end = self.bytes.iter().position(|&b| b == 0);
        let text = &self.bytes[..end.unwrap_or(self.bytes.len())];
        match str::from_utf8(text) {
            Ok(name) => name,
            Err(error) => str::from_utf8(&text[..error.valid_up_to()]).unwrap_or(""),
        }
    }
}

/// What a Service port is called. The programs never read it: it is there so
/// that the maps explain themselves when no agent runs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServiceMeta {
    pub namespace: Name,
    pub name: Name,
    pub port_name: Name,
    /// `spec.ports[].port`.
    pub port: Port,
    /// IP protocol number.
    pub protocol: u8,
    pub pad: u8,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_legal_length_survive() {
        for length in 0..=NAME_LEN {
            let name = "a".repeat(length);
            assert_eq!(Name::new(&name).expect("fits").as_str(), name);
        }
        assert!(Name::new(&"a".repeat(NAME_LEN + 1)).is_none());
    }

    #[test]
    fn frontend_kinds_survive_their_number() {
        for number in 0..=u8::MAX {
            if let Some(kind) = FrontendKind::from_number(number) {
                assert_eq!(kind as u8, number);
            }
        }
        assert_eq!(FrontendKind::from_number(2), Some(FrontendKind::NodePort));
    }
}
