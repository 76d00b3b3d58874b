//! By which device the kernel would send a packet.

use std::{io, net::IpAddr};

use netlink_packet_core::NLM_F_ACK;

use super::{Netlink, attributes, word};

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// To this node itself.
    Here,
    /// Out of the device with this index.
    By(u32),
    /// Nowhere: there is no route, or one that says so.
    Nowhere,
}

/// A packet that comes in, for its way through the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transit {
    pub from: IpAddr,
    /// Index of the device by which it comes in.
    pub device: u32,
}

impl Netlink {
    /// Where a packet to `to` goes: one that the node sends itself, or one that
    /// passes through it.
    ///
    /// # Errors
    ///
    /// If the kernel cannot be asked, or would not take such a packet there.
    pub fn route(&self, to: IpAddr, transit: Option<Transit>) -> io::Result<Route> {
        let body = question(to, transit);
        match self.request(libc::RTM_GETROUTE, NLM_F_ACK, &body) {
            Ok(replies) => Ok(replies.first().map_or(Route::Nowhere, |reply| parse(reply))),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES) => Ok(Route::Nowhere),
                _ => Err(error),
            },
        }
    }
}

/// `struct rtmsg` and attributes.
fn question(to: IpAddr, transit: Option<Transit>) -> Vec<u8> {
    let family: libc::c_int = match to {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    let bits = |addr: Option<IpAddr>| match addr {
        None => 0,
        Some(IpAddr::V4(_)) => 32,
        Some(IpAddr::V6(_)) => 128,
    };
    let from = transit.map(|transit| transit.from);
    let mut body = vec![family.cast_unsigned() as u8, bits(Some(to)), bits(from)];
    body.resize(12, 0);
    push(&mut body, libc::RTA_DST, &octets(to));
    if let Some(Transit { from, device }) = transit {
        push(&mut body, libc::RTA_SRC, &octets(from));
        push(&mut body, libc::RTA_IIF, &device.to_ne_bytes());
    }
    body
}

fn push(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend(((4 + value.len()) as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

fn parse(reply: &[u8]) -> Route {
    match reply.get(7) {
        Some(&libc::RTN_LOCAL) => return Route::Here,
        Some(&libc::RTN_UNICAST) => {}
        _ => return Route::Nowhere,
    }
    let mut attributes = attributes(reply, 12);
    let device = attributes.find(|attribute| attribute.kind() == libc::RTA_OIF);
    let device = device.and_then(|device| word(device.value(), 0));
    device.map_or(Route::Nowhere, Route::By)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_addresses_are_the_nodes_own() {
        let netlink = Netlink::open().expect("socket");
        let to = "127.0.0.1".parse().expect("an address");
        assert_eq!(netlink.route(to, None).expect("asked"), Route::Here);
    }

    #[test]
    fn a_reply_names_a_device_or_says_why_there_is_none() {
        let reply = |kind, attributes: &[u8]| {
            let mut reply = vec![2, 32, 0, 0, libc::RT_TABLE_MAIN, 0, 0, kind];
            reply.resize(12, 0);
            reply.extend(attributes);
            reply
        };
        let mut device = Vec::new();
        push(&mut device, libc::RTA_OIF, &7_u32.to_ne_bytes());
        for (reply, route) in [
            (reply(libc::RTN_UNICAST, &device), Route::By(7)),
            (reply(libc::RTN_LOCAL, &device), Route::Here),
            (reply(libc::RTN_UNREACHABLE, &device), Route::Nowhere),
            (reply(libc::RTN_UNICAST, &[]), Route::Nowhere),
            (vec![0; 3], Route::Nowhere),
        ] {
            assert_eq!(parse(&reply), route);
        }
    }

    #[test]
    fn a_question_is_as_long_as_it_says() {
        for (to, from) in [("192.0.2.1", "192.0.2.9"), ("fd00::1", "fd00::9")] {
            let [to, from]: [IpAddr; 2] = [to, from].map(|text| text.parse().expect("an address"));
            let transit = Transit { from, device: 3 };
            let body = question(to, Some(transit));
            let kinds: Vec<_> = attributes(&body, 12).map(|a| a.kind()).collect();
            assert_eq!(kinds, [libc::RTA_DST, libc::RTA_SRC, libc::RTA_IIF]);
        }
    }
}
