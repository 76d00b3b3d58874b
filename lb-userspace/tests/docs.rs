//! The pages: what they link to is there, and commands that they name are klb's.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use clap::{CommandFactory as _, ValueEnum as _};
use lb_userspace::args::{Cli, What};
use serde_json::Value;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Every page for people, with its text.
fn pages() -> Vec<(PathBuf, String)> {
    let entries = fs::read_dir(root().join("docs")).expect("a folder");
    let pages = entries.map(|entry| entry.expect("an entry").path());
    let pages = pages.filter(|path| path.extension().is_some_and(|end| end == "md"));
    let pages = pages.chain(["README.md", "ARCHITECTURE.md"].map(|name| root().join(name)));
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a page");
        (path, text)
    };
    pages.map(read).collect()
}

/// Where the links of a page lead that are not to other sites.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let ends = text.split("](").skip(1);
    let links = ends.filter_map(|rest| rest.split_once(')').map(|(link, _)| link));
    links.filter(|link| !link.contains("://"))
}

/// The names that a page's headings have in links.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| -> String {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading
            .chars()
            .filter(|c| c.is_alphanumeric() || *c == ' ' || *c == '-');
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn links_lead_somewhere() {
    for (path, text) in pages() {
        for link in links(&text) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                _ => path.with_file_name(file),
            };
            assert!(target.exists(), "{}: {link}", path.display());
            if !anchor.is_empty() {
                let text = fs::read_to_string(&target).expect("a page");
                let anchors = anchors(&text);
                assert!(anchors.contains(anchor), "{}: {link}", path.display());
            }
        }
    }
}

#[test]
fn every_page_is_found_from_the_first() {
    let first = fs::read_to_string(root().join("README.md")).expect("a page");
    let mut linked: BTreeSet<_> = links(&first).map(str::to_owned).collect();
    let second = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("a page");
    linked.extend(links(&second).map(str::to_owned));
    for (path, _) in pages() {
        let name = path.file_name().expect("a name").display().to_string();
        // For those who change klb, and named in the text.
        if ["README.md", "testing.md", "verifier-budget.md"].contains(&name.as_str()) {
            continue;
        }
        let is_linked = linked.iter().any(|link| {
            link.split('#')
                .next()
                .is_some_and(|link| link.ends_with(&name))
        });
        assert!(is_linked, "{name}");
    }
}

/// In the pages about tasks: the first one also says what there is not yet.
#[test]
fn commands_are_klbs() {
    let cli = Cli::command();
    let known: BTreeSet<_> = cli.get_subcommands().map(clap::Command::get_name).collect();
    for (path, text) in pages() {
        if path.ends_with("README.md") {
            continue;
        }
        let spans = text.split('`').skip(1).step_by(2);
        let lines = text.lines().filter_map(|line| line.strip_prefix("$ "));
        let named = spans
            .chain(lines)
            .filter_map(|code| code.strip_prefix("klb ")?.split([' ', '\\', '|']).next());
        for command in named.filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase())) {
            assert!(known.contains(command), "{}: klb {command}", path.display());
        }
    }
}

/// The documents that commands print, by the names of their schemas.
fn documents() -> BTreeSet<String> {
    let cli = Cli::command();
    let has_json = |command: &&clap::Command| {
        let mut outputs = command
            .get_arguments()
            .filter(|arg| arg.get_id() == "output");
        outputs.any(|arg| {
            let values = arg.get_possible_values();
            values.iter().any(|value| value.get_name() == "json")
        })
    };
    let commands = cli.get_subcommands().filter(has_json);
    let names = commands.flat_map(|command| match command.get_name() {
        "get" => What::value_variants()
            .iter()
            .map(|what| format!("get-{}", what.name()))
            .collect(),
        name => vec![name.to_owned()],
    });
    names.collect()
}

/// That they are as their schemas say is a test of the agent's level
/// (`tests/tests/agent/schemas.rs`).
#[test]
fn every_document_has_a_schema_that_describes_all_of_it() {
    let folder = root().join("docs/schemas");
    let entries = fs::read_dir(&folder).expect("a folder");
    let names = entries.map(|entry| {
        let path = entry.expect("an entry").path();
        path.file_stem().expect("a name").display().to_string()
    });
    assert_eq!(names.collect::<BTreeSet<_>>(), documents());
    for name in documents() {
        let text = fs::read_to_string(folder.join(format!("{name}.json"))).expect("a schema");
        let schema: Value = serde_json::from_str(&text).expect("JSON");
        assert!(
            schema["title"]
                .as_str()
                .is_some_and(|title| title.starts_with("klb "))
        );
        assert_described(&name, &schema);
    }
}

/// Every field has words, and every object says which of its fields are always
/// there.
fn assert_described(path: &str, schema: &Value) {
    if let Some(fields) = schema["properties"].as_object() {
        assert!(schema["required"].is_array(), "{path}");
        for (name, field) in fields {
            let path = format!("{path}.{name}");
            let description = field["description"].as_str();
            assert!(description.is_some_and(|text| !text.is_empty()), "{path}");
            assert_described(&path, field);
        }
    }
    if schema["type"] == "array" {
        assert!(schema["items"].is_object(), "{path}");
        assert_described(&format!("{path}[]"), &schema["items"]);
    }
    for (name, definition) in schema["$defs"].as_object().into_iter().flatten() {
        assert_described(&format!("{path}#{name}"), definition);
    }
}
