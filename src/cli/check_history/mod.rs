//! `sophont check-history`: holds what clients wrote down against what is stored, and says which promises were kept.
//!
//! Owns: the client's log ([`log`]), the check ([`check`]), and where the truth is read ([`truth`]). Not here: sending
//! (`load`, `tests/chaos`). `sophont load --verify`, the crash test and the chaos test judge by the same check.
//! Tests: at the foot of each file, and `tests/it/check_history.rs`. For people: `docs/check-history.md`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use clap::Args;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::{
    Failure, SettingsArgs,
    door::{self, Door, DoorArgs},
    out,
};
use crate::{
    config::Backend,
    runtime::clock::Clock,
    store::{
        self, Store,
        postgres::PostgresStore,
        sqlite::{self, SqliteStore},
    },
    types::{Fault, Kind, TenantId},
};
use check::{Breach, Verdict};
use log::Log;
use truth::Truth;

pub mod check;
pub mod log;
#[cfg(test)]
mod planted;
pub mod truth;

/// Instances that are read at once.
const READERS: usize = 8;

/// Arguments of `check-history`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// What clients wrote down: JSON lines, in the form of docs/check-history.md. One sender's lines stand in one file.
    #[arg(required = true, value_name = "LOG")]
    logs: Vec<PathBuf>,
    /// A node to ask; name several to have their histories compared too.
    #[arg(long, value_name = "URL", conflicts_with = "data_dir")]
    url: Vec<String>,
    /// Read the store in this data folder in place of asking a node. The folder is copied, never changed; a node may run.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Read the store that a node's configuration file names, SQLite or PostgreSQL.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["url", "data_dir"])]
    config: Option<PathBuf>,
    /// Whose instances, with --data-dir or --config.
    #[arg(long, value_name = "TENANT", default_value = "default")]
    tenant: String,
    /// Environment variable that holds the token; `SOPHONT_TOKEN` is used when it is set and none is named.
    #[arg(long, value_name = "VAR")]
    token_env: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log.
    #[error(transparent)]
    Log(#[from] log::Error),
    /// What is stored.
    #[error(transparent)]
    Truth(#[from] truth::Error),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Log(error) => error.kind(),
            Error::Truth(error) => error.kind(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Error::Log(error) => error.hint(),
            Error::Truth(error) => error.hint(),
        }
    }
}

