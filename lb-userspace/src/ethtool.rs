//! What a device does with packets before and after the kernel does: its
//! offloads, as `ethtool -k` shows them.

use std::{
    io,
    net::UdpSocket,
    os::fd::AsRawFd as _,
    ptr::{addr_of_mut, from_mut},
};

/// Those that matter to a load balancer; `None` where the device does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Sums of incoming packets are checked by the device.
    pub rx_checksum: Option<bool>,
    /// Packets of a connection are put together by the kernel, and taken apart
    /// again where they leave.
    pub gro: Option<bool>,
    /// They are put together by the device, for good.
    pub lro: Option<bool>,
    /// Tags of VLANs are taken out of incoming frames.
    pub rx_vlan: Option<bool>,
}

/// `struct ethtool_value`
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

impl Offloads {
    /// Those of a device of this network namespace, by its name.
    ///
    /// # Errors
    ///
    /// If the kernel cannot be asked at all; one question that a device does not
    /// answer is no error.
    pub fn read(device: &str) -> io::Result<Self> {
        const ETHTOOL_GRXCSUM: u32 = 0x14;
        const ETHTOOL_GFLAGS: u32 = 0x25;
        const ETHTOOL_GGRO: u32 = 0x2b;
        const ETH_FLAG_RXVLAN: u32 = 1 << 8;
        const ETH_FLAG_LRO: u32 = 1 << 15;
        // Any socket will do, of this network namespace.
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let ask = |command| ask(&socket, device, command).ok();
        let flags = ask(ETHTOOL_GFLAGS);
        let flag = |flag| flags.map(|flags| flags & flag != 0);
        Ok(Self {
            rx_checksum: ask(ETHTOOL_GRXCSUM).map(|on| on != 0),
            gro: ask(ETHTOOL_GGRO).map(|on| on != 0),
            lro: flag(ETH_FLAG_LRO),
            rx_vlan: flag(ETH_FLAG_RXVLAN),
        })
    }
}

/// Asks for one number.
fn ask(socket: &UdpSocket, device: &str, command: u32) -> io::Result<u32> {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    let mut value = Value { command, data: 0 };
    // SAFETY: all zero is a name that is empty, and a pointer to nothing.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = request.ifr_name.iter_mut();
    // One place stays for the zero at the end.
    for (place, byte) in name.take(libc::IFNAMSIZ - 1).zip(device.bytes()) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_data = from_mut(&mut value).cast();
    // SAFETY: the request names a device and points to a value of the kind that
    // these commands read and write; both outlive the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, addr_of_mut!(request)) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value.data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_tells_what_it_does() {
        let offloads = Offloads::read("lo").expect("a socket");
        assert_eq!(offloads.lro, Some(false), "{offloads:?}");
        assert!(offloads.gro.is_some(), "{offloads:?}");
        assert!(offloads.rx_checksum.is_some(), "{offloads:?}");
        assert_eq!(
            Offloads::read("no-such-device").expect("a socket"),
            Offloads::default()
        );
    }
}
