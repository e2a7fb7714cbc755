//! The cache over real servers: three tiers, one load for many, and reads that are never older than what was acknowledged.
//!
//! Each check of staleness has a negative control: with the validation switched off it has to fail.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use actix_rt::Arbiter;
use serde_json::json;
use sophont::{
    config,
    runtime::clock::Clock,
    scaling::cache::{Kind, Options, Sizes, Slot, TieredCache},
    telemetry::metric as name,
    types::TenantId,
};

use crate::support::{About, Http, Node, PATIENCE, cluster::Cluster, metric, redis::Redis, wait_until};

const MIB: u64 = 1024 * 1024;

fn slot(kind: Kind, id: &str) -> Slot {
    Slot::new(kind, &TenantId::new("t").unwrap(), id)
}

/// A cache as a node has one, on threads of its own.
struct Tiers {
    cache: TieredCache,
    arbiters: [Arbiter; 2],
    loads: Arc<AtomicUsize>,
}

impl Tiers {
    fn start(redis: Option<&Redis>, folder: Option<&Path>) -> Self {
        let defaults = config::Config::default();
        let redis = redis.map(|redis| (config::Redis { url: redis.url(), ..defaults.redis }, String::from("herd")));
        let cache = TieredCache::new(Options {
            sizes: Sizes { l1: 16 * MIB, l2: 16 * MIB, l3: 16 * MIB },
            policy: config::Cache::default(),
            redis,
            folder: folder.map(Path::to_owned),
            clock: Clock::System,
        });
        let arbiters = [Arbiter::new(), Arbiter::new()];
        cache.start(arbiters[0].handle(), arbiters[1].handle());
        Self { cache, arbiters, loads: Arc::default() }
    }

    /// What is under a key; loading it makes `text` of it, and is counted.
    async fn get(&self, slot: &Slot, text: &str) -> String {
        let (loads, text) = (self.loads.clone(), text.to_owned());
        let load = move || async move {
            loads.fetch_add(1, Ordering::SeqCst);
            // The others come meanwhile.
            tokio::task::yield_now().await;
            Ok::<_, ()>(Some(text))
        };
        let value = self.cache.get_or_load::<String, _, _, _>(slot, 0, load).await.unwrap();
        (*value.unwrap()).clone()
    }

    fn loads(&self) -> usize {
        self.loads.load(Ordering::SeqCst)
    }

    /// The tiers that hold a key.
    async fn tiers(&self, slot: &Slot) -> Vec<&'static str> {
        self.cache.inspect(slot).await.iter().map(|found| found.tier).collect()
    }

    /// Until its actors run and all these tiers take what is loaded; then nothing is counted yet.
    async fn until_warm(&self, kind: Kind, tiers: &[&str]) {
        let warm = slot(kind, &format!("warm{:p}", &raw const *self));
        wait_until("the tiers take what is loaded", PATIENCE, async || {
            self.cache.invalidate(&warm);
            self.get(&warm, "warm").await;
            self.tiers(&warm).await == tiers
        })
        .await;
        self.loads.store(0, Ordering::SeqCst);
    }

    async fn until_held(&self, slot: &Slot, tiers: &[&str]) {
        wait_until(&format!("{tiers:?} hold it"), PATIENCE, async || self.tiers(slot).await == tiers).await;
    }
}

impl Drop for Tiers {
    fn drop(&mut self) {
        for arbiter in &self.arbiters {
            arbiter.stop();
        }
    }
}

#[actix_rt::test]
async fn a_cold_herd_on_three_nodes_loads_at_most_three_times() {
    const HERD: usize = 10_000;
    let redis = Redis::start().await;
    let nodes: Arc<Vec<Tiers>> = Arc::new((0..3).map(|_| Tiers::start(Some(&redis), None)).collect());
    for node in nodes.iter() {
        // One that is not connected loads for itself.
        node.until_warm(Kind::Answer, &["l1", "l2"]).await;
    }
    let herd = (0..HERD).map(|n| {
        let nodes = nodes.clone();
        tokio::spawn(async move { nodes[n % 3].get(&slot(Kind::Answer, "herd"), "answer").await })
    });
    for answer in herd.collect::<Vec<_>>() {
        assert_eq!(answer.await.unwrap(), "answer");
    }
    let loads: Vec<usize> = nodes.iter().map(Tiers::loads).collect();
    assert!(loads.iter().sum::<usize>() <= 3, "{loads:?}");
    assert!(loads.iter().all(|loads| *loads <= 1), "one load for each node at most: {loads:?}");
}

