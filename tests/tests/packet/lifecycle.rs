//! The life of a flow: when it begins anew, when it ends, and that nothing of
//! it is left to harm another connection.

use std::net::SocketAddr;

use lb_common::{
    Credit, Hook, Reason,
    flow::{FORWARD, REPLY, State},
};
use lb_tests::{
    cpu,
    fragments::cut,
    packet::{self, Packet, flags},
    program::Datapath,
};

use crate::world::{World, answered, local, tcp_worlds, translated, udp_worlds, untouched, worlds};

/// A TCP connection in steps. The client's sequence numbers begin at 1000, the
/// backend's at 5000.
struct Connection {
    world: World,
    datapath: Datapath,
}

impl Connection {
    fn opening(world: World) -> Self {
        Self::opening_with(Credit::MOST, world)
    }

    /// Among the young, if there is no credit.
    fn opening_with(credit: u32, world: World) -> Self {
        let mut datapath = world.serve_one();
        datapath.set_credit(credit);
        let mut connection = Self { world, datapath };
        connection.client_opens();
        connection
    }

    /// The handshake is over, and nothing has been sent.
    fn accepted(world: World) -> Self {
        Self::accepted_with(Credit::MOST, world)
    }

    fn accepted_with(credit: u32, world: World) -> Self {
        let mut connection = Self::opening_with(credit, world);
        connection.backend_answers();
        connection.client_sends(flags::ACK);
        connection
    }

    fn established(world: World) -> Self {
        Self::established_with(Credit::MOST, world)
    }

    fn established_with(credit: u32, world: World) -> Self {
        let mut connection = Self::accepted_with(credit, world);
        connection.backend_sends(flags::ACK);
        connection.assert_state(State::Established);
        connection
    }

    fn closed(world: World) -> Self {
        Self::closed_with(Credit::MOST, world)
    }

    fn closed_with(credit: u32, world: World) -> Self {
        let mut connection = Self::established_with(credit, world);
        connection.client_sends(flags::FIN | flags::ACK);
        connection.assert_state(State::HalfClosed);
        connection.backend_sends(flags::FIN | flags::ACK);
        connection.client_sends(flags::ACK);
        connection.assert_state(State::Closed);
        connection
    }

    fn client_opens(&mut self) {
        let syn = self.world.first(self.world.frontend).bytes();
        let entered = self.datapath.run(Hook::TcIngress, &syn);
        assert_eq!(entered.reason, Reason::NewFlow);
    }

    fn backend_answers(&mut self) {
        let answer = self.world.answer(self.world.backend).bytes();
        let left = self.datapath.run(Hook::TcEgress, &answer);
        assert_eq!(left.reason, Reason::Reply);
    }

    fn client_sends(&mut self, flags: u8) {
        let World {
            client, frontend, ..
        } = self.world;
        let packet = Packet::tcp(client, frontend, flags).numbers(1001, 5001);
        let to = (client, self.world.backend);
        translated(
            &mut self.datapath,
            Hook::TcIngress,
            &packet,
            Reason::Forward,
            to,
        );
    }

    fn backend_sends(&mut self, flags: u8) {
        let World {
            client,
            frontend,
            backend,
            ..
        } = self.world;
        let packet = Packet::tcp(backend, client, flags).numbers(5001, 1001);
        let to = (frontend, client);
        translated(
            &mut self.datapath,
            Hook::TcEgress,
            &packet,
            Reason::Reply,
            to,
        );
    }

    /// Both entries must agree.
    fn assert_state(&self, state: State) {
        let protocol = self.world.protocol;
        let states: Vec<_> = if self.world.client.is_ipv4() {
            let flows = self.datapath.flows4();
            flows.values().map(|flow| flow.state(protocol)).collect()
        } else {
            let flows = self.datapath.flows6();
            flows.values().map(|flow| flow.state(protocol)).collect()
        };
        assert_eq!(states, [state, state]);
    }

