//! The stored form of a step: a short record, and its long texts apart, each under the hash of its content, so that what
//! stands in several steps of an instance's open turns is stored once.
//!
//! A record is one version byte, then postcard. Texts of at most [`INLINE`] bytes stand in the record itself: a reference
//! would cost as much. Not here: tables. Invariant: what a record refers to is among the texts of its instance.
//! Tests: at the foot; `tests/golden/store` holds one of each version.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::types::{Message, StimulusId, ToolCall, ToolResult, Usage, step::Answered, step::Speaker, step::Step};

/// The newest version of a step.
const STEP_VERSION: u8 = 1;
/// Longest text that stands in the step itself, in bytes.
const INLINE: usize = 192;

/// The version that is written, for the test that holds it against the cluster's protocol.
#[cfg(test)]
pub(crate) const WRITTEN: u8 = STEP_VERSION;

/// Names a text by its content.
pub(crate) type Hash = [u8; 32];

/// The steps of a stimulus whose turn is not over, in order from the first.
pub type Journal = (StimulusId, Vec<std::sync::Arc<Step>>);

/// A step as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Encoded {
    /// The record.
    pub rec: Vec<u8>,
    /// The texts it refers to; some may be stored already.
    pub texts: Vec<(Hash, Vec<u8>)>,
}

#[derive(Serialize, Deserialize)]
enum Text {
    Here(String),
    There(Hash),
}

#[derive(Serialize, Deserialize)]
struct Call {
    id: String,
    name: String,
    arguments: Text,
}

#[derive(Serialize, Deserialize)]
enum Stored {
    Asked(Vec<(Speaker, Text, Vec<Call>, Option<String>)>),
    Answered { text: Text, pieces: Vec<u32>, calls: Vec<Call>, model: Option<String>, usage: Usage },
    Calling { call: u32 },
    Returned { call: u32, content: Text, failed: bool, actions: Text },
}

/// Takes texts out of a step.
#[derive(Default)]
struct Lift(Vec<(Hash, Vec<u8>)>);

impl Lift {
    fn text(&mut self, text: &str) -> Text {
        if text.len() <= INLINE {
            return Text::Here(text.to_owned());
        }
        let hash = *blake3::hash(text.as_bytes()).as_bytes();
        if !self.0.iter().any(|(other, _)| *other == hash) {
            self.0.push((hash, text.as_bytes().to_vec()));
        }
        Text::There(hash)
    }

    fn calls(&mut self, calls: &[ToolCall]) -> Vec<Call> {
        let call = |call: &ToolCall| Call {
            id: call.id.clone(),
            name: call.name.clone(),
            arguments: self.text(&call.arguments),
        };
        calls.iter().map(call).collect()
    }
}

/// The stored form.
///
/// # Errors
/// Only when a value cannot be serialized, which the types rule out.
pub(crate) fn encode(step: &Step) -> Result<Encoded, Error> {
    let mut lift = Lift::default();
    let stored = match step {
        Step::Asked(messages) => {
            let message = |m: &Message| (m.role, lift.text(&m.content), lift.calls(&m.calls), m.call.clone());
            Stored::Asked(messages.iter().map(message).collect())
        }
        Step::Answered(Answered { text, pieces, calls, model, usage }) => Stored::Answered {
            text: lift.text(text),
            pieces: pieces.clone(),
            calls: lift.calls(calls),
            model: model.clone(),
            usage: *usage,
        },
        Step::Calling { call } => Stored::Calling { call: *call },
        Step::Returned { call, result, actions } => Stored::Returned {
            call: *call,
            content: lift.text(&result.content),
            failed: result.failed,
            actions: lift.text(actions),
        },
    };
    let rec = postcard::to_extend(&stored, vec![STEP_VERSION]).map_err(|e| Error::Backend(e.to_string()))?;
    Ok(Encoded { rec, texts: lift.0 })
}

