//! Folding: the frozen generation goes, in key order and in portions, into the tables that are looked up by key.
//!
//! Sorting turns thousands of scattered writes into neighbouring ones, which is what makes an append-only commit path cheap
//! on the whole. A portion is part of some group commit; the position up to which the log is folded moves with the last
//! one. Folding a generation again after a crash writes the same rows again.
//! Tests: `tests/it/store_contract.rs`; figures in `docs/adr/0002-turn-and-commit.md`.

use std::{sync::Arc, thread::JoinHandle};

use rusqlite::{OptionalExtension as _, params};

use super::{
    memtable::{Generation, IdKey, day},
    rows,
    writer::Writer,
};
use crate::{
    store::{Error, rank, replay},
    types::{EpisodeId, InstanceKey},
};

/// What an episode weighs in a portion, in rows.
const EPISODE_ROWS: usize = 16;
/// Days before today whose ids are kept: more than the deduplication window, whatever the hour.
pub(super) const DAYS_KEPT: i64 = 2;

/// A generation's content in the order of the tables.
#[derive(Debug, Default)]
struct Plan {
    heads: Vec<(InstanceKey, i64)>,
    ids: Vec<(i64, IdKey, i64)>,
    episodes: Vec<(InstanceKey, i64)>,
}

impl Plan {
    fn of(generation: &Generation) -> Self {
        let mut heads: Vec<_> =
            generation.heads.iter().map(|(key, latest)| (key.clone(), latest.head.links[0])).collect();
        heads.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let mut ids: Vec<_> = generation.ids.iter().map(|(id, found)| (found.day, id.clone(), found.seq)).collect();
        // Already in the order of ids; a generation spans two days at most once a day.
        ids.sort_by_key(|(day, _, _)| *day);
        let mut episodes: Vec<_> =
            generation.episodes.iter().flat_map(|(key, seqs)| seqs.iter().map(|seq| (key.clone(), *seq))).collect();
        episodes.sort_unstable_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
        Self { heads, ids, episodes }
    }
}

/// How far the tables are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Cursor {
    heads: usize,
    ids: usize,
    episodes: usize,
    finished: bool,
}

/// A fold under way.
#[derive(Debug)]
pub(super) struct Folding {
    generation: Arc<Generation>,
    sorting: Option<JoinHandle<Plan>>,
    plan: Plan,
    at: Cursor,
    /// Where the cursor will be when the running transaction is durable.
    staged: Cursor,
}

impl Folding {
    fn new(generation: Arc<Generation>) -> Self {
        let sorted = Arc::clone(&generation);
        // Sorting takes milliseconds that no commit should wait for.
        let sorting =
            std::thread::Builder::new().name(String::from("store-sort")).spawn(move || Plan::of(&sorted)).ok();
        let plan = if sorting.is_some() { Plan::default() } else { Plan::of(&generation) };
        Self { generation, sorting, plan, at: Cursor::default(), staged: Cursor::default() }
    }

    /// Whether the plan is there.
    pub(super) fn is_ready(&mut self) -> bool {
        if self.sorting.as_ref().is_some_and(JoinHandle::is_finished) {
            self.wait();
        }
        self.sorting.is_none()
    }

    /// Waits for the plan.
    pub(super) fn wait(&mut self) {
        if let Some(sorting) = self.sorting.take() {
            self.plan = sorting.join().unwrap_or_else(|_| Plan::of(&self.generation));
        }
    }
}

