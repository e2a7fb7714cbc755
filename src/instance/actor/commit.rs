//! Units of work and their ends: what is submitted, what a durable commit sets free, what a refusal gives back.

use std::sync::Arc;

use actix::prelude::*;

use super::{Control, InstanceActor, Journaling, Out, Phase, State, think::FIRST_PAUSE};
use crate::{
    instance::{
        Error, Receipt,
        attention::HELD_BACK,
        events::Event,
        inbox::{BARRED, BEHIND, Waiting},
        turn::{self, Standing},
    },
    store::{Committed, DeadLetter, Done, Known, Rejection, Unit, Work},
    types::{StateSnapshot, TurnRecord},
};

type Ended = Result<Committed, Rejection>;

impl InstanceActor {
    pub(super) fn submit(&mut self, work: Work, out: Out, ctx: &mut Context<Self>) {
        self.agenda().out = Some(out);
        if self.kept.tenure.is_over() {
            return self.committed(Err(Rejection::Fenced), ctx);
        }
        let (done, end) = Done::channel();
        self.environment.store.submit(Unit {
            key: self.key.clone(),
            fence: self.kept.tenure.fence(self.kept.lodged),
            work,
            done,
        });
        ctx.spawn(end.into_actor(self).map(|end, actor, ctx| {
            let end = end.unwrap_or(Err(Rejection::Failed(crate::store::Error::Closed)));
            actor.committed(end, ctx);
        }));
    }

    pub(super) fn submit_turns(
        &mut self,
        after: Standing,
        mut decided: Vec<(Waiting, Arc<TurnRecord>)>,
        ctx: &mut Context<Self>,
    ) {
        self.kept.version = after.version;
        self.kept.since_full = u32::try_from(after.since_full).unwrap_or(u32::MAX);
        let turns = decided.iter().map(|(_, record)| record.clone()).collect();
        if self.environment.faults.ack_before_commit() {
            for (waiting, turn) in &mut decided {
                waiting.tell(&Ok(Receipt::Decided { turn: turn.clone(), repeated: false }));
            }
        }
        self.submit(Work::Turns { head: self.kept.head, turns }, Out::Turns(decided), ctx);
    }

    pub(super) fn submit_accept(&mut self, ctx: &mut Context<Self>) {
        let stimuli: Vec<_> = self.agenda().inbox.unaccepted().map(|waiting| waiting.stimulus.clone()).collect();
        if !stimuli.is_empty() {
            let ids = stimuli.iter().map(|stimulus| stimulus.id.clone()).collect();
            self.submit(Work::Accept { stimuli }, Out::Accept(ids), ctx);
        }
    }

    /// Steps of the thought in hand. One that is not in hand any more has nobody who waits.
    pub(super) fn submit_steps(&mut self, journaling: Journaling, ctx: &mut Context<Self>) {
        let head = self.kept.head;
        let Some(thinking) = &self.agenda().thinking else { return self.go_on_soon(ctx) };
        let stimulus = journaling.stimulus.clone();
        let first = u32::try_from(thinking.waiting.steps.len()).unwrap_or(u32::MAX);
        let work = Work::Step { head, stimulus, first, steps: journaling.steps.clone() };
        self.submit(work, Out::Steps(journaling), ctx);
    }

    pub(super) fn submit_bury(&mut self, waiting: Waiting, reason: String, ctx: &mut Context<Self>) {
        let (at, tries) = (self.environment.clock.now(), waiting.tries);
        tracing::error!(instance = %self.key, stimulus = %waiting.stimulus.id, reason, tries, "a stimulus was given up");
        let letter = Arc::new(DeadLetter { stimulus: (*waiting.stimulus).clone(), reason: reason.clone(), tries, at });
        let work = Work::Bury { stimulus: waiting.stimulus.clone(), reason, tries, at };
        self.submit(work, Out::Bury(Box::new(waiting), letter), ctx);
    }

    pub(super) fn submit_control(&mut self, control: Control, ctx: &mut Context<Self>) {
        let work = match &control {
            Control::Profile(mind, _) => {
                Work::PutProfile { profile: mind.profile.clone(), at: self.environment.clock.now() }
            }
            Control::Forget(_) if !self.kept.exists => {
                control.refuse(Error::NotFound);
                return self.go_on_soon(ctx);
            }
            Control::Forget(_) => Work::Forget,
            Control::Revive(stimulus, _) => Work::Revive { stimulus: stimulus.clone() },
        };
        self.submit(work, Out::Control(control), ctx);
    }

