//! The journal of turns under way: rows of steps, and their long texts by hash. Written and removed inside the writer's
//! transaction, read by activation. Tests: `tests/it/store_contract.rs`, `tests/it/store_sqlite.rs`.

use std::sync::Arc;

use rusqlite::{Connection, params};

use super::{rows, writer::Writer};
use crate::{
    store::{
        Error,
        journal::{self, Journal, Texts},
    },
    types::{InstanceKey, Step, StimulusId},
};

impl Writer<'_> {
    /// Writes steps of a stimulus, the first under this number.
    pub(super) fn enter_steps(
        &mut self,
        key: &InstanceKey,
        stimulus: &StimulusId,
        first: u32,
        steps: &[Arc<Step>],
    ) -> Result<(), Error> {
        let (tenant, instance) = (key.tenant.as_str(), key.instance.as_str());
        let mut text = self.db.prepare_cached(
            "INSERT INTO blobs (tenant, instance, hash, bytes) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING",
        )?;
        let mut step = self.db.prepare_cached(
            "INSERT OR REPLACE INTO turn_steps (tenant, instance, stimulus, n, rec) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?;
        for (number, one) in (first..).zip(steps) {
            let encoded = journal::encode(one)?;
            for (hash, bytes) in &encoded.texts {
                text.execute(params![tenant, instance, &hash[..], bytes])?;
            }
            step.execute(params![tenant, instance, stimulus.as_str(), number, encoded.rec])?;
        }
        // A number that is written anew counts twice: the count says whether to look, not how many there are.
        self.steps.set(key, self.steps.get(key) + steps.len() as u64);
        Ok(())
    }

    /// Removes the steps of a stimulus; the instance's texts go with its last step.
    pub(super) fn leave_steps(&mut self, key: &InstanceKey, stimulus: &StimulusId) -> Result<(), Error> {
        if self.steps.get(key) == 0 {
            return Ok(());
        }
        let (tenant, instance) = (key.tenant.as_str(), key.instance.as_str());
        let mut delete =
            self.db.prepare_cached("DELETE FROM turn_steps WHERE tenant = ?1 AND instance = ?2 AND stimulus = ?3")?;
        delete.execute(params![tenant, instance, stimulus.as_str()])?;
        let mut rest = self.db.prepare_cached("SELECT count(*) FROM turn_steps WHERE tenant = ?1 AND instance = ?2")?;
        let left: u64 = rest.query_row(params![tenant, instance], |row| row.get(0))?;
        if left == 0 {
            let mut texts = self.db.prepare_cached("DELETE FROM blobs WHERE tenant = ?1 AND instance = ?2")?;
            texts.execute(params![tenant, instance])?;
        }
        self.steps.set(key, left);
        Ok(())
    }
}

/// The steps of an instance.
pub(super) fn journals(db: &Connection, key: &InstanceKey) -> Result<Vec<Journal>, Error> {
    let names = params![key.tenant.as_str(), key.instance.as_str()];
    let mut query = db.prepare_cached(
        "SELECT stimulus, rec FROM turn_steps WHERE tenant = ?1 AND instance = ?2 ORDER BY stimulus, n",
    )?;
    let mut found = query.query(names)?;
    let mut recs: Vec<(StimulusId, Vec<u8>)> = Vec::new();
    while let Some(row) = found.next()? {
        let stimulus = rows::id(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?)?;
        recs.push((stimulus, rows::blob(row, 1)?.to_vec()));
    }
    if recs.is_empty() {
        return Ok(Vec::new());
    }
    let mut texts = Texts::default();
    let mut query = db.prepare_cached("SELECT hash, bytes FROM blobs WHERE tenant = ?1 AND instance = ?2")?;
    let mut found = query.query(names)?;
    while let Some(row) = found.next()? {
        texts.add(rows::blob(row, 0)?, rows::blob(row, 1)?)?;
    }
    let read = |(stimulus, rec): (StimulusId, Vec<u8>)| Ok((stimulus, texts.decode(&rec)?));
    Ok(journal::gather(recs.into_iter().map(read).collect::<Result<Vec<_>, Error>>()?))
}
