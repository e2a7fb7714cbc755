//! The actor around one instance: gathers inputs, calls the pure turn, commits, and only then answers.
//!
//! Here: its life and its loop. In `attend`: which stimulus is next, which share a thought. In `think`: asking the engine; in
//! `recent`: the turns it is told of. In `unheard`: a thought nobody waits for. In `commit`: units of work and their ends. In
//! `message`: what it can be told. In `passivate`: what it leaves behind in memory. Not here: decisions (`turn`), queues (`inbox`), who keeps it alive (`cluster/shard.rs`).
//! Invariants: one unit of work is with the store at a time, so units of an instance are in order; the state in memory runs
//! ahead of the store only while that unit is out, and is loaded again when the unit is refused; nobody is answered before.
//! Tests: at the foot; `tests/it/turn.rs`, `tests/it/panic.rs`, `tests/it/activation.rs`, `tests/it/crash.rs`.

mod attend;
mod commit;
pub mod message;
mod passivate;
mod recent;
mod think;
mod unheard;

use std::{
    collections::{HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use actix::prelude::*;
use tokio::sync::oneshot;

use self::{
    attend::{Next, is_held_back, remembered},
    think::Failure,
};
use super::{
    Error,
    attention::{self, Past},
    environment::Environment,
    inbox::{Inbox, Waiting},
    tenure::{BusyToken, Tenure},
    turn::{self, Author, Judgement, Mind, Standing},
};
use crate::{
    cognition::{Action, Facts, Thought},
    store::{DeadLetter, Head, Loaded},
    types::{InstanceKey, RawJson, StateDoc, Step, StimulusId, TurnRecord, limits::MAX_TURNS_PER_COMMIT},
};

/// Where the instance stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// In memory without its state; the next arrival loads it.
    Cold,
    /// Being loaded.
    Activating,
    /// Deciding and committing.
    Active,
    /// Another node owns it; everything is refused.
    Fenced,
}

impl Phase {
    /// Whether a life may take this step.
    const fn may_become(self, next: Phase) -> bool {
        matches!(
            (self, next),
            (Phase::Cold, Phase::Activating)
                | (Phase::Activating, Phase::Active | Phase::Cold)
                | (Phase::Active, Phase::Cold)
                | (_, Phase::Fenced)
        )
    }
}

/// What an instance carries only while something is going on; an idle one has none of it.
struct Agenda {
    inbox: Inbox,
    controls: VecDeque<Control>,
    /// The unit that is with the store.
    out: Option<Out>,
    /// The stimulus that is with the engine, or whose answer waits for the store.
    thinking: Option<Thinking>,
    /// A stimulus failed and waits before it is tried again; nothing overtakes it.
    pausing: bool,
    /// Something may have come into the store's inbox: look there before nothing is left to do.
    look: bool,
    /// All that waits does so for others like it, and an alarm is set for its end.
    gathering: bool,
    /// What waits was made durable so that it may share the thought that begins next.
    invited: bool,
    _busy: BusyToken,
}

/// A unit that is with the store.
enum Out {
    Turns(Vec<(Waiting, Arc<TurnRecord>)>),
    Accept(Vec<StimulusId>),
    Bury(Box<Waiting>, Arc<DeadLetter>),
    Steps(Journaling),
    Control(Control),
}

struct Thinking {
    waiting: Waiting,
    /// Those that share the thought; they were accepted, and come after it.
    others: Vec<Waiting>,
    /// What the rules already decided; it comes before what the engine decides.
    actions: Vec<Action>,
    slow: bool,
    handle: SpawnHandle,
    answer: Option<Result<Thought, Failure>>,
    /// Steps the engine waits to see committed.
    journaling: Option<Journaling>,
}

/// Steps of the thought in hand, and who waits for their commit.
struct Journaling {
    stimulus: StimulusId,
    steps: Vec<Arc<Step>>,
    answer: oneshot::Sender<Result<(), Error>>,
}

impl Thinking {
    /// All it is about.
    fn in_hand(&self) -> impl Iterator<Item = &Waiting> {
        std::iter::once(&self.waiting).chain(&self.others)
    }

    fn in_hand_mut(&mut self) -> impl Iterator<Item = &mut Waiting> {
        std::iter::once(&mut self.waiting).chain(&mut self.others)
    }
}

/// A change of the instance itself.
enum Control {
    Profile(Arc<Mind>, oneshot::Sender<Result<bool, Error>>),
    Forget(oneshot::Sender<Result<(), Error>>),
    Revive(StimulusId, oneshot::Sender<Result<(), Error>>),
}

impl Control {
    fn refuse(self, error: Error) {
        match self {
            Control::Profile(_, answer) => drop(answer.send(Err(error))),
            Control::Forget(answer) | Control::Revive(_, answer) => drop(answer.send(Err(error))),
        }
    }
}

/// The state: text while idle (a fraction of the memory), parsed while busy.
enum State {
    Packed(RawJson),
    Open(Box<StateDoc>),
}

/// What stopped a run of decisions.
enum Stop {
    Panicked(Waiting),
    Think(Waiting, Vec<Action>),
    /// All that is left waits for others like it, for so long.
    Gather(Duration),
}

/// What an instance keeps between its turns. In an allocation of its own: with it in the actor, the task around the actor
/// would fall into the allocator's next size class, for every instance in memory.
struct Kept {
    tenure: Arc<Tenure>,
    exists: bool,
    head: Head,
    version: u64,
    /// At most [`TURNS_PER_FULL_STATE`](crate::types::limits::TURNS_PER_FULL_STATE): four bytes keep the whole small.
    since_full: u32,
    /// What it heard lately, for attention; only while it is busy, and never without attention.
    past: Option<Box<Past>>,
    /// How many stimuli were lodged for the shard when it was last loaded, as far as was known.
    lodged: u64,
    state: State,
}

/// One living instance.
pub struct InstanceActor {
    environment: Arc<Environment>,
    key: InstanceKey,
    phase: Phase,
    /// Its own mind; the node's default one when absent.
    mind: Option<Arc<Mind>>,
    kept: Box<Kept>,
    agenda: Option<Box<Agenda>>,
}

impl InstanceActor {
    /// A cold instance; it loads itself when the first message arrives.
    pub fn new(environment: Arc<Environment>, key: InstanceKey, tenure: Arc<Tenure>) -> Self {
        Self {
            environment,
            key,
            phase: Phase::Cold,
            mind: None,
            kept: Box::new(Kept {
                tenure,
                exists: false,
                head: Head::default(),
                version: 0,
                since_full: 0,
                past: None,
                lodged: 0,
                state: State::Open(Box::default()),
            }),
            agenda: None,
        }
    }

    /// Starts it on this thread's arbiter, with room for a burst that comes before it has run for the first time.
    pub fn begin(self) -> Addr<Self> {
        Self::create(|ctx| {
            ctx.set_mailbox_capacity(self.environment.max_inbox.max(16));
            self
        })
    }

    /// An illegal step is a bug: it stops a test, and in production fences the instance, which then only refuses.
    fn become_(&mut self, next: Phase) {
        debug_assert!(self.phase.may_become(next), "{:?} -> {next:?}", self.phase);
        if self.phase.may_become(next) {
            self.phase = next;
        } else {
            tracing::error!(instance = %self.key, from = ?self.phase, to = ?next, "illegal step in an instance's life");
            self.phase = Phase::Fenced;
        }
    }

    fn mind(&self) -> &Arc<Mind> {
        self.mind.as_ref().unwrap_or(&self.environment.default_mind)
    }

    fn agenda(&mut self) -> &mut Agenda {
        let busy = &self.kept.tenure.busy;
        self.agenda.get_or_insert_with(|| {
            Box::new(Agenda {
                inbox: Inbox::default(),
                controls: VecDeque::new(),
                out: None,
                thinking: None,
                pausing: false,
                look: false,
                gathering: false,
                invited: false,
                _busy: busy.enter(),
            })
        })
    }

    fn standing(&self) -> Standing {
        Standing { turn: self.kept.head.turn, version: self.kept.version, since_full: self.kept.since_full.into() }
    }

    fn open_state(&mut self) -> Box<StateDoc> {
        match std::mem::replace(&mut self.kept.state, State::Open(Box::default())) {
            State::Open(state) => state,
            State::Packed(text) => Box::new(serde_json::from_str(text.get()).unwrap_or_default()),
        }
    }

    // Life.

    fn ensure_active(&mut self, ctx: &mut Context<Self>) {
        if self.phase != Phase::Cold {
            return self.go_on(ctx);
        }
        self.become_(Phase::Activating);
        self.kept.lodged = self.kept.tenure.lodged();
        let store = self.environment.store.clone();
        let (key, snapshot) = (self.key.clone(), self.snapshot());
        let load = async move {
            match snapshot {
                Some(snapshot) => store.load_with(&key, snapshot).await,
                None => store.load(&key).await,
            }
        };
        ctx.spawn(load.into_actor(self).map(|loaded, actor, ctx| {
            if actor.phase == Phase::Fenced {
                return actor.go_on(ctx);
            }
            match loaded.map_err(Error::from).and_then(|loaded| actor.take_over(loaded)) {
                Ok(()) => {
                    actor.become_(Phase::Active);
                    actor.environment.metrics.activations.increment(1);
                    actor.go_on(ctx);
                }
                Err(error) => {
                    tracing::error!(instance = %actor.key, %error, "an instance could not be loaded");
                    actor.become_(Phase::Cold);
                    actor.refuse_all(&error);
                }
            }
        }));
    }

    fn take_over(&mut self, loaded: Loaded) -> Result<(), Error> {
        self.came_back(&loaded);
        self.mind = match loaded.profile {
            Some(profile) => Some(self.environment.minds.of(&self.key.tenant, &profile)?),
            None => None,
        };
        self.kept.exists = loaded.exists;
        self.kept.head = loaded.head;
        self.kept.version = loaded.state.version;
        self.kept.since_full = u32::try_from(loaded.turns_since_full).unwrap_or(u32::MAX);
        self.kept.state = State::Packed(loaded.state.doc);
        let mut journals: HashMap<StimulusId, Vec<Arc<Step>>> = loaded.journals.into_iter().collect();
        if let Some(thinking) = self.agenda.as_mut().and_then(|agenda| agenda.thinking.as_mut()) {
            thinking.waiting.steps = journals.remove(&thinking.waiting.stimulus.id).unwrap_or_default();
        }
        if !loaded.inbox.is_empty() {
            let agenda = self.agenda();
            let thinking = agenda.thinking.as_ref();
            let is_in_hand = |id: &StimulusId| {
                thinking.is_some_and(|thinking| thinking.in_hand().any(|waiting| waiting.stimulus.id == *id))
            };
            let stored = loaded.inbox.into_iter().filter(|stimulus| !is_in_hand(&stimulus.id));
            agenda.inbox.restore(stored);
            for waiting in agenda.inbox.iter_mut() {
                waiting.steps = journals.remove(&waiting.stimulus.id).unwrap_or_default();
            }
        }
        Ok(())
    }

    /// Loads the last commit again: after a refused unit the memory has run ahead of it.
    fn reload(&mut self, ctx: &mut Context<Self>) {
        if self.phase == Phase::Fenced {
            return self.go_on(ctx);
        }
        self.become_(Phase::Cold);
        self.ensure_active(ctx);
    }

    /// Tells everybody who waits. What the store has accepted stays there and is found again by the scan.
    fn refuse_all(&mut self, error: &Error) {
        let Some(mut agenda) = self.agenda.take() else { return };
        for waiting in agenda.inbox.iter_mut() {
            waiting.tell(&Err(error.clone()));
        }
        for waiting in agenda.thinking.iter_mut().flat_map(Thinking::in_hand_mut) {
            waiting.tell(&Err(error.clone()));
        }
        for control in agenda.controls {
            control.refuse(error.clone());
        }
    }

    /// This node may not decide any more: what waits goes to the node that may, in its order.
    fn hand_over_all(&mut self) {
        let Some(mut agenda) = self.agenda.take() else { return };
        if let Some(thinking) = agenda.thinking.take() {
            self.hand_over(thinking.waiting);
            thinking.others.into_iter().for_each(|waiting| self.hand_over(waiting));
        }
        while let Some(waiting) = agenda.inbox.pop() {
            self.hand_over(waiting);
        }
        for control in agenda.controls {
            control.refuse(Error::Fenced);
        }
    }

    fn hand_over(&self, waiting: Waiting) {
        if let Err(mut waiting) = self.kept.tenure.hand_over(&self.key, waiting) {
            waiting.tell(&Err(Error::Fenced));
        }
    }

    // The loop: one thing after the other, until something has to be waited for.

    fn go_on(&mut self, ctx: &mut Context<Self>) {
        if self.phase == Phase::Fenced {
            // A unit that is still with the store comes before everything behind it, whatever becomes of it.
            if self.agenda.as_ref().is_none_or(|agenda| agenda.out.is_none()) {
                self.hand_over_all();
            }
            return;
        }
        let Some(agenda) = self.agenda.as_deref_mut().filter(|_| self.phase == Phase::Active) else { return };
        if agenda.out.is_some() {
            return;
        }
        if let Some(control) = agenda.controls.pop_front() {
            return self.submit_control(control, ctx);
        }
        if let Some(journaling) = agenda.thinking.as_mut().and_then(|thinking| thinking.journaling.take()) {
            return self.submit_steps(journaling, ctx);
        }
        if let Some(thinking) = agenda.thinking.take_if(|thinking| thinking.answer.is_some()) {
            return self.conclude_thought(thinking, ctx);
        }
        if agenda.pausing || agenda.thinking.as_ref().is_some_and(|thinking| thinking.slow) {
            if self.interrupt(ctx) {
                return;
            }
            // Whoever arrives meanwhile gets a durable place in the inbox and need not wait.
            return self.submit_accept(ctx);
        }
        if agenda.thinking.is_some() {
            return;
        }
        if agenda.inbox.is_empty() {
            let look = agenda.look;
            self.agenda = None;
            if look {
                self.reload(ctx);
            }
            return;
        }
        self.decide(ctx);
    }

    /// Decides as many waiting stimuli as go into one commit, up to the first that must be thought about.
    fn decide(&mut self, ctx: &mut Context<Self>) {
        let now = self.environment.clock.now();
        let mind = self.mind().clone();
        let mut state = self.open_state();
        let mut standing = self.standing();
        let mut decided: Vec<(Waiting, Arc<TurnRecord>)> = Vec::new();
        let mut stop = None;
        while decided.len() < MAX_TURNS_PER_COMMIT {
            let next = match &mind.attention {
                None => self.agenda().inbox.pop().map_or(Next::Nothing, Next::One),
                Some(attention) => self.attend(attention, &mind, &state, standing, now),
            };
            let mut waiting = match next {
                Next::One(waiting) => waiting,
                Next::Nothing => break,
                Next::Later(pause) => {
                    stop = Some(Stop::Gather(pause));
                    break;
                }
            };
            if let Some(expected) = waiting.expected.filter(|expected| *expected != standing.version) {
                waiting.tell(&Err(Error::VersionMismatch { expected, actual: standing.version }));
                continue;
            }
            let facts =
                Facts { key: &self.key, stimulus: &waiting.stimulus, state: &state, turn: standing.turn + 1, now };
            let mut engine = "reflex";
            let judged = catch_unwind(AssertUnwindSafe(|| {
                self.environment.faults.strike(&waiting.stimulus);
                turn::judge(&mind, &facts)
            }));
            let decision = match judged {
                Err(_) => {
                    stop = Some(Stop::Panicked(waiting));
                    break;
                }
                Ok(Ok(Judgement::Think(mut actions, _))) if is_held_back(&mind, &waiting) => {
                    actions.push(Action::Remember(remembered(&waiting.stimulus)));
                    engine = attention::HELD_BACK;
                    Ok(actions)
                }
                Ok(Ok(Judgement::Think(actions, _))) => {
                    stop = Some(Stop::Think(waiting, actions));
                    break;
                }
                Ok(Err(refusal)) => {
                    waiting.tell(&Err(Error::Invalid(refusal.to_string())));
                    continue;
                }
                Ok(Ok(Judgement::Decided(actions))) => Ok(actions),
                Ok(Ok(Judgement::Failed(reason))) => Err(reason),
            };
            let author = Author { engine, thought: Thought::default() };
            let twin = self.environment.twin;
            let record = turn::conclude(standing, &waiting.stimulus, &mut state, decision, author, twin, now);
            standing = standing.after(&record);
            decided.push((waiting, Arc::new(record)));
        }
        self.kept.state = State::Open(state);
        if decided.is_empty() {
            return match stop {
                None => self.go_on_soon(ctx),
                Some(Stop::Gather(pause)) => self.gather(pause, ctx),
                Some(Stop::Panicked(waiting)) => self.panicked(waiting, ctx),
                Some(Stop::Think(waiting, actions)) => self.think(waiting, actions, ctx),
            };
        }
        match stop {
            Some(Stop::Panicked(waiting) | Stop::Think(waiting, _)) => self.agenda().inbox.put_back(waiting),
            Some(Stop::Gather(_)) | None => {}
        }
        self.submit_turns(standing, decided, ctx);
    }

    /// Everything popped was refused on the spot: look again whether there is more, without recursion.
    fn go_on_soon(&mut self, ctx: &mut Context<Self>) {
        ctx.spawn(async {}.into_actor(self).map(|(), actor, ctx| actor.go_on(ctx)));
    }
}

impl Actor for InstanceActor {
    type Context = Context<Self>;
}

impl Drop for InstanceActor {
    /// Also after a panic: those who wait are told by their dropped senders.
    fn drop(&mut self) {
        self.environment.active.fetch_sub(1, std::sync::atomic::Ordering::AcqRel);
        self.environment.metrics.active.decrement(1.0);
    }
}

#[cfg(test)]
mod tests {
    use actix::dev::ContextFut;

    use super::*;

    /// What tokio puts around a future in its task: header, scheduler, id, and the links at its end.
    const AROUND: usize = 96;

    /// The limits are size classes of the allocator: a byte more costs every instance in memory 128 or 16.
    #[test]
    fn an_idle_instance_is_small() {
        let task = AROUND + size_of::<ContextFut<InstanceActor, Context<InstanceActor>>>();
        assert!(task <= 512, "the task of an instance has {task} bytes");
        let kept = size_of::<Kept>();
        assert!(kept <= 96, "what an instance keeps has {kept} bytes");
    }
}
