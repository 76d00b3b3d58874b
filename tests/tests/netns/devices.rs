//! Devices that come and go while the agent runs.

use std::time::{Duration, Instant};

use lb_tests::{
    agent::{Device, Hooks},
    topology::{Cluster, Family, UPLINK},
    traffic::{Outcome, Protocol},
    wait,
    world::{Frontend, World},
};

/// The design says 100 ms; a machine that runs four tests beside this one takes
/// longer just to plug in a pod and to start who asks. This proves the same: an
/// agent that was not told of a device looks again after `--verify-interval`, ten
/// minutes.
const BOUND: Duration = Duration::from_secs(10);

/// Within which one of several is served whatever else the machine does.
pub(crate) const AT_ONCE: Duration = Duration::from_secs(1);

/// From `ip link add` to the first answer of the Service, over TC: the agent
/// learns of the device, attaches to it, and the pod gets through.
#[test]
fn a_new_pod_is_served_at_once() {
    let mut world = crate::world(Hooks::TC);
    let request = world.any_request().timeout(Duration::from_millis(100));
    let mut fastest = BOUND;
    for number in 20..25 {
        let name = format!("new-{number}");
        let pod = world.cluster.unplugged_pod(&name, number);
        let started = Instant::now();
        world.cluster.plug(&pod);
        let plugged = started.elapsed();
        let answer = pod.host.await_answer(&request, BOUND);
        let served = started.elapsed();
        println!("{name}: plugged in after {plugged:?}, served after {served:?}");
        let log = world.agent.log().text();
        answer.unwrap_or_else(|failure| panic!("{name} is not served: {failure}\n{log}"));
        fastest = fastest.min(served);
    }
    assert!(fastest < AT_ONCE, "the first was served after {fastest:?}");
}

/// What a pod leaves behind when it goes.
#[test]
fn a_pod_that_goes_leaves_nothing() {
    let mut world = crate::world(Hooks::TC);
    world.cluster.add_pods(&[("short", 30)]);
    await_device(&world.agent, "pod30", true);
    world.cluster.remove_pod("short");
    await_device(&world.agent, "pod30", false);
    assert_still_served(&world.cluster, &world.any_request());
}

/// A new device in the place of the old one, with the old one's name.
#[test]
fn an_uplink_that_vanishes_and_returns_is_served_again() {
    for hooks in [Hooks::XDP, Hooks::CLSACT] {
        let world = crate::world(hooks);
        let index = |world: &World| {
            let devices = world.agent.status().devices;
            let mut uplinks = devices.iter().filter(|device| is_whole(device, hooks));
            uplinks
                .find_map(|device| (device.name.as_deref() == Some(UPLINK)).then_some(device.index))
        };
        let first = index(&world).expect("the uplink");
        let node = world.cluster.node.place.netns();
        node.ip(&format!("link del {UPLINK}\n"));
        world.cluster.plug_uplink();
        let what = "the new uplink to have every program";
        wait::until(what, Duration::from_secs(10), || {
            index(&world).filter(|new| *new != first)
        });
        for family in Family::ALL {
            let request = world.request(Frontend::NodePort, family, Protocol::Tcp);
            let answer = world.cluster.outside.await_answer(&request, BOUND);
            answer.unwrap_or_else(|failure| panic!("{hooks:?}, {family}: {failure}"));
        }
    }
}

/// A name is no more than a name: what is on the device stays, unless the new
/// one is that of no edge.
#[test]
fn a_device_with_a_new_name_is_served_while_it_is_a_pods() {
    let world = crate::world(Hooks::TC);
    let rename = |from, to| {
        let node = world.cluster.node.place.netns();
        node.ip(&format!("link set {from} name {to}\n"));
    };
    let request = world.any_request();
    let stream = world.cluster.client.host.stream(&request, true);
    stream.await_more(5);
    rename("pod9", "podnine");
    await_device(&world.agent, "podnine", true);
    stream.await_more(5);
    let reports = stream.stop();
    assert!(
        reports
            .iter()
            .all(|report| matches!(report.outcome, Outcome::Answer(_)))
    );
    rename("podnine", "other");
    await_device(&world.agent, "other", false);
    let request = request.timeout(Duration::from_millis(100));
    let client = &world.cluster.client.host;
    client
        .ask(&request)
        .expect_err("no program is on the device");
    rename("other", "pod9");
    client.await_answer(&request, BOUND).expect("an answer");
}

/// Whether every program that the hooks ask for is on an uplink.
fn is_whole(device: &Device, hooks: Hooks) -> bool {
    let is_there = [&device.tc_ingress, &device.tc_egress].map(Option::is_some);
    is_there == [true, true] && (device.xdp.is_some() || hooks.xdp == "off")
}

fn await_device(agent: &lb_tests::agent::Agent, device: &str, there: bool) {
    let word = if there { "there" } else { "gone" };
    let what = format!("{device} to be {word} in klb status");
    wait::until(&what, Duration::from_secs(10), || {
        let status = agent.status();
        let mut devices = status.devices.iter();
        let found = devices.any(|known| known.name.as_deref() == Some(device));
        let complete = status.devices.iter().all(|known| known.tc_egress.is_some());
        (found == there && complete).then_some(())
    });
}

fn assert_still_served(cluster: &Cluster, request: &lb_tests::traffic::Request) {
    let answer = cluster.client.host.ask(request);
    answer.expect("an answer after another pod has gone");
}
