//! Devices that come and go while the agent runs.

use std::time::{Duration, Instant};

use lb_tests::{agent::Hooks, topology::Cluster};

/// The design says 100 ms; a machine that runs four tests beside this one takes
/// longer just to plug in a pod.
const BOUND: Duration = Duration::from_secs(1);

/// From `ip link add` to the first answer of the Service, over TC: the agent
/// learns of the device, attaches to it, and the pod gets through.
#[test]
fn a_new_pod_is_served_at_once() {
    let mut world = crate::world(Hooks::TC);
    let request = world.any_request().timeout(Duration::from_millis(10));
    for number in 20..25 {
        let name = format!("new-{number}");
        let pod = world.cluster.unplugged_pod(&name, number);
        let started = Instant::now();
        world.cluster.plug(&pod);
        let plugged = started.elapsed();
        let answer = pod.host.await_answer(&request, Duration::from_secs(5));
        let served = started.elapsed();
        println!("{name}: plugged in after {plugged:?}, served after {served:?}");
        let log = world.agent.log().text();
        answer.unwrap_or_else(|failure| panic!("{name} is not served: {failure}\n{log}"));
        assert!(
            served < BOUND,
            "{name} was served after {served:?} only\n{log}"
        );
    }
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

fn await_device(agent: &lb_tests::agent::Agent, device: &str, there: bool) {
    let word = if there { "there" } else { "gone" };
    let what = format!("{device} to be {word} in klb status");
    lb_tests::wait::until(&what, Duration::from_secs(10), || {
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