/// The texts of an instance, by their hashes.
#[derive(Debug, Default)]
pub(crate) struct Texts(pub HashMap<Hash, Vec<u8>, ahash::RandomState>);

impl Texts {
    /// Adds one as it was stored.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the hash has another length.
    pub(crate) fn add(&mut self, hash: &[u8], bytes: &[u8]) -> Result<(), Error> {
        let hash =
            Hash::try_from(hash).map_err(|_| Error::Corrupt(String::from("a text's hash has a wrong length")))?;
        self.0.insert(hash, bytes.to_vec());
        Ok(())
    }

    fn text(&self, text: Text) -> Result<String, Error> {
        let hash = match text {
            Text::Here(text) => return Ok(text),
            Text::There(hash) => hash,
        };
        let bytes = self.0.get(&hash).ok_or_else(|| Error::Corrupt(String::from("a text of a step is gone")))?;
        String::from_utf8(bytes.clone()).map_err(|_| Error::Corrupt(String::from("a text of a step is not UTF-8")))
    }

    fn calls(&self, calls: Vec<Call>) -> Result<Vec<ToolCall>, Error> {
        let call = |Call { id, name, arguments }| Ok(ToolCall { id, name, arguments: self.text(arguments)? });
        calls.into_iter().map(call).collect()
    }

    /// Reads a stored step.
    ///
    /// # Errors
    /// [`Error::Corrupt`].
    pub(crate) fn decode(&self, rec: &[u8]) -> Result<Step, Error> {
        let stored: Stored = match rec.split_first() {
            Some((&STEP_VERSION, rest)) => {
                postcard::from_bytes(rest).map_err(|e| Error::Corrupt(format!("a step: {e}")))?
            }
            Some((version, _)) => {
                let why = format!("a step has version {version}, this build reads up to {STEP_VERSION}");
                return Err(Error::Corrupt(why));
            }
            None => return Err(Error::Corrupt(String::from("a step is empty"))),
        };
        Ok(match stored {
            Stored::Asked(messages) => {
                let message = |(role, content, calls, call)| {
                    Ok(Message { role, content: self.text(content)?, calls: self.calls(calls)?, call })
                };
                Step::Asked(messages.into_iter().map(message).collect::<Result<_, Error>>()?)
            }
            Stored::Answered { text, pieces, calls, model, usage } => {
                Step::Answered(Answered { text: self.text(text)?, pieces, calls: self.calls(calls)?, model, usage })
            }
            Stored::Calling { call } => Step::Calling { call },
            Stored::Returned { call, content, failed, actions } => Step::Returned {
                call,
                result: ToolResult { content: self.text(content)?, failed },
                actions: self.text(actions)?,
            },
        })
    }
}

