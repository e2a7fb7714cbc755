//! Tests of the lanes: what follows from each answer, refusal and loss, and that no order of them breaks a sender's order.

#![allow(clippy::unwrap_used)]

use std::{collections::HashSet, sync::Mutex};

use proptest::prelude::*;
use tokio::sync::oneshot;

use super::*;
use crate::{
    cluster::bus::message::Record,
    instance::{
        Until,
        inbox::{Line, Waiter},
    },
    types::{Channel, InstanceId, Millis, Outcome as Ended, Source, StateChange, StimulusId, TenantId, TurnRecord},
};

/// A table with one shard.
struct Table(Mutex<(Owner, u64)>);

impl Table {
    fn new(owner: Owner) -> Arc<Self> {
        let epoch = if let Owner::Node { epoch, .. } = &owner { *epoch } else { 0 };
        Arc::new(Self(Mutex::new((owner, epoch))))
    }
    fn set(&self, owner: Owner) {
        let mut table = self.0.lock().unwrap();
        if let Owner::Node { epoch, .. } = &owner {
            table.1 = *epoch;
        }
        table.0 = owner;
    }
}

impl Owners for Table {
    fn shard_of(&self, _: &InstanceKey) -> u32 {
        0
    }
    fn owner(&self, _: u32) -> Owner {
        self.0.lock().unwrap().0.clone()
    }
    fn epoch(&self, _: u32) -> u64 {
        self.0.lock().unwrap().1
    }
    fn doubt(&self, _: u32) {}
}

const BOUNDS: Bounds =
    Bounds { items: 100, bytes: 100_000, batch_items: 4, batch_bytes: 10_000, answer: Duration::from_secs(1) };

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn at(name: &str, epoch: u64) -> Owner {
    Owner::Node { node: node(name), epoch }
}

fn key() -> InstanceKey {
    InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap())
}

type End = oneshot::Receiver<Result<Receipt, Error>>;

fn stimulus(id: &str, sender: &str) -> Stimulus {
    let mut stimulus = Stimulus::text(Source::Mqtt, Channel::new("c").unwrap(), "x", Millis(0));
    stimulus.id = StimulusId::new(id).unwrap();
    stimulus.sender = Some(sender.into());
    stimulus
}

fn waiting(id: &str, until: Until, line: Option<Line>) -> (Waiting, End) {
    let (waiter, end) = Waiter::new(until, line);
    (Waiting::arrived(stimulus(id, "s"), None, waiter), end)
}

fn decided(id: &StimulusId) -> Outcome {
    let mut stimulus = stimulus("x", "s");
    stimulus.id = id.clone();
    let turn = TurnRecord {
        turn: 1,
        version: 0,
        stimulus,
        outcome: Ended::Silent,
        reply: None,
        effects: Vec::new(),
        state: StateChange::None,
        episodes: Vec::new(),
        steps: 0,
        engine: "reflex".into(),
        model: None,
        usage: None,
        error: None,
        decided_at: Millis(0),
        epoch: 0,
    };
    Outcome::Decided { turn: Record(Arc::new(turn)), repeated: false }
}

/// Lanes, and what they asked for that nobody looked at yet.
struct Bench {
    lanes: Lanes,
    table: Arc<Table>,
    now: Instant,
    out: Vec<Act>,
}

impl Bench {
    fn new(owner: Owner) -> Self {
        let table = Table::new(owner);
        Self { lanes: Lanes::new(table.clone(), BOUNDS, 0, 1), table, now: Instant::now(), out: Vec::new() }
    }

    fn take(&mut self, id: &str, until: Until) -> End {
        let (waiting, end) = waiting(id, until, None);
        self.lanes.take(&key(), waiting, Place::Last, self.now, &mut self.out);
        end
    }

    fn results(&mut self, work: &Work, from: &str, fate: Fate) {
        self.lanes.results(work.call, &node(from), fate, self.now, &mut self.out);
    }

    /// What is to be done.
    fn acts(&mut self) -> Vec<Act> {
        std::mem::take(&mut self.out)
    }

    fn sent(&mut self, to: &str) -> Work {
        match self.acts().pop() {
            Some(Act::Send { to: node, work }) => {
                assert_eq!(node.as_str(), to);
                work
            }
            other => panic!("a batch for {to} was due, not {other:?}"),
        }
    }

