//! What nodes say to each other.
//!
//! Owns: the messages, and how an answer of an instance looks on the wire. Not here: their envelope (`frame`), what they
//! make a node do (`cluster::forward`). A published kind never changes: a change is a new kind at the end, said since a new
//! version of the protocol ([`Message::since`]); golden files tell.
//! Tests: at the foot, and those of `frame`.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    instance::{self, Receipt, inbox::BEHIND},
    store::{self, DeadLetter},
    types::{InstanceKey, Load, Millis, NodeId, Protocol, RawJson, Stimulus, StimulusId, TurnRecord},
};

/// A message between nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// Stimuli for an instance the receiver owns.
    Work(Work),
    /// What became of forwarded stimuli.
    Results(Results),
    /// A change of an instance, or a question about it.
    Ask(Ask),
    /// The answer to an [`Ask`].
    Answer(Answer),
    /// Something waits in the store for these instances of the receiver.
    Wake(Vec<InstanceKey>),
    /// These states changed: what caches hold of older versions is stale.
    Invalidate(Vec<Stale>),
    /// How busy the sender is.
    Load(Load),
    /// The sender wants to be told what happens to an instance, or no longer.
    Watch(Watch),
    /// What happened to an instance the receiver watches.
    Events(Events),
    /// Bytes of a door for the same door on other nodes.
    Relay(Relay),
    /// How busy the sender is, told now and then. Since protocol 2; a [`Message::Load`] also says that shards changed hands.
    Report(Load),
    /// The sender cannot read what the receiver sent it. Since protocol 2.
    Unread(Unread),
    /// Whether what the sender holds of these states is the newest. Since protocol 3.
    Check(Check),
    /// The answer to a [`Check`]. Since protocol 3.
    Checked(Checked),
    /// Somebody at the sender's doors listens to an answer, or nobody does any more. Since protocol 4.
    Ear(Ear),
    /// Whether anybody at the receiver's doors wants these answers. Since protocol 5.
    Hark(Hark),
    /// The answer to a [`Hark`]. Since protocol 5.
    Heard(Heard),
    /// Who sent a stimulus was told at the sender's doors to come back for the answer. Since protocol 5.
    Kept(Kept),
}

/// A batch of one sender's stimuli for one instance, in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// What [`Results::call`] repeats.
    pub call: u64,
    /// The instance.
    pub key: InstanceKey,
    /// Its shard: the partition.
    pub shard: u32,
    /// The receiver's epoch as the sender knows it.
    pub epoch: u64,
    /// The sender waits so long from sending on, in milliseconds.
    pub within_ms: u32,
    /// Whether earlier stimuli of this sender were put into the store's inbox meanwhile: look there first.
    pub after_lodged: bool,
    /// The stimuli.
    pub items: Vec<Item>,
}

/// A forwarded stimulus.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// The stimulus.
    pub stimulus: Arc<Stimulus>,
    /// State version it insists on.
    pub expected: Option<u64>,
    /// Whether its sender waits for the decision, not only for acceptance.
    pub decided: bool,
}

/// What became of a batch, or of some of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Which batch.
    pub call: u64,
    /// What.
    pub what: Fate,
}

/// What became of a batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Fate {
    /// Nothing was taken: the shard is not the receiver's.
    NotMine {
        /// Whose it is, as far as the receiver knows.
        owner: Option<NodeId>,
        /// The epoch of that.
        epoch: u64,
    },
    /// These, by position in the batch, ended so.
    Each(Vec<(u16, Outcome)>),
}

/// What became of a stimulus.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// It is durable; its sender waits for the decision, which follows.
    Taken,
    /// It was decided.
    Decided {
        /// The turn.
        turn: Record,
        /// Whether it is the result of an earlier one with the same id.
        repeated: bool,
    },
    /// It was decided, and the turn is too large for the bus: read it in the store.
    InStore,
    /// It was accepted.
    Accepted {
        /// Whether it had been, under the same id.
        repeated: bool,
    },
    /// It was given up.
    Dead(Box<Letter>),
    /// It was refused.
    Refused(Refusal),
}

