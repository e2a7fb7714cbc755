//! The history checker: what a client was promised, held against what the instances say happened.
//!
//! Owns: the client's log, its form on disk, and the pure check. Not here: sending, reading turns back (`readback.rs`).
//! Tests: at the foot, where each kind of violation is planted and must be found; `tests/it/load.rs` and the crash test
//! use it against a real server.
//!
//! # The log
//! JSON lines, appended before the act they speak of becomes visible: `sent` before the bytes leave, `ack` after the
//! acknowledgement was read. A torn last line (the client was killed) is ignored; any other bad line is an error.
//! ```json
//! {"e":"sent","instance":"lamp","sender":"s1","seq":7,"id":"s1-7"}
//! {"e":"ack","instance":"lamp","id":"s1-7","turn":12}
//! ```
//! `seq` grows by sender and instance; `turn` is there when the acknowledgement named one. A repeat of the same id is
//! logged as `sent` again with the same sender and seq, and counts once.
//!
//! # What is checked, instance by instance
//! | violation | meaning |
//! |---|---|
//! | lost | acknowledged, and no turn carries it (promise 1) |
//! | doubled | more than one turn carries it, acknowledged or not (promise 2) |
//! | disordered | acknowledged after a later one of the same sender was already decided (promise 3) |
//! | moved | the turn its acknowledgement named holds another stimulus, or none |
//! | gaps | turn numbers that do not grow by one |
//!
//! A stimulus that was sent and never acknowledged may be there once or not at all. Only acknowledged stimuli have a
//! claim to order: a client that wants order awaits each acknowledgement or sends over one connection. Turns whose
//! stimulus is not in the log are counted as foreign and judged only by their number.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, BufRead, Write},
};

use serde::{Deserialize, Serialize};

/// Most violations kept word for word in a [`Verdict`]; the counts go on.
pub const MAX_EXAMPLES: usize = 20;

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "e", rename_all = "lowercase", deny_unknown_fields)]
pub enum Event {
    /// About to leave.
    Sent {
        /// Where it goes.
        instance: String,
        /// Who sends it.
        sender: String,
        /// Its place among this sender's stimuli for this instance.
        seq: u64,
        /// Its stimulus id.
        id: String,
    },
    /// The server answered that it is durable.
    Ack {
        /// Where it went.
        instance: String,
        /// Its stimulus id.
        id: String,
        /// The turn, when the answer named it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        turn: Option<u64>,
    },
}

impl Event {
    /// Appends the event as one line.
    ///
    /// # Errors
    /// What the writer says.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *out, self)?;
        out.write_all(b"\n")
    }
}

/// One stimulus as its sender knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// Who sent it.
    pub sender: String,
    /// Its place among this sender's stimuli for this instance.
    pub seq: u64,
    /// Its stimulus id.
    pub id: String,
    /// Whether the server said it is durable.
    pub acked: bool,
    /// The turn the acknowledgement named.
    pub turn: Option<u64>,
}

/// One turn as the server reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its number.
    pub turn: u64,
    /// The id of its stimulus.
    pub id: String,
}

/// A page of `GET /v1/instances/{id}/turns`, as far as the check needs it.
#[derive(Debug, Deserialize)]
pub struct Page {
    /// The turns, oldest first.
    pub items: Vec<PageTurn>,
    /// The cursor of the next page.
    pub next: Option<serde_json::Value>,
}

/// One turn of a [`Page`].
#[derive(Debug, Deserialize)]
pub struct PageTurn {
    /// Its number.
    pub turn: u64,
    /// Its stimulus.
    pub stimulus: PageStimulus,
}

/// The stimulus of a [`PageTurn`].
#[derive(Debug, Deserialize)]
pub struct PageStimulus {
    /// Its id.
    pub id: String,
}

impl Page {
    /// The cursor as it stands in `?after=`.
    pub fn cursor(&self) -> Option<String> {
        match self.next.as_ref()? {
            serde_json::Value::Null => None,
            serde_json::Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        }
    }
}

impl From<PageTurn> for Seen {
    fn from(turn: PageTurn) -> Self {
        Seen { turn: turn.turn, id: turn.stimulus.id }
    }
}

/// The log, folded by instance.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Log {
    instances: BTreeMap<String, Instance>,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Instance {
    sent: Vec<Sent>,
    by_id: HashMap<String, usize>,
}

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file.
    #[error("cannot read the log: {0}")]
    Io(#[from] io::Error),
    /// A line in the middle that is no event.
    #[error("line {line} of the log: {source}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// An acknowledgement for something never sent: the log was not written in order.
    #[error("line {line} of the log acknowledges '{id}' at '{instance}', which was not sent")]
    UnknownAck {
        /// Counted from 1.
        line: usize,
        /// The instance.
        instance: String,
        /// The stimulus id.
        id: String,
    },
}

