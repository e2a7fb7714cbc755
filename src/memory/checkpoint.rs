//! Checkpoints: what a shelf is made of, kept in the store beside the log, so that the first question to a cold instance reads
//! that and the end of the log.
//!
//! Parts cover runs of turns and are made from the log, off the path of turns and questions, when enough came since the last one.
//! Any node may make them: they follow from the log alone. What is forgotten takes the parts it stands in along, in the
//! commit of the turn that forgets, and the store leaves out a part that was read before that. Tests: `tests/it/memory_contract.rs`.

use std::sync::Arc;

use bytes::Bytes;

use super::{Error, Memory, digest::Digest, part};
use crate::{
    store::{Done, Keep, Part, Rejection, Spans},
    types::{InstanceKey, TurnRecord},
};

/// A part has so many episodes before it is closed; one turn may add as many as a turn has.
const PART: usize = 1024;
/// Fewer than this at the end of the log are not worth a part: reading them takes milliseconds.
pub(super) const LEAST: usize = 512;
/// Turns read at once.
const PAGE: usize = 16;

/// What stands in parts after a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// Parts that were written now.
    pub written: usize,
    /// Parts there are.
    pub parts: usize,
    /// The last turn they cover.
    pub upto: u64,
}

impl Memory {
    /// Brings the parts of an instance up to its log; with `all` also where that is little. A part that is missing between others
    /// is made again.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Store`].
    pub async fn checkpoint(&self, key: &InstanceKey, all: bool) -> Result<Checkpoint, Error> {
        let known = self.spans(key).await?;
        let (mut at, mut written) = (0, 0);
        for (after, upto) in &known.spans {
            if *after > at {
                written += self.fill(key, known.life, at, Some(*after), true).await?;
            }
            at = at.max(*upto);
        }
        written += self.fill(key, known.life, at, None, all).await?;
        let now = self.spans(key).await?;
        let upto = now.spans.iter().map(|(_, upto)| *upto).max().unwrap_or(0);
        Ok(Checkpoint { written, parts: now.spans.len(), upto })
    }

    async fn spans(&self, key: &InstanceKey) -> Result<Spans, Error> {
        let spans = self.store.spans(key).await?;
        if spans.life == 0 { Err(Error::NotFound) } else { Ok(spans) }
    }

    /// Makes parts of the turns behind one, up to another.
    async fn fill(
        &self,
        key: &InstanceKey,
        life: i64,
        from: u64,
        until: Option<u64>,
        all: bool,
    ) -> Result<usize, Error> {
        let (mut begin, mut at, mut written) = (from, from, 0);
        let mut turns: Vec<Arc<TurnRecord>> = Vec::new();
        // What is forgotten behind this turn is not seen by what is read from here on.
        let mut seen = self.spans(key).await?.head;
        loop {
            let page = self.store.remembered(key, at, PAGE).await?;
            if page.life != life {
                return Ok(written);
            }
            let full = page.turns.len() == PAGE;
            let within = page.turns.into_iter().filter(|turn| until.is_none_or(|until| turn.turn <= until));
            let before = turns.len();
            turns.extend(within);
            at = turns.last().map_or(at, |turn| turn.turn);
            let more = full && turns.len() == before + PAGE;
            while let Some(count) = portion(&turns, !more && all, !more) {
                let some: Vec<_> = turns.drain(..count).collect();
                let upto = some.last().map_or(begin, |turn| turn.turn);
                self.keep(key, life, seen, begin, some).await?;
                (begin, written) = (upto, written + 1);
            }
            if !more {
                return Ok(written);
            }
            if turns.is_empty() {
                seen = self.spans(key).await?.head;
            }
        }
    }

    async fn keep(
        &self,
        key: &InstanceKey,
        life: i64,
        seen: u64,
        after: u64,
        turns: Vec<Arc<TurnRecord>>,
    ) -> Result<(), Error> {
        let (lexical, upto) = (self.lexical, turns.last().map_or(after, |turn| turn.turn));
        let made = tokio::task::spawn_blocking(move || {
            let digests: Vec<Digest<'_>> = turns.iter().map(|turn| Digest::of(turn, lexical)).collect();
            part::encode(&digests, lexical)
        });
        let Ok(Some(rec)) = made.await else { return Ok(()) };
        let part = Part { after, upto, rec: Bytes::from(rec) };
        let (done, end) = Done::channel();
        self.store.keep(Keep { key: key.clone(), life, seen, part }, done);
        match end.await {
            Ok(Ok(_)) => {
                metrics::counter!(crate::telemetry::metric::MEMORY_PARTS, "result" => "written").increment(1);
                Ok(())
            }
            Ok(Err(Rejection::Failed(error))) => Err(error.into()),
            Ok(Err(_)) | Err(_) => Err(crate::store::Error::Closed.into()),
        }
    }

    /// Brings the parts of those up to date that were woken, until dropped.
    pub async fn checkpoints(&self) {
        loop {
            let key = self.stale.next().await;
            if let Err(error) = self.checkpoint(&key, false).await {
                tracing::debug!(instance = %key, %error, "a checkpoint waits for the next question");
            }
        }
    }

    /// Says that much was remembered by an instance.
    pub fn grown(&self, key: &InstanceKey) {
        self.stale.push(key);
    }
}

/// How many of these turns the next part takes; nothing when they are too few for one.
fn portion(turns: &[Arc<TurnRecord>], all: bool, last: bool) -> Option<usize> {
    let mut episodes = 0;
    for (at, turn) in turns.iter().enumerate() {
        episodes += turn.episodes.len().max(1);
        if episodes >= PART {
            return Some(at + 1);
        }
    }
    let enough = (all && !turns.is_empty()) || (last && episodes >= LEAST);
    enough.then_some(turns.len())
}
