//! The store in memory: complete and ordered like the durable ones, gone with the process.
//!
//! Owns: [`MemoryStore`] for tests, simulation and `store.backend = "memory"`, and [`Faults`], with which a test makes
//! commits fail, wait or vanish. Several nodes of one process may share it: then it fences, and time is its clock's.
//! Not here: durability.
//! Invariants: units are applied one at a time in the order of submission; their ends are told in that order, while no lock
//! of the store is held, on the thread that submitted or released them.
//! Tests: `tests/it/store_contract.rs`.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Bound,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Notify;

use super::{
    Committed, DeadLetter, Done, Episode, Error, Feed, Fence, Head, Index, Journal, Keep, Known, Listed, Loaded,
    MqttRow, MqttWrite, Outgoing, Part, Parts, Pending, Piece, Reader, Rejection, Remembered, Scope, Shipping, Spans,
    Stats, Store, Unit, Work, Writer, check, ownership::Rows, rank, replay,
};
use crate::{
    runtime::clock::Clock,
    types::{
        EpisodeId, InstanceId, InstanceKey, Millis, NodeId, Profile, StateSnapshot, Step, Stimulus, StimulusId,
        TenantId, TurnRecord,
    },
};

mod ownership;

/// Most units that wait while commits are held.
const DEFAULT_QUEUE: usize = 65_536;

/// A store that lives in memory. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct MemoryStore(Arc<Inner>);

struct Inner {
    dedupe: bool,
    max_queue: usize,
    /// How many feeds it has. With one, all turns stand in it; with more, a turn stands in its shard's.
    feeds: u32,
    clock: Clock,
    work: Mutex<WorkQueue>,
    data: Mutex<Data>,
    hint: Arc<Notify>,
}

/// What waits to be applied, and how the next of it shall end.
#[derive(Default)]
struct WorkQueue {
    jobs: VecDeque<Job>,
    /// Some thread applies jobs at present; others only queue theirs.
    busy: bool,
    closed: bool,
    held: bool,
    /// Jobs let through though held.
    permits: usize,
    failing: Option<(usize, Error)>,
    dropping: usize,
    failing_reads: Option<(usize, Error)>,
    fence_off: bool,
    behind_off: bool,
}

/// What is checked of a fence.
#[derive(Clone, Copy)]
struct Checks {
    fence: bool,
    behind: bool,
}

