//! What `klb trace` is told: what happened, to whom, and only what was asked for.

use std::net::{IpAddr, SocketAddr};

use lb_common::{
    Addr4, Addr6, Address as _, Hook, Reason,
    flow::{TCP, UDP},
    node::Network,
    service::{FRONTEND_ECHO, FRONTEND_SOURCE_RANGES},
    trace::{EVENT_ENDS, EVENT_TRANSLATED, Ends, OLD_XDP_BYTES, Trace, bit_of_hook, bit_of_reason},
};
use lb_tests::{
    fragments::cut,
    icmp::{Message, echo, too_big},
    program::{Datapath, EVENT_BYTES},
    told::{Told, everything, now},
};

use crate::world::{HERE, local, tcp_worlds, udp_worlds, worlds};

/// With as much of the frames as there may be.
fn with_frames() -> Trace {
    Trace {
        snaplen: 2048,
        ..everything()
    }
}

fn mapped(addr: IpAddr) -> Addr6 {
    match addr {
        IpAddr::V4(addr) => Addr4::from(addr).mapped(),
        IpAddr::V6(addr) => addr.into(),
    }
}

fn only(addr: IpAddr) -> Network<Addr6> {
    Network {
        addr: mapped(addr),
        mask: Addr6 { octets: [255; 16] },
    }
}

fn ends(src: SocketAddr, dst: SocketAddr) -> Ends {
    Ends {
        src: mapped(src.ip()),
        dst: mapped(dst.ip()),
        src_port: src.port().into(),
        dst_port: dst.port().into(),
    }
}

/// Runs a frame, of which one event is told.
fn one(datapath: &mut Datapath, hook: Hook, frame: &[u8]) -> Told {
    let outcome = datapath.run(hook, frame);
    let told = datapath.told();
    let [told] = &told[..] else {
        panic!("{hook:?} {:?}: one event, not {told:?}", outcome.reason);
    };
    assert_eq!(told.reason(), outcome.reason);
    assert_eq!(told.event.hook, hook as u8);
    assert_eq!(told.event.ifindex, HERE);
    assert_eq!(told.event.trace, 7);
    told.clone()
}

#[test]
fn a_flow_is_told_with_both_ends_before_and_after() {
    for (world, hook) in worlds()
        .into_iter()
        .flat_map(|world| [Hook::Xdp, Hook::TcIngress].map(|hook| (world, hook)))
    {
        let mut datapath = world.serve_one();
        datapath.listen(&with_frames());
        let first = world.first(world.frontend).payload(vec![5; 300]).bytes();
        let told = one(&mut datapath, hook, &first);
        assert_eq!(told.reason(), Reason::NewFlow);
        assert_eq!(told.event.flags, EVENT_ENDS | EVENT_TRANSLATED);
        assert_eq!(told.event.before, ends(world.client, world.frontend));
        assert_eq!(told.event.after, ends(world.client, world.backend));
        assert_eq!(
            (told.event.service, told.event.protocol),
            (1, world.protocol)
        );
        assert_eq!(told.event.length as usize, first.len());

        let answer = world.answer(world.backend).bytes();
        let told = one(&mut datapath, Hook::TcEgress, &answer);
        assert_eq!(told.reason(), Reason::Reply);
        assert_eq!(told.event.before, ends(world.backend, world.client));
        assert_eq!(told.event.after, ends(world.frontend, world.client));
        assert_eq!(told.event.service, 1);
        let told = one(&mut datapath, hook, &first);
        assert_eq!(told.reason(), Reason::Forward);
    }
}

/// Whether a frame was told in so many bytes as can be: before Linux 5.18 XDP tells
/// the start only, in words of 8 bytes.
fn is_enough(hook: Hook, told: usize, frame: usize) -> bool {
    told == frame || hook == Hook::Xdp && told == frame.min(OLD_XDP_BYTES) / 8 * 8
}

#[test]
fn frames_are_told_as_they_came_and_as_they_went_on() {
    for world in worlds() {
        for (hook, size) in [(Hook::TcIngress, 1400), (Hook::Xdp, 60)] {
            let mut datapath = world.serve_one();
            datapath.listen(&with_frames());
            let frame = world.first(world.frontend).payload(vec![5; size]).bytes();
            let outcome = datapath.run(hook, &frame);
            let told = datapath.told().remove(0);
            // Before Linux 5.18 XDP tells the start only.
            let length = told.before.len();
            assert!(is_enough(hook, length, frame.len()), "{hook:?}: {length}");
            assert_eq!(told.before, frame[..length]);
            assert_eq!(told.after, outcome.frame[..length]);
            assert_eq!(told.event.length_after as usize, outcome.frame.len());

            datapath.listen(&Trace {
                snaplen: 54,
                ..everything()
            });
            let told = one(&mut datapath, hook, &frame);
            assert_eq!((told.before.len(), told.after.len()), (54, 54));
        }
    }
}

