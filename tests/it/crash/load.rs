//! Senders that never give up, and the log of what they were promised.
//!
//! Three manners: ordered HTTP senders (one stimulus in flight, repeated under its id until acknowledged), twins (the same
//! stimulus over two connections at once), and devices (MQTT QoS 1, a window in flight, a session that outlives
//! connections, repeats with DUP under few and often reused packet ids).

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use sophont::cli::check_history::log::{Answer, Door, Event, Log, Send, What};
use tokio::task::JoinSet;

use crate::support::{
    Http, Node, PATIENCE,
    device::{Connection, Packet, Version},
    http::echo,
    wait_for, wait_until,
};

/// Instances that decide at once, and instances that think first.
pub const FAST: usize = 4;
const SLOW: usize = 2;
/// Longest time until a stimulus is acknowledged, restarts included.
const UNTIL_ACKNOWLEDGED: Duration = Duration::from_secs(120);
/// The slow instance with a device, which is refused for want of room now and then, and must keep its order all the same.
const WITH_DEVICE: usize = 0;
/// Publishes a device has in flight.
const WINDOW: usize = 8;

/// The name of an instance that decides at once.
pub fn fast(n: usize) -> String {
    format!("fast-{n}")
}

fn slow(n: usize) -> String {
    format!("slow-{n}")
}

/// All instances.
pub fn instances() -> Vec<String> {
    (0..FAST).map(fast).chain((0..SLOW).map(slow)).collect()
}

/// Gives every instance its profile.
pub async fn prepare(node: &Node) {
    let http = node.client();
    for n in 0..FAST {
        http.put_instance(&fast(n), &echo()).await;
    }
    for n in 0..SLOW {
        // The small inbox refuses now and then, and what is accepted is decided soon after the load ends.
        let script = json!({"reply": "thought", "delay_ms": 2});
        let profile = json!({"engine": "scripted", "script": script, "limits": {"max_inbox": 64}});
        http.put_instance(&slow(n), &profile).await;
    }
}

/// What all senders share.
#[derive(Debug)]
struct Shared {
    log: Mutex<Log>,
    acknowledged: AtomicU64,
    contradictions: AtomicU64,
    forgotten_sessions: AtomicU64,
    stopping: AtomicBool,
}

impl Shared {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().expect("the log")
    }

    fn sent(&self, instance: &str, sender: &str, seq: u64, id: &str, door: Door) {
        let [instance, sender, id] = [instance, sender, id].map(str::to_owned);
        assert!(self.log().push(Event::Sent(Send { instance, sender, id, seq, door, ..Send::default() })));
    }

    fn acknowledged(&self, instance: &str, id: &str, turn: Option<u64>) {
        let [instance, id] = [instance, id].map(str::to_owned);
        let what = if turn.is_some() { What::Decided } else { What::Accepted };
        let answer = Answer { at: None, client: None, instance, id, what, turn, content: None, code: None };
        assert!(self.log().push(Event::Answer(answer)), "it was sent before");
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

/// Running senders, or what is left of them.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    senders: JoinSet<()>,
    devices: Vec<Arc<AtomicU64>>,
}

impl Load {
    /// Starts all senders. `name` keeps the ids of one load apart from those of another on the same node.
    pub fn start(node: &Node, name: &str, twins: bool) -> Self {
        let shared = Arc::new(Shared {
            log: Mutex::default(),
            acknowledged: AtomicU64::new(0),
            contradictions: AtomicU64::new(0),
            forgotten_sessions: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        });
        let mut load = Self { shared, senders: JoinSet::new(), devices: Vec::new() };
        let http = node.client();
        for n in 0..FAST {
            load.ordered(&http, fast(n), format!("{name}-a{n}"), "?wait=30");
            load.ordered(&http, fast(n), format!("{name}-b{n}"), "?wait=0");
            if twins {
                load.twins(&http, fast(n), format!("{name}-t{n}"));
            }
        }
        for n in 0..SLOW {
            load.ordered(&http, slow(n), format!("{name}-w{n}"), "?wait=30");
            if n != WITH_DEVICE {
                load.ordered(&http, slow(n), format!("{name}-s{n}"), "?wait=0");
            }
        }
        load.device(node.mqtt(), fast(0), format!("{name}-d0"), Version::V311, false);
        load.device(node.mqtt(), fast(1), format!("{name}-d1"), Version::V5, true);
        load.device(node.mqtt(), fast(2), format!("{name}-d2"), Version::V5, false);
        load.device(node.mqtt(), slow(WITH_DEVICE), format!("{name}-d3"), Version::V311, false);
        load
    }