enum Job {
    Unit(Unit),
    Ship(Vec<Fence>, Vec<Shipping>, Done),
    Mqtt(Vec<MqttWrite>, Done),
    Keep(Box<Keep>, Done),
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::with(true, DEFAULT_QUEUE)
    }

    /// An empty store that recognises no repeats: the negative control of tests that count doubled turns.
    pub fn without_dedupe() -> Self {
        Self::with(false, DEFAULT_QUEUE)
    }

    /// An empty store that recognises repeats or not, and refuses when more than `max_queue` units wait.
    pub fn with(dedupe: bool, max_queue: usize) -> Self {
        Self::shared(dedupe, max_queue, 1, Clock::System)
    }

    /// As [`MemoryStore::with`], for nodes that share it: with a feed for each of so many shards, and the clock by which
    /// leases run and end.
    pub fn shared(dedupe: bool, max_queue: usize, feeds: u32, clock: Clock) -> Self {
        Self(Arc::new(Inner {
            dedupe,
            max_queue,
            feeds: feeds.max(1),
            clock,
            work: Mutex::default(),
            data: Mutex::new(Data { next: 1, ..Data::default() }),
            hint: Arc::default(),
        }))
    }

    /// The handle with which tests make it fail.
    pub fn faults(&self) -> Faults {
        Faults(self.clone())
    }

    /// Opens a closed store again, with everything that was committed.
    pub fn reopen(&self) {
        self.work().closed = false;
    }

    fn work(&self) -> MutexGuard<'_, WorkQueue> {
        self.0.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn data(&self) -> MutexGuard<'_, Data> {
        self.0.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The data, unless a read shall fail now.
    fn read(&self) -> Result<MutexGuard<'_, Data>, Error> {
        let mut work = self.work();
        if work.closed {
            return Err(Error::Closed);
        }
        if let Some(error) = take_failure(&mut work.failing_reads) {
            return Err(error);
        }
        drop(work);
        Ok(self.data())
    }

    fn queue(&self, job: Job) {
        let mut work = self.work();
        let refused = if work.closed {
            Some(Error::Closed)
        } else if work.jobs.len() >= self.0.max_queue {
            Some(Error::Overloaded)
        } else {
            None
        };
        match refused {
            None => {
                work.jobs.push_back(job);
                drop(work);
                self.pump();
            }
            Some(error) => {
                drop(work);
                job.into_done().tell(Err(Rejection::Failed(error)));
            }
        }
    }

    /// Applies what waits, one job at a time, and tells each end without a lock. Only one thread does so at a time; a job
    /// queued meanwhile (also by a `Done`) is taken by that thread.
    fn pump(&self) {
        let mut work = self.work();
        if work.busy {
            return;
        }
        loop {
            if work.held && work.permits == 0 {
                break;
            }
            let Some(job) = work.jobs.pop_front() else { break };
            work.permits = work.permits.saturating_sub(1);
            work.busy = true;
            let failure = take_failure(&mut work.failing);
            let dropped = work.dropping > 0;
            work.dropping = work.dropping.saturating_sub(1);
            let checks = Checks { fence: !work.fence_off, behind: !work.behind_off };
            drop(work);
            if dropped {
                drop(job);
            } else {
                self.end(job, failure, checks);
            }
            work = self.work();
            work.busy = false;
        }
    }

    fn end(&self, job: Job, failure: Option<Error>, checks: Checks) {
        if let Some(error) = failure {
            return job.into_done().tell(Err(Rejection::Failed(error)));
        }
        let mut data = self.data();
        let quiet = data.outgoing.len();
        let (done, end) = match job {
            Job::Unit(unit) => match data.admit(&unit, checks) {
                Ok(()) => {
                    let feed = Feed(if self.0.feeds == 1 { 0 } else { unit.fence.shard });
                    (unit.done, data.apply(&unit.key, unit.fence, feed, unit.work, self.0.dedupe))
                }
                Err(rejection) => (unit.done, Err(rejection)),
            },
            Job::Ship(under, writes, done) => {
                let (count, checks) = (self.0.feeds, checks.fence);
                for write in writes {
                    if !checks || data.may_ship(&under, write.shard(count)) {
                        data.ship(write);
                    }
                }
                (done, Ok(Committed { head: Head::default(), created: false }))
            }
            Job::Mqtt(writes, done) => {
                writes.into_iter().for_each(|write| data.mqtt(write));
                (done, Ok(Committed { head: Head::default(), created: false }))
            }
            Job::Keep(keep, done) => {
                data.keep(*keep);
                (done, Ok(Committed { head: Head::default(), created: false }))
            }
        };
        let outgoing = data.outgoing.len() > quiet;
        drop(data);
        if outgoing {
            self.0.hint.notify_one();
        }
        done.tell(end);
    }
}

/// A turn that was written before.
fn earlier(turns: &mut [Arc<TurnRecord>], turn: u64) -> Option<&mut Arc<TurnRecord>> {
    turns.get_mut(usize::try_from(turn).ok()?.checked_sub(1)?)
}

fn take_failure(failing: &mut Option<(usize, Error)>) -> Option<Error> {
    let (left, error) = failing.as_mut()?;
    let error = error.clone();
    *left -= 1;
    if *left == 0 {
        *failing = None;
    }
    Some(error)
}

impl Job {
    fn into_done(self) -> Done {
        match self {
            Job::Unit(Unit { done, .. }) | Job::Ship(_, _, done) | Job::Mqtt(_, done) | Job::Keep(_, done) => done,
        }
    }
}

/// Faults on demand of a [`MemoryStore`]. Cheap to clone.
#[derive(Clone)]
pub struct Faults(MemoryStore);

impl Faults {
    /// The next `count` commits fail with `error`; nothing of them is written.
    pub fn fail_next(&self, count: usize, error: Error) {
        self.0.work().failing = (count > 0).then_some((count, error));
    }

    /// The next `count` reads fail with `error`.
    pub fn fail_reads(&self, count: usize, error: Error) {
        self.0.work().failing_reads = (count > 0).then_some((count, error));
    }

    /// The next `count` commits vanish: nothing is written, and their `Done` is dropped (which tells [`Error::Closed`]).
    pub fn drop_next(&self, count: usize) {
        self.0.work().dropping = count;
    }

    /// From here on commits wait, until released.
    pub fn hold(&self) {
        self.0.work().held = true;
    }

    /// Lets the next `count` commits through while the rest is held.
    pub fn release_next(&self, count: usize) {
        self.0.work().permits += count;
        self.0.pump();
    }

    /// Lets everything through again.
    pub fn release(&self) {
        let mut work = self.0.work();
        work.held = false;
        work.permits = 0;
        drop(work);
        self.0.pump();
    }

