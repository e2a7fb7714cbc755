//! What only the SQLite store has to prove: crashes, a full disk, the lock, versions of files, faults of a commit.
//!
//! The promises it shares with other backends are in `store_contract.rs`.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use sophont::{
    config,
    runtime::clock::Clock,
    store::{
        Done, Error, Feed, Fence, Head, Known, Reader as _, Rejection, Store as _, Unit, Work, Writer as _,
        sqlite::{Options, SqliteStore},
    },
    types::{Fault as _, Millis},
};

use crate::store_contract::{commit, decide, effect, episode, id, key, record, settings, stimulus, turns};

fn open(folder: &Path, options: Options) -> Arc<SqliteStore> {
    SqliteStore::open_with(folder, &settings(), Clock::System, options).unwrap()
}

fn open_error(folder: &Path) -> Error {
    match SqliteStore::open(folder, &settings(), Clock::System) {
        Ok(_) => panic!("it opened"),
        Err(error) => error,
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        // The index of the write-ahead log is shared memory: a crash of the machine loses it.
        if !entry.file_name().to_str().unwrap().ends_with("-shm") {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

#[tokio::test]
async fn a_second_process_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), Options::default());
    let error = open_error(folder.path());
    assert!(matches!(&error, Error::Locked(text) if text.contains(&std::process::id().to_string())), "{error}");
    assert!(error.hint().unwrap().contains("--data-dir"));
    store.close();
    open(folder.path(), Options::default());
}

#[tokio::test]
async fn a_crash_loses_nothing_acknowledged() {
    for generation_turns in [3, 1000] {
        let folder = tempfile::tempdir().unwrap();
        let options = Options { generation_turns, ..Options::default() };
        let store = open(folder.path(), options.clone());
        let mut heads = [Head::default(); 5];
        for round in 0..20 {
            for (number, head) in heads.iter_mut().enumerate() {
                let mut next = record(head.turn + 1, stimulus(Some(&format!("s{round}"))));
                next.episodes = vec![episode(&format!("round {round}"))];
                next.effects = vec![effect(0)];
                *head = turns(&*store, &key(&format!("i{number}")), *head, vec![next]).await.unwrap();
            }
            let copied = tempfile::tempdir().unwrap();
            copy(folder.path(), copied.path());
            if round % 5 != 4 {
                continue;
            }
            let crashed = open(copied.path(), options.clone());
            for (number, head) in heads.iter().enumerate() {
                let key = key(&format!("i{number}"));
                assert_eq!(crashed.load(&key).await.unwrap().head, *head);
                assert_eq!(crashed.turns(&key, 0, 99).await.unwrap().len(), round + 1);
                assert_eq!(crashed.recall(&key, "round", 99).await.unwrap().len(), round + 1);
                let again = decide(&*crashed, &key, *head, &[Some("s0")]).await;
                assert!(matches!(again, Err(Rejection::Duplicate { known: Known::Decided(_), .. })), "{again:?}");
            }
            assert_eq!(crashed.outgoing(&[(Feed(0), 0)], 999).await.unwrap().len(), 5 * (round + 1));
        }
    }
}

#[tokio::test]
async fn a_position_is_never_given_out_twice() {
    let folder = tempfile::tempdir().unwrap();
    let mut last = 0;
    for life in 0..4 {
        let store = open(folder.path(), Options::default());
        let mut next = record(1, stimulus(None));
        next.effects = vec![effect(0)];
        turns(&*store, &key("a"), Head::default(), vec![next]).await.unwrap();
        let position = store.outgoing(&[(Feed(0), 0)], 9).await.unwrap().last().unwrap().position;
        assert!(position > last, "life {life}: {position} after {last}");
        last = position;
        commit(&*store, &key("a"), Work::Forget).await.unwrap();
        store.settle().await.unwrap();
        assert!(store.outgoing(&[(Feed(0), 0)], 9).await.unwrap().is_empty(), "the forgotten turns are removed");
        if life % 2 == 0 {
            store.close();
        }
    }
}

