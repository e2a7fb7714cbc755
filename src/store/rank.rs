//! Ranking of episodes by the words they share with a query: BM25 (Robertson and Walker 1994) within one instance.
//!
//! Pure, and the same for every backend that scores itself, so that a recall ranks alike on all of them. The statistics are
//! those of the instance alone: neither the scores nor the cost of a recall depend on what other tenants remember.
//! Tests: at the foot.

use std::collections::HashMap;

/// Saturation of repeated words.
const K1: f64 = 1.2;
/// Weight of the length.
const B: f64 = 0.75;
/// Longest word that is indexed, in bytes; longer ones are cut.
const MAX_WORD_BYTES: usize = 48;
/// Most different words of a query that are looked for.
pub(crate) const MAX_QUERY_WORDS: usize = 32;

/// The words of a text: runs of letters and digits, lower case.
pub(crate) fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(|word| {
        let mut word = word.to_lowercase();
        if word.len() > MAX_WORD_BYTES {
            word.truncate(word.floor_char_boundary(MAX_WORD_BYTES));
        }
        word
    })
}

/// The different words of a query, in order, at most [`MAX_QUERY_WORDS`].
pub(crate) fn query_words(query: &str) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for word in words(query) {
        if out.len() == MAX_QUERY_WORDS {
            break;
        }
        if !out.contains(&word) {
            out.push(word);
        }
    }
    out
}

/// How often each word stands in an episode, and how many words it has in all. Tags count as words of the episode.
pub(crate) fn count_words(content: &str, tags: &[String]) -> (HashMap<String, u32>, u32) {
    let mut counts = HashMap::new();
    let mut length = 0;
    for word in words(content).chain(tags.iter().flat_map(|tag| words(tag))) {
        *counts.entry(word).or_insert(0) += 1;
        length += 1;
    }
    (counts, length)
}

/// What BM25 must know of an instance's episodes as a whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Corpus {
    /// Episodes.
    pub episodes: u64,
    /// Words in all of them.
    pub words: u64,
}

impl Corpus {
    /// Counts one more episode.
    pub(crate) fn add(&mut self, length: u32) {
        self.episodes += 1;
        self.words += u64::from(length);
    }
}

/// One word's occurrence in one episode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Posting {
    /// The episode.
    pub episode: u64,
    /// How often the word stands in it.
    pub count: u32,
    /// Words of the episode.
    pub length: u32,
}

/// What a word says that so many of the episodes have.
pub(crate) fn rarity(episodes: f64, holders: f64) -> f64 {
    (1.0 + (episodes - holders + 0.5).max(0.0) / (holders + 0.5)).ln()
}

/// What a word counts that stands so often in an episode of so many words.
pub(crate) fn weight(rarity: f64, count: u32, length: u32, mean: f64) -> f64 {
    let count = f64::from(count);
    rarity * count * (K1 + 1.0) / (count + K1 * (1.0 - B + B * f64::from(length) / mean))
}

/// The best episodes, best first; of equals the newer first. `lists` holds one list of postings per query word.
#[allow(clippy::cast_precision_loss)] // counts far below 2^53
pub(crate) fn best(corpus: Corpus, lists: &[Vec<Posting>], limit: usize) -> Vec<(u64, f64)> {
    let episodes = corpus.episodes.max(1) as f64;
    let mean = (corpus.words as f64 / episodes).max(1.0);
    let mut scores: HashMap<u64, f64, ahash::RandomState> = HashMap::default();
    for list in lists {
        let holders = list.len() as f64;
        let rarity = rarity(episodes, holders);
        for posting in list {
            *scores.entry(posting.episode).or_insert(0.0) += weight(rarity, posting.count, posting.length, mean);
        }
    }
    let mut ranked: Vec<(u64, f64)> = scores.into_iter().collect();
    let order = |a: &(u64, f64), b: &(u64, f64)| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0));
    if ranked.len() > limit && limit > 0 {
        ranked.select_nth_unstable_by(limit - 1, order);
    }
    ranked.truncate(limit);
    ranked.sort_unstable_by(order);
    ranked
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn rank(texts: &[&str], query: &str, limit: usize) -> Vec<u64> {
        let mut corpus = Corpus::default();
        let counted: Vec<_> = texts.iter().map(|text| count_words(text, &[])).collect();
        counted.iter().for_each(|(_, length)| corpus.add(*length));
        let lists: Vec<Vec<Posting>> = query_words(query)
            .iter()
            .map(|word| {
                let hit = |(id, (counts, length)): (usize, &(HashMap<String, u32>, u32))| {
                    let count = *counts.get(word)?;
                    Some(Posting { episode: id as u64, count, length: *length })
                };
                counted.iter().enumerate().filter_map(hit).collect()
            })
            .collect();
        best(corpus, &lists, limit).into_iter().map(|(id, _)| id).collect()
    }

    #[test]
    fn words_are_lower_case_runs_of_letters_and_digits() {
        assert_eq!(words("It's 30.5 °C, KÜCHE!").collect::<Vec<_>>(), ["it", "s", "30", "5", "c", "küche"]);
        assert_eq!(words(&"é".repeat(100)).next().unwrap().len(), MAX_WORD_BYTES);
        assert_eq!(query_words("a b A c b"), ["a", "b", "c"]);
    }

    #[test]
    fn rare_words_count_more_than_common_ones_and_short_episodes_more_than_long_ones() {
        let texts =
            ["the lamp is on", "the fan is on", "the fan is off", "the lamp and the fan and the door are on today"];
        assert_eq!(rank(&texts, "lamp", 9), [0, 3]);
        assert_eq!(rank(&texts, "the fan off", 1), [2]);
        assert_eq!(rank(&texts, "unheard", 9), [] as [u64; 0]);
    }

    #[test]
    fn of_equals_the_newer_comes_first() {
        assert_eq!(rank(&["hot", "hot", "hot", "cold"], "hot", 2), [2, 1]);
        assert_eq!(rank(&["hot"], "hot", 0), [] as [u64; 0]);
    }
}
