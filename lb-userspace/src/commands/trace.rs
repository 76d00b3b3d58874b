//! `klb trace`: what happens to packets and calls, while it happens.
//!
//! The programs tell only while this listens, and only what was asked for
//! (`datapath/trace.rs`); what is done here is to name and to print it.

mod pcapng;
mod question;
mod record;

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufWriter, Write},
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use lb_common::{Hook, trace::Trace};
use nix::time::{ClockId, clock_gettime};
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    time::{MissedTickBehavior, interval},
};

pub use self::question::reason_names;
use self::{
    pcapng::{Frame, PcapNg},
    question::{ids, question},
    record::Record,
};
use super::{PortId, open_pins};
use crate::{
    args::{ServiceEnd, TraceArgs, TraceOutput},
    datapath::{
        inspect,
        kernel::KernelMaps,
        trace::{LEASE, Listener, Told},
    },
    errors::Chain,
    netlink::Netlink,
};

/// How often the end is put off: twice may be late.
const RENEWAL: Duration = Duration::from_secs(LEASE as u64 / 3);

/// Events that are read in a row before anything else is looked at.
const BATCH: usize = 1024;

/// Where frames go that are to be seen on stdout.
const STDOUT: &str = "-";

/// Runs `klb trace`.
pub fn run(args: &TraceArgs) -> anyhow::Result<()> {
    listen(args).map_err(|error| {
        if is_forbidden(&error) {
            return error.context("klb trace needs root's rights on the node");
        }
        error
    })
}

/// Whether it is a lack of rights.
fn is_forbidden(error: &anyhow::Error) -> bool {
    let mut causes = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| cause.kind() == io::ErrorKind::PermissionDenied)
}

fn listen(args: &TraceArgs) -> anyhow::Result<()> {
    let pins = open_pins(&args.paths)?;
    let listener = Listener::open(&pins)?;
    let config = KernelMaps::open(&pins)?.config()?;
    let mut session = Session {
        names: Names {
            of_here: !inspect::is_elsewhere(&config)?,
            devices: HashMap::new(),
            services: HashMap::new(),
        },
        sink: Sink::new(args)?,
        service: args.service.clone(),
        left: args.count,
        shown: 0,
        listener,
    };
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let signals = {
        // Before it is said that this listens: whoever reads that may end it.
        let _entered = runtime.enter();
        Signals::new().context("waiting for signals")?
    };
    session.begin(&question(args))?;
    let result = runtime.block_on(session.follow(signals));
    let summary = session.summary();
    // Nobody may be there to read it.
    drop(writeln!(io::stderr(), "{summary}"));
    result
}

/// A trace that goes on.
struct Session {
    listener: Listener,
    names: Names,
    sink: Sink,
    service: Option<ServiceEnd>,
    /// How many are still wanted, if there is an end to it.
    left: Option<u64>,
    shown: u64,
}

/// Whether somebody wants more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// There is more to be read at once.
    More,
    Wait,
    Enough,
}

impl Session {
    fn begin(&mut self, trace: &Trace) -> anyhow::Result<()> {
        let services = self.wanted_services()?;
        if let (Some(service), Some([])) = (&self.service, services.as_deref()) {
            bail!("there is no Service {service} in the kernel's maps");
        }
        let mut trace = *trace;
        if let Some(services) = &services {
            trace.services[..services.len()].copy_from_slice(services);
            trace.service_count = services.len() as u32;
        }
        self.listener.ask(&trace)?;
        drop(writeln!(io::stderr(), "listening, until Ctrl-C"));
        Ok(())
    }

    /// The ids of the Service that was asked for.
    fn wanted_services(&self) -> anyhow::Result<Option<Vec<u32>>> {
        let Some(service) = &self.service else {
            return Ok(None);
        };
        Ok(Some(ids(service, &self.listener.metas()?)?))
    }