    /// A SYN from the client's same port, with the given sequence number, after
    /// the frontend's backend was replaced.
    fn syn_after_replacement(&mut self, seq: u32) -> packet::Seen {
        let World {
            client,
            frontend,
            other_backend,
            protocol,
            ..
        } = self.world;
        self.datapath
            .serve(protocol, frontend, &[local(other_backend)]);
        let syn = Packet::tcp(client, frontend, flags::SYN).numbers(seq, 0);
        packet::read(&self.datapath.run(Hook::TcIngress, &syn.bytes()).frame)
    }
}

/// A packet on another CPU may have missed it among the confirmed just before,
/// and must find it among the young then.
#[test]
fn a_confirmed_connection_stays_among_the_young_until_its_next_news() {
    for world in tcp_worlds() {
        for news in [flags::ACK, flags::FIN | flags::ACK] {
            let mut connection = Connection::accepted_with(0, world);
            let counts = |datapath: &Datapath| (datapath.young_count(), datapath.flow_count());
            assert_eq!(counts(&connection.datapath), (2, 2));
            if news == flags::ACK {
                connection.datapath.age_flows(1);
            }
            connection.client_sends(news);
            assert_eq!(counts(&connection.datapath), (0, 2));
        }
    }
}

#[test]
fn both_entries_go_through_the_states_together() {
    for world in tcp_worlds() {
        for credit in [0, 1] {
            Connection::closed_with(credit, world);
        }
    }
}

/// What is not among the young need not be moved from there. All is on one CPU
/// here, which begins with credit for one.
#[test]
fn a_connection_that_is_answered_is_credit_for_the_next() {
    cpu::stay();
    for world in tcp_worlds() {
        let mut connection = Connection::accepted_with(1, world);
        for port in 2000..2010 {
            assert_eq!(connection.datapath.young_count(), 0, "{port}");
            connection.world.client.set_port(port);
            connection.client_opens();
            connection.backend_answers();
            connection.client_sends(flags::ACK);
        }
        assert_eq!(connection.datapath.flow_count(), 2 * 11);
    }
}

/// On the same CPU.
#[test]
fn a_connection_without_credit_earns_some_for_the_next() {
    cpu::stay();
    for world in tcp_worlds() {
        let mut connection = Connection::accepted_with(0, world);
        assert_eq!(connection.datapath.young_count(), 2);
        connection.world.client.set_port(2000);
        connection.client_opens();
        assert_eq!(connection.datapath.young_count(), 2);
    }
}

/// Its SYN comes again and again, later each time than the one before.
#[test]
fn a_connection_that_is_not_answered_is_found_among_the_young() {
    for world in tcp_worlds() {
        let mut connection = Connection::opening_with(0, world);
        connection.datapath.set_credit(Credit::MOST);
        for _ in 0..3 {
            connection.datapath.age_flows(40);
            let syn = world.first(world.frontend).bytes();
            let entered = connection.datapath.run(Hook::TcIngress, &syn);
            assert_eq!(entered.reason, Reason::Forward);
            assert_eq!(connection.datapath.flow_count(), 2);
            assert_eq!(connection.datapath.young_count(), 2);
        }
    }
}

/// The other may be in either table, and has the same tuple back from the backend.
#[test]
fn a_connection_gets_another_port_where_one_in_the_other_table_has_its_own() {
    for world in tcp_worlds() {
        for credit in [[0, 1], [1, 0]] {
            let mut connection = Connection::opening_with(credit[0], world);
            let datapath = &mut connection.datapath;
            let backends = [local(world.backend)];
            datapath.serve(world.protocol, world.other_frontend, &backends);
            datapath.set_credit(credit[1]);
            let syn = world.first(world.other_frontend).bytes();
            let seen = packet::read(&datapath.run(Hook::TcIngress, &syn).frame);
            assert_eq!(seen.dst, world.backend);
            assert_ne!(seen.src.port(), world.client.port());
            connection.backend_answers();
            connection.client_sends(flags::ACK);
        }
    }
}

