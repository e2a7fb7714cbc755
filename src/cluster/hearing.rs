//! Who listens to answers at the doors of which node: the owner of the instance is told, because it is the one who can stop thinking.
//!
//! What is told is a hint (`Ear`, since protocol 4): a message may be lost, and an owner change after somebody left. So an owner that
//! knows of nobody who listens asks before it gives a thought up (`Hark`, since protocol 5), and goes on unless every other node said that
//! nobody does there.
//!
//! Not here: the registry itself (`instance::ears`), what an owner makes of it (`instance::actor`).
//! Invariants: nothing is said that a node of the cluster does not know; a question ends within the bus's time to answer.
//! Tests: at the foot; `tests/it/unheard.rs`.

use std::{sync::Arc, time::Duration};

use futures_util::future::{BoxFuture, join_all};
use metrics::Counter;

use super::{
    bus::{
        Message,
        message::{Ear, Hark, Heard, Kept},
    },
    calls::Calls,
    forward::{Forwarder, Owner},
};
use crate::{
    instance::ears::{Ears, Neighbours, News},
    telemetry::metric,
    types::{InstanceKey, NodeId, StimulusId},
};

/// Most questions to other nodes without an answer. Beyond it thoughts go on.
const MOST_CALLS: usize = 1024;

/// What hearing stands on.
pub struct Parts {
    /// Those who listen here.
    pub ears: Ears,
    /// Who owns what, and the way there.
    pub forwarder: Forwarder,
    /// The other nodes whose lease runs.
    pub others: Box<dyn Fn() -> Vec<NodeId> + Send + Sync>,
    /// The version of the protocol that all of them speak.
    pub spoken: Box<dyn Fn() -> u32 + Send + Sync>,
    /// How long a node may take to answer.
    pub answer: Duration,
    /// A fault for tests: who listens elsewhere is not heard.
    pub deaf: bool,
}

/// Listeners across nodes. Cheap to clone.
#[derive(Clone)]
pub struct Hearing(Arc<Inner>);

struct Inner {
    parts: Parts,
    calls: Calls<bool>,
    answers: [Counter; 3],
}

/// What the other nodes said, all together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Nobody,
    Somebody,
    /// One of them said nothing.
    Unknown,
}

impl Verdict {
    /// Of what each node said: whether somebody there wants the answer.
    fn of(said: &[Option<bool>]) -> Self {
        match () {
            () if said.contains(&Some(true)) => Self::Somebody,
            () if said.contains(&None) => Self::Unknown,
            () => Self::Nobody,
        }
    }
}

impl Hearing {
    /// From here on doors of other nodes are told and asked.
    pub fn start(parts: Parts) -> Self {
        let answers =
            ["nobody", "somebody", "unknown"].map(|answer| metrics::counter!(metric::HARKED, "answer" => answer));
        let ears = parts.ears.clone();
        let hearing = Self(Arc::new(Inner { parts, calls: Calls::new(MOST_CALLS), answers }));
        ears.set_neighbours(Arc::new(hearing.clone()));
        hearing
    }

    /// The table of owners changed: the new ones are told who listens here.
    pub fn moved(&self) {
        for (key, stimulus) in self.0.parts.ears.here() {
            self.changed(&key, &stimulus, News::Listens);
        }
    }

    /// Takes a message about listeners; gives back any other.
    ///
    /// # Errors
    /// The message, when it is about something else.
    #[allow(clippy::result_large_err)] // it goes on to whoever wants it
    pub fn hear(&self, from: NodeId, age_ms: u64, message: Message) -> Result<(), Message> {
        let ears = &self.0.parts.ears;
        match message {
            Message::Ear(Ear { listens: true, .. }) if self.0.parts.deaf => {}
            Message::Ear(Ear { key, stimulus, listens, left }) => {
                let news = match (listens, left) {
                    (true, _) => News::Listens,
                    (false, true) => News::Left,
                    (false, false) => News::Ends,
                };
                ears.elsewhere(from, key, stimulus, news);
            }
            Message::Kept(Kept { key, stimulus }) => ears.elsewhere(from, key, stimulus, News::Kept),
            Message::Hark(Hark { call, within_ms, key, stimuli }) if age_ms < u64::from(within_ms) => {
                let wanted = ears.wanted(&key, stimuli);
                self.0.parts.forwarder.bus().hint(&from, &Message::Heard(Heard { call, key, wanted }));
            }
            // Whoever asked has given up.
            Message::Hark(_) => {}
            Message::Heard(Heard { call, key, wanted }) => {
                let answer = !wanted.is_empty();
                // What was told of them got lost: nobody need ask again while they listen.
                for stimulus in wanted {
                    ears.elsewhere(from.clone(), key.clone(), stimulus, News::Listens);
                }
                self.0.calls.answer(&from, call, answer);
            }
            other => return Err(other),
        }
        Ok(())
    }

    /// What was asked of a node, or of any, may never have arrived.
    pub fn lost(&self, to: Option<&NodeId>) {
        self.0.calls.lost(to);
    }

    /// Whether all nodes know a message.
    fn is_understood(&self, message: &Message) -> bool {
        (self.0.parts.spoken)() >= u32::from(message.since())
    }

    /// Asks all other nodes.
    async fn ask_all(&self, key: InstanceKey, stimuli: Vec<StimulusId>) -> bool {
        let others = (self.0.parts.others)();
        if others.is_empty() {
            return false;
        }
        let said = join_all(others.iter().map(|node| self.ask(node, &key, &stimuli))).await;
        let verdict = Verdict::of(&said);
        self.0.answers[verdict as usize].increment(1);
        verdict != Verdict::Nobody
    }

    /// Whether somebody there wants one of these answers; none when it did not say.
    async fn ask(&self, node: &NodeId, key: &InstanceKey, stimuli: &[StimulusId]) -> Option<bool> {
        let within = self.0.parts.answer;
        let call = self.0.calls.open(node).ok()?;
        let within_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        let hark = Message::Hark(Hark { call: call.id(), within_ms, key: key.clone(), stimuli: stimuli.into() });
        if !self.is_understood(&hark) {
            return None;
        }
        self.0.parts.forwarder.bus().send(node, &hark).ok()?;
        call.within(within).await.ok()
    }
}

impl Neighbours for Hearing {
    fn changed(&self, key: &InstanceKey, stimulus: &StimulusId, news: News) -> bool {
        let Owner::Node { node, .. } = self.0.parts.forwarder.owner_of(key) else { return false };
        let (key, stimulus) = (key.clone(), stimulus.clone());
        let message = match news {
            News::Kept => Message::Kept(Kept { key, stimulus }),
            _ => {
                let (listens, left) = (news == News::Listens, news == News::Left);
                Message::Ear(Ear { key, stimulus, listens, left })
            }
        };
        if self.is_understood(&message) {
            self.0.parts.forwarder.bus().hint(&node, &message);
        }
        true
    }

    fn may_listen(&self, key: &InstanceKey, stimuli: Vec<StimulusId>) -> BoxFuture<'static, bool> {
        let (hearing, key) = (self.clone(), key.clone());
        Box::pin(async move { hearing.ask_all(key, stimuli).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_listens_only_when_every_node_said_so() {
        for (said, verdict) in [
            (&[][..], Verdict::Nobody),
            (&[Some(false), Some(false)], Verdict::Nobody),
            (&[Some(false), None], Verdict::Unknown),
            (&[None, Some(true)], Verdict::Somebody),
        ] {
            assert_eq!(Verdict::of(said), verdict, "{said:?}");
        }
    }
}
