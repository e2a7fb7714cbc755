//! The embedded MQTT door: real clients (mosquitto, paho), and packets by hand where order and repeats matter.
//!
//! Not here: crashes under load (`tests/it/crash.rs`), the external broker (`mqtt_external`).

mod door;
mod hostile;
mod node;
pub mod raw;

use std::time::Duration;

use door::{Door, Played};
use raw::{Hello, Raw};
use sophont::{config::Sources, instance::Error, store::memory::MemoryStore};

use crate::support::{PATIENCE, mosquitto, program, tls::Certificates, wait_until};

const SUITE: Duration = Duration::from_secs(240);

async fn suite(version: &str) {
    let door = Door::open();
    let port = door.address.port().to_string();
    let said = program::paho("suite.py", &["127.0.0.1", &port, "default", version], SUITE).await;
    println!("{said}");
}

#[tokio::test]
async fn paho_3_1_1_passes_the_suite() {
    suite("v3").await;
}

#[tokio::test]
async fn paho_5_passes_the_suite() {
    suite("v5").await;
}

#[tokio::test]
async fn mosquitto_publishes_and_subscribes() {
    let door = Door::open();
    let subscriber = mosquitto::Subscriber::start(door.address, &["-t", "a/#", "-q", "1", "-F", "%t %p"]).await;
    for version in ["311", "5"] {
        let arguments = ["-t", "a/b", "-m", version, "-q", "2", "-V", version];
        let sent = mosquitto::publish(door.address, &arguments).await;
        assert!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    }
    assert_eq!(subscriber.wait(2).await, ["a/b 311", "a/b 5"]);
}

#[tokio::test]
async fn mosquitto_comes_in_over_tls_with_a_token() {
    let home = tempfile::TempDir::new().unwrap();
    let files = Certificates::make(home.path()).await;
    let config = home.path().join("sophont.toml");
    let lines = format!(
        "[mqtt]\ntls_listen = \"127.0.0.1:0\"\ntls_cert = {:?}\ntls_key = {:?}\n{TOKENS}",
        files.cert, files.key
    );
    std::fs::write(&config, lines).unwrap();
    let sources = Sources { file: Some(config), ..Sources::default() };
    let door = Door::configured(MemoryStore::new(), Played::default(), sources);
    let address = door.tls_address.unwrap();
    let ca = files.ca.display().to_string();
    let topic = "sophont/acme/lamp/in/chat";
    let common = ["--cafile", ca.as_str(), "-t", topic, "-m", "hi", "-q", "1"];
    let good = [&common[..], &["-u", "acme/lamp-device", "-P", "device-secret"]].concat();
    let sent = mosquitto::publish(address, &good).await;
    assert!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    let bad = [&common[..], &["-u", "acme", "-P", "wrong"]].concat();
    assert!(!mosquitto::publish(address, &bad).await.status.success());
    let came = door.played.came.lock().unwrap();
    let [(key, stimulus)] = &came[..] else { panic!("one stimulus, not {came:?}") };
    assert_eq!((key.to_string(), stimulus.sender.as_deref()), ("acme/lamp".into(), Some("lamp-device")));
}

const TOKENS: &str = r#"
[[auth.tokens]]
token = "device-secret"
tenant = "acme"
name = "lamp-device"
device = true
instance = "lamp"
[[auth.tokens]]
token = "owner-secret"
tenant = "acme"
name = "owner"
[[auth.tokens]]
token = "stranger-secret"
tenant = "other"
name = "stranger"
[[auth.tokens]]
token = "reader-secret"
tenant = "acme"
name = "reader"
scopes = ["read"]
"#;

fn guarded(store: MemoryStore) -> Door {
    let home = tempfile::TempDir::new().unwrap();
    let config = home.path().join("sophont.toml");
    std::fs::write(&config, TOKENS).unwrap();
    Door::configured(store, Played::default(), Sources { file: Some(config), ..Sources::default() })
}

const LAMP: Option<(&str, &str)> = Some(("acme/lamp-device", "device-secret"));
const OWNER: Option<(&str, &str)> = Some(("acme", "owner-secret"));

