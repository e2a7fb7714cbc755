//! Random histories on every backend, against a model made of plain maps.
//!
//! Each seed is a history of a few thousand units of a few instances with few ids, so that repeats, revivals and new lives
//! meet; folding is forced and the store is reopened (closed, or dropped as by a crash) at random. A failure names its seed.

use std::{collections::BTreeMap, sync::Arc};

use sophont::{
    store::{Head, Known, Rejection, Scope, Work, sqlite::Options},
    types::{InstanceKey, Millis, Profile, Stimulus, StimulusId, TurnRecord},
};

use crate::store_contract::{Subject, commit, episode, id, key_of, record, stimulus};

const STEPS: usize = 600;
const IDS: u64 = 40;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

#[derive(Default, Clone)]
struct Life {
    head: Head,
    persona: Option<String>,
    turns: Vec<Arc<TurnRecord>>,
    inbox: Vec<Arc<Stimulus>>,
    dead: Vec<Stimulus>,
}

#[derive(Debug, PartialEq, Clone, Copy)]
enum Fate {
    Waiting,
    Dead,
    Decided(u64),
}

impl Life {
    fn fate(&self, id: &StimulusId) -> Option<Fate> {
        if self.inbox.iter().any(|s| s.id == *id) {
            return Some(Fate::Waiting);
        }
        if self.dead.iter().any(|s| s.id == *id) {
            return Some(Fate::Dead);
        }
        self.turns.iter().find(|t| t.stimulus.id == *id).map(|t| Fate::Decided(t.turn))
    }
}

fn fate(known: &Known) -> Fate {
    match known {
        Known::Waiting(_) => Fate::Waiting,
        Known::Dead(_) => Fate::Dead,
        Known::Decided(record) => Fate::Decided(record.turn),
    }
}

fn keys() -> Vec<InstanceKey> {
    [("t", "a"), ("t", "b"), ("u", "a")].map(|(tenant, instance)| key_of(tenant, instance)).to_vec()
}

struct Run {
    subject: Subject,
    lives: BTreeMap<InstanceKey, Life>,
    random: Random,
}

impl Run {
    fn pick(&mut self) -> InstanceKey {
        let keys = keys();
        keys[usize::try_from(self.random.below(keys.len() as u64)).unwrap()].clone()
    }

    fn stimulus(&mut self) -> Stimulus {
        match self.random.below(IDS + 10) {
            number if number < IDS => stimulus(Some(&format!("s{number}"))),
            _ => stimulus(None),
        }
    }

    async fn step(&mut self) {
        match self.random.below(100) {
            0..40 => self.turns().await,
            40..60 => self.accept().await,
            60..72 => self.decide_waiting().await,
            72..79 => self.bury().await,
            79..85 => self.revive().await,
            85..89 => self.profile().await,
            89..92 => self.forget().await,
            92..96 => self.subject.settle().await,
            crash => self.subject.reopen(crash < 98).await,
        }
    }

    async fn turns(&mut self) {
        let key = self.pick();
        let life = self.lives.get(&key).cloned().unwrap_or_default();
        let count = 1 + self.random.below(3);
        let mut turns: Vec<Arc<TurnRecord>> = Vec::new();
        for number in 1..=count {
            let mut next = record(life.head.turn + number, self.stimulus());
            next.episodes = vec![episode(&format!("turn {}", next.turn))];
            turns.push(Arc::new(next));
        }
        let expected = turns.iter().enumerate().filter(|(_, t)| t.stimulus.repeatable).find_map(|(at, t)| {
            let before = turns[..at].iter().find(|e| e.stimulus.id == t.stimulus.id).map(|e| Fate::Decided(e.turn));
            let known = life.fate(&t.stimulus.id).filter(|fate| *fate != Fate::Waiting);
            before.or(known).map(|fate| (at, fate))
        });
        let work = Work::Turns { head: life.head, turns: turns.clone() };
        match (commit(&*self.subject.store, &key, work).await, expected) {
            (Ok(end), None) => {
                let mut life = life;
                life.head = end.head;
                for turn in turns {
                    life.inbox.retain(|s| s.id != turn.stimulus.id);
                    life.turns.push(turn);
                }
                self.lives.insert(key, life);
            }
            // A unit with two faults may be told either.
            (Err(Rejection::Duplicate { .. }), Some(_)) => {}
            (end, expected) => panic!("turns of {key}: {end:?}, expected {expected:?}"),
        }
    }

    async fn accept(&mut self) {
        let (key, stimulus) = (self.pick(), Arc::new(self.stimulus()));
        let life = self.lives.get(&key);
        let expected = life.and_then(|life| life.fate(&stimulus.id)).filter(|_| stimulus.repeatable);
        let work = Work::Accept { stimuli: vec![Arc::clone(&stimulus)] };
        match (commit(&*self.subject.store, &key, work).await, expected) {
            (Ok(end), None) => {
                let life = self.lives.entry(key).or_default();
                assert_eq!(end.head, life.head);
                life.inbox.push(stimulus);
            }
            (Err(Rejection::Duplicate { known, .. }), Some(expected)) => assert_eq!(fate(&known), expected),
            (end, expected) => panic!("accept of {key}: {end:?}, expected {expected:?}"),
        }
    }

