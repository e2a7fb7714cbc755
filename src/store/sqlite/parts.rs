//! Parts of memories: written by the writer's thread, read for a shelf that is made. A row with `after` -1 says which turn forgot
//! something last. Tests: `tests/it/store_contract.rs`.

use bytes::Bytes;
use rusqlite::{OptionalExtension as _, params};

use super::{reader::View, rows, writer::Writer};
use crate::{
    store::{Error, Keep, Part, Parts, Spans},
    types::InstanceKey,
};

impl Writer<'_> {
    /// Writes, replaces or removes a part, unless it is of another life or of before something was forgotten.
    pub(super) fn keep_part(&mut self, keep: &Keep) -> Result<(), Error> {
        let (tenant, instance) = (keep.key.tenant.as_str(), keep.key.instance.as_str());
        if rows::born(self.db, &keep.key)? != Some(keep.life) {
            return Ok(());
        }
        let mut mark = self
            .db
            .prepare_cached("SELECT upto FROM memory_parts WHERE tenant = ?1 AND instance = ?2 AND after = -1")?;
        let forgot: Option<u64> = mark.query_row(params![tenant, instance], |row| row.get(0)).optional()?;
        if forgot.is_some_and(|turn| turn > keep.seen) {
            return Ok(());
        }
        let Part { after, upto, rec } = &keep.part;
        if rec.is_empty() {
            let mut delete = self
                .db
                .prepare_cached("DELETE FROM memory_parts WHERE tenant = ?1 AND instance = ?2 AND after = ?3")?;
            delete.execute(params![tenant, instance, after])?;
        } else {
            let mut insert = self.db.prepare_cached(
                "INSERT OR REPLACE INTO memory_parts (tenant, instance, after, upto, rec) VALUES (?1, ?2, ?3, ?4, ?5)",
            )?;
            insert.execute(params![tenant, instance, after, upto, &rec[..]])?;
        }
        Ok(())
    }

    /// Parts go in which something stands that a turn forgets.
    pub(super) fn lose_parts(
        &self,
        key: &InstanceKey,
        turn: u64,
        lost: impl Iterator<Item = u64>,
    ) -> Result<(), Error> {
        let (tenant, instance) = (key.tenant.as_str(), key.instance.as_str());
        let mut mark = self.db.prepare_cached(
            "INSERT OR REPLACE INTO memory_parts (tenant, instance, after, upto, rec) VALUES (?1, ?2, -1, ?3, x'')",
        )?;
        mark.execute(params![tenant, instance, turn])?;
        let mut delete = self.db.prepare_cached(
            "DELETE FROM memory_parts WHERE tenant = ?1 AND instance = ?2 AND after >= 0 AND after < ?3 AND upto >= ?3",
        )?;
        for lost in lost {
            delete.execute(params![tenant, instance, lost])?;
        }
        Ok(())
    }
}

impl View {
    pub(super) fn parts(&self, key: &InstanceKey, behind: u64, limit: usize) -> Result<Parts, Error> {
        let settled = self.settled(key, |_| ())?;
        let Some(life) = rows::born(&settled.tx, key)? else { return Ok(Parts::default()) };
        let head = settled.head(key)?.turn;
        let mut query = settled.tx.prepare_cached(
            "SELECT after, upto, rec FROM memory_parts WHERE tenant = ?1 AND instance = ?2 AND after >= 0
             AND upto > ?3 AND upto <= ?4 ORDER BY after LIMIT ?5",
        )?;
        let names = params![key.tenant.as_str(), key.instance.as_str(), behind, head, limit];
        let part = |row: &rusqlite::Row<'_>| {
            Ok(Part { after: row.get(0)?, upto: row.get(1)?, rec: Bytes::from(row.get::<_, Vec<u8>>(2)?) })
        };
        let parts = query.query_map(names, part)?.collect::<Result<_, _>>()?;
        Ok(Parts { life, parts })
    }

    pub(super) fn spans(&self, key: &InstanceKey) -> Result<Spans, Error> {
        let settled = self.settled(key, |_| ())?;
        let Some(life) = rows::born(&settled.tx, key)? else { return Ok(Spans::default()) };
        let head = settled.head(key)?.turn;
        let mut query = settled.tx.prepare_cached(
            "SELECT after, upto FROM memory_parts WHERE tenant = ?1 AND instance = ?2 AND after >= 0 ORDER BY after",
        )?;
        let found = query
            .query_map(params![key.tenant.as_str(), key.instance.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let spans = found.collect::<Result<_, _>>()?;
        Ok(Spans { life, head, spans })
    }
}