#[tokio::test]
async fn who_may_not_come_in_is_told_why() {
    let door = guarded(MemoryStore::new());
    let strangers = [
        (None, 0x87, 5),
        (Some(("acme", "wrong")), 0x86, 4),
        (Some(("other", "owner-secret")), 0x86, 4),
        (Some(("acme/lamp-device", "owner-secret")), 0x86, 4),
    ];
    for (login, v5, v3) in strangers {
        let (_, _, code) = Raw::greet(door.address, Hello { login, ..Hello::v5("x") }).await;
        assert_eq!(code, v5, "{login:?}");
        let (_, _, code) = Raw::greet(door.address, Hello { login, ..Hello::v3("x") }).await;
        assert_eq!(code, v3, "{login:?}");
    }
}

#[tokio::test]
async fn tenants_are_walls_and_devices_keep_to_their_instance() {
    let door = guarded(MemoryStore::new());
    let (mut stranger, _) =
        Raw::connect(door.address, Hello { login: Some(("other", "stranger-secret")), ..Hello::v5("s") }).await;
    stranger.subscribe("#", 1).await;
    let (mut lamp, _) = Raw::connect(door.address, Hello { login: LAMP, ..Hello::v5("l") }).await;
    let (mut owner, _) = Raw::connect(door.address, Hello { login: OWNER, ..Hello::v5("o") }).await;
    owner.subscribe("house/#", 1).await;
    lamp.publish("house/door", "open", 1, 1).await;
    assert_eq!(lamp.ack(0x40).await, (1, 0));
    assert_eq!(owner.message().await.1, "open");
    for (id, topic, code) in [
        (2, "sophont/acme/door/in/x", 0x87),
        (3, "sophont/other/lamp/in/x", 0x87),
        (4, "sophont/acme/lamp/in/x", 0),
        (5, "sophont/acme/door/presence", 0x87),
    ] {
        lamp.publish(topic, "x", 1, id).await;
        assert_eq!(lamp.ack(0x40).await, (id, code), "{topic}");
    }
    let (mut reader, _) =
        Raw::connect(door.address, Hello { login: Some(("acme", "reader-secret")), ..Hello::v5("r") }).await;
    reader.publish("house/door", "shut", 1, 1).await;
    assert_eq!(reader.ack(0x40).await, (1, 0x87));
    stranger.silence().await;
    assert_eq!(door.played.count(), 1);
}

#[tokio::test]
async fn a_device_cannot_take_the_session_of_somebody_else() {
    let door = guarded(MemoryStore::new());
    let (mut owner, _) = Raw::connect(door.address, Hello { login: OWNER, ..Hello::v5("same").lasting() }).await;
    owner.subscribe("sophont/acme/door/out/#", 1).await;
    let (_lamp, is_present) = Raw::connect(door.address, Hello { login: LAMP, ..Hello::v5("same").lasting() }).await;
    assert!(!is_present);
    owner.send(&[0xc0, 0]).await;
    assert_eq!(owner.packet().await, Some((0xd0, vec![])));
}

#[tokio::test]
async fn presence_follows_a_bound_device_also_over_a_crash() {
    let door = guarded(MemoryStore::new());
    let (mut owner, _) = Raw::connect(door.address, Hello { login: OWNER, ..Hello::v5("o") }).await;
    owner.subscribe("sophont/acme/+/presence", 0).await;
    let (lamp, _) = Raw::connect(door.address, Hello { login: LAMP, ..Hello::v3("l") }).await;
    assert_eq!(owner.message().await.1, "online");
    lamp.goodbye().await;
    assert_eq!(owner.message().await.1, "offline");
    let (_lamp, _) = Raw::connect(door.address, Hello { login: LAMP, ..Hello::v3("l") }).await;
    assert_eq!(owner.message().await.1, "online");
    let door = guarded(door.kill());
    let (mut owner, _) = Raw::connect(door.address, Hello { login: OWNER, ..Hello::v5("o") }).await;
    owner.subscribe("sophont/acme/+/presence", 0).await;
    let (topic, state, flags, _) = owner.message().await;
    assert_eq!((topic.as_str(), state.as_str(), flags & 1), ("sophont/acme/lamp/presence", "offline", 1));
}

