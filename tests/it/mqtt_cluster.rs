//! Devices of the embedded listeners of three nodes, as behind a TCP balancer: sessions, queues, retained values and messages
//! are the cluster's, and a node may die with all its connections.

use std::collections::BTreeSet;

use crate::{
    mqtt::raw::{Hello, Raw},
    support::{PATIENCE, cluster::Cluster, http::echo, wait_for, wait_until},
};
use nix::sys::signal::Signal;
use serde_json::json;

/// The first byte of a PUBLISH says that it may have been sent before.
const DUP: u8 = 8;

async fn at(cluster: &Cluster, node: usize, hello: Hello<'_>) -> (Raw, bool) {
    Raw::connect(cluster.nodes[node].mqtt(), hello).await
}

/// Publishes by a client of its own, and waits for the acknowledgement.
async fn publish(cluster: &Cluster, node: usize, topic: &str, payload: &str) {
    let (mut raw, _) = at(cluster, node, Hello::v5(&format!("publisher-{payload}"))).await;
    raw.publish(topic, payload, 1, 1).await;
    assert_eq!(raw.ack(0x40).await, (1, 0), "{topic} {payload}");
    raw.goodbye().await;
}

/// The next message is this one; acknowledges it.
async fn expect(raw: &mut Raw, payload: &str) {
    let (_, said, _, id) = raw.message().await;
    assert_eq!(said, payload);
    raw.say(0x40, id).await;
}

async fn is_taken_over(mut raw: Raw) {
    assert_eq!(raw.packet().await, Some((0xe0, vec![0x8e, 0])));
    assert_eq!(raw.packet().await, None);
}

#[tokio::test]
async fn a_session_goes_on_at_another_node() {
    let cluster = Cluster::start().await;
    let (mut first, was_there) = at(&cluster, 0, Hello::v5("dev").lasting()).await;
    assert!(!was_there);
    first.subscribe("t/+", 1).await;
    publish(&cluster, 2, "t/1", "one").await;
    let (_, payload, flags, id) = first.message().await;
    assert_eq!((&*payload, flags & DUP), ("one", 0));

    // Over to another node, with a message unacknowledged.
    let (mut second, was_there) = at(&cluster, 1, Hello::v5("dev").lasting()).await;
    assert!(was_there, "the session is the cluster's");
    is_taken_over(first).await;
    let (_, payload, flags, again) = second.message().await;
    assert_eq!((&*payload, flags & DUP, again), ("one", DUP, id));
    second.say(0x40, id).await;
    publish(&cluster, 0, "t/2", "two").await;
    expect(&mut second, "two").await;

    // What is published anywhere while it is away waits for it, once.
    second.goodbye().await;
    for (node, payload) in [(0, "three"), (1, "four"), (2, "five")] {
        publish(&cluster, node, "t/x", payload).await;
    }
    let (mut third, was_there) = at(&cluster, 2, Hello::v5("dev").lasting()).await;
    assert!(was_there);
    let mut waited = Vec::new();
    for _ in 0..3 {
        let (_, payload, _, id) = third.message().await;
        third.say(0x40, id).await;
        waited.push(payload);
    }
    // Those of one publisher keep their order; these are three.
    waited.sort();
    assert_eq!(waited, ["five", "four", "three"]);
    publish(&cluster, 0, "t/x", "six").await;
    expect(&mut third, "six").await;
    third.silence().await;

    // A clean start ends it everywhere.
    let (fresh, was_there) = at(&cluster, 0, Hello::v5("dev")).await;
    assert!(!was_there);
    is_taken_over(third).await;
    fresh.goodbye().await;
    let (_, was_there) = at(&cluster, 1, Hello::v5("dev").lasting()).await;
    assert!(!was_there);
}

