//! Starting `klb-traffic` in a place, and reading what it reports.

use std::{cell::Cell, net::SocketAddr, path::PathBuf, time::Duration};

use crate::{
    measure::{Measured, Test},
    process::{Place, Process},
    traffic::{Answer, Failure, Outcome, Report, Request, Step},
    wait,
};

/// Longer than any request lasts, and than a server takes to start.
const LIMIT: Duration = Duration::from_secs(30);
/// How long a request in a stream waits for its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long one of those waits, at most, of which one is to be answered.
const ATTEMPT: Duration = Duration::from_secs(2);

/// The helper program.
#[derive(Clone, Debug)]
pub struct Helper {
    program: PathBuf,
}

impl Helper {
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
        }
    }

    /// Starts a server; [`await_server`] waits until it listens.
    pub fn serve(&self, place: &Place, name: &str) -> Process {
        self.serve_on(place, name, 3000, 3053)
    }

    /// As [`Self::serve`], on other ports.
    pub fn serve_on(&self, place: &Place, name: &str, http: u16, udp: u16) -> Process {
        let mut command = place.command(&self.program);
        command.args(["serve", name]);
        command.args([format!("--http={http}"), format!("--udp={udp}")]);
        place.start(name, command)
    }

    /// Starts a server that answers what is measured; [`await_server`] waits
    /// until it listens.
    pub fn serve_measure(&self, place: &Place, number: u8, cpu: usize) -> Process {
        let mut command = place.command(&self.program);
        command.args(["serve-measure", &number.to_string()]);
        command.arg(format!("--cpu={cpu}"));
        place.start(&format!("measured-{number}"), command)
    }

    /// Asks for a while, by turns of these addresses, and times it.
    ///
    /// # Panics
    /// If a request fails.
    pub fn measure(
        &self,
        place: &Place,
        test: Test,
        to: &[SocketAddr],
        time: Duration,
        cpu: usize,
    ) -> Measured {
        let mut command = place.command(&self.program);
        command.args(["measure", test.flag()]);
        command.args(to.iter().map(ToString::to_string));
        command.arg(format!("--time={}", time.as_millis()));
        command.arg(format!("--cpu={cpu}"));
        let mut process = place.start("measure", command);
        let status = process.wait(LIMIT);
        assert!(status.success(), "{process:?}");
        serde_json::from_str(&process.stdout().text())
            .unwrap_or_else(|error| panic!("{error}: {process:?}"))
    }

    /// Asks once.
    ///
    /// # Errors
    /// Why no answer came.
    pub fn ask(&self, place: &Place, request: &Request) -> Result<Answer, Failure> {
        let mut outcomes = self.ask_often(place, request, 1);
        outcomes.pop().expect("one outcome")
    }

    /// Asks one time after the other.
    ///
    /// # Panics
    /// If the helper itself fails.
    pub fn ask_often(
        &self,
        place: &Place,
        request: &Request,
        count: u32,
    ) -> Vec<Result<Answer, Failure>> {
        let count = format!("--count={count}");
        self.run(place, "ask", request, &[count])
    }

    /// Asks until there is an answer, or until the time is over.
    ///
    /// # Errors
    /// The last failure.
    pub fn await_answer(
        &self,
        place: &Place,
        request: &Request,
        within: Duration,
    ) -> Result<Answer, Failure> {
        let limit = ATTEMPT.min(Duration::from_millis(request.timeout));
        let request = request.clone().timeout(limit);
        let within = format!("--within={}", within.as_millis());
        let mut outcomes = self.run(place, "await", &request, &[within]);
        outcomes.pop().expect("one outcome")
    }

    fn run(
        &self,
        place: &Place,
        verb: &str,
        request: &Request,
        flags: &[String],
    ) -> Vec<Result<Answer, Failure>> {
        let arguments = [request.flags().as_slice(), flags].concat();
        self.outcomes(place, verb, &arguments)
    }

    /// Takes steps with one UDP socket.
    pub fn take(
        &self,
        place: &Place,
        steps: &[Step],
        mapped: bool,
    ) -> Vec<Result<Answer, Failure>> {
        let mut arguments: Vec<_> = steps.iter().map(ToString::to_string).collect();
        arguments.extend(mapped.then(|| "--mapped".to_owned()));
        self.outcomes(place, "steps", &arguments)
    }

    fn outcomes(
        &self,
        place: &Place,
        verb: &str,
        arguments: &[String],
    ) -> Vec<Result<Answer, Failure>> {
        let mut command = place.command(&self.program);
        command.arg(verb).args(arguments);
        let mut process = place.start(verb, command);
        let status = process.wait(LIMIT);
        assert!(status.success(), "{process:?}");
        let reports = reports(&process);
        assert!(!reports.is_empty(), "{process:?}");
        reports
            .into_iter()
            .map(|report| report.outcome.result())
            .collect()
    }

    /// Starts asking again and again, each time by a new connection, or all the
    /// time over one that is `held`. An answer may take long, ten seconds or what the
    /// request says: these requests are there to tell whether any is lost, and a lost one
    /// stays lost.
    pub fn stream(&self, place: &Place, request: &Request, held: bool) -> Stream {
        let timeout = PATIENCE.max(Duration::from_millis(request.timeout));
        let request = request.clone().timeout(timeout);
        let flag = held.then_some("--hold");
        self.start_stream(place, &request, flag)
    }

    /// Starts asking again and again over one UDP socket, whatever it is told.
    pub fn insist(&self, place: &Place, request: &Request) -> Stream {
        self.start_stream(place, request, Some("--insist"))
    }

    fn start_stream(&self, place: &Place, request: &Request, flag: Option<&str>) -> Stream {
        let mut command = place.command(&self.program);
        command.arg("stream").args(request.flags()).args(flag);
        Stream {
            process: place.start("stream", command),
            read: Cell::default(),
        }
    }
}

