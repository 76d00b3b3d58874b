//! Tables as kubectl prints them: columns aligned, no borders.

use std::fmt;

use super::look::{Look, Tone};

/// Blanks between two columns.
const GAP: usize = 3;

/// Whether what a cell says is good or bad, if it is either.
type Judge = fn(&str) -> Option<Tone>;

/// Rows below a header.
#[derive(Clone, Debug)]
pub(super) struct Table {
    indent: usize,
    rows: Vec<Vec<String>>,
    /// By the number of the column.
    judges: Vec<(usize, Judge)>,
    /// Below the rows.
    note: Option<String>,
}

impl Table {
    pub(super) fn new(header: &[&str]) -> Self {
        Self {
            indent: 0,
            rows: vec![header.iter().map(ToString::to_string).collect()],
            judges: Vec::new(),
            note: None,
        }
    }

    /// Sets the table in by some blanks.
    pub(super) fn indented(mut self, indent: usize) -> Self {
        self.indent = indent;
        self
    }

    /// Has the cells of some columns judged.
    pub(super) fn judged(mut self, columns: &[&str], judge: Judge) -> Self {
        let columns = columns.iter().filter_map(|name| self.column(name));
        self.judges = columns.map(|column| (column, judge)).collect();
        self
    }

    /// The table less some of its columns.
    pub(super) fn without(mut self, columns: &[&str]) -> Self {
        for name in columns {
            if let Some(column) = self.column(name) {
                for row in &mut self.rows {
                    row.remove(column);
                }
            }
        }
        self.judges.clear();
        self
    }

    fn column(&self, name: &str) -> Option<usize> {
        self.rows.first()?.iter().position(|header| header == name)
    }

    /// An empty cell is shown as `-`, so that every row has every column.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        let shown = |cell: String| {
            if cell.is_empty() {
                "-".to_owned()
            } else {
                cell
            }
        };
        self.rows.push(cells.into_iter().map(shown).collect());
    }

    /// Says something below the rows.
    pub(super) fn note(&mut self, text: &str) {
        self.note = Some(text.to_owned());
    }

    fn widths(&self) -> Vec<usize> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        (0..columns).map(width).collect()
    }

    /// The table as stdout wants it: a row is one line, however narrow that is.
    pub(super) fn shown(&self, look: Look) -> String {
        let widths = self.widths();
        let mut text = String::new();
        for (index, row) in self.rows.iter().enumerate() {
            let line = look.fitted(&self.line(row, &widths));
            if index == 0 {
                text.push_str(&line);
            } else {
                text.push_str(&self.painted(row, &widths, &line, look));
            }
            text.push('\n');
        }
        if let Some(note) = &self.note {
            let line = format!("{:indent$}{note}\n", "", indent = self.indent);
            text.push_str(&line);
        }
        text
    }

    fn line(&self, row: &[String], widths: &[usize]) -> String {
        let padded = |(cell, width): (&String, &usize)| format!("{cell:<0$}", width + GAP);
        let line: String = row.iter().zip(widths).map(padded).collect();
        format!("{:indent$}{}", "", line.trim_end(), indent = self.indent)
    }

    /// A line with colours, which take no place: it is as wide as before.
    fn painted(&self, row: &[String], widths: &[usize], line: &str, look: Look) -> String {
        let mut rest = line.chars();
        let mut painted: String = rest.by_ref().take(self.indent).collect();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            let piece: String = rest.by_ref().take(width + GAP).collect();
            let text = piece.trim_end();
            painted.push_str(&look.paint(self.tone(column, cell), text));
            painted.push_str(&piece[text.len()..]);
        }
        painted
    }

    /// By the whole cell, also if only some of it is seen.
    fn tone(&self, column: usize, cell: &str) -> Option<Tone> {
        let (_, judge) = self.judges.iter().find(|(judged, _)| *judged == column)?;
        judge(cell)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown(Look::PLAIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&["NAME", "STATE", "INDEX"]).indented(2);
        table.row(["eth0".to_owned(), "up".to_owned(), "2".to_owned()]);
        table.row(["a-long-name".to_owned(), "down".to_owned(), String::new()]);
        table.judged(&["STATE", "of no column"], |state| match state {
            "up" => Some(Tone::Good),
            "down" => Some(Tone::Bad),
            _ => None,
        })
    }

    #[test]
    fn columns_line_up_and_lines_end_with_text() {
        assert_eq!(
            table().to_string(),
            "  NAME          STATE   INDEX\n\
             \x20 eth0          up      2\n\
             \x20 a-long-name   down    -\n"
        );
    }

    #[test]
    fn a_table_without_rows_is_its_header() {
        assert_eq!(Table::new(&["A", "B"]).to_string(), "A   B\n");
    }

    #[test]
    fn on_a_narrow_terminal_a_row_is_still_one_line() {
        assert_eq!(
            table().shown(Look::terminal(19, true)),
            "  NAME          ST…\n\
             \x20 eth0          \x1b[32mup…\x1b[0m\n\
             \x20 a-long-name   \x1b[31mdo…\x1b[0m\n"
        );
    }

    #[test]
    fn colours_take_no_place() {
        assert_eq!(
            table().shown(Look::terminal(80, true)),
            "  NAME          STATE   INDEX\n\
             \x20 eth0          \x1b[32mup\x1b[0m      2\n\
             \x20 a-long-name   \x1b[31mdown\x1b[0m    -\n"
        );
    }

    #[test]
    fn columns_can_be_left_out() {
        let text = table().without(&["NAME", "none"]).to_string();
        assert_eq!(text, "  STATE   INDEX\n  up      2\n  down    -\n");
    }
}
