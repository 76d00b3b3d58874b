//! What `/metrics` tells, as a whole.

use std::{collections::BTreeSet, fs, time::Duration};

use lb_common::names;
use lb_tests::{
    agent::{Hooks, spoil},
    manifests::many,
    openmetrics::{self, Samples},
    topology::Family,
    traffic::Protocol,
    wait,
    world::{Frontend, World},
};

/// Where metrics are.
pub(crate) const METRICS: u16 = 10249;

/// A page that a strict reader takes.
fn scrape(world: &World) -> Samples {
    let page = page(world);
    openmetrics::parse(&page).unwrap_or_else(|error| panic!("{error}\n{page}"))
}

fn page(world: &World) -> String {
    let page = world.agent.page(METRICS, "/metrics");
    assert_eq!(page.status, 200, "{page:?}");
    let kind = &page.headers["content-type"];
    assert_eq!(
        kind,
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    );
    page.body
}

#[test]
fn a_page_is_as_the_format_wants_it() {
    let (mut world, _server) = crate::api::world(Hooks::ALL);
    world.agent.start();
    for family in Family::ALL {
        for kind in [Frontend::ClusterIp, Frontend::NodePort] {
            let request = world.request(kind, family, Protocol::Tcp);
            let pod = &world.cluster.client.host;
            for client in [pod, &pod.without_cgroup()] {
                client.ask(&request).expect("an answer");
            }
        }
    }
    let samples = scrape(&world);
    let value = |name: &str| {
        let value = samples.get(name);
        *value.unwrap_or_else(|| panic!("no {name} in {samples:#?}"))
    };
    for map in [
        names::SERVICES4,
        names::SERVICES6,
        names::FLOWS4,
        names::FLOWS6,
        names::SOCKETS4,
    ] {
        let entries = value(&format!("klb_map_entries{{map={map:?}}}"));
        let capacity = value(&format!("klb_map_capacity{{map={map:?}}}"));
        assert!(entries > 0.0 && entries <= capacity, "{map}: {entries}");
    }
    for map in [names::YOUNG4, names::AFFINITY6, names::FRAGMENTS4] {
        value(&format!("klb_map_entries{{map={map:?}}}"));
    }
    for hook in ["connect4", "connect6", "sendmsg4", "recvmsg6"] {
        let name = format!("klb_attached_socket_hooks{{hook={hook:?}}}");
        assert!(value(&name) > 0.0, "{hook}");
    }
    assert!(value("klb_events_dropped_total{}") >= 0.0);
    assert!(value("kubeproxy_sync_full_proxy_rules_duration_seconds_count{}") > 0.0);
    assert!(value("klb_api_lists_total{kind=\"Service\"}") > 0.0);
}

/// Names of samples that there may be of the metrics on a page.
fn announced(page: &str) -> BTreeSet<String> {
    let lines = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let names = lines.flat_map(|line| {
        let (name, kind) = line.split_once(' ').expect("a kind");
        let ends: &[_] = match kind {
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_count", "_sum"],
            _ => &[""],
        };
        ends.iter().map(move |end| format!("{name}{end}"))
    });
    names.collect()
}

/// Words of a file that look like names of klb's metrics.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let names = words.filter(|word| word.starts_with("klb_") || word.starts_with("kubeproxy_"));
    names.map(str::to_owned).collect()
}

/// What only faults are counted in is there once one was counted: so the server
/// goes away, and somebody else changes a map.
#[test]
fn alerts_and_dashboard_name_metrics_that_there_are() {
    const FOLDER: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/components/monitoring"
    );
    let (mut world, server) = crate::api::world(Hooks::ALL);
    world.agent.flags.push("--verify-interval=1s".to_owned());
    world.agent.start();
    server.set_down(true);
    spoil(&world.agent.pins().join(names::SLOTS4));
    let no_metrics = BTreeSet::from(["klb_", "klb_backend", "klb_meta"].map(str::to_owned));
    for file in ["prometheusrule.yaml", "dashboard.json"] {
        let text = fs::read_to_string(format!("{FOLDER}/{file}")).expect("a file");
        let named = &named(&text) - &no_metrics;
        assert!(named.len() > 5, "{file}: {named:?}");
        let what = format!("all of {named:?}, which {file} names");
        wait::until(&what, Duration::from_secs(20), || {
            named.is_subset(&announced(&page(&world))).then_some(())
        });
    }
}

