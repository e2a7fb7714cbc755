//! The `llm` engine: any OpenAI-compatible chat endpoint.
//!
//! Owns: which provider and model a profile means, and the course of a call: a place in the provider's pool, the breaker, the
//! deadline, retries. Not here: the wire (`client.rs`, `wire.rs`), what a model is told
//! (`context.rs`), the steps of a turn (`course.rs`).
//!
//! Invariants:
//! - A failed call yields an error that says whether trying again can help; it never loses the stimulus, which stands in the
//!   inbox until its turn is committed.
//! - A call is repeated only while nothing was said, or after [`Progress::restart`] took back what was said.
//! - A place is held only while a call is under way, not while waiting to repeat it.
//!
//! Tests: at the foot of each file; `tests/it/thinking.rs`.

mod answers;
mod breaker;
mod client;
mod context;
mod fair;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod offer;
mod pool;
mod quirks;
mod reading;
mod sse;
mod tokens;
mod wire;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use backon::{BackoffBuilder, ExponentialBuilder};
use secrecy::SecretString;
use serde_json::{Map, Value};
use tokio::time::{sleep, timeout_at};

use self::{
    breaker::{Admission, Breaker},
    client::{Answer, Ask, Client, Failure, Voice},
    pool::Pool,
    wire::Tool,
};
use super::{
    Action, Engine, Error, Pace, Progress, Question, Thought, answer,
    course::{Course, Utterance},
};
use crate::{
    config,
    scaling::{
        cache::TieredCache,
        pool::{Limits, Tally},
    },
    telemetry::metric,
    types::{Chat, Cut, Message, Profile, RawJson, Reply, chat::LeftCalls, step::Answered, strict},
};

/// Episodes and recent turns a model is told.
const EPISODES: usize = 8;
const TURNS: usize = 12;
/// Repeats of a failed call, and the shortest and longest wait before one (without `Retry-After`), doubled each time, with
/// as much again at random.
const REPEATS: usize = 3;
const SHORTEST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(8);
/// How much earlier than the deadline a call ends.
const MARGIN: Duration = Duration::from_millis(50);
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// Asks language models.
#[derive(Debug)]
pub struct Llm {
    cache: TieredCache,
    providers: BTreeMap<String, Provider>,
    /// The provider of profiles that name none.
    default: Option<String>,
}

/// One endpoint with its limits.
#[derive(Debug)]
struct Provider {
    name: Arc<str>,
    model: String,
    max_tokens: u32,
    context_tokens: u32,
    client: Client,
    pool: Pool,
    breaker: Mutex<Breaker>,
    strain: Strain,
    /// How many tools were left out of the last offer.
    left_out: AtomicUsize,
}

impl Llm {
    /// Prepares the configured providers. Nothing is asked of them yet.
    ///
    /// # Errors
    /// [`Error::Settings`] names the provider whose address or key is wrong or missing, [`Error::NoProvider`] an unknown
    /// default.
    pub fn new(config: &config::Cognition, cache: TieredCache) -> Result<Self, Error> {
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("sophont/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| Error::Settings(format!("no HTTP client: {error}")))?;
        let providers = config
            .providers
            .iter()
            .map(|(name, provider)| {
                let pool = Pool::new(Arc::from(name.as_str()), limits(provider, config));
                Ok((name.clone(), Provider::new(name, provider, http.clone(), pool)?))
            })
            .collect::<Result<BTreeMap<_, _>, Error>>()?;
        let default = match config.default_provider.as_str() {
            "" if providers.len() == 1 => providers.keys().next().cloned(),
            "" => None,
            name if providers.contains_key(name) => Some(name.to_owned()),
            name => return Err(Error::NoProvider(name.to_owned())),
        };
        Ok(Self { cache, providers, default })
    }

    /// The provider and model a profile means: `PROVIDER/MODEL`, `PROVIDER`, or nothing for the defaults.
    fn choose<'s>(&'s self, profile: &'s Profile) -> Result<(&'s Provider, &'s str), Error> {
        let wanted = profile.model.as_deref().unwrap_or_default();
        let (name, model) = match wanted.split_once('/') {
            Some((name, model)) => (name, model),
            None => (wanted, ""),
        };
        let name = if name.is_empty() { self.default.as_deref().unwrap_or_default() } else { name };
        let provider = self.providers.get(name).ok_or_else(|| Error::NoProvider(name.to_owned()))?;
        let model = if model.is_empty() { provider.model.as_str() } else { model };
        if model.is_empty() {
            return Err(Error::Settings(format!("provider '{name}' has no model of its own, name one: {name}/MODEL")));
        }
        Ok((provider, model))
    }

