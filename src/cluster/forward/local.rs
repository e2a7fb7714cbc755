//! The instances of this node, as forwarding reaches them: the shards, and whoever wants to hear the rest.
//!
//! Not here: what a shard does. Tests: `tests/it/forward.rs`.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::sync::oneshot;

use super::{Delivery, Here};
use crate::{
    cluster::{
        bus::{
            Message,
            message::{Question, Told},
        },
        shard::What,
        shards::Shards,
    },
    instance::{Error, environment::Environment},
    types::{InstanceKey, NodeId, Profile},
};

/// Longest wait for an instance of this node; whoever asked has a deadline of its own.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is told of messages that are neither work nor questions.
pub type News = Box<dyn Fn(NodeId, u64, Message) + Send + Sync>;
/// What is told of messages that may never have arrived.
type Lost = Box<dyn Fn(Option<&NodeId>) + Send + Sync>;

/// The instances of this node.
pub struct Local {
    shards: Shards,
    environment: Arc<Environment>,
    news: News,
    lost: Lost,
}

impl Local {
    /// Those of the shards; `news` takes the messages that are not for an instance, and must not block.
    pub fn new(shards: Shards, environment: Arc<Environment>, news: News) -> Self {
        Self { shards, environment, news, lost: Box::new(|_| ()) }
    }

    /// Who asked other nodes something of their own is told here what may never have arrived. Must not block.
    #[must_use]
    pub fn on_lost(mut self, lost: impl Fn(Option<&NodeId>) + Send + Sync + 'static) -> Self {
        self.lost = Box::new(lost);
        self
    }

    async fn told<T>(
        &self,
        key: &InstanceKey,
        what: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> What,
    ) -> Result<T, Error> {
        let (answer, receiver) = oneshot::channel();
        self.shards.tell(key, what(answer)).map_err(|_| Error::Fenced)?;
        match tokio::time::timeout(PATIENCE, receiver).await {
            Err(_) => Err(Error::Timeout(PATIENCE)),
            Ok(Err(_)) => Err(Error::Overloaded("the instance's mailbox is full")),
            Ok(Ok(end)) => end,
        }
    }
}

#[async_trait]
impl Here for Local {
    fn deliver(&self, key: &InstanceKey, delivery: Delivery) -> Result<(), Box<Delivery>> {
        let Delivery { stimulus, expected, waiter } = delivery;
        match self.shards.tell(key, What::Deliver(stimulus, expected, waiter)) {
            Err(What::Deliver(stimulus, expected, waiter)) => Err(Box::new(Delivery { stimulus, expected, waiter })),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn wake(&self, key: &InstanceKey) {
        // A shard that is not here any more is woken by its next owner's scan.
        drop(self.shards.tell(key, What::Wake));
    }

    async fn ask(&self, key: &InstanceKey, question: Question) -> Result<Told, Error> {
        match question {
            Question::PutProfile(json) => {
                let profile: Profile =
                    serde_json::from_str(json.get()).map_err(|error| Error::Invalid(error.to_string()))?;
                let mind = self.environment.minds.of(&key.tenant, &Arc::new(profile))?;
                let created = self.told(key, |answer| What::PutProfile(mind, answer)).await?;
                Ok(Told::Stored { created })
            }
            Question::Forget => self.told(key, What::Forget).await.map(|()| Told::Done),
            Question::Revive(stimulus) => {
                self.told(key, |answer| What::Revive(stimulus, answer)).await.map(|()| Told::Done)
            }
            Question::Observe => {
                let (answer, observed) = oneshot::channel();
                self.shards.tell(key, What::Observe(answer)).map_err(|_| Error::Fenced)?;
                let observed = observed.await.ok().flatten();
                let inbox = observed.map_or(0, |observed| observed.inbox as u64);
                Ok(Told::Presence { active: observed.is_some(), inbox })
            }
        }
    }

    fn hear(&self, from: NodeId, age_ms: u64, message: Message) {
        (self.news)(from, age_ms, message);
    }

    fn lost(&self, to: Option<&NodeId>) {
        (self.lost)(to);
    }
}
