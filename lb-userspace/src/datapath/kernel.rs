//! The kernel's maps, opened from their pins: for the agent, which fills them,
//! and for the tool, which reads them with or without an agent.

use std::{
    collections::{self, BTreeMap, BTreeSet},
    hash::Hash as Hashed,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, OwnedFd},
};

use aya::{
    Pod,
    maps::{
        Array, HashMap, Map, MapData, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
};
use ipnet::IpNet;
use lb_common::{
    Addr4, Addr6, Address, Hook, Port, Reason,
    flow::{FORWARD, FlowEntry, State, Timeouts, Tuple, UDP, is_from_client},
    names,
    node::{Config, Device, FragmentKey, FragmentPorts, Netns, Network},
    reason::{Effect, counter_index},
    service::{
        Affinity, AffinityKey, BackendRef, SLOT_LOCAL, ServiceEntry, ServiceKey, ServiceMeta, Slot,
        SourceRange, is_living,
    },
    socket::{SOCKET_REVERSE, SocketEntry, SocketKey},
};

use super::{
    Family, FrontendKey, MapError, Maps, SlotValue,
    gather::{self, Batch},
    load::{LoadError, open_map},
    pins::Pins,
    served::ServedPorts,
    sys,
};
use crate::termination::Orphan;

/// A family's address as it stands in the maps.
pub(super) trait MapAddr: Address + Pod + Into<IpAddr> + Hashed {
    /// `None` for an address of the other family.
    fn from_ip(addr: IpAddr) -> Option<Self>;
}

impl MapAddr for Addr4 {
    fn from_ip(addr: IpAddr) -> Option<Self> {
        match addr {
            IpAddr::V4(addr) => Some(addr.into()),
            IpAddr::V6(_) => None,
        }
    }
}

impl MapAddr for Addr6 {
    fn from_ip(addr: IpAddr) -> Option<Self> {
        match addr {
            IpAddr::V4(_) => None,
            IpAddr::V6(addr) => Some(addr.into()),
        }
    }
}

/// The address and port of one end.
pub(super) fn socket_addr<A: MapAddr>(addr: A, port: Port) -> SocketAddr {
    SocketAddr::new(addr.into(), port.get())
}

/// A hash map, with the descriptor by which it is read in bulk.
pub(super) struct Hash<K, V> {
    name: &'static str,
    fd: OwnedFd,
    entries: HashMap<MapData, K, V>,
    max_entries: u32,
    gathered: Batch<K, V>,
}

impl<K: Pod, V: Pod> Hash<K, V> {
    pub(super) fn open(pins: &Pins, name: &'static str) -> Result<Self, LoadError> {
        let (data, fd, max_entries) = open(pins, name)?;
        Ok(Self {
            name,
            fd,
            entries: typed(data, name)?,
            max_entries,
            gathered: Batch::default(),
        })
    }

    pub(super) fn read_all(&self) -> Result<Vec<(K, V)>, MapError> {
        sys::read_all(&self.fd).map_err(|source| MapError {
            operation: "read",
            map: self.name,
            source,
        })
    }

    fn put(&mut self, key: &K, value: &V) -> Result<(), MapError> {
        let result = self.entries.insert(key, value, 0);
        result.map_err(|error| map_error("write", self.name, error))
    }

    fn put_gathered(&self) -> Result<(), MapError> {
        put_many(&self.fd, self.name, &self.gathered)
    }

    fn delete(&mut self, key: &K) -> Result<(), MapError> {
        let result = self.entries.remove(key);
        unless_gone(result.map_err(|error| map_error("delete", self.name, error)))
    }

    fn fill(&self) -> Result<Fill, MapError> {
        let entries = sys::count::<K, V>(&self.fd).map_err(|source| MapError {
            operation: "read",
            map: self.name,
            source,
        })?;
        Ok(Fill {
            map: self.name,
            entries,
            max_entries: self.max_entries,
        })
    }
}

/// The networks of `loadBalancerSourceRanges`, with the map's name for errors.
struct Ranges<A: MapAddr>
where
    SourceRange<A>: Pod,
{
    name: &'static str,
    entries: LpmTrie<MapData, SourceRange<A>, u32>,
    max_entries: u32,
}

impl<A: MapAddr> Ranges<A>
where
    SourceRange<A>: Pod,
{
    fn open(pins: &Pins, name: &'static str) -> Result<Self, LoadError> {
        let (data, _, max_entries) = open(pins, name)?;
        Ok(Self {
            name,
            entries: typed(data, name)?,
            max_entries,
        })
    }

    fn key(service: u32, range: IpNet) -> Option<Key<SourceRange<A>>> {
        let addr = A::from_ip(range.network())?;
        let bits = u32::BITS + u32::from(range.prefix_len());
        Some(Key::new(bits, SourceRange { service, addr }))
    }

    fn read_all(&self) -> Result<BTreeSet<(u32, IpNet)>, MapError> {
        let keys = self.entries.keys().map(|key| {
            let key = key.map_err(|error| map_error("read", self.name, error))?;
            let SourceRange { service, addr } = key.data();
            let bits = key.prefix_len().saturating_sub(u32::BITS);
            let range = IpNet::new(addr.into(), bits as u8);
            Ok(range.ok().map(|range| (service, range)))
        });
        keys.filter_map(Result::transpose).collect()
    }

    fn put(&mut self, service: u32, range: IpNet) -> Result<(), MapError> {
        let key = Self::key(service, range).ok_or_else(|| wrong_family(self.name))?;
        let result = self.entries.insert(&key, 1, 0);
        result.map_err(|error| map_error("write", self.name, error))
    }

    fn delete(&mut self, service: u32, range: IpNet) -> Result<(), MapError> {
        let key = Self::key(service, range).ok_or_else(|| wrong_family(self.name))?;
        unless_gone(
            self.entries
                .remove(&key)
                .map_err(|error| map_error("delete", self.name, error)),
        )
    }

    fn fill(&self) -> Result<Fill, MapError> {
        Ok(Fill {
            map: self.name,
            entries: self.read_all()?.len(),
            max_entries: self.max_entries,
        })
    }
}

/// Deleting what is not there succeeds.
fn unless_gone(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(error) if error.source.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

/// An array, with its name for errors.
pub(super) struct Table<V: Pod> {
    name: &'static str,
    fd: OwnedFd,
    entries: Array<MapData, V>,
    gathered: Batch<u32, V>,
}

impl<V: Pod> Table<V> {
    pub(super) fn open(pins: &Pins, name: &'static str) -> Result<Self, LoadError> {
        let (data, fd, _) = open(pins, name)?;
        Ok(Self {
            name,
            fd,
            entries: typed(data, name)?,
            gathered: Batch::default(),
        })
    }

    pub(super) fn get(&self, index: u32) -> Result<V, MapError> {
        let result = self.entries.get(&index, 0);
        result.map_err(|error| map_error("read", self.name, error))
    }

    fn read_all(&self) -> Result<Vec<(u32, V)>, MapError> {
        sys::read_all(&self.fd).map_err(|source| MapError {
            operation: "read",
            map: self.name,
            source,
        })
    }

    pub(super) fn put(&mut self, index: u32, value: V) -> Result<(), MapError> {
        let result = self.entries.set(index, value, 0);
        result.map_err(|error| map_error("write", self.name, error))
    }

    fn put_gathered(&self) -> Result<(), MapError> {
        let (keys, values) = (self.gathered.keys(), self.gathered.values());
        // An older klb made its arrays otherwise, and they stay.
        match sys::store_many(&self.fd, keys, values) {
            Ok(()) => Ok(()),
            Err(_) => put_many(&self.fd, self.name, &self.gathered),
        }
    }
}

fn put_many<K: Pod, V: Pod>(
    map: &OwnedFd,
    name: &'static str,
    batch: &Batch<K, V>,
) -> Result<(), MapError> {
    sys::write_many(map, batch.keys(), batch.values()).map_err(|source| MapError {
        operation: "write",
        map: name,
        source,
    })
}

fn open(pins: &Pins, name: &'static str) -> Result<(MapData, OwnedFd, u32), LoadError> {
    let data = open_map(pins, name)?;
    let fd = data.fd().as_fd().try_clone_to_owned();
    let fd = fd.map_err(|error| LoadError::Map {
        name,
        source: error.into(),
    })?;
    let info = data
        .info()
        .map_err(|source| LoadError::Map { name, source })?;
    Ok((data, fd, info.max_entries()))
}

/// Gives a map its type, which is refused for keys or values of another size.
pub(super) fn typed<T>(data: MapData, name: &'static str) -> Result<T, LoadError>
where
    T: TryFrom<Map, Error = aya::maps::MapError>,
{
    Map::from_map_data(data)
        .and_then(T::try_from)
        .map_err(|source| LoadError::Map { name, source })
}

pub(super) fn map_error(
    operation: &'static str,
    map: &'static str,
    error: aya::maps::MapError,
) -> MapError {
    let source = match error {
        aya::maps::MapError::SyscallError(error) => error.io_error,
        aya::maps::MapError::KeyNotFound | aya::maps::MapError::ElementNotFound => {
            io::Error::from_raw_os_error(libc::ENOENT)
        }
        error => io::Error::other(error),
    };
    MapError {
        operation,
        map,
        source,
    }
}

/// Names of the maps that each family has.
struct FamilyNames {
    services: &'static str,
    slots: &'static str,
    ranges: &'static str,
    flows: &'static str,
    young: &'static str,
    affinity: &'static str,
    fragments: &'static str,
    sockets: &'static str,
}

const NAMES4: FamilyNames = FamilyNames {
    services: names::SERVICES4,
    slots: names::SLOTS4,
    ranges: names::RANGES4,
    flows: names::FLOWS4,
    young: names::YOUNG4,
    affinity: names::AFFINITY4,
    fragments: names::FRAGMENTS4,
    sockets: names::SOCKETS4,
};

const NAMES6: FamilyNames = FamilyNames {
    services: names::SERVICES6,
    slots: names::SLOTS6,
    ranges: names::RANGES6,
    flows: names::FLOWS6,
    young: names::YOUNG6,
    affinity: names::AFFINITY6,
    fragments: names::FRAGMENTS6,
    sockets: names::SOCKETS6,
};

/// The maps that each family has.
struct FamilyMaps<A: MapAddr>
where
    Slot<A>: Pod,
    SourceRange<A>: Pod,
{
    services: Hash<ServiceKey<A>, ServiceEntry>,
    slots: Table<Slot<A>>,
    ranges: Ranges<A>,
    flows: Hash<Tuple<A>, FlowEntry<A>>,
    young: Hash<Tuple<A>, FlowEntry<A>>,
    affinities: Hash<AffinityKey<A>, Affinity>,
    fragments: Hash<FragmentKey<A>, FragmentPorts>,
    sockets: Hash<SocketKey<A>, SocketEntry<A>>,
}

impl<A: MapAddr> FamilyMaps<A>
where
    ServiceKey<A>: Pod,
    Slot<A>: Pod,
    SourceRange<A>: Pod,
    Tuple<A>: Pod,
    FlowEntry<A>: Pod,
    AffinityKey<A>: Pod,
    FragmentKey<A>: Pod,
    SocketKey<A>: Pod,
    SocketEntry<A>: Pod,
{
    fn open(pins: &Pins, names: &FamilyNames) -> Result<Self, LoadError> {
        Ok(Self {
            services: Hash::open(pins, names.services)?,
            slots: Table::open(pins, names.slots)?,
            ranges: Ranges::open(pins, names.ranges)?,
            flows: Hash::open(pins, names.flows)?,
            young: Hash::open(pins, names.young)?,
            affinities: Hash::open(pins, names.affinity)?,
            fragments: Hash::open(pins, names.fragments)?,
            sockets: Hash::open(pins, names.sockets)?,
        })
    }

    /// How full the maps are that give up their oldest entries for new ones.
    fn fill_of_evicting(&self) -> Result<[Fill; 5], MapError> {
        Ok([
            self.flows.fill()?,
            self.young.fill()?,
            self.affinities.fill()?,
            self.fragments.fill()?,
            self.sockets.fill()?,
        ])
    }

    /// How full those are that only the agent writes; of an array, which always
    /// has all its entries, those in use are counted.
    fn fill_of_services(&self) -> Result<[Fill; 3], MapError> {
        Ok([
            self.services.fill()?,
            self.slots_fill()?,
            self.ranges.fill()?,
        ])
    }

    fn services(&self) -> Result<impl Iterator<Item = (FrontendKey, ServiceEntry)>, MapError> {
        let entries = self.services.read_all()?.into_iter();
        Ok(entries.map(|(key, entry)| (frontend_key(&key), entry)))
    }

    /// The key, or `None` for a frontend of the other family.
    fn service_key(key: FrontendKey) -> Option<ServiceKey<A>> {
        Some(ServiceKey::new(
            A::from_ip(key.addr)?,
            Port::from(key.port),
            key.protocol,
        ))
    }

    fn put_service(
        &mut self,
        key: FrontendKey,
        entry: &ServiceEntry,
        gather: bool,
    ) -> Result<(), MapError> {
        let key = Self::service_key(key).ok_or_else(|| wrong_family(self.services.name))?;
        if gather {
            self.services.gathered.push(key, *entry);
            return Ok(());
        }
        self.services.put(&key, entry)
    }

    fn delete_service(&mut self, key: FrontendKey) -> Result<(), MapError> {
        Self::service_key(key).map_or(Ok(()), |key| self.services.delete(&key))
    }

    fn slot(&self, index: u32) -> Result<SlotValue, MapError> {
        let slot = self.slots.get(index)?;
        Ok(SlotValue {
            addr: socket_addr(slot.addr, slot.port),
            local: slot.flags & SLOT_LOCAL != 0,
            backend: slot.backend,
        })
    }

    fn put_slot(&mut self, index: u32, value: &SlotValue, gather: bool) -> Result<(), MapError> {
        let addr = A::from_ip(value.addr.ip()).ok_or_else(|| wrong_family(self.slots.name))?;
        let slot = Slot {
            addr,
            port: Port::from(value.addr.port()),
            flags: if value.local { SLOT_LOCAL } else { 0 },
            backend: value.backend,
        };
        if gather {
            self.slots.gathered.push(index, slot);
            return Ok(());
        }
        self.slots.put(index, slot)
    }

    /// Who is in the slots of frontends, whether or not it gets new flows.
    fn members(&self, members: &mut BTreeMap<BackendRef, Member>) -> Result<(), MapError> {
        /// Above so many the whole array is read at once.
        const FEW: u32 = 1024;
        let mut ranges = BTreeMap::<(u32, u32), u32>::new();
        for (_, entry) in self.services()? {
            let outer = entry.slot_count.saturating_add(entry.parked.into());
            ranges.insert((entry.first_slot, outer), entry.service);
            let inner = (entry.inner_first_slot, entry.inner_slot_count);
            ranges.entry(inner).or_insert(entry.service);
        }
        let total = ranges
            .keys()
            .fold(0_u32, |sum, (_, n)| sum.saturating_add(*n));
        // An array is read in the order of its indices.
        let all = if total > FEW {
            self.slots.read_all()?
        } else {
            Vec::new()
        };
        for ((first, count), service) in ranges {
            for index in first..first.saturating_add(count) {
                let slot = match all.get(index as usize) {
                    Some((at, slot)) if *at == index => *slot,
                    _ => self.slots.get(index)?,
                };
                if slot.backend.id != 0 {
                    let addr = socket_addr(slot.addr, slot.port);
                    members.insert(slot.backend, Member { service, addr });
                }
            }
        }
        Ok(())
    }

    /// The slots that frontends hold; those of one Service may share them.
    fn slots_fill(&self) -> Result<Fill, MapError> {
        let mut ranges = BTreeMap::<u32, u32>::new();
        for (_, entry) in self.services()? {
            let outer = entry.slot_count.saturating_add(entry.parked.into());
            for (first, count) in [
                (entry.first_slot, outer),
                (entry.inner_first_slot, entry.inner_slot_count),
            ] {
                let longest = ranges.entry(first).or_default();
                *longest = count.max(*longest);
            }
        }
        Ok(Fill {
            map: self.slots.name,
            entries: ranges.values().map(|count| *count as usize).sum(),
            max_entries: self.slots.entries.len(),
        })
    }

    /// The ports of frontends, of backends, and of what flows and sockets lead to.
    fn ports(&self) -> Result<BTreeSet<Port>, MapError> {
        let mut members = BTreeMap::new();
        self.members(&mut members)?;
        let members = members.values().map(|member| member.addr.port().into());
        let frontends = self.services()?.map(|(key, _)| key.port.into());
        let mut ports: BTreeSet<_> = members.chain(frontends).collect();
        // A connection may move from the young while they are read.
        for flows in [&self.young, &self.flows] {
            let flows = flows.read_all()?.into_iter();
            ports.extend(flows.map(|(key, entry)| server_port(&key, entry.direction)));
        }
        let sockets = self.sockets.read_all()?.into_iter();
        ports.extend(sockets.map(|(key, _)| key.port));
        Ok(ports)
    }

    fn flows(&self, now: u32, timeouts: Timeouts) -> Result<impl Iterator<Item = Flow>, MapError> {
        // A connection is in both tables for a while after it was confirmed.
        let mut entries: collections::HashMap<_, _> = self.young.read_all()?.into_iter().collect();
        entries.extend(self.flows.read_all()?);
        Ok(entries
            .into_iter()
            .filter_map(move |(key, entry)| flow(&key, &entry, now, &timeouts)))
    }

    fn clients(&self, now: u32) -> Result<impl Iterator<Item = Client>, MapError> {
        let entries = self.affinities.read_all()?.into_iter();
        Ok(entries.map(move |(key, affinity)| Client {
            client: key.client.into(),
            service: key.service,
            life: affinity.backend,
            idle: now.saturating_sub(affinity.last_used),
        }))
    }

    fn sockets(&self) -> Result<impl Iterator<Item = Socket>, MapError> {
        let entries = self.sockets.read_all()?.into_iter();
        Ok(entries.filter_map(|(key, entry)| socket(&key, &entry)))
    }
}

/// The port of a frontend or backend in a packet whose entry has this direction.
const fn server_port<A>(key: &Tuple<A>, direction: u8) -> Port {
    if is_from_client(direction) {
        key.dst_port
    } else {
        key.src_port
    }
}

fn wrong_family(map: &'static str) -> MapError {
    MapError {
        operation: "write",
        map,
        source: io::Error::new(io::ErrorKind::InvalidInput, "address of the other family"),
    }
}

fn frontend_key<A: MapAddr>(key: &ServiceKey<A>) -> FrontendKey {
    FrontendKey {
        addr: key.addr.into(),
        port: key.port.get(),
        protocol: key.protocol,
    }
}

/// `None` for one without a mask and an address.
fn network<A: MapAddr>(network: Network<A>) -> Option<IpNet> {
    if network.mask.is_zero() && network.addr.is_zero() {
        return None;
    }
    let network = IpNet::with_netmask(network.addr.into(), network.mask.into());
    network.ok().map(|network| network.trunc())
}

/// `None` for a network of the other family.
fn map_network<A: MapAddr>(network: IpNet) -> Option<Network<A>> {
    // That of every address needs one that is not zero.
    let addr = if network.prefix_len() == 0 {
        network.hostmask()
    } else {
        network.network()
    };
    Some(Network {
        addr: A::from_ip(addr)?,
        mask: A::from_ip(network.netmask())?,
    })
}

/// A translated connection or exchange, as its client's direction shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// IP protocol number.
    pub protocol: u8,
    pub client: SocketAddr,
    pub frontend: SocketAddr,
    pub backend: SocketAddr,
    /// Service port, the key of the names.
    pub service: u32,
    /// Which life of the backend it is of.
    pub life: BackendRef,
    pub state: State,
    /// Seconds since the last packet of either direction.
    pub idle: u32,
}

/// `None` for the direction of the replies, and for a flow that is over and
/// only waits for its entry to be used again.
fn flow<A: MapAddr>(
    key: &Tuple<A>,
    entry: &FlowEntry<A>,
    now: u32,
    timeouts: &Timeouts,
) -> Option<Flow> {
    if entry.direction != FORWARD || entry.expired(key.protocol, now, timeouts) {
        return None;
    }
    Some(Flow {
        protocol: key.protocol,
        client: socket_addr(key.src, key.src_port),
        frontend: socket_addr(key.dst, key.dst_port),
        backend: socket_addr(entry.dst, entry.dst_port),
        service: entry.service,
        life: entry.backend,
        state: entry.state(key.protocol),
        idle: now.saturating_sub(entry.last_seen),
    })
}

/// A translation that was made at a socket. The socket may have been closed
/// since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// IP protocol number.
    pub protocol: u8,
    /// The kernel's id of the socket.
    pub cookie: u64,
    pub frontend: SocketAddr,
    pub backend: SocketAddr,
    /// Service port, the key of the names.
    pub service: u32,
    /// Which life of the backend it was given.
    pub life: BackendRef,
}

/// From the entry that leads back from the backend, which TCP and UDP both
/// have.
fn socket<A: MapAddr>(key: &SocketKey<A>, entry: &SocketEntry<A>) -> Option<Socket> {
    let [low, high] = key.cookie;
    (key.direction == SOCKET_REVERSE).then(|| Socket {
        protocol: key.protocol,
        cookie: u64::from(high) << 32 | u64::from(low),
        frontend: socket_addr(entry.addr, entry.port),
        backend: socket_addr(key.addr, key.port),
        service: entry.service,
        life: entry.backend,
    })
}

/// A client that keeps its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    pub client: IpAddr,
    /// Service port, the key of the names.
    pub service: u32,
    /// Which life of the backend it is of.
    pub life: BackendRef,
    /// Seconds since its last new flow.
    pub idle: u32,
}

