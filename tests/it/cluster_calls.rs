//! What operators see and ask: a single node is a cluster of one.

use serde_json::json;

use crate::support::{About, Node};

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
