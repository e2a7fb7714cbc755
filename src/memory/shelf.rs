//! An instance's episodes as recall needs them: notes, words, vectors and short texts, in memory.
//!
//! A shelf follows the instance's turns that remembered or forgot something, from the first on, and holds nothing that does not
//! follow from them: two nodes that read the same turns have the same shelf. Slots are in the order of ids and never move;
//! of a forgotten episode only the note remains, with when it was recorded and when forgotten. An episode from a line of an
//! import that had become one before is a repeat: nobody recalls it.
//!
//! Pure. Not here: `search`, what an import asks (`known`). Tests: `shelf/tests.rs`.

use std::{
    collections::{HashMap, VecDeque},
    sync::atomic::AtomicU64,
};

use super::{
    digest::{Digest, Planes, Trace},
    vector::{self, Coarse, Matrix},
};
use crate::{
    store::Episode,
    types::{EpisodeId, Millis, RawJson, TurnRecord},
};

mod figures;
mod kept;
mod known;
mod search;

pub use figures::Figures;

/// How many episodes before it a new one is compared with by its vector.
const RECENT: usize = 64;
/// From this cosine on two episodes tell the same.
const SAME: f32 = 0.97;
/// When nothing ended it.
const NEVER: i64 = i64::MAX;

/// What is kept of each episode.
#[derive(Debug, Clone)]
struct Note {
    id: EpisodeId,
    recorded_at: i64,
    occurred_at: i64,
    /// When it was forgotten or superseded.
    gone_at: i64,
    /// NaN where there is none.
    reward: f32,
    /// Words of its text.
    length: u32,
    /// The first of its group of duplicates; itself where there is none.
    root: u32,
    tags: Box<[u32]>,
    forgotten: bool,
    /// Forgotten, and the turn that forgot it was not met yet.
    undated: bool,
    /// Has a given vector, or was asked about in vain.
    embedded: bool,
    junk: bool,
    /// Of a line that had become an episode before.
    repeat: bool,
}

#[derive(Debug, Clone, Copy)]
struct Posting {
    slot: u32,
    count: u16,
    /// Words of the episode.
    length: u16,
}

/// A text that is held: content, then data from `data` on.
#[derive(Debug, Clone)]
struct Held {
    text: Box<str>,
    data: Option<u32>,
}

type Map<K, V> = HashMap<K, V, ahash::RandomState>;

/// What an episode is, among those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// New.
    Fresh,
    /// Tells what another one told.
    Duplicate,
    /// Tells nothing.
    Junk,
}

/// A vector that cannot be compared with the others of its instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OtherDimension {
    /// Of the instance's vectors.
    pub has: usize,
    /// Of this one.
    pub given: usize,
}

/// The shelf of one life of an instance.
#[derive(Debug)]
pub(crate) struct Shelf {
    /// Whose turns it follows: another life is another shelf.
    pub life: i64,
    /// The last turn it knows.
    pub turn: u64,
    /// Episodes it read from the log since parts were asked for.
    pub read: usize,
    /// Whether it was complete once: what comes now is new.
    pub live: bool,
    /// The last turn that the index in the store knows.
    pub kept: Option<u64>,
    /// The last turn after which the index was made anew, or that forgot something, which took that in the store along.
    since: u64,
    limit: usize,
    notes: Vec<Note>,
    words: Map<u64, Vec<Posting>>,
    all_words: u64,
    tags: Map<Box<str>, u32>,
    /// Of each tag its name, and the slots that have it, in order.
    tagged: Vec<(Box<str>, Vec<u32>)>,
    /// By the lines of imports.
    lines: Map<u64, u32>,
    /// By slot.
    texts: Vec<Option<Held>>,
    text_bytes: usize,
    /// The first known episode with these words in this order.
    same: Map<u64, u32>,
    /// The last ones with a vector, as their coarse planes.
    recent: VecDeque<(u32, f32, Box<[i8]>)>,
    /// Of duplicates and repeats by their first one: all of them, the first included, in order.
    groups: Map<u32, Vec<u32>>,
    repeats: Map<u32, Vec<u32>>,
    lexical: Option<Matrix>,
    given: Option<Matrix>,
    postings: usize,
    /// Where the vectors stand that came later.
    vectors: Map<u32, EpisodeId>,
    /// How many known episodes have no given vector.
    bare: usize,
    /// Of what was recalled: how many, and their ages in milliseconds together.
    recalled: (AtomicU64, AtomicU64),
}