/// A backend in the slots of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Service port, the key of the names.
    pub service: u32,
    pub addr: SocketAddr,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    pub map: &'static str,
    pub entries: usize,
    pub max_entries: u32,
}

/// How often a hook came to an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter {
    pub hook: Hook,
    pub reason: Reason,
    /// Packets, or calls; summed over all CPUs.
    pub count: u64,
}

impl Counter {
    /// Whether a packet ended here, or a call. A flow without a backend is answered,
    /// and has ended all the same.
    pub fn is_refusal(&self) -> bool {
        is_refusal(self.reason)
    }
}

fn is_refusal(reason: Reason) -> bool {
    let ends = matches!(reason.effect(), Effect::Refuse | Effect::Answer);
    ends && reason != Reason::Echo
}

/// Every map of one pin folder.
pub struct KernelMaps {
    v4: FamilyMaps<Addr4>,
    v6: FamilyMaps<Addr6>,
    backends: Table<u32>,
    metas: Hash<u32, ServiceMeta>,
    /// For who writes frontends and slots: an older klb, whose maps may be read, has
    /// none.
    served: Option<ServedPorts>,
    config: Table<Config>,
    /// As they were set last.
    settings: Option<Config>,
    /// What is put is kept back.
    gathering: Option<Gathering>,
}

