//! How stdout wants its text: colours and a width are for terminals only, and
//! what a program reads is as it always was.

use std::{
    env,
    ffi::OsStr,
    io::{self, IsTerminal as _},
    os::fd::AsRawFd as _,
};

/// Whether something is as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Good,
    Bad,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    /// Characters of a line, where there is an end to it.
    pub(super) width: Option<usize>,
    colours: bool,
}

impl Look {
    /// For files, pipes and tests.
    pub(super) const PLAIN: Self = Self {
        width: None,
        colours: false,
    };

    /// Stdout's, now: a window may become another size.
    pub(super) fn of_stdout() -> Self {
        let stdout = io::stdout();
        if !stdout.is_terminal() {
            return Self::PLAIN;
        }
        let (no_color, term) = (env::var_os("NO_COLOR"), env::var_os("TERM"));
        Self {
            width: width(&stdout),
            colours: are_wanted(no_color.as_deref(), term.as_deref()),
        }
    }

    pub(super) const fn has_colours(self) -> bool {
        self.colours
    }

    /// What is bad in red, what is fine in green.
    pub(super) fn paint(self, tone: Option<Tone>, text: &str) -> String {
        let code = match tone {
            // Cut off.
            _ if text.is_empty() => return String::new(),
            Some(Tone::Good) if self.colours => 32,
            Some(Tone::Bad) if self.colours => 31,
            _ => return text.to_owned(),
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// A line that fits, with a sign where something was cut off.
    pub(super) fn fitted(self, line: &str) -> String {
        match self.width {
            Some(width) if line.chars().count() > width => {
                let kept = line.chars().take(width.saturating_sub(1));
                kept.chain(['…']).collect()
            }
            _ => line.to_owned(),
        }
    }

    #[cfg(test)]
    pub(super) const fn terminal(width: usize, colours: bool) -> Self {
        Self {
            width: Some(width),
            colours,
        }
    }
}

/// By <https://no-color.org>, and of what a terminal says of itself.
fn are_wanted(no_color: Option<&OsStr>, term: Option<&OsStr>) -> bool {
    no_color.is_none_or(OsStr::is_empty) && term.is_some_and(|term| term != "dumb")
}

/// Columns of a terminal, if it knows.
fn width(terminal: &io::Stdout) -> Option<usize> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the request writes one winsize, which outlives the call.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_col > 0).then_some(size.ws_col.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_left_out_where_they_are_not_wanted() {
        let xterm = Some(OsStr::new("xterm"));
        assert!(are_wanted(None, xterm));
        assert!(are_wanted(Some(OsStr::new("")), xterm), "as the rule says");
        assert!(!are_wanted(Some(OsStr::new("1")), xterm));
        assert!(!are_wanted(None, Some(OsStr::new("dumb"))));
        assert!(!are_wanted(None, None));
        let bad = Some(Tone::Bad);
        assert_eq!(Look::PLAIN.paint(bad, "reset"), "reset");
        let colourful = Look::terminal(80, true);
        assert_eq!(colourful.paint(bad, "reset"), "\x1b[31mreset\x1b[0m");
        assert_eq!(colourful.paint(Some(Tone::Good), "ok"), "\x1b[32mok\x1b[0m");
        assert_eq!(colourful.paint(None, "opening"), "opening");
        assert_eq!(colourful.paint(bad, ""), "", "what was cut off");
    }

    #[test]
    fn a_line_is_cut_at_the_width_and_not_before() {
        let look = Look::terminal(5, false);
        assert_eq!(look.fitted("12345"), "12345");
        assert_eq!(look.fitted("123456"), "1234…");
        assert_eq!(Look::PLAIN.fitted("123456"), "123456");
    }
}