#[test]
fn what_is_refused_or_dropped_is_told_with_its_frontend() {
    for world in worlds() {
        let mut datapath = Datapath::new();
        datapath.serve(world.protocol, world.frontend, &[]);
        datapath.listen(&with_frames());
        let frame = world.first(world.frontend).bytes();
        let told = one(&mut datapath, Hook::TcIngress, &frame);
        assert_eq!(told.reason(), Reason::NoBackend);
        assert_eq!(told.event.flags, EVENT_ENDS, "translated into nothing");
        assert_eq!(told.event.before, ends(world.client, world.frontend));
        assert_eq!(told.event.after, Ends::default());
        assert_eq!(told.event.service, 1);
        let answer = Message::read(&told.after);
        assert_eq!(answer.dst, world.client.ip(), "the answer is what went on");

        datapath.serve(
            world.protocol,
            world.other_frontend,
            &[local(world.backend)],
        );
        datapath.change_frontend(world.protocol, world.other_frontend, |entry| {
            entry.flags |= FRONTEND_SOURCE_RANGES;
        });
        let frame = world.first(world.other_frontend).bytes();
        let told = one(&mut datapath, Hook::TcIngress, &frame);
        assert_eq!(told.reason(), Reason::SourceRange);
        assert_eq!((told.event.service, told.after.len()), (2, 0));
    }
}

#[test]
fn what_passes_is_told_where_it_is_asked_for_and_stays_as_it_is() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        datapath.listen(&with_frames());
        let frame = world.first(world.stranger).bytes();
        for hook in [Hook::Xdp, Hook::TcIngress, Hook::TcEgress] {
            assert_eq!(datapath.run(hook, &frame).frame, frame);
            let told = datapath.told().remove(0);
            assert_eq!(told.reason(), Reason::NotService);
            assert_eq!(told.event.before, ends(world.client, world.stranger));
            let length = told.before.len();
            assert!(is_enough(hook, length, frame.len()), "{hook:?}: {length}");
            assert_eq!(
                (told.event.service, &told.before[..]),
                (0, &frame[..length])
            );
        }
        let mut arp = frame.clone();
        arp[12..14].copy_from_slice(&[8, 6]);
        let told = one(&mut datapath, Hook::TcIngress, &arp);
        assert_eq!((told.reason(), told.event.flags), (Reason::NotIp, 0));
        assert_eq!(
            told.event.before,
            Ends::default(),
            "not those of the packet before"
        );
    }
}

#[test]
fn an_icmp_error_is_told_as_the_answer_to_what_it_is_about() {
    for world in worlds() {
        let mut datapath = world.serve_one();
        let sent = world.first(world.frontend).bytes();
        let forwarded = datapath.run(Hook::TcIngress, &sent).frame;
        datapath.listen(&everything());
        let router = world.stranger.ip();
        let kind = too_big(router);
        let error = Message::about(&forwarded, usize::MAX, router, world.client.ip(), kind);
        let told = one(&mut datapath, Hook::TcEgress, &error.bytes());
        assert_eq!(told.reason(), Reason::IcmpError);
        assert_eq!(told.event.before, ends(world.backend, world.client));
        assert_eq!(told.event.after, ends(world.frontend, world.client));
        assert_eq!(
            (told.event.service, told.event.protocol),
            (1, world.protocol)
        );
    }
}

#[test]
fn a_ping_is_told_by_its_addresses() {
    for world in tcp_worlds() {
        let mut datapath = world.serve_one();
        datapath.put_address(world.frontend.ip(), FRONTEND_ECHO);
        datapath.listen(&everything());
        let [request, _] = echo(world.client.ip());
        let ping = Message {
            src: world.client.ip(),
            dst: world.frontend.ip(),
            kind: request,
            rest: 7,
            payload: vec![1; 32],
        };
        let told = one(&mut datapath, Hook::TcIngress, &ping.bytes());
        assert_eq!(told.reason(), Reason::Echo);
        assert_eq!(told.event.before.dst, mapped(world.frontend.ip()));
    }
}

#[test]
fn fragments_are_told_with_the_ports_of_their_first() {
    for world in udp_worlds() {
        let mut datapath = world.serve_one();
        datapath.listen(&everything());
        let large = world.first(world.frontend).payload(vec![7; 3000]);
        let fragments = cut(&large, 7, 1440);
        assert!(fragments.len() > 1);
        for fragment in &fragments {
            let told = one(&mut datapath, Hook::TcIngress, fragment);
            assert_eq!(told.event.before, ends(world.client, world.frontend));
            assert_eq!(told.event.after, ends(world.client, world.backend));
        }
    }
}

