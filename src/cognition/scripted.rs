//! The `scripted` engine: a fixed answer after a fixed delay, for tests and load.
//!
//! `profile.script`: `{"reply": "…", "data": …, "delay_ms": 0, "tokens": 8, "fail_times": 0, "set": {"reported.x": 1}}`, all
//! optional. With a delay the answer's text is streamed in `tokens` even pieces over it; `fail_times` makes the first tries of
//! every stimulus fail as an unavailable provider would. `steps` come before that answer, each
//! `{"say": "…", "delay_ms": 0, "call": [{"tool": "NAME", "arguments": {}}]}`.
//! Invariants: deterministic; no delay means no waiting at all.
//! Tests: at the foot.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::time::{Instant, sleep_until};

use super::{
    Action, Engine, Error, Pace, Progress, Question, Thought,
    course::{Course, Utterance},
    reflex,
};
use crate::types::{
    InstanceKey, Profile, RawJson, Reply, StimulusId, ToolCall, Usage, limits::MAX_CALLS, step::Answered, words,
};

/// Longest delay, in milliseconds.
const MAX_DELAY_MS: u64 = 10 * 60 * 1000;
/// Most pieces of one answer.
const MAX_TOKENS: u32 = 10_000;
/// Most steps.
const MAX_LINES: usize = 1000;
/// Most failures before an answer.
const MAX_FAILURES: u32 = 100;
/// Most stimuli whose failures are counted at once; beyond it the counts begin anew.
const MAX_COUNTED: usize = 10_000;

/// What the engine is told to do.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Script {
    reply: Option<String>,
    data: Option<Value>,
    delay_ms: u64,
    tokens: Option<u32>,
    fail_times: u32,
    set: Map<String, Value>,
    steps: Vec<Line>,
}

/// One answer on the way to the last.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Line {
    say: String,
    delay_ms: u64,
    call: Vec<Call>,
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Call {
    tool: String,
    #[serde(default)]
    arguments: Map<String, Value>,
}

impl Line {
    /// The answer, whose calls are named after its place.
    fn answer(&self, place: usize, pieces: Vec<u32>) -> Answered {
        let call = |(at, call): (usize, &Call)| ToolCall {
            id: format!("call_{place}_{at}"),
            name: call.tool.clone(),
            arguments: Value::Object(call.arguments.clone()).to_string(),
        };
        let usage = Usage { input_tokens: 0, output_tokens: words::words(&self.say).count() as u64 };
        let calls = self.call.iter().enumerate().map(call).collect();
        Answered { text: self.say.clone(), pieces, calls, model: None, usage }
    }
}

impl Default for Script {
    fn default() -> Self {
        Self {
            reply: Some(String::from("ok")),
            data: None,
            delay_ms: 0,
            tokens: None,
            fail_times: 0,
            set: Map::new(),
            steps: Vec::new(),
        }
    }
}

impl Script {
    fn of(profile: &Profile) -> Result<Self, Error> {
        let Some(settings) = &profile.script else { return Ok(Self::default()) };
        let wrong = |reason: String| Error::Settings(format!("script: {reason}"));
        let script = Self::deserialize(settings).map_err(|error| wrong(error.to_string()))?;
        let over = |name: &str, most: u64| wrong(format!("{name} is at most {most}"));
        if script.delay_ms > MAX_DELAY_MS {
            return Err(over("delay_ms", MAX_DELAY_MS));
        }
        if script.tokens.is_some_and(|tokens| tokens > MAX_TOKENS) {
            return Err(over("tokens", u64::from(MAX_TOKENS)));
        }
        if script.steps.len() > MAX_LINES {
            return Err(over("the number of steps", MAX_LINES as u64));
        }
        if script.steps.iter().any(|line| line.delay_ms > MAX_DELAY_MS) {
            return Err(over("delay_ms", MAX_DELAY_MS));
        }
        if script.steps.iter().any(|line| line.call.is_empty() || line.call.len() > MAX_CALLS) {
            return Err(wrong(format!("a step calls 1 to {MAX_CALLS} tools")));
        }
        if script.fail_times > MAX_FAILURES {
            return Err(over("fail_times", u64::from(MAX_FAILURES)));
        }
        if !script.set.is_empty() {
            reflex::fixed_patch(&script.set).map_err(wrong)?;
        }
        Ok(script)
    }

    /// Pieces of the answer: as many as told, else one a word.
    fn tokens(&self) -> u32 {
        let reply = self.reply.as_deref().unwrap_or_default();
        let words = || u32::try_from(words::words(reply).count()).unwrap_or(MAX_TOKENS).clamp(1, MAX_TOKENS);
        self.tokens.unwrap_or_else(words)
    }

