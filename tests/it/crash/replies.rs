//! The device that listens: every reply it gets must be of a committed turn, and every device that was acknowledged must
//! have had its reply, through all kills.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::Value;
use tokio::task::JoinHandle;

use crate::support::{
    PATIENCE,
    device::{Connection, Packet, Version},
    wait_for, wait_until,
};

/// A reply: instance, turn and what it answers.
type Reply = (String, u64, String);

/// The listening device and what it heard.
#[derive(Debug)]
pub struct Replies {
    heard: Arc<Mutex<HashSet<Reply>>>,
    listening: Arc<AtomicBool>,
    listener: JoinHandle<()>,
}

impl Drop for Replies {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

impl Replies {
    /// Starts listening to all replies of the tenant, with a session that outlives connections.
    pub fn start(to: SocketAddr) -> Self {
        let (heard, listening) = (Arc::<Mutex<HashSet<Reply>>>::default(), Arc::<AtomicBool>::default());
        let listener = tokio::task::spawn_local(listen(to, Arc::clone(&heard), Arc::clone(&listening)));
        Self { heard, listening, listener }
    }

    /// Waits until the subscription is granted.
    pub async fn until_listening(&self) {
        wait_until("the listener is subscribed", PATIENCE, async || self.listening.load(Ordering::Relaxed)).await;
    }

    /// Waits until everything sent was answered, and checks that every answer is of a turn that is there.
    ///
    /// # Panics
    /// When an answer is missing at the deadline, or speaks of a turn that is not there.
    pub async fn until_answered(&self, sent: &[(String, String)], turns: &HashMap<String, Vec<Value>>) {
        let mut committed = HashMap::new();
        for (instance, turns) in turns {
            for turn in turns {
                let content = turn["stimulus"]["content"].as_str().expect("content").to_owned();
                let number = turn["turn"].as_u64().expect("a number");
                committed.insert((instance.clone(), content), (number, turn["stimulus"]["id"].clone()));
            }
        }
        let expected: Vec<Reply> = sent
            .iter()
            .filter_map(|key| {
                let (number, id) = committed.get(key)?;
                Some((key.0.clone(), *number, id.as_str().expect("an id").to_owned()))
            })
            .collect();
        wait_until("every device's stimulus is answered", 2 * PATIENCE, async || {
            let heard = self.heard.lock().expect("what was heard");
            expected.iter().all(|reply| heard.contains(reply))
        })
        .await;
        let there: HashSet<Reply> = committed
            .iter()
            .map(|((instance, _), (number, id))| (instance.clone(), *number, id.as_str().expect("an id").to_owned()))
            .collect();
        let heard = self.heard.lock().expect("what was heard");
        let invented: Vec<_> = heard.difference(&there).collect();
        assert!(invented.is_empty(), "replies of turns that are not there: {invented:?}");
        println!("{} replies heard, {} expected", heard.len(), expected.len());
    }
}

async fn listen(to: SocketAddr, heard: Arc<Mutex<HashSet<Reply>>>, listening: Arc<AtomicBool>) {
    loop {
        let connection = wait_for("the listener connects", Duration::from_secs(120), async || {
            Connection::open(to, "listener", Version::V311).await.ok()
        })
        .await;
        // A connection breaks with every kill.
        let _ = follow(connection, &heard, &listening).await;
    }
}

async fn follow(mut connection: Connection, heard: &Mutex<HashSet<Reply>>, listening: &AtomicBool) -> io::Result<()> {
    if !connection.session_present {
        connection.subscribe(1, "sophont/default/+/out/reply").await?;
    }
    loop {
        match connection.next().await? {
            Packet::Publish { topic, packet_id, payload } => {
                let instance = topic.split('/').nth(2).unwrap_or_default().to_owned();
                let payload: Value = serde_json::from_slice(&payload).expect("a reply is JSON");
                let stimulus = payload["stimulus"].as_str().expect("the stimulus's id").to_owned();
                let turn = payload["turn"].as_u64().expect("the turn's number");
                heard.lock().expect("what was heard").insert((instance, turn, stimulus));
                if let Some(packet_id) = packet_id {
                    connection.acknowledge(packet_id).await?;
                }
            }
            Packet::Suback(_) => listening.store(true, Ordering::Relaxed),
            _ => {}
        }
    }
}
