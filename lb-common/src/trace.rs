//! What `klb trace` asks of the programs, and what they tell.

use crate::{
    addr::{Addr6, Address, Port},
    flow::Tuple,
    node::Network,
    reason::{Effect, Hook, Reason},
};

/// Most bytes of a frame that an event carries, before and after translation
/// each; a power of two.
pub const TRACE_BYTES: usize = 2048;

/// Bytes of a frame that XDP gives at most before Linux 5.18, which brought a helper
/// for it; in words of 8 bytes, so up to 7 at the end of a shorter one are left out.
pub const OLD_XDP_BYTES: usize = 128;

/// How many Service ports can be asked for.
pub const TRACE_SERVICES: usize = 64;

/// What is to be told: the one entry of `klb_trace`, written by the command that
/// listens.
///
/// Everything that is zero is anything. An IPv4 address stands as IPv6 maps it
/// (`::ffff:a.b.c.d`), so that there is one kind.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Bits by number of [`Reason`].
    pub reasons: u64,
    /// Second of the monotonic clock at which programs stop to tell, unless it is
    /// put off: a command that was killed does not do that. 0 if nobody listens.
    pub until: u32,
    /// Names this trace; stands in its events.
    pub id: u32,
    /// Process id of the command.
    pub owner: u32,
    /// Bits by number of [`Hook`].
    pub hooks: u32,
    /// Bytes of each frame that are wanted, at most [`TRACE_BYTES`].
    pub snaplen: u32,
    /// How many of `services` are asked for.
    pub service_count: u32,
    pub services: [u32; TRACE_SERVICES],
    /// Either end, before or after translation.
    pub address: Network<Addr6>,
    /// The sender, before or after.
    pub from: Network<Addr6>,
    /// The receiver, before or after.
    pub to: Network<Addr6>,
    pub port: Port,
    pub from_port: Port,
    pub to_port: Port,
    /// IP protocol number.
    pub protocol: u8,
    pub pad: u8,
}

/// Nobody listens, and nothing is asked for.
impl Default for Trace {
    fn default() -> Self {
        Self {
            reasons: 0,
            until: 0,
            id: 0,
            owner: 0,
            hooks: 0,
            snaplen: 0,
            service_count: 0,
            services: [0; TRACE_SERVICES],
            address: Network::default(),
            from: Network::default(),
            to: Network::default(),
            port: Port::default(),
            from_port: Port::default(),
            to_port: Port::default(),
            protocol: 0,
            pad: 0,
        }
    }
}

/// Both ends of a packet. Of a socket's call the sender is not known, and zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    pub src: Addr6,
    pub dst: Addr6,
    pub src_port: Port,
    pub dst_port: Port,
}

impl Ends {
    #[inline(always)]
    pub fn of<A: Address>(tuple: &Tuple<A>) -> Self {
        Self {
            src: tuple.src.mapped(),
            dst: tuple.dst.mapped(),
            src_port: tuple.src_port,
            dst_port: tuple.dst_port,
        }
    }
}

/// What happened to one packet or call. Behind it stand the first
/// [`Event::captured`] bytes of the frame as it came, and then the first
/// [`Event::captured_after`] as it went on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds of the monotonic clock.
    pub time: u64,
    /// [`Trace::id`] of whom it is told to.
    pub trace: u32,
    /// Service id; 0 if there is none.
    pub service: u32,
    /// Index of the device; 0 for a call.
    pub ifindex: u32,
    /// Bytes of the frame as it came, and as it went on; the latter is 0 where it
    /// was not captured.
    pub length: u32,
    pub length_after: u32,
    /// Process that makes a call, and its name; 0 for a packet.
    pub pid: u32,
    pub comm: [u8; 16],
    /// As it came, with [`EVENT_ENDS`]. Of an ICMP error these are the ends of the
    /// answer to the packet that it is about.
    pub before: Ends,
    /// As it went on, with [`EVENT_TRANSLATED`].
    pub after: Ends,
    pub captured: u16,
    pub captured_after: u16,
    /// Number of a [`Reason`].
    pub reason: u8,
    /// Number of a [`Hook`].
    pub hook: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// Bits of `EVENT_*`.
    pub flags: u8,
}

/// The packet has been parsed.
pub const EVENT_ENDS: u8 = 1 << 0;
/// The packet or call has been translated.
pub const EVENT_TRANSLATED: u8 = 1 << 1;
/// The call sends a datagram; without this it connects.
pub const EVENT_DATAGRAM: u8 = 1 << 2;

