//! `klb`: one binary, the agent and the tool.

use std::{env, process::ExitCode};

use lb_userspace::{
    agent,
    args::Command,
    commands, config,
    errors::{Chain, is_forbidden},
};

fn main() -> ExitCode {
    let cli = config::parse(env::args_os()).unwrap_or_else(|error| error.exit());
    let result = match &cli.command {
        Command::Agent(args) => well(agent::run(args)),
        Command::Get(args) => well(commands::get::run(args)),
        Command::Status(args) => commands::status::run(args),
        Command::Top(args) => commands::top::run(args),
        Command::Explain(args) => well(commands::explain::run(args)),
        Command::Trace(args) => well(commands::trace::run(args)),
        Command::Diff(args) => commands::diff::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Cleanup(args) => well(commands::cleanup::run(args)),
        Command::Completions(args) => well(commands::completions::run(args)),
    };
    result.unwrap_or_else(|error| {
        let hint = if is_forbidden(error.as_ref()) {
            ": run klb as root, with the capabilities that docs/privileges.md lists"
        } else {
            ""
        };
        eprintln!("klb: {}{hint}", Chain(error.as_ref()));
        if error.is::<commands::WrongUsage>() {
            return 2.into();
        }
        trouble(&cli.command)
    })
}

/// Of a command that has nothing to tell by its exit status but failure.
fn well(result: anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    result.map(|()| ExitCode::SUCCESS)
}

/// Where failure has an exit status that is not an answer.
fn trouble(command: &Command) -> ExitCode {
    match command {
        Command::Diff(_) => 2.into(),
        _ => ExitCode::FAILURE,
    }
}
