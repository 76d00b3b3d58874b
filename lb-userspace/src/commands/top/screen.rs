//! The terminal: taken, and given back as it was, whatever happens.

use std::{
    io::{self, Stdout, Write as _},
    panic, process,
    sync::Once,
};

use ratatui::{
    Terminal,
    backend::CrosstermBackend,
    crossterm::{
        cursor::{Hide, Show},
        execute, queue,
        style::ResetColor,
        terminal::{
            Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode,
            enable_raw_mode,
        },
    },
};

/// Exit status of a program that has panicked.
const PANICKED: i32 = 101;

/// Owns the terminal until it is dropped.
pub(super) struct Screen {
    pub(super) terminal: Terminal<CrosstermBackend<Stdout>>,
}

impl Screen {
    /// Keys come one by one from now on, and what was on the terminal is kept
    /// aside.
    ///
    /// # Errors
    ///
    /// If stdout is no terminal, or has gone.
    pub(super) fn take() -> io::Result<Self> {
        give_back_on_panic();
        enable_raw_mode()?;
        // From here on dropping it gives all back.
        let terminal = Terminal::new(CrosstermBackend::new(io::stdout()));
        let screen = Self {
            terminal: terminal.inspect_err(|_| give_back())?,
        };
        // Not by ratatui, which asks first where the cursor is, and fails at a
        // terminal that does not answer.
        let clear = Clear(ClearType::All);
        execute!(io::stdout(), EnterAlternateScreen, clear, Hide)?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

/// As it was before. Nobody is left to be told if that fails: the terminal has
/// gone, then.
pub(super) fn give_back() {
    // The kernel's part first: a terminal that takes no text cannot hold it up.
    drop(disable_raw_mode());
    let mut stdout = io::stdout();
    drop(queue!(stdout, ResetColor, LeaveAlternateScreen, Show).and_then(|()| stdout.flush()));
}

/// A message that was written to the other screen would go with it; and no other
/// thread may draw on.
fn give_back_on_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            give_back();
            report(info);
            process::exit(PANICKED);
        }));
    });
}

#[cfg(test)]
mod tests {
    use std::{env, process::Command};

    use lb_tests::pty::Terminal;

    use super::*;

    /// Set where the test is to do what is tested.
    const PANIC: &str = "KLB_TEST_PANIC";
    const NAME: &str = "commands::top::screen::tests::a_panic_gives_the_terminal_back";

    /// This test runs itself on a terminal, and panics there.
    #[test]
    fn a_panic_gives_the_terminal_back() {
        if env::var_os(PANIC).is_some() {
            let mut screen = Screen::take().expect("a terminal");
            let drawn = screen.terminal.draw(|frame| {
                frame.render_widget("the view", frame.area());
            });
            drawn.expect("drawn");
            let mut line = String::new();
            io::stdin().read_line(&mut line).expect("a key");
            panic!("on purpose");
        }
        let mut command = Command::new(env::current_exe().expect("this test"));
        command.args(["--exact", NAME, "--nocapture"]);
        command.env(PANIC, "1").env("RUST_BACKTRACE", "0");
        let mut terminal = Terminal::start(command, 24, 80);
        terminal.await_text("the view");
        assert!(terminal.is_taken() && !terminal.is_given_back());
        terminal.press("\n");
        assert_eq!(terminal.wait().code(), Some(PANICKED), "{terminal:?}");
        assert!(terminal.is_given_back(), "{terminal:?}");
        assert!(terminal.text().contains("on purpose"), "{terminal:?}");
    }
}