#[derive(Debug, Default)]
struct Gathering {
    /// Number of entries that the maps keep back.
    entries: usize,
    /// Why something that was gathered before is not written.
    failure: Option<MapError>,
}

impl KernelMaps {
    /// # Errors
    ///
    /// [`LoadError::Map`] names the map that is missing or of another shape.
    pub fn open(pins: &Pins) -> Result<Self, LoadError> {
        Ok(Self {
            v4: FamilyMaps::open(pins, &NAMES4)?,
            v6: FamilyMaps::open(pins, &NAMES6)?,
            backends: Table::open(pins, names::BACKENDS)?,
            metas: Hash::open(pins, names::META)?,
            served: None,
            config: Table::open(pins, names::CONFIG)?,
            settings: None,
            gathering: None,
        })
    }

    /// Whether an entry that is put is kept back. If so, and if that has become
    /// much, what was kept back before is written.
    fn gathers(&mut self) -> bool {
        let Some(gathering) = &mut self.gathering else {
            return false;
        };
        if gathering.entries >= gather::MANY {
            gathering.entries = 0;
            if let Err(error) = self.write_gathered() {
                self.fail(error);
            }
        }
        if let Some(gathering) = &mut self.gathering {
            gathering.entries += 1;
        }
        true
    }

    /// As [`Self::gathers`], for an entry with a port, which is to be known as
    /// served before the entry is written.
    fn serves(&mut self, port: u16) -> Result<bool, MapError> {
        let gather = self.gathers();
        let served = self.served()?;
        served.add(port.into());
        if !gather {
            served.write()?;
        }
        Ok(gather)
    }

