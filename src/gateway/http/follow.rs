//! Following one stimulus to its turn: `accepted`, `step`, `token`…, `turn` or `error`.
//!
//! Owns: [`Words`], which knows what of an answer a client has, and how it is brought the rest. Not here: the loop (`tail.rs`).
//!
//! Invariants: the words a client puts together are the draft's, none missing, none twice; when an answer is begun anew (a
//! failed call, a restarted node) the client is told to forget what it has. Ids of events are `STIMULUS:0` for `accepted`,
//! `STIMULUS:N:DIGEST:BYTES:DIGEST` after N words (the first digest is of the words as they were cut, the second of their
//! text), and `STIMULUS:turn` at the end; any of them resumes.
//! Tests: at the foot; `tests/it/http.rs`.

use std::sync::Arc;

use serde::Serialize;

use super::{
    problem::{Problem, Refusal},
    said::Said,
    sse,
    tail::{End, Flow, Tail, Thread},
    view::{self, Status, StatusView},
};
use crate::{
    instance::{
        self,
        events::{Event, Watch},
    },
    store::{DeadLetter, Known},
    types::{InstanceKey, Millis, StimulusId, TurnRecord},
};

/// How far a client got, from its `Last-Event-ID`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resume {
    /// The stimulus it followed.
    pub stimulus: StimulusId,
    /// What it has.
    pub has: Has,
}

/// What a client has of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Has {
    /// So many words, with this digest, and their text, if the id says; those of builds before do not.
    Words(u64, u64, Option<Said>),
    /// All of it.
    Turn,
}

impl Resume {
    /// Reads the id of an event.
    pub fn parse(id: &str) -> Option<Self> {
        let mut parts = id.split(':');
        let stimulus = StimulusId::new(parts.next()?).ok()?;
        let rest: [Option<&str>; 5] = std::array::from_fn(|_| parts.next());
        let has = match rest {
            [Some("turn"), None, ..] => Has::Turn,
            [Some("0"), None, ..] => Has::Words(0, Words::EMPTY, Some(Said::default())),
            [Some(count), Some(digest), bytes, text, None] => {
                let said = match (bytes, text) {
                    (Some(bytes), Some(text)) => Some(Said::parse(bytes, text)?),
                    (None, None) => None,
                    _ => return None,
                };
                Has::Words(count.parse().ok()?, u64::from_str_radix(digest, 16).ok()?, said)
            }
            _ => return None,
        };
        Some(Self { stimulus, has })
    }
}

/// The words a client has: how many, and a digest of them, so that a stream can go on only where it left off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Words {
    count: u64,
    digest: u64,
    said: Option<Said>,
}

/// What to do with the next word.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Send it.
    Send,
    /// The client has it.
    Skip,
    /// Words before it are missing.
    Gap,
}

impl Words {
    const EMPTY: u64 = 0xcbf2_9ce4_8422_2325;

    /// What a client has.
    pub fn new(has: Option<Has>) -> Self {
        match has {
            Some(Has::Words(count, digest, said)) => Self { count, digest, said },
            Some(Has::Turn) | None => Self { count: 0, digest: Self::EMPTY, said: Some(Said::default()) },
        }
    }

    /// Takes a word into account when it is the next one.
    pub fn next(&mut self, index: u64, text: &str) -> Next {
        match index.cmp(&self.count) {
            std::cmp::Ordering::Less => Next::Skip,
            std::cmp::Ordering::Greater => Next::Gap,
            std::cmp::Ordering::Equal => {
                self.push(text);
                Next::Send
            }
        }
    }

    fn push(&mut self, text: &str) {
        let step = |digest: u64, byte: u8| (digest ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        self.digest = text.bytes().chain([0xff]).fold(self.digest, step);
        self.count += 1;
        self.said.iter_mut().for_each(|said| said.push(text));
    }

    /// What of a whole answer comes behind the words; nothing where the client has none, or all, or where its id does not say.
    fn rest_of<'t>(&self, answer: &'t str) -> Rest<'t> {
        let Some(said) = self.said.filter(|_| self.count > 0) else { return Rest::None };
        match said.rest_of(answer) {
            Some("") => Rest::None,
            Some(rest) => Rest::Behind(rest),
            None => Rest::Anew,
        }
    }

    /// Whether what the client has is how this draft begins.
    pub fn continues(&self, draft: &[Arc<str>]) -> bool {
        let Some(begin) = usize::try_from(self.count).ok().and_then(|count| draft.get(..count)) else { return false };
        let mut words = Self::new(None);
        begin.iter().for_each(|text| words.push(text));
        (words.count, words.digest) == (self.count, self.digest)
    }

    fn id(&self, stimulus: &StimulusId) -> String {
        let said = self.said.map(|said| format!(":{said}")).unwrap_or_default();
        format!("{stimulus}:{}:{:x}{said}", self.count, self.digest)
    }
}

