//! Sizes that change while a node runs, seen from outside: what the tiers of the cache hold and the process takes, and how many
//! calls of models and tools run at once.

use serde_json::json;
use sophont::{
    config,
    runtime::clock::Clock,
    scaling::cache::{Kind, Options, Sizes, Slot, TieredCache},
    telemetry::metric as name,
    types::TenantId,
};

use crate::{
    settings::{edit, in_force, node, until_told},
    support::{Http, Node, PATIENCE, metric, wait_until},
};

const MIB: u64 = 1024 * 1024;

async fn held(http: &Http, tier: &str) -> f64 {
    metric(http, &format!("{}{{tier=\"{tier}\"}}", name::CACHE_BYTES)).await
}

async fn pool(http: &Http, of: &str, pool: &str) -> f64 {
    metric(http, &format!("{of}{{pool=\"{pool}\"}}")).await
}

/// Text that does not get smaller.
fn noise(bytes: usize) -> String {
    let mut hasher = blake3::Hasher::new().update(b"noise").finalize_xof();
    let mut noise = vec![0; bytes / 2];
    hasher.fill(&mut noise);
    noise.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn resident(node: &Node) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[tokio::test]
async fn what_the_first_two_tiers_hold_and_take_follows_their_sizes() {
    let config = |l1: usize, l2: usize| {
        format!(
            "[scaling]\ncache_l1_size_mb = {l1}\ncache_l2_size_mb = {l2}\n[instances]\nidle_passivate_seconds = 1\n"
        )
    };
    let node = node(&config(64, 64)).await;
    let http = node.client();
    let text = noise(200_000);
    for n in 0..120 {
        let path = format!("/v1/instances/i{n}/state");
        http.patch(&path, &json!({"desired": {"text": text}})).await.expect(200);
        http.get(&path).await.expect(200);
    }
    let full = 40.0 * MIB as f64;
    wait_until("both tiers hold much", PATIENCE, async || {
        held(&http, "l1").await > full && held(&http, "l2").await > full / 4.0
    })
    .await;
    wait_until("instances left memory", PATIENCE, async || metric(&http, name::ACTIVE).await == 0.0).await;
    let before = resident(&node);
    edit(&node, &config(64, 1));
    wait_until("the second tier is small", PATIENCE, async || held(&http, "l2").await <= MIB as f64).await;
    assert!(held(&http, "l1").await > full, "the first is as it was");
    edit(&node, &config(1, 1));
    wait_until("the first tier is small", PATIENCE, async || held(&http, "l1").await <= MIB as f64).await;
    // Both held more than 50 MiB; most of it is given back.
    wait_until("memory is given back", PATIENCE, async || resident(&node) + 40 * MIB < before).await;
    assert_eq!(in_force(&http, "scaling.cache_l2_size_mb").await, 1.0);
}

#[tokio::test]
async fn what_the_third_tier_holds_and_its_file_follow_its_size() {
    let config = |mib: usize| format!("[scaling]\ncache_l3_size_mb = {mib}\n");
    let mut node = node(&config(16)).await;
    node.term();
    assert!(node.wait_exit(PATIENCE).await.success());
    // As a node with an engine would leave it.
    tokio::task::spawn_blocking({
        let folder = node.data_dir();
        move || {
            actix_rt::System::new().block_on(async move {
                let arbiters = [actix_rt::Arbiter::new(), actix_rt::Arbiter::new()];
                let cache = TieredCache::new(Options {
                    sizes: Sizes { l1: MIB, l2: 0, l3: 16 * MIB },
                    policy: config::Cache::default(),
                    redis: None,
                    folder: Some(folder),
                    clock: Clock::System,
                });
                cache.start(arbiters[0].handle(), arbiters[1].handle());
                let slot = |n: usize| Slot::new(Kind::Embedding, &TenantId::new("default").unwrap(), format!("e{n}"));
                let last = slot(0);
                wait_until("the actors run", PATIENCE, async || {
                    cache.put(&last, 0, noise(20_000));
                    cache.inspect(&last).await.iter().any(|found| found.tier == "l3")
                })
                .await;
                for n in 1..300 {
                    cache.put(&slot(n), 0, noise(20_000));
                }
                let last = slot(299);
                wait_until("all is written", PATIENCE, async || {
                    cache.inspect(&last).await.iter().any(|found| found.tier == "l3")
                })
                .await;
                assert!(arbiters.iter().all(actix_rt::Arbiter::stop));
                arbiters.into_iter().for_each(|arbiter| arbiter.join().unwrap());
            });
        }
    })
    .await
    .unwrap();
    node.start_again().await;
    let http = node.client();
    let file = || std::fs::metadata(node.data_dir().join("cache.db")).unwrap().len();
    wait_until("it holds what was left", PATIENCE, async || held(&http, "l3").await > 4.0 * MIB as f64).await;
    let before = file();
    edit(&node, &config(1));
    wait_until("it holds less", PATIENCE, async || held(&http, "l3").await <= MIB as f64).await;
    wait_until("the file is smaller", PATIENCE, async || file() < before / 2).await;
    edit(&node, &config(1_048_577));
    until_told(&node, "scaling.cache_l3_size_mb: 1048577 is out of range, allowed is 0 to 1048576").await;
    assert_eq!(in_force(&http, "scaling.cache_l3_size_mb").await, 1.0);
}

/// A model server that takes calls and never answers.
async fn silent_server() -> (String, tokio::task::JoinHandle<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let accept = tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            open.push(stream);
        }
    });
    (url, accept)
}

