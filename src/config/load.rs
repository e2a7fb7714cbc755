//! Layers: the compiled-in file, a preset, a file, the environment, `--set`, flags. The last one that sets a key wins.
//!
//! Owns: reading the layers, decoding the result, and finding all that is wrong with it in one go.
//! Not here: what values make sense (`check.rs`). Invariant: a [`Loaded`] has passed every check.
//! Tests: at the foot; `tests/it/config.rs` drives the binary.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::de::{DeTable, DeValue};

use super::{
    Config, check, env,
    error::{Error, Origin, Origins, Problem, dotted},
    preset::Preset,
    tree::{Tree, friendly},
};

/// The file that is compiled in.
pub const DEFAULT_TOML: &str = include_str!("../../config/default.toml");

/// The file that is read when none is named and it exists.
pub const USUAL_FILE: &str = "sophont.toml";

/// Settings of earlier builds, and what they are called now.
const MOVED: [(&str, &str); 2] =
    [("store.postgres.pool", "scaling.connection_pool_size"), ("store.postgres.wait_ms", "scaling.pool_wait_seconds")];

/// Most problems told at once.
const MAX_PROBLEMS: usize = 32;

/// What the settings are made from. The environment comes in as an argument.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// `--preset`: the lowest layer above the defaults.
    pub preset: Option<Preset>,
    /// `--config`: this file and no other; it must exist.
    pub file: Option<PathBuf>,
    /// The environment; only names that begin with [`env::PREFIX`] are settings, all serve to find secrets.
    pub env: Vec<(String, String)>,
    /// Each `--set`, as written.
    pub set: Vec<String>,
    /// Flags of their own: name, section, key, value.
    pub flags: Vec<(&'static str, &'static str, &'static str, String)>,
}

/// Settings in force, and where they came from.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    pub(super) origins: Origins,
}

impl Loaded {
    /// A problem with one setting, found by somebody who understands it.
    pub fn problem(&self, section: &str, key: &str, message: String, hint: Option<String>) -> Problem {
        let path = [section.to_owned(), key.to_owned()];
        Problem { origin: self.origins.of(&path), key: dotted(&path), message, hint }
    }
}

struct Layers {
    tree: Tree,
    origins: Origins,
    problems: Vec<Problem>,
}

/// Reads all layers and checks the result.
///
/// # Errors
/// [`Error::File`] when the file cannot be read, [`Error::Problems`] with all that is wrong otherwise.
pub fn load(sources: &Sources) -> Result<Loaded, Error> {
    let mut layers = Layers { tree: defaults()?, origins: Origins::default(), problems: Vec::new() };
    if let Some(preset) = &sources.preset {
        layers.add_preset(preset)?;
    }
    let usual = Path::new(USUAL_FILE);
    let file = sources.file.clone().or_else(|| usual.is_file().then(|| usual.to_owned()));
    if let Some(path) = &file {
        let text = std::fs::read_to_string(path).map_err(|source| Error::File { path: path.clone(), source })?;
        layers.add_file(path, &text)?;
    }
    layers.add_env(&sources.env);
    layers.add_sets(&sources.set);
    for (flag, section, key, value) in &sources.flags {
        layers.add_text(vec![String::from(*section), String::from(*key)], value, Origin::Flag(flag));
    }
    layers.refuse_faults(cfg!(feature = "faults"));
    let config = layers.decode();
    let Layers { origins, mut problems, .. } = layers;
    if let (Some(config), true) = (&config, problems.is_empty()) {
        let has_env = |name: &str| sources.env.iter().any(|(known, value)| known == name && !value.is_empty());
        problems.extend(check::check(config, &has_env).into_iter().map(|found| Problem {
            origin: origins.of(&found.path),
            key: dotted(&found.path),
            message: found.message,
            hint: found.hint,
        }));
    }
    match config {
        Some(config) if problems.is_empty() => Ok(Loaded { config, file, origins }),
        _ => Err(Error::Problems(problems)),
    }
}

/// The compiled-in settings, as a tree.
fn defaults() -> Result<Tree, Error> {
    match DeTable::parse(DEFAULT_TOML) {
        Ok(table) => Ok(Tree::of_table(table.get_ref())),
        Err(error) => Err(Error::Problems(vec![syntax(Path::new("config/default.toml"), DEFAULT_TOML, &error)])),
    }
}

impl Default for Config {
    /// The compiled-in settings.
    #[allow(clippy::expect_used)] // compiled in, and decoded by a test
    fn default() -> Self {
        Config::deserialize(defaults().expect("the compiled-in settings parse"))
            .expect("the compiled-in settings decode")
    }
}

