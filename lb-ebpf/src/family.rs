//! What differs between IPv4 and IPv6: the maps, and where things stand in the
//! header. Everything else is written once, over [`Family`].

use lb_common::{
    Addr4, Addr6, Address, Reason,
    service::{BackendRef, ServiceEntry, ServiceKey, Slot},
};

use crate::maps::{
    BACKENDS, FLOWS4, FLOWS6, Flows, SERVICES4, SERVICES6, SLOTS4, SLOTS6, SOCKETS4, SOCKETS6,
    Services, Slots, Sockets,
};
use crate::{
    packet::Packet,
    parse::{Parsed, parse_v4, parse_v6},
};

pub trait Family {
    type Addr: Address;

    /// Where source and destination, which follow each other, stand in the
    /// header.
    const ADDRESSES: usize;
    /// Where the header's own checksum stands, if it has one.
    const HEADER_CHECKSUM: Option<usize>;

    /// Reads the headers of a frame of this family.
    fn parse<P: Packet>(packet: &P) -> Result<Parsed<Self::Addr>, Reason>;

    fn services() -> &'static Services<Self::Addr>;
    fn slots() -> &'static Slots<Self::Addr>;
    fn flows() -> &'static Flows<Self::Addr>;
    fn sockets() -> &'static Sockets<Self::Addr>;

    /// The entry of a frontend.
    #[inline(always)]
    fn service(key: &ServiceKey<Self::Addr>) -> Option<&'static ServiceEntry> {
        // SAFETY: only the agent writes this map. It is not preallocated, so an
        // update brings an entry of its own and the old one stays as it is
        // until every program that may see it has ended.
        unsafe { Self::services().get(key) }
    }

    /// The backend in a slot.
    #[inline(always)]
    fn slot(index: u32) -> Result<&'static Slot<Self::Addr>, Reason> {
        Self::slots().get(index).ok_or(Reason::BadSlot)
    }
}

pub struct V4;
pub struct V6;

impl Family for V4 {
    type Addr = Addr4;
    const ADDRESSES: usize = 12;
    const HEADER_CHECKSUM: Option<usize> = Some(10);

    #[inline(always)]
    fn parse<P: Packet>(packet: &P) -> Result<Parsed<Addr4>, Reason> {
        parse_v4(packet)
    }
    #[inline(always)]
    fn services() -> &'static Services<Addr4> {
        &SERVICES4
    }
    #[inline(always)]
    fn slots() -> &'static Slots<Addr4> {
        &SLOTS4
    }
    #[inline(always)]
    fn flows() -> &'static Flows<Addr4> {
        &FLOWS4
    }
    #[inline(always)]
    fn sockets() -> &'static Sockets<Addr4> {
        &SOCKETS4
    }
}

impl Family for V6 {
    type Addr = Addr6;
    const ADDRESSES: usize = 8;
    const HEADER_CHECKSUM: Option<usize> = None;

    #[inline(always)]
    fn parse<P: Packet>(packet: &P) -> Result<Parsed<Addr6>, Reason> {
        parse_v6(packet)
    }
    #[inline(always)]
    fn services() -> &'static Services<Addr6> {
        &SERVICES6
    }
    #[inline(always)]
    fn slots() -> &'static Slots<Addr6> {
        &SLOTS6
    }
    #[inline(always)]
    fn flows() -> &'static Flows<Addr6> {
        &FLOWS6
    }
    #[inline(always)]
    fn sockets() -> &'static Sockets<Addr6> {
        &SOCKETS6
    }
}

/// Whether this life of the backend goes on.
#[inline(always)]
pub fn is_alive(backend: BackendRef) -> bool {
    BACKENDS.get(backend.id).copied() == Some(backend.generation)
}