impl crate::types::Fault for LogError {
    fn kind(&self) -> crate::types::Kind {
        match self {
            LogError::Io(_) => crate::types::Kind::Unavailable,
            LogError::Line { .. } | LogError::UnknownAck { .. } => crate::types::Kind::Invalid,
        }
    }
}

impl Log {
    /// Takes one event. `false` when it acknowledges something that was not sent.
    pub fn push(&mut self, event: Event) -> bool {
        match event {
            Event::Sent { instance, sender, seq, id } => {
                let instance = self.instances.entry(instance).or_default();
                if !instance.by_id.contains_key(&id) {
                    instance.by_id.insert(id.clone(), instance.sent.len());
                    instance.sent.push(Sent { sender, seq, id, acked: false, turn: None });
                }
                true
            }
            Event::Ack { instance, id, turn } => {
                let Some(instance) = self.instances.get_mut(&instance) else { return false };
                let Some(sent) = instance.by_id.get(&id).and_then(|&at| instance.sent.get_mut(at)) else {
                    return false;
                };
                sent.acked = true;
                sent.turn = turn.or(sent.turn);
                true
            }
        }
    }

    /// Reads a log.
    ///
    /// # Errors
    /// [`LogError`]; a torn last line is none.
    pub fn read(input: impl BufRead) -> Result<Self, LogError> {
        let mut log = Log::default();
        let mut torn: Option<LogError> = None;
        for (at, text) in input.split(b'\n').enumerate() {
            let text = text?;
            if let Some(error) = torn.take() {
                return Err(error);
            }
            if text.is_empty() {
                continue;
            }
            let line = at + 1;
            match serde_json::from_slice::<Event>(&text) {
                Err(source) => torn = Some(LogError::Line { line, source }),
                Ok(event) => {
                    if let Event::Ack { instance, id, .. } = &event {
                        let (instance, id) = (instance.clone(), id.clone());
                        if !log.push(event) {
                            return Err(LogError::UnknownAck { line, instance, id });
                        }
                    } else {
                        log.push(event);
                    }
                }
            }
        }
        Ok(log)
    }

    /// The instances that were sent anything, in order.
    pub fn instances(&self) -> impl Iterator<Item = &str> {
        self.instances.keys().map(String::as_str)
    }

    /// What was sent to one instance, in order of sending.
    pub fn sent(&self, instance: &str) -> &[Sent] {
        self.instances.get(instance).map_or(&[], |i| &i.sent)
    }
}

/// What a check found. The default is "nothing checked".
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Instances checked.
    pub instances: u64,
    /// Stimuli in the log.
    pub sent: u64,
    /// Acknowledged ones.
    pub acked: u64,
    /// Turns read back.
    pub turns: u64,
    /// Turns whose stimulus is not in the log.
    pub foreign: u64,
    /// Acknowledged and not there.
    pub lost: u64,
    /// Turns too many.
    pub doubled: u64,
    /// Acknowledged and decided after a later one of the same sender.
    pub disordered: u64,
    /// Acknowledged under another turn number than the one it has.
    pub moved: u64,
    /// Turn numbers that do not grow by one.
    pub gaps: u64,
    /// The first [`MAX_EXAMPLES`] violations in words.
    pub examples: Vec<String>,
}

impl Verdict {
    /// Whether every promise checked was kept.
    pub fn is_clean(&self) -> bool {
        self.violations() == 0
    }

    /// How many violations there are.
    pub fn violations(&self) -> u64 {
        self.lost + self.doubled + self.disordered + self.moved + self.gaps
    }

    /// Adds what another check found.
    pub fn merge(&mut self, other: Verdict) {
        self.instances += other.instances;
        self.sent += other.sent;
        self.acked += other.acked;
        self.turns += other.turns;
        self.foreign += other.foreign;
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.disordered += other.disordered;
        self.moved += other.moved;
        self.gaps += other.gaps;
        self.examples.extend(other.examples);
        self.examples.truncate(MAX_EXAMPLES);
    }

