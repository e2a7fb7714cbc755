//! The journal of turns under way: what a group commit writes and removes of it. Read with the rest of an instance
//! (`query`). Tests: `tests/it/store_contract.rs`.

use std::sync::Arc;

use tokio_postgres::types::Type;

use super::{
    sql::Sql,
    writes::{Blobs, Step as Statement, Texts, int},
};
use crate::{
    store::{Error, journal},
    types::{InstanceKey, Step, StimulusId},
};

const BLOBS: Sql = Sql {
    text: "INSERT INTO blobs (tenant, instance, hash, bytes)
           SELECT * FROM unnest($1::text[], $2::text[], $3::bytea[], $4::bytea[]) ON CONFLICT DO NOTHING",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::BYTEA_ARRAY, Type::BYTEA_ARRAY],
};
const STEPS: Sql = Sql {
    text: "INSERT INTO turn_steps (tenant, instance, stimulus, n, rec)
           SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::bytea[])
           ON CONFLICT (tenant, instance, stimulus, n) DO UPDATE SET rec = excluded.rec",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::INT4_ARRAY, Type::BYTEA_ARRAY],
};
/// The texts of an instance go with its last step. What is removed here is still seen by the rest of the statement.
const GONE: Sql = Sql {
    text: "WITH g AS (SELECT * FROM unnest($1::text[], $2::text[], $3::text[]) g(tenant, instance, stimulus)),
             s AS (DELETE FROM turn_steps x USING g WHERE x.tenant = g.tenant AND x.instance = g.instance
               AND x.stimulus = g.stimulus RETURNING x.tenant, x.instance)
           DELETE FROM blobs b USING (SELECT DISTINCT tenant, instance FROM s) d
           WHERE b.tenant = d.tenant AND b.instance = d.instance
             AND NOT EXISTS (SELECT FROM turn_steps o WHERE o.tenant = d.tenant AND o.instance = d.instance
               AND NOT EXISTS (SELECT FROM g WHERE g.tenant = o.tenant AND g.instance = o.instance
                 AND g.stimulus = o.stimulus))",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::TEXT_ARRAY],
};

/// What a group commit writes of journals.
#[derive(Default)]
pub(super) struct Steps<'a> {
    blobs: (Texts<'a>, Texts<'a>, Blobs, Blobs),
    steps: (Texts<'a>, Texts<'a>, Texts<'a>, Vec<i32>, Blobs),
    gone: (Texts<'a>, Texts<'a>, Texts<'a>),
}

impl<'a> Steps<'a> {
    /// Steps of a stimulus, the first under this number.
    pub(super) fn enter(
        &mut self,
        key: &'a InstanceKey,
        stimulus: &'a StimulusId,
        first: u32,
        steps: &'a [Arc<Step>],
    ) -> Result<(), Error> {
        for (number, step) in (first..).zip(steps) {
            let encoded = journal::encode(step)?;
            for (hash, bytes) in encoded.texts {
                self.blobs.0.push(key.tenant.as_str());
                self.blobs.1.push(key.instance.as_str());
                self.blobs.2.push(hash.to_vec());
                self.blobs.3.push(bytes);
            }
            self.steps.0.push(key.tenant.as_str());
            self.steps.1.push(key.instance.as_str());
            self.steps.2.push(stimulus.as_str());
            self.steps.3.push(int(number));
            self.steps.4.push(encoded.rec);
        }
        Ok(())
    }

    /// The steps of a stimulus go.
    pub(super) fn leave(&mut self, key: &'a InstanceKey, stimulus: &'a StimulusId) {
        self.gone.0.push(key.tenant.as_str());
        self.gone.1.push(key.instance.as_str());
        self.gone.2.push(stimulus.as_str());
    }

    /// The statements, each with its number of rows.
    pub(super) fn statements(&self) -> [(usize, Statement<'_>); 3] {
        let (blobs, steps, gone) = (&self.blobs, &self.steps, &self.gone);
        [
            (blobs.0.len(), (&BLOBS, vec![&blobs.0, &blobs.1, &blobs.2, &blobs.3])),
            (steps.0.len(), (&STEPS, vec![&steps.0, &steps.1, &steps.2, &steps.3, &steps.4])),
            (gone.0.len(), (&GONE, vec![&gone.0, &gone.1, &gone.2])),
        ]
    }
}
