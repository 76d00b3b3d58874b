//! A terminal: a program runs on it, keys are pressed, and what it shows is what
//! somebody would see.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _, Write as _},
    num::NonZeroU16,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    pty::{Winsize, openpty},
    sys::{
        signal::{Signal, killpg},
        termios::{Termios, tcgetattr},
    },
    unistd::Pid,
};

use crate::wait;

/// How long it may take until something is seen.
const LIMIT: Duration = Duration::from_secs(30);

/// A program on a terminal of its own; killed on drop.
pub struct Terminal {
    child: Child,
    status: Option<ExitStatus>,
    /// Where its user sits.
    user: File,
    /// Where the program sits.
    program: OwnedFd,
    /// As it was before there was a program.
    before: Termios,
    screen: vt100::Parser,
}

impl Terminal {
    /// Starts a program, in a process group of its own, with input, output and
    /// errors on a new terminal.
    ///
    /// # Panics
    /// If there is no terminal to be had, or the program does not start.
    pub fn start(mut command: Command, rows: u16, columns: u16) -> Self {
        let pty = openpty(&size(rows, columns), None).expect("a terminal");
        let before = tcgetattr(&pty.slave).expect("its settings");
        let no_wait = FcntlArg::F_SETFL(OFlag::O_NONBLOCK);
        fcntl(&pty.master, no_wait).expect("it is read as far as there is something");
        let end = || pty.slave.try_clone().expect("a descriptor");
        let child = command
            .process_group(0)
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display()));
        Self {
            child,
            status: None,
            user: pty.master.into(),
            program: pty.slave,
            before,
            screen: vt100::Parser::new(cells(rows), cells(columns), 0),
        }
    }

    /// What it shows now: a line for each row.
    pub fn text(&mut self) -> String {
        self.read();
        self.screen.screen().contents()
    }

    /// Whether it shows what a program wants that takes all of it, aside of what
    /// was there before.
    pub fn is_taken(&mut self) -> bool {
        self.read();
        self.screen.screen().alternate_screen()
    }

    /// Whether it is as it was before there was a program: what is typed is seen,
    /// lines are edited, the cursor is there.
    ///
    /// # Panics
    /// If the kernel does not know it.
    pub fn is_given_back(&mut self) -> bool {
        self.read();
        let screen = self.screen.screen();
        let settings = tcgetattr(&self.program).expect("its settings");
        settings == self.before && !screen.alternate_screen() && !screen.hide_cursor()
    }

    /// Whether anything on it has a colour.
    pub fn is_colourful(&mut self) -> bool {
        self.read();
        let screen = self.screen.screen();
        let (rows, columns) = screen.size();
        let (rows, columns) = (rows.get(), columns.get());
        let cells = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
        let mut cells = cells.filter_map(|(row, column)| screen.cell(row, column));
        cells.any(|cell| cell.fgcolor() != vt100::Color::Default)
    }

    /// Waits until it shows something.
    ///
    /// # Panics
    /// If it does not; the message has what it shows instead.
    pub fn until(&mut self, what: &str, is_it: impl Fn(&str) -> bool) -> String {
        let found = wait::attempt(LIMIT, || Some(self.text()).filter(|text| is_it(text)));
        found.unwrap_or_else(|| panic!("waited {LIMIT:?} for {what} of {self:?}"))
    }

    /// As [`Self::until`], of a text.
    ///
    /// # Panics
    /// Likewise.
    pub fn await_text(&mut self, text: &str) -> String {
        self.until(text, |shown| shown.contains(text))
    }

    /// Presses keys.
    ///
    /// # Panics
    /// If the terminal takes none.
    pub fn press(&mut self, keys: &str) {
        let pressed = self.user.write_all(keys.as_bytes());
        pressed.unwrap_or_else(|error| panic!("{error}: {self:?}"));
    }

    /// Gives its window another size, and tells the program.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn resize(&mut self, rows: u16, columns: u16) {
        self.read();
        let size = size(rows, columns);
        let fd = self.user.as_raw_fd();
        // SAFETY: the request reads one winsize, which outlives the call.
        let result = unsafe { libc::ioctl(fd, libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        self.screen.set_size(cells(rows), cells(columns));
        // It is not the program's controlling terminal, which would do so.
        self.signal(Signal::SIGWINCH);
    }

    /// Sends a signal to the program.
    pub fn signal(&self, signal: Signal) {
        let group = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        // An error means that it has ended.
        let _ = killpg(group, signal);
    }

    /// Waits for the program's end.
    ///
    /// # Panics
    /// If it does not come.
    pub fn wait(&mut self) -> ExitStatus {
        let status = wait::attempt(LIMIT, || {
            // A program that writes more than fits waits for its reader.
            self.read();
            self.status()
        });
        status.unwrap_or_else(|| panic!("waited {LIMIT:?} for the end of {self:?}"))
    }

    fn status(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("a child");
        }
        self.status
    }

    /// Takes in what was written.
    fn read(&mut self) {
        let mut bytes = [0; 4096];
        loop {
            match self.user.read(&mut bytes) {
                Ok(0) => return,
                Ok(count) => self.screen.process(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => panic!("reading a terminal: {error}"),
            }
        }
    }
}

fn cells(count: u16) -> NonZeroU16 {
    NonZeroU16::new(count).expect("a terminal has rows and columns")
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl fmt::Debug for Terminal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "a program ({:?}), which shows:", self.status)?;
        writeln!(f, "{}", self.screen.screen().contents())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        // If it was waited for before, this returns at once.
        drop(self.child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_is_seen_and_heard() {
        let mut shell = Command::new("sh");
        shell.args([
            "-c",
            "read first; stty -echo; read line; echo got $line; stty size; read line",
        ]);
        let mut terminal = Terminal::start(shell, 5, 30);
        assert!(terminal.is_given_back());
        terminal.press("what is seen\n");
        wait::until("no echo", LIMIT, || {
            (!terminal.is_given_back()).then_some(())
        });
        terminal.press("a word\n");
        let shown = terminal.await_text("5 30");
        let lines: Vec<_> = shown.lines().collect();
        assert_eq!(lines[..2], ["what is seen", "got a word"]);
        terminal.press("\n");
        assert!(terminal.wait().success());
        assert!(!terminal.is_given_back(), "sh does not give back");
    }
}
