//! The course of a turn that takes steps: what was answered, which tools were called and what came of it, from the journal
//! and since. Both engines that call tools go by it.
//!
//! Not here: asking a model (`llm`), reciting a script (`scripted`), committing steps (`instance`, behind
//! [`Progress::commit`]).
//! Invariants: an answer is committed before its tools are called, and their results before the next is asked for; a tool that may not
//! be called twice is called only after that was committed, and never again when no result followed; results and what they want done
//! stand in the order of the calls, whichever came first; the key of a call depends on the instance, the stimulus and the
//! call's place in the turn alone; the words streamed are the words of the reply.
//! Tests: `tests/it/steps.rs`.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};
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
/// Most calls of one answer that are made at the same time. A kill hides the outcome of no more of them.
const SIDE_BY_SIDE: usize = 8;
/// What the model is told of a call that nothing is known of.
const UNKNOWN: &str = "unknown: the node stopped while this tool was at work. It was not called again, because it may already have had \
                       its effect.";

/// How far a turn may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Most answers and results. The last answer is asked for without tools.
    pub steps: u32,
    /// Most tokens of all its model calls together; no further answer is asked for beyond it.
    pub tokens: u64,
}

/// What came of a call.
#[derive(Debug, Clone)]
struct Returned {
    result: ToolResult,
    actions: Vec<Action>,
}

/// An answer that called tools, and what came of it.
#[derive(Debug)]
struct Round {
    /// The number of its step.
    number: u32,
    answer: Answered,
    results: Vec<Option<Returned>>,
    /// The calls that were about to be made, and that nothing followed.
    calling: BTreeSet<usize>,
}

/// The committed steps of a turn.
#[derive(Debug, Default)]
struct Taken {
    /// What the model was told before its first answer.
    asked: Option<Vec<Message>>,
    /// The number of the next step.
    next: u32,
    rounds: Vec<Round>,
}

impl Taken {
    fn take(&mut self, step: Step) -> Result<(), Error> {
        let number = self.next;
        self.next += 1;
        let senseless = || Error::Settings(format!("step {number} of the journal does not follow the one before"));
        match step {
            Step::Asked(messages) => self.asked = Some(messages),
            Step::Answered(answer) => {
                let results = vec![None; answer.calls.len()];
                self.rounds.push(Round { number, answer, results, calling: BTreeSet::new() });
            }
            Step::Calling { call } => {
                self.rounds.last_mut().ok_or_else(senseless)?.calling.insert(call as usize);
            }
            Step::Returned { call, result, actions } => {
                let round = self.rounds.last_mut().ok_or_else(senseless)?;
                let place = round.results.get_mut(call as usize).ok_or_else(senseless)?;
                let actions = match actions.as_str() {
                    "" => Vec::new(),
                    actions => serde_json::from_str(actions)
                        .map_err(|error| Error::Settings(format!("the actions of step {number}: {error}")))?,
                };
                *place = Some(Returned { result, actions });
                round.calling.remove(&(call as usize));
            }
        }
        Ok(())
    }

    /// What came of calls, in their order, whichever returned first.
    fn returned(&self) -> impl Iterator<Item = &Returned> {
        self.rounds.iter().flat_map(|round| &round.results).flatten()
    }

    fn actions(&self) -> Vec<Action> {
        self.returned().flat_map(|returned| returned.actions.iter().cloned()).collect()
    }

    /// Answers and results.
    fn count(&self) -> u32 {
        u32::try_from(self.rounds.len() + self.returned().count()).unwrap_or(u32::MAX)
    }

    fn usage(&self) -> Usage {
        self.rounds.iter().fold(Usage::default(), |sum, round| sum.plus(round.answer.usage))
    }

    fn model(&self) -> Option<String> {
        self.rounds.last().and_then(|round| round.answer.model.clone())
    }
}

/// A turn under way.
#[derive(Debug)]
pub struct Course<'q> {
    question: &'q Question,
    begun: Instant,
    offered: Vec<ToolSpec>,
    taken: Taken,
}

/// A call that has no result yet.
struct Open {
    /// The step of its answer.
    number: u32,
    place: u32,
    call: ToolCall,
    /// Whether it was under way when the node stopped.
    hidden: bool,
}

/// A call about to be made.
struct Due {
    place: u32,
    name: String,
    arguments: Map<String, Value>,
    key: String,
    repeatable: bool,
}

impl<'q> Course<'q> {
    /// Takes up a turn where its journal ends.
    ///
    /// # Errors
    /// [`Error::Settings`] when the journal makes no sense.
    pub async fn resume(question: &'q Question) -> Result<Self, Error> {
        let offered = question.tools.offered(&question.key, &question.profile).await;
        let mut taken = Taken::default();
        for step in &question.steps {
            taken.take((**step).clone())?;
        }
        Ok(Self { question, begun: Instant::now(), offered, taken })
    }

