//! `klb explain` says what happens, before it happens.

use std::collections::BTreeSet;

use lb_tests::{
    agent::Hooks,
    topology::{Addresses, Family, UPLINK},
    traffic::Protocol,
};
use serde_json::Value;

use crate::matrix::{self, Client, SERVICES};

/// As `--proto` takes it.
pub(crate) const fn flag(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

/// What `docs/matrix.md` would say of it; `untouched` where klb has no part in what
/// becomes of the packet.
fn in_words(said: &Value) -> &'static str {
    let outcome = said["verdict"]["outcome"].as_str();
    match outcome.expect("an outcome") {
        "refused" => return "refused",
        "dropped" => return "silence",
        "untouched" | "unseen" => return "untouched",
        "forwarded" => {}
        other => panic!("no outcome {other}"),
    }
    let candidates = said["candidates"].as_array().expect("a list").iter();
    let seen: BTreeSet<_> = candidates
        .map(|candidate| (candidate["local"] == true, candidate["sees"] == "client"))
        .collect();
    match Vec::from_iter(seen)[..] {
        [(true, true)] => "local",
        [(false, true)] => "remote",
        [(false, true), (true, true)] => "both",
        [(false, false), (true, true)] => "both, masqueraded",
        ref other => panic!("nobody speaks of {other:?}"),
    }
}

/// Explains each row of the matrix for one of its Services, families and protocols,
/// which take turns, and asks for it then.
fn check_column(hooks: Hooks, column: usize) {
    let nodes = matrix::nodes(hooks);
    let mut wrong = Vec::new();
    for (number, row) in matrix::rows().iter().enumerate() {
        let client = Client::new(&nodes, row.client, row.frontend);
        let mut meant = SERVICES.into_iter().filter(|s| s.is_meant(row, &client));
        let service = meant.next().expect("one at least");
        let family = Family::ALL[number % 2];
        let protocol = [Protocol::Tcp, Protocol::Udp][number / 2 % 2];
        let to = service.to(row.frontend, family, protocol);
        let from = client.host.addresses.ip(family);
        let agent = nodes.agents()[usize::from(client.node == Addresses::NODE_2)];
        let (from, to_text) = (from.to_string(), to.to_string());
        let mut question = vec!["--from", &from, "--to", &to_text, "--proto", flag(protocol)];
        if row.client == "outside" {
            // It hangs on a veth of the node, as a pod does, and is taken for one.
            question.extend(["--at", UPLINK]);
        }
        let said = agent.explain(&question);
        let explained = in_words(&said);
        let observed = client.observe(to, protocol, row.expected[column]);
        let agrees = match explained {
            "untouched" => ["no route", "refused"].contains(&observed.as_str()),
            explained => explained == observed,
        };
        if !agrees {
            wrong.push(format!(
                "{} at {} ({}) {family} {protocol:?}: {explained}, but {observed}: {said:#}",
                row.client, row.frontend, row.service
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_it_says_of_sockets_happens() {
    check_column(Hooks::SOCKET, 0);
}

#[test]
fn what_it_says_of_tc_happens() {
    check_column(Hooks::TC, 1);
}

#[test]
fn what_it_says_of_xdp_happens() {
    check_column(Hooks::XDP, 2);
}
