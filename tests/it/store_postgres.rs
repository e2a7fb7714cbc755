//! What only PostgreSQL has: connections that break, a server that crashes, locks, a pooler, an older or newer schema.
//!
//! Real servers; breaks at a chosen moment come from a proxy in this process that reads along. After each of them everything
//! that was acknowledged is there once, and nothing that was refused is there at all.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use sophont::{
    runtime::clock::Clock,
    scaling::pool::Limits,
    store::{
        Done, Error, Feed, Head, Reader as _, Rejection, Store as _, Unit, Work, Writer as _,
        postgres::{Options, PostgresStore},
    },
    types::{Fault as _, InstanceKey, Kind, StimulusId},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::{
    store_contract::{
        SHARDS, Subject, commit, decide, effect, fence, id, key, open_postgres, open_postgres_with, pool,
        postgres_settings, record, stimulus, turns,
    },
    support::{Node, PATIENCE, Postgres, http, postgres, wait_until},
};

async fn fresh() -> (Arc<PostgresStore>, String) {
    let url = postgres::shared().database().await;
    (open_postgres(&postgres_settings(&url)).await, url)
}

/// Several instances that decide and accept all the time, and what they were told.
struct Load {
    store: Arc<PostgresStore>,
    acknowledged: Arc<AtomicUsize>,
    refused: Arc<AtomicUsize>,
    stop: tokio_util::sync::CancellationToken,
    tasks: Vec<tokio::task::JoinHandle<Told>>,
}

/// What one instance was told.
struct Told {
    key: InstanceKey,
    decided: Vec<StimulusId>,
    accepted: Vec<StimulusId>,
}

