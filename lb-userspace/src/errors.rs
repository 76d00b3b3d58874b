//! Errors as one line for a log.

use std::{error::Error, fmt, io};

/// Shows an error with its causes: `a: b: c`.
///
/// A cause that an error already repeats in its own text is not shown twice.
pub struct Chain<'a>(pub &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.0.to_string();
        f.write_str(&shown)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !shown.ends_with(&text) {
                write!(f, ": {text}")?;
            }
            shown = text;
            cause = error.source();
        }
        Ok(())
    }
}

/// Whether something was not allowed, at the bottom of an error.
pub fn is_forbidden(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let kind = error.downcast_ref().map(io::Error::kind);
        if kind == Some(io::ErrorKind::PermissionDenied) {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] Repeating);

    #[derive(Debug, thiserror::Error)]
    #[error("middle: {0}")]
    struct Repeating(#[source] io::Error);

    #[test]
    fn every_cause_is_shown_once() {
        let error = Outer(Repeating(io::Error::other("inner")));
        assert_eq!(Chain(&error).to_string(), "outer: middle: inner");
    }

    #[test]
    fn what_is_not_allowed_is_known_however_deep_it_is() {
        for (code, expected) in [
            (libc::EPERM, true),
            (libc::EACCES, true),
            (libc::ENOENT, false),
        ] {
            let error = Outer(Repeating(io::Error::from_raw_os_error(code)));
            assert_eq!(is_forbidden(&error), expected, "{code}");
        }
    }
}
