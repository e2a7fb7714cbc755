//! Attention: what of all that waits deserves a thought, in which order, and what shares one. Pure.
//!
//! Owns: salience (from the rules, the sender's word, priority, novelty and the sender's recent past), ranking, likeness, and
//! the one stimulus that stands for several. Not here: the queues (`inbox`), the turns (`actor/attend.rs`), rules.
//!
//! Invariants: salience lies within 0 and 1, grows with what was said and with novelty, falls as a sender repeats itself, and
//! a rule's word and a person's stimulus are never worn down; of one sender nothing overtakes anything; what waits grows
//! in rank, so nothing starves; the past kept of an instance is bounded and lost with its activation.
//! Tests: at the foot; `tests/it/attention.rs`.

use std::time::Duration;

use serde::Deserialize as _;

use super::{talk::Talk, turn::PATCH_CHANNEL};
use crate::types::{
    Millis, Priority, Profile, RawJson, Source, Stimulus,
    limits::{MAX_ATTENTION_KINDS, MAX_MERGE_WINDOW_MS, MAX_MERGED_TEXT, MAX_TURNS_PER_COMMIT},
    profile::{AttentionSpec, Interrupt},
};

/// The engine of a turn that attention decided: held back, or given up for what the same person said next.
pub const HELD_BACK: &str = "attention";

/// Share of its salience that a stimulus keeps when nothing in it is new.
const OLD_NEWS: f32 = 0.3;
/// Share of its salience that a stimulus loses at most because its sender speaks so often.
const HABIT: f32 = 0.6;
/// A sender is half a habit after so many stimuli a minute.
const HABIT_RATE: f32 = 12.0;
/// Over which time a sender's stimuli are counted, in milliseconds.
const HABIT_MS: f32 = 60_000.0;
/// What was heard so long ago is half new again, in milliseconds.
const FORGET_MS: f32 = 10.0 * 60_000.0;
/// How many of the last different stimuli of a kind are known.
const KNOWN: usize = 4;
/// So long a wait counts as much as the whole range of salience.
const PATIENCE: Duration = Duration::from_secs(30);

/// A profile's settings of attention, checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Below it nothing is thought about.
    pub threshold: f32,
    /// Below it stimuli share thoughts.
    pub merge_below: f32,
    /// How long they wait for each other.
    pub window: Duration,
    /// Most stimuli of one thought.
    pub merge_max: usize,
    /// What a person's new stimulus does.
    pub interrupt: Interrupt,
}

impl Attention {
    /// Those of a profile; `None` when it has none.
    ///
    /// # Errors
    /// In words, which setting is wrong.
    pub fn of(profile: &Profile) -> Result<Option<Self>, String> {
        let Some(settings) = &profile.attention else { return Ok(None) };
        let spec = AttentionSpec::deserialize(settings).map_err(|error| format!("attention: {error}"))?;
        for (name, value) in [("threshold", spec.threshold), ("merge_below", spec.merge_below)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(format!("attention.{name} lies between 0 and 1, this is {value}"));
            }
        }
        if spec.merge_window_ms > MAX_MERGE_WINDOW_MS {
            return Err(format!("attention.merge_window_ms is at most {MAX_MERGE_WINDOW_MS}"));
        }
        let merge_max = usize::from(spec.merge_max);
        if !(1..=MAX_TURNS_PER_COMMIT).contains(&merge_max) {
            return Err(format!("attention.merge_max lies between 1 and {MAX_TURNS_PER_COMMIT}"));
        }
        Ok(Some(Self {
            threshold: spec.threshold,
            merge_below: spec.merge_below,
            window: Duration::from_millis(spec.merge_window_ms.into()),
            merge_max,
            interrupt: spec.interrupt,
        }))
    }

    /// Whether a stimulus of this salience is not thought about at all.
    pub fn holds_back(&self, salience: f32) -> bool {
        salience < self.threshold
    }

    /// Whether a stimulus of this salience shares its thought.
    fn shares(&self, salience: f32) -> bool {
        self.merge_max > 1 && salience >= self.threshold && salience < self.merge_below
    }
}

