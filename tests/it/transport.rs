//! TLS to the servers a node stands on, with real ones and an authority made for the test: who cannot prove to be the server is
//! not talked to, and nothing goes in the clear where TLS is asked for.

use std::{path::Path, sync::Arc, time::Duration};

use sophont::{
    cluster::bus::{
        Bus as _, Health, Inbound, Message,
        message::Relay,
        redis::{Options, RedisBus},
    },
    config::{self, PostgresTls},
    runtime::clock::Clock,
    store::{Error, Head, Reader as _, postgres::PostgresStore},
    types::{Fault as _, Kind, NodeId},
};
use tokio::runtime::Handle;

use crate::{
    store_contract::{SHARDS, decide, key, postgres_settings},
    support::{Node, PATIENCE, Postgres, http::echo, postgres, redis::Redis, tls::Certificates, wait_for, wait_until},
};

/// Settings for a server behind TLS that is known by this authority.
fn verified(url: &str, ca: &Path) -> config::Store {
    let mut config = postgres_settings(url);
    config.postgres.tls = PostgresTls::Verify;
    config.postgres.tls_ca = Some(ca.to_owned());
    config
}

async fn open(config: config::Store) -> Result<Arc<PostgresStore>, Error> {
    let runtime = postgres::runtime();
    let opening =
        runtime.clone().spawn(async move { PostgresStore::open(&config, SHARDS, Clock::System, runtime).await });
    opening.await.unwrap()
}

async fn refused(config: config::Store) -> String {
    let error = open(config).await.map(drop).expect_err("it is not talked to");
    assert_eq!(error.kind(), Kind::Unavailable);
    error.to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_is_talked_to_when_it_proves_who_it_is() {
    let (home, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let certificates = Certificates::make(home.path()).await;
    let others = Certificates::make(elsewhere.path()).await;
    let server = Postgres::start_over_tls(&certificates);
    let url = server.url("postgres");

    let store = open(verified(&url, &certificates.ca)).await.unwrap();
    decide(&*store, &key("lamp"), Head::default(), &[None]).await.unwrap();
    assert_eq!(store.turns(&key("lamp"), 0, 9).await.unwrap().len(), 1);

    let told = refused(verified(&url, &others.ca)).await;
    assert!(told.contains("invalid peer certificate"), "another authority: {told}");
    let told = refused(verified(&url.replace("127.0.0.1", "127.0.0.2"), &certificates.ca)).await;
    assert!(told.contains("invalid peer certificate"), "another name: {told}");
    let told = refused(postgres_settings(&url)).await;
    assert!(told.contains("no encryption"), "the server wants TLS: {told}");
    let plain = postgres::shared().database().await;
    let told = refused(verified(&plain, &certificates.ca)).await;
    assert!(told.contains("does not support TLS"), "nothing goes in the clear: {told}");
    let told = refused(verified(&url, &home.path().join("nothing.pem"))).await;
    assert!(told.contains("nothing.pem"), "{told}");
}

/// A bus to this address; over TLS it trusts this authority.
fn bus(url: String, ca: Option<&Path>) -> (Arc<RedisBus>, sophont::cluster::bus::Inlet) {
    let options = Options {
        url: url.into(),
        ca: ca.map(|ca| std::fs::read(ca).unwrap()),
        keys: String::from("sophont:tls"),
        timeout: Duration::from_millis(2000),
        max_queue: 1000,
        max_queue_bytes: 1024 * 1024,
        mailbox_entries: 1000,
    };
    RedisBus::start(options, NodeId::generate("n"), &Handle::current()).unwrap()
}

async fn until_down(bus: &RedisBus) -> String {
    wait_for("the bus is down, and says why", PATIENCE, async || match bus.health() {
        Health::Down(why) if why.contains("not connected yet") => None,
        Health::Down(why) => Some(why.to_string()),
        Health::Up => panic!("it was talked to"),
        Health::Off => None,
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_talked_to_when_it_proves_who_it_is() {
    let (home, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let certificates = Certificates::make(home.path()).await;
    let others = Certificates::make(elsewhere.path()).await;
    let server = Redis::start_over_tls(&certificates).await;

    let ((one, _inlet), (other, mut inlet)) =
        (bus(server.url(), Some(&certificates.ca)), bus(server.url(), Some(&certificates.ca)));
    for bus in [&one, &other] {
        wait_until("the bus is up", PATIENCE, async || bus.health() == Health::Up).await;
    }
    let message = Message::Relay(Relay { kind: String::from("test"), body: b"hello".to_vec().into() });
    one.send(other.node(), &message).unwrap();
    let heard = wait_for("the message", PATIENCE, async || inlet.try_next()).await;
    assert!(matches!(heard, Inbound::Message { message: Message::Relay(relay), .. } if &relay.body[..] == b"hello"));

    let (stranger, _inlet) = bus(server.url(), Some(&others.ca));
    let why = until_down(&stranger).await;
    assert!(why.contains("invalid peer certificate"), "another authority: {why}");
    let (clear, _inlet) = bus(server.url().replace("rediss://", "redis://"), None);
    until_down(&clear).await;
    let plain = Redis::start().await;
    let (fooled, _inlet) = bus(plain.url().replace("redis://", "rediss://"), Some(&certificates.ca));
    until_down(&fooled).await;
    assert_eq!(one.health(), Health::Up);
}

#[tokio::test]
async fn a_cluster_works_over_tls_alone() {
    let home = tempfile::tempdir().unwrap();
    let certificates = Certificates::make(home.path()).await;
    let server = Postgres::start_over_tls(&certificates);
    let redis = Redis::start_over_tls(&certificates).await;
    let config = |name: &str| {
        format!(
            "[node]\nname = \"{name}\"\n[store]\nbackend = \"postgres\"\n[store.postgres]\nurl = \"{}\"\ntls = \"verify\"\n\
             tls_ca = {ca:?}\n[cluster]\nshards = 8\n[redis]\nurl = \"{}\"\nca_file = {ca:?}\n",
            server.url("postgres"),
            redis.url(),
            ca = certificates.ca,
        )
    };
    let one = Node::builder().config(&config("n0")).start().await;
    let other = Node::builder().config(&config("n1")).start().await;
    for node in [&one, &other] {
        let bus = async || node.client().get("/health/ready").await.json()["checks"]["bus"] == "ok";
        wait_until("the bus is up", PATIENCE, bus).await;
    }
    one.client().put_instance("lamp", &echo()).await;
    for (turn, node) in [&one, &other, &one, &other].into_iter().enumerate() {
        let said = node.client().say("lamp", &format!("s{turn}"), "hi").await.expect(200);
        assert_eq!(said["turn"], turn + 1);
    }
}
