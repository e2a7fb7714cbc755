//! Fuzz targets: what is thrown at each parser of bytes from outside, and what has to hold.
//!
//! A body stands in the `fuzz.rs` beside its parsers and panics when something does not hold. `fuzz/` makes a program of each for
//! libFuzzer, which finds its own way through them (`docs/testing.md`); the test at the foot runs them over their seeds, and over
//! changed ones, whenever tests run, so that none rots. Compiled for those two only: with `cfg(test)`, or the `cfg(fuzzing)` of cargo-fuzz.

use crate::{cli, cluster, cognition, config, gateway, memory, scaling, store, tools, types};

/// A target: its name, and what takes the bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All of them. Each has a program in `fuzz/fuzz_targets` and seeds in `fuzz/seeds`.
pub const TARGETS: [Target; 23] = [
    ("bus_frames", cluster::fuzz::frames),
    ("cache_entries", scaling::cache::fuzz::entries),
    ("chat_requests", gateway::http::fuzz::chat_requests),
    ("config_files", config::fuzz::files),
    ("documents", types::fuzz::documents),
    ("embeddings", memory::fuzz::vectors),
    ("episodes", gateway::http::fuzz::episodes),
    ("fetched_addresses", tools::fuzz::addresses),
    ("history_logs", cli::fuzz::logs),
    ("import_lines", gateway::http::fuzz::lines),
    ("mcp_answers", tools::fuzz::answers),
    ("memory_parts", memory::fuzz::parts),
    ("model_streams", cognition::fuzz::streams),
    ("mqtt_packets", gateway::mqtt::fuzz::packets),
    ("mqtt_payloads", gateway::mqtt::fuzz::payloads),
    ("mqtt_records", gateway::mqtt::fuzz::records),
    ("mqtt_topics", gateway::mqtt::fuzz::topics),
    ("node_streams", cli::fuzz::streams),
    ("queries", gateway::http::fuzz::queries),
    ("rules", cognition::fuzz::rules),
    ("stimuli", gateway::http::fuzz::stimuli),
    ("stored_forms", store::fuzz::forms),
    ("words", types::fuzz::words),
];

/// Throws bytes at a target.
///
/// # Panics
/// When something does not hold, or there is no such target.
pub fn run(name: &str, bytes: &[u8]) {
    match TARGETS.iter().find(|target| target.0 == name) {
        Some((_, target)) => target(bytes),
        None => panic!("there is no target {name}"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    use super::*;

    /// So often is each seed changed.
    const CHANGES: u64 = 60;

    fn files(folder: &str) -> Vec<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
        let mut files: Vec<PathBuf> =
            entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect();
        files.sort();
        files
    }

    /// Some bytes other than they were: flipped, left out, put in, said twice. The same every time.
    fn changed(seed: &[u8], nth: u64) -> Vec<u8> {
        let mut state = nth;
        let mut dice = |below: usize| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            usize::try_from((mixed ^ (mixed >> 27)) >> 33).unwrap() % below.max(1)
        };
        let mut bytes = seed.to_vec();
        for _ in 0..=dice(4) {
            let (at, to) = (dice(bytes.len() + 1), dice(bytes.len() + 1));
            match dice(4) {
                0 if at < bytes.len() => bytes[at] ^= 1 << dice(8),
                1 => drop(bytes.drain(at.min(to)..at.max(to).min(at.min(to) + 8))),
                2 => bytes.insert(at, [0, 1, 0x7f, 0x80, 0xff, b'"', b'\n', b'9'][dice(8)]),
                _ => bytes.extend_from_within(at.min(to)..at.max(to)),
            }
        }
        bytes
    }

    #[test]
    fn every_target_takes_its_seeds_and_what_is_like_them() {
        for (name, target) in TARGETS {
            let seeds = files(&format!("fuzz/seeds/{name}"));
            assert!(!seeds.is_empty(), "{name} has no seeds in fuzz/seeds");
            for seed in seeds {
                let bytes = fs::read(&seed).unwrap();
                println!("{}", seed.display());
                target(&bytes);
                for nth in 0..CHANGES {
                    println!("change {nth}");
                    target(&changed(&bytes, nth));
                }
            }
        }
    }

    #[test]
    fn every_target_has_a_program_and_a_line_in_the_document() {
        let names: Vec<String> = TARGETS.iter().map(|target| target.0.to_owned()).collect();
        let programs = files("fuzz/fuzz_targets");
        let named: Vec<&str> = programs.iter().filter_map(|path| path.file_stem()?.to_str()).collect();
        assert_eq!(named, names, "programs and targets, in order");
        let read = |path: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
        let (manifest, document) = (read("fuzz/Cargo.toml"), read("docs/testing.md"));
        for name in &names {
            let path = format!("fuzz/fuzz_targets/{name}.rs");
            assert!(read(&path).contains(&format!("run(\"{name}\", bytes)")), "{path}");
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in fuzz/Cargo.toml");
            assert!(document.contains(&format!("| `{name}` |")), "{name} is not in docs/testing.md");
        }
    }
}