    fn thought(&self, question: &Question) -> Result<Thought, Error> {
        let mut actions = Vec::with_capacity(2);
        if !self.set.is_empty() {
            actions.push(Action::Set(reflex::fixed_patch(&self.set).map_err(Error::Settings)?));
        }
        if self.reply.is_some() || self.data.is_some() {
            let data = self.data.as_ref().map(RawJson::of);
            actions.push(Action::Reply(Reply { content: self.reply.clone(), data }));
        }
        let asked = question.stimulus.content.as_deref().map_or(0, |text| words::words(text).count());
        let usage = Usage { input_tokens: asked as u64, output_tokens: u64::from(self.tokens()) };
        Ok(Thought { actions, usage: Some(usage), steps: 1, ..Thought::default() })
    }
}

impl Script {
    /// The steps and the last answer together.
    fn conclude(&self, course: Course<'_>, last: Thought) -> Thought {
        let text = self.reply.clone().unwrap_or_default();
        let usage = last.usage.unwrap_or_default();
        let (mut thought, reply) = course.conclude(Some(Answered { text, usage, ..Answered::default() }));
        let own = last.actions.into_iter().filter(|action| !matches!(action, Action::Reply(_)));
        thought.actions.extend(own);
        let data = self.data.as_ref().map(RawJson::of);
        if reply.is_some() || data.is_some() {
            let content = reply.and_then(|reply| reply.content);
            thought.actions.push(Action::Reply(Reply { content, data }));
        }
        thought
    }
}

/// Does what the profile's script says.
#[derive(Debug, Default)]
pub struct Scripted {
    /// Failures so far of stimuli that still have to fail.
    failures: Mutex<HashMap<(InstanceKey, StimulusId), u32>>,
}

impl Scripted {
    /// Checks a profile's script.
    ///
    /// # Errors
    /// [`Error::Settings`] says what is wrong.
    pub(super) fn check(profile: &Profile) -> Result<(), Error> {
        Script::of(profile).map(drop)
    }

    /// Goes through the steps that are not behind the turn yet.
    async fn recite<'q>(lines: &[Line], question: &'q Question, progress: &dyn Progress) -> Result<Course<'q>, Error> {
        let mut course = Course::resume(question).await?;
        loop {
            course.call(|_| false, progress).await?;
            let place = course.answers();
            let Some(line) = lines.get(place) else { return Ok(course) };
            course.may_ask()?;
            let delay = Duration::from_millis(line.delay_ms);
            if delay > course.left() {
                sleep_until(Instant::now() + course.left()).await;
                return Err(Error::Timeout(question.deadline));
            }
            sleep_until(Instant::now() + delay).await;
            let utterance = Utterance::new(progress, course.has_spoken());
            if !line.say.is_empty() {
                utterance.token(&line.say);
            }
            course.answered(&[], line.answer(place, utterance.pieces()), &utterance).await?;
        }
    }

    /// Whether this try fails, counting it.
    fn fails(&self, question: &Question, times: u32) -> bool {
        if times == 0 {
            return false;
        }
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.len() >= MAX_COUNTED {
            failures.clear();
        }
        let id = (question.key.clone(), question.stimulus.id.clone());
        let count = failures.entry(id.clone()).or_insert(0);
        if *count < times {
            *count += 1;
            return true;
        }
        failures.remove(&id);
        false
    }
}

#[async_trait]
impl Engine for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn pace(&self, profile: &Profile) -> Pace {
        let field = |name| profile.script.as_ref().and_then(|script| script.get(name));
        let delays = field("delay_ms").and_then(Value::as_u64).is_some_and(|delay| delay > 0);
        let steps = field("steps").and_then(Value::as_array).is_some_and(|steps| !steps.is_empty());
        if delays || steps { Pace::Slow } else { Pace::Instant }
    }

    fn wants(&self, _: &Profile) -> (usize, usize) {
        (0, 0)
    }

    async fn think(&self, question: Question, progress: &dyn Progress) -> Result<Thought, Error> {
        let script = Script::of(&question.profile)?;
        let delay = Duration::from_millis(script.delay_ms);
        if delay > question.deadline {
            sleep_until(Instant::now() + question.deadline).await;
            return Err(Error::Timeout(question.deadline));
        }
        if self.fails(&question, script.fail_times) {
            return Err(Error::Unavailable(String::from("the script says so")));
        }
        let course = match script.steps.as_slice() {
            [] => None,
            lines => Some(Self::recite(lines, &question, progress).await?),
        };
        let apart = course.as_ref().is_some_and(Course::has_spoken);
        let progress = &Utterance::new(progress, apart);
        if !delay.is_zero() {
            let begun = Instant::now();
            let tokens = script.tokens().max(1);
            for (index, piece) in pieces(script.reply.as_deref().unwrap_or_default(), tokens).enumerate() {
                let part = u32::try_from(index + 1).unwrap_or(tokens);
                sleep_until(begun + delay * part / tokens).await;
                if !piece.is_empty() {
                    progress.token(piece);
                }
            }
        }
        let thought = script.thought(&question)?;
        Ok(match course {
            None => thought,
            Some(course) => script.conclude(course, thought),
        })
    }
}

