//! The turn: what one stimulus does to one instance. Pure: state, rules and stimulus in, a record out.
//!
//! Not here: the commit, the clock, the engine's own thinking, any IO or actor.
//! Invariants: a refused patch changes nothing; a record's effects are numbered from 0; every
//! [`TURNS_PER_FULL_STATE`] turns carry the whole state.
//! Tests: at the foot.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::attention::Attention;
use crate::{
    cognition::{Action, Engine, Facts, Thought, reflex::RuleSet},
    types::{
        Effect, EffectKind, EpisodeDraft, Millis, Outcome, Priority, Profile, RawJson, Reply, Source, StateChange,
        StateDoc, Stimulus, TurnRecord,
        limits::{MAX_EFFECTS_PER_TURN, MAX_STATE_BYTES, TURNS_PER_FULL_STATE},
        memory,
    },
};

/// The channel of state patches.
pub const PATCH_CHANNEL: &str = "state/patch";

/// A profile made ready: its rules compiled, its engine chosen. Shared by all instances with the same profile.
pub struct Mind {
    /// The profile in force.
    pub profile: Arc<Profile>,
    /// Its rules.
    pub rules: RuleSet,
    /// Who decides when no rule does.
    pub engine: Arc<dyn Engine>,
    /// How what waits is ranked, merged and held back; `None` when it is not, as with an engine that takes no time.
    pub attention: Option<Attention>,
}

/// What the rules said.
pub enum Judgement {
    /// The rules decided.
    Decided(Vec<Action>),
    /// The engine must think; the rules' own actions come first, with what they say of the stimulus's salience.
    Think(Vec<Action>, Option<f32>),
    /// A rule that matched could not be carried out; the reason goes on record.
    Failed(String),
}

/// Where an instance stands before a turn.
#[derive(Debug, Clone, Copy)]
pub struct Standing {
    /// Number of the last turn.
    pub turn: u64,
    /// State version.
    pub version: u64,
    /// Turns since the record with the whole state.
    pub since_full: u64,
}

impl Standing {
    /// Where it stands after a turn.
    #[must_use]
    pub fn after(self, record: &TurnRecord) -> Self {
        let since_full = if matches!(record.state, StateChange::Full(_)) { 0 } else { self.since_full + 1 };
        Self { turn: record.turn, version: record.version, since_full }
    }
}

/// Why a stimulus cannot become a turn at all. The sender is told; nothing is recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A patch that does not fit the state document.
    #[error("{0}")]
    BadPatch(String),
    /// A change of the memory that cannot be read.
    #[error("{0}")]
    BadMemory(String),
}

/// Tries the rules on a stimulus.
///
/// A state patch is applied for the rules to see and never reaches the engine. A change of the memory reaches neither.
///
/// # Errors
/// [`Refusal`] when a patch cannot be applied.
pub fn judge(mind: &Mind, facts: &Facts<'_>) -> Result<Judgement, Refusal> {
    let unread = |error: serde_json::Error| Refusal::BadMemory(error.to_string());
    if memory::writes(facts.stimulus) {
        let (drafts, _) = memory::read_writing(facts.stimulus).map_err(unread)?;
        return Ok(Judgement::Decided(drafts.into_iter().map(Action::Remember).collect()));
    }
    if memory::forgets(facts.stimulus) {
        return memory::read_forgetting(facts.stimulus).map(|_| Judgement::Decided(Vec::new())).map_err(unread);
    }
    if memory::embeds(facts.stimulus) {
        return memory::read_embedding(facts.stimulus).map(|_| Judgement::Decided(Vec::new())).map_err(unread);
    }
    if facts.stimulus.channel.as_str() != PATCH_CHANNEL {
        let verdict = match mind.rules.evaluate(facts) {
            Ok(verdict) => verdict,
            Err(error) => return Ok(Judgement::Failed(error.to_string())),
        };
        let decided = verdict.drop || (!verdict.matched.is_empty() && !verdict.think);
        let actions = if verdict.drop { Vec::new() } else { verdict.actions };
        return Ok(if decided { Judgement::Decided(actions) } else { Judgement::Think(actions, verdict.salience) });
    }
    let patch = patch_of(facts.stimulus);
    let mut state = facts.state.clone();
    state.apply(&patch).map_err(|error| Refusal::BadPatch(error.to_string()))?;
    if size_of_state(&state) > MAX_STATE_BYTES {
        return Err(Refusal::BadPatch(format!("the state would be larger than {MAX_STATE_BYTES} bytes")));
    }
    match mind.rules.evaluate(&Facts { state: &state, ..*facts }) {
        Ok(verdict) => {
            let mut actions = vec![Action::Set(patch)];
            actions.extend(verdict.actions);
            Ok(Judgement::Decided(actions))
        }
        Err(error) => Ok(Judgement::Failed(error.to_string())),
    }
}

