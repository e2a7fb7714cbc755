//! Checkpoints: what a shelf is made of, kept in the store beside the log, so that the first question to a cold instance reads
//! that and the end of the log.
//!
//! Parts cover runs of turns and are made from the log, off the path of turns and questions, when enough came since the last one.
//! Any node may make them: they follow from the log alone. What is forgotten takes the parts it stands in along, in the
//! commit of the turn that forgets, and the store leaves out a part that was read before that.
//!
//! The index over the vectors is kept whole, by a node that has the shelf, whenever it was made anew or went with something that
//! was forgotten. Tests: `tests/it/memory_checkpoint.rs`.

use std::sync::Arc;

use bytes::Bytes;

use super::{Error, Memory, digest::Digest, index, part, shelves::Shared};
use crate::{
    store::{Done, Keep, Part, Piece, Rejection, Spans},
    telemetry::metric,
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
    /// is made again. The index is kept where that of the store is behind; without `all`, only of a shelf that is held anyway.
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
        let shelf = if all { Some(self.current(key).await?) } else { self.shelves.held(key) };
        if let Some(shelf) = shelf {
            self.keep_index(key, known.life, &shelf).await?;
        }
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
        let piece = Piece::Part(Part { after, upto, rec: Bytes::from(rec) });
        self.keep_piece(Keep { key: key.clone(), life, seen, piece }).await?;
        metrics::counter!(metric::MEMORY_PARTS, "result" => "written").increment(1);
        Ok(())
    }

    /// Keeps the index of a shelf, unless the store has one that knows as much.
    async fn keep_index(&self, key: &InstanceKey, life: i64, shared: &Shared) -> Result<(), Error> {
        let stored = self.spans(key).await?.index;
        let mut shelf = Arc::clone(shared).write_owned().await;
        if shelf.life != life || !shelf.is_unkept() {
            return Ok(());
        }
        let seen = shelf.turn;
        // Another node may have kept one since; one that did not fit here is none.
        if shelf.kept.is_some() && stored.is_some_and(|upto| upto >= seen) {
            shelf.kept = stored;
            return Ok(());
        }
        let shelf = shelf.downgrade();
        let made = tokio::task::spawn_blocking(move || index::encode(&shelf.plans()?));
        let Ok(Some(rec)) = made.await else { return Ok(()) };
        let piece = Piece::Index(Bytes::from(rec));
        self.keep_piece(Keep { key: key.clone(), life, seen, piece }).await?;
        metrics::counter!(metric::MEMORY_INDEXES, "result" => "written").increment(1);
        let mut shelf = shared.write().await;
        if shelf.life == life {
            shelf.kept = shelf.kept.max(Some(seen));
        }
        Ok(())
    }

    async fn keep_piece(&self, keep: Keep) -> Result<(), Error> {
        let (done, end) = Done::channel();
        self.store.keep(keep, done);
        match end.await {
            Ok(Ok(_)) => Ok(()),
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
