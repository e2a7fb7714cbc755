//! Devices: MQTT QoS 1, a window in flight, a session that outlives connections, repeats with DUP under few and often
//! reused packet ids.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use sophont::cli::check_history::log::{By, Door, Send, What};
use tokio::time::timeout;

use super::{
    super::{
        device::{Connection, Packet, Version},
        wait_for, wait_until,
    },
    Book, UNTIL_ACCEPTED, WITH_DEVICE, slow,
};

/// Publishes a device has in flight.
const WINDOW: usize = 8;

/// One publish on its way.
#[derive(Debug)]
struct InFlight {
    packet_id: u16,
    id: String,
}

#[derive(Debug)]
pub struct Device {
    book: Arc<Book>,
    accepted: Arc<AtomicU64>,
    instance: String,
    sender: String,
    topic: String,
    version: Version,
    names_ids: bool,
    pace: Duration,
    began: Instant,
    next: u64,
    in_flight: VecDeque<InFlight>,
    /// Refused for the moment, to be sent again.
    again: VecDeque<String>,
    known: bool,
}

impl Device {
    pub fn new(
        book: Arc<Book>,
        accepted: Arc<AtomicU64>,
        instance: String,
        sender: String,
        version: Version,
        names_ids: bool,
        pace: Duration,
    ) -> Self {
        let topic = format!("sophont/default/{instance}/in/text");
        let (in_flight, again) = (VecDeque::new(), VecDeque::new());
        let (next, known, began) = (1, false, Instant::now());
        Self { book, accepted, instance, sender, topic, version, names_ids, pace, began, next, in_flight, again, known }
    }

    pub async fn run(mut self, doors: Vec<SocketAddr>) {
        let mut door: usize = self.sender.bytes().map(usize::from).sum();
        while !self.is_done() {
            let what = format!("device {} connects", self.sender);
            let connection = wait_for(&what, UNTIL_ACCEPTED, async || {
                let to = doors[door % doors.len()];
                // Without an id it is known by its session and packet id, to the node that has what it sent in hand.
                door += usize::from(self.names_ids);
                Connection::open(to, &self.sender, self.version).await.ok()
            })
            .await;
            if self.known && !connection.session_present {
                self.book.forgot_a_session();
            }
            self.known = true;
            // A broken connection is what this is about: connect again and repeat.
            let _ = self.talk(connection).await;
        }
    }

    fn is_done(&self) -> bool {
        self.book.is_stopping() && self.in_flight.is_empty() && self.again.is_empty()
    }

    async fn talk(&mut self, mut connection: Connection) -> io::Result<()> {
        for waiting in &self.in_flight {
            let id = self.names_ids.then_some(&*waiting.id);
            connection.publish(waiting.packet_id, true, &self.topic, id, waiting.id.as_bytes()).await?;
        }
        while !self.is_done() {
            while self.in_flight.len() < WINDOW
                && let Some(id) = self.next_id()
            {
                self.publish(&mut connection, id).await?;
            }
            if self.in_flight.is_empty() {
                let (this, book) = (&*self, &self.book);
                wait_until("the others send too", UNTIL_ACCEPTED, async || this.may_send() || book.is_stopping()).await;
                continue;
            }
            let look = if self.pace.is_zero() { UNTIL_ACCEPTED } else { self.pace };
            let Ok(packet) = timeout(look, connection.next()).await else { continue };
            match packet? {
                Packet::Puback(packet_id, reason) => self.take_ack(packet_id, reason),
                // A server that goes away says so on MQTT 5.
                Packet::Other(0xe0) => return Err(io::ErrorKind::ConnectionReset.into()),
                other => panic!("device {} was sent {other:?}", self.sender),
            }
        }
        Ok(())
    }

    /// Keeps its pace; the device of the slow instance sends a tenth of all, so that what it sends can be decided in time.
    fn may_send(&self) -> bool {
        let due = if self.pace.is_zero() { u128::MAX } else { self.began.elapsed().as_nanos() / self.pace.as_nanos() };
        if u128::from(self.next) > due.saturating_add(WINDOW as u128) {
            return false;
        }
        self.instance != slow(WITH_DEVICE) || self.next <= WINDOW as u64 + self.book.accepted() / 10
    }

    /// What to send now: first what was refused.
    fn next_id(&mut self) -> Option<String> {
        if let Some(id) = self.again.pop_front() {
            return Some(id);
        }
        if self.book.is_stopping() || !self.may_send() {
            return None;
        }
        let (seq, sender, instance) = (self.next, self.sender.clone(), self.instance.clone());
        self.next += 1;
        let id = format!("{sender}-{seq}");
        let by = if self.names_ids { By::Id } else { By::Content };
        self.book.sends(Send { sender, instance, id: id.clone(), seq, by, door: Door::Mqtt, ..Send::default() });
        Some(id)
    }

    async fn publish(&mut self, connection: &mut Connection, id: String) -> io::Result<()> {
        // The lowest free one: packet ids are reused at once, which a server that recognises repeats by them must bear.
        let free = |packet_id: &u16| self.in_flight.iter().all(|waiting| waiting.packet_id != *packet_id);
        let packet_id = (1..).find(free).expect("a free packet id");
        self.in_flight.push_back(InFlight { packet_id, id: id.clone() });
        let name = self.names_ids.then_some(&*id);
        connection.publish(packet_id, false, &self.topic, name, id.as_bytes()).await
    }

    fn take_ack(&mut self, packet_id: u16, reason: u8) {
        let at = self.in_flight.iter().position(|waiting| waiting.packet_id == packet_id);
        let at = at.unwrap_or_else(|| panic!("device {}: an ack for {packet_id}, which is not in flight", self.sender));
        let waiting = self.in_flight.remove(at).expect("it is there");
        match reason {
            0..0x80 => {
                self.book.answered(&self.instance, &waiting.id, What::Accepted, None, None);
                self.accepted.fetch_add(1, Ordering::Relaxed);
            }
            0x80 | 0x83 | 0x97 => {
                self.book.answered(&self.instance, &waiting.id, What::Refused, None, None);
                // Refused is not the same as not taken, and without an id a new publish is a new stimulus.
                if self.names_ids {
                    self.again.push_back(waiting.id);
                }
            }
            _ => panic!("device {} was refused with {reason:#x}", self.sender),
        }
    }
}