/// Line and column, from 1, of a byte position.
fn position(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

fn syntax(path: &Path, text: &str, error: &toml::de::Error) -> Problem {
    let (line, column) = position(text, error.span().map_or(0, |span| span.start));
    let origin = Origin::File { path: path.to_owned(), line, column };
    Problem { origin, key: String::new(), message: error.message().to_owned(), hint: None }
}

impl Layers {
    fn add_file(&mut self, path: &Path, text: &str) -> Result<(), Error> {
        let (table, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            let problems = errors.iter().take(MAX_PROBLEMS).map(|error| syntax(path, text, error)).collect();
            return Err(Error::Problems(problems));
        }
        let place = |at: usize| {
            let (line, column) = position(text, at);
            Origin::File { path: path.to_owned(), line, column }
        };
        note_table(&mut self.origins, &mut Vec::new(), table.get_ref(), &place);
        self.tree.merge(Tree::of_table(table.get_ref()));
        Ok(())
    }

    fn add_preset(&mut self, preset: &Preset) -> Result<(), Error> {
        let table = DeTable::parse(preset.text)
            .map_err(|error| Error::Problems(vec![syntax(Path::new(preset.name), preset.text, &error)]))?;
        note_table(&mut self.origins, &mut Vec::new(), table.get_ref(), &|_| Origin::Preset(preset.name));
        self.tree.merge(Tree::of_table(table.get_ref()));
        Ok(())
    }

    fn add_env(&mut self, variables: &[(String, String)]) {
        let mut ours: Vec<_> = variables.iter().filter(|(name, _)| name.starts_with(env::PREFIX)).collect();
        ours.sort();
        for (name, value) in ours {
            let origin = Origin::Env(name.clone());
            match env::path_of(name) {
                Some(Ok(path)) => self.add_text(env::as_written(path, &self.tree), value, origin),
                Some(Err(message)) => self.problem(origin, &[], message.to_owned(), None),
                None => {}
            }
        }
    }

    fn add_sets(&mut self, sets: &[String]) {
        for text in sets {
            match env::split_set(text) {
                Ok((path, value)) => {
                    let origin = Origin::Set(dotted(&path));
                    self.add_text(path, &value, origin);
                }
                Err(message) => self.problem(Origin::Set(text.clone()), &[], message.to_owned(), None),
            }
        }
    }

    fn add_text(&mut self, path: Vec<String>, value: &str, origin: Origin) {
        match self.tree.put(&path, Tree::Text(value.to_owned())) {
            Ok(()) => self.origins.set(&path, origin),
            Err(at) => self.problem(origin, &path, format!("'{}' is a value and no section", dotted(&at)), None),
        }
    }

    fn problem(&mut self, origin: Origin, path: &[String], message: String, hint: Option<String>) {
        self.problems.push(Problem { origin, key: dotted(path), message, hint });
    }

    fn refuse_faults(&mut self, known: bool) {
        if known {
            return;
        }
        let section = [String::from("faults")];
        if self.tree.remove(&section) {
            let (path, origin) = self
                .origins
                .below("faults")
                .map_or((section.to_vec(), Origin::Default), |(p, o)| (p.clone(), o.clone()));
            let hint = "it breaks promises on purpose; tests build with --features faults";
            self.problem(origin, &path, String::from("this build has no faults on demand"), Some(hint.to_owned()));
        }
    }

    /// Decodes the tree. Each thing that is wrong is noted and mended with the default, so that the next one is found too.
    fn decode(&mut self) -> Option<Config> {
        let defaults = defaults().ok()?;
        for _ in 0..MAX_PROBLEMS {
            let mut track = serde_path_to_error::Track::new();
            let tracked = serde_path_to_error::Deserializer::new(self.tree.clone(), &mut track);
            let error = match Config::deserialize(tracked) {
                Ok(config) => return Some(config),
                Err(error) => error.to_string(),
            };
            let path = steps(&track.path());
            let (message, hint) = explain(&error, &path, &defaults);
            self.problem(self.origins.of(&path), &path, message, hint);
            if !mend(&mut self.tree, &defaults, &path) {
                return None;
            }
        }
        None
    }
}

/// Notes the place of every key of a table.
fn note_table(origins: &mut Origins, path: &mut Vec<String>, table: &DeTable<'_>, place: &dyn Fn(usize) -> Origin) {
    for (key, value) in table {
        path.push(key.get_ref().to_string());
        note_value(origins, path, value.get_ref(), key.span().start, place);
        path.pop();
    }
}

fn note_value(
    origins: &mut Origins,
    path: &mut Vec<String>,
    value: &DeValue<'_>,
    at: usize,
    place: &dyn Fn(usize) -> Origin,
) {
    origins.note(path, place(at));
    match value {
        DeValue::Table(table) => note_table(origins, path, table, place),
        DeValue::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                path.push(index.to_string());
                note_value(origins, path, item.get_ref(), item.span().start, place);
                path.pop();
            }
        }
        _ => {}
    }
}

