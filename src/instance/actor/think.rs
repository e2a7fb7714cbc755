//! Asking the engine about one stimulus, and what happens when there is no answer.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use actix::prelude::*;
use async_trait::async_trait;
use futures_util::FutureExt as _;

use super::{
    InstanceActor, State, Thinking,
    message::Commit,
    recent::{self, Wanted},
};
use crate::{
    cognition::{self, Action, Bounds, Pace, Progress, Question, Thought, course},
    instance::{
        attention,
        environment::Environment,
        inbox::Waiting,
        turn::{self, Author, Mind},
    },
    types::{Fault as _, InstanceKey, Priority, Step, StimulusId, limits::MAX_TRIES, memory::ENGINE, profile::Limits},
};

/// Tries of a stimulus whose engine is unavailable, with growing pauses, before it goes to the dead letters.
const MAX_THINK_TRIES: u32 = 6;
/// Pause before the first repetition.
pub(super) const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Why there is no thought.
pub(super) enum Failure {
    Engine(cognition::Error),
    Panicked,
    /// Nobody waits for it: the engine was not asked.
    Unheard,
}

impl InstanceActor {
    pub(super) fn think(&mut self, waiting: Waiting, actions: Vec<Action>, ctx: &mut Context<Self>) {
        let mind = self.mind().clone();
        let slow = mind.engine.pace(&mind.profile) == Pace::Slow;
        // What has steps behind it goes on with those it was told of in the first.
        let alone = !slow || mind.attention.is_none() || !waiting.steps.is_empty();
        if slow && !waiting.accepted || !alone && self.awaits_others() {
            self.agenda().inbox.put_back(waiting);
            return self.submit_accept(ctx);
        }
        let attention = mind.attention.as_ref().filter(|_| waiting.steps.is_empty());
        let others = attention.map_or_else(Vec::new, |attention| self.companions(&waiting, attention));
        self.ask(waiting, others, actions, ctx);
    }

    /// Asks the engine about a stimulus and those that share its thought.
    pub(super) fn ask(
        &mut self,
        waiting: Waiting,
        others: Vec<Waiting>,
        actions: Vec<Action>,
        ctx: &mut Context<Self>,
    ) {
        let mind = self.mind().clone();
        let slow = mind.engine.pace(&mind.profile) == Pace::Slow;
        let in_hand = || std::iter::once(&waiting).chain(&others);
        let wanted = (slow && self.is_unheard(in_hand())).then(|| self.wanted_elsewhere(in_hand()));
        let stimulus = match others.as_slice() {
            [] => waiting.stimulus.clone(),
            others => Arc::new(attention::listed(&waiting.stimulus, others.iter().map(|other| &*other.stimulus))),
        };
        let environment = self.environment.clone();
        let state = self.open_state();
        let question = Question {
            key: self.key.clone(),
            profile: mind.profile.clone(),
            stimulus,
            state: (*state).clone(),
            recollection: Vec::new(),
            recent: Vec::new(),
            now: environment.clock.now(),
            deadline: mind
                .profile
                .limits
                .think_seconds
                .map_or_else(|| environment.limits.think(), |s| Duration::from_secs(s.into())),
            tools: environment.toolbox.clone(),
            steps: waiting.steps.clone(),
            bounds: bounds(&environment, &mind.profile.limits),
        };
        self.kept.state = State::Open(state);
        let draft = slow.then(|| (self.key.clone(), waiting.stimulus.id.clone(), course::spoken(&waiting.steps)));
        let talk = mind.attention.map(|_| self.kept.past.as_ref().map_or_else(Vec::new, |past| past.talk.turns()));
        let last = (self.kept.head.turn, talk);
        let address = slow.then(|| ctx.address());
        let asked = async move {
            if let Some(wanted) = wanted
                && !wanted.await
            {
                return Err(Failure::Unheard);
            }
            if let Some((key, stimulus, spoken)) = draft {
                environment.hub.begin_draft(&key, &stimulus, spoken);
            }
            ask(environment, mind, question, last, address).await
        };
        let handle = ctx.spawn(asked.into_actor(self).map(|answer, actor, ctx| {
            if let Some(thinking) = &mut actor.agenda().thinking {
                thinking.answer = Some(answer);
            }
            actor.go_on(ctx);
        }));
        self.agenda().thinking =
            Some(Thinking { waiting, others, actions, slow, handle, answer: None, journaling: None });
        self.heed(ctx);
    }

    pub(super) fn conclude_thought(&mut self, thinking: Thinking, ctx: &mut Context<Self>) {
        let Thinking { waiting, others, mut actions, slow, answer, .. } = thinking;
        match answer {
            Some(Ok(mut thought)) => {
                actions.append(&mut thought.actions);
                let author = Author { engine: self.mind().engine.name(), thought };
                let (standing, now, twin) = (self.standing(), self.environment.clock.now(), self.environment.twin);
                let mut state = self.open_state();
                let record = turn::conclude(standing, &waiting.stimulus, &mut state, Ok(actions), author, twin, now);
                let (standing, decided) = self.share(waiting, others, record, standing, &mut state);
                self.kept.state = State::Open(state);
                self.submit_turns(standing, decided, ctx);
            }
            Some(Err(Failure::Engine(error))) => {
                if slow {
                    self.environment.hub.end_draft(&self.key);
                }
                tracing::warn!(instance = %self.key, %error, tries = waiting.tries + 1, "the engine gave no answer");
                // What is refused when several share a thought may be taken one by one.
                let shared = !others.is_empty();
                let (retryable, cause) = (error.kind().is_retryable(), error.to_string());
                let tries = if retryable || shared { MAX_THINK_TRIES } else { 1 };
                let waiting = self.part(waiting, others, !retryable);
                self.try_again(waiting, cause, tries, retryable || !shared, ctx);
            }
            Some(Err(Failure::Unheard)) if self.is_unheard(std::iter::once(&waiting).chain(&others)) => {
                self.cancel(waiting, others, actions, ctx);
            }
            // Somebody came while other nodes were asked.
            Some(Err(Failure::Unheard)) => self.ask(waiting, others, actions, ctx),
            Some(Err(Failure::Panicked)) | None => {
                if slow {
                    self.environment.hub.end_draft(&self.key);
                }
                let waiting = self.part(waiting, others, true);
                self.panicked(waiting, ctx);
            }
        }
    }

