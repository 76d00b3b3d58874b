//! `klb get --watch`: again whenever it is another.

use std::{thread, time::Duration};

use super::document::Document;
use crate::{
    args::{Format, GetArgs},
    commands::{rendered, write_text},
};

/// Prints at once, and after every change, until nobody reads any more or the
/// command is ended.
pub(super) fn run(
    args: &GetArgs,
    read: impl Fn() -> anyhow::Result<Document>,
) -> anyhow::Result<()> {
    let looks = || {
        let document = read()?;
        Ok((document.essence(args.output)?, document))
    };
    each_change(args.interval, looks, |document, is_first| {
        let separator = if is_first { "" } else { between(args.output) };
        let text = rendered(args.output, document, |document, look| {
            document.table(args.output).shown(look)
        })?;
        write_text(&format!("{separator}{text}"))
    })
}

/// What keeps two documents apart. JSON needs nothing: `jq` reads one after the
/// other.
const fn between(output: Format) -> &'static str {
    match output {
        Format::Table | Format::Wide => "\n",
        Format::Json => "",
        Format::Yaml => "---\n",
    }
}

/// Looks every so often, and shows what is not as it was, until that says that
/// it is enough.
fn each_change<T>(
    interval: Duration,
    mut look: impl FnMut() -> anyhow::Result<(String, T)>,
    mut show: impl FnMut(&T, bool) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let mut shown: Option<String> = None;
    loop {
        let (essence, document) = look()?;
        if shown.as_ref() != Some(&essence) {
            if !show(&document, shown.is_none())? {
                return Ok(());
            }
            shown = Some(essence);
        }
        thread::sleep(interval);
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    fn followed(essences: &[&str], enough: usize) -> (Vec<(usize, bool)>, anyhow::Result<()>) {
        let mut looks = essences.iter().enumerate();
        let mut shown = Vec::new();
        let look = || match looks.next() {
            Some((number, essence)) => Ok(((*essence).to_owned(), number)),
            None => bail!("the maps have gone"),
        };
        let result = each_change(Duration::ZERO, look, |number, is_first| {
            shown.push((*number, is_first));
            Ok(shown.len() < enough)
        });
        (shown, result)
    }

    #[test]
    fn only_a_change_is_shown_again() {
        let (shown, result) = followed(&["a", "a", "b", "b", "a"], usize::MAX);
        assert_eq!(shown, [(0, true), (2, false), (4, false)]);
        let error = result.expect_err("a look that fails ends it");
        assert_eq!(error.to_string(), "the maps have gone");
    }

    #[test]
    fn it_ends_with_its_reader() {
        let (shown, result) = followed(&["a", "b", "c"], 2);
        assert_eq!(shown.len(), 2);
        result.expect("that is no failure");
    }
}
