//! Recall on one shelf: which episodes count, their rankings by words and by vectors, each group of duplicates once.
//!
//! Filters that leave few are answered from these few; filters that leave many are looked at while a ranking is made. Pure.
//! Tests: `tests.rs`.

use std::{collections::HashSet, sync::atomic::Ordering};

use super::{
    super::{
        ask::{Asked, Known},
        fuse::{self, Hit, Place},
        vector::{Best, Matrix},
    },
    Map, NEVER, Note, OtherDimension, Shelf,
};
use crate::{
    store::rank,
    types::{Millis, id::stable_hash, memory::Vector},
};

/// Cosines below this say nothing, for the built-in embedder and for others.
const LEAST_LEXICAL: f32 = 0.2;
const LEAST_GIVEN: f32 = 0.05;
/// How deep the two rankings are fused.
const DEPTH: usize = 100;

impl Shelf {
    fn keeps(&self, known: &Known, tags: &Tags, slot: u32) -> bool {
        let note = &self.notes[slot as usize];
        let then = known.as_of.map_or(note.gone_at == NEVER, |at| note.recorded_at <= at.0 && note.gone_at > at.0);
        then && !note.forgotten
            && !note.repeat
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
        let few = if asked.known.narrows() { self.few(&tags, keep) } else { None };
        let depth = DEPTH.max(4 * asked.limit);
        let nearest = |matrix: &Option<Matrix>, query: &Option<Vector>, least| match (matrix, query) {
            (Some(matrix), Some(query)) => matrix.nearest(query, depth, least, few.as_deref(), keep),
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
        self.once_each(&mut ranked, keep);
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

    /// All slots that are to be kept, in order, when they are few enough to be looked at one by one.
    fn few(&self, tags: &Tags, keep: impl Fn(u32) -> bool) -> Option<Vec<u32>> {
        let gather = |slots: &mut dyn Iterator<Item = u32>| {
            let found: Vec<u32> = slots.filter(|slot| keep(*slot)).take(self.limit).collect();
            (found.len() < self.limit).then_some(found)
        };
        let slots = |tag: &u32| self.tagged[*tag as usize].1.iter().copied();
        match (&tags.all, &tags.any) {
            // A tag that is on no episode.
            (None, _) => Some(Vec::new()),
            (Some(all), _) if !all.is_empty() => {
                let rarest = all.iter().min_by_key(|tag| self.tagged[**tag as usize].1.len())?;
                gather(&mut slots(rarest))
            }
            (_, Some(any)) if any.iter().map(|tag| self.tagged[*tag as usize].1.len()).sum::<usize>() < self.limit => {
                let mut union: Vec<u32> = any.iter().flat_map(slots).collect();
                union.sort_unstable();
                union.dedup();
                gather(&mut union.into_iter())
            }
            _ => gather(&mut (0..u32::try_from(self.notes.len()).unwrap_or(u32::MAX))),
        }
    }

    /// How many were known at a time and are forgotten now.
    fn forgotten_since(&self, at: Millis) -> u64 {
        let then = |note: &&Note| note.forgotten && !note.repeat && note.recorded_at <= at.0 && note.gone_at > at.0;
        self.notes.iter().filter(then).count() as u64
    }

    /// Leaves the best of each group of duplicates, with how many of the others would have fitted.
    fn once_each(&self, ranked: &mut Vec<Hit>, keep: impl Fn(u32) -> bool) {
        let mut shown = HashSet::with_hasher(ahash::RandomState::new());
        ranked.retain_mut(|hit| {
            let root = self.notes[hit.slot as usize].root;
            let group = self.groups.get(&root);
            let fit = group.map_or(1, |group| group.iter().filter(|slot| keep(**slot)).count());
            hit.duplicates = u32::try_from(fit.saturating_sub(1)).unwrap_or(u32::MAX);
            shown.insert(root)
        });
    }

    /// BM25, as `store::rank`.
    #[allow(clippy::cast_precision_loss)] // counts far below 2^53
    fn by_words(&self, words: &[String], limit: usize, keep: impl Fn(u32) -> bool) -> Vec<(u32, f32)> {
        let lists: Vec<_> = words.iter().filter_map(|word| self.words.get(&stable_hash(word.bytes()))).collect();
        if lists.is_empty() {
            return Vec::new();
        }
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
                #[allow(clippy::cast_possible_truncation)] // a score
                let weight = rank::weight(rarity, posting.count.into(), posting.length.into(), mean) as f32;
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
