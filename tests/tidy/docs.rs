//! Documents in step with the code: every setting explained, every decision listed, every migration in every dialect.

use std::collections::{BTreeMap, BTreeSet};

use crate::{File, assert_complaint, assert_tidy, read};

const DEFAULTS: &str = "config/default.toml";
const SETTINGS: &str = "docs/configuration.md";
const PROMISES: &str = "docs/SEMANTICS.md";

/// A line of the default configuration that gives a key, in force or (`# key = …`) absent by default.
struct Setting<'a> {
    section: &'a str,
    key: &'a str,
    line: usize,
    explained: bool,
}

/// All settings of the default configuration.
fn settings(defaults: &str) -> Vec<Setting<'_>> {
    let mut section = "";
    let mut before = "";
    let mut found = Vec::new();
    for (at, line) in defaults.lines().enumerate() {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if bare.starts_with('[') && bare.ends_with(']') {
            section = bare;
        } else if let Some((key, _)) = bare.split_once(" = ")
            && key.chars().all(word)
        {
            let explained = before.starts_with("# ") && !before.contains(" = ");
            found.push(Setting { section, key, line: at + 1, explained });
        }
        before = line;
    }
    found
}

/// Settings without a comment of their own.
pub fn unexplained_settings(defaults: &str) -> Vec<String> {
    let bare = settings(defaults).into_iter().filter(|setting| !setting.explained);
    bare.map(|setting| format!("{DEFAULTS}:{}: say above `{}` what it does, in which unit", setting.line, setting.key))
        .collect()
}

/// Settings that the document does not name: the text below a heading with the section's name has to have the key in
/// backticks.
pub fn undocumented_settings(defaults: &str, document: &str) -> Vec<String> {
    let sections = headed(document);
    let mut complaints = Vec::new();
    for Setting { section, key, .. } in settings(defaults) {
        let mut below = sections.iter().filter(|(head, _)| head.contains(section));
        if !below.any(|(_, text)| text.contains(&format!("`{key}`"))) {
            complaints
                .push(format!("{SETTINGS}: explain `{key}` under a heading with {section}: values, default, effect"));
        }
    }
    complaints
}

/// Headings of a Markdown text and what stands below each, up to the next.
fn headed(document: &str) -> Vec<(String, String)> {
    let mut sections = vec![(String::new(), String::new())];
    for line in document.lines() {
        if line.starts_with('#') {
            sections.push((line.into(), String::new()));
        } else if let Some((_, text)) = sections.last_mut() {
            text.push_str(line);
            text.push('\n');
        }
    }
    sections
}

/// Decisions that the index does not link, and links of the index that lead nowhere.
pub fn index_gaps(index: &str, records: &[&str]) -> Vec<String> {
    let linked: BTreeSet<&str> = index
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter(|link| link.starts_with(|c: char| c.is_ascii_digit()))
        .collect();
    let there: BTreeSet<&str> = records.iter().copied().collect();
    let missing = there.difference(&linked).map(|name| format!("docs/adr/README.md: list {name}"));
    let dangling =
        linked.difference(&there).map(|name| format!("docs/adr/README.md: {name} is not there: mend the link"));
    missing.chain(dangling).collect()
}

/// Migrations that not every dialect has under the same number and name, or whose numbers have gaps or repeat.
pub fn uneven_migrations(paths: &[&str]) -> Vec<String> {
    let mut dialects: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for path in paths {
        if let Some((dialect, name)) = path.strip_prefix("migrations/").and_then(|rest| rest.split_once('/')) {
            dialects.entry(dialect).or_default().push(name);
        }
    }
    let all: BTreeSet<&str> = dialects.values().flatten().copied().collect();
    let mut complaints = Vec::new();
    for (dialect, names) in &dialects {
        for name in all.iter().filter(|name| !names.contains(name)) {
            complaints
                .push(format!("migrations/{dialect}: {name} is missing: every dialect has the same numbers and names"));
        }
        let mut numbers: Vec<Option<u32>> = names.iter().map(|name| number(name)).collect();
        numbers.sort_unstable();
        if numbers.iter().enumerate().any(|(at, own)| *own != u32::try_from(at + 1).ok()) {
            complaints
                .push(format!("migrations/{dialect}: name them V1__…, V2__…, without gap or repeat; found {names:?}"));
        }
    }
    complaints
}

fn number(name: &str) -> Option<u32> {
    name.strip_prefix('V')?.split("__").next()?.parse().ok()
}

/// Tests that a document names as `file::test` in backticks and that `tests/it` does not have.
pub fn missing_tests(document: &str, tests: &[File]) -> Vec<String> {
    let word =
        |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    let quoted = document.split('`').skip(1).step_by(2);
    let named = quoted.filter_map(|text| text.split_once("::")).filter(|(file, test)| word(file) && word(test));
    let exists = |file: &str, test: &str| {
        let path = format!("tests/it/{file}.rs");
        tests.iter().any(|found| found.path == path && found.text.contains(&format!("fn {test}(")))
    };
    named
        .filter(|(file, test)| !exists(file, test))
        .map(|(file, test)| {
            format!("{PROMISES}: there is no test `{test}` in tests/it/{file}.rs: name the one that proves it")
        })
        .collect()
}

