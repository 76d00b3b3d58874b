//! Who may open a flow, and to which of the backends.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use lb_common::{
    Addr4, Addr6, Hook, Reason,
    node::{Config, Network},
    service::{
        FRONTEND_DROP, FRONTEND_MAGLEV, FRONTEND_REFUSE, FRONTEND_SOURCE_RANGES, FrontendKind,
    },
};
use lb_tests::{
    packet::{Packet, read},
    program::{Backend, Datapath},
};

use crate::world::{
    World, behind_a_pod_device, dropped, local, tcp_worlds, untouched, with_cluster_network, worlds,
};

/// Some local backends, by ascending id.
fn backends(world: &World, count: u16) -> Vec<Backend> {
    let backend = |n| local(SocketAddr::new(world.backend.ip(), 3000 + n));
    (0..count).map(backend).collect()
}

/// Where a new flow of a client goes.
fn backend_of(datapath: &mut Datapath, hook: Hook, packet: &Packet) -> SocketAddr {
    let outcome = datapath.run(hook, &packet.bytes());
    assert_eq!(outcome.reason, Reason::NewFlow, "{packet:?}");
    read(&outcome.frame).dst
}

fn client(world: &World, port: u16) -> SocketAddr {
    SocketAddr::new(world.client.ip(), port)
}

/// The ports of backends that a hundred clients get.
fn spread(datapath: &mut Datapath, world: &World, hook: Hook) -> BTreeSet<u16> {
    (0..100)
        .map(|n| {
            let packet = Packet::first(world.protocol, client(world, 20_000 + n), world.frontend);
            backend_of(datapath, hook, &packet).port()
        })
        .collect()
}

#[test]
fn clients_outside_and_inside_have_their_own_ranges() {
    for world in worlds() {
        let mut datapath = Datapath::new();
        datapath.serve(world.protocol, world.frontend, &backends(&world, 5));
        datapath.change_frontend(world.protocol, world.frontend, |entry| {
            entry.slot_count = 2;
            entry.inner_first_slot = entry.first_slot + 1;
            entry.inner_slot_count = 4;
        });
        let outside = spread(&mut datapath, &world, Hook::TcIngress);
        assert_eq!(outside, BTreeSet::from([3000, 3001]));
        behind_a_pod_device(&mut datapath);
        let port = |n: u16| client(&world, 21_000 + n);
        let inside: BTreeSet<_> = (0..100)
            .map(|n| Packet::first(world.protocol, port(n), world.frontend))
            .map(|packet| backend_of(&mut datapath, Hook::TcIngress, &packet).port())
            .collect();
        assert_eq!(inside, BTreeSet::from([3001, 3002, 3003, 3004]));
    }
}

#[test]
fn a_local_policy_without_local_backends_drops_in_silence() {
    for world in worlds() {
        let mut datapath = Datapath::new();
        datapath.serve(world.protocol, world.frontend, &backends(&world, 1));
        datapath.change_frontend(world.protocol, world.frontend, |entry| {
            entry.slot_count = 0;
            entry.flags = FRONTEND_DROP;
        });
        for hook in [Hook::TcIngress, Hook::Xdp] {
            let packet = world.first(world.frontend);
            dropped(&mut datapath, hook, &packet, Reason::NoLocalBackend);
        }
        behind_a_pod_device(&mut datapath);
        backend_of(&mut datapath, Hook::TcIngress, &world.first(world.frontend));
    }
}

#[test]
fn only_clients_in_the_source_ranges_open_flows() {
    for world in worlds() {
        let mut datapath = Datapath::new();
        datapath.serve(world.protocol, world.frontend, &backends(&world, 1));
        let mut service = 0;
        datapath.change_frontend(world.protocol, world.frontend, |entry| {
            entry.flags = FRONTEND_SOURCE_RANGES;
            entry.kind = FrontendKind::LoadBalancer as u8;
            service = entry.service;
        });
        // A range of another Service is no range of this one.
        datapath.allow(service + 1, world.client.ip(), 8);
        for hook in [Hook::TcIngress, Hook::Xdp] {
            let packet = world.first(world.frontend);
            dropped(&mut datapath, hook, &packet, Reason::SourceRange);
        }
        let prefix = if world.client.is_ipv4() { 24 } else { 64 };
        let network: IpAddr = if world.client.is_ipv4() {
            "192.168.50.0".parse().expect("an address")
        } else {
            "fd00:50::".parse().expect("an address")
        };
        datapath.allow(service, network, prefix);
        backend_of(&mut datapath, Hook::TcIngress, &world.first(world.frontend));
        let mut stranger = world.first(world.frontend);
        stranger.src = world.stranger;
        dropped(
            &mut datapath,
            Hook::TcIngress,
            &stranger,
            Reason::SourceRange,
        );
    }
}

