//! How long each instance was out of reach: the longest silence between two acceptances around each fault.
//!
//! Pure. Nothing is asserted about times; the table is for people (`docs/performance.md`). Tests: at the foot.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    time::{Duration, Instant},
};

/// A fault that happened.
#[derive(Debug, Clone, Copy)]
pub struct Strike {
    /// Its kind.
    pub kind: &'static str,
    /// When it began.
    pub from: Instant,
    /// When it was mended.
    pub to: Instant,
    /// When everybody had been served again.
    pub calm: Instant,
}

/// The longest silence of an instance that begins before `to` and ends after `from`.
fn silence(served: &[Instant], from: Instant, to: Instant) -> Duration {
    let first = served.partition_point(|at| *at < from).saturating_sub(1);
    let gaps = served[first..].windows(2).take_while(|pair| pair[0] < to);
    gaps.map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}

fn quantile(sorted: &[Duration], per_cent: usize) -> Duration {
    let at = (sorted.len() * per_cent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or_default()
}

/// A row for each kind of fault, and one for the time between faults.
pub fn table(strikes: &[Strike], served: &HashMap<String, Vec<Instant>>) -> String {
    let mut by_kind: BTreeMap<&str, (usize, Vec<Duration>)> = BTreeMap::new();
    for strike in strikes {
        let (count, silences) = by_kind.entry(strike.kind).or_default();
        *count += 1;
        silences.extend(served.values().map(|served| silence(served, strike.from, strike.to)));
    }
    let quiet = strikes.windows(2).flat_map(|pair| {
        let (from, to) = (pair[0].calm, pair[1].from);
        served.values().filter_map(move |served| {
            let within: Vec<Instant> = served.iter().copied().filter(|at| (from..to).contains(at)).collect();
            (within.len() > 1).then(|| silence(&within, from, to))
        })
    });
    by_kind.insert("(between faults)", (0, quiet.collect()));
    let mut table = String::from(
        "| fault | times | instances x times | p50 ms | p99 ms | max ms |\n|---|---:|---:|---:|---:|---:|\n",
    );
    for (kind, (count, mut silences)) in by_kind {
        silences.sort_unstable();
        let [p50, p99, max] = [50, 99, 100].map(|per_cent| quantile(&silences, per_cent).as_millis());
        let samples = silences.len();
        writeln!(table, "| {kind} | {count} | {samples} | {p50} | {p99} | {max} |").unwrap();
    }
    table
}

#[test]
fn the_longest_silence_around_a_fault_is_found() {
    let zero = Instant::now();
    let at = |ms: u64| zero + Duration::from_millis(ms);
    let served: Vec<Instant> = [0, 10, 20, 500, 510, 900].map(at).to_vec();
    assert_eq!(silence(&served, at(30), at(400)), Duration::from_millis(480));
    assert_eq!(silence(&served, at(505), at(520)), Duration::from_millis(390));
    assert_eq!(silence(&served, at(0), at(25)), Duration::from_millis(480), "it began before the end");
    assert_eq!(silence(&[], at(0), at(9)), Duration::ZERO);
    let strikes = [Strike { kind: "kill -9", from: at(30), to: at(400), calm: at(600) }];
    let table = table(&strikes, &HashMap::from([("lamp".into(), served)]));
    assert!(table.contains("| kill -9 | 1 | 1 | 480 | 480 | 480 |"), "{table}");
}

#[test]
fn quantiles_are_of_the_nearest_rank() {
    let all: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
    assert_eq!([50, 99, 100].map(|q| quantile(&all, q).as_millis()), [100, 198, 200]);
    assert_eq!(quantile(&[], 50), Duration::ZERO);
}