#[tokio::test]
async fn acks_are_pipelined_and_leave_in_order() {
    let played = Played { is_holding: true, ..Played::default() };
    let door = Door::with(MemoryStore::new(), played, &[]);
    let (mut device, _) = Raw::connect(door.address, Hello::v3("d")).await;
    for id in 1..=10 {
        device.publish("sophont/default/lamp/in/x", &id.to_string(), 1, id).await;
    }
    wait_until("all stimuli are on their way", PATIENCE, async || door.played.count() == 10).await;
    (1..10).rev().for_each(|index| door.played.answer(index));
    device.silence().await;
    door.played.answer(0);
    for id in 1..=10 {
        assert_eq!(device.ack(0x40).await, (id, 0));
    }
    let came = door.played.came.lock().unwrap();
    let order: Vec<_> = came.iter().map(|(_, stimulus)| stimulus.content.clone().unwrap()).collect();
    assert_eq!(order, ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]);
}

#[tokio::test]
async fn with_mqtt_5_what_is_in_flight_behind_a_refusal_is_not_taken_until_its_sender_was_told() {
    let played = Played { is_holding: true, ..Played::default() };
    let door = Door::with(MemoryStore::new(), played, &[]);
    let (mut device, _) = Raw::connect(door.address, Hello::v5("d")).await;
    for (topic, id) in [("lamp", 1), ("lamp", 2), ("door", 3)] {
        device.publish(&format!("sophont/default/{topic}/in/x"), &id.to_string(), 1, id).await;
    }
    wait_until("all stimuli are on their way", PATIENCE, async || door.played.count() == 3).await;
    door.played.end(0, Err(Error::InboxFull(1)));
    assert_eq!(device.ack(0x40).await, (1, 0x97));
    assert_eq!(door.played.behind_a_refusal(), [1], "another instance's stimuli are not concerned");
    device.publish("sophont/default/lamp/in/x", "4", 1, 4).await;
    wait_until("it is on its way", PATIENCE, async || door.played.count() == 4).await;
    assert_eq!(door.played.behind_a_refusal(), [1], "its sender knew of the refusal");
}

#[tokio::test]
async fn the_ack_of_a_kept_message_waits_for_the_commit() {
    let door = Door::open();
    let (mut keeper, _) = Raw::connect(door.address, Hello::v5("k").lasting()).await;
    keeper.subscribe("t", 1).await;
    keeper.goodbye().await;
    wait_until("the session is kept", PATIENCE, async || door.broker.connections() == 0).await;
    let (mut sender, _) = Raw::connect(door.address, Hello::v5("s")).await;
    let faults = door.store.faults();
    faults.hold();
    sender.publish("t", "x", 1, 1).await;
    sender.publish("t", "y", 2, 2).await;
    wait_until("the rows wait", PATIENCE, async || faults.waiting() == 2).await;
    sender.silence().await;
    faults.release();
    assert_eq!(sender.ack(0x40).await, (1, 0));
    assert_eq!(sender.ack(0x50).await, (2, 0));
}

#[tokio::test]
async fn a_store_that_fails_acknowledges_nothing() {
    let door = Door::open();
    let (mut keeper, _) = Raw::connect(door.address, Hello::v5("k").lasting()).await;
    keeper.subscribe("t", 1).await;
    keeper.goodbye().await;
    wait_until("the session is kept", PATIENCE, async || door.broker.connections() == 0).await;
    let (mut new, _) = Raw::connect(door.address, Hello::v5("n")).await;
    let (mut old, _) = Raw::connect(door.address, Hello::v3("o")).await;
    let faults = door.store.faults();
    faults.fail_next(3, sophont::store::Error::Full("test".into()));
    new.publish("t", "x", 1, 1).await;
    assert_eq!(new.ack(0x40).await, (1, 0x80));
    old.publish("t", "x", 1, 1).await;
    assert!(old.packet().await.is_none(), "MQTT 3 cannot say no: the connection ends without an ack");
    let (_, _, code) = Raw::greet(door.address, Hello::v5("again").lasting()).await;
    assert_eq!(code, 0x88);
    let (mut keeper, is_present) = Raw::connect(door.address, Hello::v5("k").lasting()).await;
    assert!(is_present);
    keeper.silence().await;
}

