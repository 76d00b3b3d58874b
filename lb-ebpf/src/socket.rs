//! Translation at the socket: the destination is rewritten once, when a
//! process names it, and no packet is touched afterwards.
//!
//! A socket of IPv6 may name an IPv4 address as `::ffff:a.b.c.d` (RFC 4291,
//! 2.5.5.2). The kernel runs the IPv6 hooks for it, except that `sendmsg`
//! runs the IPv4 one; so the IPv6 programs look at the address and take the
//! IPv4 way through [`CallMapped`].

use core::mem::offset_of;

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::{BPF_ANY, bpf_sock, bpf_sock_addr},
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie},
    programs::SockAddrContext,
};
use lb_common::{
    Addr4, Addr6, Address as _, Port, Reason,
    flow::UDP,
    node::{CONFIG_HOST_SOCKETS_ONLY, NETNS_OPTED_OUT, Netns},
    service::{
        AffinityKey, FRONTEND_REFUSE, FRONTEND_SOURCE_RANGES, ServiceEntry, ServiceKey, Slot,
    },
    socket::{SOCKET_FORWARD, SOCKET_REVERSE, SocketEntry, SocketKey},
};

use crate::{
    clock, config,
    family::{Family, V4, V6, is_alive},
    maps::NETNS,
    open::device,
    select::{self, Window},
    served::is_served,
    trace, traffic,
};

#[unsafe(no_mangle)]
static HAS_SET_RETVAL: Global<u8> = Global::new(0);

/// Whether the kernel lets a socket hook choose the error.
#[inline(always)]
pub fn can_choose_error() -> bool {
    HAS_SET_RETVAL.load() != 0
}

/// One socket call, with an address of one family in it.
pub trait Call: Sized {
    type Family: Family;

    /// The call as it is now: an address is read once, and not again when it has been
    /// set.
    fn read(context: *mut bpf_sock_addr) -> Self;

    fn context(&self) -> *mut bpf_sock_addr;
    /// The address that the call had when it was read.
    fn addr(&self) -> <Self::Family as Family>::Addr;
    fn set_addr(&self, addr: <Self::Family as Family>::Addr);
    /// The address that the socket is connected to.
    fn peer_addr(&self) -> <Self::Family as Family>::Addr;

    /// The port that the socket is connected to; 0 if it is not.
    #[inline(always)]
    fn peer_port(&self) -> Port {
        // SAFETY: the context is the kernel's, and leads to a socket in every
        // hook. The port is in network order in the first half of a word, which
        // was a word of its own before 5.17.
        let port = unsafe {
            let socket = (*self.context()).__bindgen_anon_1.sk;
            let port = socket.byte_add(offset_of!(bpf_sock, dst_port));
            port.cast::<u32>().read_volatile()
        };
        Port {
            octets: (port as u16).to_ne_bytes(),
        }
    }

    #[inline(always)]
    fn port(&self) -> Port {
        // SAFETY: the context is the kernel's. The port is in network order in
        // the low half.
        let port = unsafe { (*self.context()).user_port } as u16;
        Port {
            octets: port.to_ne_bytes(),
        }
    }

    #[inline(always)]
    fn set_port(&self, port: Port) {
        // SAFETY: as in `port`.
        unsafe { (*self.context()).user_port = u32::from(u16::from_ne_bytes(port.octets)) };
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.context()).protocol as u8 }
    }

    /// The kernel's name for the socket.
    #[inline(always)]
    fn cookie(&self) -> [u32; 2] {
        // SAFETY: the context is the kernel's.
        let cookie = unsafe { bpf_get_socket_cookie(self.context().cast()) };
        [cookie as u32, (cookie >> 32) as u32]
    }

    /// Key of this socket's translations of the address in the call.
    #[inline(always)]
    fn key(&self, direction: u8) -> SocketKey<<Self::Family as Family>::Addr> {
        SocketKey {
            cookie: self.cookie(),
            addr: self.addr(),
            port: self.port(),
            protocol: self.protocol(),
            direction,
        }
    }
}

/// A call of an IPv4 socket.
pub struct Call4 {
    context: *mut bpf_sock_addr,
    addr: Addr4,
}
/// A call of an IPv6 socket.
pub struct Call6 {
    context: *mut bpf_sock_addr,
    addr: Addr6,
}
/// A call of an IPv6 socket with an IPv4 address.
pub struct CallMapped {
    context: *mut bpf_sock_addr,
    addr: Addr4,
}

