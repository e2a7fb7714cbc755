//! A small conversation-memory suite from seeds: people tell facts, change them, contradict themselves, repeat themselves, among
//! small talk; then questions are asked about now and about earlier times. Scores stand in `docs/performance.md`.
//!
//! Recall is by the built-in embedder and words, as a node does without any model. A question counts as answered when the episode
//! that answers it is recalled first (@1), or among the first three (@3). Deterministic: a manual clock and one seed.

use std::sync::Arc;

use sophont::{
    config,
    memory::{Ask, Known, Memory},
    runtime::clock::Clock,
    scaling::cache::{Options, TieredCache},
    store::{Head, memory::MemoryStore},
    types::{
        Channel, EpisodeId, InstanceKey, Millis, RawJson, Source, Stimulus, TurnRecord,
        memory::{ENGINE, Extra, WRITE_CHANNEL, Writing, Written, read_writing},
    },
};

use crate::store_contract::{key, record, turns};

const PEOPLE: [&str; 12] = ["Ann", "Ben", "Cleo", "Dana", "Emil", "Fay", "Gus", "Hana", "Ivo", "June", "Kai", "Lena"];
/// What is told, how it is asked for, and what it may be.
const FACTS: [(&str, &str, [&str; 6]); 6] = [
    ("{who} lives in {what}", "Where does {who} live?", ["Paris", "Rome", "Oslo", "Lisbon", "Vienna", "Dublin"]),
    (
        "{who} works as a {what}",
        "What is the work of {who}?",
        ["nurse", "baker", "pilot", "teacher", "carpenter", "judge"],
    ),
    (
        "{who} likes to drink {what}",
        "Which drink does {who} like?",
        ["tea", "coffee", "cider", "water", "lemonade", "milk"],
    ),
    ("the car of {who} is a {what}", "What car has {who}?", ["Volvo", "Fiat", "Skoda", "Toyota", "Renault", "Saab"]),
    (
        "{who} is allergic to {what}",
        "What allergies has {who}? allergic",
        ["nuts", "wheat", "dust", "pollen", "shrimps", "eggs"],
    ),
    (
        "the dog of {who} is called {what}",
        "How is the dog of {who} called?",
        ["Rex", "Bella", "Luna", "Max", "Toby", "Nala"],
    ),
];
const TALK: [&str; 8] = [
    "the weather turned cold over night",
    "somebody left the window open again",
    "the train was late by twenty minutes",
    "we should order more paper for the printer",
    "the meeting moved to the small room",
    "a parcel came for the neighbours",
    "the lift makes a strange noise",
    "lunch was better than yesterday",
];
const MINUTE: i64 = 60_000;

/// splitmix64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % limit as u64).unwrap()
    }
}

struct Told {
    memory: Memory,
    store: MemoryStore,
    key: InstanceKey,
    clock: Clock,
    head: Head,
}

impl Told {
    fn new() -> Self {
        let store = MemoryStore::new();
        let clock = Clock::manual(Millis(1_795_000_000_000));
        let (settings, cache) = (config::Config::default().memory, TieredCache::new(Options::default()));
        let memory = Memory::new(&settings, Arc::new(store.clone()), clock.clone(), &cache).unwrap();
        Self { memory, store, key: key("suite"), clock, head: Head::default() }
    }

    /// Remembers a text a minute after the one before; its id and when it was recorded.
    async fn tell(&mut self, text: &str, supersedes: Vec<EpisodeId>) -> (EpisodeId, Millis) {
        self.clock.advance(MINUTE);
        let now = self.clock.now();
        let written = Written {
            content: text.into(),
            data: None,
            tags: Vec::new(),
            reward: None,
            occurred_at: None,
            extra: Extra { supersedes, ..Extra::default() },
        };
        let mut stimulus = Stimulus::empty(Source::Http, Channel::new(WRITE_CHANNEL).unwrap(), now);
        stimulus.data = Some(RawJson::from_serialize(&Writing { episodes: vec![written] }).unwrap());
        let (episodes, kept) = read_writing(&stimulus).unwrap();
        stimulus.data = kept;
        let turn = self.head.turn + 1;
        let engine = String::from(ENGINE);
        let told = TurnRecord { episodes, engine, decided_at: now, ..record(turn, stimulus) };
        self.head = turns(&self.store, &self.key, self.head, vec![told]).await.unwrap();
        (EpisodeId::new(turn, 0), now)
    }

