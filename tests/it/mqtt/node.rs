//! The embedded door of a whole node: the real binary, SQLite, instances that answer, `kill -9`.

use serde_json::json;

use super::{
    SUITE,
    raw::{Hello, Raw},
};
use crate::support::{Node, PATIENCE, program, wait_until};

#[tokio::test]
async fn paho_passes_the_suite_against_a_node() {
    let node = Node::start().await;
    let profile = json!({"reflexes": [{"when": "true", "do": [{"reply": "{{stimulus.content}}"}], "stop": true}]});
    node.client().put("/v1/instances/echo", &profile).await.expect(201);
    let port = node.mqtt().port().to_string();
    program::paho("suite.py", &["127.0.0.1", &port, "default"], SUITE).await;
}

#[tokio::test]
async fn mqtt_comes_in_over_websocket() {
    let node = Node::start().await;
    let port = node.http().port().to_string();
    program::paho("websocket.py", &[&port], PATIENCE).await;
}

#[tokio::test]
async fn what_is_sent_again_after_kill_9_is_not_decided_again() {
    let mut node = Node::start().await;
    let topic = "sophont/default/lamp/in/x";
    let (mut device, _) = Raw::connect(node.mqtt(), Hello::v3("d").lasting()).await;
    for id in 1..=20 {
        device.publish(topic, &format!("m{id}"), 1, id).await;
        assert_eq!(device.ack(0x40).await.0, id);
    }
    node.kill9().await;
    node.start_again().await;
    let (mut device, is_present) = Raw::connect(node.mqtt(), Hello::v3("d").lasting()).await;
    assert!(is_present);
    for id in 1..=20 {
        device.publish_again(topic, &format!("m{id}"), 1, id).await;
        assert_eq!(device.ack(0x40).await.0, id);
    }
    device.publish(topic, "m20", 1, 20).await;
    assert_eq!(device.ack(0x40).await.0, 20);
    wait_until("the last one is decided", PATIENCE, async || {
        let turns = node.client().get("/v1/instances/lamp/turns?limit=100").await.expect(200);
        turns["items"].as_array().unwrap().len() >= 21
    })
    .await;
    let turns = node.client().get("/v1/instances/lamp/turns?limit=100").await.expect(200);
    let texts: Vec<_> =
        turns["items"].as_array().unwrap().iter().map(|turn| turn["stimulus"]["content"].clone()).collect();
    let expected: Vec<_> = (1..=20).chain([20]).map(|id| json!(format!("m{id}"))).collect();
    assert_eq!(texts, expected);
}
