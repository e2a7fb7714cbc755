//! The port through which an engine uses tools, and two that need nothing: an empty one and a scripted one.
//!
//! Not here: the tools (`tools`, plugged in by `node`), their place in a turn's journal (`steps.rs`).
//! Invariants: a call always has a result the model can read, also when it fails; what a call wants done comes back as
//! actions and is done by the turn's commit, not by the call.
//! Tests: at the foot.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use serde_json::{Map, Value};

use super::Action;
use crate::types::{InstanceKey, Millis, Profile, RawJson, StateDoc, Stimulus, ToolResult, ToolSpec};

/// What a tool may see of the turn it is called in.
#[derive(Debug, Clone, Copy)]
pub struct Sight<'a> {
    /// Whose turn: tenant and instance, the partition of everything a tool touches.
    pub key: &'a InstanceKey,
    /// The profile in force.
    pub profile: &'a Profile,
    /// What the turn decides on.
    pub stimulus: &'a Stimulus,
    /// The state before the turn.
    pub state: &'a StateDoc,
    /// What the turn has decided so far, in order; nothing of it is committed.
    pub decided: &'a [Action],
    /// Now.
    pub now: Millis,
}

/// A call of a tool.
#[derive(Debug, Clone, Copy)]
pub struct Invocation<'a> {
    /// Which tool.
    pub name: &'a str,
    /// Its arguments: an object, not checked against the tool's schema.
    pub arguments: &'a Map<String, Value>,
    /// The same for every try of this call, and for no other: `STIMULUS.STEP`.
    pub key: &'a str,
    /// Longest time it may take. The caller waits no longer.
    pub deadline: Duration,
    /// What it may see.
    pub sight: Sight<'a>,
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outcome {
    /// For the model.
    pub result: ToolResult,
    /// For the turn's commit, in order.
    pub actions: Vec<Action>,
}

impl Outcome {
    /// A result without actions.
    pub fn of(result: ToolResult) -> Self {
        Self { result, actions: Vec::new() }
    }
}

/// The tools of a node. Implemented over `tools`.
#[async_trait]
pub trait Toolbox: std::fmt::Debug + Send + Sync {
    /// The tools an instance may use at present, without two of one name.
    async fn offered(&self, key: &InstanceKey, profile: &Profile) -> Vec<ToolSpec>;

    /// Calls one. An unknown tool, bad arguments, a refusal and a timeout are results, too. Dropping the future cancels the
    /// call; what it did outside may stand.
    async fn call(&self, call: Invocation<'_>) -> Outcome;
}

/// What is said of a tool that is not there.
pub fn unknown(name: &str) -> Outcome {
    Outcome::of(ToolResult::failure(format!("there is no tool '{name}'")))
}

/// No tools.
#[derive(Debug, Clone, Copy, Default)]
pub struct Empty;

#[async_trait]
impl Toolbox for Empty {
    async fn offered(&self, _: &InstanceKey, _: &Profile) -> Vec<ToolSpec> {
        Vec::new()
    }

    async fn call(&self, call: Invocation<'_>) -> Outcome {
        unknown(call.name)
    }
}

/// A call a [`Rehearsed`] toolbox was asked to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Heard {
    /// Which tool.
    pub name: String,
    /// Its arguments.
    pub arguments: Value,
    /// Its idempotency key.
    pub key: String,
}

/// Tools with fixed outcomes, which write down how they were called. For tests. Cheap to clone; clones share what they heard.
#[derive(Debug, Clone, Default)]
pub struct Rehearsed {
    tools: Arc<HashMap<String, (ToolSpec, Outcome)>>,
    heard: Arc<Mutex<Vec<Heard>>>,
}

impl Rehearsed {
    /// These tools, each with what every call of it yields.
    pub fn new(tools: impl IntoIterator<Item = (ToolSpec, Outcome)>) -> Self {
        let tools = tools.into_iter().map(|(spec, outcome)| (spec.name.clone(), (spec, outcome))).collect();
        Self { tools: Arc::new(tools), heard: Arc::default() }
    }

    /// A tool without arguments.
    pub fn tool(name: &str, repeatable: bool) -> ToolSpec {
        let parameters = RawJson::of(&serde_json::json!({"type": "object", "properties": {}}));
        ToolSpec { name: name.to_owned(), description: format!("does {name}"), parameters, repeatable }
    }

    /// The calls so far, in order.
    pub fn heard(&self) -> Vec<Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[async_trait]
impl Toolbox for Rehearsed {
    async fn offered(&self, _: &InstanceKey, _: &Profile) -> Vec<ToolSpec> {
        let mut offered: Vec<ToolSpec> = self.tools.values().map(|(spec, _)| spec.clone()).collect();
        offered.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        offered
    }

    async fn call(&self, call: Invocation<'_>) -> Outcome {
        let heard =
            Heard { name: call.name.to_owned(), arguments: call.arguments.clone().into(), key: call.key.to_owned() };
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).push(heard);
        self.tools.get(call.name).map_or_else(|| unknown(call.name), |(_, outcome)| outcome.clone())
    }
}

/// Tools that are a POST to a test's own server: `touch` may not be called twice, `look` may.
#[cfg(feature = "faults")]
#[derive(Debug)]
pub struct Outside {
    http: reqwest::Client,
    url: String,
}

#[cfg(feature = "faults")]
impl Outside {
    /// Below this address.
    pub fn new(url: &str) -> Self {
        Self { http: reqwest::Client::new(), url: url.trim_end_matches('/').to_owned() }
    }
}

#[cfg(feature = "faults")]
#[async_trait]
impl Toolbox for Outside {
    async fn offered(&self, _: &InstanceKey, _: &Profile) -> Vec<ToolSpec> {
        vec![Rehearsed::tool("touch", false), Rehearsed::tool("look", true)]
    }

    async fn call(&self, call: Invocation<'_>) -> Outcome {
        let url = format!("{}/{}", self.url, call.name);
        let sent = self.http.post(url).header("idempotency-key", call.key).json(call.arguments).send();
        let answer = async { sent.await?.error_for_status()?.text().await };
        Outcome::of(answer.await.map_or_else(|error| ToolResult::failure(error.to_string()), ToolResult::of))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{Channel, InstanceId, Source, TenantId};

    #[tokio::test]
    async fn a_rehearsed_tool_does_as_told_and_writes_down_the_call() {
        let key = InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap());
        let (profile, state) = (Profile::default(), StateDoc::default());
        let stimulus = Stimulus::text(Source::Http, Channel::new("chat").unwrap(), "hi", Millis(0));
        let sight =
            Sight { key: &key, profile: &profile, stimulus: &stimulus, state: &state, decided: &[], now: Millis(0) };
        let arguments = Map::from_iter([(String::from("n"), Value::from(1))]);
        let call = |name| Invocation { name, arguments: &arguments, key: "s.1", deadline: Duration::MAX, sight };
        let done = Outcome { result: ToolResult::of("done"), actions: vec![Action::Set(Value::Null)] };
        let tools = Rehearsed::new([(Rehearsed::tool("touch", false), done.clone())]);
        assert_eq!(tools.call(call("touch")).await, done);
        assert_eq!(
            tools.heard(),
            [Heard { name: "touch".into(), arguments: arguments.clone().into(), key: "s.1".into() }]
        );
        assert!(tools.call(call("look")).await.result.failed);
        assert!(Empty.offered(&key, &profile).await.is_empty() && Empty.call(call("touch")).await.result.failed);
    }
}