impl Shelf {
    /// Of a life, before its first turn. With `lexical` each text gets a vector of the built-in embedder. More than `limit`
    /// vectors are found through an index.
    pub(crate) fn new(life: i64, lexical: bool, limit: usize) -> Self {
        Self {
            life,
            turn: 0,
            read: 0,
            live: false,
            kept: None,
            since: 0,
            limit,
            notes: Vec::new(),
            words: Map::default(),
            all_words: 0,
            tags: Map::default(),
            tagged: Vec::new(),
            lines: Map::default(),
            texts: Vec::new(),
            text_bytes: 0,
            same: Map::default(),
            recent: VecDeque::new(),
            groups: Map::default(),
            repeats: Map::default(),
            lexical: lexical.then(|| Matrix::new(super::lexical::DIMENSION, limit, false)),
            given: None,
            postings: 0,
            vectors: Map::default(),
            bare: 0,
            recalled: (AtomicU64::new(0), AtomicU64::new(0)),
        }
    }

    /// Follows one more turn; tells what its episodes are.
    pub(crate) fn follow(&mut self, record: &TurnRecord) -> Vec<Kind> {
        self.read += record.episodes.len();
        self.take(&Digest::of(record, self.lexical.is_some()))
    }

    /// Follows one more turn by its digest.
    pub(crate) fn take(&mut self, digest: &Digest<'_>) -> Vec<Kind> {
        self.turn = self.turn.max(digest.turn);
        self.embed(digest);
        let mut kinds = Vec::with_capacity(digest.traces.len());
        for (place, trace) in digest.traces.iter().enumerate() {
            kinds.extend(self.add(EpisodeId::new(digest.turn, place), trace.as_ref(), digest.at));
        }
        if !digest.forgot.is_empty() {
            self.since = self.since.max(digest.turn);
            self.lose(&digest.forgotten().collect::<Vec<_>>(), Millis(digest.at));
        }
        kinds
    }

    fn add(&mut self, id: EpisodeId, trace: Option<&Trace<'_>>, at: i64) -> Option<Kind> {
        let slot = u32::try_from(self.notes.len()).ok()?;
        let note = Note {
            id,
            recorded_at: at,
            occurred_at: at,
            gone_at: NEVER,
            reward: f32::NAN,
            length: 0,
            root: slot,
            tags: Box::default(),
            forgotten: false,
            undated: false,
            embedded: false,
            junk: false,
            repeat: false,
        };
        let Some(trace) = trace else {
            // Forgotten later on, by a turn that is still to come.
            self.notes.push(Note { forgotten: true, undated: true, ..note });
            self.texts.push(None);
            return None;
        };
        let occurred_at = trace.occurred_at.unwrap_or(at);
        let reward = trace.reward.unwrap_or(f32::NAN);
        let tags: Box<[u32]> = trace.tags.iter().map(|tag| self.tag(tag)).collect();
        let note = Note { occurred_at, reward, length: trace.length, tags, junk: trace.junk, ..note };
        if let Some(first) = trace.line.and_then(|line| self.lines.get(&line)) {
            self.repeats.entry(*first).or_default().push(slot);
            self.notes.push(Note { repeat: true, ..note });
            self.texts.push(None);
            return None;
        }
        self.index(slot, &note, trace);
        let root = self.root(slot, trace);
        if root != slot {
            self.groups.entry(root).or_insert_with(|| vec![root]).push(slot);
        }
        let embedded = self.give(slot, trace.given.as_ref());
        self.bare += usize::from(!embedded);
        let junk = note.junk;
        self.notes.push(Note { root, embedded, ..note });
        let held = trace.text.as_ref().map(|text| self.hold(text));
        self.texts.push(held);
        for id in &trace.supersedes {
            if let Some(old) = self.slot(EpisodeId(*id)).filter(|old| *old != slot) {
                let note = &mut self.notes[old as usize];
                if !note.forgotten {
                    note.gone_at = note.gone_at.min(at);
                }
            }
        }
        if let Some(line) = trace.line {
            self.lines.insert(line, slot);
        }
        Some(if root != slot {
            Kind::Duplicate
        } else if junk {
            Kind::Junk
        } else {
            Kind::Fresh
        })
    }

    /// Its words, tags and built-in vector.
    fn index(&mut self, slot: u32, note: &Note, trace: &Trace<'_>) {
        let length = u16::try_from(trace.length).unwrap_or(u16::MAX);
        for (word, count) in &trace.words {
            self.words.entry(*word).or_default().push(Posting { slot, count: *count, length });
        }
        self.postings += trace.words.len();
        self.all_words += u64::from(trace.length);
        for tag in &note.tags {
            let slots = &mut self.tagged[*tag as usize].1;
            if slots.last() != Some(&slot) {
                slots.push(slot);
            }
        }
        if let (Some(matrix), Some(planes)) = (&mut self.lexical, &trace.lexical) {
            matrix.push(slot, planes.scale, planes.numbers(), &[]);
        }
    }

