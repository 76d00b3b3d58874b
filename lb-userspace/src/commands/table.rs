//! Tables as kubectl prints them: columns aligned, no borders.

use std::fmt;

/// Blanks between two columns.
const GAP: usize = 3;

/// Rows below a header.
#[derive(Clone, Debug)]
pub(super) struct Table {
    indent: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(header: &[&str]) -> Self {
        Self {
            indent: 0,
            rows: vec![header.iter().map(ToString::to_string).collect()],
        }
    }

    /// Sets the table in by some blanks.
    pub(super) fn indented(mut self, indent: usize) -> Self {
        self.indent = indent;
        self
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

    fn widths(&self) -> Vec<usize> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        (0..columns).map(width).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        for row in &self.rows {
            let padded = |(cell, width): (&String, &usize)| format!("{cell:<0$}", width + GAP);
            let line: String = row.iter().zip(&widths).map(padded).collect();
            writeln!(f, "{:indent$}{}", "", line.trim_end(), indent = self.indent)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_with_text() {
        let mut table = Table::new(&["NAME", "INDEX"]).indented(2);
        table.row(["eth0".to_owned(), "2".to_owned()]);
        table.row(["a-long-name".to_owned(), String::new()]);
        assert_eq!(
            table.to_string(),
            "  NAME          INDEX\n\
             \x20 eth0          2\n\
             \x20 a-long-name   -\n"
        );
    }

    #[test]
    fn a_table_without_rows_is_its_header() {
        assert_eq!(Table::new(&["A", "B"]).to_string(), "A   B\n");
    }
}
