//! Those who wait for a decision that another node makes: told by its owner's message, or else by the store.
//!
//! The message is a hint, looking into the store is the guarantee: seldom where a message is due, at once and then less and
//! less often where none is. Bounded in number and time; a wait nobody listens to ends. Tests: `tests/it/forward.rs`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, oneshot};

use super::{Forwarder, lanes};
use crate::{
    cluster::bus::message::Outcome,
    instance::{Error, Receipt, inbox::Waiting},
    store::Known,
    types::{Fault as _, InstanceKey, limits::STREAM_SECONDS},
};

/// Most waits at once.
const MOST: usize = 65_536;
/// Most looks into the store at once.
const LOOKS: usize = 16;
/// The first look where no message is due.
const SOON: Duration = Duration::from_millis(10);
/// The first look where one is, and the longest pause between two.
const SELDOM: Duration = Duration::from_secs(1);
/// No wait is longer; no door lets anybody wait as long.
const LONGEST: Duration = Duration::from_secs(STREAM_SECONDS);

/// Who awaits what.
pub(super) struct Awaited {
    hints: Mutex<HashMap<(u64, u16), oneshot::Sender<Outcome>, ahash::RandomState>>,
    places: Arc<Semaphore>,
    looks: Arc<Semaphore>,
}

impl Default for Awaited {
    fn default() -> Self {
        Self { hints: Mutex::default(), places: Arc::new(Semaphore::new(MOST)), looks: Arc::new(Semaphore::new(LOOKS)) }
    }
}

impl Awaited {
    /// An owner says what became of a stimulus. Nobody waiting for it any more is fine.
    pub fn settle(&self, call: u64, index: u16, outcome: Outcome) {
        if let Some(hint) = self.remove((call, index)) {
            drop(hint.send(outcome));
        }
    }

    fn remove(&self, place: (u64, u16)) -> Option<oneshot::Sender<Outcome>> {
        self.hints.lock().unwrap_or_else(PoisonError::into_inner).remove(&place)
    }

    fn hint(&self, place: (u64, u16)) -> oneshot::Receiver<Outcome> {
        let (sender, hint) = oneshot::channel();
        self.hints.lock().unwrap_or_else(PoisonError::into_inner).insert(place, sender);
        hint
    }
}

impl Forwarder {
    /// The stimulus is durable: tells its waiters what becomes of it.
    pub(super) fn await_decision(&self, key: InstanceKey, mut waiting: Waiting, asked: Option<(u64, u16)>) {
        waiting.tell_accepted();
        if waiting.waiters.is_empty() {
            return;
        }
        let Ok(place) = self.0.awaited.places.clone().try_acquire_owned() else {
            return waiting.tell(&Err(Error::Timeout(self.0.answer)));
        };
        let hint = asked.map(|asked| self.0.awaited.hint(asked));
        let forwarder = self.clone();
        self.0.handle.spawn(async move {
            let end = forwarder.decision(&key, &mut waiting, hint).await;
            if let Some(asked) = asked {
                forwarder.0.awaited.remove(asked);
            }
            waiting.tell(&end);
            drop(place);
        });
    }

    async fn decision(
        &self,
        key: &InstanceKey,
        waiting: &mut Waiting,
        mut hint: Option<oneshot::Receiver<Outcome>>,
    ) -> Result<Receipt, Error> {
        let began = Instant::now();
        let mut pause = if hint.is_some() { SELDOM } else { SOON };
        while began.elapsed() < LONGEST {
            let told = async {
                match &mut hint {
                    Some(hint) => hint.await.ok(),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                told = told => {
                    hint = None;
                    pause = SOON;
                    match told {
                        // It is durable: an owner that could not go on with it has a successor.
                        Some(Outcome::Refused(refusal)) if Error::from(refusal.clone()).kind().is_retryable() => {}
                        Some(Outcome::InStore | Outcome::Taken | Outcome::Accepted { .. }) | None => {}
                        Some(outcome) => return lanes::end(outcome),
                    }
                }
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(SELDOM),
            }
            waiting.waiters.retain(|waiter| !waiter.is_gone());
            if waiting.waiters.is_empty() {
                break;
            }
            let Ok(_look) = self.0.awaited.looks.acquire().await else { break };
            // A store that fails is asked again.
            match self.0.store.find(key, &waiting.stimulus.id).await {
                Ok(Some(Known::Decided(turn))) => return Ok(Receipt::Decided { turn, repeated: false }),
                Ok(Some(Known::Dead(letter))) => return Ok(Receipt::Dead(letter)),
                Ok(Some(Known::Waiting(_)) | None) | Err(_) => {}
            }
        }
        Err(Error::Timeout(began.elapsed()))
    }
}
