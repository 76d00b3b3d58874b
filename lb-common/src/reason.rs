//! Why a program did what it did.

/// The hooks that count for themselves. The number is a row of the counters.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    Xdp = 0,
    TcIngress = 1,
    TcEgress = 2,
    Socket = 3,
}

impl Hook {
    pub const ALL: [Self; 4] = [Self::Xdp, Self::TcIngress, Self::TcEgress, Self::Socket];

    /// As metrics and `klb status` spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::TcIngress => "tc-ingress",
            Self::TcEgress => "tc-egress",
            Self::Socket => "socket",
        }
    }
}

/// Declares [`Reason`] and, from the same table, everything that must know
/// every reason.
macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $number:literal, $name:literal, $effect:ident;)+) => {
        /// The outcome of one run of a program: return type, index of the
        /// counter and label of the metric.
        ///
        /// The numbers stand in pinned maps and in dashboards: a number is
        /// never given to another reason.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $($(#[doc = $doc])+ $variant = $number,)+
        }

        impl Reason {
            /// Every reason, by number.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// As metrics and `klb status` spell it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// What happens to the packet or the call.
            #[inline(always)]
            pub const fn effect(self) -> Effect {
                match self { $(Self::$variant => Effect::$effect),+ }
            }

            /// One sentence for the operator.
            pub const fn description(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+)),+ }
            }
        }
    };
}

/// What a [`Reason`] means for the packet or the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// It goes on as it came.
    Pass,
    /// It goes on translated.
    Translate,
    /// It ends here: a packet is dropped, a call refused.
    Refuse,
    /// It goes on later.
    Keep,
    /// The packet goes back to its sender as an answer; a call is refused.
    Answer,
}

reasons! {
    /// No frontend and no flow of klb's.
    NotService = 0, "not_service", Pass;
    /// First packet of a flow, sent to a backend.
    NewFlow = 1, "new_flow", Translate;
    /// Later packet of a flow, sent to the flow's backend.
    Forward = 2, "forward", Translate;
    /// Reply of a backend, given the frontend's address again.
    Reply = 3, "reply", Translate;
    /// Socket call translated.
    Socket = 4, "socket", Translate;
    /// Neither IPv4 nor IPv6.
    NotIp = 5, "not_ip", Pass;
    /// A protocol that klb does not balance, or ICMP that is about no flow.
    OtherProtocol = 6, "other_protocol", Pass;
    /// Too short for the headers it announces.
    Truncated = 7, "truncated", Pass;
    /// A header that contradicts itself.
    Malformed = 8, "malformed", Pass;
    /// A fragment whose first one was not seen, or not translated.
    Fragment = 9, "fragment", Pass;
    /// IPv6 extension headers that do not end at a transport header, too many of them, or source routing.
    ExtensionHeader = 10, "extension_header", Pass;
    /// TCP in mid-connection without a flow: a connection that somebody else translates, or that outlived its flow.
    NoFlow = 11, "no_flow", Pass;
    /// On its way through the node: translated, or to be translated, where it goes out.
    TransitReply = 12, "transit_reply", Pass;
    /// Left by XDP to TC: the sender's kernel has not finished the checksum.
    UnfinishedChecksum = 13, "unfinished_checksum", Pass;
    /// Left by XDP to TC: the chosen backend is not on this node.
    RemoteBackend = 14, "remote_backend", Pass;
    /// A direct connection that reuses the ports of an old flow; the old flow was removed.
    StaleFlow = 15, "stale_flow", Pass;
    /// The Service has no backend: answered with "port unreachable".
    NoBackend = 16, "no_backend", Answer;
    /// Every backend tried already has a flow with this client's address and port.
    TupleConflict = 17, "tuple_conflict", Refuse;
    /// The flow table refused an entry.
    FlowTableFull = 18, "flow_table_full", Refuse;
    /// The kernel refused to change the packet.
    RewriteFailed = 19, "rewrite_failed", Refuse;
    /// A frontend points at a slot that does not exist.
    BadSlot = 20, "bad_slot", Refuse;
    /// First packet of a flow whose backend will see an address of this node.
    NewMasqueradedFlow = 21, "new_masqueraded_flow", Translate;
    /// Packet to a backend, given an address of this node.
    Masqueraded = 22, "masqueraded", Translate;
    /// Answer of a backend to an address of this node, given the client's address again.
    Unmasqueraded = 23, "unmasqueraded", Translate;
    /// No port of the node is left for another flow to this backend.
    MasqueradeExhausted = 24, "masquerade_exhausted", Refuse;
    /// A traffic policy Local, and no backend on this node.
    NoLocalBackend = 25, "no_local_backend", Refuse;
    /// The client is not in loadBalancerSourceRanges.
    SourceRange = 26, "source_range", Refuse;
    /// A port of a ClusterIP that no Service has: answered with "port unreachable".
    NoSuchPort = 27, "no_such_port", Answer;
    /// An answer was due and the limit of answers reached.
    AnswerLimit = 28, "answer_limit", Refuse;
    /// Left by XDP to TC: the packet is to be answered, or is a fragment.
    LeftToTc = 29, "left_to_tc", Pass;
    /// ICMP error about a flow, translated like the packet that it is about.
    IcmpError = 30, "icmp_error", Translate;
    /// Ping of a Service's address: answered.
    Echo = 31, "echo", Answer;
    /// Call of a process that is not served at the socket: it opted out, or only the node's own are.
    SocketNotServed = 32, "socket_not_served", Pass;
    /// Fragment that came before the first one of its packet: kept until that comes.
    FragmentKept = 33, "fragment_kept", Keep;
    /// Fragment that was kept: comes in once more, now that the first has come.
    FragmentReleased = 34, "fragment_released", Keep;
    /// The backend knows another connection with the client's port: the client's next SYN gets another.
    PortTaken = 35, "port_taken", Refuse;
}

/// Room for reasons in a row of the counters; a power of two, so that rows
/// stay where they are when reasons are added.
pub const REASONS: u32 = 64;

/// Entries of the counter map.
pub const COUNTERS: u32 = Hook::ALL.len() as u32 * REASONS;

/// Where a hook counts a reason.
#[inline(always)]
pub const fn counter_index(hook: Hook, reason: Reason) -> u32 {
    hook as u32 * REASONS + reason as u32
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn reasons_are_numbered_in_order_and_named_once() {
        let mut names = HashSet::new();
        for (number, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, number);
            assert!(names.insert(reason.name()), "{} twice", reason.name());
            assert!(reason.description().ends_with('.'));
        }
        assert!(Reason::ALL.len() <= REASONS as usize);
    }

    #[test]
    fn counters_do_not_overlap() {
        let mut seen = HashSet::new();
        for hook in Hook::ALL {
            for reason in Reason::ALL {
                let index = counter_index(hook, *reason);
                assert!(index < COUNTERS && seen.insert(index));
            }
        }
    }
}