/// Why another node refused. The wire form of [`instance::Error`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The inbox is at its limit.
    InboxFull(u64),
    /// The node is at a limit.
    Overloaded,
    /// One before it of the same batch was not taken.
    Behind,
    /// The node drains.
    Draining,
    /// The state has another version.
    VersionMismatch {
        /// Version asked for.
        expected: u64,
        /// Version in force.
        actual: u64,
    },
    /// It cannot be applied.
    Invalid(String),
    /// There is no such instance.
    NotFound,
    /// There is no such dead letter.
    NoDeadLetter,
    /// The shard is no longer the node's.
    Fenced,
    /// No answer within so many milliseconds.
    Timeout(u64),
    /// The commit queue is full.
    StoreOverloaded,
    /// No space is left.
    StoreFull(String),
    /// Another process holds the store.
    StoreLocked(String),
    /// The store is closed.
    StoreClosed,
    /// The store's data are damaged.
    StoreCorrupt(String),
    /// The store failed.
    StoreFailed(String),
    /// The instance died while it decided.
    Crashed,
}

/// What the one who asked reads of a limit on another node.
const THERE: &str = "the node that owns the instance is at a limit";

impl From<&instance::Error> for Refusal {
    fn from(error: &instance::Error) -> Self {
        use instance::Error as E;
        match error {
            E::InboxFull(limit) => Self::InboxFull(*limit as u64),
            E::Overloaded(BEHIND) => Self::Behind,
            E::Overloaded(_) => Self::Overloaded,
            E::Draining => Self::Draining,
            E::VersionMismatch { expected, actual } => Self::VersionMismatch { expected: *expected, actual: *actual },
            E::Invalid(text) => Self::Invalid(text.clone()),
            E::NotFound => Self::NotFound,
            E::NoDeadLetter => Self::NoDeadLetter,
            E::Fenced => Self::Fenced,
            E::Timeout(after) => Self::Timeout(u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
            E::Store(store::Error::Overloaded) => Self::StoreOverloaded,
            E::Store(store::Error::Full(text)) => Self::StoreFull(text.clone()),
            E::Store(store::Error::Locked(text)) => Self::StoreLocked(text.clone()),
            E::Store(store::Error::Closed) => Self::StoreClosed,
            E::Store(store::Error::Corrupt(text)) => Self::StoreCorrupt(text.clone()),
            E::Store(store::Error::Backend(text)) => Self::StoreFailed(text.clone()),
            E::Store(other) => Self::StoreFailed(other.to_string()),
            E::Crashed => Self::Crashed,
        }
    }
}

impl From<Refusal> for instance::Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::InboxFull(limit) => Self::InboxFull(usize::try_from(limit).unwrap_or(usize::MAX)),
            Refusal::Overloaded => Self::Overloaded(THERE),
            Refusal::Behind => Self::Overloaded(BEHIND),
            Refusal::Draining => Self::Draining,
            Refusal::VersionMismatch { expected, actual } => Self::VersionMismatch { expected, actual },
            Refusal::Invalid(text) => Self::Invalid(text),
            Refusal::NotFound => Self::NotFound,
            Refusal::NoDeadLetter => Self::NoDeadLetter,
            Refusal::Fenced => Self::Fenced,
            Refusal::Timeout(ms) => Self::Timeout(Duration::from_millis(ms)),
            Refusal::StoreOverloaded => Self::Store(store::Error::Overloaded),
            Refusal::StoreFull(text) => Self::Store(store::Error::Full(text)),
            Refusal::StoreLocked(text) => Self::Store(store::Error::Locked(text)),
            Refusal::StoreClosed => Self::Store(store::Error::Closed),
            Refusal::StoreCorrupt(text) => Self::Store(store::Error::Corrupt(text)),
            Refusal::StoreFailed(text) => Self::Store(store::Error::Backend(text)),
            Refusal::Crashed => Self::Crashed,
        }
    }
}

