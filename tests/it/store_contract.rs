//! What every store promises, one suite over all backends.
//!
//! Each test takes a [`Subject`] and runs on the memory backend, on SQLite as it comes (what is committed is not folded
//! yet), and on SQLite that folds after every other turn. What only SQLite has (crashes, disk full, files) is in
//! `store_sqlite.rs`; the random histories are in `store_model.rs`.

use std::{collections::BTreeMap, sync::Arc};

use sophont::{
    config,
    runtime::clock::Clock,
    scaling::pool::Limits,
    store::{
        Committed, DeadLetter, Done, Error, Feed, Fence, Head, Known, MqttRow, MqttWrite, Pending, Rejection, Scope,
        Shipping, Snapshot, Store, Unit, Work,
        memory::MemoryStore,
        ownership::{Claim, Joining, Ownership},
        postgres::{Options as PostgresOptions, PostgresStore},
        sqlite::{Options, SqliteStore},
    },
    types::{
        Channel, Effect, EffectKind, EpisodeDraft, InstanceId, InstanceKey, Millis, Outcome, Profile, RawJson, Source,
        StateChange, StateSnapshot, Stimulus, StimulusId, TenantId, TurnRecord,
    },
};

use crate::support::postgres;

/// A store under test, and what it stands on.
pub struct Subject {
    pub store: Arc<dyn Store>,
    ownership: Option<Arc<dyn Ownership>>,
    sqlite: Option<Sqlite>,
    postgres: Option<config::Store>,
}

/// How many shards the stores of several nodes have here.
pub const SHARDS: u32 = 8;

struct Sqlite {
    store: Option<Arc<SqliteStore>>,
    options: Options,
    folder: tempfile::TempDir,
}

pub fn settings() -> config::Store {
    config::Store {
        backend: config::Backend::Sqlite,
        // What is tested here does not depend on the disk's cache.
        durability: config::Durability::Normal,
        max_batch: 64,
        max_queue: 4096,
        readers: 2,
        cache_mb: 4,
        slow_query_ms: 0,
        postgres: config::Config::default().store.postgres,
    }
}

/// As [`settings`], for a database of PostgreSQL.
pub fn postgres_settings(url: &str) -> config::Store {
    let mut config = settings();
    config.backend = config::Backend::Postgres;
    config.durability = config::Durability::Full;
    config.postgres.url = url.into();
    config.postgres.lanes = 2;
    config
}

/// So many connections for reads and no more.
pub fn pool(size: usize) -> Limits {
    Limits { size, overflow: 0, ..Limits::default() }
}

pub async fn open_postgres(config: &config::Store) -> Arc<PostgresStore> {
    open_postgres_with(config, PostgresOptions { pool: pool(4), ..PostgresOptions::default() }).await
}

pub async fn open_postgres_with(config: &config::Store, options: PostgresOptions) -> Arc<PostgresStore> {
    let (config, runtime) = (config.clone(), postgres::runtime());
    let opening = runtime
        .clone()
        .spawn(async move { PostgresStore::open_with(&config, SHARDS, Clock::System, runtime, options).await });
    opening.await.unwrap().unwrap()
}

impl Subject {
    pub fn memory() -> Self {
        let memory = MemoryStore::shared(true, 65_536, SHARDS, Clock::System);
        Self { store: Arc::new(memory.clone()), ownership: Some(Arc::new(memory)), sqlite: None, postgres: None }
    }

    pub fn sqlite(options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open_with(folder.path(), &settings(), Clock::System, options.clone()).unwrap();
        Self {
            store: store.clone(),
            ownership: None,
            sqlite: Some(Sqlite { store: Some(store), options, folder }),
            postgres: None,
        }
    }

    /// Gives a shard another epoch, as another owner would; false where fences are not looked at.
    pub async fn set_epoch(&self, shard: u32, epoch: u64) -> bool {
        let Some(ownership) = &self.ownership else { return false };
        let joining = Joining { shards: SHARDS, ..crate::ownership_contract::joining("owner") };
        ownership.join(&joining).await.unwrap();
        for before in 0..epoch {
            let taken = ownership.take(&joining.node, &[Claim { shard, epoch: before }]).await.unwrap();
            ownership.release(&joining.node, &taken).await.unwrap();
        }
        true
    }

    pub fn folding() -> Self {
        Self::sqlite(Options { generation_turns: 2, ..Options::default() })
    }

    pub async fn postgres() -> Self {
        Self::postgres_at(postgres_settings(&postgres::shared().database().await)).await
    }

    /// PostgreSQL behind a pooler that gives each transaction another of three sessions.
    pub async fn pgbouncer() -> Self {
        let direct = postgres::shared().database().await;
        let mut config = postgres_settings(&postgres::pooler().await.url(&direct));
        config.postgres.direct_url = direct;
        config.postgres.pooler = true;
        Self::postgres_at(config).await
    }

    pub async fn postgres_at(config: config::Store) -> Self {
        let store = open_postgres(&config).await;
        Self { store: store.clone(), ownership: Some(store), sqlite: None, postgres: Some(config) }
    }

    /// Folds what is committed, where there is folding.
    pub async fn settle(&self) {
        if let Some(store) = self.sqlite.as_ref().and_then(|sqlite| sqlite.store.as_ref()) {
            store.settle().await.unwrap();
        }
    }

    /// Where its file lies.
    pub fn folder(&self) -> Option<&std::path::Path> {
        self.sqlite.as_ref().map(|sqlite| sqlite.folder.path())
    }

    /// The address of its database, without a pooler between.
    pub fn url(&self) -> Option<String> {
        let postgres = &self.postgres.as_ref()?.postgres;
        let direct = Some(postgres.direct_url.clone()).filter(|url| !url.is_empty());
        direct.or_else(|| Some(postgres.url.clone()))
    }

    /// Whether it can be opened again.
    pub fn is_durable(&self) -> bool {
        self.sqlite.is_some() || self.postgres.is_some()
    }

    /// Opens it again, after closing it or after dropping it as a crash would, where it can be.
    pub async fn reopen(&mut self, crash: bool) {
        if let Some(config) = &self.postgres {
            if !crash {
                self.store.close();
            }
            self.store = Arc::new(MemoryStore::new());
            self.ownership = None;
            let store = open_postgres(config).await;
            self.store = store.clone();
            self.ownership = Some(store);
            return;
        }
        let Some(sqlite) = &mut self.sqlite else { return };
        let old = sqlite.store.take().unwrap();
        if !crash {
            old.close();
        }
        self.store = Arc::new(MemoryStore::new());
        assert_eq!(Arc::strong_count(&old), 1, "nobody else holds the store");
        drop(old);
        let store =
            SqliteStore::open_with(sqlite.folder.path(), &settings(), Clock::System, sqlite.options.clone()).unwrap();
        self.store = store.clone();
        sqlite.store = Some(store);
    }
}

pub fn key(instance: &str) -> InstanceKey {
    key_of("default", instance)
}

pub fn key_of(tenant: &str, instance: &str) -> InstanceKey {
    InstanceKey::new(TenantId::new(tenant).unwrap(), InstanceId::new(instance).unwrap())
}

pub fn id(text: &str) -> StimulusId {
    StimulusId::new(text).unwrap()
}

/// A stimulus with an id that its sender chose, or a generated one.
pub fn stimulus(chosen: Option<&str>) -> Stimulus {
    let plain = Stimulus::text(Source::Http, Channel::new("chat").unwrap(), "hello", Clock::System.now());
    match chosen {
        Some(chosen) => plain.with_repeatable_id(id(chosen)),
        None => plain,
    }
}