fn patch_of(stimulus: &Stimulus) -> Value {
    stimulus.data.as_ref().map(RawJson::value).unwrap_or_default()
}

/// Who decided, for the record.
#[derive(Debug, Clone, Default)]
pub struct Author {
    /// `reflex`, `scripted`, `llm`.
    pub engine: &'static str,
    /// Figures of the thought, when there was one.
    pub thought: Thought,
}

/// Turns a decision into the record to commit, and `state` into the state after it.
///
/// A decision that breaks a limit becomes a failed turn that changes nothing: the stimulus is used up, the reason is on record.
/// Of a state patch at least the patch itself holds.
pub fn conclude(
    standing: Standing,
    stimulus: &Stimulus,
    state: &mut StateDoc,
    decision: Result<Vec<Action>, String>,
    author: Author,
    twin: bool,
    now: Millis,
) -> TurnRecord {
    let mut record = TurnRecord {
        turn: standing.turn + 1,
        version: standing.version,
        stimulus: stimulus.clone(),
        outcome: Outcome::Silent,
        reply: None,
        effects: Vec::new(),
        state: StateChange::None,
        episodes: Vec::new(),
        steps: author.thought.steps,
        engine: String::from(author.engine),
        model: author.thought.model,
        usage: author.thought.usage,
        error: None,
        decided_at: now,
        epoch: 0,
    };
    author.thought.cut.into_iter().for_each(|cut| record.cut_short(cut));
    let weigh = |parts: Parts| parts.change(state).map(|change| (change, parts));
    let mut weighed = decision.map(Parts::sort).and_then(weigh);
    if let Err(reason) = &weighed
        && stimulus.channel.as_str() == PATCH_CHANNEL
    {
        // Whoever patched the state is right about it whatever a rule makes of that: the patch holds, the rules do not.
        let alone = Parts { sets: vec![patch_of(stimulus)], ..Parts::default() };
        if let Ok(patched) = weigh(alone) {
            record.error = Some(reason.clone());
            weighed = Ok(patched);
        }
    }
    match weighed {
        Err(reason) => {
            record.outcome = Outcome::Failed;
            record.error = Some(reason);
        }
        Ok((change, parts)) => {
            if let Some((after, patch)) = change {
                record.version += 1;
                record.effects.extend(twin.then(|| twin_effect(state, &after, record.version)).flatten());
                *state = after;
                record.state = patch.map_or(StateChange::None, StateChange::Patch);
            }
            let to_mqtt = stimulus.source == Source::Mqtt || stimulus.reply_to.is_some();
            if parts.reply.is_some() {
                record.outcome = Outcome::Replied;
                if to_mqtt {
                    record.effects.push(EffectKind::Reply { to: stimulus.reply_to.clone() }.unnumbered());
                }
            }
            record.reply = parts.reply;
            record.effects.extend(parts.effects.into_iter().map(EffectKind::unnumbered));
            record.episodes = parts.episodes;
        }
    }
    if memory::writes(stimulus) {
        // What is remembered stands in the record once, with the episodes.
        record.stimulus.data = memory::read_writing(stimulus).ok().and_then(|(_, kept)| kept);
    }
    if memory::changes(stimulus) {
        record.engine = String::from(memory::ENGINE);
    }
    for (index, effect) in (0..).zip(&mut record.effects) {
        effect.index = index;
    }
    let changed = record.version != standing.version;
    let unsaid = changed && record.state == StateChange::None;
    if unsaid || standing.since_full + 1 >= TURNS_PER_FULL_STATE || standing.turn == 0 {
        record.state = StateChange::Full(text_of_state(state));
    }
    record
}

/// The state as JSON text.
pub fn text_of_state(state: &StateDoc) -> RawJson {
    RawJson::from_serialize(state).unwrap_or_else(|_| RawJson::of(&Value::Null))
}

fn size_of_state(state: &StateDoc) -> usize {
    text_of_state(state).get().len()
}

impl EffectKind {
    fn unnumbered(self) -> Effect {
        Effect { index: 0, kind: self }
    }
}

/// A decision sorted by what it asks for.
#[derive(Default)]
struct Parts {
    reply: Option<Reply>,
    sets: Vec<Value>,
    effects: Vec<EffectKind>,
    episodes: Vec<EpisodeDraft>,
}