    async fn commit(&mut self, progress: &dyn Progress, steps: Vec<Step>) -> Result<(), Error> {
        if steps.is_empty() {
            return Ok(());
        }
        progress.commit(steps.clone()).await?;
        steps.into_iter().try_for_each(|step| self.taken.take(step))
    }

    /// Answers so far.
    pub fn answers(&self) -> usize {
        self.taken.rounds.len()
    }

    /// What the model was told before its first answer, if it answered.
    pub fn asked(&self) -> Option<&[Message]> {
        self.taken.asked.as_deref()
    }

    /// The time that is left.
    pub fn left(&self) -> Duration {
        self.question.deadline.saturating_sub(self.begun.elapsed())
    }

    /// The tools the next answer may call: none when there is no step left for them.
    pub fn offered(&self) -> &[ToolSpec] {
        let room = self.taken.count().saturating_add(STEPS_TO_CALL) <= self.question.bounds.steps;
        if room { &self.offered } else { &[] }
    }

    /// What was answered and what came of the calls, as messages behind those the model was told first.
    pub fn messages(&self) -> Vec<Message> {
        let mut messages = Vec::new();
        for Round { answer, results, .. } in &self.taken.rounds {
            messages.push(Message {
                calls: answer.calls.clone(),
                ..Message::said(Speaker::Assistant, answer.text.clone())
            });
            for (call, result) in answer.calls.iter().zip(results) {
                let content = result.as_ref().map_or("", |returned| &returned.result.content);
                messages.push(Message::result(&call.id, content));
            }
        }
        messages
    }

    /// Whether another answer may be asked for.
    ///
    /// # Errors
    /// [`Error::Bounds`] when the turn has used up its tokens or steps.
    pub fn may_ask(&self) -> Result<(), Error> {
        let (bounds, usage) = (self.question.bounds, self.taken.usage());
        let tokens = usage.input_tokens + usage.output_tokens;
        if tokens >= bounds.tokens {
            return Err(Error::Bounds(format!("{tokens} tokens in one turn, the limit is {}", bounds.tokens)));
        }
        let taken = self.taken.count();
        if taken > bounds.steps {
            return Err(Error::Bounds(format!("{taken} steps in one turn, the limit is {}", bounds.steps)));
        }
        Ok(())
    }

    /// Takes an answer that calls tools: it is committed, with what the model was told if it is the first.
    ///
    /// # Errors
    /// [`Error`] when it cannot be committed.
    pub async fn answered(&mut self, told: &[Message], answer: Answered, progress: &dyn Progress) -> Result<(), Error> {
        let asked = self.taken.asked.is_none().then(|| Step::Asked(told.to_vec()));
        let steps = asked.into_iter().chain([Step::Answered(answer)]).collect();
        self.commit(progress, steps).await
    }

    /// Makes the calls of the last answer that have no result yet, side by side, but those `outside` says are another's. Each
    /// result is committed as it comes.
    ///
    /// # Errors
    /// [`Error`] when the time is over or a step cannot be committed.
    pub async fn call(&mut self, outside: impl Fn(&str) -> bool, progress: &dyn Progress) -> Result<(), Error> {
        loop {
            let mut open = self.open(&outside);
            if open.is_empty() {
                return Ok(());
            }
            open.truncate(SIDE_BY_SIDE);
            self.make(open, progress).await?;
        }
    }

    /// The calls of the last answer that have no result.
    fn open(&self, outside: &impl Fn(&str) -> bool) -> Vec<Open> {
        let Some(round) = self.taken.rounds.last() else { return Vec::new() };
        let calls = (0..).zip(round.answer.calls.iter().zip(&round.results));
        let open = calls.filter(|(_, (call, result))| result.is_none() && !outside(&call.name));
        open.map(|(place, (call, _))| Open {
            number: round.number,
            place,
            call: call.clone(),
            hidden: round.calling.contains(&(place as usize)),
        })
        .collect()
    }

    /// A call as it is to be made, or what is said of one that is not.
    fn prepare(&self, open: Open) -> Result<Due, Outcome> {
        let refused = |reason: &str| Outcome::of(ToolResult::failure(reason));
        if open.hidden {
            return Err(refused(UNKNOWN));
        }
        let ToolCall { name, arguments: text, .. } = open.call;
        let Some(spec) = self.offered.iter().find(|spec| spec.name == name) else {
            return Err(toolbox::unknown(&name));
        };
        let arguments = arguments(&text).map_err(|reason| refused(&reason))?;
        let question = self.question;
        let key = call_key(&question.key, &question.stimulus.id, open.number, open.place);
        Ok(Due { place: open.place, name, arguments, key, repeatable: spec.repeatable })
    }