#[tokio::test]
async fn overload_is_told_to_mqtt_5_and_ends_mqtt_3() {
    let played = Played { refusal: Some(Error::InboxFull(9)), ..Played::default() };
    let door = Door::with(MemoryStore::new(), played, &[]);
    let (mut new, _) = Raw::connect(door.address, Hello::v5("n")).await;
    let (mut old, _) = Raw::connect(door.address, Hello::v3("o")).await;
    for (qos, kind) in [(1, 0x40), (2, 0x50)] {
        new.publish("sophont/default/lamp/in/x", "x", qos, 1).await;
        assert_eq!(new.ack(kind).await, (1, 0x97));
    }
    old.publish("sophont/default/lamp/in/x", "x", 1, 1).await;
    assert!(old.packet().await.is_none());
}

#[tokio::test]
async fn everything_kept_survives_a_crash() {
    let door = Door::open();
    let (mut keeper, is_present) = Raw::connect(door.address, Hello::v5("k").lasting()).await;
    assert!(!is_present);
    keeper.subscribe("t/#", 2).await;
    let (mut sender, _) = Raw::connect(door.address, Hello { will: Some(("will", "lost")), ..Hello::v3("s") }).await;
    for (id, payload) in [(1, "one"), (2, "two")] {
        sender.publish("t/1", payload, 1, id).await;
        assert_eq!(sender.ack(0x40).await, (id, 0));
    }
    sender.publish("t/2", "three", 2, 3).await;
    assert_eq!(sender.ack(0x50).await, (3, 0));
    // One is acknowledged, one is received but not, one is released and not completed.
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(keeper.message().await.3);
    }
    keeper.say(0x40, ids[0]).await;
    keeper.say(0x50, ids[2]).await;
    assert_eq!(keeper.ack(0x62).await.0, ids[2]);
    let faults = door.store.faults();
    wait_until("everything is written", PATIENCE, async || faults.waiting() == 0).await;

    let door = Door::with(door.kill(), Played::default(), &[]);
    let (mut keeper, is_present) = Raw::connect(door.address, Hello::v5("k").lasting()).await;
    assert!(is_present);
    assert_eq!(keeper.ack(0x62).await.0, ids[2], "the release comes again, not the message");
    let (topic, payload, flags, id) = keeper.message().await;
    assert_eq!((topic.as_str(), payload.as_str(), id), ("t/1", "two", ids[1]));
    assert_eq!(flags & 8, 8, "a repeat is marked");
    keeper.say(0x70, ids[2]).await;
    keeper.say(0x40, ids[1]).await;
    keeper.subscribe("will", 1).await;
    let (_, payload, ..) = keeper.message().await;
    assert_eq!(payload, "lost", "the will of a client that was connected at the crash");
}

#[tokio::test]
async fn a_repeat_on_a_resumed_session_is_the_same_stimulus() {
    let played = Played { is_holding: true, ..Played::default() };
    let door = Door::with(MemoryStore::new(), played, &[]);
    let topic = "sophont/default/lamp/in/x";
    let (mut device, _) = Raw::connect(door.address, Hello::v3("d").lasting()).await;
    for id in [5, 6] {
        device.publish(topic, "on", 1, id).await;
    }
    wait_until("both are on their way", PATIENCE, async || door.played.count() == 2).await;
    drop(device);
    // The old connection keeps the session until what it took is settled.
    (0..2).for_each(|index| door.played.answer(index));
    let (mut device, is_present) = Raw::connect(door.address, Hello::v3("d").lasting()).await;
    assert!(is_present);
    device.publish_again(topic, "on", 1, 5).await;
    device.publish_again(topic, "other", 1, 6).await;
    device.publish(topic, "on", 1, 5).await;
    wait_until("all are on their way", PATIENCE, async || door.played.count() == 5).await;
    let came = door.played.came.lock().unwrap();
    let ids: Vec<_> = came.iter().map(|(_, stimulus)| stimulus.id.clone()).collect();
    assert_eq!(ids[2], ids[0], "a repeat has the id of the first copy");
    assert!(ids[3] != ids[1] && ids[4] != ids[0] && ids[0] != ids[1], "others have their own");
    assert!(came.iter().all(|(_, stimulus)| stimulus.repeatable));
}

