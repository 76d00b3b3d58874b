//! `klb completions`: the script by which a shell completes a command line.

use clap::CommandFactory as _;
use clap_complete::generate;

use super::print_text;
use crate::args::{Cli, CompletionsArgs, Shell};

/// Runs `klb completions`.
pub fn run(args: &CompletionsArgs) -> anyhow::Result<()> {
    print_text(&script(args.shell))
}

/// Of what `klb` itself has: kube-proxy's flags are understood, and nobody is
/// meant to type them.
fn script(shell: Shell) -> String {
    let generator = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    generate(generator, &mut Cli::command(), "klb", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use clap::ValueEnum as _;

    use super::*;

    /// How a script offers a subcommand.
    fn offer(shell: Shell, command: &str) -> String {
        match shell {
            Shell::Bash => format!("klb__subcmd__{command})"),
            Shell::Zsh => format!("\n'{command}:"),
            Shell::Fish => format!("__fish_klb_needs_command\" -f -a \"{command}\""),
        }
    }

    #[test]
    fn every_subcommand_is_in_each() {
        for &shell in Shell::value_variants() {
            let script = script(shell);
            for command in Cli::command().get_subcommands() {
                let offer = offer(shell, command.get_name());
                assert!(script.contains(&offer), "{shell:?}: no {offer} in {script}");
            }
        }
    }

    #[test]
    fn what_may_follow_is_in_each() {
        for &shell in Shell::value_variants() {
            let script = script(shell);
            for word in ["backends", "namespace", "generic"] {
                assert!(script.contains(word), "{shell:?}: {word}");
            }
        }
    }

    #[test]
    fn bash_completes_by_it() {
        let ask = "COMP_WORDS=(klb get d) COMP_CWORD=2; _klb klb d get; echo \"${COMPREPLY[@]}\"";
        let script = format!("{}\n{ask}", script(Shell::Bash));
        let said = Command::new("bash").args(["-c", &script]).output();
        let said = said.expect("there is a bash");
        let words = String::from_utf8_lossy(&said.stdout);
        assert_eq!(words.trim(), "devices", "{said:?}");
    }
}
