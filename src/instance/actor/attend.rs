//! Attention at work: which stimulus is next, which share a thought, and when a person interrupts one.
//!
//! Not here: what decides it (`instance/attention.rs`, pure). Nothing of this runs for an instance without attention.
//! Tests: `tests/it/attention.rs`.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use actix::prelude::*;

use super::{InstanceActor, State, Thinking};
use crate::{
    cognition::{Action, Facts, Thought},
    instance::{
        attention::{self, Attention, Candidate, Interruption, Pick, Weight},
        inbox::Waiting,
        turn::{self, Author, Judgement, Mind, Standing, lane},
    },
    types::{
        EpisodeDraft, Millis, Priority, StateDoc, Stimulus, TurnRecord,
        limits::{MAX_ATTENTION_LOOK, MAX_INTERRUPTS},
        turn::MERGED,
    },
};

/// What is to be decided next.
pub(super) enum Next {
    One(Waiting),
    /// All that waits does so for others like it, the first one so long.
    Later(Duration),
    Nothing,
}

/// Whether a stimulus that no rule decided is not thought about either.
pub(super) fn is_held_back(mind: &Mind, waiting: &Waiting) -> bool {
    match (mind.attention, waiting.weight) {
        (Some(attention), Weight::Heavy { salience, .. }) => attention.holds_back(salience),
        _ => false,
    }
}

/// What is remembered of a stimulus that is held back.
pub(super) fn remembered(stimulus: &Stimulus) -> EpisodeDraft {
    let content = stimulus.content.clone();
    let told = || stimulus.data.as_ref().map_or_else(String::new, |data| data.get().to_owned());
    EpisodeDraft {
        content: content.unwrap_or_else(|| format!("[{}] {}", stimulus.channel, told())),
        data: stimulus.data.clone(),
        tags: vec![String::from("held-back")],
        reward: None,
        occurred_at: Some(stimulus.accepted_at),
    }
}

fn candidate(waiting: &Waiting) -> Candidate<'_> {
    Candidate { stimulus: &waiting.stimulus, weight: waiting.weight, age: waiting.since.elapsed() }
}

impl InstanceActor {
    /// The next to decide: of the most urgent priority that has one, the one that ranks highest.
    pub(super) fn attend(
        &mut self,
        attention: &Attention,
        mind: &Mind,
        state: &StateDoc,
        standing: Standing,
        now: Millis,
    ) -> Next {
        let mut pause: Option<Duration> = None;
        for lane in 0..Priority::ALL.len() {
            self.weigh(lane, mind, state, standing, now);
            let inbox = &mut self.agenda().inbox;
            let candidates: Vec<Candidate<'_>> = inbox.lane(lane).take(MAX_ATTENTION_LOOK).map(candidate).collect();
            match attention::pick(&candidates, attention) {
                Pick::Take(index) => return inbox.take(lane, index).map_or(Next::Nothing, Next::One),
                Pick::Wait(left) => pause = Some(pause.map_or(left, |pause| pause.min(left))),
                Pick::Nothing => {}
            }
        }
        pause.map_or(Next::Nothing, Next::Later)
    }

    /// Weighs those of a lane that were not looked at.
    fn weigh(&mut self, lane: usize, mind: &Mind, state: &StateDoc, standing: Standing, now: Millis) {
        let Some(agenda) = self.agenda.as_deref_mut() else { return };
        let unseen = |waiting: &&mut Waiting| waiting.weight == Weight::Unknown;
        for waiting in agenda.inbox.lane_mut(lane).take(MAX_ATTENTION_LOOK).filter(unseen) {
            let stimulus = &*waiting.stimulus;
            let facts = Facts { key: &self.key, stimulus, state, turn: standing.turn + 1, now };
            // One that panics does so again when it is its turn, where that is seen to.
            let judged = catch_unwind(AssertUnwindSafe(|| turn::judge(mind, &facts)));
            waiting.weight = match judged {
                Ok(Ok(Judgement::Think(actions, rule))) => Weight::Heavy {
                    salience: self.kept.past.get_or_insert_default().weigh(stimulus, rule, now),
                    alike: actions.is_empty() && waiting.expected.is_none() && waiting.tries == 0,
                },
                _ => Weight::Light,
            };
        }
    }

    /// Waits for others like those that wait; what arrives meanwhile gets its durable place.
    pub(super) fn gather(&mut self, pause: Duration, ctx: &mut Context<Self>) {
        let agenda = self.agenda();
        if std::mem::take(&mut agenda.look) {
            return self.reload(ctx);
        }
        if !std::mem::replace(&mut agenda.gathering, true) {
            ctx.run_later(pause, |actor, ctx| {
                if let Some(agenda) = &mut actor.agenda {
                    agenda.gathering = false;
                }
                actor.go_on(ctx);
            });
        }
        self.submit_accept(ctx);
    }

    /// Whether some that wait must become durable before a thought begins that they may share. Once for each thought: with
    /// arrivals that do not end it begins all the same.
    pub(super) fn awaits_others(&mut self) -> bool {
        let agenda = self.agenda();
        agenda.invited = !agenda.invited && agenda.inbox.unaccepted().next().is_some();
        agenda.invited
    }