/// Waits until a server listens.
///
/// # Panics
/// If it does not.
pub fn await_server(server: &mut Process) {
    let listening = wait::attempt(LIMIT, || {
        let ready = server.stdout().lines().iter().any(|line| line == "serving");
        let ended = server.status().is_some();
        (ready || ended).then_some(ready)
    });
    assert_eq!(listening, Some(true), "no server: {server:?}");
}

/// Requests that go on in the background.
#[derive(Debug)]
pub struct Stream {
    process: Process,
    /// Up to where the output was read, and the answers up to there: it is read
    /// often, and becomes long.
    read: Cell<(u64, usize)>,
}

impl Stream {
    /// What has happened so far.
    pub fn reports(&self) -> Vec<Report> {
        reports(&self.process)
    }

    /// Waits until so many more answers have come.
    ///
    /// # Panics
    /// If they do not come in time.
    pub fn await_more(&self, answers: usize) {
        let wanted = self.answers() + answers;
        let come = wait::attempt(LIMIT, || (self.answers() >= wanted).then_some(()));
        assert!(come.is_some(), "no {answers} more answers of {self:?}");
    }

    /// The number of answers so far.
    fn answers(&self) -> usize {
        let (offset, answers) = self.read.get();
        let text = self.process.stdout().text_from(offset);
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        let more = parse(whole.lines())
            .into_iter()
            .filter(|report| matches!(report.outcome, Outcome::Answer(_)));
        let read = (offset + whole.len() as u64, answers + more.count());
        self.read.set(read);
        read.1
    }

    /// Lets the last request end; returns all that happened.
    pub fn stop(mut self) -> Vec<Report> {
        self.process.close_stdin();
        self.process.wait(LIMIT);
        self.reports()
    }
}

fn reports(process: &Process) -> Vec<Report> {
    parse(process.stdout().lines().iter().map(String::as_str))
}

fn parse<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<Report> {
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}
