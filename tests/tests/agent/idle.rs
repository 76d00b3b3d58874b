//! An agent that has nothing to do rests.

use std::{collections::BTreeMap, fs, thread::sleep, time::Duration};

use lb_tests::{
    agent::{Agent, Hooks},
    wait,
};

/// How long it is looked at a time.
const WINDOW: Duration = Duration::from_secs(2);
/// How often its threads may have gone to sleep in that time, all together. What
/// comes round by the minute may fall into it.
const MOST: u64 = 40;
/// What a start brings with it is over by then.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often each thread went to sleep: a count, which a busy machine does not
/// change.
fn rests(agent: &mut Agent) -> BTreeMap<String, u64> {
    let folder = format!("/proc/{}/task", agent.process().id());
    let threads = fs::read_dir(folder).expect("the agent runs");
    let threads = threads.filter_map(|thread| {
        let path = thread.ok()?.path();
        // One that ends meanwhile has gone to sleep for good.
        let text = fs::read_to_string(path.join("status")).ok()?;
        let mut lines = text.lines();
        let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        Some((path.display().to_string(), count.trim().parse().ok()?))
    });
    threads.collect()
}

/// Waits for a window in which the agent does next to nothing. `meanwhile` is
/// what others do at its beginning.
fn await_rest(agent: &mut Agent, meanwhile: impl Fn()) {
    let mut counts = Vec::new();
    let rested = wait::attempt(PATIENCE, || {
        let before = rests(agent);
        meanwhile();
        sleep(WINDOW);
        let after = rests(agent).into_iter();
        let count = after.map(|(thread, count)| count - before.get(&thread).unwrap_or(&0));
        let count: u64 = count.sum();
        counts.push(count);
        (count <= MOST).then_some(())
    });
    assert!(rested.is_some(), "in each {WINDOW:?}: {counts:?}");
}

#[test]
fn manifests_that_others_only_read_wake_nobody() {
    let mut world = crate::world(Hooks::ALL);
    let folder = world.cluster.scope().folder().join("manifests");
    await_rest(&mut world.agent, || {
        for _ in 0..2 * MOST {
            let files = fs::read_dir(&folder).expect("the manifests");
            for file in files {
                drop(fs::read(file.expect("a file").path()).expect("a manifest"));
            }
            sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn an_api_server_without_news_wakes_nobody() {
    let (mut world, _server) = crate::api::world(Hooks::ALL);
    world.agent.start();
    await_rest(&mut world.agent, || {});
}