    /// What is counted of the calls of each provider.
    pub(super) fn pools(&self) -> impl Iterator<Item = Arc<Tally>> {
        self.providers.values().map(|provider| provider.pool.tally().clone())
    }

    /// As many calls at once, and as many that wait, as the settings say.
    pub(super) fn resize(&self, config: &config::Cognition) {
        for (name, provider) in &self.providers {
            if let Some(settings) = config.providers.get(name) {
                provider.pool.resize(limits(settings, config));
            }
        }
    }

    /// Checks that a profile means a provider and a model.
    ///
    /// # Errors
    /// [`Error::NoProvider`], [`Error::Settings`].
    pub(super) fn check(&self, profile: &Profile) -> Result<(), Error> {
        self.choose(profile).map(drop)
    }
}

#[async_trait]
impl Engine for Llm {
    fn name(&self) -> &'static str {
        "llm"
    }

    fn pace(&self, _: &Profile) -> Pace {
        Pace::Slow
    }

    fn wants(&self, _: &Profile) -> (usize, usize) {
        (EPISODES, TURNS)
    }

    async fn think(&self, question: Question, progress: &dyn Progress) -> Result<Thought, Error> {
        let (provider, model) = self.choose(&question.profile)?;
        let chat = Chat::of(&question.stimulus).unwrap_or_default();
        let outside = |name: &str| chat.tools.iter().any(|tool| tool.name == name);
        let named = Some(format!("{}/{model}", provider.name));
        let mut course = Course::resume(&question).await?;
        loop {
            course.call(outside, progress).await?;
            if !course.left_to_others().is_empty() {
                return Ok(concluded(&question, course, None, None));
            }
            course.may_ask()?;
            let tools = provider.offered(&course, &chat)?;
            let room = provider.room(&tools);
            let told = course.asked().map_or_else(|| context::told(&question, room), <[Message]>::to_vec);
            let messages = context::fit(told.clone(), course.messages(), room);
            let utterance = Utterance::new(progress, course.has_spoken());
            let (max_tokens, options) = provider.options(&chat, &course, &tools);
            let ask =
                Ask { who: &question.key, model, messages: &messages, tools: &tools, max_tokens, options: &options };
            let answered = provider.held_or_asked(&self.cache, &question.profile, ask, &course, &utterance);
            let Answer { text, calls, usage, cut } = answered.await?;
            // What was answered before consumes nothing, and teaches nothing.
            if usage.input_tokens > 0 {
                provider.strain.learn(tokens::of_all(&messages) + offer::cost(&tools), usage.input_tokens);
            }
            // A model that calls what it was not offered has said its last word.
            let calls = if tools.is_empty() { Vec::new() } else { calls };
            let answer = Answered { text, pieces: utterance.pieces(), calls, model: named.clone(), usage };
            if answer.calls.iter().all(|call| outside(&call.name)) {
                return Ok(concluded(&question, course, Some(answer), cut));
            }
            course.answered(&told, answer, progress).await?;
        }
    }
}

/// The whole turn: what was told is remembered, what tools want done is done, and everything said is the reply, with the
/// calls that are left to the client, or the JSON it asked for, as its data.
fn concluded(question: &Question, course: Course<'_>, last: Option<Answered>, cut: Option<Cut>) -> Thought {
    let left = match &last {
        Some(last) => last.calls.clone(),
        None => course.left_to_others(),
    };
    let json = Chat::of(&question.stimulus).is_some_and(|chat| chat.options.contains_key("response_format"));
    let structured = last.as_ref().filter(|_| json).and_then(|last| strict::whole(&last.text).ok());
    let (mut thought, reply) = course.conclude(last);
    let remembered = question.stimulus.content.as_deref().and_then(answer::remember);
    let mut actions: Vec<Action> = remembered.into_iter().collect();
    actions.append(&mut thought.actions);
    let data = if left.is_empty() { structured } else { RawJson::from_serialize(&LeftCalls::from(left)).ok() };
    if reply.is_some() || data.is_some() {
        let content = reply.and_then(|reply| reply.content);
        actions.push(Action::Reply(Reply { content, data }));
    }
    Thought { actions, cut, ..thought }
}