#[test]
fn a_retransmitted_syn_goes_to_the_same_backend() {
    for world in tcp_worlds() {
        let seen = Connection::opening(world).syn_after_replacement(1000);
        assert_eq!(seen.dst, world.backend);
    }
}

#[test]
fn a_new_syn_is_a_new_connection_unless_the_old_one_lives() {
    for world in tcp_worlds() {
        let other = world.other_backend;
        let mut opening = Connection::opening(world);
        assert_eq!(opening.syn_after_replacement(77).dst, other);
        assert_eq!(opening.datapath.flow_count(), 2, "the old flow is gone");
        let mut closed = Connection::closed(world);
        assert_eq!(closed.syn_after_replacement(77).dst, other);
        assert_eq!(closed.datapath.flow_count(), 2, "the old flow is gone");
        // A guessed SYN must not move a connection that lives.
        let mut established = Connection::established(world);
        assert_eq!(established.syn_after_replacement(77).dst, world.backend);
    }
}

#[test]
fn a_reset_ends_the_flow_from_either_side() {
    for world in tcp_worlds() {
        for from_client in [true, false] {
            let mut connection = Connection::established(world);
            if from_client {
                connection.client_sends(flags::RST);
            } else {
                connection.backend_sends(flags::RST | flags::ACK);
            }
            connection.assert_state(State::Reset);
            assert_eq!(
                connection.syn_after_replacement(77).dst,
                world.other_backend
            );
        }
    }
}

#[test]
fn a_refused_connection_is_told_to_the_client() {
    for world in tcp_worlds() {
        let mut connection = Connection::opening(world);
        let refusal = Packet::tcp(world.backend, world.client, flags::RST | flags::ACK);
        translated(
            &mut connection.datapath,
            Hook::TcEgress,
            &refusal.numbers(0, 1001),
            Reason::Reply,
            (world.frontend, world.client),
        );
    }
}

#[test]
fn a_direct_connection_from_a_used_port_is_left_alone() {
    for world in tcp_worlds() {
        let mut connection = Connection::closed(world);
        let datapath = &mut connection.datapath;
        let syn = Packet::tcp(world.client, world.backend, flags::SYN).numbers(900_000, 0);
        untouched(datapath, Hook::TcIngress, &syn.bytes(), Reason::NotService);
        let answer = Packet::tcp(world.backend, world.client, flags::SYN | flags::ACK)
            .numbers(70, 900_001)
            .bytes();
        untouched(datapath, Hook::TcEgress, &answer, Reason::StaleFlow);
        assert_eq!(datapath.flow_count(), 0, "the old flow is gone");
        let more = Packet::tcp(world.backend, world.client, flags::ACK)
            .numbers(71, 900_001)
            .bytes();
        untouched(datapath, Hook::TcEgress, &more, Reason::NotService);
    }
}

#[test]
fn the_refusal_of_a_direct_connection_is_left_alone() {
    for world in tcp_worlds() {
        let mut connection = Connection::closed(world);
        let refusal = Packet::tcp(world.backend, world.client, flags::RST | flags::ACK)
            .numbers(0, 900_001)
            .bytes();
        untouched(
            &mut connection.datapath,
            Hook::TcEgress,
            &refusal,
            Reason::StaleFlow,
        );
    }
}

#[test]
fn a_silent_flow_ends_in_both_directions() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        datapath.run(Hook::TcIngress, &world.first(world.frontend).bytes());
        datapath.age_flows(61);
        let answer = world.answer(world.backend).bytes();
        untouched(&mut datapath, Hook::TcEgress, &answer, Reason::StaleFlow);
        assert_eq!(datapath.flow_count(), 0);
    }
}

