//! `[mqtt] mode = "external"` against a real Mosquitto: nothing acknowledged is lost, whichever side dies.
//!
//! The link is the real one; the way to instances is a fake that keeps what it accepted, knows ids as a store would, and
//! holds or refuses on demand. The death of this process is the end of the link's task: it writes nothing at its end, as it
//! keeps nothing that would survive.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use nix::sys::signal::Signal;
use rumqttc::{AsyncClient, MqttOptions, PublishOptions, PublishProperties, QoS};
use sophont::{
    config::Config,
    delivery::{Message, Publisher},
    gateway::mqtt::external::{Error, Inward, Link, Parts},
    instance::{self, Until},
    runtime::{clock::Clock, drain::Drain},
    store,
    types::{InstanceKey, Millis, Stimulus, TenantId},
};
use tokio::sync::watch;

use crate::{
    mqtt::raw::{Hello, Raw},
    support::{
        self, Mosquitto, PATIENCE,
        cluster::Cluster,
        http::echo,
        mosquitto::{Subscriber, publish},
        wait_until,
    },
};

/// Instances, as far as a door sees them.
struct World {
    accepted: Mutex<Vec<(InstanceKey, Stimulus)>>,
    /// Calls that began.
    asked: AtomicUsize,
    /// While set, hand-overs to this instance (or all, when empty) wait before they are accepted.
    held: watch::Sender<Option<String>>,
    /// While set, hand-overs wait after they were accepted.
    silent: watch::Sender<bool>,
    /// Hand-overs that are refused as overloaded before one is accepted.
    refusals: AtomicUsize,
    /// Questions after earlier messages that fail before one is answered.
    unsure: AtomicUsize,
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            accepted: Mutex::default(),
            asked: AtomicUsize::new(0),
            held: watch::channel(None).0,
            silent: watch::channel(false).0,
            refusals: AtomicUsize::new(0),
            unsure: AtomicUsize::new(0),
        })
    }

    fn contents(&self) -> Vec<String> {
        let accepted = self.accepted.lock().unwrap();
        accepted.iter().map(|(_, stimulus)| stimulus.content.clone().unwrap_or_default()).collect()
    }

    fn count(&self) -> usize {
        self.accepted.lock().unwrap().len()
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    async fn wait(&self, count: usize) {
        let what = format!("{count} stimuli accepted");
        wait_until(&what, PATIENCE, async || self.count() >= count).await;
    }
}

#[async_trait]
impl Inward for World {
    async fn deliver(&self, key: &InstanceKey, stimulus: Stimulus, _until: Until) -> Result<(), instance::Error> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            return Err(instance::Error::Overloaded("a test"));
        }
        let is_free =
            |held: &Option<String>| held.as_deref().is_none_or(|who| !["", key.instance.as_str()].contains(&who));
        self.held.subscribe().wait_for(is_free).await.unwrap();
        {
            let mut accepted = self.accepted.lock().unwrap();
            let is_known = |(known, before): &(InstanceKey, Stimulus)| known == key && before.id == stimulus.id;
            if !(stimulus.repeatable && accepted.iter().any(is_known)) {
                accepted.push((key.clone(), stimulus));
            }
        }
        self.silent.subscribe().wait_for(|silent| !silent).await.unwrap();
        Ok(())
    }

    async fn knows(&self, key: &InstanceKey, prefix: &str, since: Millis) -> Result<bool, store::Error> {
        let unsure = self.unsure.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if unsure.is_ok() {
            return Err(store::Error::Closed);
        }
        let accepted = self.accepted.lock().unwrap();
        Ok(accepted.iter().any(|(known, stimulus)| {
            known == key && stimulus.id.as_str().starts_with(prefix) && stimulus.accepted_at >= since
        }))
    }
}

/// A node's link, and what it takes to kill it.
struct Node {
    link: Arc<Link>,
    drain: Drain,
}

