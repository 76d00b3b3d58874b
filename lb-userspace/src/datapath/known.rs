//! The table by which programs know what may be of a flow (`klb_known`), where it
//! does not tell of flows that are there.

use aya::{Ebpf, maps::Map};
use lb_common::{
    known::{KNOWN_BITS, Known},
    names,
};

use super::{
    MapError,
    kernel::{map_error, monotonic_seconds},
    sys,
};

/// Has the programs look for a flow of whatever comes, until all flows that are
/// there now have been seen again or are over.
///
/// # Errors
///
/// If the kernel refuses, which may have written a part.
pub(super) fn believe_all(ebpf: &Ebpf) -> Result<(), MapError> {
    let name = names::KNOWN;
    let Some(Map::Array(map)) = ebpf.map(name) else {
        let name = name.to_owned();
        let source = aya::maps::MapError::InvalidName { name };
        return Err(map_error("open", names::KNOWN, source));
    };
    let now = monotonic_seconds();
    let places: Vec<u32> = (0..1 << KNOWN_BITS).collect();
    let known = vec![Known { to: now, from: now }; places.len()];
    sys::write_many(map.fd(), &places, &known).map_err(|source| MapError {
        operation: "write",
        map: name,
        source,
    })
}
