//! Against maps that the reconciler has written.

use std::{collections::BTreeSet, time::Instant};

use super::*;
use crate::{
    datapath::memory::MemoryMaps,
    index::Index,
    model::{
        Algorithm, Endpoint, EndpointPort, EndpointSlice, Object, Policy, Protocol, Service,
        ServicePort,
    },
    plan::{Ping, Settings},
    reconcile::Reconciler,
};

/// A Service with a `NodePort`, a load balancer with sources and a policy
/// `Local`, in both families.
fn service(name: &str, number: u8, algorithm: Algorithm) -> Object {
    let addr = |text: String| text.parse().expect("an address");
    Object::Service(Service {
        id: NamespacedName::new("default", name),
        created: 0,
        cluster_ips: vec![
            addr(format!("10.96.0.{number}")),
            addr(format!("fd00:10:96::{number}")),
        ],
        external_ips: Vec::new(),
        load_balancer_ips: vec![addr(format!("192.0.2.{number}"))],
        source_ranges: vec!["10.0.0.0/8".parse().expect("a network")],
        affinity: None,
        algorithm: Some(algorithm),
        internal_policy: Policy::Cluster,
        external_policy: Policy::Local,
        health_check_port: None,
        ports: vec![ServicePort {
            name: "http".to_owned(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: Some(30_000 + u16::from(number)),
        }],
    })
}

/// Three endpoints of which one is here, and one is about to end.
fn slice(name: &str, number: u8, family: Family) -> Object {
    let endpoints = (1..=3_u8).map(|last| Endpoint {
        addr: match family {
            Family::V4 => [10, 244, number, last].into(),
            Family::V6 => [0xfd00, 0x10, 0x244, 0, 0, 0, number.into(), last.into()].into(),
        },
        node: Some(if last == 1 { "here" } else { "there" }.into()),
        ready: last < 3,
        serving: true,
        terminating: last == 3,
        hints: None,
    });
    Object::EndpointSlice(EndpointSlice {
        id: NamespacedName::new("default", format!("{name}-{family:?}")),
        service: name.to_owned(),
        family,
        ports: vec![EndpointPort {
            name: "http".to_owned(),
            protocol: Protocol::Tcp,
            port: 3000,
        }],
        endpoints: endpoints.collect(),
        triggered: None,
    })
}

fn plans() -> Vec<ServicePlan> {
    let settings = Settings {
        maglev_table: 7,
        ping: Ping::All,
        ..Settings::default()
    };
    let mut index = Index::new("here", settings);
    index.set_node_addresses(BTreeSet::from(["192.168.50.1"
        .parse()
        .expect("an address")]));
    for (number, name, algorithm) in [
        (1, "first", Algorithm::Random),
        (2, "second", Algorithm::Maglev),
    ] {
        index.apply(service(name, number, algorithm));
        index.apply(slice(name, number, Family::V4));
        index.apply(slice(name, number, Family::V6));
    }
    let changes = index.take_changes().into_iter();
    changes.map(|(plan, _)| plan).collect()
}

fn written(plans: &[ServicePlan]) -> Reconciler<MemoryMaps> {
    let mut reconciler = Reconciler::restore(MemoryMaps::default()).expect("maps");
    let report = reconciler.apply(plans, Instant::now());
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    reconciler
}

fn compare(plans: &[ServicePlan], maps: &MemoryMaps) -> Vec<Difference> {
    let content = Content::read(maps).expect("content");
    differences(plans.iter(), &content, &BTreeSet::new())
}

/// The differences after a change of the maps, each as one line.
fn lines(change: impl FnOnce(&mut MemoryMaps)) -> Vec<String> {
    let plans = plans();
    let written = written(&plans);
    let mut maps = MemoryMaps {
        content: written.maps().content.clone(),
        ..MemoryMaps::default()
    };
    change(&mut maps);
    let lines = compare(&plans, &maps).into_iter().map(|difference| {
        let changes = difference
            .changes
            .iter()
            .filter(|_| difference.state == State::Differs);
        let changes: Vec<_> = changes
            .map(
                |Change {
                     field,
                     missing,
                     more,
                 }| format!(" {field}: -{more:?} +{missing:?}"),
            )
            .collect();
        let changes = changes.concat();
        let Difference {
            service,
            frontend,
            state,
            ..
        } = &difference;
        let frontend = frontend.as_deref().unwrap_or("-");
        format!("{service} {frontend} {}{changes}", state.name())
    });
    lines.collect()
}

fn key(text: &str) -> FrontendKey {
    let addr: std::net::SocketAddr = text.parse().expect("an address");
    FrontendKey {
        addr: addr.ip(),
        port: addr.port(),
        protocol: 6,
    }
}

#[test]
fn what_the_reconciler_wrote_is_what_should_be() {
    let plans = plans();
    let reconciler = written(&plans);
    assert_eq!(compare(&plans, reconciler.maps()), []);
    assert!(plans.iter().all(|plan| !plan.ports.is_empty()));
}

#[test]
fn a_lost_frontend_is_missing() {
    let lines = lines(|maps| {
        maps.content.services.remove(&key("10.96.0.1:80"));
    });
    assert_eq!(lines, ["default/first:http 10.96.0.1:80/TCP missing"]);
}

#[test]
fn a_strange_frontend_is_more() {
    let lines = lines(|maps| {
        let entry = maps.content.services[&key("10.96.0.1:80")];
        maps.content.services.insert(key("10.96.0.9:80"), entry);
    });
    assert_eq!(lines, ["default/first:http 10.96.0.9:80/TCP more"]);
}

#[test]
fn what_an_entry_says_is_compared() {
    let lines = lines(|maps| {
        let key = key("10.96.0.2:80");
        let entry = maps.content.services.get_mut(&key).expect("an entry");
        entry.affinity = 5;
        entry.flags = 0;
        entry.slot_count -= 1;
    });
    let [line] = &lines[..] else {
        panic!("{lines:?}");
    };
    assert!(
        line.starts_with("default/second:http 10.96.0.2:80/TCP differs"),
        "{line}"
    );
    for change in [
        r#"algorithm: -["random"] +["maglev"]"#,
        r#"affinity seconds: -["5"] +["0"]"#,
        r#"slots: -["6"] +["7"]"#,
    ] {
        assert!(line.contains(change), "{line}");
    }
}

#[test]
fn backends_that_changed_or_died_are_named() {
    let lines = lines(|maps| {
        let entry = maps.content.services[&key("10.96.0.1:80")];
        let first = maps.content.slots.get_mut(&(Family::V4, entry.first_slot));
        let first = first.expect("a slot");
        first.addr = "10.9.9.9:3000".parse().expect("an address");
        let second = maps.content.slots[&(Family::V4, entry.first_slot + 1)];
        *maps
            .content
            .backends
            .get_mut(&second.backend.id)
            .expect("an id") += 1;
    });
    let cluster = lines.iter().find(|line| line.contains(" 10.96.0.1:80/TCP"));
    let cluster = cluster.unwrap_or_else(|| panic!("{lines:?}"));
    for word in [
        "-[\"10.244.1.2:3000 (dead)\", \"10.9.9.9:3000 (here)\"]",
        "10.244.1.1:3000 (here)",
    ] {
        assert!(cluster.contains(word), "{cluster}");
    }
}

#[test]
fn sources_networks_and_names_are_compared() {
    let lines = lines(|maps| {
        maps.content.ranges.clear();
        maps.content.networks.remove(&Family::V6);
        let strange = maps.content.metas[&1];
        let mut strange = strange;
        strange.name = lb_common::service::Name::new("strange").expect("short");
        maps.content.metas.insert(99, strange);
    });
    let text = lines.join("\n");
    for word in [
        "source ranges: -[] +[\"10.0.0.0/8\"]",
        "fd00:10:96::1 differs refuses other ports: -[\"no\"] +[\"yes\"]",
        "default/strange:http - more",
    ] {
        assert!(text.contains(word), "no {word} in\n{text}");
    }
}

/// What describes a held Service cannot be understood.
#[test]
fn a_held_service_is_not_compared() {
    let all = plans();
    let reconciler = written(&all);
    let content = Content::read(reconciler.maps()).expect("content");
    let (first, rest) = all.split_first().expect("plans");
    let held = BTreeSet::from([first.service.clone()]);
    assert_eq!(differences(rest.iter(), &content, &held), []);
    let states = differences(rest.iter(), &content, &BTreeSet::new()).into_iter();
    let states: BTreeSet<_> = states.map(|difference| difference.state.name()).collect();
    assert_eq!(states, BTreeSet::from(["more"]));
}