/// Waits are judged by how long a thought may take.
fn limits(provider: &config::Provider, config: &config::Cognition) -> Limits {
    Limits {
        size: provider.max_concurrent,
        overflow: 0,
        wait: Duration::from_secs(config.think_seconds),
        recycle: Duration::MAX,
        waiting: provider.max_waiting,
    }
}

impl Provider {
    fn new(name: &str, config: &config::Provider, http: reqwest::Client, pool: Pool) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Settings(format!("provider '{name}': {reason}"));
        let url = reqwest::Url::parse(&config.base_url).map_err(|error| wrong(format!("base_url: {error}")))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(wrong(String::from("base_url must begin with http:// or https://")));
        }
        let key = match config.api_key_env.as_str() {
            "" => None,
            variable => {
                let key = std::env::var(variable)
                    .map_err(|_| wrong(format!("the environment variable {variable} is not set")))?;
                Some(SecretString::from(key))
            }
        };
        let idle = Duration::from_secs(config.idle_seconds.max(1));
        let name: Arc<str> = Arc::from(name);
        Ok(Self {
            client: Client::new(http, &config.base_url, key, idle),
            pool,
            breaker: Mutex::new(Breaker::default()),
            strain: Strain::default(),
            left_out: AtomicUsize::new(0),
            model: config.model.clone(),
            max_tokens: config.max_tokens,
            context_tokens: config.context_tokens,
            name,
        })
    }

    /// What a request may say to the server, and its own limit of an answer if that is stricter. Which tool to call is said
    /// once: said again, the turn would not end.
    fn options(&self, chat: &Chat, course: &Course<'_>, tools: &[Tool]) -> (u32, Map<String, Value>) {
        let mut options = chat.options.clone();
        let limits = ["max_tokens", "max_completion_tokens"].map(|name| options.remove(name));
        let asked = limits.iter().flatten().filter_map(Value::as_u64).min();
        let asked = asked.and_then(|asked| u32::try_from(asked).ok()).unwrap_or(u32::MAX);
        if tools.is_empty() {
            options.remove("parallel_tool_calls");
        }
        if tools.is_empty() || course.answers() > 0 {
            options.remove("tool_choice");
        }
        (self.max_tokens.min(asked.max(1)), options)
    }

    /// How many tokens of messages fit into the model's window beside the tools and the answer.
    fn room(&self, tools: &[Tool]) -> usize {
        let window = self.context_tokens.saturating_sub(self.max_tokens) as usize;
        self.strain.ease(window).saturating_sub(offer::cost(tools))
    }

    /// Asks until there is an answer, repeating does not help, or the time is over.
    async fn ask(&self, ask: Ask<'_>, deadline: Duration, progress: &dyn Progress) -> Result<Answer, Error> {
        // A moment before the caller's own deadline, so that it is this end that says what the time was lost on.
        let deadline = deadline.saturating_sub(MARGIN.min(deadline / 10));
        let mut account = Account::open(self);
        let mut voice = Voice::new(progress);
        let end = self.repeat(ask, deadline, &mut voice).await;
        if end.is_err() {
            voice.restart();
        }
        account.close(&end);
        end
    }

    async fn repeat(&self, ask: Ask<'_>, deadline: Duration, voice: &mut Voice<'_>) -> Result<Answer, Error> {
        let until = tokio::time::Instant::now() + deadline;
        let mut waits = ExponentialBuilder::new()
            .with_min_delay(SHORTEST_WAIT)
            .with_max_delay(LONGEST_WAIT)
            .with_max_times(REPEATS)
            .with_jitter()
            .build();
        loop {
            let place = timeout_at(until, self.pool.place(ask.who, ask.tokens()))
                .await
                .map_err(|_| Error::Timeout(deadline))??;
            let trial = Trial::begin(self)?;
            let end = timeout_at(until, self.client.call(ask, voice)).await;
            drop(place);
            let (reason, after) = match end {
                Ok(Ok(answer)) => {
                    trial.lives();
                    return Ok(answer);
                }
                Ok(Err(Failure::Adapted)) => {
                    trial.lives();
                    continue;
                }
                Ok(Err(Failure::Refused(reason))) => {
                    trial.lives();
                    return Err(Error::Refused(format!("{}: {reason}", self.name)));
                }
                Ok(Err(Failure::Again { reason, after, alive })) => {
                    if alive {
                        trial.lives()
                    } else {
                        trial.failed()
                    }
                    (format!("{}: {reason}", self.name), after)
                }
                Err(_) => {
                    // An answer that was under way and is merely long says nothing against the provider.
                    if voice.has_spoken() {
                        trial.lives()
                    } else {
                        trial.failed()
                    }
                    return Err(Error::Timeout(deadline));
                }
            };
            voice.restart();
            let Some(wait) = waits.next() else { return Err(Error::Unavailable(reason)) };
            let wait = wait.max(after.unwrap_or_default());
            if tokio::time::Instant::now() + wait >= until {
                return Err(Error::Unavailable(format!("{reason} (no time left to try again in {wait:.1?})")));
            }
            tracing::debug!(provider = %self.name, %reason, ?wait, "model call failed, trying again");
            sleep(wait).await;
        }
    }

    fn with_breaker<T>(&self, act: impl FnOnce(&mut Breaker) -> T) -> T {
        act(&mut self.breaker.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// By how much a server counted more tokens than were guessed, in thousandths above one: its vocabulary, or what its template
/// puts around messages. It is learnt at once, and unlearnt by a hundredth with each call.
#[derive(Debug, Default)]
struct Strain(AtomicU64);

impl Strain {
    /// No server counts more than three times what was guessed.
    const MOST: u64 = 2000;

    /// What a server counted of what was guessed.
    fn learn(&self, guessed: usize, counted: u64) {
        let found = (counted.saturating_mul(1000) / guessed.max(1) as u64).saturating_sub(1000).min(Self::MOST);
        let learn = |known: u64| Some(found.max(known - known.div_ceil(100)));
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, learn);
    }

    /// How many guessed tokens fit where so many of the server's do.
    fn ease(&self, tokens: usize) -> usize {
        let strain = usize::try_from(self.0.load(Ordering::Relaxed)).unwrap_or(0);
        tokens.saturating_mul(1000) / (1000 + strain)
    }
}

/// A call under the breaker's eyes; dropped without an end, it was given up.
struct Trial<'p> {
    provider: &'p Provider,
    admission: Option<Admission>,
}