/// What attention knows of a stimulus that waits.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Weight {
    /// It was not looked at.
    #[default]
    Unknown,
    /// Rules decide it, or it is a patch: no engine is needed.
    Light,
    /// An engine would think about it.
    Heavy {
        /// Its salience.
        salience: f32,
        /// Whether it may share a thought: no rule acts on it by itself, it insists on nothing, and it did not fail before.
        alike: bool,
    },
}

/// What an instance heard lately, kind by kind. A hint: it is lost with the activation.
#[derive(Debug, Default)]
pub struct Past {
    kinds: Vec<Kind>,
    /// What was last said to people.
    pub talk: Talk,
}

/// Stimuli of one sender on one channel.
#[derive(Debug)]
struct Kind {
    name: u64,
    at: Millis,
    /// Stimuli counted, those a minute ago for little.
    rate: f32,
    /// What the last different ones were about.
    about: [u64; KNOWN],
    next: u8,
}

impl Past {
    /// The salience of a stimulus, which is heard with this. `rule` is what the rules say of it.
    pub fn weigh(&mut self, stimulus: &Stimulus, rule: Option<f32>, now: Millis) -> f32 {
        let (novelty, rate) = self.hear(stimulus, now);
        salience(rule, stimulus.salience, stimulus.priority, novelty, rate)
    }

    /// Kinds known.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// How new a stimulus is, 0 to 1, and how many of its kind came in the last minute before it.
    fn hear(&mut self, stimulus: &Stimulus, now: Millis) -> (f32, f32) {
        let name = seeds().hash_one((stimulus.source, &stimulus.channel, &stimulus.sender));
        let about = about(stimulus);
        let Some(kind) = self.kinds.iter_mut().find(|kind| kind.name == name) else {
            let kind = Kind { name, at: now, rate: 1.0, about: [about, 0, 0, 0], next: 1 };
            if self.kinds.len() < MAX_ATTENTION_KINDS {
                self.kinds.push(kind);
            } else if let Some(oldest) = self.kinds.iter_mut().min_by_key(|kind| kind.at) {
                *oldest = kind;
            }
            return (1.0, 0.0);
        };
        let since = milliseconds(now.0.saturating_sub(kind.at.0));
        let heard = kind.about.iter().filter(|known| **known != 0).map(|known| likeness(*known, about));
        let heard = heard.fold(0.0_f32, f32::max);
        let novelty = 1.0 - heard * (-since * std::f32::consts::LN_2 / FORGET_MS).exp();
        let rate = kind.rate * (-since / HABIT_MS).exp();
        kind.at = now;
        kind.rate = rate + 1.0;
        if heard < 1.0 {
            kind.about[usize::from(kind.next) % KNOWN] = about;
            kind.next = kind.next.wrapping_add(1);
        }
        (novelty.clamp(0.0, 1.0), rate)
    }
}

/// How much attention a stimulus deserves, 0 to 1.
///
/// `rule` and `said` are what the rules and the sender say of it; `novelty` runs from 0 to 1, `rate` is how many the sender
/// sent in the last minute.
pub fn salience(rule: Option<f32>, said: Option<f32>, priority: Priority, novelty: f32, rate: f32) -> f32 {
    let within = |value: f32| if value.is_nan() { 0.0 } else { value.clamp(0.0, 1.0) };
    if let Some(rule) = rule {
        return within(rule);
    }
    let said = within(said.unwrap_or(match priority {
        Priority::Human => 1.0,
        Priority::Timer => 0.7,
        Priority::Device => 0.5,
        Priority::Background => 0.3,
    }));
    if priority == Priority::Human {
        return said;
    }
    let fresh = OLD_NEWS + (1.0 - OLD_NEWS) * within(novelty);
    let rate = if rate.is_nan() { 0.0 } else { rate.max(0.0) };
    let heard = 1.0 - HABIT * if rate.is_infinite() { 1.0 } else { rate / (rate + HABIT_RATE) };
    within(said * fresh * heard)
}

#[allow(clippy::cast_precision_loss)] // a time of days need not be exact
const fn milliseconds(time: i64) -> f32 {
    if time < 0 { 0.0 } else { time as f32 }
}

