//! Pin folders of other layouts: what a klb of an earlier or a later version has
//! left in the kernel, whose maps this one cannot read.
//!
//! Its programs go on for the connections that they know, beside this one's, and
//! begin no more. That asks for little to stay the same in all layouts: the names
//! of the maps of frontends begin with `klb_svc`, a program that finds no
//! frontend and no flow leaves a packet to the next program, links are pinned in
//! `links/`, and `klb_count` counts as it does here.

use std::{fs, io, path::Path};

use aya::maps::{Map, MapData, MapInfo, PerCpuArray};
use lb_common::{Hook, Reason, names, reason::counter_index};

use super::{attach, pins::Pins, sys};

/// What all names of maps of frontends begin with.
const FRONTENDS: &str = "klb_svc";

/// What packets are counted under that belong to a flow.
const OF_FLOWS: [Reason; 6] = [
    Reason::Forward,
    Reason::Reply,
    Reason::Socket,
    Reason::Masqueraded,
    Reason::Unmasqueraded,
    Reason::IcmpError,
];

/// The folders beside `own` that a klb of another layout has used.
///
/// # Errors
///
/// If the folder above cannot be read.
pub fn others(own: &Pins) -> io::Result<Vec<Pins>> {
    let Some(above) = own.root().parent() else {
        return Ok(Vec::new());
    };
    let folders = match fs::read_dir(above) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        folders => folders?,
    };
    let mut others = Vec::new();
    for folder in folders {
        let folder = folder?;
        let name = folder.file_name();
        let is_layout = name.to_str().is_some_and(is_layout);
        if is_layout && folder.path() != own.root() {
            others.push(Pins::at(folder.path()));
        }
    }
    Ok(others)
}

/// `v1` and its like.
fn is_layout(name: &str) -> bool {
    let number = name.strip_prefix('v');
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// What a layout is called: the name of its folder.
pub fn name(pins: &Pins) -> String {
    let name = pins.root().file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Removes the frontends, so that no flow begins there any more. Returns how many
/// there were.
pub fn stop_opening(pins: &Pins) -> io::Result<usize> {
    let mut removed = 0;
    for name in pins.pinned()? {
        if name.starts_with(FRONTENDS) {
            removed += clear(&pins.map(&name))?;
        }
    }
    Ok(removed)
}

/// Removes all entries of a hash map of any shape.
fn clear(path: &Path) -> io::Result<usize> {
    let key_size = MapInfo::from_pin(path)
        .map_err(io::Error::other)?
        .key_size();
    sys::clear(sys::open_pin(path)?, key_size as usize)
}

/// How many packets of flows have been translated there; `None` if the counters
/// are of another shape.
pub fn translated(pins: &Pins) -> Option<u64> {
    let data = MapData::from_pin(pins.map(names::COUNTERS)).ok()?;
    let map = Map::from_map_data(data).ok()?;
    let counters: PerCpuArray<_, u64> = map.try_into().ok()?;
    let mut sum = 0_u64;
    for hook in Hook::ALL {
        for reason in OF_FLOWS {
            let counts = counters.get(&counter_index(hook, reason), 0).ok()?;
            sum += counts.iter().sum::<u64>();
        }
    }
    Some(sum)
}

/// Takes it off all hooks, and removes the folder.
pub fn remove(pins: &Pins) -> io::Result<()> {
    attach::detach_everything(pins)?;
    pins.remove_all().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_of_layouts_are_others() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let bpffs = folder.path().join("klb");
        let own = Pins::of_layout(&bpffs, "v2");
        assert!(others(&own).expect("no folder yet").is_empty());
        for name in ["v1", "v2", "v10", "vx", "v", "other"] {
            fs::create_dir_all(bpffs.join(name)).expect("created");
        }
        let mut found: Vec<_> = others(&own).expect("listed").iter().map(name).collect();
        found.sort();
        assert_eq!(found, ["v1", "v10"]);
    }
}
