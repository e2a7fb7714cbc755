//! What a session still has to send: waiting, sent and not acknowledged, released and not completed. Pure.
//!
//! Not here: rows (`registry` writes them), the socket (`connection`).
//!
//! Invariants: order numbers grow and give the packet id, so a message keeps its id over reconnects and restarts; at most
//! `window` messages of QoS 1 and 2 are under way; a held message and what follows it stay until it is released.
//! Tests: at the foot.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use super::{
    packet::{Id, Outgoing},
    record::Message,
};
use crate::types::{Millis, limits::MAX_QUEUED_BYTES};

/// Most QoS 0 messages waiting for a connection that does not keep up.
const MAX_WEAK: usize = 1000;

/// A message on its way to one session.
#[derive(Debug, Clone)]
pub struct Item {
    /// What.
    pub message: Arc<Message>,
    /// QoS of this delivery.
    pub qos: u8,
    /// Retain flag of this delivery.
    pub retain: bool,
    /// Subscription identifiers.
    pub ids: Vec<u32>,
    /// Position in the session, from 1; 0 for QoS 0.
    pub order: i64,
    /// Whether it has a row in the store.
    pub stored: bool,
    /// Whether it may have been sent before.
    pub dup: bool,
    /// Not to be sent yet.
    pub held: bool,
}

impl Item {
    /// A message for a session, not stored.
    pub fn new(message: Arc<Message>, qos: u8, retain: bool, ids: Vec<u32>) -> Self {
        Self { message, qos, retain, ids, order: 0, stored: false, dup: false, held: false }
    }
}

#[derive(Debug)]
enum Sent {
    Published(Item),
    Released { stored: bool },
}

/// How a message ended for the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Its position.
    pub order: i64,
    /// Whether its row is to be removed (or, after PUBREC, replaced).
    pub stored: bool,
}

/// What [`Outbox::pump`] did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pumped {
    /// Messages sent.
    pub sent: usize,
    /// Messages thrown away: expired, or larger than the client takes.
    pub dropped: usize,
    /// Rows of those.
    pub rows: Vec<i64>,
    /// Whether it stopped because the buffer is full.
    pub is_buffer_full: bool,
}

/// What a message sent by [`Outbox::pump`]'s caller came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrote {
    /// It is in the buffer.
    Yes,
    /// The client does not take packets of its size.
    TooLarge,
    /// No room in the buffer now.
    Full,
}

/// A session's outgoing messages.
#[derive(Debug)]
pub struct Outbox {
    waiting: VecDeque<Item>,
    sent: BTreeMap<i64, Sent>,
    ids: HashMap<Id, i64, ahash::RandomState>,
    next: i64,
    weak: usize,
    /// Weight of all messages, waiting and sent.
    bytes: usize,
}

impl Default for Outbox {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), sent: BTreeMap::new(), ids: HashMap::default(), next: 1, weak: 0, bytes: 0 }
    }
}

fn id_of(order: i64) -> Id {
    let id = (order - 1).rem_euclid(i64::from(u16::MAX)) + 1;
    u16::try_from(id).ok().and_then(Id::new).unwrap_or(Id::MIN)
}

impl Outbox {
    /// Adds a message; `None` when there is no room. Returns its position (0 for QoS 0).
    pub fn push(&mut self, mut item: Item, max_queued: usize) -> Option<i64> {
        let bytes = self.bytes + item.message.weight();
        if bytes > MAX_QUEUED_BYTES && self.bytes > 0 {
            return None;
        }
        if item.qos == 0 {
            if self.weak >= MAX_WEAK {
                return None;
            }
            self.weak += 1;
        } else {
            if self.strong() >= max_queued {
                return None;
            }
            item.order = self.next;
            self.next += 1;
        }
        let order = item.order;
        self.bytes = bytes;
        self.waiting.push_back(item);
        Some(order)
    }