/// The same in every run, so that what was seen once can be seen again in a test.
fn seeds() -> ahash::RandomState {
    ahash::RandomState::with_seeds(1, 2, 3, 4)
}

/// What a stimulus is about, as a set of 64: of its words, with numbers by their magnitude, so that a reading that moves a
/// little is no news. Never 0.
fn about(stimulus: &Stimulus) -> u64 {
    let seeds = seeds();
    let mut set = 0_u64;
    let texts = [stimulus.content.as_deref(), stimulus.data.as_ref().map(RawJson::get)];
    let letters = |c: char| !(c.is_alphanumeric() || c == '.' || c == '-');
    for word in texts.into_iter().flatten().flat_map(|text| text.split(letters)).filter(|word| !word.is_empty()) {
        let bit = match word.parse::<f32>() {
            Ok(number) if number.is_finite() => {
                let magnitude = (number.abs() + 1.0).log2().round();
                seeds.hash_one((number < 0.0, magnitude.to_bits()))
            }
            _ => seeds.hash_one(word),
        };
        set |= 1 << (bit % 64);
    }
    if set == 0 { 1 } else { set }
}

/// How much two sets have in common, 0 to 1 (Jaccard).
#[allow(clippy::cast_precision_loss)] // at most 64
fn likeness(a: u64, b: u64) -> f32 {
    (a & b).count_ones() as f32 / (a | b).count_ones().max(1) as f32
}

/// One that waits, as ranking sees it.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The stimulus.
    pub stimulus: &'a Stimulus,
    /// What is known of it.
    pub weight: Weight,
    /// How long it has waited.
    pub age: Duration,
}

impl Candidate<'_> {
    fn shares(&self, attention: &Attention) -> bool {
        matches!(self.weight, Weight::Heavy { salience, alike: true } if attention.shares(salience))
    }

    /// Its rank: salience, grown with its wait. What needs no thought goes first, since it holds nobody up.
    fn rank(&self, attention: &Attention) -> f32 {
        match self.weight {
            Weight::Heavy { salience, .. } if !attention.holds_back(salience) => {
                salience + self.age.as_secs_f32() / PATIENCE.as_secs_f32()
            }
            _ => f32::INFINITY,
        }
    }

    fn is_held_back(&self, attention: &Attention) -> bool {
        matches!(self.weight, Weight::Heavy { salience, .. } if attention.holds_back(salience))
    }
}

/// What to do with those that wait with one priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    /// Take this one.
    Take(usize),
    /// All of them wait for others like them, the first one so long.
    Wait(Duration),
    /// There is none.
    Nothing,
}

/// Picks among those that wait with one priority, in their order of arrival: the highest rank of those that no earlier one
/// of their sender stands before; of equal ones the first. Takes time in proportion to their number.
pub fn pick(waiting: &[Candidate<'_>], attention: &Attention) -> Pick {
    let (mut kinds, mut held_up) = (Map::default(), Map::default());
    for (index, candidate) in waiting.iter().enumerate() {
        if candidate.shares(attention) {
            *kinds.entry(kind(candidate.stimulus)).or_insert(0_usize) += 1;
        } else if !candidate.is_held_back(attention) {
            held_up.insert(sender(candidate.stimulus), index);
        }
    }
    // How much longer one waits for others like it: not when its time is over, enough have come, or it would hold up
    // something else its sender sent. What is held back in the end may wait with it.
    let gathers = |index: usize, candidate: &Candidate<'_>| {
        let left = attention.window.checked_sub(candidate.age).filter(|left| !left.is_zero())?;
        let holds_up = held_up.get(&sender(candidate.stimulus)).is_some_and(|other| *other > index);
        let enough = kinds.get(&kind(candidate.stimulus)).is_some_and(|count| *count >= attention.merge_max);
        (candidate.shares(attention) && !holds_up && !enough).then_some(left)
    };
    let mut seen = Set::default();
    let mut best: Option<(usize, f32)> = None;
    let mut shortest: Option<Duration> = None;
    for (index, candidate) in waiting.iter().enumerate() {
        if !seen.insert(sender(candidate.stimulus)) {
            continue;
        }
        if let Some(left) = gathers(index, candidate) {
            shortest = Some(shortest.map_or(left, |shortest| shortest.min(left)));
            continue;
        }
        let rank = candidate.rank(attention);
        if best.is_none_or(|(_, highest)| rank > highest) {
            best = Some((index, rank));
        }
    }
    match (best, shortest) {
        (Some((index, _)), _) => Pick::Take(index),
        (None, Some(left)) => Pick::Wait(left),
        (None, None) => Pick::Nothing,
    }
}

