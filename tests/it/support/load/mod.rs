//! Senders that never give up, and the log of what they were promised.
//!
//! Four manners: ordered HTTP senders (one stimulus in flight, repeated under its id until accepted, through whichever door
//! answers), senders without ids (they cannot repeat, so what was not answered stays unknown), twins (the same stimulus over
//! two connections at once), and devices (`by_mqtt.rs`). The log is what `sophont check-history` reads.

mod book;
mod by_http;
mod by_mqtt;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use sophont::cli::check_history::log::Log;
use tokio::task::JoinSet;

use super::{Http, Node, PATIENCE, device::Version, http::echo, wait_until};

pub use book::Book;

/// Instances that decide at once, and instances that think first, unless a shape says otherwise.
pub const FAST: usize = 4;
const SLOW: usize = 2;
/// Longest time until a stimulus is accepted, faults included.
pub const UNTIL_ACCEPTED: Duration = Duration::from_secs(120);
/// The slow instance with a device, which is refused for want of room now and then, and must keep its order all the same.
const WITH_DEVICE: usize = 0;

/// The name of an instance that decides at once.
pub fn fast(n: usize) -> String {
    format!("fast-{n}")
}

fn slow(n: usize) -> String {
    format!("slow-{n}")
}

/// All instances of the usual shape.
pub fn instances() -> Vec<String> {
    Shape::default().instances()
}

/// What load there is.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Instances that decide at once, each with two ordered senders.
    pub fast: usize,
    /// Instances that think first.
    pub slow: usize,
    /// Whether stimuli are also sent over two connections at once.
    pub twins: bool,
    /// Whether there are senders without ids too.
    pub nameless: bool,
    /// Whether devices are all of MQTT 5 with ids, and accepted by a broker in between.
    pub through_broker: bool,
    /// Longest wait for one answer over HTTP before the stimulus is repeated.
    pub patience: Duration,
    /// Time between two stimuli of one sender; none = as fast as they are answered.
    pub pace: Duration,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            fast: FAST,
            slow: SLOW,
            twins: false,
            nameless: false,
            through_broker: false,
            patience: PATIENCE,
            pace: Duration::ZERO,
        }
    }
}

impl Shape {
    /// All instances.
    pub fn instances(&self) -> Vec<String> {
        (0..self.fast).map(fast).chain((0..self.slow).map(slow)).collect()
    }

    /// Gives every instance its profile.
    pub async fn prepare(&self, http: &Http) {
        for n in 0..self.fast {
            http.put_instance(&fast(n), &echo()).await;
        }
        for n in 0..self.slow {
            // The small inbox refuses now and then, and what is accepted is decided soon after the load ends.
            let script = json!({"reply": "thought", "delay_ms": 2});
            let profile = json!({"engine": "scripted", "script": script, "limits": {"max_inbox": 64}});
            http.put_instance(&slow(n), &profile).await;
        }
    }
}

/// Where senders knock: each tries the next door when one does not answer.
#[derive(Debug, Clone)]
pub struct Doors {
    /// HTTP.
    pub http: Vec<Http>,
    /// MQTT.
    pub mqtt: Vec<SocketAddr>,
}

impl Doors {
    /// The doors of one node.
    pub fn of(node: &Node) -> Self {
        Self { http: vec![node.client()], mqtt: vec![node.mqtt()] }
    }
}

/// Running senders, or what is left of them.
#[derive(Debug)]
pub struct Load {
    book: Arc<Book>,
    senders: JoinSet<()>,
    devices: Vec<Arc<AtomicU64>>,
    instances: Vec<String>,
}

