//! The course of a turn that takes steps: what was answered, which tools were called and what came of it, from the journal
//! and since. Both engines that call tools go by it.
//!
//! Not here: asking a model (`llm`), reciting a script (`scripted`), committing steps (`instance`, behind
//! [`Progress::commit`]).
//! Invariants: a step is committed before the next begins; a tool that may not be called twice is called only after that
//! was committed, and never again when no result followed; the key of a call depends on the instance, the stimulus and the
//! call's place in the turn alone; the words streamed are the words of the reply.
//! Tests: `tests/it/steps.rs`.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde_json::{Map, Value};
use tokio::time::Instant;

use super::{
    Action, Error, Progress, Question, Thought,
    toolbox::{self, Invocation, Outcome, Sight},
};
use crate::types::{
    InstanceKey, Message, Reply, Speaker, Step, StimulusId, ToolCall, ToolResult, ToolSpec, Usage,
    limits::MAX_RESULT_BYTES, step::Answered,
};

/// What stands between the words of two answers of one turn.
const PARAGRAPH: &str = "\n\n";
/// Steps a call takes with the answer that follows it: an answer that calls, its result, and the last answer.
const STEPS_TO_CALL: u32 = 3;

/// How far a turn may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Most answers and results. The last answer is asked for without tools.
    pub steps: u32,
    /// Most tokens of all its model calls together; no further answer is asked for beyond it.
    pub tokens: u64,
}

/// An answer that called tools, and what came of it.
#[derive(Debug)]
struct Round {
    /// The number of its step.
    number: u32,
    answer: Answered,
    results: Vec<Option<ToolResult>>,
    /// The call that was about to be made, if nothing followed.
    calling: Option<usize>,
}

/// A turn under way.
#[derive(Debug)]
pub struct Course<'q> {
    question: &'q Question,
    begun: Instant,
    offered: Vec<ToolSpec>,
    /// What the model was told before its first answer.
    asked: Option<Vec<Message>>,
    /// The number of the next step.
    next: u32,
    rounds: Vec<Round>,
    actions: Vec<Action>,
}

impl<'q> Course<'q> {
    /// Takes up a turn where its journal ends.
    ///
    /// # Errors
    /// [`Error::Settings`] when the journal makes no sense.
    pub async fn resume(question: &'q Question) -> Result<Self, Error> {
        let offered = question.tools.offered(&question.key, &question.profile).await;
        let mut course = Self {
            question,
            begun: Instant::now(),
            offered,
            asked: None,
            next: 0,
            rounds: Vec::new(),
            actions: Vec::new(),
        };
        for step in &question.steps {
            course.take((**step).clone())?;
        }
        Ok(course)
    }

    /// A step that is committed.
    fn take(&mut self, step: Step) -> Result<(), Error> {
        let number = self.next;
        self.next += 1;
        let senseless = || Error::Settings(format!("step {number} of the journal does not follow the one before"));
        match step {
            Step::Asked(messages) => self.asked = Some(messages),
            Step::Answered(answer) => {
                let results = vec![None; answer.calls.len()];
                self.rounds.push(Round { number, answer, results, calling: None });
            }
            Step::Calling { call } => {
                self.rounds.last_mut().ok_or_else(senseless)?.calling = Some(call as usize);
            }
            Step::Returned { call, result, actions } => {
                let round = self.rounds.last_mut().ok_or_else(senseless)?;
                *round.results.get_mut(call as usize).ok_or_else(senseless)? = Some(result);
                round.calling = None;
                if !actions.is_empty() {
                    let actions: Vec<Action> = serde_json::from_str(&actions)
                        .map_err(|error| Error::Settings(format!("the actions of step {number}: {error}")))?;
                    self.actions.extend(actions);
                }
            }
        }
        Ok(())
    }

    async fn commit(&mut self, progress: &dyn Progress, steps: Vec<Step>) -> Result<(), Error> {
        progress.commit(steps.clone()).await?;
        steps.into_iter().try_for_each(|step| self.take(step))
    }

    /// Answers and results so far.
    fn taken(&self) -> u32 {
        let results = self.rounds.iter().flat_map(|round| &round.results).filter(|result| result.is_some()).count();
        u32::try_from(self.rounds.len() + results).unwrap_or(u32::MAX)
    }

    /// Answers so far.
    pub fn answers(&self) -> usize {
        self.rounds.len()
    }

    /// What the model was told before its first answer, if it answered.
    pub fn asked(&self) -> Option<&[Message]> {
        self.asked.as_deref()
    }

    /// The time that is left.
    pub fn left(&self) -> Duration {
        self.question.deadline.saturating_sub(self.begun.elapsed())
    }

