//! What this node wrote elsewhere and how much that is: what was written longest ago goes first. Pure. Tests: at the foot.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

/// Keys with their bytes, in the order they were written.
#[derive(Debug)]
pub(super) struct Ledger {
    written: HashMap<Arc<str>, (u64, usize), ahash::RandomState>,
    order: VecDeque<(u64, Arc<str>)>,
    next: u64,
    bytes: u64,
    most: u64,
}

impl Ledger {
    /// For at most so many bytes.
    pub fn new(most: u64) -> Self {
        Self { written: HashMap::default(), order: VecDeque::new(), next: 0, bytes: 0, most }
    }

    /// A key was written; those that have to go for it.
    pub fn wrote(&mut self, key: String, bytes: usize) -> Vec<String> {
        let key: Arc<str> = key.into();
        self.next += 1;
        if let Some((_, before)) = self.written.insert(key.clone(), (self.next, bytes)) {
            self.bytes -= before as u64;
        }
        self.bytes += bytes as u64;
        self.order.push_back((self.next, key));
        if self.order.len() > 2 * self.written.len() + 64 {
            self.order.retain(|(number, key)| self.written.get(key).is_some_and(|(newest, _)| newest == number));
        }
        self.shed()
    }

    /// A key was dropped.
    pub fn dropped(&mut self, key: &str) {
        if let Some((_, bytes)) = self.written.remove(key) {
            self.bytes -= bytes as u64;
        }
    }

    /// Another bound; those that have to go for it.
    pub fn resize(&mut self, most: u64) -> Vec<String> {
        self.most = most;
        self.shed()
    }

    fn shed(&mut self) -> Vec<String> {
        let mut over = Vec::new();
        while self.bytes > self.most
            && let Some((number, key)) = self.order.pop_front()
        {
            if self.written.get(&key).is_some_and(|(newest, _)| *newest == number) {
                self.dropped(&key);
                over.push(key.to_string());
            }
        }
        over
    }

    /// How many keys.
    pub fn len(&self) -> u64 {
        self.written.len() as u64
    }

    /// Their bytes.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_longest_ago_goes_first() {
        let mut ledger = Ledger::new(30);
        assert!(ledger.wrote("a".into(), 10).is_empty());
        assert!(ledger.wrote("b".into(), 10).is_empty());
        assert!(ledger.wrote("a".into(), 10).is_empty(), "again: the same key counts once");
        assert_eq!(ledger.wrote("c".into(), 20), ["b"]);
        ledger.dropped("a");
        assert_eq!((ledger.len(), ledger.bytes()), (1, 20));
        assert_eq!(ledger.resize(10), ["c"]);
        (0..10_000).for_each(|_| assert!(ledger.wrote("d".into(), 5).is_empty()));
        assert!(ledger.order.len() < 100, "it does not grow with what is written again");
    }
}
