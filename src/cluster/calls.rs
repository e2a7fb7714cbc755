//! Questions to other nodes and their answers: which answer belongs to which question.
//!
//! Not here: the bus. Invariants: a call is answered at most once, by the node that was asked; one that is answered, given
//! up or past its deadline holds nothing; late answers find nobody and are dropped. Tests: at the foot.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::oneshot;

use crate::types::NodeId;

/// Why a call has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// As many calls are open as may be.
    #[error("too many calls to other nodes are open")]
    Full,
    /// It may never have arrived.
    #[error("the call to another node was lost")]
    Lost,
    /// The deadline passed.
    #[error("another node did not answer within {0:?}")]
    Timeout(Duration),
}

/// Open calls whose answers are a `T`. Cheap to clone.
#[derive(Debug)]
pub struct Calls<T>(Arc<Mutex<Open<T>>>);

impl<T> Clone for Calls<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

#[derive(Debug)]
struct Open<T> {
    calls: HashMap<u64, (NodeId, oneshot::Sender<T>), ahash::RandomState>,
    last: u64,
    most: usize,
}

impl<T> Calls<T> {
    /// At most `most` are open at once.
    pub fn new(most: usize) -> Self {
        Self(Arc::new(Mutex::new(Open { calls: HashMap::default(), last: 0, most })))
    }

    /// Opens a call to a node.
    ///
    /// # Errors
    /// [`Unanswered::Full`].
    pub fn open(&self, to: &NodeId) -> Result<Call<T>, Unanswered> {
        let mut open = self.lock();
        if open.calls.len() >= open.most {
            return Err(Unanswered::Full);
        }
        open.last += 1;
        let (id, (sender, answer)) = (open.last, oneshot::channel());
        open.calls.insert(id, (to.clone(), sender));
        Ok(Call { id, answer, calls: self.clone() })
    }

    /// An answer came. False when nobody waits for it, or it comes from another node than was asked.
    pub fn answer(&self, from: &NodeId, id: u64, answer: T) -> bool {
        let mut open = self.lock();
        if open.calls.get(&id).is_none_or(|(asked, _)| asked != from) {
            return false;
        }
        let waiting = open.calls.remove(&id);
        drop(open);
        waiting.is_some_and(|(_, waiting)| waiting.send(answer).is_ok())
    }

    /// What was asked of a node, or of any, may never have arrived: these calls end. Returns how many.
    pub fn lost(&self, to: Option<&NodeId>) -> usize {
        self.lock().calls.extract_if(|_, (asked, _)| to.is_none_or(|to| asked == to)).count()
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.lock().calls.len()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Open<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open call. Dropping it gives it up.
#[derive(Debug)]
pub struct Call<T> {
    id: u64,
    answer: oneshot::Receiver<T>,
    calls: Calls<T>,
}

impl<T> Call<T> {
    /// What the answer has to name.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// Waits for the answer. Cancel safe in that giving up leaves nothing behind.
    ///
    /// # Errors
    /// [`Unanswered::Lost`], [`Unanswered::Timeout`].
    pub async fn within(mut self, deadline: Duration) -> Result<T, Unanswered> {
        match tokio::time::timeout(deadline, &mut self.answer).await {
            Err(_) => Err(Unanswered::Timeout(deadline)),
            Ok(Err(_)) => Err(Unanswered::Lost),
            Ok(Ok(answer)) => Ok(answer),
        }
    }
}

impl<T> Drop for Call<T> {
    fn drop(&mut self) {
        self.calls.lock().calls.remove(&self.id);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn an_answer_finds_its_call_once_and_from_the_one_asked() {
        let calls = Calls::new(8);
        let (one, two) = (calls.open(&node("a")).unwrap(), calls.open(&node("a")).unwrap());
        let (first, second) = (one.id(), two.id());
        assert!(!calls.answer(&node("b"), second, 0), "another node's answer");
        assert!(calls.answer(&node("a"), second, 2));
        assert!(!calls.answer(&node("a"), second, 3), "a doubled answer");
        assert!(calls.answer(&node("a"), first, 1));
        assert_eq!((one.within(LONG).await, two.within(LONG).await), (Ok(1), Ok(2)));
        assert!(calls.is_empty());
    }

    #[tokio::test]
    async fn a_call_ends_by_its_deadline_and_late_answers_are_dropped() {
        let calls = Calls::new(8);
        let call = calls.open(&node("a")).unwrap();
        let id = call.id();
        let deadline = Duration::from_millis(5);
        assert_eq!(call.within(deadline).await, Err(Unanswered::Timeout(deadline)));
        assert!(calls.is_empty());
        assert!(!calls.answer(&node("a"), id, 1));
    }

    #[tokio::test]
    async fn calls_are_bounded_and_those_lost_end_at_once() {
        let calls = Calls::<u8>::new(3);
        let (a, b, c) =
            (calls.open(&node("a")).unwrap(), calls.open(&node("b")).unwrap(), calls.open(&node("a")).unwrap());
        assert_eq!(calls.open(&node("a")).err(), Some(Unanswered::Full));
        drop(c);
        let again = calls.open(&node("a")).unwrap();
        assert_eq!(calls.lost(Some(&node("a"))), 2);
        assert_eq!((a.within(LONG).await, again.within(LONG).await), (Err(Unanswered::Lost), Err(Unanswered::Lost)));
        assert_eq!(calls.lost(None), 1);
        assert_eq!(b.within(LONG).await, Err(Unanswered::Lost));
    }
}
