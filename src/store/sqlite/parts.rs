//! Parts of memories: written by the writer's thread, read for a shelf that is made. A row with `after` -1 says which turn forgot
//! something last, one with -2 is the index over the vectors. Tests: `tests/it/memory_checkpoint.rs`.

use bytes::Bytes;
use rusqlite::{OptionalExtension as _, params};

use super::{reader::View, rows, writer::Writer};
use crate::{
    store::{Error, Index, Keep, Part, Parts, Piece, Spans},
    types::InstanceKey,
};

/// Where the index stands.
const INDEX: i64 = -2;

impl Writer<'_> {
    /// Writes, replaces or removes a piece, unless it is of another life or of before something was forgotten.
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
        let rec = keep.piece.rec();
        let (after, upto) = match &keep.piece {
            Piece::Part(part) => (i64::try_from(part.after).unwrap_or(i64::MAX), part.upto),
            Piece::Index(_) => (INDEX, keep.seen),
        };
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

    /// Parts go in which something stands that a turn forgets, and the index: its centres are made of all vectors.
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
        let mut index =
            self.db.prepare_cached("DELETE FROM memory_parts WHERE tenant = ?1 AND instance = ?2 AND after = -2")?;
        index.execute(params![tenant, instance])?;
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
            "SELECT after, upto, rec FROM memory_parts WHERE tenant = ?1 AND instance = ?2
             AND after >= coalesce((SELECT max(after) FROM memory_parts
               WHERE tenant = ?1 AND instance = ?2 AND after BETWEEN 0 AND ?3), 0)
             AND upto > ?3 AND upto <= ?4 ORDER BY after LIMIT ?5",
        )?;
        let names = params![key.tenant.as_str(), key.instance.as_str(), behind, head, limit];
        let part = |row: &rusqlite::Row<'_>| {
            Ok(Part { after: row.get(0)?, upto: row.get(1)?, rec: Bytes::from(row.get::<_, Vec<u8>>(2)?) })
        };
        let parts = query.query_map(names, part)?.collect::<Result<_, _>>()?;
        Ok(Parts { life, parts })
    }

    pub(super) fn index(&self, key: &InstanceKey) -> Result<Option<Index>, Error> {
        let settled = self.settled(key, |_| ())?;
        let Some(life) = rows::born(&settled.tx, key)? else { return Ok(None) };
        let head = settled.head(key)?.turn;
        let mut query = settled.tx.prepare_cached(
            "SELECT i.upto, i.rec FROM memory_parts i LEFT JOIN memory_parts m
               ON m.tenant = i.tenant AND m.instance = i.instance AND m.after = -1
             WHERE i.tenant = ?1 AND i.instance = ?2 AND i.after = -2 AND i.upto <= ?3 AND i.upto >= coalesce(m.upto, 0)",
        )?;
        let index = |row: &rusqlite::Row<'_>| {
            Ok(Index { life, upto: row.get(0)?, rec: Bytes::from(row.get::<_, Vec<u8>>(1)?) })
        };
        Ok(query.query_row(params![key.tenant.as_str(), key.instance.as_str(), head], index).optional()?)
    }

    pub(super) fn spans(&self, key: &InstanceKey) -> Result<Spans, Error> {
        let settled = self.settled(key, |_| ())?;
        let Some(life) = rows::born(&settled.tx, key)? else { return Ok(Spans::default()) };
        let head = settled.head(key)?.turn;
        let mut query = settled.tx.prepare_cached(
            "SELECT after, upto FROM memory_parts WHERE tenant = ?1 AND instance = ?2 ORDER BY after",
        )?;
        let found = query
            .query_map(params![key.tenant.as_str(), key.instance.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let rows: Vec<(i64, u64)> = found.collect::<Result<_, _>>()?;
        Ok(Spans::of(life, head, &rows))
    }
}
