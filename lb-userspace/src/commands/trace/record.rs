//! What was told, for people and for programs.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::{Duration, SystemTime},
};

use lb_common::{
    Addr6, Hook, Port, Reason, flow,
    reason::Effect,
    trace::{EVENT_DATAGRAM, EVENT_ENDS, EVENT_TRANSLATED, Ends, Event},
};
use serde::Serialize;

use crate::commands::{PortId, effect_name, protocol_name};

/// One packet or call.
#[derive(Debug, Serialize)]
pub(super) struct Record {
    /// When, as RFC 3339 has it, of UTC.
    pub(super) time: String,
    #[serde(skip)]
    at: SystemTime,
    pub(super) hook: &'static str,
    /// Where the packet was met.
    pub(super) device: Option<String>,
    /// Who calls.
    process: Option<Process>,
    reason: &'static str,
    effect: &'static str,
    #[serde(skip)]
    why: Reason,
    /// Of an ICMP error, that of the packet that it is about.
    protocol: Option<String>,
    /// As it came.
    before: Option<Path>,
    /// As it went on, where that is another.
    after: Option<Path>,
    service: Option<PortId>,
    /// Bytes of the frame.
    length: Option<u32>,
}

#[derive(Debug, Serialize)]
struct Process {
    pid: u32,
    name: String,
    call: &'static str,
}

/// From where to where. A call's process has no address yet.
#[derive(Debug, Serialize)]
struct Path {
    src: Option<Place>,
    dst: Place,
}

#[derive(Debug, Serialize)]
struct Place {
    address: IpAddr,
    /// Of a ping there is none.
    port: Option<u16>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => SocketAddr::new(self.address, port).fmt(f),
            None => self.address.fmt(f),
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(src) = &self.src {
            write!(f, "{src} → ")?;
        }
        self.dst.fmt(f)
    }
}

impl Record {
    /// Of an event at some time, with what its numbers are called; `None` if it is
    /// of a klb that knows more.
    pub(super) fn new(
        event: &Event,
        at: SystemTime,
        device: Option<String>,
        service: Option<PortId>,
    ) -> Option<Self> {
        let mut hooks = Hook::ALL.into_iter();
        let hook = hooks.find(|hook| *hook as u8 == event.hook)?;
        let why = *Reason::ALL.get(usize::from(event.reason))?;
        let is_call = hook == Hook::Socket;
        let path = |flag, ends| {
            let is_there = event.flags & flag != 0;
            is_there.then(|| Path::new(ends, event.protocol, is_call))
        };
        Some(Self {
            time: humantime::format_rfc3339_micros(at).to_string(),
            at,
            hook: hook.name(),
            device: device.filter(|_| !is_call),
            process: is_call.then(|| Process::of(event)),
            reason: why.name(),
            effect: effect_name(why.effect()),
            why,
            protocol: (event.flags & EVENT_ENDS != 0).then(|| name_of(event.protocol)),
            before: path(EVENT_ENDS, &event.before),
            after: path(EVENT_TRANSLATED, &event.after),
            service,
            length: (!is_call).then_some(event.length),
        })
    }

    /// One line, with its end.
    pub(super) fn line(&self) -> String {
        let mut words = vec![local_time(self.at), self.hook.to_owned()];
        if let Some(process) = &self.process {
            words.push(format!("{}[{}]", process.name, process.pid));
        }
        words.extend(self.device.clone());
        words.push(self.reason.to_owned());
        if self.why == Reason::IcmpError {
            words.push("about".to_owned());
        }
        words.extend(self.protocol.clone());
        if let Some(process) = &self.process {
            words.push(process.call.to_owned());
        }
        words.extend(self.before.as_ref().map(ToString::to_string));
        if let Some(after) = &self.after {
            words.push(format!("⇒ {after}"));
        }
        if self.before.is_none() {
            words.extend(self.length.map(|length| format!("{length} bytes")));
        }
        words.extend(self.service.as_ref().map(ToString::to_string));
        if self.why.effect() != Effect::Translate {
            let why = self.why.description().trim();
            words.push(format!("({})", why.trim_end_matches('.')));
        }
        words.join(" ") + "\n"
    }

    /// When it was.
    pub(super) const fn at(&self) -> SystemTime {
        self.at
    }

    /// What a frame is noted with in a file.
    pub(super) fn comment(&self) -> String {
        match &self.service {
            Some(service) => format!("{} {service}", self.reason),
            None => self.reason.to_owned(),
        }
    }
}

impl Process {
    fn of(event: &Event) -> Self {
        let end = event.comm.iter().position(|byte| *byte == 0);
        let name = &event.comm[..end.unwrap_or(event.comm.len())];
        Self {
            pid: event.pid,
            // Whatever a process calls itself, a line stays one.
            name: String::from_utf8_lossy(name).escape_debug().to_string(),
            call: if event.flags & EVENT_DATAGRAM == 0 {
                "connect"
            } else {
                "sendmsg"
            },
        }
    }
}

impl Path {
    fn new(ends: &Ends, protocol: u8, is_call: bool) -> Self {
        let has_ports = [flow::TCP, flow::UDP, flow::SCTP].contains(&protocol);
        let place = |addr: Addr6, port: Port| Place {
            address: Ipv6Addr::from(addr).to_canonical(),
            port: has_ports.then_some(port.get()),
        };
        Self {
            src: (!is_call).then(|| place(ends.src, ends.src_port)),
            dst: place(ends.dst, ends.dst_port),
        }
    }
}

fn name_of(protocol: u8) -> String {
    match protocol {
        1 => "ICMP".to_owned(),
        58 => "ICMPv6".to_owned(),
        other => protocol_name(other),
    }
}