    /// The served ports, which [`Self::learn_served`] has opened.
    fn served(&mut self) -> Result<&mut ServedPorts, MapError> {
        self.served.as_mut().ok_or_else(|| MapError {
            operation: "write",
            map: names::SERVED,
            source: io::Error::other("the maps are open for reading only"),
        })
    }

    /// Opens the served ports, which whoever writes frontends and slots has to. Adds
    /// those of all frontends and backends that are there, and of flows and sockets,
    /// which may have outlived theirs: an older klb wrote no ports.
    ///
    /// Programs that run meanwhile open flows to backends only that are there.
    pub fn learn_served(&mut self, pins: &Pins) -> Result<(), LoadError> {
        let mut served = ServedPorts::open(pins)?;
        for port in self.v4.ports()?.into_iter().chain(self.v6.ports()?) {
            served.add(port);
        }
        served.write()?;
        self.served = Some(served);
        Ok(())
    }

    /// Nothing that is gathered is written any more.
    fn fail(&mut self, error: MapError) {
        if let Some(gathering) = &mut self.gathering {
            gathering.failure.get_or_insert(error);
        }
    }

    /// Nobody who reads meanwhile ever finds an entry that leads to what is not
    /// there.
    fn write_gathered(&mut self) -> Result<(), MapError> {
        let has_failed = self
            .gathering
            .as_ref()
            .is_some_and(|gathering| gathering.failure.is_some());
        let result = if has_failed {
            Ok(())
        } else {
            self.put_gathered()
        };
        self.backends.gathered.clear();
        self.v4.slots.gathered.clear();
        self.v6.slots.gathered.clear();
        self.metas.gathered.clear();
        self.v4.services.gathered.clear();
        self.v6.services.gathered.clear();
        result
    }