impl<'p> Trial<'p> {
    fn begin(provider: &'p Provider) -> Result<Self, Error> {
        let admission = provider.with_breaker(|breaker| breaker.admit(Instant::now())).map_err(|pause| {
            let name = &provider.name;
            Error::Unavailable(format!("{name} failed repeatedly and is left alone for {} s", pause.as_secs().max(1)))
        })?;
        Ok(Self { provider, admission: Some(admission) })
    }

    fn lives(mut self) {
        if let Some(admission) = self.admission.take() {
            self.provider.with_breaker(|breaker| breaker.succeeded(admission));
        }
    }

    fn failed(mut self) {
        if let Some(admission) = self.admission.take() {
            self.provider.with_breaker(|breaker| breaker.failed(admission, Instant::now()));
        }
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        if let Some(admission) = self.admission.take() {
            self.provider.with_breaker(|breaker| breaker.abandoned(admission, Instant::now()));
        }
    }
}

/// The figures of one question; dropped open, it was cancelled.
struct Account<'p> {
    provider: &'p Provider,
    begun: Instant,
    open: bool,
}

impl<'p> Account<'p> {
    fn open(provider: &'p Provider) -> Self {
        Self { provider, begun: Instant::now(), open: true }
    }

    fn close(&mut self, end: &Result<Answer, Error>) {
        self.open = false;
        self.count(match end {
            Ok(_) => "ok",
            Err(Error::Refused(_) | Error::NoProvider(_) | Error::Settings(_) | Error::Bounds(_)) => "refused",
            Err(Error::Unavailable(_)) => "unavailable",
            Err(Error::Overloaded(_)) => "overloaded",
            Err(Error::Timeout(_)) => "timeout",
        });
        if let Ok(answer) = end {
            let tokens = |direction: &'static str, count: u64| {
                let name = self.provider.name.to_string();
                metrics::counter!(metric::MODEL_TOKENS, "provider" => name, "direction" => direction).increment(count);
            };
            tokens("input", answer.usage.input_tokens);
            tokens("output", answer.usage.output_tokens);
        }
    }

    fn count(&self, result: &'static str) {
        let name = || self.provider.name.to_string();
        metrics::counter!(metric::MODEL_CALLS, "provider" => name(), "result" => result).increment(1);
        metrics::histogram!(metric::MODEL_SECONDS, "provider" => name()).record(self.begun.elapsed().as_secs_f64());
    }
}

