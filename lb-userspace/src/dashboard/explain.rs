//! `klb explain`, for somebody who has a form instead of a command line.
//!
//! To run the programs they are loaded once more, which takes a second of work and
//! some memory. So it is a process of its own, the same program as this: it runs
//! last, is ended when it takes too long or nobody waits any more, and whatever
//! becomes of it is nothing to the agent. It may do what the agent may.

use std::{
    ffi::OsString,
    io,
    net::SocketAddr,
    process::{Output as Printed, Stdio},
    time::Duration,
};

use clap::ValueEnum as _;
use hyper::StatusCode;
use nix::net::if_::if_nametoindex;
use tokio::{process::Command, sync::Semaphore, time::timeout};

use super::{JSON, Refusal, nice::step_back, query::Query};
use crate::{
    args::{End, ExplainArgs, Output, PacketProtocol, Paths},
    commands::explain,
    health::http::Answer,
};

/// As long as a slow machine may take.
const LIMIT: Duration = Duration::from_secs(20);

/// This program, also when its file has been replaced meanwhile.
const THIS: &str = "/proc/self/exe";

/// Where calls of processes are met.
const SOCKET: &str = "socket";

/// Understands what is asked.
///
/// # Errors
///
/// If there is no such packet, or no such place.
pub(super) fn question(query: &mut Query, paths: &Paths) -> Result<ExplainArgs, Refusal> {
    const PROTOCOLS: [(&str, PacketProtocol); 3] = [
        ("tcp", PacketProtocol::Tcp),
        ("udp", PacketProtocol::Udp),
        ("sctp", PacketProtocol::Sctp),
    ];
    let from = query.of_form(
        "from",
        "ADDR or ADDR:PORT, an IPv6 address with a port in brackets",
    )?;
    let to = query.of_form("to", "ADDR:PORT, an IPv6 address in brackets")?;
    let missing = |name| Refusal::wrong(format!("{name} is missing"));
    let args = ExplainArgs {
        from: from.ok_or_else(|| missing("from"))?,
        to: to.ok_or_else(|| missing("to"))?,
        proto: query
            .one_of("proto", &PROTOCOLS)?
            .unwrap_or(PacketProtocol::Tcp),
        at: query.text("at"),
        output: Output::Json,
        paths: paths.clone(),
    };
    explain::check(&args).map_err(|error| Refusal::wrong(error.to_string()))?;
    if let Some(device) = args.at.as_deref().filter(|at| *at != SOCKET)
        && if_nametoindex(device).is_err()
    {
        return Err(Refusal::wrong(format!(
            "at: there is no device {device} here"
        )));
    }
    Ok(args)
}

/// Asks, one question at a time.
#[derive(Debug)]
pub(super) struct Explainer {
    program: Vec<OsString>,
    limit: Duration,
    turn: Semaphore,
}

impl Explainer {
    pub(super) fn new() -> Self {
        Self::of(vec![THIS.into()], LIMIT)
    }

    fn of(program: Vec<OsString>, limit: Duration) -> Self {
        Self {
            program,
            limit,
            turn: Semaphore::new(1),
        }
    }

    /// What `klb explain -o json` prints.
    ///
    /// # Errors
    ///
    /// If another question is not answered yet, this one takes too long, or has no
    /// answer.
    pub(super) async fn answer(&self, args: &ExplainArgs) -> Result<Answer, Refusal> {
        let _turn = self.turn.try_acquire().map_err(|_taken| {
            let sentence = "another question is not answered yet: ask again in a second";
            Refusal::new(StatusCode::TOO_MANY_REQUESTS, sentence)
        })?;
        let failed = |error: io::Error| Refusal::failed(format!("running klb explain: {error}"));
        let printed = match timeout(self.limit, self.run(args)).await {
            Ok(printed) => printed.map_err(failed)?,
            Err(_elapsed) => {
                let sentence = format!("it took more than {:?}, and was given up", self.limit);
                return Err(Refusal::new(StatusCode::GATEWAY_TIMEOUT, sentence));
            }
        };
        if !printed.status.success() {
            return Err(Refusal::failed(complaint(&printed)));
        }
        Ok(Answer::new(StatusCode::OK, JSON, printed.stdout))
    }

    async fn run(&self, args: &ExplainArgs) -> io::Result<Printed> {
        let mut command = Command::new(&self.program[0]);
        let child = command
            .args(&self.program[1..])
            .args(line(args))
            // Nothing but what is said here.
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(id) = child.id() {
            step_back(id);
        }
        child.wait_with_output().await
    }
}

/// The command line.
fn line(args: &ExplainArgs) -> Vec<OsString> {
    let ExplainArgs {
        from: End { ip, port },
        to,
        proto,
        at,
        output: _,
        paths,
    } = args;
    let Paths {
        bpffs,
        state_dir,
        layout,
    } = paths;
    let from = port.map_or_else(
        || ip.to_string(),
        |port| SocketAddr::new(*ip, port).to_string(),
    );
    let proto = proto.to_possible_value();
    let proto = proto.as_ref().map_or("tcp", |value| value.get_name());
    let mut line: Vec<OsString> = vec!["explain".into(), "--output=json".into()];
    let mut push = |flag: &str, value: OsString| {
        let mut argument = OsString::from(format!("--{flag}="));
        argument.push(value);
        line.push(argument);
    };
    push("from", from.into());
    push("to", to.to_string().into());
    push("proto", proto.into());
    push("bpffs", bpffs.into());
    push("state-dir", state_dir.into());
    push("layout", layout.into());
    if let Some(at) = at {
        push("at", at.into());
    }
    line
}