    /// Stale fences are accepted from here on, or refused again: the negative control of tests that count owners.
    pub fn fence_off(&self, off: bool) {
        self.0.work().fence_off = off;
    }

    /// Owners that have not looked at what was lodged may decide what came later, from here on or no longer: the negative
    /// control of tests that look at order.
    pub fn behind_off(&self, off: bool) {
        self.0.work().behind_off = off;
    }

    /// A node's process is known to be gone, or (`alive`) its session stands again.
    pub fn set_alive(&self, node: &NodeId, alive: bool) {
        self.0.data().cluster.set_alive(node, alive);
    }

    /// Commits that wait at present.
    pub fn waiting(&self) -> usize {
        self.0.work().jobs.len()
    }
}

/// The least of all ids.
const FIRST_ID: &str = "-";

type MqttKey = (TenantId, String);

#[derive(Default)]
struct Data {
    cluster: Rows,
    instances: BTreeMap<InstanceKey, Instance>,
    outgoing: BTreeMap<(Feed, i64), (InstanceKey, Arc<TurnRecord>)>,
    /// Position of the next turn.
    next: i64,
    shipped: BTreeMap<Feed, i64>,
    pending: BTreeMap<(InstanceKey, String), Pending>,
    sessions: BTreeMap<MqttKey, Bytes>,
    queued: BTreeMap<MqttKey, BTreeMap<i64, Bytes>>,
    retained: BTreeMap<MqttKey, Bytes>,
}

struct Instance {
    /// Differs from every other life's.
    life: i64,
    profile: Option<Arc<Profile>>,
    created_at: Millis,
    head: Head,
    turns: Vec<Arc<TurnRecord>>,
    inbox: Vec<Arc<Stimulus>>,
    dead: Vec<Arc<DeadLetter>>,
    /// The steps of turns under way, by stimulus and number.
    steps: BTreeMap<(StimulusId, u32), Arc<Step>>,
    /// Where in `turns` each stimulus was decided.
    decided: HashMap<StimulusId, usize, ahash::RandomState>,
    /// Parts of its memory, and the turn that forgot something last.
    parts: BTreeMap<u64, Part>,
    forgot: u64,
    /// The index over its vectors, and the last turn that knows.
    index: Option<(u64, Bytes)>,
}

impl Instance {
    fn new(created_at: Millis) -> Self {
        static LIVES: AtomicI64 = AtomicI64::new(1);
        Self {
            life: LIVES.fetch_add(1, Ordering::Relaxed),
            profile: None,
            created_at,
            head: Head::default(),
            turns: Vec::new(),
            inbox: Vec::new(),
            dead: Vec::new(),
            parts: BTreeMap::new(),
            forgot: 0,
            index: None,
            steps: BTreeMap::new(),
            decided: HashMap::default(),
        }
    }

    fn journals(&self) -> Vec<Journal> {
        let mut journals: Vec<Journal> = Vec::new();
        for ((stimulus, _), step) in &self.steps {
            match journals.last_mut() {
                Some((last, steps)) if last == stimulus => steps.push(step.clone()),
                _ => journals.push((stimulus.clone(), vec![step.clone()])),
            }
        }
        journals
    }

    fn waiting(&self, id: &StimulusId) -> Option<usize> {
        self.inbox.iter().position(|stimulus| stimulus.id == *id)
    }

    /// Whether a stimulus waits, and nothing of its priority before it but what was decided before it.
    fn is_next(&self, id: &StimulusId, decided: &[&StimulusId]) -> bool {
        self.waiting(id).is_some_and(|at| {
            let before = self.inbox[..at].iter().filter(|other| other.priority == self.inbox[at].priority);
            before.into_iter().all(|other| decided.contains(&&other.id))
        })
    }

    fn known(&self, id: &StimulusId) -> Option<Known> {
        if let Some(at) = self.waiting(id) {
            return Some(Known::Waiting(Arc::clone(&self.inbox[at])));
        }
        if let Some(letter) = self.dead.iter().find(|letter| letter.stimulus.id == *id) {
            return Some(Known::Dead(Arc::clone(letter)));
        }
        self.decided.get(id).map(|&at| Known::Decided(Arc::clone(&self.turns[at])))
    }

    fn state(&self) -> Result<(StateSnapshot, u64), Error> {
        let whole = self.turns.iter().rposition(|t| matches!(t.state, crate::types::StateChange::Full(_)));
        let since = self.turns.len() - whole.map_or(0, |at| at + 1);
        let state = replay::replay(self.turns[whole.unwrap_or(0)..].iter().map(AsRef::as_ref))?;
        Ok((state, u64::try_from(since).unwrap_or(u64::MAX)))
    }
}