impl Call for Call4 {
    type Family = V4;

    #[inline(always)]
    fn read(context: *mut bpf_sock_addr) -> Self {
        // SAFETY: the context is the kernel's.
        let addr = unsafe { (*context).user_ip4 };
        let addr = Addr4 {
            octets: addr.to_ne_bytes(),
        };
        Self { context, addr }
    }

    #[inline(always)]
    fn context(&self) -> *mut bpf_sock_addr {
        self.context
    }

    #[inline(always)]
    fn addr(&self) -> Addr4 {
        self.addr
    }

    #[inline(always)]
    fn set_addr(&self, addr: Addr4) {
        // SAFETY: the context is the kernel's.
        unsafe { (*self.context).user_ip4 = u32::from_ne_bytes(addr.octets) };
    }

    #[inline(always)]
    fn peer_addr(&self) -> Addr4 {
        peer_v4(self.context)
    }
}

impl Call for Call6 {
    type Family = V6;

    #[inline(always)]
    fn read(context: *mut bpf_sock_addr) -> Self {
        let addr = Addr6::from_words(words(context));
        Self { context, addr }
    }

    #[inline(always)]
    fn context(&self) -> *mut bpf_sock_addr {
        self.context
    }

    #[inline(always)]
    fn addr(&self) -> Addr6 {
        self.addr
    }

    #[inline(always)]
    fn set_addr(&self, addr: Addr6) {
        let [w0, w1, w2, w3] = addr.words();
        // SAFETY: the context is the kernel's. Each word is a store of its
        // own; wider ones are not allowed by every kernel.
        unsafe {
            let to = &raw mut (*self.context).user_ip6;
            let to = to.cast::<u32>();
            to.write_volatile(w0);
            to.add(1).write_volatile(w1);
            to.add(2).write_volatile(w2);
            to.add(3).write_volatile(w3);
        }
    }

    #[inline(always)]
    fn peer_addr(&self) -> Addr6 {
        // SAFETY: the context is the kernel's, and leads to a socket in every
        // hook. Each word is a load of its own.
        let words = unsafe {
            let from = (&raw const (*(*self.context).__bindgen_anon_1.sk).dst_ip6).cast::<u32>();
            [
                from.read_volatile(),
                from.add(1).read_volatile(),
                from.add(2).read_volatile(),
                from.add(3).read_volatile(),
            ]
        };
        Addr6::from_words(words)
    }
}

impl Call for CallMapped {
    type Family = V4;

    #[inline(always)]
    fn read(context: *mut bpf_sock_addr) -> Self {
        let [_, _, _, addr] = words(context);
        let addr = Addr4 {
            octets: addr.to_ne_bytes(),
        };
        Self { context, addr }
    }

    #[inline(always)]
    fn context(&self) -> *mut bpf_sock_addr {
        self.context
    }

    #[inline(always)]
    fn addr(&self) -> Addr4 {
        self.addr
    }

    #[inline(always)]
    fn set_addr(&self, addr: Addr4) {
        // SAFETY: the context is the kernel's.
        unsafe {
            let to = &raw mut (*self.context).user_ip6;
            to.cast::<u32>()
                .add(3)
                .write_volatile(u32::from_ne_bytes(addr.octets));
        }
    }

    #[inline(always)]
    fn peer_addr(&self) -> Addr4 {
        peer_v4(self.context)
    }
}

#[inline(always)]
fn peer_v4(context: *mut bpf_sock_addr) -> Addr4 {
    // SAFETY: the context is the kernel's, and leads to a socket in every hook.
    let addr = unsafe { (*(*context).__bindgen_anon_1.sk).dst_ip4 };
    Addr4 {
        octets: addr.to_ne_bytes(),
    }
}

#[inline(always)]
fn words(context: *mut bpf_sock_addr) -> [u32; 4] {
    // SAFETY: the context is the kernel's. Volatile keeps the loads at one
    // word each, which every kernel allows.
    unsafe {
        let from = &raw const (*context).user_ip6;
        let from = from.cast::<u32>();
        [
            from.read_volatile(),
            from.add(1).read_volatile(),
            from.add(2).read_volatile(),
            from.add(3).read_volatile(),
        ]
    }
}