fn steps(path: &serde_path_to_error::Path) -> Vec<String> {
    use serde_path_to_error::Segment;
    path.iter()
        .filter_map(|segment| match segment {
            Segment::Map { key } => Some(key.clone()),
            Segment::Seq { index } => Some(index.to_string()),
            Segment::Enum { .. } | Segment::Unknown => None,
        })
        .collect()
}

/// Puts the default where something is wrong, or takes it away; false when nothing can be done.
fn mend(tree: &mut Tree, defaults: &Tree, path: &[String]) -> bool {
    // A list is mended whole: what is wrong with one of its items was told.
    let list = (1..path.len()).find(|&length| matches!(tree.at(&path[..length]), Some(Tree::List(_))));
    let path = &path[..list.unwrap_or(path.len())];
    match defaults.at(path) {
        _ if path.is_empty() => false,
        Some(default) if tree.at(path) != Some(default) => tree.put(path, default.clone()).is_ok(),
        Some(_) => false,
        None => tree.remove(path),
    }
}

/// serde's message in words for the one who wrote the settings, and what may have been meant.
fn explain(error: &str, path: &[String], defaults: &Tree) -> (String, Option<String>) {
    let quoted = |text: &str| text.split('`').skip(1).step_by(2).map(String::from).collect::<Vec<_>>();
    let (said, expected) = error.split_once(", expected ").unwrap_or((error, ""));
    if let Some(name) = said.strip_prefix("unknown field ").map(|name| name.trim_matches('`')) {
        return (String::from("unknown setting"), suggest(name, &quoted(expected), path, defaults));
    }
    if let Some(name) = said.strip_prefix("unknown variant ").map(|name| name.trim_matches('`')) {
        let allowed = quoted(expected);
        return (format!("'{name}' is not one of {}", allowed.join(", ")), near(name, &allowed));
    }
    if let Some(found) = said.strip_prefix("invalid type: ").or_else(|| said.strip_prefix("invalid value: ")) {
        let expected =
            friendly(expected).unwrap_or_else(|| expected.strip_prefix("struct ").map_or(expected, |_| "a section"));
        return (format!("{} is not {expected}", found.replace('`', "'")), None);
    }
    if error == "invalid socket address syntax" {
        return (String::from("not an address such as 127.0.0.1:8080 or [::1]:8080"), None);
    }
    if let Some(name) = said.strip_prefix("missing field ") {
        return (format!("{} is missing", name.replace('`', "'")), None);
    }
    (error.replace('`', "'"), None)
}

/// What may have been meant by an unknown name: a neighbour spelled much like it, or the same name in another section.
fn suggest(name: &str, allowed: &[String], path: &[String], defaults: &Tree) -> Option<String> {
    if let Some((_, now)) = MOVED.iter().find(|(before, _)| *before == dotted(path)) {
        return Some(format!("it is now {now}"));
    }
    if let Some(hint) = near(name, allowed) {
        return Some(hint);
    }
    let Tree::Table(sections) = defaults else { return None };
    let elsewhere = sections.iter().find_map(|(section, tree)| match tree {
        Tree::Table(keys) if keys.contains_key(name) && path.first() != Some(section) => Some(section),
        _ => None,
    });
    if let Some(section) = elsewhere {
        return Some(format!("it belongs to [{section}]"));
    }
    (!allowed.is_empty()).then(|| format!("known here: {}", allowed.join(", ")))
}

