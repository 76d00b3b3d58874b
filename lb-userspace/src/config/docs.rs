//! `docs/configuration.md` lists every setting. The lists are made from the
//! code; `KLB_BLESS=1 cargo test -p lb-userspace --lib config::docs` writes them.

use std::{env, fmt::Write as _, fs, path::Path};

use clap::Arg;

use super::{
    agent, command,
    kube_proxy::{FIELDS, Field, Rule},
    settings,
};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");

#[test]
fn the_page_lists_what_there_is() {
    let page = fs::read_to_string(PAGE).expect("the page");
    let wanted = with_list(&page, "settings", &all_settings());
    let wanted = with_list(&wanted, "kube-proxy", &all_of_kube_proxy());
    if page != wanted && env::var_os("KLB_BLESS").is_some() {
        fs::write(PAGE, &wanted).expect("written");
        return;
    }
    let name = Path::new(PAGE).file_name().expect("a name");
    assert_eq!(
        page, wanted,
        "{name:?} is out of date: set KLB_BLESS to have it written"
    );
}

/// The page with another list between two marks.
fn with_list(page: &str, name: &str, list: &str) -> String {
    let (begin, end) = (
        format!("<!-- {name} -->\n"),
        format!("<!-- end of {name} -->"),
    );
    let (before, rest) = page.split_once(&begin).expect("a mark");
    let (_, after) = rest.split_once(&end).expect("its end");
    format!("{before}{begin}\n{list}\n{end}{after}")
}

fn all_settings() -> String {
    let command = command();
    let mut text = String::from("| flag, field | variable | default | |\n|---|---|---|---|\n");
    for arg in settings(agent(&command)) {
        let name = arg.get_long().expect("long");
        let value = arg.get_value_names().expect("a value")[0].as_str();
        let variable = arg.get_env().expect("a variable").display();
        let help = cell(&arg.get_help().expect("help").to_string());
        let (help, default) = match default(arg) {
            Some(default) => (help, default),
            // Where no value is the default, the help says what is.
            None => match help.split_once(" [default: ") {
                Some((help, default)) => {
                    (help.to_owned(), default.trim_end_matches(']').to_owned())
                }
                None => (help, String::new()),
            },
        };
        let values = choices(arg).unwrap_or_else(|| format!("`{value}`"));
        writeln!(
            text,
            "| `--{name}` {values} | `{variable}` | {default} | {help} |"
        )
        .expect("written");
    }
    text
}

fn default(arg: &Arg) -> Option<String> {
    let values = arg.get_default_values().iter();
    let values: Vec<_> = values
        .map(|value| format!("`{}`", value.display()))
        .collect();
    (!values.is_empty()).then(|| values.join(", "))
}

/// The values of a flag that has only some.
fn choices(arg: &Arg) -> Option<String> {
    let values = arg.get_possible_values();
    let names: Vec<_> = values
        .iter()
        .map(|value| format!("`{}`", value.get_name()))
        .collect();
    (!names.is_empty()).then(|| names.join(" \\| "))
}

fn all_of_kube_proxy() -> String {
    let mut text = String::from("| field | flag | klb |\n|---|---|---|\n");
    for Field {
        path, flag, rule, ..
    } in FIELDS
    {
        let (path, flag) = (code(path), code(&dashed(flag)));
        let meaning = match rule {
            Rule::Is(flag) => format!("`--{flag}`"),
            Rule::Without(why) => format!("nothing: {why}"),
            Rule::Refused(sentence) => format!("refused: {sentence}"),
            Rule::By(meaning, _) => (*meaning).to_owned(),
        };
        writeln!(text, "| {path} | {flag} | {} |", cell(&meaning)).expect("written");
    }
    text
}

fn dashed(flag: &str) -> String {
    match flag.len() {
        0 => String::new(),
        1 => format!("-{flag}"),
        _ => format!("--{flag}"),
    }
}

fn code(text: &str) -> String {
    if text.is_empty() {
        return String::new();
    }
    format!("`{text}`")
}

fn cell(text: &str) -> String {
    text.replace('\n', " ").replace('|', "\\|")
}
