//! The floor in the kernel: programs of our own that only do what no load
//! balancer can leave out (`lb-ebpf/src/floor`), with maps filled by hand.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, Map},
    programs::{
        CgroupAttachMode, CgroupSockAddr, Program, ProgramError, SchedClassifier, TcAttachType,
        Xdp, XdpMode, cgroup_sock_addr::CgroupSockAddrLinkId,
    },
};
use lb_common::{
    Addr4, Addr6, Port,
    flow::Tuple,
    service::{ServiceEntry, ServiceKey, Slot},
};
use lb_tests::{program::load_program, topology::Family};

use crate::paths;

/// What the floor's maps hold, as the programs see it.
#[path = "../../../lb-ebpf/src/floor/shared.rs"]
pub(super) mod shared;

// SAFETY: `repr(C)`, integers only, and no padding between them.
unsafe impl Pod for shared::Frame {}
// SAFETY: as before.
unsafe impl Pod for shared::Way {}

/// To local backends, the stack behind: packets to frontends only.
pub(super) const XDP: &str = "floor_xdp";
/// Both directions, out by the routes.
pub(super) const XDP_FIB: &str = "floor_xdp_fib";
/// As [`XDP`].
pub(super) const TC: &str = "floor_tc";
/// As [`XDP_FIB`].
pub(super) const TC_FIB: &str = "floor_tc_fib";
/// Both directions, past the node's stack as [`Floor::lead`] says.
pub(super) const TC_PEER: &str = "floor_tc_peer";
/// At the socket, for IPv4 and IPv6: with the note that shows the process what
/// it has named, and without it.
pub(super) const CONNECT: [&str; 2] = ["floor_connect4", "floor_connect6"];
pub(super) const CONNECT_PLAIN: [&str; 2] = ["floor_plain4", "floor_plain6"];
/// Headers are read, and that is all.
pub(super) const TC_READ: &str = "floor_read_tc";
/// Nothing, at each hook.
pub(super) const TC_NOTHING: &str = "floor_no_tc";
pub(super) const XDP_NOTHING: &str = "floor_no_xdp";
pub(super) const CONNECT_NOTHING: [&str; 2] = ["floor_no_conn4", "floor_no_conn6"];

/// Sends the packet of `floor_frame`, as its flows.
pub(super) const SOURCE: &str = "floor_source";
/// Take in what arrives.
pub(super) const SINK_XDP: &str = "floor_sink_xdp";
pub(super) const SINK_TC: &str = "floor_sink_tc";

/// The floor's programs, loaded when they are first asked for. What is attached
/// is so until this drops.
pub(super) struct Floor {
    ebpf: Ebpf,
    next_slot: u32,
}

impl Floor {
    /// # Errors
    /// If there is no object, or the kernel refuses its maps.
    pub(super) fn load() -> Result<Self> {
        let path = paths::floor_object();
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let ebpf = EbpfLoader::new().load(&bytes)?;
        Ok(Self { ebpf, next_slot: 0 })
    }

    /// Makes `frontend` lead to `backends`.
    ///
    /// # Errors
    /// If a map is full.
    pub(super) fn serve(
        &mut self,
        protocol: u8,
        frontend: SocketAddr,
        backends: &[SocketAddr],
    ) -> Result<()> {
        let entry = ServiceEntry {
            first_slot: self.next_slot,
            slot_count: u32::try_from(backends.len())?,
            ..ServiceEntry::default()
        };
        for backend in backends {
            self.put_slot(*backend)?;
        }
        let port = Port::from(frontend.port());
        match frontend.ip() {
            IpAddr::V4(addr) => put(
                self.map("floor_svc4")?,
                ServiceKey::new(Addr4::from(addr), port, protocol),
                entry,
            ),
            IpAddr::V6(addr) => put(
                self.map("floor_svc6")?,
                ServiceKey::new(Addr6::from(addr), port, protocol),
                entry,
            ),
        }
    }

    fn put_slot(&mut self, backend: SocketAddr) -> Result<()> {
        let index = self.next_slot;
        self.next_slot += 1;
        let port = Port::from(backend.port());
        match backend.ip() {
            IpAddr::V4(addr) => {
                let addr = Addr4::from(addr);
                let slot = Slot {
                    addr,
                    port,
                    ..Slot::default()
                };
                set(self.map("floor_slot4")?, index, slot)
            }
            IpAddr::V6(addr) => {
                let addr = Addr6::from(addr);
                let slot = Slot {
                    addr,
                    port,
                    ..Slot::default()
                };
                set(self.map("floor_slot6")?, index, slot)
            }
        }
    }

    /// Says where [`TC_PEER`] sends what is for `to`: out of the other end of a
    /// device, or by the device to the neighbour. The unspecified address stands
    /// for all others.
    ///
    /// # Errors
    /// If a map is full.
    pub(super) fn lead(&mut self, to: IpAddr, ifindex: u32, to_peer: bool) -> Result<()> {
        let way = shared::Way {
            ifindex,
            to_peer: to_peer.into(),
        };
        match to {
            IpAddr::V4(addr) => put(self.map("floor_way4")?, Addr4::from(addr), way),
            IpAddr::V6(addr) => put(self.map("floor_way6")?, Addr6::from(addr), way),
        }
    }