    pub(super) fn committed(&mut self, end: Ended, ctx: &mut Context<Self>) {
        let Some(out) = self.agenda().out.take() else { return };
        match end {
            Ok(committed) => self.settle(out, committed, ctx),
            Err(Rejection::Fenced) => {
                self.put_back(out);
                self.kept.tenure.lose();
                self.fence(ctx);
            }
            // Others lodged something that comes before this unit: it is read first, and goes before what is put back.
            Err(Rejection::Behind { lodged }) => {
                self.put_back(out);
                self.kept.tenure.learn_lodged(lodged);
                self.reload(ctx);
            }
            Err(Rejection::Duplicate { index, known }) => {
                self.environment.metrics.repeats.increment(1);
                // One that waits in the store and not here is read before anything that comes later.
                let waits = matches!(known, Known::Waiting(_));
                self.leave_out(out, index, &Ok(Receipt::of(known)), waits, ctx);
            }
            Err(Rejection::Barred { index }) => self.leave_out(out, index, &Err(Error::Overloaded(BARRED)), false, ctx),
            Err(Rejection::NotFound) => {
                if let Out::Control(control) = out {
                    control.refuse(Error::NoDeadLetter);
                }
                self.go_on(ctx);
            }
            Err(Rejection::Failed(error)) => {
                // It may have been written all the same, when the connection broke before the answer came.
                let unsure = matches!(out, Out::Turns(_) | Out::Accept(_) | Out::Steps(_));
                self.give_back(out, &Error::Store(error));
                if !self.agenda().inbox.is_empty() {
                    self.pause(FIRST_PAUSE, ctx);
                }
                if unsure { self.reload(ctx) } else { self.go_on(ctx) }
            }
        }
    }

    /// The unit is durable: now, and only now, everybody may know.
    pub(super) fn settle(&mut self, out: Out, committed: Committed, ctx: &mut Context<Self>) {
        self.kept.head = committed.head;
        match out {
            Out::Turns(decided) => {
                self.kept.exists = true;
                self.refresh_cache();
                for (waiting, turn) in decided {
                    if let Some(past) = &mut self.kept.past {
                        past.talk.decided(&turn);
                    }
                    self.announce(waiting, turn);
                }
            }
            Out::Accept(ids) => {
                self.kept.exists = true;
                self.environment.states.touch(&self.key);
                let hub = self.environment.hub.clone();
                for id in ids {
                    if let Some(waiting) = self.agenda().inbox.find(&id) {
                        waiting.accepted = true;
                        waiting.tell_accepted();
                    }
                    hub.publish(&self.key, || Event::Accepted(id));
                }
            }
            Out::Steps(Journaling { stimulus, steps, answer }) => {
                let thinking = self.agenda().thinking.as_mut();
                if let Some(thinking) = thinking.filter(|thinking| thinking.waiting.stimulus.id == stimulus) {
                    thinking.waiting.steps.extend(steps);
                }
                self.environment.hub.keep_draft(&self.key);
                drop(answer.send(Ok(())));
            }
            Out::Bury(mut waiting, letter) => {
                self.environment.metrics.dead_letters.increment(1);
                waiting.tell(&Ok(Receipt::Dead(letter.clone())));
                self.environment.ears.over(&self.key, &waiting.stimulus.id);
                self.environment.hub.publish(&self.key, || Event::Dead(letter));
            }
            Out::Control(Control::Profile(mind, answer)) => {
                self.kept.exists = true;
                self.mind = Some(mind);
                self.environment.states.touch(&self.key);
                self.environment.hub.publish(&self.key, || Event::Profile);
                drop(answer.send(Ok(committed.created)));
            }
            Out::Control(Control::Forget(answer)) => {
                if let Some(thinking) = &self.agenda().thinking {
                    let handle = thinking.handle;
                    ctx.cancel_future(handle);
                    self.environment.hub.end_draft(&self.key);
                }
                self.refuse_all(&Error::NotFound);
                self.environment.states.forget(&self.key);
                self.environment.memory.drop_shelf(&self.key);
                self.environment.hub.publish(&self.key, || Event::Forgotten);
                drop(answer.send(Ok(())));
                return self.reload(ctx);
            }
            Out::Control(Control::Revive(_, answer)) => {
                drop(answer.send(Ok(())));
                return self.reload(ctx);
            }
        }
        self.go_on(ctx);
    }