#[test]
fn an_established_connection_may_be_silent_for_a_day() {
    for world in tcp_worlds() {
        let mut connection = Connection::established(world);
        connection.datapath.age_flows(23 * 60 * 60);
        connection.backend_sends(flags::ACK);
        connection.datapath.age_flows(23 * 60 * 60);
        connection.client_sends(flags::ACK);
        connection.datapath.age_flows(25 * 60 * 60);
        let late = Packet::tcp(world.client, world.frontend, flags::ACK).bytes();
        untouched(
            &mut connection.datapath,
            Hook::TcIngress,
            &late,
            Reason::NoFlow,
        );
    }
}

#[test]
fn traffic_in_one_direction_keeps_both_alive() {
    for world in udp_worlds() {
        let mut datapath = world.serve_one();
        let first = world.first(world.frontend);
        datapath.run(Hook::TcIngress, &first.bytes());
        for _ in 0..10 {
            datapath.age_flows(20);
            translated(
                &mut datapath,
                Hook::TcIngress,
                &first,
                Reason::Forward,
                (world.client, world.backend),
            );
        }
        answered(&mut datapath, &world);
    }
}

#[test]
fn an_entry_that_the_table_dropped_comes_back() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        let first = world.first(world.frontend);
        datapath.run(Hook::TcIngress, &first.bytes());
        datapath.evict(REPLY);
        assert_eq!(datapath.flow_count(), 1);
        // An entry tells the other one news at most once a second.
        datapath.age_flows(1);
        translated(
            &mut datapath,
            Hook::TcIngress,
            &first,
            Reason::Forward,
            (world.client, world.backend),
        );
        answered(&mut datapath, &world);
        datapath.evict(FORWARD);
        datapath.age_flows(1);
        answered(&mut datapath, &world);
        assert_eq!(datapath.flow_count(), 2);
    }
}

#[test]
fn udp_leaves_a_backend_that_has_gone_with_the_next_packet() {
    for world in udp_worlds() {
        let mut datapath = Datapath::new();
        let protocol = world.protocol;
        let [gone] = datapath.serve(protocol, world.frontend, &[local(world.backend)])[..] else {
            panic!("one backend was served");
        };
        let first = world.first(world.frontend);
        datapath.run(Hook::TcIngress, &first.bytes());
        datapath.serve(protocol, world.frontend, &[local(world.other_backend)]);
        translated(
            &mut datapath,
            Hook::TcIngress,
            &first,
            Reason::Forward,
            (world.client, world.backend),
        );
        datapath.set_generation(gone.id, 0);
        translated(
            &mut datapath,
            Hook::TcIngress,
            &first,
            Reason::NewFlow,
            (world.client, world.other_backend),
        );
        // The id lives again, but as another backend.
        datapath.set_generation(gone.id, gone.generation + 1);
        translated(
            &mut datapath,
            Hook::TcIngress,
            &first,
            Reason::Forward,
            (world.client, world.other_backend),
        );
    }
}

/// As pools of connections do, and who waits for a peer that has nothing to say.
#[test]
fn a_connection_may_be_silent_from_its_handshake_on() {
    for world in tcp_worlds() {
        let mut connection = Connection::accepted(world);
        connection.assert_state(State::Established);
        connection.datapath.age_flows(23 * 60 * 60);
        connection.backend_sends(flags::ACK);
        connection.client_sends(flags::ACK);
    }
}

/// Whoever forges the client's address cannot know what the backend's SYN says.
#[test]
fn a_guessed_acknowledgment_confirms_nothing() {
    for world in tcp_worlds() {
        let mut connection = Connection::opening_with(0, world);
        connection.backend_answers();
        for guess in [0, 5000, 5002] {
            let ack = Packet::tcp(world.client, world.frontend, flags::ACK).numbers(1001, guess);
            connection.datapath.run(Hook::TcIngress, &ack.bytes());
        }
        connection.assert_state(State::Opening);
        assert_eq!(connection.datapath.young_count(), 2);
    }
}

