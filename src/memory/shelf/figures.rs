//! How good and how large a memory is.
//!
//! Pure. Tests: `tests.rs`.

use std::sync::atomic::Ordering;

use super::{Held, Matrix, NEVER, Note, Shelf};
use crate::types::Millis;

/// Figures of a shelf.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Figures {
    /// Episodes that are known now.
    pub episodes: u64,
    /// Of these, duplicates of another one that is known.
    pub duplicates: u64,
    /// Of these, without meaning.
    pub junk: u64,
    /// Superseded by others; only `as_of` finds them.
    pub superseded: u64,
    /// Forgotten; nothing of them is left but when.
    pub forgotten: u64,
    /// Of these, with a vector of the client's or of a model.
    pub embedded: u64,
    /// Numbers of such a vector.
    pub dimension: Option<usize>,
    /// When the oldest and the newest known ones were recorded.
    pub oldest: Option<Millis>,
    /// The newest.
    pub newest: Option<Millis>,
    /// Sum of the rewards, and how many have one.
    pub rewards: (f64, u64),
    /// Mean age of what was recalled since it is in memory, in seconds.
    pub staleness: Option<f64>,
    /// Bytes in memory, about.
    pub bytes: usize,
    /// Whether vectors are found through an index.
    pub indexed: bool,
}

impl Shelf {
    /// The figures.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn figures(&self) -> Figures {
        let mut figures = Figures { bytes: self.bytes(), indexed: self.is_indexed(), ..Figures::default() };
        for (slot, note) in self.notes.iter().enumerate() {
            if note.repeat {
                continue;
            }
            if note.forgotten {
                figures.forgotten += 1;
            } else if note.gone_at != NEVER {
                figures.superseded += 1;
            } else {
                figures.episodes += 1;
                figures.duplicates += u64::from(note.root as usize != slot);
                figures.junk += u64::from(note.junk);
                figures.embedded += u64::from(note.embedded);
                let at = Millis(note.recorded_at);
                figures.oldest = Some(figures.oldest.map_or(at, |oldest| oldest.min(at)));
                figures.newest = Some(figures.newest.map_or(at, |newest| newest.max(at)));
                if !note.reward.is_nan() {
                    figures.rewards = (figures.rewards.0 + f64::from(note.reward), figures.rewards.1 + 1);
                }
            }
        }
        figures.dimension = self.dimension();
        let (count, ages) = (self.recalled.0.load(Ordering::Relaxed), self.recalled.1.load(Ordering::Relaxed));
        figures.staleness = (count > 0).then(|| ages as f64 / count as f64 / 1000.0);
        figures
    }

    /// About how many bytes it holds.
    pub(crate) fn bytes(&self) -> usize {
        let notes = self.notes.capacity() * size_of::<Note>();
        let words = self.words.len() * 48 + self.postings * 12;
        let tags = self.tagged.iter().map(|(name, slots)| 96 + 2 * name.len() + 4 * slots.capacity()).sum::<usize>();
        let texts = self.texts.capacity() * size_of::<Option<Held>>() + self.text_bytes;
        let groups = self.groups.values().map(|group| 48 + 4 * group.capacity()).sum::<usize>();
        let rest = self.lines.len() * 16 + self.same.len() * 24 + self.recent.len() * 600 + tags + texts + groups;
        let matrices: usize = self.lexical.iter().chain(&self.given).map(Matrix::bytes).sum();
        512 + notes + words + rest + matrices
    }
}