#[actix_rt::test]
async fn what_one_node_loaded_the_others_find_in_redis_and_without_it_they_load() {
    let mut redis = Redis::start().await;
    let (one, other) = (Tiers::start(Some(&redis), None), Tiers::start(Some(&redis), None));
    let shared = slot(Kind::Answer, "shared");
    one.until_warm(Kind::Answer, &["l1", "l2"]).await;
    other.until_warm(Kind::Answer, &["l1", "l2"]).await;
    one.get(&shared, "first").await;
    one.until_held(&shared, &["l1", "l2"]).await;
    assert_eq!((other.get(&shared, "second").await, other.loads()), (String::from("first"), 0));

    redis.kill().await;
    let alone = slot(Kind::Answer, "alone");
    assert_eq!((other.get(&alone, "loaded").await, other.loads()), (String::from("loaded"), 1));
    assert_eq!(other.get(&shared, "third").await, "first", "its own memory does not need Redis");

    redis.start_again().await;
    one.until_warm(Kind::Answer, &["l1", "l2"]).await;
}

/// Whoever comes next need not wait for a guard that nobody has any more, whichever way its load ended.
#[actix_rt::test]
async fn a_load_leaves_no_guard_in_redis() {
    let redis = Redis::start().await;
    let tiers = Tiers::start(Some(&redis), None);
    tiers.until_warm(Kind::Answer, &["l1", "l2"]).await;
    let guards = async || redis.command(&["KEYS", "*guard/*"]).await;
    wait_until("the guard of the warm one is gone", PATIENCE, async || guards().await.is_empty()).await;
    for end in [Ok(Some(String::from("told"))), Err("no")] {
        let slot = slot(Kind::Answer, if end.is_ok() { "ends" } else { "fails" });
        let loaded = tiers.cache.get_or_make::<String, _, _, _>(&slot, 0, || async {
            // Without an end of its own it stays until it is taken away.
            assert_eq!(redis.command(&["PERSIST", &guards().await]).await, "1", "there is one while it loads");
            end.clone()
        });
        assert_eq!(loaded.await.map(|text| text.map(|text| (*text).clone())), end);
        wait_until("its guard is gone", PATIENCE, async || guards().await.is_empty()).await;
    }
}

#[actix_rt::test]
async fn what_is_dear_to_make_survives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let dear = slot(Kind::Embedding, "0123abcd/model");
    let cheap = slot(Kind::State, "cheap");
    let before = Tiers::start(None, Some(folder.path()));
    before.until_warm(Kind::Embedding, &["l1", "l2", "l3"]).await;
    before.get(&dear, "dear").await;
    before.get(&cheap, "cheap").await;
    before.until_held(&dear, &["l1", "l2", "l3"]).await;
    before.until_held(&cheap, &["l1", "l2"]).await;
    drop(before);
    let after = Tiers::start(None, Some(folder.path()));
    after.until_warm(Kind::Embedding, &["l1", "l2", "l3"]).await;
    assert_eq!(after.tiers(&dear).await, ["l3"]);
    assert_eq!(after.get(&dear, "made again").await, "dear");
    assert_eq!(after.get(&cheap, "made again").await, "made again");
    assert_eq!(after.loads(), 1);
    // What was found below is above from then on.
    after.until_held(&dear, &["l1", "l2", "l3"]).await;
    after.cache.invalidate(&dear);
    after.until_held(&dear, &[]).await;
}

