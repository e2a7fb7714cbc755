//! What every store does with episodes: turns that changed a memory are found, and what is forgotten is gone everywhere.
//!
//! Not here: recall by the API (`memory.rs`), ranking (`store_contract.rs`).

use bytes::Bytes;
use sophont::{
    runtime::clock::Clock,
    store::{
        Done, Head, Keep, Part, Piece, Store, Work,
        sqlite::{Options, SqliteStore},
    },
    types::{
        Channel, EpisodeId, InstanceKey, RawJson, Source, Stimulus, TurnRecord,
        memory::{ENGINE, Extra, FORGET_CHANNEL, Forgetting, Vector, WRITE_CHANNEL, Writing, Written, read_writing},
    },
};

use crate::{
    store_contract::{
        Subject, commit, episode, key, open_postgres, postgres_settings, record, settings, stimulus, turns,
    },
    support::postgres,
};

fn command(turn: u64, channel: &str, data: RawJson) -> TurnRecord {
    let mut stimulus = Stimulus::empty(Source::Http, Channel::new(channel).unwrap(), Clock::System.now());
    stimulus.data = Some(data);
    TurnRecord { engine: String::from(ENGINE), ..record(turn, stimulus) }
}

/// A turn that remembers these texts, each with a vector.
fn writing(turn: u64, texts: &[&str]) -> TurnRecord {
    let written = |text: &&str| Written {
        content: (*text).into(),
        data: None,
        tags: vec![format!("tag-of-{text}")],
        reward: Some(0.5),
        occurred_at: None,
        extra: Extra { embedding: Vector::of(&[1.0, 2.0, 3.0]), ..Extra::default() },
    };
    remembering(turn, texts.iter().map(written).collect())
}

pub fn remembering(turn: u64, episodes: Vec<Written>) -> TurnRecord {
    let data = RawJson::from_serialize(&Writing { episodes }).unwrap();
    let mut turn = command(turn, WRITE_CHANNEL, data);
    let (drafts, kept) = read_writing(&turn.stimulus).unwrap();
    turn.episodes = drafts;
    turn.stimulus.data = kept;
    turn
}

pub fn forgetting(turn: u64, ids: &[EpisodeId]) -> TurnRecord {
    command(turn, FORGET_CHANNEL, RawJson::from_serialize(&Forgetting::of(ids)).unwrap())
}

/// The numbers of the turns that changed the memory, page by page.
async fn remembered(store: &dyn Store, key: &InstanceKey, page: usize) -> Vec<u64> {
    let mut all = Vec::new();
    loop {
        let found = store.remembered(key, all.last().copied().unwrap_or(0), page).await.unwrap();
        assert!(found.life != 0 && found.turns.len() <= page);
        if found.turns.is_empty() {
            return all;
        }
        all.extend(found.turns.iter().map(|turn| turn.turn));
    }
}

async fn turns_with_episodes_are_found_among_others(mut subject: Subject) {
    let key = key("a");
    let unknown = subject.store.remembered(&key, 0, 9).await.unwrap();
    assert_eq!((unknown.life, unknown.turns.len()), (0, 0));
    assert!(subject.store.turns_at(&key, &[1]).await.unwrap().is_empty());
    let mut head = Head::default();
    for number in 1..=40u64 {
        let mut next = record(number, stimulus(None));
        if number % 3 == 0 {
            next.episodes = vec![episode("one"), episode("two")];
        }
        head = turns(&*subject.store, &key, head, vec![next]).await.unwrap();
        if number == 21 {
            subject.settle().await;
        }
    }
    let expected: Vec<u64> = (1..=40).filter(|number| number % 3 == 0).collect();
    for round in 0..3 {
        for page in [1, 4, 99] {
            assert_eq!(remembered(&*subject.store, &key, page).await, expected, "round {round}");
        }
        let mut found = subject.store.turns_at(&key, &[3, 40, 20, 41, 0]).await.unwrap();
        found.sort_by_key(|turn| turn.turn);
        assert_eq!(found.iter().map(|turn| turn.turn).collect::<Vec<_>>(), [3, 20, 40]);
        match round {
            0 => subject.settle().await,
            _ => subject.reopen(round == 1).await,
        }
    }
}

