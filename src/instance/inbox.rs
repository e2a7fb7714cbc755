//! What waits for an instance in memory: by priority, then arrival; bounded by the one who lets in.
//!
//! Not here: durability. An entry that is `accepted` also stands in the store's inbox.
//! Tests: at the foot.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::oneshot;

use super::{Error, Receipt, Until, attention::Weight, turn::lane};
use crate::types::{Fault as _, Priority, Step, Stimulus, StimulusId};

/// Why a stimulus is refused whose forerunner was.
pub const BEHIND: &str = "an earlier stimulus of the same sender was not taken";

/// Why a stimulus is refused whose MQTT session went on at another node, which does not know of it.
pub const BARRED: &str = "its session went on at another node, where its sender sends it again";

/// What one sender has in flight and will send again in order if it is not taken (an MQTT 3.1.1 connection). Once one of it
/// was not taken, those behind it are refused as well, so that none of them overtakes it. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Line(Arc<AtomicBool>);

impl Line {
    /// Whether one of it was not taken.
    pub fn is_broken(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Someone who waits for what becomes of a stimulus. Dropping it unanswered tells them that the instance crashed.
#[derive(Debug)]
pub struct Waiter {
    until: Until,
    answer: Option<oneshot::Sender<Result<Receipt, Error>>>,
    /// Told when the stimulus is durable, by one who waits for more.
    taken: Option<oneshot::Sender<()>>,
    line: Option<Line>,
}

impl Waiter {
    /// One who waits so long, at the end of a line if there is one, and where the answer arrives.
    pub fn new(until: Until, line: Option<Line>) -> (Self, oneshot::Receiver<Result<Receipt, Error>>) {
        let (answer, receiver) = oneshot::channel();
        (Self { until, answer: Some(answer), taken: None, line }, receiver)
    }

    /// One who waits for the decision and also wants to know when the stimulus is durable, where both arrive. The second
    /// channel closes without news when the end comes first.
    pub fn attentive(line: Option<Line>) -> (Self, oneshot::Receiver<Result<Receipt, Error>>, oneshot::Receiver<()>) {
        let (mut waiter, receiver) = Self::new(Until::Decided, line);
        let (taken, notice) = oneshot::channel();
        waiter.taken = Some(taken);
        (waiter, receiver, notice)
    }

    /// How long they wait.
    pub const fn until(&self) -> Until {
        self.until
    }

    /// Whether nobody listens any more.
    pub fn is_gone(&self) -> bool {
        self.answer.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    /// Tells one who waits for the decision that the stimulus is durable.
    pub fn tell_taken(&mut self) {
        if let Some(taken) = self.taken.take() {
            let _ = taken.send(());
        }
    }

    /// Whether one before it in its line was not taken.
    pub fn is_behind_a_refusal(&self) -> bool {
        self.line.as_ref().is_some_and(Line::is_broken)
    }

    /// Answers. Nobody listening any more is not an error.
    pub fn tell(mut self, end: Result<Receipt, Error>) {
        if end.as_ref().is_err_and(|error| error.kind().is_retryable()) {
            self.break_line();
        }
        if let Some(answer) = self.answer.take() {
            drop(answer.send(end));
        }
    }

    fn break_line(&self) {
        if let Some(line) = &self.line {
            line.0.store(true, Ordering::Release);
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if self.answer.is_some() {
            self.break_line();
        }
    }
}

/// A stimulus that waits.
#[derive(Debug)]
pub struct Waiting {
    /// The stimulus.
    pub stimulus: Arc<Stimulus>,
    /// Whether it stands in the store's inbox.
    pub accepted: bool,
    /// Failed tries so far.
    pub tries: u32,
    /// State version it insists on.
    pub expected: Option<u64>,
    /// Who waits; more than one when the same id came twice.
    pub waiters: Vec<Waiter>,
    /// When it came in, for the latency figure.
    pub since: std::time::Instant,
    /// What attention knows of it.
    pub weight: Weight,
    /// Thoughts about it that were interrupted.
    pub interrupted: u8,
    /// The committed steps of its turn, when that was begun.
    pub steps: Vec<Arc<Step>>,
}

impl Waiting {
    /// One that just arrived.
    pub fn arrived(stimulus: Stimulus, expected: Option<u64>, waiter: Waiter) -> Self {
        Self {
            stimulus: Arc::new(stimulus),
            accepted: false,
            tries: 0,
            expected,
            waiters: vec![waiter],
            since: std::time::Instant::now(),
            weight: Weight::Unknown,
            interrupted: 0,
            steps: Vec::new(),
        }
    }

    /// One that stands in the store's inbox and that nobody waits for.
    pub fn accepted(stimulus: Arc<Stimulus>) -> Self {
        Self {
            stimulus,
            accepted: true,
            tries: 0,
            expected: None,
            waiters: Vec::new(),
            since: std::time::Instant::now(),
            weight: Weight::Unknown,
            interrupted: 0,
            steps: Vec::new(),
        }
    }

    /// Whether it stands in the store's inbox.
    pub const fn is_accepted(&self) -> bool {
        self.accepted
    }

    /// Answers everybody, and forgets them.
    pub fn tell(&mut self, end: &Result<Receipt, Error>) {
        for waiter in self.waiters.drain(..) {
            waiter.tell(end.clone());
        }
    }

    /// Whether it may not be taken any more: it is not durable, and one before it in its line was not taken.
    pub fn is_behind_a_refusal(&self) -> bool {
        !self.accepted && self.waiters.iter().any(Waiter::is_behind_a_refusal)
    }

    /// Answers those who wait only for acceptance; the others may want to know of it.
    pub fn tell_accepted(&mut self) {
        for waiter in self.waiters.extract_if(.., |waiter| waiter.until() == Until::Accepted) {
            waiter.tell(Ok(Receipt::Accepted { repeated: false }));
        }
        self.waiters.iter_mut().for_each(Waiter::tell_taken);
    }
}

/// Four queues, one for each priority.
#[derive(Debug, Default)]
pub struct Inbox([VecDeque<Waiting>; Priority::ALL.len()]);

impl Inbox {
    /// Number of stimuli.
    pub fn len(&self) -> usize {
        self.0.iter().map(VecDeque::len).sum()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(VecDeque::is_empty)
    }

    /// Takes a new arrival.
    pub fn push(&mut self, waiting: Waiting) {
        self.0[lane(waiting.stimulus.priority)].push_back(waiting);
    }

    /// Puts one back where it was taken from. If the same id arrived meanwhile, the two become one: a unit of work never
    /// holds an id twice, so nobody is told of a turn that is not written.
    pub fn put_back(&mut self, mut waiting: Waiting) {
        if waiting.stimulus.repeatable && self.find(&waiting.stimulus.id).is_some() {
            for again in self.extract(|other| other.stimulus.id == waiting.stimulus.id) {
                waiting.waiters.extend(again.waiters);
                waiting.accepted |= again.accepted;
            }
            if waiting.accepted {
                waiting.tell_accepted();
            }
        }
        self.0[lane(waiting.stimulus.priority)].push_front(waiting);
    }

    /// The most urgent, longest waiting one.
    pub fn pop(&mut self) -> Option<Waiting> {
        self.0.iter_mut().find_map(VecDeque::pop_front)
    }

    /// Those of one priority, the longest waiting first. `lane` counts from 0, the most urgent.
    pub fn lane(&self, lane: usize) -> impl Iterator<Item = &Waiting> {
        self.0.get(lane).into_iter().flatten()
    }

    /// The same, to be changed in place.
    pub fn lane_mut(&mut self, lane: usize) -> impl Iterator<Item = &mut Waiting> {
        self.0.get_mut(lane).into_iter().flatten()
    }

    /// Takes one of a lane out of its turn.
    pub fn take(&mut self, lane: usize, index: usize) -> Option<Waiting> {
        self.0.get_mut(lane)?.remove(index)
    }

    /// The waiting one with this id.
    pub fn find(&mut self, id: &StimulusId) -> Option<&mut Waiting> {
        self.0.iter_mut().flatten().find(|waiting| waiting.stimulus.id == *id)
    }

    /// Takes what stands in the store's inbox, in its order. It goes before what arrived while it was read, which came
    /// later; one that arrived again keeps who waits for it and takes its old place.
    pub fn restore(&mut self, stored: impl IntoIterator<Item = Arc<Stimulus>>) {
        let arrived: Vec<Waiting> = self.0.iter_mut().flat_map(|queue| queue.drain(..)).collect();
        let order: Vec<StimulusId> = arrived.iter().map(|waiting| waiting.stimulus.id.clone()).collect();
        let mut arrived: HashMap<StimulusId, Waiting, ahash::RandomState> =
            arrived.into_iter().map(|waiting| (waiting.stimulus.id.clone(), waiting)).collect();
        for stimulus in stored {
            let again = arrived.remove(&stimulus.id);
            self.push(Waiting { accepted: true, ..again.unwrap_or_else(|| Waiting::accepted(stimulus)) });
        }
        order.iter().filter_map(|id| arrived.remove(id)).for_each(|waiting| self.push(waiting));
    }

    /// Those the store does not know yet, in the order in which they will be taken.
    pub fn unaccepted(&self) -> impl Iterator<Item = &Waiting> {
        self.0.iter().flatten().filter(|waiting| !waiting.accepted)
    }

    /// All of them, to be changed in place.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Waiting> {
        self.0.iter_mut().flatten()
    }

    /// Removes those a test picks.
    pub fn extract(&mut self, mut pick: impl FnMut(&Waiting) -> bool) -> Vec<Waiting> {
        let mut out = Vec::new();
        for queue in &mut self.0 {
            let mut rest = VecDeque::with_capacity(queue.len());
            for waiting in queue.drain(..) {
                if pick(&waiting) { out.push(waiting) } else { rest.push_back(waiting) }
            }
            *queue = rest;
        }
        out
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{Channel, Millis, Source};

    #[test]
    fn one_who_waits_for_the_decision_may_hear_of_acceptance() {
        let (waiter, mut end, mut taken) = Waiter::attentive(None);
        let mut one = Waiting { waiters: vec![waiter], ..waiting(Priority::Device, "a") };
        one.tell_accepted();
        assert!(taken.try_recv().is_ok() && end.try_recv().is_err());
        assert!(!one.waiters[0].is_gone());
        drop(end);
        assert!(one.waiters[0].is_gone());
    }

    #[test]
    fn a_line_breaks_when_one_is_not_taken() {
        let line = Line::default();
        let waiter = || Waiter::new(Until::Accepted, Some(line.clone())).0;
        waiter().tell(Ok(Receipt::Accepted { repeated: false }));
        waiter().tell(Err(Error::Invalid("for good".into())));
        assert!(!waiter_is_behind(&line), "what is refused for good does not come again");
        waiter().tell(Err(Error::InboxFull(1)));
        assert!(waiter_is_behind(&line));

        let crashed = Line::default();
        drop(Waiter::new(Until::Accepted, Some(crashed.clone())));
        assert!(waiter_is_behind(&crashed));
    }

    fn waiter_is_behind(line: &Line) -> bool {
        line.is_broken()
    }

    fn waiting(priority: Priority, text: &str) -> Waiting {
        let mut stimulus = Stimulus::text(Source::Http, Channel::new("c").unwrap(), text, Millis(0));
        stimulus.priority = priority;
        Waiting {
            stimulus: Arc::new(stimulus),
            accepted: false,
            tries: 0,
            expected: None,
            waiters: Vec::new(),
            since: std::time::Instant::now(),
            weight: Weight::Unknown,
            interrupted: 0,
            steps: Vec::new(),
        }
    }

    #[test]
    fn priority_first_then_arrival() {
        let mut inbox = Inbox::default();
        for (priority, text) in
            [(Priority::Background, "d"), (Priority::Device, "b"), (Priority::Human, "a"), (Priority::Device, "c")]
        {
            inbox.push(waiting(priority, text));
        }
        let order: Vec<_> = std::iter::from_fn(|| inbox.pop()).map(|w| w.stimulus.content.clone().unwrap()).collect();
        assert_eq!(order, ["a", "b", "c", "d"]);
    }

    #[test]
    fn what_the_store_kept_comes_before_what_arrived_meanwhile() {
        let stored: Vec<_> = ["a", "b", "c"].map(|text| waiting(Priority::Device, text).stimulus).into();
        let mut inbox = Inbox::default();
        inbox.push(waiting(Priority::Device, "d"));
        inbox.push(Waiting { stimulus: stored[1].clone(), tries: 2, ..waiting(Priority::Device, "b") });
        inbox.push(waiting(Priority::Device, "e"));
        inbox.restore(stored);
        let order: Vec<_> = std::iter::from_fn(|| inbox.pop()).collect();
        let seen: Vec<_> =
            order.iter().map(|w| (w.stimulus.content.as_deref().unwrap(), w.accepted, w.tries)).collect();
        assert_eq!(seen, [("a", true, 0), ("b", true, 2), ("c", true, 0), ("d", false, 0), ("e", false, 0)]);
    }

    #[test]
    fn what_is_put_back_takes_in_a_repeat_that_arrived_meanwhile() {
        let id = StimulusId::new("same").unwrap();
        let named = || {
            let stimulus = (*waiting(Priority::Device, "a").stimulus).clone().with_repeatable_id(id.clone());
            let (waiter, receiver) = Waiter::new(Until::Decided, None);
            (
                Waiting { stimulus: Arc::new(stimulus), waiters: vec![waiter], ..waiting(Priority::Device, "a") },
                receiver,
            )
        };
        let ((first, _one), (again, _other)) = (named(), named());
        let mut inbox = Inbox::default();
        inbox.push(waiting(Priority::Device, "b"));
        inbox.push(again);
        inbox.put_back(first);
        assert_eq!(inbox.len(), 2);
        assert_eq!(inbox.pop().map(|waiting| (waiting.stimulus.id.clone(), waiting.waiters.len())), Some((id, 2)));
    }

    #[test]
    fn what_is_put_back_comes_first_again() {
        let mut inbox = Inbox::default();
        inbox.push(waiting(Priority::Device, "a"));
        inbox.push(waiting(Priority::Device, "b"));
        let first = inbox.pop().unwrap();
        inbox.put_back(first);
        assert_eq!(inbox.pop().unwrap().stimulus.content.as_deref(), Some("a"));
        assert_eq!(inbox.len(), 1);
    }
}
