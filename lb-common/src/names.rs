//! Names of maps, programs and globals, as they stand in the object and below
//! the pin folder. The kernel cuts names at 15 bytes, so none is longer.

/// The layout of everything in this crate that stands in a map. A change that
/// an older or newer agent would misread gets a new number, and with it a pin
/// folder of its own.
pub const LAYOUT: &str = "v1";

/// Frontend → slot range; written by the agent.
pub const SERVICES4: &str = "klb_svc4";
pub const SERVICES6: &str = "klb_svc6";
/// Slot number → backend; written by the agent.
pub const SLOTS4: &str = "klb_slot4";
pub const SLOTS6: &str = "klb_slot6";
/// Backend id → living generation; written by the agent.
pub const BACKENDS: &str = "klb_backend";
/// Service id → names; written and read by the agent and the tool.
pub const META: &str = "klb_meta";
/// Tuple → translation; written by the packet programs.
pub const FLOWS4: &str = "klb_flow4";
pub const FLOWS6: &str = "klb_flow6";
/// Socket and remote address → translation; written by the socket programs.
pub const SOCKETS4: &str = "klb_sock4";
pub const SOCKETS6: &str = "klb_sock6";
/// Datagrams, and connections that began without credit; as [`FLOWS4`].
pub const YOUNG4: &str = "klb_young4";
pub const YOUNG6: &str = "klb_young6";
/// Client and Service port → backend; written by all programs.
pub const AFFINITY4: &str = "klb_affin4";
pub const AFFINITY6: &str = "klb_affin6";
/// Who may use a frontend, as an LPM trie; written by the agent.
pub const RANGES4: &str = "klb_range4";
pub const RANGES6: &str = "klb_range6";
/// Fragmented packet → its ports; written by the packet programs.
pub const FRAGMENTS4: &str = "klb_frag4";
pub const FRAGMENTS6: &str = "klb_frag6";
/// Fragment that came before its first → its frame; written by the TC programs.
pub const EARLY4: &str = "klb_early4";
pub const EARLY6: &str = "klb_early6";
/// By a hash: when something rare last happened; written by the packet programs, and
/// by the agent at a start.
pub const RARE: &str = "klb_rare";
/// By a hash of an address and port: when a packet of a flow was last seen to and
/// from there; written by the packet programs.
pub const KNOWN: &str = "klb_known";
/// A bit for each port at which anything is served; one entry, written by the agent.
pub const SERVED: &str = "klb_served";
/// How many connections may yet be opened among the confirmed; per CPU, written by
/// the packet programs.
pub const CREDIT: &str = "klb_credit";
/// Memory for an early frame; per CPU.
pub const EARLY: &str = "klb_early";
/// Settings; one entry, written by the agent.
pub const CONFIG: &str = "klb_config";
/// Port last tried for a masqueraded flow, by backend; written by the TC
/// programs.
pub const PORT_CURSORS: &str = "klb_cursor";
/// Device index → device; written by the agent.
pub const DEVICES: &str = "klb_device";
/// By a hash of what the kernel was asked: the way it told; per CPU, written by
/// the packet programs.
pub const ROUTES4: &str = "klb_route4";
pub const ROUTES6: &str = "klb_route6";
/// Cookie of a network namespace → pod; written by the agent.
pub const NETNS: &str = "klb_netns";
/// ICMP errors sent in this second; per CPU, written by the TC programs.
pub const ANSWERS: &str = "klb_answers";
/// Memory of a running packet program; per CPU.
pub const SCRATCH: &str = "klb_scratch";
/// Hook and reason → packets (or calls); per CPU, written by every program.
pub const COUNTERS: &str = "klb_count";

/// What `klb trace` asks for; one entry, written by the command.
pub const TRACE: &str = "klb_trace";
/// What the programs tell it; a ring, written by every program.
pub const EVENTS: &str = "klb_events";
/// Memory of a running packet program for an event; per CPU.
pub const TRACING: &str = "klb_tracing";

/// Backend id → what flows through it; per CPU, written by every program.
pub const TRAFFIC: &str = "klb_traffic";