#[actix_rt::test]
async fn what_has_to_leave_the_first_tier_is_found_in_the_second() {
    let tiers = Tiers::start(None, None);
    tiers.until_warm(Kind::Answer, &["l1", "l2"]).await;
    let text = "x".repeat(10_000);
    for n in 0..4000 {
        tiers.get(&slot(Kind::Answer, &n.to_string()), &text).await;
    }
    // 40 MB went through 16 MiB; compressed all of it fits below.
    let loads = tiers.loads();
    let mut gone = None;
    for n in 0..4000 {
        let slot = slot(Kind::Answer, &n.to_string());
        if tiers.tiers(&slot).await == ["l2"] {
            gone = Some(slot);
            break;
        }
    }
    assert_eq!(tiers.get(&gone.unwrap(), "loaded again").await, text);
    assert_eq!(tiers.loads(), loads);
    tiers.cache.resize(Sizes { l1: MIB, l2: MIB, l3: 0 });
    wait_until("the first tier is as small as it is to be", PATIENCE, async || tiers.cache.measure().1 <= MIB).await;
}

#[actix_rt::test]
async fn without_its_actors_everybody_loads_for_themselves() {
    let tiers = Tiers::start(None, None);
    tiers.until_warm(Kind::Answer, &["l1", "l2"]).await;
    tiers.get(&slot(Kind::Answer, "a"), "a").await;
    for arbiter in &tiers.arbiters {
        arbiter.stop();
    }
    for n in 0..20 {
        assert_eq!(tiers.get(&slot(Kind::Answer, &format!("b{n}")), "b").await, "b");
    }
    assert_eq!(tiers.loads(), 21);
}

/// Who writes states through one node and reads them through all.
struct Witness {
    clients: Vec<Http>,
    /// Writes of each instance that were acknowledged: each makes a version.
    written: [u64; 6],
}

impl Witness {
    fn of(cluster: &Cluster) -> Self {
        Self { clients: clients(cluster), written: [0; 6] }
    }

    /// How many reads were older than what had been acknowledged before they began.
    async fn stale_reads(&mut self, rounds: usize) -> usize {
        let mut stale = 0;
        for round in 0..rounds {
            for (instance, written) in self.written.iter_mut().enumerate() {
                let path = format!("/v1/instances/i{instance}/state");
                let writer = &self.clients[(round + instance) % self.clients.len()];
                *written += 1;
                writer.patch(&path, &json!({"desired": {"n": *written}})).await.expect(200);
                for reader in &self.clients {
                    let read = reader.get(&path).await.expect(200);
                    stale += usize::from(read["version"].as_u64() < Some(*written));
                }
            }
        }
        stale
    }
}

async fn states(clients: &[Http], result: &str) -> f64 {
    let name = format!("{}{{tier=\"l1\",type=\"state\",result=\"{result}\"}}", name::CACHE_READS);
    let mut sum = 0.0;
    for client in clients {
        sum += metric(client, &name).await;
    }
    sum
}

fn clients(cluster: &Cluster) -> Vec<Http> {
    (0..cluster.nodes.len()).map(|node| cluster.client(node)).collect()
}

#[tokio::test]
async fn no_node_answers_with_less_than_was_acknowledged() {
    let deaf = "[faults]\ndrop_invalidations = true\n";
    let mut cluster = Cluster::build(3, true, |builder| builder.config(deaf)).await;
    let clients = clients(&cluster);
    let mut witness = Witness::of(&cluster);
    assert_eq!(witness.stale_reads(5).await, 0);
    // Read again without a write between: what is held is served after a look at the owner.
    for _ in 0..3 {
        for client in &clients {
            client.get("/v1/instances/i0/state").await.expect(200);
        }
    }
    assert!(states(&clients, "validated").await > 0.0, "copies are served");
    let redis = cluster.redis.as_mut().unwrap();
    redis.kill().await;
    assert_eq!(witness.stale_reads(2).await, 0);
    redis.start_again().await;
    assert_eq!(witness.stale_reads(2).await, 0);
}

#[tokio::test]
async fn without_validation_the_same_check_finds_old_answers() {
    let blind = "[faults]\ndrop_invalidations = true\ncache_blind = true\n";
    let cluster = Cluster::build(3, true, |builder| builder.config(blind)).await;
    assert!(Witness::of(&cluster).stale_reads(3).await > 0);
}