    /// The tools the next answer may call: none when there is no step left for them.
    pub fn offered(&self) -> &[ToolSpec] {
        let room = self.taken().saturating_add(STEPS_TO_CALL) <= self.question.bounds.steps;
        if room { &self.offered } else { &[] }
    }

    /// What was answered and what came of the calls, as messages behind those the model was told first.
    pub fn messages(&self) -> Vec<Message> {
        let mut messages = Vec::new();
        for Round { answer, results, .. } in &self.rounds {
            messages.push(Message {
                calls: answer.calls.clone(),
                ..Message::said(Speaker::Assistant, answer.text.clone())
            });
            for (call, result) in answer.calls.iter().zip(results) {
                let content = result.as_ref().map_or("", |result| &result.content);
                messages.push(Message::result(&call.id, content));
            }
        }
        messages
    }

    /// Consumed so far.
    fn usage(&self) -> Usage {
        self.rounds.iter().fold(Usage::default(), |sum, round| sum.plus(round.answer.usage))
    }

    /// Whether another answer may be asked for.
    ///
    /// # Errors
    /// [`Error::Bounds`] when the turn has used up its tokens or steps.
    pub fn may_ask(&self) -> Result<(), Error> {
        let (bounds, usage) = (self.question.bounds, self.usage());
        let tokens = usage.input_tokens + usage.output_tokens;
        if tokens >= bounds.tokens {
            return Err(Error::Bounds(format!("{tokens} tokens in one turn, the limit is {}", bounds.tokens)));
        }
        if self.taken() > bounds.steps {
            return Err(Error::Bounds(format!("{} steps in one turn, the limit is {}", self.taken(), bounds.steps)));
        }
        Ok(())
    }

    /// Takes an answer that calls tools: it is committed, with what the model was told if it is the first.
    ///
    /// # Errors
    /// [`Error`] when it cannot be committed.
    pub async fn answered(&mut self, told: &[Message], answer: Answered, progress: &dyn Progress) -> Result<(), Error> {
        let asked = self.asked.is_none().then(|| Step::Asked(told.to_vec()));
        let steps = asked.into_iter().chain([Step::Answered(answer)]).collect();
        self.commit(progress, steps).await
    }

    /// Makes the calls of the last answer that have no result yet, one after the other, but those `outside` says are another's.
    ///
    /// # Errors
    /// [`Error`] when the time is over or a step cannot be committed.
    pub async fn call(&mut self, outside: impl Fn(&str) -> bool, progress: &dyn Progress) -> Result<(), Error> {
        while let Some((number, at, call, hidden)) = self.next_call(&outside) {
            let place = u32::try_from(at).unwrap_or(u32::MAX);
            let outcome = if hidden {
                Outcome::of(ToolResult::failure(
                    "unknown: the node stopped while this tool was at work. It was not called again, because it may \
                     already have had its effect.",
                ))
            } else if self.taken() >= self.question.bounds.steps.saturating_sub(1) {
                Outcome::of(ToolResult::failure("not called: the turn may take no more steps"))
            } else {
                self.make(number, place, &call, progress).await?
            };
            let mut result = outcome.result;
            cut(&mut result.content);
            let actions = match outcome.actions.as_slice() {
                [] => String::new(),
                actions => serde_json::to_string(actions).map_err(|error| Error::Settings(error.to_string()))?,
            };
            self.commit(progress, vec![Step::Returned { call: place, result, actions }]).await?;
        }
        Ok(())
    }

    /// The first call without a result: the step of its answer, its place there, and whether its outcome is hidden.
    fn next_call(&self, outside: &impl Fn(&str) -> bool) -> Option<(u32, usize, ToolCall, bool)> {
        let round = self.rounds.last()?;
        let open = |(at, call): &(usize, &ToolCall)| round.results[*at].is_none() && !outside(&call.name);
        let (at, call) = round.answer.calls.iter().enumerate().find(open)?;
        Some((round.number, at, call.clone(), round.calling == Some(at)))
    }

    async fn make(
        &mut self,
        number: u32,
        place: u32,
        call: &ToolCall,
        progress: &dyn Progress,
    ) -> Result<Outcome, Error> {
        let Some(spec) = self.offered.iter().find(|spec| spec.name == call.name) else {
            return Ok(toolbox::unknown(&call.name));
        };
        let arguments = match arguments(&call.arguments) {
            Ok(arguments) => arguments,
            Err(reason) => return Ok(Outcome::of(ToolResult::failure(reason))),
        };
        if !spec.repeatable {
            self.commit(progress, vec![Step::Calling { call: place }]).await?;
        }
        let question = self.question;
        let sight = Sight {
            key: &question.key,
            profile: &question.profile,
            stimulus: &question.stimulus,
            state: &question.state,
            decided: &self.actions,
            now: question.now,
        };
        let key = call_key(&question.key, &question.stimulus.id, number, place);
        let deadline = self.left();
        let made =
            question.tools.call(Invocation { name: &call.name, arguments: &arguments, key: &key, deadline, sight });
        tokio::time::timeout(deadline, made).await.map_err(|_| Error::Timeout(question.deadline))
    }