#[tokio::test]
async fn a_drain_answers_what_was_taken_and_says_goodbye() {
    let played = Played { is_holding: true, ..Played::default() };
    let door = Door::with(MemoryStore::new(), played, &[]);
    let (mut device, _) = Raw::connect(door.address, Hello::v5("d")).await;
    device.publish("sophont/default/lamp/in/x", "x", 1, 1).await;
    wait_until("it is on its way", PATIENCE, async || door.played.count() == 1).await;
    door.drain.begin();
    device.silence().await;
    door.played.answer(0);
    assert_eq!(device.ack(0x40).await, (1, 0));
    assert_eq!(device.packet().await, Some((0xe0, vec![0x8b, 0])));
    assert!(device.packet().await.is_none());
    tokio::time::timeout(PATIENCE, door.broker.idle()).await.expect("no connection is left");
}

#[tokio::test]
async fn connections_above_the_limit_are_told_so() {
    let door = Door::with(MemoryStore::new(), Played::default(), &["mqtt.max_connections=2"]);
    let _one = Raw::connect(door.address, Hello::v5("1")).await;
    let _two = Raw::connect(door.address, Hello::v5("2")).await;
    let (_, _, code) = Raw::greet(door.address, Hello::v5("3")).await;
    assert_eq!(code, 0x89);
    let (_, _, code) = Raw::greet(door.address, Hello::v3("3")).await;
    assert_eq!(code, 3);
}

#[tokio::test]
async fn mqtt_3_is_read_no_faster_than_it_is_answered() {
    let played = Played { is_holding: true, ..Played::default() };
    let door = Door::with(MemoryStore::new(), played, &["mqtt.receive_maximum=5"]);
    let (mut device, _) = Raw::connect(door.address, Hello::v3("d")).await;
    for id in 1..=20 {
        device.publish("sophont/default/lamp/in/x", "x", 1, id).await;
    }
    wait_until("as many as allowed are on their way", PATIENCE, async || door.played.count() == 5).await;
    device.silence().await;
    assert_eq!(door.played.count(), 5);
    for index in 0..20 {
        wait_until("the next is on its way", PATIENCE, async || door.played.count() > index).await;
        door.played.answer(index);
        assert_eq!(device.ack(0x40).await.0, u16::try_from(index).unwrap() + 1);
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_costs_no_more_than_its_queue() {
    let door = Door::with(MemoryStore::new(), Played::default(), &["mqtt.max_queued=50"]);
    let (mut sleeper, _) = Raw::connect(door.address, Hello::v5("z").lasting()).await;
    sleeper.subscribe("t", 1).await;
    let (mut reader, _) = Raw::connect(door.address, Hello::v5("r")).await;
    reader.subscribe("t", 0).await;
    let (mut sender, _) = Raw::connect(door.address, Hello::v5("s")).await;
    let payload = "x".repeat(10_000);
    for id in 1..=300 {
        sender.publish("t", &payload, 1, id).await;
        assert_eq!(sender.ack(0x40).await, (id, 0));
        assert_eq!(reader.message().await.1.len(), 10_000);
    }
    // It has what fits its queue and nothing else.
    for _ in 0..50 {
        sleeper.message().await;
    }
    sleeper.silence().await;
}

#[tokio::test]
async fn a_thousand_idle_connections_leave_a_busy_one_in_peace() {
    let door = Door::open();
    let mut idle = Vec::new();
    for n in 0..1000 {
        idle.push(Raw::connect(door.address, Hello::v5(&format!("idle-{n}"))).await);
    }
    assert_eq!(door.broker.connections(), 1000);
    let (mut busy, _) = Raw::connect(door.address, Hello::v5("busy")).await;
    busy.subscribe("t", 1).await;
    for id in 1..=200 {
        busy.publish("t", "x", 0, 0).await;
        assert_eq!(busy.message().await.1, "x", "{id}");
    }
    drop(idle);
    wait_until("their places are free again", PATIENCE, async || door.broker.connections() == 1).await;
}
