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
/// What a turn says of itself that was given up.
const CANCELLED: &str = "cancelled: whoever sent this left before the answer, and nobody else waits for it";

impl InstanceActor {
    /// Looks now and then whether anybody still waits for the thought in hand, for as long as it is.
    pub(super) fn heed(&self, ctx: &mut Context<Self>) {
        let thinking = self.agenda.as_ref().and_then(|agenda| agenda.thinking.as_ref());
        let (Some(_), Some(thinking)) = (self.patience(), thinking.filter(|thinking| thinking.slow)) else { return };
        let handle = thinking.handle;
        ctx.run_later(LOOK, move |actor, ctx| {
            let thinking = actor.agenda.as_ref().and_then(|agenda| agenda.thinking.as_ref());
            if thinking.is_some_and(|thinking| thinking.handle == handle) && !actor.give_up(ctx) {
                actor.heed(ctx);
            }
        });
    }

    /// How long a thought goes on that nobody waits for; none when it goes on to its end.
    fn patience(&self) -> Option<Duration> {
        let seconds = self.mind().profile.limits.cancel_unheard_seconds;
        seconds.map(|seconds| Duration::from_secs(seconds.into()))
    }

    /// Whether nobody has waited for any of these for longer than the profile lets them be thought about.
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

    /// Ends the thought in hand when nobody waits for it; whether it did.
    fn give_up(&mut self, ctx: &mut Context<Self>) -> bool {
        let Some(agenda) = self.agenda.as_ref().filter(|agenda| agenda.out.is_none()) else { return false };
        let is_between =
            |t: &&Thinking| t.answer.is_none() && t.journaling.is_none() && !course::is_at_work(&t.waiting.steps);
        let Some(thinking) = agenda.thinking.as_ref().filter(is_between) else { return false };
        if !self.is_unheard(thinking.in_hand()) {
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