/// Memory for the event of a running packet program: the value of `klb_tracing`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracing {
    pub event: Event,
    /// Right behind the event. Room for twice as much as there may be, so that a
    /// mask is proof enough for the verifier.
    pub bytes: [u8; 4 * TRACE_BYTES],
    /// The tuple by which the flow was looked up last, of either family.
    pub tuple: [u32; 10],
    /// The family of `tuple`, 4 or 6; 0 if there is none.
    pub family: u32,
    pub pad: u32,
    /// Events of packets for which there was no room.
    pub lost: u64,
    /// Of calls: a call's program may be interrupted by a packet's.
    pub lost_calls: u64,
}

impl Trace {
    /// Whether somebody listens.
    #[inline(always)]
    pub const fn is_on(&self, now: u32) -> bool {
        self.until != 0 && self.until.wrapping_sub(now).cast_signed() > 0
    }

    #[inline(always)]
    pub const fn has_hook(&self, hook: Hook) -> bool {
        self.hooks & bit_of_hook(hook) != 0
    }

    #[inline(always)]
    pub const fn has_reason(&self, reason: Reason) -> bool {
        self.reasons & bit_of_reason(reason) != 0
    }

    /// Whether a packet or call with these ends is asked for.
    ///
    /// There is one branch, at the end: the verifier would walk through what
    /// follows on each.
    #[inline(always)]
    pub fn is_about(&self, service: u32, protocol: u8, before: &Ends, after: &Ends) -> bool {
        let from = yes_in(&before.src, &self.from) | yes_in(&after.src, &self.from);
        let to = yes_in(&before.dst, &self.to) | yes_in(&after.dst, &self.to);
        let address = yes_in(&before.src, &self.address)
            | yes_in(&before.dst, &self.address)
            | yes_in(&after.src, &self.address)
            | yes_in(&after.dst, &self.address);
        let from_port = yes_port(self.from_port, before.src_port, after.src_port);
        let to_port = yes_port(self.to_port, before.dst_port, after.dst_port);
        let port = yes_port(self.port, before.src_port, before.dst_port)
            | yes_port(self.port, after.src_port, after.dst_port);
        let (asked, protocol) = (u32::from(self.protocol), u32::from(protocol));
        let protocol = yes_if_zero(asked) | yes_if_zero(asked ^ protocol);
        let service = self.yes_service(service);
        is_yes(protocol & service & from & to & address & from_port & to_port & port)
    }

    /// Not inlined, as [`yes_in`]: all at once needs more registers than there are,
    /// and more stack.
    #[inline(never)]
    fn yes_service(&self, service: u32) -> u64 {
        let mut one = 0;
        for &asked in &self.services {
            one |= yes_if_zero(asked ^ service);
        }
        // What is not asked for is 0, and so is no Service.
        yes_if_zero(self.service_count) | one & !yes_if_zero(service)
    }
}

/// A "yes" of [`Trace::is_about`], of which only the first bit counts.
#[inline(always)]
const fn yes_if_zero(number: u32) -> u64 {
    (number as u64).wrapping_sub(1)
}

#[inline(always)]
const fn is_yes(answer: u64) -> bool {
    answer >> (u64::BITS - 1) != 0
}

/// Whether the address is in the network; all are in one of zeros.
#[inline(never)]
fn yes_in(addr: &Addr6, network: &Network<Addr6>) -> u64 {
    let ([a0, a1, a2, a3], [m0, m1, m2, m3]) = (addr.words(), network.mask.words());
    let [n0, n1, n2, n3] = network.addr.words();
    yes_if_zero(((a0 & m0) ^ n0) | ((a1 & m1) ^ n1) | ((a2 & m2) ^ n2) | ((a3 & m3) ^ n3))
}

/// Whether the port is any, or one of two.
#[inline(always)]
fn yes_port(port: Port, one: Port, other: Port) -> u64 {
    let [port, one, other] = [port, one, other].map(|port| u32::from(port.get()));
    yes_if_zero(port) | yes_if_zero(port ^ one) | yes_if_zero(port ^ other)
}

/// A hook's bit of [`Trace::hooks`].
#[inline(always)]
pub const fn bit_of_hook(hook: Hook) -> u32 {
    1 << hook as u32
}

/// A reason's bit of [`Trace::reasons`].
#[inline(always)]
pub const fn bit_of_reason(reason: Reason) -> u64 {
    1 << reason as u32
}

