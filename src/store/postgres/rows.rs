//! Columns of rows, as what they stand for.

use tokio_postgres::Row;

use super::connect::Failure;
use crate::{
    store::{DeadLetter, Error, record},
    types::{InstanceKey, Millis, Profile, Stimulus, TurnRecord},
};

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        failure.into_error()
    }
}

/// A stored text as an id.
pub(super) fn id<T: std::str::FromStr<Err: std::fmt::Display>>(row: &Row, column: usize) -> Result<T, Failure> {
    let text: &str = row.try_get(column)?;
    Ok(text.parse().map_err(|e| Error::Corrupt(format!("a stored id '{text}': {e}")))?)
}

/// The key in two columns.
pub(super) fn key(row: &Row, column: usize) -> Result<InstanceKey, Failure> {
    Ok(InstanceKey::new(id(row, column)?, id(row, column + 1)?))
}

/// A turn from the bytes of its row.
pub(super) fn decode(rec: &[u8]) -> Result<(record::Row, TurnRecord), Error> {
    let (head, bytes) = record::decode_row(rec, 0)?;
    Ok((head, record::decode_record(bytes, 0)?))
}

/// A turn.
pub(super) fn turn(row: &Row, column: usize) -> Result<TurnRecord, Failure> {
    Ok(decode(row.try_get(column)?)?.1)
}

/// A waiting stimulus.
pub(super) fn stimulus(row: &Row, column: usize) -> Result<Stimulus, Failure> {
    Ok(record::decode_stimulus(row.try_get(column)?)?)
}

/// A dead letter, from reason, tries, time and record.
pub(super) fn letter(row: &Row, column: usize) -> Result<DeadLetter, Failure> {
    Ok(DeadLetter {
        stimulus: stimulus(row, column + 3)?,
        reason: row.try_get(column)?,
        tries: u32::try_from(row.try_get::<_, i64>(column + 1)?).unwrap_or(u32::MAX),
        at: Millis(row.try_get(column + 2)?),
    })
}

/// A profile, where there is one.
pub(super) fn profile(row: &Row, column: usize) -> Result<Option<std::sync::Arc<Profile>>, Failure> {
    let Some(json) = row.try_get::<_, Option<&str>>(column)? else { return Ok(None) };
    let profile = serde_json::from_str(json).map_err(|e| Error::Corrupt(format!("a stored profile: {e}")))?;
    Ok(Some(std::sync::Arc::new(profile)))
}