    fn ordered(&mut self, http: &Http, instance: String, sender: String, wait: &'static str) {
        let (shared, http) = (Arc::clone(&self.shared), http.clone());
        self.senders.spawn_local(async move {
            for seq in 1.. {
                if shared.is_stopping() {
                    return;
                }
                let id = format!("{sender}-{seq}");
                shared.sent(&instance, &sender, seq, &id, Door::Http);
                let turn = until_accepted(&http, &instance, &id, wait).await;
                shared.acknowledged(&instance, &id, turn);
            }
        });
    }

    fn twins(&mut self, http: &Http, instance: String, sender: String) {
        let (shared, http) = (Arc::clone(&self.shared), http.clone());
        self.senders.spawn_local(async move {
            for seq in 1.. {
                if shared.is_stopping() {
                    return;
                }
                let id = format!("{sender}-{seq}");
                shared.sent(&instance, &sender, seq, &id, Door::Http);
                let one = until_accepted(&http, &instance, &id, "?wait=30");
                let (one, other) = tokio::join!(one, until_accepted(&http, &instance, &id, "?wait=30"));
                if one.is_some() && other.is_some() && one != other {
                    shared.contradictions.fetch_add(1, Ordering::Relaxed);
                }
                shared.acknowledged(&instance, &id, one.or(other));
            }
        });
    }

    fn device(&mut self, to: SocketAddr, instance: String, sender: String, version: Version, names_ids: bool) {
        let acknowledged = Arc::new(AtomicU64::new(0));
        self.devices.push(Arc::clone(&acknowledged));
        let topic = format!("sophont/default/{instance}/in/text");
        let device = Device {
            shared: Arc::clone(&self.shared),
            acknowledged,
            instance,
            sender,
            topic,
            version,
            names_ids,
            next: 1,
            in_flight: VecDeque::new(),
            known: false,
        };
        self.senders.spawn_local(device.run(to));
    }

    /// Waits for so many more acknowledgements, some of them to every device.
    pub async fn until_acknowledged(&self, count: u64) {
        let all = || self.shared.acknowledged.load(Ordering::Relaxed);
        let target = all() + count;
        let devices: Vec<u64> = self.devices.iter().map(|device| device.load(Ordering::Relaxed)).collect();
        wait_until(&format!("{count} more acknowledgements"), UNTIL_ACKNOWLEDGED, async || {
            let each =
                self.devices.iter().zip(&devices).all(|(device, before)| device.load(Ordering::Relaxed) > *before);
            each && all() >= target
        })
        .await;
    }

    /// Lets every sender finish what it has in flight, and returns what they wrote down.
    pub async fn finish(mut self) -> Self {
        self.shared.stopping.store(true, Ordering::Relaxed);
        while let Some(end) = self.senders.join_next().await {
            end.expect("a sender came to its end");
        }
        self
    }

    /// What was sent and acknowledged.
    pub fn log(&self) -> MutexGuard<'_, Log> {
        self.shared.log()
    }

    /// How often twins were told different turns.
    pub fn contradictions(&self) -> u64 {
        self.shared.contradictions.load(Ordering::Relaxed)
    }

    /// How often a device that had a session was told that there is none.
    pub fn forgotten_sessions(&self) -> u64 {
        self.shared.forgotten_sessions.load(Ordering::Relaxed)
    }

    /// Instance and content of everything devices sent.
    pub fn sent_by_devices(&self) -> Vec<(String, String)> {
        let log = self.log();
        let all = log.instances().flat_map(|i| log.sent(i).iter().map(|sent| (i.to_owned(), sent.clone())));
        let by_device = |sent: &str| sent.rsplit('-').next().is_some_and(|name| name.starts_with('d'));
        all.filter(|(_, sent)| by_device(&sent.sender)).map(|(instance, sent)| (instance, sent.id)).collect()
    }
}