/// `::ffff:0:0/96`
#[inline(always)]
fn is_mapped(addr: &Addr6) -> bool {
    let [w0, w1, w2, _] = addr.words();
    w0 | w1 == 0 && w2 == 0xffff_u32.to_be()
}

/// What a hook does with a call, whatever the family.
pub trait Action {
    fn run<C: Call>(call: &C) -> Reason;

    /// Tells who listens. Returns the same reason.
    fn tell<C: Call>(call: &C, reason: Reason) -> Reason;

    #[inline(always)]
    fn run_and_tell<C: Call>(call: &C) -> Reason {
        Self::tell(call, Self::run(call))
    }
}

/// A process connects.
pub struct Connect;

/// A process sends a datagram without having connected: the backend of the
/// datagram before is kept while it lives, as a packet's flow would.
pub struct Send;

/// A process asks who sent a datagram, or whom it is connected to: it is shown
/// the frontend that it named.
pub struct Reveal;

/// A call of an IPv4 socket.
#[inline(always)]
pub fn on4<A: Action>(ctx: &SockAddrContext) -> Reason {
    A::run_and_tell(&Call4::read(ctx.as_ptr().cast()))
}

/// A call of an IPv6 socket, with an address of either family.
#[inline(always)]
pub fn on6<A: Action>(ctx: &SockAddrContext) -> Reason {
    let context = ctx.as_ptr().cast();
    let call = Call6::read(context);
    if is_mapped(&call.addr) {
        A::run_and_tell(&CallMapped::read(context))
    } else {
        A::run_and_tell(&call)
    }
}

impl Action for Connect {
    #[inline(always)]
    fn run<C: Call>(call: &C) -> Reason {
        let reason = match frontend::<C>(call) {
            Ok(service) => assign::<C, false>(call, service),
            Err(reason) => reason,
        };
        match reason {
            // Nothing is sent by this. `ping`, and those who sort addresses by
            // how they are reached, connect a UDP socket to any port to learn
            // their own address. A datagram itself is refused, where it leaves
            // the pod; what the node's own processes send meets no hook.
            Reason::NoSuchPort if call.protocol() == UDP && !is_of_node(call.context()) => {
                Reason::NotService
            }
            Reason::NotService if was_used(call.context()) => {
                // It may name a backend that it was given before: then it wants
                // to be shown just that.
                let _ = C::Family::sockets().remove(&call.key(SOCKET_REVERSE));
                Reason::NotService
            }
            reason => reason,
        }
    }

    #[inline(always)]
    fn tell<C: Call>(call: &C, reason: Reason) -> Reason {
        trace::call(call, reason, false)
    }
}

/// Whether the socket has a port already, as after an earlier `connect()`.
/// Others, and these are most, go without a look into the socket map.
#[inline(always)]
fn was_used(context: *mut bpf_sock_addr) -> bool {
    // SAFETY: the context is the kernel's, and leads to a socket in every hook.
    unsafe { (*(*context).__bindgen_anon_1.sk).src_port != 0 }
}

impl Action for Send {
    #[inline(always)]
    fn run<C: Call>(call: &C) -> Reason {
        if is_connected_to(call) {
            call.set_addr(call.peer_addr());
            call.set_port(call.peer_port());
            return Reason::Socket;
        }
        // A server's answers, which are to no frontend, need no more than this.
        let service = match frontend::<C>(call) {
            Ok(service) => service,
            Err(reason) => return reason,
        };
        // SAFETY: the copy is made at once.
        let known = unsafe { C::Family::sockets().get(&call.key(SOCKET_FORWARD)).copied() };
        if let Some(entry) = known
            && is_alive(entry.backend)
        {
            call.set_addr(entry.addr);
            call.set_port(entry.port);
            return Reason::Socket;
        }
        assign::<C, true>(call, service)
    }

    #[inline(always)]
    fn tell<C: Call>(call: &C, reason: Reason) -> Reason {
        trace::call(call, reason, true)
    }
}