impl Data {
    /// Whether the unit may be written under its fence. Where no node ever joined nobody is fenced.
    fn admit(&mut self, unit: &Unit, checks: Checks) -> Result<(), Rejection> {
        if !self.cluster.is_founded() {
            return Ok(());
        }
        let row = self.cluster.shard(unit.fence.shard).ok_or(Rejection::Fenced)?;
        let standing = (row.epoch, row.lodged);
        let instance = self.instances.get(&unit.key);
        let unit_ids: Vec<&StimulusId> = match &unit.work {
            Work::Turns { turns, .. } => turns.iter().map(|turn| &turn.stimulus.id).collect(),
            _ => Vec::new(),
        };
        let next = |id: &StimulusId| {
            let earlier = unit_ids.split(|other| *other == id).next().unwrap_or_default();
            instance.is_some_and(|instance| instance.is_next(id, earlier))
        };
        let mut fence = unit.fence;
        if !checks.fence {
            fence.epoch = standing.0;
        }
        if !checks.behind {
            fence.lodged = standing.1;
        }
        check::fence(fence, standing, &unit.work, next)
    }

    /// Whether delivery may write for a shard under these fences.
    fn may_ship(&mut self, under: &[Fence], shard: u32) -> bool {
        let Some(fence) = under.iter().find(|fence| fence.shard == shard) else { return true };
        !self.cluster.is_founded() || self.cluster.shard(shard).is_some_and(|row| row.epoch == fence.epoch)
    }

    /// Checks everything first, then writes: a unit is applied whole or not at all.
    fn apply(
        &mut self,
        key: &InstanceKey,
        fence: Fence,
        feed: Feed,
        work: Work,
        dedupe: bool,
    ) -> Result<Committed, Rejection> {
        match work {
            Work::Turns { head, turns } => self.turns(key, feed, head, &turns, dedupe),
            Work::Accept { stimuli } => self.accept(key, stimuli, dedupe),
            Work::Lodge { stimuli } => {
                let count = stimuli.len() as u64;
                let end = self.accept(key, stimuli, dedupe);
                // One that waits already may have come by a commit whose end its owner never heard: it has to look.
                let unheard = matches!(end, Err(Rejection::Duplicate { known: Known::Waiting(_), .. }));
                if (end.is_ok() || unheard)
                    && let Some(row) = self.cluster.shard(fence.shard)
                {
                    row.lodged += count;
                }
                end
            }
            Work::Bury { stimulus, reason, tries, at } => {
                let instance = self.instances.entry(key.clone()).or_insert_with(|| Instance::new(at));
                instance.inbox.retain(|waiting| waiting.id != stimulus.id);
                instance.dead.retain(|letter| letter.stimulus.id != stimulus.id);
                instance.steps.retain(|(other, _), _| *other != stimulus.id);
                instance.dead.push(Arc::new(DeadLetter { stimulus: (*stimulus).clone(), reason, tries, at }));
                Ok(Committed { head: instance.head, created: false })
            }
            Work::Step { stimulus, first, steps, .. } => {
                let instance = self.instances.get_mut(key).ok_or(Rejection::NotFound)?;
                let numbered = (first..).zip(steps).map(|(number, step)| ((stimulus.clone(), number), step));
                instance.steps.extend(numbered);
                Ok(Committed { head: instance.head, created: false })
            }
            Work::Revive { stimulus } => {
                let instance = self.instances.get_mut(key).ok_or(Rejection::NotFound)?;
                let at = instance.dead.iter().position(|l| l.stimulus.id == stimulus).ok_or(Rejection::NotFound)?;
                let letter = instance.dead.remove(at);
                instance.inbox.push(Arc::new(letter.stimulus.clone()));
                Ok(Committed { head: instance.head, created: false })
            }
            Work::PutProfile { profile, at } => {
                let created = !self.instances.contains_key(key);
                let instance = self.instances.entry(key.clone()).or_insert_with(|| Instance::new(at));
                instance.profile = Some(profile);
                Ok(Committed { head: instance.head, created })
            }
            Work::Forget => {
                self.instances.remove(key);
                self.pending.retain(|(owner, _), _| owner != key);
                self.outgoing.retain(|_, (owner, _)| owner != key);
                Ok(Committed { head: Head::default(), created: false })
            }
        }
    }

