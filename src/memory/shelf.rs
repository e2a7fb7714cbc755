//! An instance's episodes as recall needs them: notes, words and vectors, in memory, without the texts.
//!
//! A shelf follows the instance's turns that remembered or forgot something, from the first on, and holds nothing that does not
//! follow from them: two nodes that read the same turns have the same shelf. Slots are in the order of ids and never move;
//! of a forgotten episode only the note remains, with when it was recorded and when forgotten.
//!
//! Pure. Tests: `shelf/tests.rs`.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    ask::{Asked, Known},
    fuse::{self, Hit, Place},
    lexical,
    vector::{self, Best, Matrix},
};
use crate::{
    store::rank,
    types::{
        EpisodeDraft, EpisodeId, Millis, TurnRecord,
        id::stable_hash,
        memory::{Extra, Vector},
        words,
    },
};

/// How many episodes before it a new one is compared with by its vector.
const RECENT: usize = 64;
/// From this cosine on two episodes tell the same.
const SAME: f32 = 0.97;
/// Below so many words of meaning an episode without data is junk.
const MEANING: usize = 2;
/// Cosines below this say nothing, for the built-in embedder and for others.
const LEAST_LEXICAL: f32 = 0.2;
const LEAST_GIVEN: f32 = 0.05;
/// How deep the two rankings are fused.
const DEPTH: usize = 100;

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
}

