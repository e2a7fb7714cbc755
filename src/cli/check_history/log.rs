//! What clients wrote down: the log, its form on disk, and what it says about each stimulus.
//!
//! Not here: what is held against it (`check.rs`, `truth.rs`). `docs/check-history.md` describes the form for those who
//! write such logs. Tests: at the foot.
//!
//! A line is written before the act it speaks of becomes visible: `sent` before the bytes leave, `answer` after the answer
//! was read. So the order of the lines of one sender is the order of what happened, and a torn last line (the client was
//! killed) loses nothing; it is ignored. Any other bad line is an error.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, BufRead, Write},
};

use serde::{Deserialize, Serialize};

use crate::types::{Kind, Priority};

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "e", rename_all = "lowercase")]
pub enum Event {
    /// A stimulus is about to leave.
    Sent(Send),
    /// An answer came, or it is known that none will.
    Answer(Answer),
}

/// A stimulus about to leave. A repeat is another line with the same instance and id, and counts once.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Send {
    /// When, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<i64>,
    /// The program or connection, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// Who sends: order is promised to a sender.
    pub sender: String,
    /// Where it goes.
    pub instance: String,
    /// Its stimulus id; with `by` = `content` its text.
    pub id: String,
    /// Its place among this sender's stimuli for this instance, growing.
    pub seq: u64,
    /// The door it goes through.
    #[serde(default)]
    pub door: Door,
    /// How it is found among the turns.
    #[serde(default, skip_serializing_if = "By::is_id")]
    pub by: By,
    /// Its priority, when the sender names one: order holds within a priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
}

/// What became of a stimulus, as its sender was told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    /// When, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<i64>,
    /// The program or connection, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// Where the stimulus went.
    pub instance: String,
    /// The stimulus.
    pub id: String,
    /// What the answer means.
    pub what: What,
    /// The turn, when the answer named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turn: Option<u64>,
    /// The text of the reply, when the answer had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// The code of a refusal, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
}

/// Which door a stimulus goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Door {
    /// Requests: one that must not overtake another waits for its answer.
    #[default]
    Http,
    /// A session that keeps the order of what is sent over it, repeats included, with several in flight.
    Mqtt,
}

/// How a stimulus is recognised among the turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// By its id.
    #[default]
    Id,
    /// By its text, which is its own among all texts sent to the instance: for devices that cannot name ids.
    Content,
}

impl By {
    #[allow(clippy::trivially_copy_pass_by_ref)] // serde calls it so
    const fn is_id(&self) -> bool {
        matches!(self, By::Id)
    }
}

/// What an answer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// Durable, not decided yet: 202, PUBACK.
    Accepted,
    /// Decided: 200 with the turn.
    Decided,
    /// Not taken: any refusal.
    Refused,
    /// No answer: the connection broke, or patience ended. The stimulus may be taken or not.
    Timeout,
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

/// One stimulus as its sender knows it. Places are counted over all lines of all files, and grow with time within a sender.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sent {
    /// Who sent it.
    pub sender: String,
    /// Its number within the sender.
    pub seq: u64,
    /// Its id, or its text.
    pub id: String,
    /// How it is found.
    pub by: By,
    /// The door it went through.
    pub door: Door,
    /// Its priority, when it was named.
    pub priority: Option<Priority>,
    /// Where it was first sent.
    pub place: u64,
    /// Where it was first said to be durable.
    pub accepted: Option<u64>,
    /// Whether it was ever refused; then it came again at a place of its own in the stream.
    pub refused: bool,
    /// What answers said about its turn.
    pub told: Vec<Told>,
}

impl Sent {
    /// Whether the server said that it is durable.
    pub const fn is_accepted(&self) -> bool {
        self.accepted.is_some()
    }
}

/// What an answer said about the turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// Where it stands.
    pub place: u64,
    /// The turn's number.
    pub turn: Option<u64>,
    /// The reply's text.
    pub content: Option<String>,
}