    fn turns(
        &mut self,
        key: &InstanceKey,
        feed: Feed,
        head: Head,
        turns: &[Arc<TurnRecord>],
        dedupe: bool,
    ) -> Result<Committed, Rejection> {
        check::numbered(head, turns)?;
        let known = self.instances.get(key);
        check::current(head, known.map_or_else(Head::default, |instance| instance.head))?;
        if dedupe {
            check::distinct_turns(turns)?;
            for (index, record) in turns.iter().enumerate().filter(|(_, record)| record.stimulus.repeatable) {
                match known.and_then(|instance| instance.known(&record.stimulus.id)) {
                    // The end of the slow path: it waited, now it is decided.
                    None | Some(Known::Waiting(_)) => {}
                    Some(known) => return Err(Rejection::Duplicate { index, known }),
                }
            }
        }
        let created_at = check::created_at(turns);
        let instance = self.instances.entry(key.clone()).or_insert_with(|| Instance::new(created_at));
        for record in turns {
            if let Some(at) = instance.waiting(&record.stimulus.id) {
                instance.inbox.remove(at);
                instance.steps.retain(|(other, _), _| *other != record.stimulus.id);
            }
            instance.head = instance.head.advance(self.next);
            instance.decided.entry(record.stimulus.id.clone()).or_insert(instance.turns.len());
            instance.turns.push(Arc::clone(record));
            for (turn, places) in replay::losses(record) {
                instance.forgot = record.turn;
                instance.index = None;
                instance.parts.retain(|after, part| turn <= *after || turn > part.upto);
                let Some(lost) = earlier(&mut instance.turns, turn) else { continue };
                let mut redacted = (**lost).clone();
                redacted.redact(&places);
                *lost = Arc::new(redacted);
                let lost = Arc::clone(lost);
                let leaving = self.outgoing.values_mut().filter(|(owner, sent)| owner == key && sent.turn == turn);
                leaving.for_each(|(_, sent)| *sent = Arc::clone(&lost));
            }
            if !record.effects.is_empty() {
                self.outgoing.insert((feed, self.next), (key.clone(), Arc::clone(record)));
            }
            self.next += 1;
        }
        Ok(Committed { head: instance.head, created: false })
    }

    fn accept(&mut self, key: &InstanceKey, stimuli: Vec<Arc<Stimulus>>, dedupe: bool) -> Result<Committed, Rejection> {
        let known = self.instances.get(key);
        if dedupe {
            check::distinct_stimuli(&stimuli)?;
            for (index, stimulus) in stimuli.iter().enumerate().filter(|(_, stimulus)| stimulus.repeatable) {
                if let Some(known) = known.and_then(|instance| instance.known(&stimulus.id)) {
                    return Err(Rejection::Duplicate { index, known });
                }
            }
        }
        let created_at = stimuli.first().map_or(Millis(0), |stimulus| stimulus.accepted_at);
        let instance = self.instances.entry(key.clone()).or_insert_with(|| Instance::new(created_at));
        instance.inbox.extend(stimuli);
        Ok(Committed { head: instance.head, created: false })
    }

    fn ship(&mut self, write: Shipping) {
        match write {
            Shipping::Shipped { feed, position } => {
                let shipped = self.shipped.entry(feed).or_default();
                *shipped = position.max(*shipped);
            }
            Shipping::Postpone(pending) => {
                self.pending.insert((pending.key.clone(), pending.effect_id.clone()), *pending);
            }
            Shipping::Settle { key, effect_id } => {
                self.pending.remove(&(key, effect_id));
            }
        }
    }

    fn mqtt(&mut self, write: MqttWrite) {
        match write {
            MqttWrite::PutSession { tenant, client, record, .. } => {
                self.sessions.insert((tenant, client), record);
            }
            MqttWrite::DropSession { tenant, client, .. } => {
                let key = (tenant, client);
                self.sessions.remove(&key);
                self.queued.remove(&key);
            }
            MqttWrite::Enqueue { tenant, client, order, record, .. } => {
                self.queued.entry((tenant, client)).or_default().insert(order, record);
            }
            MqttWrite::Dequeue { tenant, client, order, .. } => {
                if let Some(queue) = self.queued.get_mut(&(tenant, client)) {
                    queue.remove(&order);
                }
            }
            MqttWrite::Retain { tenant, topic, record } if record.is_empty() => {
                self.retained.remove(&(tenant, topic));
            }
            MqttWrite::Retain { tenant, topic, record } => {
                self.retained.insert((tenant, topic), record);
            }
            // There is no other node.
            MqttWrite::Mail { .. } | MqttWrite::Collect { .. } => {}
        }
    }