/// Whether the socket is connected to a backend, which lives, of the frontend in
/// the call: it was given it by `connect()`.
#[inline(always)]
fn is_connected_to<C: Call>(call: &C) -> bool {
    let port = call.peer_port();
    if port.get() == 0 {
        return false;
    }
    let key = SocketKey {
        addr: call.peer_addr(),
        port,
        ..call.key(SOCKET_REVERSE)
    };
    // SAFETY: the copy is made at once.
    let shown = unsafe { C::Family::sockets().get(&key).copied() };
    shown.is_some_and(|shown| {
        shown.addr.same(&call.addr()) && shown.port == call.port() && is_alive(shown.backend)
    })
}

impl Action for Reveal {
    #[inline(always)]
    fn run<C: Call>(call: &C) -> Reason {
        // Mostly it is a server that asks, for its client.
        if !is_served(call.port()) {
            return Reason::NotService;
        }
        // SAFETY: the copy is made at once.
        let entry = unsafe { C::Family::sockets().get(&call.key(SOCKET_REVERSE)).copied() };
        let Some(entry) = entry else {
            return Reason::NotService;
        };
        call.set_addr(entry.addr);
        call.set_port(entry.port);
        Reason::Reply
    }

    /// Nothing that has not been told when the process named the frontend.
    #[inline(always)]
    fn tell<C: Call>(_call: &C, reason: Reason) -> Reason {
        reason
    }
}

/// Gives the socket a backend of the frontend, and notes what it is to be shown; for
/// a datagram also which backend it has got.
#[inline(always)]
fn assign<C: Call, const DATAGRAM: bool>(call: &C, service: &ServiceEntry) -> Reason {
    match try_assign::<C, DATAGRAM>(call, service) {
        Ok(slot) => {
            call.set_addr(slot.addr);
            call.set_port(slot.port);
            traffic::count_flow(slot.backend);
            Reason::NewFlow
        }
        Err(reason) => reason,
    }
}

/// The backend for the frontend in the call, noted.
#[inline(always)]
fn try_assign<C: Call, const DATAGRAM: bool>(
    call: &C,
    service: &ServiceEntry,
) -> Result<&'static Slot<<C::Family as Family>::Addr>, Reason> {
    let cookie = netns_cookie(call.context());
    let caller = Caller::of(call, cookie)?;
    let slot = choose::<C::Family>(service, caller, cookie)?;
    let forward = call.key(SOCKET_FORWARD);
    let reverse = SocketKey {
        addr: slot.addr,
        port: slot.port,
        direction: SOCKET_REVERSE,
        ..forward
    };
    // Without its entries a connection works all the same, but the process is
    // shown the backend's address: refuse rather than confuse. Only a socket
    // that has been used may have been given the same backend before.
    if DATAGRAM || forward.protocol == UDP && was_used(call.context()) {
        forget_other::<C>(&forward, &reverse);
    }
    if DATAGRAM {
        note::<C>(&forward, &reverse, slot, service.service)?;
    }
    note::<C>(&reverse, &forward, slot, service.service).map(|()| slot)
}

/// If this socket was given the same backend for another frontend, the next
/// datagram for that one is to be seen again: whom the process has named last is
/// whom it is shown.
#[inline(always)]
fn forget_other<C: Call>(
    forward: &SocketKey<<C::Family as Family>::Addr>,
    reverse: &SocketKey<<C::Family as Family>::Addr>,
) {
    // SAFETY: the copy is made at once.
    let Some(shown) = (unsafe { C::Family::sockets().get(reverse).copied() }) else {
        return;
    };
    let other = SocketKey {
        addr: shown.addr,
        port: shown.port,
        ..*forward
    };
    if !other.addr.same(&forward.addr) || other.port != forward.port {
        let _ = C::Family::sockets().remove(&other);
    }
}

/// The frontend that the address in the call is.
#[inline(always)]
fn frontend<C: Call>(call: &C) -> Result<&'static ServiceEntry, Reason> {
    let (addr, port) = (call.addr(), call.port());
    if is_served(port) {
        let exact = ServiceKey::new(addr, port, call.protocol());
        if let Some(service) = C::Family::service(&exact) {
            return Ok(service);
        }
    }
    let config = config::get().ok_or(Reason::NotService)?;
    if addr.is_in(C::Family::cluster_network(config)) {
        let address = ServiceKey::new(addr, Port::default(), 0);
        return match C::Family::service(&address) {
            Some(entry) if entry.flags & FRONTEND_REFUSE != 0 => Err(Reason::NoSuchPort),
            _ => Err(Reason::NotService),
        };
    }
    Err(Reason::NotService)
}

