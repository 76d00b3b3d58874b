//! The servers and clients of klb's tests and demo, as a program of its own:
//! the socket programs look at the control group of a *process*, so a thread of
//! the test cannot stand for a process of the cluster.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, UdpSocket},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use clap::{Parser, Subcommand};
use lb_tests::{
    measure,
    traffic::{Answer, Connection, Failure, Protocol, Report, Request, Step, now, serve, take},
};

/// Servers and clients for klb's tests and demo
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer with a name over HTTP and UDP, IPv4 and IPv6, until killed
    Serve {
        name: String,
        #[arg(long, default_value_t = 3000)]
        http: u16,
        #[arg(long, default_value_t = 3053)]
        udp: u16,
    },
    /// Ask a number of times, and report each outcome as a line of JSON
    Ask {
        #[command(flatten)]
        request: Request,
        #[arg(long, default_value_t = 1)]
        count: u32,
    },
    /// Ask again and again until there is an answer; report only that, or the
    /// last failure
    Await {
        #[command(flatten)]
        request: Request,
        #[arg(long, value_name = "MS", default_value_t = 5000)]
        within: u64,
    },
    /// Take steps with one UDP socket, and report each outcome
    Steps {
        /// Speak IPv4 by an IPv6 socket
        #[arg(long)]
        mapped: bool,
        #[arg(required = true)]
        steps: Vec<Step>,
    },
    /// Ask until standard input ends, and report each outcome
    Stream {
        #[command(flatten)]
        request: Request,
        /// Pause between an outcome and the next question
        #[arg(long, value_name = "MS", default_value_t = 4)]
        every: u64,
        /// Ask over one connection that stays open
        #[arg(long)]
        hold: bool,
        /// UDP: ask over one socket, also after failures
        #[arg(long, conflicts_with = "hold")]
        insist: bool,
    },
    /// Answer `measure` with a number, on one CPU, until killed
    ServeMeasure {
        number: u8,
        #[arg(long)]
        cpu: usize,
    },
    /// Ask for a while, on one CPU, and report how long that took
    Measure {
        #[arg(value_enum)]
        test: measure::Test,
        /// Whom to ask, by turns
        #[arg(required = true)]
        to: Vec<SocketAddr>,
        #[arg(long, value_name = "MS", default_value_t = 300)]
        time: u64,
        #[arg(long)]
        cpu: usize,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("klb-traffic: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> io::Result<()> {
    match command {
        Command::Serve { name, http, udp } => {
            serve(&name, http, udp)?;
            go_on()
        }
        Command::Ask { request, count } => (0..count).try_for_each(|_| report(request.perform())),
        Command::Await { request, within } => report(keep_asking(&request, within)),
        Command::Steps { mapped, steps } => match take(&steps, mapped) {
            Ok(outcomes) => outcomes.into_iter().try_for_each(report),
            Err(failure) => report(Err(failure)),
        },
        Command::Stream {
            request,
            every,
            hold,
            insist,
        } => {
            let every = Duration::from_millis(every);
            let mut held = None;
            if insist {
                let socket = request.unconnected()?;
                stream(every, || request.insist(&socket))
            } else if hold {
                stream(every, || ask_held(&request, &mut held))
            } else {
                stream(every, || request.perform())
            }
        }
        Command::ServeMeasure { number, cpu } => {
            measure::take_cpu(cpu)?;
            measure::serve(number)?;
            go_on()
        }
        Command::Measure {
            test,
            to,
            time,
            cpu,
        } => {
            measure::take_cpu(cpu)?;
            let measured = measure::measure(test, &to, Duration::from_millis(time))?;
            print(&serde_json::to_string(&measured).map_err(io::Error::other)?)
        }
    }
}

/// Says that servers listen, and lets them.
fn go_on() -> io::Result<()> {
    print("serving")?;
    loop {
        thread::park();
    }
}

fn keep_asking(request: &Request, within: u64) -> Result<Answer, Failure> {
    let end = now() + within * 1000;
    loop {
        let result = request.perform();
        if result.is_ok() || now() > end {
            return result;
        }
        // Without it, a refusal at once would make this loop take a whole CPU.
        thread::sleep(Duration::from_millis(1));
    }
}

fn stream(every: Duration, mut ask: impl FnMut() -> Result<Answer, Failure>) -> io::Result<()> {
    let ended = watch_stdin();
    while !ended.load(Ordering::Relaxed) {
        report(ask())?;
        thread::sleep(every);
    }
    Ok(())
}

/// A flag that is set when standard input ends.
fn watch_stdin() -> Arc<AtomicBool> {
    let ended = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&ended);
    thread::spawn(move || {
        // An error ends it as well.
        drop(io::stdin().read_to_end(&mut Vec::new()));
        flag.store(true, Ordering::Relaxed);
    });
    ended
}

/// What is kept between two questions.
enum Held {
    Connection(Connection),
    Socket(UdpSocket),
}

impl Held {
    fn open(request: &Request) -> Result<Self, Failure> {
        match request.protocol {
            Protocol::Tcp => Connection::open(request).map(Self::Connection),
            Protocol::Udp => request.udp_socket().map(Self::Socket),
        }
    }
}

/// Asks over the connection or socket in `held`; makes one where there is none.
fn ask_held(request: &Request, held: &mut Option<Held>) -> Result<Answer, Failure> {
    let started = now();
    let mut kept = match held.take() {
        Some(kept) => kept,
        None => Held::open(request)?,
    };
    let (name, seen) = match &mut kept {
        Held::Connection(connection) => connection.ask(request.size)?,
        Held::Socket(socket) => {
            let answer = request.over(socket)?;
            (answer.name, answer.seen)
        }
    };
    *held = Some(kept);
    Ok(Answer {
        name,
        from: request.to,
        peer: None,
        seen,
        micros: now() - started,
    })
}

fn report(result: Result<Answer, Failure>) -> io::Result<()> {
    print(&serde_json::to_string(&Report::new(result)).map_err(io::Error::other)?)
}

/// A line in one write: a reader sees it whole or not at all.
fn print(line: &str) -> io::Result<()> {
    io::stdout()
        .lock()
        .write_all(format!("{line}\n").as_bytes())
}