    /// Makes calls side by side. What may not be called twice is committed as being called before any of them begins.
    async fn make(&mut self, open: Vec<Open>, progress: &dyn Progress) -> Result<(), Error> {
        let (mut steps, mut due) = (Vec::new(), Vec::new());
        let room = self.question.bounds.steps.saturating_sub(1).saturating_sub(self.taken.count());
        for (at, open) in (0..).zip(open) {
            let place = open.place;
            let late = at >= room && !open.hidden;
            let too_many = || Outcome::of(ToolResult::failure("not called: the turn may take no more steps"));
            match if late { Err(too_many()) } else { self.prepare(open) } {
                Ok(call) => due.push(call),
                Err(outcome) => steps.push(returned(place, outcome)?),
            }
        }
        steps.extend(due.iter().filter(|call| !call.repeatable).map(|call| Step::Calling { call: call.place }));
        self.commit(progress, steps).await?;
        let (question, deadline, decided) = (self.question, self.left(), self.taken.actions());
        let sight = Sight {
            key: &question.key,
            profile: &question.profile,
            stimulus: &question.stimulus,
            state: &question.state,
            decided: &decided,
            now: question.now,
        };
        let mut made: FuturesUnordered<_> = due
            .iter()
            .map(|Due { place, name, arguments, key, .. }| async move {
                let call = question.tools.call(Invocation { name, arguments, key, deadline, sight });
                (*place, tokio::time::timeout(deadline, call).await)
            })
            .collect();
        while let Some(first) = made.next().await {
            // What is there already is committed with it, and also what others did before one was too late.
            let more = std::iter::from_fn(|| made.next().now_or_never().flatten());
            let (mut steps, mut late) = (Vec::new(), false);
            for (place, end) in std::iter::once(first).chain(more) {
                match end {
                    Ok(outcome) => steps.push(returned(place, outcome)?),
                    Err(_) => late = true,
                }
            }
            self.commit(progress, steps).await?;
            if late {
                return Err(Error::Timeout(question.deadline));
            }
        }
        Ok(())
    }

    /// Whether calls of the last answer are left to others.
    pub fn left_to_others(&self) -> Vec<ToolCall> {
        let Some(round) = self.taken.rounds.last() else { return Vec::new() };
        let open = round.answer.calls.iter().zip(&round.results).filter(|(_, result)| result.is_none());
        open.map(|(call, _)| call.clone()).collect()
    }

    /// The turn's thought: all that was said, with the words of the last answer behind those before it.
    pub fn conclude(self, last: Option<Answered>) -> (Thought, Option<Reply>) {
        let taken = self.taken;
        let steps = taken.count() + u32::from(last.is_some());
        let (mut usage, mut model) = (taken.usage(), taken.model());
        let mut said: Vec<String> = taken.rounds.iter().map(|round| round.answer.text.clone()).collect();
        if let Some(last) = last {
            usage = usage.plus(last.usage);
            said.push(last.text);
            model = last.model.or(model);
        }
        said.retain(|text| !text.is_empty());
        let content = (!said.is_empty()).then(|| said.join(PARAGRAPH));
        let reply = content.map(|content| Reply { content: Some(content), data: None });
        (Thought { actions: taken.actions(), model, usage: Some(usage), steps, cut: None }, reply)
    }

    /// Whether words were said before the next answer.
    pub fn has_spoken(&self) -> bool {
        self.taken.rounds.iter().any(|round| !round.answer.text.is_empty())
    }
}

/// What a turn that goes no further than its committed steps amounts to.
pub fn left_off(steps: &[Arc<Step>]) -> Thought {
    let taken = gone_through(steps);
    let usage = (!taken.rounds.is_empty()).then(|| taken.usage());
    Thought { actions: taken.actions(), model: taken.model(), usage, steps: taken.count(), cut: None }
}

/// Whether a tool that may not be called twice is at work.
pub fn is_at_work(steps: &[Arc<Step>]) -> bool {
    gone_through(steps).rounds.last().is_some_and(|round| !round.calling.is_empty())
}

/// What makes no sense in a journal is told to whoever resumes it.
fn gone_through(steps: &[Arc<Step>]) -> Taken {
    let mut taken = Taken::default();
    steps.iter().map_while(|step| taken.take((**step).clone()).ok()).for_each(drop);
    taken
}

/// The step of what came of a call.
fn returned(call: u32, outcome: Outcome) -> Result<Step, Error> {
    let Outcome { mut result, actions } = outcome;
    cut(&mut result.content);
    let actions = match actions.as_slice() {
        [] => String::new(),
        actions => serde_json::to_string(actions).map_err(|error| Error::Settings(error.to_string()))?,
    };
    Ok(Step::Returned { call, result, actions })
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