impl Parts {
    fn sort(actions: Vec<Action>) -> Self {
        let mut parts = Self::default();
        for action in actions {
            match action {
                Action::Reply(reply) => parts.reply = Some(reply),
                Action::Set(patch) => parts.sets.push(patch),
                Action::Remember(episode) => parts.episodes.push(episode),
                Action::Publish { channel, content, data, retain } => {
                    parts.effects.push(EffectKind::Publish { channel, content, data, retain });
                }
                Action::Send { instance, channel, content, data } => {
                    parts.effects.push(EffectKind::Send { instance, channel, content, data });
                }
                Action::Remind { due, content, data } => parts.effects.push(EffectKind::Remind { due, content, data }),
                Action::Webhook { url, body } => parts.effects.push(EffectKind::Webhook { url, body }),
            }
        }
        parts
    }

    /// The state after, with the patch that leads there; no patch when several were applied, whose composition RFC 7396 does
    /// not define. `None` when nothing changes.
    fn change(&self, state: &StateDoc) -> Result<Option<(StateDoc, Option<RawJson>)>, String> {
        if self.effects.len() > MAX_EFFECTS_PER_TURN {
            return Err(format!("{} effects in one turn, the limit is {MAX_EFFECTS_PER_TURN}", self.effects.len()));
        }
        if self.sets.is_empty() {
            return Ok(None);
        }
        let mut after = state.clone();
        for patch in &self.sets {
            after.apply(patch).map_err(|error| error.to_string())?;
        }
        if after == *state {
            return Ok(None);
        }
        // A patch is often smaller than the state by far: then the whole needs no look at its size.
        let patch = match self.sets.as_slice() {
            [only] => Some(RawJson::of(only)),
            _ => None,
        };
        let size = size_of_state(&after);
        if size > MAX_STATE_BYTES {
            return Err(format!("the state would have {size} bytes, the limit is {MAX_STATE_BYTES}"));
        }
        Ok(Some((after, patch.filter(|patch| patch.get().len() <= size))))
    }
}

/// What the twin's topics must show after a change; nothing while nothing is desired.
fn twin_effect(before: &StateDoc, after: &StateDoc, version: u64) -> Option<Effect> {
    if before.desired.is_empty() && after.desired.is_empty() {
        return None;
    }
    let (delta_before, delta_after) = (before.delta(), after.delta());
    let desired_changed = before.desired != after.desired;
    if !desired_changed && delta_before == delta_after {
        return None;
    }
    let text = |map: &Map<String, Value>| RawJson::from_serialize(map).ok();
    let desired = if desired_changed { text(&after.desired) } else { None };
    let delta = text(&delta_after)?;
    Some(EffectKind::Twin { version, desired, delta }.unnumbered())
}

