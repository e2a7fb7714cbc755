//! What all instances of a node share: store, clock, engines, limits, figures. Handed in once, by `node`.

use std::{
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{Error, attention::Attention, ears::Ears, events::Hub, turn::Mind};
use crate::{
    cognition::{Bounds, Engines, Pace, Toolbox, reflex::RuleSet, toolbox},
    config::{self, Config, MqttMode},
    memory::Memory,
    runtime::clock::Clock,
    scaling::cache::{Kind, Local, Options, Slot, States, TieredCache},
    store::Store,
    telemetry::metric,
    tools::scope,
    types::{Profile, Stimulus, TenantId},
};

/// What a profile with its compiled rules takes in memory, of what it takes as text, about.
const COMPILED: usize = 16;

/// Shared by every instance of the node; immutable but for its counters and [`Limits`].
pub struct Environment {
    /// The truth.
    pub store: Arc<dyn Store>,
    /// Time.
    pub clock: Clock,
    /// What instances remember.
    pub memory: Arc<Memory>,
    /// Watches.
    pub hub: Hub,
    /// Who still waits for what.
    pub ears: Ears,
    /// What is held of what is dear to load or to make.
    pub cache: TieredCache,
    /// Committed states, for readers.
    pub states: States,
    /// Profiles made ready.
    pub minds: Minds,
    /// The mind of instances without a profile of their own.
    pub default_mind: Arc<Mind>,
    /// Whether the twin's topics are published: whether an MQTT door is open.
    pub twin: bool,
    /// Most stimuli waiting for one instance.
    pub max_inbox: usize,
    /// The tools engines may use; none until `node` plugs them in.
    pub toolbox: Arc<dyn Toolbox>,
    /// Instances in memory.
    pub active: AtomicUsize,
    /// Limits that change while the node runs.
    pub limits: Limits,
    /// Figures.
    pub metrics: Metrics,
    /// Faults on demand.
    pub faults: Faults,
}

impl Environment {
    /// What a node's settings make of it, over an opened store.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the engines' settings are wrong.
    pub fn new(config: &Config, store: Arc<dyn Store>, clock: Clock) -> Result<Self, Error> {
        let cache = TieredCache::new(Options::of(config, clock.clone()));
        let engines = Engines::new(&config.cognition, &cache).map_err(|error| Error::Invalid(error.to_string()))?;
        let minds = Minds::new(engines, cache.clone());
        let default_mind = minds.ready(&Arc::new(Profile::default()))?;
        let memory = Memory::new(&config.memory, store.clone(), clock.clone(), &cache).map_err(Error::Invalid)?;
        Ok(Self {
            memory: Arc::new(memory),
            store,
            clock,
            hub: Hub::default(),
            ears: Ears::default(),
            states: States::new(cache.clone(), config.faults.cache_blind),
            cache,
            minds,
            default_mind,
            twin: config.mqtt.mode != MqttMode::Off,
            max_inbox: config.instances.max_inbox,
            toolbox: Faults::toolbox(&config.faults).unwrap_or_else(|| Arc::new(toolbox::Empty)),
            active: AtomicUsize::new(0),
            limits: Limits::of(config),
            metrics: Metrics::default(),
            faults: Faults::of(&config.faults),
        })
    }
}

/// Limits that change while the node runs. Each is read anew wherever it counts.
#[derive(Debug)]
pub struct Limits {
    max_active: AtomicUsize,
    idle: AtomicU64,
    think: AtomicU64,
    steps: AtomicU32,
    tokens: AtomicU64,
    turns_away: AtomicBool,
}

impl Limits {
    fn of(config: &Config) -> Self {
        Self {
            max_active: AtomicUsize::new(config.scaling.limits.max_consciousness_instances),
            idle: AtomicU64::new(config.instances.idle_passivate_seconds),
            think: AtomicU64::new(config.cognition.think_seconds),
            steps: AtomicU32::new(config.cognition.max_steps),
            tokens: AtomicU64::new(config.cognition.max_tokens_per_turn),
            turns_away: AtomicBool::new(false),
        }
    }

    /// Most instances in memory.
    pub fn max_active(&self) -> usize {
        self.max_active.load(Ordering::Relaxed)
    }

    /// Idle instances leave memory after this.
    pub fn idle(&self) -> Duration {
        Duration::from_secs(self.idle.load(Ordering::Relaxed))
    }

    /// Longest thinking for one turn, where the profile does not say.
    pub fn think(&self) -> Duration {
        Duration::from_secs(self.think.load(Ordering::Relaxed))
    }

    /// How far a turn may go that begins now.
    pub fn bounds(&self) -> Bounds {
        Bounds { steps: self.steps.load(Ordering::Relaxed), tokens: self.tokens.load(Ordering::Relaxed) }
    }

    /// For turns that begin to think from here on.
    pub fn set_bounds(&self, bounds: Bounds) {
        self.steps.store(bounds.steps, Ordering::Relaxed);
        self.tokens.store(bounds.tokens, Ordering::Relaxed);
    }

    /// Whether work that can wait is refused, because another node has room for it and this one has none.
    pub fn turns_away(&self) -> bool {
        self.turns_away.load(Ordering::Relaxed)
    }

    /// From here on it is so.
    pub fn set_turns_away(&self, turns_away: bool) {
        self.turns_away.store(turns_away, Ordering::Relaxed);
    }

    /// From here on at most so many; those that are too many leave within seconds, the ones idle for longest first.
    pub fn set_max_active(&self, most: usize) {
        self.max_active.store(most, Ordering::Relaxed);
    }

    /// From here on they leave after this, in whole seconds.
    pub fn set_idle(&self, after: Duration) {
        self.idle.store(after.as_secs(), Ordering::Relaxed);
    }

    /// For thoughts that begin from here on, in whole seconds.
    pub fn set_think(&self, longest: Duration) {
        self.think.store(longest.as_secs(), Ordering::Relaxed);
    }
}

/// Makes profiles ready, and shares one [`Mind`] among all instances with the same profile while any of them lives, and in the
/// cache for a while after: compiling rules is most of what it costs to bring back an instance that has some.
pub struct Minds {
    engines: Engines,
    cache: TieredCache,
    interned: Mutex<Interned>,
}

#[derive(Default)]
struct Interned {
    by_text: std::collections::HashMap<blake3::Hash, Weak<Mind>>,
    sweep_at: usize,
}

impl Minds {
    /// Over the engines of the node.
    pub fn new(engines: Engines, cache: TieredCache) -> Self {
        Self { engines, cache, interned: Mutex::default() }
    }

    /// The engines behind them.
    pub const fn engines(&self) -> &Engines {
        &self.engines
    }

    /// Checks a tenant's profile and makes it ready.
    ///
    /// # Errors
    /// [`Error::Invalid`] says which rule or setting is wrong.
    pub fn of(&self, tenant: &TenantId, profile: &Arc<Profile>) -> Result<Arc<Mind>, Error> {
        let (hash, bytes) = hash_of(profile)?;
        let slot = Slot::new(Kind::Profile, tenant, hash.to_hex().as_str());
        if let Some(Some(held)) = self.cache.get::<Local<Arc<Mind>>>(&slot, 0) {
            return Ok(held.value.clone());
        }
        let mind = self.shared(hash, profile)?;
        self.cache.put(&slot, 0, Local { value: mind.clone(), bytes: bytes * COMPILED });
        Ok(mind)
    }

    /// As [`Minds::of`], of the node's own.
    fn ready(&self, profile: &Arc<Profile>) -> Result<Arc<Mind>, Error> {
        self.shared(hash_of(profile)?.0, profile)
    }

    fn shared(&self, hash: blake3::Hash, profile: &Arc<Profile>) -> Result<Arc<Mind>, Error> {
        if let Some(mind) = self.lock().by_text.get(&hash).and_then(Weak::upgrade) {
            return Ok(mind);
        }
        self.engines.check(profile).map_err(|error| Error::Invalid(error.to_string()))?;
        let rules = RuleSet::compile(&profile.reflexes).map_err(|error| Error::Invalid(error.to_string()))?;
        let engine = self.engines.of(profile).clone();
        scope::check(&profile.tools).map_err(Error::Invalid)?;
        let attention = Attention::of(profile).map_err(Error::Invalid)?;
        let attention = attention.filter(|_| engine.pace(profile) == Pace::Slow);
        let mind = Arc::new(Mind { profile: profile.clone(), rules, engine, attention });
        let mut interned = self.lock();
        if interned.by_text.len() >= interned.sweep_at {
            interned.by_text.retain(|_, mind| mind.strong_count() > 0);
            interned.sweep_at = (interned.by_text.len() * 2).max(1024);
        }
        interned.by_text.insert(hash, Arc::downgrade(&mind));
        Ok(mind)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Interned> {
        self.interned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A profile's hash, and its length as text.
fn hash_of(profile: &Profile) -> Result<(blake3::Hash, usize), Error> {
    let text = serde_json::to_vec(profile).map_err(|error| Error::Invalid(error.to_string()))?;
    Ok((blake3::hash(&text), text.len()))
}

/// Handles of the figures instances record, looked up once.
pub struct Metrics {
    /// Turns by outcome: replied, silent, failed.
    pub turns: [metrics::Counter; 3],
    /// Arrival to commit, fast path.
    pub fast_seconds: metrics::Histogram,
    /// Arrival to commit, slow path.
    pub slow_seconds: metrics::Histogram,
    /// Repeats recognised.
    pub repeats: metrics::Counter,
    /// Stimuli given up.
    pub dead_letters: metrics::Counter,
    /// Stimuli whose thought was cancelled because nobody waited for it any more.
    pub unheard: metrics::Counter,
    /// Panics caught.
    pub panics: metrics::Counter,
    /// Activations.
    pub activations: metrics::Counter,
    /// Passivations.
    pub passivations: metrics::Counter,
    /// Stimuli of the background class refused because the node is full.
    pub refused: metrics::Counter,
    /// Instances in memory.
    pub active: metrics::Gauge,
    /// What attention made of stimuli.
    pub attention: Attended,
}

/// What became of the stimuli attention weighed, and the share of model calls it saved.
pub struct Attended {
    thoughts: Counted,
    merged: Counted,
    held_back: Counted,
    saved: metrics::Gauge,
    /// Thoughts interrupted for a person, those joined and those cancelled.
    pub interrupted: [metrics::Counter; 2],
}

struct Counted(metrics::Counter, AtomicU64);

impl Counted {
    fn new(fate: &'static str) -> Self {
        Self(metrics::counter!(metric::ATTENTION_STIMULI, "fate" => fate), AtomicU64::new(0))
    }

    fn add(&self, more: u64) {
        self.0.increment(more);
        self.1.fetch_add(more, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.1.load(Ordering::Relaxed)
    }
}

impl Attended {
    fn new() -> Self {
        let interrupted = |policy| metrics::counter!(metric::INTERRUPTED, "policy" => policy);
        Self {
            thoughts: Counted::new("thought"),
            merged: Counted::new("merged"),
            held_back: Counted::new("held_back"),
            saved: metrics::gauge!(metric::ATTENTION_SAVED),
            interrupted: [interrupted("merge"), interrupted("cancel")],
        }
    }

    /// One thought was concluded that so many other stimuli shared.
    pub fn thought(&self, others: usize) {
        self.thoughts.add(1);
        self.merged.add(others as u64);
        self.reckon();
    }

    /// A stimulus was held back.
    pub fn held_back(&self) {
        self.held_back.add(1);
        self.reckon();
    }

    #[allow(clippy::cast_precision_loss)] // a share need not be exact
    fn reckon(&self) {
        let saved = self.merged.get() + self.held_back.get();
        self.saved.set(saved as f64 / (saved + self.thoughts.get()).max(1) as f64);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let turns = |outcome| metrics::counter!(metric::TURNS, "outcome" => outcome);
        Self {
            turns: [turns("replied"), turns("silent"), turns("failed")],
            fast_seconds: metrics::histogram!(metric::TURN_SECONDS, "path" => "fast"),
            slow_seconds: metrics::histogram!(metric::TURN_SECONDS, "path" => "slow"),
            repeats: metrics::counter!(metric::REPEATS),
            dead_letters: metrics::counter!(metric::DEAD_LETTERS),
            unheard: metrics::counter!(metric::UNHEARD),
            panics: metrics::counter!(metric::PANICS),
            activations: metrics::counter!(metric::ACTIVATIONS),
            passivations: metrics::counter!(metric::PASSIVATIONS),
            refused: metrics::counter!(metric::SCALING_REFUSED),
            active: metrics::gauge!(metric::ACTIVE),
            attention: Attended::new(),
        }
    }
}

/// Faults on demand; without the `faults` feature there are none and the checks vanish.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// A turn on a stimulus with this text panics.
    #[cfg(feature = "faults")]
    pub panic_on: String,
    /// Waiters are answered when the unit is submitted, before it is durable.
    #[cfg(feature = "faults")]
    pub ack_before_commit: bool,
}

impl Faults {
    /// Those of the settings.
    #[cfg_attr(not(feature = "faults"), allow(unused_variables))]
    pub fn of(config: &config::Faults) -> Self {
        Self {
            #[cfg(feature = "faults")]
            panic_on: config.panic_on.clone(),
            #[cfg(feature = "faults")]
            ack_before_commit: config.ack_before_commit,
        }
    }

    /// Tools that a test stands behind.
    #[cfg_attr(not(feature = "faults"), allow(unused_variables))]
    pub fn toolbox(config: &config::Faults) -> Option<Arc<dyn Toolbox>> {
        #[cfg(feature = "faults")]
        if !config.tools_url.is_empty() {
            return Some(Arc::new(toolbox::Outside::new(&config.tools_url)));
        }
        None
    }

    /// Panics if the stimulus is the chosen one.
    #[cfg_attr(not(feature = "faults"), allow(unused_variables, clippy::unused_self))]
    #[allow(clippy::panic)]
    pub fn strike(&self, stimulus: &Stimulus) {
        #[cfg(feature = "faults")]
        if !self.panic_on.is_empty() && stimulus.content.as_deref() == Some(&*self.panic_on) {
            panic!("fault on demand");
        }
    }

    /// Whether acknowledgements leave too early on purpose.
    #[cfg_attr(not(feature = "faults"), allow(clippy::unused_self))]
    pub fn ack_before_commit(&self) -> bool {
        #[cfg(feature = "faults")]
        return self.ack_before_commit;
        #[cfg(not(feature = "faults"))]
        false
    }
}