    pub(super) fn announce(&self, mut waiting: Waiting, turn: Arc<TurnRecord>) {
        self.environment.ears.over(&self.key, &waiting.stimulus.id);
        let metrics = &self.environment.metrics;
        metrics.turns[turn.outcome as usize].increment(1);
        let seconds = if waiting.accepted { &metrics.slow_seconds } else { &metrics.fast_seconds };
        seconds.record(waiting.since.elapsed());
        // What a person's next words replaced is of the same author, but nothing was saved.
        if turn.engine == HELD_BACK && !turn.episodes.is_empty() {
            metrics.attention.held_back();
        }
        if let [_] = waiting.waiters.as_slice()
            && let Some(waiter) = waiting.waiters.pop()
        {
            waiter.tell(Ok(Receipt::Decided { turn: turn.clone(), repeated: false }));
        }
        waiting.tell(&Ok(Receipt::Decided { turn: turn.clone(), repeated: false }));
        self.environment.hub.publish(&self.key, || Event::Turn(turn));
    }

    /// Readers that hold the state get the new one before anybody is answered.
    pub(super) fn refresh_cache(&mut self) {
        let State::Open(state) = &self.kept.state else { return };
        let (version, turn) = (self.kept.version, self.kept.head.turn);
        self.environment.states.refresh(&self.key, self.kept.tenure.epoch, version, || {
            StateSnapshot::new(version, turn, turn::text_of_state(state))
        });
    }

    /// A stimulus of the unit is not to be decided here: its sender is told its end, the others are decided again.
    fn leave_out(&mut self, out: Out, index: usize, end: &Result<Receipt, Error>, look: bool, ctx: &mut Context<Self>) {
        match out {
            Out::Turns(mut decided) => {
                if index < decided.len() {
                    let (mut waiting, _) = decided.remove(index);
                    waiting.tell(end);
                }
                for (waiting, _) in decided.into_iter().rev() {
                    self.agenda().inbox.put_back(waiting);
                }
                self.reload(ctx);
            }
            Out::Accept(ids) => {
                let left = ids.get(index);
                for mut waiting in self.agenda().inbox.extract(|w| Some(&w.stimulus.id) == left && !w.accepted) {
                    waiting.tell(end);
                }
                if look { self.reload(ctx) } else { self.go_on(ctx) }
            }
            Out::Bury(..) | Out::Control(_) | Out::Steps(_) => self.go_on(ctx),
        }
    }

    /// Nothing of a unit was written, and nobody is to be told: its stimuli wait again, in their order.
    fn put_back(&mut self, out: Out) {
        match out {
            Out::Turns(decided) => {
                decided.into_iter().rev().for_each(|(waiting, _)| self.agenda().inbox.put_back(waiting));
            }
            Out::Bury(waiting, _) => self.agenda().inbox.put_back(*waiting),
            Out::Control(control) => self.agenda().controls.push_front(control),
            Out::Steps(journaling) => drop(journaling.answer.send(Err(Error::Fenced))),
            Out::Accept(_) => {}
        }
    }

    /// From here on the instance decides nothing: another node has its shard, or will have it.
    pub(super) fn fence(&mut self, ctx: &mut Context<Self>) {
        if let Some(thinking) = self.agenda.as_mut().and_then(|agenda| agenda.thinking.as_mut()) {
            ctx.cancel_future(thinking.handle);
            self.environment.hub.end_draft(&self.key);
        }
        self.become_(Phase::Fenced);
        if self.agenda.as_ref().is_none_or(|agenda| agenda.out.is_none()) {
            self.go_on(ctx);
        }
    }

    /// A unit was not written: the store still has what it had accepted, everybody else is refused.
    pub(super) fn give_back(&mut self, out: Out, error: &Error) {
        let refuse = |actor: &mut Self, mut waiting: Waiting| {
            if waiting.accepted {
                actor.agenda().inbox.put_back(waiting);
            } else {
                waiting.tell(&Err(error.clone()));
            }
        };
        match out {
            Out::Turns(decided) => decided.into_iter().rev().for_each(|(waiting, _)| refuse(self, waiting)),
            Out::Bury(waiting, _) => refuse(self, *waiting),
            Out::Control(control) => control.refuse(error.clone()),
            Out::Steps(journaling) => drop(journaling.answer.send(Err(error.clone()))),
            Out::Accept(ids) => {
                for mut waiting in self.agenda().inbox.extract(|w| !w.accepted && ids.contains(&w.stimulus.id)) {
                    waiting.tell(&Err(error.clone()));
                }
            }
        }
        for mut waiting in self.agenda().inbox.extract(Waiting::is_behind_a_refusal) {
            waiting.tell(&Err(Error::Overloaded(BEHIND)));
        }
    }
}