/// `docs/metrics.md` is made of what the code can tell; here, of what it does.
#[test]
fn the_reference_has_all_that_is_told() {
    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let reference = fs::read_to_string(PAGE).expect("the reference");
    let (mut world, _server) = crate::api::world(Hooks::ALL);
    let detail = "--traffic-metrics=backends".to_owned();
    world.agent.flags.push(detail);
    world.agent.start();
    let page = page(&world);
    for line in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').expect("a kind");
        let end = if kind == "counter" { "_total" } else { "" };
        let row = format!("| `{name}{end}` | {kind} |");
        assert!(reference.contains(&row), "no {row}");
    }
}

/// A line a change, and nothing for packets, in whichever format.
#[test]
fn logs_have_a_line_for_each_change_and_none_for_packets() {
    let mut world = crate::stopped_world(Hooks::ALL);
    world.agent.flags.push("--log-format=json".to_owned());
    let info = ("RUST_LOG".to_owned(), "info".to_owned());
    world.agent.variables.push(info);
    world.agent.spawn();
    let ready = r#""message":"ready""#;
    world.agent.await_log(ready, |line| line.contains(ready));
    let lines = |world: &mut World| -> Vec<serde_json::Value> {
        let text = world.agent.log().text();
        let lines = text.lines().map(|line| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
        });
        lines.collect()
    };
    let before = lines(&mut world);
    for line in &before {
        for field in ["timestamp", "level"] {
            assert!(line[field].is_string(), "no {field}: {line}");
        }
    }
    let request = world.any_request();
    for _ in 0..50 {
        world.cluster.client.host.ask(&request).expect("an answer");
    }
    world.put_endpoints(&[("pod-2", 6)]);
    world.agent.await_services("one endpoint", |services| {
        let mut frontends = services.iter().flat_map(|service| &service.frontends);
        frontends.all(|frontend| frontend.backends.len() == 1)
    });
    // Servers say that they listen in tasks of their own, which may be after it is ready.
    let others = |line: &serde_json::Value| line["fields"]["message"] != "listening";
    let new = wait::until("a line of the change", Duration::from_secs(20), || {
        let mut new = lines(&mut world).split_off(before.len());
        new.retain(others);
        (!new.is_empty()).then_some(new)
    });
    assert_eq!(new.len(), 1, "{new:#?}");
    assert_eq!(new[0]["fields"]["message"], "written", "{new:?}");
    assert_eq!(new[0]["fields"]["service"], "default/echo", "{new:?}");
}

/// Bytes of memory that the agent has, as the kernel counts them.
fn resident(world: &mut World) -> u64 {
    let status = format!("/proc/{}/status", world.agent.process().id());
    let status = fs::read_to_string(status).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    1024 * number.expect("a size").parse::<u64>().expect("a number")
}

/// An answer is megabytes here, and is made by whichever thread is free.
#[test]
fn answers_leave_no_memory_behind() {
    let mut world = crate::stopped_world(Hooks::SOCKET);
    let flags = &mut world.agent.flags;
    flags.retain(|flag| !flag.starts_with("--map-"));
    world.agent.manifests.put("many.yaml", &many(4000));
    world.agent.start();
    page(&world);
    let before = resident(&mut world);
    for _ in 0..8 {
        page(&world);
    }
    let more = resident(&mut world).saturating_sub(before);
    assert!(more < 8 << 20, "{more} of {before} bytes");
}