/// Why it failed, in its own words.
fn complaint(printed: &Printed) -> String {
    let text = String::from_utf8_lossy(&printed.stderr);
    let mut lines = text.lines().map(str::trim);
    let last = lines.rfind(|line| !line.is_empty());
    last.map_or_else(
        || format!("klb explain: {}", printed.status),
        |line| line.trim_start_matches("klb: ").to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command as Subcommand};

    fn paths() -> Paths {
        Paths {
            bpffs: "/sys/fs/bpf/klb".into(),
            state_dir: "/run/klb".into(),
            layout: "v1".to_owned(),
        }
    }

    fn asked(query: &str) -> Result<ExplainArgs, String> {
        let mut query = Query::parse(query).expect("parameters");
        question(&mut query, &paths()).map_err(|refusal| refusal.sentence)
    }

    fn any() -> ExplainArgs {
        asked("from=192.0.2.9&to=192.0.2.1:80").expect("a question")
    }

    #[test]
    fn what_is_asked_is_what_the_command_line_says() {
        for (query, words) in [
            (
                "from=192.0.2.9&to=192.0.2.1:80",
                &["--from", "192.0.2.9", "--to", "192.0.2.1:80"][..],
            ),
            (
                "from=[fd00::9]:7&to=[fd00::1]:80&proto=udp&at=lo",
                &[
                    "--from",
                    "[fd00::9]:7",
                    "--to",
                    "[fd00::1]:80",
                    "--proto",
                    "udp",
                    "--at",
                    "lo",
                ],
            ),
            (
                "from=fd00::9&to=[fd00::1]:80&proto=sctp&at=socket",
                &[
                    "--from",
                    "fd00::9",
                    "--to",
                    "[fd00::1]:80",
                    "--proto",
                    "sctp",
                    "--at",
                    "socket",
                ],
            ),
        ] {
            let asked = line(&asked(query).expect("a question"));
            let asked = [OsString::from("klb")].into_iter().chain(asked);
            let typed = ["klb", "explain", "-o", "json"].iter().chain(words);
            let asked = Cli::try_parse_from(asked).expect("valid").command;
            let typed = Cli::try_parse_from(typed).expect("valid").command;
            let (Subcommand::Explain(asked), Subcommand::Explain(typed)) = (asked, typed) else {
                panic!("{query}");
            };
            assert_eq!(format!("{asked:?}"), format!("{typed:?}"), "{query}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_anything_is_done() {
        for (query, part) in [
            ("", "from is missing"),
            ("from=192.0.2.9", "to is missing"),
            ("from=here&to=192.0.2.1:80", "from: wanted is ADDR or"),
            ("from=192.0.2.9&to=192.0.2.1", "to: wanted is ADDR:PORT"),
            ("from=192.0.2.9&to=[fd00::1]:80", "different families"),
            ("from=192.0.2.9&to=192.0.2.1:0", "0 is no port"),
            ("from=192.0.2.9&to=192.0.2.1:80&proto=gre", "tcp, udp, sctp"),
            ("from=192.0.2.9&to=192.0.2.1:80&at=no-such", "no device"),
            ("from=192.0.2.9&to=192.0.2.1:80&at=--help", "no device"),
            ("from=192.0.2.9&to=192.0.2.1:80&at=a%00b", "no device"),
        ] {
            let sentence = asked(query).expect_err("refused");
            assert!(sentence.contains(part), "{query}: {sentence}");
        }
    }

    /// An explainer that runs a script; the question is its arguments.
    fn explainer(script: &str, limit: Duration) -> Arc<Explainer> {
        let program = ["/bin/sh", "-c", script].map(OsString::from);
        Arc::new(Explainer::of(program.into(), limit))
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn an_answer_is_what_was_printed() {
        let explainer = explainer("echo '{\"verdict\": 1}'; echo no matter >&2", MINUTE);
        let answer = explainer.answer(&any()).await.expect("an answer");
        assert_eq!(answer.body, "{\"verdict\": 1}\n");
    }

    #[tokio::test]
    async fn what_fails_says_why() {
        for (script, wanted) in [
            ("echo first >&2; echo klb: why >&2; exit 1", "why"),
            ("exit 1", "klb explain: exit status: 1"),
        ] {
            let refusal = explainer(script, MINUTE).answer(&any()).await;
            let refusal = refusal.expect_err("failed");
            assert_eq!(refusal, Refusal::failed(wanted));
        }
    }

    #[tokio::test]
    async fn what_takes_too_long_is_given_up() {
        let explainer = explainer("exec sleep 60", Duration::from_millis(50));
        let refusal = explainer.answer(&any()).await.expect_err("given up");
        assert_eq!(refusal.status, StatusCode::GATEWAY_TIMEOUT);
        assert_eq!(
            explainer.turn.available_permits(),
            1,
            "the next one may ask"
        );
    }

    #[tokio::test]
    async fn there_is_one_question_at_a_time() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        let script = format!("cat {}", pipe.display());
        let explainer = explainer(&script, MINUTE);
        let asking = Arc::clone(&explainer);
        let first = tokio::spawn(async move { asking.answer(&any()).await });
        while explainer.turn.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let refusal = explainer.answer(&any()).await.expect_err("one at a time");
        assert_eq!(refusal.status, StatusCode::TOO_MANY_REQUESTS);
        let write = tokio::task::spawn_blocking(move || std::fs::write(pipe, "{}"));
        write.await.expect("no panic").expect("written");
        let answer = first.await.expect("no panic").expect("an answer");
        assert_eq!(answer.body, "{}");
        assert_eq!(explainer.turn.available_permits(), 1);
    }
}
