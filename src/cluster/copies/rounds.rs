//! Who asks for a key at present, and who shares the next answer. Pure.
//!
//! Invariants: for each key one asks at a time; nobody gets an answer that was asked for before they came; when one who asks
//! gives up, the next one who waits asks. Tests: at the foot.

use std::collections::HashMap;

use tokio::sync::oneshot;

use crate::types::InstanceKey;

/// Rounds of questions whose answers are a `T`.
#[derive(Debug)]
pub struct Rounds<T>(HashMap<InstanceKey, Vec<oneshot::Sender<Told<T>>>, ahash::RandomState>);

impl<T> Default for Rounds<T> {
    fn default() -> Self {
        Self(HashMap::default())
    }
}

/// What somebody is to do who wants a key.
#[derive(Debug)]
pub enum Enter<T> {
    /// Ask, and end the round.
    Lead,
    /// Wait.
    Wait(oneshot::Receiver<Told<T>>),
}

/// What one who waited is told.
#[derive(Debug)]
pub enum Told<T> {
    /// Ask, end the round, and tell these.
    Lead(Vec<oneshot::Sender<Told<T>>>),
    /// The answer.
    End(T),
}

impl<T> Rounds<T> {
    /// Somebody wants a key.
    pub fn enter(&mut self, key: &InstanceKey) -> Enter<T> {
        match self.0.get_mut(key) {
            None => {
                self.0.insert(key.clone(), Vec::new());
                Enter::Lead
            }
            Some(waiting) => {
                let (sender, told) = oneshot::channel();
                waiting.push(sender);
                Enter::Wait(told)
            }
        }
    }

    /// The round of a key is over: those who came meanwhile have the next one.
    pub fn end(&mut self, key: &InstanceKey) {
        let Some(waiting) = self.0.get_mut(key) else { return };
        let mut waiting = std::mem::take(waiting);
        waiting.retain(|waits| !waits.is_closed());
        while let Some(next) = waiting.pop() {
            match next.send(Told::Lead(waiting)) {
                Ok(()) => return,
                Err(Told::Lead(back)) => waiting = back,
                Err(Told::End(_)) => break,
            }
        }
        self.0.remove(key);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{InstanceId, TenantId};

    fn key() -> InstanceKey {
        InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap())
    }

    fn wait(rounds: &mut Rounds<u8>) -> oneshot::Receiver<Told<u8>> {
        match rounds.enter(&key()) {
            Enter::Wait(told) => told,
            Enter::Lead => panic!("nobody asks at present"),
        }
    }

    #[test]
    fn those_who_come_while_one_asks_share_the_next_answer() {
        let mut rounds = Rounds::default();
        assert!(matches!(rounds.enter(&key()), Enter::Lead));
        let mut waiting: Vec<_> = (0..3).map(|_| wait(&mut rounds)).collect();
        rounds.end(&key());
        let leads =
            waiting.iter_mut().rposition(|told| matches!(told.try_recv(), Ok(Told::Lead(rest)) if rest.len() == 2));
        assert_eq!(leads, Some(2));
        let mut later = wait(&mut rounds);
        rounds.end(&key());
        assert!(
            matches!(later.try_recv(), Ok(Told::Lead(rest)) if rest.is_empty()),
            "it came too late for that answer"
        );
        rounds.end(&key());
        assert!(matches!(rounds.enter(&key()), Enter::Lead), "nothing is left behind");
    }

    #[test]
    fn who_gave_up_neither_asks_nor_holds_anybody_up() {
        let mut rounds = Rounds::default();
        assert!(matches!(rounds.enter(&key()), Enter::Lead));
        let (gone, mut waits) = (wait(&mut rounds), wait(&mut rounds));
        let also_gone = wait(&mut rounds);
        drop((gone, also_gone));
        rounds.end(&key());
        assert!(matches!(waits.try_recv(), Ok(Told::Lead(rest)) if rest.is_empty()));
        let dropped = wait(&mut rounds);
        drop(dropped);
        rounds.end(&key());
        assert!(matches!(rounds.enter(&key()), Enter::Lead));
    }
}
