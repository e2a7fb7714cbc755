//! Settings of a node that runs: the file is edited, and the node goes by it, or says why not and goes on as it was.

use std::fs;

use nix::sys::signal::Signal;
use serde_json::json;
use sophont::telemetry::metric as name;

use crate::support::{
    About, Http, Node, PATIENCE, cluster::Cluster, http::echo, metric, postgres, redis::Redis, wait_until,
};

/// A node with this configuration.
pub(crate) async fn node(config: &str) -> Node {
    Node::builder().about(About::Process).config(config).start().await
}

/// Puts another file in place of the node's, in one step, as editors and orchestrators do.
pub(crate) fn edit(node: &Node, config: &str) {
    let new = node.home().join("new.toml");
    fs::write(&new, config).unwrap();
    fs::rename(new, node.home().join("sophont.toml")).unwrap();
}

/// How often this stands in the node's log.
fn told(node: &Node, text: &str) -> usize {
    node.log().matches(text).count()
}

pub(crate) async fn until_told(node: &Node, text: &str) {
    wait_until(&format!("the log says: {text}"), PATIENCE, async || told(node, text) > 0).await;
}

pub(crate) async fn in_force(http: &Http, key: &str) -> f64 {
    metric(http, &format!("{}{{key=\"{key}\"}}", name::CONFIG_VALUE)).await
}

async fn reloads(http: &Http, result: &str) -> f64 {
    metric(http, &format!("{}{{result=\"{result}\"}}", name::CONFIG_RELOADS)).await
}

const LIMIT: &str = "scaling.max_consciousness_instances";

#[tokio::test]
async fn fewer_instances_stay_in_memory_when_the_file_says_so() {
    let node = node("[scaling]\nmax_consciousness_instances = 100\n[cluster]\nshards = 2").await;
    let http = node.client();
    for n in 0..40 {
        http.say(&format!("i{n}"), "s1", "hello").await.expect(200);
    }
    assert_eq!(metric(&http, name::ACTIVE).await, 40.0);
    assert_eq!(in_force(&http, LIMIT).await, 100.0);
    edit(&node, "[scaling]\nmax_consciousness_instances = 5\n[cluster]\nshards = 2");
    wait_until("most of them left memory", PATIENCE, async || metric(&http, name::ACTIVE).await <= 5.0).await;
    assert_eq!(in_force(&http, LIMIT).await, 5.0);
    assert_eq!(told(&node, "scaling.max_consciousness_instances: 100 -> 5"), 1, "each change is told once");
    assert_eq!(reloads(&http, "applied").await, 1.0);
    assert!(metric(&http, name::CONFIG_CHANGED).await > 1.0e9);
    assert_eq!(http.say("i0", "s2", "again").await.expect(200)["turn"], 2);
}

#[tokio::test]
async fn each_limit_of_instances_is_what_the_file_says_now() {
    let config = |idle: u32, think: u32| {
        format!("[instances]\nidle_passivate_seconds = {idle}\n[cognition]\nthink_seconds = {think}")
    };
    let node = node(&config(3600, 1)).await;
    let http = node.client();
    http.put_instance("slow", &json!({"engine": "scripted", "script": {"delay_ms": 1500, "reply": "done"}})).await;
    http.put_instance("lamp", &echo()).await;
    http.say("lamp", "s1", "hello").await.expect(200);
    edit(&node, &config(1, 60));
    until_told(&node, "cognition.think_seconds: 1 -> 60").await;
    let turn = http.say("slow", "s1", "think").await.expect(200);
    assert_eq!(turn["outcome"], "replied", "the thought had longer than at the start: {turn}");
    wait_until("the idle instance left memory", PATIENCE, async || {
        http.get("/v1/instances/lamp").await.expect(200)["activation"] != "active"
    })
    .await;
}

#[tokio::test]
async fn a_hangup_has_the_file_read_at_once_and_says_when_nothing_is_new() {
    let node = node("").await;
    let http = node.client();
    node.signal(Signal::SIGHUP);
    wait_until("the file was read again", PATIENCE, async || reloads(&http, "unchanged").await == 1.0).await;
    assert!(told(&node, "SIGHUP") == 1, "{}", node.log());
    let config = |level: &str| format!("[telemetry]\nlog = \"{level}\"");
    edit(&node, &config("warn"));
    node.signal(Signal::SIGHUP);
    wait_until("the log is silent", PATIENCE, async || reloads(&http, "applied").await == 1.0).await;
    assert_eq!(told(&node, "setting changed"), 0, "the change itself is below the level it asks for");
    edit(&node, &config("info"));
    node.signal(Signal::SIGHUP);
    until_told(&node, "setting changed: telemetry.log: \\\"warn\\\" -> \\\"info\\\"").await;
}

