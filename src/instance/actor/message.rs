//! What an instance can be told, and how it takes it.

use std::sync::Arc;

use actix::prelude::*;
use tokio::sync::oneshot;

use super::{Agenda, Control, InstanceActor, Journaling, Phase, State};
use crate::{
    instance::{
        Error, Receipt, Until,
        inbox::{BEHIND, Waiter, Waiting},
        turn::{self, Mind},
    },
    types::{Priority, Step, Stimulus, StimulusId},
};

/// A stimulus arrives.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Deliver {
    /// The stimulus.
    pub stimulus: Stimulus,
    /// State version it insists on.
    pub expected: Option<u64>,
    /// Who waits for it.
    pub waiter: Waiter,
}

impl Handler<Deliver> for InstanceActor {
    type Result = ();

    fn handle(&mut self, Deliver { stimulus, expected, mut waiter }: Deliver, ctx: &mut Context<Self>) {
        let limit = self.mind().profile.limits.max_inbox.map_or(self.environment.max_inbox, |limit| limit as usize);
        if waiter.is_behind_a_refusal() {
            return waiter.tell(Err(Error::Overloaded(BEHIND)));
        }
        let can_wait = stimulus.priority == Priority::Background && self.environment.limits.turns_away();
        let agenda = self.agenda();
        if stimulus.repeatable {
            let in_hand = agenda.thinking.as_mut().and_then(|t| t.in_hand_mut().find(|w| w.stimulus.id == stimulus.id));
            if let Some(earlier) = in_hand.or_else(|| agenda.inbox.find(&stimulus.id)) {
                if earlier.accepted && waiter.until() == Until::Accepted {
                    waiter.tell(Ok(Receipt::Accepted { repeated: true }));
                } else {
                    if earlier.accepted {
                        waiter.tell_taken();
                    }
                    earlier.waiters.push(waiter);
                }
                return self.ensure_active(ctx);
            }
        }
        if agenda.inbox.len() >= limit {
            return waiter.tell(Err(Error::InboxFull(limit)));
        }
        // What can wait waits for a node with room.
        if can_wait {
            self.environment.metrics.refused.increment(1);
            return waiter.tell(Err(Error::Overloaded(
                "the node is full and another one has room: it takes no work of the background class",
            )));
        }
        agenda.inbox.push(Waiting::arrived(stimulus, expected, waiter));
        self.ensure_active(ctx);
    }
}

/// The profile is created or replaced.
#[derive(Message)]
#[rtype(result = "()")]
pub struct PutProfile {
    /// The profile, made ready.
    pub mind: Arc<Mind>,
    /// Told whether it was created.
    pub answer: oneshot::Sender<Result<bool, Error>>,
}

/// Everything about the instance is forgotten.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Forget {
    /// Told when it is.
    pub answer: oneshot::Sender<Result<(), Error>>,
}

/// A dead letter goes back into the inbox.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Revive {
    /// Which.
    pub stimulus: StimulusId,
    /// Told when it is.
    pub answer: oneshot::Sender<Result<(), Error>>,
}

/// There may be stimuli waiting in the store: look.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Wake;

/// The tenure is over: decide nothing more, hand over what waits.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Fence;

/// How much waits; `None` while the instance must not leave memory.
#[derive(Message)]
#[rtype(result = "Observed")]
pub struct Observe {
    /// Whether the question comes from passivation, which also packs the state.
    pub pack: bool,
    /// Whether it leaves memory if it is idle: it leaves a snapshot behind.
    pub leave: bool,
}

/// What an instance says of itself.
#[derive(Debug, Clone, Copy, MessageResponse)]
pub struct Observed {
    /// Stimuli in its inbox or in hand.
    pub inbox: usize,
    /// Whether nothing is going on.
    pub idle: bool,
}

/// The thought in hand took steps, and goes on when they are committed.
#[derive(Message)]
#[rtype(result = "Result<(), Error>")]
pub struct Commit {
    /// On which stimulus.
    pub stimulus: StimulusId,
    /// The steps, in order.
    pub steps: Vec<Step>,
}

impl Handler<Commit> for InstanceActor {
    type Result = ResponseFuture<Result<(), Error>>;
    fn handle(&mut self, Commit { stimulus, steps }: Commit, ctx: &mut Context<Self>) -> Self::Result {
        let (answer, end) = oneshot::channel();
        let thinking = self.agenda.as_mut().and_then(|agenda| agenda.thinking.as_mut());
        if let Some(thinking) = thinking.filter(|thinking| thinking.waiting.stimulus.id == stimulus) {
            let steps = steps.into_iter().map(Arc::new).collect();
            thinking.journaling = Some(Journaling { stimulus, steps, answer });
            self.go_on(ctx);
        }
        Box::pin(async move { end.await.unwrap_or(Err(Error::Crashed)) })
    }
}

impl InstanceActor {
    fn control(&mut self, control: Control, ctx: &mut Context<Self>) {
        let limit = self.environment.max_inbox;
        let controls = &mut self.agenda().controls;
        if controls.len() >= limit {
            return control.refuse(Error::InboxFull(limit));
        }
        controls.push_back(control);
        self.ensure_active(ctx);
    }
}

impl Handler<PutProfile> for InstanceActor {
    type Result = ();
    fn handle(&mut self, PutProfile { mind, answer }: PutProfile, ctx: &mut Context<Self>) {
        self.control(Control::Profile(mind, answer), ctx);
    }
}

impl Handler<Forget> for InstanceActor {
    type Result = ();
    fn handle(&mut self, Forget { answer }: Forget, ctx: &mut Context<Self>) {
        self.control(Control::Forget(answer), ctx);
    }
}

impl Handler<Revive> for InstanceActor {
    type Result = ();
    fn handle(&mut self, Revive { stimulus, answer }: Revive, ctx: &mut Context<Self>) {
        self.control(Control::Revive(stimulus, answer), ctx);
    }
}

impl Handler<Wake> for InstanceActor {
    type Result = ();
    fn handle(&mut self, _: Wake, ctx: &mut Context<Self>) {
        match self.phase {
            Phase::Active if self.agenda.is_none() => self.reload(ctx),
            // What is being loaded or was, may have been read before something was lodged.
            Phase::Active | Phase::Activating => self.agenda().look = true,
            Phase::Cold | Phase::Fenced => self.ensure_active(ctx),
        }
    }
}

impl Handler<Fence> for InstanceActor {
    type Result = ();
    fn handle(&mut self, _: Fence, ctx: &mut Context<Self>) {
        self.fence(ctx);
    }
}

impl Handler<Observe> for InstanceActor {
    type Result = Observed;
    fn handle(&mut self, Observe { pack, leave }: Observe, _: &mut Context<Self>) -> Observed {
        if pack
            && self.agenda.is_none()
            && let State::Open(state) = &self.kept.state
        {
            self.kept.state = State::Packed(turn::text_of_state(state));
        }
        if pack && self.agenda.is_none() {
            self.kept.past = None;
        }
        if leave {
            self.leave_snapshot();
        }
        let in_hand = |agenda: &Agenda| agenda.thinking.as_ref().map_or(0, |thinking| 1 + thinking.others.len());
        let inbox = self.agenda.as_ref().map_or(0, |agenda| agenda.inbox.len() + in_hand(agenda));
        Observed { inbox, idle: self.agenda.is_none() && self.phase != Phase::Activating }
    }
}
