//! What the kernel says about devices, addresses, routes and TC filters, and
//! when it changes.
//!
//! Only the few attributes that klb uses are read. The crate that knows all of
//! rtnetlink refuses a whole message for one attribute that a newer kernel
//! writes in another way; a device that klb then does not see would go without
//! its programs.

mod frames;
mod route;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::pending,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd as _},
};

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer,
    NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
    NlaBuffer, NlasIterator,
};
use netlink_sys::{
    Socket,
    protocols::{NETLINK_GENERIC, NETLINK_ROUTE},
};
use tokio::io::{Interest, unix::AsyncFd};

pub use self::{
    frames::FrameTakers,
    route::{Route, Transit},
};

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub loopback: bool,
    /// Its frames have Ethernet headers.
    pub ethernet: bool,
    /// What makes it: `veth`, `vxlan`, `bond` and so on; `None` for hardware.
    pub kind: Option<String>,
    /// The XDP program on the device, if there is one.
    pub xdp: Option<Xdp>,
    /// The network namespace of the device's other end, or of the device below
    /// it; `None` if it is this one.
    pub leads_to: Option<NamespaceId>,
}

/// Names a network namespace inside another one.
pub type NamespaceId = i32;

/// An XDP program on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xdp {
    pub native: bool,
    pub program_id: u32,
}

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// Index of the device.
    pub device: u32,
    pub addr: IpAddr,
    /// Reachable from elsewhere: not of link or host scope.
    pub global: bool,
    /// Bits of `IFA_F_*`.
    pub flags: u32,
}

/// A `bpf` filter of a `clsact` qdisc.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    pub handle: u32,
    pub priority: u16,
    /// The filter's name: that of its program, or what its owner chose.
    pub name: String,
    /// 0 for filters of other kinds than `bpf`.
    pub program_id: u32,
}

/// The two sides of a `clsact` qdisc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Ingress,
    Egress,
}

impl Side {
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// `tcm_parent` of filters on this side: `TC_H_CLSACT` and
    /// `TC_H_MIN_INGRESS` or `TC_H_MIN_EGRESS`.
    const fn parent(self) -> u32 {
        match self {
            Self::Ingress => 0xffff_fff2,
            Self::Egress => 0xffff_fff3,
        }
    }
}

/// Asks the kernel of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
}

impl Netlink {
    pub fn open() -> io::Result<Self> {
        Self::of_protocol(NETLINK_ROUTE)
    }

    /// For other questions than those of this file.
    pub(crate) fn of_protocol(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        Ok(Self { socket })
    }

    /// The cookie of the network namespace: its name for as long as the system
    /// runs.
    ///
    /// # Errors
    ///
    /// `ENOPROTOOPT` before Linux 5.14.
    pub fn netns_cookie(&self) -> io::Result<u64> {
        /// Not in the libc crate.
        const SO_NETNS_COOKIE: libc::c_int = 71;
        let mut cookie = 0_u64;
        let mut size = size_of::<u64>() as libc::socklen_t;
        // SAFETY: the descriptor is open, and number and size live through the
        // call.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut size,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(cookie)
    }

    /// What another network namespace is called here, if it is called anything.
    pub fn namespace_id(&self, namespace: impl AsFd) -> io::Result<Option<NamespaceId>> {
        const NETNSA_NSID: u16 = 1;
        const NETNSA_FD: u16 = 3;
        // `struct rtgenmsg`, padded, and one attribute.
        let mut body = vec![0; 4];
        body.extend(8_u16.to_ne_bytes());
        body.extend(NETNSA_FD.to_ne_bytes());
        body.extend(namespace.as_fd().as_raw_fd().to_ne_bytes());
        let replies = self.request(libc::RTM_GETNSID, NLM_F_ACK, &body)?;
        let mut found = replies.iter().flat_map(|reply| attributes(reply, 4));
        let found = found.find(|attribute| attribute.kind() == NETNSA_NSID);
        let id = found.and_then(|attribute| word(attribute.value(), 0));
        Ok(id.map(u32::cast_signed).filter(|id| *id >= 0))
    }