    fn lodging(&mut self) -> (u64, Vec<String>) {
        match self.acts().pop() {
            Some(Act::Lodge { call, stimuli, .. }) => (call, stimuli.iter().map(|s| s.id.to_string()).collect()),
            other => panic!("something to lodge was due, not {other:?}"),
        }
    }

    fn later(&mut self) {
        self.now += BOUNDS.answer;
        self.lanes.tick(self.now, &mut self.out);
    }
}

fn ids(work: &Work) -> Vec<&str> {
    work.items.iter().map(|item| item.stimulus.id.as_str()).collect()
}

#[test]
fn one_batch_is_under_way_and_what_arrives_meanwhile_is_the_next() {
    let mut bench = Bench::new(at("b", 1));
    let mut first = bench.take("1", Until::Accepted);
    let work = bench.sent("b");
    assert!(ids(&work) == ["1"] && work.items[0].stimulus.repeatable && !work.items[0].decided);
    let _rest: Vec<End> = (2..=7).map(|n| bench.take(&n.to_string(), Until::Decided)).collect();
    assert!(bench.acts().is_empty() && bench.lanes.holds(&key(), Some("s")));
    bench.results(&work, "c", Fate::Each(vec![(0, decided(&work.items[0].stimulus.id))]));
    assert!(matches!(bench.acts()[..], [Act::Settle(..)]), "another node's answer is none");
    bench.results(&work, "b", Fate::Each(vec![(0, decided(&work.items[0].stimulus.id))]));
    let work = bench.sent("b");
    assert!(matches!(first.try_recv(), Ok(Ok(Receipt::Decided { repeated: false, .. }))));
    assert_eq!(ids(&work), ["2", "3", "4", "5"]);
    let taken = (0..4).map(|index| (index, Outcome::Taken)).collect();
    bench.results(&work, "b", Fate::Each(taken));
    assert_eq!(ids(&bench.sent("b")), ["6", "7"], "what is durable holds nobody up");
}

#[test]
fn who_waits_for_the_decision_awaits_it_after_acceptance() {
    let mut bench = Bench::new(at("b", 1));
    let (mut accepted, mut decision) = (bench.take("1", Until::Accepted), bench.take("2", Until::Decided));
    let work = bench.sent_first();
    bench.results(&work, "b", Fate::Each(vec![(0, Outcome::Accepted { repeated: false })]));
    let work = bench.sent("b");
    assert!(matches!(accepted.try_recv(), Ok(Ok(Receipt::Accepted { repeated: false }))));
    bench.results(&work, "b", Fate::Each(vec![(0, Outcome::Taken)]));
    let acts = bench.acts();
    assert!(matches!(&acts[..], [Act::Await { asked: Some((call, 0)), .. }] if *call == work.call), "{acts:?}");
    assert!(decision.try_recv().is_err() && bench.lanes.is_empty());
    bench.results(&work, "b", Fate::Each(vec![(0, decided(&work.items[0].stimulus.id))]));
    assert!(matches!(&bench.acts()[..], [Act::Settle(call, 0, _)] if *call == work.call));
}

impl Bench {
    fn sent_first(&mut self) -> Work {
        match self.acts().into_iter().next() {
            Some(Act::Send { work, .. }) => work,
            other => panic!("a batch was due, not {other:?}"),
        }
    }
}

#[test]
fn a_refusal_is_tried_again_at_the_newest_owner_and_then_lodged() {
    let mut bench = Bench::new(at("b", 1));
    let mut end = bench.take("1", Until::Accepted);
    let work = bench.sent("b");
    bench.results(&work, "b", Fate::NotMine { owner: Some(node("c")), epoch: 2 });
    let work = bench.sent("c");
    assert_eq!((work.epoch, ids(&work)), (2, vec!["1"]));
    bench.results(&work, "c", Fate::NotMine { owner: Some(node("d")), epoch: 3 });
    let (call, lodged) = bench.lodging();
    assert_eq!(lodged, ["1"]);
    bench.lanes.lodged(call, Ok(()), bench.now, &mut bench.out);
    assert!(matches!(&bench.acts()[..], [Act::Wake(_)]));
    assert!(matches!(end.try_recv(), Ok(Ok(Receipt::Accepted { .. }))));
    assert!(bench.lanes.is_empty() && !bench.lanes.holds(&key(), Some("s")));
}