    /// Holds one instance's turns, oldest first and complete, against what was sent to it.
    pub fn check_instance(&mut self, instance: &str, sent: &[Sent], turns: &[Seen]) {
        self.instances += 1;
        self.sent += sent.len() as u64;
        self.acked += sent.iter().filter(|s| s.acked).count() as u64;
        self.turns += turns.len() as u64;
        self.check_numbers(instance, turns);
        let mut places: HashMap<&str, u64> = HashMap::with_capacity(turns.len());
        for seen in turns {
            if let Some(first) = places.get(seen.id.as_str()) {
                self.doubled += 1;
                self.example(|| {
                    format!("{instance}: '{}' decided in turn {first} and again in turn {}", seen.id, seen.turn)
                });
            } else {
                places.insert(&seen.id, seen.turn);
            }
        }
        for sent in sent.iter().filter(|s| s.acked) {
            self.check_acked(instance, sent, places.get(sent.id.as_str()).copied());
        }
        self.check_order(instance, sent, turns);
    }

    fn check_numbers(&mut self, instance: &str, turns: &[Seen]) {
        let mut before = 0;
        for seen in turns {
            if seen.turn != before + 1 {
                self.gaps += 1;
                self.example(|| format!("{instance}: turn {} follows turn {before}", seen.turn));
            }
            before = seen.turn;
        }
    }

    fn check_acked(&mut self, instance: &str, sent: &Sent, place: Option<u64>) {
        match (place, sent.turn) {
            (None, _) => {
                self.lost += 1;
                self.example(|| format!("{instance}: '{}' was acknowledged and has no turn", sent.id));
            }
            (Some(there), Some(named)) if there != named => {
                self.moved += 1;
                self.example(|| {
                    format!("{instance}: '{}' was acknowledged as turn {named} and is turn {there}", sent.id)
                });
            }
            _ => {}
        }
    }

    fn check_order(&mut self, instance: &str, sent: &[Sent], turns: &[Seen]) {
        let known: HashMap<&str, &Sent> = sent.iter().map(|s| (s.id.as_str(), s)).collect();
        let mut highest: HashMap<&str, u64> = HashMap::new();
        for seen in turns {
            let Some(sent) = known.get(seen.id.as_str()) else {
                self.foreign += 1;
                continue;
            };
            if !sent.acked {
                continue;
            }
            let highest = highest.entry(sent.sender.as_str()).or_insert(0);
            if sent.seq < *highest {
                let later = *highest;
                self.disordered += 1;
                self.example(|| {
                    format!(
                        "{instance}: '{}' (sender {}, {}) came after number {later} of the same sender",
                        sent.id, sent.sender, sent.seq
                    )
                });
            }
            *highest = sent.seq.max(*highest);
        }
    }