    /// Takes those that share the thought of a stimulus out of the inbox, in their order.
    pub(super) fn companions(&mut self, first: &Waiting, attention: &Attention) -> Vec<Waiting> {
        let lane = lane(first.stimulus.priority);
        let inbox = &mut self.agenda().inbox;
        // What is not durable yet joins no thought.
        let durable = |waiting| Candidate {
            weight: if Waiting::is_accepted(waiting) { waiting.weight } else { Weight::Unknown },
            ..candidate(waiting)
        };
        let candidates: Vec<Candidate<'_>> = inbox.lane(lane).take(MAX_ATTENTION_LOOK).map(durable).collect();
        let taken = attention::companions(&candidate(first), &candidates, attention);
        // Each one taken moves those behind it up.
        taken.into_iter().enumerate().filter_map(|(before, index)| inbox.take(lane, index - before)).collect()
    }

    /// The turns of one thought: that of its stimulus, and one for each that shared it.
    pub(super) fn share(
        &self,
        waiting: Waiting,
        others: Vec<Waiting>,
        record: TurnRecord,
        before: Standing,
        state: &mut StateDoc,
    ) -> (Standing, Vec<(Waiting, Arc<TurnRecord>)>) {
        if self.mind().attention.is_some() {
            self.environment.metrics.attention.thought(others.len());
        }
        let (first, now, twin) = (record.turn, record.decided_at, self.environment.twin);
        let mut standing = before.after(&record);
        let (reply, cut) = (record.reply.clone(), record.cut());
        let mut decided = Vec::with_capacity(1 + others.len());
        decided.push((waiting, Arc::new(record)));
        for other in others {
            let said = reply.clone().filter(|_| attention::is_answered(&other.stimulus)).map(Action::Reply);
            let cut = cut.filter(|_| said.is_some());
            let author = Author { engine: MERGED, thought: Thought { cut, ..Thought::default() } };
            let said = Ok(said.into_iter().collect());
            let mut record = turn::conclude(standing, &other.stimulus, state, said, author, twin, now);
            record.share(first);
            standing = standing.after(&record);
            decided.push((other, Arc::new(record)));
        }
        (standing, decided)
    }

    /// A shared thought failed: the others wait again, behind the first, which is given back. `alone`: each is thought
    /// about by itself from now on, so that one that spoils a thought spoils no other's.
    pub(super) fn part(&mut self, mut waiting: Waiting, others: Vec<Waiting>, alone: bool) -> Waiting {
        let inbox = &mut self.agenda().inbox;
        let apart = |waiting: &mut Waiting| {
            if let Weight::Heavy { alike, .. } = &mut waiting.weight {
                *alike &= !alone;
            }
        };
        apart(&mut waiting);
        for mut other in others.into_iter().rev() {
            apart(&mut other);
            inbox.put_back(other);
        }
        waiting
    }

    /// Lets a person who waits interrupt the thought in hand, when the profile says so; whether it did.
    pub(super) fn interrupt(&mut self, ctx: &mut Context<Self>) -> bool {
        let Some(interruption) = self.interruption() else { return false };
        let Some(Thinking { mut waiting, mut others, actions, handle, .. }) = self.agenda().thinking.take() else {
            return false;
        };
        ctx.cancel_future(handle);
        self.environment.hub.end_draft(&self.key);
        self.environment.metrics.attention.interrupted[usize::from(interruption != Interruption::Join)].increment(1);
        waiting.interrupted += 1;
        match interruption {
            Interruption::Join => {
                others.extend(self.agenda().inbox.take(lane(Priority::Human), 0));
                self.ask(waiting, others, actions, ctx);
            }
            Interruption::Postpone => {
                let waiting = self.part(waiting, others, false);
                self.agenda().inbox.put_back(waiting);
                self.go_on_soon(ctx);
            }
            Interruption::Replace => {
                let mut state = self.open_state();
                let (standing, now, twin) = (self.standing(), self.environment.clock.now(), self.environment.twin);
                let author = Author { engine: attention::HELD_BACK, thought: Thought::default() };
                let record = turn::conclude(standing, &waiting.stimulus, &mut state, Ok(actions), author, twin, now);
                self.kept.state = State::Open(state);
                let waiting = self.part(waiting, others, false);
                self.submit_turns(standing.after(&record), vec![(waiting, Arc::new(record))], ctx);
            }
        }
        true
    }

    /// What the first of a person that waits does to the thought in hand.
    fn interruption(&mut self) -> Option<Interruption> {
        let mind = self.mind().clone();
        let attention = mind.attention.as_ref()?;
        let human = lane(Priority::Human);
        let agenda = self.agenda.as_ref()?;
        let thinking = agenda.thinking.as_ref().filter(|t| t.slow && t.waiting.interrupted < MAX_INTERRUPTS)?;
        // Its steps were told without whoever comes now.
        if !thinking.waiting.steps.is_empty() {
            return None;
        }
        let new = agenda.inbox.lane(human).next().filter(|new| new.accepted)?;
        let full = thinking.others.len() + 1 >= attention.merge_max.max(2);
        let decision = attention::interruption(attention.interrupt, &thinking.waiting.stimulus, &new.stimulus)?;
        let state = self.open_state();
        let (standing, now) = (self.standing(), self.environment.clock.now());
        self.weigh(human, &mind, &state, standing, now);
        self.kept.state = State::Open(state);
        // What the rules decide in no time, and what is held back, is worth no thought of another.
        let new = self.agenda.as_ref()?.inbox.lane(human).next()?;
        match (new.weight, decision) {
            (Weight::Heavy { salience, .. }, _) if attention.holds_back(salience) => None,
            (Weight::Heavy { alike, .. }, Interruption::Join) => (alike && !full).then_some(decision),
            (Weight::Heavy { .. }, _) | (Weight::Light, Interruption::Postpone) => Some(decision),
            (Weight::Light | Weight::Unknown, _) => None,
        }
    }
}
