//! Applying units inside the writer's transaction: checks first, then writes.
//!
//! A unit that is rejected has written nothing, so its neighbours need no savepoint. An error of SQLite ends the whole
//! transaction; the writer then tries the units one by one. Tests: `tests/it/store_contract.rs`.

use std::sync::Arc;

use rusqlite::params;

use super::{
    memtable::{Decided, IdKey, Latest, day, id_key},
    query,
    record::{self, Row},
    rows,
    writer::Writer,
};
use crate::{
    store::{
        Committed, DeadLetter, Episode, Error, Head, Known, MqttWrite, Rejection, Shipping, Unit, Work, check,
        links::{LOW, STEPS, holds_coarse},
        rank, replay,
    },
    types::{EpisodeId, InstanceKey, Millis, Profile, Stimulus, StimulusId, TurnRecord, memory},
};

/// Why a unit was not applied.
pub(super) enum Trouble {
    /// It alone is refused; nothing of it was written.
    Rejected(Rejection),
    /// The transaction cannot go on.
    Failed(Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<rusqlite::Error> for Trouble {
    fn from(error: rusqlite::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl From<Rejection> for Trouble {
    fn from(rejection: Rejection) -> Self {
        Self::Rejected(rejection)
    }
}

impl Writer<'_> {
    pub(super) fn apply(&mut self, unit: &Unit) -> Result<Committed, Trouble> {
        let key = &unit.key;
        match &unit.work {
            Work::Turns { head, turns } => self.apply_turns(key, *head, turns),
            // One process has the file: who lodges is who owns.
            Work::Accept { stimuli } | Work::Lodge { stimuli } => self.accept(key, stimuli),
            Work::Step { stimulus, first, steps, .. } => {
                self.enter_steps(key, stimulus, *first, steps)?;
                self.unchanged(key, false)
            }
            Work::Bury { stimulus, reason, tries, at } => self.bury(key, stimulus, reason, *tries, *at),
            Work::Revive { stimulus } => self.revive(key, stimulus),
            Work::PutProfile { profile, at } => self.put_profile(key, profile, *at),
            Work::Forget => self.forget(key),
        }
    }

    /// The head of an instance if it is not folded, the running transaction included.
    fn unfolded_head(&self, key: &InstanceKey) -> Option<Latest> {
        self.delta.heads.get(key).copied().or_else(|| self.memtable().head(key))
    }

    fn head(&self, key: &InstanceKey) -> Result<Head, Error> {
        match self.unfolded_head(key) {
            Some(latest) => Ok(latest.head),
            None => rows::folded_head(self.db, key),
        }
    }

    /// The head after work that adds no turn.
    fn unchanged(&self, key: &InstanceKey, created: bool) -> Result<Committed, Trouble> {
        Ok(Committed { head: self.head(key)?, created })
    }

    fn decided_unfolded(&self, key: &InstanceKey, id: &IdKey) -> Option<Decided> {
        let dropped = self.delta.dropped.get(key).copied();
        match self.delta.ids.get(id) {
            Some(decided) if dropped.is_none_or(|upto| decided.seq > upto) => Some(*decided),
            _ if dropped.is_some() => None,
            _ => self.memtable().decided(key, id),
        }
    }

    /// What became of an id that may not come again, other than that it waits.
    fn settled(&self, key: &InstanceKey, stimulus: &StimulusId, fresh: bool) -> Result<Option<Known>, Error> {
        if self.dead.get(key) > 0
            && let Some((_, letter)) = rows::dead(self.db, key, stimulus)?
        {
            return Ok(Some(Known::Dead(Arc::new(letter))));
        }
        let decided = match self.decided_unfolded(key, &id_key(key, stimulus)) {
            Some(decided) => Some(decided.seq),
            None if fresh => None,
            None => rows::seen(self.db, self.days.iter().rev().copied(), key, stimulus)?,
        };
        let Some(seq) = decided else { return Ok(None) };
        let (_, record) = rows::turn_at(self.db, key, seq)?.ok_or_else(|| rows::missing(key, seq))?;
        Ok(Some(Known::Decided(Arc::new(record))))
    }

    /// Whether no turn of the instance can be in the folded tables.
    fn is_fresh(&self, key: &InstanceKey) -> bool {
        let whole = |latest: &Latest| latest.since == 1;
        self.delta.heads.get(key).is_some_and(whole) || self.memtable().holds_all(key)
    }

    fn apply_turns(&mut self, key: &InstanceKey, head: Head, turns: &[Arc<TurnRecord>]) -> Result<Committed, Trouble> {
        check::numbered(head, turns)?;
        match self.unfolded_head(key) {
            Some(latest) => check::current(head, latest.head)?,
            // A first turn must find no history. For a later one the folded head is not read: the instance's only writer
            // said where it stands, and a stale writer is one whose last commit is still unfolded.
            None if head.turn == 0 => check::current(head, rows::folded_head(self.db, key)?)?,
            None => {}
        }
        if self.options.dedupe && turns.iter().any(|record| record.stimulus.repeatable) {
            check::distinct_turns(turns)?;
            let fresh = head.turn == 0 || self.is_fresh(key);
            for (index, record) in turns.iter().enumerate().filter(|(_, record)| record.stimulus.repeatable) {
                // One that waits is decided now: the end of the slow path.
                if let Some(known) = self.settled(key, &record.stimulus.id, fresh)? {
                    return Err(Rejection::Duplicate { index, known }.into());
                }
            }
        }
        if head.turn == 0 {
            self.create(key, check::created_at(turns), None)?;
        }
        let mut head = head;
        for record in turns {
            head = self.append(key, head, record)?;
        }
        Ok(Committed { head, created: false })
    }

    /// Writes one turn to the log; the head after it.
    fn append(&mut self, key: &InstanceKey, head: Head, record: &TurnRecord) -> Result<Head, Error> {
        if memory::writes(&record.stimulus) && self.waiting.get(key) > 0 {
            // What was to be remembered stood in the inbox as well, where nobody will look for it to forget it.
            self.overwrite(true)?;
        }
        let waited = self.leave_inbox(key, &record.stimulus.id)?;
        if waited {
            self.leave_steps(key, &record.stimulus.id)?;
        }
        let seq = self.take_position();
        let mut place = head.place();
        if holds_coarse(record.turn) && head.links[LOW - 1] != 0 {
            let before = head.links[LOW - 1];
            let row = rows::row_at(self.db, key, before)?.ok_or_else(|| rows::missing(key, before))?;
            debug_assert_eq!(row.place.turn + STEPS[LOW - 1], record.turn);
            place.back[LOW..].copy_from_slice(&row.place.coarse_for_next(before));
        }
        let flags = record::flags(record, waited);
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        let row = Row { flags, place, decided_at: record.decided_at };
        let buffer = record::encode(&row, seq, record, buffer)?;
        let names = (seq, key.tenant.as_str(), key.instance.as_str(), flags, buffer.as_slice());
        self.insert_turn.execute(names)?;
        self.buffer = buffer;
        let head = head.advance(seq);
        self.delta.add_turn(key, head);
        if row.has(record::INDEXED) {
            let decided = Decided { seq, day: day(record.decided_at) };
            self.delta.ids.insert(id_key(key, &record.stimulus.id), decided);
        }
        self.lose(key, head, record)?;
        if row.has(record::EPISODES) {
            self.delta.episodes.entry(key.clone()).or_default().push(seq);
        }
        self.outgoing |= row.has(record::EFFECTS);
        Ok(head)
    }

    /// Takes what a turn forgets out of the log and out of the words, and lets nothing of it stand in the pages it leaves.
    fn lose(&mut self, key: &InstanceKey, head: Head, record: &TurnRecord) -> Result<(), Error> {
        let losses = replay::losses(record);
        if losses.is_empty() {
            return Ok(());
        }
        self.overwrite(true)?;
        self.lose_parts(key, record.turn, losses.keys().copied())?;
        let owner = rows::born(self.db, key)?;
        let mut update = self.db.prepare_cached("UPDATE turns SET rec = ?2 WHERE seq = ?1")?;
        for (turn, places) in losses {
            let Some(seq) = query::position(self.db, key, head, turn)? else { continue };
            let Some((_, lost)) = rows::turn_at(self.db, key, seq)? else { continue };
            if let Some(owner) = owner {
                for episode in replay::episodes(&lost).filter(|e| places.contains(&EpisodeId(e.id).place())) {
                    self.lose_words(owner, &episode)?;
                }
            }
            let rec: Vec<u8> =
                self.db.prepare_cached("SELECT rec FROM turns WHERE seq = ?1")?.query_row([seq], |row| row.get(0))?;
            if let Some(redacted) = record::redact(&rec, seq, &places)? {
                update.execute(params![seq, redacted])?;
            }
        }
        Ok(())
    }

    /// The words of an episode, as far as they are folded. Its place stays.
    fn lose_words(&self, owner: i64, episode: &Episode) -> Result<(), Error> {
        let mut delete = self.db.prepare_cached("DELETE FROM words WHERE owner = ?1 AND word = ?2 AND episode = ?3")?;
        for word in rank::count_words(&episode.content, &episode.tags).0.keys() {
            delete.execute(params![owner, word, episode.id])?;
        }
        Ok(())
    }

    /// Whether what is deleted is overwritten with zeros, also in pages that become free. Costs writes, so only where content
    /// must be gone; the usual way overwrites it in pages that are written anyway.
    pub(super) fn overwrite(&mut self, all: bool) -> Result<(), Error> {
        if self.overwrites != all {
            let sql = if all { "PRAGMA secure_delete = ON" } else { "PRAGMA secure_delete = FAST" };
            self.db.prepare_cached(sql)?.query_row([], |_| Ok(()))?;
            self.overwrites = all;
        }
        Ok(())
    }

    /// Takes a stimulus out of the inbox; whether it stood there.
    fn leave_inbox(&mut self, key: &InstanceKey, stimulus: &StimulusId) -> Result<bool, Error> {
        let waiting = self.waiting.get(key);
        if waiting == 0 {
            return Ok(false);
        }
        let mut delete = self.db.prepare_cached(
            "DELETE FROM inbox WHERE ord = (SELECT ord FROM inbox
             WHERE tenant = ?1 AND stimulus = ?2 AND instance = ?3 ORDER BY ord LIMIT 1)",
        )?;
        let left = delete.execute(params![key.tenant.as_str(), stimulus.as_str(), key.instance.as_str()])? > 0;
        if left {
            self.waiting.set(key, waiting - 1);
        }
        Ok(left)
    }

    fn enter_inbox(&mut self, key: &InstanceKey, stimulus: &Stimulus) -> Result<(), Error> {
        let mut insert =
            self.db.prepare_cached("INSERT INTO inbox (tenant, instance, stimulus, rec) VALUES (?1, ?2, ?3, ?4)")?;
        let rec = record::encode_stimulus(stimulus)?;
        insert.execute(params![key.tenant.as_str(), key.instance.as_str(), stimulus.id.as_str(), rec])?;
        self.waiting.set(key, self.waiting.get(key) + 1);
        Ok(())
    }

    /// Makes the instance's row if there is none; whether there was none.
    fn create(&mut self, key: &InstanceKey, at: Millis, profile: Option<&str>) -> Result<bool, Error> {
        let mut insert = self.db.prepare_cached(
            "INSERT INTO instances (tenant, instance, born, created_at, profile) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT DO NOTHING",
        )?;
        let born = self.take_lasting_position();
        let names = params![key.tenant.as_str(), key.instance.as_str(), born, at.0, profile];
        Ok(insert.execute(names)? > 0)
    }

    fn accept(&mut self, key: &InstanceKey, stimuli: &[Arc<Stimulus>]) -> Result<Committed, Trouble> {
        if self.options.dedupe && stimuli.iter().any(|stimulus| stimulus.repeatable) {
            check::distinct_stimuli(stimuli)?;
            let fresh = self.is_fresh(key);
            for (index, stimulus) in stimuli.iter().enumerate().filter(|(_, stimulus)| stimulus.repeatable) {
                let waits = if self.waiting.get(key) > 0 { rows::waiting(self.db, key, &stimulus.id)? } else { None };
                let known = match waits {
                    Some((_, waiting)) => Some(Known::Waiting(Arc::new(waiting))),
                    None => self.settled(key, &stimulus.id, fresh)?,
                };
                if let Some(known) = known {
                    return Err(Rejection::Duplicate { index, known }.into());
                }
            }
        }
        let at = stimuli.first().map_or(Millis(0), |stimulus| stimulus.accepted_at);
        self.create(key, at, None)?;
        for stimulus in stimuli {
            self.enter_inbox(key, stimulus)?;
        }
        self.unchanged(key, false)
    }

    fn bury(
        &mut self,
        key: &InstanceKey,
        stimulus: &Stimulus,
        reason: &str,
        tries: u32,
        at: Millis,
    ) -> Result<Committed, Trouble> {
        self.create(key, at, None)?;
        self.leave_inbox(key, &stimulus.id)?;
        self.leave_steps(key, &stimulus.id)?;
        self.leave_dead(key, &stimulus.id)?;
        let mut insert = self.db.prepare_cached(
            "INSERT INTO dead (tenant, instance, stimulus, reason, tries, at, rec) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?;
        let rec = record::encode_stimulus(stimulus)?;
        let (tenant, instance) = (key.tenant.as_str(), key.instance.as_str());
        insert.execute(params![tenant, instance, stimulus.id.as_str(), reason, tries, at.0, rec])?;
        self.dead.set(key, self.dead.get(key) + 1);
        self.unchanged(key, false)
    }

    fn leave_dead(&mut self, key: &InstanceKey, stimulus: &StimulusId) -> Result<Option<DeadLetter>, Error> {
        let dead = self.dead.get(key);
        if dead == 0 {
            return Ok(None);
        }
        let Some((ord, letter)) = rows::dead(self.db, key, stimulus)? else { return Ok(None) };
        self.db.prepare_cached("DELETE FROM dead WHERE ord = ?1")?.execute([ord])?;
        self.dead.set(key, dead - 1);
        Ok(Some(letter))
    }

    fn revive(&mut self, key: &InstanceKey, stimulus: &StimulusId) -> Result<Committed, Trouble> {
        let Some(letter) = self.leave_dead(key, stimulus)? else { return Err(Rejection::NotFound.into()) };
        self.enter_inbox(key, &letter.stimulus)?;
        self.unchanged(key, false)
    }

    fn put_profile(&mut self, key: &InstanceKey, profile: &Profile, at: Millis) -> Result<Committed, Trouble> {
        let json = serde_json::to_string(profile)
            .map_err(|e| Rejection::Failed(Error::Backend(format!("a profile that is no JSON: {e}"))))?;
        let created = self.create(key, at, Some(&json))?;
        if !created {
            let mut update =
                self.db.prepare_cached("UPDATE instances SET profile = ?3 WHERE tenant = ?1 AND instance = ?2")?;
            update.execute(params![key.tenant.as_str(), key.instance.as_str(), json])?;
        }
        self.unchanged(key, created)
    }

    /// The instance is gone at once; its turns, ids and episodes are removed by and by (see `chores`).
    fn forget(&mut self, key: &InstanceKey) -> Result<Committed, Trouble> {
        let gone = Committed { head: Head::default(), created: false };
        let Some(born) = rows::born(self.db, key)? else { return Ok(gone) };
        let head = self.head(key)?;
        // Parts of its memory have pages of their own, which become free at once.
        self.overwrite(true)?;
        for table in [
            "DELETE FROM instances WHERE tenant = ?1 AND instance = ?2",
            "DELETE FROM heads WHERE tenant = ?1 AND instance = ?2",
            "DELETE FROM inbox WHERE tenant = ?1 AND instance = ?2",
            "DELETE FROM dead WHERE tenant = ?1 AND instance = ?2",
            "DELETE FROM pending WHERE tenant = ?1 AND instance = ?2",
            "DELETE FROM turn_steps WHERE tenant = ?1 AND instance = ?2",
            "DELETE FROM blobs WHERE tenant = ?1 AND instance = ?2",
            "DELETE FROM memory_parts WHERE tenant = ?1 AND instance = ?2",
        ] {
            self.db.prepare_cached(table)?.execute(params![key.tenant.as_str(), key.instance.as_str()])?;
        }
        let mut insert = self.db.prepare_cached("INSERT INTO forgotten (born, seq) VALUES (?1, ?2)")?;
        insert.execute(params![born, head.links[0]])?;
        self.delta.forget(key, self.last_position());
        self.waiting.set(key, 0);
        self.dead.set(key, 0);
        self.steps.set(key, 0);
        self.has_forgotten = true;
        Ok(gone)
    }

    pub(super) fn apply_shipping(&mut self, write: &Shipping) -> Result<(), Error> {
        match write {
            Shipping::Shipped { position, .. } => {
                let shipped = rows::meta(self.db, "shipped")?.max(*position);
                rows::set_meta(self.db, "shipped", shipped)
            }
            Shipping::Postpone(pending) => {
                let mut insert = self.db.prepare_cached(
                    "INSERT OR REPLACE INTO pending (tenant, instance, effect, due, tries, rec)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                )?;
                let (tenant, instance) = (pending.key.tenant.as_str(), pending.key.instance.as_str());
                let rec = record::encode_pending(pending)?;
                insert.execute(params![tenant, instance, pending.effect_id, pending.due.0, pending.tries, rec])?;
                Ok(())
            }
            Shipping::Settle { key, effect_id } => {
                let mut delete = self
                    .db
                    .prepare_cached("DELETE FROM pending WHERE tenant = ?1 AND instance = ?2 AND effect = ?3")?;
                delete.execute(params![key.tenant.as_str(), key.instance.as_str(), effect_id])?;
                Ok(())
            }
        }
    }

    pub(super) fn apply_mqtt(&mut self, write: &MqttWrite) -> Result<(), Error> {
        let db = self.db;
        match write {
            MqttWrite::PutSession { tenant, client, record, .. } => db
                .prepare_cached("INSERT OR REPLACE INTO mqtt_sessions (tenant, client, rec) VALUES (?1, ?2, ?3)")?
                .execute(params![tenant.as_str(), client, record.as_ref()])?,
            MqttWrite::DropSession { tenant, client, .. } => {
                db.prepare_cached("DELETE FROM mqtt_queue WHERE tenant = ?1 AND client = ?2")?
                    .execute(params![tenant.as_str(), client])?;
                db.prepare_cached("DELETE FROM mqtt_sessions WHERE tenant = ?1 AND client = ?2")?
                    .execute(params![tenant.as_str(), client])?
            }
            MqttWrite::Enqueue { tenant, client, order, record, .. } => db
                .prepare_cached("INSERT OR REPLACE INTO mqtt_queue (tenant, client, ord, rec) VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![tenant.as_str(), client, order, record.as_ref()])?,
            MqttWrite::Dequeue { tenant, client, order, .. } => db
                .prepare_cached("DELETE FROM mqtt_queue WHERE tenant = ?1 AND client = ?2 AND ord = ?3")?
                .execute(params![tenant.as_str(), client, order])?,
            MqttWrite::Retain { tenant, topic, record } if record.is_empty() => db
                .prepare_cached("DELETE FROM mqtt_retained WHERE tenant = ?1 AND topic = ?2")?
                .execute(params![tenant.as_str(), topic])?,
            MqttWrite::Retain { tenant, topic, record } => db
                .prepare_cached("INSERT OR REPLACE INTO mqtt_retained (tenant, topic, rec) VALUES (?1, ?2, ?3)")?
                .execute(params![tenant.as_str(), topic, record.as_ref()])?,
            // There is no other node.
            MqttWrite::Mail { .. } | MqttWrite::Collect { .. } => 0,
        };
        Ok(())
    }
}