    async fn ask(&self, question: &str, as_of: Option<Millis>) -> Vec<EpisodeId> {
        let known = Known { as_of, ..Known::default() };
        let ask = Ask { query: Some(question.into()), limit: 3, known, ..Ask::default() };
        let found = self.memory.search(&self.key, ask).await.unwrap();
        found.episodes.iter().map(|found| EpisodeId(found.episode.id)).collect()
    }
}

/// Questions of one kind.
#[derive(Default)]
struct Score {
    asked: usize,
    first: usize,
    third: usize,
    /// Answers that name what did not hold then.
    untrue: usize,
}

impl Score {
    fn count(&mut self, found: &[EpisodeId], right: EpisodeId, wrong: &[EpisodeId]) {
        self.asked += 1;
        self.first += usize::from(found.first() == Some(&right));
        self.third += usize::from(found.contains(&right));
        self.untrue += usize::from(found.iter().any(|id| wrong.contains(id)));
    }

    fn line(&self, name: &str) -> String {
        let share = |part: usize| 100.0 * part as f64 / self.asked as f64;
        format!("| {name} | {} | {:.1} | {:.1} | {} |", self.asked, share(self.first), share(self.third), self.untrue)
    }
}

fn say(form: &str, who: &str, what: &str) -> String {
    form.replace("{who}", who).replace("{what}", what)
}

#[tokio::test]
async fn conversations_are_remembered() {
    let (mut told, mut dice) = (Told::new(), Dice(7));
    let [mut facts, mut updates, mut contradictions, mut past] = std::array::from_fn(|_| Score::default());
    // Everybody tells everything, in any order, among small talk.
    let mut all: Vec<(usize, usize)> =
        (0..PEOPLE.len()).flat_map(|who| (0..FACTS.len()).map(move |fact| (who, fact))).collect();
    for at in (1..all.len()).rev() {
        all.swap(at, dice.below(at + 1));
    }
    let mut first = Vec::new();
    for &(who, fact) in &all {
        let what = dice.below(5);
        let text = say(FACTS[fact].0, PEOPLE[who], FACTS[fact].2[what]);
        first.push((who, fact, what, told.tell(&text, Vec::new()).await));
        for _ in 0..dice.below(4) {
            let text = format!("{}, on day {}", TALK[dice.below(TALK.len())], dice.below(300));
            told.tell(&text, Vec::new()).await;
        }
    }
    for (who, fact, _, (id, _)) in &first {
        facts.count(&told.ask(&say(FACTS[*fact].1, PEOPLE[*who], ""), None).await, *id, &[]);
    }
    // A third changes: half of that says what it replaces, half only says the opposite.
    let before = told.clock.now();
    for (nth, (who, fact, what, (old, _))) in first.iter().enumerate().filter(|(nth, _)| nth % 3 == 0) {
        let replaces = nth % 2 == 0;
        let text = say(FACTS[*fact].0, PEOPLE[*who], FACTS[*fact].2[what + 1]);
        let (new, _) = told.tell(&text, if replaces { vec![*old] } else { Vec::new() }).await;
        let question = say(FACTS[*fact].1, PEOPLE[*who], "");
        let now = told.ask(&question, None).await;
        if replaces {
            updates.count(&now, new, &[*old]);
        } else {
            contradictions.count(&now, new, &[]);
        }
        // What was known before knows nothing of it.
        past.count(&told.ask(&question, Some(before)).await, *old, &[new]);
    }
    // And at each moment only what had been told by then.
    for (who, fact, _, (id, at)) in &first {
        let question = say(FACTS[*fact].1, PEOPLE[*who], "");
        past.count(&told.ask(&question, Some(*at)).await, *id, &[]);
        let earlier = told.ask(&question, Some(at.plus(-1))).await;
        assert!(!earlier.contains(id), "{question} was answered before it was told");
    }
    let scores = [("facts", facts), ("updates", updates), ("contradictions", contradictions), ("as of", past)];
    println!("| questions | asked | right @1 % | right @3 % | untrue |\n|---|---|---|---|---|");
    for (name, score) in &scores {
        println!("{}", score.line(name));
    }
    for (name, score) in &scores {
        // What did not hold then is never told, and nearly everything that was told is found.
        assert_eq!(score.untrue, 0, "{name}");
        assert!(score.third * 100 >= score.asked * LEAST, "{}", score.line(name));
        assert!(score.first * 100 >= score.asked * LEAST_FIRST, "{}", score.line(name));
    }
}

/// Percent of the questions of each kind that must be answered among three, and first.
const LEAST: usize = 90;
const LEAST_FIRST: usize = 75;
