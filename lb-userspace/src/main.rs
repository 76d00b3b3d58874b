//! `klb`: one binary, the agent and the tool.

use std::{env, process::ExitCode};

use lb_userspace::{agent, args::Command, commands, config};

fn main() -> ExitCode {
    let cli = config::parse(env::args_os()).unwrap_or_else(|error| error.exit());
    let result = match &cli.command {
        Command::Agent(args) => agent::run(args),
        Command::Get(args) => commands::get::run(args),
        Command::Status(args) => commands::status::run(args),
        Command::Cleanup(args) => commands::cleanup::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("klb: {}", lb_userspace::errors::Chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
