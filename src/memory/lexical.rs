//! The built-in embedder: a text as the words and parts of words it has, hashed into 256 numbers.
//!
//! No model: two texts are near when they share words, stems, or runs of letters ("thermostat" and "thermostats", a typo and what
//! was meant). It knows no synonyms. Deterministic, offline, and a published dimension and hash never change without a new
//! name, because vectors of two versions must not be compared. After "feature hashing" (Weinberger et al. 2009): a sign from
//! the hash keeps collisions from adding up.
//! Tests: at the foot.

use crate::types::{id::stable_hash, memory::Vector, words};

/// Numbers of a vector.
pub(crate) const DIMENSION: usize = 256;
/// What a whole word weighs; its runs of letters share one.
const WORD: f32 = 1.0;
/// What all runs of letters of a word weigh together.
const RUNS: f32 = 0.6;
/// Letters of a run.
const RUN: usize = 3;
/// Most words that are looked at.
const MAX_WORDS: usize = 2048;

/// The vector of a text; `None` when it has no words.
pub(crate) fn embed(text: &str) -> Option<Vector> {
    let mut numbers = [0f32; DIMENSION];
    let mut any = false;
    for word in words::words(text).take(MAX_WORDS) {
        // Fillers say little, but a text of nothing else should still be found by itself.
        let weight = if words::is_filler(&word) { 0.1 } else { 1.0 };
        let stem = words::stem(&word);
        add(&mut numbers, b'w', stem, weight * WORD);
        runs(&mut numbers, stem, weight * RUNS);
        any = true;
    }
    // A word said ten times says little more than one said once or twice.
    for number in &mut numbers {
        *number = number.signum() * number.abs().sqrt();
    }
    if any { Vector::of(&numbers) } else { None }
}

fn runs(numbers: &mut [f32; DIMENSION], stem: &str, weight: f32) {
    let letters: Vec<char> = std::iter::once('^').chain(stem.chars()).chain(std::iter::once('$')).take(64).collect();
    let all = letters.windows(RUN);
    #[allow(clippy::cast_precision_loss)] // a few letters
    let each = weight / (all.len().max(1) as f32).sqrt();
    let mut run = String::with_capacity(4 * RUN);
    for letters in all {
        run.clear();
        run.extend(letters);
        add(numbers, b'r', &run, each);
    }
}

fn add(numbers: &mut [f32; DIMENSION], kind: u8, text: &str, weight: f32) {
    let hash = stable_hash(std::iter::once(kind).chain(text.bytes()));
    let hash = hash ^ (hash >> 29);
    #[allow(clippy::cast_possible_truncation)] // below the dimension
    let at = (hash % DIMENSION as u64) as usize;
    let sign = if hash >> 40 & 1 == 0 { 1.0 } else { -1.0 };
    numbers[at] += sign * weight;
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn near(one: &str, other: &str) -> f32 {
        embed(one).unwrap().numbers().zip(embed(other).unwrap().numbers()).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn texts_are_near_by_what_they_share() {
        assert!(near("the lamp in the kitchen", "kitchen lamp") > 0.8);
        assert!(near("thermostat broken", "the thermostats broke") > near("thermostat broken", "garden hose") + 0.3);
        assert!(near("the refrigerator hums", "refridgerator") > 0.25, "a typo");
        assert!(near("red apples", "quarterly report").abs() < 0.25);
        assert!(near("a b c", "a b c") > 0.999);
    }

    #[test]
    fn the_same_text_is_the_same_vector_on_every_machine() {
        assert!(embed("?! ").is_none());
        let vector = embed("it was hot in the kitchen").unwrap();
        assert_eq!(vector.dimension(), DIMENSION);
        let sum = vector.high.iter().zip(0i64..).map(|(n, at)| i64::from(*n) * (at + 1)).sum::<i64>();
        assert_eq!(sum, CHECK, "a change of the embedder needs a new name");
    }
    const CHECK: i64 = -16006;
}
