//! A thought nobody waits for any more: when it is given up, and what then becomes of its stimuli.
//!
//! A stimulus that was accepted is never lost: it gets a turn, which does what its rules and the committed steps decided and says
//! that it was cancelled. Not here: who listens (`instance/ears.rs`). Nothing of this runs without `limits.cancel_unheard_seconds`.
//! Invariants: only what came in by HTTP from a sender who waited and left is given up, with nothing else to answer it by; a tool that
//! may not be called twice is not interrupted. Tests: `tests/it/unheard.rs`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use actix::prelude::*;
use futures_util::future::BoxFuture;

use super::{InstanceActor, State, Thinking};
use crate::{
    cognition::{Action, Thought, course},
    instance::{
        inbox::Waiting,
        turn::{self, Author},
    },
    types::{Source, TurnRecord},
};

/// How often somebody looks whether anybody still waits.
const LOOK: Duration = Duration::from_millis(250);
/// How soon other nodes are asked again when one of them may have somebody who waits.
const AGAIN: Duration = Duration::from_secs(1);
/// What a turn says of itself that was given up.
const CANCELLED: &str = "cancelled: whoever sent this left before the answer, and nobody else waits for it";

impl InstanceActor {
    /// Looks now and then whether anybody still waits for the thought in hand, for as long as it is.
    pub(super) fn heed(&self, ctx: &mut Context<Self>) {
        let thinking = self.thinking().filter(|thinking| thinking.slow);
        if let (Some(_), Some(thinking)) = (self.patience(), thinking) {
            Self::look_in(LOOK, thinking.handle, ctx);
        }
    }

    /// Looks after a while whether anybody waits for a thought, and again if it goes on.
    fn look_in(after: Duration, handle: SpawnHandle, ctx: &mut Context<Self>) {
        ctx.run_later(after, move |actor, ctx| {
            let Some(thinking) = actor.thinking().filter(|thinking| thinking.handle == handle) else { return };
            if !actor.may_give_up(thinking) {
                return Self::look_in(LOOK, handle, ctx);
            }
            let wanted = actor.wanted_elsewhere(thinking.in_hand());
            ctx.spawn(wanted.into_actor(actor).map(move |wanted, actor, ctx| {
                if actor.thinking().is_none_or(|thinking| thinking.handle != handle) {
                    return;
                }
                if wanted || !actor.give_up(ctx) {
                    Self::look_in(if wanted { AGAIN } else { LOOK }, handle, ctx);
                }
            }));
        });
    }

    fn thinking(&self) -> Option<&Thinking> {
        self.agenda.as_ref().and_then(|agenda| agenda.thinking.as_ref())
    }

    /// How long a thought goes on that nobody waits for; none when it goes on to its end.
    fn patience(&self) -> Option<Duration> {
        let seconds = self.mind().profile.limits.cancel_unheard_seconds;
        seconds.map(|seconds| Duration::from_secs(seconds.into()))
    }

    /// Whether nobody has waited for any of these for longer than the profile lets them be thought about, as far as is known here.
    pub(super) fn is_unheard<'w>(&self, mut waiting: impl Iterator<Item = &'w Waiting>) -> bool {
        let Some(patience) = self.patience() else { return false };
        let now = Instant::now();
        waiting.all(|waiting| {
            let stimulus = &waiting.stimulus;
            let answered_here = stimulus.source == Source::Http && stimulus.reply_to.is_none();
            let since = answered_here.then(|| self.environment.ears.unheard_since(&self.key, &stimulus.id)).flatten();
            since.is_some_and(|since| now.duration_since(since) >= patience)
        })
    }

    /// Whether somebody at another node may wait for one of these.
    pub(super) fn wanted_elsewhere<'w>(&self, waiting: impl Iterator<Item = &'w Waiting>) -> BoxFuture<'static, bool> {
        self.environment.ears.wanted_elsewhere(&self.key, waiting.map(|waiting| waiting.stimulus.id.clone()).collect())
    }

    /// Whether a thought can be ended where it is, and nobody is known to wait for it.
    fn may_give_up(&self, thinking: &Thinking) -> bool {
        let is_between = thinking.answer.is_none()
            && thinking.journaling.is_none()
            && !course::is_at_work(&thinking.waiting.steps)
            && self.agenda.as_ref().is_some_and(|agenda| agenda.out.is_none());
        is_between && self.is_unheard(thinking.in_hand())
    }

    /// Ends the thought in hand when nobody waits for it; whether it did. Other nodes were asked.
    fn give_up(&mut self, ctx: &mut Context<Self>) -> bool {
        if !self.thinking().is_some_and(|thinking| self.may_give_up(thinking)) {
            return false;
        }
        let Some(Thinking { waiting, others, actions, handle, .. }) = self.agenda().thinking.take() else {
            return false;
        };
        ctx.cancel_future(handle);
        self.environment.hub.end_draft(&self.key);
        self.cancel(waiting, others, actions, ctx);
        true
    }

    /// Ends the turns of stimuli that nobody waits for: what rules and committed steps decided holds, and no model is asked.
    pub(super) fn cancel(
        &mut self,
        waiting: Waiting,
        others: Vec<Waiting>,
        mut actions: Vec<Action>,
        ctx: &mut Context<Self>,
    ) {
        let engine = self.mind().engine.name();
        let (now, twin) = (self.environment.clock.now(), self.environment.twin);
        let (mut standing, mut state) = (self.standing(), self.open_state());
        let mut thought = course::left_off(&waiting.steps);
        actions.append(&mut thought.actions);
        let first = (waiting, actions, thought);
        let rest = others.into_iter().map(|other| (other, Vec::new(), Thought::default()));
        let mut decided: Vec<(Waiting, Arc<TurnRecord>)> = Vec::new();
        for (waiting, actions, thought) in std::iter::once(first).chain(rest) {
            let author = Author { engine, thought };
            let mut record = turn::conclude(standing, &waiting.stimulus, &mut state, Ok(actions), author, twin, now);
            record.error.get_or_insert_with(|| String::from(CANCELLED));
            standing = standing.after(&record);
            tracing::info!(instance = %self.key, stimulus = %waiting.stimulus.id, "nobody waits for the answer: cancelled");
            self.environment.metrics.unheard.increment(1);
            decided.push((waiting, Arc::new(record)));
        }
        self.kept.state = State::Open(state);
        self.submit_turns(standing, decided, ctx);
    }
}