    /// Every device.
    pub fn links(&self) -> io::Result<Vec<Link>> {
        const IFLA_EXT_MASK: u16 = 29;
        const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;
        // `struct ifinfomsg`, all zero for every device, and one attribute.
        let mut body = vec![0; 16];
        body.extend(8_u16.to_ne_bytes());
        body.extend(IFLA_EXT_MASK.to_ne_bytes());
        body.extend(RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
        let replies = self.dump(libc::RTM_GETLINK, &body)?;
        Ok(replies
            .iter()
            .filter_map(|reply| parse_link(reply))
            .collect())
    }

    /// The MTU of every device, by index.
    pub fn mtus(&self) -> io::Result<BTreeMap<u32, u32>> {
        // `struct ifinfomsg`, all zero for every device.
        let replies = self.dump(libc::RTM_GETLINK, &[0; 16])?;
        let mtus = replies.iter().filter_map(|reply| {
            let mut attributes = attributes(reply, 16);
            let mtu = attributes.find(|attribute| attribute.kind() == libc::IFLA_MTU)?;
            Some((word(reply, 4)?, word(mtu.value(), 0)?))
        });
        Ok(mtus.collect())
    }

    /// The device that each port belongs to, such as a bridge, by index.
    pub fn masters(&self) -> io::Result<BTreeMap<u32, u32>> {
        // `struct ifinfomsg`, all zero for every device.
        let replies = self.dump(libc::RTM_GETLINK, &[0; 16])?;
        let masters = replies.iter().filter_map(|reply| {
            let mut attributes = attributes(reply, 16);
            let master = attributes.find(|attribute| attribute.kind() == libc::IFLA_MASTER)?;
            Some((word(reply, 4)?, word(master.value(), 0)?))
        });
        Ok(masters.collect())
    }

    /// The device that each VLAN and its like is on, by index, where both are in
    /// this network namespace.
    pub fn lower(&self) -> io::Result<BTreeMap<u32, u32>> {
        // `struct ifinfomsg`, all zero for every device.
        let replies = self.dump(libc::RTM_GETLINK, &[0; 16])?;
        let lower = replies.iter().filter_map(|reply| {
            let field = |kind| attributes(reply, 16).find(|attribute| attribute.kind() == kind);
            let lower = field(libc::IFLA_LINK)?;
            let is_here = field(libc::IFLA_LINK_NETNSID).is_none();
            is_here.then_some((word(reply, 4)?, word(lower.value(), 0)?))
        });
        Ok(lower.collect())
    }

    /// Every address of every device.
    pub fn addresses(&self) -> io::Result<Vec<Address>> {
        // `struct ifaddrmsg`, all zero for every family.
        let replies = self.dump(libc::RTM_GETADDR, &[0; 8])?;
        Ok(replies
            .iter()
            .filter_map(|reply| parse_address(reply))
            .collect())
    }

    /// Indices of the devices that a default route of the main table leads to,
    /// in either family.
    pub fn default_routes(&self) -> io::Result<BTreeSet<u32>> {
        // `struct rtmsg`, all zero for every family and table.
        let replies = self.dump(libc::RTM_GETROUTE, &[0; 12])?;
        Ok(replies
            .iter()
            .flat_map(|reply| default_route_devices(reply))
            .collect())
    }

    /// The filters on one side of a device's `clsact` qdisc; none if there is no
    /// such qdisc or device.
    pub fn filters(&self, device: u32, side: Side) -> io::Result<Vec<Filter>> {
        let body = tcmsg(device, 0, side.parent());
        let replies = self.dump(libc::RTM_GETTFILTER, &body)?;
        Ok(replies
            .iter()
            .filter_map(|reply| parse_filter(reply))
            .collect())
    }

    /// Removes a device.
    pub fn delete_link(&self, device: u32) -> io::Result<()> {
        // `struct ifinfomsg`, with the index in it.
        let mut body = vec![0; 4];
        body.extend(device.to_ne_bytes());
        body.resize(16, 0);
        self.request(libc::RTM_DELLINK, NLM_F_ACK, &body).map(drop)
    }

    /// Removes a device's `clsact` qdisc, with all its filters.
    pub fn delete_clsact(&self, device: u32) -> io::Result<()> {
        const TC_H_CLSACT: u32 = 0xffff_fff1;
        const HANDLE: u32 = 0xffff_0000;
        let body = tcmsg(device, HANDLE, TC_H_CLSACT);
        self.request(libc::RTM_DELQDISC, NLM_F_ACK, &body).map(drop)
    }

    /// Removes a filter from one side of a device's `clsact` qdisc.
    pub fn delete_filter(&self, device: u32, side: Side, filter: &Filter) -> io::Result<()> {
        let mut body = tcmsg(device, filter.handle, side.parent());
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        let info = u32::from(filter.priority) << 16 | u32::from(protocol);
        body.truncate(16);
        body.extend(info.to_ne_bytes());
        self.request(libc::RTM_DELTFILTER, NLM_F_ACK, &body)
            .map(drop)
    }

    /// Asks for a listing; once more if it changed while it was read.
    pub(crate) fn dump(&self, kind: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        const ATTEMPTS: usize = 8;
        for _ in 0..ATTEMPTS {
            match self.request(kind, NLM_F_DUMP, body) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
        Err(io::Error::other(
            "the kernel's listing changes faster than it can be read",
        ))
    }

    /// Sends a request and collects the bodies of the replies.
    ///
    /// # Errors
    ///
    /// What the kernel answers; `Interrupted` for a listing that changed.
    pub(crate) fn request(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let payload = NetlinkPayload::from(Body {
            kind,
            bytes: body.to_vec(),
        });
        let mut request = NetlinkMessage::new(header, payload);
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut replies = Vec::new();
        let mut interrupted = false;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for message in messages(&datagram) {
                let (header, payload) = message?.into_parts();
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                match payload {
                    NetlinkPayload::InnerMessage(body) => replies.push(body.bytes),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Done(_) if interrupted => {
                        return Err(io::ErrorKind::Interrupted.into());
                    }
                    NetlinkPayload::Done(_) | NetlinkPayload::Error(_) => return Ok(replies),
                    _ => {}
                }
            }
        }
    }
}

/// What has changed since it was last asked.
#[expect(
    clippy::struct_excessive_bools,
    reason = "any of them may be set with any other"
)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub links: bool,
    pub addresses: bool,
    pub default_routes: bool,
    /// A qdisc or filter was removed.
    pub filters: bool,
    /// Other devices than before take frames from XDP.
    pub frames: bool,
}

