//! Where an agent's settings come from: its flags, else the environment, else a
//! file, else the defaults.
//!
//! There is one list of settings, the flags in `args.rs`. The variable of a flag
//! is named after it, and a field of the file *is* the flag, without its dashes:
//! one name to search for. What the file says takes the place of the defaults
//! before the command line is read, so `clap` knows which value goes before
//! which, and reads them all alike.
//!
//! kube-proxy's flags and its file are told in klb's flags first (`kube_proxy`):
//! the file's become defaults like those of any file, the flags are put behind
//! those that were given.

mod file;
mod kube_proxy;

#[cfg(test)]
mod docs;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::{env, ffi::OsString, path::PathBuf};

use clap::{
    Arg, ArgMatches, Command, CommandFactory as _, Error, FromArgMatches as _,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};

use self::{file::File, kube_proxy::Translation};
use crate::args::{Cli, Command as Subcommand};

/// The command that has settings.
const AGENT: &str = "agent";
const HAS_AGENT: &str = "klb has an agent";

/// A value for a flag, and what somebody else calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    /// Where the user finds it: `conntrack.udpTimeout`.
    field: String,
    /// The long name of klb's flag.
    flag: String,
    values: Vec<String>,
}

/// Understands a command line, with all that stands behind it.
///
/// # Errors
///
/// What is wrong, with the name of the flag, the variable or the field; also the
/// help and the version, if that is what is asked for.
pub fn parse(line: impl IntoIterator<Item = OsString>) -> Result<Cli, Error> {
    let mut line: Vec<OsString> = line.into_iter().collect();
    let mut command = command();
    // Once without the file, to know whether there is one.
    let matches = lenient(command.clone())
        .try_get_matches_from(&line)
        .map_err(name_variable)?;
    let Some((AGENT, given)) = matches.subcommand() else {
        return Cli::from_arg_matches(&matches);
    };
    let mut of_kube_proxy = kube_proxy::of_flags(given).map_err(|text| refusal(&text))?;
    for setting in &of_kube_proxy.settings {
        line.extend(as_flags(setting, given)?);
    }
    if let Some(path) = given.get_one::<PathBuf>("config") {
        let at = |text: String| refusal(&format!("{}: {text}", path.display()));
        let settings = match file::read(path).map_err(at)? {
            File::Own(settings) => settings,
            File::KubeProxy(translation) => of_kube_proxy.take_in(translation),
        };
        command = with_defaults(command, &settings, given).map_err(at)?;
    }
    let matches = command.try_get_matches_from(line)?;
    finish(&matches, of_kube_proxy)
}

fn finish(matches: &ArgMatches, of_kube_proxy: Translation) -> Result<Cli, Error> {
    let mut cli = Cli::from_arg_matches(matches)?;
    if let Subcommand::Agent(args) = &mut cli.command {
        if args.devices.nodeport_addresses.is_empty()
            && let Some(sentence) = of_kube_proxy.wants_networks
        {
            return Err(refusal(&sentence));
        }
        args.notes.extend(of_kube_proxy.note());
    }
    Ok(cli)
}

/// The command line that klb understands, variables of the environment and
/// kube-proxy's flags included.
fn command() -> Command {
    Cli::command().mut_subcommand(AGENT, |agent| {
        agent.mut_args(with_variable).args(kube_proxy::flags())
    })
}

fn with_variable(arg: Arg) -> Arg {
    match (arg.get_long(), arg.get_env()) {
        (Some(flag), None) if flag != "help" => {
            let variable = variable(flag);
            arg.env(variable)
        }
        _ => arg,
    }
}

/// The variable of the environment that stands for a flag.
fn variable(flag: &str) -> String {
    format!("KLB_{}", flag.replace('-', "_").to_uppercase())
}

/// An error that names the variable, if it is one that is wrong: clap names the
/// flag, which nobody has typed.
fn name_variable(error: Error) -> Error {
    if !matches!(
        error.kind(),
        ErrorKind::InvalidValue | ErrorKind::ValueValidation
    ) {
        return error;
    }
    let command = command();
    let mut wrong = settings(agent(&command)).filter_map(|arg| {
        let variable = arg.get_env()?.to_str()?;
        check(&Setting {
            field: variable.to_owned(),
            flag: arg.get_long()?.to_owned(),
            values: vec![env::var(variable).ok()?],
        })
        .err()
    });
    wrong.next().map_or(error, |text| refusal(&text))
}

/// What must be given may still come from the file.
fn lenient(command: Command) -> Command {
    command.mut_subcommand(AGENT, |agent| agent.mut_args(|arg| arg.required(false)))
}

/// A setting as the flags that somebody would have typed.
fn as_flags(setting: &Setting, given: &ArgMatches) -> Result<Vec<OsString>, Error> {
    let Setting { field, flag, .. } = setting;
    if given.value_source(&id(flag)) == Some(ValueSource::CommandLine) {
        return Err(refusal(&format!(
            "{field} and --{flag} are the same: give one of them"
        )));
    }
    check(setting).map_err(|text| refusal(&text))?;
    let flags = setting.values.iter();
    Ok(flags
        .map(|value| format!("--{flag}={value}").into())
        .collect())
}