    fn put_gathered(&mut self) -> Result<(), MapError> {
        self.served()?.write()?;
        self.backends.put_gathered()?;
        self.v4.slots.put_gathered()?;
        self.v6.slots.put_gathered()?;
        self.metas.put_gathered()?;
        self.v4.services.put_gathered()?;
        self.v6.services.put_gathered()
    }

    /// The settings that the programs go by.
    pub fn config(&self) -> Result<Config, MapError> {
        self.config.get(0)
    }

    /// Changes the settings, also while programs run.
    pub fn set_config(&mut self, config: &Config) -> Result<(), MapError> {
        self.config.put(0, *config)?;
        self.settings = Some(*config);
        Ok(())
    }

    /// The flows that packets are translated by.
    pub fn flows(&self) -> Result<Vec<Flow>, MapError> {
        let now = monotonic_seconds();
        let timeouts = self.config()?.timeouts;
        let v4 = self.v4.flows(now, timeouts)?;
        Ok(v4.chain(self.v6.flows(now, timeouts)?).collect())
    }

    /// The backends of all Services, those included that get no new flows.
    pub fn members(&self) -> Result<BTreeMap<BackendRef, Member>, MapError> {
        let mut members = BTreeMap::new();
        self.v4.members(&mut members)?;
        self.v6.members(&mut members)?;
        Ok(members)
    }