/// Repeats a stimulus until it is acknowledged; the turn, when the answer names it.
async fn until_accepted(http: &Http, instance: &str, id: &str, wait: &str) -> Option<u64> {
    let path = format!("/v1/instances/{instance}/stimuli{wait}");
    wait_for(&format!("{id} is acknowledged"), UNTIL_ACKNOWLEDGED, async || {
        let request = http.request(reqwest::Method::POST, &path).timeout(PATIENCE);
        let answer = Http::try_send(request.json(&json!({"id": id, "content": id}))).await.ok()?;
        match answer.status.as_u16() {
            200 => {
                let turn = answer.json();
                assert_eq!(turn["stimulus"]["id"], id, "{instance} answered with another stimulus's turn: {turn}");
                Some(Some(turn["turn"].as_u64().expect("the turn's number")))
            }
            202 => Some(None),
            503 | 504 => None,
            _ => panic!("{id}: {} {}", answer.status, answer.text),
        }
    })
    .await
}

/// One publish on its way.
#[derive(Debug)]
struct InFlight {
    packet_id: u16,
    id: String,
}

#[derive(Debug)]
struct Device {
    shared: Arc<Shared>,
    acknowledged: Arc<AtomicU64>,
    instance: String,
    sender: String,
    topic: String,
    version: Version,
    names_ids: bool,
    next: u64,
    in_flight: VecDeque<InFlight>,
    known: bool,
}

impl Device {
    async fn run(mut self, to: SocketAddr) {
        while !self.is_done() {
            let what = format!("device {} connects", self.sender);
            let connection = wait_for(&what, UNTIL_ACKNOWLEDGED, async || {
                Connection::open(to, &self.sender, self.version).await.ok()
            })
            .await;
            if self.known && !connection.session_present {
                self.shared.forgotten_sessions.fetch_add(1, Ordering::Relaxed);
            }
            self.known = true;
            // A broken connection is what this test is about: connect again and repeat.
            let _ = self.talk(connection).await;
        }
    }

    fn is_done(&self) -> bool {
        self.shared.is_stopping() && self.in_flight.is_empty()
    }

    async fn talk(&mut self, mut connection: Connection) -> io::Result<()> {
        for waiting in &self.in_flight {
            let id = self.names_ids.then_some(&*waiting.id);
            connection.publish(waiting.packet_id, true, &self.topic, id, waiting.id.as_bytes()).await?;
        }
        while !self.is_done() {
            while self.in_flight.len() < WINDOW && !self.shared.is_stopping() && self.may_send() {
                self.publish_next(&mut connection).await?;
            }
            if self.in_flight.is_empty() {
                let (this, stopping) = (&*self, &self.shared);
                wait_until("the others send too", UNTIL_ACKNOWLEDGED, async || {
                    this.may_send() || stopping.is_stopping()
                })
                .await;
                continue;
            }
            match connection.next().await? {
                Packet::Puback(packet_id, reason) => self.take_ack(packet_id, reason),
                other => panic!("device {} was sent {other:?}", self.sender),
            }
        }
        Ok(())
    }

    /// The device of the slow instance sends a tenth of all, so that what it sends can be decided in time.
    fn may_send(&self) -> bool {
        let all = self.shared.acknowledged.load(Ordering::Relaxed);
        self.instance != slow(WITH_DEVICE) || self.next <= WINDOW as u64 + all / 10
    }

    async fn publish_next(&mut self, connection: &mut Connection) -> io::Result<()> {
        let id = format!("{}-{}", self.sender, self.next);
        self.shared.sent(&self.instance, &self.sender, self.next, &id, Door::Mqtt);
        self.next += 1;
        // The lowest free one: packet ids are reused at once, which a server that recognises repeats by them must bear.
        let free = |packet_id: &u16| self.in_flight.iter().all(|waiting| waiting.packet_id != *packet_id);
        let packet_id = (1..).find(free).expect("a free packet id");
        self.in_flight.push_back(InFlight { packet_id, id: id.clone() });
        let name = self.names_ids.then_some(&*id);
        connection.publish(packet_id, false, &self.topic, name, id.as_bytes()).await
    }

    fn take_ack(&mut self, packet_id: u16, reason: u8) {
        assert!(reason < 0x80, "device {} was refused with {reason:#x}", self.sender);
        let at = self.in_flight.iter().position(|waiting| waiting.packet_id == packet_id);
        let at = at.unwrap_or_else(|| panic!("device {}: an ack for {packet_id}, which is not in flight", self.sender));
        let waiting = self.in_flight.remove(at).expect("it is there");
        self.shared.acknowledged(&self.instance, &waiting.id, None);
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
    }
}