#[tokio::test]
async fn a_file_with_a_mistake_changes_nothing_and_is_told_with_place_and_hint() {
    let node = node("[scaling]\nmax_consciousness_instances = 100").await;
    let http = node.client();
    edit(&node, "[scaling]\nmax_consciousness_instances = 7\nload_secnds = 3\n[instances]\nscan_seconds = 0\n");
    until_told(&node, "sophont.toml:3:1: scaling.load_secnds: unknown setting (did you mean 'load_seconds'?)").await;
    wait_until("it is counted", PATIENCE, async || reloads(&http, "refused").await == 1.0).await;
    assert_eq!(in_force(&http, LIMIT).await, 100.0);
    edit(&node, "[scaling]\nmax_consciousness_instances = 7\n[instances]\nscan_seconds = 0\n");
    until_told(&node, "instances.scan_seconds: 0 is out of range, allowed is 1 to 3600").await;
    assert_eq!(in_force(&http, LIMIT).await, 100.0);
    edit(&node, "[scaling]\nmax_consciousness_instances = 7\n");
    until_told(&node, "scaling.max_consciousness_instances: 100 -> 7").await;
    assert_eq!(in_force(&http, LIMIT).await, 7.0);
}

#[tokio::test]
async fn what_is_fixed_keeps_the_rest_back_and_is_named() {
    let node = node("").await;
    let http = node.client();
    edit(&node, "[scaling]\nmax_consciousness_instances = 7\n[store]\nmax_batch = 7\n[cluster]\nshards = 7\n");
    until_told(&node, "needs a restart: cluster.shards, store.max_batch").await;
    assert_eq!(in_force(&http, LIMIT).await, 1_000_000.0);
    assert_eq!(told(&node, "setting changed"), 0);
}

#[tokio::test]
async fn layers_above_the_file_stay_above_it() {
    let node = Node::builder()
        .about(About::Process)
        .config("[scaling]\nmax_consciousness_instances = 100")
        .arg("--set")
        .arg("scaling.max_consciousness_instances=50")
        .env("SOPHONT__INSTANCES__SCAN_SECONDS", "7")
        .start()
        .await;
    let http = node.client();
    edit(
        &node,
        "[scaling]\nmax_consciousness_instances = 3\n[instances]\nscan_seconds = 8\nidle_passivate_seconds = 9",
    );
    until_told(&node, "instances.idle_passivate_seconds: 300 -> 9").await;
    assert_eq!((in_force(&http, LIMIT).await, in_force(&http, "instances.scan_seconds").await), (50.0, 7.0));
    assert_eq!(told(&node, "setting changed"), 1);
}

/// As Kubernetes renews a volume: the file stays where it is and is reached through a link that is switched.
#[tokio::test]
async fn a_switched_link_is_another_file_and_a_missing_file_is_none() {
    let node = node("").await;
    let http = node.client();
    let at = |path: &str| node.home().join(path);
    for (version, limit) in [("v1", 11), ("v2", 12)] {
        fs::create_dir(at(version)).unwrap();
        let text = format!("[scaling]\nmax_consciousness_instances = {limit}\n");
        fs::write(at(version).join("sophont.toml"), text).unwrap();
    }
    let switch = |to: &str, link: &str| {
        std::os::unix::fs::symlink(to, at("link")).unwrap();
        fs::rename(at("link"), at(link)).unwrap();
    };
    switch("v1", "..data");
    switch("..data/sophont.toml", "sophont.toml");
    wait_until("the first is in force", PATIENCE, async || in_force(&http, LIMIT).await == 11.0).await;
    switch("v2", "..data");
    wait_until("the second is in force", PATIENCE, async || in_force(&http, LIMIT).await == 12.0).await;
    fs::remove_file(at("sophont.toml")).unwrap();
    until_told(&node, "the configuration file is gone").await;
    assert_eq!(in_force(&http, LIMIT).await, 12.0);
    node.signal(Signal::SIGHUP);
    until_told(&node, "cannot read the configuration file").await;
    assert_eq!(in_force(&http, LIMIT).await, 12.0);
    http.say("lamp", "s1", "hello").await.expect(200);
}

