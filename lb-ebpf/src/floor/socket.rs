//! Translation at the socket.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_ANY, bpf_sock_addr},
    helpers::bpf_get_socket_cookie,
    programs::SockAddrContext,
};
use lb_common::{
    Addr4, Addr6, Address as _, Port,
    service::{ServiceKey, Slot},
    socket::{SOCKET_REVERSE, SocketEntry, SocketKey},
};

use crate::{
    family::{Family, V4, V6},
    translate::choose,
};

/// Whether it is noted which frontend the process has named.
pub trait Note {
    const IS_WRITTEN: bool;
}

pub struct Noted;
pub struct Plain;

impl Note for Noted {
    const IS_WRITTEN: bool = true;
}

impl Note for Plain {
    const IS_WRITTEN: bool = false;
}

#[inline(always)]
pub fn on4<N: Note>(ctx: &SockAddrContext) -> Option<()> {
    let context: *mut bpf_sock_addr = ctx.as_ptr().cast();
    // SAFETY: the context is the kernel's.
    let octets = unsafe { (*context).user_ip4 }.to_ne_bytes();
    let slot = assign::<V4, N>(context, Addr4 { octets })?;
    // SAFETY: the context is the kernel's.
    unsafe { (*context).user_ip4 = u32::from_ne_bytes(slot.addr.octets) };
    Some(())
}

#[inline(always)]
pub fn on6<N: Note>(ctx: &SockAddrContext) -> Option<()> {
    let context: *mut bpf_sock_addr = ctx.as_ptr().cast();
    // SAFETY: the context is the kernel's, and its words are loaded one by one.
    let words = unsafe {
        let from = (&raw const (*context).user_ip6).cast::<u32>();
        [
            from.read_volatile(),
            from.add(1).read_volatile(),
            from.add(2).read_volatile(),
            from.add(3).read_volatile(),
        ]
    };
    let slot = assign::<V6, N>(context, Addr6::from_words(words))?;
    let [w0, w1, w2, w3] = slot.addr.words();
    // SAFETY: as before.
    unsafe {
        let to = (&raw mut (*context).user_ip6).cast::<u32>();
        to.write_volatile(w0);
        to.add(1).write_volatile(w1);
        to.add(2).write_volatile(w2);
        to.add(3).write_volatile(w3);
    }
    Some(())
}

/// A backend for the frontend at `addr`, whose port is already in the call.
#[inline(always)]
fn assign<F: Family, N: Note>(
    context: *mut bpf_sock_addr,
    addr: F::Addr,
) -> Option<&'static Slot<F::Addr>> {
    // SAFETY: the context is the kernel's. The port is in network order in the
    // low half.
    let (port, protocol) = unsafe { ((*context).user_port as u16, (*context).protocol as u8) };
    let port = Port {
        octets: port.to_ne_bytes(),
    };
    // SAFETY: only the benchmark writes this map, before the program runs.
    let service = unsafe { F::services().get(&ServiceKey::new(addr, port, protocol)) }?;
    let slot = choose::<F>(service)?;
    if N::IS_WRITTEN {
        // SAFETY: the context is the kernel's.
        let cookie = unsafe { bpf_get_socket_cookie(context.cast()) };
        let key = SocketKey {
            cookie: [cookie as u32, (cookie >> 32) as u32],
            addr: slot.addr,
            port: slot.port,
            protocol,
            direction: SOCKET_REVERSE,
        };
        let entry = SocketEntry {
            addr,
            port,
            pad: 0,
            service: service.service,
            backend: slot.backend,
        };
        F::sockets().insert(&key, &entry, u64::from(BPF_ANY)).ok()?;
    }
    // SAFETY: the context is the kernel's.
    unsafe { (*context).user_port = u32::from(u16::from_ne_bytes(slot.port.octets)) };
    Some(slot)
}