impl Writer<'_> {
    /// Begins to fold what was committed so far.
    pub(super) fn freeze(&mut self) {
        let generation = self.memtable_mut().freeze();
        self.folding = Some(Folding::new(generation));
    }

    /// Folds about `rows` rows within the running transaction.
    pub(super) fn fold_portion(&mut self, rows: usize) -> Result<(), Error> {
        let Some(mut folding) = self.folding.take() else { return Ok(()) };
        let folded = if folding.is_ready() { self.fold_rows(&mut folding, rows) } else { Ok(()) };
        self.folding = Some(folding);
        folded
    }

    fn fold_rows(&mut self, folding: &mut Folding, rows: usize) -> Result<(), Error> {
        let plan = &folding.plan;
        let mut at = folding.at;
        let mut left = rows;
        while left > 0 && at.heads < plan.heads.len() {
            let (key, seq) = &plan.heads[at.heads];
            self.fold_head(key, *seq)?;
            (at.heads, left) = (at.heads + 1, left - 1);
        }
        while left > 0 && at.ids < plan.ids.len() {
            let (day, id, seq) = &plan.ids[at.ids];
            self.fold_id(*day, id, *seq)?;
            (at.ids, left) = (at.ids + 1, left - 1);
        }
        while left > 0 && at.episodes < plan.episodes.len() {
            let (key, seq) = &plan.episodes[at.episodes];
            self.fold_episodes(key, *seq)?;
            (at.episodes, left) = (at.episodes + 1, left.saturating_sub(EPISODE_ROWS));
        }
        let ends = (plan.heads.len(), plan.ids.len(), plan.episodes.len());
        at.finished = (at.heads, at.ids, at.episodes) == ends;
        if at.finished && folding.generation.last_seq > 0 {
            rows::set_meta(self.db, "folded", folding.generation.last_seq)?;
        }
        folding.staged = at;
        Ok(())
    }

    /// The transaction is durable: the cursor moves, and a generation that is folded whole is let go.
    pub(super) fn fold_committed(&mut self) {
        let Some(folding) = &mut self.folding else { return };
        folding.at = folding.staged;
        if folding.at.finished {
            self.folding = None;
            self.memtable_mut().frozen = None;
        }
    }

    /// The transaction is gone, and its part of the fold with it.
    pub(super) fn fold_rolled_back(&mut self) {
        if let Some(folding) = &mut self.folding {
            folding.staged = folding.at;
        }
    }

    fn fold_head(&mut self, key: &InstanceKey, seq: i64) -> Result<(), Error> {
        // A newer head follows in a later generation. It may also say that the instance is forgotten.
        if self.delta.heads.contains_key(key) || self.memtable().active.heads.contains_key(key) {
            return Ok(());
        }
        let (tenant, instance) = (key.tenant.as_str(), key.instance.as_str());
        if seq == 0 {
            let mut delete = self.db.prepare_cached("DELETE FROM heads WHERE tenant = ?1 AND instance = ?2")?;
            delete.execute(params![tenant, instance])?;
        } else {
            let mut write =
                self.db.prepare_cached("INSERT OR REPLACE INTO heads (tenant, instance, seq) VALUES (?1, ?2, ?3)")?;
            write.execute(params![tenant, instance, seq])?;
        }
        Ok(())
    }

    /// Whether the instance was forgotten after that position.
    fn is_dropped(&self, key: &InstanceKey, seq: i64) -> bool {
        self.delta.dropped.get(key).is_some_and(|upto| seq <= *upto) || seq <= self.memtable().dropped(key)
    }

    fn fold_id(&mut self, bucket: i64, id: &IdKey, seq: i64) -> Result<(), Error> {
        let (tenant, stimulus, instance) = id;
        let key = InstanceKey::new(tenant.clone(), instance.clone());
        if self.is_dropped(&key, seq) || bucket < self.first_day() {
            return Ok(());
        }
        let mut write = self.db.prepare_cached(
            "INSERT OR REPLACE INTO seen (bucket, tenant, stimulus, instance, seq) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?;
        write.execute(params![bucket, tenant.as_str(), stimulus.as_str(), instance.as_str(), seq])?;
        // Though the transaction may fail: a day too many costs a lookup, a day too few would miss a repeat.
        self.days.insert(bucket);
        Ok(())
    }

    /// The oldest day whose ids are kept.
    pub(super) fn first_day(&self) -> i64 {
        day(self.clock.now()) - DAYS_KEPT
    }

    fn fold_episodes(&mut self, key: &InstanceKey, seq: i64) -> Result<(), Error> {
        if self.is_dropped(key, seq) {
            return Ok(());
        }
        let Some(owner) = rows::born(self.db, key)?.filter(|born| *born < seq) else { return Ok(()) };
        let Some((_, record)) = rows::turn_at(self.db, key, seq)? else { return Err(rows::missing(key, seq)) };
        let mut place = self
            .db
            .prepare_cached("INSERT INTO episodes (owner, episode, seq) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING")?;
        let mut insert = self.db.prepare_cached(
            "INSERT OR REPLACE INTO words (owner, word, episode, count, length) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?;
        let mut corpus = rank::Corpus::default();
        // What tells of forgotten episodes has a place and no words.
        let blank = record.episodes.iter().enumerate().filter(|(_, draft)| draft.is_blank());
        let marker = record.is_marked().then(|| EpisodeId::marker(record.turn));
        for id in blank.map(|(at, _)| EpisodeId::new(record.turn, at)).chain(marker) {
            place.execute(params![owner, id.0, seq])?;
        }
        for episode in replay::episodes(&record) {
            // Folded before a crash: its words are there and counted.
            if place.execute(params![owner, episode.id, seq])? == 0 {
                continue;
            }
            let (counts, length) = rank::count_words(&episode.content, &episode.tags);
            for (word, count) in counts {
                insert.execute(params![owner, word, episode.id, count, length])?;
            }
            corpus.add(length);
        }
        self.add_to_corpus(owner, corpus)
    }

    fn add_to_corpus(&self, owner: i64, more: rank::Corpus) -> Result<(), Error> {
        let mut write = self.db.prepare_cached(
            "INSERT INTO corpora (owner, episodes, words) VALUES (?1, ?2, ?3)
             ON CONFLICT DO UPDATE SET episodes = episodes + ?2, words = words + ?3",
        )?;
        write.execute(params![owner, more.episodes, more.words])?;
        Ok(())
    }

    /// The last life that still has rows to be removed: its `born` and the turn to go on from.
    pub(super) fn next_forgotten(&self) -> Result<Option<(i64, i64)>, Error> {
        let mut query = self.db.prepare_cached("SELECT born, seq FROM forgotten LIMIT 1")?;
        Ok(query.query_row([], |row| Ok((row.get(0)?, row.get(1)?))).optional()?)
    }
}