/// The log, folded by instance.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Log {
    instances: BTreeMap<String, Instance>,
    places: u64,
    files: Vec<(String, u64)>,
    homes: HashMap<String, usize>,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Instance {
    sent: Vec<Sent>,
    by_id: HashMap<String, usize>,
}

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("cannot read the log {file}: {source}")]
    Io {
        /// Which.
        file: String,
        /// What the system says.
        source: io::Error,
    },
    /// A line in the middle that is no event.
    #[error("{file}:{line}: {source}")]
    Line {
        /// Which file.
        file: String,
        /// Counted from 1.
        line: u64,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// An answer to something never sent: the log was not written in order.
    #[error("{file}:{line} answers '{id}' at '{instance}', which was not sent before")]
    UnknownAnswer {
        /// Which file.
        file: String,
        /// Counted from 1.
        line: u64,
        /// The instance.
        instance: String,
        /// The stimulus id.
        id: String,
    },
    /// The order of a sender is the order of lines, which two files do not have.
    #[error("{file}:{line}: the sender '{sender}' has lines in another file too: one sender, one file")]
    Scattered {
        /// Which file.
        file: String,
        /// Counted from 1.
        line: u64,
        /// The sender.
        sender: String,
    },
}

impl crate::types::Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Io { .. } => Kind::Unavailable,
            Error::Line { .. } | Error::UnknownAnswer { .. } | Error::Scattered { .. } => Kind::Invalid,
        }
    }

    fn hint(&self) -> Option<String> {
        (self.kind() == Kind::Invalid).then(|| String::from("docs/check-history.md describes the form of a log"))
    }
}

impl Log {
    /// Takes one event. `false` when it answers something that was not sent.
    pub fn push(&mut self, event: Event) -> bool {
        let place = self.places;
        self.places += 1;
        match event {
            Event::Sent(send) => {
                self.send(send, place);
                true
            }
            Event::Answer(answer) => self.answer(answer, place),
        }
    }

    fn send(&mut self, send: Send, place: u64) {
        let Send { sender, instance, id, seq, door, by, priority, .. } = send;
        let instance = self.instances.entry(instance).or_default();
        if !instance.by_id.contains_key(&id) {
            instance.by_id.insert(id.clone(), instance.sent.len());
            instance.sent.push(Sent { sender, seq, id, by, door, priority, place, ..Sent::default() });
        }
    }

    fn answer(&mut self, answer: Answer, place: u64) -> bool {
        let Answer { instance, id, what, turn, content, .. } = answer;
        let Some(instance) = self.instances.get_mut(&instance) else { return false };
        let Some(sent) = instance.by_id.get(&id).and_then(|&at| instance.sent.get_mut(at)) else { return false };
        match what {
            What::Accepted | What::Decided => {
                sent.accepted.get_or_insert(place);
                if turn.is_some() || content.is_some() {
                    sent.told.push(Told { place, turn, content });
                }
            }
            What::Refused => sent.refused = true,
            What::Timeout => {}
        }
        true
    }

    /// Reads one file after those read before.
    ///
    /// # Errors
    /// [`Error`]; a torn last line is none.
    pub fn read(&mut self, name: &str, input: impl BufRead) -> Result<(), Error> {
        let file = || name.to_owned();
        let first = self.places;
        self.files.push((file(), first));
        let mut torn: Option<Error> = None;
        for (line, text) in (1u64..).zip(input.split(b'\n')) {
            let text = text.map_err(|source| Error::Io { file: file(), source })?;
            if let Some(error) = torn.take() {
                return Err(error);
            }
            self.places = first + line - 1;
            if text.is_empty() {
                self.places += 1;
                continue;
            }
            match serde_json::from_slice::<Event>(&text) {
                Err(source) => {
                    self.places += 1;
                    torn = Some(Error::Line { file: file(), line, source });
                }
                Ok(event) => self.take(event, name, line)?,
            }
        }
        Ok(())
    }

    fn take(&mut self, event: Event, name: &str, line: u64) -> Result<(), Error> {
        let file = name.to_owned();
        match event {
            Event::Sent(send) => {
                let here = self.files.len();
                if *self.homes.entry(send.sender.clone()).or_insert(here) != here {
                    return Err(Error::Scattered { file, line, sender: send.sender });
                }
                self.push(Event::Sent(send));
                Ok(())
            }
            Event::Answer(answer) => {
                let (instance, id) = (answer.instance.clone(), answer.id.clone());
                let known = self.push(Event::Answer(answer));
                known.then_some(()).ok_or(Error::UnknownAnswer { file, line, instance, id })
            }
        }
    }

    /// The instances that were sent anything, in order.
    pub fn instances(&self) -> impl Iterator<Item = &str> {
        self.instances.keys().map(String::as_str)
    }

    /// What was sent to one instance, in order of sending.
    pub fn sent(&self, instance: &str) -> &[Sent] {
        self.instances.get(instance).map_or(&[], |i| &i.sent)
    }