    /// Puts back what the store kept, in order.
    pub fn restore(&mut self, item: Item) {
        self.next = self.next.max(item.order + 1);
        self.bytes += item.message.weight();
        self.waiting.push_back(item);
    }

    /// Puts back a message that was released and not completed.
    pub fn restore_released(&mut self, order: i64) {
        self.next = self.next.max(order + 1);
        self.ids.insert(id_of(order), order);
        self.sent.insert(order, Sent::Released { stored: true });
    }

    /// The last position that may have been sent and is not acknowledged; 0 when there is none.
    pub fn sent_up_to(&self) -> i64 {
        let again = self.waiting.iter().filter(|item| item.dup).map(|item| item.order);
        again.chain(self.sent.keys().copied()).max().unwrap_or(0)
    }

    /// QoS 1 and 2 messages, waiting or under way.
    pub fn strong(&self) -> usize {
        self.waiting.len() - self.weak + self.sent.len()
    }

    /// Messages waiting.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Lets a held message go.
    pub fn release(&mut self, order: i64) {
        if let Some(item) = self.waiting.iter_mut().find(|item| item.order == order) {
            item.held = false;
        }
    }

    /// Takes back a message whose row could not be written, if it was not sent yet.
    pub fn retract(&mut self, order: i64) {
        self.keep(|item| item.order != order);
    }

    fn keep(&mut self, wanted: impl Fn(&Item) -> bool) {
        let bytes = &mut self.bytes;
        self.waiting.retain(|item| {
            let is_kept = wanted(item);
            *bytes -= if is_kept { 0 } else { item.message.weight() };
            is_kept
        });
    }

    /// Forgets QoS 0 messages: the connection they were meant for is gone.
    pub fn drop_weak(&mut self) {
        self.keep(|item| item.qos > 0);
        self.weak = 0;
    }

    /// The connection is new: what was under way is sent again, first and marked. Returns the ids to release again.
    pub fn resume(&mut self) -> Vec<Id> {
        let mut again = Vec::new();
        let mut released = Vec::new();
        for (order, sent) in std::mem::take(&mut self.sent) {
            match sent {
                Sent::Published(item) => again.push(Item { dup: true, ..item }),
                Sent::Released { stored } => {
                    released.push(id_of(order));
                    self.sent.insert(order, Sent::Released { stored });
                }
            }
        }
        self.ids = self.sent.keys().map(|&order| (id_of(order), order)).collect();
        for item in again.into_iter().rev() {
            self.waiting.push_front(item);
        }
        released
    }