    /// Takes a given vector; whether it can be compared with the others.
    fn give(&mut self, slot: u32, planes: Option<&Planes<'_>>) -> bool {
        let Some(planes) = planes else { return false };
        let numbers = planes.numbers();
        let (high, low) = numbers.split_at(numbers.len() / 2);
        let matrix = self.given.get_or_insert_with(|| Matrix::new(high.len(), self.limit, true));
        matrix.push(slot, planes.scale, high, low);
        matrix.dimension() == high.len()
    }

    fn hold(&mut self, text: &super::digest::Text<'_>) -> Held {
        let data = text.data.and(u32::try_from(text.content.len()).ok());
        let held: Box<str> = text.data.map_or_else(|| text.content.into(), |data| [text.content, data].concat().into());
        self.text_bytes += held.len();
        Held { text: held, data }
    }

    /// Takes the vectors of earlier episodes.
    fn embed(&mut self, digest: &Digest<'_>) {
        for late in &digest.late {
            let Some(slot) = self.slot(EpisodeId(late.of)) else { continue };
            let note = &mut self.notes[slot as usize];
            if note.embedded || note.forgotten {
                continue;
            }
            note.embedded = true;
            self.bare = self.bare.saturating_sub(usize::from(!note.repeat));
            if let Some(planes) = &late.given {
                self.vectors.insert(slot, EpisodeId::new(digest.turn, late.place as usize));
                self.give(slot, Some(planes));
            }
        }
    }

    /// Known episodes without a given vector, the newest first, at most so many.
    pub(crate) fn bare(&self, limit: usize) -> Vec<EpisodeId> {
        if self.bare == 0 {
            return Vec::new();
        }
        let bare = self.notes.iter().rev().filter(|note| !note.embedded && !note.forgotten && !note.repeat);
        bare.take(limit).map(|note| note.id).collect()
    }