/// Threads of a node whose name begins so.
fn threads(node: &Node, name: &str) -> usize {
    let tasks = fs::read_dir(format!("/proc/{}/task", node.pid())).expect("the process runs");
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|found| found.starts_with(name)).count()
}

#[tokio::test]
async fn as_many_threads_read_the_data_folder_as_the_file_says() {
    let config = |size: usize| format!("[store]\nreaders = 4\n[scaling]\nconnection_pool_size = {size}\n");
    let node = node(&config(9)).await;
    let http = node.client();
    assert_eq!(threads(&node, "store-read"), 4, "at most one for each of store.readers");
    for size in [1, 3] {
        edit(&node, &config(size));
        wait_until("there are so many", PATIENCE, async || threads(&node, "store-read") == size).await;
        assert_eq!(in_force(&http, "scaling.connection_pool_size").await, size as f64);
        assert_eq!(metric(&http, &format!("{}{{pool=\"sqlite_readers\"}}", name::POOL_SIZE)).await, size as f64);
        for n in 0..20 {
            http.get(&format!("/v1/instances/nobody-{size}-{n}")).await.expect(404);
        }
    }
}

/// A table is locked, so that each read takes its connection and stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_connections_read_a_database_as_the_file_says_and_what_is_slow_or_strained_is_told() {
    let url = postgres::shared().database().await;
    let config = |size: usize, overflow: usize, slow: usize| {
        format!(
            "[store]\nbackend = \"postgres\"\nslow_query_ms = {slow}\n[store.postgres]\nurl = \"{url}\"\nlock_ms = 60000\n\
             statement_ms = 60000\n[scaling]\nconnection_pool_size = {size}\npool_overflow = {overflow}\n"
        )
    };
    let node = node(&config(1, 1, 0)).await;
    let http = node.client();
    let admin = postgres::connect(&url).await;
    let watch = postgres::connect(&url).await;
    let blocked = async || {
        let count = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'instances'::regclass \
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        watch.query_one(count, &[]).await.unwrap().get::<_, i64>(0)
    };
    admin.batch_execute("BEGIN; LOCK TABLE instances IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let reads: Vec<_> = (0..6)
        .map(|n| {
            let http = http.clone();
            tokio::spawn(async move { http.get(&format!("/v1/instances/i{n}/state")).await.status })
        })
        .collect();
    wait_until("two wait for the server, the others for a connection", PATIENCE, async || {
        let waiting = metric(&http, &format!("{}{{pool=\"postgres_readers\"}}", name::POOL_WAITING)).await;
        blocked().await == 2 && waiting >= 4.0
    })
    .await;
    until_told(&node, "a pool is too small for what is asked of it").await;
    edit(&node, &config(3, 0, 500));
    wait_until("three wait for the server", PATIENCE, async || blocked().await == 3).await;
    admin.batch_execute("ROLLBACK").await.unwrap();
    for read in reads {
        assert_eq!(read.await.unwrap(), 404);
    }
    let strained = http.get("/health/ready").await.text;
    assert!(strained.contains("postgres_readers: "), "readiness tells for a minute: {strained}");
    until_told(&node, "slow statement").await;
    assert!(told(&node, "SELECT turns") > 0 && metric(&http, name::STORE_SLOW).await > 0.0, "it is named");
    let statements = metric(&http, &format!("{}{{result=\"miss\"}}", name::STORE_STATEMENTS)).await;
    assert!(statements > 0.0, "statements are prepared once a connection");
    edit(&node, &config(1, 0, 0));
    wait_until("what is too much is closed", PATIENCE, async || {
        metric(&http, &format!("{}{{reason=\"overflow\"}}", name::POOL_RECYCLED)).await >= 2.0
    })
    .await;
}