    async fn decide_waiting(&mut self) {
        let key = self.pick();
        let Some(life) = self.lives.get_mut(&key).filter(|life| !life.inbox.is_empty()) else { return };
        let at = usize::try_from(self.random.below(life.inbox.len() as u64)).unwrap();
        let waiting = life.inbox.remove(at);
        let turn = Arc::new(record(life.head.turn + 1, (*waiting).clone()));
        let work = Work::Turns { head: life.head, turns: vec![Arc::clone(&turn)] };
        life.head = commit(&*self.subject.store, &key, work).await.unwrap().head;
        life.turns.push(turn);
    }

    async fn bury(&mut self) {
        let key = self.pick();
        let Some(life) = self.lives.get_mut(&key).filter(|life| !life.inbox.is_empty()) else { return };
        let stimulus = life.inbox.remove(0);
        let work = Work::Bury { stimulus: Arc::clone(&stimulus), reason: String::from("r"), tries: 1, at: Millis(1) };
        commit(&*self.subject.store, &key, work).await.unwrap();
        life.dead.push((*stimulus).clone());
    }

    async fn revive(&mut self) {
        let key = self.pick();
        let Some(life) = self.lives.get_mut(&key).filter(|life| !life.dead.is_empty()) else { return };
        let stimulus = life.dead.remove(0);
        commit(&*self.subject.store, &key, Work::Revive { stimulus: stimulus.id.clone() }).await.unwrap();
        life.inbox.push(Arc::new(stimulus));
    }

    async fn profile(&mut self) {
        let (key, persona) = (self.pick(), format!("p{}", self.random.below(9)));
        let profile = Arc::new(Profile { persona: Some(persona.clone()), ..Profile::default() });
        let end = commit(&*self.subject.store, &key, Work::PutProfile { profile, at: Millis(1) }).await.unwrap();
        assert_eq!(end.created, !self.lives.contains_key(&key));
        self.lives.entry(key).or_default().persona = Some(persona);
    }

    async fn forget(&mut self) {
        let key = self.pick();
        commit(&*self.subject.store, &key, Work::Forget).await.unwrap();
        self.lives.remove(&key);
    }

    async fn check(&self) {
        let store = &*self.subject.store;
        for key in keys() {
            let life = self.lives.get(&key).cloned().unwrap_or_default();
            let loaded = store.load(&key).await.unwrap();
            assert_eq!(loaded.exists, self.lives.contains_key(&key), "{key} exists");
            assert_eq!(loaded.head, life.head, "head of {key}");
            assert_eq!(loaded.inbox, life.inbox, "inbox of {key}");
            assert_eq!(loaded.profile.and_then(|p| p.persona.clone()), life.persona);
            assert_eq!(store.turns(&key, 0, 100_000).await.unwrap(), life.turns, "turns of {key}");
            let dead = store.dead_letters(&key, None, 1000).await.unwrap();
            assert_eq!(dead.into_iter().map(|l| l.stimulus).collect::<Vec<_>>(), life.dead);
            let remembered = store.recall(&key, "turn", 100_000).await.unwrap();
            let expected = life.turns.iter().map(|turn| turn.episodes.len()).sum::<usize>();
            assert_eq!(remembered.len(), expected, "episodes of {key}");
            for number in 0..IDS {
                let id = id(&format!("s{number}"));
                let found = store.find(&key, &id).await.unwrap().map(|known| fate(&known));
                assert_eq!(found, life.fate(&id), "{id} of {key}");
            }
        }
        let mut waiting: Vec<_> =
            self.lives.iter().filter(|(_, l)| !l.inbox.is_empty()).map(|(k, _)| k.clone()).collect();
        waiting.sort();
        assert_eq!(store.waiting(&Scope::all(), None, 99).await.unwrap(), waiting);
    }
}

async fn history(subject: Subject, seed: u64) {
    let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut run = Run { subject, lives: BTreeMap::new(), random };
    println!("seed {seed}");
    for step in 0..STEPS {
        run.step().await;
        if step % 60 == 59 {
            run.check().await;
        }
    }
}

#[tokio::test]
async fn random_histories_on_memory() {
    for seed in 0..20 {
        history(Subject::memory(), seed).await;
    }
}

#[tokio::test]
async fn random_histories_on_sqlite() {
    for seed in 20..26 {
        history(Subject::sqlite(Options::default()), seed).await;
    }
}

#[tokio::test]
async fn random_histories_on_sqlite_that_folds() {
    for seed in 26..32 {
        let options = Options { generation_turns: 1 + usize::try_from(seed % 7).unwrap(), ..Options::default() };
        history(Subject::sqlite(options), seed).await;
    }
}

#[tokio::test]
async fn random_histories_on_postgres() {
    for seed in 32..36 {
        history(Subject::postgres().await, seed).await;
    }
}