impl Load {
    /// Starts all senders, on the present `LocalSet`. `name` keeps the ids of one load apart from those of another.
    pub fn start(doors: &Doors, name: &str, shape: &Shape, book: Book) -> Self {
        let mut load =
            Self { book: Arc::new(book), senders: JoinSet::new(), devices: Vec::new(), instances: shape.instances() };
        for n in 0..shape.fast {
            load.ordered(doors, shape, fast(n), format!("{name}-a{n}"), "?wait=5");
            load.ordered(doors, shape, fast(n), format!("{name}-b{n}"), "?wait=0");
            if shape.twins {
                load.twins(doors, shape, fast(n), format!("{name}-t{n}"));
            }
            if shape.nameless {
                load.nameless(doors, shape, fast(n), format!("{name}-u{n}"));
            }
        }
        for n in 0..shape.slow {
            load.ordered(doors, shape, slow(n), format!("{name}-w{n}"), "?wait=5");
            if n != WITH_DEVICE {
                load.ordered(doors, shape, slow(n), format!("{name}-s{n}"), "?wait=0");
            }
        }
        let old = if shape.through_broker { Version::V5 } else { Version::V311 };
        let ids = shape.through_broker;
        load.device(doors, shape, fast(0), format!("{name}-d0"), old, ids);
        load.device(doors, shape, fast(1), format!("{name}-d1"), Version::V5, true);
        load.device(doors, shape, fast(2), format!("{name}-d2"), Version::V5, ids);
        load.device(doors, shape, slow(WITH_DEVICE), format!("{name}-d3"), old, ids);
        load
    }

    fn sender(&self, doors: &Doors, shape: &Shape, instance: String, name: String) -> by_http::Sender {
        by_http::Sender::new(Arc::clone(&self.book), doors.http.clone(), shape, instance, name)
    }

    fn ordered(&mut self, doors: &Doors, shape: &Shape, instance: String, name: String, wait: &'static str) {
        let sender = self.sender(doors, shape, instance, name);
        self.senders.spawn_local(sender.ordered(wait));
    }

    fn nameless(&mut self, doors: &Doors, shape: &Shape, instance: String, name: String) {
        let sender = self.sender(doors, shape, instance, name);
        self.senders.spawn_local(sender.nameless());
    }

    fn twins(&mut self, doors: &Doors, shape: &Shape, instance: String, name: String) {
        let sender = self.sender(doors, shape, instance, name);
        self.senders.spawn_local(sender.twins());
    }

    fn device(
        &mut self,
        doors: &Doors,
        shape: &Shape,
        instance: String,
        sender: String,
        version: Version,
        names_ids: bool,
    ) {
        // A broker takes whatever comes; what it holds for a node that is away should stay below its receive maximum.
        let pace = if shape.through_broker { 5 * shape.pace } else { shape.pace };
        let accepted = Arc::new(AtomicU64::new(0));
        self.devices.push(Arc::clone(&accepted));
        let device = by_mqtt::Device::new(Arc::clone(&self.book), accepted, instance, sender, version, names_ids, pace);
        self.senders.spawn_local(device.run(doors.mqtt.clone()));
    }

    /// Waits for so many more acceptances, some of them to every device.
    pub async fn until_accepted(&self, count: u64) {
        let target = self.book.accepted() + count;
        let devices: Vec<u64> = self.devices.iter().map(|device| device.load(Ordering::Relaxed)).collect();
        wait_until(&format!("{count} more are accepted, some of every device"), UNTIL_ACCEPTED, async || {
            let each =
                self.devices.iter().zip(&devices).all(|(device, before)| device.load(Ordering::Relaxed) > *before);
            each && self.book.accepted() >= target
        })
        .await;
    }

    /// Waits until each instance was served at least once from now on.
    pub async fn until_each_is_served(&self) {
        let counts = || -> Vec<usize> { self.instances.iter().map(|one| self.book.times_served(one)).collect() };
        let before = counts();
        wait_until("each instance is served again", UNTIL_ACCEPTED, async || {
            counts().iter().zip(&before).all(|(now, before)| now > before)
        })
        .await;
    }

    /// Lets every sender finish what it has in flight, and returns what they wrote down.
    pub async fn finish(mut self) -> Self {
        self.book.stop();
        while let Some(end) = self.senders.join_next().await {
            end.expect("a sender came to its end");
        }
        self
    }

    /// What they wrote down.
    pub fn book(&self) -> &Arc<Book> {
        &self.book
    }

    /// Instance and content of everything devices sent.
    pub fn sent_by_devices(&self) -> Vec<(String, String)> {
        self.book.read(|log: &Log| {
            let all = log.instances().flat_map(|i| log.sent(i).iter().map(|sent| (i.to_owned(), sent.clone())));
            let by_device = |sent: &str| sent.rsplit('-').next().is_some_and(|name| name.starts_with('d'));
            all.filter(|(_, sent)| by_device(&sent.sender)).map(|(instance, sent)| (instance, sent.id)).collect()
        })
    }
}