/// Puts what a file says in the place of the defaults.
fn with_defaults(
    mut command: Command,
    settings: &[Setting],
    given: &ArgMatches,
) -> Result<Command, String> {
    let agent = agent(&command).clone();
    for setting in settings {
        let Setting { field, flag, .. } = setting;
        let Some(arg) = settable(&agent, flag) else {
            return Err(unknown(&agent, field));
        };
        // `uplink:` with nothing behind it is what a template leaves.
        if setting.values.is_empty() {
            continue;
        }
        check(setting)?;
        let others: Vec<&Arg> = excluded_by(&agent, arg).collect();
        let said = |other: &&&Arg| {
            let mut names = settings.iter().filter(|setting| !setting.values.is_empty());
            names.any(|setting| Some(setting.flag.as_str()) == other.get_long())
        };
        if let Some(other) = others.iter().find(said) {
            let other = other.get_long().unwrap_or_default();
            return Err(format!("{field}: cannot be used with `{other}`"));
        }
        if !others.iter().any(|other| is_given(other, given)) {
            let (id, values) = (arg.get_id().clone(), setting.values.clone());
            let set = |arg: Arg| arg.required(false).default_values(values);
            command = command.mut_subcommand(AGENT, |agent| agent.mut_arg(id, set));
        }
    }
    Ok(command)
}

/// The flags that cannot be used together with this one.
fn excluded_by<'a>(agent: &'a Command, arg: &'a Arg) -> impl Iterator<Item = &'a Arg> {
    let excludes = |one: &Arg, other: &Arg| {
        let mut others = agent.get_arg_conflicts_with(one).into_iter();
        others.any(|excluded| excluded.get_id() == other.get_id())
    };
    // Either of them may be the one that says so.
    settings(agent).filter(move |other| excludes(arg, other) || excludes(other, arg))
}

/// Whether it is a flag or a variable that says something.
fn is_given(arg: &Arg, given: &ArgMatches) -> bool {
    let source = given.value_source(arg.get_id().as_str());
    source.is_some_and(|source| source != ValueSource::DefaultValue)
}

/// Whether klb understands the values, by the only one who knows: the flag.
fn check(setting: &Setting) -> Result<(), String> {
    let Setting {
        field,
        flag,
        values,
    } = setting;
    let start = ["klb".to_owned(), AGENT.to_owned()].into_iter();
    let flags = values.iter().map(|value| format!("--{flag}={value}"));
    lenient(Cli::command())
        .try_get_matches_from(start.chain(flags))
        .map(|_| ())
        .map_err(|error| format!("{field}: {:?}: {}", values.join(","), reason(&error)))
}

/// What is wrong with a value, without the flag that it was for.
fn reason(error: &Error) -> String {
    let allowed = match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(values)) if !values.is_empty() => values.join(", "),
        _ => String::new(),
    };
    match error.kind() {
        ErrorKind::ArgumentConflict => "one value is wanted".to_owned(),
        ErrorKind::InvalidValue if allowed.is_empty() => "a value is wanted".to_owned(),
        ErrorKind::InvalidValue => format!("wanted is one of {allowed}"),
        _ => {
            std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
        }
    }
}

/// The flag that a field of the file may set.
fn settable<'a>(agent: &'a Command, flag: &str) -> Option<&'a Arg> {
    settings(agent).find(|arg| arg.get_long() == Some(flag))
}

/// The flags that are settings; there is no file that names another one.
fn settings(agent: &Command) -> impl Iterator<Item = &Arg> {
    let args = agent.get_arguments().filter(|arg| !arg.is_hide_set());
    args.filter(|arg| !matches!(arg.get_long(), None | Some("help" | "version" | "config")))
}

fn unknown(agent: &Command, field: &str) -> String {
    // Names that differ in writing only: nodePortAddresses, map_flows.
    let plain = |name: &str| name.replace(['-', '_'], "").to_lowercase();
    let mut names = settings(agent).filter_map(Arg::get_long);
    let similar = names.find(|name| plain(name) == plain(field));
    let hint = similar.map_or_else(
        || "the fields are the flags of `klb agent`, without their dashes in front".to_owned(),
        |name| format!("it is `{name}`"),
    );
    format!("{field}: there is no such field; {hint}")
}

fn agent(command: &Command) -> &Command {
    command.find_subcommand(AGENT).expect(HAS_AGENT)
}

/// By which clap knows a flag.
fn id(flag: &str) -> String {
    flag.replace('-', "_")
}

/// A sentence for the user; the exit status is that of wrong usage.
fn refusal(sentence: &str) -> Error {
    let mut command = command();
    // So that the usage that it prints is complete.
    command.build();
    let agent = command.find_subcommand_mut(AGENT).expect(HAS_AGENT);
    agent.error(ErrorKind::ValueValidation, sentence)
}