#[tokio::test]
async fn a_closed_store_leaves_one_file_and_nothing_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), Options::default());
    decide(&*store, &key("a"), Head::default(), &[Some("x"), None]).await.unwrap();
    store.close();
    let wal = std::fs::metadata(folder.path().join("sophont.db-wal")).map_or(0, |file| file.len());
    assert_eq!(wal, 0);
    let store = open(folder.path(), Options::default());
    assert_eq!(store.load(&key("a")).await.unwrap().head.turn, 2);
}

#[tokio::test]
async fn a_disk_full_on_demand_acknowledges_nothing_and_passes() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("full");
    let options = Options { disk_full_file: Some(file.clone()), generation_turns: 2, ..Options::default() };
    let store = open(folder.path(), options);
    let head = decide(&*store, &key("a"), Head::default(), &[Some("one")]).await.unwrap();
    std::fs::write(&file, b"").unwrap();
    let end = decide(&*store, &key("a"), head, &[Some("two")]).await;
    assert!(matches!(&end, Err(Rejection::Failed(Error::Full(_)))), "{end:?}");
    assert!(matches!(store.probe(std::time::Duration::from_secs(30)).await, Err(Error::Full(_))));
    assert_eq!(store.load(&key("a")).await.unwrap().head, head, "reads go on, and see what was committed");
    assert_eq!(store.find(&key("a"), &id("two")).await.unwrap(), None);
    std::fs::remove_file(&file).unwrap();
    assert_eq!(decide(&*store, &key("a"), head, &[Some("two")]).await.unwrap().turn, 2);
}

#[tokio::test]
async fn a_full_database_acknowledges_nothing_it_did_not_store_and_goes_on_with_space() {
    let folder = tempfile::tempdir().unwrap();
    let pages = Arc::new(AtomicU32::new(120));
    let options = Options { max_pages: Some(Arc::clone(&pages)), generation_turns: 8, ..Options::default() };
    let store = open(folder.path(), options.clone());
    let (mut head, mut refused) = (Head::default(), 0);
    for number in 0..400 {
        let mut next = record(head.turn + 1, stimulus(Some(&format!("s{number}"))));
        next.stimulus.content = Some("x".repeat(2000));
        match turns(&*store, &key("a"), head, vec![next]).await {
            Ok(after) => head = after,
            Err(Rejection::Failed(Error::Full(_))) => refused += 1,
            Err(other) => panic!("{other:?}"),
        }
        if refused == 20 {
            break;
        }
    }
    assert_eq!(refused, 20, "SQLite itself said that it is full");
    assert!(head.turn > 10);
    let read = store.turns(&key("a"), 0, 1000).await.unwrap();
    assert_eq!(read.len() as u64, head.turn, "all that was acknowledged, nothing else");
    pages.store(100_000, Ordering::Release);
    let after = decide(&*store, &key("a"), head, &[Some("after")]).await.unwrap();
    assert_eq!(after.turn, head.turn + 1);
    store.settle().await.unwrap();
    drop(store);
    let store = open(folder.path(), options);
    assert_eq!(store.load(&key("a")).await.unwrap().head, after);
    assert!(matches!(store.find(&key("a"), &id("s3")).await.unwrap(), Some(Known::Decided(_))));
}

#[tokio::test]
async fn a_newer_schema_and_a_damaged_file_are_told() {
    let folder = tempfile::tempdir().unwrap();
    open(folder.path(), Options::default()).close();
    let db = rusqlite::Connection::open(folder.path().join("sophont.db")).unwrap();
    db.execute("UPDATE refinery_schema_history SET version = 99 WHERE version = 1", []).unwrap();
    drop(db);
    let error = open_error(folder.path());
    assert!(matches!(error, Error::NewerSchema { found: 99, .. }), "{error}");
    assert!(error.to_string().contains("newer build"), "{error}");

    let damaged = tempfile::tempdir().unwrap();
    std::fs::write(damaged.path().join("sophont.db"), "this is no database, whatever its name says".repeat(50))
        .unwrap();
    let error = open_error(damaged.path());
    assert!(matches!(error, Error::Corrupt(_)), "{error}");
}