/// Puts steps together that stand in the order of their stimuli and numbers.
pub(crate) fn gather(steps: impl IntoIterator<Item = (StimulusId, Step)>) -> Vec<Journal> {
    let mut journals: Vec<Journal> = Vec::new();
    for (stimulus, step) in steps {
        let step = std::sync::Arc::new(step);
        match journals.last_mut() {
            Some((last, steps)) if *last == stimulus => steps.push(step),
            _ => journals.push((stimulus, vec![step])),
        }
    }
    journals
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn call(id: &str, arguments: &str) -> ToolCall {
        ToolCall { id: id.into(), name: "look".into(), arguments: arguments.into() }
    }

    fn samples() -> Vec<Step> {
        let long = "it was warm ".repeat(40);
        vec![
            Step::Asked(vec![
                Message::said(Speaker::System, &long),
                Message { calls: vec![call("a", "{}")], ..Message::said(Speaker::Assistant, "") },
                Message::result("a", &long),
            ]),
            Step::Answered(Answered {
                text: "I look.".into(),
                pieces: vec![2, 5],
                calls: vec![call("b", r#"{"at":"door"}"#)],
                model: Some("local/small".into()),
                usage: Usage { input_tokens: 7, output_tokens: 8 },
            }),
            Step::Calling { call: 0 },
            Step::Returned { call: 0, result: ToolResult::failure(&long), actions: String::new() },
        ]
    }

    fn texts(encoded: &[Encoded]) -> Texts {
        let mut texts = Texts::default();
        for (hash, bytes) in encoded.iter().flat_map(|one| &one.texts) {
            texts.add(hash, bytes).unwrap();
        }
        texts
    }

    #[test]
    fn a_step_reads_back_and_its_form_is_as_published() {
        let encoded: Vec<Encoded> = samples().iter().map(|step| encode(step).unwrap()).collect();
        let texts = texts(&encoded);
        let read: Vec<Step> = encoded.iter().map(|one| texts.decode(&one.rec).unwrap()).collect();
        assert_eq!(read, samples());
        assert_eq!(texts.0.len(), 1, "what stands in several steps is stored once");
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/store/steps-1.bin");
        let written: Vec<u8> = encoded.iter().flat_map(|one| one.rec.clone()).collect();
        let stored = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}; {written:02x?}", path.display()));
        assert_eq!(stored, written, "a stored format changed; old stores could not be read");
    }

    #[test]
    fn damage_is_told() {
        let texts = Texts::default();
        for (bytes, why) in [(&[][..], "empty"), (&[9, 1], "version 9"), (&[1, 77], "a step:")] {
            assert!(matches!(texts.decode(bytes), Err(Error::Corrupt(text)) if text.contains(why)), "{why}");
        }
        let one = encode(&samples()[0]).unwrap();
        assert!(matches!(texts.decode(&one.rec), Err(Error::Corrupt(text)) if text.contains("gone")));
    }

    /// A turn of a hundred steps, told from one beginning, that looks at a few things again and again.
    #[test]
    fn a_long_turn_costs_little_more_than_what_is_different_in_it() {
        let scene = "you are a house ".repeat(200);
        let mut steps = vec![Step::Asked(vec![
            Message::said(Speaker::System, &scene),
            Message::said(Speaker::User, "look after it"),
        ])];
        for n in 0..50 {
            let text = format!("Round {n}: ") + &"I look at the next door and compare. ".repeat(12);
            let (pieces, left) = (text.len() / 5, text.len() % 5);
            let pieces = std::iter::repeat_n(5, pieces).chain((left > 0).then_some(left as u32)).collect();
            let calls = vec![call(&format!("call_{n}"), &format!(r#"{{"at":"door {}"}}"#, n % 10))];
            steps.push(Step::Answered(Answered { text, pieces, calls, model: None, usage: Usage::default() }));
            let seen = format!("door {}: ", n % 10) + &"closed, no light, nobody there; ".repeat(30);
            steps.push(Step::Returned { call: 0, result: ToolResult::of(seen), actions: String::new() });
        }
        let encoded: Vec<Encoded> = steps.iter().map(|step| encode(step).unwrap()).collect();
        let rows: usize = encoded.iter().map(|one| one.rec.len()).sum();
        let stored: usize = rows + texts(&encoded).0.values().map(|text| 32 + text.len()).sum::<usize>();
        let mut unique = std::collections::HashSet::new();
        for step in &steps {
            match step {
                Step::Asked(messages) => unique.extend(messages.iter().map(|m| m.content.clone())),
                Step::Answered(answer) => {
                    unique.insert(answer.text.clone());
                    unique.extend(answer.calls.iter().map(|call| format!("{}{}", call.id, call.arguments)));
                }
                Step::Returned { result, .. } => drop(unique.insert(result.content.clone())),
                Step::Calling { .. } => {}
            }
        }
        let unique: usize = unique.iter().map(String::len).sum();
        println!("{} steps: {stored} bytes stored, {unique} different", steps.len());
        assert!(stored * 10 <= unique * 13, "{stored} bytes for {unique}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = Texts::default().decode(&bytes);
        }
    }
}