impl From<&Result<Receipt, instance::Error>> for Outcome {
    fn from(end: &Result<Receipt, instance::Error>) -> Self {
        match end {
            Ok(Receipt::Decided { turn, repeated }) => {
                Self::Decided { turn: Record(turn.clone()), repeated: *repeated }
            }
            Ok(Receipt::Accepted { repeated }) => Self::Accepted { repeated: *repeated },
            Ok(Receipt::Dead(letter)) => Self::Dead(Box::new(Letter::from(&**letter))),
            Err(error) => Self::Refused(Refusal::from(error)),
        }
    }
}

/// A turn, in its stored form, which has a version of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct Record(pub Arc<TurnRecord>);

impl Serialize for Record {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0.encode(Vec::new()).map_err(serde::ser::Error::custom)?)
    }
}

impl<'de> Deserialize<'de> for Record {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = <&[u8]>::deserialize(deserializer)?;
        Ok(Self(Arc::new(TurnRecord::decode(bytes).map_err(de::Error::custom)?)))
    }
}

/// A dead letter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Letter {
    stimulus: Stimulus,
    reason: String,
    tries: u32,
    at: Millis,
}

impl From<&DeadLetter> for Letter {
    fn from(letter: &DeadLetter) -> Self {
        let DeadLetter { stimulus, reason, tries, at } = letter.clone();
        Self { stimulus, reason, tries, at }
    }
}

impl From<Letter> for DeadLetter {
    fn from(Letter { stimulus, reason, tries, at }: Letter) -> Self {
        Self { stimulus, reason, tries, at }
    }
}

/// A change of an instance, or a question about it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ask {
    /// What [`Answer::call`] repeats.
    pub call: u64,
    /// The instance.
    pub key: InstanceKey,
    /// The sender waits so long from sending on, in milliseconds.
    pub within_ms: u32,
    /// What.
    pub what: Question,
}

/// What can be asked of an instance's owner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Question {
    /// Create it or replace its profile, given as JSON.
    PutProfile(RawJson),
    /// Forget it.
    Forget,
    /// Put a dead letter back into its inbox.
    Revive(StimulusId),
    /// Say how it lives at present.
    Observe,
}

/// The answer to an [`Ask`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Which.
    pub call: u64,
    /// What.
    pub what: Told,
}

/// What an owner answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Told {
    /// The profile is stored; whether the instance is new.
    Stored {
        /// Whether it was created.
        created: bool,
    },
    /// It is done.
    Done,
    /// How it lives.
    Presence {
        /// Whether it is in memory.
        active: bool,
        /// Stimuli waiting there.
        inbox: u64,
    },
    /// The shard is not the receiver's.
    NotMine {
        /// Whose it is, as far as the receiver knows.
        owner: Option<NodeId>,
        /// The epoch of that.
        epoch: u64,
    },
    /// It was refused.
    Refused(Refusal),
}

/// A state that changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stale {
    /// Whose.
    pub key: InstanceKey,
    /// The version in force; `None` when there is no state any more.
    pub version: Option<u64>,
}

/// Begins or ends the watch of an instance on another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// The instance.
    pub key: InstanceKey,
    /// The owner forgets the watch after so long without hearing of it again, in milliseconds; 0 ends it.
    pub for_ms: u32,
}

/// What happened to a watched instance, in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Events {
    /// The instance.
    pub key: InstanceKey,
    /// The answer being thought, before these events: sent when the watch begins and when events were left out.
    pub draft: Option<Draft>,
    /// The events.
    pub events: Vec<Happened>,
}

/// An answer being thought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draft {
    /// To which stimulus.
    pub stimulus: StimulusId,
    /// Its pieces so far.
    pub tokens: Vec<Arc<str>>,
}