#[tokio::test]
async fn who_does_not_mind_is_answered_without_asking_until_it_is_told() {
    let cluster = Cluster::start().await;
    let clients = clients(&cluster);
    clients[0].patch("/v1/instances/lamp/state", &json!({"desired": {"on": false}})).await.expect(200);
    let owner = cluster.owner("lamp").await;
    let reader = &clients[(owner + 1) % 3];
    let path = "/v1/instances/lamp/state?consistency=eventual";
    assert_eq!(reader.get(path).await.expect(200)["version"], 1);
    let only = std::slice::from_ref(reader);
    let before = (states(only, "hit").await, states(only, "validated").await);
    assert_eq!(reader.get(path).await.expect(200)["version"], 1);
    assert_eq!((states(only, "hit").await, states(only, "validated").await), (before.0 + 1.0, before.1));
    clients[owner].patch("/v1/instances/lamp/state", &json!({"desired": {"on": true}})).await.expect(200);
    wait_until("it was told that its copy is old", PATIENCE, async || {
        reader.get(path).await.expect(200)["version"] == 2
    })
    .await;
}

#[tokio::test]
async fn a_state_that_many_want_at_once_is_loaded_once() {
    const HERD: usize = 1500;
    let cluster = Cluster::start().await;
    let clients = clients(&cluster);
    clients[0].patch("/v1/instances/wanted/state", &json!({"desired": {"on": true}})).await.expect(200);
    let before = loads_of_states(&clients).await;
    let herd = (0..HERD).map(|n| {
        let client = clients[n % 3].clone();
        tokio::spawn(async move { client.get("/v1/instances/wanted/state").await.expect(200)["version"].as_u64() })
    });
    for version in herd.collect::<Vec<_>>() {
        assert_eq!(version.await.unwrap(), Some(1));
    }
    let loaded = loads_of_states(&clients).await - before;
    assert!(loaded <= 3.0, "{loaded} loads");
}

/// Loads of states at all nodes so far.
async fn loads_of_states(clients: &[Http]) -> f64 {
    let mut sum = 0.0;
    for client in clients {
        sum += metric(client, &format!("{}{{type=\"state\"}}", name::CACHE_LOADS)).await;
    }
    sum
}

#[tokio::test]
async fn an_instance_that_is_not_there_is_looked_for_once_by_many() {
    const HERD: usize = 1500;
    let cluster = Cluster::start().await;
    let clients = clients(&cluster);
    // The owner's first look is behind it, and holds for a second.
    let (before, began) = (loads_of_states(&clients).await, std::time::Instant::now());
    let herd = (0..HERD).map(|n| {
        let client = clients[n % 3].clone();
        tokio::spawn(async move { client.get("/v1/instances/nobody/state").await.status })
    });
    for status in herd.collect::<Vec<_>>() {
        assert_eq!(status.await.unwrap(), 404);
    }
    let loaded = loads_of_states(&clients).await - before;
    assert!(loaded <= 3.0 + began.elapsed().as_secs_f64(), "{loaded} loads in {:?}", began.elapsed());
    // It is known at once when it comes to be.
    clients[0].patch("/v1/instances/nobody/state", &json!({"desired": {"on": true}})).await.expect(200);
    for client in &clients {
        assert_eq!(client.get("/v1/instances/nobody/state").await.expect(200)["version"], 1);
    }
}

#[tokio::test]
async fn what_other_nodes_read_they_find_in_redis_and_the_owner_says_that_it_is_the_newest() {
    let cluster = Cluster::start().await;
    let clients = clients(&cluster);
    let path = "/v1/instances/shared/state";
    clients[0].patch(path, &json!({"desired": {"n": 0}})).await.expect(200);
    let seconded = async || {
        let mut sum = 0.0;
        for client in &clients {
            let result = "{tier=\"l2\",type=\"state\",result=\"validated\"}";
            sum += metric(client, &format!("{}{result}", name::CACHE_READS)).await;
        }
        sum
    };
    let mut written = 0;
    wait_until("another node's read was answered from Redis", PATIENCE, async || {
        for client in &clients {
            assert_eq!(client.get(path).await.expect(200)["desired"]["n"], written);
        }
        written += 1;
        clients[0].patch(path, &json!({"desired": {"n": written}})).await.expect(200);
        seconded().await > 0.0
    })
    .await;
    wait_until("what others read is there once it is committed, before anybody asks", PATIENCE, async || {
        for client in &clients {
            client.get(path).await.expect(200);
        }
        written += 1;
        let state = clients[0].patch(path, &json!({"desired": {"n": written}})).await.expect(200);
        let held = clients[0].get("/v1/cache?key=state/shared").await.expect(200);
        let second = held["items"].as_array().unwrap().iter().find(|item| item["tier"] == "l2");
        second.is_some_and(|item| item["version"] == state["version"])
    })
    .await;
}