/// Asks from a new port each time.
struct Visitor {
    world: World,
    port: u16,
}

impl Visitor {
    const fn new(world: World) -> Self {
        Self {
            world,
            port: 30_000,
        }
    }

    fn visit(&mut self, datapath: &mut Datapath, frontend: SocketAddr) -> SocketAddr {
        self.port += 1;
        let packet = Packet::first(
            self.world.protocol,
            client(&self.world, self.port),
            frontend,
        );
        backend_of(datapath, Hook::TcIngress, &packet)
    }
}

/// Two frontends of one Service port with affinity, and 16 backends.
fn with_affinity(world: &World) -> (Datapath, Vec<lb_common::service::BackendRef>) {
    let mut datapath = Datapath::new();
    let backends = backends(world, 16);
    let references = datapath.serve(world.protocol, world.frontend, &backends);
    let mut first = None;
    datapath.change_frontend(world.protocol, world.frontend, |entry| {
        entry.affinity = 60;
        first = Some(*entry);
    });
    datapath.serve(world.protocol, world.other_frontend, &[]);
    datapath.change_frontend(world.protocol, world.other_frontend, |entry| {
        *entry = first.expect("read above");
    });
    (datapath, references)
}

#[test]
fn a_client_keeps_its_backend_at_every_frontend_and_hook() {
    for world in worlds() {
        let (mut datapath, _) = with_affinity(&world);
        let mut visitor = Visitor::new(world);
        let backend = visitor.visit(&mut datapath, world.frontend);
        for _ in 0..10 {
            for frontend in [world.frontend, world.other_frontend] {
                assert_eq!(visitor.visit(&mut datapath, frontend), backend);
            }
            let packet = Packet::first(
                world.protocol,
                client(&world, visitor.port + 1),
                world.frontend,
            );
            assert_eq!(backend_of(&mut datapath, Hook::Xdp, &packet), backend);
            visitor.port += 1;
        }
        // Others are spread all the same.
        let others: BTreeSet<_> = (0..50)
            .map(|n| {
                let ip = match world.client.ip() {
                    IpAddr::V4(_) => IpAddr::from([172, 16, 0, n]),
                    IpAddr::V6(_) => IpAddr::from([0xfd01, 0, 0, 0, 0, 0, 0, u16::from(n)]),
                };
                let packet =
                    Packet::first(world.protocol, SocketAddr::new(ip, 40_000), world.frontend);
                backend_of(&mut datapath, Hook::TcIngress, &packet)
            })
            .collect();
        assert!(others.len() > 5, "{others:?}");
    }
}

#[test]
fn affinity_ends_after_its_timeout_and_each_visit_refreshes_it() {
    for world in worlds() {
        let (mut datapath, _) = with_affinity(&world);
        let mut visitor = Visitor::new(world);
        let backend = visitor.visit(&mut datapath, world.frontend);
        for _ in 0..5 {
            datapath.age_affinity(50);
            assert_eq!(visitor.visit(&mut datapath, world.frontend), backend);
        }
        let later: BTreeSet<_> = (0..20)
            .map(|_| {
                datapath.age_affinity(61);
                visitor.visit(&mut datapath, world.frontend)
            })
            .collect();
        assert!(later.len() > 1, "always {later:?}");
    }
}

