//! When what is heard is written, in a time that passes as fast as it can.

use std::sync::Mutex;

use prometheus_client::registry::Registry;
use tokio::{sync::mpsc, time::sleep};

use super::{
    steps::{service, slice},
    *,
};
use crate::{
    datapath::memory::MemoryMaps,
    model::{Node, Object},
    plan::Settings,
};

const BATCH: Duration = Duration::from_millis(10);

/// When entries were written, since a moment; news come at these times, in
/// milliseconds since that moment.
async fn writes(news: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let maps = Arc::<Mutex<MemoryMaps>>::default();
    let (node_addresses, addresses) = watch::channel(BTreeSet::new());
    let (synced, mut is_synced) = watch::channel(false);
    let links = Links {
        metrics: ControlMetrics::register(&mut Registry::default()),
        addresses,
        opted_out: watch::channel(None).0,
        orphans: Arc::default(),
        synced,
        health: Reporter::default(),
        events: Events::default(),
        recorder: Recorder::default(),
    };
    let pace = Pace {
        batch_delay: BATCH,
        verify_interval: Duration::from_secs(3600),
    };
    let index = Index::new("here", Settings::default());
    let control = Control::new(index, Arc::clone(&maps), links, pace).expect("maps");
    let (sender, source) = mpsc::unbounded_channel();
    let node = Object::Node(Node {
        name: "here".to_owned(),
        zone: None,
        leaving: false,
    });
    let all = [node, service(1), slice(1, &[1])].map(Event::Apply);
    let tell = |events| sender.send(events).expect("the core listens");
    tell([&all[..], &[Event::Synced(Scope::Services)]].concat());

    let times = Arc::new(Mutex::new(Vec::new()));
    let (log, observed) = (Arc::clone(&times), Arc::clone(&maps));
    let test = async {
        is_synced
            .wait_for(|synced| *synced)
            .await
            .expect("the core lives");
        sleep(Duration::from_secs(1)).await;
        let start = Instant::now();
        let millis = move || u64::try_from(start.elapsed().as_millis()).expect("short");
        observed.lock().expect("maps").observer = Some(Box::new(move |_| {
            log.lock().expect("times").push(millis());
        }));
        for (number, time) in (0_u64..).zip(news) {
            sleep(Duration::from_millis(time - millis())).await;
            let pod = u8::try_from(2 + number % 200).expect("small");
            tell(vec![Event::Apply(slice(1, &[pod]))]);
        }
        sleep(Duration::from_secs(1)).await;
    };
    tokio::select! {
        ended = control.run(Source::Test(source)) => panic!("{ended:?}"),
        () = test => {}
    }
    drop(node_addresses);
    let mut times = times.lock().expect("times").clone();
    times.dedup();
    times
}

#[test]
fn an_ordinary_change_is_written_without_giving_way() {
    let entries = |backends: &[u8], choice| {
        let mut index = Index::new("here", Settings::default());
        index.apply(service(1));
        index.apply(slice(1, backends));
        let mut changes = index.take_changes();
        let (mut plan, _) = changes.pop().expect("a Service");
        plan.ports[0].choice = choice;
        most_entries(&plan)
    };
    let many: Vec<_> = (0..=255).collect();
    for (backends, choice, is_short) in [
        (&[][..], Choice::Random, true),
        (&many[..20], Choice::Random, true),
        (&many, Choice::Random, false),
        (&many[..2], Choice::Maglev(65537), false),
    ] {
        let entries = entries(backends, choice);
        assert_eq!(entries <= SHORT, is_short, "{entries}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_comes_after_a_rest_is_written_at_once() {
    assert_eq!(writes([0]).await, [0]);
    assert_eq!(writes([5, 500]).await, [5, 500]);
}

#[tokio::test(start_paused = true)]
async fn what_comes_soon_after_a_write_is_written_together() {
    assert_eq!(writes([0, 2, 9]).await, [0, 10]);
}

/// News that never cease are no reason to put off a write.
#[tokio::test(start_paused = true)]
async fn news_without_end_are_written_all_the_same() {
    let times = writes(0..1000).await;
    let batch = u64::try_from(BATCH.as_millis()).expect("short");
    // The timer of tokio has a grain of a millisecond.
    let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(gaps.max() <= Some(batch + 1), "{times:?}");
    assert!(times[0] == 0 && times.len() >= 90, "{times:?}");
}