/// Files that a document names in backticks and that are not there.
pub fn dangling_paths(documents: &[File], exists: impl Fn(&str) -> bool) -> Vec<String> {
    const ROOMS: &[&str] = &["src/", "tests/", "docs/", "migrations/", "benches/", ".ci/"];
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-');
    let mut complaints = Vec::new();
    for document in documents {
        for (at, line) in document.text.lines().enumerate() {
            let named =
                line.split('`').skip(1).step_by(2).filter(|name| ROOMS.iter().any(|room| name.starts_with(room)));
            let paths = named.filter_map(|name| name.split("::").next()).filter(|path| path.chars().all(plain));
            for path in paths.filter(|path| !exists(path)) {
                complaints.push(format!("{}:{}: there is no {path}: name what is there", document.path, at + 1));
            }
        }
    }
    complaints
}

#[test]
fn documents_name_files_that_are_there() {
    let mut documents = read(&["docs"], ".md");
    for name in ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"] {
        let text = std::fs::read_to_string(crate::root().join(name));
        documents.extend(text.into_iter().map(|text| File::new(name, &text)));
    }
    assert_tidy(&dangling_paths(&documents, |path| crate::root().join(path).exists()));
    let dangling = |text: &str| dangling_paths(&[File::new("docs/a.md", text)], |path| path == "src/a.rs");
    assert_tidy(&dangling("`src/a.rs` and `src/a.rs::f`, `tests/{name}`, `src/<name>.rs`, src/plain.rs, `std::fs`"));
    assert_complaint(&dangling("see\n`src/gone.rs`"), &["docs/a.md:2", "src/gone.rs"]);
}

#[test]
fn every_promise_names_its_tests() {
    let documents = read(&["docs"], ".md");
    if let Some(document) = documents.iter().find(|file| file.path == PROMISES) {
        let tests = read(&["tests/it"], ".rs");
        assert!(document.text.matches("::").count() > 15, "the tests are found");
        assert_tidy(&missing_tests(&document.text, &tests));
    }
    let tests = [File::new("tests/it/turn.rs", "async fn it_holds() {}")];
    assert_tidy(&missing_tests(
        "Run `file::name` so: `turn::it_holds`, in `types::Kind`.",
        &[&tests[..], &[File::new("tests/it/file.rs", "fn name() {}")]].concat(),
    ));
    assert_complaint(&missing_tests("`turn::it_broke`", &tests), &["`it_broke`", "tests/it/turn.rs"]);
    assert_complaint(&missing_tests("`trun::it_holds`", &tests), &["tests/it/trun.rs"]);
}

#[test]
fn every_setting_is_explained() {
    let all = read(&["config", "docs"], "");
    let text = |path: &str| all.iter().find(|file| file.path == path).map(|file| &*file.text);
    let defaults = text(DEFAULTS).expect("the default configuration");
    assert!(settings(defaults).len() > 40, "the settings are found");
    assert_tidy(&unexplained_settings(defaults));
    assert_tidy(&undocumented_settings(defaults, text(SETTINGS).unwrap_or_default()));
}

#[test]
fn every_decision_is_in_the_index() {
    let all = read(&["docs/adr"], ".md");
    let name = |file: &File| file.path.rsplit('/').next().unwrap_or_default().to_string();
    let records: Vec<String> =
        all.iter().map(name).filter(|name| name.starts_with(|c: char| c.is_ascii_digit())).collect();
    let records: Vec<&str> = records.iter().map(String::as_str).collect();
    let index = all.iter().find(|file| file.path == "docs/adr/README.md").map_or("", |file| &file.text);
    assert_tidy(&index_gaps(index, &records));
}

#[test]
fn every_dialect_has_the_same_migrations() {
    let all = read(&["migrations"], ".sql");
    assert_tidy(&uneven_migrations(&all.iter().map(|file| &*file.path).collect::<Vec<_>>()));
}

#[test]
fn each_rule_bites() {
    let defaults =
        "[http]\n# Where.\nlisten = \"x\"\n# How many.\n# workers = 0\n\n# [[auth.tokens]]\n# Who.\n# name = 1\n";
    let document =
        "# Settings\n## `[http]`\n`listen` is where.\n`workers` are threads.\n## `[[auth.tokens]]`\n`name`\n";
    assert_tidy(&unexplained_settings(defaults));
    assert_complaint(&unexplained_settings("[a]\n# Why.\nb = 1\nc = 2\n"), &["config/default.toml:4", "`c`"]);
    assert_tidy(&undocumented_settings(defaults, document));
    let silent = document.replace("`workers`", "they");
    assert_complaint(&undocumented_settings(defaults, &silent), &["`workers`", "[http]"]);
    let elsewhere = document.replace("`name`", "").replace("`listen`", "`listen` `name`");
    assert_complaint(&undocumented_settings(defaults, &elsewhere), &["`name`", "[[auth.tokens]]"]);

    assert_complaint(&index_gaps("", &["0001-house.md"]), &["list 0001-house.md"]);
    assert_complaint(&index_gaps("[x](0001-house.md)", &[]), &["0001-house.md is not there"]);
    assert_tidy(&index_gaps("- [1](0001-house.md)\n- [gaps](gaps.md)", &["0001-house.md"]));

    let sqlite = ["migrations/sqlite/V1__a.sql", "migrations/sqlite/V2__b.sql"];
    assert_tidy(&uneven_migrations(&sqlite));
    assert_complaint(&uneven_migrations(&["migrations/sqlite/V2__b.sql"]), &["without gap"]);
    assert_complaint(&uneven_migrations(&["migrations/sqlite/V1__a.sql", "migrations/sqlite/V1__b.sql"]), &["repeat"]);
    let both = [sqlite[0], sqlite[1], "migrations/postgres/V1__a.sql"];
    assert_complaint(&uneven_migrations(&both), &["migrations/postgres", "V2__b.sql"]);
}