impl Changes {
    const ALL: Self = Self {
        links: true,
        addresses: true,
        default_routes: true,
        filters: true,
        frames: true,
    };

    const fn any(self) -> bool {
        self.links || self.addresses || self.default_routes || self.filters || self.frames
    }
}

/// Tells when something changes.
///
/// It tells *that*, and [`Netlink`] tells what is there now: so a message that
/// was lost, as happens when many come at once, costs a listing and no more.
#[derive(Debug)]
pub struct Monitor {
    socket: AsyncFd<Socket>,
    /// Is told of devices and frames.
    frames: Option<AsyncFd<Socket>>,
}

impl Monitor {
    /// Every change after this call is told; of which devices take frames if the
    /// kernel tells at all.
    pub fn open(frames: Option<&FrameTakers>) -> io::Result<Self> {
        let mut monitor = Self::with(&[
            libc::RTNLGRP_LINK,
            libc::RTNLGRP_IPV4_IFADDR,
            libc::RTNLGRP_IPV6_IFADDR,
            libc::RTNLGRP_IPV4_ROUTE,
            libc::RTNLGRP_IPV6_ROUTE,
            libc::RTNLGRP_TC,
        ])?;
        monitor.frames = frames
            .map(|frames| listen(NETLINK_GENERIC, &[frames.group]))
            .transpose()?;
        Ok(monitor)
    }

    /// Of devices and addresses only, but also of those in the network
    /// namespaces that devices of this one lead to.
    pub fn open_beyond() -> io::Result<Self> {
        let monitor = Self::with(&[
            libc::RTNLGRP_LINK,
            libc::RTNLGRP_IPV4_IFADDR,
            libc::RTNLGRP_IPV6_IFADDR,
        ])?;
        monitor.socket.get_ref().set_listen_all_namespaces(true)?;
        Ok(monitor)
    }

    fn with(groups: &[u32]) -> io::Result<Self> {
        Ok(Self {
            socket: listen(NETLINK_ROUTE, groups)?,
            frames: None,
        })
    }

    /// Forgets the changes that have come, for they will be seen anyway.
    pub fn forget(&self) -> io::Result<()> {
        drain(self.socket.get_ref()).map(drop)
    }

