//! House rules as code: rows, crate-per-door, headers, names, metrics, docs in step, nothing skipped, nothing orphaned.
//!
//! Each rule is a plain function from texts to complaints; a complaint says what to do. Each has a test that runs it over
//! the repository and one that shows it bites. Not here: taste (length, names), which is for people, and what clippy knows.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "tidy/docs.rs"]
mod docs;
#[path = "tidy/files.rs"]
mod files;
#[path = "tidy/rows.rs"]
mod rows;
#[path = "tidy/tokens.rs"]
mod tokens;

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A text file: path from the repository's root, with `/`, and content.
#[derive(Debug, Clone)]
pub struct File {
    /// Path.
    pub path: String,
    /// Content.
    pub text: String,
}

impl File {
    /// A file of the given path and content.
    pub fn new(path: &str, text: &str) -> Self {
        Self { path: path.into(), text: text.into() }
    }
}

/// The repository's root.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All files below the given folders whose names end with `ending`, in path order. A folder that is not there has none.
pub fn read(folders: &[&str], ending: &str) -> Vec<File> {
    let mut files = Vec::new();
    folders.iter().for_each(|folder| collect(&root().join(folder), ending, &mut files));
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

fn collect(folder: &Path, ending: &str, files: &mut Vec<File>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            collect(&path, ending, files);
        } else if path.to_str().is_some_and(|name| name.ends_with(ending)) {
            let relative = path.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
            // Golden records are no text; rules about names see them all the same.
            files.push(File::new(&relative, &String::from_utf8_lossy(&fs::read(&path).unwrap())));
        }
    }
}

/// Fails with all complaints, one a line.
#[track_caller]
pub fn assert_tidy(complaints: &[String]) {
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
}

/// Fails unless there is exactly one complaint and it has all the words.
#[track_caller]
pub fn assert_complaint(complaints: &[String], words: &[&str]) {
    assert_eq!(complaints.len(), 1, "{complaints:?}");
    words.iter().for_each(|word| assert!(complaints[0].contains(word), "no {word:?} in {complaints:?}"));
}
