//! Several rankings made one: reciprocal rank fusion (Cormack, Clarke and Büttcher 2009), then recency and reward.
//!
//! Ranks, not scores, are added: BM25 and cosines have no common scale. What happened lately and what was good counts a little
//! more; neither lifts what does not fit over what does by far. Pure. Tests: at the foot.

use std::collections::HashMap;

use crate::types::{EpisodeId, Millis};

/// The constant of the method: how fast a place counts less.
const K: f64 = 60.0;
/// What the words, the built-in vectors and given vectors count. The built-in ones see the same letters as the words do.
const WEIGHTS: [f64; 3] = [1.0, 0.6, 1.0];
/// The most recency adds.
const RECENCY: f64 = 0.15;
/// After so many milliseconds recency is worth half.
const HALF_LIFE: f64 = 30.0 * 24.0 * 3600.0 * 1000.0;
/// The most a reward of 1 adds; one of -1 takes as much.
const REWARD: f64 = 0.15;

/// What an episode brings along.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// When it happened.
    pub occurred_at: Millis,
    /// How good it was.
    pub reward: Option<f32>,
}

/// A place in one ranking.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ranked {
    /// From 1.
    pub rank: usize,
    /// BM25, or a cosine.
    pub score: f32,
}

/// Why an episode has its score.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Explained {
    /// Its place by the words it shares with the query.
    pub words: Option<Ranked>,
    /// Its place by the built-in embedder.
    pub text: Option<Ranked>,
    /// Its place by a given vector, or a model's.
    pub vector: Option<Ranked>,
    /// The places together, 1 at best.
    pub fused: f64,
    /// What recency multiplies it by.
    pub recency: f64,
    /// What its reward multiplies it by.
    pub reward: f64,
}

/// An episode that fits.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Hit {
    pub slot: u32,
    pub id: EpisodeId,
    pub score: f64,
    /// Others that tell the same and fit too.
    pub duplicates: u32,
    pub explained: Explained,
}

/// The hits of rankings by words, built-in vectors and given vectors, best first; of equals the newer first.
pub(crate) fn fuse(rankings: [Vec<(u32, f32)>; 3], now: Millis, place: impl Fn(u32) -> Place) -> Vec<Hit> {
    let used = rankings.iter().zip(WEIGHTS).filter(|(ranking, _)| !ranking.is_empty());
    let most: f64 = used.map(|(_, weight)| weight / (K + 1.0)).sum();
    let mut found: HashMap<u32, Explained, ahash::RandomState> = HashMap::default();
    for (which, (ranking, weight)) in rankings.iter().zip(WEIGHTS).enumerate() {
        for (at, (slot, score)) in ranking.iter().enumerate() {
            let explained = found.entry(*slot).or_default();
            let ranked = Some(Ranked { rank: at + 1, score: *score });
            match which {
                0 => explained.words = ranked,
                1 => explained.text = ranked,
                _ => explained.vector = ranked,
            }
            #[allow(clippy::cast_precision_loss)] // some hundreds
            let part = weight / (K + at as f64 + 1.0) / most;
            explained.fused += part;
        }
    }
    let mut hits: Vec<Hit> = found
        .into_iter()
        .map(|(slot, mut explained)| {
            let place = place(slot);
            explained.recency = 1.0 + RECENCY * recency(now, place.occurred_at);
            explained.reward = 1.0 + REWARD * f64::from(place.reward.unwrap_or(0.0).clamp(-1.0, 1.0));
            let score = explained.fused * explained.recency * explained.reward;
            Hit { slot, id: EpisodeId(0), score, duplicates: 0, explained }
        })
        .collect();
    hits.sort_unstable_by(|a, b| b.score.total_cmp(&a.score).then(b.slot.cmp(&a.slot)));
    hits
}

/// 1 for what happens now, half of it after each half-life.
#[allow(clippy::cast_precision_loss)] // milliseconds of centuries
fn recency(now: Millis, at: Millis) -> f64 {
    let age = now.0.saturating_sub(at.0).max(0) as f64;
    0.5f64.powf(age / HALF_LIFE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Millis = Millis(1_795_000_000_000);

    fn order(rankings: [Vec<(u32, f32)>; 3], place: impl Fn(u32) -> Place) -> Vec<u32> {
        fuse(rankings, NOW, place).iter().map(|hit| hit.slot).collect()
    }

    fn plain(_: u32) -> Place {
        Place { occurred_at: NOW, reward: None }
    }

    #[test]
    fn who_is_in_both_rankings_wins() {
        let rankings = [vec![(1, 9.0), (2, 8.0)], vec![(3, 0.9), (2, 0.8)], vec![]];
        assert_eq!(order(rankings, plain), [2, 1, 3]);
        assert!(order([vec![], vec![], vec![]], plain).is_empty());
    }

    #[test]
    fn recency_and_reward_decide_between_near_equals() {
        let rankings = || [vec![(1, 9.0), (2, 8.9)], vec![], vec![]];
        let old = |slot| Place { occurred_at: if slot == 1 { Millis(0) } else { NOW }, reward: None };
        assert_eq!(order(rankings(), old), [2, 1]);
        let good = |slot| Place { reward: (slot == 2).then_some(1.0), ..plain(slot) };
        assert_eq!(order(rankings(), good), [2, 1]);
        assert_eq!(order(rankings(), plain), [1, 2]);
    }

    #[test]
    fn a_score_is_what_its_parts_say() {
        let hits = fuse([vec![(1, 9.0)], vec![(1, 0.5)], vec![]], NOW, plain);
        let explained = hits[0].explained;
        assert!((explained.fused - 1.0).abs() < 1e-9, "first everywhere");
        assert!((hits[0].score - explained.fused * explained.recency * explained.reward).abs() < 1e-12);
        assert_eq!(explained.words, Some(Ranked { rank: 1, score: 9.0 }));
        assert_eq!(explained.vector, None);
        assert!((recency(NOW, NOW) - 1.0).abs() < 1e-12 && recency(NOW, Millis(0)) < 1e-3);
        assert!((recency(NOW, Millis(NOW.0 + 5)) - 1.0).abs() < 1e-12, "a clock ahead");
    }
}