    /// The file and line (from 1) of a place; `None` for a log that was not read from files.
    pub fn line(&self, place: u64) -> Option<(&str, u64)> {
        let (name, first) = self.files.iter().rev().find(|(_, first)| *first <= place)?;
        Some((name, place - first + 1))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sent(sender: &str, seq: u64) -> Event {
        let (sender, id) = (sender.to_owned(), format!("{sender}-{seq}"));
        Event::Sent(Send { sender, instance: "lamp".into(), id, seq, ..Send::default() })
    }

    fn answer(id: &str, what: What, turn: Option<u64>) -> Event {
        let (instance, id) = ("lamp".into(), id.into());
        Event::Answer(Answer { at: None, client: None, instance, id, what, turn, content: None, code: None })
    }

    fn lines(events: &[Event]) -> Vec<u8> {
        let mut out = Vec::new();
        for event in events {
            event.write(&mut out).unwrap();
        }
        out
    }

    fn read(bytes: &[u8]) -> Result<Log, Error> {
        let mut log = Log::default();
        log.read("a.jsonl", bytes).map(|()| log)
    }

    #[test]
    fn the_log_reads_back_what_was_written() {
        let events =
            [sent("a", 1), sent("a", 2), answer("a-1", What::Decided, Some(4)), answer("a-2", What::Refused, None)];
        let bytes = lines(&[&events[..], &[sent("a", 1)]].concat());
        let log = read(&bytes).unwrap();
        assert_eq!(log.instances().collect::<Vec<_>>(), ["lamp"]);
        let [one, two] = log.sent("lamp") else { panic!("{log:?}") };
        assert_eq!((one.place, one.accepted, one.told[0].turn, one.refused), (0, Some(2), Some(4), false));
        assert_eq!((two.place, two.accepted, two.told.len(), two.refused), (1, None, 0, true));
        assert_eq!(log.sent("other"), []);
        assert_eq!((log.line(0), log.line(3)), (Some(("a.jsonl", 1)), Some(("a.jsonl", 4))));
    }

    #[test]
    fn the_form_is_the_documented_one() {
        let text = br#"{"e":"sent","at":1763714000123,"client":"c1","sender":"s1","instance":"lamp","id":"s1-7","seq":7,"door":"http"}
{"e":"answer","at":1763714000140,"client":"c1","instance":"lamp","id":"s1-7","what":"decided","turn":12,"content":"seen 7"}
"#;
        let log = read(text).unwrap();
        let told = Told { place: 1, turn: Some(12), content: Some("seen 7".into()) };
        assert_eq!(log.sent("lamp")[0].told, [told]);
        let event: Event = serde_json::from_slice(text.split(|b| *b == b'\n').next().unwrap()).unwrap();
        assert_eq!(lines(&[event]), text.split_inclusive(|b| *b == b'\n').next().unwrap());
    }

    #[test]
    fn an_unknown_field_is_a_mistake_and_not_ignored() {
        let bytes = lines(&[sent("a", 1), sent("a", 2)]);
        let text = String::from_utf8(bytes).unwrap().replacen("\"seq\"", "\"turns\":1,\"seq\"", 1);
        assert!(matches!(read(text.as_bytes()), Err(Error::Line { line: 1, .. })));
    }

    #[test]
    fn a_torn_last_line_is_ignored_and_a_torn_middle_is_not() {
        let mut bytes = lines(&[sent("a", 1), answer("a-1", What::Accepted, None)]);
        bytes.extend_from_slice(b"{\"e\":\"sent\",\"inst");
        assert_eq!(read(&bytes).unwrap().sent("lamp").len(), 1);
        bytes.extend_from_slice(b"\n");
        bytes.extend(lines(&[answer("a-1", What::Accepted, None)]));
        assert!(matches!(read(&bytes), Err(Error::Line { line: 3, .. })));
    }

    #[test]
    fn an_answer_to_nothing_is_an_error() {
        let bytes = lines(&[sent("a", 1), answer("a-2", What::Accepted, None)]);
        assert!(matches!(read(&bytes), Err(Error::UnknownAnswer { line: 2, .. })));
    }

    #[test]
    fn files_follow_each_other_and_a_sender_stays_in_one() {
        let mut log = Log::default();
        log.read("a", &lines(&[sent("a", 1)])[..]).unwrap();
        log.read("b", &lines(&[sent("b", 1), sent("b", 2)])[..]).unwrap();
        assert_eq!((log.line(0), log.line(1), log.line(2)), (Some(("a", 1)), Some(("b", 1)), Some(("b", 2))));
        let scattered = log.read("c", &lines(&[sent("a", 2)])[..]);
        assert!(matches!(scattered, Err(Error::Scattered { line: 1, .. })));
    }
}