#[test]
fn a_fragment_before_its_first_is_told_and_its_first_as_it_came() {
    for world in udp_worlds() {
        let mut datapath = world.serve_one();
        datapath.put_address(world.frontend.ip(), 0);
        datapath.listen(&with_frames());
        let large = world.first(world.frontend).payload(vec![7; 2000]);
        let fragments = cut(&large, 7, 1440);
        let kept = one(&mut datapath, Hook::TcIngress, &fragments[1]);
        assert_eq!(kept.reason(), Reason::FragmentKept);
        datapath.run(Hook::TcIngress, &fragments[0]);
        let told = datapath.told();
        let first = told.iter().find(|told| told.reason() == Reason::NewFlow);
        let first = first.unwrap_or_else(|| panic!("{told:?}"));
        assert_eq!(first.before, fragments[0]);
        assert_eq!(first.event.before, ends(world.client, world.frontend));
    }
}

#[test]
fn only_what_is_asked_for_is_told() {
    for world in tcp_worlds() {
        let mut datapath = world.serve_one();
        let frame = world.first(world.frontend).bytes();
        datapath.run(Hook::TcIngress, &frame);
        let about = |change: &dyn Fn(&mut Trace)| {
            let mut trace = everything();
            change(&mut trace);
            trace
        };
        let of_service = |id: u32| {
            about(&|trace| {
                trace.services[0] = id;
                trace.service_count = 1;
            })
        };
        let from = |addr: SocketAddr| about(&|trace| trace.from = only(addr.ip()));
        let to = |addr: SocketAddr| about(&|trace| trace.to = only(addr.ip()));
        let either = |addr: SocketAddr| about(&|trace| trace.address = only(addr.ip()));
        for (wanted, trace) in [
            (true, everything()),
            (true, from(world.client)),
            (false, from(world.backend)),
            (true, to(world.frontend)),
            (true, to(world.backend)),
            (false, to(world.client)),
            (true, either(world.backend)),
            (false, either(world.stranger)),
            (true, about(&|trace| trace.port = 3000.into())),
            (true, about(&|trace| trace.to_port = 80.into())),
            (false, about(&|trace| trace.port = 443.into())),
            (true, of_service(1)),
            (false, of_service(2)),
            (true, about(&|trace| trace.protocol = TCP)),
            (false, about(&|trace| trace.protocol = UDP)),
            (
                true,
                about(&|trace| trace.reasons = bit_of_reason(Reason::Forward)),
            ),
            (
                false,
                about(&|trace| trace.reasons = bit_of_reason(Reason::NewFlow)),
            ),
            (
                true,
                about(&|trace| trace.hooks = bit_of_hook(Hook::TcIngress)),
            ),
            (false, about(&|trace| trace.hooks = bit_of_hook(Hook::Xdp))),
        ] {
            datapath.listen(&trace);
            let outcome = datapath.run(Hook::TcIngress, &frame);
            assert_eq!(outcome.reason, Reason::Forward);
            assert_eq!(datapath.told().len(), usize::from(wanted), "{trace:?}");
        }
    }
}

#[test]
fn nobody_is_told_anything_who_does_not_listen_any_more() {
    let world = tcp_worlds().next().expect("a family");
    let mut datapath = world.serve_one();
    let frame = world.first(world.frontend).bytes();
    let answer = world.answer(world.backend).bytes();
    // The clock of the programs is up to a tick behind.
    for until in [0, now() - 1] {
        datapath.listen_until(&everything(), until);
        datapath.run(Hook::TcIngress, &frame);
        datapath.run(Hook::Xdp, &frame);
        datapath.run(Hook::TcEgress, &answer);
        assert_eq!(datapath.told(), []);
        assert_eq!(
            datapath.trace().until,
            0,
            "the next packet need not look at the clock"
        );
    }
}

#[test]
fn what_there_is_no_room_for_is_counted() {
    let world = tcp_worlds().next().expect("a family");
    let mut datapath = world.serve_one();
    datapath.listen(&everything());
    let frame = world.first(world.frontend).bytes();
    let lost = datapath.lost();
    let runs = u64::from(EVENT_BYTES) / 128 + 10;
    for _ in 0..runs {
        datapath.run(Hook::TcIngress, &frame);
    }
    let (told, lost) = (datapath.told().len() as u64, datapath.lost() - lost);
    assert!(told > 0 && lost > 0);
    assert_eq!(told + lost, runs);
    datapath.run(Hook::TcIngress, &frame);
    assert_eq!(datapath.told().len(), 1, "there is room again");
}