#[tokio::test]
async fn a_forgotten_instance_leaves_nothing_behind_at_any_node() {
    let cluster = Cluster::start().await;
    let clients = clients(&cluster);
    let path = "/v1/instances/lamp/state";
    for life in 1..=3 {
        clients[life % 3].patch(path, &json!({"desired": {"life": life}})).await.expect(200);
        for client in &clients {
            let state = client.get(path).await.expect(200);
            assert_eq!(
                (&state["version"], &state["desired"]["life"]),
                (&json!(1), &json!(life)),
                "same version, other life"
            );
        }
        clients[(life + 1) % 3].delete("/v1/instances/lamp").await.expect(204);
        for client in &clients {
            assert_eq!(client.get(path).await.status, 404);
        }
    }
}

#[tokio::test]
async fn one_node_counts_hits_and_its_tiers_are_on_the_metrics_page() {
    let node = Node::builder().about(About::Process).start().await;
    let http = node.client();
    http.patch("/v1/instances/lamp/state", &json!({"desired": {"on": true}})).await.expect(200);
    for _ in 0..3 {
        http.get("/v1/instances/lamp/state").await.expect(200);
    }
    let only = std::slice::from_ref(&http);
    assert!(states(only, "hit").await >= 2.0);
    let limit = |tier: &str| format!("{}{{tier=\"{tier}\"}}", name::CACHE_LIMIT);
    for (tier, mib) in [("l1", 64.0), ("l2", 64.0), ("l3", 256.0)] {
        wait_until("the tier tells its size", PATIENCE, async || metric(&http, &limit(tier)).await == mib * MIB as f64)
            .await;
    }
    wait_until("what is held is counted", PATIENCE, async || {
        metric(&http, &format!("{}{{tier=\"l1\"}}", name::CACHE_ENTRIES)).await >= 1.0
    })
    .await;
}

#[tokio::test]
async fn an_operator_sees_what_each_tier_holds() {
    let node = Node::start().await;
    let http = node.client();
    http.patch("/v1/instances/lamp/state", &json!({"desired": {"on": true}})).await.expect(200);
    let url = http.url("");
    let inspect = async |key: &str| {
        let output = crate::support::node::run(&["inspect", "--cache", key, "--json", "--url", &url]).await;
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    http.get("/v1/instances/lamp/state").await.expect(200);
    wait_until("two tiers hold it", PATIENCE, async || {
        let (_, shown) = inspect("state/lamp").await;
        shown.contains("\"l1\"") && shown.contains("\"l2\"") && shown.contains("\"version\": 1")
    })
    .await;
    assert_eq!(inspect("state/nobody").await, (true, String::from("[]\n")));
    assert!(!inspect("lamp").await.0, "a key names its type");
    http.get("/v1/cache?key=thing/lamp").await.problem(400, "QUERY_INVALID");
}

/// A short run of the scenario; whether it succeeded, and what it printed.
async fn scenario(arguments: &[&str]) -> (bool, String) {
    let usual = ["load", "--runs", "1", "--connections", "8", "--warmup", "0.5", "--duration", "2", "--rate", "150"];
    let output = crate::support::node::run(&[&usual[..], arguments].concat()).await;
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[tokio::test]
async fn the_scenario_finds_stale_reads_where_there_are_any_and_only_there() {
    let (clean, told) = scenario(&["--scenario", "cache", "--instances", "40", "--drop-invalidations"]).await;
    assert!(clean && told.contains("| stale reads |  | 0 |"), "{told}");
    let blind = ["--scenario", "cache", "--instances", "40", "--set", "faults.cache_blind=true"];
    let (clean, told) = scenario(&blind).await;
    assert!(!clean && told.contains("the first stale read"), "{told}");
}