#[tokio::test]
async fn as_many_calls_of_a_model_run_and_wait_as_the_file_says() {
    const POOL: &str = "model/silent";
    let (url, server) = silent_server().await;
    let config = |calls: usize, waiting: usize| {
        format!(
            "[cognition]\nthink_seconds = 600\n[cognition.providers.silent]\nbase_url = \"{url}\"\nmodel = \"m\"\n\
             idle_seconds = 600\nmax_concurrent = {calls}\nmax_waiting = {waiting}\n[tools]\nmax_concurrent = {calls}\n"
        )
    };
    let node = node(&config(1, 100)).await;
    let http = node.client();
    let think = async |n: usize| {
        http.put_instance(&format!("i{n}"), &json!({"engine": "llm"})).await;
        http.drop_in(&format!("i{n}"), &json!({"id": "s", "content": "hello"})).await.expect(202);
    };
    for n in 0..4 {
        think(n).await;
    }
    let are = async |in_use: f64, waiting: f64| {
        (pool(&http, name::POOL_IN_USE, POOL).await, pool(&http, name::POOL_WAITING, POOL).await) == (in_use, waiting)
    };
    wait_until("one calls, three wait", PATIENCE, async || are(1.0, 3.0).await).await;
    let ready = http.get("/health/ready").await.text;
    assert!(!ready.contains("model/silent: "), "nobody waited long, or in vain: {ready}");
    edit(&node, &config(3, 100));
    wait_until("three call, one waits", PATIENCE, async || are(3.0, 1.0).await).await;
    assert_eq!((pool(&http, name::POOL_SIZE, POOL).await, pool(&http, name::POOL_SIZE, "tools").await), (3.0, 3.0));
    edit(&node, &config(1, 1));
    wait_until("no more are to call", PATIENCE, async || pool(&http, name::POOL_SIZE, POOL).await == 1.0).await;
    think(4).await;
    let refused = format!("{}{{pool=\"{POOL}\",reason=\"full\"}}", name::POOL_REFUSED);
    wait_until("one too many is refused", PATIENCE, async || metric(&http, &refused).await >= 1.0).await;
    wait_until("those under way go on, and one waits", PATIENCE, async || are(3.0, 1.0).await).await;
    until_told(&node, "a pool is too small for what is asked of it").await;
    let ready = http.get("/health/ready").await.text;
    assert!(ready.contains("model/silent: "), "{ready}");
    server.abort();
}