fn near(name: &str, allowed: &[String]) -> Option<String> {
    let far = (name.chars().count() / 3).max(1);
    let (distance, best) = allowed
        .iter()
        .map(|known| (strsim::damerau_levenshtein(&name.to_lowercase(), known), known))
        .min_by_key(|(distance, _)| *distance)?;
    (distance <= far).then(|| format!("did you mean '{best}'?"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sources(text: &str) -> (tempfile::TempDir, Sources) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, text).unwrap();
        (dir, Sources { file: Some(file), ..Sources::default() })
    }

    fn problems(text: &str) -> Vec<String> {
        let (dir, sources) = sources(text);
        let Err(Error::Problems(problems)) = load(&sources) else { panic!("{text} must be refused") };
        let folder = format!("{}/", dir.path().display());
        problems.iter().map(|problem| problem.to_string().replace(&folder, "")).collect()
    }

    #[test]
    fn later_layers_win_and_are_remembered() {
        let (_dir, mut sources) = sources("[http]\nworkers = 2\nmax_body_kb = 7\nmax_connections = 9\n");
        sources.env = vec![
            (String::from("SOPHONT__HTTP__MAX_BODY_KB"), String::from("8")),
            (String::from("SOPHONT__HTTP__MAX_CONNECTIONS"), String::from("10")),
            (String::from("SOPHONT__COGNITION__PROVIDERS__LOCAL__BASE_URL"), String::from("http://127.0.0.1:1/v1")),
        ];
        sources.set = vec![String::from("http.max_connections=11"), String::from("http.listen=127.0.0.1:1")];
        sources.flags = vec![("--http", "http", "listen", String::from("127.0.0.1:2"))];
        let loaded = load(&sources).unwrap();
        let http = &loaded.config.http;
        assert_eq!((http.workers, http.max_body_kb, http.max_connections), (2, 8, 11));
        assert_eq!(http.listen, "127.0.0.1:2".parse().unwrap());
        assert_eq!(loaded.config.cognition.providers["local"].base_url, "http://127.0.0.1:1/v1");
        let origin = |key: &str| loaded.origins.of(&[String::from("http"), String::from(key)]).to_string();
        assert!(origin("workers").ends_with("c.toml:2:1"));
        assert_eq!(origin("max_body_kb"), "env SOPHONT__HTTP__MAX_BODY_KB");
        assert_eq!(origin("max_connections"), "--set http.max_connections");
        assert_eq!(origin("listen"), "--http");
    }

    #[test]
    fn everything_wrong_is_told_with_place_and_near_miss() {
        let text = "[http]\nlistn = \"127.0.0.1:1\"\nworkers = \"two\"\n\n[stor]\nx = 1\n\n[store]\nbackend = \"sqlit\"\n  max_inbox = 5\n";
        assert_eq!(
            problems(text),
            [
                "c.toml:2:1: http.listn: unknown setting (did you mean 'listen'?)",
                "c.toml:3:1: http.workers: string \"two\" is not a whole number of 0 or more",
                "c.toml:5:2: stor: unknown setting (did you mean 'store'?)",
                "c.toml:9:1: store.backend: 'sqlit' is not one of sqlite, postgres, memory (did you mean 'sqlite'?)",
                "c.toml:10:3: store.max_inbox: unknown setting (it belongs to [instances])",
            ]
        );
    }

    #[test]
    fn a_setting_that_moved_is_told_with_its_new_name() {
        assert_eq!(
            problems("[store.postgres]\npool = 8\n"),
            ["c.toml:2:1: store.postgres.pool: unknown setting (it is now scaling.connection_pool_size)"]
        );
    }

    #[test]
    fn bad_syntax_is_told_with_place() {
        assert_eq!(problems("[http]\nlisten = 127.0.0.1\n").len(), 1);
        assert!(problems("[http]\nlisten = \n")[0].starts_with("c.toml:2:"));
    }

    #[test]
    fn lists_point_at_the_item() {
        let text = "[[auth.tokens]]\ntoken = \"0123456789abcdef\"\ntenant = \"a b\"\nname = \"n\"\n";
        assert_eq!(
            problems(text),
            ["c.toml:3:1: auth.tokens[0].tenant: ' ' is not allowed in an id, use A-Z a-z 0-9 . _ ~ -"]
        );
        let text = "[[auth.tokens]]\ntoken = \"0123456789abcdef\"\nname = \"n\"\n";
        assert_eq!(problems(text), ["c.toml:1:1: auth.tokens[0]: 'tenant' is missing"]);
    }

    #[test]
    fn names_of_layers_are_told() {
        let one = |name: &str, value: &str| Sources {
            env: vec![(String::from(name), String::from(value))],
            ..Sources::default()
        };
        let told = |sources: &Sources| load(sources).unwrap_err().to_string();
        assert_eq!(
            told(&one("SOPHONT__MQTT__RECEIVE_MAXIMUM", "70000")),
            "env SOPHONT__MQTT__RECEIVE_MAXIMUM: mqtt.receive_maximum: '70000' is not a whole number from 0 to 65535"
        );
        assert_eq!(
            told(&one("SOPHONT__MQTT__RECIEVE_MAXIMUM", "7")),
            "env SOPHONT__MQTT__RECIEVE_MAXIMUM: mqtt.recieve_maximum: unknown setting (did you mean 'receive_maximum'?)"
        );
        assert!(told(&one("SOPHONT__MQTT", "7")).contains("SOPHONT__SECTION__KEY"));
        let set = Sources { set: vec![String::from("http.listen.x=1")], ..Sources::default() };
        assert_eq!(told(&set), "--set http.listen.x: http.listen.x: 'http.listen' is a value and no section");
    }

    #[test]
    fn faults_are_refused_by_builds_without_them() {
        let mut layers = Layers { tree: defaults().unwrap(), origins: Origins::default(), problems: Vec::new() };
        layers.add_sets(&[String::from("faults.panic_on=boom")]);
        layers.refuse_faults(false);
        assert!(
            layers.problems[0].to_string().starts_with("--set faults.panic_on: faults.panic_on: this build has no")
        );
    }

    /// Every key a section knows stands in the compiled-in file, as a setting or as a comment.
    #[test]
    fn the_compiled_in_file_names_every_key() {
        let sections = "node http mqtt store store.postgres cluster scaling instances cognition cognition.providers.local memory memory.endpoint memory.model tools tools.http \
                        tools.tenants.acme tools.mcp.files delivery \
                        auth auth.tokens telemetry faults";
        for section in sections.split_whitespace() {
            let mut tree = defaults().unwrap();
            let mut path: Vec<String> = section.split('.').map(String::from).collect();
            path.push(String::from("?"));
            if section == "auth.tokens" {
                let token = Tree::Table([(String::from("?"), Tree::Int(1))].into());
                tree.put(&path[..2], Tree::List(vec![token])).unwrap();
            } else {
                tree.put(&path, Tree::Int(1)).unwrap();
            }
            let error = Config::deserialize(tree).unwrap_err().to_string();
            let known: Vec<_> = error.split('`').skip(3).step_by(2).collect();
            assert!(!known.is_empty(), "{section}: {error}");
            let header = format!("[{section}]");
            let starts = [format!("\n{header}\n"), format!("\n# {header}\n"), format!("\n# [{header}]\n")];
            let from = starts.iter().find_map(|start| DEFAULT_TOML.find(start));
            let from = from.unwrap_or_else(|| panic!("{header} is not in config/default.toml"));
            let part = &DEFAULT_TOML[from + 1..];
            let part = &part[..part.find("\n[").unwrap_or(part.len())];
            for key in known {
                let there = part.contains(&format!("\n{key} = ")) || part.contains(&format!("\n# {key} = "));
                assert!(
                    there
                        || ["providers", "tokens", "postgres", "http", "tenants", "mcp", "endpoint", "model"]
                            .contains(&key),
                    "{section}.{key} is not in config/default.toml"
                );
            }
        }
    }

    #[test]
    fn the_compiled_in_file_passes_the_checks() {
        let none: &dyn Fn(&str) -> bool = &|_| false;
        assert_eq!(check::check(&Config::default(), none), []);
    }

    proptest::proptest! {
        /// Whatever is in a file, there is an answer: settings, or what is wrong.
        #[test]
        fn no_file_is_too_strange(at in 0..DEFAULT_TOML.len(), cut in 0_usize..40, put in "[\\[\\]\"'=.#\\\\n{}a-z0-9é]{0,12}") {
            let from = (0..=at).rev().find(|&at| DEFAULT_TOML.is_char_boundary(at)).unwrap_or(0);
            let to = (from + cut..=DEFAULT_TOML.len()).find(|&at| DEFAULT_TOML.is_char_boundary(at));
            let rest = &DEFAULT_TOML[to.unwrap_or(DEFAULT_TOML.len())..];
            let (_dir, sources) = sources(&format!("{}{put}{rest}", &DEFAULT_TOML[..from]));
            if let Err(Error::Problems(problems)) = load(&sources) {
                proptest::prop_assert!(!problems.is_empty());
                let placed = problems.iter().all(|problem| matches!(problem.origin, Origin::File { .. }));
                proptest::prop_assert!(placed, "{}", Error::Problems(problems));
            }
        }

        /// Whatever is in the environment and in `--set`, there is an answer.
        #[test]
        fn no_text_is_too_strange(name in "[A-Z_]{0,20}", key in "\\PC{0,20}", value in "\\PC{0,20}") {
            let sources = Sources {
                env: vec![(format!("{}{name}", env::PREFIX), value.clone())],
                set: vec![format!("{key}={value}"), format!("http.{key}={value}")],
                ..Sources::default()
            };
            if let Err(Error::Problems(problems)) = load(&sources) {
                proptest::prop_assert!(!problems.is_empty());
            }
        }
    }
}