    /// Whether calls of the last answer are left to others.
    pub fn left_to_others(&self) -> Vec<ToolCall> {
        let Some(round) = self.rounds.last() else { return Vec::new() };
        let open = round.answer.calls.iter().zip(&round.results).filter(|(_, result)| result.is_none());
        open.map(|(call, _)| call.clone()).collect()
    }

    /// The turn's thought: all that was said, with the words of the last answer behind those before it.
    pub fn conclude(self, last: Option<Answered>) -> (Thought, Option<Reply>) {
        let steps = self.taken() + u32::from(last.is_some());
        let mut usage = self.usage();
        let mut said: Vec<String> = self.rounds.iter().map(|round| round.answer.text.clone()).collect();
        let mut model = self.rounds.last().and_then(|round| round.answer.model.clone());
        if let Some(last) = last {
            usage = usage.plus(last.usage);
            said.push(last.text);
            model = last.model.or(model);
        }
        said.retain(|text| !text.is_empty());
        let content = (!said.is_empty()).then(|| said.join(PARAGRAPH));
        let reply = content.map(|content| Reply { content: Some(content), data: None });
        (Thought { actions: self.actions, model, usage: Some(usage), steps }, reply)
    }

    /// Whether words were said before the next answer.
    pub fn has_spoken(&self) -> bool {
        self.rounds.iter().any(|round| !round.answer.text.is_empty())
    }
}

/// The same for every try of a call, and for no other. A digest, so that it fits into any header and tells nothing.
fn call_key(key: &InstanceKey, stimulus: &StimulusId, number: u32, place: u32) -> String {
    let text = format!("{}/{}/{stimulus}/{number}/{place}", key.tenant, key.instance);
    blake3::hash(text.as_bytes()).to_hex().chars().take(32).collect()
}

/// The arguments of a call; none at all are an empty object.
fn arguments(text: &str) -> Result<Map<String, Value>, String> {
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(arguments)) => Ok(arguments),
        Ok(_) => Err(String::from("not called: the arguments are not a JSON object")),
        Err(error) => Err(format!("not called: the arguments are not JSON: {error}")),
    }
}

/// Cuts a result that is longer than a model should read.
fn cut(content: &mut String) {
    if content.len() > MAX_RESULT_BYTES {
        let end = (0..=MAX_RESULT_BYTES).rev().find(|&at| content.is_char_boundary(at)).unwrap_or(0);
        content.truncate(end);
        content.push_str("\n[cut: the result is longer]");
    }
}

/// The words of answers that are committed, in the pieces in which they were streamed.
pub fn spoken(steps: &[Arc<Step>]) -> Vec<Arc<str>> {
    let mut words: Vec<Arc<str>> = Vec::new();
    for step in steps {
        let Step::Answered(Answered { text, pieces, .. }) = &**step else { continue };
        if text.is_empty() {
            continue;
        }
        if !words.is_empty() {
            words.push(Arc::from(PARAGRAPH));
        }
        let mut rest = text.as_str();
        for piece in pieces {
            let Some((piece, after)) = rest.split_at_checked(*piece as usize) else { break };
            words.push(Arc::from(piece));
            rest = after;
        }
        if !rest.is_empty() {
            words.push(Arc::from(rest));
        }
    }
    words
}

/// Passes the words of one answer on, apart from those before it, and remembers in which pieces.
pub struct Utterance<'p> {
    progress: &'p dyn Progress,
    apart: bool,
    pieces: Mutex<Vec<u32>>,
}

impl<'p> Utterance<'p> {
    /// The next answer's; `apart`: words were said before.
    pub fn new(progress: &'p dyn Progress, apart: bool) -> Self {
        Self { progress, apart, pieces: Mutex::default() }
    }

    /// In which pieces it was said.
    pub fn pieces(&self) -> Vec<u32> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait::async_trait]
impl Progress for Utterance<'_> {
    fn token(&self, text: &str) {
        let mut pieces = self.lock();
        if pieces.is_empty() && self.apart {
            self.progress.token(PARAGRAPH);
        }
        pieces.push(u32::try_from(text.len()).unwrap_or(u32::MAX));
        self.progress.token(text);
    }

    fn restart(&self) {
        self.lock().clear();
        self.progress.restart();
    }

    async fn commit(&self, steps: Vec<Step>) -> Result<(), Error> {
        self.progress.commit(steps).await
    }
}
