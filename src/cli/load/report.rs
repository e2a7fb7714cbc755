//! The figures of some runs: median and range, as a table for people and as JSON for machines; comparison of two.
//!
//! Pure but for printing. Tests: at the foot.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::{
    super::check_history::{self, check::Verdict},
    machine::Machine,
};

/// One measured value of one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What was measured, such as `latency p99`.
    pub name: String,
    /// Its unit.
    pub unit: String,
    /// The value.
    pub value: f64,
}

impl Figure {
    /// Puts the three together.
    pub fn new(name: impl Into<String>, unit: &str, value: f64) -> Self {
        Self { name: name.into(), unit: unit.into(), value }
    }
}

/// One row over all runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// Its unit.
    pub unit: String,
    /// The middle value, or the mean of the middle two.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// How many runs have it.
    pub runs: usize,
}

/// Everything that is printed about one scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Which scenario.
    pub scenario: String,
    /// How load was made: open loop with a rate, or closed loop with operations in flight.
    pub generator: String,
    /// The settings that matter to who repeats it.
    pub settings: Vec<(String, String)>,
    /// Where.
    pub machine: Machine,
    /// Which build measured: version, profile, target.
    pub build: String,
    /// The seed of arrivals and choices.
    pub seed: u64,
    /// Median and range.
    pub rows: Vec<Row>,
    /// What should be known beside the figures.
    pub notes: Vec<String>,
    /// What the history checker found, when asked.
    #[serde(default, skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub verdict: Option<Verdict>,
    /// Reads that were older than what had been acknowledged before they began, where that was looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_reads: Option<u64>,
    /// Whether the run was cut short.
    pub interrupted: bool,
}

/// This build in a line.
pub fn build() -> String {
    let profile = if cfg!(debug_assertions) { "debug: figures mean nothing" } else { "release" };
    let (version, os, arch) = (env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH);
    format!("sophont {version} ({profile}, {arch}-{os})")
}

/// Folds the figures of some runs into rows, in the order in which they first appear.
pub fn rows(runs: &[Vec<Figure>]) -> Vec<Row> {
    let mut names: Vec<(&str, &str)> = Vec::new();
    for figure in runs.iter().flatten() {
        if !names.contains(&(&figure.name, &figure.unit)) {
            names.push((&figure.name, &figure.unit));
        }
    }
    names.into_iter().filter_map(|(name, unit)| row(runs, name, unit)).collect()
}

fn row(runs: &[Vec<Figure>], name: &str, unit: &str) -> Option<Row> {
    let figures = runs.iter().flatten().filter(|f| f.name == name && f.unit == unit);
    let mut values: Vec<f64> = figures.map(|f| f.value).collect();
    values.sort_by(f64::total_cmp);
    let (min, max) = (*values.first()?, *values.last()?);
    let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
    let median = f64::midpoint(low, high);
    Some(Row { name: name.into(), unit: unit.into(), median, min, max, runs: values.len() })
}