/// The bits of all reasons with an effect.
pub const fn bits_of_effect(effect: Effect) -> u64 {
    let (mut bits, mut at) = (0, 0);
    while at < Reason::ALL.len() {
        if Reason::ALL[at].effect() as u32 == effect as u32 {
            bits |= bit_of_reason(Reason::ALL[at]);
        }
        at += 1;
    }
    bits
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::{addr::Addr4, flow};

    fn addr(text: &str) -> Addr4 {
        Addr4::from(text.parse::<Ipv4Addr>().expect("an address"))
    }

    fn network(text: &str, prefix: u32) -> Network<Addr6> {
        let mask = u128::MAX << (128 - 96 - prefix);
        Network {
            addr: addr(text).mapped(),
            mask: Addr6 {
                octets: mask.to_be_bytes(),
            },
        }
    }

    fn ends(src: &str, src_port: u16, dst: &str, dst_port: u16) -> Ends {
        Ends::of(&Tuple::new(
            addr(src),
            addr(dst),
            src_port.into(),
            dst_port.into(),
            flow::TCP,
        ))
    }

    /// From a client to a Service's port, and to the backend.
    fn is_about(trace: &Trace) -> bool {
        let before = ends("192.0.2.1", 40_000, "10.96.0.1", 80);
        let after = ends("192.0.2.1", 40_000, "10.244.0.5", 8080);
        trace.is_about(7, flow::TCP, &before, &after)
    }

    #[test]
    fn what_is_not_asked_for_is_anything() {
        assert!(is_about(&Trace::default()));
    }

    /// A question about one thing.
    fn about(change: impl FnOnce(&mut Trace)) -> Trace {
        let mut trace = Trace::default();
        change(&mut trace);
        trace
    }

    fn about_services(ids: &[u32]) -> Trace {
        about(|trace| {
            trace.services[..ids.len()].copy_from_slice(ids);
            trace.service_count = ids.len() as u32;
        })
    }

    #[test]
    fn protocols_and_services_admit_and_exclude() {
        for (wanted, trace) in [
            (true, about(|trace| trace.protocol = flow::TCP)),
            (false, about(|trace| trace.protocol = flow::UDP)),
            (true, about_services(&[9, 7])),
            (false, about_services(&[9, 8])),
        ] {
            assert_eq!(is_about(&trace), wanted, "{trace:?}");
        }
    }

    #[test]
    fn addresses_and_ports_admit_and_exclude() {
        let from = |addr, prefix| about(|trace| trace.from = network(addr, prefix));
        let to = |addr, prefix| about(|trace| trace.to = network(addr, prefix));
        let either = |addr, prefix| about(|trace| trace.address = network(addr, prefix));
        for (wanted, trace) in [
            (true, from("192.0.2.1", 32)),
            (true, from("192.0.2.0", 24)),
            (false, from("10.96.0.1", 32)),
            (true, to("10.96.0.1", 32)),
            (true, to("10.244.0.5", 32)),
            (false, to("192.0.2.1", 32)),
            (true, either("192.0.2.1", 32)),
            (true, either("10.244.0.0", 16)),
            (false, either("10.244.1.0", 24)),
            (true, about(|trace| trace.port = 8080.into())),
            (true, about(|trace| trace.port = 80.into())),
            (true, about(|trace| trace.port = 40_000.into())),
            (false, about(|trace| trace.port = 443.into())),
            (true, about(|trace| trace.from_port = 40_000.into())),
            (false, about(|trace| trace.from_port = 80.into())),
            (true, about(|trace| trace.to_port = 8080.into())),
            (false, about(|trace| trace.to_port = 40_000.into())),
        ] {
            assert_eq!(is_about(&trace), wanted, "{trace:?}");
        }
    }

    #[test]
    fn a_packet_of_no_service_is_none_of_those_asked_for() {
        let mut trace = Trace {
            service_count: 1,
            ..Trace::default()
        };
        trace.services[0] = 5;
        let ends = Ends::default();
        assert!(!trace.is_about(0, flow::TCP, &ends, &ends));
    }

    #[test]
    fn a_trace_ends_by_itself_also_when_the_clock_wraps() {
        for (until, now, is_on) in [
            (0, 5, false),
            (8, 5, true),
            (8, 8, false),
            (8, 9, false),
            (1, u32::MAX, true),
            (u32::MAX, 1, false),
        ] {
            let trace = Trace {
                until,
                ..Trace::default()
            };
            assert_eq!(trace.is_on(now), is_on, "{until} {now}");
        }
    }

    #[test]
    fn reasons_and_hooks_have_bits_of_their_own() {
        let all = [
            Effect::Pass,
            Effect::Translate,
            Effect::Refuse,
            Effect::Keep,
            Effect::Answer,
        ];
        let sum: u32 = all
            .map(|effect| bits_of_effect(effect).count_ones())
            .iter()
            .sum();
        assert_eq!(sum as usize, Reason::ALL.len());
        let trace = Trace {
            reasons: bits_of_effect(Effect::Answer),
            hooks: bit_of_hook(Hook::Socket),
            ..Trace::default()
        };
        assert!(trace.has_reason(Reason::Echo) && !trace.has_reason(Reason::Forward));
        assert!(trace.has_hook(Hook::Socket) && !trace.has_hook(Hook::Xdp));
    }
}