    /// With repeats of these episodes, and the places where vectors of theirs stand in later turns; in order.
    pub(crate) fn with_vectors(&self, mut ids: Vec<EpisodeId>) -> Vec<EpisodeId> {
        let again = ids.iter().filter_map(|id| self.repeats.get(&self.slot(*id)?)).flatten();
        let again: Vec<EpisodeId> = again.map(|slot| self.notes[*slot as usize].id).collect();
        ids.extend(again);
        let later: Vec<EpisodeId> = ids.iter().filter_map(|id| self.vectors.get(&self.slot(*id)?).copied()).collect();
        ids.extend(later);
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    fn tag(&mut self, tag: &str) -> u32 {
        if let Some(known) = self.tags.get(tag) {
            return *known;
        }
        let number = u32::try_from(self.tagged.len()).unwrap_or(u32::MAX);
        self.tags.insert(tag.into(), number);
        self.tagged.push((tag.into(), Vec::new()));
        number
    }

    /// The first of the group of those that tell the same, by their words or by their vectors.
    fn root(&mut self, slot: u32, trace: &Trace<'_>) -> u32 {
        let first = self.same.get(&trace.same).copied();
        let dimension = self.dimension();
        let given = trace.given.as_ref().filter(|given| dimension.is_none_or(|has| 2 * has == given.planes.len()));
        let vector = given.map(|planes| (planes, planes.planes.len() / 2));
        let vector = vector.or_else(|| trace.lexical.as_ref().map(|planes| (planes, planes.planes.len())));
        let vector =
            vector.map(|(planes, dimension)| (planes.scale, Box::<[i8]>::from(&planes.numbers()[..dimension])));
        let near = || {
            let (scale, high) = vector.as_ref()?;
            let alike = || self.recent.iter().filter(|(_, _, other)| other.len() == high.len());
            let others = alike().map(|(_, scale, high)| Coarse { scale: *scale, high });
            let (at, cosine) = vector::nearest(Coarse { scale: *scale, high }, others)?;
            if cosine >= SAME { Some(alike().nth(at)?.0) } else { None }
        };
        let like = first.or_else(near);
        let known = like.and_then(|like| self.notes.get(like as usize)).filter(|note| !note.forgotten);
        let root = known.map_or(slot, |note| note.root);
        self.same.entry(trace.same).or_insert(slot);
        if let Some((scale, high)) = vector {
            if self.recent.len() == RECENT {
                self.recent.pop_front();
            }
            self.recent.push_back((slot, scale, high));
        }
        root
    }

    fn lose(&mut self, ids: &[EpisodeId], at: Millis) {
        let mut slots: Vec<u32> = ids.iter().filter_map(|id| self.slot(*id)).collect();
        slots.sort_unstable();
        // Of one that was forgotten before it was met nothing else is here.
        slots.retain(|slot| {
            let note = &mut self.notes[*slot as usize];
            if note.undated {
                (note.gone_at, note.undated) = (at.0, false);
            }
            !note.forgotten
        });
        if slots.is_empty() {
            return;
        }
        for slot in &slots {
            let note = &mut self.notes[*slot as usize];
            note.gone_at = at.0;
            self.bare -= usize::from(!note.embedded && !note.repeat).min(self.bare);
            note.forgotten = true;
            note.tags = Box::default();
            note.reward = f32::NAN;
            note.occurred_at = note.recorded_at;
            self.all_words = self.all_words.saturating_sub(if note.repeat { 0 } else { note.length.into() });
            note.length = 0;
            if let Some(held) = self.texts[*slot as usize].take() {
                self.text_bytes -= held.text.len();
            }
        }
        let is_gone = |slot: u32| slots.binary_search(&slot).is_ok();
        self.words.retain(|_, list| {
            list.retain(|posting| !is_gone(posting.slot));
            !list.is_empty()
        });
        self.postings = self.words.values().map(Vec::len).sum();
        self.tagged.iter_mut().for_each(|(_, tagged)| tagged.retain(|slot| !is_gone(*slot)));
        self.same.retain(|_, slot| !is_gone(*slot));
        self.recent.retain(|(slot, ..)| !is_gone(*slot));
        self.lexical.iter_mut().chain(&mut self.given).for_each(|matrix| matrix.remove(&slots));
        self.regroup(&slots);
    }

    /// Groups without what is gone. One whose first is gone gathers around the next.
    fn regroup(&mut self, gone: &[u32]) {
        let mut roots: Vec<u32> = gone.iter().map(|slot| self.notes[*slot as usize].root).collect();
        roots.sort_unstable();
        roots.dedup();
        for root in roots {
            let Some(mut group) = self.groups.remove(&root) else { continue };
            group.retain(|slot| !self.notes[*slot as usize].forgotten);
            let Some(first) = group.first().copied() else { continue };
            group.iter().for_each(|slot| self.notes[*slot as usize].root = first);
            if group.len() > 1 {
                self.groups.insert(first, group);
            }
        }
    }

    fn slot(&self, id: EpisodeId) -> Option<u32> {
        let at = self.notes.binary_search_by_key(&id, |note| note.id).ok()?;
        u32::try_from(at).ok()
    }

    /// Numbers of the vectors that were given.
    pub(crate) fn dimension(&self) -> Option<usize> {
        self.given.as_ref().map(Matrix::dimension)
    }

    /// How many episodes it knows, forgotten ones included.
    pub(crate) fn len(&self) -> usize {
        self.notes.len()
    }

    /// The episode this one repeats, when that is known.
    pub(crate) fn duplicate_of(&self, id: EpisodeId) -> Option<EpisodeId> {
        let note = &self.notes[self.slot(id)? as usize];
        let root = &self.notes[note.root as usize];
        (root.id != id).then_some(root.id)
    }

    /// Since when an episode holds no longer.
    pub(crate) fn superseded_at(&self, id: EpisodeId) -> Option<Millis> {
        let note = &self.notes[self.slot(id)? as usize];
        (note.gone_at != NEVER).then_some(Millis(note.gone_at))
    }

    /// An episode as it was remembered, where its text is held.
    pub(crate) fn episode(&self, slot: u32) -> Option<Episode> {
        let (note, held) = (self.notes.get(slot as usize)?, self.texts.get(slot as usize)?.as_ref()?);
        let split = held.data.map_or(held.text.len(), |data| data as usize);
        let data = held.data.map(|_| RawJson::parse(&held.text[split..])).transpose().ok()?;
        Some(Episode {
            id: note.id.0,
            turn: note.id.turn(),
            content: held.text[..split].to_owned(),
            data,
            tags: note.tags.iter().map(|tag| self.tagged[*tag as usize].0.clone().into()).collect(),
            reward: (!note.reward.is_nan()).then_some(note.reward),
            occurred_at: Millis(note.occurred_at),
            recorded_at: Millis(note.recorded_at),
            score: 0.0,
        })
    }

    /// The known episodes that `wanted` names, oldest first.
    pub(crate) fn pick(&self, wanted: impl Fn(&Standing) -> bool) -> Vec<EpisodeId> {
        let standing = |note: &Note| Standing {
            id: note.id,
            occurred_at: Millis(note.occurred_at),
            reward: (!note.reward.is_nan()).then_some(note.reward),
            tags: note.tags.iter().map(|tag| &*self.tagged[*tag as usize].0).collect(),
            repeat: note.repeat,
        };
        self.notes.iter().filter(|note| !note.forgotten && wanted(&standing(note))).map(|note| note.id).collect()
    }
}

/// An episode as prune and forget look at it.
#[derive(Debug, Clone)]
pub(crate) struct Standing<'a> {
    /// Which.
    pub id: EpisodeId,
    /// When it happened.
    pub occurred_at: Millis,
    /// How good it was.
    pub reward: Option<f32>,
    /// Its labels.
    pub tags: Vec<&'a str>,
    /// Of a line of an import that had become an episode before.
    pub repeat: bool,
}

#[cfg(test)]
mod tests;
