//! Reflexes: an instance's rules, compiled when its profile is stored and evaluated on every stimulus, without a model.
//!
//! Owns: [`RuleSet`], the order of rules, `stop` and `drop`, and errors that name rule, part and position.
//! Not here: what becomes of the actions (`instance::turn`), the extractive answer when no rule matches (`answer.rs`).
//!
//! Invariants:
//! - Evaluation is pure: the same facts give the same verdict.
//! - A condition that cannot be evaluated (a missing field, a wrong type) does not match. An action that cannot be finished
//!   fails the evaluation, since half of what a rule decides is worse than nothing.
//! - What a rule set may cost is bounded when it is compiled ([`MAX_RULES_COST`]).
//!
//! Tests: at the foot; `benches/reflex.rs` measures. The language for its users: `docs/reflexes.md`.

mod action;
mod expression;
mod scene;
mod template;

use std::fmt;

use serde_json::Value;

use self::{
    action::{Misfit, Plan},
    expression::{Condition, Flaw, Scope},
    scene::Scene,
};
use super::{Action, Facts};
use crate::types::{
    Fault, Kind, RuleSpec,
    limits::{MAX_ACTIONS_PER_RULE, MAX_EFFECTS_PER_TURN, MAX_RULES, MAX_RULES_COST},
};

/// Why a rule is refused when a profile is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleError {
    /// Index of the rule within `reflexes`, from 0.
    pub rule: usize,
    /// The part of the rule: `when`, `do[2].publish.channel`; empty for the rule as a whole.
    pub part: String,
    /// Where within that part's text, from 1; `None` when the part as a whole is wrong.
    pub column: Option<usize>,
    /// What is wrong, for people.
    pub reason: String,
}

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "reflexes[{}]", self.rule)?;
        if !self.part.is_empty() {
            write!(f, ".{}", self.part)?;
        }
        if let Some(column) = self.column {
            write!(f, ", character {column}")?;
        }
        write!(f, ": {}", self.reason)
    }
}

impl std::error::Error for RuleError {}

impl Fault for RuleError {
    fn kind(&self) -> Kind {
        Kind::Invalid
    }
    fn code(&self) -> &'static str {
        "BAD_REFLEX"
    }
}

/// A merge patch of dotted paths and constant values, as `set` takes them; texts in it are taken as they are.
pub(super) fn fixed_patch(paths: &serde_json::Map<String, Value>) -> Result<Value, String> {
    action::fixed_patch(paths).map_err(|(part, flaw)| format!("set{part}: {}", flaw.reason))
}

/// Why a rule that matched could not be carried out. Repeating the stimulus cannot cure it; another profile or stimulus can.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("reflexes[{rule}].do[{action}].{part}: {reason}")]
pub struct EvaluationError {
    /// Index of the rule.
    pub rule: usize,
    /// Index of the action.
    pub action: usize,
    /// The part of the action.
    pub part: String,
    /// What is wrong.
    pub reason: String,
}

impl Fault for EvaluationError {
    fn kind(&self) -> Kind {
        Kind::Invalid
    }
    fn code(&self) -> &'static str {
        "REFLEX_FAILED"
    }
    fn hint(&self) -> Option<String> {
        Some(String::from(
            "ask has(...) before using a field that may be missing, or use optional access such as a.?b.orValue(0)",
        ))
    }
}

/// What the rules decide about one stimulus.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Verdict {
    /// What to do, in order.
    pub actions: Vec<Action>,
    /// Whether the engine is asked although a rule matched.
    pub think: bool,
    /// Whether the stimulus is dropped: the engine is not asked and later rules were not tried. Actions of rules before the
    /// `drop` stand.
    pub drop: bool,
    /// Indexes of the rules that matched, in order.
    pub matched: Vec<usize>,
    /// The highest salience among the rules that matched.
    pub salience: Option<f32>,
}

/// The compiled rules of one profile. Shared by every activation of the instance.
#[derive(Debug, Default)]
pub struct RuleSet {
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    when: Condition,
    plans: Vec<Plan>,
    salience: Option<f32>,
    stop: bool,
}

