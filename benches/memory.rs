//! Recall of the top ten among many episodes of one instance: time, and how many of the exact ten are found (P14).
//!
//! `cargo bench --bench memory [-- COUNT...]` prints a table for 10,000 and 1,000,000 episodes (or the given counts): an SQLite
//! store in a temporary folder, batches of 1,000, each with a text and an embedding of 256 numbers, all from one seed.
//! Embeddings lie around 2,000 topics with as much spread as keeps neighbours apart; questions are new points around the same
//! topics. "exact" is the order by full-precision dot products over all episodes. Then the same questions are asked again, for
//! what the cache saves: the answer is held, and the store is asked whether the memory changed. At last the memory is kept in parts
//! and with its index, and begun by one that is cold: with the parts alone, and with both. Figures: `docs/performance.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, clippy::cast_precision_loss)]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use sophont::{
    config,
    memory::{Ask, Known, Memory},
    runtime::clock::Clock,
    scaling::cache::{Options, TieredCache},
    store::{Done, Fence, Head, Keep, Piece, Reader as _, Store, Unit, Work, Writer as _, sqlite::SqliteStore},
    types::{
        Channel, EpisodeId, InstanceId, InstanceKey, Outcome, RawJson, Source, StateChange, Stimulus, TenantId,
        TurnRecord,
        memory::{ENGINE, Extra, Vector, WRITE_CHANNEL, Writing, Written, read_writing},
    },
};

const DIMENSION: usize = 256;
const TOPICS: usize = 2000;
const SPREAD: f32 = 0.7;
const BATCH: usize = 1000;
const QUESTIONS: usize = 200;
const TOP: usize = 10;
/// Different words; word n is said about 1/n as often as the first (Zipf).
const WORDS: u64 = 30_000;

/// splitmix64.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    #[allow(clippy::cast_possible_truncation)]
    fn normal(&mut self) -> f32 {
        let (a, b) = (self.unit().max(1e-12), self.unit());
        ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    }

    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn word(&mut self) -> String {
        let rank = (WORDS as f64).powf(self.unit()) as u64;
        let mut name = rank.wrapping_mul(0x9e37_79b9) % 11_881_376;
        let mut text = String::new();
        for _ in 0..5 {
            text.push(char::from(b'a' + (name % 26) as u8));
            name /= 26;
        }
        text
    }

    fn text(&mut self, words: usize) -> String {
        (0..words).map(|_| self.word()).collect::<Vec<_>>().join(" ")
    }

    fn around(&mut self, topics: &[Vec<f32>]) -> Vec<f32> {
        let topic = &topics[usize::try_from(self.next() % topics.len() as u64).unwrap()];
        topic.iter().map(|n| n + SPREAD * self.normal()).collect()
    }
}

fn unit(numbers: &[f32]) -> Vec<f32> {
    let length = numbers.iter().map(|n| n * n).sum::<f32>().sqrt();
    numbers.iter().map(|n| n / length).collect()
}

fn writing(turn: u64, episodes: Vec<Written>) -> TurnRecord {
    let now = Clock::System.now();
    let mut stimulus = Stimulus::empty(Source::Http, Channel::new(WRITE_CHANNEL).unwrap(), now);
    stimulus.data = Some(RawJson::from_serialize(&Writing { episodes }).unwrap());
    let (episodes, kept) = read_writing(&stimulus).unwrap();
    stimulus.data = kept;
    TurnRecord {
        turn,
        version: 0,
        stimulus,
        outcome: Outcome::Silent,
        reply: None,
        effects: Vec::new(),
        state: StateChange::None,
        episodes,
        steps: 0,
        engine: String::from(ENGINE),
        model: None,
        usage: None,
        error: None,
        decided_at: now,
        epoch: 0,
    }
}

/// A memory that knows nothing yet.
fn memory(store: &Arc<SqliteStore>) -> Memory {
    let mut settings = config::Config::default().memory;
    settings.cache_mb = 4096;
    let cache = TieredCache::new(Options::default());
    Memory::new(&settings, store.clone() as Arc<dyn Store>, Clock::System, &cache).unwrap()
}

struct Subject {
    store: Arc<SqliteStore>,
    memory: Memory,
    key: InstanceKey,
    /// Full-precision embeddings, one after the other.
    truth: Vec<f32>,
    topics: Vec<Vec<f32>>,
    dice: Dice,
    _folder: tempfile::TempDir,
}