#[test]
fn an_owner_that_refuses_and_is_still_in_the_table_is_not_asked_again() {
    let mut bench = Bench::new(at("b", 1));
    let _end = bench.take("1", Until::Accepted);
    let work = bench.sent("b");
    bench.results(&work, "b", Fate::Each(vec![(0, Outcome::Refused(Refusal::Draining))]));
    assert_eq!(bench.lodging().1, ["1"]);
}

#[test]
fn what_is_lodged_is_marked_for_the_next_batch_and_known_ids_are_answered() {
    let mut bench = Bench::new(at("b", 1));
    let (mut one, mut two) = (bench.take("1", Until::Decided), bench.take("2", Until::Accepted));
    let work = bench.sent_first();
    bench.later();
    let (call, lodged) = bench.lodging();
    assert_eq!(lodged, ["1"]);
    let Outcome::Decided { turn, .. } = decided(&work.items[0].stimulus.id) else { panic!("decided") };
    let known = Rejection::Duplicate { index: 0, known: Known::Decided(turn.0) };
    bench.lanes.lodged(call, Err(known), bench.now, &mut bench.out);
    let second = bench.sent("b");
    assert!(matches!(one.try_recv(), Ok(Ok(Receipt::Decided { repeated: false, .. }))));
    assert_eq!((ids(&second), second.after_lodged), (vec!["2"], false));
    bench.lanes.lost(Some(&node("b")), bench.now, &mut bench.out);
    let (call, _) = bench.lodging();
    let _three = bench.take("3", Until::Accepted);
    bench.lanes.lodged(call, Ok(()), bench.now, &mut bench.out);
    let third = bench.sent("b");
    assert!(matches!(two.try_recv(), Ok(Ok(Receipt::Accepted { .. }))));
    assert_eq!((ids(&third), third.after_lodged), (vec!["3"], true));
}

#[test]
fn what_is_barred_is_refused_and_the_rest_is_lodged() {
    let mut bench = Bench::new(Owner::Nobody);
    let mut one = bench.take("1", Until::Accepted);
    let (call, lodged) = bench.lodging();
    assert_eq!(lodged, ["1"]);
    let (mut two, mut three) = (bench.take("2", Until::Accepted), bench.take("3", Until::Accepted));
    bench.lanes.lodged(call, Ok(()), bench.now, &mut bench.out);
    assert!(matches!(one.try_recv(), Ok(Ok(Receipt::Accepted { .. }))));
    let (call, lodged) = bench.lodging();
    assert_eq!(lodged, ["2", "3"]);
    bench.lanes.lodged(call, Err(Rejection::Barred { index: 0 }), bench.now, &mut bench.out);
    assert!(matches!(two.try_recv(), Ok(Err(Error::Overloaded(BARRED)))));
    let (call, lodged) = bench.lodging();
    assert_eq!(lodged, ["3"]);
    bench.lanes.lodged(call, Ok(()), bench.now, &mut bench.out);
    assert!(matches!(three.try_recv(), Ok(Ok(Receipt::Accepted { .. }))));
    assert!(bench.lanes.is_empty());
}

#[test]
fn what_insists_on_a_version_is_refused_rather_than_lodged() {
    let mut bench = Bench::new(Owner::Nobody);
    let (mut waiting, mut end) = waiting("1", Until::Decided, None);
    waiting.expected = Some(3);
    bench.lanes.take(&key(), waiting, Place::Last, bench.now, &mut bench.out);
    assert!(bench.acts().is_empty() && bench.lanes.is_empty());
    assert!(matches!(end.try_recv(), Ok(Err(Error::Fenced))));
}

#[test]
fn a_full_bus_refuses_and_one_that_is_down_lodges() {
    let mut bench = Bench::new(at("b", 1));
    let mut end = bench.take("1", Until::Accepted);
    let work = bench.sent("b");
    bench.lanes.unsent(work.call, bus::Error::Overloaded, bench.now, &mut bench.out);
    bench.acts();
    assert!(matches!(end.try_recv(), Ok(Err(Error::Overloaded(_)))));
    let mut end = bench.take("2", Until::Accepted);
    let work = bench.sent("b");
    bench.lanes.unsent(work.call, bus::Error::Down, bench.now, &mut bench.out);
    let (call, _) = bench.lodging();
    let failed = Rejection::Failed(store::Error::Closed);
    bench.lanes.lodged(call, Err(failed), bench.now, &mut bench.out);
    bench.acts();
    assert!(matches!(end.try_recv(), Ok(Err(Error::Store(store::Error::Closed)))), "nothing was accepted, for certain");
}

