//! Single rows, as the writer and the readers both ask for them.
//!
//! Every statement names the tenant, or a log position that was found under one. Tests: `tests/it/store_contract.rs`.

use rusqlite::{Connection, OptionalExtension as _, Row as SqlRow, params};

use super::record::{self, Row};
use crate::{
    store::{DeadLetter, Error, Head},
    types::{InstanceId, InstanceKey, Millis, Stimulus, StimulusId, TenantId, TurnRecord},
};

/// A stored text as an id.
///
/// # Errors
/// [`Error::Corrupt`].
pub(super) fn id<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, Error> {
    text.parse().map_err(|e| Error::Corrupt(format!("a stored id '{text}': {e}")))
}

/// The key in two columns of a row.
///
/// # Errors
/// [`Error::Corrupt`].
pub(super) fn key(row: &SqlRow<'_>, tenant: usize, instance: usize) -> Result<InstanceKey, Error> {
    let tenant: TenantId = id(row.get_ref(tenant)?.as_str().map_err(rusqlite::Error::from)?)?;
    let instance: InstanceId = id(row.get_ref(instance)?.as_str().map_err(rusqlite::Error::from)?)?;
    Ok(InstanceKey::new(tenant, instance))
}

/// A blob column.
pub(super) fn blob<'a>(row: &'a SqlRow<'_>, column: usize) -> Result<&'a [u8], Error> {
    Ok(row.get_ref(column)?.as_blob().map_err(rusqlite::Error::from)?)
}

/// A turn's row, if it is there and of that instance.
pub(super) fn turn_at(db: &Connection, key: &InstanceKey, seq: i64) -> Result<Option<(Row, TurnRecord)>, Error> {
    let mut query = db.prepare_cached("SELECT rec FROM turns WHERE seq = ?1 AND tenant = ?2 AND instance = ?3")?;
    let mut rows = query.query(params![seq, key.tenant.as_str(), key.instance.as_str()])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    let (head, bytes) = record::decode_row(blob(row, 0)?, seq)?;
    Ok(Some((head, record::decode_record(bytes, seq)?)))
}

/// The head of a turn's row, if it is there and of that instance.
pub(super) fn row_at(db: &Connection, key: &InstanceKey, seq: i64) -> Result<Option<Row>, Error> {
    let mut query = db.prepare_cached("SELECT rec FROM turns WHERE seq = ?1 AND tenant = ?2 AND instance = ?3")?;
    let mut rows = query.query(params![seq, key.tenant.as_str(), key.instance.as_str()])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    Ok(Some(record::decode_row(blob(row, 0)?, seq)?.0))
}

/// What to say of a log that lacks a turn which something points to.
pub(super) fn missing(key: &InstanceKey, seq: i64) -> Error {
    Error::Corrupt(format!("the turn of {key} at {seq} is gone"))
}

/// The head in the folded table.
pub(super) fn folded_head(db: &Connection, key: &InstanceKey) -> Result<Head, Error> {
    let mut query = db.prepare_cached("SELECT seq FROM heads WHERE tenant = ?1 AND instance = ?2")?;
    let seq: Option<i64> =
        query.query_row(params![key.tenant.as_str(), key.instance.as_str()], |row| row.get(0)).optional()?;
    let Some(seq) = seq else { return Ok(Head::default()) };
    let row = row_at(db, key, seq)?.ok_or_else(|| missing(key, seq))?;
    Ok(row.place.head_before().advance(seq))
}

/// Where the present life of an instance began in the log; `None` when there is no such instance.
pub(super) fn born(db: &Connection, key: &InstanceKey) -> Result<Option<i64>, Error> {
    let mut query = db.prepare_cached("SELECT born FROM instances WHERE tenant = ?1 AND instance = ?2")?;
    Ok(query.query_row(params![key.tenant.as_str(), key.instance.as_str()], |row| row.get(0)).optional()?)
}

/// Where the folded index says an id was decided, on one of the days, in the instance's present life.
pub(super) fn seen(
    db: &Connection,
    days: impl Iterator<Item = i64>,
    key: &InstanceKey,
    stimulus: &StimulusId,
) -> Result<Option<i64>, Error> {
    let mut query = db
        .prepare_cached("SELECT seq FROM seen WHERE bucket = ?1 AND tenant = ?2 AND stimulus = ?3 AND instance = ?4")?;
    for day in days {
        let names = params![day, key.tenant.as_str(), stimulus.as_str(), key.instance.as_str()];
        let found: Option<i64> = query.query_row(names, |row| row.get(0)).optional()?;
        if let Some(seq) = found
            && born(db, key)?.is_some_and(|born| seq > born)
        {
            return Ok(Some(seq));
        }
    }
    Ok(None)
}

/// The days the folded index has, newest first.
pub(super) fn days(db: &Connection) -> Result<Vec<i64>, Error> {
    let mut query = db.prepare_cached("SELECT max(bucket) FROM seen WHERE bucket < ?1")?;
    let mut days = Vec::new();
    let mut before = i64::MAX;
    while let Some(day) = query.query_row([before], |row| row.get::<_, Option<i64>>(0))? {
        days.push(day);
        before = day;
    }
    Ok(days)
}

/// The oldest waiting stimulus of that id, with its place in the inbox.
pub(super) fn waiting(
    db: &Connection,
    key: &InstanceKey,
    stimulus: &StimulusId,
) -> Result<Option<(i64, Stimulus)>, Error> {
    let mut query = db.prepare_cached(
        "SELECT ord, rec FROM inbox WHERE tenant = ?1 AND stimulus = ?2 AND instance = ?3 ORDER BY ord LIMIT 1",
    )?;
    let mut rows = query.query(params![key.tenant.as_str(), stimulus.as_str(), key.instance.as_str()])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    Ok(Some((row.get(0)?, record::decode_stimulus(blob(row, 1)?)?)))
}

/// The dead letter of that id, with its place.
pub(super) fn dead(
    db: &Connection,
    key: &InstanceKey,
    stimulus: &StimulusId,
) -> Result<Option<(i64, DeadLetter)>, Error> {
    let mut query = db.prepare_cached(
        "SELECT ord, reason, tries, at, rec FROM dead WHERE tenant = ?1 AND stimulus = ?2 AND instance = ?3 LIMIT 1",
    )?;
    let mut rows = query.query(params![key.tenant.as_str(), stimulus.as_str(), key.instance.as_str()])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    Ok(Some((row.get(0)?, letter(row)?)))
}

/// A dead letter from its columns `reason`, `tries`, `at`, `rec`, after one other.
pub(super) fn letter(row: &SqlRow<'_>) -> Result<DeadLetter, Error> {
    let stimulus = record::decode_stimulus(blob(row, 4)?)?;
    Ok(DeadLetter { stimulus, reason: row.get(1)?, tries: row.get(2)?, at: Millis(row.get(3)?) })
}

/// A named number.
pub(super) fn meta(db: &Connection, name: &str) -> Result<i64, Error> {
    let mut query = db.prepare_cached("SELECT value FROM meta WHERE name = ?1")?;
    Ok(query.query_row([name], |row| row.get(0)).optional()?.unwrap_or(0))
}

/// Sets a named number.
pub(super) fn set_meta(db: &Connection, name: &str, value: i64) -> Result<(), Error> {
    let mut write = db.prepare_cached("INSERT OR REPLACE INTO meta (name, value) VALUES (?1, ?2)")?;
    write.execute(params![name, value])?;
    Ok(())
}
