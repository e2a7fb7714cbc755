//! Recall: the postings of the query's words in one instance, folded and not, ranked.
//!
//! Why an index of our own and not FTS5 stands in `docs/adr/0005-storage-format-and-versioning.md`.
//! Tests: `tests/it/store_contract.rs`.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{query, reader::View, rows};
use crate::{
    store::{
        Episode, Error, Remembered,
        rank::{self, Corpus, Posting},
        replay,
    },
    types::{EpisodeId, InstanceKey, TurnRecord},
};

impl View {
    pub(super) fn recall(&self, key: &InstanceKey, query: &str, limit: usize) -> Result<Vec<Episode>, Error> {
        let words = rank::query_words(query);
        if words.is_empty() || limit == 0 {
            return Ok(Vec::new());
        }
        let settled = self.settled(key, |memtable| memtable.episodes(key))?;
        let tx = &settled.tx;
        let Some(owner) = rows::born(tx, key)? else { return Ok(Vec::new()) };
        let mut corpus = folded_corpus(tx, owner)?;
        let mut lists = Vec::with_capacity(words.len());
        for word in &words {
            lists.push(folded_postings(tx, owner, word)?);
        }
        // A generation may be folded in part: an episode the tables know is not counted again.
        let mut places: HashMap<u64, i64> = HashMap::new();
        for seq in settled.extra.iter().copied().collect::<HashSet<_>>() {
            let Some((_, record)) = rows::turn_at(tx, key, seq)? else { continue };
            for episode in replay::episodes(&record) {
                if folded_place(tx, owner, episode.id)?.is_some() {
                    continue;
                }
                let (counts, length) = rank::count_words(&episode.content, &episode.tags);
                corpus.add(length);
                places.insert(episode.id, seq);
                for (word, list) in words.iter().zip(&mut lists) {
                    if let Some(&count) = counts.get(word) {
                        list.push(Posting { episode: episode.id, count, length });
                    }
                }
            }
        }
        let mut found = Vec::with_capacity(limit.min(64));
        for (id, score) in rank::best(corpus, &lists, limit) {
            let place = match places.get(&id) {
                Some(seq) => Some(*seq),
                None => folded_place(tx, owner, id)?,
            };
            let seq = place.ok_or_else(|| Error::Corrupt(format!("episode {id} of {key} has no place")))?;
            let (_, record) = rows::turn_at(tx, key, seq)?.ok_or_else(|| rows::missing(key, seq))?;
            found.extend(replay::episodes(&record).find(|e| e.id == id).map(|e| Episode { score, ..e }));
        }
        Ok(found)
    }

    pub(super) fn remembered(&self, key: &InstanceKey, after: u64, limit: usize) -> Result<Remembered, Error> {
        let settled = self.settled(key, |memtable| memtable.episodes(key))?;
        let tx = &settled.tx;
        let Some(owner) = rows::born(tx, key)? else { return Ok(Remembered::default()) };
        let mut turns = Vec::new();
        let mut next = after + 1;
        while turns.len() < limit {
            let Some((episode, seq)) = folded_from(tx, owner, EpisodeId::new(next, 0))? else { break };
            let (_, record) = rows::turn_at(tx, key, seq)?.ok_or_else(|| rows::missing(key, seq))?;
            turns.push(Arc::new(record));
            next = episode.turn() + 1;
        }
        let mut unfolded: Vec<i64> = settled.extra.iter().copied().filter(|seq| *seq > owner).collect();
        unfolded.sort_unstable();
        unfolded.dedup();
        // In the order of turns, so the first that is new is found by halves.
        let (mut low, mut high) = (0, unfolded.len());
        while low < high {
            let middle = usize::midpoint(low, high);
            let seq = unfolded[middle];
            let row = rows::row_at(tx, key, seq)?.ok_or_else(|| rows::missing(key, seq))?;
            if row.place.turn < next {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        for &seq in unfolded[low..].iter().take(limit - turns.len()) {
            let (_, record) = rows::turn_at(tx, key, seq)?.ok_or_else(|| rows::missing(key, seq))?;
            turns.push(Arc::new(record));
        }
        Ok(Remembered { life: owner, turns })
    }

    pub(super) fn turns_at(&self, key: &InstanceKey, turns: &[u64]) -> Result<Vec<Arc<TurnRecord>>, Error> {
        let settled = self.settled(key, |_| ())?;
        let tx = &settled.tx;
        let Some(owner) = rows::born(tx, key)? else { return Ok(Vec::new()) };
        let head = settled.head(key)?;
        let mut found = Vec::with_capacity(turns.len());
        for &turn in turns {
            let folded = folded_from(tx, owner, EpisodeId::new(turn, 0))?.filter(|(episode, _)| episode.turn() == turn);
            let seq = match folded {
                Some((_, seq)) => Some(seq),
                None => query::position(tx, key, head, turn)?,
            };
            if let Some(seq) = seq {
                found.extend(rows::turn_at(tx, key, seq)?.map(|(_, record)| Arc::new(record)));
            }
        }
        Ok(found)
    }
}

/// The first folded episode at or behind one, and where its turn stands.
fn folded_from(db: &Connection, owner: i64, from: EpisodeId) -> Result<Option<(EpisodeId, i64)>, Error> {
    let mut query = db.prepare_cached(
        "SELECT episode, seq FROM episodes WHERE owner = ?1 AND episode >= ?2 ORDER BY episode LIMIT 1",
    )?;
    Ok(query.query_row(params![owner, from.0], |row| Ok((EpisodeId(row.get(0)?), row.get(1)?))).optional()?)
}

fn folded_corpus(db: &Connection, owner: i64) -> Result<Corpus, Error> {
    let mut query = db.prepare_cached("SELECT episodes, words FROM corpora WHERE owner = ?1")?;
    let corpus = query.query_row([owner], |row| Ok(Corpus { episodes: row.get(0)?, words: row.get(1)? })).optional()?;
    Ok(corpus.unwrap_or_default())
}

fn folded_postings(db: &Connection, owner: i64, word: &str) -> Result<Vec<Posting>, Error> {
    let mut query = db.prepare_cached("SELECT episode, count, length FROM words WHERE owner = ?1 AND word = ?2")?;
    let found = query.query_map(params![owner, word], |row| {
        Ok(Posting { episode: row.get(0)?, count: row.get(1)?, length: row.get(2)? })
    })?;
    Ok(found.collect::<Result<_, _>>()?)
}

fn folded_place(db: &Connection, owner: i64, episode: u64) -> Result<Option<i64>, Error> {
    let mut query = db.prepare_cached("SELECT seq FROM episodes WHERE owner = ?1 AND episode = ?2")?;
    Ok(query.query_row(params![owner, episode], |row| row.get(0)).optional()?)
}