#[tokio::test]
async fn a_session_outlives_its_node() {
    let mut cluster = Cluster::start().await;
    let (mut watcher, _) = at(&cluster, 2, Hello::v5("watcher").lasting()).await;
    watcher.subscribe("will/#", 1).await;
    let (_mourned, _) = at(&cluster, 0, Hello { will: Some(("will/a", "gone")), ..Hello::v5("mourned") }).await;
    let (mut device, _) = at(&cluster, 0, Hello::v3("dev").lasting()).await;
    device.subscribe("q/2", 2).await;
    device.subscribe("q/1", 1).await;
    // QoS 2, up to its release.
    let (mut publisher, _) = at(&cluster, 1, Hello::v5("p")).await;
    publisher.publish("q/2", "exactly once", 2, 1).await;
    assert_eq!(publisher.ack(0x50).await, (1, 0));
    let (_, payload, _, id) = device.message().await;
    assert_eq!(payload, "exactly once");
    device.say(0x50, id).await;
    assert_eq!(device.ack(0x62).await, (id, 0));
    // QoS 1, sent and not acknowledged.
    publish(&cluster, 2, "q/1", "unacknowledged").await;
    let (_, payload, _, open) = device.message().await;
    assert_eq!(payload, "unacknowledged");

    cluster.nodes[0].kill9().await;
    publish(&cluster, 1, "q/1", "to the dead").await;
    let (mut device, was_there) = at(&cluster, 1, Hello::v3("dev").lasting()).await;
    assert!(was_there);
    assert_eq!(device.ack(0x62).await, (id, 0), "it is released again, not sent again");
    let (_, payload, flags, again) = device.message().await;
    assert_eq!((&*payload, flags & DUP, again), ("unacknowledged", DUP, open));
    device.say(0x70, id).await;
    device.say(0x40, open).await;
    expect(&mut device, "to the dead").await;
    device.silence().await;

    expect(&mut watcher, "gone").await;
    cluster.nodes[0].start_again().await;
    publish(&cluster, 0, "q/1", "from the risen").await;
    expect(&mut device, "from the risen").await;
    watcher.silence().await;
}

/// A node stands still with a publish in its hands; its client goes elsewhere and sends it again, as it must. The node that
/// wakes late does not know, and hands on what it had.
#[tokio::test]
async fn what_a_node_that_stood_still_had_in_hand_is_not_decided_beside_its_repeat() {
    const IN: &str = "sophont/default/lamp/in/chat";
    let cluster = Cluster::start().await;
    cluster.client(0).put_instance("lamp", &echo()).await;
    let owner = cluster.owner("lamp").await;
    let (asleep, awake) = ((owner + 1) % 3, (owner + 2) % 3);
    let (mut first, _) = at(&cluster, asleep, Hello::v5("dev").lasting()).await;
    first.publish(IN, "settled", 1, 1).await;
    assert_eq!(first.ack(0x40).await, (1, 0));
    cluster.nodes[asleep].signal(Signal::SIGSTOP);
    first.publish(IN, "once", 1, 2).await;

    let mut second = until_seated(&cluster, awake, Hello::v5("dev").lasting()).await;
    for _ in 0..2 {
        second.publish_again(IN, "once", 1, 2).await;
        assert_eq!(second.ack(0x40).await, (2, 0));
    }
    cluster.nodes[asleep].signal(Signal::SIGCONT);
    while first.packet().await.is_some() {}
    // Behind what the node still has of this sender.
    let mark = json!({"id": "mark", "sender": "dev", "content": "mark"});
    let client = cluster.client(asleep);
    wait_until("the node takes stimuli again", PATIENCE, async || {
        client.post("/v1/instances/lamp/stimuli", &mark).await.status.is_success()
    })
    .await;
    assert_eq!(cluster.client(awake).until_decided("lamp", 3).await, ["settled", "once", "mark"]);
}