    /// UDP sockets that were given a backend which has gone.
    pub fn orphans(&self) -> Result<BTreeSet<Orphan>, MapError> {
        let mut sockets = self.sockets()?;
        sockets.retain(|socket| socket.protocol == UDP);
        // Of the many backends that there may be, few are named.
        let named: BTreeSet<_> = sockets.iter().map(|socket| socket.life.id).collect();
        let generations = named.into_iter().map(|id| Ok((id, self.backends.get(id)?)));
        let generations: BTreeMap<_, _> = generations.collect::<Result<_, MapError>>()?;
        let orphans = sockets
            .into_iter()
            .filter(|socket| generations.get(&socket.life.id) != Some(&socket.life.generation));
        Ok(orphans
            .map(|socket| Orphan {
                cookie: socket.cookie,
                backend: socket.backend,
            })
            .collect())
    }

    /// The translations that were made at sockets.
    pub fn sockets(&self) -> Result<Vec<Socket>, MapError> {
        Ok(self.v4.sockets()?.chain(self.v6.sockets()?).collect())
    }

    /// The clients of Services with affinity, also those that keep nothing any
    /// more.
    pub fn clients(&self) -> Result<Vec<Client>, MapError> {
        let now = monotonic_seconds();
        Ok(self.v4.clients(now)?.chain(self.v6.clients(now)?).collect())
    }

    /// How full the maps are.
    pub fn fill(&self) -> Result<Vec<Fill>, MapError> {
        let mut fill = self.fill_of_services()?;
        fill.extend(self.fill_of_evicting()?);
        fill.sort_by_key(|fill| names::MAPS.iter().position(|map| *map == fill.map));
        Ok(fill)
    }

    /// How full those maps are that give up their oldest entries for new ones.
    /// Takes as long as they are full.
    pub fn fill_of_evicting(&self) -> Result<Vec<Fill>, MapError> {
        let mut fill = Vec::from(self.v4.fill_of_evicting()?);
        fill.extend(self.v6.fill_of_evicting()?);
        Ok(fill)
    }

    /// How full those maps are that only the agent writes.
    pub fn fill_of_services(&self) -> Result<Vec<Fill>, MapError> {
        let backends = Fill {
            map: self.backends.name,
            entries: self
                .backends()?
                .values()
                .filter(|&&generation| is_living(generation))
                .count(),
            max_entries: self.backend_capacity(),
        };
        let mut fill = vec![backends, self.metas.fill()?];
        fill.extend(self.v4.fill_of_services()?);
        fill.extend(self.v6.fill_of_services()?);
        Ok(fill)
    }
}

/// Seconds of the clock that flows are stamped with.
pub(super) fn monotonic_seconds() -> u32 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |now| now.tv_sec().cast_unsigned() as u32)
}

/// A hash map that is written as a whole; by itself, since a task of its own
/// owns it.
pub struct WholeTable<K, V> {
    entries: Hash<K, V>,
    /// As it was written last.
    written: Option<BTreeMap<K, V>>,
}

/// What the programs know of devices, by index.
pub type DeviceTable = WholeTable<u32, Device>;

/// What the programs know of pods, by the cookie of their network namespace.
pub type NetnsTable = WholeTable<[u32; 2], Netns>;

impl DeviceTable {
    pub fn open(pins: &Pins) -> Result<Self, LoadError> {
        let entries = Hash::open(pins, names::DEVICES)?;
        let written = None;
        Ok(Self { entries, written })
    }
}

impl NetnsTable {
    pub fn open(pins: &Pins) -> Result<Self, LoadError> {
        let entries = Hash::open(pins, names::NETNS)?;
        let written = None;
        Ok(Self { entries, written })
    }
}

impl<K: Pod + Ord, V: Pod + PartialEq> WholeTable<K, V> {
    /// What is in it.
    pub fn read(&self) -> Result<BTreeMap<K, V>, MapError> {
        Ok(self.entries.read_all()?.into_iter().collect())
    }

    /// Makes the table this one, by the fewest writes. Returns of how many
    /// entries somebody else had changed what was written before.
    pub fn write(&mut self, wanted: &BTreeMap<K, V>) -> Result<u64, MapError> {
        let there = self.read()?;
        let written = self.written.take();
        let strange = written.map_or(0, |written| differences(&written, &there));
        for (key, value) in wanted {
            if there.get(key) != Some(value) {
                self.entries.put(key, value)?;
            }
        }
        for key in there.keys().filter(|key| !wanted.contains_key(key)) {
            self.entries.delete(key)?;
        }
        self.written = Some(wanted.clone());
        Ok(strange)
    }

    /// Name of the map.
    pub const fn name(&self) -> &'static str {
        self.entries.name
    }
}

