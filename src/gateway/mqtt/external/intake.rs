//! What came from the broker and is not answered yet: whose turn it is, and which packet its acknowledgement goes to. Pure.
//!
//! One message of an instance is under way at a time, so that refused ones keep their place; many instances at once. A
//! message that the broker sends again after a reconnect, while the first copy is still in hand, is not a second message: the
//! acknowledgement of the first goes to the new packet.
//!
//! Invariants: messages of one instance are handed out in order of arrival; an acknowledgement is only ever sent on the
//! connection whose packet it answers. Tests: at the foot.

use std::collections::{HashMap, VecDeque};

use crate::{
    instance::Until,
    types::{InstanceKey, Stimulus},
};

/// The packet an acknowledgement answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet {
    /// Which connection, counted from the start of the process.
    pub(super) connection: u64,
    /// The broker's packet id.
    pub(super) id: u16,
}

/// One message on its way to its instance.
#[derive(Debug, Clone)]
pub(super) struct Job {
    /// Whose.
    pub(super) key: InstanceKey,
    /// What it became.
    pub(super) stimulus: Stimulus,
    /// What its acknowledgement waits for.
    pub(super) until: Until,
    /// The derived id without its unique part, when an earlier copy may have been accepted by an earlier life.
    pub(super) earlier: Option<String>,
    /// The packet id, when it wants an acknowledgement.
    pub(super) packet: Option<u16>,
    /// Its place in the order of arrival.
    pub(super) ticket: u64,
}

/// A message with a packet id that was not acknowledged yet.
#[derive(Debug, Clone, Copy)]
struct Open {
    connection: u64,
    ticket: u64,
    fingerprint: u64,
    /// Accepted, but on a connection that is gone: acknowledged when the broker sends it again.
    finished: bool,
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    /// New.
    New,
    /// A copy of one that is in hand.
    InHand,
    /// A copy of one that was accepted: acknowledge it now.
    Accepted,
}

#[derive(Debug, Default)]
struct Lane {
    running: bool,
    queue: VecDeque<Job>,
}

/// All that is in hand.
#[derive(Debug, Default)]
pub(super) struct Intake {
    connection: u64,
    tickets: u64,
    lanes: HashMap<InstanceKey, Lane>,
    ready: VecDeque<InstanceKey>,
    open: HashMap<u16, Open>,
    waiting: usize,
}

impl Intake {
    /// The connection is gone, another may come.
    pub(super) fn disconnected(&mut self) {
        self.connection += 1;
    }

    /// A connection is there. Without the session, the broker will send nothing again.
    pub(super) fn connected(&mut self, session_present: bool) {
        if !session_present {
            self.open.clear();
        }
    }

    /// Whether a message with a packet id is new, by id and fingerprint. A copy takes the place of the packet it repeats.
    pub(super) fn arrival(&mut self, packet: u16, dup: bool, fingerprint: u64) -> Arrival {
        match self.open.get_mut(&packet) {
            Some(open) if dup && open.fingerprint == fingerprint && open.connection < self.connection => {
                if open.finished {
                    self.open.remove(&packet);
                    return Arrival::Accepted;
                }
                open.connection = self.connection;
                Arrival::InHand
            }
            _ => Arrival::New,
        }
    }

    /// Takes a new message in.
    pub(super) fn take(&mut self, mut job: Job, fingerprint: u64) {
        self.tickets += 1;
        job.ticket = self.tickets;
        if let Some(packet) = job.packet {
            let open = Open { connection: self.connection, ticket: job.ticket, fingerprint, finished: false };
            self.open.insert(packet, open);
        }
        self.waiting += 1;
        let lane = self.lanes.entry(job.key.clone()).or_default();
        if !lane.running && lane.queue.is_empty() {
            self.ready.push_back(job.key.clone());
        }
        lane.queue.push_back(job);
    }

    /// The next message to hand to its instance.
    pub(super) fn next(&mut self) -> Option<Job> {
        while let Some(key) = self.ready.pop_front() {
            if let Some(lane) = self.lanes.get_mut(&key)
                && let Some(job) = lane.queue.pop_front()
            {
                lane.running = true;
                return Some(job);
            }
        }
        None
    }

    /// A message is done with; says which packet to acknowledge now.
    pub(super) fn done(&mut self, job: &Job) -> Option<Packet> {
        self.waiting = self.waiting.saturating_sub(1);
        if let Some(lane) = self.lanes.get_mut(&job.key) {
            lane.running = false;
            if lane.queue.is_empty() {
                self.lanes.remove(&job.key);
            } else {
                self.ready.push_back(job.key.clone());
            }
        }
        let id = job.packet?;
        let open = self.open.get_mut(&id).filter(|open| open.ticket == job.ticket)?;
        if open.connection == self.connection {
            self.open.remove(&id);
            return Some(Packet { connection: self.connection, id });
        }
        open.finished = true;
        None
    }

    /// Messages in hand, under way or waiting.
    pub(super) fn len(&self) -> usize {
        self.waiting
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{Channel, InstanceId, Millis, Source, TenantId};

    fn job(instance: &str, packet: u16) -> Job {
        let stimulus = Stimulus::text(Source::Mqtt, Channel::new("c").unwrap(), packet.to_string(), Millis(0));
        Job {
            key: InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new(instance).unwrap()),
            stimulus,
            until: Until::Accepted,
            earlier: None,
            packet: Some(packet),
            ticket: 0,
        }
    }

    fn take(intake: &mut Intake, instance: &str, packet: u16) {
        assert_eq!(intake.arrival(packet, false, 7), Arrival::New);
        intake.take(job(instance, packet), 7);
    }

    #[test]
    fn one_message_of_an_instance_is_under_way_in_order_of_arrival() {
        let mut intake = Intake::default();
        for packet in 1..=3 {
            take(&mut intake, "a", packet);
        }
        take(&mut intake, "b", 4);
        let (first, other) = (intake.next().unwrap(), intake.next().unwrap());
        assert_eq!((first.packet, other.packet), (Some(1), Some(4)));
        assert!(intake.next().is_none());
        assert_eq!(intake.done(&first), Some(Packet { connection: 0, id: 1 }));
        assert_eq!(intake.next().unwrap().packet, Some(2));
        assert_eq!(intake.len(), 3);
    }

    #[test]
    fn a_copy_after_a_reconnect_is_the_same_message_and_its_answer_goes_to_the_new_packet() {
        let mut intake = Intake::default();
        take(&mut intake, "a", 1);
        take(&mut intake, "b", 2);
        let (a, b) = (intake.next().unwrap(), intake.next().unwrap());
        intake.disconnected();
        assert_eq!(intake.done(&a), None, "the connection it came on is gone");
        intake.connected(true);
        assert_eq!(intake.arrival(1, true, 7), Arrival::Accepted);
        assert_eq!(intake.arrival(2, true, 7), Arrival::InHand);
        assert_eq!(intake.done(&b), Some(Packet { connection: 1, id: 2 }));
        assert_eq!(intake.arrival(2, false, 7), Arrival::New, "the id is free for another message");
    }

    #[test]
    fn a_message_is_new_when_the_session_is_new_or_the_content_is_another() {
        let mut intake = Intake::default();
        take(&mut intake, "a", 1);
        let first = intake.next().unwrap();
        intake.disconnected();
        intake.connected(true);
        assert_eq!(intake.arrival(1, true, 8), Arrival::New);
        intake.take(job("a", 1), 8);
        assert_eq!(intake.done(&first), None, "its packet id belongs to another message now");
        intake.disconnected();
        intake.connected(false);
        assert_eq!(intake.arrival(1, true, 8), Arrival::New);
    }
}
