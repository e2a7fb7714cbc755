//! Recall: the postings of the query's words in one instance, folded and not, ranked.
//!
//! Why an index of our own and not FTS5 stands in `docs/adr/0005-storage-format-and-versioning.md`.
//! Tests: `tests/it/store_contract.rs`.

use std::collections::{HashMap, HashSet};

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{reader::View, rows};
use crate::{
    store::{
        Episode, Error,
        rank::{self, Corpus, Posting},
        replay,
    },
    types::InstanceKey,
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
