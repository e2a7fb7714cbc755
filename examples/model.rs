//! Asks a real model through the `llm` engine and prints what came when: for trying a provider before a node uses it.
//!
//! `cargo run --example model -- http://127.0.0.1:18080/v1 gemma-3-270m "Once upon a time"`. A key is taken from the
//! environment variable `MODEL_API_KEY` if it is set. At the end it asks once more, stops after the third word, and times how
//! long the provider is still busy with the abandoned answer.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::BTreeMap,
    io::Write,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use sophont::{
    cognition::{Engine, Engines, Progress, Question},
    config,
    scaling::cache::{Options, TieredCache},
    types::{
        Channel, InstanceId, InstanceKey, Millis, Profile, Source, StateDoc, Stimulus, TenantId, profile::EngineName,
    },
};

struct Print {
    begun: Instant,
    times: Mutex<Vec<Duration>>,
    enough: tokio::sync::Notify,
}

impl Print {
    fn new() -> Self {
        Self { begun: Instant::now(), times: Mutex::default(), enough: tokio::sync::Notify::new() }
    }
}

impl Progress for Print {
    fn token(&self, text: &str) {
        print!("{text}");
        std::io::stdout().flush().unwrap();
        let mut times = self.times.lock().unwrap();
        times.push(self.begun.elapsed());
        if times.len() == 3 {
            self.enough.notify_one();
        }
    }
    fn restart(&self) {
        println!("\n(begun anew)");
    }
}

fn question(text: &str) -> Question {
    Question {
        key: InstanceKey::new(TenantId::new("example").unwrap(), InstanceId::new("example").unwrap()),
        profile: Arc::new(Profile::default()),
        stimulus: Arc::new(Stimulus::text(Source::Http, Channel::new("chat").unwrap(), text, Millis(0))),
        state: StateDoc::default(),
        recollection: vec![],
        recent: vec![],
        now: Millis(0),
        deadline: Duration::from_secs(120),
        tools: std::sync::Arc::new(sophont::cognition::toolbox::Empty),
        steps: Vec::new(),
        bounds: sophont::cognition::Bounds { steps: 100, tokens: 1_000_000 },
    }
}

async fn answer(engine: &dyn Engine, text: &str) -> (Duration, Duration) {
    let print = Print::new();
    let thought = engine.think(question(text), &print).await.unwrap();
    let total = print.begun.elapsed();
    let times = print.times.lock().unwrap();
    let first = times.first().copied().unwrap_or(total);
    println!("\n-- {} pieces, first after {first:.2?}, all after {total:.2?}, {:?}", times.len(), thought.usage);
    (first, total)
}

#[tokio::main]
async fn main() {
    let mut words = std::env::args().skip(1);
    let base_url = words.next().unwrap_or_else(|| String::from("http://127.0.0.1:18080/v1"));
    let model = words.next().unwrap_or_else(|| String::from("gemma-3-270m"));
    let text = words.next().unwrap_or_else(|| String::from("Tell me a short story about a lamp."));
    let key = std::env::var("MODEL_API_KEY").map(|_| String::from("MODEL_API_KEY")).unwrap_or_default();
    let provider = config::Provider {
        base_url,
        api_key_env: key,
        model,
        max_concurrent: 1,
        max_waiting: 10,
        idle_seconds: 60,
        max_tokens: 128,
        context_tokens: 8192,
    };
    let settings = config::Cognition {
        default_engine: EngineName::Llm,
        default_provider: String::new(),
        think_seconds: 120,
        max_steps: 100,
        max_tokens_per_turn: 1_000_000,
        providers: BTreeMap::from([(String::from("example"), provider)]),
    };
    let engines = Engines::new(&settings, &TieredCache::new(Options::default())).unwrap();
    let engine = engines.get(EngineName::Llm).as_ref();
    answer(engine, &text).await;
    let (_, undisturbed) = answer(engine, &text).await;

    let print = Print::new();
    tokio::select! {
        thought = engine.think(question(&text), &print) => println!("\n-- it was shorter than three pieces: {thought:?}"),
        () = print.enough.notified() => println!("\n-- stopped after {:.2?}", print.begun.elapsed()),
    }
    let begun = Instant::now();
    answer(engine, &text).await;
    println!(
        "-- the next answer was complete {:.2?} after the stop; undisturbed it takes {undisturbed:.2?}",
        begun.elapsed()
    );
}