    /// Hands waiting messages to `write`, in order, while window and buffer allow.
    pub fn pump(&mut self, window: usize, now: Millis, mut write: impl FnMut(&Outgoing<'_>) -> Wrote) -> Pumped {
        let mut done = Pumped::default();
        while let Some(item) = self.waiting.front() {
            let id = (item.qos > 0).then(|| id_of(item.order));
            if item.held
                || (item.qos > 0 && (self.sent.len() >= window || id.is_some_and(|id| self.ids.contains_key(&id))))
            {
                break;
            }
            let wrote = if item.message.is_expired(now) {
                Wrote::TooLarge
            } else {
                let Item { qos, retain, dup, .. } = *item;
                write(&Outgoing { message: &item.message, qos, id, retain, dup, ids: &item.ids })
            };
            if wrote == Wrote::Full {
                done.is_buffer_full = true;
                break;
            }
            let Some(item) = self.waiting.pop_front() else { break };
            self.weak -= usize::from(item.qos == 0);
            if wrote != Wrote::Yes || id.is_none() {
                self.bytes -= item.message.weight();
            }
            match (wrote, id) {
                (Wrote::Yes, Some(id)) => {
                    done.sent += 1;
                    self.ids.insert(id, item.order);
                    self.sent.insert(item.order, Sent::Published(item));
                }
                (Wrote::Yes, None) => done.sent += 1,
                _ => {
                    done.dropped += 1;
                    if item.stored {
                        done.rows.push(item.order);
                    }
                }
            }
        }
        if self.waiting.is_empty() && self.waiting.capacity() > 64 {
            self.waiting = VecDeque::new();
        }
        done
    }

    fn end(&mut self, id: Id, fits: impl FnOnce(&Sent) -> bool) -> Option<Ended> {
        let order = *self.ids.get(&id)?;
        if !self.sent.get(&order).is_some_and(fits) {
            return None;
        }
        self.ids.remove(&id);
        let stored = match self.sent.remove(&order)? {
            Sent::Published(item) => {
                self.bytes -= item.message.weight();
                item.stored
            }
            Sent::Released { stored } => stored,
        };
        Some(Ended { order, stored })
    }

    /// PUBACK.
    pub fn acked(&mut self, id: Id) -> Option<Ended> {
        self.end(id, |sent| matches!(sent, Sent::Published(item) if item.qos == 1))
    }

    /// PUBREC: the receiver has it. Its place is kept until PUBCOMP.
    pub fn received(&mut self, id: Id) -> Option<Ended> {
        let order = *self.ids.get(&id)?;
        let sent = self.sent.get_mut(&order)?;
        match sent {
            Sent::Published(item) if item.qos == 2 => {
                let stored = item.stored;
                self.bytes -= item.message.weight();
                *sent = Sent::Released { stored };
                Some(Ended { order, stored })
            }
            // Said again: release it again, its row is as it should be.
            Sent::Released { .. } => Some(Ended { order, stored: false }),
            Sent::Published(_) => None,
        }
    }

    /// PUBREC with an error: the receiver does not want it.
    pub fn rejected(&mut self, id: Id) -> Option<Ended> {
        self.end(id, |sent| matches!(sent, Sent::Published(item) if item.qos == 2))
    }

    /// PUBCOMP.
    pub fn completed(&mut self, id: Id) -> Option<Ended> {
        self.end(id, |sent| matches!(sent, Sent::Released { .. }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn item(qos: u8, text: &str) -> Item {
        let message = Message { topic: text.into(), qos, ..Message::default() };
        Item { stored: qos > 0, ..Item::new(Arc::new(message), qos, false, Vec::new()) }
    }

    fn pump(outbox: &mut Outbox, window: usize) -> Vec<(String, Option<u16>, bool)> {
        let mut sent = Vec::new();
        outbox.pump(window, Millis(10), |out| {
            sent.push((out.message.topic.clone(), out.id.map(Id::get), out.dup));
            Wrote::Yes
        });
        sent
    }

    #[test]
    fn the_window_bounds_what_is_under_way_and_order_holds() {
        let mut outbox = Outbox::default();
        for name in ["a", "b", "c"] {
            outbox.push(item(1, name), 10).unwrap();
        }
        assert_eq!(pump(&mut outbox, 2), [("a".into(), Some(1), false), ("b".into(), Some(2), false)]);
        assert!(pump(&mut outbox, 2).is_empty());
        assert_eq!(outbox.acked(Id::new(2).unwrap()), Some(Ended { order: 2, stored: true }));
        assert_eq!(outbox.acked(Id::new(2).unwrap()), None);
        assert_eq!(pump(&mut outbox, 2), [("c".into(), Some(3), false)]);
    }

    #[test]
    fn a_new_connection_gets_again_what_was_not_acknowledged() {
        let mut outbox = Outbox::default();
        for (qos, name) in [(1, "a"), (2, "b"), (1, "c")] {
            outbox.push(item(qos, name), 10).unwrap();
        }
        pump(&mut outbox, 2);
        assert_eq!(outbox.received(Id::new(2).unwrap()), Some(Ended { order: 2, stored: true }));
        assert_eq!(outbox.received(Id::new(2).unwrap()), Some(Ended { order: 2, stored: false }));
        assert_eq!(outbox.resume(), [Id::new(2).unwrap()]);
        assert_eq!(pump(&mut outbox, 9), [("a".into(), Some(1), true), ("c".into(), Some(3), false)]);
        assert_eq!(outbox.completed(Id::new(2).unwrap()), Some(Ended { order: 2, stored: true }));
        assert_eq!(outbox.strong(), 2);
    }

    #[test]
    fn ids_stay_with_their_messages_over_a_restart() {
        let mut outbox = Outbox::default();
        outbox.restore_released(70_000);
        outbox.restore(Item { order: 70_001, ..item(2, "b") });
        assert_eq!(outbox.resume(), [Id::new(4465).unwrap()]);
        assert_eq!(pump(&mut outbox, 9), [("b".into(), Some(4466), false)]);
        assert_eq!(outbox.push(item(1, "c"), 9), Some(70_002));
    }

    #[test]
    fn full_queues_refuse_the_newest() {
        let mut outbox = Outbox::default();
        assert!(outbox.push(item(1, "a"), 1).is_some());
        assert!(outbox.push(item(1, "b"), 1).is_none());
        for _ in 0..MAX_WEAK {
            assert!(outbox.push(item(0, "q"), 1).is_some());
        }
        assert!(outbox.push(item(0, "q"), 1).is_none());
        outbox.drop_weak();
        assert_eq!((outbox.waiting(), outbox.strong()), (1, 1));
    }

    #[test]
    fn bytes_are_bounded_and_given_back() {
        let big = || {
            Item::new(Arc::new(Message { payload: vec![0; 9 << 20].into(), ..Message::default() }), 2, false, vec![])
        };
        let mut outbox = Outbox::default();
        assert!(outbox.push(big(), 9).is_some() && outbox.push(big(), 9).is_none());
        pump(&mut outbox, 9);
        assert!(outbox.push(big(), 9).is_none(), "it may have to be sent again");
        outbox.received(Id::MIN).unwrap();
        assert_eq!(outbox.bytes, 0);
        let order = outbox.push(big(), 9).unwrap();
        outbox.retract(order);
        outbox.push(item(0, "q"), 9).unwrap();
        outbox.drop_weak();
        outbox.push(item(1, "a"), 9).unwrap();
        pump(&mut outbox, 9);
        outbox.acked(Id::new(3).unwrap()).unwrap();
        assert_eq!(outbox.bytes, 0);
    }

    #[test]
    fn held_expired_and_oversized_messages() {
        let mut outbox = Outbox::default();
        let order = outbox.push(Item { held: true, ..item(2, "a") }, 9).unwrap();
        outbox.push(item(1, "b"), 9).unwrap();
        assert!(pump(&mut outbox, 9).is_empty());
        outbox.release(order);
        assert_eq!(pump(&mut outbox, 9).len(), 2);
        let old = Message { expires_at: Some(Millis(10)), ..Message::default() };
        outbox.push(Item { stored: true, ..Item::new(Arc::new(old), 1, false, Vec::new()) }, 9).unwrap();
        outbox.push(item(1, "big"), 9).unwrap();
        let done = outbox.pump(9, Millis(10), |_| Wrote::TooLarge);
        assert_eq!((done.dropped, done.rows), (2, vec![3, 4]));
        outbox.push(item(0, "x"), 9).unwrap();
        assert!(outbox.pump(9, Millis(10), |_| Wrote::Full).is_buffer_full);
        assert_eq!(outbox.waiting(), 1);
    }

    #[test]
    fn an_id_still_under_way_is_not_used_twice() {
        let mut outbox = Outbox::default();
        outbox.push(item(1, "old"), 9).unwrap();
        pump(&mut outbox, 9);
        outbox.next = 65_536;
        outbox.push(item(1, "new"), 9).unwrap();
        assert!(pump(&mut outbox, 9).is_empty());
        outbox.acked(Id::MIN).unwrap();
        assert_eq!(pump(&mut outbox, 9), [("new".into(), Some(1), false)]);
    }
}
