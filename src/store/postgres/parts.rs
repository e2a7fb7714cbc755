//! Parts of memories. A row with `after` -1 says which turn forgot something last; who writes a piece and who forgets meet at it.
//! One with -2 is the index over the vectors.
//!
//! Tests: `tests/it/memory_checkpoint.rs`.

use bytes::Bytes;
use tokio_postgres::types::Type;

use super::{PostgresStore, Shared, connect::Failure, sql::Sql, writes::big};
use crate::{
    store::{Error, Index, Keep, Part, Parts, Piece, Spans},
    types::InstanceKey,
};

/// The instance's row keeps its life from ending meanwhile; the mark keeps it from forgetting.
const KEEP: Sql = Sql {
    text: "WITH i AS (SELECT 1 FROM instances WHERE tenant = $1 AND instance = $2 AND life = $3 FOR KEY SHARE),
           m AS (INSERT INTO memory_parts AS p (tenant, instance, after, upto, rec)
             SELECT $1, $2, -1, 0, ''::bytea FROM i
             ON CONFLICT (tenant, instance, after) DO UPDATE SET upto = p.upto RETURNING p.upto)
           INSERT INTO memory_parts (tenant, instance, after, upto, rec)
           SELECT $1, $2, $5, $6, $7 FROM m WHERE m.upto <= $4
           ON CONFLICT (tenant, instance, after) DO UPDATE SET upto = excluded.upto, rec = excluded.rec RETURNING 1",
    types: &[Type::TEXT, Type::TEXT, Type::INT8, Type::INT8, Type::INT8, Type::INT8, Type::BYTEA],
};
const DROP: Sql = Sql {
    text: "DELETE FROM memory_parts WHERE tenant = $1 AND instance = $2 AND after = $3 RETURNING 1",
    types: &[Type::TEXT, Type::TEXT, Type::INT8],
};
const PARTS: Sql = Sql {
    text: "SELECT after, upto, rec FROM memory_parts WHERE tenant = $1 AND instance = $2
           AND after >= coalesce((SELECT max(after) FROM memory_parts
             WHERE tenant = $1 AND instance = $2 AND after BETWEEN 0 AND $3), 0)
           AND upto > $3 AND upto <= $4 ORDER BY after LIMIT $5",
    types: &[Type::TEXT, Type::TEXT, Type::INT8, Type::INT8, Type::INT8],
};
const INDEX: Sql = Sql {
    text: "SELECT i.upto, i.rec FROM memory_parts i LEFT JOIN memory_parts m
             ON m.tenant = i.tenant AND m.instance = i.instance AND m.after = -1
           WHERE i.tenant = $1 AND i.instance = $2 AND i.after = -2 AND i.upto <= $3 AND i.upto >= coalesce(m.upto, 0)",
    types: &[Type::TEXT, Type::TEXT, Type::INT8],
};
const SPANS: Sql = Sql {
    text: "SELECT after, upto FROM memory_parts WHERE tenant = $1 AND instance = $2 ORDER BY after",
    types: &[Type::TEXT, Type::TEXT],
};

pub(super) async fn keep(shared: &Shared, keep: &Keep) -> Result<(), Failure> {
    let (tenant, instance) = (keep.key.tenant.as_str(), keep.key.instance.as_str());
    let (seen, rec) = (big(keep.seen), &keep.piece.rec()[..]);
    let (after, upto) = match &keep.piece {
        Piece::Part(part) => (big(part.after), big(part.upto)),
        Piece::Index(_) => (-2, seen),
    };
    let conn = shared.writer().await?;
    if rec.is_empty() {
        conn.run(&DROP, &[&tenant, &instance, &after]).await?;
    } else {
        conn.run(&KEEP, &[&tenant, &instance, &keep.life, &seen, &after, &upto, &rec]).await?;
    }
    Ok(())
}

fn column(error: tokio_postgres::Error) -> Error {
    Failure::from(error).into()
}

impl PostgresStore {
    pub(super) async fn read_parts(&self, key: &InstanceKey, behind: u64, limit: usize) -> Result<Parts, Error> {
        let Some(standing) = self.standing(key).await? else { return Ok(Parts::default()) };
        let (tenant, instance) = (key.tenant.as_str(), key.instance.as_str());
        let (behind, head, limit) = (big(behind), big(standing.turn), big(limit as u64));
        let found = self.rows_of(&key.tenant, &PARTS, &[&tenant, &instance, &behind, &head, &limit]).await?;
        let part = |row: &tokio_postgres::Row| {
            let number = |at| row.try_get::<_, i64>(at).map(i64::unsigned_abs).map_err(column);
            let rec: &[u8] = row.try_get(2).map_err(column)?;
            Ok(Part { after: number(0)?, upto: number(1)?, rec: Bytes::copy_from_slice(rec) })
        };
        let parts = found.iter().map(part).collect::<Result<_, Error>>()?;
        Ok(Parts { life: standing.life, parts })
    }

    pub(super) async fn read_index(&self, key: &InstanceKey) -> Result<Option<Index>, Error> {
        let Some(standing) = self.standing(key).await? else { return Ok(None) };
        let (tenant, instance, head) = (key.tenant.as_str(), key.instance.as_str(), big(standing.turn));
        let found = self.rows_of(&key.tenant, &INDEX, &[&tenant, &instance, &head]).await?;
        let index = |row: &tokio_postgres::Row| {
            let upto = row.try_get::<_, i64>(0).map_err(column)?.unsigned_abs();
            let rec: &[u8] = row.try_get(1).map_err(column)?;
            Ok(Index { life: standing.life, upto, rec: Bytes::copy_from_slice(rec) })
        };
        found.first().map(index).transpose()
    }

    pub(super) async fn read_spans(&self, key: &InstanceKey) -> Result<Spans, Error> {
        let Some(standing) = self.standing(key).await? else { return Ok(Spans::default()) };
        let found = self.rows_of(&key.tenant, &SPANS, &[&key.tenant.as_str(), &key.instance.as_str()]).await?;
        let number = |row: &tokio_postgres::Row, at| row.try_get::<_, i64>(at).map_err(column);
        let row = |row| Ok((number(row, 0)?, number(row, 1)?.unsigned_abs()));
        let rows: Vec<(i64, u64)> = found.iter().map(row).collect::<Result<_, Error>>()?;
        Ok(Spans::of(standing.life, standing.turn, &rows))
    }
}