/// A number with about four digits that matter.
pub fn human(value: f64) -> String {
    let size = value.abs();
    let text = match size {
        0.0 => return "0".into(),
        s if s >= 1000.0 => return thousands(value),
        s if s >= 100.0 => format!("{value:.0}"),
        s if s >= 10.0 => format!("{value:.1}"),
        s if s >= 0.095 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    };
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut out = String::from(if value < 0.0 { "-" } else { "" });
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

impl Report {
    /// The table, in Markdown so that it can go into a document as it is.
    pub fn table(&self) -> String {
        let machine = &self.machine;
        let mut out = String::new();
        let _ = writeln!(out, "### {}: {}\n", self.scenario, self.generator);
        let syncs = machine.fdatasyncs_per_second.map_or("unknown".into(), human);
        let _ = writeln!(
            out,
            "{} ({} cores, {} MiB, Linux {}), fdatasync/s {syncs}, load average at start {}. {}. Seed {}.",
            machine.cpu,
            machine.cores,
            thousands(to_f64(machine.memory_mib)),
            machine.kernel,
            human(machine.load_average),
            self.build,
            self.seed
        );
        let settings: Vec<String> = self.settings.iter().map(|(k, v)| format!("{k} {v}")).collect();
        let _ = writeln!(out, "{}.\n", settings.join(", "));
        let runs = self.rows.iter().map(|r| r.runs).max().unwrap_or(0);
        let _ = writeln!(out, "| figure | unit | median of {runs} | range |\n|---|---|---:|---:|");
        for row in &self.rows {
            let (min, max) = (human(row.min), human(row.max));
            let range = if min == max { min } else { format!("{min} to {max}") };
            let _ = writeln!(out, "| {} | {} | {} | {range} |", row.name, row.unit, human(row.median));
        }
        out.push('\n');
        if self.interrupted {
            out.push_str("Interrupted: the figures are of what ran until then.\n");
        }
        for note in &self.notes {
            let _ = writeln!(out, "- {note}");
        }
        if let Some(verdict) = &self.verdict {
            out.push_str("\nverified: ");
            out.push_str(&check_history::table(verdict));
        }
        out
    }

    /// Each row beside the same row of an earlier report.
    pub fn compare(&self, earlier: &Report) -> String {
        let mut out = format!("compared with {} ({}), {}:\n\n", earlier.scenario, earlier.generator, earlier.build);
        out.push_str("| figure | unit | earlier | now | change |\n|---|---|---:|---:|---:|\n");
        for row in &self.rows {
            let before = earlier.rows.iter().find(|r| r.name == row.name && r.unit == row.unit);
            let (was, change) = match before {
                None => ("-".into(), "new".into()),
                Some(before) => (human(before.median), change(before, row)),
            };
            let _ = writeln!(out, "| {} | {} | {was} | {} | {change} |", row.name, row.unit, human(row.median));
        }
        if earlier.machine.cpu != self.machine.cpu || earlier.machine.cores != self.machine.cores {
            out.push_str("\nThe earlier run was on another machine: compare ratios, not times.\n");
        }
        out
    }
}

/// The change of a median, marked when the two ranges do not touch: less is likely noise.
fn change(before: &Row, now: &Row) -> String {
    if before.median == 0.0 {
        return if now.median == 0.0 { "=".into() } else { "from 0".into() };
    }
    let percent = (now.median / before.median - 1.0) * 100.0;
    let apart = now.min > before.max || now.max < before.min;
    format!("{percent:+.1} %{}", if apart { "" } else { " (ranges overlap)" })
}

/// A count as a figure.
#[allow(clippy::cast_precision_loss)] // counts stay below 2^53
pub fn to_f64(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn report(values: &[f64]) -> Report {
        let runs: Vec<_> = values.iter().map(|&v| vec![Figure::new("rate", "op/s", v)]).collect();
        Report {
            scenario: "post-durable".into(),
            generator: "open loop".into(),
            settings: vec![("connections".into(), "64".into())],
            machine: Machine::look(None),
            build: build(),
            seed: 1,
            rows: rows(&runs),
            notes: vec!["a note".into()],
            verdict: None,
            stale_reads: None,
            interrupted: false,
        }
    }

    #[test]
    fn rows_have_median_and_range() {
        let row = &report(&[3.0, 1.0, 2.0]).rows[0];
        assert_eq!((row.median, row.min, row.max, row.runs), (2.0, 1.0, 3.0, 3));
        assert_eq!(report(&[1.0, 2.0]).rows[0].median, 1.5);
        assert!(report(&[]).rows.is_empty());
    }

    #[test]
    fn a_figure_that_one_run_lacks_is_kept() {
        let runs = [vec![Figure::new("a", "", 1.0)], vec![Figure::new("a", "", 1.0), Figure::new("b", "", 2.0)]];
        let rows = rows(&runs);
        assert_eq!(rows.iter().map(|r| (r.name.as_str(), r.runs)).collect::<Vec<_>>(), [("a", 2), ("b", 1)]);
    }

    #[test]
    fn numbers_are_short() {
        let cases =
            [(0.0, "0"), (0.0123, "0.0123"), (1.5, "1.5"), (23.45, "23.4"), (456.7, "457"), (12345.6, "12,346")];
        for (value, text) in cases {
            assert_eq!(human(value), text);
        }
        assert_eq!(human(1_000_000.0), "1,000,000");
        assert_eq!(human(100.0), "100");
    }

    #[test]
    fn the_table_is_markdown_and_says_what_it_is() {
        let text = report(&[30_000.0, 31_000.0, 29_000.0]).table();
        assert!(text.contains("| rate | op/s | 30,000 | 29,000 to 31,000 |"), "{text}");
        assert!(text.contains("connections 64") && text.contains("- a note") && text.contains("Seed 1"), "{text}");
    }

    #[test]
    fn comparison_tells_change_from_noise() {
        let (slow, fast) = (report(&[100.0, 110.0, 90.0]), report(&[200.0, 210.0, 190.0]));
        assert!(fast.compare(&slow).contains("| rate | op/s | 100 | 200 | +100.0 % |"));
        let near = report(&[105.0, 95.0, 115.0]);
        assert!(near.compare(&slow).contains("+5.0 % (ranges overlap)"), "{}", near.compare(&slow));
        let mut renamed = fast;
        renamed.rows[0].name = "other".into();
        assert!(renamed.compare(&slow).contains("| other | op/s | - | 200 | new |"));
    }

    #[test]
    fn json_reads_back() {
        let report = report(&[1.0]);
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
