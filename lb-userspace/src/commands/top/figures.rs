//! Figures in few characters.

use crate::commands::status::counters::shown;

/// Above so much a figure is told in thousands, and so on.
const TEN_THOUSAND: f64 = 9999.5;

/// In up to five characters: `0`, `<0.1`, `2.5`, `9999`, `12.3k`, `123k`, `1.2M`.
pub(super) fn short(value: f64) -> String {
    if value < TEN_THOUSAND {
        return shown(value);
    }
    let mut scaled = value;
    let mut unit = ' ';
    for next in ['k', 'M', 'G', 'T', 'P'] {
        if scaled < 999.5 {
            break;
        }
        scaled /= 1000.0;
        unit = next;
    }
    if scaled < 99.95 {
        format!("{scaled:.1}{unit}")
    } else {
        format!("{scaled:.0}{unit}")
    }
}

/// A part of 1. A little is never nothing, and not all is never all.
pub(super) fn percent(share: f64) -> String {
    if share <= 0.0 {
        return "0%".to_owned();
    }
    let most = if share < 1.0 { 99.0 } else { 100.0 };
    let percent = (share * 100.0).round().clamp(1.0, most);
    format!("{percent:.0}%")
}

/// A part of 1, so many cells wide at most, by eighths.
pub(super) fn bar(share: f64, width: usize) -> String {
    const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "a part of the cells of a line"
    )]
    let eighths = (share.clamp(0.0, 1.0) * (8 * width) as f64).round() as usize;
    let eighths = eighths.max(usize::from(share > 0.0)).min(8 * width);
    let mut bar = "█".repeat(eighths / 8);
    if let Some(part) = EIGHTHS.get(eighths % 8).filter(|part| **part != ' ') {
        bar.push(*part);
    }
    let missing = width.saturating_sub(bar.chars().count());
    bar.extend(std::iter::repeat_n(' ', missing));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short_and_never_nothing() {
        for (value, expected) in [
            (0.0, "0"),
            (0.04, "<0.1"),
            (2.5, "2.5"),
            (999.6, "1000"),
            (9999.4, "9999"),
            (9999.6, "10.0k"),
            (12_345.0, "12.3k"),
            (99_960.0, "100k"),
            (999_499.0, "999k"),
            (999_600.0, "1.0M"),
            (4_567_890.0, "4.6M"),
            (1.5e9, "1.5G"),
            (2e13, "20.0T"),
            (9e17, "900P"),
        ] {
            assert_eq!(short(value), expected, "{value}");
            assert!(short(value).len() <= 5);
        }
    }

    #[test]
    fn a_part_shows_and_so_does_what_is_missing() {
        let shares = [0.0, 0.001, 0.333, 0.999, 1.0];
        assert_eq!(shares.map(percent), ["0%", "1%", "33%", "99%", "100%"]);
        let bars = [0.0, 0.001, 0.5, 0.55, 1.0, 7.0].map(|share| bar(share, 4));
        assert_eq!(bars, ["    ", "▏   ", "██  ", "██▎ ", "████", "████"]);
        assert_eq!(bar(1.0, 0), "");
    }
}
