//! Processes of a test: where they run, what they say, and their end.

use std::{
    ffi::OsStr,
    fmt,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    rc::Rc,
    time::Duration,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        signal::{self, SigHandler, Signal, killpg},
    },
    unistd::{Pid, write},
};

use crate::{cgroup::Cgroup, netns::Netns, scope::Scope, wait};

/// How many lines of an output a message shows.
const SHOWN: usize = 30;

/// Where processes run: in a namespace and, for those of the cluster, in the
/// cluster's control group.
#[derive(Clone, Debug)]
pub struct Place {
    scope: Rc<Scope>,
    netns: Rc<Netns>,
    cgroup: Option<Rc<Cgroup>>,
}

impl Place {
    pub fn new(scope: &Rc<Scope>, netns: Netns, cgroup: Option<&Rc<Cgroup>>) -> Self {
        Self {
            scope: Rc::clone(scope),
            netns: Rc::new(netns),
            cgroup: cgroup.map(Rc::clone),
        }
    }

    pub fn scope(&self) -> &Rc<Scope> {
        &self.scope
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_deref()
    }

    /// The same namespace, seen by processes outside of the cluster's control
    /// group: no socket program runs for them.
    #[must_use]
    pub fn without_cgroup(&self) -> Self {
        Self {
            cgroup: None,
            ..self.clone()
        }
    }

    /// A command that will run here, in a process group of its own. It is killed
    /// when the calling thread ends, unless the scope is to last.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let netns = self.netns.file();
        let door = self.cgroup.as_ref().map(|cgroup| cgroup.door());
        let lasting = self.scope.is_lasting();
        let mut command = Command::new(program);
        command.process_group(0);
        let enter = move || -> io::Result<()> {
            setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
            if let Some(door) = &door {
                write(door.as_fd(), b"0")?;
            }
            if !lasting {
                prctl::set_pdeathsig(Signal::SIGKILL)?;
            }
            // A shell has what it runs in the background ignore it.
            // SAFETY: no handler is set.
            unsafe { signal::signal(Signal::SIGINT, SigHandler::SigDfl)? };
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes system calls; it
        // neither allocates nor takes a lock.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Starts a command made by [`Self::command`]; `name` is for messages and
    /// for the files that its output goes to.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(&self, name: &str, mut command: Command) -> Process {
        let stdout = Output::new(self.scope.new_file(&format!("{name}.out")));
        let stderr = Output::new(self.scope.new_file(&format!("{name}.err")));
        let child = command
            .stdin(Stdio::piped())
            .stdout(stdout.create())
            .stderr(stderr.create())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {}: {error}", command.get_program().display()));
        Process {
            name: name.to_owned(),
            child,
            status: None,
            stdout,
            stderr,
        }
    }
}

/// A process; killed on drop with all that it started.
///
/// Its output goes to files and not to pipes, so that it neither blocks nor
/// breaks when nobody reads: the demo can leave it running.
pub struct Process {
    name: String,
    child: Child,
    status: Option<ExitStatus>,
    stdout: Output,
    stderr: Output,
}

impl Process {
    pub fn stdout(&self) -> &Output {
        &self.stdout
    }

    pub fn stderr(&self) -> &Output {
        &self.stderr
    }

    /// Closes its standard input, which some programs take as a wish to end.
    pub fn close_stdin(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the process and all that it started.
    pub fn signal(&self, signal: Signal) {
        let group = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        // An error means that all of them have ended.
        let _ = killpg(group, signal);
    }

    /// How it ended, if it did.
    ///
    /// # Panics
    /// If the kernel does not know it.
    pub fn status(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            let status = self.child.try_wait();
            self.status = status.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        }
        self.status
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end within `limit`; the message has what it said.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        wait::attempt(limit, || self.status())
            .unwrap_or_else(|| panic!("waited {limit:?} for the end of {self:?}"))
    }

    /// Waits for a line on `stderr` that `is_it` accepts.
    ///
    /// # Panics
    /// If it does not come within `limit`, or if the process ends before.
    pub fn wait_for_stderr(
        &mut self,
        what: &str,
        limit: Duration,
        is_it: impl Fn(&str) -> bool,
    ) -> String {
        let found = wait::attempt(limit, || {
            let ended = self.status().is_some();
            let line = self.stderr.lines().into_iter().find(|line| is_it(line));
            line.map(Ok).or(ended.then_some(Err(())))
        });
        match found {
            Some(Ok(line)) => line,
            Some(Err(())) => panic!("no {what}, and the end of {self:?}"),
            None => panic!("waited {limit:?} for {what} of {self:?}"),
        }
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self
            .status
            .map_or_else(|| "running".to_owned(), |status| status.to_string());
        writeln!(f, "{} ({state}), which said at last:", self.name)?;
        for output in [&self.stdout, &self.stderr] {
            let lines = output.lines();
            for line in lines.iter().skip(lines.len().saturating_sub(SHOWN)) {
                writeln!(f, "  {line}")?;
            }
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        // If it was waited for before, this returns at once.
        drop(self.child.wait());
    }
}

/// A file that a process writes to.
#[derive(Clone, Debug)]
pub struct Output {
    path: PathBuf,
}

impl Output {
    fn new(path: PathBuf) -> Self {
        Self { path }
    }

    fn create(&self) -> File {
        File::create(&self.path).unwrap_or_else(|error| panic!("{}: {error}", self.path.display()))
    }

    pub fn text(&self) -> String {
        self.text_from(0)
    }

    /// The text from an offset on; empty if there is none yet.
    pub fn text_from(&self, offset: u64) -> String {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(offset))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
    }

    /// The complete lines so far.
    pub fn lines(&self) -> Vec<String> {
        let text = self.text();
        text.split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'))
            .map(str::to_owned)
            .collect()
    }
}
