//! An answer of the chat protocol, chunk by chunk.
//!
//! The protocol cannot take words back. So what was sent is remembered by length and digest, and what follows is sent only
//! while it goes on from there; an answer that was begun anew in other words ends the stream with an error, and asking again
//! under the same `Idempotency-Key` yields the turn. Each chunk with words has an id, `STIMULUS:c:BYTES:DIGEST`, which resumes.
//! Invariants: the words a client puts together are the beginning of the reply, and all of it when the stream ends well.
//! Tests: at the foot; `tests/it/openai.rs`.

use bytes::Bytes;
use serde_json::{Value, json};

use super::{
    super::{
        problem::{Problem, Refusal},
        said::Said,
        tail::{End, Flow, Tail, Thread},
    },
    wire::{Answer, Form},
};
use crate::{
    instance::events::{Event, Watch},
    store::Known,
    types::{StimulusId, TurnRecord},
};

const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// Where a stream broke off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resume {
    /// The stimulus.
    pub stimulus: StimulusId,
    /// What the client has.
    pub said: Said,
}

impl Resume {
    /// Reads the id of a chunk.
    pub fn parse(id: &str) -> Option<Self> {
        let mut parts = id.split(':');
        let stimulus = StimulusId::new(parts.next()?).ok()?;
        let ("c", bytes, digest, None) = (parts.next()?, parts.next()?, parts.next()?, parts.next()) else {
            return None;
        };
        Some(Self { stimulus, said: Said::parse(bytes, digest)? })
    }
}

/// A stream that brings one answer.
pub struct Talk {
    /// Which, for whom.
    pub thread: Thread,
    /// What its chunks have in common.
    pub form: Form,
    /// Whether the last chunk says what was consumed.
    pub usage: bool,
    /// What the client has.
    pub said: Said,
    /// The answer as it is thought.
    pub draft: Draft,
}

/// The answer as it is thought.
#[derive(Default)]
pub struct Draft {
    text: String,
    pieces: u64,
    /// What the client has is how it begins.
    fits: bool,
}

impl Tail for Talk {
    fn thread(&mut self) -> &mut Thread {
        &mut self.thread
    }

    async fn event(&mut self, event: Event, watch: &mut Watch) -> Flow {
        let mine = |id: &StimulusId| *id == self.thread.stimulus;
        match event {
            Event::Token { stimulus, index, text } if mine(&stimulus) => {
                if index > self.draft.pieces {
                    return self.look_again(watch).await;
                }
                if index == self.draft.pieces {
                    self.draft.pieces += 1;
                    self.draft.text.push_str(&text);
                    return self.say().await;
                }
                Ok(())
            }
            Event::Thinking(id) | Event::Restart(id) if mine(&id) => self.look_again(watch).await,
            Event::Turn(turn) if mine(&turn.stimulus.id) => self.turn(&turn).await,
            Event::Dead(dead) if mine(&dead.stimulus.id) => self.settle(Some(Known::Dead(dead))).await,
            Event::Forgotten => self.problem(Refusal::NoStimulus.into()).await,
            Event::Missed => self.look_again(watch).await,
            _ => Ok(()),
        }
    }

    async fn catch_up(&mut self, watch: &Watch) -> Flow {
        let draft = watch.draft.as_ref().filter(|draft| draft.stimulus == self.thread.stimulus);
        let Some(draft) = draft else { return Ok(()) };
        self.draft = Draft { text: draft.tokens.concat(), pieces: draft.tokens.len() as u64, fits: false };
        self.say().await
    }

    /// The rest of its words, the calls that are left to the client, and the end.
    async fn turn(&mut self, turn: &TurnRecord) -> Flow {
        if let Err(refusal) = Answer::is_there(turn) {
            return self.problem(refusal.into()).await;
        }
        let answer = Answer::of(turn);
        let Some(rest) = self.said.rest_of(&answer.content) else { return self.begun_anew().await };
        self.words(rest).await?;
        if !answer.calls.is_empty() {
            let call = |(index, call): (usize, &_)| {
                let mut call = json!(call);
                call["index"] = json!(index);
                call
            };
            let calls: Vec<Value> = answer.calls.iter().enumerate().map(call).collect();
            self.delta(&json!({"tool_calls": calls}), None).await?;
        }
        self.delta(&json!({}), Some(answer.finish())).await?;
        if self.usage {
            let chunk = self.form.usage(turn);
            self.thread.sink.send(data(None, &chunk)).await?;
        }
        self.thread.sink.send(DONE).await?;
        Err(End::Done)
    }

    async fn problem(&mut self, problem: Problem) -> Flow {
        let refused = problem.refused(&self.thread.path, &self.thread.request_id);
        self.thread.sink.send(data(None, &refused)).await?;
        Err(End::Done)
    }
}

impl Talk {
    /// Brings the answer to its end. The watch began before `known` was asked for.
    pub async fn run(mut self, watch: Watch, known: Known, resumed: bool) {
        let begins = json!({"role": "assistant", "content": ""});
        if resumed || self.delta(&begins, None).await.is_ok() {
            self.go_on(watch, known).await;
        }
    }

    /// Sends what the draft has behind what was said, once there is more of it than was said.
    async fn say(&mut self) -> Flow {
        if self.draft.text.len() <= self.said.bytes() {
            return Ok(());
        }
        if !self.draft.fits && self.said.rest_of(&self.draft.text).is_none() {
            return self.begun_anew().await;
        }
        self.draft.fits = true;
        let rest = self.draft.text.get(self.said.bytes()..).unwrap_or_default().to_owned();
        self.words(&rest).await
    }

    async fn words(&mut self, text: &str) -> Flow {
        if text.is_empty() {
            return Ok(());
        }
        self.said.push(text);
        self.delta(&json!({"content": text}), None).await
    }

    async fn begun_anew(&mut self) -> Flow {
        let why = "the answer was begun anew in other words: ask again with the same Idempotency-Key";
        self.problem(crate::instance::Error::Overloaded(why).into()).await
    }

    async fn delta(&mut self, delta: &Value, finish: Option<&str>) -> Flow {
        let id = format!("{}:c:{}", self.thread.stimulus, self.said);
        Ok(self.thread.sink.send(data(Some(&id), &self.form.chunk(delta, finish))).await?)
    }
}

/// An event without a name, as the protocol has them.
fn data(id: Option<&str>, value: &Value) -> Bytes {
    let id = id.map(|id| format!("id: {id}\n")).unwrap_or_default();
    Bytes::from(format!("{id}data: {value}\n\n"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_id_of_a_chunk_says_what_the_client_has() {
        let mut said = Said::default();
        said.push("hello");
        let id = format!("s-1:c:{said}");
        let resume = Resume::parse(&id).unwrap();
        assert_eq!((resume.stimulus.as_str(), resume.said), ("s-1", said));
        for bad in ["", "s-1", "s-1:5:aa", "s-1:c:5", "s-1:c:x:aa", "s-1:c:5:zz", "s-1:c:5:aa:1", "s 1:c:5:aa"] {
            assert_eq!(Resume::parse(bad), None, "{bad}");
        }
    }
}
