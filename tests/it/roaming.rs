//! MQTT sessions in a store that several nodes share: who took one last writes to it, nobody else; what others leave for it is
//! found by whoever has it.

use std::sync::Arc;

use sophont::{
    store::{
        Done, Head, MqttRow, MqttWrite, Reader as _, Rejection, Work, Writer as _,
        ownership::{Joining, Ownership},
        postgres::PostgresStore,
        roaming::{Holder, Mail, Origin, Roaming as _, Seat, Sign},
    },
    types::{InstanceId, NodeId, Protocol, Roles, TenantId},
};

use crate::{
    store_contract::{SHARDS, commit, decide, key_of, open_postgres, postgres_settings, record, stimulus, turns},
    support::{PATIENCE, postgres, wait_until},
};

async fn store() -> Arc<PostgresStore> {
    open_postgres(&postgres_settings(&postgres::shared().database().await)).await
}

async fn member(store: &PostgresStore, name: &str) -> NodeId {
    let node = NodeId::generate(name);
    let joining = Joining {
        node: node.clone(),
        cluster: "c".into(),
        shards: SHARDS,
        addresses: Vec::new(),
        roles: Roles::default(),
        weight: 1,
        protocol: Protocol { min: 1, max: 1 },
        lease: std::time::Duration::from_secs(60),
    };
    store.join(&joining).await.unwrap();
    node
}

fn tenant() -> TenantId {
    TenantId::new("t").unwrap()
}

fn seat(client: &str) -> Seat {
    Seat { tenant: tenant(), client: client.into() }
}

fn put(client: &str, hold: u64, record: &'static str) -> MqttWrite {
    MqttWrite::PutSession { tenant: tenant(), client: client.into(), hold, record: record.into() }
}

fn enqueue(hold: u64, order: i64, record: &'static str) -> MqttWrite {
    MqttWrite::Enqueue { tenant: tenant(), client: "c".into(), hold, order, or_mail: order < 9, record: record.into() }
}

async fn write(store: &PostgresStore, writes: Vec<MqttWrite>) {
    let (done, end) = Done::channel();
    store.mqtt(writes, done);
    end.await.unwrap().unwrap();
}