    /// Waits for a change, and takes all that have come.
    ///
    /// Dropping the future loses no change.
    pub async fn changed(&self) -> io::Result<Changes> {
        loop {
            let changes = tokio::select! {
                changes = told(&self.socket) => changes?,
                changes = told_of_frames(self.frames.as_ref()) => changes?,
            };
            if changes.any() {
                return Ok(changes);
            }
        }
    }
}

/// A socket that is told what these groups are told.
fn listen(protocol: isize, groups: &[u32]) -> io::Result<AsyncFd<Socket>> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.set_non_blocking(true)?;
    for group in groups {
        socket.add_membership(*group)?;
    }
    // SAFETY: the socket owns its descriptor, and keeps it as long as the
    // registration that owns the socket.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
}

/// Waits for messages, and takes all that have come.
async fn told(socket: &AsyncFd<Socket>) -> io::Result<Changes> {
    let mut guard = socket.readable().await?;
    let changes = drain(socket.get_ref())?;
    guard.clear_ready();
    Ok(changes)
}

/// As [`told`], of devices and frames; for ever if nobody tells.
async fn told_of_frames(socket: Option<&AsyncFd<Socket>>) -> io::Result<Changes> {
    let Some(socket) = socket else {
        return pending().await;
    };
    // Whatever was told: it was about devices, and is looked up.
    let _ = told(socket).await?;
    Ok(Changes {
        frames: true,
        ..Changes::default()
    })
}

/// Takes every message that waits.
fn drain(socket: &Socket) -> io::Result<Changes> {
    let mut changes = Changes::default();
    loop {
        match socket.recv_from_full() {
            Ok((datagram, _)) => {
                for message in messages(&datagram) {
                    if let NetlinkPayload::InnerMessage(body) = message?.payload {
                        note(&mut changes, &body);
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(changes),
            // Messages were dropped: anything may have changed.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => changes = Changes::ALL,
            Err(error) => return Err(error),
        }
    }
}

fn note(changes: &mut Changes, message: &Body) {
    match message.kind {
        libc::RTM_NEWLINK | libc::RTM_DELLINK => changes.links = true,
        libc::RTM_NEWADDR | libc::RTM_DELADDR => changes.addresses = true,
        libc::RTM_DELQDISC | libc::RTM_DELTFILTER => changes.filters = true,
        // Other routes come and go by the thousand on some nodes.
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE if is_default_route(&message.bytes) => {
            changes.default_routes = true;
        }
        _ => {}
    }
}

/// A message whose contents are read elsewhere.
#[derive(Clone, Debug)]
struct Body {
    kind: u16,
    bytes: Vec<u8>,
}

impl NetlinkSerializable for Body {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.bytes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.bytes);
    }
}

impl NetlinkDeserializable for Body {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self {
            kind: header.message_type,
            bytes: payload.to_vec(),
        })
    }
}

impl From<Body> for NetlinkPayload<Body> {
    fn from(body: Body) -> Self {
        Self::InnerMessage(body)
    }
}

/// The messages of a datagram.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = io::Result<NetlinkMessage<Body>>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let parsed = NetlinkBuffer::new_checked(datagram)
            .and_then(|buffer| {
                let length = (buffer.length() as usize).next_multiple_of(4);
                Ok((NetlinkMessage::deserialize(datagram)?, length))
            })
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()));
        let (message, rest) = match parsed {
            Ok((message, length)) => (Ok(message), datagram.get(length..).unwrap_or_default()),
            Err(error) => (Err(error), &[][..]),
        };
        datagram = rest;
        Some(message)
    })
}

/// The attributes after a header of `header` bytes, up to one that is broken.
fn attributes(message: &[u8], header: usize) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(message.get(header..).unwrap_or_default()).map_while(Result::ok)
}

/// The attributes in another one.
fn nested<'a>(attribute: &'a NlaBuffer<&[u8]>) -> Vec<NlaBuffer<&'a [u8]>> {
    attributes(attribute.value(), 0).collect()
}

pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