impl Subject {
    async fn of(count: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = config::Config::default();
        settings.store.durability = config::Durability::Off;
        let store = SqliteStore::open(folder.path(), &settings.store, Clock::System).unwrap();
        let memory = memory(&store);
        let key = InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap());
        let mut dice = Dice(20_261_121);
        let topics: Vec<Vec<f32>> = (0..TOPICS).map(|_| (0..DIMENSION).map(|_| dice.normal()).collect()).collect();
        let mut truth = Vec::with_capacity(count * DIMENSION);
        let mut head = Head::default();
        for turn in 1..=u64::try_from(count.div_ceil(BATCH)).unwrap() {
            let episodes = (0..BATCH.min(count - truth.len() / DIMENSION)).map(|_| {
                let numbers = unit(&dice.around(&topics));
                truth.extend_from_slice(&numbers);
                Written {
                    content: dice.text(12),
                    data: None,
                    tags: vec![format!("shelf-{}", dice.next() % 100)],
                    reward: None,
                    occurred_at: None,
                    extra: Extra { embedding: Vector::of(&numbers), ..Extra::default() },
                }
            });
            let episodes = episodes.collect();
            let (done, end) = Done::channel();
            let work = Work::Turns { head, turns: vec![Arc::new(writing(turn, episodes))] };
            store.submit(Unit { key: key.clone(), fence: Fence::default(), work, done });
            head = end.await.unwrap().unwrap().head;
        }
        store.settle().await.unwrap();
        Self { store, memory, key, truth, topics, dice, _folder: folder }
    }

    fn exact(&self, question: &[f32]) -> Vec<u64> {
        let score = |numbers: &[f32]| numbers.iter().zip(question).map(|(a, b)| a * b).sum::<f32>();
        let mut all: Vec<(f32, usize)> = self.truth.chunks_exact(DIMENSION).map(score).zip(0..).collect();
        all.select_nth_unstable_by(TOP - 1, |a, b| b.0.total_cmp(&a.0));
        let id = |at: usize| EpisodeId::new((at / BATCH + 1) as u64, at % BATCH).0;
        all[..TOP].iter().map(|(_, at)| id(*at)).collect()
    }

    async fn ask(&self, ask: Ask) -> (Duration, Vec<u64>) {
        let began = Instant::now();
        let found = self.memory.search(&self.key, ask).await.unwrap();
        (began.elapsed(), found.episodes.iter().map(|found| found.episode.id).collect())
    }
}

fn row(name: &str, count: usize, mut times: Vec<Duration>, found: Option<f64>) {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1000.0;
    let found = found.map_or(String::from("-"), |found| format!("{found:.4}"));
    println!("| {count} | {name} | {:.2} | {:.2} | {found} |", at(0.5), at(0.99));
}

async fn measure(count: usize) {
    let began = Instant::now();
    let mut subject = Subject::of(count).await;
    let written = began.elapsed();
    let began = Instant::now();
    let figures = subject.memory.figures(&subject.key).await.unwrap();
    let indexed = figures.indexed;
    println!(
        "{count} episodes: written in {:.1} s, read into memory in {:.2} s, {:.0} MiB, index: {indexed}",
        written.as_secs_f64(),
        began.elapsed().as_secs_f64(),
        figures.bytes as f64 / 1024.0 / 1024.0,
    );
    println!("| episodes | recall by | p50 ms | p99 ms | recall@10 |\n|---|---|---|---|---|");
    let questions: Vec<Vec<f32>> = (0..QUESTIONS).map(|_| unit(&subject.dice.around(&subject.topics))).collect();
    let texts: Vec<String> = (0..QUESTIONS).map(|_| subject.dice.text(6)).collect();
    let (mut times, mut hits) = (Vec::new(), 0);
    for question in &questions {
        let ask = Ask { embedding: Vector::of(question), limit: TOP, ..Ask::default() };
        let (time, found) = subject.ask(ask).await;
        times.push(time);
        let exact = subject.exact(question);
        hits += found.iter().filter(|id| exact.contains(id)).count();
    }
    row("vector", count, times, Some(hits as f64 / (QUESTIONS * TOP) as f64));
    let mut by_text = Vec::new();
    let mut hybrid = Vec::new();
    let mut filtered = Vec::new();
    for (text, question) in texts.iter().zip(&questions) {
        let ask = Ask { query: Some(text.clone()), limit: TOP, ..Ask::default() };
        by_text.push(subject.ask(ask.clone()).await.0);
        let both = Ask { embedding: Vector::of(question), ..ask };
        hybrid.push(subject.ask(both.clone()).await.0);
        let known = Known { tags_any: vec![String::from("shelf-7")], ..Known::default() };
        filtered.push(subject.ask(Ask { known, ..both }).await.0);
    }
    row("text (words and built-in vectors)", count, by_text, None);
    row("text and vector", count, hybrid, None);
    row("text and vector, one tag of a hundred", count, filtered, None);
    again(&mut subject, count).await;
    cold(subject, count).await;
}

