//! Rules about files: headers, names, orphans; metric names on their page; no test skipped, no sleep in tests.

use crate::{
    File, assert_complaint, assert_tidy, read,
    tokens::{Kind, Token, tokens},
};

const METRIC_PAGE: &str = "src/telemetry/metric.rs";
const WAITING_PLACE: &str = "tests/it/support/mod.rs";

/// Files that do not begin with a header.
pub fn headless(files: &[File]) -> Vec<String> {
    let headless = files.iter().filter(|file| !file.text.starts_with("//! "));
    headless
        .map(|file| {
            format!("{}: begin with `//! ` and say what it owns, what is not here, and where its tests are", file.path)
        })
        .collect()
}

/// Files and folders with a name that says nothing.
pub fn empty_names(files: &[File]) -> Vec<String> {
    const EMPTY: &[&str] = &["util", "utils", "helper", "helpers", "common", "manager", "managers", "misc"];
    let named =
        files.iter().filter(|file| file.path.split('/').any(|part| EMPTY.contains(&part.trim_end_matches(".rs"))));
    named.map(|file| format!("{}: name it after the verb or noun it is", file.path)).collect()
}

/// Modules that nobody declares: their code is not compiled, their tests do not run.
pub fn orphans(files: &[File]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        let (folder, name) = file.path.rsplit_once('/').unwrap_or(("", &file.path));
        let name = name.trim_end_matches(".rs");
        // A package's roots need no declaration; `a/mod.rs` is declared as `a` where `a.rs` would be.
        let (folder, name) =
            if name == "mod" { folder.rsplit_once('/').unwrap_or(("", folder)) } else { (folder, name) };
        if matches!(name, "main" | "lib") || folder == "tests" || folder == "benches" {
            continue;
        }
        let parents = [
            format!("{folder}/mod.rs"),
            format!("{folder}/main.rs"),
            format!("{folder}/lib.rs"),
            format!("{folder}.rs"),
        ];
        let declared = files.iter().filter(|other| parents.contains(&other.path)).any(|parent| declares(parent, name));
        if !declared {
            complaints
                .push(format!("{}: nothing declares `mod {name};`: declare it in {folder} or delete it", file.path));
        }
    }
    complaints
}

fn declares(file: &File, name: &str) -> bool {
    let all = tokens(&file.text);
    all.windows(3).any(|w| w[0].is("mod") && w[1].is(name) && w[2].kind == Kind::Mark(';'))
}

/// Tokens before the tests at the foot of a file.
fn without_tests(text: &str) -> Vec<Token> {
    let mut all = tokens(text);
    let foot = all.windows(6).position(|w| {
        w[0].kind == Kind::Mark('#') && w[2].is("cfg") && w[4].is("test") && w[5].kind == Kind::Mark(')')
    });
    all.truncate(foot.unwrap_or(all.len()));
    all
}

/// Metric names written anywhere but on the metric page.
pub fn stray_metrics(files: &[File]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files.iter().filter(|file| file.path != METRIC_PAGE) {
        for token in without_tests(&file.text) {
            if let Kind::Text(text) = &token.kind
                && text.starts_with("sophont_")
            {
                complaints.push(format!(
                    "{}:{}: \"{text}\" is a metric's name: give it a constant in {METRIC_PAGE} and use that",
                    file.path, token.line
                ));
            }
        }
    }
    complaints
}

/// Names on the metric page that do not look like metric names, or stand there twice.
pub fn bad_metrics(page: &File) -> Vec<String> {
    let mut seen = Vec::new();
    let mut complaints = Vec::new();
    for token in without_tests(&page.text) {
        let Kind::Text(name) = token.kind else { continue };
        let parts: Vec<&str> = name.split('_').collect();
        let lower =
            |part: &&str| !part.is_empty() && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if parts.len() < 3 || parts[0] != "sophont" || !parts.iter().all(lower) {
            complaints.push(format!(
                "{METRIC_PAGE}:{}: \"{name}\" should be sophont_<module>_<what>_<unit>[_total], in lower case",
                token.line
            ));
        } else if seen.contains(&name) {
            complaints.push(format!("{METRIC_PAGE}:{}: \"{name}\" stands here twice: keep one constant", token.line));
        }
        seen.push(name);
    }
    complaints
}