/// Connects as soon as the node gets the session.
async fn until_seated(cluster: &Cluster, node: usize, hello: Hello<'_>) -> Raw {
    wait_for("the session is given", PATIENCE, async || {
        let (raw, is_present, code) = Raw::greet(cluster.nodes[node].mqtt(), hello).await;
        (is_present && code == 0).then_some(raw)
    })
    .await
}

#[tokio::test]
async fn a_client_id_is_connected_once_in_the_cluster() {
    let cluster = Cluster::start().await;
    let (first, _) = at(&cluster, 0, Hello::v5("x")).await;
    let (second, _) = at(&cluster, 1, Hello::v5("x")).await;
    is_taken_over(first).await;
    let (third, was_there) = at(&cluster, 2, Hello::v5("x").lasting()).await;
    assert!(!was_there);
    is_taken_over(second).await;
    let (mut fourth, was_there) = at(&cluster, 0, Hello::v5("x").lasting()).await;
    assert!(was_there);
    is_taken_over(third).await;
    fourth.silence().await;
}

#[tokio::test]
async fn a_value_that_is_retained_anywhere_is_there_everywhere() {
    let cluster = Cluster::start().await;
    let (mut publisher, _) = at(&cluster, 0, Hello::v5("p")).await;
    let retained = |raw: &Raw, payload: &str, id| {
        let mut packet = raw.publish_packet("r/a", payload, 1, id, false);
        packet[0] |= 1;
        packet
    };
    let packet = retained(&publisher, "on", 1);
    publisher.send(&packet).await;
    assert_eq!(publisher.ack(0x40).await, (1, 0));
    for (node, filter) in [(1, "r/a"), (2, "r/#"), (0, "+/a")] {
        let (mut subscriber, _) = at(&cluster, node, Hello::v5(&format!("s{node}"))).await;
        subscriber.subscribe(filter, 1).await;
        let (topic, payload, flags, id) = subscriber.message().await;
        assert_eq!((&*topic, &*payload, flags & 1), ("r/a", "on", 1));
        subscriber.say(0x40, id).await;
        subscriber.goodbye().await;
    }
    let packet = retained(&publisher, "", 2);
    publisher.send(&packet).await;
    assert_eq!(publisher.ack(0x40).await, (2, 0));
    let (mut subscriber, _) = at(&cluster, 2, Hello::v5("s")).await;
    subscriber.subscribe("r/#", 1).await;
    publish(&cluster, 1, "r/b", "live").await;
    expect(&mut subscriber, "live").await;
}

#[tokio::test]
async fn what_is_published_at_one_node_reaches_subscribers_at_all() {
    let cluster = Cluster::start().await;
    cluster.client(0).put_instance("lamp", &echo()).await;
    let mut subscribers = Vec::new();
    for node in 0..3 {
        let (mut subscriber, _) = at(&cluster, node, Hello::v5(&format!("s{node}"))).await;
        subscriber.subscribe("a/#", 1).await;
        subscriber.subscribe("sophont/default/lamp/out/#", 1).await;
        subscribers.push(subscriber);
    }
    for node in 0..3 {
        publish(&cluster, node, "a/b", &format!("by {node}")).await;
        let (mut publisher, _) = at(&cluster, node, Hello::v5("p0")).await;
        publisher.publish("a/c", "weak", 0, 0).await;
        for subscriber in &mut subscribers {
            expect(subscriber, &format!("by {node}")).await;
            let (topic, _, flags, _) = subscriber.message().await;
            assert_eq!((&*topic, flags & 6), ("a/c", 0));
        }
        // The instance answers from its owner, wherever that is.
        publisher.publish("sophont/default/lamp/in/chat", "hi", 1, 7).await;
        assert_eq!(publisher.ack(0x40).await, (7, 0));
        for subscriber in &mut subscribers {
            let (topic, payload, _, id) = subscriber.message().await;
            assert_eq!(topic, "sophont/default/lamp/out/reply");
            assert!(payload.contains("\"hi\""), "{payload}");
            subscriber.say(0x40, id).await;
        }
    }
}