/// Which of those that wait, in their order of arrival, share the thought of `first`, which was picked before: those like it
/// whose sender has nothing else before them. At most so many that the thought has `merge_max`.
pub fn companions(first: &Candidate<'_>, waiting: &[Candidate<'_>], attention: &Attention) -> Vec<usize> {
    let mut taken = Vec::new();
    if !first.shares(attention) {
        return taken;
    }
    let mut passed_over = Set::default();
    for (index, candidate) in waiting.iter().enumerate() {
        if taken.len() + 1 >= attention.merge_max {
            break;
        }
        let sender = sender(candidate.stimulus);
        let alike = candidate.shares(attention) && kind(first.stimulus) == kind(candidate.stimulus);
        if alike && !passed_over.contains(&sender) {
            taken.push(index);
        } else {
            passed_over.insert(sender);
        }
    }
    taken
}

type Map<K, V> = std::collections::HashMap<K, V, ahash::RandomState>;
type Set<K> = std::collections::HashSet<K, ahash::RandomState>;

/// Who sent a stimulus, as far as can be told: those who give no name are one for each door.
fn sender(stimulus: &Stimulus) -> (Option<&str>, Option<Source>) {
    let name = stimulus.sender.as_deref();
    (name, name.is_none().then_some(stimulus.source))
}

/// What stimuli have in common that may share a thought: door, priority, and the first level of the channel.
fn kind(stimulus: &Stimulus) -> (Source, Priority, &str) {
    let channel = stimulus.channel.as_str();
    (stimulus.source, stimulus.priority, channel.split_once('/').map_or(channel, |(first, _)| first))
}

/// One stimulus that stands for several before the engine: under the first one's id, with a list of all in its text.
pub fn listed<'a>(first: &Stimulus, others: impl ExactSizeIterator<Item = &'a Stimulus>) -> Stimulus {
    let all = others.len() + 1;
    let mut text = format!("{all} stimuli are answered together:\n");
    let mut say = |number: usize, stimulus: &Stimulus| {
        text.push_str(&number.to_string());
        text.push_str(". [");
        text.push_str(stimulus.channel.as_str());
        if let Some(sender) = &stimulus.sender {
            text.push_str(", ");
            text.push_str(sender);
        }
        text.push_str("] ");
        let parts = [stimulus.content.as_deref(), stimulus.data.as_ref().map(RawJson::get)];
        let told = parts.into_iter().flatten().collect::<Vec<_>>().join(" ");
        text.push_str(told.char_indices().nth(MAX_MERGED_TEXT).map_or(&*told, |(end, _)| &told[..end]));
        text.push('\n');
    };
    say(1, first);
    (2..).zip(others).for_each(|(number, stimulus)| say(number, stimulus));
    Stimulus { content: Some(text), data: None, ..first.clone() }
}

/// Whether one that shares a thought is answered with its words: where somebody may wait for them. What a stream of a device
/// reports is not answered again and again.
pub fn is_answered(stimulus: &Stimulus) -> bool {
    stimulus.reply_to.is_some() || stimulus.source == Source::Http || stimulus.priority == Priority::Human
}

/// What a person's new stimulus does to the thought about another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interruption {
    /// Both are thought about together.
    Join,
    /// The thought is dropped; the other one is thought about again after it.
    Postpone,
    /// The thought is dropped; the other one stays without an answer.
    Replace,
}