#[derive(Debug, Clone, Copy)]
struct Posting {
    slot: u32,
    count: u32,
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

/// The shelf of one life of an instance.
#[derive(Debug)]
pub(crate) struct Shelf {
    /// Whose turns it follows: another life is another shelf.
    pub life: i64,
    /// The last turn it knows.
    pub turn: u64,
    limit: usize,
    notes: Vec<Note>,
    words: Map<u64, Vec<Posting>>,
    all_words: u64,
    tags: Map<Box<str>, u32>,
    /// By the lines of imports.
    lines: Map<u64, u32>,
    /// The first known episode with these words in this order.
    texts: Map<u64, u32>,
    recent: VecDeque<(u32, Vector)>,
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
            limit,
            notes: Vec::new(),
            words: Map::default(),
            all_words: 0,
            tags: Map::default(),
            lines: Map::default(),
            texts: Map::default(),
            recent: VecDeque::new(),
            lexical: lexical.then(|| Matrix::new(lexical::DIMENSION, limit)),
            given: None,
            postings: 0,
            vectors: Map::default(),
            bare: 0,
            recalled: (AtomicU64::new(0), AtomicU64::new(0)),
        }
    }

    /// Follows one more turn; tells what its episodes are.
    pub(crate) fn follow(&mut self, record: &TurnRecord) -> Vec<Kind> {
        self.turn = self.turn.max(record.turn);
        if record.is_marked() {
            self.embed(record);
        }
        let mut extras = record.extras().into_iter();
        let mut kinds = Vec::with_capacity(record.episodes.len());
        for (place, draft) in record.episodes.iter().enumerate() {
            let extra = extras.next().unwrap_or_default();
            kinds.extend(self.add(EpisodeId::new(record.turn, place), draft, &extra, record.decided_at));
        }
        self.lose(&record.forgotten().ids().collect::<Vec<_>>(), record.decided_at);
        kinds
    }

    /// Makes what is worth making when a run of turns was followed.
    pub(crate) fn settle(&mut self) {
        self.lexical.iter_mut().chain(&mut self.given).for_each(Matrix::settle);
    }

    fn add(&mut self, id: EpisodeId, draft: &EpisodeDraft, extra: &Extra, at: Millis) -> Option<Kind> {
        let slot = u32::try_from(self.notes.len()).ok()?;
        let note = Note {
            id,
            recorded_at: at.0,
            occurred_at: draft.occurred_at.unwrap_or(at).0,
            gone_at: NEVER,
            reward: draft.reward.unwrap_or(f32::NAN),
            length: 0,
            root: slot,
            tags: Box::default(),
            forgotten: false,
            undated: false,
            embedded: false,
            junk: false,
        };
        if draft.is_blank() {
            // Forgotten later on, by a turn that is still to come.
            self.notes.push(Note { forgotten: true, undated: true, ..note });
            return None;
        }
        let (counts, length) = rank::count_words(&draft.content, &draft.tags);
        let tags = draft.tags.iter().map(|tag| self.tag(tag)).collect();
        for (word, count) in counts {
            self.words.entry(stable_hash(word.bytes())).or_default().push(Posting { slot, count });
            self.postings += 1;
        }
        self.all_words += u64::from(length);
        let lexical = self.lexical.is_some().then(|| lexical::embed(&draft.content)).flatten();
        let vector =
            extra.embedding.as_ref().filter(|given| self.dimension().is_none_or(|has| has == given.dimension()));
        let root = self.root(slot, &draft.content, vector.or(lexical.as_ref()));
        let meaning = words::words(&draft.content).filter(|word| !words::is_filler(word)).take(MEANING).count();
        let junk = meaning < MEANING && draft.data.is_none();
        let embedded = vector.is_some();
        self.bare += usize::from(!embedded);
        self.notes.push(Note { length, tags, root, junk, embedded, ..note });
        if let (Some(matrix), Some(vector)) = (&mut self.lexical, &lexical) {
            matrix.push(slot, vector);
        }
        if let Some(vector) = vector {
            self.given.get_or_insert_with(|| Matrix::new(vector.dimension(), self.limit)).push(slot, vector);
        }
        for id in &extra.supersedes {
            if let Some(old) = self.slot(*id).filter(|old| *old != slot) {
                let note = &mut self.notes[old as usize];
                if !note.forgotten {
                    note.gone_at = note.gone_at.min(at.0);
                }
            }
        }
        if let Some(line) = &extra.line {
            self.lines.insert(stable_hash(line.bytes()), slot);
        }
        Some(if root != slot {
            Kind::Duplicate
        } else if junk {
            Kind::Junk
        } else {
            Kind::Fresh
        })
    }

    /// Takes the vectors of earlier episodes.
    fn embed(&mut self, record: &TurnRecord) {
        for (place, extra) in record.extras().into_iter().enumerate() {
            let Some(slot) = extra.of.and_then(|of| self.slot(of)) else { continue };
            let note = &mut self.notes[slot as usize];
            if note.embedded || note.forgotten {
                continue;
            }
            note.embedded = true;
            self.bare = self.bare.saturating_sub(1);
            if let Some(vector) = &extra.embedding {
                self.vectors.insert(slot, EpisodeId::new(record.turn, place));
                self.given.get_or_insert_with(|| Matrix::new(vector.dimension(), self.limit)).push(slot, vector);
            }
        }
    }

    /// Known episodes without a given vector, the newest first, at most so many.
    pub(crate) fn bare(&self, limit: usize) -> Vec<EpisodeId> {
        if self.bare == 0 {
            return Vec::new();
        }
        let bare = self.notes.iter().rev().filter(|note| !note.embedded && !note.forgotten);
        bare.take(limit).map(|note| note.id).collect()
    }

    /// With the places where vectors of these episodes stand in later turns; in order.
    pub(crate) fn with_vectors(&self, mut ids: Vec<EpisodeId>) -> Vec<EpisodeId> {
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
        let number = u32::try_from(self.tags.len()).unwrap_or(u32::MAX);
        self.tags.insert(tag.into(), number);
        number
    }

    /// The first of the group of those that tell the same, by their words or by their vectors.
    fn root(&mut self, slot: u32, text: &str, vector: Option<&Vector>) -> u32 {
        let hash = words::words(text).fold(0u64, |hash, word| hash.rotate_left(9) ^ stable_hash(word.bytes()));
        let first = self.texts.get(&hash).copied();
        let near = || {
            let vector = vector?;
            let (other, cosine) = self
                .recent
                .iter()
                .filter(|(_, other)| other.dimension() == vector.dimension())
                .map(|(slot, other)| (*slot, vector::cosine(vector, other)))
                .max_by(|a, b| a.1.total_cmp(&b.1))?;
            (cosine >= SAME).then_some(other)
        };
        let like = first.or_else(near);
        let known = like.and_then(|like| self.notes.get(like as usize)).filter(|note| !note.forgotten);
        let root = known.map_or(slot, |note| note.root);
        self.texts.entry(hash).or_insert(slot);
        if let Some(vector) = vector {
            if self.recent.len() == RECENT {
                self.recent.pop_front();
            }
            self.recent.push_back((slot, vector.clone()));
        }
        root
    }

    fn lose(&mut self, ids: &[EpisodeId], at: Millis) {
        let mut slots: Vec<u32> = ids.iter().filter_map(|id| self.slot(*id)).collect();
        slots.sort_unstable();
        if slots.is_empty() {
            return;
        }
        for slot in &slots {
            let note = &mut self.notes[*slot as usize];
            if !note.forgotten || note.undated {
                note.gone_at = at.0;
            }
            self.bare -= usize::from(!note.forgotten && !note.embedded).min(self.bare);
            (note.forgotten, note.undated) = (true, false);
            note.tags = Box::default();
            note.reward = f32::NAN;
            note.occurred_at = note.recorded_at;
            self.all_words = self.all_words.saturating_sub(note.length.into());
            note.length = 0;
        }
        let is_gone = |slot: u32| slots.binary_search(&slot).is_ok();
        self.words.retain(|_, list| {
            list.retain(|posting| !is_gone(posting.slot));
            !list.is_empty()
        });
        self.postings = self.words.values().map(Vec::len).sum();
        self.texts.retain(|_, slot| !is_gone(*slot));
        self.recent.retain(|(slot, _)| !is_gone(*slot));
        self.lexical.iter_mut().chain(&mut self.given).for_each(|matrix| matrix.remove(&slots));
        self.regroup(&slots);
    }

    /// A group whose first one is gone gathers around the next.
    fn regroup(&mut self, gone: &[u32]) {
        let mut next: Map<u32, u32> = Map::default();
        for slot in 0..self.notes.len() {
            let root = self.notes[slot].root;
            if gone.binary_search(&root).is_ok() && !self.notes[slot].forgotten {
                #[allow(clippy::cast_possible_truncation)] // slots are 32 bits
                let first = *next.entry(root).or_insert(slot as u32);
                self.notes[slot].root = first;
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

    /// The episode that came from a line of an import. One that was forgotten since came from it all the same.
    pub(crate) fn imported(&self, line: &str) -> Option<EpisodeId> {
        self.lines.get(&stable_hash(line.bytes())).map(|slot| self.notes[*slot as usize].id)
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

    fn keeps(&self, known: &Known, tags: &Tags, slot: u32) -> bool {
        let note = &self.notes[slot as usize];
        let then = known.as_of.map_or(note.gone_at == NEVER, |at| note.recorded_at <= at.0 && note.gone_at > at.0);
        then && !note.forgotten
            && known.min_reward.is_none_or(|least| note.reward >= least)
            && known.after.is_none_or(|after| note.occurred_at >= after.0)
            && known.before.is_none_or(|before| note.occurred_at < before.0)
            && tags.fit(&note.tags)
    }

    /// What is asked for, best first, and how many episodes known at that time were forgotten since.
    pub(crate) fn search(&self, asked: &Asked) -> Result<(Vec<Hit>, u64), OtherDimension> {
        if let (Some(given), Some(has)) = (asked.given.as_ref().map(Vector::dimension), self.dimension())
            && given != has
            && !asked.ours
        {
            return Err(OtherDimension { has, given });
        }
        let tags = Tags::of(&asked.known, &self.tags);
        let keep = |slot: u32| self.keeps(&asked.known, &tags, slot);
        let all = asked.known.narrows() && self.is_indexed() && self.count_up_to(self.limit, keep) < self.limit;
        let depth = DEPTH.max(4 * asked.limit);
        let nearest = |matrix: &Option<Matrix>, query: &Option<Vector>, least| match (matrix, query) {
            (Some(matrix), Some(query)) => matrix.nearest(query, depth, least, all, keep),
            _ => Vec::new(),
        };
        let by_words = self.by_words(&asked.words, depth, keep);
        let by_text = nearest(&self.lexical, &asked.lexical, LEAST_LEXICAL);
        let by_vector = nearest(&self.given, &asked.given, LEAST_GIVEN);
        let place = |slot: u32| {
            let note = &self.notes[slot as usize];
            Place { occurred_at: Millis(note.occurred_at), reward: (!note.reward.is_nan()).then_some(note.reward) }
        };
        let mut ranked = fuse::fuse([by_words, by_text, by_vector], asked.now, place);
        self.once_each(&mut ranked, &asked.known, &tags);
        ranked.truncate(asked.limit);
        for hit in &mut ranked {
            let note = &self.notes[hit.slot as usize];
            hit.id = note.id;
            let age = asked.now.0.saturating_sub(note.recorded_at).max(0).unsigned_abs();
            self.recalled.0.fetch_add(1, Ordering::Relaxed);
            self.recalled.1.fetch_add(age, Ordering::Relaxed);
        }
        Ok((ranked, asked.known.as_of.map_or(0, |at| self.forgotten_since(at))))
    }

    fn is_indexed(&self) -> bool {
        self.lexical.iter().chain(&self.given).any(Matrix::is_indexed)
    }

    fn count_up_to(&self, most: usize, keep: impl Fn(u32) -> bool) -> usize {
        (0..u32::try_from(self.notes.len()).unwrap_or(u32::MAX)).filter(|slot| keep(*slot)).take(most).count()
    }

    /// How many were known at a time and are forgotten now.
    fn forgotten_since(&self, at: Millis) -> u64 {
        let then = |note: &&Note| note.forgotten && note.recorded_at <= at.0 && note.gone_at > at.0;
        self.notes.iter().filter(then).count() as u64
    }

    /// Leaves the best of each group of duplicates, with how many of the others would have fitted.
    fn once_each(&self, ranked: &mut Vec<Hit>, known: &Known, tags: &Tags) {
        let mut shown = HashSet::with_hasher(ahash::RandomState::new());
        ranked.retain(|hit| shown.insert(self.notes[hit.slot as usize].root));
        let mut others: Map<u32, u32> = Map::default();
        if self.notes.iter().enumerate().any(|(slot, note)| note.root as usize != slot) {
            for slot in 0..u32::try_from(self.notes.len()).unwrap_or(u32::MAX) {
                let root = self.notes[slot as usize].root;
                if shown.contains(&root) && self.keeps(known, tags, slot) {
                    *others.entry(root).or_default() += 1;
                }
            }
        }
        for hit in ranked {
            hit.duplicates = others.get(&self.notes[hit.slot as usize].root).map_or(0, |all| all.saturating_sub(1));
        }
    }

    /// BM25, as `store::rank`.
    #[allow(clippy::cast_precision_loss)] // counts far below 2^53
    fn by_words(&self, words: &[String], limit: usize, keep: impl Fn(u32) -> bool) -> Vec<(u32, f32)> {
        let lists = words.iter().filter_map(|word| self.words.get(&stable_hash(word.bytes())));
        let episodes = self.notes.len().max(1) as f64;
        let mean = (self.all_words as f64 / episodes).max(1.0);
        let mut scores = vec![0f32; self.notes.len()];
        let mut touched = Vec::new();
        for list in lists {
            let rarity = rank::rarity(episodes, list.len() as f64);
            for posting in list {
                let score = &mut scores[posting.slot as usize];
                if *score == 0.0 {
                    touched.push(posting.slot);
                }
                let length = self.notes[posting.slot as usize].length;
                #[allow(clippy::cast_possible_truncation)] // a score
                let weight = rank::weight(rarity, posting.count, length, mean) as f32;
                *score += weight;
            }
        }
        let mut best = Best::new(limit);
        for slot in touched {
            let score = scores[slot as usize];
            if best.wants(score) && keep(slot) {
                best.offer(slot, score);
            }
        }
        best.finish()
    }

    /// The known episodes that `wanted` names, oldest first.
    pub(crate) fn pick(&self, wanted: impl Fn(&Standing) -> bool) -> Vec<EpisodeId> {
        let tags: HashMap<u32, &str> = self.tags.iter().map(|(tag, number)| (*number, &**tag)).collect();
        let standing = |note: &Note| Standing {
            id: note.id,
            occurred_at: Millis(note.occurred_at),
            reward: (!note.reward.is_nan()).then_some(note.reward),
            tags: note.tags.iter().filter_map(|tag| tags.get(tag).copied()).collect(),
        };
        self.notes.iter().filter(|note| !note.forgotten && wanted(&standing(note))).map(|note| note.id).collect()
    }

    /// The figures.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn figures(&self) -> Figures {
        let mut figures = Figures { bytes: self.bytes(), indexed: self.is_indexed(), ..Figures::default() };
        for (slot, note) in self.notes.iter().enumerate() {
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
        let rest = self.tags.len() * 64 + self.lines.len() * 16 + self.texts.len() * 24 + self.recent.len() * 600;
        let matrices: usize = self.lexical.iter().chain(&self.given).map(Matrix::bytes).sum();
        512 + notes + words + rest + matrices
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
}

/// The tags that are asked for, as this shelf numbers them.
struct Tags {
    any: Option<Vec<u32>>,
    /// `None` where one of them is on no episode.
    all: Option<Vec<u32>>,
}

impl Tags {
    fn of(known: &Known, numbers: &Map<Box<str>, u32>) -> Self {
        let number = |tag: &String| numbers.get(tag.as_str()).copied();
        let any = (!known.tags_any.is_empty()).then(|| known.tags_any.iter().filter_map(number).collect());
        Self { any, all: known.tags_all.iter().map(number).collect() }
    }

    fn fit(&self, tags: &[u32]) -> bool {
        self.any.as_ref().is_none_or(|any| any.iter().any(|tag| tags.contains(tag)))
            && self.all.as_ref().is_some_and(|all| all.iter().all(|tag| tags.contains(tag)))
    }
}

#[cfg(test)]
mod tests;
