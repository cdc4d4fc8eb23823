//! Tables: columns as wide as they must be, two blanks between them.

use super::{print, stdout_style};

/// The most characters of a cell that comes from outside.
const WIDEST: usize = 60;

/// Rows under headings.
pub struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(headings: &[&'static str]) -> Self {
        Table { headings: headings.to_vec(), rows: Vec::new() }
    }

    /// Adds a row, with a cell for each heading. Cells may come from a guest or an image: what could steer a terminal is
    /// replaced.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| harmless(&cell, WIDEST)).collect());
    }

    /// The table as lines of text.
    pub fn render(&self, before_headings: &str, after_headings: &str) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
            cells.chain([self.headings[column].len()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.headings.len()).map(width).collect();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let padded: Vec<String> =
                cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            padded.join("  ").trim_end().to_owned()
        };
        let headings = line(&mut self.headings.iter().copied());
        let mut text = format!("{before_headings}{headings}{after_headings}\n");
        for row in &self.rows {
            text += &line(&mut row.iter().map(String::as_str));
            text.push('\n');
        }
        text
    }

    /// Prints it on standard output.
    pub fn print(&self) {
        let style = stdout_style();
        print(self.render(style.bold(), style.reset()).as_bytes());
    }
}

/// Text from outside, at most `longest` characters, without control characters.
pub fn harmless(text: &str, longest: usize) -> String {
    let mut shown: String =
        text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(longest + 1).collect();
    if shown.chars().count() > longest {
        shown = shown.chars().take(longest - 1).chain(['…']).collect();
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_do_not_trail() {
        let mut table = Table::new(&["A", "LONGER", "C"]);
        table.row(["1".into(), "2".into(), String::new()]);
        table.row(["long cell".into(), "x".into(), "y".into()]);
        assert_eq!(table.render("", ""), "A          LONGER  C\n1          2\nlong cell  x       y\n");
    }

    #[test]
    fn cells_cannot_steer_the_terminal() {
        assert_eq!(harmless("a\x1b[31m\nb", 60), "a\u{fffd}[31m\u{fffd}b");
        assert_eq!(harmless("abcdef", 4), "abc…");
        assert_eq!(harmless("abcd", 4), "abcd");
    }
}