    /// Shows what is told, until somebody has had enough.
    async fn follow(&mut self, mut signals: Signals) -> anyhow::Result<()> {
        let mut renewal = interval(RENEWAL);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ring = watched(self.listener.waiting()?).context("waiting for events")?;
        let mut next = Next::Wait;
        while next != Next::Enough {
            tokio::select! {
                biased;
                () = signals.any() => {
                    // What was told before; once, as programs go on.
                    self.show()?;
                    break;
                }
                _ = renewal.tick() => self.renew()?,
                () = std::future::ready(()), if next == Next::More => next = self.show()?,
                guard = ring.readable(), if next == Next::Wait => {
                    guard.context("waiting for events")?.clear_ready();
                    next = self.show()?;
                }
            }
        }
        Ok(())
    }

    /// Has the programs go on. Names may have changed, and Services come and gone.
    fn renew(&mut self) -> anyhow::Result<()> {
        self.names.forget();
        match self.wanted_services()? {
            Some(services) => self.listener.ask_for(&services)?,
            None => self.listener.put_off()?,
        }
        Ok(())
    }

    /// Shows what is there.
    fn show(&mut self) -> anyhow::Result<Next> {
        let offset = offset_of_clock()?;
        for _ in 0..BATCH {
            if self.left == Some(0) {
                return self.sink.flush().map(|_somebody_reads| Next::Enough);
            }
            let Some(told) = self.listener.take() else {
                return Ok(if self.sink.flush()? {
                    Next::Wait
                } else {
                    Next::Enough
                });
            };
            let Some(record) = self.names.record(&told, offset, &self.listener) else {
                continue;
            };
            if !self.sink.put(&told, &record)? {
                return Ok(Next::Enough);
            }
            self.shown += 1;
            self.left = self.left.map(|left| left - 1);
        }
        Ok(if self.sink.flush()? {
            Next::More
        } else {
            Next::Enough
        })
    }

    fn summary(&self) -> String {
        let lost = self.listener.lost();
        let lost = lost.map_or_else(|error| Chain(&error).to_string(), |lost| lost.to_string());
        format!("{} shown, {lost} lost", self.shown)
    }
}

/// The ring, to wait for.
fn watched(ring: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned, and stays open until it is not watched any
    // more.
    let watched = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
    watched.map_err(|error| error.into_parts().1)
}

