//! The rows of the house, and the door each outside crate comes in by.

use crate::{
    File, assert_complaint, assert_tidy, read,
    tokens::{Kind, Token, tokens},
};

/// Top-level modules, lowest first. A module imports only from rows below its own; `types` and `config` share the lowest
/// row and `node`, `cli` and `main` the highest, each in this order.
const ROWS: &[&[&str]] = &[
    &["types"],
    &["config"],
    &["telemetry"],
    &["runtime"],
    &["scaling"],
    &["store"],
    &["memory", "cognition", "tools", "tenancy"],
    &["instance", "delivery", "tasks"],
    &["cluster"],
    &["gateway"],
    &["node"],
    &["cli"],
    &["main", "fuzzing"],
];

/// Crates, and the paths below `src/` that may name them: a folder, or a module's file.
const DOORS: &[(&[&str], &[&str])] = &[
    (&["actix_web", "actix_ws", "actix_http", "actix_service", "utoipa_swagger_ui"], &["gateway/http"]),
    (
        &["actix", "actix_rt"],
        &["instance/actor", "cluster/shard", "cluster/shards", "cluster/balancer", "scaling/cache/actors", "node"],
    ),
    (&["rusqlite"], &["store/sqlite", "scaling/cache/shelf"]),
    (&["refinery"], &["store/sqlite", "store/postgres"]),
    (&["tokio_postgres", "deadpool_postgres", "tokio_postgres_rustls"], &["store/postgres"]),
    (&["rmqtt_codec", "rumqttc"], &["gateway/mqtt"]),
    (&["redis"], &["cluster/bus/redis", "scaling/cache/link"]),
    (&["cel"], &["cognition"]),
    (&["reqwest"], &["cognition", "memory", "delivery", "cli", "tools/fetch"]),
    (&["rmcp"], &["tools/mcp"]),
    (&["clap", "indicatif", "rustyline", "hdrhistogram"], &["cli"]),
    (&["anyhow"], &["main", "cli", "node"]),
];

/// The module path of a source file: `src/a/b.rs` and `src/a/b/mod.rs` are both `a/b`; the crate's root is empty.
pub fn module_of(path: &str) -> &str {
    let inner = path.strip_prefix("src/").unwrap_or(path);
    let inner = inner.strip_suffix(".rs").unwrap_or(inner);
    let inner = inner.strip_suffix("/mod").unwrap_or(inner);
    if inner == "lib" { "" } else { inner }
}

/// Top-level modules that a file names, by `crate::…` or by enough `super::`, each with its line.
fn imports(file: &File) -> Vec<(String, usize)> {
    let module = module_of(&file.path);
    let depth = if module.is_empty() { 0 } else { module.split('/').count() };
    let all = tokens(&file.text);
    let mut found = Vec::new();
    let mut inner = Vec::new(); // brace depths at which inline modules opened
    let mut braces = 0usize;
    for at in 0..all.len() {
        match &all[at].kind {
            Kind::Mark('{') => {
                braces += 1;
                if at >= 2 && all[at - 2].is("mod") {
                    inner.push(braces);
                }
            }
            Kind::Mark('}') => {
                if inner.last() == Some(&braces) {
                    inner.pop();
                }
                braces = braces.saturating_sub(1);
            }
            Kind::Word(word) if word == "crate" => after_path(&all, at + 1, &mut found),
            Kind::Word(word) if word == "super" && !follows_path(&all, at) => {
                let (supers, last) = count_supers(&all, at);
                if supers == depth + inner.len() {
                    after_path(&all, last + 1, &mut found);
                }
            }
            _ => {}
        }
    }
    found
}

fn follows_path(all: &[Token], at: usize) -> bool {
    at > 0 && all[at - 1].kind == Kind::Path
}

/// How many `super` stand in a row from `at`, and where the last one is.
fn count_supers(all: &[Token], at: usize) -> (usize, usize) {
    let (mut count, mut last) = (1, at);
    while all.get(last + 1).is_some_and(|t| t.kind == Kind::Path) && all.get(last + 2).is_some_and(|t| t.is("super")) {
        (count, last) = (count + 1, last + 2);
    }
    (count, last)
}

/// The first words after a `::` at `at`: one, or those of a `{…}` group.
fn after_path(all: &[Token], at: usize, found: &mut Vec<(String, usize)>) {
    if all.get(at).is_none_or(|t| t.kind != Kind::Path) {
        return;
    }
    let mut depth = 0usize;
    for (offset, token) in all[at + 1..].iter().enumerate() {
        match &token.kind {
            Kind::Mark('{') => depth += 1,
            Kind::Mark('}') => depth = depth.saturating_sub(1),
            Kind::Word(word) => {
                let before = &all[at + offset].kind;
                if depth == 0 || (depth == 1 && matches!(before, Kind::Mark('{' | ','))) {
                    found.push((word.clone(), token.line));
                }
            }
            _ => {}
        }
        if depth == 0 {
            return;
        }
    }
}

