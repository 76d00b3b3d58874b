//! `klb`: one binary, the agent and the tool.

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _, error::ErrorKind};
use lb_userspace::{
    agent,
    args::{Cli, Command},
    commands,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Agent(args) = &cli.command
        && let Err(refusal) = args.check()
    {
        Cli::command()
            .error(ErrorKind::InvalidValue, refusal)
            .exit();
    }
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