/// The first question to a memory that knows nothing: with parts, and with the index too.
async fn cold(subject: Subject, count: usize) {
    let question = unit(&vec![1.0; DIMENSION]);
    let ask = Ask { embedding: Vector::of(&question), limit: TOP, ..Ask::default() };
    let told = subject.ask(ask.clone()).await.1;
    let (began, used) = (Instant::now(), cpu());
    subject.memory.checkpoint(&subject.key, true).await.unwrap();
    let (took, used) = (began.elapsed().as_secs_f64(), (cpu() - used).as_secs_f64());
    println!("| episodes | cold, with | answered in s | CPU s |\n|---|---|---|---|");
    println!("| {count} | (keeping both) | {took:.2} | {used:.2} |");
    let Subject { store, key, memory: warm, .. } = subject;
    drop(warm);
    let index = store.index(&key).await.unwrap();
    for (with, rec) in [("parts", None), ("parts and index", index)] {
        let life = store.spans(&key).await.unwrap().life;
        let seen = rec.as_ref().map_or(u64::MAX, |index| index.upto);
        let piece = Piece::Index(rec.map(|index| index.rec).unwrap_or_default());
        let (done, end) = Done::channel();
        store.keep(Keep { key: key.clone(), life, seen, piece }, done);
        end.await.unwrap().unwrap();
        let cold = memory(&store);
        let (began, used) = (Instant::now(), cpu());
        let found = cold.search(&key, ask.clone()).await.unwrap();
        let (took, used) = (began.elapsed().as_secs_f64(), (cpu() - used).as_secs_f64());
        let ids: Vec<u64> = found.episodes.iter().map(|found| found.episode.id).collect();
        println!("| {count} | {with} | {took:.2} | {used:.2} | {}", if ids == told { "" } else { "other answer" });
    }
    store.close();
}

/// Each question once, and once more.
async fn again(subject: &mut Subject, count: usize) {
    let mut asks: Vec<(&str, Vec<Ask>)> = Vec::new();
    let by_text = (0..QUESTIONS).map(|_| Ask { query: Some(subject.dice.text(6)), limit: TOP, ..Ask::default() });
    asks.push(("text", by_text.collect()));
    let by_vector = (0..QUESTIONS).map(|_| {
        let question = unit(&subject.dice.around(&subject.topics));
        Ask { embedding: Vector::of(&question), limit: TOP, ..Ask::default() }
    });
    asks.push(("vector", by_vector.collect()));
    println!("| episodes | recall by | p50 ms | p99 ms | CPU ms / 1k |\n|---|---|---|---|---|");
    for (how, asks) in &asks {
        let mut found = Vec::new();
        for round in ["for the first time", "again"] {
            let (began, mut times) = (cpu(), Vec::new());
            for (n, ask) in asks.iter().enumerate() {
                let (time, ids) = subject.ask(ask.clone()).await;
                times.push(time);
                match found.get(n) {
                    None => found.push(ids),
                    Some(first) => assert_eq!(&ids, first),
                }
            }
            let cpu = (cpu() - began).as_secs_f64() * 1e6 / asks.len() as f64;
            times.sort_unstable();
            let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1000.0;
            println!("| {count} | {how}, {round} | {:.3} | {:.3} | {cpu:.0} |", at(0.5), at(0.99));
        }
    }
}

/// User and system time of this process so far.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10) // 100 ticks a second on Linux
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let counts: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let counts = if counts.is_empty() { vec![10_000, 1_000_000] } else { counts };
    runtime.block_on(async {
        for count in counts {
            measure(count).await;
        }
    });
}