/// The wire form of `instance::events::Event`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Happened {
    /// Durably accepted.
    Accepted(StimulusId),
    /// An engine thinks about it.
    Thinking(StimulusId),
    /// The next piece of the answer.
    Token {
        /// To which stimulus.
        stimulus: StimulusId,
        /// Position in the answer, from 0.
        index: u64,
        /// The piece.
        text: Arc<str>,
    },
    /// The words so far are void.
    Restart(StimulusId),
    /// A turn was committed.
    Turn(Record),
    /// A stimulus was given up.
    Dead(Box<Letter>),
    /// The profile was replaced.
    Profile,
    /// The instance was forgotten.
    Forgotten,
}

/// Bytes of a door for the same door on other nodes: an MQTT publish, a session taken over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relay {
    /// What they are, as the door names it (`mqtt/publish`).
    pub kind: String,
    /// The bytes, whose form and version are the door's.
    pub body: Bytes,
}

/// What a node cannot read, and what it could.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unread {
    /// The version of the frame.
    pub version: u8,
    /// The versions its build reads.
    pub reads: Protocol,
}

/// Questions about states that the receiver owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What [`Checked::call`] repeats.
    pub call: u64,
    /// The sender waits so long from sending on, in milliseconds.
    pub within_ms: u32,
    /// Which.
    pub items: Vec<Copy>,
}

/// A state that the sender wants to serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copy {
    /// Whose.
    pub key: InstanceKey,
    /// What the sender holds.
    pub held: Option<Print>,
}

/// What tells one state of an instance from all others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Print {
    /// Its version, which begins anew when an instance is forgotten.
    pub version: u64,
    /// A hash of its text.
    pub digest: u64,
}

/// How copies stand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Which call.
    pub call: u64,
    /// In the order they were asked about.
    pub items: Vec<Stands>,
}

/// How a copy stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stands {
    /// It is the newest.
    Same,
    /// This is.
    Newer {
        /// Version.
        version: u64,
        /// The instance's last turn.
        turn: u64,
        /// The state.
        doc: RawJson,
    },
    /// There is no such instance.
    Gone,
    /// The receiver does not own it.
    NotMine,
    /// Read it in the store.
    InStore,
}

/// Who listens to the answer to a stimulus that the receiver owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ear {
    /// The instance.
    pub key: InstanceKey,
    /// The stimulus.
    pub stimulus: StimulusId,
    /// Whether anybody at the sender's doors does.
    pub listens: bool,
    /// Whether who sent it left before the answer.
    pub left: bool,
}

/// A question about stimuli of an instance that the sender owns, before it gives them up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hark {
    /// What [`Heard::call`] repeats.
    pub call: u64,
    /// The sender waits so long from sending on, in milliseconds.
    pub within_ms: u32,
    /// The instance.
    pub key: InstanceKey,
    /// Which.
    pub stimuli: Vec<StimulusId>,
}

/// Who wants which answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    /// Which call.
    pub call: u64,
    /// The instance.
    pub key: InstanceKey,
    /// Those of the stimuli that somebody at the sender's doors wants answered.
    pub wanted: Vec<StimulusId>,
}

/// A stimulus whose answer somebody will come back for. The receiver owns the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The instance.
    pub key: InstanceKey,
    /// Which.
    pub stimulus: StimulusId,
}

impl Message {
    /// The version of the protocol since which this is said. Whoever speaks an older one is not told.
    pub const fn since(&self) -> u8 {
        match self {
            Message::Report(_) | Message::Unread(_) => 2,
            Message::Check(_) | Message::Checked(_) => 3,
            Message::Ear(_) => 4,
            Message::Hark(_) | Message::Heard(_) | Message::Kept(_) => 5,
            _ => 1,
        }
    }

    /// The names of the kinds, for figures and logs.
    pub const KINDS: [&str; 18] = [
        "work",
        "results",
        "ask",
        "answer",
        "wake",
        "invalidate",
        "load",
        "watch",
        "events",
        "relay",
        "report",
        "unread",
        "check",
        "checked",
        "ear",
        "hark",
        "heard",
        "kept",
    ];