async fn what_is_forgotten_is_in_no_answer(mut subject: Subject) {
    let key = key("a");
    let mut head =
        turns(&*subject.store, &key, Head::default(), vec![writing(1, &["apples are red", "pears are green"])])
            .await
            .unwrap();
    head = turns(&*subject.store, &key, head, vec![writing(2, &["plums are blue"])]).await.unwrap();
    subject.settle().await;
    head = turns(&*subject.store, &key, head, vec![writing(3, &["figs are purple"])]).await.unwrap();
    let gone = [EpisodeId::new(1, 0), EpisodeId::new(2, 0), EpisodeId::new(3, 0)];
    // One that never was is passed over.
    let never = [gone[0], EpisodeId::new(1, 9), gone[1], gone[2]];
    head = turns(&*subject.store, &key, head, vec![forgetting(4, &never)]).await.unwrap();
    for round in 0..4 {
        let store = &*subject.store;
        for word in ["apples", "plums", "figs", "tag-of-apples"] {
            let found = store.recall(&key, word, 9).await.unwrap();
            assert!(found.iter().all(|e| e.content == "pears are green"), "round {round}, {word}: {found:?}");
        }
        assert_eq!(store.recall(&key, "pears", 9).await.unwrap().len(), 1);
        let found = store.remembered(&key, 0, 9).await.unwrap();
        assert_eq!(found.turns.iter().map(|turn| turn.turn).collect::<Vec<_>>(), [1, 2, 3, 4], "tombstones stay");
        let all = store.turns(&key, 0, 9).await.unwrap();
        for turns in [&found.turns, &all] {
            assert!(turns[0].episodes[0].is_blank() && !turns[0].episodes[1].is_blank());
            assert_eq!(turns[0].extras()[0], Extra::default());
            assert!(turns[0].extras()[1].embedding.is_some());
            assert!(turns[1].episodes[0].is_blank() && turns[1].extras().is_empty());
            assert_eq!(turns[3].forgotten().ids().count(), never.len());
        }
        match round {
            0 => subject.settle().await,
            _ => subject.reopen(round == 1).await,
        }
    }
    // Forgetting again changes nothing, and the instance goes on.
    head = turns(&*subject.store, &key, head, vec![forgetting(5, &gone)]).await.unwrap();
    turns(&*subject.store, &key, head, vec![writing(6, &["apples again"])]).await.unwrap();
    assert_eq!(subject.store.recall(&key, "apples", 9).await.unwrap().len(), 1);
}

async fn a_new_life_remembers_nothing(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    turns(store, &key, Head::default(), vec![writing(1, &["apples are red"])]).await.unwrap();
    let life = store.remembered(&key, 0, 9).await.unwrap().life;
    commit(store, &key, Work::Forget).await.unwrap();
    assert_eq!(store.remembered(&key, 0, 9).await.unwrap().life, 0);
    turns(store, &key, Head::default(), vec![writing(1, &["pears are green"])]).await.unwrap();
    for _ in 0..2 {
        let found = store.remembered(&key, 0, 9).await.unwrap();
        assert_ne!(found.life, life);
        assert_eq!(found.turns.len(), 1);
        assert_eq!(found.turns[0].episodes[0].content, "pears are green");
        subject.settle().await;
    }
}

