//! Settings of a node that runs: the file is edited, and the node goes by it, or says why not and goes on as it was.

use std::fs;

use nix::sys::signal::Signal;
use serde_json::json;
use sophont::telemetry::metric as name;

use crate::support::{About, Http, Node, PATIENCE, http::echo, metric, wait_until};

/// A node with this configuration.
async fn node(config: &str) -> Node {
    Node::builder().about(About::Process).config(config).start().await
}

/// Puts another file in place of the node's, in one step, as editors and orchestrators do.
fn edit(node: &Node, config: &str) {
    let new = node.home().join("new.toml");
    fs::write(&new, config).unwrap();
    fs::rename(new, node.home().join("sophont.toml")).unwrap();
}

/// How often this stands in the node's log.
fn told(node: &Node, text: &str) -> usize {
    node.log().matches(text).count()
}

async fn until_told(node: &Node, text: &str) {
    wait_until(&format!("the log says: {text}"), PATIENCE, async || told(node, text) > 0).await;
}

async fn in_force(http: &Http, key: &str) -> f64 {
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