/// Every map, in the order of a readable listing.
pub const MAPS: [&str; 38] = [
    SERVICES4,
    SERVICES6,
    SLOTS4,
    SLOTS6,
    BACKENDS,
    META,
    SERVED,
    RANGES4,
    RANGES6,
    FLOWS4,
    FLOWS6,
    YOUNG4,
    YOUNG6,
    CREDIT,
    KNOWN,
    AFFINITY4,
    AFFINITY6,
    FRAGMENTS4,
    FRAGMENTS6,
    EARLY4,
    EARLY6,
    RARE,
    EARLY,
    SOCKETS4,
    SOCKETS6,
    CONFIG,
    DEVICES,
    NETNS,
    ROUTES4,
    ROUTES6,
    PORT_CURSORS,
    ANSWERS,
    SCRATCH,
    TRACE,
    EVENTS,
    TRACING,
    COUNTERS,
    TRAFFIC,
];

pub const XDP: &str = "klb_xdp";
/// XDP for packets of several buffers too; loaded for native mode where the
/// kernel can.
pub const XDP_FRAGS: &str = "klb_xdp_frags";
pub const TC_INGRESS: &str = "klb_tc_in";
pub const TC_EGRESS: &str = "klb_tc_out";
pub const CONNECT4: &str = "klb_connect4";
pub const CONNECT6: &str = "klb_connect6";
pub const SENDMSG4: &str = "klb_sendmsg4";
pub const SENDMSG6: &str = "klb_sendmsg6";
pub const RECVMSG4: &str = "klb_recvmsg4";
pub const RECVMSG6: &str = "klb_recvmsg6";
pub const GETPEERNAME4: &str = "klb_getpeer4";
pub const GETPEERNAME6: &str = "klb_getpeer6";

/// Every program that attaches to a cgroup.
pub const SOCKET_PROGRAMS: [&str; 8] = [
    CONNECT4,
    CONNECT6,
    SENDMSG4,
    SENDMSG6,
    RECVMSG4,
    RECVMSG6,
    GETPEERNAME4,
    GETPEERNAME6,
];

/// Global (`u8`): 1 if the kernel has `bpf_set_retval` (5.18), by which a
/// socket hook chooses the error that the caller sees.
pub const HAS_SET_RETVAL: &str = "HAS_SET_RETVAL";
/// Global (`u8`): 1 if the kernel gives XDP packets of several buffers (5.18).
pub const HAS_XDP_FRAGS: &str = "HAS_XDP_FRAGS";
/// Globals (`u32` and `u64`): [`crate::clock::Ticks`], or 0 where ticks do not tell
/// the time.
pub const TICK: &str = "TICK";
pub const FIRST_TICK: &str = "FIRST_TICK";

/// Default number of entries of each map, in the order of [`MAPS`] where they
/// can be chosen; the object declares these.
pub mod size {
    /// Frontends of one family.
    pub const SERVICES: usize = 65_536;
    /// Slots of one family. A range being replaced is held twice for a moment.
    pub const SLOTS: usize = 262_144;
    /// Backends of all Service ports, both families.
    pub const BACKENDS: usize = 262_144;
    /// Service ports.
    pub const META: usize = 65_536;
    /// Flow entries of one family; a flow has two.
    pub const FLOWS: usize = 262_144;
    /// Flow entries of one family that no answer has confirmed yet.
    pub const YOUNG: usize = 131_072;
    /// Clients of one family with session affinity, by Service port.
    pub const AFFINITY: usize = 65_536;
    /// Networks of one family in `loadBalancerSourceRanges`.
    pub const RANGES: usize = 16_384;
    /// Fragmented packets of one family that are on their way at one time.
    pub const FRAGMENTS: usize = 4_096;
    /// Fragments of one family that may come before their first.
    pub const EARLY: usize = 256;
    /// Devices that programs are attached to.
    pub const DEVICES: usize = 4_096;
    /// Network namespaces of pods.
    pub const NETNS: usize = 4_096;
    /// Socket entries of one family; a translated socket has two.
    pub const SOCKETS: usize = 65_536;
    /// Bytes of the ring of events.
    pub const EVENTS: usize = 1 << 20;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_keeps_every_name_whole() {
        let programs = [XDP, XDP_FRAGS, TC_INGRESS, TC_EGRESS];
        for name in MAPS.iter().chain(&SOCKET_PROGRAMS).chain(&programs) {
            assert!(name.len() <= 15 && name.starts_with("klb_"), "{name}");
        }
    }
}