/// A text in so many pieces of nearly equal length, cut between characters; some are empty when there are more pieces than
/// characters.
fn pieces(text: &str, count: u32) -> impl Iterator<Item = &str> {
    let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let characters = ends.len() - 1;
    let end = move |index: u32| ends[characters * index as usize / count as usize];
    (0..count).map(move |index| &text[end(index)..end(index + 1)])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::json;

    use super::*;
    use crate::types::{Channel, InstanceId, Millis, Source, StateDoc, Stimulus, TenantId};

    #[derive(Default)]
    struct Heard(Mutex<Vec<(Instant, String)>>);

    impl Progress for Heard {
        fn token(&self, text: &str) {
            self.0.lock().unwrap().push((Instant::now(), text.to_owned()));
        }
        fn restart(&self) {
            self.0.lock().unwrap().clear();
        }
    }

    fn question(script: Option<Value>) -> Question {
        let channel = Channel::new("chat").unwrap();
        Question {
            key: InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap()),
            profile: Arc::new(Profile { script, ..Profile::default() }),
            stimulus: Arc::new(Stimulus::text(Source::Http, channel, "two words", Millis(0))),
            state: StateDoc::default(),
            recollection: vec![],
            recent: vec![],
            now: Millis(0),
            deadline: Duration::from_secs(60),
            tools: Arc::new(crate::cognition::toolbox::Empty),
            steps: Vec::new(),
            bounds: crate::cognition::Bounds { steps: 100, tokens: 1_000_000 },
        }
    }

    #[tokio::test]
    async fn the_answer_is_streamed_evenly_over_the_delay() {
        let script = json!({"reply": "abcdé", "delay_ms": 50, "tokens": 5, "set": {"reported.n": 1}});
        let heard = Heard::default();
        let asked = question(Some(script));
        assert_eq!(Scripted::default().pace(&asked.profile), Pace::Slow);
        let begun = Instant::now();
        let thought = Scripted::default().think(asked, &heard).await.unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(50));
        let heard = heard.0.lock().unwrap();
        assert_eq!(heard.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>(), ["a", "b", "c", "d", "é"]);
        for (index, (at, _)) in heard.iter().enumerate() {
            let due = Duration::from_millis(10 * (index as u64 + 1));
            assert!(*at - begun >= due, "piece {index} came before {due:?}");
        }
        assert_eq!(thought.usage, Some(Usage { input_tokens: 2, output_tokens: 5 }));
        assert_eq!(thought.actions[0], Action::Set(json!({"reported": {"n": 1}})));
        assert_eq!(thought.actions[1], Action::Reply(Reply { content: Some("abcdé".into()), data: None }));
    }

    #[tokio::test]
    async fn without_a_delay_nothing_waits_and_nothing_is_streamed() {
        let (engine, heard) = (Scripted::default(), Heard::default());
        let mut thinking = engine.think(question(None), &heard);
        let std::task::Poll::Ready(thought) = futures_util::poll!(&mut thinking) else { panic!("it must not wait") };
        assert_eq!(heard.0.lock().unwrap().len(), 0);
        assert_eq!(thought.unwrap().actions, [Action::Reply(Reply { content: Some("ok".into()), data: None })]);
        assert_eq!(Scripted::default().pace(&Profile::default()), Pace::Instant);
    }

    #[tokio::test]
    async fn it_fails_as_often_as_told_for_each_stimulus() {
        let engine = Scripted::default();
        let asked = question(Some(json!({"fail_times": 2})));
        for _ in 0..2 {
            assert!(matches!(engine.think(asked.clone(), &Heard::default()).await, Err(Error::Unavailable(_))));
        }
        assert!(engine.think(asked, &Heard::default()).await.is_ok());
        assert!(engine.failures.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_delay_beyond_the_deadline_times_out() {
        let mut asked = question(Some(json!({"delay_ms": 5000})));
        asked.deadline = Duration::from_millis(10);
        assert!(matches!(Scripted::default().think(asked, &Heard::default()).await, Err(Error::Timeout(_))));
    }

    #[test]
    fn wrong_settings_are_refused() {
        for (script, reason) in [
            (json!({"replly": "x"}), "unknown field `replly`"),
            (json!({"delay_ms": -1}), "invalid value"),
            (json!({"delay_ms": 600_001}), "delay_ms is at most 600000"),
            (json!({"tokens": 10_001}), "tokens is at most"),
            (json!({"fail_times": 101}), "fail_times is at most"),
            (json!({"set": {"x": 1}}), "a path begins with"),
            (json!("ok"), "invalid type"),
        ] {
            let error =
                Scripted::check(&Profile { script: Some(script), ..Profile::default() }).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn pieces_put_together_are_the_text(text in ".{0,40}", count in 1_u32..60) {
            let cut: Vec<&str> = pieces(&text, count).collect();
            proptest::prop_assert_eq!(cut.len(), count as usize);
            proptest::prop_assert_eq!(cut.concat(), text);
        }
    }
}
