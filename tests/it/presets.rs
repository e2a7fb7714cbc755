//! Presets keep what they claim: each is started as it is, with real servers where it wants them, and measured.

use futures_util::future::join_all;
use sophont::config::preset::{self, Preset};

use crate::support::{
    About, Node, PATIENCE, Postgres, http::echo, node, postgres, redis::Redis, resident_kb, wait_until,
};

/// Connections of nodes to a server.
async fn connections(url: &str) -> usize {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sophont'";
    let counted: i64 = postgres::connect(url).await.query_one(count, &[]).await.unwrap().get(0);
    usize::try_from(counted).unwrap()
}

/// Some work for every part: turns, reads of what is in memory and of what is not.
async fn exercise(node: &Node) {
    let http = node.client();
    http.put_instance("lamp", &echo()).await;
    let some = join_all((0..40).map(|n| {
        let http = http.clone();
        async move {
            http.say(&format!("i{n}"), "s1", "hello").await.expect(200);
            http.get(&format!("/v1/instances/nobody-{n}")).await.expect(404);
            http.get(&format!("/v1/instances/i{n}/turns")).await.expect(200);
        }
    }));
    some.await;
}

fn assert_memory(node: &Node, preset: Preset) {
    let (claim, taken) = (preset.claim().unwrap(), resident_kb(node.pid()) / 1024);
    println!("preset {}: {taken} MiB of {} MiB claimed", preset.name, claim.memory_mb);
    assert!(taken <= claim.memory_mb, "{} takes {taken} MiB and claims {}", preset.name, claim.memory_mb);
}

#[tokio::test]
async fn those_for_one_process_take_what_they_claim() {
    for preset in preset::ALL.into_iter().filter(|preset| preset.claim().unwrap().connections == 0) {
        let node = Node::builder().about(About::Folder).arg("--preset").arg(preset.name).start().await;
        exercise(&node).await;
        assert_memory(&node, preset);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_for_many_nodes_take_what_they_claim() {
    let redis = Redis::start().await;
    let server = Postgres::start();
    let replica = server.replica();
    for preset in preset::ALL.into_iter().filter(|preset| preset.claim().unwrap().connections > 0) {
        let url = server.database().await;
        let mut builder = Node::builder().about(About::Process).arg("--preset").arg(preset.name);
        let name = url.rsplit('/').next().unwrap().to_owned();
        let replica = (preset.name == "500+").then(|| replica.url(&name));
        let sets = [
            Some(format!("store.postgres.url={url}")),
            Some(format!("redis.url={}", redis.url())),
            replica.as_ref().map(|url| format!("store.postgres.replica_url={url}")),
        ];
        for set in sets.into_iter().flatten() {
            builder = builder.arg("--set").arg(set);
        }
        let mut node = builder.start().await;
        exercise(&node).await;
        assert_memory(&node, preset);
        let claim = preset.claim().unwrap();
        for url in std::iter::once(&url).chain(&replica) {
            let open = connections(url).await;
            println!("preset {}: {open} connections of {} claimed", preset.name, claim.connections);
            assert!(open <= claim.connections, "{}: {open} connections, claims {}", preset.name, claim.connections);
        }
        assert!(connections(&url).await > 0, "they are found");
        node.term();
        assert!(node.wait_exit(PATIENCE).await.success());
        wait_until("its connections are gone", PATIENCE, async || connections(&url).await == 0).await;
    }
}

#[tokio::test]
async fn a_preset_is_the_lowest_layer_above_the_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("own.toml");
    std::fs::write(&file, "[scaling]\ncache_l1_size_mb = 5\n").unwrap();
    let file = file.to_str().unwrap();
    let printed = node::run(&["config", "print", "--preset", "2-10", "--config", file]).await;
    let printed = String::from_utf8(printed.stdout).unwrap();
    let line = |key: &str| printed.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
    assert!(line("cache_l1_size_mb = 5").ends_with("own.toml:2:1"), "{printed}");
    assert!(line("max_consciousness_instances = 20000").ends_with("# live, preset 2-10"), "{printed}");
    assert!(line("strategy").ends_with("# default"), "{printed}");
    let unknown = node::run(&["serve", "--preset", "3"]).await;
    let told = String::from_utf8(unknown.stderr).unwrap();
    assert!(!unknown.status.success() && told.contains("1, 2-10, 10-50, 50-500, 500+"), "{told}");
}