/// What ends a command.
struct Signals([Signal; 3]);

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    async fn any(&mut self) {
        let Self([interrupt, terminate, hangup]) = self;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// What is to be added to the monotonic clock for the time of day.
fn offset_of_clock() -> anyhow::Result<Duration> {
    let now = |clock| clock_gettime(clock).map(Duration::from);
    let day = now(ClockId::CLOCK_REALTIME).context("reading the clock")?;
    let monotonic = now(ClockId::CLOCK_MONOTONIC).context("reading the clock")?;
    Ok(day.saturating_sub(monotonic))
}

/// What numbers are called, for a moment.
struct Names {
    /// Indices of devices are those of this network namespace.
    of_here: bool,
    devices: HashMap<u32, String>,
    services: HashMap<u32, PortId>,
}

impl Names {
    fn forget(&mut self) {
        self.devices.clear();
        self.services.clear();
    }

    fn record(&mut self, told: &Told, offset: Duration, listener: &Listener) -> Option<Record> {
        let event = &told.event;
        let at = SystemTime::UNIX_EPOCH + offset + Duration::from_nanos(event.time);
        let device = (event.ifindex != 0).then(|| self.device(event.ifindex));
        let service = (event.service != 0).then(|| self.service(event.service, listener));
        Record::new(event, at, device, service)
    }

    fn device(&mut self, index: u32) -> String {
        if self.of_here && !self.devices.contains_key(&index) {
            let links = Netlink::open().and_then(|netlink| netlink.links());
            let links = links.unwrap_or_default().into_iter();
            self.devices
                .extend(links.map(|link| (link.index, link.name)));
        }
        // One that has gone, or is somewhere else, is not asked for again.
        let name = self.devices.entry(index);
        name.or_insert_with(|| format!("if{index}")).clone()
    }

    fn service(&mut self, id: u32, listener: &Listener) -> PortId {
        let name = self.services.entry(id);
        let name = name.or_insert_with(|| match listener.meta(id) {
            Some(meta) => PortId::from(&meta),
            None => PortId {
                namespace: String::new(),
                name: format!("unknown-{id}"),
                port_name: String::new(),
            },
        });
        name.clone()
    }
}

/// Where all is written to.
struct Sink {
    /// Lines; none where stdout is for frames.
    lines: Option<(BufWriter<io::Stdout>, TraceOutput)>,
    frames: Option<PcapNg<BufWriter<Box<dyn Write>>>>,
}

impl Sink {
    fn new(args: &TraceArgs) -> anyhow::Result<Self> {
        let to_stdout = args.pcap.as_deref() == Some(Path::new(STDOUT));
        let frames = args.pcap.as_deref().map(|path| {
            let to: Box<dyn Write> = if to_stdout {
                Box::new(io::stdout())
            } else {
                Box::new(File::create(path)?)
            };
            let mut file = PcapNg::new(BufWriter::new(to), args.snaplen.into())?;
            file.flush()?;
            Ok(file)
        });
        let frames: io::Result<_> = frames.transpose();
        let frames = frames.with_context(|| match &args.pcap {
            Some(path) => format!("writing {}", path.display()),
            None => String::new(),
        })?;
        let lines = (!to_stdout).then(|| (BufWriter::new(io::stdout()), args.output));
        Ok(Self { lines, frames })
    }

    /// Whether somebody reads on.
    fn put(&mut self, told: &Told, record: &Record) -> anyhow::Result<bool> {
        let mut result = Ok(());
        if let Some((to, output)) = &mut self.lines {
            let line = match output {
                TraceOutput::Text => record.line(),
                TraceOutput::Json => serde_json::to_string(record)? + "\n",
            };
            result = to.write_all(line.as_bytes());
        }
        if let Some(file) = &mut self.frames {
            result = result.and_then(|()| put_frames(file, told, record));
        }
        is_read(result)
    }

    /// Whether somebody reads on.
    fn flush(&mut self) -> anyhow::Result<bool> {
        let lines = self.lines.as_mut().map_or(Ok(()), |(to, _)| to.flush());
        let frames = self.frames.as_mut().map_or(Ok(()), PcapNg::flush);
        is_read(lines.and(frames))
    }
}

/// A reader may have seen enough, as with `| head`.
fn is_read(result: io::Result<()>) -> anyhow::Result<bool> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        result => result.map(|()| true).context("writing what was told"),
    }
}

/// The frame as it came, and as it went on.
fn put_frames<W: Write>(file: &mut PcapNg<W>, told: &Told, record: &Record) -> io::Result<()> {
    let event = &told.event;
    if event.hook == Hook::Socket as u8 {
        return Ok(());
    }
    for (phase, bytes, length) in [
        ("before", &told.before, event.length),
        ("after", &told.after, event.length_after),
    ] {
        if bytes.is_empty() {
            continue;
        }
        let device = record.device.as_deref().unwrap_or("unknown");
        file.write(&Frame {
            interface: format!("{device} {} {phase}", record.hook),
            at: record.at(),
            bytes,
            length,
            comment: &format!("{phase}: {}", record.comment()),
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::trace::TraceError;

    #[test]
    fn a_lack_of_rights_is_found_behind_whatever_was_being_done() {
        let error = || io::Error::from(io::ErrorKind::PermissionDenied);
        assert!(is_forbidden(
            &anyhow::Error::from(error()).context("/sys/fs/bpf/klb")
        ));
        let lock = TraceError::Lock {
            path: "x".into(),
            source: error(),
        };
        assert!(is_forbidden(&lock.into()));
        assert!(!is_forbidden(&anyhow::anyhow!("nothing is pinned")));
    }

    #[test]
    fn a_reader_that_has_gone_is_no_failure() {
        assert!(is_read(Ok(())).expect("written"));
        let gone = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(!is_read(Err(gone)).expect("no failure"));
        is_read(Err(io::Error::from(io::ErrorKind::StorageFull))).expect_err("a failure");
    }
}