#[test]
fn what_is_handed_over_goes_before_what_waited_for_the_handover() {
    let mut bench = Bench::new(Owner::Leaving);
    let _ends: Vec<End> = ["3", "4"].map(|id| bench.take(id, Until::Accepted)).into();
    assert!(bench.acts().is_empty());
    for id in ["1", "2"] {
        let (waiting, _end) = waiting(id, Until::Accepted, None);
        bench.lanes.take(&key(), waiting, Place::Earlier, bench.now, &mut bench.out);
    }
    bench.table.set(at("b", 2));
    bench.lanes.moved(bench.now, &mut bench.out);
    let work = bench.sent("b");
    assert_eq!(ids(&work), ["1", "2", "3", "4"]);
}

/// An owner at the first look of each pair, one who leaves at the second: a table that changes between two reads.
struct Wavering(Mutex<bool>);

impl Owners for Wavering {
    fn shard_of(&self, _: &InstanceKey) -> u32 {
        0
    }
    fn owner(&self, _: u32) -> Owner {
        let mut leaves = self.0.lock().unwrap();
        *leaves = !*leaves;
        if *leaves { at("b", 1) } else { Owner::Leaving }
    }
    fn epoch(&self, _: u32) -> u64 {
        1
    }
    fn doubt(&self, _: u32) {}
}

#[test]
fn a_new_batch_is_not_lodged_past_an_owner_that_begins_to_leave() {
    let (mut lanes, mut out) = (Lanes::new(Arc::new(Wavering(Mutex::default())), BOUNDS, 0, 1), Vec::new());
    let (waiting, _end) = waiting("1", Until::Accepted, None);
    lanes.take(&key(), waiting, Place::Last, Instant::now(), &mut out);
    assert!(matches!(out[..], [Act::Send { .. }]), "{out:?}");
}

#[test]
fn a_change_of_owner_ends_the_wait_for_the_earlier_one() {
    let mut bench = Bench::new(at("b", 1));
    let _end = bench.take("1", Until::Accepted);
    bench.sent("b");
    bench.lanes.moved(bench.now, &mut bench.out);
    assert!(bench.acts().is_empty());
    bench.table.set(at("c", 2));
    bench.lanes.moved(bench.now, &mut bench.out);
    assert_eq!(bench.lodging().1, ["1"]);
}

#[test]
fn a_broken_line_lets_nothing_behind_it_pass() {
    let mut bench = Bench::new(at("b", 1));
    let line = Line::default();
    let mut ends = Vec::new();
    for id in ["1", "2", "3"] {
        let (waiting, end) = waiting(id, Until::Accepted, Some(line.clone()));
        bench.lanes.take(&key(), waiting, Place::Last, bench.now, &mut bench.out);
        ends.push(end);
    }
    let work = bench.sent_first();
    bench.results(&work, "b", Fate::Each(vec![(0, Outcome::Refused(Refusal::InboxFull(5)))]));
    assert!(bench.acts().is_empty());
    assert!(ends.iter_mut().all(|end| matches!(end.try_recv(), Ok(Err(Error::InboxFull(_) | Error::Overloaded(_))))));
    assert!(bench.lanes.is_empty());
}

#[test]
fn what_waits_is_bounded() {
    let mut bench = Bench::new(at("b", 1));
    let mut ends: Vec<End> = (0..=BOUNDS.items).map(|n| bench.take(&n.to_string(), Until::Accepted)).collect();
    bench.acts();
    assert!(matches!(ends.pop().unwrap().try_recv(), Ok(Err(Error::Overloaded(_)))));
    assert!(ends.iter_mut().all(|end| end.try_recv().is_err()));
}

// The whole, against a world that decides in the order in which things reach it.