    /// The tenant's instances in id order.
    fn of_tenant<'a>(
        &'a self,
        tenant: &'a TenantId,
        after: Option<&InstanceId>,
    ) -> impl Iterator<Item = (&'a InstanceKey, &'a Instance)> {
        let from = match after {
            Some(after) => Bound::Excluded(InstanceKey::new(tenant.clone(), after.clone())),
            None => InstanceId::new(FIRST_ID)
                .map_or(Bound::Unbounded, |first| Bound::Included(InstanceKey::new(tenant.clone(), first))),
        };
        let instances = self.instances.range((from, Bound::Unbounded));
        instances.take_while(move |(key, _)| key.tenant == *tenant)
    }
}

impl Data {
    fn keep(&mut self, keep: Keep) {
        let instance = self.instances.get_mut(&keep.key);
        let Some(instance) = instance.filter(|it| it.life == keep.life && it.forgot <= keep.seen) else { return };
        let empty = keep.piece.rec().is_empty();
        match keep.piece {
            Piece::Index(rec) => instance.index = (!empty).then_some((keep.seen, rec)),
            Piece::Part(part) if empty => drop(instance.parts.remove(&part.after)),
            Piece::Part(part) => drop(instance.parts.insert(part.after, part)),
        }
    }
}

impl Writer for MemoryStore {
    fn submit(&self, unit: Unit) {
        self.queue(Job::Unit(unit));
    }
    fn ship(&self, under: Vec<Fence>, writes: Vec<Shipping>, done: Done) {
        self.queue(Job::Ship(under, writes, done));
    }
    fn mqtt(&self, writes: Vec<MqttWrite>, done: Done) {
        self.queue(Job::Mqtt(writes, done));
    }
    fn keep(&self, keep: Keep, done: Done) {
        self.queue(Job::Keep(Box::new(keep), done));
    }
}

#[async_trait]
impl Reader for MemoryStore {
    async fn load(&self, key: &InstanceKey) -> Result<Loaded, Error> {
        let data = self.read()?;
        let Some(instance) = data.instances.get(key) else {
            return Ok(Loaded {
                exists: false,
                profile: None,
                created_at: None,
                head: Head::default(),
                state: replay::empty_state()?,
                turns_since_full: 0,
                inbox: Vec::new(),
                journals: Vec::new(),
            });
        };
        let (state, turns_since_full) = instance.state()?;
        Ok(Loaded {
            exists: true,
            profile: instance.profile.clone(),
            created_at: Some(instance.created_at),
            head: instance.head,
            state,
            turns_since_full,
            inbox: instance.inbox.clone(),
            journals: instance.journals(),
        })
    }

    async fn state(&self, key: &InstanceKey) -> Result<Option<StateSnapshot>, Error> {
        self.read()?.instances.get(key).map(|instance| Ok(instance.state()?.0)).transpose()
    }

    async fn turns(&self, key: &InstanceKey, after: u64, limit: usize) -> Result<Vec<Arc<TurnRecord>>, Error> {
        let data = self.read()?;
        let turns = data.instances.get(key).map_or(&[][..], |instance| &instance.turns);
        let from = usize::try_from(after).unwrap_or(usize::MAX).min(turns.len());
        Ok(turns[from..].iter().take(limit).cloned().collect())
    }

    async fn find(&self, key: &InstanceKey, stimulus: &StimulusId) -> Result<Option<Known>, Error> {
        Ok(self.read()?.instances.get(key).and_then(|instance| instance.known(stimulus)))
    }

    async fn find_prefix(&self, key: &InstanceKey, prefix: &str) -> Result<Option<Known>, Error> {
        let data = self.read()?;
        let Some(instance) = data.instances.get(key) else { return Ok(None) };
        let fits =
            |record: &&Arc<TurnRecord>| record.stimulus.repeatable && record.stimulus.id.as_str().starts_with(prefix);
        Ok(instance.turns.iter().rev().find(fits).map(|record| Known::Decided(Arc::clone(record))))
    }

    async fn locate(&self, tenant: &TenantId, stimulus: &StimulusId) -> Result<Vec<InstanceId>, Error> {
        let data = self.read()?;
        let knows = |instance: &Instance| match instance.known(stimulus) {
            None => false,
            Some(Known::Decided(record)) => record.stimulus.repeatable,
            Some(Known::Waiting(_) | Known::Dead(_)) => true,
        };
        let found = data.of_tenant(tenant, None).filter(|(_, instance)| knows(instance));
        Ok(found.map(|(key, _)| key.instance.clone()).take(super::MAX_LOCATED).collect())
    }