#[test]
fn affinity_does_not_lead_to_a_backend_that_has_gone_or_left_the_list() {
    for world in worlds() {
        let (mut datapath, references) = with_affinity(&world);
        let mut visitor = Visitor::new(world);
        let backend = visitor.visit(&mut datapath, world.frontend);
        let index = usize::from(backend.port() - 3000);
        // Still alive, and not in the list of new flows.
        datapath.change_frontend(world.protocol, world.frontend, |entry| {
            let n = index as u32;
            if n < 8 {
                entry.first_slot += 8;
            }
            entry.slot_count = 8;
            entry.inner_first_slot = entry.first_slot;
            entry.inner_slot_count = 8;
        });
        assert_ne!(visitor.visit(&mut datapath, world.frontend), backend);
        // At the other frontend all are in the list.
        let kept = visitor.visit(&mut datapath, world.other_frontend);
        let index = usize::from(kept.port() - 3000);
        datapath.set_generation(references[index].id, references[index].generation + 1);
        let others: BTreeSet<_> = (0..8)
            .map(|_| visitor.visit(&mut datapath, world.other_frontend))
            .collect();
        assert!(others.len() <= 2, "a new backend is kept: {others:?}");
    }
}

#[test]
fn every_backend_of_a_long_list_can_be_kept() {
    let world = tcp_worlds().next().expect("a world");
    let mut datapath = Datapath::new();
    datapath.serve(world.protocol, world.frontend, &backends(&world, 700));
    datapath.change_frontend(world.protocol, world.frontend, |entry| entry.affinity = 60);
    for n in 0..200 {
        let ip = IpAddr::from([172, 16, 0, n]);
        let mut visit = |port| {
            let packet = Packet::first(world.protocol, SocketAddr::new(ip, port), world.frontend);
            backend_of(&mut datapath, Hook::TcIngress, &packet)
        };
        assert_eq!(visit(1000), visit(1001));
    }
}

#[test]
fn a_maglev_table_is_asked_for_client_and_port() {
    for world in worlds() {
        let serve = |frontend| {
            let mut datapath = Datapath::new();
            datapath.serve(world.protocol, frontend, &backends(&world, 64));
            datapath.change_frontend(world.protocol, frontend, |entry| {
                entry.flags = FRONTEND_MAGLEV;
            });
            datapath
        };
        // Two nodes: the address of a NodePort differs.
        let mut elsewhere = world.other_frontend;
        elsewhere.set_ip(world.stranger.ip());
        let mut nodes = [
            (serve(world.other_frontend), world.other_frontend),
            (serve(elsewhere), elsewhere),
        ];
        let mut used = BTreeSet::new();
        for port in 20_000..20_300 {
            let [here, there] = nodes.each_mut().map(|(datapath, frontend)| {
                let packet = Packet::first(world.protocol, client(&world, port), *frontend);
                backend_of(datapath, Hook::TcIngress, &packet)
            });
            assert_eq!(here, there, "every node chooses the same");
            used.insert(here);
        }
        assert!(used.len() > 55, "{} of 64 slots", used.len());
    }
}

#[test]
fn other_ports_of_a_cluster_ip_are_refused() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        let mut other_port = world.frontend;
        other_port.set_port(81);
        let packet = world.first(other_port);
        untouched(
            &mut datapath,
            Hook::TcIngress,
            &packet.bytes(),
            Reason::NotService,
        );
        let config = with_cluster_network(datapath.config(), world.frontend.ip());
        datapath.configure(&config);
        // No entry for the address: it is no ClusterIP.
        let frame = packet.bytes();
        untouched(&mut datapath, Hook::TcIngress, &frame, Reason::NotService);
        datapath.put_address(world.frontend.ip(), FRONTEND_REFUSE);
        let outcome = datapath.run(Hook::TcIngress, &frame);
        assert_eq!(outcome.reason, Reason::NoSuchPort);
        untouched(&mut datapath, Hook::Xdp, &frame, Reason::LeftToTc);
        // ClusterIPs in both halves of the address space are in every network.
        let everything = Config {
            cluster_net4: Network {
                mask: Addr4::default(),
                ..config.cluster_net4
            },
            cluster_net6: Network {
                mask: Addr6::default(),
                ..config.cluster_net6
            },
            ..config
        };
        datapath.configure(&everything);
        let outcome = datapath.run(Hook::TcIngress, &frame);
        assert_eq!(outcome.reason, Reason::NoSuchPort);
        backend_of(&mut datapath, Hook::TcIngress, &world.first(world.frontend));
    }
}