/// A step of the world.
#[derive(Debug, Clone)]
enum Step {
    Take {
        sender: usize,
        decided: bool,
    },
    /// An owner works off a batch and answers; some results may come one by one, some only as acceptance.
    Work {
        pick: usize,
        answer: Reply,
    },
    Lodge {
        pick: usize,
        fails: bool,
    },
    Lost,
    Later,
    Move(u8),
}

#[derive(Debug, Clone, Copy)]
enum Reply {
    All,
    OneByOne,
    Taken,
    NotMine,
    Draining,
    Overloaded,
    /// It decides, and nobody hears of it.
    Silence,
    /// The bus does not take it.
    Unsent,
}

fn step() -> impl Strategy<Value = Step> {
    let reply = prop_oneof![
        4 => Just(Reply::All),
        2 => Just(Reply::OneByOne),
        2 => Just(Reply::Taken),
        2 => Just(Reply::NotMine),
        1 => Just(Reply::Draining),
        1 => Just(Reply::Overloaded),
        2 => Just(Reply::Silence),
        1 => Just(Reply::Unsent),
    ];
    prop_oneof![
        8 => (0..2usize, any::<bool>()).prop_map(|(sender, decided)| Step::Take { sender, decided }),
        8 => (any::<usize>(), reply).prop_map(|(pick, answer)| Step::Work { pick, answer }),
        5 => (any::<usize>(), prop::bool::weighted(0.2)).prop_map(|(pick, fails)| Step::Lodge { pick, fails }),
        1 => Just(Step::Lost),
        2 => Just(Step::Later),
        2 => (0..4u8).prop_map(Step::Move),
    ]
}

struct World {
    bench: Bench,
    /// Ids in the order in which they became durable.
    log: Vec<StimulusId>,
    batches: Vec<(NodeId, Work)>,
    lodges: Vec<(u64, Vec<Arc<Stimulus>>)>,
    ends: Vec<(StimulusId, usize, End)>,
    awaited: HashSet<StimulusId>,
    epoch: u64,
}

impl World {
    fn durable(&mut self, id: &StimulusId) {
        if !self.log.contains(id) {
            self.log.push(id.clone());
        }
    }

    /// Does what the lanes ask for, as far as it is done at once.
    fn act(&mut self) {
        while !self.bench.out.is_empty() {
            for act in self.bench.acts() {
                match act {
                    Act::Send { to, work } => self.batches.push((to, work)),
                    Act::Lodge { call, stimuli, .. } => self.lodges.push((call, stimuli)),
                    Act::Deliver { call, batch, .. } => {
                        for mut waiting in batch {
                            self.durable(&waiting.stimulus.id);
                            waiting.tell(&Ok(Receipt::Accepted { repeated: false }));
                        }
                        self.bench.lanes.delivered(call, self.bench.now, &mut self.bench.out);
                    }
                    Act::Await { waiting, .. } => {
                        self.awaited.insert(waiting.stimulus.id.clone());
                    }
                    Act::Settle(..) | Act::Wake(_) => {}
                }
            }
        }
    }

    fn work(&mut self, pick: usize, reply: Reply) {
        if self.batches.is_empty() {
            return;
        }
        let (to, work) = self.batches.swap_remove(pick % self.batches.len());
        let all = |outcome: &dyn Fn(&StimulusId) -> Outcome| {
            work.items.iter().enumerate().map(|(at, item)| (at as u16, outcome(&item.stimulus.id))).collect::<Vec<_>>()
        };
        let each = match reply {
            Reply::Unsent => {
                let error = bus::Error::Down;
                return self.bench.lanes.unsent(work.call, error, self.bench.now, &mut self.bench.out);
            }
            Reply::NotMine => {
                let fate = Fate::NotMine { owner: Some(node("z")), epoch: self.epoch };
                return self.bench.lanes.results(work.call, &to, fate, self.bench.now, &mut self.bench.out);
            }
            Reply::Draining => all(&|_| Outcome::Refused(Refusal::Draining)),
            Reply::Overloaded => all(&|_| Outcome::Refused(Refusal::Overloaded)),
            Reply::All | Reply::OneByOne | Reply::Silence | Reply::Taken => {
                work.items.iter().for_each(|item| self.durable(&item.stimulus.id));
                if matches!(reply, Reply::Taken) { all(&|_| Outcome::Taken) } else { all(&decided) }
            }
        };
        match reply {
            Reply::Silence => {}
            Reply::OneByOne => {
                for one in each {
                    let fate = Fate::Each(vec![one]);
                    self.bench.lanes.results(work.call, &to, fate, self.bench.now, &mut self.bench.out);
                }
            }
            _ => self.bench.lanes.results(work.call, &to, Fate::Each(each), self.bench.now, &mut self.bench.out),
        }
    }

