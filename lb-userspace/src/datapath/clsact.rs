//! Filters of the `clsact` qdisc, which is how TC programs are attached where
//! the kernel has no tcx (before 6.6).
//!
//! Such a filter is no link: nothing pins it, it stays until it is removed, and
//! it is found again by its priority and handle.

use std::{collections::BTreeSet, io};

use aya::{
    maps::MapInfo,
    programs::{ProgramInfo, loaded_programs},
};

use super::{
    layouts,
    pins::{DeviceHook, Mark, Pins},
};
use crate::netlink::{Filter, Netlink, Side};

/// What the numbers of klb's filters end with, "klb" in ASCII.
const HANDLE: u32 = 0x006b_6c62;
/// The bits that this takes. Those above tell layouts apart.
const HANDLE_BITS: u32 = 24;

/// Number of the filters of a layout. Filters of one priority run one after the
/// other, whatever their numbers.
pub(super) fn handle(pins: &Pins) -> u32 {
    let name = layouts::name(pins);
    let number = name.trim_start_matches('v').parse::<u32>().unwrap_or(0);
    number << HANDLE_BITS | HANDLE
}

impl Side {
    /// The hook, which names the program.
    pub(super) const fn hook(self) -> DeviceHook {
        match self {
            Self::Ingress => DeviceHook::TcIngress,
            Self::Egress => DeviceHook::TcEgress,
        }
    }

    /// Where klb's filter stands among others. A client's packet is translated
    /// before anybody else sees it, and a reply after everybody has: so others
    /// see the addresses of pods only. The kernel gives priorities to filters
    /// without one from 49152 downwards.
    pub(super) const fn priority(self) -> u16 {
        match self {
            Self::Ingress => 1,
            Self::Egress => 60_000,
        }
    }
}

/// Whether a filter is made by klb, of whichever pin folder.
pub(super) fn is_klbs(side: Side, filter: &Filter) -> bool {
    filter.handle & ((1 << HANDLE_BITS) - 1) == HANDLE
        && filter.priority == side.priority()
        && filter.name == side.hook().program()
}

/// Tells which filters belong to one pin folder: those whose program uses a map
/// that is pinned there.
pub(super) struct Owner {
    maps: BTreeSet<u32>,
}

impl Owner {
    pub(super) fn new(pins: &Pins) -> Self {
        let names = pins.pinned().unwrap_or_default();
        let infos = names
            .iter()
            .filter_map(|name| MapInfo::from_pin(pins.map(name)).ok());
        Self {
            maps: infos.map(|info| info.id()).collect(),
        }
    }

    /// The filters of this folder on a device; none on one that has gone.
    pub(super) fn filters(
        &self,
        netlink: &Netlink,
        device: u32,
    ) -> io::Result<Vec<(Side, Filter)>> {
        let mut own = Vec::new();
        for side in Side::ALL {
            let filters = netlink.filters(device, side)?.into_iter();
            own.extend(
                filters
                    .filter(|filter| is_klbs(side, filter) && self.uses_our_maps(filter.program_id))
                    .map(|filter| (side, filter)),
            );
        }
        Ok(own)
    }

    fn uses_our_maps(&self, program: u32) -> bool {
        let info = loaded_programs()
            .filter_map(Result::ok)
            .find(|info| info.id() == program);
        let maps = info.as_ref().map(ProgramInfo::map_ids);
        matches!(maps, Some(Ok(Some(ids))) if ids.iter().any(|id| self.maps.contains(id)))
    }

    /// Removes the filters of this folder from a device, and the qdisc if klb
    /// made it and nobody else uses it.
    pub(super) fn remove(&self, netlink: &Netlink, pins: &Pins, device: u32) -> io::Result<()> {
        let filters = self.filters(netlink, device)?;
        for (side, filter) in &filters {
            netlink.delete_filter(device, *side, filter)?;
        }
        // Without a filter the mark may be of a device that is no more and whose
        // index another device has.
        if !filters.is_empty()
            && pins.marks()?.contains(&(device, Mark::Clsact))
            && is_unused(netlink, device)?
        {
            netlink.delete_clsact(device)?;
        }
        pins.unmark(device, Mark::Clsact)
    }
}

fn is_unused(netlink: &Netlink, device: u32) -> io::Result<bool> {
    for side in Side::ALL {
        if !netlink.filters(device, side)?.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}
