//! What a program needs that is not static: its loader and its libraries.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::process;

/// The files that the programs load, as this machine finds them.
///
/// # Errors
/// If a program is none, or lacks a library.
pub(super) fn of<'a>(programs: impl IntoIterator<Item = &'a Path>) -> Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    for program in programs {
        files.extend(listed(&process::text(Command::new("ldd").arg(program))?));
    }
    Ok(files)
}

/// The paths in what `ldd` prints. What has none is the kernel's.
fn listed(text: &str) -> impl Iterator<Item = PathBuf> {
    let words = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        words.find(|word| word.starts_with('/'))
    });
    words.map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_found() {
        let text = "\tlinux-vdso.so.1 (0x00007ffe)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f52)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f53)\n";
        let expected = [
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(
            listed(text).collect::<Vec<_>>(),
            expected.map(PathBuf::from)
        );
    }
}
