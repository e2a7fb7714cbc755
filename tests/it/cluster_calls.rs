//! What operators see and ask: a single node is a cluster of one.

use serde_json::json;

use crate::support::{About, Node, PATIENCE, cluster::Cluster, wait_until};

#[tokio::test]
async fn a_node_that_insists_on_being_alone_is() {
    let only = "SOPHONT__SCALING__HORIZONTAL_SCALING_ENABLED";
    let mut cluster = Cluster::build_uneven(1, false, |_, builder| builder.env(only, "false")).await;
    let mut second = cluster.nodes[0].twin().launch();
    assert!(!second.wait_exit(PATIENCE).await.success());
    let log = second.log();
    for part in ["horizontal_scaling_enabled is false here", "n0.", "leave scaling.horizontal_scaling_enabled out"] {
        assert!(log.contains(part), "{log}");
    }
    // One that does not insist may join: the fences keep both right, and the first says what it thinks of it.
    let guest = cluster.nodes[0].twin().without_env(only).start().await;
    wait_until("it complains", PATIENCE, async || cluster.nodes[0].log().contains("other nodes joined")).await;
    drop(guest);
    // An earlier life of its own does not count for longer than it lives.
    cluster.nodes[0].kill9().await;
    cluster.nodes[0].start_again().await;
    let mut shared = Node::builder().env(only, "true").config("[store]\nbackend = \"sqlite\"").launch();
    assert!(!shared.wait_exit(PATIENCE).await.success());
    assert!(shared.log().contains("several nodes need a store they can share"), "{}", shared.log());
}

#[tokio::test]
async fn a_node_alone_is_a_cluster_of_one() {
    let node =
        Node::builder().about(About::Process).config("[node]\nname = \"alone\"\n[cluster]\nshards = 8").start().await;
    let http = node.client();
    let nodes = http.get("/v1/cluster/nodes").await.expect(200);
    let row = &nodes["items"][0];
    assert_eq!(
        (nodes["items"].as_array().unwrap().len(), &row["name"], &row["here"]),
        (1, &json!("alone"), &json!(true))
    );
    assert_eq!((&row["status"], &row["shards"]), (&json!("live"), &json!(8)));

    let shards = http.get("/v1/cluster/shards?limit=3").await.expect(200);
    assert_eq!(shards["next"], "2");
    let rest = http.get("/v1/cluster/shards?after=2").await.expect(200);
    assert_eq!((rest["items"].as_array().unwrap().len(), &rest["next"]), (5, &json!(null)));
    for shard in shards["items"].as_array().unwrap().iter().chain(rest["items"].as_array().unwrap()) {
        assert_eq!((&shard["node"], &shard["epoch"]), (&row["node"], &json!(1)));
    }
    let nobody = http.post("/v1/cluster/nodes/nobody/drain", &json!(null)).await.expect(404);
    assert_eq!(nobody["code"], "NODE_NOT_FOUND");
}