impl RuleSet {
    /// Compiles and checks rules.
    ///
    /// # Errors
    /// [`RuleError`] names the first rule that is wrong, the part of it, the position and what to write instead.
    pub fn compile(specs: &[RuleSpec]) -> Result<Self, RuleError> {
        if specs.len() > MAX_RULES {
            let reason = format!("a profile has at most {MAX_RULES} rules, this one has {}", specs.len());
            return Err(RuleError { rule: MAX_RULES, part: String::new(), column: None, reason });
        }
        let mut cost = 0_u64;
        let mut rules = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            let rule = Rule::compile(index, spec)?;
            cost = cost.saturating_add(rule.cost());
            if cost > MAX_RULES_COST {
                let reason = format!(
                    "the rules up to this one may take {cost} steps for one stimulus, the limit is {MAX_RULES_COST}; \
                     iterate over less, or not within an iteration"
                );
                return Err(RuleError { rule: index, part: String::new(), column: None, reason });
            }
            rules.push(rule);
        }
        Ok(Self { rules })
    }

    /// Number of rules.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Tries the rules in order.
    ///
    /// # Errors
    /// [`EvaluationError`] when an action of a matching rule cannot be finished, or the rules together decide more than a
    /// turn may.
    pub fn evaluate(&self, facts: &Facts<'_>) -> Result<Verdict, EvaluationError> {
        let mut verdict = Verdict::default();
        let channel = facts.stimulus.channel.as_str();
        let mut candidates = self.rules.iter().enumerate().filter(|(_, rule)| rule.when.admits(channel)).peekable();
        if candidates.peek().is_none() {
            return Ok(verdict);
        }
        let scene = Scene::new(*facts);
        let scope = Scope::of(&scene);
        for (index, rule) in candidates {
            if !rule.when.holds(&scope) {
                continue;
            }
            verdict.matched.push(index);
            if let Some(salience) = rule.salience {
                verdict.salience = Some(verdict.salience.map_or(salience, |highest| highest.max(salience)));
            }
            rule.perform(index, &scope, facts, &mut verdict)?;
            if rule.stop || verdict.drop {
                break;
            }
        }
        Ok(verdict)
    }
}

impl Rule {
    fn compile(index: usize, spec: &RuleSpec) -> Result<Self, RuleError> {
        let refuse = |part: String, reason: String| RuleError { rule: index, part, column: None, reason };
        let when = Condition::compile(&spec.when)
            .map_err(|flaw| place(index, String::from("when"), flaw, Some(spec.when.as_str())))?;
        if spec.actions.len() > MAX_ACTIONS_PER_RULE {
            let reason =
                format!("a rule has at most {MAX_ACTIONS_PER_RULE} actions, this one has {}", spec.actions.len());
            return Err(refuse(String::from("do"), reason));
        }
        if let Some(salience) = spec.salience
            && !(0.0..=1.0).contains(&salience)
        {
            return Err(refuse(String::from("salience"), String::from("salience lies between 0 and 1")));
        }
        let mut plans = Vec::with_capacity(spec.actions.len());
        for (at, source) in spec.actions.iter().enumerate() {
            plans.push(Plan::compile(source).map_err(|misfit| locate(index, at, source, misfit))?);
        }
        Ok(Self { when, plans, salience: spec.salience, stop: spec.stop })
    }

    fn cost(&self) -> u64 {
        self.plans.iter().fold(self.when.cost, |cost, plan| cost.saturating_add(plan.cost()))
    }

    fn perform(
        &self,
        index: usize,
        scope: &Scope<'_>,
        facts: &Facts<'_>,
        verdict: &mut Verdict,
    ) -> Result<(), EvaluationError> {
        verdict.actions.reserve(self.plans.len());
        for (at, plan) in self.plans.iter().enumerate() {
            let failed =
                |part: &str, reason| EvaluationError { rule: index, action: at, part: part.to_owned(), reason };
            match plan {
                Plan::Think => verdict.think = true,
                Plan::Drop => {
                    verdict.drop = true;
                    return Ok(());
                }
                Plan::Act(deed) => {
                    if verdict.actions.len() >= MAX_EFFECTS_PER_TURN {
                        let reason = format!("a turn decides at most {MAX_EFFECTS_PER_TURN} actions");
                        return Err(failed("", reason));
                    }
                    let action = deed.perform(scope, facts.now).map_err(|(part, reason)| failed(part, reason))?;
                    verdict.actions.push(action);
                }
            }
        }
        Ok(())
    }
}

/// An action's misfit as an error: `do[2].publish.channel`.
fn locate(rule: usize, action: usize, source: &Value, (part, flaw): Misfit) -> RuleError {
    let text = source_text(source, &part);
    let dot = if part.is_empty() { "" } else { "." };
    place(rule, format!("do[{action}]{dot}{part}"), flaw, text)
}

