//! Retained values of one tenant, found by filter. Pure; rows are written by `registry`. Tests: at the foot.

use std::{
    collections::{BTreeMap, btree_map},
    ops::Bound,
    sync::Arc,
};

use super::{record::Message, topic};
use crate::types::Millis;

/// The last retained message of each topic.
#[derive(Debug, Default)]
pub struct Retained {
    values: BTreeMap<String, Arc<Message>>,
    bytes: usize,
}

impl Retained {
    /// Sets a topic's value; an empty payload clears it. False when the tenant is at its limit, of values or bytes.
    pub fn set(&mut self, message: &Arc<Message>, limit: usize, max_bytes: usize) -> bool {
        let old = self.values.get(&message.topic).map_or(0, |old| old.weight());
        if message.payload.is_empty() {
            self.values.remove(&message.topic);
            self.bytes -= old;
            return true;
        }
        let bytes = self.bytes - old + message.weight();
        if bytes > max_bytes {
            return false;
        }
        let len = self.values.len();
        match self.values.entry(message.topic.clone()) {
            btree_map::Entry::Occupied(mut entry) => {
                entry.insert(message.clone());
            }
            btree_map::Entry::Vacant(_) if len >= limit => return false,
            btree_map::Entry::Vacant(entry) => {
                entry.insert(message.clone());
            }
        }
        self.bytes = bytes;
        true
    }

    /// Values a filter selects, in topic order, without those that are expired.
    pub fn select(&self, filter: &str, now: Millis) -> Vec<Arc<Message>> {
        let prefix = topic::literal_prefix(filter);
        let from = (Bound::Included(prefix), Bound::Unbounded);
        self.values
            .range::<str, _>(from)
            .take_while(|(name, _)| name.starts_with(prefix))
            .filter(|(name, message)| topic::matches(filter, name) && !message.is_expired(now))
            .map(|(_, message)| message.clone())
            .collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value(name: &str, payload: &'static str) -> Arc<Message> {
        Arc::new(Message { topic: name.into(), payload: payload.into(), ..Message::default() })
    }

    #[test]
    fn values_are_replaced_cleared_limited_and_expire() {
        let mut retained = Retained::default();
        assert!(retained.set(&value("a", "1"), 1, 999) && retained.set(&value("a", "2"), 1, 999));
        assert!(!retained.set(&value("b", "1"), 1, 999));
        assert_eq!(retained.select("#", Millis(0)), [value("a", "2")]);
        assert!(retained.set(&value("a", ""), 1, 999) && retained.select("#", Millis(0)).is_empty());
        let old = Message { expires_at: Some(Millis(5)), ..(*value("c", "1")).clone() };
        retained.set(&Arc::new(old), 1, 999);
        assert_eq!((retained.select("c", Millis(4)).len(), retained.select("c", Millis(5)).len()), (1, 0));
    }

    #[test]
    fn bytes_are_bounded_and_given_back() {
        let mut retained = Retained::default();
        let size = value("a", "1").weight();
        assert!(retained.set(&value("a", "1"), 9, size) && !retained.set(&value("b", "1"), 9, size));
        assert!(retained.set(&value("a", "2"), 9, size) && retained.set(&value("a", ""), 9, size));
        assert!(retained.set(&value("b", "1"), 9, size));
        assert_eq!(retained.bytes, size);
    }

    proptest! {
        #[test]
        fn the_range_misses_nothing(names in proptest::collection::btree_set("[ab/]{1,6}", 0..12), filter in "[ab/]{0,3}(\\+/[ab]|#|[+]|[ab])") {
            prop_assume!(topic::is_filter(&filter));
            let mut retained = Retained::default();
            for name in &names {
                retained.set(&value(name, "1"), 100, usize::MAX);
            }
            let found: Vec<String> = retained.select(&filter, Millis(0)).iter().map(|m| m.topic.clone()).collect();
            let expected: Vec<String> = names.into_iter().filter(|name| topic::matches(&filter, name)).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