fn config(url: String) -> sophont::config::Mqtt {
    sophont::config::Mqtt { url, client_id: "sophont-test".into(), ..Config::default().mqtt }
}

fn parts(world: &Arc<World>, config: sophont::config::Mqtt) -> (Parts, Drain) {
    let drain = Drain::default();
    let parts = Parts {
        config,
        node: "test".into(),
        inward: world.clone(),
        clock: Clock::System,
        drain: drain.clone(),
        handle: tokio::runtime::Handle::current(),
        turn: None,
    };
    (parts, drain)
}

impl Node {
    async fn start(world: &Arc<World>, config: sophont::config::Mqtt) -> Self {
        let (parts, drain) = parts(world, config);
        let node = Self { link: Link::start(parts).unwrap(), drain };
        node.wait_connected().await;
        node
    }

    async fn of(world: &Arc<World>, broker: &Mosquitto) -> Self {
        Self::start(world, config(format!("mqtt://{}", broker.address()))).await
    }

    async fn wait_connected(&self) {
        wait_until("the link is connected", PATIENCE, async || self.link.is_connected()).await;
    }

    /// The process dies: no goodbye, no acknowledgement.
    async fn kill(self) {
        self.drain.stop();
        self.link.close(PATIENCE).await;
    }
}

/// A device with a QoS 1 connection that sends again what was not acknowledged. Publishes one after the other.
struct Device {
    client: AsyncClient,
    task: tokio::task::JoinHandle<()>,
}

impl Device {
    fn connect(broker: &Mosquitto, name: &str) -> Self {
        let options = MqttOptions::new(name, (broker.address().ip().to_string(), broker.address().port()));
        let (client, mut events) = AsyncClient::builder(options).capacity(16).build();
        let task = tokio::spawn(async move {
            let mut pause = tokio::time::interval(Duration::from_millis(20));
            loop {
                if events.poll().await.is_err() {
                    pause.tick().await;
                }
            }
        });
        Self { client, task }
    }

    /// Returns when the broker acknowledged it.
    async fn send(&self, topic: &str, payload: &str, id: &str) {
        loop {
            let properties =
                PublishProperties { user_properties: vec![("id".into(), id.into())], ..PublishProperties::default() };
            let options = PublishOptions::new(QoS::AtLeastOnce).properties(properties);
            let sent = self.client.publish_tracked(topic, payload.to_owned(), options).await.unwrap();
            if sent.wait_completion_async().await.is_ok() {
                return;
            }
        }
    }
}

