//! Sizes, alignments and the absence of holes, checked at compile time, and
//! what the agent needs to put these types into maps.

use crate::{
    addr::{Addr4, Addr6, Port},
    credit::Credit,
    flow::{FlowEntry, Tuple},
    known::Known,
    node::{Config, Device, Early, EarlyKey, FragmentKey, FragmentPorts, Netns, Network, Route},
    served::Served,
    service::{
        Affinity, AffinityKey, BackendRef, Name, ServiceEntry, ServiceKey, ServiceMeta, Slot,
        SourceRange,
    },
    socket::{SocketEntry, SocketKey},
    trace::{Ends, Event, Trace, Tracing},
    traffic::Traffic,
};

/// Asserts that a type has the given size and alignment and that its fields,
/// whose sizes follow, leave no hole: a key with a hole would match by luck.
macro_rules! layout {
    ($type:ty, $size:literal, align $align:literal, [$($field:expr),+]) => {
        const _: () = {
            assert!(size_of::<$type>() == $size);
            assert!(align_of::<$type>() == $align);
            assert!(0 $(+ $field)+ == $size);
        };

        // SAFETY: `repr(C)` without holes (asserted above), and every field is
        // an integer or an array of integers, for which all bytes are valid.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $type {}
    };
}

layout!(Addr4, 4, align 4, [4]);
layout!(Addr6, 16, align 4, [16]);
layout!(Port, 2, align 2, [2]);
layout!(BackendRef, 8, align 4, [4, 4]);
layout!(Name, 64, align 1, [64]);

layout!(ServiceKey<Addr4>, 8, align 4, [4, 2, 1, 1]);
layout!(ServiceKey<Addr6>, 20, align 4, [16, 2, 1, 1]);
layout!(ServiceEntry, 28, align 4, [4, 4, 4, 4, 4, 4, 1, 1, 2]);
layout!(SourceRange<Addr4>, 8, align 1, [4, 4]);
layout!(SourceRange<Addr6>, 20, align 1, [4, 16]);
layout!(AffinityKey<Addr4>, 8, align 4, [4, 4]);
layout!(AffinityKey<Addr6>, 20, align 4, [16, 4]);
layout!(Affinity, 12, align 4, [8, 4]);
layout!(Slot<Addr4>, 16, align 4, [4, 2, 2, 8]);
layout!(Slot<Addr6>, 28, align 4, [16, 2, 2, 8]);
layout!(ServiceMeta, 196, align 2, [64, 64, 64, 2, 1, 1]);

layout!(Tuple<Addr4>, 16, align 4, [4, 4, 2, 2, 1, 1, 2]);
layout!(Tuple<Addr6>, 40, align 4, [16, 16, 2, 2, 1, 1, 2]);
layout!(FlowEntry<Addr4>, 44, align 4, [4, 4, 2, 2, 1, 1, 1, 1, 4, 8, 4, 4, 4, 4]);
layout!(FlowEntry<Addr6>, 68, align 4, [16, 16, 2, 2, 1, 1, 1, 1, 4, 8, 4, 4, 4, 4]);

layout!(Known, 8, align 4, [4, 4]);
layout!(Credit, 8, align 4, [4, 4]);
layout!(Served, 8192, align 1, [8192]);

layout!(SocketKey<Addr4>, 16, align 4, [8, 4, 2, 1, 1]);
layout!(SocketKey<Addr6>, 28, align 4, [8, 16, 2, 1, 1]);
layout!(SocketEntry<Addr4>, 20, align 4, [4, 2, 2, 4, 8]);
layout!(SocketEntry<Addr6>, 32, align 4, [16, 2, 2, 4, 8]);

layout!(Network<Addr4>, 8, align 4, [4, 4]);
layout!(Network<Addr6>, 32, align 4, [16, 16]);
layout!(Config, 88, align 4, [8, 32, 2, 2, 4, 4, 8, 28]);
layout!(Device, 24, align 4, [4, 16, 4]);
layout!(Route<Addr4>, 40, align 4, [4, 4, 4, 4, 4, 4, 4, 12]);
layout!(Route<Addr6>, 64, align 4, [16, 16, 4, 4, 4, 4, 4, 12]);
layout!(Netns, 24, align 4, [4, 16, 4]);
layout!(FragmentKey<Addr4>, 16, align 4, [4, 4, 4, 1, 1, 2]);
layout!(FragmentKey<Addr6>, 40, align 4, [16, 16, 4, 1, 1, 2]);
layout!(EarlyKey<Addr4>, 20, align 4, [16, 4]);
layout!(EarlyKey<Addr6>, 44, align 4, [40, 4]);
layout!(Early, 2052, align 4, [4, 2048]);
layout!(FragmentPorts, 4, align 2, [2, 2]);
layout!(Trace, 392, align 8, [8, 24, 256, 96, 6, 2]);
layout!(Ends, 36, align 4, [16, 16, 2, 2]);
layout!(Event, 128, align 8, [8, 24, 16, 36, 36, 4, 4]);
layout!(Tracing, 8384, align 8, [128, 8192, 40, 8, 16]);
layout!(Traffic, 48, align 8, [4, 4, 8, 8, 8, 8, 8]);