/// The text of an attribute, which ends with a zero.
fn text(value: &[u8]) -> String {
    let end = value
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// Body of a message about qdiscs and filters: `struct tcmsg`.
fn tcmsg(device: u32, handle: u32, parent: u32) -> Vec<u8> {
    [0, device, handle, parent, 0]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect()
}

/// `struct ifinfomsg` and attributes.
fn parse_link(message: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: word(message, 4)?,
        name: String::new(),
        loopback: word(message, 8)? & libc::IFF_LOOPBACK as u32 != 0,
        ethernet: message.get(2..4)? == libc::ARPHRD_ETHER.to_ne_bytes(),
        kind: None,
        xdp: None,
        leads_to: None,
    };
    for attribute in attributes(message, 16) {
        match attribute.kind() {
            libc::IFLA_IFNAME => link.name = text(attribute.value()),
            libc::IFLA_LINKINFO => link.kind = parse_kind(attribute.value()),
            libc::IFLA_XDP => link.xdp = parse_xdp(attribute.value()),
            libc::IFLA_LINK_NETNSID => {
                link.leads_to = word(attribute.value(), 0).map(u32::cast_signed);
            }
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

/// `IFLA_INFO_KIND` of a device's `IFLA_LINKINFO`.
fn parse_kind(value: &[u8]) -> Option<String> {
    const IFLA_INFO_KIND: u16 = 1;
    let mut attributes = attributes(value, 0);
    let kind = attributes.find(|attribute| attribute.kind() == IFLA_INFO_KIND)?;
    Some(text(kind.value()))
}

fn parse_xdp(value: &[u8]) -> Option<Xdp> {
    const IFLA_XDP_ATTACHED: u16 = 2;
    const IFLA_XDP_PROG_ID: u16 = 4;
    const XDP_ATTACHED_SKB: u8 = 2;
    let (mut native, mut program_id) = (false, None);
    for attribute in attributes(value, 0) {
        match (attribute.kind(), attribute.value()) {
            (IFLA_XDP_ATTACHED, [how, ..]) => native = *how != XDP_ATTACHED_SKB,
            (IFLA_XDP_PROG_ID, id) => program_id = word(id, 0),
            _ => {}
        }
    }
    program_id.map(|program_id| Xdp { native, program_id })
}

/// `struct ifaddrmsg` and attributes.
fn parse_address(message: &[u8]) -> Option<Address> {
    let &[_, _, flags, scope, ..] = message else {
        return None;
    };
    let (mut local, mut peer) = (None, None);
    let mut flags = u32::from(flags);
    for attribute in attributes(message, 8) {
        match attribute.kind() {
            libc::IFA_LOCAL => local = ip(attribute.value()),
            libc::IFA_ADDRESS => peer = ip(attribute.value()),
            libc::IFA_FLAGS => flags = word(attribute.value(), 0)?,
            _ => {}
        }
    }
    Some(Address {
        device: word(message, 4)?,
        // On a point-to-point device IFA_ADDRESS is the other end.
        addr: local.or(peer)?,
        global: scope == libc::RT_SCOPE_UNIVERSE,
        flags,
    })
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into()),
        _ => None,
    }
}

/// Whether a `struct rtmsg` is of a default route of the main table.
fn is_default_route(message: &[u8]) -> bool {
    matches!(
        message,
        [_, 0, _, _, libc::RT_TABLE_MAIN, _, _, libc::RTN_UNICAST, ..]
    )
}

/// The devices of a default route: one, or several with multipath.
fn default_route_devices(message: &[u8]) -> Vec<u32> {
    let mut devices = Vec::new();
    if !is_default_route(message) {
        return devices;
    }
    for attribute in attributes(message, 12) {
        match attribute.kind() {
            libc::RTA_OIF => devices.extend(word(attribute.value(), 0)),
            libc::RTA_MULTIPATH => devices.extend(next_hop_devices(attribute.value())),
            _ => {}
        }
    }
    devices
}

/// The devices in a list of `struct rtnexthop`.
fn next_hop_devices(mut hops: &[u8]) -> Vec<u32> {
    let mut devices = Vec::new();
    while let (&[low, high, ..], Some(device)) = (hops, word(hops, 4)) {
        devices.push(device);
        let length = usize::from(u16::from_ne_bytes([low, high])).next_multiple_of(4);
        hops = hops.get(length.max(8)..).unwrap_or_default();
    }
    devices
}

/// `struct tcmsg` and attributes. The kernel also lists a filter's head, which
/// has no handle and is no filter.
fn parse_filter(message: &[u8]) -> Option<Filter> {
    const TCA_OPTIONS: u16 = 2;
    const TCA_BPF_NAME: u16 = 7;
    const TCA_BPF_ID: u16 = 11;
    let mut filter = Filter {
        handle: word(message, 8)?,
        priority: (word(message, 16)? >> 16) as u16,
        ..Filter::default()
    };
    let options = attributes(message, 20).find(|attribute| attribute.kind() == TCA_OPTIONS);
    for option in options
        .iter()
        .flat_map(|options| attributes(options.value(), 0))
    {
        match option.kind() {
            TCA_BPF_NAME => filter.name = text(option.value()),
            TCA_BPF_ID => filter.program_id = word(option.value(), 0)?,
            _ => {}
        }
    }
    (filter.handle != 0).then_some(filter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn route(prefix_len: u8, table: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        let header = [
            2,
            prefix_len,
            0,
            0,
            table,
            3,
            0,
            libc::RTN_UNICAST,
            0,
            0,
            0,
            0,
        ];
        [header.to_vec(), attributes.concat()].concat()
    }

    fn next_hop(device: u32) -> Vec<u8> {
        let gateway = attribute(5, &[10, 0, 0, 1]);
        let mut bytes = ((8 + gateway.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(device.to_ne_bytes());
        bytes.extend(gateway);
        bytes
    }

    #[test]
    fn the_loopback_device_is_listed_with_its_address() {
        let netlink = Netlink::open().expect("socket");
        let links = netlink.links().expect("listed");
        let lo = links
            .iter()
            .find(|link| link.name == "lo")
            .expect("every namespace has one");
        assert_eq!((lo.index, lo.loopback), (1, true));
        assert!(netlink.addresses().is_ok());
        assert!(netlink.default_routes().is_ok());
    }

    #[test]
    fn an_absent_device_has_no_filters() {
        let netlink = Netlink::open().expect("socket");
        let filters = netlink.filters(0x7fff_fff0, Side::Ingress);
        assert_eq!(filters.expect("asked"), []);
    }

    #[test]
    fn default_routes_name_each_of_their_devices() {
        let oif = attribute(libc::RTA_OIF, &7_u32.to_ne_bytes());
        let hops = attribute(libc::RTA_MULTIPATH, &[next_hop(3), next_hop(4)].concat());
        let main = libc::RT_TABLE_MAIN;
        for (message, devices) in [
            (route(0, main, std::slice::from_ref(&oif)), vec![7]),
            (route(0, main, &[hops]), vec![3, 4]),
            (route(24, main, std::slice::from_ref(&oif)), vec![]),
            (route(0, 100, std::slice::from_ref(&oif)), vec![]),
            (vec![0; 5], vec![]),
        ] {
            assert_eq!(default_route_devices(&message), devices);
        }
    }

    #[test]
    fn broken_messages_of_every_length_are_survived() {
        let bytes: Vec<u8> = (0..=255).collect();
        for length in 0..bytes.len() {
            let message = &bytes[..length];
            drop((
                parse_link(message),
                parse_address(message),
                parse_filter(message),
            ));
            drop(default_route_devices(message));
            assert!(messages(message).count() <= length);
        }
    }

    #[test]
    fn a_filter_is_known_by_name_and_program() {
        let options = [
            attribute(7, b"klb_tc_in\0"),
            attribute(11, &5_u32.to_ne_bytes()),
        ]
        .concat();
        let mut message = tcmsg(2, 0x20, Side::Ingress.parent());
        message[16..20].copy_from_slice(&(1_u32 << 16 | 3).to_ne_bytes());
        message.extend(attribute(1, b"bpf\0"));
        message.extend(attribute(2 | 0x8000, &options));
        let filter = parse_filter(&message).expect("a filter");
        assert_eq!(
            filter,
            Filter {
                handle: 0x20,
                priority: 1,
                name: "klb_tc_in".to_owned(),
                program_id: 5
            }
        );
    }

    #[tokio::test]
    async fn lost_messages_count_as_changes_of_everything() {
        let mut changes = Changes::default();
        note(
            &mut changes,
            &Body {
                kind: libc::RTM_NEWROUTE,
                bytes: route(24, libc::RT_TABLE_MAIN, &[]),
            },
        );
        assert!(!changes.any(), "a route that is no default route");
        assert!(Changes::ALL.any());
        Monitor::open(None).expect("socket with groups");
    }
}
