//! How many rows of a table each instance has, so that the commit path asks the table only when there is something.
//!
//! Bounded by the instances that have such rows at all. Changes of a transaction count at once and become lasting, or are
//! taken back, with it. Tests: at the foot.

use std::collections::HashMap;

use crate::types::InstanceKey;

type Map<V> = HashMap<InstanceKey, V, ahash::RandomState>;

/// The counts of one table.
#[derive(Debug, Default)]
pub(super) struct Counts {
    lasting: Map<u64>,
    /// As the running transaction has them.
    moved: Map<u64>,
}

impl Counts {
    /// Counts as they stand in the table.
    pub(super) fn of(rows: impl IntoIterator<Item = (InstanceKey, u64)>) -> Self {
        Self { lasting: rows.into_iter().collect(), moved: Map::default() }
    }

    /// The instance's rows.
    pub(super) fn get(&self, key: &InstanceKey) -> u64 {
        if self.lasting.is_empty() && self.moved.is_empty() {
            return 0;
        }
        self.moved.get(key).or_else(|| self.lasting.get(key)).copied().unwrap_or(0)
    }

    /// Sets the instance's rows within the running transaction.
    pub(super) fn set(&mut self, key: &InstanceKey, rows: u64) {
        self.moved.insert(key.clone(), rows);
    }

    /// The transaction was committed.
    pub(super) fn commit(&mut self) {
        for (key, rows) in self.moved.drain() {
            if rows == 0 {
                self.lasting.remove(&key);
            } else {
                self.lasting.insert(key, rows);
            }
        }
    }

    /// The transaction was rolled back.
    pub(super) fn rollback(&mut self) {
        self.moved.clear();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{InstanceId, TenantId};

    #[test]
    fn counts_move_with_their_transaction() {
        let key = InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap());
        let mut counts = Counts::of([(key.clone(), 2)]);
        counts.set(&key, 0);
        assert_eq!(counts.get(&key), 0);
        counts.rollback();
        assert_eq!(counts.get(&key), 2);
        counts.set(&key, 5);
        counts.commit();
        assert_eq!(counts.get(&key), 5);
    }
}