#[tokio::test]
async fn a_node_is_full_beyond_its_thresholds_and_alone_it_takes_what_can_wait_all_the_same() {
    for (key, claim, metric_of_all) in [("cpu", "busy_permille = 900", 2.0), ("memory", "memory_permille = 900", 2.0)] {
        let config = |percent: u32| {
            format!(
                "[scaling]\nauto_scaling_threshold_{key} = {percent}\nfull_after_seconds = 1\nspare_after_seconds = 1\n\
                 [faults]\n{claim}\n"
            )
        };
        let node = node(&config(100)).await;
        let http = node.client();
        let load = async || http.get("/health/ready").await.expect(200)["checks"]["load"].clone();
        let background = async |id: &str| {
            let stimulus = json!({"id": id, "content": "hello", "priority": "background"});
            http.post("/v1/instances/lamp/stimuli", &stimulus).await
        };
        background("s1").await.expect(200);
        assert_eq!(load().await, "ok");
        edit(&node, &config(80));
        wait_until("it is full", PATIENCE, async || metric(&http, name::SCALING_FULL).await == 1.0).await;
        let detail = load().await;
        let setting = format!("scaling.auto_scaling_threshold_{key}");
        assert!(detail.as_str().unwrap().contains(&setting), "readiness tells, and the node serves: {detail}");
        background("s2").await.expect(200);
        assert_eq!(metric(&http, name::SCALING_REFUSED).await, 0.0, "there is no other node to wait for");
        http.say("lamp", "s3", "a person").await.expect(200);
        wait_until("another node is wanted", PATIENCE, async || {
            metric(&http, name::SCALING_DESIRED).await == metric_of_all
        })
        .await;
        edit(&node, &config(100));
        wait_until("it has room", PATIENCE, async || metric(&http, name::SCALING_FULL).await == 0.0).await;
        background("s4").await.expect(200);
        wait_until("one node is enough", PATIENCE, async || metric(&http, name::SCALING_DESIRED).await == 1.0).await;
        assert_eq!(load().await, "ok");
    }
}

/// Of two nodes the one whose memory is full gives shards away, by what it says in its reports, and refuses what can wait for
/// the other one.
#[tokio::test]
async fn a_full_node_gives_shards_away_and_refuses_what_can_wait() {
    let cluster = Cluster::build_uneven(2, true, |number, builder| {
        let builder =
            builder.arg("--set").arg("scaling.full_after_seconds=1").arg("--set").arg("scaling.load_seconds=1");
        if number == 0 { builder.arg("--set").arg("faults.memory_permille=950") } else { builder }
    })
    .await;
    wait_until("it has clearly fewer shards", PATIENCE, async || {
        let rows = cluster.rows(1).await;
        let of = |name: &str, key: &str| {
            rows.iter().find(|row| row["name"] == name).and_then(|row| row[key].as_u64()).unwrap_or_default()
        };
        of("n0", "weight") < 80 && of("n0", "shards") + 4 <= of("n1", "shards") && of("n0", "shards") > 0
    })
    .await;
    let http = cluster.client(0);
    let background = json!({"content": "hello", "priority": "background"});
    let mut number = 0;
    wait_until("an instance of the full node takes no background work", PATIENCE, async || {
        number += 1;
        let answer = http.post(&format!("/v1/instances/b{number}/stimuli"), &background).await;
        if answer.status == 503 {
            answer.problem(503, "OVERLOADED");
            assert_eq!(answer.header("retry-after"), "1");
            assert!(metric(&http, name::SCALING_REFUSED).await >= 1.0);
            http.say(&format!("b{number}"), "s", "a person").await.expect(200);
        }
        answer.status == 503
    })
    .await;
}

#[tokio::test]
async fn whether_a_node_is_one_of_several_changes_while_it_runs() {
    let (url, redis) = (postgres::shared().database().await, Redis::start().await);
    let config = |name: &str, several: bool| {
        format!(
            "[node]\nname = \"{name}\"\n[store]\nbackend = \"postgres\"\n[store.postgres]\nurl = \"{url}\"\nlanes = 1\n\
             [cluster]\nshards = 8\n[redis]\nurl = \"{}\"\n[scaling]\nhorizontal_scaling_enabled = {several}\n",
            redis.url()
        )
    };
    let first = node(&config("n0", false)).await;
    let http = first.client();
    let mut second = node(&config("n1", true)).await;
    until_told(&first, "other nodes joined").await;
    assert_eq!(metric(&http, name::BUS_SENT).await, 0.0, "it says nothing on the bus");
    edit(&first, &config("n0", true));
    wait_until("it speaks to the other", PATIENCE, async || metric(&http, name::BUS_SENT).await > 0.0).await;
    edit(&first, &config("n0", false));
    until_told(&first, "is alive in this database; drain it first").await;
    assert_eq!(in_force(&http, "scaling.horizontal_scaling_enabled").await, 1.0, "nothing has changed");
    second.term();
    assert!(second.wait_exit(PATIENCE).await.success());
    wait_until("it may be alone again", PATIENCE, async || {
        first.signal(Signal::SIGHUP);
        in_force(&http, "scaling.horizontal_scaling_enabled").await == 0.0
    })
    .await;
    http.say("lamp", "s1", "hello").await.expect(200);
}
