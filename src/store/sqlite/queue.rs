//! A bounded queue between many senders and the threads of the store; a consumer takes many items at once.
//!
//! Invariants: never longer than its limit; a sender never waits. Closing refuses new items; what is queued is still taken
//! unless it is abandoned. Tests: at the foot.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Why an item was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// The limit is reached.
    Full,
    /// Nobody will take it any more.
    Closed,
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Woken {
    /// There are items.
    Items,
    /// Nothing came in time.
    Idle,
    /// Nothing will come.
    Closed,
}

#[derive(Debug)]
struct Inner<T> {
    items: VecDeque<T>,
    closed: bool,
    sleepers: usize,
}

/// The queue.
#[derive(Debug)]
pub(super) struct Queue<T> {
    inner: Mutex<Inner<T>>,
    ready: Condvar,
    limit: usize,
}

impl<T> Queue<T> {
    /// An empty queue of at most `limit` items.
    pub(super) fn new(limit: usize) -> Self {
        let inner = Inner { items: VecDeque::new(), closed: false, sleepers: 0 };
        Self { inner: Mutex::new(inner), ready: Condvar::new(), limit: limit.max(1) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends an item, or gives it back at once.
    ///
    /// # Errors
    /// The item, and why it was refused.
    pub(super) fn push(&self, item: T) -> Result<(), (T, Refused)> {
        let mut inner = self.inner();
        if inner.closed {
            return Err((item, Refused::Closed));
        }
        if inner.items.len() >= self.limit {
            return Err((item, Refused::Full));
        }
        inner.items.push_back(item);
        let wake = inner.sleepers > 0;
        drop(inner);
        // A consumer at work looks again before it sleeps: waking it would be a system call for nothing.
        if wake {
            self.ready.notify_one();
        }
        Ok(())
    }

    /// Moves the oldest items to `out` until `more` says after one that it was the last, after waiting for the first at most
    /// `wait`.
    pub(super) fn take(&self, out: &mut VecDeque<T>, wait: Duration, mut more: impl FnMut(&T) -> bool) -> Woken {
        let mut inner = self.inner();
        if inner.items.is_empty() && !inner.closed && !wait.is_zero() {
            inner.sleepers += 1;
            inner = self
                .ready
                .wait_timeout_while(inner, wait, |inner| inner.items.is_empty() && !inner.closed)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            inner.sleepers -= 1;
        }
        let mut taken = false;
        while let Some(item) = inner.items.pop_front() {
            taken = true;
            let goes_on = more(&item);
            out.push_back(item);
            if !goes_on {
                break;
            }
        }
        match (taken, inner.closed) {
            (true, _) => Woken::Items,
            (false, true) => Woken::Closed,
            (false, false) => Woken::Idle,
        }
    }

    /// Items that wait.
    pub(super) fn len(&self) -> usize {
        self.inner().items.len()
    }

    /// Refuses new items from here on.
    pub(super) fn close(&self) {
        self.inner().closed = true;
        self.ready.notify_all();
    }

    /// Refuses new items and gives up those that wait.
    pub(super) fn abandon(&self) -> VecDeque<T> {
        let mut inner = self.inner();
        inner.closed = true;
        let items = std::mem::take(&mut inner.items);
        drop(inner);
        self.ready.notify_all();
        items
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn it_is_bounded_and_ordered() {
        let queue = Queue::new(3);
        (1..=3).for_each(|item| queue.push(item).unwrap());
        assert_eq!(queue.push(4), Err((4, Refused::Full)));
        let mut out = VecDeque::new();
        let mut room = 2;
        let woken = queue.take(&mut out, LONG, |_| {
            room -= 1;
            room > 0
        });
        assert_eq!((woken, out), (Woken::Items, VecDeque::from([1, 2])));
        assert_eq!(queue.len(), 1);
    }

    #[test]
    fn closing_lets_the_rest_be_taken_and_abandoning_does_not() {
        let queue = Queue::new(3);
        queue.push(1).unwrap();
        queue.close();
        assert_eq!(queue.push(2), Err((2, Refused::Closed)));
        let mut out = VecDeque::new();
        assert_eq!(queue.take(&mut out, LONG, |_| true), Woken::Items);
        assert_eq!(queue.take(&mut out, LONG, |_| true), Woken::Closed);
        let queue = Queue::new(3);
        queue.push(1).unwrap();
        assert_eq!(queue.abandon(), [1]);
        assert_eq!(queue.take(&mut out, LONG, |_| true), Woken::Closed);
    }

    #[test]
    fn a_sleeper_is_woken() {
        let queue = std::sync::Arc::new(Queue::new(3));
        let consumer = std::thread::spawn({
            let queue = std::sync::Arc::clone(&queue);
            move || {
                let mut out = VecDeque::new();
                queue.take(&mut out, LONG, |_| true);
                out
            }
        });
        queue.push(7).unwrap();
        assert_eq!(consumer.join().unwrap(), [7]);
    }
}