/// What `new`, the first that waits of a person, does to the thought about `in_hand`; `None` when it waits.
pub fn interruption(policy: Interrupt, in_hand: &Stimulus, new: &Stimulus) -> Option<Interruption> {
    if new.priority != Priority::Human || new.channel.as_str() == PATCH_CHANNEL {
        return None;
    }
    let urgent = in_hand.priority == Priority::Human;
    let same = new.sender.is_some() && in_hand.sender == new.sender;
    match policy {
        Interrupt::Merge if !urgent || same => Some(Interruption::Join),
        Interrupt::Cancel if !urgent => Some(Interruption::Postpone),
        Interrupt::Cancel if same => Some(Interruption::Replace),
        Interrupt::Queue | Interrupt::Merge | Interrupt::Cancel => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::types::Channel;

    const NOW: Millis = Millis(1_000_000);
    const HEAVY: Weight = Weight::Heavy { salience: 0.3, alike: true };

    fn settings() -> Attention {
        let profile = Profile { attention: Some(json!({})), ..Profile::default() };
        Attention::of(&profile).unwrap().unwrap()
    }

    fn said(sender: &str, channel: &str, text: &str) -> Stimulus {
        let mut stimulus = Stimulus::text(Source::Mqtt, Channel::new(channel).unwrap(), text, NOW);
        stimulus.sender = Some(sender.to_owned());
        stimulus
    }

    fn waits(stimulus: &Stimulus, weight: Weight, age_ms: u64) -> Candidate<'_> {
        Candidate { stimulus, weight, age: Duration::from_millis(age_ms) }
    }

    #[test]
    fn wrong_settings_are_refused_with_their_name() {
        for (settings, reason) in [
            (json!({"treshold": 1}), "unknown field `treshold`"),
            (json!({"threshold": 1.5}), "attention.threshold lies between 0 and 1, this is 1.5"),
            (json!({"merge_below": -0.1}), "attention.merge_below lies between"),
            (json!({"merge_window_ms": 60_001}), "attention.merge_window_ms is at most 60000"),
            (json!({"merge_max": 0}), "attention.merge_max lies between 1 and 32"),
            (json!({"merge_max": 33}), "attention.merge_max lies between 1 and 32"),
            (json!({"interrupt": "always"}), "unknown variant `always`"),
            (json!("on"), "invalid type"),
        ] {
            let refused = Attention::of(&Profile { attention: Some(settings), ..Profile::default() }).unwrap_err();
            assert!(refused.contains(reason), "{refused}");
        }
        assert_eq!(Attention::of(&Profile::default()), Ok(None));
    }

    #[test]
    fn what_repeats_itself_is_worn_down_and_news_are_not() {
        let mut past = Past::default();
        let at = |second: i64| Millis(NOW.0 + second * 1000);
        let first = past.weigh(&said("s", "t", "temperature 21.4 C"), None, at(0));
        let mut last = first;
        for second in 1..60 {
            let reading = format!("temperature 21.{} C", second % 5);
            let now = past.weigh(&said("s", "t", &reading), None, at(second));
            assert!(now <= last, "{now} after {last}");
            last = now;
        }
        assert!(last < 0.1 && (first - 0.5).abs() < 1e-6, "{first} {last}");
        let news = past.weigh(&said("s", "t", "smoke detected, alarm"), None, at(60));
        let other = past.weigh(&said("other", "t", "temperature 21.4 C"), None, at(60));
        assert!(news > 2.0 * last, "{news} {last}");
        assert!((other - 0.5).abs() < 1e-6, "another sender has a past of its own: {other}");
        let jump = past.weigh(&said("s", "t", "temperature 88.0 C"), None, at(61));
        assert!(jump > last, "another magnitude is news");
        let later = past.weigh(&said("s", "t", "temperature 21.4 C"), None, at(24 * 3600));
        assert!(later > 0.4, "after a day it is news again: {later}");
    }

    #[test]
    fn the_past_is_bounded() {
        let mut past = Past::default();
        for n in 0..10 * MAX_ATTENTION_KINDS {
            past.weigh(&said(&format!("s{n}"), "t", "hello"), None, Millis(n as i64));
        }
        assert_eq!(past.len(), MAX_ATTENTION_KINDS);
        assert!(MAX_ATTENTION_KINDS * size_of::<Kind>() <= 4096);
        assert!(past.weigh(&said("s639", "t", "hello"), None, Millis(640)) < 0.5, "the newest are the ones known");
    }

    #[test]
    fn the_highest_rank_goes_first_and_no_sender_overtakes_itself() {
        let attention = settings();
        let (a, b, c) = (said("a", "1", "x"), said("b", "2", "x"), said("a", "3", "x"));
        let heavy = |salience| Weight::Heavy { salience, alike: false };
        let order = [waits(&a, heavy(0.5), 0), waits(&b, heavy(0.6), 0), waits(&c, heavy(0.9), 0)];
        assert_eq!(pick(&order, &attention), Pick::Take(1), "c stands behind a, of the same sender");
        assert_eq!(pick(&order[..1], &attention), Pick::Take(0));
        assert_eq!(pick(&[], &attention), Pick::Nothing);
        let light = [waits(&a, heavy(1.0), 0), waits(&b, Weight::Light, 0)];
        assert_eq!(pick(&light, &attention), Pick::Take(1), "what needs no thought holds nobody up");
        let old = [waits(&a, heavy(0.5), 20_000), waits(&b, heavy(0.9), 0)];
        assert_eq!(pick(&old, &attention), Pick::Take(0), "a wait counts");
    }

    #[test]
    fn those_alike_gather_for_a_while_and_share_a_thought() {
        let attention = Attention { merge_max: 3, ..settings() };
        let (a, b) = (said("a", "1/x", "x"), said("b", "1/y", "y"));
        let (c, other) = (said("a", "1/z", "z"), said("a", "2", "x"));
        let two = [waits(&a, HEAVY, 400), waits(&b, HEAVY, 100)];
        assert_eq!(pick(&two, &attention), Pick::Wait(Duration::from_millis(600)));
        let three = [waits(&a, HEAVY, 400), waits(&b, HEAVY, 100), waits(&c, HEAVY, 0)];
        assert_eq!(pick(&three, &attention), Pick::Take(0), "enough have come");
        assert_eq!(pick(&[waits(&a, HEAVY, 1_000)], &attention), Pick::Take(0), "its time is over");
        let held_up = [waits(&a, HEAVY, 0), waits(&other, Weight::Light, 0)];
        assert_eq!(pick(&held_up, &attention), Pick::Take(0), "it does not hold up its own sender");
        let idle = Weight::Heavy { salience: 0.01, alike: true };
        let beside = [waits(&a, HEAVY, 0), waits(&other, idle, 0)];
        assert_eq!(pick(&beside, &attention), Pick::Wait(Duration::from_secs(1)), "what is held back may wait");

        let rest = [waits(&other, Weight::Light, 0), waits(&b, HEAVY, 0), waits(&c, HEAVY, 0), waits(&b, HEAVY, 0)];
        assert_eq!(companions(&waits(&a, HEAVY, 0), &rest, &attention), [1, 3], "c stands behind another of a's");
        let heavy = Weight::Heavy { salience: 0.9, alike: true };
        assert!(companions(&waits(&a, heavy, 0), &rest, &attention).is_empty(), "what matters is not shared");
    }

    #[test]
    fn a_list_names_all_and_is_bounded() {
        let (first, long) = (said("a", "t", "one"), said("b", "t", &"é".repeat(2 * MAX_MERGED_TEXT)));
        let list = listed(&first, std::iter::once(&long));
        let text = list.content.unwrap();
        assert!(text.starts_with("2 stimuli are answered together:\n1. [t, a] one\n2. [t, b] éé"), "{text}");
        assert_eq!(text.matches('é').count(), MAX_MERGED_TEXT);
        assert_eq!(list.id, first.id);
    }

    #[test]
    fn a_person_interrupts_as_the_profile_says() {
        let human = |sender: Option<&str>| {
            let mut stimulus = said("x", "chat", "hi");
            stimulus.sender = sender.map(str::to_owned);
            stimulus.priority = Priority::Human;
            stimulus
        };
        let (device, ann, bob) = (said("d", "t", "x"), human(Some("ann")), human(Some("bob")));
        for (policy, about, new, expected) in [
            (Interrupt::Queue, &device, &ann, None),
            (Interrupt::Merge, &device, &ann, Some(Interruption::Join)),
            (Interrupt::Merge, &ann, &ann, Some(Interruption::Join)),
            (Interrupt::Merge, &bob, &ann, None),
            (Interrupt::Cancel, &device, &ann, Some(Interruption::Postpone)),
            (Interrupt::Cancel, &ann, &ann, Some(Interruption::Replace)),
            (Interrupt::Cancel, &bob, &ann, None),
            (Interrupt::Cancel, &human(None), &human(None), None),
            (Interrupt::Cancel, &ann, &device, None),
        ] {
            assert_eq!(interruption(policy, about, new), expected, "{policy:?} {:?}", about.sender);
        }
    }

    proptest! {
        #[test]
        fn salience_keeps_its_bounds_and_its_direction(
            rule in proptest::option::of(any::<f32>()), word in proptest::option::of(any::<f32>()),
            priority in prop::sample::select(&Priority::ALL[..]),
            (low, high) in (0.0_f32..=1.0, 0.0_f32..=1.0).prop_map(|(a, b)| (a.min(b), a.max(b))),
            (few, many) in (0.0_f32..1e6, 0.0_f32..1e6).prop_map(|(a, b)| (a.min(b), a.max(b))),
        ) {
            let of = |novelty, rate| salience(rule, word, priority, novelty, rate);
            for value in [of(low, few), of(high, many), salience(rule, word, priority, f32::NAN, f32::INFINITY)] {
                prop_assert!((0.0..=1.0).contains(&value), "{}", value);
            }
            prop_assert!(of(low, few) <= of(high, few));
            prop_assert!(of(low, many) <= of(low, few));
            if rule.is_some() || priority == Priority::Human {
                prop_assert_eq!(of(low, many), of(high, few));
            }
        }

        /// Taking one after the other as they are picked: all are taken once, and each sender's order holds.
        #[test]
        fn ranking_loses_nothing_and_keeps_each_senders_order(
            drawn in proptest::collection::vec((0..4_usize, 0..3_usize, 0..5_u8, 0..3_000_u64), 1..20),
            merge_max in 1..5_usize,
        ) {
            let attention = Attention { merge_max, ..settings() };
            let stimuli: Vec<(Stimulus, Weight, u64)> = drawn.iter().map(|(sender, channel, weight, age)| {
                let weight = match weight {
                    0 => Weight::Light,
                    n => Weight::Heavy { salience: f32::from(*n) / 5.0, alike: n % 2 == 0 },
                };
                (said(&format!("s{sender}"), &format!("c{channel}"), "x"), weight, *age)
            }).collect();
            let mut left: Vec<usize> = (0..stimuli.len()).collect();
            let mut order = Vec::new();
            let mut later = 0;
            while !left.is_empty() {
                let view = |at: &usize| waits(&stimuli[*at].0, stimuli[*at].1, stimuli[*at].2 + later);
                let waiting: Vec<Candidate<'_>> = left.iter().map(view).collect();
                match pick(&waiting, &attention) {
                    Pick::Take(index) => {
                        let first = waiting[index];
                        let at = left.remove(index);
                        let rest: Vec<Candidate<'_>> = left.iter().map(view).collect();
                        let taken = companions(&first, &rest, &attention);
                        prop_assert!(taken.len() < merge_max);
                        order.push(at);
                        order.extend(taken.iter().map(|index| left[*index]));
                        left.retain(|at| !order.contains(at));
                    }
                    Pick::Wait(pause) => {
                        prop_assert!(!pause.is_zero());
                        later += u64::try_from(pause.as_millis()).unwrap();
                    }
                    Pick::Nothing => prop_assert!(false, "something waits"),
                }
            }
            prop_assert_eq!(order.len(), stimuli.len());
            for sender in 0..4 {
                let of_sender: Vec<usize> = order.iter().copied().filter(|at| drawn[*at].0 == sender).collect();
                prop_assert!(of_sender.is_sorted(), "{:?}", of_sender);
            }
        }
    }
}
