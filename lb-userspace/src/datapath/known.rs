//! The tables by which programs know what may be of a flow (`klb_known`) and among the
//! young (`klb_rare`), where they do not tell of flows that are there.

use aya::{Ebpf, Pod, maps::Map};
use lb_common::{
    known::{KNOWN_BITS, Known},
    names,
    node::RARE_BITS,
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
    let now = monotonic_seconds();
    fill(ebpf, names::KNOWN, KNOWN_BITS, Known { to: now, from: now })
}

/// Has the programs look for a new connection among the young as well, where those of
/// a klb that did not note what it had put there may be: until these are confirmed or
/// over. Whatever else is rare may cost a lookup in vain for as long.
///
/// # Errors
///
/// As [`believe_all`].
pub(super) fn believe_in_young(ebpf: &Ebpf) -> Result<(), MapError> {
    fill(ebpf, names::RARE, RARE_BITS, monotonic_seconds())
}

/// Makes all entries of an array the same; `bits` is the binary logarithm of their
/// number.
fn fill<V: Pod>(ebpf: &Ebpf, name: &'static str, bits: u32, value: V) -> Result<(), MapError> {
    let Some(Map::Array(map)) = ebpf.map(name) else {
        let source = aya::maps::MapError::InvalidName {
            name: name.to_owned(),
        };
        return Err(map_error("open", name, source));
    };
    let places: Vec<u32> = (0..1 << bits).collect();
    let values = vec![value; places.len()];
    sys::write_many(map.fd(), &places, &values).map_err(|source| MapError {
        operation: "write",
        map: name,
        source,
    })
}
