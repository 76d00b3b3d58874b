//! The tables that people read, compared with files in `golden/`: the same with
//! an agent, after it was stopped, and after it was killed. What differs from
//! run to run is `~` there. `KLB_BLESS=1` has the files written.

use std::{env, fs, path::Path};

use lb_tests::{
    agent::{Agent, Hooks},
    topology::Family,
    traffic::Protocol,
    world::{Frontend, World},
};

/// A table: file, command line, and the columns that differ from run to run.
type Case = (
    &'static str,
    &'static [&'static str],
    &'static [&'static str],
);

const TABLES: [Case; 9] = [
    ("services", &["get", "services"], &[]),
    ("services-wide", &["get", "services", "-o", "wide"], &[]),
    ("backends", &["get", "backends"], &[]),
    (
        "backends-wide",
        &["get", "backends", "-o", "wide"],
        &["PACKETS-IN", "BYTES-IN", "PACKETS-OUT", "BYTES-OUT"],
    ),
    ("flows", &["get", "flows"], &["IDLE"]),
    ("sockets", &["get", "sockets"], &["COOKIE"]),
    ("affinity", &["get", "affinity"], &["IDLE", "LEFT"]),
    ("devices", &["get", "devices"], &["INDEX"]),
    ("maps", &["get", "maps"], &["ENTRIES", "FULL"]),
];

/// A world in which every choice has one outcome.
fn world() -> World {
    let mut world = crate::stopped_world(Hooks::ALL);
    crate::commands::put_lasting_affinity(&world);
    world.put_endpoints(&[("pod-1", 5)]);
    world.agent.start();
    use_flows(&world);
    for family in Family::ALL {
        let request = world.request(Frontend::ClusterIp, family, Protocol::Udp);
        world.cluster.node.ask(&request).expect("an answer");
    }
    world
}

/// The same flows each time, which are forgotten two minutes later.
fn use_flows(world: &World) {
    let client = world.cluster.client.host.without_cgroup();
    for family in Family::ALL {
        let request = world.request(Frontend::ClusterIp, family, Protocol::Udp);
        client.ask(&request.from_port(4000)).expect("an answer");
    }
}

/// A table with `~` for what differs, its columns aligned anew.
fn stable(text: &str, passing: &[&str]) -> String {
    let Some(header) = text.lines().next() else {
        return String::new();
    };
    let columns = columns(header);
    let rows: Vec<Vec<String>> = text
        .lines()
        .enumerate()
        .map(|(number, line)| {
            let cells = columns.iter().enumerate().map(|(index, (start, name))| {
                let end = columns.get(index + 1).map(|(end, _)| *end);
                let cell: String = match end {
                    Some(end) => line.chars().take(end).skip(*start).collect(),
                    None => line.chars().skip(*start).collect(),
                };
                if number > 0 && passing.contains(&name.as_str()) {
                    return "~".to_owned();
                }
                cell.trim_end().to_owned()
            });
            cells.collect()
        })
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let line = |row: &Vec<String>| {
        let cells = row.iter().enumerate();
        let cells = cells.map(|(column, cell)| format!("{cell:<0$}", width(column).unwrap_or(0)));
        cells.collect::<Vec<_>>().join("   ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// Where each column begins, and its name.
fn columns(header: &str) -> Vec<(usize, String)> {
    let mut columns: Vec<(usize, String)> = Vec::new();
    let mut is_gap = true;
    for (at, letter) in header.chars().enumerate() {
        match (letter == ' ', columns.last_mut()) {
            (true, _) => is_gap = true,
            (false, Some((_, name))) if !is_gap => name.push(letter),
            (false, _) => {
                columns.push((at, letter.to_string()));
                is_gap = false;
            }
        }
    }
    columns
}

fn assert_golden(name: &str, text: &str, when: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/agent/golden");
    let path = folder.join(format!("{name}.txt"));
    let wanted = fs::read_to_string(&path).unwrap_or_default();
    if wanted != text && env::var_os("KLB_BLESS").is_some() {
        fs::create_dir_all(folder).expect("a folder");
        fs::write(&path, text).expect("written");
        return;
    }
    assert_eq!(text, wanted, "{name}, {when}");
}

fn assert_tables(world: &World, when: &str) {
    for (name, line, passing) in TABLES {
        let said = world.agent.klb(line);
        assert_eq!(said.status.code(), Some(0), "{name}, {when}: {said:?}");
        assert_golden(name, &stable(&said.stdout, passing), when);
    }
    let explain = [
        "explain",
        "--from",
        "10.244.0.9:5000",
        "--to",
        "10.96.0.1:80",
    ];
    let said = world.agent.klb(&explain);
    assert_eq!(said.status.code(), Some(0), "{when}: {said:?}");
    assert_golden("explain", &said.stdout, when);
    let said = world.agent.klb(&["status"]);
    let settings = said.stdout.split_once("\nsettings\n");
    let (_, settings) = settings.unwrap_or_else(|| panic!("{said:?}"));
    let (settings, _) = settings.split_once("\n\n").expect("a section behind it");
    assert_golden("status-settings", &format!("{settings}\n"), when);
}

#[test]
fn tables_are_as_they_were() {
    let mut world = world();
    assert_tables(&world, "with an agent");
    for (stop, when) in [
        (Agent::terminate as fn(&mut Agent), "after it was stopped"),
        (Agent::kill, "after it was killed"),
    ] {
        stop(&mut world.agent);
        assert_tables(&world, when);
        world.agent.start();
        use_flows(&world);
    }
}

#[test]
fn passing_cells_are_hidden_and_columns_line_up() {
    let text = "NAME    IDLE    LEFT\na-b     119s    2m\nc       3s      10h\n";
    assert_eq!(
        stable(text, &["IDLE"]),
        "NAME   IDLE   LEFT\na-b    ~      2m\nc      ~      10h\n"
    );
}