impl Drop for Account<'_> {
    fn drop(&mut self) {
        if self.open {
            self.count("cancelled");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{scaling::cache::Options, types::profile::EngineName};

    fn prepared(config: &config::Cognition) -> Result<Llm, Error> {
        Llm::new(config, TieredCache::new(Options::default()))
    }

    fn cognition(default: &str, providers: &[(&str, &str)]) -> config::Cognition {
        let provider = |model: &str| config::Provider {
            base_url: String::from("http://127.0.0.1:9/v1"),
            api_key_env: String::new(),
            model: model.to_owned(),
            max_concurrent: 1,
            max_waiting: 1,
            idle_seconds: 1,
            max_tokens: 10,
            context_tokens: 8192,
        };
        config::Cognition {
            default_engine: EngineName::Llm,
            default_provider: default.to_owned(),
            think_seconds: 1,
            max_steps: 100,
            max_tokens_per_turn: 1_000_000,
            providers: providers.iter().map(|(name, model)| ((*name).to_owned(), provider(model))).collect(),
        }
    }

    fn chosen(llm: &Llm, model: Option<&str>) -> Result<(String, String), String> {
        let profile = Profile { model: model.map(str::to_owned), ..Profile::default() };
        llm.choose(&profile).map(|(p, model)| (p.name.to_string(), model.to_owned())).map_err(|error| error.to_string())
    }

    #[test]
    fn a_profile_means_a_provider_and_a_model() {
        let llm = prepared(&cognition("b", &[("a", "small"), ("b", "")])).unwrap();
        let pair = |name: &str, model: &str| Ok((name.to_owned(), model.to_owned()));
        assert_eq!(chosen(&llm, Some("a")), pair("a", "small"));
        assert_eq!(chosen(&llm, Some("a/org/large")), pair("a", "org/large"));
        assert_eq!(chosen(&llm, Some("b/m")), pair("b", "m"));
        assert!(chosen(&llm, None).unwrap_err().contains("name one: b/MODEL"));
        assert!(chosen(&llm, Some("c/m")).unwrap_err().contains("no model provider 'c'"));
        let only = prepared(&cognition("", &[("a", "small")])).unwrap();
        assert_eq!(chosen(&only, None), pair("a", "small"));
        assert!(chosen(&prepared(&cognition("", &[("a", "x"), ("b", "y")])).unwrap(), None).is_err());
    }

    #[test]
    fn a_server_that_counts_more_than_was_guessed_gets_less() {
        let strain = Strain::default();
        strain.learn(1000, 900);
        assert_eq!(strain.ease(1200), 1200, "less than guessed is what is expected");
        strain.learn(1000, 1500);
        assert_eq!(strain.ease(1200), 800);
        strain.learn(1000, 1000);
        assert!((801..810).contains(&strain.ease(1200)), "{}", strain.ease(1200));
        (0..1000).for_each(|_| strain.learn(1000, 1000));
        assert_eq!(strain.ease(1200), 1200);
        strain.learn(0, u64::MAX);
        assert_eq!(strain.ease(1200), 400);
    }

    #[test]
    fn wrong_providers_are_refused_at_start() {
        assert!(matches!(prepared(&cognition("x", &[("a", "m")])), Err(Error::NoProvider(name)) if name == "x"));
        let mut bad = cognition("", &[("a", "m")]);
        bad.providers.get_mut("a").unwrap().base_url = String::from("ftp://x/v1");
        assert!(prepared(&bad).unwrap_err().to_string().contains("provider 'a': base_url must begin"));
        bad.providers.get_mut("a").unwrap().base_url = String::from("http://x/v1");
        bad.providers.get_mut("a").unwrap().api_key_env = String::from("SOPHONT_TEST_NO_SUCH_KEY");
        assert!(prepared(&bad).unwrap_err().to_string().contains("SOPHONT_TEST_NO_SUCH_KEY is not set"));
    }
}