    pub(super) fn panicked(&mut self, waiting: Waiting, ctx: &mut Context<Self>) {
        self.environment.metrics.panics.increment(1);
        self.try_again(waiting, String::from("the turn panicked"), MAX_TRIES, false, ctx);
    }

    /// Puts a failed stimulus back in front, or gives it up after so many tries.
    pub(super) fn try_again(
        &mut self,
        mut waiting: Waiting,
        reason: String,
        tries: u32,
        pause: bool,
        ctx: &mut Context<Self>,
    ) {
        waiting.tries += 1;
        if waiting.tries >= tries {
            return self.submit_bury(waiting, reason, ctx);
        }
        if pause {
            self.pause(FIRST_PAUSE.saturating_mul(1 << (waiting.tries - 1).min(6)).min(LONGEST_PAUSE), ctx);
        }
        self.agenda().inbox.put_back(waiting);
        self.go_on_soon(ctx);
    }

    pub(super) fn pause(&mut self, pause: Duration, ctx: &mut Context<Self>) {
        self.agenda().pausing = true;
        ctx.run_later(pause, |actor, ctx| {
            actor.agenda().pausing = false;
            actor.go_on(ctx);
        });
    }
}

/// Recalls, reads the last turns and asks the engine; a panic stays inside.
async fn ask(
    environment: Arc<Environment>,
    mind: Arc<Mind>,
    mut question: Question,
    (turns, talk): (u64, Option<Vec<u64>>),
    slow: Option<Addr<InstanceActor>>,
) -> Result<Thought, Failure> {
    fn unavailable(error: impl std::fmt::Display) -> Failure {
        Failure::Engine(cognition::Error::Unavailable(error.to_string()))
    }
    let (episodes, count) = mind.engine.wants_for(&mind.profile, &question.stimulus);
    let (reader, limit) = (&environment.store, question.deadline);
    if turns > 0 {
        let text = question.stimulus.content.as_deref().unwrap_or_default();
        let recalled = environment.memory.recall(&question.key, text, episodes, limit).await;
        question.recollection = recalled.map_err(unavailable)?;
        let by_person = question.stimulus.priority == Priority::Human;
        let wanted = Wanted { head: turns, count, talk, by_person };
        question.recent = recent::read(&**reader, &question.key, wanted).await.map_err(unavailable)?;
        // Nobody said anything in them.
        question.recent.retain(|turn| turn.engine != ENGINE);
    }
    let (key, stimulus) = (question.key.clone(), question.stimulus.id.clone());
    let progress = Stream { environment: environment.clone(), key, stimulus, actor: slow };
    let thought = AssertUnwindSafe(mind.engine.think(question, &progress)).catch_unwind();
    match tokio::time::timeout(limit, thought).await {
        Err(_) => Err(Failure::Engine(cognition::Error::Timeout(limit))),
        Ok(Err(_)) => Err(Failure::Panicked),
        Ok(Ok(answer)) => answer.map_err(Failure::Engine),
    }
}

/// How far a turn may go: as far as the node lets it, or less.
fn bounds(environment: &Environment, limits: &Limits) -> Bounds {
    let Bounds { steps, tokens } = environment.limits.bounds();
    Bounds {
        steps: limits.max_steps.map_or(steps, |own| own.min(steps)),
        tokens: limits.max_tokens_per_turn.map_or(tokens, |own| own.min(tokens)),
    }
}

/// Passes an engine's words on to those who watch, and its steps to the actor.
struct Stream {
    environment: Arc<Environment>,
    key: InstanceKey,
    stimulus: StimulusId,
    /// Nobody watches an engine that answers at once, and it takes no steps.
    actor: Option<Addr<InstanceActor>>,
}

#[async_trait]
impl Progress for Stream {
    fn token(&self, text: &str) {
        if self.actor.is_some() {
            self.environment.hub.token(&self.key, text);
        }
    }
    fn restart(&self) {
        if self.actor.is_some() {
            self.environment.hub.restart_draft(&self.key);
        }
    }
    async fn commit(&self, steps: Vec<Step>) -> Result<(), cognition::Error> {
        let Some(actor) = &self.actor else { return Ok(()) };
        let unavailable = |error: &dyn std::fmt::Display| {
            cognition::Error::Unavailable(format!("a step could not be committed: {error}"))
        };
        match actor.send(Commit { stimulus: self.stimulus.clone(), steps }).await {
            Ok(end) => end.map_err(|error| unavailable(&error)),
            Err(gone) => Err(unavailable(&gone)),
        }
    }
}