/// Fragments go through TC where XDP translates all else: what XDP has translated
/// is not taken for a direct datagram then.
#[test]
fn xdp_and_tc_share_a_flow_of_datagrams() {
    for world in udp_worlds() {
        let mut datapath = world.serve_one();
        let datagram = world.first(world.frontend);
        let translated = datapath.run(Hook::Xdp, &datagram.bytes());
        assert_eq!(translated.reason, Reason::NewFlow);
        let large = datagram.payload(vec![7; 3000]);
        for frame in cut(&large, 7, 1000) {
            assert_eq!(
                datapath.run(Hook::TcIngress, &frame).reason,
                Reason::Forward
            );
        }
        untouched(
            &mut datapath,
            Hook::TcIngress,
            &translated.frame,
            Reason::NotService,
        );
        assert_eq!(datapath.flow_count(), 2);
    }
}

#[test]
fn a_direct_datagram_from_a_used_port_ends_the_flow() {
    for world in udp_worlds() {
        for entry in [Hook::TcIngress, Hook::Xdp] {
            let mut datapath = world.serve_one();
            datapath.run(entry, &world.first(world.frontend).bytes());
            let direct = world.first(world.backend).bytes();
            untouched(&mut datapath, entry, &direct, Reason::StaleFlow);
            let answer = world.answer(world.backend).bytes();
            untouched(&mut datapath, Hook::TcEgress, &answer, Reason::NotService);
            assert_eq!(datapath.flow_count(), 0);
            // And back to the Service.
            datapath.run(entry, &world.first(world.frontend).bytes());
            answered(&mut datapath, &world);
        }
    }
}

/// It is looked for the frontend once in a second, whoever sends first in it: what
/// only the backend sends does not keep such a flow alive.
#[test]
fn a_datagram_for_a_frontend_that_has_gone_is_left_alone() {
    for world in udp_worlds() {
        for answers_first in [false, true] {
            let mut datapath = world.serve_one();
            let first = world.first(world.frontend);
            datapath.run(Hook::TcIngress, &first.bytes());
            datapath.stop_serving(world.protocol, world.frontend);
            datapath.age_flows(1);
            if answers_first {
                answered(&mut datapath, &world);
            }
            untouched(
                &mut datapath,
                Hook::TcIngress,
                &first.bytes(),
                Reason::NotService,
            );
            assert_eq!(datapath.flow_count(), 0);
        }
    }
}

#[test]
fn tcp_stays_with_a_backend_that_has_gone() {
    for world in tcp_worlds() {
        let mut connection = Connection::established(world);
        for id in 0..10 {
            connection.datapath.set_generation(id, 0);
        }
        connection.client_sends(flags::ACK);
    }
}

/// The tables hold 1024 entries each here, of which the credit of one CPU is half.
#[test]
fn a_flood_of_syns_does_not_wash_out_established_connections() {
    cpu::stay();
    for world in tcp_worlds() {
        let mut connection = Connection::established(world);
        assert_eq!(connection.datapath.young_count(), 0);
        let datapath = &mut connection.datapath;
        for n in 0..2500_u16 {
            let forged = SocketAddr::new(world.stranger.ip(), 1024 + n);
            let syn = Packet::tcp(forged, world.frontend, flags::SYN).numbers(u32::from(n), 0);
            let entered = datapath.run(Hook::TcIngress, &syn.bytes());
            assert_eq!(entered.reason, Reason::NewFlow);
            if n % 3 == 0 {
                // Guessing a second packet does not help, nor does the refusal
                // that it provokes.
                let ack = Packet::tcp(forged, world.frontend, flags::ACK).numbers(1, 1);
                datapath.run(Hook::TcIngress, &ack.bytes());
                let refusal = Packet::tcp(world.backend, forged, flags::RST).numbers(1, 0);
                datapath.run(Hook::TcEgress, &refusal.bytes());
            }
        }
        let data = Packet::tcp(world.client, world.frontend, flags::ACK).numbers(1001, 5001);
        let outcome = datapath.run(Hook::TcIngress, &data.bytes());
        assert_eq!(outcome.reason, Reason::Forward);
    }
}