pub fn record(turn: u64, stimulus: Stimulus) -> TurnRecord {
    TurnRecord {
        turn,
        version: turn,
        stimulus,
        outcome: Outcome::Silent,
        reply: None,
        effects: Vec::new(),
        state: StateChange::Patch(RawJson::parse(&format!(r#"{{"reported":{{"n":{turn}}}}}"#)).unwrap()),
        episodes: Vec::new(),
        steps: 0,
        engine: String::from("reflex"),
        model: None,
        usage: None,
        error: None,
        decided_at: Clock::System.now(),
        epoch: 0,
    }
}

pub fn episode(content: &str) -> EpisodeDraft {
    EpisodeDraft { content: content.into(), data: None, tags: Vec::new(), reward: None, occurred_at: None }
}

pub fn effect(index: u32) -> Effect {
    Effect { index, kind: EffectKind::Reply { to: None } }
}

pub async fn commit(store: &dyn Store, key: &InstanceKey, work: Work) -> Result<Committed, Rejection> {
    commit_under(store, fence(key), key, work).await
}

async fn commit_under(store: &dyn Store, fence: Fence, key: &InstanceKey, work: Work) -> Result<Committed, Rejection> {
    let (done, end) = Done::channel();
    store.submit(Unit { key: key.clone(), fence, work, done });
    end.await.unwrap()
}

/// The first owner's fence.
pub fn fence(key: &InstanceKey) -> Fence {
    Fence { shard: key.shard(SHARDS), epoch: 0, lodged: 0 }
}

/// Commits turns after a head.
pub async fn turns(
    store: &dyn Store,
    key: &InstanceKey,
    head: Head,
    turns: Vec<TurnRecord>,
) -> Result<Head, Rejection> {
    let turns = turns.into_iter().map(Arc::new).collect();
    Ok(commit(store, key, Work::Turns { head, turns }).await?.head)
}

/// Commits one plain turn per id after a head.
pub async fn decide(store: &dyn Store, key: &InstanceKey, head: Head, ids: &[Option<&str>]) -> Result<Head, Rejection> {
    let mut records = Vec::new();
    for (number, chosen) in (head.turn + 1..).zip(ids) {
        records.push(record(number, stimulus(*chosen)));
    }
    turns(store, key, head, records).await
}

async fn accept(store: &dyn Store, key: &InstanceKey, stimuli: &[Stimulus]) -> Result<Committed, Rejection> {
    let stimuli = stimuli.iter().cloned().map(Arc::new).collect();
    commit(store, key, Work::Accept { stimuli }).await
}

async fn bury(store: &dyn Store, key: &InstanceKey, stimulus: &Stimulus) {
    let work = Work::Bury {
        stimulus: Arc::new(stimulus.clone()),
        reason: String::from("poison"),
        tries: 3,
        at: Clock::System.now(),
    };
    commit(store, key, work).await.unwrap();
}

fn duplicate(end: Result<impl std::fmt::Debug, Rejection>) -> (usize, Known) {
    match end {
        Err(Rejection::Duplicate { index, known }) => (index, known),
        other => panic!("no duplicate: {other:?}"),
    }
}

fn names(stimuli: &[Arc<Stimulus>]) -> Vec<&str> {
    stimuli.iter().map(|stimulus| stimulus.id.as_str()).collect()
}

macro_rules! contract {
    ($($name:ident)*) => {
        mod memory {
            $(#[tokio::test] async fn $name() { super::$name(super::Subject::memory()).await; })*
        }
        mod sqlite {
            $(#[tokio::test] async fn $name() { super::$name(super::Subject::sqlite(super::Options::default())).await; })*
        }
        mod sqlite_folding {
            $(#[tokio::test] async fn $name() { super::$name(super::Subject::folding()).await; })*
        }
        mod on_postgres {
            $(#[tokio::test] async fn $name() { super::$name(super::Subject::postgres().await).await; })*
        }
        mod through_pgbouncer {
            $(#[tokio::test] async fn $name() { super::$name(super::Subject::pgbouncer().await).await; })*
        }
    };
}

contract! {
    an_unknown_instance_is_empty
    turns_are_read_back_in_order
    a_unit_is_whole_or_not_at_all
    a_stale_head_is_refused
    units_are_applied_in_the_order_of_submission
    a_repeated_id_is_refused_with_its_first_result
    a_repeat_in_one_unit_is_refused
    a_repeat_of_a_waiting_or_dead_one_is_refused
    the_same_id_may_come_to_another_instance
    the_slow_path_ends_in_a_turn
    a_dead_letter_is_listed_and_revived
    a_profile_makes_or_changes_an_instance
    a_forgotten_instance_begins_again
    a_long_instance_is_forgotten_wholly
    long_histories_are_read_in_pages
    the_state_is_that_of_the_last_turn
    a_snapshot_counts_only_while_the_history_ends_there
    a_generated_id_is_found_by_its_time
    ids_are_found_by_prefix
    ids_are_located_within_the_tenant
    instances_are_listed_by_page_and_label
    waiting_instances_are_listed_once
    recall_ranks_what_was_committed
    recall_is_the_instances_own
    effects_leave_in_commit_order
    pending_effects_come_due
    what_a_former_owner_ships_is_left_out
    mqtt_rows_are_kept
    tenants_are_walls
    figures_count_what_is_there
    a_probe_writes_and_reads
    a_closed_store_refuses
    a_stale_fence_is_refused_alone
    what_was_lodged_comes_first
    what_was_lodged_itself_does_not_overtake
    a_lodged_repeat_is_refused
    a_scope_names_what_is_asked_for
    each_feed_is_in_order
}

async fn an_unknown_instance_is_empty(subject: Subject) {
    let (store, key) = (&*subject.store, key("nobody"));
    let loaded = store.load(&key).await.unwrap();
    assert!(!loaded.exists && loaded.profile.is_none() && loaded.inbox.is_empty());
    assert_eq!((loaded.head, loaded.state.version), (Head::default(), 0));
    assert_eq!(store.state(&key).await.unwrap(), None);
    assert!(store.turns(&key, 0, 10).await.unwrap().is_empty());
    assert_eq!(store.find(&key, &id("x")).await.unwrap(), None);
    assert_eq!(store.find(&key, &StimulusId::generate()).await.unwrap(), None);
    assert!(store.recall(&key, "anything", 5).await.unwrap().is_empty());
    assert_eq!(commit(store, &key, Work::Forget).await.unwrap().head, Head::default());
    assert!(!store.load(&key).await.unwrap().exists);
}

async fn turns_are_read_back_in_order(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let mut whole = record(1, stimulus(Some("one")));
    whole.effects = vec![effect(0)];
    whole.episodes = vec![episode("first")];
    whole.reply = Some(sophont::types::Reply { content: Some(String::from("hi")), data: None });
    let head = turns(store, &key, Head::default(), vec![whole.clone(), record(2, stimulus(None))]).await.unwrap();
    assert_eq!(head.turn, 2);
    let head = decide(store, &key, head, &[None]).await.unwrap();
    for _ in 0..2 {
        let read = store.turns(&key, 0, 10).await.unwrap();
        assert_eq!(read.iter().map(|t| t.turn).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(*read[0], whole);
        assert_eq!(store.turns(&key, 1, 1).await.unwrap()[0].turn, 2);
        assert!(store.turns(&key, 3, 10).await.unwrap().is_empty());
        let loaded = store.load(&key).await.unwrap();
        assert!(loaded.exists && loaded.inbox.is_empty());
        assert_eq!((loaded.head, loaded.turns_since_full), (head, 3));
        subject.settle().await;
    }
}

async fn a_unit_is_whole_or_not_at_all(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let head = decide(store, &key, Head::default(), &[Some("one")]).await.unwrap();
    let (index, _) = duplicate(decide(store, &key, head, &[Some("two"), Some("three"), Some("one")]).await);
    assert_eq!(index, 2);
    let gap = turns(store, &key, head, vec![record(2, stimulus(None)), record(4, stimulus(None))]).await;
    assert!(matches!(gap, Err(Rejection::Failed(Error::Backend(_)))), "{gap:?}");
    let empty = turns(store, &key, head, Vec::new()).await;
    assert!(matches!(empty, Err(Rejection::Failed(Error::Backend(_)))), "{empty:?}");
    let loaded = store.load(&key).await.unwrap();
    assert_eq!(loaded.head, head);
    assert_eq!(store.find(&key, &id("two")).await.unwrap(), None);
    // Rejected alone: a neighbour in the same commit is not touched.
    let other = key_of("default", "b");
    let (bad, good) = tokio::join!(
        decide(store, &key, head, &[Some("four"), Some("one")]),
        decide(store, &other, Head::default(), &[Some("one")])
    );
    assert_eq!(duplicate(bad).0, 1);
    assert_eq!(good.unwrap().turn, 1);
}

async fn a_stale_head_is_refused(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let first = decide(store, &key, Head::default(), &[None]).await.unwrap();
    let second = decide(store, &key, first, &[None]).await.unwrap();
    for stale in [Head::default(), first] {
        let end = decide(store, &key, stale, &[None]).await;
        // A folded head of a later turn is trusted, but a first turn never overwrites a history.
        if stale == Head::default() || subject.sqlite.as_ref().is_none_or(|s| s.options.generation_turns > 2) {
            assert!(matches!(end, Err(Rejection::Failed(Error::Backend(_)))), "{end:?}");
        }
        if end.is_ok() {
            return;
        }
    }
    assert_eq!(store.load(&key).await.unwrap().head, second);
}

async fn units_are_applied_in_the_order_of_submission(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let mut ends = Vec::new();
    for number in 0..50 {
        let (done, end) = Done::channel();
        let work = Work::Accept { stimuli: vec![Arc::new(stimulus(Some(&format!("s{number}"))))] };
        store.submit(Unit { key: key.clone(), fence: fence(&key), work, done });
        ends.push(end);
    }
    for end in ends {
        end.await.unwrap().unwrap();
    }
    let expected: Vec<String> = (0..50).map(|number| format!("s{number}")).collect();
    assert_eq!(names(&store.load(&key).await.unwrap().inbox), expected);
}

async fn a_repeated_id_is_refused_with_its_first_result(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let head = decide(store, &key, Head::default(), &[Some("one"), Some("two")]).await.unwrap();
    for _ in 0..2 {
        let (index, known) = duplicate(decide(store, &key, head, &[None, Some("one")]).await);
        assert_eq!(index, 1);
        assert!(matches!(known, Known::Decided(record) if record.turn == 1 && record.stimulus.id == id("one")));
        let (index, known) = duplicate(accept(store, &key, &[stimulus(Some("two"))]).await);
        assert_eq!(index, 0);
        assert!(matches!(known, Known::Decided(record) if record.turn == 2));
        assert!(matches!(store.find(&key, &id("two")).await.unwrap(), Some(Known::Decided(r)) if r.turn == 2));
        subject.settle().await;
    }
    assert_eq!(store.load(&key).await.unwrap().head, head);
}

async fn a_repeat_in_one_unit_is_refused(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let (index, known) = duplicate(decide(store, &key, Head::default(), &[Some("x"), None, Some("x")]).await);
    assert_eq!(index, 2);
    assert!(matches!(known, Known::Decided(record) if record.turn == 1));
    let (index, known) = duplicate(accept(store, &key, &[stimulus(Some("x")), stimulus(Some("x"))]).await);
    assert_eq!(index, 1);
    assert!(matches!(known, Known::Waiting(first) if first.id == id("x")));
    assert!(!store.load(&key).await.unwrap().exists);
    // Two units of one commit, one after the other.
    let again = [stimulus(Some("y"))];
    let (first, second) = tokio::join!(decide(store, &key, Head::default(), &[Some("y")]), accept(store, &key, &again));
    first.unwrap();
    assert!(matches!(duplicate(second).1, Known::Decided(record) if record.turn == 1));
}

async fn a_repeat_of_a_waiting_or_dead_one_is_refused(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    accept(store, &key, &[stimulus(Some("waits"))]).await.unwrap();
    let (_, known) = duplicate(accept(store, &key, &[stimulus(None), stimulus(Some("waits"))]).await);
    assert!(matches!(known, Known::Waiting(waiting) if waiting.id == id("waits")));
    bury(store, &key, &stimulus(Some("dead"))).await;
    let (_, known) = duplicate(accept(store, &key, &[stimulus(Some("dead"))]).await);
    assert!(matches!(known, Known::Dead(letter) if letter.stimulus.id == id("dead") && letter.tries == 3));
    let (_, known) = duplicate(decide(store, &key, Head::default(), &[Some("dead")]).await);
    assert!(matches!(known, Known::Dead(_)));
    assert_eq!(names(&store.load(&key).await.unwrap().inbox), ["waits"]);
}

async fn the_same_id_may_come_to_another_instance(subject: Subject) {
    let store = &*subject.store;
    for key in [key("a"), key("b"), key_of("other", "a")] {
        assert_eq!(decide(store, &key, Head::default(), &[Some("one")]).await.unwrap().turn, 1);
        subject.settle().await;
    }
}

async fn the_slow_path_ends_in_a_turn(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let (chosen, generated) = (stimulus(Some("one")), stimulus(None));
    let end = accept(store, &key, &[chosen.clone(), generated.clone()]).await.unwrap();
    assert_eq!(end.head, Head::default());
    let loaded = store.load(&key).await.unwrap();
    assert!(loaded.exists);
    assert_eq!(loaded.inbox.iter().map(|s| (**s).clone()).collect::<Vec<_>>(), [chosen.clone(), generated.clone()]);
    assert!(matches!(store.find(&key, &generated.id).await.unwrap(), Some(Known::Waiting(_))));
    // Decided out of order; what waited leaves the inbox with its turn.
    let head = turns(store, &key, Head::default(), vec![record(1, generated.clone())]).await.unwrap();
    assert_eq!(names(&store.load(&key).await.unwrap().inbox), ["one"]);
    let head = turns(store, &key, head, vec![record(2, chosen)]).await.unwrap();
    for _ in 0..2 {
        assert!(store.load(&key).await.unwrap().inbox.is_empty());
        assert!(matches!(store.find(&key, &generated.id).await.unwrap(), Some(Known::Decided(r)) if r.turn == 1));
        assert!(matches!(duplicate(decide(store, &key, head, &[Some("one")]).await).1, Known::Decided(_)));
        subject.settle().await;
    }
}

async fn a_dead_letter_is_listed_and_revived(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let all: Vec<Stimulus> = ["one", "two", "three"].iter().map(|name| stimulus(Some(name))).collect();
    accept(store, &key, &all).await.unwrap();
    for stimulus in &all {
        bury(store, &key, stimulus).await;
    }
    let letters = |dead: Vec<DeadLetter>| dead.into_iter().map(|l| l.stimulus.id).collect::<Vec<_>>();
    assert!(store.load(&key).await.unwrap().inbox.is_empty());
    assert_eq!(letters(store.dead_letters(&key, None, 2).await.unwrap()), [id("one"), id("two")]);
    assert_eq!(letters(store.dead_letters(&key, Some(&id("two")), 2).await.unwrap()), [id("three")]);
    assert!(matches!(store.find(&key, &id("two")).await.unwrap(), Some(Known::Dead(l)) if l.reason == "poison"));
    commit(store, &key, Work::Revive { stimulus: id("two") }).await.unwrap();
    assert_eq!(names(&store.load(&key).await.unwrap().inbox), ["two"]);
    assert_eq!(letters(store.dead_letters(&key, None, 9).await.unwrap()), [id("one"), id("three")]);
    for stimulus in ["two", "never"] {
        let end = commit(store, &key, Work::Revive { stimulus: id(stimulus) }).await;
        assert!(matches!(end, Err(Rejection::NotFound)), "{end:?}");
    }
    // Given up twice is there once, at the end.
    bury(store, &key, &all[0]).await;
    assert_eq!(letters(store.dead_letters(&key, None, 9).await.unwrap()), [id("three"), id("one")]);
}

async fn a_profile_makes_or_changes_an_instance(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let put = |persona: &str| Work::PutProfile {
        profile: Arc::new(Profile { persona: Some(persona.into()), ..Profile::default() }),
        at: Millis(77),
    };
    assert!(commit(store, &key, put("calm")).await.unwrap().created);
    let head = decide(store, &key, Head::default(), &[None]).await.unwrap();
    let end = commit(store, &key, put("brisk")).await.unwrap();
    assert_eq!((end.created, end.head), (false, head));
    let loaded = store.load(&key).await.unwrap();
    assert_eq!(loaded.profile.unwrap().persona.as_deref(), Some("brisk"));
    assert_eq!((loaded.created_at, loaded.head), (Some(Millis(77)), head));
    // One that stimuli made gets its profile later.
    let other = key_of("default", "b");
    accept(store, &other, &[stimulus(None)]).await.unwrap();
    assert!(store.load(&other).await.unwrap().profile.is_none());
    assert!(!commit(store, &other, put("late")).await.unwrap().created);
    assert_eq!(store.load(&other).await.unwrap().profile.unwrap().persona.as_deref(), Some("late"));
}

async fn a_forgotten_instance_begins_again(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    for life in 0..3 {
        let mut first = record(1, stimulus(Some("one")));
        first.episodes = vec![episode(&format!("life {life} begins"))];
        let head = turns(store, &key, Head::default(), vec![first]).await.unwrap();
        if life == 1 {
            subject.settle().await;
        }
        decide(store, &key, head, &[Some("two"), None]).await.unwrap();
        accept(store, &key, &[stimulus(Some("waits"))]).await.unwrap();
        bury(store, &key, &stimulus(Some("dead"))).await;
        let remembered = store.recall(&key, "begins", 9).await.unwrap();
        assert_eq!(remembered.iter().map(|e| e.content.clone()).collect::<Vec<_>>(), [format!("life {life} begins")]);
        assert_eq!(commit(store, &key, Work::Forget).await.unwrap().head, Head::default());
        let loaded = store.load(&key).await.unwrap();
        assert!(!loaded.exists && loaded.inbox.is_empty());
        assert_eq!(loaded.head, Head::default());
        for name in ["one", "two", "waits", "dead"] {
            assert_eq!(store.find(&key, &id(name)).await.unwrap(), None, "{name}");
            assert!(store.locate(&key.tenant, &id(name)).await.unwrap().is_empty(), "{name}");
        }
        assert_eq!(store.find_prefix(&key, "t").await.unwrap(), None);
        assert!(store.recall(&key, "begins", 9).await.unwrap().is_empty());
        assert!(store.turns(&key, 0, 9).await.unwrap().is_empty());
        assert!(store.dead_letters(&key, None, 9).await.unwrap().is_empty());
        assert!(store.list(&key.tenant, None, None, 9).await.unwrap().is_empty());
        assert!(store.waiting(&Scope::all(), None, 9).await.unwrap().is_empty());
        if life == 0 {
            subject.settle().await;
        }
    }
    // The ids of the new life are remembered though the old one's are still being removed.
    let head = decide(store, &key, Head::default(), &[Some("one")]).await.unwrap();
    subject.settle().await;
    assert!(matches!(duplicate(decide(store, &key, head, &[Some("one")]).await).1, Known::Decided(r) if r.turn == 1));
}

async fn a_long_instance_is_forgotten_wholly(subject: Subject) {
    let (store, long, other) = (&*subject.store, key("long"), key_of("default", "other"));
    let mut head = Head::default();
    let mut kept = Head::default();
    for round in 0..40 {
        let name = format!("r{round}");
        head = decide(store, &long, head, &[Some(name.as_str()), None, None]).await.unwrap();
        kept = decide(store, &other, kept, &[Some(name.as_str())]).await.unwrap();
    }
    commit(store, &long, Work::Forget).await.unwrap();
    decide(store, &long, Head::default(), &[Some("r7")]).await.unwrap();
    for _ in 0..2 {
        assert_eq!(store.turns(&long, 0, 500).await.unwrap().len(), 1);
        assert_eq!(store.turns(&other, 0, 500).await.unwrap().len(), 40);
        assert_eq!(store.find(&long, &id("r8")).await.unwrap(), None);
        assert!(matches!(store.find(&long, &id("r7")).await.unwrap(), Some(Known::Decided(r)) if r.turn == 1));
        assert!(matches!(store.find(&other, &id("r8")).await.unwrap(), Some(Known::Decided(r)) if r.turn == 9));
        subject.settle().await;
    }
}

async fn long_histories_are_read_in_pages(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let mut head = Head::default();
    const TURNS: u64 = 8300; // beyond two coarse links
    while head.turn < TURNS {
        head = decide(store, &key, head, &[None; 50]).await.unwrap();
    }
    for after in [0, 1, 15, 255, 4090, 4095, 4096, 8191, 8299] {
        let read = store.turns(&key, after, 7).await.unwrap();
        let expected: Vec<u64> = (after + 1..=TURNS).take(7).collect();
        assert_eq!(read.iter().map(|t| t.turn).collect::<Vec<_>>(), expected);
    }
    assert!(store.turns(&key, TURNS, 7).await.unwrap().is_empty());
    let middle = store.turns(&key, 4999, 1).await.unwrap()[0].clone();
    let found = store.find(&key, &middle.stimulus.id).await.unwrap();
    assert!(matches!(found, Some(Known::Decided(r)) if r.turn == 5000));
}

async fn the_state_is_that_of_the_last_turn(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let mut head = Head::default();
    for number in 1..=40u64 {
        let mut next = record(number, stimulus(None));
        if number % 16 == 0 {
            let whole = format!(r#"{{"desired":{{"w":{number}}},"reported":{{"n":{number}}}}}"#);
            next.state = StateChange::Full(RawJson::parse(&whole).unwrap());
        }
        if number % 5 == 0 {
            next.state = StateChange::None;
        }
        head = turns(store, &key, head, vec![next]).await.unwrap();
    }
    let loaded = store.load(&key).await.unwrap();
    assert_eq!(loaded.state.doc.get(), r#"{"desired":{"w":32},"reported":{"n":39}}"#);
    assert_eq!((loaded.state.version, loaded.state.turn, loaded.turns_since_full), (40, 40, 8));
    assert_eq!(store.state(&key).await.unwrap(), Some(loaded.state));
}

async fn a_snapshot_counts_only_while_the_history_ends_there(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let head = decide(store, &key, Head::default(), &[None; 5]).await.unwrap();
    assert_eq!(store.load(&key).await.unwrap().head, head);
    // One that could not have been made of these turns shows whether it was used.
    let marked = r#"{"marked":true}"#;
    let state = StateSnapshot::new(5, 5, RawJson::parse(marked).unwrap());
    let snapshot = Arc::new(Snapshot { head, state, turns_since_full: 2 });
    let with = async || store.load_with(&key, snapshot.clone()).await.unwrap();
    let in_memory = subject.sqlite.is_none() && subject.postgres.is_none();
    for _ in 0..2 {
        let loaded = with().await;
        assert!(loaded.exists && loaded.head == head);
        assert_eq!((loaded.state.doc.get() == marked, loaded.turns_since_full == 2), (!in_memory, !in_memory));
        subject.settle().await;
    }
    let head = decide(store, &key, head, &[None]).await.unwrap();
    let (loaded, plain) = (with().await, store.load(&key).await.unwrap());
    assert_eq!((loaded.head, &loaded.state, loaded.turns_since_full), (head, &plain.state, plain.turns_since_full));
    assert!(loaded.state.doc.get().contains(r#""n":6"#), "{:?}", loaded.state);
    // Another life with as many turns is another history.
    commit(store, &key, Work::Forget).await.unwrap();
    assert!(!with().await.exists);
    decide(store, &key, Head::default(), &[None; 5]).await.unwrap();
    let loaded = with().await;
    assert!(loaded.state.doc.get().contains(r#""n":5"#), "{:?}", loaded.state);
}

async fn a_generated_id_is_found_by_its_time(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let mut head = Head::default();
    let mut ids = Vec::new();
    for _ in 0..30 {
        let next: Vec<TurnRecord> = (head.turn + 1..head.turn + 11).map(|n| record(n, stimulus(None))).collect();
        ids.extend(next.iter().map(|record| (record.turn, record.stimulus.id.clone())));
        head = turns(store, &key, head, next).await.unwrap();
    }
    subject.settle().await;
    for (turn, id) in ids.iter().step_by(23) {
        let found = store.find(&key, id).await.unwrap();
        assert!(matches!(&found, Some(Known::Decided(record)) if record.turn == *turn), "{turn}: {found:?}");
    }
    assert_eq!(store.find(&key, &StimulusId::generate()).await.unwrap(), None);
}

async fn ids_are_found_by_prefix(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let head = decide(store, &key, Head::default(), &[Some("m.7.1"), Some("m.7.2"), Some("m.70.1")]).await.unwrap();
    decide(store, &key_of("default", "b"), Head::default(), &[Some("m.7.3")]).await.unwrap();
    for _ in 0..2 {
        let found = store.find_prefix(&key, "m.7.").await.unwrap();
        assert!(matches!(&found, Some(Known::Decided(record)) if record.turn == 2), "{found:?}");
        assert!(matches!(store.find_prefix(&key, "m.").await.unwrap(), Some(Known::Decided(r)) if r.turn == 3));
        assert_eq!(store.find_prefix(&key, "m.8.").await.unwrap(), None);
        subject.settle().await;
    }
    decide(store, &key, head, &[Some("m.7.0")]).await.unwrap();
    assert!(matches!(store.find_prefix(&key, "m.7.").await.unwrap(), Some(Known::Decided(r)) if r.turn == 4));
}

async fn ids_are_located_within_the_tenant(subject: Subject) {
    let store = &*subject.store;
    decide(store, &key("decided"), Head::default(), &[Some("x")]).await.unwrap();
    accept(store, &key("waiting"), &[stimulus(Some("x"))]).await.unwrap();
    bury(store, &key("buried"), &stimulus(Some("x"))).await;
    decide(store, &key_of("other", "z"), Head::default(), &[Some("x")]).await.unwrap();
    for _ in 0..2 {
        let found = store.locate(&key("a").tenant, &id("x")).await.unwrap();
        assert_eq!(found.iter().map(InstanceId::as_str).collect::<Vec<_>>(), ["buried", "decided", "waiting"]);
        assert!(store.locate(&key("a").tenant, &id("y")).await.unwrap().is_empty());
        subject.settle().await;
    }
    for number in 0..12 {
        decide(store, &key(&format!("many-{number}")), Head::default(), &[Some("m")]).await.unwrap();
    }
    assert_eq!(store.locate(&key("a").tenant, &id("m")).await.unwrap().len(), 10);
}

async fn instances_are_listed_by_page_and_label(subject: Subject) {
    let store = &*subject.store;
    let labelled = |value: &str| {
        let labels = BTreeMap::from([(String::from("floor"), String::from(value))]);
        Work::PutProfile { profile: Arc::new(Profile { labels, ..Profile::default() }), at: Millis(5) }
    };
    for name in ["d", "b"] {
        commit(store, &key(name), labelled("1")).await.unwrap();
    }
    commit(store, &key("c"), labelled("2")).await.unwrap();
    decide(store, &key("a"), Head::default(), &[None]).await.unwrap();
    accept(store, &key("e"), &[stimulus(None)]).await.unwrap();
    decide(store, &key_of("a-tenant-before", "x"), Head::default(), &[None]).await.unwrap();
    decide(store, &key_of("z-tenant-after", "y"), Head::default(), &[None]).await.unwrap();
    let tenant = key("a").tenant;
    let list = async |label, after: Option<&str>, limit| {
        let after = after.map(|after| InstanceId::new(after).unwrap());
        let listed = store.list(&tenant, label, after.as_ref(), limit).await.unwrap();
        listed.iter().map(|l| l.instance.as_str().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(list(None, None, 9).await, ["a", "b", "c", "d", "e"]);
    assert_eq!(list(None, Some("b"), 2).await, ["c", "d"]);
    assert_eq!(list(Some(("floor", "1")), None, 9).await, ["b", "d"]);
    assert_eq!(list(Some(("floor", "1")), Some("b"), 9).await, ["d"]);
    assert!(list(Some(("wing", "1")), None, 9).await.is_empty());
    assert!(list(None, Some("e"), 9).await.is_empty());
}

async fn waiting_instances_are_listed_once(subject: Subject) {
    let store = &*subject.store;
    for name in ["c", "a", "b"] {
        accept(store, &key(name), &[stimulus(None), stimulus(None)]).await.unwrap();
    }
    accept(store, &key_of("another", "z"), &[stimulus(None)]).await.unwrap();
    decide(store, &key("idle"), Head::default(), &[None]).await.unwrap();
    let all = store.waiting(&Scope::all(), None, 9).await.unwrap();
    assert_eq!(all, [key_of("another", "z"), key("a"), key("b"), key("c")]);
    assert_eq!(store.waiting(&Scope::all(), Some(&key("a")), 1).await.unwrap(), [key("b")]);
    assert!(store.waiting(&Scope::all(), Some(&key("c")), 9).await.unwrap().is_empty());
}

async fn recall_ranks_what_was_committed(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let texts = ["the lamp is on", "the fan is on", "the fan is off and the lamp is off", "nothing of note"];
    let mut head = Head::default();
    for (number, text) in (1..).zip(texts) {
        let mut next = record(number, stimulus(None));
        next.episodes = vec![episode(text), episode("the door")];
        next.episodes[0].tags = vec![String::from("room-9")];
        head = turns(store, &key, head, vec![next]).await.unwrap();
    }
    let mut scores = Vec::new();
    for _ in 0..2 {
        let found = store.recall(&key, "Fan off?", 9).await.unwrap();
        assert_eq!(found.iter().map(|e| e.turn).collect::<Vec<_>>(), [3, 2]);
        assert_eq!((found[0].content.as_str(), found[0].tags.len()), (texts[2], 1));
        assert!(found[0].score > found[1].score && found[1].score > 0.0);
        assert_eq!(store.recall(&key, "door", 2).await.unwrap().iter().map(|e| e.turn).collect::<Vec<_>>(), [4, 3]);
        assert_eq!(store.recall(&key, "room 9", 9).await.unwrap().len(), 4);
        assert!(store.recall(&key, "", 9).await.unwrap().is_empty());
        assert!(store.recall(&key, "fan", 0).await.unwrap().is_empty());
        scores.push(found[0].score);
        subject.settle().await;
    }
    assert!((scores[0] - scores[1]).abs() < 1e-12, "folding changes no score: {scores:?}");
    // Folded and unfolded together.
    let mut next = record(5, stimulus(None));
    next.episodes = vec![episode("a new fan")];
    turns(store, &key, head, vec![next]).await.unwrap();
    let found = store.recall(&key, "fan", 9).await.unwrap();
    assert_eq!(found.len(), 3);
    assert_eq!(found[0].turn, 5, "the shortest");
}

async fn recall_is_the_instances_own(subject: Subject) {
    let store = &*subject.store;
    for key in [key("a"), key("b"), key_of("other", "a")] {
        let mut next = record(1, stimulus(None));
        next.episodes = vec![episode(&format!("secret of {key}"))];
        turns(store, &key, Head::default(), vec![next]).await.unwrap();
    }
    for _ in 0..2 {
        let found = store.recall(&key("a"), "secret", 9).await.unwrap();
        assert_eq!(found.iter().map(|e| e.content.as_str()).collect::<Vec<_>>(), ["secret of default/a"]);
        subject.settle().await;
    }
}

/// Instances of a shard, in order of their names.
fn keys_of(shard: u32, count: usize) -> Vec<InstanceKey> {
    (0..).map(|n| key(&format!("k{n:06}"))).filter(|key| key.shard(SHARDS) == shard).take(count).collect()
}

/// A feed of the store that holds the turns of a shard's instances.
fn feed_of(store: &dyn Store, shard: u32) -> Feed {
    let feeds = store.feeds(&Scope::of(SHARDS, [shard]));
    assert_eq!(feeds.len(), 1);
    feeds[0]
}

async fn effects_leave_in_commit_order(subject: Subject) {
    let store = &*subject.store;
    let (keys, feed) = (keys_of(3, 2), feed_of(store, 3));
    let key = |name: &str| keys[usize::from(name == "b")].clone();
    let hint = store.outgoing_hint();
    let mut heads = BTreeMap::new();
    for round in 0..3u64 {
        for name in ["a", "b"] {
            let key = key(name);
            let mut next = record(round + 1, stimulus(None));
            next.effects = if name == "a" || round == 1 { vec![effect(0)] } else { Vec::new() };
            let head = heads.get(name).copied().unwrap_or_default();
            heads.insert(name, turns(store, &key, head, vec![next]).await.unwrap());
        }
    }
    tokio::time::timeout(std::time::Duration::from_secs(10), hint.notified()).await.unwrap();
    let all = store.outgoing(&[(feed, 0)], 99).await.unwrap();
    let order: Vec<(&str, u64)> =
        all.iter().map(|o| (if o.key == key("b") { "b" } else { "a" }, o.turn.turn)).collect();
    assert_eq!(order, [("a", 1), ("a", 2), ("b", 2), ("a", 3)]);
    assert!(all.windows(2).all(|pair| pair[0].position < pair[1].position));
    let rest = store.outgoing(&[(feed, all[1].position)], 1).await.unwrap();
    assert_eq!(rest.iter().map(|o| o.position).collect::<Vec<_>>(), [all[2].position]);
    // Asked again and again at the end, it sees what comes after a quiet stretch.
    let end = all[3].position;
    for _ in 0..2 {
        assert!(store.outgoing(&[(feed, end)], 9).await.unwrap().is_empty());
        heads.insert("b", decide(store, &key("b"), heads["b"], &[None]).await.unwrap());
    }
    let mut next = record(heads["b"].turn + 1, stimulus(None));
    next.effects = vec![effect(0)];
    turns(store, &key("b"), heads["b"], vec![next]).await.unwrap();
    assert_eq!(store.outgoing(&[(feed, end)], 9).await.unwrap().len(), 1);
    assert_eq!(store.outgoing(&[(feed, 0)], 99).await.unwrap().len(), 5);
    assert_eq!(store.shipped(&[feed]).await.unwrap(), [0]);
    ship(store, vec![Shipping::Shipped { feed, position: end }]).await;
    assert_eq!(store.shipped(&[feed]).await.unwrap(), [end]);
}

async fn ship(store: &dyn Store, writes: Vec<Shipping>) {
    let (done, end) = Done::channel();
    store.ship(Vec::new(), writes, done);
    end.await.unwrap().unwrap();
}

async fn what_a_former_owner_ships_is_left_out(subject: Subject) {
    let store = &*subject.store;
    let (mine, other) = (key("a"), key("b"));
    let (shard, elsewhere) = (mine.shard(SHARDS), other.shard(SHARDS));
    assert_ne!(shard, elsewhere);
    if !subject.set_epoch(shard, 2).await {
        return;
    }
    let row = |key: &InstanceKey, effect_id: &str| Pending {
        key: key.clone(),
        effect_id: effect_id.into(),
        effect: effect(0),
        reply: None,
        stimulus: id("s"),
        tries: 1,
        due: Millis(1),
    };
    let ship = async |epoch: u64, position: i64, writes: Vec<Shipping>| {
        let (done, end) = Done::channel();
        let shipped = [shard, elsewhere].map(|shard| Shipping::Shipped { feed: Feed(shard), position });
        store.ship(vec![Fence { shard, epoch, lodged: 0 }], writes.into_iter().chain(shipped).collect(), done);
        end.await.unwrap().unwrap();
        store.shipped(&[Feed(shard), Feed(elsewhere)]).await.unwrap()
    };
    let put = |row: Pending| Shipping::Postpone(Box::new(row));
    let due = async || store.due(&Scope::all(), Millis(9), 9).await.unwrap();
    assert_eq!(ship(2, 5, vec![put(row(&mine, "1-0"))]).await, [5, 5]);
    // Whoever has an older epoch changes nothing of this shard, and of others what it may.
    let settle = Shipping::Settle { key: mine.clone(), effect_id: String::from("1-0") };
    let late = vec![settle.clone(), put(row(&mine, "2-0")), put(row(&other, "1-0"))];
    assert_eq!(ship(1, 9, late).await, [5, 9]);
    assert_eq!(due().await, [row(&mine, "1-0"), row(&other, "1-0")]);
    assert_eq!(ship(2, 10, vec![settle]).await, [10, 10]);
    assert_eq!(due().await, [row(&other, "1-0")]);
}

async fn pending_effects_come_due(subject: Subject) {
    let store = &*subject.store;
    let pending = |name: &str, effect_id: &str, due: i64| Pending {
        key: key(name),
        effect_id: effect_id.into(),
        effect: effect(0),
        reply: None,
        stimulus: id("s"),
        tries: 1,
        due: Millis(due),
    };
    let put = |p: &Pending| Shipping::Postpone(Box::new(p.clone()));
    let (late, soon, other) = (pending("a", "1-0", 300), pending("a", "1-1", 100), pending("b", "1-0", 200));
    ship(store, vec![put(&late), put(&soon), put(&other)]).await;
    assert_eq!(store.due(&Scope::all(), Millis(250), 9).await.unwrap(), [soon.clone(), other.clone()]);
    assert_eq!(store.due(&Scope::all(), Millis(250), 1).await.unwrap(), std::slice::from_ref(&soon));
    assert!(store.due(&Scope::all(), Millis(99), 9).await.unwrap().is_empty());
    // Put off again, it replaces itself; settled, it is gone.
    let again = Pending { tries: 2, due: Millis(900), ..soon.clone() };
    ship(store, vec![put(&again), Shipping::Settle { key: other.key.clone(), effect_id: String::from("1-0") }]).await;
    assert_eq!(store.due(&Scope::all(), Millis(1000), 9).await.unwrap(), [late, again]);
    // Forgetting takes the instance's with it.
    decide(store, &key("a"), Head::default(), &[None]).await.unwrap();
    commit(store, &key("a"), Work::Forget).await.unwrap();
    assert!(store.due(&Scope::all(), Millis(1000), 9).await.unwrap().is_empty());
}

async fn mqtt_rows_are_kept(subject: Subject) {
    let mut subject = subject;
    let tenant = key("a").tenant;
    let session = |client: &str, record: &'static str| MqttWrite::PutSession {
        tenant: tenant.clone(),
        client: client.into(),
        hold: 0,
        record: record.into(),
    };
    let message = |client: &str, order: i64| MqttWrite::Enqueue {
        tenant: tenant.clone(),
        client: client.into(),
        hold: 0,
        order,
        or_mail: true,
        record: format!("m{order}").into_bytes().into(),
    };
    let retain = |topic: &str, record: &'static str| MqttWrite::Retain {
        tenant: tenant.clone(),
        topic: topic.into(),
        record: record.into(),
    };
    let write = async |store: &dyn Store, writes| {
        let (done, end) = Done::channel();
        store.mqtt(writes, done);
        end.await.unwrap().unwrap();
    };
    let writes = vec![
        session("c1", "old"),
        session("c1", "new"),
        session("c2", "x"),
        message("c1", 2),
        message("c1", 1),
        message("c1", 10),
        message("c2", 1),
        retain("t/1", "on"),
        retain("t/2", "on"),
    ];
    write(&*subject.store, writes).await;
    let drop_session = MqttWrite::DropSession { tenant: tenant.clone(), client: String::from("c2"), hold: 0 };
    let dequeue = MqttWrite::Dequeue { tenant: tenant.clone(), client: String::from("c1"), hold: 0, order: 2 };
    write(&*subject.store, vec![drop_session, dequeue, retain("t/2", "")]).await;
    subject.reopen(true).await;
    let rows = subject.store.mqtt_rows().await.unwrap();
    let told: Vec<String> = rows
        .iter()
        .map(|row| match row {
            MqttRow::Session { client, record, .. } => format!("session {client} {record:?}"),
            MqttRow::Queued { client, order, record, .. } => format!("queued {client} {order} {record:?}"),
            MqttRow::Retained { topic, record, .. } => format!("retained {topic} {record:?}"),
        })
        .collect();
    let expected = ["session c1 b\"new\"", "queued c1 1 b\"m1\"", "queued c1 10 b\"m10\"", "retained t/1 b\"on\""];
    assert_eq!(told, expected);
}

async fn tenants_are_walls(subject: Subject) {
    let (store, mine, yours) = (&*subject.store, key_of("mine", "a"), key_of("yours", "a"));
    decide(store, &mine, Head::default(), &[Some("one"), Some("two")]).await.unwrap();
    accept(store, &mine, &[stimulus(Some("waits"))]).await.unwrap();
    bury(store, &mine, &stimulus(Some("dead"))).await;
    for _ in 0..2 {
        assert!(!store.load(&yours).await.unwrap().exists);
        assert_eq!(store.state(&yours).await.unwrap(), None);
        assert!(store.turns(&yours, 0, 9).await.unwrap().is_empty());
        assert!(store.dead_letters(&yours, None, 9).await.unwrap().is_empty());
        assert!(store.list(&yours.tenant, None, None, 9).await.unwrap().is_empty());
        for name in ["one", "waits", "dead"] {
            assert_eq!(store.find(&yours, &id(name)).await.unwrap(), None);
            assert!(store.locate(&yours.tenant, &id(name)).await.unwrap().is_empty());
        }
        assert_eq!(store.find_prefix(&yours, "o").await.unwrap(), None);
        let end = commit(store, &yours, Work::Revive { stimulus: id("dead") }).await;
        assert!(matches!(end, Err(Rejection::NotFound)));
        commit(store, &yours, Work::Forget).await.unwrap();
        assert_eq!(store.load(&mine).await.unwrap().head.turn, 2);
        subject.settle().await;
    }
}

async fn figures_count_what_is_there(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    accept(store, &key, &[stimulus(None), stimulus(None), stimulus(Some("x"))]).await.unwrap();
    bury(store, &key, &stimulus(Some("x"))).await;
    let figures = store.stats().await.unwrap();
    assert_eq!((figures.inbox, figures.dead, figures.pending), (2, 1, 0));
    assert_eq!(figures.bytes > 0, subject.sqlite.is_some() || subject.postgres.is_some());
}

async fn a_probe_writes_and_reads(subject: Subject) {
    subject.store.probe(std::time::Duration::from_secs(30)).await.unwrap();
}

async fn a_closed_store_refuses(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    decide(store, &key, Head::default(), &[None]).await.unwrap();
    store.close();
    let end = decide(store, &key, Head::default(), &[None]).await;
    assert!(matches!(end, Err(Rejection::Failed(Error::Closed))), "{end:?}");
    assert!(matches!(store.load(&key).await, Err(Error::Closed)));
    store.close();
}

async fn a_stale_fence_is_refused_alone(subject: Subject) {
    let store = &*subject.store;
    let (mine, other) = (keys_of(1, 1).remove(0), keys_of(2, 1).remove(0));
    let head = decide(store, &mine, Head::default(), &[None]).await.unwrap();
    if !subject.set_epoch(1, 7).await {
        return;
    }
    let all: Vec<Work> = vec![
        Work::Turns { head, turns: vec![Arc::new(record(2, stimulus(None)))] },
        Work::Accept { stimuli: vec![Arc::new(stimulus(None))] },
        Work::Bury { stimulus: Arc::new(stimulus(None)), reason: String::new(), tries: 1, at: Millis(1) },
        Work::Revive { stimulus: id("x") },
        Work::PutProfile { profile: Arc::default(), at: Millis(1) },
        Work::Forget,
    ];
    for work in all {
        let what = format!("{work:?}");
        // Its neighbour in the same commit, of a shard that is as it was, is written.
        let neighbour = [stimulus(None)];
        let (stale, good) = tokio::join!(commit(store, &mine, work), accept(store, &other, &neighbour));
        assert!(matches!(stale, Err(Rejection::Fenced)), "{what}: {stale:?}");
        good.unwrap();
    }
    let loaded = store.load(&mine).await.unwrap();
    assert!(loaded.inbox.is_empty() && loaded.profile.is_none());
    assert_eq!(loaded.head, head);
    assert_eq!(store.load(&other).await.unwrap().inbox.len(), 6);
    let new = Fence { epoch: 7, ..fence(&mine) };
    let work = Work::Turns { head, turns: vec![Arc::new(record(2, stimulus(None)))] };
    assert_eq!(commit_under(store, new, &mine, work).await.unwrap().head.turn, 2);
}

async fn what_was_lodged_comes_first(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let fenced = subject.set_epoch(key.shard(SHARDS), 2).await;
    let owner = Fence { epoch: 2, ..fence(&key) };
    let put = |chosen: &str| vec![Arc::new(stimulus(Some(chosen)))];
    let waits = put("first");
    commit_under(store, owner, &key, Work::Accept { stimuli: waits.clone() }).await.unwrap();
    // Another node has an old epoch, or none.
    let stimuli = vec![put("lodged-1").remove(0), put("lodged-2").remove(0)];
    commit_under(store, Fence { epoch: 1, ..owner }, &key, Work::Lodge { stimuli }).await.unwrap();
    assert_eq!(names(&store.load(&key).await.unwrap().inbox), ["first", "lodged-1", "lodged-2"]);
    let turn = |number, stimulus| vec![Arc::new(record(number, stimulus))];
    if fenced {
        for work in [
            Work::Accept { stimuli: put("later") },
            Work::Turns { head: Head::default(), turns: turn(1, stimulus(Some("later"))) },
        ] {
            let end = commit_under(store, owner, &key, work).await;
            assert!(matches!(end, Err(Rejection::Behind { lodged: 2 })), "{end:?}");
        }
    }
    // What stood there before is decided all the same, and so is everything once the owner has looked.
    let work = Work::Turns { head: Head::default(), turns: turn(1, (*waits[0]).clone()) };
    let head = commit_under(store, owner, &key, work).await.unwrap().head;
    let looked = Fence { lodged: 2, ..owner };
    let work = Work::Turns { head, turns: turn(2, stimulus(Some("later"))) };
    commit_under(store, looked, &key, work).await.unwrap();
    commit_under(store, looked, &key, Work::Accept { stimuli: put("last") }).await.unwrap();
    assert_eq!(names(&store.load(&key).await.unwrap().inbox), ["lodged-1", "lodged-2", "last"]);
}

async fn what_was_lodged_itself_does_not_overtake(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let fenced = subject.set_epoch(key.shard(SHARDS), 2).await;
    let owner = Fence { epoch: 2, ..fence(&key) };
    let [one, two] = [stimulus(Some("one")), stimulus(Some("two"))];
    let lodge = |of: &Stimulus| Work::Lodge { stimuli: vec![Arc::new(of.clone())] };
    for of in [&one, &two] {
        commit_under(store, owner, &key, lodge(of)).await.unwrap();
    }
    // The owner heard of the second by another way, and not of the first.
    let turns = |of: &[&Stimulus]| Work::Turns {
        head: Head::default(),
        turns: (1..).zip(of).map(|(number, of)| Arc::new(record(number, (*of).clone()))).collect(),
    };
    if fenced {
        for of in [&[&two][..], &[&two, &one]] {
            let end = commit_under(store, owner, &key, turns(of)).await;
            assert!(matches!(end, Err(Rejection::Behind { lodged: 2 })), "{end:?}");
        }
    }
    // A repeat that waits tells the owner to look, too: it may have come by a commit whose end the owner never heard.
    duplicate(commit_under(store, owner, &key, lodge(&two)).await);
    if fenced {
        let end = commit_under(store, Fence { lodged: 2, ..owner }, &key, turns(&[&stimulus(None)])).await;
        assert!(matches!(end, Err(Rejection::Behind { lodged: 3 })), "{end:?}");
    }
    commit_under(store, owner, &key, turns(&[&one, &two])).await.unwrap();
    assert!(store.load(&key).await.unwrap().inbox.is_empty());
}

async fn a_lodged_repeat_is_refused(subject: Subject) {
    let (store, key) = (&*subject.store, key("a"));
    let head = decide(store, &key, Head::default(), &[Some("decided")]).await.unwrap();
    accept(store, &key, &[stimulus(Some("waits"))]).await.unwrap();
    for (chosen, number) in [("decided", 1), ("waits", 0)] {
        let stimuli = vec![Arc::new(stimulus(None)), Arc::new(stimulus(Some(chosen)))];
        let (index, known) = duplicate(commit(store, &key, Work::Lodge { stimuli }).await);
        assert_eq!(index, 1);
        assert!(match known {
            Known::Decided(record) => record.turn == number,
            Known::Waiting(waiting) => waiting.id == id("waits"),
            Known::Dead(_) => false,
        });
    }
    // The one that waits makes its owner look: it may have come by a commit whose end the owner never heard.
    let looked = Fence { lodged: 2, ..fence(&key) };
    let work = Work::Turns { head, turns: vec![Arc::new(record(2, stimulus(None)))] };
    commit_under(store, looked, &key, work).await.unwrap();
}

async fn a_scope_names_what_is_asked_for(subject: Subject) {
    let store = &*subject.store;
    let (one, two) = (keys_of(1, 2), keys_of(2, 1));
    for key in one.iter().chain(&two) {
        accept(store, key, &[stimulus(None)]).await.unwrap();
        let pending = Pending {
            key: key.clone(),
            effect_id: String::from("1-0"),
            effect: effect(0),
            reply: None,
            stimulus: id("s"),
            tries: 1,
            due: Millis(5),
        };
        ship(store, vec![Shipping::Postpone(Box::new(pending))]).await;
    }
    for (shards, expected) in
        [(vec![1], one.clone()), (vec![2], two.clone()), (vec![3], vec![]), (vec![1, 2], [one, two].concat())]
    {
        let scope = Scope::of(SHARDS, shards);
        let mut expected = expected;
        expected.sort();
        assert_eq!(store.waiting(&scope, None, 9).await.unwrap(), expected);
        if let [first, rest @ ..] = expected.as_slice() {
            assert_eq!(store.waiting(&scope, Some(first), 9).await.unwrap(), rest);
        }
        let due = store.due(&scope, Millis(9), 9).await.unwrap();
        assert_eq!(due.into_iter().map(|row| row.key).collect::<Vec<_>>(), expected);
    }
    assert_eq!(store.due(&Scope::of(SHARDS, [1]), Millis(9), 1).await.unwrap().len(), 1);
}

async fn each_feed_is_in_order(subject: Subject) {
    let store = &*subject.store;
    let (one, two) = (keys_of(1, 2), keys_of(2, 1));
    for key in one.iter().chain(&two).chain(&one) {
        let head = store.load(key).await.unwrap().head;
        let mut next = record(head.turn + 1, stimulus(None));
        next.effects = vec![effect(0)];
        turns(store, key, head, vec![next]).await.unwrap();
    }
    let feeds = store.feeds(&Scope::of(SHARDS, [1, 2]));
    let from: Vec<_> = feeds.iter().map(|feed| (*feed, 0)).collect();
    let all = store.outgoing(&from, 99).await.unwrap();
    assert_eq!(all.len(), 5);
    for feed in &feeds {
        let of: Vec<_> = all.iter().filter(|outgoing| outgoing.feed == *feed).collect();
        assert!(of.windows(2).all(|pair| pair[0].position < pair[1].position));
        // What is missing of a feed comes after what is given.
        let mut after = 0;
        for expected in &of {
            let next = store.outgoing(&[(*feed, after)], 1).await.unwrap();
            assert_eq!((next[0].position, &next[0].key), (expected.position, &expected.key));
            after = next[0].position;
        }
        assert!(store.outgoing(&[(*feed, after)], 1).await.unwrap().is_empty());
        ship(store, vec![Shipping::Shipped { feed: *feed, position: after }]).await;
        ship(store, vec![Shipping::Shipped { feed: *feed, position: after - 1 }]).await;
        assert_eq!(store.shipped(&[*feed]).await.unwrap(), [after], "it never goes back");
    }
    assert!(store.outgoing(&[], 9).await.unwrap().is_empty());
}
