//! What goes away by and by: turns, ids and episodes of forgotten instances, and ids older than the window.
//!
//! Both go in small portions inside other transactions; neither is visible meanwhile, because every lookup compares with
//! where the instance's present life began. Tests: `tests/it/store_contract.rs`, `tests/it/store_sqlite.rs`.

use rusqlite::params;

use super::{memtable::day, record, rows, writer::Writer};
use crate::store::Error;

impl Writer<'_> {
    /// Whether there is something to remove.
    pub(super) fn has_chores(&self) -> bool {
        self.has_forgotten || self.expired_day().is_some()
    }

    fn expired_day(&self) -> Option<i64> {
        self.days.first().copied().filter(|day| *day < self.first_day())
    }

    /// Removes about `rows` rows within the running transaction.
    pub(super) fn chores_portion(&mut self, rows: usize) -> Result<(), Error> {
        if self.has_forgotten {
            self.overwrite(true)?;
            match self.next_forgotten()? {
                Some((born, seq)) if seq != 0 => self.remove_turns(born, seq, rows)?,
                Some((born, _)) => self.remove_episodes(born, rows)?,
                None => self.has_forgotten = false,
            }
        }
        if let Some(day) = self.expired_day() {
            self.expire(day, rows)?;
        }
        Ok(())
    }

    /// Walks a forgotten life backward and deletes its turns and their ids.
    fn remove_turns(&mut self, born: i64, seq: i64, rows: usize) -> Result<(), Error> {
        self.keep_positions();
        let mut at = seq;
        let mut read = self.db.prepare_cached("SELECT rec, tenant, instance FROM turns WHERE seq = ?1")?;
        let mut delete = self.db.prepare_cached("DELETE FROM turns WHERE seq = ?1")?;
        let mut unlist = self.db.prepare_cached(
            "DELETE FROM seen WHERE bucket = ?1 AND tenant = ?2 AND stimulus = ?3 AND instance = ?4 AND seq = ?5",
        )?;
        for _ in 0..rows {
            if at <= born {
                at = 0;
                break;
            }
            let mut found = read.query([at])?;
            let Some(row) = found.next()? else {
                at = 0;
                break;
            };
            let (head, bytes) = record::decode_row(rows::blob(row, 0)?, at)?;
            if head.has(record::INDEXED) {
                let key = rows::key(row, 1, 2)?;
                let turn = record::decode_record(bytes, at)?;
                let (tenant, instance) = (key.tenant.as_str(), key.instance.as_str());
                unlist.execute(params![day(turn.decided_at), tenant, turn.stimulus.id.as_str(), instance, at])?;
            }
            drop(found);
            delete.execute([at])?;
            at = head.place.back[0];
        }
        self.db.prepare_cached("UPDATE forgotten SET seq = ?2 WHERE born = ?1")?.execute(params![born, at])?;
        Ok(())
    }

    fn remove_episodes(&self, owner: i64, rows: usize) -> Result<(), Error> {
        let mut words = self.db.prepare_cached(
            "DELETE FROM words WHERE (owner, word, episode) IN
             (SELECT owner, word, episode FROM words WHERE owner = ?1 LIMIT ?2)",
        )?;
        let mut episodes = self.db.prepare_cached(
            "DELETE FROM episodes WHERE (owner, episode) IN
             (SELECT owner, episode FROM episodes WHERE owner = ?1 LIMIT ?2)",
        )?;
        let removed = words.execute(params![owner, rows])? + episodes.execute(params![owner, rows])?;
        if removed == 0 {
            self.db.prepare_cached("DELETE FROM corpora WHERE owner = ?1")?.execute([owner])?;
            self.db.prepare_cached("DELETE FROM forgotten WHERE born = ?1")?.execute([owner])?;
        }
        Ok(())
    }

    fn expire(&mut self, day: i64, rows: usize) -> Result<(), Error> {
        let mut delete = self.db.prepare_cached(
            "DELETE FROM seen WHERE (bucket, tenant, stimulus, instance) IN
             (SELECT bucket, tenant, stimulus, instance FROM seen WHERE bucket = ?1 LIMIT ?2)",
        )?;
        if delete.execute(params![day, rows])? < rows {
            // When the transaction fails after all, the leftover is invisible no longer than until the next start.
            self.days.remove(&day);
        }
        Ok(())
    }
}
