//! The network namespaces of the node's pods.
//!
//! Which namespaces there are is told by the names in a folder, where container
//! runtimes and `ip netns` keep them, and by processes. One is a pod's if a
//! device in it leads into the node's own: the far end of a veth, or the device
//! below a macvlan. What else is on the machine, another node in namespaces of
//! its own say, is none of this node's.
//!
//! No namespace is held open: one that its pod has left must be able to go.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{self, File},
    io,
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    panic,
    path::{Path, PathBuf},
    thread,
};

use lb_common::node::Device;
use nix::sched::{CloneFlags, setns};
use tracing::debug;

use crate::{
    devices::Listing,
    netlink::{Link, Netlink},
};

/// A pod, as the network sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// The kernel's name for the namespace; `None` before Linux 5.14.
    pub cookie: Option<u64>,
    pub addresses: BTreeSet<IpAddr>,
    /// With which its packets leave.
    pub sources: Device,
}

/// Finds the namespaces of pods.
#[derive(Debug)]
pub struct Namespaces {
    folder: PathBuf,
    /// The node's.
    own: File,
}

/// Device and inode, by which two files that are one namespace are told.
type Identity = (u64, u64);

impl Namespaces {
    /// The calling thread must be in the namespace of the node.
    pub fn open(folder: &Path) -> io::Result<Self> {
        Ok(Self {
            folder: folder.to_owned(),
            own: File::open("/proc/thread-self/ns/net")?,
        })
    }

    /// Every pod.
    pub fn pods(&self) -> Vec<Pod> {
        self.in_pods(|netlink| {
            // Of its devices no more is asked than whether it is a pod's.
            let listing = Listing {
                links: Vec::new(),
                addresses: netlink.addresses()?,
                default_routes: netlink.default_routes()?,
            };
            let addresses = listing.addresses.iter().filter(|address| address.global);
            Ok(Pod {
                cookie: netlink.netns_cookie().ok(),
                addresses: addresses.map(|address| address.addr).collect(),
                sources: listing.own_sources(|_| false),
            })
        })
    }

    /// Does something inside each pod's namespace, with a socket that was opened
    /// there. One where it fails is left out: most often it has just gone.
    pub fn in_pods<T: Send>(&self, work: impl Fn(&Netlink) -> io::Result<T> + Sync) -> Vec<T> {
        // In a thread that ends with it: nothing else must run in there.
        let walk = || self.walk(&work);
        let result = thread::scope(|scope| scope.spawn(walk).join());
        result.unwrap_or_else(|payload| panic::resume_unwind(payload))
    }

    fn walk<T>(&self, work: impl Fn(&Netlink) -> io::Result<T>) -> Vec<T> {
        let mut seen: BTreeSet<Identity> = self.own.metadata().iter().map(identity).collect();
        let mut results = Vec::new();
        for path in self.paths() {
            let result = fs::metadata(&path).and_then(|metadata| {
                if !seen.insert(identity(&metadata)) {
                    return Ok(None);
                }
                enter(&path)?;
                let netlink = Netlink::open()?;
                if self.is_home_of(&netlink.links()?, &netlink)? {
                    work(&netlink).map(Some)
                } else {
                    Ok(None)
                }
            });
            match result {
                Ok(result) => results.extend(result),
                Err(error) => debug!(path = %path.display(), %error, "no network namespace"),
            }
        }
        results
    }

    /// Whether a device leads from a namespace to the node's own.
    fn is_home_of(&self, links: &[Link], netlink: &Netlink) -> io::Result<bool> {
        if links.iter().all(|link| link.leads_to.is_none()) {
            return Ok(false);
        }
        let own = netlink.namespace_id(&self.own)?;
        Ok(own.is_some() && links.iter().any(|link| link.leads_to == own))
    }

    /// Where namespaces may be found; several paths may be of one.
    fn paths(&self) -> Vec<PathBuf> {
        let named = entries(&self.folder);
        let processes = entries(Path::new("/proc")).filter(|path| {
            let name = path.file_name().map(OsStr::as_encoded_bytes);
            name.is_some_and(|name| name.iter().all(u8::is_ascii_digit))
        });
        named
            .chain(processes.map(|process| process.join("ns/net")))
            .collect()
    }
}

/// A cookie as the programs compare it, low word first.
pub const fn words(cookie: u64) -> [u32; 2] {
    [cookie as u32, (cookie >> 32) as u32]
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path()))
}

fn identity(metadata: &fs::Metadata) -> Identity {
    (metadata.dev(), metadata.ino())
}

/// Takes the calling thread there.
fn enter(path: &Path) -> io::Result<()> {
    setns(File::open(path)?, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_own_namespace_is_no_pods() {
        let here = Namespaces::open(Path::new("/proc/self/ns")).expect("a namespace");
        let own = here.own.metadata().expect("metadata");
        let in_folder = fs::metadata("/proc/self/ns/net").expect("metadata");
        assert_eq!(identity(&own), identity(&in_folder));
        assert!(here.paths().contains(&PathBuf::from("/proc/self/ns/net")));
        let cookie = Netlink::open().expect("a socket").netns_cookie().ok();
        assert!(here.pods().iter().all(|pod| pod.cookie != cookie));
    }
}