/// Number of keys that have not the same value in both.
fn differences<K: Ord, V: PartialEq>(one: &BTreeMap<K, V>, other: &BTreeMap<K, V>) -> u64 {
    let keys: BTreeSet<_> = one.keys().chain(other.keys()).collect();
    let differ = keys
        .into_iter()
        .filter(|key| one.get(key) != other.get(key));
    differ.count() as u64
}

/// The counters of one pin folder; by themselves, since the metrics read them
/// while the agent's task owns the maps.
pub struct Counters {
    counters: PerCpuArray<MapData, u64>,
}

impl Counters {
    pub fn open(pins: &Pins) -> Result<Self, LoadError> {
        let data = open_map(pins, names::COUNTERS)?;
        Ok(Self {
            counters: typed(data, names::COUNTERS)?,
        })
    }

    /// Every hook and reason, those never counted included.
    pub fn read(&self) -> Result<Vec<Counter>, MapError> {
        self.read_those(|_| true)
    }

    /// Every hook and those reasons for which a packet ends, or a call.
    pub fn read_refusals(&self) -> Result<Vec<Counter>, MapError> {
        self.read_those(is_refusal)
    }

    fn read_those(&self, is_one: impl Fn(Reason) -> bool) -> Result<Vec<Counter>, MapError> {
        let reasons: Vec<_> = Reason::ALL
            .iter()
            .filter(|reason| is_one(**reason))
            .collect();
        let pairs = Hook::ALL
            .into_iter()
            .flat_map(|hook| reasons.iter().map(move |reason| (hook, **reason)));
        let counters = pairs.map(|(hook, reason)| {
            let values = self.counters.get(&counter_index(hook, reason), 0);
            let values = values.map_err(|error| map_error("read", names::COUNTERS, error))?;
            Ok(Counter {
                hook,
                reason,
                count: values.iter().sum(),
            })
        });
        counters.collect()
    }
}

impl Maps for KernelMaps {
    fn services(&self) -> Result<BTreeMap<FrontendKey, ServiceEntry>, MapError> {
        Ok(self.v4.services()?.chain(self.v6.services()?).collect())
    }

    fn put_service(&mut self, key: FrontendKey, entry: &ServiceEntry) -> Result<(), MapError> {
        let gather = self.serves(key.port)?;
        match Family::of(key.addr) {
            Family::V4 => self.v4.put_service(key, entry, gather),
            Family::V6 => self.v6.put_service(key, entry, gather),
        }
    }

    fn delete_service(&mut self, key: FrontendKey) -> Result<(), MapError> {
        match Family::of(key.addr) {
            Family::V4 => self.v4.delete_service(key),
            Family::V6 => self.v6.delete_service(key),
        }
    }

    fn slot_capacity(&self, family: Family) -> u32 {
        match family {
            Family::V4 => self.v4.slots.entries.len(),
            Family::V6 => self.v6.slots.entries.len(),
        }
    }

    fn slot(&self, family: Family, index: u32) -> Result<SlotValue, MapError> {
        match family {
            Family::V4 => self.v4.slot(index),
            Family::V6 => self.v6.slot(index),
        }
    }

    fn put_slot(&mut self, family: Family, index: u32, value: &SlotValue) -> Result<(), MapError> {
        let gather = self.serves(value.addr.port())?;
        match family {
            Family::V4 => self.v4.put_slot(index, value, gather),
            Family::V6 => self.v6.put_slot(index, value, gather),
        }
    }

    fn backends(&self) -> Result<BTreeMap<u32, u32>, MapError> {
        let entries = self.backends.read_all()?;
        Ok(entries
            .into_iter()
            .filter(|(_, generation)| *generation != 0)
            .collect())
    }

    fn backend_capacity(&self) -> u32 {
        self.backends.entries.len()
    }

    fn put_backend(&mut self, id: u32, generation: u32) -> Result<(), MapError> {
        if self.gathers() {
            self.backends.gathered.push(id, generation);
            return Ok(());
        }
        self.backends.put(id, generation)
    }

    fn metas(&self) -> Result<BTreeMap<u32, ServiceMeta>, MapError> {
        Ok(self.metas.read_all()?.into_iter().collect())
    }

    fn put_meta(&mut self, service: u32, meta: &ServiceMeta) -> Result<(), MapError> {
        if self.gathers() {
            self.metas.gathered.push(service, *meta);
            return Ok(());
        }
        self.metas.put(&service, meta)
    }

    fn delete_meta(&mut self, service: u32) -> Result<(), MapError> {
        self.metas.delete(&service)
    }

    fn ranges(&self) -> Result<BTreeSet<(u32, IpNet)>, MapError> {
        let mut ranges = self.v4.ranges.read_all()?;
        ranges.extend(self.v6.ranges.read_all()?);
        Ok(ranges)
    }

    fn put_range(&mut self, service: u32, range: IpNet) -> Result<(), MapError> {
        match range {
            IpNet::V4(_) => self.v4.ranges.put(service, range),
            IpNet::V6(_) => self.v6.ranges.put(service, range),
        }
    }

    fn delete_range(&mut self, service: u32, range: IpNet) -> Result<(), MapError> {
        match range {
            IpNet::V4(_) => self.v4.ranges.delete(service, range),
            IpNet::V6(_) => self.v6.ranges.delete(service, range),
        }
    }

    fn cluster_network(&self, family: Family) -> Result<Option<IpNet>, MapError> {
        let config = self.config()?;
        Ok(match family {
            Family::V4 => network(config.cluster_net4),
            Family::V6 => network(config.cluster_net6),
        })
    }

