//! One test for each hook, for every kernel of the matrix: the agent itself,
//! real sockets, and what `klb status` says.

use lb_common::Hook;
use lb_tests::{
    agent::{Hooks, Status},
    topology::{Family, Host},
    traffic::Protocol,
    world::{Frontend, World},
};

/// Asks over both families and protocols; who answers must be the frontend.
fn ask(world: &World, client: &Host, kind: Frontend) {
    for family in Family::ALL {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let request = world.request(kind, family, protocol).size(1200);
            let answer = client
                .ask(&request)
                .unwrap_or_else(|failure| panic!("{request:?}: {failure}"));
            assert_eq!(answer.from, request.to);
            assert_eq!(answer.seen.ip(), client.addresses.ip(family), "{request:?}");
        }
    }
}

/// That this hook alone has chosen all backends, and nothing is wrong.
fn all_by(world: &World, hook: Hook, flows: u64) -> Status {
    let status = world.agent.status();
    assert_eq!(status.warnings, [""; 0]);
    assert_eq!(status.new_flows(), [(hook, flows)].into());
    status
}

#[test]
fn the_socket_hook() {
    let world = crate::world(Hooks::SOCKET);
    ask(&world, &world.cluster.client.host, Frontend::ClusterIp);
    ask(&world, &world.cluster.node, Frontend::NodePort);
    all_by(&world, Hook::Socket, 8);
}

/// By a link where the kernel has such, else as a classifier.
#[test]
fn tc() {
    let world = crate::world(Hooks::TC);
    ask(&world, &world.cluster.client.host, Frontend::ClusterIp);
    ask(&world, &world.cluster.outside, Frontend::NodePort);
    let status = all_by(&world, Hook::TcIngress, 8);
    for device in status.devices {
        let programs = [&device.tc_ingress, &device.tc_egress];
        assert!(
            programs.iter().all(|program| program.is_some()),
            "{device:?}"
        );
    }
}

#[test]
fn xdp() {
    let world = crate::world(Hooks::XDP);
    ask(&world, &world.cluster.outside, Frontend::NodePort);
    let status = all_by(&world, Hook::Xdp, 4);
    assert!(status.devices.iter().any(|device| device.xdp.is_some()));
}

/// What the kernel lacks, and what that means, is said to the operator; of what
/// it has there is no talk.
#[test]
fn what_the_kernel_lacks() {
    let world = crate::world(Hooks::ALL);
    let status = world.agent.status();
    let limits = status.limits.join("\n");
    let said = world.agent.klb(&["status"]).stdout;
    for (feature, limit) in [
        (
            "set_retval",
            "lets no hook choose an error (it came with 5.18)",
        ),
        (
            "xdp_frags",
            "no packets of several buffers (it came with 5.18)",
        ),
        ("sock_destroy", "CONFIG_INET_DIAG_DESTROY"),
        ("netns_cookie", "it came with 5.14"),
    ] {
        let found = status.kernel[feature].as_bool();
        let lacks = !found.unwrap_or_else(|| panic!("{feature} was not tried: {said}"));
        assert_eq!(limits.contains(limit), lacks, "{feature}: {limits}");
        assert_eq!(said.contains(limit), lacks, "{feature}: {said}");
    }
    // How TC programs are on devices is said of each of them.
    let expected = match status.kernel["tcx"].as_bool() {
        Some(true) => "tcx",
        Some(false) => "clsact",
        None => panic!("tcx was not tried: {said}"),
    };
    for device in status.devices {
        let programs = [&device.tc_ingress, &device.tc_egress];
        let programs = programs.map(|program| program.as_deref());
        assert_eq!(programs, [Some(expected); 2], "{:?}", device.name);
    }
}