/// Runs the command. Exit code 1 when a promise was broken.
///
/// # Errors
/// A log that cannot be read; no node and no store to ask.
pub fn run(args: &CheckArgs) -> Result<ExitCode, Failure> {
    let log = read(&args.logs).map_err(|error| Failure::of(&error))?;
    let runtime = door::runtime()?;
    let mut verdict = if args.data_dir.is_some() || args.config.is_some() {
        runtime.block_on(judge_store(&log, args))?
    } else {
        let truths = nodes(args)?;
        runtime.block_on(judge(&log, &truths)).map_err(|error| Failure::of(&error))?
    };
    quote(&mut verdict, &log).map_err(|error| Failure::of(&error))?;
    if args.json {
        let text = serde_json::to_string_pretty(&verdict).map_err(|error| Failure::new(error.to_string()))?;
        out::out(&format!("{text}\n"));
    } else {
        out::out(&table(&verdict));
    }
    Ok(if verdict.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn open(path: &Path) -> Result<BufReader<File>, log::Error> {
    let failed = |source| log::Error::Io { file: path.display().to_string(), source };
    File::open(path).map(BufReader::new).map_err(failed)
}

fn read(paths: &[PathBuf]) -> Result<Log, log::Error> {
    let mut log = Log::default();
    for path in paths {
        log.read(&path.display().to_string(), open(path)?)?;
    }
    Ok(log)
}

fn nodes(args: &CheckArgs) -> Result<Vec<Truth>, Failure> {
    const USUAL_URL: &str = "SOPHONT_URL";
    let usual = || std::env::var(USUAL_URL).unwrap_or_else(|_| String::from("http://127.0.0.1:8080"));
    let urls = if args.url.is_empty() { vec![usual()] } else { args.url.clone() };
    let door = |url| Door::new(&DoorArgs { url, token_env: args.token_env.clone() }).map(Truth::Node);
    urls.into_iter().map(door).collect()
}

/// Holds the log against the first truth, and the others against it.
///
/// # Errors
/// [`truth::Error`] when one does not tell.
pub async fn judge(log: &Log, truths: &[Truth]) -> Result<Verdict, truth::Error> {
    let Some((first, others)) = truths.split_first() else { return Ok(Verdict::default()) };
    let one = async |instance: &str| {
        let sent = log.sent(instance);
        let stored = first.stored(instance, sent).await?;
        let mut verdict = Verdict::default();
        verdict.check_instance(instance, sent, &stored);
        for other in others {
            verdict.check_alike(instance, &stored.turns, &other.turns(instance).await?);
        }
        Ok(verdict)
    };
    let parts = stream::iter(log.instances().map(one)).buffered(READERS);
    parts
        .try_fold(Verdict::default(), async |mut all: Verdict, part| {
            all.merge(part);
            Ok(all)
        })
        .await
}

/// Judges by the store itself: a copy of it, or the database that nodes share.
async fn judge_store(log: &Log, args: &CheckArgs) -> Result<Verdict, Failure> {
    let settings =
        SettingsArgs { config: args.config.clone(), data_dir: args.data_dir.clone(), ..SettingsArgs::default() };
    let config = settings.load()?.config;
    let tenant = &args.tenant;
    let tenant = TenantId::new(tenant).map_err(|error| Failure::new(format!("'{tenant}' is no tenant: {error}")))?;
    let fault = |error: store::Error| Failure::of(&error);
    let backend = if args.data_dir.is_some() { Backend::Sqlite } else { config.store.backend };
    // Removed when it was read.
    let mut _copy = None;
    let store: Arc<dyn Store> = match backend {
        Backend::Sqlite => {
            let copy = _copy.insert(Copy::of(&config.node.data_dir).map_err(fault)?);
            SqliteStore::open(&copy.0, &config.store, Clock::System).map_err(fault)?
        }
        Backend::Postgres => {
            let handle = tokio::runtime::Handle::current();
            PostgresStore::open(&config.store, config.cluster.shards, Clock::System, handle).await.map_err(fault)?
        }
        Backend::Memory => {
            return Err(Failure::new("a store in memory is gone with its node: ask the node with --url"));
        }
    };
    let verdict = judge(log, &[Truth::Store(store.clone(), tenant)]).await;
    // Closing waits for threads, or for tasks of this very runtime.
    let _ = tokio::task::spawn_blocking(move || store.close()).await;
    verdict.map_err(|error| Failure::of(&error))
}

/// A copy of a store in a temporary folder, removed with the handle.
struct Copy(PathBuf);

impl Copy {
    fn of(folder: &Path) -> Result<Self, store::Error> {
        let copy = Self(std::env::temp_dir().join(format!("sophont-check-{}", uuid::Uuid::new_v4())));
        sqlite::copy(folder, &copy.0)?;
        Ok(copy)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // What is left is in the system's temporary folder, which is tidied without us.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Puts the lines of the log beside the violations they prove.
fn quote(verdict: &mut Verdict, log: &Log) -> Result<(), log::Error> {
    let places = verdict.examples.iter().flat_map(|violation| &violation.places);
    let mut wanted: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
    for (file, line) in places.filter_map(|place| log.line(*place)) {
        wanted.entry(file).or_default().insert(line);
    }
    let mut texts: BTreeMap<(&str, u64), String> = BTreeMap::new();
    for (file, lines) in wanted {
        let failed = |source| log::Error::Io { file: file.to_owned(), source };
        for (line, text) in (1u64..).zip(open(Path::new(file))?.split(b'\n')) {
            if lines.contains(&line) {
                texts.insert((file, line), String::from_utf8_lossy(&text.map_err(failed)?).into_owned());
            }
        }
    }
    for violation in &mut verdict.examples {
        let lines = violation.places.iter().filter_map(|place| log.line(*place));
        let quoted = lines.map(|at| format!("{}:{}: {}", at.0, at.1, texts.get(&at).map_or("", String::as_str)));
        violation.lines = quoted.collect();
    }
    Ok(())
}

/// The verdict for people.
pub fn table(v: &Verdict) -> String {
    let mut page = format!(
        "{} instances, {} stimuli sent, {} accepted ({} waiting, {} dead letters), {} turns ({} of stimuli not in the log)\n\n",
        v.instances, v.sent, v.acked, v.waiting, v.dead, v.turns, v.foreign
    );
    page.push_str("promise  violation    found\n");
    for breach in Breach::ALL {
        let (promise, name, meaning) = (breach.promise(), breach.name(), breach.meaning());
        page.push_str(&format!("{promise:<8} {name:<11} {:>6}  {meaning}\n", v.count(breach)));
    }
    for violation in &v.examples {
        page.push_str(&format!("\nVIOLATION {}\n", out::plain(&violation.to_string())));
        for line in &violation.lines {
            page.push_str(&format!("  {}\n", out::plain(line)));
        }
    }
    let shown = v.examples.len() as u64;
    match v.violations() {
        0 => page.push_str("\nkept: no violation found\n"),
        all if all > shown => page.push_str(&format!("\nBROKEN: {all} violations, of which {shown} are shown\n")),
        all => page.push_str(&format!("\nBROKEN: {all} violations\n")),
    }
    page
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{
        check::{Stored, Violation},
        log::Sent,
        *,
    };

    #[test]
    fn the_table_names_every_kind_and_quotes_the_log() {
        let mut verdict = Verdict::default();
        let accepted = Sent { id: "a-1".into(), accepted: Some(1), ..Sent::default() };
        verdict.check_instance("lamp", &[accepted], &Stored::default());
        verdict.examples[0].lines.push("log:1: {\u{1b}}".into());
        let page = table(&verdict);
        for breach in Breach::ALL {
            assert!(page.contains(breach.name()) && page.contains(breach.meaning()), "{page}");
        }
        assert!(page.contains("VIOLATION lost at lamp: 'a-1' was accepted"), "{page}");
        assert!(page.contains("  log:1: {}") && page.ends_with("BROKEN: 1 violations\n"), "{page}");
        assert!(table(&Verdict::default()).ends_with("kept: no violation found\n"));
    }

    #[test]
    fn json_tells_the_counts_and_the_examples() {
        let (what, instance, detail) = (Breach::Gaps, String::from("lamp"), String::from("x"));
        let example = Violation { what, instance, detail, places: vec![1], lines: Vec::new() };
        let json = serde_json::to_value(Verdict { gaps: 1, examples: vec![example], ..Verdict::default() }).unwrap();
        assert_eq!((&json["gaps"], &json["examples"][0]["what"]), (&1.into(), &"gaps".into()));
    }
}