    fn lodge(&mut self, pick: usize, fails: bool) {
        if self.lodges.is_empty() {
            return;
        }
        let (call, stimuli) = self.lodges.swap_remove(pick % self.lodges.len());
        let known = stimuli.iter().position(|stimulus| self.log.contains(&stimulus.id));
        let end = match known {
            _ if fails => Err(Rejection::Failed(store::Error::Overloaded)),
            Some(index) => Err(Rejection::Duplicate { index, known: Known::Waiting(stimuli[index].clone()) }),
            None => {
                stimuli.iter().for_each(|stimulus| self.durable(&stimulus.id));
                Ok(())
            }
        };
        self.bench.lanes.lodged(call, end, self.bench.now, &mut self.bench.out);
    }

    fn step(&mut self, step: Step, number: usize) {
        match step {
            Step::Take { sender, decided } => {
                let (waiter, end) = Waiter::new(if decided { Until::Decided } else { Until::Accepted }, None);
                let stimulus = stimulus(&format!("n{number}"), &format!("s{sender}"));
                self.ends.push((stimulus.id.clone(), sender, end));
                let waiting = Waiting::arrived(stimulus, None, waiter);
                self.bench.lanes.take(&key(), waiting, Place::Last, self.bench.now, &mut self.bench.out);
            }
            Step::Work { pick, answer } => self.work(pick, answer),
            Step::Lodge { pick, fails } => self.lodge(pick, fails),
            Step::Lost => self.bench.lanes.lost(None, self.bench.now, &mut self.bench.out),
            Step::Later => self.bench.later(),
            Step::Move(to) => {
                self.epoch += 1;
                self.bench.table.set(match to {
                    0 => Owner::Nobody,
                    1 => Owner::Leaving,
                    2 => at("b", self.epoch),
                    _ => at("c", self.epoch),
                });
                self.bench.lanes.moved(self.bench.now, &mut self.bench.out);
            }
        }
        self.act();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]
    #[test]
    fn order_is_kept_and_everybody_hears_the_truth(steps in prop::collection::vec(step(), 1..80)) {
        let bench = Bench::new(at("b", 1));
        let mut world = World {
            bench,
            log: Vec::new(),
            batches: Vec::new(),
            lodges: Vec::new(),
            ends: Vec::new(),
            awaited: HashSet::new(),
            epoch: 1,
        };
        for (number, step) in steps.into_iter().enumerate() {
            world.step(step, number);
        }
        // In the end everything works, and what is left comes to an end.
        world.bench.table.set(Owner::Nobody);
        for _ in 0..1000 {
            world.bench.later();
            world.act();
            world.lodge(0, false);
            world.act();
        }
        // What still wandered about arrives after all.
        while !world.batches.is_empty() {
            world.work(0, Reply::Silence);
        }
        prop_assert!(world.bench.lanes.is_empty() && world.bench.lanes.bytes == 0);
        prop_assert!(world.bench.lanes.lanes.is_empty() && world.bench.lanes.calls.is_empty());
        let mut last = [0; 2];
        for (id, sender, mut end) in world.ends {
            let place = world.log.iter().position(|durable| *durable == id);
            match end.try_recv() {
                Ok(Ok(_)) => {
                    let place = place.expect("what was acknowledged is durable") + 1;
                    prop_assert!(place > last[sender], "{id} of {sender} was overtaken");
                    last[sender] = place;
                }
                Ok(Err(Error::Timeout(_))) => {}
                Ok(Err(_)) => prop_assert!(place.is_none(), "{id} was refused and is durable"),
                Err(_) => {
                    prop_assert!(world.awaited.contains(&id) && place.is_some(), "nobody heard of {id}");
                    let place = place.unwrap() + 1;
                    prop_assert!(place > last[sender], "{id} of {sender} was overtaken");
                    last[sender] = place;
                }
            }
        }
    }
}