    fn put_cluster_network(&mut self, network: IpNet) -> Result<(), MapError> {
        let mut config = self.config()?;
        if let Some(network) = map_network(network) {
            config.cluster_net4 = network;
        }
        if let Some(network) = map_network(network) {
            config.cluster_net6 = network;
        }
        self.config.put(0, config)
    }

    fn mend_settings(&mut self) -> Result<bool, MapError> {
        let (found, Some(settings)) = (self.config()?, self.settings) else {
            return Ok(false);
        };
        let wanted = Config {
            cluster_net4: found.cluster_net4,
            cluster_net6: found.cluster_net6,
            ..settings
        };
        if found != wanted {
            self.config.put(0, wanted)?;
        }
        Ok(found != wanted)
    }

    fn mend_served(&mut self) -> Result<bool, MapError> {
        self.served()?.mend()
    }

    fn gather(&mut self) {
        self.gathering = Some(Gathering::default());
    }

    fn flush(&mut self) -> Result<(), MapError> {
        let result = self.write_gathered();
        self.backends.gathered = Batch::default();
        self.v4.slots.gathered = Batch::default();
        self.v6.slots.gathered = Batch::default();
        self.metas.gathered = Batch::default();
        self.v4.services.gathered = Batch::default();
        self.v6.services.gathered = Batch::default();
        let gathering = self.gathering.take().unwrap_or_default();
        gathering.failure.map_or(result, Err)
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{
        flow::{REPLY, UDP, seen},
        service::BackendRef,
        socket::SOCKET_FORWARD,
    };

    use super::*;
    use crate::errors::Chain;

    fn addr(text: &str) -> Addr4 {
        Addr4::from_ip(text.parse().expect("address")).expect("IPv4")
    }

    fn entry(direction: u8, last_seen: u32) -> FlowEntry<Addr4> {
        FlowEntry {
            src: addr("10.0.0.1"),
            dst: addr("10.244.0.5"),
            src_port: Port::from(40000),
            dst_port: Port::from(53),
            direction,
            seen: seen::DATA,
            seen_peer: 0,
            flags: 0,
            service: 7,
            backend: BackendRef::default(),
            isn: 0,
            syn_ack: 0,
            last_seen,
            edge: 2,
        }
    }

    #[test]
    fn a_flow_is_shown_from_its_clients_side_while_it_lives() {
        let key = Tuple::new(
            addr("10.0.0.1"),
            addr("10.96.0.10"),
            Port::from(40000),
            Port::from(53),
            UDP,
        );
        let shown = flow(&key, &entry(FORWARD, 100), 105, &State::TIMEOUTS).expect("living");
        assert_eq!(shown.client.to_string(), "10.0.0.1:40000");
        assert_eq!(shown.frontend.to_string(), "10.96.0.10:53");
        assert_eq!(shown.backend.to_string(), "10.244.0.5:53");
        assert_eq!(
            (shown.service, shown.idle, shown.state),
            (7, 5, State::Unreplied)
        );
        assert_eq!(flow(&key, &entry(REPLY, 100), 105, &State::TIMEOUTS), None);
        assert_eq!(
            flow(&key, &entry(FORWARD, 100), 1000, &State::TIMEOUTS),
            None
        );
    }

    #[test]
    fn a_socket_is_shown_once() {
        let key = |direction| SocketKey {
            cookie: [2, 1],
            addr: addr("10.244.0.5"),
            port: Port::from(53),
            protocol: UDP,
            direction,
        };
        let entry = SocketEntry {
            addr: addr("10.96.0.10"),
            port: Port::from(53),
            pad: 0,
            service: 7,
            backend: BackendRef::default(),
        };
        let shown = socket(&key(SOCKET_REVERSE), &entry).expect("shown");
        assert_eq!(shown.cookie, 0x1_0000_0002);
        assert_eq!(shown.frontend.to_string(), "10.96.0.10:53");
        assert_eq!(shown.backend.to_string(), "10.244.0.5:53");
        assert_eq!(socket(&key(SOCKET_FORWARD), &entry), None);
    }

    #[test]
    fn networks_survive_their_map() {
        for text in [
            "10.96.0.0/12",
            "10.96.0.1/32",
            "fd00:10:96::/112",
            "0.0.0.0/0",
            "::/0",
        ] {
            let expected: IpNet = text.parse().expect("a network");
            let (v4, v6) = (
                map_network::<Addr4>(expected),
                map_network::<Addr6>(expected),
            );
            assert!(v4.is_some() != v6.is_some(), "of one family");
            let found = v4.and_then(network).or(v6.and_then(network));
            assert_eq!(found, Some(expected));
        }
        assert_eq!(network(Network::<Addr4>::default()), None);
    }

    #[test]
    fn a_full_map_is_recognised_behind_ayas_errors() {
        let error = |number| {
            let io_error = io::Error::from_raw_os_error(number);
            let call = "bpf_map_update_elem";
            aya::maps::MapError::SyscallError(aya::sys::SyscallError { call, io_error })
        };
        let full = map_error("write", names::META, error(libc::E2BIG));
        assert!(full.is_full());
        let text = Chain(&full).to_string();
        assert!(
            text.starts_with("write klb_meta: the map is full: "),
            "{text}"
        );
        assert_eq!(text.matches("os error").count(), 1, "{text}");
        assert!(!map_error("write", names::META, error(libc::EPERM)).is_full());
    }
}