#[tokio::test]
async fn a_queue_that_is_full_refuses_before_submit_returns() {
    let folder = tempfile::tempdir().unwrap();
    let config = config::Store { max_queue: 1, ..settings() };
    let store = SqliteStore::open(folder.path(), &config, Clock::System).unwrap();
    let mut ends = Vec::new();
    for number in 0..2000 {
        let (done, end) = Done::channel();
        let work = Work::Accept { stimuli: vec![Arc::new(stimulus(None))] };
        store.submit(Unit { key: key(&format!("i{number}")), fence: Fence::default(), work, done });
        ends.push(end);
    }
    let (mut accepted, mut refused) = (0, 0);
    for end in ends {
        match end.await.unwrap() {
            Ok(_) => accepted += 1,
            Err(Rejection::Failed(Error::Overloaded)) => refused += 1,
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!(accepted > 0 && refused > 0, "{accepted} accepted, {refused} refused");
    assert_eq!(store.stats().await.unwrap().inbox, accepted);
}

#[tokio::test]
async fn without_dedupe_a_repeat_is_decided_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), Options { dedupe: false, generation_turns: 2, ..Options::default() });
    let head = decide(&*store, &key("a"), Head::default(), &[Some("x"), Some("x")]).await.unwrap();
    assert_eq!(decide(&*store, &key("a"), head, &[Some("x")]).await.unwrap().turn, 3);
}

#[tokio::test]
async fn ids_expire_by_the_day_and_not_before_the_window_is_over() {
    const HOUR: i64 = 60 * 60 * 1000;
    let folder = tempfile::tempdir().unwrap();
    let clock = Clock::manual(Millis(1000 * 24 * HOUR));
    let store = SqliteStore::open(folder.path(), &settings(), clock.clone()).unwrap();
    let mut first = record(1, stimulus(Some("old")));
    first.decided_at = clock.now();
    let head = turns(&*store, &key("a"), Head::default(), vec![first]).await.unwrap();
    store.settle().await.unwrap();
    clock.advance(47 * HOUR);
    store.settle().await.unwrap();
    let again = decide(&*store, &key("a"), head, &[Some("old")]).await;
    assert!(matches!(again, Err(Rejection::Duplicate { .. })), "{again:?}");
    clock.advance(48 * HOUR);
    store.settle().await.unwrap();
    assert_eq!(store.find(&key("a"), &id("old")).await.unwrap(), None);
    assert_eq!(decide(&*store, &key("a"), head, &[Some("old")]).await.unwrap().turn, 2);
}

#[tokio::test]
async fn a_store_written_by_version_1_opens() {
    let folder = tempfile::tempdir().unwrap();
    let stored = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/store/v1");
    copy(&stored, folder.path());
    let store = open(folder.path(), Options::default());
    let key = key("lamp");
    let loaded = store.load(&key).await.unwrap();
    assert_eq!((loaded.head.turn, loaded.state.version), (20, 20));
    assert_eq!(loaded.profile.unwrap().persona.as_deref(), Some("a lamp"));
    assert_eq!(loaded.inbox.len(), 1);
    assert_eq!(store.dead_letters(&key, None, 9).await.unwrap().len(), 1);
    assert!(matches!(store.find(&key, &id("s7")).await.unwrap(), Some(Known::Decided(record)) if record.turn == 7));
    assert_eq!(store.recall(&key, "bright", 99).await.unwrap().len(), 20);
    assert_eq!(store.turns(&key, 0, 99).await.unwrap().len(), 20);
    assert_eq!(decide(&*store, &key, loaded.head, &[None]).await.unwrap().turn, 21);
}
