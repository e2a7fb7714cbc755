//! What is wrong with the settings, and where each of them came from, in words for the person who wrote them.
//!
//! Tests: at the foot of `load.rs`; `tests/it/config.rs` reads them as the binary prints them.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use crate::types::{Fault, Kind};

/// Where a setting came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The file that is compiled in.
    Default,
    /// A preset that is compiled in.
    Preset(&'static str),
    /// A file, with line and column from 1.
    File {
        /// As it was named.
        path: PathBuf,
        /// Line.
        line: usize,
        /// Column, in characters.
        column: usize,
    },
    /// An environment variable.
    Env(String),
    /// `--set`, with its key.
    Set(String),
    /// A flag of its own, such as `--http`.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::Preset(name) => write!(f, "preset {name}"),
            Origin::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Origin::Env(name) => write!(f, "env {name}"),
            Origin::Set(key) => write!(f, "--set {key}"),
            Origin::Flag(flag) => f.write_str(flag),
        }
    }
}

/// The origin of each setting, by path. A setting that is not there is a default.
#[derive(Debug, Clone, Default)]
pub(super) struct Origins(BTreeMap<Vec<String>, Origin>);

impl Origins {
    /// Notes where a setting came from; what was noted of it and below it is void.
    pub(super) fn set(&mut self, path: &[String], origin: Origin) {
        self.0.retain(|known, _| known.len() < path.len() || known[..path.len()] != *path);
        self.0.insert(path.to_vec(), origin);
    }

    /// Adds a note and leaves those below it.
    pub(super) fn note(&mut self, path: &[String], origin: Origin) {
        self.0.insert(path.to_vec(), origin);
    }

    /// The origin of a setting or, when it has none, of the list or section it is in.
    pub(super) fn of(&self, path: &[String]) -> Origin {
        (0..=path.len()).rev().find_map(|length| self.0.get(&path[..length])).cloned().unwrap_or(Origin::Default)
    }

    /// The origin of exactly this setting.
    pub(super) fn exactly(&self, path: &[String]) -> Option<&Origin> {
        self.0.get(path)
    }

    /// The first setting in or below a section that somebody set.
    pub(super) fn below(&self, section: &str) -> Option<(&Vec<String>, &Origin)> {
        self.0.iter().find(|(path, _)| path.first().is_some_and(|first| first == section))
    }
}

/// A path as people write it: `auth.tokens[0].tenant`.
pub(super) fn dotted(path: &[String]) -> String {
    let mut out = String::new();
    for name in path {
        if name.bytes().all(|b| b.is_ascii_digit()) && !out.is_empty() {
            out.push_str(&format!("[{name}]"));
            continue;
        }
        if !out.is_empty() {
            out.push('.');
        }
        out.push_str(name);
    }
    out
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where it was written.
    pub origin: Origin,
    /// The setting, such as `http.listen`; empty when it is not about one.
    pub key: String,
    /// What is wrong, in a sentence without a full stop.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.origin != Origin::Default {
            write!(f, "{}: ", self.origin)?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// All that is wrong with the settings, one a line.
    #[error("{}", lines(.0))]
    Problems(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        Kind::Invalid
    }
    fn code(&self) -> &'static str {
        "CONFIG_INVALID"
    }
    fn hint(&self) -> Option<String> {
        Some(String::from("docs/configuration.md tells what each setting does and allows"))
    }
}
