//! What flows through a backend: the value of `klb_traffic`, per CPU.

use crate::service::BackendRef;

/// Counters of one life of a backend, on one CPU. Entry 0 of the map counts for
/// all backends that have no entry of their own.
///
/// Packets are frames as they are on the wire, also where the kernel has joined
/// them (GRO) or will split them (GSO); bytes are those of the frames as the hook
/// sees them, of joined ones with one header; under XDP without what fills up a short
/// frame. What a socket hook translates is counted as flows only: its packets meet no
/// program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// [`BackendRef::generation`] of the life that is counted; 0 in entry 0.
    pub generation: u32,
    pub pad: u32,
    /// Flows opened, at sockets and by packets.
    pub flows: u64,
    /// From clients to the backend.
    pub packets_in: u64,
    pub bytes_in: u64,
    /// From the backend to clients.
    pub packets_out: u64,
    pub bytes_out: u64,
}

/// Whose counters an entry holds, seen from a flow with some backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The flow's backend.
    Same,
    /// One that had the number before: its counters make way.
    Earlier,
    /// One that has the number now, while the flow has outlived its backend.
    Later,
}

impl Traffic {
    #[inline(always)]
    pub const fn owner(&self, backend: BackendRef) -> Owner {
        match backend
            .generation
            .wrapping_sub(self.generation)
            .cast_signed()
        {
            0 => Owner::Same,
            1.. => Owner::Earlier,
            _ => Owner::Later,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_follow_each_other_also_when_the_number_wraps() {
        for (counted, flow, owner) in [
            (0, 1, Owner::Earlier),
            (7, 7, Owner::Same),
            (7, 9, Owner::Earlier),
            (9, 7, Owner::Later),
            (u32::MAX, 1, Owner::Earlier),
            (1, u32::MAX, Owner::Later),
        ] {
            let traffic = Traffic {
                generation: counted,
                ..Traffic::default()
            };
            let backend = BackendRef {
                id: 1,
                generation: flow,
            };
            assert_eq!(traffic.owner(backend), owner, "{counted} {flow}");
        }
    }
}