/// The text of an action's part, when that part is a text in which a position means something.
fn source_text<'v>(source: &'v Value, part: &str) -> Option<&'v str> {
    let mut value = source;
    for step in part.split(['.', '[']).filter(|step| !step.is_empty()).take(2) {
        value = value.get(step)?;
    }
    value.as_str().filter(|text| text.contains("{{"))
}

fn place(rule: usize, part: String, flaw: Flaw, text: Option<&str>) -> RuleError {
    let column = text.map(|_| flaw.at + 1);
    RuleError { rule, part, column, reason: flaw.reason }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::types::{
        Channel, EpisodeDraft, InstanceId, InstanceKey, Millis, RawJson, Reply, Source, StateDoc, Stimulus, StimulusId,
        TenantId,
    };

    /// 2026-11-21T05:10:53.120Z
    const NOW: Millis = Millis(1_795_237_853_120);

    fn rules(value: Value) -> Result<RuleSet, RuleError> {
        RuleSet::compile(&serde_json::from_value::<Vec<RuleSpec>>(value).unwrap())
    }

    fn refused(value: Value) -> String {
        rules(value).unwrap_err().to_string()
    }

    struct World {
        key: InstanceKey,
        stimulus: Stimulus,
        state: StateDoc,
    }

    impl World {
        fn new(channel: &str, data: Value) -> Self {
            let key = InstanceKey::new(TenantId::new("home").unwrap(), InstanceId::new("lamp").unwrap());
            let mut stimulus = Stimulus::empty(Source::Mqtt, Channel::new(channel).unwrap(), NOW);
            stimulus.id = StimulusId::new("s-1").unwrap();
            stimulus.data = Some(RawJson::of(&data));
            Self { key, stimulus, state: StateDoc::default() }
        }

        fn state(mut self, state: Value) -> Self {
            self.state.apply(&state).unwrap();
            self
        }

        fn judge(&self, rules: &RuleSet) -> Result<Verdict, EvaluationError> {
            let facts = Facts { key: &self.key, stimulus: &self.stimulus, state: &self.state, turn: 1, now: NOW };
            rules.evaluate(&facts)
        }

        fn replies(&self, text: &str) -> Result<String, EvaluationError> {
            let verdict = self.judge(&rules(json!([{"when": "true", "do": [{"reply": text}]}])).unwrap())?;
            match verdict.actions.as_slice() {
                [Action::Reply(Reply { content: Some(content), .. })] => Ok(content.clone()),
                other => panic!("one reply was due, not {other:?}"),
            }
        }

        fn holds(&self, when: &str) -> bool {
            !self.judge(&rules(json!([{"when": when}])).unwrap()).unwrap().matched.is_empty()
        }
    }

    #[test]
    fn the_rule_of_the_documentation_does_what_it_says() {
        let rules = rules(json!([{
            "when": "stimulus.channel == 'temperature' && stimulus.data.celsius > 30.0",
            "do": [{"set": {"reported.hot": true}}, {"publish": {"channel": "fan", "data": {"on": true}}},
                   {"reply": "fan on at {{stimulus.data.celsius}} C"}, {"remember": "it was hot"}],
            "salience": 0.2, "stop": true}, {"when": "true", "do": ["think"]}]))
        .unwrap();
        let verdict = World::new("temperature", json!({"celsius": 31.5})).judge(&rules).unwrap();
        assert_eq!(verdict.matched, [0]);
        assert_eq!(verdict.salience, Some(0.2));
        assert!(!verdict.think && !verdict.drop);
        assert_eq!(
            verdict.actions,
            [
                Action::Set(json!({"reported": {"hot": true}})),
                Action::Publish {
                    channel: Channel::new("fan").unwrap(),
                    content: None,
                    data: Some(RawJson::of(&json!({"on": true}))),
                    retain: false
                },
                Action::Reply(Reply { content: Some("fan on at 31.5 C".into()), data: None }),
                Action::Remember(EpisodeDraft {
                    content: "it was hot".into(),
                    data: None,
                    tags: vec![],
                    reward: None,
                    occurred_at: None
                }),
            ]
        );
        let cool = World::new("temperature", json!({"celsius": 30})).judge(&rules).unwrap();
        assert_eq!((cool.matched.as_slice(), cool.think), ([1].as_slice(), true));
        assert_eq!(World::new("humidity", json!({"celsius": 99})).judge(&rules).unwrap().matched, [1]);
    }

    #[test]
    fn a_counter_starts_at_nothing_and_counts_as_a_number() {
        for count in
            ["{{has(state.reported.count) ? state.reported.count + 1 : 1}}", "{{state.reported.?count.orValue(0) + 1}}"]
        {
            let rules = rules(json!([{"when": "true", "do": [{"set": {"reported.count": count}}]}])).unwrap();
            let mut world = World::new("any", json!({}));
            for expected in 1..=3 {
                let verdict = world.judge(&rules).unwrap();
                let [Action::Set(patch)] = verdict.actions.as_slice() else { panic!("{verdict:?}") };
                assert_eq!(*patch, json!({"reported": {"count": expected}}));
                world.state.apply(patch).unwrap();
            }
        }
    }

    #[test]
    fn an_action_that_lacks_a_value_fails_with_its_place() {
        let rules = rules(json!([{"when": "false"}, {"when": "true", "do": [{"reply": "x"},
            {"set": {"reported.count": "{{state.reported.count + 1}}"}}]}]))
        .unwrap();
        let error = World::new("any", json!({})).judge(&rules).unwrap_err();
        assert_eq!((error.rule, error.action, error.part.as_str()), (1, 1, "set"));
        assert!(error.to_string().contains("reflexes[1].do[1].set: No such key: count"), "{error}");
        assert_eq!(error.kind(), Kind::Invalid);
    }

    #[test]
    fn a_condition_that_fails_does_not_match() {
        let world = World::new("a", json!({"n": 1, "list": [1, 2], "text": "x"}));
        for when in [
            "stimulus.data.missing > 1",
            "stimulus.data.text > 1",
            "stimulus.data.n",
            "stimulus.content == 'x'",
            "stimulus.data.list[5] == 1",
            "1 / (stimulus.data.n - 1) == 1",
            "stimulus.channel == 'a' && stimulus.data.missing",
        ] {
            assert!(!world.holds(when), "{when}");
        }
        assert!(world.holds("stimulus.data.missing > 1 || stimulus.data.n == 1"), "CEL lets the other side decide");
    }

    #[test]
    fn everything_documented_is_visible() {
        let mut world = World::new(
            "room/light",
            json!({"on": true, "tags": ["a", "b"], "deep": {"x": {"y": 7}}, "big": 18_446_744_073_709_551_615_u64}),
        )
        .state(json!({"desired": {"on": true, "level": 3}, "reported": {"on": false, "level": 3}}));
        world.stimulus.sender = Some("bulb".into());
        world.stimulus.salience = Some(0.5);
        world.stimulus.content_type = Some("application/json".into());
        for when in [
            "stimulus.id == 's-1' && stimulus.source == 'mqtt' && stimulus.priority == 'device'",
            "stimulus.sender == 'bulb' && stimulus.salience == 0.5 && stimulus.content_type.startsWith('application/')",
            "stimulus.channel.startsWith('room/') && stimulus['channel'] == 'room/light'",
            "!has(stimulus.content) && has(stimulus.data) && has(stimulus.data.deep.x) && !has(stimulus.data.deep.z)",
            "stimulus.accepted_at <= now && now - stimulus.accepted_at < duration('1s')",
            "now == timestamp('2026-11-21T05:10:53.120Z') && now.getFullYear() == 2026",
            "instance.id == 'lamp' && instance.tenant == 'home'",
            "state.desired.on && !state.reported.on && state.delta == {'on': true} && size(state.delta) == 1",
            "{'on': true} == state.delta && !has(state.delta.level) && 'on' in state.delta",
            "stimulus.data.deep.x.y == 7 && stimulus.data.deep['x'].y == 7 && stimulus.data['deep'] == {'x': {'y': 7}}",
            "'a' in stimulus.data.tags && stimulus.data.tags[1] == 'b' && ['a', 'b'] == stimulus.data.tags",
            "stimulus.data.tags.exists(t, t == 'b') && stimulus.data.tags.map(t, t) == ['a', 'b']",
            "size(stimulus.data.tags) == 2 && stimulus.data.exists(k, k == 'on') && stimulus.data.big > 1u",
            "stimulus.data.tags + ['c'] == ['a', 'b', 'c'] && ['z'] + stimulus.data.tags == ['z', 'a', 'b']",
            "type(stimulus.data.tags) == list && type(stimulus.data) == map && type(stimulus.channel) == string",
        ] {
            assert!(world.holds(when), "{when}");
        }
    }

    #[test]
    fn templates_write_texts_and_typed_values() {
        let world =
            World::new("t", json!({"c": 31.0, "n": 2, "s": "é", "list": [1, {"a": null}], "flag": true, "none": null}));
        assert_eq!(world.replies("{{stimulus.data.c}}/{{stimulus.data.n}}/{{stimulus.data.s}}").unwrap(), "31/2/é");
        assert_eq!(
            world.replies("{{stimulus.data.list}} {{stimulus.data.flag}} {{stimulus.data.none}}").unwrap(),
            "[1,{\"a\":null}] true null"
        );
        assert_eq!(world.replies("{{now}} {{'{{'}}").unwrap(), "2026-11-21T05:10:53.120Z {{");
        let rules = rules(json!([{"when": "true", "do": [{"reply": {"data": {
            "copy": "{{stimulus.data.list}}", "text": "n={{stimulus.data.n}}", "number": "{{stimulus.data.n * 2}}",
            "delta": "{{state.delta}}", "fixed": [1, "x"]}}}]}]))
        .unwrap();
        let verdict = world.state(json!({"desired": {"a": 1}})).judge(&rules).unwrap();
        let [Action::Reply(Reply { data: Some(data), .. })] = verdict.actions.as_slice() else { panic!("{verdict:?}") };
        assert_eq!(
            data.value(),
            json!({"copy": [1, {"a": null}], "text": "n=2", "number": 4, "delta": {"a": 1}, "fixed": [1, "x"]})
        );
    }

    #[test]
    fn every_action_is_carried_out() {
        let rules = rules(json!([{"when": "stimulus.channel == 'go'", "do": [
            {"publish": {"channel": "out/{{stimulus.data.room}}", "content": "hi", "retain": true}},
            {"send": {"instance": "{{stimulus.data.peer}}", "channel": "greet", "content": "from {{instance.id}}"}},
            {"set": {"reported.a.b": 1, "reported.a.c": "{{stimulus.data.room}}", "desired.x": null}},
            {"remember": {"content": "c {{stimulus.data.room}}", "data": {"r": "{{stimulus.data.room}}"}, "tags": ["t", "{{stimulus.data.room}}"], "reward": 0.5}},
            {"remind": {"in": "5m", "content": "check"}},
            {"remind": {"at": "{{now + duration('1h')}}", "data": {"k": 1}}},
            {"webhook": {"url": "https://example.com/{{instance.id}}", "body": {"id": "{{stimulus.id}}"}}}]}]))
        .unwrap();
        let verdict = World::new("go", json!({"room": "attic", "peer": "other"})).judge(&rules).unwrap();
        let raw = |value: Value| RawJson::of(&value);
        assert_eq!(
            verdict.actions,
            [
                Action::Publish {
                    channel: Channel::new("out/attic").unwrap(),
                    content: Some("hi".into()),
                    data: None,
                    retain: true
                },
                Action::Send {
                    instance: InstanceId::new("other").unwrap(),
                    channel: Channel::new("greet").unwrap(),
                    content: Some("from lamp".into()),
                    data: None
                },
                Action::Set(json!({"reported": {"a": {"b": 1, "c": "attic"}}, "desired": {"x": null}})),
                Action::Remember(EpisodeDraft {
                    content: "c attic".into(),
                    data: Some(raw(json!({"r": "attic"}))),
                    tags: vec!["t".into(), "attic".into()],
                    reward: Some(0.5),
                    occurred_at: None
                }),
                Action::Remind { due: NOW.plus(300_000), content: Some("check".into()), data: None },
                Action::Remind { due: NOW.plus(3_600_000), content: None, data: Some(raw(json!({"k": 1}))) },
                Action::Webhook { url: "https://example.com/lamp".into(), body: raw(json!({"id": "s-1"})) },
            ]
        );
    }

    #[test]
    fn stop_drop_and_think_steer_what_follows() {
        let set = rules(json!([
            {"when": "true", "do": [{"reply": "a"}], "salience": 0.9},
            {"when": "stimulus.data.n == 1", "do": [{"reply": "b"}, {"think": true}], "stop": true, "salience": 0.1},
            {"when": "stimulus.data.n == 2", "do": [{"drop": true}, {"reply": "never"}]},
            {"when": "true", "do": [{"reply": "last"}]}]))
        .unwrap();
        let judge = |n: i64| World::new("x", json!({"n": n})).judge(&set).unwrap();
        let one = judge(1);
        assert_eq!(
            (one.matched.as_slice(), one.actions.len(), one.think, one.salience),
            ([0, 1].as_slice(), 2, true, Some(0.9))
        );
        let two = judge(2);
        assert_eq!((two.matched.as_slice(), two.actions.len(), two.drop), ([0, 2].as_slice(), 1, true));
        assert_eq!(judge(3).matched, [0, 3]);
    }

    #[test]
    fn a_wrong_rule_is_refused_with_its_place() {
        let one = |action: Value| refused(json!([{"when": "true"}, {"when": "true", "do": ["think", action]}]));
        for (message, expected) in [
            (refused(json!([{"when": "stimulus.x == 1"}])), "reflexes[0].when, character 9: 'stimulus' has no 'x'"),
            (one(json!({"reply": "at {{stimulus.data.}}"})), "reflexes[1].do[1].reply, character 20"),
            (one(json!({"reply": "at {{now"})), "reflexes[1].do[1].reply, character 4: this '{{' has no '}}'"),
            (one(json!({"reply": {"contents": "x"}})), "reflexes[1].do[1].reply.contents: unknown field"),
            (one(json!({"reply": {}})), "reflexes[1].do[1].reply: needs content or data"),
            (one(json!({"shout": "x"})), "reflexes[1].do[1].shout: there is no action 'shout'"),
            (one(json!({"reply": "x", "set": {}})), "reflexes[1].do[1]: an action has exactly one"),
            (
                one(json!({"publish": {"channel": "a/+", "content": "x"}})),
                "reflexes[1].do[1].publish.channel: a channel",
            ),
            (one(json!({"publish": {"content": "x"}})), "reflexes[1].do[1].publish.channel: is missing"),
            (
                one(json!({"publish": {"channel": "{{oops}}", "content": "x"}})),
                "publish.channel, character 3: there is no 'oops'",
            ),
            (
                one(json!({"send": {"instance": "a b", "channel": "c", "data": 1}})),
                "reflexes[1].do[1].send.instance: ' '",
            ),
            (one(json!({"set": {"hot": true}})), "reflexes[1].do[1].set['hot']: a path begins with"),
            (one(json!({"set": {"reported": 3}})), "reflexes[1].do[1].set['reported']: the whole"),
            (
                one(json!({"remind": {"in": "soon", "content": "x"}})),
                "reflexes[1].do[1].remind.in: 'soon' is no duration",
            ),
            (one(json!({"remind": {"content": "x"}})), "reflexes[1].do[1].remind: needs either"),
            (
                one(json!({"webhook": {"url": "{{stimulus.data.url}}"}})),
                "reflexes[1].do[1].webhook.url, character 1: must begin",
            ),
            (refused(json!([{"when": "true", "salience": 2}])), "reflexes[0].salience: salience lies"),
            (
                refused(json!([{"when": "stimulus.data.all(x, x.all(y, y > 1))"}])),
                "reflexes[0]: the rules up to this one",
            ),
        ] {
            assert!(message.contains(expected), "{message}\n  should contain {expected}");
        }
        let many: Vec<Value> = (0..=MAX_RULES).map(|_| json!({"when": "true"})).collect();
        assert!(refused(Value::Array(many)).contains("at most 256 rules"));
        let long: Vec<Value> = (0..=MAX_ACTIONS_PER_RULE).map(|_| json!("think")).collect();
        assert!(refused(json!([{"when": "true", "do": long}])).contains("reflexes[0].do: a rule has at most 32"));
    }

    #[test]
    fn what_is_too_long_to_iterate_can_still_be_measured_and_copied() {
        let long: Vec<i64> = (0..2000).collect();
        let world = World::new("x", json!({"long": long}));
        assert!(!world.holds("stimulus.data.long.exists(x, x == 1)"), "iteration is refused");
        assert!(!world.holds("size(stimulus.data.long + [1]) > 0"), "and so is making it longer");
        assert!(
            world.holds(
                "size(stimulus.data.long) == 2000 && stimulus.data.long[1999] == 1999 && 7 in stimulus.data.long"
            )
        );
        assert!(world.replies("{{stimulus.data.long}}").unwrap().ends_with("1998,1999]"));
    }

    #[test]
    fn a_turn_decides_a_bounded_number_of_actions_and_text() {
        let replies: Vec<Value> = (0..MAX_ACTIONS_PER_RULE).map(|_| json!({"reply": "x"})).collect();
        let set = rules(json!([{"when": "true", "do": replies}, {"when": "true", "do": replies}, {"when": "true", "do": [{"reply": "x"}]}])).unwrap();
        let error = World::new("x", json!(1)).judge(&set).unwrap_err();
        assert_eq!((error.rule, error.action), (2, 0), "{error}");
        let mut world = World::new("x", json!(1));
        world.stimulus.content = Some("x".repeat(200_000));
        assert!(world.replies("{{stimulus.content}}").is_ok());
        assert!(world.replies("{{stimulus.content}}{{stimulus.content}}").is_err());
    }

    /// Expressions that parse, over values at the borders of their types.
    fn expression() -> impl proptest::strategy::Strategy<Value = String> {
        use proptest::{prelude::*, sample::select};
        let atom = select(vec![
            "9223372036854775807",
            "-9223372036854775807",
            "0",
            "18446744073709551615u",
            "1.0",
            "0.0",
            "1e308",
            "true",
            "null",
            "'é\u{1f600}'",
            "b'\\xff'",
            "[]",
            "[1, 'a', null]",
            "{'a': [1]}",
            "now",
            "duration('9223372036s')",
            "duration('-1ns')",
            "timestamp('9999-12-31T23:59:59.999Z')",
            "timestamp('0001-01-01T00:00:00Z')",
            "stimulus",
            "stimulus.data",
            "stimulus.data.list",
            "stimulus.data.deep.x",
            "stimulus.data.text",
            "state",
            "state.delta",
            "state.reported.?none",
            "instance.id",
            "optional.none()",
            "int",
            "stimulus.data.big",
            "stimulus.data.half",
        ]);
        atom.prop_map(str::to_owned).prop_recursive(4, 24, 3, |inner| {
            let operator = select(vec!["+", "-", "*", "/", "%", "<", ">=", "==", "!=", "in", "&&", "||"]);
            let function = select(vec![
                "int",
                "uint",
                "double",
                "string",
                "bytes",
                "size",
                "type",
                "bool",
                "duration",
                "timestamp",
                "!",
                "-",
            ]);
            let method = select(vec![
                ".size()",
                ".a",
                ".?a",
                "[0]",
                "['a']",
                "[-1]",
                ".getFullYear()",
                ".getHours('Europe/Berlin')",
                ".getMilliseconds('no/zone')",
                ".orValue(1)",
                ".hasValue()",
                ".value()",
                ".contains('a')",
                ".startsWith(now)",
                ".map(v, v)",
                ".filter(v, v == v)",
                ".all(v, v > 0)",
                ".exists(v, v == 1)",
                ".exists_one(v, true)",
            ]);
            prop_oneof![
                (inner.clone(), operator, inner.clone()).prop_map(|(a, o, b)| format!("({a} {o} {b})")),
                (function, inner.clone()).prop_map(|(f, a)| format!("{f}({a})")),
                (inner.clone(), method).prop_map(|(a, m)| format!("({a}){m}")),
                (inner.clone(), inner.clone(), inner).prop_map(|(a, b, c)| format!("({a} ? {b} : {c})")),
            ]
        })
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(2000))]
        #[test]
        fn no_expression_panics_or_runs_away(source in expression()) {
            let world = World::new("x", json!({"list": [1, [2], {"a": 1}], "deep": {"x": {"y": 7}}, "text": "t", "half": 0.5,
                "big": 18_446_744_073_709_551_615_u64}))
            .state(json!({"desired": {"on": true}, "reported": {"n": 1}}));
            let begun = std::time::Instant::now();
            let piece = format!("{{{{{source}}}}}");
            for rule in [
                json!({"when": source}),
                json!({"when": "true", "do": [{"reply": format!("{piece} and")}]}),
                json!({"when": "true", "do": [{"set": {"reported.x": piece}}]}),
            ] {
                if let Ok(set) = rules(json!([rule])) {
                    drop(world.judge(&set));
                }
            }
            proptest::prop_assert!(begun.elapsed() < std::time::Duration::from_secs(5));
        }
    }
}
