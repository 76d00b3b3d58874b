//! What must not grow unnoticed: the size and the verifier's work of every
//! program, the size of map entries, and that the object has what
//! `lb_common::names` says.

use std::{collections::BTreeSet, fmt::Write as _};

use aya_obj::Object;
use lb_common::names;
use lb_tests::{
    program::{costs, load, object},
    stack,
};

const PAGE: &str = include_str!("../../../docs/verifier-budget.md");

/// Upper bounds: program, translated bytes, instructions verified. The largest
/// measured on 5.10 (which does not count instructions), 6.1, 6.12, 6.18 and
/// 7.2, and up to a tenth: each verifier walks paths of its own.
const BUDGET: [(&str, u32, u32); 11] = [
    (names::XDP, 110_000, 520_000),
    (names::TC_INGRESS, 163_000, 620_000),
    (names::TC_EGRESS, 82_000, 155_000),
    (names::CONNECT4, 9_800, 12_000),
    (names::CONNECT6, 20_000, 20_000),
    (names::SENDMSG4, 10_600, 12_000),
    (names::SENDMSG6, 22_600, 22_000),
    (names::RECVMSG4, 760, 100),
    (names::RECVMSG6, 1_600, 200),
    (names::GETPEERNAME4, 760, 100),
    (names::GETPEERNAME6, 1_600, 200),
];

#[test]
fn programs_stay_within_their_budget() {
    let costs = costs();
    println!("{:<14}{:>12}{:>12}", "program", "translated", "verified");
    for (name, cost) in &costs {
        let verified = cost.verified.map_or("-".to_owned(), |n| n.to_string());
        println!("{name:<14}{:>12}{verified:>12}", cost.translated);
    }
    let named: BTreeSet<_> = BUDGET.iter().map(|(name, ..)| (*name).to_owned()).collect();
    assert_eq!(costs.keys().cloned().collect::<BTreeSet<_>>(), named);
    let mut over = Vec::new();
    for (name, translated, verified) in BUDGET {
        let cost = &costs[name];
        if cost.translated > translated || cost.verified.unwrap_or(0) > verified {
            over.push(format!("{name}: {cost:?}"));
        }
    }
    assert!(over.is_empty(), "over budget: {}", over.join("; "));
}

/// The verifier's limit (`MAX_BPF_STACK`).
const STACK: usize = 512;

#[test]
fn calls_fit_the_stack_as_every_kernel_counts_it() {
    let chains = stack::deepest(&object());
    let depths = chains.values().map(|chain| chain.iter().sum());
    let deepest: usize = depths.max().expect("programs");
    // It is near the limit, so to count too little would show.
    assert!((STACK * 3 / 4..=STACK).contains(&deepest), "{chains:?}");
}

#[test]
fn the_page_says_the_budget() {
    let separated = |number: u32| -> String {
        let digits = number.to_string();
        let head = digits.len() % 3;
        let mut groups: Vec<&str> = Vec::new();
        if head > 0 {
            groups.push(&digits[..head]);
        }
        groups.extend(
            (head..digits.len())
                .step_by(3)
                .map(|at| &digits[at..at + 3]),
        );
        groups.join(",")
    };
    for (name, translated, verified) in BUDGET {
        let row = format!(
            "| {name} | {} | {} |",
            separated(translated),
            separated(verified)
        );
        assert!(PAGE.contains(&row), "the page should say {row}");
    }
}

#[test]
fn the_object_has_every_map_with_types_that_can_be_printed() {
    let ebpf = load();
    let maps: BTreeSet<_> = ebpf
        .maps()
        .map(|(name, _)| name.to_owned())
        .filter(|name| !name.starts_with('.'))
        .collect();
    let expected: BTreeSet<_> = names::MAPS.iter().map(|&name| name.to_owned()).collect();
    assert_eq!(maps, expected);
}

/// What an entry takes, without what the kernel adds to it.
#[test]
fn the_page_says_what_an_entry_takes() {
    let bytes = object();
    let object = Object::parse(&bytes).expect("the object");
    let mut rows = String::from("| map | key | value |\n|---|---|---|\n");
    for name in names::MAPS {
        let map = &object.maps[name];
        let (key, value) = (map.key_size(), map.value_size());
        writeln!(rows, "| {name} | {key} | {value} |").expect("a string grows");
    }
    assert!(PAGE.contains(&rows), "the page should say:\n{rows}");
}

/// DWARF is three quarters of what the compiler writes, and would be in every
/// `klb` and in the memory of each that runs.
#[test]
fn the_object_names_lines_of_source_and_has_nothing_for_debuggers() {
    let bytes = object();
    let has = |section: &[u8]| bytes.windows(section.len()).any(|window| window == section);
    assert!(has(b".BTF.ext"));
    assert!(!has(b".debug_"));
}