async fn rows(store: &PostgresStore) -> Vec<String> {
    let told = |row: MqttRow| match row {
        MqttRow::Session { client, record, .. } => format!("{client} {record:?}"),
        MqttRow::Queued { order, record, .. } => format!("{order} {record:?}"),
        MqttRow::Retained { topic, record, .. } => format!("{topic} {record:?}"),
    };
    store.mqtt_rows().await.unwrap().into_iter().map(told).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_took_a_session_last_writes_to_it() {
    let store = store().await;
    let (a, b) = (member(&store, "a").await, member(&store, "b").await);
    assert_eq!(store.claim(&seat("c"), &a, 0).await.unwrap(), None);
    let first = store.found(&seat("c"), &a).await.unwrap().unwrap();
    assert_eq!(store.found(&seat("c"), &b).await.unwrap(), None, "there is one");
    write(&store, vec![put("c", first.hold, "of a"), enqueue(first.hold, 1, "one"), enqueue(first.hold, 2, "two")])
        .await;

    assert_eq!(store.claim(&seat("c"), &b, first.hold + 7).await.unwrap(), None, "somebody else took it");
    let second = store.claim(&seat("c"), &b, first.hold).await.unwrap().unwrap();
    assert!(second.hold > first.hold);
    assert_eq!((&second.record[..], second.queue.len()), (&b"of a"[..], 2));
    let holder = store.holder(&seat("c")).await.unwrap();
    assert_eq!(holder, Some(Holder { node: b.as_str().into(), hold: second.hold, alive: true, running: true }));

    // What comes late changes nothing. A message that was on its way is left for the one who has the session.
    let dequeue = MqttWrite::Dequeue { tenant: tenant(), client: "c".into(), hold: first.hold, order: 1 };
    let drop_it = MqttWrite::DropSession { tenant: tenant(), client: "c".into(), hold: first.hold };
    let late =
        vec![put("c", first.hold, "late"), dequeue, drop_it, enqueue(first.hold, 3, "m"), enqueue(first.hold, 9, "r")];
    write(&store, late).await;
    assert_eq!(rows(&store).await, ["c b\"of a\"", "1 b\"one\"", "2 b\"two\""]);
    assert_eq!(store.mail(&a, 9).await.unwrap(), []);
    let mail = store.mail(&b, 9).await.unwrap();
    let [Mail { id, queued: true, record, .. }] = &mail[..] else { panic!("{mail:?}") };
    assert_eq!(&record[..], b"m");

    // Taken over from the mail in one step, by the holder only.
    let collect = |hold| MqttWrite::Collect { tenant: tenant(), client: "c".into(), hold, mail: *id };
    write(&store, vec![collect(first.hold)]).await;
    assert_eq!(store.mail(&b, 9).await.unwrap().len(), 1);
    write(&store, vec![enqueue(second.hold, 3, "m"), collect(second.hold)]).await;
    assert_eq!(store.mail(&b, 9).await.unwrap(), []);
    assert_eq!(rows(&store).await.last().unwrap(), "3 b\"m\"");
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_of_a_node_that_is_gone_are_adopted_and_everybody_hears_of_it() {
    let store = store().await;
    let (a, b) = (member(&store, "a").await, member(&store, "b").await);
    let mut since = store.changes(0).await.unwrap().until;
    for client in ["c", "d"] {
        let taken = store.found(&seat(client), &a).await.unwrap().unwrap();
        write(&store, vec![put(client, taken.hold, "x")]).await;
    }
    let mut heard = async |store: &PostgresStore| {
        let changes = store.changes(since).await.unwrap();
        since = changes.until;
        let told = |row: sophont::store::roaming::Seen| (row.seat.client, row.node, row.record.is_some());
        changes.rows.into_iter().map(told).collect::<Vec<_>>()
    };
    let mut told = heard(&store).await;
    told.sort();
    assert_eq!(told, [("c".into(), a.as_str().into(), true), ("d".into(), a.as_str().into(), true)]);
    let from = [String::from(a.as_str())];
    assert!(store.adopt(&from, &b, 9).await.unwrap().is_empty(), "it lives");
    assert!(store.dead(&from).await.unwrap().is_empty());

    let mail = MqttWrite::Mail { tenant: tenant(), client: "c".into(), record: "letter".into() };
    let nobody = MqttWrite::Mail { tenant: tenant(), client: "nobody".into(), record: "letter".into() };
    write(&store, vec![mail, nobody]).await;
    store.leave(&a).await.unwrap();
    assert_eq!(store.dead(&from).await.unwrap(), from);
    let mut adopted: Vec<_> = store.adopt(&from, &b, 9).await.unwrap();
    adopted.sort_by(|one, other| one.seat.cmp(&other.seat));
    assert_eq!(adopted.iter().map(|one| &*one.seat.client).collect::<Vec<_>>(), ["c", "d"]);
    assert_eq!(store.mail(&b, 9).await.unwrap().len(), 1);
    assert!(heard(&store).await.iter().all(|(_, node, _)| node == b.as_str()));
    let over = MqttWrite::DropSession { tenant: tenant(), client: "c".into(), hold: adopted[0].hold };
    write(&store, vec![over]).await;
    assert!(heard(&store).await.contains(&("c".into(), String::new(), false)));
    assert!(store.mail(&b, 9).await.unwrap().is_empty(), "mail goes with its session");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_absent_when_its_devices_are_nowhere() {
    let store = store().await;
    let (a, b) = (member(&store, "a").await, member(&store, "b").await);
    let (tenant, instance) = (tenant(), InstanceId::new("lamp").unwrap());
    let sign = |record| Sign { tenant: &tenant, instance: &instance, topic: "p", record };
    assert!(store.arrive(sign(b"online"), &a).await.unwrap());
    assert!(!store.arrive(sign(b"online"), &b).await.unwrap());
    assert!(!store.part(sign(b"offline"), Some(&a)).await.unwrap(), "a device hopped");
    assert!(store.abandoned(9).await.unwrap().is_empty());
    assert_eq!(store.retained(&tenant, "p").await.unwrap(), ["online"]);
    Ownership::leave(&*store, &b).await.unwrap();
    assert_eq!(store.abandoned(9).await.unwrap(), [(tenant.clone(), instance.clone())]);
    assert!(store.part(sign(b"offline"), None).await.unwrap());
    assert!(!store.part(sign(b"offline"), None).await.unwrap(), "it was said once");
    assert_eq!(store.retained(&tenant, "p").await.unwrap(), ["offline"]);
    assert_eq!(store.full(1, usize::MAX).await.unwrap(), std::slice::from_ref(&tenant));
    assert!(store.full(2, 1000).await.unwrap().is_empty());
}

fn made(hold: u64, count: u64) -> String {
    format!("mq.00000000000000aa.7.3.0b419297.{count}.{hold}")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_made_under_a_barred_hold_is_applied_only_if_it_was_before() {
    let store = store().await;
    let lamp = key_of("t", "lamp");
    let (before, waiting) = (made(5, 1), made(5, 2));
    let head = decide(&*store, &lamp, Head::default(), &[Some(&before)]).await.unwrap();
    let accept = |id: &str| Work::Accept { stimuli: vec![Arc::new(stimulus(Some(id)))] };
    let lodge = |id: &str| Work::Lodge { stimuli: vec![Arc::new(stimulus(Some("a"))), Arc::new(stimulus(Some(id)))] };
    commit(&*store, &lamp, accept(&waiting)).await.unwrap();

    store.bar(&tenant(), Origin { session: "00000000000000aa", hold: 5 }).await.unwrap();
    // An older bar takes nothing back.
    store.bar(&tenant(), Origin { session: "00000000000000aa", hold: 2 }).await.unwrap();
    let is_barred = |end: Result<_, Rejection>, at| matches!(end, Err(Rejection::Barred { index }) if index == at);
    for late in [made(5, 3), made(4, 9)] {
        assert!(is_barred(commit(&*store, &lamp, accept(&late)).await, 0));
        assert!(is_barred(commit(&*store, &lamp, lodge(&late)).await, 1));
        let decided = decide(&*store, &lamp, head, &[Some("b"), Some(&late)]).await;
        assert!(is_barred(decided.map(|_| unreachable!()), 1));
    }
    let loaded = store.load(&lamp).await.unwrap();
    let inbox: Vec<&str> = loaded.inbox.iter().map(|stimulus| stimulus.id.as_str()).collect();
    assert_eq!((loaded.head, inbox), (head, vec![&*waiting]), "nothing of the units was written");

    // What was applied stays, and is recognised.
    let again = commit(&*store, &lamp, accept(&before)).await;
    assert!(matches!(again, Err(Rejection::Duplicate { index: 0, .. })), "{again:?}");
    let head = turns(&*store, &lamp, head, vec![record(2, stimulus(Some(&waiting)))]).await.unwrap();
    // Newer holds, other sessions, other tenants and other ids are free.
    let other = made(5, 4).replace("00aa", "00ab");
    let head = decide(&*store, &lamp, head, &[Some(&made(6, 1)), Some(&other), Some("c")]).await.unwrap();
    assert_eq!(head.turn, 5);
    decide(&*store, &key_of("u", "lamp"), Head::default(), &[Some(&made(5, 5))]).await.unwrap();
}

/// What may still be applied when the bar is set is waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_bar_waits_for_the_transactions_under_way() {
    let database = postgres::shared().database().await;
    let store = open_postgres(&postgres_settings(&database)).await;
    let (client, connection) = tokio_postgres::connect(&database, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
    let bar = {
        let store = store.clone();
        tokio::spawn(async move { store.bar(&tenant(), Origin { session: "aa", hold: 5 }).await })
    };
    let is_set = async || {
        let row = client.query_one("SELECT count(*) FROM mqtt_barred", &[]).await.unwrap();
        row.get::<_, i64>(0) == 1
    };
    wait_until("the bar is set", PATIENCE, is_set).await;
    assert!(!bar.is_finished(), "the open transaction may have begun before it");
    client.batch_execute("COMMIT").await.unwrap();
    bar.await.unwrap().unwrap();
}