    /// Which of [`Message::KINDS`] it is.
    pub const fn number(&self) -> usize {
        match self {
            Message::Work(_) => 0,
            Message::Results(_) => 1,
            Message::Ask(_) => 2,
            Message::Answer(_) => 3,
            Message::Wake(_) => 4,
            Message::Invalidate(_) => 5,
            Message::Load(_) => 6,
            Message::Watch(_) => 7,
            Message::Events(_) => 8,
            Message::Relay(_) => 9,
            Message::Report(_) => 10,
            Message::Unread(_) => 11,
            Message::Check(_) => 12,
            Message::Checked(_) => 13,
            Message::Ear(_) => 14,
            Message::Hark(_) => 15,
            Message::Heard(_) => 16,
            Message::Kept(_) => 17,
        }
    }

    /// Its kind's name.
    pub const fn kind(&self) -> &'static str {
        Self::KINDS[self.number()]
    }
}

/// One of each kind, for tests and golden files.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) fn samples() -> Vec<Message> {
    use crate::types::{Channel, InstanceId, Outcome as Ended, Priority, ReplyTo, Source, StateChange, TenantId};
    let key = InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("lamp").unwrap());
    let id = StimulusId::new("s-1").unwrap();
    let node = NodeId::new("b.4567").unwrap();
    let stimulus = |correlation| Stimulus {
        id: id.clone(),
        repeatable: true,
        source: Source::Mqtt,
        channel: Channel::new("room/temperature").unwrap(),
        sender: Some("device:lamp".into()),
        priority: Priority::Device,
        salience: Some(0.5),
        content: Some("hot".into()),
        data: Some(RawJson::parse("{\"celsius\":40}").unwrap()),
        content_type: None,
        reply_to: Some(ReplyTo { topic: "answers".into(), correlation }),
        traceparent: Some("00-1-2-01".into()),
        accepted_at: Millis(1_795_237_853_120),
    };
    let turn = Record(Arc::new(TurnRecord {
        turn: 3,
        version: 2,
        stimulus: stimulus(Some(vec![1, 2])),
        outcome: Ended::Silent,
        reply: None,
        effects: Vec::new(),
        state: StateChange::None,
        episodes: Vec::new(),
        steps: 0,
        engine: "reflex".into(),
        model: None,
        usage: None,
        error: None,
        decided_at: Millis(1_795_237_853_121),
        epoch: 0,
    }));
    let letter = Letter { stimulus: stimulus(None), reason: "poison".into(), tries: 3, at: Millis(5) };
    let items = [(None, false), (Some(vec![7]), true)].map(|(correlation, decided)| Item {
        stimulus: Arc::new(stimulus(correlation)),
        expected: decided.then_some(9),
        decided,
    });
    let refusals = [
        Refusal::InboxFull(10),
        Refusal::Overloaded,
        Refusal::Behind,
        Refusal::Draining,
        Refusal::VersionMismatch { expected: 1, actual: 2 },
        Refusal::Invalid("no".into()),
        Refusal::NotFound,
        Refusal::NoDeadLetter,
        Refusal::Fenced,
        Refusal::Timeout(1500),
        Refusal::StoreOverloaded,
        Refusal::StoreFull("disk".into()),
        Refusal::StoreLocked("by".into()),
        Refusal::StoreClosed,
        Refusal::StoreCorrupt("page".into()),
        Refusal::StoreFailed("gone".into()),
        Refusal::Crashed,
    ];
    let outcomes = [
        Outcome::Taken,
        Outcome::Decided { turn: turn.clone(), repeated: true },
        Outcome::InStore,
        Outcome::Accepted { repeated: false },
        Outcome::Dead(Box::new(letter.clone())),
    ];
    let outcomes = outcomes.into_iter().chain(refusals.into_iter().map(Outcome::Refused));
    let each = outcomes.enumerate().map(|(at, outcome)| (at as u16, outcome)).collect();
    let print = Print { version: 3, digest: 4 };
    let newer = Stands::Newer { version: 5, turn: 6, doc: RawJson::parse("{\"desired\":{}}").unwrap() };
    let ask = |what| Message::Ask(Ask { call: 2, key: key.clone(), within_ms: 500, what });
    let answer = |what| Message::Answer(Answer { call: 2, what });
    vec![
        Message::Work(Work {
            call: 1,
            key: key.clone(),
            shard: 17,
            epoch: 4,
            within_ms: 1000,
            after_lodged: true,
            items: items.into(),
        }),
        Message::Results(Results { call: 1, what: Fate::Each(each) }),
        Message::Results(Results { call: 1, what: Fate::NotMine { owner: Some(node.clone()), epoch: 5 } }),
        ask(Question::PutProfile(RawJson::parse("{\"persona\":\"a lamp\"}").unwrap())),
        ask(Question::Forget),
        ask(Question::Revive(id.clone())),
        ask(Question::Observe),
        answer(Told::Stored { created: true }),
        answer(Told::Done),
        answer(Told::Presence { active: true, inbox: 2 }),
        answer(Told::NotMine { owner: Some(node), epoch: 9 }),
        answer(Told::Refused(Refusal::NotFound)),
        Message::Wake(vec![key.clone()]),
        Message::Invalidate(vec![
            Stale { key: key.clone(), version: Some(8) },
            Stale { key: key.clone(), version: None },
        ]),
        Message::Load(Load { busy_permille: 420, instances: 1000, in_hand: 3 }),
        Message::Watch(Watch { key: key.clone(), for_ms: 30_000 }),
        Message::Check(Check {
            call: 7,
            within_ms: 900,
            items: [None, Some(print)].map(|held| Copy { key: key.clone(), held }).into(),
        }),
        Message::Checked(Checked {
            call: 7,
            items: vec![Stands::Same, newer, Stands::Gone, Stands::NotMine, Stands::InStore],
        }),
        Message::Ear(Ear { key: key.clone(), stimulus: id.clone(), listens: false, left: true }),
        Message::Hark(Hark { call: 8, within_ms: 700, key: key.clone(), stimuli: vec![id.clone()] }),
        Message::Heard(Heard { call: 8, key: key.clone(), wanted: vec![id.clone()] }),
        Message::Kept(Kept { key: key.clone(), stimulus: id.clone() }),
        Message::Events(Events {
            key,
            draft: Some(Draft { stimulus: id.clone(), tokens: vec!["Hel".into(), "lo".into()] }),
            events: vec![
                Happened::Accepted(id.clone()),
                Happened::Thinking(id.clone()),
                Happened::Token { stimulus: id.clone(), index: 2, text: "!".into() },
                Happened::Restart(id),
                Happened::Turn(turn),
                Happened::Dead(Box::new(letter)),
                Happened::Profile,
                Happened::Forgotten,
            ],
        }),
        Message::Relay(Relay { kind: "mqtt/publish".into(), body: Bytes::from_static(&[0, 255, 1]) }),
        Message::Report(Load { busy_permille: 421, instances: 1001, in_hand: 4 }),
        Message::Unread(Unread { version: 9, reads: Protocol { min: 1, max: 2 } }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Fault as _;

    #[test]
    fn a_refusal_reads_the_same_on_the_other_node() {
        use instance::Error as E;
        for error in [
            E::InboxFull(4),
            E::Overloaded("here"),
            E::Overloaded(BEHIND),
            E::Draining,
            E::VersionMismatch { expected: 1, actual: 2 },
            E::Invalid("why".into()),
            E::NotFound,
            E::NoDeadLetter,
            E::Fenced,
            E::Timeout(Duration::from_secs(2)),
            E::Store(store::Error::Overloaded),
            E::Store(store::Error::Full("disk".into())),
            E::Store(store::Error::Locked("by".into())),
            E::Store(store::Error::Corrupt("page".into())),
            E::Store(store::Error::Closed),
            E::Store(store::Error::Backend("gone".into())),
            E::Crashed,
        ] {
            let there = E::from(Refusal::from(&error));
            assert_eq!(there.kind(), error.kind(), "{error} became {there}");
            assert_eq!(Refusal::from(&there), Refusal::from(&error));
        }
    }
}
