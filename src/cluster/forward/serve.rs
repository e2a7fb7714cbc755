//! Work and questions that other nodes forward to the instances of this one.
//!
//! Invariants: a batch is delivered in its order, and once one of it was not taken those behind it are not either; work that
//! comes after its sender gave up is left alone, since the sender has lodged it. Tests: `tests/it/forward.rs`.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::sync::oneshot;

use super::{Delivery, Forwarder, Owner};
use crate::{
    cluster::bus::{
        self, Bus, Message,
        message::{Answer, Ask, Fate, Outcome, Refusal, Results, Told, Work},
    },
    instance::{
        Error, Receipt, Until,
        inbox::{Line, Waiter},
    },
    types::NodeId,
};

/// Most results of one message.
const MOST_RESULTS: usize = 128;

/// What somebody waits for, by place in a batch.
type Next = BoxFuture<'static, (u16, Step)>;

enum Step {
    /// It is durable; the end follows.
    Taken(oneshot::Receiver<Result<Receipt, Error>>),
    End(Outcome),
}

impl Forwarder {
    /// A batch from another node.
    pub(super) fn work(&self, from: NodeId, age_ms: u64, work: Work) {
        let counts = &self.0.counts;
        let count = work.items.len() as u64;
        if age_ms >= u64::from(work.within_ms) {
            return counts.late.increment(count);
        }
        let shard = self.0.owners.shard_of(&work.key);
        let mine = shard == work.shard && self.0.owners.owner(shard) == Owner::Here;
        let Some(here) = self.0.here.get().filter(|_| mine) else {
            counts.not_mine.increment(count);
            return self.reply(&from, work.call, self.not_mine(shard));
        };
        if work.after_lodged {
            here.wake(&work.key);
        }
        let line = Line::default();
        let pending = FuturesUnordered::new();
        for (index, item) in (0..).zip(work.items) {
            let (waiter, next) = waiter(index, item.decided, line.clone());
            let delivery = Delivery { stimulus: Arc::unwrap_or_clone(item.stimulus), expected: item.expected, waiter };
            if let Err(delivery) = here.deliver(&work.key, delivery) {
                if index == 0 {
                    counts.not_mine.increment(count);
                    return self.reply(&from, work.call, self.not_mine(shard));
                }
                delivery.waiter.tell(Err(Error::Fenced));
            }
            pending.push(next);
        }
        counts.taken.increment(count);
        self.0.handle.spawn(gather(self.0.bus.clone(), from, work.call, pending));
    }

    fn not_mine(&self, shard: u32) -> Fate {
        let owner = match self.0.owners.owner(shard) {
            Owner::Node { node, .. } => Some(node),
            Owner::Here | Owner::Leaving | Owner::Nobody => None,
        };
        Fate::NotMine { owner, epoch: self.0.owners.epoch(shard) }
    }

    fn reply(&self, to: &NodeId, call: u64, what: Fate) {
        // Without an answer the sender goes by the store.
        self.0.bus.hint(to, &Message::Results(Results { call, what }));
    }

    /// A question from another node.
    pub(super) fn answer(&self, from: NodeId, age_ms: u64, ask: Ask) {
        let left = u64::from(ask.within_ms).saturating_sub(age_ms);
        if left == 0 {
            return;
        }
        let reply = |told| Message::Answer(Answer { call: ask.call, what: told });
        let shard = self.0.owners.shard_of(&ask.key);
        let here = self.0.here.get().filter(|_| self.0.owners.owner(shard) == Owner::Here);
        let Some(here) = here.cloned() else {
            let Fate::NotMine { owner, epoch } = self.not_mine(shard) else { return };
            return self.0.bus.hint(&from, &reply(Told::NotMine { owner, epoch }));
        };
        let Ok(permit) = self.0.served.clone().try_acquire_owned() else {
            return self.0.bus.hint(&from, &reply(Told::Refused(Refusal::Overloaded)));
        };
        let bus = self.0.bus.clone();
        self.0.handle.spawn(async move {
            let end = tokio::time::timeout(Duration::from_millis(left), here.ask(&ask.key, ask.what)).await;
            // Too late to matter: whoever asked has given up.
            let Ok(end) = end else { return };
            let what = end.unwrap_or_else(|error| Told::Refused(Refusal::from(&error)));
            bus.hint(&from, &Message::Answer(Answer { call: ask.call, what }));
            drop(permit);
        });
    }
}

/// One who waits on behalf of the sender on another node, and the future of what they are to be told first.
fn waiter(index: u16, decided: bool, line: Line) -> (Waiter, Next) {
    if !decided {
        let (waiter, end) = Waiter::new(Until::Accepted, Some(line));
        return (waiter, ended(index, end));
    }
    let (waiter, mut end, taken) = Waiter::attentive(Some(line));
    let next = Box::pin(async move {
        tokio::select! {
            biased;
            end = &mut end => (index, Step::End(outcome(end))),
            taken = taken => match taken {
                Ok(()) => (index, Step::Taken(end)),
                Err(_) => ended(index, end).await,
            },
        }
    });
    (waiter, next)
}

fn ended(index: u16, end: oneshot::Receiver<Result<Receipt, Error>>) -> Next {
    Box::pin(async move { (index, Step::End(outcome(end.await))) })
}

fn outcome(end: Result<Result<Receipt, Error>, oneshot::error::RecvError>) -> Outcome {
    Outcome::from(&end.unwrap_or(Err(Error::Crashed)))
}

/// Sends the results of a batch as they come, those that come together in one message.
async fn gather(bus: Arc<dyn Bus>, to: NodeId, call: u64, mut pending: FuturesUnordered<Next>) {
    while let Some(first) = pending.next().await {
        // What one commit sets free comes one after the other: a moment later all of it is there.
        tokio::task::yield_now().await;
        let mut steps = vec![first];
        while steps.len() < MOST_RESULTS
            && let Some(Some(step)) = futures_util::FutureExt::now_or_never(pending.next())
        {
            steps.push(step);
        }
        let mut results = Vec::with_capacity(steps.len());
        for (index, step) in steps {
            match step {
                Step::End(outcome) => results.push((index, outcome)),
                Step::Taken(end) => {
                    results.push((index, Outcome::Taken));
                    pending.push(ended(index, end));
                }
            }
        }
        send(&*bus, &to, call, results);
    }
}

/// Sends results; what is too large for one message goes in parts, what is too large by itself is to be read in the store.
fn send(bus: &dyn Bus, to: &NodeId, call: u64, results: Vec<(u16, Outcome)>) {
    let message = Message::Results(Results { call, what: Fate::Each(results) });
    if !matches!(bus.send(to, &message), Err(bus::Error::TooLarge(_))) {
        return; // sent, or lost: the sender has a deadline
    }
    let Message::Results(Results { what: Fate::Each(mut results), .. }) = message else { return };
    match results.len() {
        0 => {}
        1 => {
            let small = vec![(results[0].0, Outcome::InStore)];
            bus.hint(to, &Message::Results(Results { call, what: Fate::Each(small) }));
        }
        len => {
            let rest = results.split_off(len / 2);
            send(bus, to, call, results);
            send(bus, to, call, rest);
        }
    }
}
