//! The kernel's sum of a whole packet (`CHECKSUM_COMPLETE`), which devices and tunnels
//! give it: it has to stay true whatever is written, or the kernel sums the packet up
//! again and blames the device.

use std::net::SocketAddr;

use lb_common::{
    Hook,
    flow::{SCTP, UDP},
    node::{CONFIG_BYPASS, Config},
    service::{FRONTEND_ECHO, FRONTEND_REFUSE},
};
use lb_tests::{
    fragments::cut,
    icmp::{Message, echo, too_big},
    packet::{Packet, flags},
    private::{in_private_namespace, ip},
    program::{Backend, Datapath},
};
use nix::libc::{EBADMSG, EINVAL};

use crate::world::{World, make_a_router, sctp_worlds, with_cluster_network, worlds};

/// A datapath, and what was wrong so far.
struct Summing {
    datapath: Datapath,
    wrong: Vec<String>,
}

impl Summing {
    fn run(&mut self, what: &str, hook: Hook, frame: &[u8]) -> Vec<u8> {
        match self.datapath.run_with_sum(hook, frame) {
            Ok(frame) => frame,
            Err(error) if error.raw_os_error() == Some(EBADMSG) => {
                self.wrong.push(format!("{what}, {hook:?}"));
                self.datapath.run(hook, frame).frame
            }
            Err(error) => panic!("{what}, {hook:?}: {error}"),
        }
    }

    /// Makes the frontend lead to the backend.
    fn serve(&mut self, world: &World, local: bool, flags: u32) {
        let (addr, frontend) = (world.backend, world.frontend);
        self.datapath
            .serve(world.protocol, frontend, &[Backend { addr, local }]);
        let config = self.datapath.config();
        self.datapath.configure(&Config { flags, ..config });
    }

    /// The first packet and its answer, by way of the stack and past it.
    fn there_and_back(&mut self, world: &World) {
        let what = format!("{} of {}", world.protocol, world.client.ip());
        let first = world.first(world.frontend).bytes();
        self.run(&format!("{what}, first"), Hook::TcIngress, &first);
        let answer = world.answer(world.backend).bytes();
        for hook in [Hook::TcIngress, Hook::TcEgress] {
            self.run(&format!("{what}, answer"), hook, &answer);
        }
        self.run(&format!("{what}, again"), Hook::TcIngress, &first);
    }

    /// What routers say of its packets, and of those of its answer.
    fn errors(&mut self, world: &World) {
        let what = format!("{} of {}, error", world.protocol, world.client.ip());
        let about = |frame: &[u8], to| {
            let router = world.stranger.ip();
            Message::about(frame, usize::MAX, router, to, too_big(router)).bytes()
        };
        let first = world.first(world.frontend).bytes();
        let entered = self.run(&what, Hook::TcIngress, &first);
        let error = about(&entered, world.client.ip());
        self.run(&what, Hook::TcEgress, &error);
        let answer = world.answer(world.backend).bytes();
        let left = self.run(&what, Hook::TcEgress, &answer);
        let error = about(&left, world.frontend.ip());
        self.run(&format!("{what} about an answer"), Hook::TcIngress, &error);
    }

    /// Datagrams larger than a packet.
    fn fragments(&mut self, world: &World) {
        let what = format!("{} of {}, fragment", world.protocol, world.client.ip());
        for (id, (hook, src, dst)) in (7..).zip([
            (Hook::TcIngress, world.client, world.frontend),
            (Hook::TcEgress, world.backend, world.client),
        ]) {
            let large = Packet::udp(src, dst).payload(vec![7; 3000]);
            for (number, frame) in cut(&large, id, 1000).iter().enumerate() {
                self.run(&format!("{what} {number}"), hook, frame);
            }
        }
    }

    /// What is answered by the node itself.
    fn answers(&mut self, world: &World) {
        let what = format!("{} of {}", world.protocol, world.client.ip());
        let address = world.frontend.ip();
        let config = with_cluster_network(self.datapath.config(), address);
        self.datapath.configure(&config);
        self.datapath
            .put_address(address, FRONTEND_REFUSE | FRONTEND_ECHO);
        let other_port = SocketAddr::new(address, 81);
        // Of what is cut off to be quoted the kernel forgets its sum, which the run does
        // not know.
        if world.protocol != SCTP {
            let refused = world.first(other_port).payload(Vec::new()).bytes();
            self.run(&format!("{what}, refused"), Hook::TcIngress, &refused);
        }
        let [kind, _] = echo(address);
        let ping = Message {
            src: world.client.ip(),
            dst: address,
            kind,
            rest: 1,
            payload: b"how are you".to_vec(),
        };
        self.run(&format!("{what}, ping"), Hook::TcIngress, &ping.bytes());
    }

    /// There and back by the node's own address.
    fn masqueraded(&mut self, world: &World) {
        let what = format!("{} of {}, masqueraded", world.protocol, world.client.ip());
        let first = world.first(world.frontend).bytes();
        let entered = self.run(&format!("{what}, first"), Hook::TcIngress, &first);
        let left = self.run(&format!("{what}, first"), Hook::TcEgress, &entered);
        let source = lb_tests::packet::read(&left).src;
        let answer =
            Packet::tcp(world.backend, source, flags::SYN | flags::ACK).numbers(5000, 1001);
        let entered = self.run(&format!("{what}, answer"), Hook::TcIngress, &answer.bytes());
        self.run(&format!("{what}, answer"), Hook::TcEgress, &entered);
    }
}

/// Whether the kernel can tell.
fn is_told(datapath: &Datapath) -> bool {
    let packet = worlds()[0].first(worlds()[0].stranger).bytes();
    match datapath.run_with_sum(Hook::TcIngress, &packet) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(EINVAL), "an older kernel");
            eprintln!("before Linux 6.12 the kernel does not tell");
            false
        }
    }
}

#[test]
fn the_sum_of_a_packet_follows_all_that_is_written() {
    in_private_namespace(|| {
        ip("link set lo up");
        make_a_router();
        let mut summing = Summing {
            datapath: Datapath::new(),
            wrong: Vec::new(),
        };
        if !is_told(&summing.datapath) {
            return;
        }
        for flags in [0, CONFIG_BYPASS] {
            for mut world in worlds().into_iter().chain(sctp_worlds()) {
                world.client.set_port(41_000 + flags as u16);
                summing.serve(&world, true, flags);
                summing.there_and_back(&world);
                summing.errors(&world);
                summing.answers(&world);
                if world.protocol == UDP {
                    summing.fragments(&world);
                }
                if world.is_tcp() {
                    world.client.set_port(42_000 + flags as u16);
                    summing.serve(&world, false, flags);
                    summing.masqueraded(&world);
                }
            }
        }
        assert!(summing.wrong.is_empty(), "{:#?}", summing.wrong);
    });
}
