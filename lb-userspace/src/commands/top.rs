//! `klb top`: which Services are busy now, and with which backends.

mod document;
mod draw;
mod figures;
mod meter;
mod picture;
mod screen;
mod view;

use std::{
    env,
    ffi::OsStr,
    io::{self, IsTerminal as _},
    process::{self, ExitCode},
    sync::mpsc::{self, Receiver, Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use humantime::format_duration;
use nix::sys::signal::{SigSet, Signal};
use ratatui::crossterm::event::{self, KeyEvent, KeyEventKind};

use self::{
    document::Document,
    draw::{Scene, Theme, draw},
    meter::Meter,
    picture::Picture,
    screen::Screen,
    view::{Next, View},
};
use super::{look::Look, print};
use crate::{
    args::{Output, TopArgs},
    errors::Chain,
};

/// What ends a program that others may end.
const ENDING: [Signal; 4] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGHUP,
];

/// For how long a terminal may hold up what is written to it, when it is time to
/// end.
const PATIENCE: Duration = Duration::from_secs(2);

/// Runs `klb top`.
pub fn run(args: &TopArgs) -> anyhow::Result<ExitCode> {
    // What is missing is said before there is a screen to say it on.
    let meter = Meter::start(&args.paths)?;
    if is_live(args) {
        return live(args, meter);
    }
    once(args, meter)?;
    Ok(ExitCode::SUCCESS)
}

/// Whether there is somebody who looks on.
fn is_live(args: &TopArgs) -> bool {
    let is_dumb = env::var_os("TERM").is_none_or(|term| term == OsStr::new("dumb"));
    !args.once && args.output == Output::Table && io::stdout().is_terminal() && !is_dumb
}

fn once(args: &TopArgs, mut meter: Meter) -> anyhow::Result<()> {
    let began = Instant::now();
    thread::sleep(args.interval);
    let picture = selected(args, meter.read()?);
    let document = Document::new(picture, began.elapsed());
    let with_backends = args.service.is_some();
    print(args.output, &document, |document, look| {
        document.text(with_backends, look)
    })
}

/// What was asked for, in the order that was.
fn selected(args: &TopArgs, mut picture: Picture) -> Picture {
    picture.select(args.namespace.as_deref(), args.service.as_deref());
    picture.sort(args.sort);
    picture
}

/// What the view hears of.
enum Event {
    Key(KeyEvent),
    /// The terminal has another size.
    Resized,
    /// What was read, or why nothing could be.
    Read(Result<Picture, String>),
    /// Somebody wants it to end.
    Signal(Signal),
    /// There is no terminal any more.
    Gone,
}

fn live(args: &TopArgs, meter: Meter) -> anyhow::Result<ExitCode> {
    let (sender, events) = mpsc::channel();
    // Before there are threads, which do as the first one.
    let ending: SigSet = ENDING.into_iter().collect();
    ending.thread_block().context("holding back signals")?;
    let mut screen = Screen::take().context("taking the terminal")?;
    let signals = sender.clone();
    thread::spawn(move || await_signal(&ending, &signals));
    let keys = sender.clone();
    thread::spawn(move || read_keys(&keys));
    let interval = args.interval;
    thread::spawn(move || read_maps(meter, interval, &sender));
    let result = follow(args, &mut screen, &events);
    drop(screen);
    Ok(result?.map_or(ExitCode::SUCCESS, exit_code))
}

/// As a shell tells it of one that a signal has ended.
fn exit_code(signal: Signal) -> ExitCode {
    ExitCode::from(128 + signal as u8)
}

fn await_signal(signals: &SigSet, events: &Sender<Event>) {
    if let Ok(signal) = signals.wait() {
        drop(events.send(Event::Signal(signal)));
        // The view may wait for a terminal that takes nothing.
        thread::sleep(PATIENCE);
        drop(ratatui::crossterm::terminal::disable_raw_mode());
        process::exit(128 + signal as i32);
    }
}

fn read_keys(events: &Sender<Event>) {
    loop {
        let event = match event::read() {
            Ok(event::Event::Key(key)) if key.kind != KeyEventKind::Release => Event::Key(key),
            Ok(event::Event::Resize(..)) => Event::Resized,
            Ok(_) => continue,
            Err(_) => Event::Gone,
        };
        let is_last = matches!(event, Event::Gone);
        if events.send(event).is_err() || is_last {
            return;
        }
    }
}

/// At once, and then every so often, also if a look takes longer than that.
fn read_maps(mut meter: Meter, interval: Duration, events: &Sender<Event>) {
    loop {
        let began = Instant::now();
        thread::sleep(interval);
        let picture = meter.read();
        let picture = picture.map_err(|error| Chain(error.as_ref()).to_string());
        if events.send(Event::Read(picture)).is_err() {
            return;
        }
        // No more than half of the time is spent on reading.
        let late = began.elapsed().saturating_sub(interval * 2);
        thread::sleep(late);
    }
}

/// Shows what there is, until somebody has seen enough; by which signal it was
/// ended, if by one.
fn follow(
    args: &TopArgs,
    screen: &mut Screen,
    events: &Receiver<Event>,
) -> anyhow::Result<Option<Signal>> {
    let mut view = View::new(args.sort);
    let mut state = State::default();
    let interval = format_duration(args.interval).to_string();
    let theme = Theme::new(Look::of_stdout().has_colours());
    loop {
        let scene = Scene {
            picture: state.shown.as_ref(),
            trouble: state.trouble.as_deref(),
            interval: &interval,
            theme,
        };
        let drawn = screen.terminal.draw(|frame| draw(frame, &scene, &mut view));
        drawn.context("writing to the terminal")?;
        match events.recv() {
            Ok(Event::Key(key)) => {
                let nothing = Picture::default();
                let picture = state.shown.as_ref().unwrap_or(&nothing);
                if view.key(key, picture) == Next::Quit {
                    return Ok(None);
                }
            }
            Ok(Event::Resized) => {}
            Ok(Event::Read(read)) => state.take(args, read),
            Ok(Event::Signal(signal)) => return Ok(Some(signal)),
            Ok(Event::Gone) | Err(_) => return Ok(None),
        }
        state.settle(&view);
    }
}

/// The newest picture, and the one that is shown: not the same while it is
/// paused.
#[derive(Default)]
struct State {
    shown: Option<Picture>,
    newest: Option<Picture>,
    trouble: Option<String>,
}

impl State {
    fn take(&mut self, args: &TopArgs, read: Result<Picture, String>) {
        match read {
            Ok(picture) => {
                self.newest = Some(selected(args, picture));
                self.trouble = None;
            }
            Err(trouble) => self.trouble = Some(trouble),
        }
    }

    /// After whatever has happened.
    fn settle(&mut self, view: &View) {
        if !view.is_paused
            && let Some(newest) = self.newest.take()
        {
            self.shown = Some(newest);
        }
        if let Some(shown) = &mut self.shown {
            shown.sort(view.sort);
        }
    }
}