impl Device {
    /// Returns when the link's subscription stands and nothing of the probing is under way; says how many were accepted.
    async fn stand(&self, world: &World) -> usize {
        let before = world.count();
        wait_until("the subscription stands", PATIENCE, async || {
            self.send("sophont/acme/probe/in/c", "probe", "probe").await;
            world.count() > before
        })
        .await;
        // Messages of one instance are handed over one at a time: with the last of them, all are through.
        self.send("sophont/acme/probe/in/c", "mark", "mark").await;
        world.wait(before + 2).await;
        world.count()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn message(topic: &str, payload: &str, retain: bool) -> Message {
    Message {
        tenant: TenantId::new("acme").unwrap(),
        topic: topic.into(),
        payload: Bytes::from(payload.to_owned()),
        json: true,
        retain,
        correlation: Some(b"c-7".to_vec()),
        effect_id: "lamp/1-0".into(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_leaves_to_the_broker_what_is_refused_at_present() {
    let (broker, world) = (Mosquitto::start().await, World::new());
    let node = Node::of(&world, &broker).await;
    let device = Device::connect(&broker, "d");
    let (accepted, asked) = (device.stand(&world).await, world.asked());
    world.refusals.store(usize::MAX, Ordering::SeqCst);
    device.send("sophont/acme/lamp/in/c", "late", "late").await;
    wait_until("it was refused", PATIENCE, async || world.asked() > asked).await;
    node.drain.begin();
    let closed = tokio::time::timeout(PATIENCE, node.link.close(10 * PATIENCE)).await;
    assert!(closed.is_ok(), "the drain waits for what cannot be taken now");
    world.refusals.store(0, Ordering::SeqCst);
    let _next = Node::of(&world, &broker).await;
    world.wait(accepted + 1).await;
    assert_eq!(world.contents().last().map(String::as_str), Some("late"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_and_an_instance_talk_through_the_broker() {
    let (broker, world) = (Mosquitto::start().await, World::new());
    let node = Node::of(&world, &broker).await;
    let properties = "-V 5 -q 1 -t sophont/acme/lamp/in/chat/de -D publish user-property id order-1 \
        -D publish response-topic sophont/acme/lamp/out/x -D publish correlation-data c-7 -m hello";
    // The subscription may still be on its way to the broker.
    wait_until("the stimulus is accepted", PATIENCE, async || {
        assert!(publish(broker.address(), &properties.split_whitespace().collect::<Vec<_>>()).await.status.success());
        world.count() == 1
    })
    .await;
    let (key, stimulus) = world.accepted.lock().unwrap()[0].clone();
    assert_eq!(key.to_string(), "acme/lamp");
    assert_eq!((stimulus.channel.as_str(), stimulus.content.as_deref()), ("chat/de", Some("hello")));
    assert_eq!((stimulus.id.as_str(), stimulus.repeatable), ("order-1", true));
    let reply_to = stimulus.reply_to.unwrap();
    assert_eq!(
        (reply_to.topic.as_str(), reply_to.correlation.as_deref()),
        ("sophont/acme/lamp/out/x", Some(&b"c-7"[..]))
    );

    let listener = Subscriber::start(
        broker.address(),
        &["-V", "5", "-q", "1", "-t", "sophont/acme/lamp/#", "-F", "%r %t %D %P %C %p"],
    )
    .await;
    node.link.publish(message(&reply_to.topic, "{\"turn\":1}", false)).await.unwrap();
    node.link.publish(message("sophont/acme/lamp/state/desired", "{\"version\":1}", true)).await.unwrap();
    let lines = listener.wait(2).await;
    assert_eq!(lines[0], "0 sophont/acme/lamp/out/x c-7 effect:lamp/1-0 application/json {\"turn\":1}");
    let late = Subscriber::start(broker.address(), &["-t", "sophont/acme/lamp/state/desired", "-F", "%r %p"]).await;
    assert_eq!(late.wait(1).await, ["1 {\"version\":1}"], "the broker retains it");

    let reported = ["-q", "1", "-t", "sophont/acme/lamp/state/reported", "-m", "{\"on\":true}"];
    assert!(publish(broker.address(), &reported).await.status.success());
    world.wait(2).await;
    let (_, patch) = world.accepted.lock().unwrap()[1].clone();
    assert_eq!(patch.data.unwrap().get(), "{\"reported\":{\"on\":true}}");
    node.link.close(PATIENCE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_while_the_broker_restarts_under_flow() {
    const DEVICES: usize = 4;
    // By default Mosquitto keeps 1,000 messages for a client that is away, and drops the rest.
    let mut broker = Mosquitto::builder().config("max_queued_messages 0").start().await;
    let world = World::new();
    let node = Node::of(&world, &broker).await;
    let first = Device::connect(&broker, "first");
    let base = first.stand(&world).await;
    let (stop, stopped) = watch::channel(false);
    let flows: Vec<_> = (0..DEVICES)
        .map(|n| {
            let (device, stopped) = (Device::connect(&broker, &format!("device-{n}")), stopped.clone());
            tokio::spawn(async move {
                let mut sent = Vec::new();
                while !*stopped.borrow() {
                    let id = format!("m-{n}-{}", sent.len());
                    device.send(&format!("sophont/acme/d{n}/in/c"), &id, &id).await;
                    sent.push(id);
                }
                sent
            })
        })
        .collect();
    for round in 1..=3 {
        let goal = world.count() + 100;
        wait_until("the flow flows", PATIENCE, async || world.count() >= goal).await;
        broker.stop(Signal::SIGTERM).await;
        wait_until("the link noticed", PATIENCE, async || !node.link.is_connected()).await;
        assert!(node.link.publish(message("sophont/acme/d0/out/x", "1", false)).await.is_err(), "round {round}");
        broker.start_again().await;
        node.wait_connected().await;
    }
    let goal = world.count() + 100;
    wait_until("the flow flows on", PATIENCE, async || world.count() >= goal).await;
    stop.send(true).unwrap();
    let mut sent = Vec::new();
    for flow in flows {
        sent.push(flow.await.unwrap());
    }
    world.wait(base + sent.iter().map(Vec::len).sum::<usize>()).await;
    let mut by_instance: HashMap<String, Vec<String>> = HashMap::new();
    for (key, stimulus) in world.accepted.lock().unwrap().iter() {
        by_instance.entry(key.instance.to_string()).or_default().push(stimulus.content.clone().unwrap());
    }
    for (n, sent) in sent.iter().enumerate() {
        assert_eq!(&by_instance[&format!("d{n}")], sent, "each once, in order");
    }
    node.link.publish(message("sophont/acme/d0/out/x", "1", false)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_lost_the_session_is_subscribed_again() {
    let (mut broker, world) = (Mosquitto::start().await, World::new());
    let node = Node::of(&world, &broker).await;
    let device = Device::connect(&broker, "device");
    wait_until("the subscription stands", PATIENCE, async || {
        device.send("sophont/acme/a/in/c", "1", "id-1").await;
        world.count() == 1
    })
    .await;
    broker.stop(Signal::SIGKILL).await;
    wait_until("the link noticed", PATIENCE, async || !node.link.is_connected()).await;
    broker.start_again().await;
    node.wait_connected().await;
    wait_until("the flow goes on", PATIENCE, async || {
        device.send("sophont/acme/a/in/c", "2", "id-2").await;
        world.count() == 2
    })
    .await;
    node.link.publish(message("sophont/acme/a/out/x", "1", false)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_acknowledged_comes_to_the_next_life_of_the_process() {
    let (broker, world) = (Mosquitto::start().await, World::new());
    let node = Node::of(&world, &broker).await;
    let device = Device::connect(&broker, "device");
    let base = device.stand(&world).await;
    // Twenty reach the process and are not accepted, then it dies; ten more come while it is dead.
    world.held.send_replace(Some(String::new()));
    let asked = world.asked();
    for n in 0..20 {
        let (topic, payload) = (format!("sophont/acme/i{n}/in/c"), n.to_string());
        assert!(publish(broker.address(), &["-q", "1", "-t", &topic, "-m", &payload]).await.status.success());
    }
    wait_until("all are in hand", PATIENCE, async || world.asked() == asked + 20).await;
    node.kill().await;
    for n in 20..30 {
        let (topic, payload) = (format!("sophont/acme/i{n}/in/c"), n.to_string());
        assert!(publish(broker.address(), &["-q", "1", "-t", &topic, "-m", &payload]).await.status.success());
    }
    assert_eq!(world.count(), base);
    world.held.send_replace(None);
    let node = Node::of(&world, &broker).await;
    world.wait(base + 30).await;
    // In this life they were accepted, but the process dies before it can say so.
    world.silent.send_replace(true);
    for n in 0..5 {
        let (topic, payload) = (format!("sophont/acme/i{n}/in/c"), format!("again {n}"));
        assert!(publish(broker.address(), &["-q", "1", "-t", &topic, "-m", &payload]).await.status.success());
    }
    world.wait(base + 35).await;
    node.kill().await;
    world.silent.send_replace(false);
    // The next one cannot look up at once what its earlier life accepted, and must not guess.
    world.unsure.store(3, Ordering::SeqCst);
    let node = Node::of(&world, &broker).await;
    // A later message of each shows that the copies before it were dealt with.
    for n in 0..5 {
        let topic = format!("sophont/acme/i{n}/in/c");
        device.send(&topic, &format!("last {n}"), &format!("last-{n}")).await;
    }
    world.wait(base + 40).await;
    let contents = world.contents();
    let distinct: HashSet<&String> = contents.iter().collect();
    assert_eq!((contents.len(), distinct.len()), (base + 40, base + 40), "each once: {contents:?}");
    // Publishing works on a resumed session, too.
    node.link.publish(message("sophont/acme/a/out/x", "1", false)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_after_a_reconnect_is_recognised_while_the_first_is_in_hand() {
    let (mut broker, world) = (Mosquitto::start().await, World::new());
    let node = Node::of(&world, &broker).await;
    let device = Device::connect(&broker, "device");
    let base = device.stand(&world).await;
    world.held.send_replace(Some(String::new()));
    let asked = world.asked();
    for n in 0..10 {
        let topic = format!("sophont/acme/i{n}/in/c");
        assert!(publish(broker.address(), &["-q", "1", "-t", &topic, "-m", "same"]).await.status.success());
    }
    wait_until("all are in hand", PATIENCE, async || world.asked() == asked + 10).await;
    broker.stop(Signal::SIGTERM).await;
    wait_until("the link noticed", PATIENCE, async || !node.link.is_connected()).await;
    broker.start_again().await;
    node.wait_connected().await;
    world.held.send_replace(None);
    world.wait(base + 10).await;
    for n in 0..10 {
        device.send(&format!("sophont/acme/i{n}/in/c"), "last", &format!("last-{n}")).await;
    }
    world.wait(base + 20).await;
    assert_eq!(world.contents().iter().filter(|content| *content == "same").count(), 10);
    node.kill().await;
    let _node = Node::of(&world, &broker).await;
    device.send("sophont/acme/probe/in/c", "end", "end").await;
    world.wait(base + 21).await;
    assert_eq!(world.count(), base + 21, "all was acknowledged: nothing came again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_slow_instance_holds_nobody_and_the_broker_keeps_what_is_too_much() {
    let (broker, world) = (Mosquitto::start().await, World::new());
    let config = sophont::config::Mqtt { receive_maximum: 8, ..config(format!("mqtt://{}", broker.address())) };
    let node = Node::start(&world, config).await;
    let device = Device::connect(&broker, "device");
    let base = device.stand(&world).await;
    world.held.send_replace(Some("slow".into()));
    for n in 0..3 {
        device.send("sophont/acme/slow/in/c", &format!("slow {n}"), &format!("slow-{n}")).await;
    }
    for n in 0..50 {
        device.send("sophont/acme/quick/in/c", &format!("quick {n}"), &format!("quick-{n}")).await;
    }
    world.wait(base + 50).await;
    world.held.send_replace(Some(String::new()));
    let asked = world.asked();
    for n in 0..40 {
        device.send(&format!("sophont/acme/i{n}/in/c"), &format!("more {n}"), &format!("more-{n}")).await;
    }
    // Three of eight places are held by the slow instance. (Mosquitto 2.0.11 sends a few more than it should.)
    wait_until("the places are taken", PATIENCE, async || world.asked() >= asked + 5).await;
    node.link.publish(message("sophont/acme/quick/out/x", "1", false)).await.unwrap();
    assert!(world.asked() < asked + 20, "the broker keeps the rest: {}", world.asked() - asked);
    world.refusals.store(10, Ordering::SeqCst);
    world.held.send_replace(None);
    world.wait(base + 93).await;
    let contents = world.contents();
    let slow: Vec<&String> = contents.iter().filter(|content| content.starts_with("slow")).collect();
    assert_eq!(slow, ["slow 0", "slow 1", "slow 2"], "in order, though some were refused for a while");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_never_be_accepted_is_reported_and_holds_nothing() {
    let (broker, world) = (Mosquitto::start().await, World::new());
    let _node = Node::of(&world, &broker).await;
    let device = Device::connect(&broker, "device");
    wait_until("the subscription stands", PATIENCE, async || {
        device.send("sophont/acme/lamp/in/c", "good", "good").await;
        world.count() == 1
    })
    .await;
    let errors = Subscriber::start(broker.address(), &["-t", "sophont/acme/lamp/out/errors"]).await;
    let bad = ["-q", "1", "-t", "sophont/acme/lamp/state/reported", "-m", "[1]"];
    assert!(publish(broker.address(), &bad).await.status.success());
    device.send("sophont/acme/lamp/in/c", "x", "no id at all").await;
    device.send("sophont/a b/lamp/in/c", "x", "a").await;
    let reports = errors.wait(2).await;
    assert!(reports[0].contains("\"reason\":\"payload_format\""), "{reports:?}");
    device.send("sophont/acme/lamp/in/c", "good again", "good-2").await;
    world.wait(2).await;
    assert_eq!(world.contents(), ["good", "good again"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_share_a_group() {
    let (broker, world) = (Mosquitto::start().await, World::new());
    let of = |client_id: &str| sophont::config::Mqtt {
        client_id: client_id.into(),
        share_group: "nodes".into(),
        ..config(format!("mqtt://{}", broker.address()))
    };
    let (one, two) = (Node::start(&world, of("one")).await, Node::start(&world, of("two")).await);
    let device = Device::connect(&broker, "device");
    let base = device.stand(&world).await;
    for n in 0..40 {
        let topic = format!("sophont/acme/i{n}/in/c");
        assert!(publish(broker.address(), &["-q", "1", "-t", &topic, "-m", &n.to_string()]).await.status.success());
    }
    world.wait(base + 40).await;
    assert_eq!(world.count(), base + 40, "each message reaches one of them");
    // What the broker gives to the one that left waits for its return.
    one.link.close(PATIENCE).await;
    for n in 0..10 {
        device.send("sophont/acme/probe/in/c", &format!("late {n}"), &format!("late-{n}")).await;
    }
    let one = Node::start(&world, of("one")).await;
    world.wait(base + 50).await;
    assert_eq!(world.count(), base + 50);
    one.link.close(PATIENCE).await;
    two.link.close(PATIENCE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_and_a_password_let_the_node_in_and_a_wrong_authority_does_not() {
    // A secret that is in the environment of every test run: tests do not set variables, which all threads share.
    let (name, secret) = std::env::vars()
        .find(|(_, value)| {
            value.len() > 3 && value.len() < 100 && value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'/')
        })
        .unwrap();
    let broker = Mosquitto::builder().tls().password("node", &secret).start().await;
    let (world, port) = (World::new(), broker.tls_address().port());
    let of = |ca: &std::path::Path| sophont::config::Mqtt {
        username: "node".into(),
        password_env: name.clone(),
        ca_file: Some(ca.to_owned()),
        ..config(format!("mqtts://localhost:{port}"))
    };
    let other = tempfile::TempDir::new().unwrap();
    let stranger = crate::support::tls::Certificates::make(other.path()).await;
    let (parts, drain) = parts(&world, of(&stranger.ca));
    let mistrusting = Link::start(parts).unwrap();
    wait_until("the broker saw a broken handshake", PATIENCE, async || broker.log().contains("OpenSSL Error")).await;
    assert!(!mistrusting.is_connected());
    drain.stop();
    mistrusting.close(PATIENCE).await;

    let node = Node::start(&world, of(&broker.certificates().ca)).await;
    wait_until("the stimulus is accepted", PATIENCE, async || {
        let mut arguments: Vec<&str> = vec!["-u", "node", "-P", &secret];
        arguments.extend(["-V", "5", "-q", "1", "-t", "sophont/acme/lamp/in/c", "-m", "hello"]);
        arguments.extend(["-D", "publish", "user-property", "id", "tls-1"]);
        assert!(publish(broker.address(), &arguments).await.status.success());
        world.count() == 1
    })
    .await;
    node.link.publish(message("sophont/acme/lamp/out/x", "1", false)).await.unwrap();
}

#[tokio::test]
async fn wrong_settings_are_told_at_the_start() {
    let world = World::new();
    let start = |config| Link::start(parts(&world, config).0).map(drop);
    assert!(matches!(start(config("broker:1883".into())), Err(Error::Url(_))));
    let no_password = sophont::config::Mqtt {
        username: "u".into(),
        password_env: "SOPHONT_TEST_NO_SUCH_VARIABLE".into(),
        ..config("mqtt://localhost:1".into())
    };
    assert!(matches!(start(no_password), Err(Error::Password(_))));
    let no_ca = sophont::config::Mqtt { ca_file: Some("/no/such/file".into()), ..config("mqtts://localhost:1".into()) };
    assert!(matches!(start(no_ca), Err(Error::Ca(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_node_decides_behind_the_broker_and_loses_nothing_to_kill_9() {
    let broker = Mosquitto::start().await;
    let settings = format!("[mqtt]\nmode = \"external\"\nurl = \"mqtt://{}\"\n", broker.address());
    let mut node = support::Node::builder().without_mqtt_listener().config(&settings).start().await;
    let rule = serde_json::json!({"engine": "reflex", "reflexes": [{"when": "true", "do": [{"reply": "got {{stimulus.content}}"}]}]});
    node.client().put("/v1/instances/lamp", &rule).await.expect(201);
    let device = Device::connect(&broker, "device");
    let topic = "sophont/default/lamp/in/c";
    let replies =
        Subscriber::start(broker.address(), &["-q", "1", "-t", "sophont/default/lamp/out/reply", "-F", "%p"]).await;
    let turns = async |node: &support::Node| {
        let listed = node.client().get("/v1/instances/lamp/turns?limit=1000").await.expect(200);
        let items = listed["items"].as_array().unwrap().clone();
        items.iter().map(|turn| turn["stimulus"]["content"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    wait_until("the subscription stands", PATIENCE, async || {
        device.send(topic, "first", "first").await;
        !turns(&node).await.is_empty()
    })
    .await;
    assert!(replies.wait(1).await[0].contains("\"content\":\"got first\""));
    for n in 0..50 {
        if n == 25 {
            node.kill9().await;
        }
        device.send(topic, &format!("m {n}"), &format!("m-{n}")).await;
    }
    node.start_again().await;
    wait_until("all are decided", PATIENCE, async || turns(&node).await.len() == 51).await;
    let expected: Vec<String> = std::iter::once("first".into()).chain((0..50).map(|n| format!("m {n}"))).collect();
    assert_eq!(turns(&node).await, expected, "each once, in order");
    wait_until("all are answered", PATIENCE, async || {
        let lines = replies.messages();
        expected.iter().all(|content| lines.iter().any(|line| line.contains(&format!("\"got {content}\""))))
    })
    .await;
    node.term();
    assert!(node.wait_exit(PATIENCE).await.success());
}

/// Three nodes over PostgreSQL and Redis, each a client of the broker.
async fn cluster(broker: &Mosquitto, settings: &str) -> Cluster {
    let settings = format!("[mqtt]\nmode = \"external\"\nurl = \"mqtt://{}\"\n{settings}\n", broker.address());
    let cluster = Cluster::build(3, true, |builder| builder.config(&settings).without_mqtt_listener()).await;
    for instance in ["lamp", "door", "probe"] {
        cluster.client(0).put_instance(instance, &echo()).await;
    }
    wait_until("somebody reads", PATIENCE, async || {
        let probe = ["-q", "1", "-t", "sophont/default/probe/in/c", "-m", "probe"];
        assert!(publish(broker.address(), &probe).await.status.success());
        let turns = cluster.client(0).get("/v1/instances/probe/turns").await.expect(200);
        turns["items"].as_array().is_some_and(|turns| !turns.is_empty())
    })
    .await;
    cluster
}

/// A device that sends numbers as fast as it can: `act` happens after the first half.
async fn pour(broker: &Mosquitto, instance: &str, count: u16, act: impl Future<Output = ()>) -> Vec<String> {
    let (mut device, _) = Raw::connect(broker.address(), Hello::v3(instance)).await;
    let topic = format!("sophont/default/{instance}/in/c");
    let mut send = async |numbers: std::ops::RangeInclusive<u16>| {
        for number in numbers.clone() {
            device.publish(&topic, &number.to_string(), 1, number).await;
        }
        for number in numbers {
            assert_eq!(device.ack(0x40).await, (number, 0));
        }
    };
    send(1..=count / 2).await;
    act.await;
    send(count / 2 + 1..=count).await;
    (1..=count).map(|number| number.to_string()).collect()
}

#[tokio::test]
async fn one_reader_keeps_the_order_of_a_device_also_when_it_is_killed() {
    // Without persistence the broker keeps its sessions all the same, as long as it runs.
    let broker = Mosquitto::builder().config("max_queued_messages 0\nmax_inflight_messages 0").start().await;
    let mut cluster = cluster(&broker, "readers = \"one\"").await;
    let sent = pour(&broker, "lamp", 400, async {}).await;
    assert_eq!(cluster.client(0).until_decided("lamp", sent.len()).await, sent, "as they were sent");

    let first = |cluster: &Cluster| {
        let client = cluster.client(1);
        async move {
            let shards = client.get("/v1/cluster/shards").await.expect(200);
            let rows = shards["items"].as_array().cloned().unwrap_or_default();
            let row = rows.into_iter().find(|row| row["shard"] == 0).expect("the first shard");
            row["node"].as_str().expect("an owner").to_owned()
        }
    };
    let reader = first(&cluster).await;
    let number = (0..3).find(|number| reader.starts_with(&format!("n{number}"))).expect("a node of the cluster");
    let killed = &mut cluster.nodes[number];
    let sent = pour(&broker, "door", 400, async { killed.kill9().await }).await;
    let asked = cluster.client(number + 1);
    let decided = asked.until_decided("door", sent.len()).await;
    assert_eq!(decided, sent, "each once, as they were sent, over a change of readers");
}

#[tokio::test]
async fn a_group_of_nodes_takes_each_message_once_also_when_one_is_killed() {
    let broker = Mosquitto::builder().config("max_queued_messages 0\nmax_inflight_messages 0").start().await;
    let mut cluster = cluster(&broker, "share_group = \"nodes\"").await;
    let replies =
        Subscriber::start(broker.address(), &["-q", "1", "-t", "sophont/default/lamp/out/reply", "-F", "%p"]).await;
    let owner = cluster.owner("lamp").await;
    let victim = (owner + 1) % 3;
    let killed = &mut cluster.nodes[victim];
    let sent = pour(&broker, "lamp", 300, async { killed.kill9().await }).await;
    // What the broker gave to the dead one waits for its return.
    cluster.nodes[victim].start_again().await;
    let mut decided = cluster.client(owner).until_decided("lamp", sent.len()).await;
    decided.sort_by_key(|text| text.parse::<u16>().unwrap());
    assert_eq!(decided, sent, "each once, by whichever node");
    // The owner alone answers, once each.
    let mut answered = replies.wait(sent.len()).await;
    assert_eq!(answered.len(), sent.len());
    answered.sort();
    answered.dedup();
    assert_eq!(answered.len(), sent.len());
}