/// What of a whole answer a client lacks.
#[derive(Debug, PartialEq, Eq)]
enum Rest<'t> {
    /// Nothing that is told in words.
    None,
    /// This, behind what it has.
    Behind(&'t str),
    /// What it has is not how the answer begins.
    Anew,
}

/// A piece of an answer.
#[derive(Debug, Serialize)]
pub struct TokenView<'a> {
    /// Of the answer to which stimulus.
    pub stimulus: &'a StimulusId,
    /// Its place, from 0.
    pub index: u64,
    /// The text.
    pub text: &'a str,
}

/// What the engine does. `restart` voids the words sent so far.
#[derive(Debug, Serialize)]
pub struct StepView<'a> {
    /// For which stimulus.
    pub stimulus: &'a StimulusId,
    /// `thinking` or `restart`.
    pub step: &'a str,
}

/// A stream that follows one stimulus.
pub struct Follow {
    /// Which, for whom.
    pub thread: Thread,
    /// What the client has.
    pub words: Words,
}

impl Tail for Follow {
    fn thread(&mut self) -> &mut Thread {
        &mut self.thread
    }

    async fn event(&mut self, event: Event, watch: &mut Watch) -> Flow {
        let mine = |id: &StimulusId| *id == self.thread.stimulus;
        match event {
            Event::Thinking(id) if mine(&id) => {
                // A thought begins, or goes on from its journal: only words that are not part of it any more are void.
                *watch = self.thread.watch();
                self.catch_up(watch).await
            }
            Event::Token { stimulus, index, text } if mine(&stimulus) => match self.words.next(index, &text) {
                Next::Send => self.token(index, &text).await,
                Next::Skip => Ok(()),
                Next::Gap => self.look_again(watch).await,
            },
            Event::Restart(id) if mine(&id) => self.restart().await,
            Event::Turn(turn) if mine(&turn.stimulus.id) => self.turn(&turn).await,
            Event::Dead(dead) if mine(&dead.stimulus.id) => self.settle(Some(Known::Dead(dead))).await,
            Event::Missed => self.ask().await,
            Event::Forgotten => self.problem(Refusal::NoStimulus.into()).await,
            _ => Ok(()),
        }
    }

    async fn catch_up(&mut self, watch: &Watch) -> Flow {
        let draft = watch.draft.as_ref().filter(|draft| draft.stimulus == self.thread.stimulus);
        let Some(draft) = draft else { return Ok(()) };
        if !self.words.continues(&draft.tokens) {
            self.restart().await?;
        } else if self.words.count == 0 {
            self.step("thinking").await?;
        }
        for (index, text) in (0u64..).zip(&draft.tokens) {
            if self.words.next(index, text) == Next::Send {
                self.token(index, text).await?;
            }
        }
        Ok(())
    }

    async fn turn(&mut self, turn: &TurnRecord) -> Flow {
        let answer = turn.reply.as_ref().and_then(|reply| reply.content.as_deref()).unwrap_or_default();
        match self.words.rest_of(answer) {
            Rest::None => (),
            Rest::Behind(rest) => self.add(rest).await?,
            Rest::Anew => {
                self.restart().await?;
                self.add(answer).await?;
            }
        }
        let id = format!("{}:turn", self.thread.stimulus);
        self.thread.sink.send(sse::frame("turn", Some(&id), &view::turn_json(turn))).await?;
        Err(End::Done)
    }

    async fn problem(&mut self, problem: Problem) -> Flow {
        let body = problem.body(&self.thread.path, &self.thread.request_id);
        self.thread.sink.send(sse::frame("error", None, &body)).await?;
        Err(End::Done)
    }
}

impl Follow {
    /// Follows until the turn. The watch began before `known` was asked for.
    pub async fn run(mut self, watch: Watch, known: Known, resumed: bool) {
        let accepted = match &known {
            Known::Waiting(stimulus) => stimulus.accepted_at,
            Known::Decided(turn) => turn.stimulus.accepted_at,
            Known::Dead(dead) => dead.stimulus.accepted_at,
        };
        if resumed || self.accepted(accepted).await.is_ok() {
            self.go_on(watch, known).await;
        }
    }

    async fn accepted(&mut self, at: Millis) -> Flow {
        let view = StatusView {
            id: &self.thread.stimulus,
            instance: &self.thread.key.instance,
            status: Status::Accepted,
            accepted_at: at,
            turn: None,
            reason: None,
        };
        let id = format!("{}:0", self.thread.stimulus);
        Ok(self.thread.sink.send(sse::event("accepted", Some(&id), &view)).await?)
    }