impl Load {
    fn start(store: &Arc<PostgresStore>, instances: usize) -> Self {
        let (acknowledged, refused) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let stop = tokio_util::sync::CancellationToken::new();
        let one = |number: usize| {
            let (store, stop) = (store.clone(), stop.clone());
            let (acknowledged, refused) = (acknowledged.clone(), refused.clone());
            tokio::spawn(async move {
                let key = key(&format!("load-{number}"));
                let mut told = Told { key: key.clone(), decided: Vec::new(), accepted: Vec::new() };
                let mut head = Head::default();
                let mut round = 0;
                while !stop.is_cancelled() {
                    round += 1;
                    // Every third is accepted under an id that tells nobody apart, the others are decided.
                    let accepts = round % 3 == 0;
                    let chosen = format!("s{number}-{round}");
                    let next = stimulus((!accepts).then_some(chosen.as_str()));
                    let id = next.id.clone();
                    let work = if accepts {
                        Work::Accept { stimuli: vec![Arc::new(next)] }
                    } else {
                        let mut turn = record(head.turn + 1, next);
                        turn.effects = vec![effect(0)];
                        Work::Turns { head, turns: vec![Arc::new(turn)] }
                    };
                    match commit(&*store, &key, work).await {
                        Ok(end) => {
                            acknowledged.fetch_add(1, Ordering::Relaxed);
                            head = end.head;
                            if accepts { told.accepted.push(id) } else { told.decided.push(id) }
                        }
                        Err(Rejection::Failed(error)) => {
                            assert_eq!(error.kind(), Kind::Unavailable, "{error}");
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(rejection) => panic!("{rejection:?}"),
                    }
                }
                told
            })
        };
        let tasks = (0..instances).map(one).collect();
        Self { store: store.clone(), acknowledged, refused, stop, tasks }
    }

    fn acknowledged(&self) -> usize {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until so many more were acknowledged.
    async fn goes_on(&self, more: usize) {
        let until = self.acknowledged() + more;
        wait_until("commits go on", PATIENCE * 2, async || self.acknowledged() >= until).await;
    }

    /// Ends, and compares what is stored with what was told; how many were acknowledged and refused.
    async fn check(self) -> (usize, usize) {
        self.stop.cancel();
        let mut positions = BTreeMap::new();
        for task in self.tasks {
            let told = task.await.unwrap();
            let loaded = self.store.load(&told.key).await.unwrap();
            let waiting: Vec<_> = loaded.inbox.iter().map(|stimulus| stimulus.id.clone()).collect();
            assert_eq!(waiting, told.accepted, "the inbox of {}", told.key);
            let turns = self.store.turns(&told.key, 0, 1_000_000).await.unwrap();
            let decided: Vec<_> = turns.iter().map(|turn| turn.stimulus.id.clone()).collect();
            assert_eq!(decided, told.decided, "the turns of {}", told.key);
            assert_eq!(loaded.head.turn as usize, decided.len());
            *positions.entry(told.key.shard(SHARDS)).or_insert(0) += decided.len();
        }
        for (shard, count) in positions {
            let outgoing = self.store.outgoing(&[(Feed(shard), 0)], 1_000_000).await.unwrap();
            assert_eq!(outgoing.len(), count, "effects of shard {shard}");
            assert!(outgoing.windows(2).all(|pair| pair[0].position < pair[1].position));
        }
        (self.acknowledged.load(Ordering::Relaxed), self.refused.load(Ordering::Relaxed))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terminated_connections_lose_and_double_nothing() {
    let (store, url) = fresh().await;
    let load = Load::start(&store, 12);
    let admin = postgres::connect(&url).await;
    let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE datname = current_database() AND pid <> pg_backend_pid() AND random() < 0.7";
    let mut killed = 0;
    for _ in 0..25 {
        load.goes_on(20).await;
        killed += admin.query(kill, &[]).await.unwrap().len();
    }
    load.goes_on(20).await;
    let (acknowledged, refused) = load.check().await;
    println!("{killed} connections terminated, {acknowledged} acknowledged, {refused} refused");
    assert!(killed > 25);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_the_server_loses_and_doubles_nothing() {
    let mut server = Postgres::start();
    let store = open_postgres(&postgres_settings(&server.database().await)).await;
    let load = Load::start(&store, 12);
    for mode in ["immediate", "fast", "immediate"] {
        load.goes_on(60).await;
        server.stop(mode);
        server.start_again();
    }
    load.goes_on(60).await;
    let (acknowledged, refused) = load.check().await;
    println!("{acknowledged} acknowledged, {refused} refused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_server_commits_are_refused_and_reads_fail() {
    let mut server = Postgres::start();
    let config = postgres_settings(&server.database().await);
    let options = Options { patience: Duration::from_millis(300), ..Options::default() };
    let runtime = postgres::runtime();
    let opening = runtime
        .clone()
        .spawn(async move { PostgresStore::open_with(&config, SHARDS, Clock::System, runtime, options).await });
    let store = opening.await.unwrap().unwrap();
    let head = decide(&*store, &key("a"), Head::default(), &[None]).await.unwrap();
    server.stop("fast");
    let end = decide(&*store, &key("a"), head, &[Some("x")]).await;
    let Err(Rejection::Failed(error)) = end else { panic!("{end:?}") };
    assert_eq!((error.kind(), error.code()), (Kind::Unavailable, "STORE_UNAVAILABLE"));
    assert_eq!(store.load(&key("a")).await.unwrap_err().kind(), Kind::Unavailable);
    assert!(store.probe(Duration::from_secs(5)).await.is_err());
    server.start_again();
    wait_until("it serves again", PATIENCE, async || store.probe(Duration::from_secs(5)).await.is_ok()).await;
    assert_eq!(decide(&*store, &key("a"), head, &[Some("x")]).await.unwrap().turn, 2);
}

/// What the proxy does with the next COMMIT that passes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Break {
    /// Passes it on and cuts the connection before the answer.
    AfterCommit,
    /// Swallows it and cuts the connection.
    BeforeCommit,
    /// Swallows it, and lets the connection hang until the server gives the transaction up.
    Hang,
}

/// Stands between store and server and breaks connections at a chosen moment.
struct Proxy {
    port: u16,
    next: Arc<std::sync::Mutex<Option<Break>>>,
    broken: Arc<AtomicU32>,
}

impl Proxy {
    async fn before(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let next: Arc<std::sync::Mutex<Option<Break>>> = Arc::default();
        let broken: Arc<AtomicU32> = Arc::default();
        let (for_all, count) = (next.clone(), broken.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(("127.0.0.1", server)).await.unwrap();
                tokio::spawn(pass(client, server, for_all.clone(), count.clone()));
            }
        });
        Self { port, next, broken }
    }

    fn break_next(&self, how: Break) {
        *self.next.lock().unwrap() = Some(how);
    }

    fn broken(&self) -> u32 {
        self.broken.load(Ordering::SeqCst)
    }
}

async fn pass(
    mut client: TcpStream,
    mut server: TcpStream,
    next: Arc<std::sync::Mutex<Option<Break>>>,
    broken: Arc<AtomicU32>,
) {
    let (mut up, mut down) = (vec![0; 65_536], vec![0; 65_536]);
    loop {
        tokio::select! {
            read = client.read(&mut up) => {
                let Ok(read @ 1..) = read else { return };
                let commits = up[..read].windows(7).any(|bytes| bytes == b"COMMIT\0");
                let how = if commits { next.lock().unwrap().take() } else { None };
                match how {
                    None => server.write_all(&up[..read]).await.unwrap_or(()),
                    Some(Break::AfterCommit) => {
                        server.write_all(&up[..read]).await.unwrap();
                        // The server has answered, so it has committed; nobody is told.
                        let mut answer = [0; 1];
                        let _ = server.read(&mut answer).await;
                        broken.fetch_add(1, Ordering::SeqCst);
                        return;
                    }
                    Some(Break::BeforeCommit) => {
                        broken.fetch_add(1, Ordering::SeqCst);
                        return;
                    }
                    Some(Break::Hang) => {
                        broken.fetch_add(1, Ordering::SeqCst);
                        // Ends when the server closes.
                        while matches!(server.read(&mut down).await, Ok(1..)) {}
                        return;
                    }
                }
            }
            read = server.read(&mut down) => {
                let Ok(read @ 1..) = read else { return };
                if client.write_all(&down[..read]).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_answer_is_lost_is_looked_up() {
    let server = postgres::shared();
    let url = server.database().await;
    let proxy = Proxy::before(server.port()).await;
    let mut config = postgres_settings(&url.replace(&server.port().to_string(), &proxy.port.to_string()));
    config.postgres.idle_in_transaction_ms = 300;
    let store = open_postgres(&config).await;
    let mut head = Head::default();
    let mut accepted = Vec::new();
    let mut decided = Vec::new();
    for (round, how) in [Break::AfterCommit, Break::BeforeCommit, Break::Hang].into_iter().cycle().take(9).enumerate() {
        let before = proxy.broken();
        proxy.break_next(how);
        let name = format!("s{round}");
        if round % 2 == 0 {
            head = decide(&*store, &key("a"), head, &[Some(&name), None]).await.unwrap();
            decided.push(id(&name));
        } else {
            // Its id tells the store nothing: only the batch's number does.
            let waits = stimulus(None);
            accepted.push(waits.id.clone());
            let work = Work::Accept { stimuli: vec![Arc::new(waits)] };
            assert_eq!(commit(&*store, &key("a"), work).await.unwrap().head, head);
        }
        assert_eq!(proxy.broken(), before + 1, "{how:?}");
    }
    let loaded = store.load(&key("a")).await.unwrap();
    assert_eq!(loaded.inbox.iter().map(|stimulus| stimulus.id.clone()).collect::<Vec<_>>(), accepted);
    let turns = store.turns(&key("a"), 0, 99).await.unwrap();
    let chosen: Vec<_> = turns.iter().filter(|t| t.stimulus.repeatable).map(|t| t.stimulus.id.clone()).collect();
    assert_eq!((chosen, turns.len()), (decided, 10));
    assert_eq!(loaded.head, head);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_is_locked_holds_up_itself_alone() {
    let url = postgres::shared().database().await;
    let mut config = postgres_settings(&url);
    config.postgres.lock_ms = 100;
    config.postgres.lanes = 1;
    let store = open_postgres(&config).await;
    let (held, free) = (key("a"), (0..).map(|n| key(&format!("b{n}"))));
    let free = free.into_iter().find(|key| key.shard(SHARDS) != held.shard(SHARDS)).unwrap();
    let admin = postgres::connect(&url).await;
    let lock = format!("BEGIN; SELECT 1 FROM shards WHERE shard = {} FOR UPDATE", held.shard(SHARDS));
    admin.batch_execute(&lock).await.unwrap();
    let (stuck, fine) = tokio::join!(
        decide(&*store, &held, Head::default(), &[Some("x")]),
        decide(&*store, &free, Head::default(), &[Some("x")])
    );
    assert!(matches!(stuck, Err(Rejection::Failed(Error::Backend(_)))), "{stuck:?}");
    assert_eq!(fine.unwrap().turn, 1);
    assert!(!store.load(&held).await.unwrap().exists);
    // A lock that is let go in time is waited for.
    let waiting = tokio::spawn({
        let (store, held) = (store.clone(), held.clone());
        async move { decide(&*store, &held, Head::default(), &[Some("x")]).await }
    });
    let blocked = "SELECT count(*) FROM pg_locks WHERE NOT granted";
    let watch = postgres::connect(&url).await;
    wait_until("it waits", PATIENCE, async || watch.query_one(blocked, &[]).await.unwrap().get::<_, i64>(0) > 0).await;
    admin.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().turn, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_take_too_long_fail_and_come_back() {
    let url = postgres::shared().database().await;
    let mut config = postgres_settings(&url);
    config.postgres.statement_ms = 300;
    let pool = Limits { wait: Duration::from_millis(100), ..pool(1) };
    let store = open_postgres_with(&config, Options { pool, ..Options::default() }).await;
    decide(&*store, &key("a"), Head::default(), &[None]).await.unwrap();
    let admin = postgres::connect(&url).await;
    admin.batch_execute("BEGIN; LOCK TABLE instances IN ACCESS EXCLUSIVE MODE").await.unwrap();
    // One waits for the server, the others for its connection.
    let a = key("a");
    let all = futures_util::future::join_all((0..4).map(|_| store.load(&a)));
    for end in tokio::time::timeout(PATIENCE, all).await.unwrap() {
        assert_eq!(end.unwrap_err().kind(), Kind::Unavailable);
    }
    admin.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(store.load(&key("a")).await.unwrap().head.turn, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unit_at_fault_takes_no_neighbour_with_it() {
    let (store, _) = fresh().await;
    let keys: Vec<_> = (0..20).map(|n| key(&format!("i{n}"))).collect();
    let mut heads = Vec::new();
    for key in &keys {
        heads.push(decide(&*store, key, Head::default(), &[None]).await.unwrap());
    }
    let second = decide(&*store, &keys[7], heads[7], &[None]).await.unwrap();
    // The old head of one makes a row that stands already, in the middle of one batch.
    let ends: Vec<_> = keys
        .iter()
        .zip(&heads)
        .map(|(key, head)| {
            let (done, end) = Done::channel();
            let turns = vec![Arc::new(record(2, stimulus(None)))];
            store.submit(Unit { key: key.clone(), fence: fence(key), work: Work::Turns { head: *head, turns }, done });
            end
        })
        .collect();
    for (number, end) in ends.into_iter().enumerate() {
        let end = end.await.unwrap();
        assert_eq!(end.is_ok(), number != 7, "{number}: {end:?}");
    }
    assert_eq!(store.load(&keys[7]).await.unwrap().head, second);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_schema_or_number_of_shards_is_refused() {
    let (store, url) = fresh().await;
    store.close();
    let config = postgres_settings(&url);
    let open = async |shards: u32| {
        let (config, runtime) = (config.clone(), postgres::runtime());
        let opening =
            runtime.clone().spawn(async move { PostgresStore::open(&config, shards, Clock::System, runtime).await });
        opening.await.unwrap().map(drop)
    };
    open(SHARDS).await.unwrap();
    let other = open(SHARDS * 2).await.unwrap_err();
    assert!(other.to_string().contains(&format!("founded for {SHARDS} shards")), "{other}");
    let admin = postgres::connect(&url).await;
    let newer =
        "INSERT INTO refinery_schema_history (version, name, applied_on, checksum) VALUES (999, 'later', '', '')";
    admin.execute(newer, &[]).await.unwrap();
    assert!(matches!(open(SHARDS).await, Err(Error::NewerSchema { found: 999, known: 1.. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_forgotten_or_expired_is_removed() {
    let (store, url) = fresh().await;
    let mut first = record(1, stimulus(Some("one")));
    first.episodes = vec![crate::store_contract::episode("it rained")];
    let head = turns(&*store, &key("gone"), Head::default(), vec![first]).await.unwrap();
    decide(&*store, &key("gone"), head, &[None; 20]).await.unwrap();
    decide(&*store, &key("kept"), Head::default(), &[Some("two")]).await.unwrap();
    commit(&*store, &key("gone"), Work::Forget).await.unwrap();
    let admin = postgres::connect(&url).await;
    admin.execute("UPDATE seen SET day = day - 3", &[]).await.unwrap();
    let left = "SELECT (SELECT count(*) FROM turns), (SELECT count(*) FROM episodes), (SELECT count(*) FROM forgotten),
                (SELECT count(*) FROM seen)";
    wait_until("only the other instance's turn is left", PATIENCE, async || {
        let row = admin.query_one(left, &[]).await.unwrap();
        [0, 1, 2, 3].map(|at| row.get::<_, i64>(at)) == [1, 0, 0, 0]
    })
    .await;
    assert_eq!(store.load(&key("kept")).await.unwrap().head.turn, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_text_of_many_words_is_remembered() {
    let subject = Subject::postgres().await;
    let mut next = record(1, stimulus(None));
    let words: Vec<String> = (0..30_000).map(|n| format!("word{n:06}")).collect();
    next.episodes = vec![crate::store_contract::episode(&words.join(" "))];
    turns(&*subject.store, &key("a"), Head::default(), vec![next]).await.unwrap();
    let found = subject.store.recall(&key("a"), "word000003", 9).await.unwrap();
    assert_eq!(found.len(), 1);
}

#[tokio::test]
async fn a_node_killed_on_a_database_goes_on_from_there() {
    let url = postgres::shared().database().await;
    let mut builder = Node::builder();
    for argument in postgres::arguments(&url) {
        builder = builder.arg(argument);
    }
    let mut node = builder.start().await;
    node.client().put_instance("lamp", &http::echo()).await;
    for round in 1..=3u64 {
        let (id, content) = (format!("s{round}"), format!("c{round}"));
        let answer = node.client().say("lamp", &id, &content).await.expect(200);
        assert_eq!(answer["turn"], round, "{answer}");
        node.kill9().await;
        node.start_again().await;
        let again = node.client().say("lamp", &id, &content).await.expect(200);
        assert_eq!(again["turn"], round, "decided once: {again}");
    }
    node.restart().await;
    assert_eq!(node.client().decided("lamp").await, ["c1", "c2", "c3"]);
    assert!(!node.log().contains("commits under way"), "it closed in good order: {}", node.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_from_a_replica_see_what_was_committed() {
    let primary = Postgres::start();
    let url = primary.database().await;
    let mut replica = primary.replica();
    let mut config = postgres_settings(&url);
    config.postgres.replica_url = url.replace(&format!(":{}/", primary.port()), &format!(":{}/", replica.port()));
    let (store, other) = (open_postgres(&config).await, open_postgres(&config).await);
    let mut head = Head::default();
    for turn in 1..=50u64 {
        head = decide(&*store, &key("a"), head, &[Some(&format!("s{turn}"))]).await.unwrap();
        // Also what another node committed.
        assert_eq!(other.turns(&key("a"), 0, 99).await.unwrap().len() as u64, turn);
        assert_eq!(store.state(&key("a")).await.unwrap().unwrap().turn, turn);
    }
    wait_until("the replica answers", PATIENCE, async || {
        assert_eq!(store.state(&key("a")).await.unwrap().unwrap().turn, 50);
        store.replica_reads() > 0
    })
    .await;
    // A replica that stands still is passed over.
    let at_replica = postgres::connect(&config.postgres.replica_url).await;
    at_replica.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
    let served = store.replica_reads();
    for turn in 51..=60u64 {
        head = decide(&*store, &key("a"), head, &[None]).await.unwrap();
        assert_eq!(store.turns(&key("a"), 0, 99).await.unwrap().len() as u64, turn);
    }
    assert_eq!(store.replica_reads(), served);
    at_replica.batch_execute("SELECT pg_wal_replay_resume()").await.unwrap();
    wait_until("it answers again", PATIENCE, async || {
        assert_eq!(store.turns(&key("a"), 0, 99).await.unwrap().len(), 60);
        store.replica_reads() > served
    })
    .await;
    // And so is one that is gone.
    replica.stop("immediate");
    decide(&*store, &key("a"), head, &[None]).await.unwrap();
    assert_eq!(store.turns(&key("a"), 0, 99).await.unwrap().len(), 61);
}
