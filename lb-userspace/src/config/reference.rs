//! `docs/reference.md` is what `klb --help` and the help of each command say;
//! `KLB_BLESS=1 cargo test -p lb-userspace --lib config::reference` writes it.

use std::{env, fmt::Write as _, fs};

use clap::Command;

use super::command;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference.md");

const HEAD: &str = "\
# Reference

What `klb --help` says, and `klb COMMAND --help` of each command. This page is made from there.
Settings of the agent with their variables and fields are a table in [configuration](configuration.md), metrics are in [metrics](metrics.md).

`-o json` prints one document, which is described field by field by a JSON schema in [schemas](schemas). More fields may be added, none of these go or change.
";

#[test]
fn the_page_says_what_help_says() {
    let wanted = reference();
    let page = fs::read_to_string(PAGE).unwrap_or_default();
    if page != wanted && env::var_os("KLB_BLESS").is_some() {
        fs::write(PAGE, &wanted).expect("written");
        return;
    }
    assert!(
        page == wanted,
        "reference.md is out of date: set KLB_BLESS to have it written"
    );
}

fn reference() -> String {
    let mut klb = command();
    // So that each command knows what it is called.
    klb.build();
    let mut page = HEAD.to_owned();
    section(&mut page, &mut klb);
    let commands = klb.get_subcommands_mut();
    for command in commands.filter(|command| command.get_name() != "help") {
        section(&mut page, command);
    }
    page
}

fn section(page: &mut String, command: &mut Command) {
    // What a variable is set to here is nobody's business.
    let mut quiet = command.clone().mut_args(|arg| arg.hide_env_values(true));
    let name = quiet.get_bin_name().unwrap_or("klb").to_owned();
    let help = quiet.render_long_help().to_string();
    let help: Vec<_> = help.lines().map(str::trim_end).collect();
    let help = help.join("\n");
    write!(page, "\n## {name}\n\n```text\n{}\n```\n", help.trim_end()).expect("written");
}