    fn example(&mut self, text: impl FnOnce() -> String) {
        if self.examples.len() < MAX_EXAMPLES {
            self.examples.push(text());
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sent(sender: &str, seq: u64, acked: bool) -> Sent {
        Sent { sender: sender.into(), seq, id: format!("{sender}-{seq}"), acked, turn: None }
    }

    fn seen(ids: &[&str]) -> Vec<Seen> {
        (1..).zip(ids).map(|(turn, id)| Seen { turn, id: (*id).into() }).collect()
    }

    fn check(sent: &[Sent], turns: &[Seen]) -> Verdict {
        let mut verdict = Verdict::default();
        verdict.check_instance("lamp", sent, turns);
        verdict
    }

    #[test]
    fn a_kept_promise_is_clean() {
        let log = [sent("a", 1, true), sent("b", 1, true), sent("a", 2, true)];
        let verdict = check(&log, &seen(&["b-1", "a-1", "a-2"]));
        assert!(verdict.is_clean(), "{verdict:?}");
        assert_eq!((verdict.sent, verdict.acked, verdict.turns, verdict.foreign), (3, 3, 3, 0));
    }

    #[test]
    fn loss_is_found() {
        let verdict = check(&[sent("a", 1, true), sent("a", 2, true)], &seen(&["a-2"]));
        assert_eq!((verdict.lost, verdict.violations()), (1, 1), "{verdict:?}");
        assert!(verdict.examples[0].contains("a-1"), "{verdict:?}");
    }

    #[test]
    fn the_unacknowledged_may_be_there_or_not() {
        let log = [sent("a", 1, false), sent("a", 2, false)];
        assert!(check(&log, &[]).is_clean());
        assert!(check(&log, &seen(&["a-1"])).is_clean());
        assert!(check(&log, &seen(&["a-2", "a-1"])).is_clean());
    }

    #[test]
    fn doubles_are_found_even_of_the_unacknowledged() {
        for acked in [true, false] {
            let verdict = check(&[sent("a", 1, acked)], &seen(&["a-1", "x", "a-1"]));
            assert_eq!((verdict.doubled, verdict.violations()), (1, 1), "{verdict:?}");
        }
    }

    #[test]
    fn disorder_of_one_sender_is_found_and_of_two_is_none() {
        let log = [sent("a", 1, true), sent("a", 2, true), sent("b", 1, true)];
        let verdict = check(&log, &seen(&["a-2", "b-1", "a-1"]));
        assert_eq!((verdict.disordered, verdict.violations()), (1, 1), "{verdict:?}");
        assert!(check(&log, &seen(&["b-1", "a-1", "a-2"])).is_clean());
    }

    #[test]
    fn an_acknowledgement_that_named_another_turn_is_found() {
        let log = [Sent { turn: Some(2), ..sent("a", 1, true) }];
        assert_eq!(check(&log, &seen(&["a-1"])).moved, 1);
        assert!(check(&log, &seen(&["x", "a-1"])).is_clean());
    }

    #[test]
    fn gaps_in_the_numbers_are_found() {
        let turns = [Seen { turn: 1, id: "x".into() }, Seen { turn: 3, id: "y".into() }];
        let verdict = check(&[], &turns);
        assert_eq!((verdict.gaps, verdict.foreign), (1, 2));
        assert_eq!(check(&[], &turns[1..]).gaps, 1, "history starts at 1");
    }

    #[test]
    fn examples_are_bounded_and_counts_are_not() {
        let log: Vec<_> = (1..=100).map(|n| sent("a", n, true)).collect();
        let verdict = check(&log, &[]);
        assert_eq!((verdict.lost, verdict.examples.len()), (100, MAX_EXAMPLES));
    }

    #[test]
    fn verdicts_add_up() {
        let mut verdict = check(&[sent("a", 1, true)], &[]);
        verdict.merge(check(&[sent("a", 1, true)], &seen(&["a-1", "a-1"])));
        assert_eq!((verdict.instances, verdict.lost, verdict.doubled, verdict.examples.len()), (2, 1, 1, 2));
    }

    fn lines(events: &[Event]) -> Vec<u8> {
        let mut out = Vec::new();
        for event in events {
            event.write(&mut out).unwrap();
        }
        out
    }

    fn sent_event(seq: u64) -> Event {
        Event::Sent { instance: "lamp".into(), sender: "a".into(), seq, id: format!("a-{seq}") }
    }

    fn ack_event(seq: u64, turn: Option<u64>) -> Event {
        Event::Ack { instance: "lamp".into(), id: format!("a-{seq}"), turn }
    }

    #[test]
    fn the_log_reads_back_what_was_written() {
        let bytes = lines(&[sent_event(1), sent_event(2), ack_event(1, Some(4)), sent_event(1)]);
        let log = Log::read(&bytes[..]).unwrap();
        assert_eq!(log.instances().collect::<Vec<_>>(), ["lamp"]);
        assert_eq!(log.sent("lamp"), [Sent { turn: Some(4), ..sent("a", 1, true) }, sent("a", 2, false)]);
        assert_eq!(log.sent("other"), []);
    }

    #[test]
    fn a_torn_last_line_is_ignored_and_a_torn_middle_is_not() {
        let mut bytes = lines(&[sent_event(1), ack_event(1, None)]);
        bytes.extend_from_slice(b"{\"e\":\"sent\",\"inst");
        assert_eq!(Log::read(&bytes[..]).unwrap().sent("lamp").len(), 1);
        bytes.extend_from_slice(b"\n{\"e\":\"ack\",\"instance\":\"lamp\",\"id\":\"a-1\"}\n");
        assert!(matches!(Log::read(&bytes[..]), Err(LogError::Line { line: 3, .. })));
    }

    #[test]
    fn an_acknowledgement_of_nothing_is_an_error() {
        let bytes = lines(&[sent_event(1), ack_event(2, None)]);
        assert!(matches!(Log::read(&bytes[..]), Err(LogError::UnknownAck { line: 2, .. })));
    }

    #[test]
    fn a_page_of_turns_is_read() {
        let page = r#"{"items":[{"turn":3,"stimulus":{"id":"x","channel":"c"},"reply":null}],"next":"3"}"#;
        let page: Page = serde_json::from_str(page).unwrap();
        assert_eq!(page.cursor().as_deref(), Some("3"));
        let seen: Vec<Seen> = page.items.into_iter().map(Seen::from).collect();
        assert_eq!(seen, [Seen { turn: 3, id: "x".into() }]);
        let last: Page = serde_json::from_str(r#"{"items":[],"next":null}"#).unwrap();
        assert_eq!(last.cursor(), None);
    }
}