/// The lane of a stimulus in an inbox, most urgent first.
pub const fn lane(priority: Priority) -> usize {
    match priority {
        Priority::Human => 0,
        Priority::Device => 1,
        Priority::Timer => 2,
        Priority::Background => 3,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::types::Channel;

    const NOW: Millis = Millis(1_000);

    fn stimulus(source: Source) -> Stimulus {
        Stimulus::text(source, Channel::new("c").unwrap(), "hello", NOW)
    }

    fn conclude_from(state: &mut StateDoc, since_full: u64, actions: Vec<Action>) -> TurnRecord {
        let standing = Standing { turn: 5, version: 3, since_full };
        let author = Author { engine: "reflex", ..Author::default() };
        conclude(standing, &stimulus(Source::Http), state, Ok(actions), author, true, NOW)
    }

    fn reply(text: &str) -> Action {
        Action::Reply(Reply { content: Some(text.into()), data: None })
    }

    #[test]
    fn a_turn_without_actions_is_silent_and_keeps_the_version() {
        let record = conclude_from(&mut StateDoc::default(), 0, vec![]);
        assert_eq!((record.turn, record.version, record.outcome), (6, 3, Outcome::Silent));
        assert_eq!(record.state, StateChange::None);
    }

    #[test]
    fn a_patch_holds_though_the_rules_fail() {
        let mut patch = Stimulus::empty(Source::Http, Channel::new(PATCH_CHANNEL).unwrap(), NOW);
        patch.data = Some(RawJson::of(&json!({"reported": {"on": true}})));
        let standing = Standing { turn: 5, version: 3, since_full: 0 };
        let too_large = Action::Set(json!({"reported": {"x": "x".repeat(MAX_STATE_BYTES)}}));
        for decision in [Err(String::from("no such key")), Ok(vec![Action::Set(patch_of(&patch)), too_large])] {
            let mut state = StateDoc::default();
            let record = conclude(standing, &patch, &mut state, decision, Author::default(), true, NOW);
            assert_eq!(Value::Object(state.reported), json!({"on": true}));
            assert_eq!((record.version, record.outcome), (4, Outcome::Silent));
            assert!(record.error.is_some(), "{record:?}");
        }
    }

    #[test]
    fn the_last_reply_counts() {
        let record = conclude_from(&mut StateDoc::default(), 0, vec![reply("a"), reply("b")]);
        assert_eq!(record.reply.unwrap().content.as_deref(), Some("b"));
        assert_eq!(record.outcome, Outcome::Replied);
        assert!(record.effects.is_empty(), "an HTTP sender gets its reply as the answer");
    }

    #[test]
    fn a_reply_to_a_device_is_an_effect() {
        let standing = Standing { turn: 0, version: 0, since_full: 0 };
        let mut state = StateDoc::default();
        let record =
            conclude(standing, &stimulus(Source::Mqtt), &mut state, Ok(vec![reply("a")]), Author::default(), true, NOW);
        assert_eq!(record.effects, vec![EffectKind::Reply { to: None }.unnumbered()]);
    }

    #[test]
    fn one_patch_is_kept_several_become_the_whole() {
        let mut state = StateDoc::default();
        state.apply(&json!({"reported": {"long": "x".repeat(100)}})).unwrap();
        let one = conclude_from(&mut state, 0, vec![Action::Set(json!({"reported": {"a": 1}}))]);
        assert_eq!(one.version, 4);
        assert_eq!(one.state, StateChange::Patch(RawJson::of(&json!({"reported": {"a": 1}}))));
        let set = |n: u32| Action::Set(json!({"reported": {"a": n}}));
        let two = conclude_from(&mut state, 0, vec![set(2), set(3)]);
        assert_eq!(two.state, StateChange::Full(text_of_state(&state)));
        assert_eq!(state.reported["a"], json!(3));
    }

    #[test]
    fn a_patch_that_changes_nothing_keeps_the_version() {
        let mut state = StateDoc::default();
        state.apply(&json!({"reported": {"a": 1}})).unwrap();
        let record = conclude_from(&mut state, 0, vec![Action::Set(json!({"reported": {"a": 1}}))]);
        assert_eq!((record.version, record.state), (3, StateChange::None));
    }

    #[test]
    fn the_whole_state_comes_regularly() {
        let record = conclude_from(&mut StateDoc::default(), TURNS_PER_FULL_STATE - 1, vec![]);
        assert!(matches!(record.state, StateChange::Full(_)));
        let standing = Standing { turn: 5, version: 3, since_full: TURNS_PER_FULL_STATE - 1 };
        assert_eq!(standing.after(&record).since_full, 0);
    }

    #[test]
    fn a_broken_limit_is_a_failed_turn_that_changes_nothing() {
        let mut state = StateDoc::default();
        let before = state.clone();
        let huge = Action::Set(json!({"reported": {"a": "x".repeat(MAX_STATE_BYTES)}}));
        let record = conclude_from(&mut state, 0, vec![huge, reply("done")]);
        assert_eq!((record.outcome, record.version), (Outcome::Failed, 3));
        assert!(record.error.unwrap().contains("limit"));
        assert!(record.reply.is_none());
        assert_eq!(state, before);
    }

    #[test]
    fn the_twin_is_published_when_the_delta_moves() {
        let mut state = StateDoc::default();
        let wish = conclude_from(&mut state, 0, vec![Action::Set(json!({"desired": {"on": true}}))]);
        let EffectKind::Twin { desired, delta, version } = &wish.effects[0].kind else { panic!("a twin effect") };
        assert_eq!((desired.as_ref().unwrap().get(), delta.get(), *version), (r#"{"on":true}"#, r#"{"on":true}"#, 4));
        let met = conclude_from(&mut state, 0, vec![Action::Set(json!({"reported": {"on": true}}))]);
        let EffectKind::Twin { desired, delta, .. } = &met.effects[0].kind else { panic!("a twin effect") };
        assert_eq!((desired, delta.get()), (&None, "{}"));
        let other = conclude_from(&mut state, 0, vec![Action::Set(json!({"reported": {"x": 1}}))]);
        assert!(other.effects.is_empty());
    }

    #[test]
    fn effects_are_numbered_from_zero() {
        let publish =
            Action::Publish { channel: Channel::new("fan").unwrap(), content: None, data: None, retain: false };
        let record = conclude_from(&mut StateDoc::default(), 0, vec![publish.clone(), publish]);
        assert_eq!(record.effects.iter().map(|effect| effect.index).collect::<Vec<_>>(), [0, 1]);
    }
}
