//! Statements that take long: named in the log, without the values they were given, and counted.
//!
//! One threshold for the process, whatever backend asks: SQLite calls back without a state of ours.
//! Not here: who measures (`sqlite::schema`, `postgres::sql`). Tests: at the foot; `tests/it/settings.rs`.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crate::telemetry::metric;

/// Milliseconds; 0 is off.
static THRESHOLD: AtomicU64 = AtomicU64::new(0);

/// Statements from here on that take as long as this are told; none for zero.
pub fn set_threshold(threshold: Duration) {
    THRESHOLD.store(u64::try_from(threshold.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// A statement took so long.
pub(super) fn note(backend: &'static str, text: &str, took: Duration) {
    let threshold = THRESHOLD.load(Ordering::Relaxed);
    if threshold == 0 || took < Duration::from_millis(threshold) {
        return;
    }
    metrics::counter!(metric::STORE_SLOW, "backend" => backend).increment(1);
    tracing::warn!(
        backend,
        statement = name(text),
        milliseconds = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        "slow statement"
    );
}

/// A statement in few words: what it does, to which table. No value that stands in its text is among them.
fn name(text: &str) -> String {
    let word = |text: &str| {
        let name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        text.chars().skip_while(|c| *c == '"').take_while(|c| name(*c)).collect::<String>()
    };
    let mut words = text.split(|c: char| c.is_whitespace() || matches!(c, '(' | ')')).filter(|word| !word.is_empty());
    let verb = word(words.next().unwrap_or_default()).to_ascii_uppercase();
    if verb == "UPDATE" {
        return format!("{verb} {}", word(words.next().unwrap_or_default()));
    }
    let before = |word: &str| ["FROM", "INTO", "SELECT"].iter().any(|known| word.eq_ignore_ascii_case(known));
    let words: Vec<&str> = words.collect();
    // Of `FROM (SELECT …` the inner table is the one.
    let table =
        words.windows(2).find(|pair| before(pair[0]) && !pair[0].eq_ignore_ascii_case("SELECT") && !before(pair[1]));
    match table.map(|pair| word(pair[1])).filter(|table| !table.is_empty()) {
        Some(table) => format!("{verb} {table}"),
        None => verb,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_is_named_without_its_values() {
        for (text, expected) in [
            ("SELECT rec FROM turns WHERE tenant = 'geheim'", "SELECT turns"),
            ("INSERT INTO inbox (tenant, rec) VALUES (?1, 'geheim')", "INSERT inbox"),
            ("UPDATE lanes SET batch = $2", "UPDATE lanes"),
            ("DELETE FROM seen\n  WHERE day < 7", "DELETE seen"),
            ("SELECT count(*) FROM (SELECT instance FROM inbox)", "SELECT inbox"),
            ("COMMIT", "COMMIT"),
            ("SELECT 'geheim'", "SELECT"),
            ("", ""),
        ] {
            assert_eq!(name(text), expected, "{text}");
        }
    }
}
