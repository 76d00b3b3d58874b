//! Which devices take frames from XDP: what the kernel's family `netdev` tells of
//! them since Linux 6.3.
//!
//! A frame that XDP sends to another device is lost there without a word. A veth
//! takes it only while its other end polls (GRO is on there, or XDP), which can
//! change at any time.

use std::{collections::BTreeSet, io};

use netlink_packet_core::{NLM_F_ACK, NlaBuffer};
use netlink_sys::protocols::NETLINK_GENERIC;

use super::{Netlink, attributes, nested, word};

/// Bytes of `struct genlmsghdr`.
const HEADER: usize = 4;

const CTRL_CMD_GETFAMILY: u8 = 3;
const NETDEV_CMD_DEV_GET: u8 = 1;

/// Asks which devices take frames from XDP.
#[derive(Debug)]
pub struct FrameTakers {
    netlink: Netlink,
    family: u16,
    /// The group that is told of changes.
    pub(super) group: u32,
}

impl FrameTakers {
    /// `None` if the kernel does not tell.
    pub fn open() -> io::Result<Option<Self>> {
        const GENL_ID_CTRL: u16 = 0x10;
        const CTRL_ATTR_FAMILY_ID: u16 = 1;
        const CTRL_ATTR_FAMILY_NAME: u16 = 2;
        const NAME: &[u8] = b"netdev\0\0";
        let netlink = Netlink::of_protocol(NETLINK_GENERIC)?;
        let mut body = header(CTRL_CMD_GETFAMILY);
        body.extend((4 + NAME.len() as u16 - 1).to_ne_bytes());
        body.extend(CTRL_ATTR_FAMILY_NAME.to_ne_bytes());
        body.extend(NAME);
        let replies = match netlink.request(GENL_ID_CTRL, NLM_F_ACK, &body) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            replies => replies?,
        };
        let mut all = replies.iter().flat_map(|reply| attributes(reply, HEADER));
        let family = all.find(|attribute| attribute.kind() == CTRL_ATTR_FAMILY_ID);
        let family =
            family.and_then(|family| Some(u16::from_ne_bytes(*family.value().first_chunk()?)));
        let group = replies.iter().find_map(|reply| group(reply, b"mgmt\0"));
        Ok(family.zip(group).map(|(family, group)| Self {
            netlink,
            family,
            group,
        }))
    }

    /// The indices of the devices that do.
    pub fn list(&self) -> io::Result<BTreeSet<u32>> {
        let body = header(NETDEV_CMD_DEV_GET);
        let replies = self.netlink.dump(self.family, &body)?;
        Ok(replies.iter().filter_map(|reply| taker(reply)).collect())
    }
}

/// `struct genlmsghdr`.
fn header(command: u8) -> Vec<u8> {
    vec![command, 1, 0, 0]
}

/// The number of a multicast group in what is told of a family.
fn group(family: &[u8], name: &[u8]) -> Option<u32> {
    const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
    const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
    const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
    let groups = attributes(family, HEADER).find(|all| all.kind() == CTRL_ATTR_MCAST_GROUPS)?;
    nested(&groups).iter().find_map(|group| {
        let fields = nested(group);
        let field = |kind| fields.iter().find(|field| field.kind() == kind);
        (field(CTRL_ATTR_MCAST_GRP_NAME)?.value() == name)
            .then(|| word(field(CTRL_ATTR_MCAST_GRP_ID)?.value(), 0))
            .flatten()
    })
}

/// The device of a message, if it takes frames.
fn taker(device: &[u8]) -> Option<u32> {
    const NETDEV_A_DEV_IFINDEX: u16 = 1;
    const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
    const NETDEV_XDP_ACT_NDO_XMIT: u64 = 1 << 2;
    let field = |kind| {
        let mut fields = attributes(device, HEADER);
        fields.find(|field: &NlaBuffer<_>| field.kind() == kind)
    };
    let features = field(NETDEV_A_DEV_XDP_FEATURES)?;
    let features = u64::from_ne_bytes(*features.value().first_chunk()?);
    (features & NETDEV_XDP_ACT_NDO_XMIT != 0)
        .then(|| word(field(NETDEV_A_DEV_IFINDEX)?.value(), 0))
        .flatten()
}