/// The time of day here, to a microsecond, as tcpdump has it.
fn local_time(at: SystemTime) -> String {
    let since = at.duration_since(SystemTime::UNIX_EPOCH);
    let since = since.unwrap_or(Duration::ZERO);
    let seconds = since.as_secs().cast_signed();
    // SAFETY: all zeros are a valid time, and the call reads one number and writes
    // one time; both outlive it.
    let time = unsafe {
        let mut time = std::mem::zeroed::<libc::tm>();
        libc::localtime_r(&raw const seconds, &raw mut time);
        time
    };
    format!(
        "{:02}:{:02}:{:02}.{:06}",
        time.tm_hour,
        time.tm_min,
        time.tm_sec,
        since.subsec_micros()
    )
}

#[cfg(test)]
mod tests {
    use lb_common::{Addr4, Address as _};

    use super::*;

    fn ends(src: [u8; 4], src_port: u16, dst: [u8; 4], dst_port: u16) -> Ends {
        Ends {
            src: Addr4 { octets: src }.mapped(),
            dst: Addr4 { octets: dst }.mapped(),
            src_port: src_port.into(),
            dst_port: dst_port.into(),
        }
    }

    fn event(hook: Hook, reason: Reason) -> Event {
        Event {
            hook: hook as u8,
            reason: reason as u8,
            protocol: flow::TCP,
            flags: EVENT_ENDS,
            length: 74,
            before: ends([192, 0, 2, 9], 40_000, [10, 96, 0, 1], 80),
            ..Event::default()
        }
    }

    fn web() -> PortId {
        PortId {
            namespace: "default".to_owned(),
            name: "web".to_owned(),
            port_name: "http".to_owned(),
        }
    }

    /// A line without its time.
    fn line(event: &Event, service: Option<PortId>) -> String {
        let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_000_042);
        let record = Record::new(event, at, Some("eth0".to_owned()), service).expect("known");
        let line = record.line();
        let (time, rest) = line.split_once(' ').expect("words");
        assert!(time.ends_with("01.000042"), "{time}");
        rest.to_owned()
    }

    #[test]
    fn a_translated_packet_is_shown_on_both_sides() {
        let event = Event {
            after: ends([192, 0, 2, 9], 40_000, [10, 244, 0, 5], 8080),
            flags: EVENT_ENDS | EVENT_TRANSLATED,
            ..event(Hook::TcIngress, Reason::NewFlow)
        };
        assert_eq!(
            line(&event, Some(web())),
            "tc-ingress eth0 new_flow TCP 192.0.2.9:40000 → 10.96.0.1:80 ⇒ \
             192.0.2.9:40000 → 10.244.0.5:8080 default/web:http\n"
        );
    }

    #[test]
    fn what_ends_here_has_its_reason_in_words() {
        assert_eq!(
            line(&event(Hook::Xdp, Reason::SourceRange), Some(web())),
            "xdp eth0 source_range TCP 192.0.2.9:40000 → 10.96.0.1:80 default/web:http \
             (The client is not in loadBalancerSourceRanges)\n"
        );
    }

    #[test]
    fn a_call_names_its_process() {
        let mut comm = [0; 16];
        comm[..6].copy_from_slice(b"my\nsql");
        let event = Event {
            pid: 7,
            comm,
            after: ends([0; 4], 0, [10, 244, 0, 5], 8080),
            flags: EVENT_ENDS | EVENT_TRANSLATED | EVENT_DATAGRAM,
            ..event(Hook::Socket, Reason::NewFlow)
        };
        assert_eq!(
            line(&event, Some(web())),
            "socket my\\nsql[7] new_flow TCP sendmsg 10.96.0.1:80 ⇒ 10.244.0.5:8080 \
             default/web:http\n"
        );
    }

    #[test]
    fn what_has_no_ports_or_no_ends_says_what_it_has() {
        let ping = Event {
            protocol: 1,
            ..event(Hook::TcIngress, Reason::Echo)
        };
        let said = line(&ping, None);
        assert!(said.contains("echo ICMP 192.0.2.9 → 10.96.0.1 ("), "{said}");
        let arp = Event {
            flags: 0,
            ..event(Hook::Xdp, Reason::NotIp)
        };
        assert_eq!(
            line(&arp, None),
            "xdp eth0 not_ip 74 bytes (Neither IPv4 nor IPv6)\n"
        );
        let error = line(&event(Hook::TcEgress, Reason::IcmpError), None);
        assert!(error.contains("icmp_error about TCP 192"), "{error}");
    }

    #[test]
    fn json_has_all_of_it() {
        let event = event(Hook::TcIngress, Reason::NoBackend);
        let at = SystemTime::UNIX_EPOCH + Duration::from_micros(42);
        let record = Record::new(&event, at, Some("eth0".to_owned()), Some(web())).expect("known");
        let json = serde_json::to_value(record).expect("JSON");
        assert_eq!(
            json,
            serde_json::json!({
                "time": "1970-01-01T00:00:00.000042Z",
                "hook": "tc-ingress",
                "device": "eth0",
                "process": null,
                "reason": "no_backend",
                "effect": "answer",
                "protocol": "TCP",
                "before": {
                    "src": {"address": "192.0.2.9", "port": 40000},
                    "dst": {"address": "10.96.0.1", "port": 80},
                },
                "after": null,
                "service": {"namespace": "default", "name": "web", "port_name": "http"},
                "length": 74,
            })
        );
    }

    #[test]
    fn an_event_of_a_younger_klb_is_left_out() {
        for (hook, reason) in [(9, 0), (0, 200)] {
            let event = Event {
                hook,
                reason,
                ..Event::default()
            };
            assert!(Record::new(&event, SystemTime::UNIX_EPOCH, None, None).is_none());
        }
    }
}