/// Tests that are skipped.
pub fn skipped_tests(files: &[File]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        let all = tokens(&file.text);
        for window in all.windows(3).filter(|w| w[0].kind == Kind::Mark('#') && w[2].is("ignore")) {
            let (path, line) = (&file.path, window[0].line);
            complaints.push(format!("{path}:{line}: a skipped test proves nothing: mend it, or delete it and say why"));
        }
    }
    complaints
}

/// Tests that sleep.
pub fn sleeping_tests(files: &[File]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files.iter().filter(|file| file.path != WAITING_PLACE) {
        let all = tokens(&file.text);
        for window in all.windows(2).filter(|w| w[0].is("sleep") && w[1].kind == Kind::Mark('(')) {
            let (path, line) = (&file.path, window[0].line);
            complaints
                .push(format!("{path}:{line}: do not sleep in tests: wait for a named condition with `wait_for`"));
        }
    }
    complaints
}

#[test]
fn every_file_has_a_header() {
    assert_tidy(&headless(&read(&["src", "tests", "benches", "examples"], ".rs")));
}

#[test]
fn every_name_says_something() {
    assert_tidy(&empty_names(&read(&["src", "tests", "benches"], "")));
}

#[test]
fn no_file_is_orphaned() {
    assert_tidy(&orphans(&read(&["src", "tests/it"], ".rs")));
}

#[test]
fn metric_names_stand_on_one_page() {
    let files = read(&["src"], ".rs");
    assert_tidy(&stray_metrics(&files));
    let page = files.iter().find(|file| file.path == METRIC_PAGE).expect("the metric page");
    assert_tidy(&bad_metrics(page));
}

#[test]
fn no_test_is_skipped_and_none_sleeps() {
    assert_tidy(&skipped_tests(&read(&["src", "tests"], ".rs")));
    assert_tidy(&sleeping_tests(&read(&["tests"], ".rs")));
}

#[test]
fn each_rule_bites() {
    let one = |path: &str, text: &str| [File::new(path, text)];
    assert_complaint(&headless(&one("src/a.rs", "use x;\n//! late\n")), &["src/a.rs", "begin with `//! `"]);
    assert_complaint(&headless(&one("src/a.rs", "")), &["src/a.rs"]);
    assert_complaint(&empty_names(&one("src/a/utils.rs", "")), &["src/a/utils.rs"]);
    assert_complaint(&empty_names(&one("src/common/a.rs", "")), &["src/common/a.rs"]);
    assert_complaint(&stray_metrics(&one("src/a.rs", "x(\"sophont_a_b\")")), &["src/a.rs:1", METRIC_PAGE]);
    assert_complaint(
        &skipped_tests(&one("tests/it/a.rs", "#[test]\n#[ignore = \"x\"]\nfn f() {}")),
        &["tests/it/a.rs:2"],
    );
    assert_complaint(&sleeping_tests(&one("tests/it/a.rs", "\ntokio::time::sleep(x).await")), &["tests/it/a.rs:2"]);
    let page = |text: &str| bad_metrics(&File::new(METRIC_PAGE, text));
    assert_complaint(&page("const A: &str = \"sophont_Bad_name\";"), &["sophont_Bad_name"]);
    assert_complaint(&page("const A: &str = \"other_a_b\";"), &["other_a_b"]);
    assert_complaint(&page("const A: &str = \"sophont_a_b\"; const B: &str = \"sophont_a_b\";"), &["twice"]);
}

#[test]
fn an_orphan_is_found_wherever_it_lies() {
    let tree = |main: &str, module: &str| {
        orphans(&[
            File::new("src/lib.rs", main),
            File::new("src/a/mod.rs", module),
            File::new("src/a/b.rs", ""),
            File::new("tests/it/main.rs", "mod c;"),
            File::new("tests/it/c.rs", ""),
        ])
    };
    assert_tidy(&tree("pub mod a;", "mod b;"));
    assert_complaint(&tree("pub mod a;", "// mod b;"), &["src/a/b.rs"]);
    assert_complaint(&tree("", "mod b;"), &["src/a/mod.rs", "`mod a;`"]);
}

#[test]
fn a_metric_in_the_tests_at_the_foot_is_fine() {
    let text = "fn f() {}\n#[cfg(test)]\nmod tests { const X: &str = \"sophont_a_b\"; }";
    assert_tidy(&stray_metrics(&[File::new("src/a.rs", text)]));
}