macro_rules! contract {
    ($($name:ident)*) => {
        mod memory { $(#[tokio::test] async fn $name() { super::$name(super::Subject::memory()).await; })* }
        mod sqlite {
            $(#[tokio::test] async fn $name() { super::$name(super::Subject::sqlite(super::Options::default())).await; })*
        }
        mod sqlite_folding { $(#[tokio::test] async fn $name() { super::$name(super::Subject::folding()).await; })* }
        mod on_postgres { $(#[tokio::test] async fn $name() { super::$name(super::Subject::postgres().await).await; })* }
        mod through_pgbouncer {
            $(#[tokio::test] async fn $name() { super::$name(super::Subject::pgbouncer().await).await; })*
        }
    };
}

contract! {
    turns_with_episodes_are_found_among_others
    what_is_forgotten_is_in_no_answer
    a_new_life_remembers_nothing
}

/// Words of these texts stand nowhere else.
const SECRETS: [&str; 3] = ["xyzzyquux", "plughfrobnitz", "grueblorb"];

/// Remembers secrets with small and large neighbours, folds some of it, and forgets the secrets.
async fn remember_and_forget(store: &dyn Store, settle: impl AsyncFn()) {
    let key = key("a");
    let long = format!("{} {}", SECRETS[1], "plughfrobnitz lies in a long text ".repeat(400));
    let mut head =
        turns(store, &key, Head::default(), vec![writing(1, &[SECRETS[0], "harmless", &long])]).await.unwrap();
    settle().await;
    head = turns(store, &key, head, vec![writing(2, &[SECRETS[2]])]).await.unwrap();
    // A part of the memory with all of it, over several pages, and an index.
    let known = store.spans(&key).await.unwrap();
    let rec = Bytes::from(format!("{}{long}", SECRETS.concat()));
    for piece in [Piece::Part(Part { after: 0, upto: 2, rec: rec.clone() }), Piece::Index(rec)] {
        let (done, end) = Done::channel();
        store.keep(Keep { key: key.clone(), life: known.life, seen: known.head, piece }, done);
        end.await.unwrap().unwrap();
    }
    let kept = store.spans(&key).await.unwrap();
    assert_eq!((kept.spans, kept.index), (vec![(0, 2)], Some(2)));
    let gone = [EpisodeId::new(1, 0), EpisodeId::new(1, 2), EpisodeId::new(2, 0)];
    turns(store, &key, head, vec![forgetting(3, &gone)]).await.unwrap();
}

/// How many of the secrets, and of what was kept, stand in some bytes.
fn count(bytes: &[u8], text: &str) -> usize {
    bytes.windows(text.len()).filter(|window| window.eq_ignore_ascii_case(text.as_bytes())).count()
}

#[tokio::test]
async fn nothing_forgotten_is_left_in_the_files_of_sqlite() {
    for forget in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open_with(folder.path(), &settings(), Clock::System, Options::default()).unwrap();
        if forget {
            remember_and_forget(&*store, async || store.settle().await.unwrap()).await;
        } else {
            turns(&*store, &key("a"), Head::default(), vec![writing(1, &SECRETS)]).await.unwrap();
        }
        store.close();
        drop(store);
        let mut found = 0;
        for file in std::fs::read_dir(folder.path()).unwrap() {
            let bytes = std::fs::read(file.unwrap().path()).unwrap();
            found += SECRETS.iter().map(|secret| count(&bytes, secret)).sum::<usize>();
        }
        assert_eq!(found == 0, forget, "{found} traces; forgotten: {forget}");
    }
}

#[tokio::test]
async fn nothing_forgotten_is_left_in_the_tables_of_postgres() {
    let url = postgres::shared().database().await;
    let store = open_postgres(&postgres_settings(&url)).await;
    remember_and_forget(&*store, async || {}).await;
    let client = postgres::connect(&url).await;
    client.batch_execute("VACUUM (FULL)").await.unwrap();
    let tables = "SELECT quote_ident(relname::text) FROM pg_class
                  WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace";
    let (mut found, mut kept) = (0, 0);
    for table in client.query(tables, &[]).await.unwrap() {
        let rows = client.query(&format!("SELECT t::text FROM {} t", table.get::<_, &str>(0)), &[]).await.unwrap();
        for row in rows {
            let text: &str = row.get(0);
            // Records are shown as hexadecimal digits.
            let hex = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
            let has = |word: &str| count(text.as_bytes(), word) + count(text.as_bytes(), &hex(word));
            found += SECRETS.iter().map(|secret| has(secret)).sum::<usize>();
            kept += has("harmless");
        }
    }
    assert_eq!(found, 0);
    assert!(kept >= 2, "the scan sees records and words: {kept}");
}