fn row(module: &str) -> Option<usize> {
    ROWS.iter().position(|row| row.contains(&module))
}

/// Imports that go sideways or up.
pub fn upward_imports(files: &[File]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        let module = module_of(&file.path);
        let own = module.split('/').next().unwrap_or_default();
        if own.is_empty() {
            continue; // the crate's root names every module
        }
        let Some(own_row) = row(own) else {
            complaints.push(format!("{}: module `{own}` has no row: give it one in tests/tidy/rows.rs", file.path));
            continue;
        };
        for (used, line) in imports(file) {
            // What has no row is not a module: an item or macro of the crate's root.
            let Some(used_row) = row(&used) else { continue };
            if used != own && used_row >= own_row {
                complaints.push(format!(
                    "{}:{line}: `{own}` imports `{used}`, which is not below it: own a small trait here and let `node` plug \
                     `{used}` in, or move the shared part down",
                    file.path
                ));
            }
        }
    }
    complaints
}

/// Outside crates named where they do not belong.
pub fn crates_outside_their_door(files: &[File]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        let module = module_of(&file.path);
        let all = tokens(&file.text);
        for (at, token) in all.iter().enumerate() {
            let Some(word) = token.word() else { continue };
            let Some((_, doors)) = DOORS.iter().find(|(crates, _)| crates.contains(&word)) else { continue };
            let named = all.get(at + 1).is_some_and(|next| next.kind == Kind::Path)
                || (at > 0 && all[at - 1].is("use"))
                || (at > 1 && all[at - 1].is("crate") && all[at - 2].is("extern"));
            let inside =
                |door: &&str| module == *door || module.strip_prefix(*door).is_some_and(|r| r.starts_with('/'));
            if named && !follows_path(&all, at) && !doors.iter().any(inside) {
                complaints.push(format!(
                    "{}:{}: `{word}` may be named only in src/{}: put the code there behind a type of ours",
                    file.path,
                    token.line,
                    doors.join(", src/")
                ));
            }
        }
    }
    complaints
}

#[test]
fn rows_import_downward_only() {
    assert_tidy(&upward_imports(&read(&["src"], ".rs")));
}

#[test]
fn outside_crates_come_in_by_their_door() {
    assert_tidy(&crates_outside_their_door(&read(&["src"], ".rs")));
}

#[test]
fn every_form_of_an_upward_import_is_found() {
    for text in [
        "use crate::gateway::http;",
        "use crate::{types::{Kind, id::x}, gateway};",
        "fn f() { crate::gateway::x() }",
        "use super::gateway;",
        "mod inner { use super::super::gateway::x; }",
        "pub(crate) use crate::gateway as g;",
        "use crate::instance;",
    ] {
        let complaints = upward_imports(&[File::new("src/delivery/mod.rs", text)]);
        assert_complaint(&complaints, &["src/delivery/mod.rs:1", "`delivery`", "let `node` plug"]);
    }
    let nested = File::new("src/store/sqlite/writer.rs", "//! x\nuse super::super::super::memory;");
    assert_complaint(&upward_imports(&[nested]), &["src/store/sqlite/writer.rs:2", "`memory`"]);
    assert_complaint(&upward_imports(&[File::new("src/types/id.rs", "use crate::config::Config;")]), &["`config`"]);
    assert_complaint(&upward_imports(&[File::new("src/strange.rs", "")]), &["`strange` has no row"]);
}

#[test]
fn downward_imports_comments_and_own_parts_are_fine() {
    let text = r#"
        //! [`crate::gateway`] comes later
        use crate::{store::{self, Episode}, types::{gateway, Kind}};
        use super::router;
        /* use crate::cli; */
        const X: &str = "crate::cli";
        pub(crate) fn f() { crate::cluster::g(); super::router::h(); }
        mod tests { use super::*; use super::super::cluster; }
    "#;
    assert_tidy(&upward_imports(&[File::new("src/cluster/shard.rs", text)]));
}

#[test]
fn a_crate_outside_its_door_is_found() {
    for text in ["use reqwest::Client;", "fn f(_: reqwest::Url) {}", "use reqwest as web;", "#[reqwest::x] fn f() {}"] {
        let complaints = crates_outside_their_door(&[File::new("src/store/mod.rs", text)]);
        assert_complaint(
            &complaints,
            &["`reqwest`", "src/cognition, src/memory, src/delivery, src/cli, src/tools/fetch"],
        );
    }
    let fine = [
        File::new("src/delivery/webhook.rs", "use reqwest::Client;"),
        File::new("src/instance/actor.rs", "use actix::Actor;"),
        File::new("src/instance/actor/slow.rs", "use actix::Actor;"),
        File::new("src/gateway/http/mod.rs", "// clap::Parser\nlet actix = 1; x::cel::y(); self.clap"),
    ];
    assert_tidy(&crates_outside_their_door(&fine));
}