/// Who makes the call.
#[derive(Clone, Copy)]
enum Caller {
    /// A process of the node.
    Host,
    /// One in a pod's network namespace, of which the agent has noted this.
    Pod(&'static Netns),
    /// One in another.
    Stranger,
}

impl Caller {
    /// # Errors
    /// If calls from there are not served, or if the address is the loopback of
    /// another namespace than the node's.
    #[inline(always)]
    fn of<C: Call>(call: &C, cookie: [u32; 2]) -> Result<Self, Reason> {
        let config = config::get().ok_or(Reason::NotService)?;
        if cookie == config.host_netns {
            return Ok(Self::Host);
        }
        if C::Family::is_loopback(&call.addr()) {
            return Err(Reason::NotService);
        }
        if config.flags & CONFIG_HOST_SOCKETS_ONLY != 0 {
            return Err(Reason::SocketNotServed);
        }
        // SAFETY: only the agent writes this map. It is not preallocated, so an
        // update brings an entry of its own and the old one stays as it is.
        let Some(pod) = (unsafe { NETNS.get(&cookie) }) else {
            return Ok(Self::Stranger);
        };
        if pod.flags & NETNS_OPTED_OUT != 0 {
            return Err(Reason::SocketNotServed);
        }
        Ok(Self::Pod(pod))
    }

    /// The address that the packets of the call will have, if it is known.
    #[inline(always)]
    fn addr<F: Family>(self) -> Option<F::Addr> {
        let addr = match self {
            Self::Host => F::device_address(device(0)?),
            Self::Pod(pod) => F::netns_address(pod),
            Self::Stranger => return None,
        };
        if addr.is_zero() { None } else { Some(addr) }
    }
}

/// Whether the socket is in the node's own network namespace.
#[inline(always)]
fn is_of_node(context: *mut bpf_sock_addr) -> bool {
    config::get().is_some_and(|config| config.host_netns == netns_cookie(context))
}

/// The kernel's name for the socket's network namespace, low word first.
#[inline(always)]
fn netns_cookie(context: *mut bpf_sock_addr) -> [u32; 2] {
    // SAFETY: the context is the kernel's.
    let cookie = unsafe { bpf_get_netns_cookie(context.cast()) };
    [cookie as u32, (cookie >> 32) as u32]
}

/// The slot for a caller, which counts as inside.
#[inline(always)]
fn choose<F: Family>(
    service: &ServiceEntry,
    caller: Caller,
    cookie: [u32; 2],
) -> Result<&'static Slot<F::Addr>, Reason> {
    if service.flags & FRONTEND_SOURCE_RANGES != 0 {
        // If it is not known, its packets have an address, and are looked at.
        let addr = caller.addr::<F>().ok_or(Reason::SocketNotServed)?;
        if !F::is_in_source_ranges(service.service, &addr) {
            return Err(Reason::SourceRange);
        }
    }
    let window = Window::of(service, true)?;
    if service.affinity == 0 {
        return window.slot::<F>(select::random());
    }
    let now = clock::seconds();
    let client = AffinityKey {
        client: caller.addr::<F>().unwrap_or_else(|| F::stand_in(cookie)),
        service: service.service,
    };
    let slot = match select::kept::<F>(&client, window, service.affinity, now) {
        Some(slot) => slot,
        None => window.slot::<F>(select::random())?,
    };
    select::keep::<F>(&client, slot.backend, now);
    Ok(slot)
}

/// Writes the entry for `key`, which leads to the address in `to`.
#[inline(always)]
fn note<C: Call>(
    key: &SocketKey<<C::Family as Family>::Addr>,
    to: &SocketKey<<C::Family as Family>::Addr>,
    slot: &Slot<<C::Family as Family>::Addr>,
    service: u32,
) -> Result<(), Reason> {
    let entry = SocketEntry {
        addr: to.addr,
        port: to.port,
        pad: 0,
        service,
        backend: slot.backend,
    };
    C::Family::sockets()
        .insert(key, &entry, u64::from(BPF_ANY))
        .map_err(|_error| Reason::FlowTableFull)
}