#[tokio::test]
async fn a_group_gets_each_message_once_over_all_nodes() {
    let cluster = Cluster::start().await;
    let mut members = Vec::new();
    for node in 0..3 {
        let hello = Hello::v5(["m0", "m1", "m2"][node]);
        // One of them lasts.
        let (mut member, _) = at(&cluster, node, if node == 1 { hello.lasting() } else { hello }).await;
        member.subscribe("$share/g/work/#", 1).await;
        members.push(member);
    }
    let (mut publisher, _) = at(&cluster, 0, Hello::v5("p")).await;
    for number in 1..=30 {
        publisher.publish("work/x", &number.to_string(), 1, number).await;
        assert_eq!(publisher.ack(0x40).await, (number, 0));
    }
    // In turn: ten each.
    let mut all = BTreeSet::new();
    for member in &mut members {
        for _ in 0..10 {
            let (_, payload, _, id) = member.message().await;
            member.say(0x40, id).await;
            assert!(all.insert(payload.clone()), "{payload} came twice");
        }
    }
    assert_eq!(all.len(), 30);
}

const TOKENS: &str = r#"
[[auth.tokens]]
token = "lamp-secret"
tenant = "acme"
name = "lamp"
device = true
instance = "lamp"
[[auth.tokens]]
token = "owner-secret"
tenant = "acme"
name = "owner"
scopes = ["read", "write", "admin"]
"#;

#[tokio::test]
async fn presence_is_told_for_the_cluster() {
    let mut cluster = Cluster::guarded(TOKENS, "owner-secret").await;
    let device = |client| Hello { login: Some(("acme", "lamp-secret")), ..Hello::v5(client) };
    let owner = Hello { login: Some(("acme", "owner-secret")), ..Hello::v5("owner") };
    let (mut watcher, _) = at(&cluster, 2, owner).await;
    watcher.subscribe("sophont/acme/lamp/presence", 1).await;
    let (first, _) = at(&cluster, 0, device("a")).await;
    expect(&mut watcher, "online").await;
    // It hops: the new connection is there before the old one ends, and after.
    let (second, _) = at(&cluster, 1, device("a")).await;
    is_taken_over(first).await;
    let (third, _) = at(&cluster, 0, device("b")).await;
    second.goodbye().await;
    watcher.silence().await;
    // Its node dies with it.
    cluster.nodes[0].kill9().await;
    expect(&mut watcher, "offline").await;
    drop(third);
    let (_fourth, _) = at(&cluster, 1, device("b")).await;
    expect(&mut watcher, "online").await;
    let (mut late, _) = at(&cluster, 1, Hello { client: "late", ..owner }).await;
    late.subscribe("sophont/acme/lamp/presence", 1).await;
    expect(&mut late, "online").await;
}

#[tokio::test]
async fn without_a_bus_the_store_carries_what_lasts() {
    let cluster = Cluster::build(2, false, |builder| builder).await;
    let (mut device, _) = at(&cluster, 1, Hello::v5("dev").lasting()).await;
    device.subscribe("t", 1).await;
    // The other node finds the subscription in the store, in its own time.
    let mut sent = 0;
    let (mut publisher, _) = at(&cluster, 0, Hello::v5("p")).await;
    while sent == 0 || !device.comes().await {
        sent += 1;
        publisher.publish("t", &sent.to_string(), 1, sent).await;
        assert_eq!(publisher.ack(0x40).await, (sent, 0));
    }
    let (_, payload, _, id) = device.message().await;
    device.say(0x40, id).await;
    for number in payload.parse::<u16>().unwrap() + 1..=sent {
        expect(&mut device, &number.to_string()).await;
    }
    // Taken over all the same: the node before finds that its hold is over.
    let (_, was_there) = at(&cluster, 0, Hello::v5("dev").lasting()).await;
    assert!(was_there);
    is_taken_over(device).await;
}