    async fn step(&mut self, step: &str) -> Flow {
        let view = StepView { stimulus: &self.thread.stimulus, step };
        Ok(self.thread.sink.send(sse::event("step", None, &view)).await?)
    }

    async fn restart(&mut self) -> Flow {
        let had = self.words.count > 0;
        self.words = Words::new(None);
        if had { self.step("restart").await } else { Ok(()) }
    }

    /// Words that come with the turn, as one piece.
    async fn add(&mut self, text: &str) -> Flow {
        if text.is_empty() {
            return Ok(());
        }
        let index = self.words.count;
        self.words.push(text);
        self.token(index, text).await
    }

    async fn token(&mut self, index: u64, text: &str) -> Flow {
        let view = TokenView { stimulus: &self.thread.stimulus, index, text };
        let id = self.words.id(&self.thread.stimulus);
        Ok(self.thread.sink.send(sse::event("token", Some(&id), &view)).await?)
    }
}

/// What is said of a stimulus that was given up.
pub fn dead_letter(key: &InstanceKey, dead: &DeadLetter) -> Refusal {
    Refusal::Dead {
        reason: dead.reason.clone(),
        tries: dead.tries,
        instance: key.instance.clone(),
        stimulus: dead.stimulus.id.clone(),
    }
}

/// What a receipt says is known.
pub fn known(receipt: instance::Receipt, stimulus: impl FnOnce() -> crate::types::Stimulus) -> Known {
    match receipt {
        instance::Receipt::Decided { turn, .. } => Known::Decided(turn),
        instance::Receipt::Accepted { .. } => Known::Waiting(Arc::new(stimulus())),
        instance::Receipt::Dead(dead) => Known::Dead(dead),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn draft(words: &[&str]) -> Vec<Arc<str>> {
        words.iter().map(|word| Arc::from(*word)).collect()
    }

    fn after(words: &[&str]) -> Words {
        let mut out = Words::new(None);
        for (index, word) in (0u64..).zip(words) {
            assert_eq!(out.next(index, word), Next::Send);
        }
        out
    }

    #[test]
    fn words_are_taken_once_and_in_order() {
        let mut words = after(&["a", "b"]);
        assert_eq!(words.next(1, "b"), Next::Skip);
        assert_eq!(words.next(3, "d"), Next::Gap);
        assert_eq!(words.next(2, "c"), Next::Send);
        assert_eq!(words, after(&["a", "b", "c"]));
    }

    #[test]
    fn a_stream_goes_on_only_where_it_left_off() {
        let words = after(&["a", "b"]);
        assert!(words.continues(&draft(&["a", "b"])) && words.continues(&draft(&["a", "b", "c"])));
        for other in [&["a"][..], &["a", "x", "c"], &["ab", ""], &[]] {
            assert!(!words.continues(&draft(other)), "{other:?}");
        }
        assert!(Words::new(None).continues(&draft(&[])));
    }

    #[test]
    fn with_the_turn_comes_what_the_client_lacks() {
        let words = after(&["he", "l"]);
        assert_eq!(words.rest_of("hello"), Rest::Behind("lo"));
        assert_eq!(
            (words.rest_of("hel"), words.rest_of("help!"), words.rest_of("he")),
            (Rest::None, Rest::Behind("p!"), Rest::Anew)
        );
        assert_eq!((words.rest_of("hallo"), words.rest_of("")), (Rest::Anew, Rest::Anew));
        assert_eq!(after(&[]).rest_of("hello"), Rest::None, "the turn says it");
        let before = Words { said: None, ..words };
        assert_eq!(before.rest_of("hello"), Rest::None, "an id of a build before does not say what it has");
    }

    #[test]
    fn the_id_of_an_event_says_what_the_client_has() {
        let stimulus = StimulusId::new("s-1").unwrap();
        let words = after(&["a", "b"]);
        let resume = Resume::parse(&words.id(&stimulus)).unwrap();
        assert_eq!((&resume.stimulus, Words::new(Some(resume.has))), (&stimulus, words));
        assert_eq!(Resume::parse("s-1:turn").unwrap().has, Has::Turn);
        assert_eq!(Words::new(Some(Resume::parse("s-1:0").unwrap().has)), Words::new(None));
        let before = Resume::parse("s-1:2:ab").unwrap();
        assert_eq!(Words::new(Some(before.has)).id(&stimulus), "s-1:2:ab", "of a build before");
        for bad in
            ["", "s-1", "s-1:", "s-1:x", "s-1:1", "s-1:1:zz", "s 1:0", "s-1:1:2:3", "s-1:1:2:3:z", "s-1:1:2:3:4:5"]
        {
            assert_eq!(Resume::parse(bad), None, "{bad}");
        }
    }
}