    async fn list(
        &self,
        tenant: &TenantId,
        label: Option<(&str, &str)>,
        after: Option<&InstanceId>,
        limit: usize,
    ) -> Result<Vec<Listed>, Error> {
        let data = self.read()?;
        let fits = |instance: &Instance| match (label, &instance.profile) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some((name, value)), Some(profile)) => profile.labels.get(name).is_some_and(|v| v == value),
        };
        let listed = data.of_tenant(tenant, after).filter(|(_, instance)| fits(instance)).take(limit);
        Ok(listed
            .map(|(key, instance)| Listed {
                instance: key.instance.clone(),
                profile: instance.profile.clone(),
                created_at: instance.created_at,
            })
            .collect())
    }

    async fn waiting(
        &self,
        scope: &Scope,
        after: Option<&InstanceKey>,
        limit: usize,
    ) -> Result<Vec<InstanceKey>, Error> {
        let data = self.read()?;
        let range = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let waiting = data.instances.range::<InstanceKey, _>(range).filter(|(_, i)| !i.inbox.is_empty());
        Ok(waiting.filter(|(key, _)| scope.contains(key)).take(limit).map(|(key, _)| key.clone()).collect())
    }

    async fn dead_letters(
        &self,
        key: &InstanceKey,
        after: Option<&StimulusId>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, Error> {
        let data = self.read()?;
        let dead = data.instances.get(key).map_or(&[][..], |instance| &instance.dead);
        let named = after.and_then(|after| dead.iter().position(|letter| letter.stimulus.id == *after));
        let from = named.map_or(0, |at| at + 1);
        Ok(dead[from..].iter().take(limit).map(|letter| (**letter).clone()).collect())
    }

    async fn recall(&self, key: &InstanceKey, query: &str, limit: usize) -> Result<Vec<Episode>, Error> {
        let data = self.read()?;
        let Some(instance) = data.instances.get(key) else { return Ok(Vec::new()) };
        let words = rank::query_words(query);
        let mut corpus = rank::Corpus::default();
        let mut lists: Vec<Vec<rank::Posting>> = vec![Vec::new(); words.len()];
        for episode in instance.turns.iter().flat_map(|record| replay::episodes(record)) {
            let (counts, length) = rank::count_words(&episode.content, &episode.tags);
            corpus.add(length);
            for (word, list) in words.iter().zip(&mut lists) {
                if let Some(&count) = counts.get(word) {
                    list.push(rank::Posting { episode: episode.id, count, length });
                }
            }
        }
        let ranked = rank::best(corpus, &lists, limit);
        let found = ranked.into_iter().filter_map(|(id, score)| {
            let record = instance.turns.get(usize::try_from(EpisodeId(id).turn()).ok()?.checked_sub(1)?)?;
            let episode = replay::episodes(record).find(|episode| episode.id == id)?;
            Some(Episode { score, ..episode })
        });
        Ok(found.collect())
    }

    async fn remembered(&self, key: &InstanceKey, after: u64, limit: usize) -> Result<Remembered, Error> {
        let data = self.read()?;
        let Some(instance) = data.instances.get(key) else { return Ok(Remembered::default()) };
        let from = usize::try_from(after).unwrap_or(usize::MAX).min(instance.turns.len());
        let turns = instance.turns[from..].iter().filter(|record| record.is_memory()).take(limit).cloned().collect();
        Ok(Remembered { life: instance.life, turns })
    }

    async fn parts(&self, key: &InstanceKey, behind: u64, limit: usize) -> Result<Parts, Error> {
        let data = self.read()?;
        let Some(instance) = data.instances.get(key) else { return Ok(Parts::default()) };
        let fits = |part: &&Part| part.upto > behind && part.upto <= instance.head.turn;
        Ok(Parts { life: instance.life, parts: instance.parts.values().filter(fits).take(limit).cloned().collect() })
    }

    async fn index(&self, key: &InstanceKey) -> Result<Option<Index>, Error> {
        let data = self.read()?;
        let Some(instance) = data.instances.get(key) else { return Ok(None) };
        let fits = instance.index.as_ref().filter(|(upto, _)| *upto <= instance.head.turn);
        Ok(fits.map(|(upto, rec)| Index { life: instance.life, upto: *upto, rec: rec.clone() }))
    }

    async fn spans(&self, key: &InstanceKey) -> Result<Spans, Error> {
        let data = self.read()?;
        let Some(instance) = data.instances.get(key) else { return Ok(Spans::default()) };
        let spans = instance.parts.values().map(|part| (part.after, part.upto)).collect();
        let index = instance.index.as_ref().map(|(upto, _)| *upto);
        Ok(Spans { life: instance.life, head: instance.head.turn, spans, index })
    }

    async fn turns_at(&self, key: &InstanceKey, turns: &[u64]) -> Result<Vec<Arc<TurnRecord>>, Error> {
        let data = self.read()?;
        let Some(instance) = data.instances.get(key) else { return Ok(Vec::new()) };
        let at = |turn: &u64| instance.turns.get(usize::try_from(*turn).ok()?.checked_sub(1)?).cloned();
        Ok(turns.iter().filter_map(at).collect())
    }

    fn feeds(&self, scope: &Scope) -> Vec<Feed> {
        match self.0.feeds {
            1 => vec![Feed(0)],
            feeds => (0..feeds).filter(|shard| scope.has(*shard)).map(Feed).collect(),
        }
    }

    async fn outgoing(&self, after: &[(Feed, i64)], limit: usize) -> Result<Vec<Outgoing>, Error> {
        let data = self.read()?;
        let later = after.iter().flat_map(|&(feed, after)| {
            data.outgoing.range((Bound::Excluded((feed, after)), Bound::Included((feed, i64::MAX))))
        });
        let outgoing = |(&(feed, position), (key, turn)): (&(Feed, i64), &(InstanceKey, Arc<TurnRecord>))| Outgoing {
            feed,
            position,
            key: key.clone(),
            turn: Arc::clone(turn),
        };
        Ok(later.take(limit).map(outgoing).collect())
    }

    async fn shipped(&self, feeds: &[Feed]) -> Result<Vec<i64>, Error> {
        let data = self.read()?;
        Ok(feeds.iter().map(|feed| data.shipped.get(feed).copied().unwrap_or(0)).collect())
    }

    async fn due(&self, scope: &Scope, now: Millis, limit: usize) -> Result<Vec<Pending>, Error> {
        let data = self.read()?;
        let is_due = |pending: &&Pending| pending.due <= now && scope.contains(&pending.key);
        let mut due: Vec<&Pending> = data.pending.values().filter(is_due).collect();
        due.sort_by_key(|pending| pending.due);
        Ok(due.into_iter().take(limit).cloned().collect())
    }

    async fn mqtt_rows(&self) -> Result<Vec<MqttRow>, Error> {
        let data = self.read()?;
        let sessions = data.sessions.iter().map(|((tenant, client), record)| MqttRow::Session {
            tenant: tenant.clone(),
            client: client.clone(),
            record: record.clone(),
        });
        let queued = data.queued.iter().flat_map(|((tenant, client), queue)| {
            queue.iter().map(|(&order, record)| MqttRow::Queued {
                tenant: tenant.clone(),
                client: client.clone(),
                order,
                record: record.clone(),
            })
        });
        let retained = data.retained.iter().map(|((tenant, topic), record)| MqttRow::Retained {
            tenant: tenant.clone(),
            topic: topic.clone(),
            record: record.clone(),
        });
        Ok(sessions.chain(queued).chain(retained).collect())
    }

    async fn stats(&self) -> Result<Stats, Error> {
        let data = self.read()?;
        let (inbox, dead) = data.instances.values().fold((0, 0), |(inbox, dead), instance| {
            (inbox + instance.inbox.len() as u64, dead + instance.dead.len() as u64)
        });
        let pending = data.pending.len() as u64;
        drop(data);
        Ok(Stats { queue: self.work().jobs.len(), inbox, dead, pending, bytes: 0 })
    }

    async fn probe(&self, deadline: Duration) -> Result<(), Error> {
        let (done, end) = Done::channel();
        self.ship(Vec::new(), Vec::new(), done);
        match tokio::time::timeout(deadline, end).await {
            Ok(Ok(Ok(_))) => self.read().map(drop),
            Ok(Ok(Err(Rejection::Failed(error)))) => Err(error),
            Ok(Ok(Err(_)) | Err(_)) => Err(Error::Closed),
            Err(_) => Err(Error::Backend(format!("no commit within {deadline:?}"))),
        }
    }
}

impl Store for MemoryStore {
    fn outgoing_hint(&self) -> Arc<Notify> {
        Arc::clone(&self.0.hint)
    }

    fn close(&self) {
        self.pump();
        let mut work = self.work();
        work.closed = true;
        // What a test still holds back is lost with the store, as with any other.
        let held: Vec<Job> = work.jobs.drain(..).collect();
        drop(work);
        drop(held);
    }
}