    /// Attaches one of the TC programs where packets come in by a device of the
    /// current network namespace.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn attach_tc(&mut self, name: &str, device: &str) -> Result<()> {
        let program: &mut SchedClassifier = self.loaded(name)?.try_into()?;
        program.attach(device, TcAttachType::Ingress)?;
        Ok(())
    }

    /// As [`Self::attach_tc`], and where they go out.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn attach_tc_both(&mut self, name: &str, device: &str) -> Result<()> {
        let program: &mut SchedClassifier = self.loaded(name)?.try_into()?;
        program.attach(device, TcAttachType::Ingress)?;
        program.attach(device, TcAttachType::Egress)?;
        Ok(())
    }

    /// As [`Self::attach_tc`], for XDP in the driver.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn attach_xdp(&mut self, name: &str, device: &str) -> Result<()> {
        let program: &mut Xdp = self.loaded(name)?.try_into()?;
        program.attach(device, XdpMode::Driver)?;
        Ok(())
    }

    /// Attaches one of the programs for `connect()` to a control group, until
    /// [`Self::detach`].
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn attach_connect(
        &mut self,
        name: &str,
        group: &Path,
    ) -> Result<CgroupSockAddrLinkId> {
        let group = fs::File::open(group)?;
        let program: &mut CgroupSockAddr = self.loaded(name)?.try_into()?;
        Ok(program.attach(group, CgroupAttachMode::Single)?)
    }

    /// # Errors
    /// If it was not attached.
    pub(super) fn detach(&mut self, name: &str, link: CgroupSockAddrLinkId) -> Result<()> {
        let program: &mut CgroupSockAddr = self.program(name)?.try_into()?;
        Ok(program.detach(link)?)
    }

    /// Removes every flow of a family.
    ///
    /// # Errors
    /// If the table cannot be read.
    pub(super) fn forget(&mut self, family: Family) -> Result<()> {
        match family {
            Family::V4 => clear::<Tuple<Addr4>, Target<4>>(self.map("floor_flow4")?),
            Family::V6 => clear::<Tuple<Addr6>, Target<16>>(self.map("floor_flow6")?),
        }
    }

    /// A map of the object.
    ///
    /// # Errors
    /// If there is none of that name.
    pub(super) fn map(&mut self, name: &str) -> Result<&mut Map> {
        self.ebpf
            .map_mut(name)
            .with_context(|| format!("no map {name}"))
    }

    /// A program of the object, which the kernel has verified.
    ///
    /// # Errors
    /// If there is none of that name, or it is refused.
    pub(super) fn loaded(&mut self, name: &str) -> Result<&mut Program> {
        let program = self.program(name)?;
        load(program).map_err(|error| anyhow!("{name}: {error:?}"))?;
        Ok(program)
    }

    fn program(&mut self, name: &str) -> Result<&mut Program> {
        self.ebpf
            .program_mut(name)
            .with_context(|| format!("no program {name}"))
    }
}

/// Loads a program that may be loaded already.
pub(super) fn load(program: &mut Program) -> Result<(), ProgramError> {
    match load_program(program) {
        Err(ProgramError::AlreadyLoaded) => Ok(()),
        result => result,
    }
}

/// The programs' `Target`, of which nothing is read here: address, port and
/// which of the two it is.
#[repr(C)]
#[derive(Clone, Copy)]
struct Target<const ADDRESS: usize> {
    addr: [u8; ADDRESS],
    port: [u8; 2],
    is_source: u16,
}

// SAFETY: `repr(C)`, integers only, and no padding between them.
unsafe impl<const ADDRESS: usize> Pod for Target<ADDRESS> {}

fn clear<K: Pod, V: Pod>(map: &mut Map) -> Result<()> {
    let mut map: HashMap<_, K, V> = map.try_into()?;
    let keys: Vec<_> = map.keys().collect::<Result<_, _>>()?;
    for key in keys {
        map.remove(&key)?;
    }
    Ok(())
}

pub(super) fn put<K: Pod, V: Pod>(map: &mut Map, key: K, value: V) -> Result<()> {
    let mut map: HashMap<_, K, V> = map.try_into()?;
    Ok(map.insert(key, value, 0)?)
}

pub(super) fn set<V: Pod>(map: &mut Map, index: u32, value: V) -> Result<()> {
    let mut map: Array<_, V> = map.try_into()?;
    Ok(map.set(index, value, 0)?)
}

pub(super) fn get<V: Pod>(map: &mut Map, index: u32) -> Result<V> {
    let map: Array<_, V> = map.try_into()?;
    Ok(map.get(&index, 0)?)
}
