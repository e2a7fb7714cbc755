//! Writing to standard output and error: a reader that went away is no reason to panic.

use std::io::Write;

use serde_json::Value;

/// Writes to standard output and flushes; false when nobody reads any more.
pub(super) fn out(text: &str) -> bool {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_ok()
}

/// Writes to standard error.
pub(super) fn err(text: &str) {
    let mut stderr = std::io::stderr().lock();
    // There is nowhere left to complain.
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// Text of unknown origin for a terminal: control characters, which could move the cursor or worse, are left out.
pub(super) fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// The beginning of a text, on one line, at most `width` characters.
pub(super) fn brief(text: &str, width: usize) -> String {
    let line: String = plain(text).chars().map(|c| if c.is_whitespace() { ' ' } else { c }).collect();
    if line.chars().count() <= width {
        return line;
    }
    line.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

/// A JSON value as people read it.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => String::from("-"),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// A table with a title; its columns are as wide as their widest cell, the last one has no padding.
pub(super) fn table(title: &str, names: &[&str], rows: Vec<Vec<String>>) -> String {
    if rows.is_empty() {
        return format!("\n{title}: none\n");
    }
    let clean: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| brief(cell, 100)).collect()).collect();
    let width = |column: usize| {
        let cells = clean.iter().map(|row| row[column].chars().count());
        cells.chain([names[column].chars().count()]).max().unwrap_or_default()
    };
    let mut out = format!("\n{title}\n");
    let head: Vec<String> = names.iter().map(|name| String::from(*name)).collect();
    for row in [&head].into_iter().chain(&clean) {
        let cells: Vec<String> = row
            .iter()
            .enumerate()
            .map(
                |(column, cell)| {
                    if column + 1 == row.len() { cell.clone() } else { format!("{cell:<0$}", width(column)) }
                },
            )
            .collect();
        out.push_str(&format!("  {}\n", cells.join("  ").trim_end()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_not_given_orders() {
        assert_eq!(plain("a\u{1b}[31mb\r\nc\td\u{7}"), "a[31mb\nc\td");
    }

    #[test]
    fn a_long_text_is_cut() {
        assert_eq!(brief("ab\ncd", 10), "ab cd");
        assert_eq!(brief("abcdef", 4), "abc…");
    }
}
