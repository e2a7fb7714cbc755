//! What a caller is shown: turns, stimuli, instances, state. Inner types are not the API; these are.
//!
//! Owns: views that go out. Not here: bodies that come in (`wire.rs`), problems (`problem.rs`).
//! Invariant: a view borrows from what it shows; a turn is written once, into a buffer that seldom grows. Tests: at the foot.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Serialize;

use super::wire::ReplyToBody;
use crate::{
    store::DeadLetter,
    types::{
        Channel, Effect, EffectKind, InstanceId, Millis, Outcome, Priority, Profile, RawJson, Reply, Source, StateDoc,
        StateSnapshot, Stimulus, StimulusId, TurnRecord, Usage,
    },
};

/// A stimulus as it is shown.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Stimulus)]
pub struct StimulusView<'a> {
    #[schema(value_type = String)]
    id: &'a StimulusId,
    source: Source,
    #[schema(value_type = String)]
    channel: &'a Channel,
    #[serde(skip_serializing_if = "Option::is_none")]
    sender: Option<&'a str>,
    priority: Priority,
    #[serde(skip_serializing_if = "Option::is_none")]
    salience: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<serde_json::Value>)]
    data: Option<&'a RawJson>,
    /// MIME type of an MQTT payload.
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_to: Option<ReplyToBody>,
    #[schema(value_type = String, format = DateTime)]
    accepted_at: Millis,
}

impl<'a> From<&'a Stimulus> for StimulusView<'a> {
    fn from(stimulus: &'a Stimulus) -> Self {
        Self {
            id: &stimulus.id,
            source: stimulus.source,
            channel: &stimulus.channel,
            sender: stimulus.sender.as_deref(),
            priority: stimulus.priority,
            salience: stimulus.salience,
            content: stimulus.content.as_deref(),
            data: stimulus.data.as_ref(),
            content_type: stimulus.content_type.as_deref(),
            reply_to: stimulus.reply_to.as_ref().map(|to| ReplyToBody {
                topic: to.topic.clone(),
                correlation: to.correlation.as_ref().map(|bytes| BASE64_STANDARD.encode(bytes)),
            }),
            accepted_at: stimulus.accepted_at,
        }
    }
}

/// What the instance says.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Reply)]
pub struct ReplyView<'a> {
    content: Option<&'a str>,
    #[schema(value_type = Option<serde_json::Value>)]
    data: Option<&'a RawJson>,
}

impl<'a> From<&'a Reply> for ReplyView<'a> {
    fn from(reply: &'a Reply) -> Self {
        Self { content: reply.content.as_deref(), data: reply.data.as_ref() }
    }
}

/// What a turn asks of the world. `id` is unique within the instance, and the key of its delivery.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Effect)]
pub struct EffectView<'a> {
    id: String,
    #[serde(flatten)]
    what: WhatView<'a>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[schema(as = EffectKind)]
enum WhatView<'a> {
    /// The reply over MQTT.
    Reply {
        #[serde(skip_serializing_if = "Option::is_none")]
        topic: Option<&'a str>,
    },
    /// A message below `out/`.
    Publish {
        #[schema(value_type = String)]
        channel: &'a Channel,
        content: Option<&'a str>,
        #[schema(value_type = Option<serde_json::Value>)]
        data: Option<&'a RawJson>,
        retain: bool,
    },
    /// The twin changed.
    Twin { version: u64 },
    /// A stimulus for another instance.
    Send {
        #[schema(value_type = String)]
        instance: &'a InstanceId,
        #[schema(value_type = String)]
        channel: &'a Channel,
        content: Option<&'a str>,
        #[schema(value_type = Option<serde_json::Value>)]
        data: Option<&'a RawJson>,
    },
    /// A stimulus for itself, later.
    Remind {
        #[schema(value_type = String, format = DateTime)]
        due: Millis,
        content: Option<&'a str>,
        #[schema(value_type = Option<serde_json::Value>)]
        data: Option<&'a RawJson>,
    },
    /// An HTTP POST.
    Webhook {
        url: &'a str,
        #[schema(value_type = serde_json::Value)]
        body: &'a RawJson,
    },
}

impl<'a> EffectView<'a> {
    fn of(turn: u64, effect: &'a Effect) -> Self {
        let what = match &effect.kind {
            EffectKind::Reply { to } => WhatView::Reply { topic: to.as_ref().map(|to| &*to.topic) },
            EffectKind::Publish { channel, content, data, retain } => {
                WhatView::Publish { channel, content: content.as_deref(), data: data.as_ref(), retain: *retain }
            }
            EffectKind::Twin { version, .. } => WhatView::Twin { version: *version },
            EffectKind::Send { instance, channel, content, data } => {
                WhatView::Send { instance, channel, content: content.as_deref(), data: data.as_ref() }
            }
            EffectKind::Remind { due, content, data } => {
                WhatView::Remind { due: *due, content: content.as_deref(), data: data.as_ref() }
            }
            EffectKind::Webhook { url, body } => WhatView::Webhook { url, body },
        };
        Self { id: format!("{turn}-{}", effect.index), what }
    }
}

/// What a model call consumed.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Usage)]
pub struct UsageView {
    input_tokens: u64,
    output_tokens: u64,
}

/// A committed turn.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Turn)]
pub struct TurnView<'a> {
    /// Its number within the instance, from 1 without gaps.
    turn: u64,
    stimulus: StimulusView<'a>,
    /// Nothing when the outcome is `silent` or `failed`.
    reply: Option<ReplyView<'a>>,
    effects: Vec<EffectView<'a>>,
    /// Model and tool calls made.
    steps: u32,
    /// Who decided: `reflex`, `scripted` or `llm`; `merged` when it shared a thought, `attention` when none was worth it.
    engine: &'a str,
    /// The turn whose thought this one shared: that one has the answer, and what was decided with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    decided_with: Option<u64>,
    model: Option<&'a str>,
    usage: Option<UsageView>,
    #[schema(value_type = String, format = DateTime)]
    decided_at: Millis,
    /// State version after it.
    version: u64,
    outcome: Outcome,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    /// In histories that were asked for it, where nodes share a store: how often its shard had changed hands. It never falls
    /// from one turn to the next.
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<u64>,
}

impl<'a> TurnView<'a> {
    /// With what is not said unasked: the answer that a sender got for the same turn does not know it.
    pub fn with_epoch(turn: &'a TurnRecord) -> Self {
        Self { epoch: (turn.epoch > 0).then_some(turn.epoch), ..Self::from(turn) }
    }
}

impl<'a> From<&'a TurnRecord> for TurnView<'a> {
    fn from(turn: &'a TurnRecord) -> Self {
        let usage = |usage: Usage| UsageView { input_tokens: usage.input_tokens, output_tokens: usage.output_tokens };
        Self {
            turn: turn.turn,
            stimulus: (&turn.stimulus).into(),
            reply: turn.reply.as_ref().map(ReplyView::from),
            effects: turn.effects.iter().map(|effect| EffectView::of(turn.turn, effect)).collect(),
            steps: turn.steps,
            engine: turn.engine(),
            decided_with: turn.decided_with(),
            model: turn.model.as_deref(),
            usage: turn.usage.map(usage),
            decided_at: turn.decided_at,
            version: turn.version,
            outcome: turn.outcome,
            error: turn.error.as_deref(),
            epoch: None,
        }
    }
}

/// Where a stimulus stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Durable, waiting.
    Accepted,
    /// Being decided.
    Thinking,
    /// Decided.
    Decided,
    /// Given up; a dead letter.
    Dead,
}

/// A stimulus and what became of it.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = StimulusStatus)]
pub struct StatusView<'a> {
    /// Its id.
    #[schema(value_type = String)]
    pub id: &'a StimulusId,
    /// Whose.
    #[schema(value_type = String)]
    pub instance: &'a InstanceId,
    /// Where it stands.
    pub status: Status,
    /// When it was taken.
    #[schema(value_type = String, format = DateTime)]
    pub accepted_at: Millis,
    /// The turn, when it is decided and the answer has room for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turn: Option<TurnView<'a>>,
    /// Why it was given up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'a str>,
}

/// A stimulus that was given up.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = DeadLetter)]
pub struct DeadLetterView<'a> {
    stimulus: StimulusView<'a>,
    /// Why.
    reason: &'a str,
    /// How often it was tried.
    tries: u32,
    /// When it was given up.
    #[schema(value_type = String, format = DateTime)]
    at: Millis,
}

impl<'a> From<&'a DeadLetter> for DeadLetterView<'a> {
    fn from(dead: &'a DeadLetter) -> Self {
        Self { stimulus: (&dead.stimulus).into(), reason: &dead.reason, tries: dead.tries, at: dead.at }
    }
}

/// Whether an instance is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// In memory on its node.
    Active,
    /// In the store only.
    Cold,
}

/// An instance.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Instance)]
pub struct InstanceView<'a> {
    /// Its id.
    #[schema(value_type = String)]
    pub id: &'a InstanceId,
    /// When it was created.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub created_at: Option<Millis>,
    /// Its own profile; nothing when it lives by the tenant's default.
    pub profile: Option<&'a Profile>,
    /// Number of its last turn, 0 before the first.
    pub turn: u64,
    /// Version of its state.
    pub version: u64,
    /// Whether it is in memory.
    pub activation: Activation,
    /// The node that owns it.
    pub node: &'a str,
    /// Stimuli waiting.
    pub inbox: usize,
}

/// One line of the list of instances.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = ListedInstance)]
pub struct ListedView<'a> {
    /// Its id.
    #[schema(value_type = String)]
    pub id: &'a InstanceId,
    /// When it was created.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Millis,
    /// Its own profile.
    pub profile: Option<&'a Profile>,
}

/// A page of a list.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Page<T> {
    /// What there is.
    pub items: Vec<T>,
    /// Goes into `after` for the page that follows; nothing at the end.
    pub next: Option<String>,
}

/// The twin.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = State)]
pub struct StateView<'a> {
    /// Grows with each change; the `ETag`.
    version: u64,
    /// What the world should be like.
    #[schema(value_type = Object)]
    desired: &'a serde_json::Map<String, serde_json::Value>,
    /// What the device says it is like.
    #[schema(value_type = Object)]
    reported: &'a serde_json::Map<String, serde_json::Value>,
    /// What of `desired` is not so in `reported`.
    #[schema(value_type = Object)]
    delta: serde_json::Map<String, serde_json::Value>,
}

/// The body of a state, made once per version and then shared by all readers.
pub fn state_body(state: &StateSnapshot) -> bytes::Bytes {
    state.body(|state| {
        let doc: StateDoc = serde_json::from_str(state.doc.get()).unwrap_or_default();
        let view =
            StateView { version: state.version, desired: &doc.desired, reported: &doc.reported, delta: doc.delta() };
        to_json(&view).into()
    })
}

/// The JSON of a view.
pub fn to_json<T: Serialize>(view: &T) -> Vec<u8> {
    sized_json(view, 256)
}

/// The JSON of a view whose size is roughly known, so that the buffer seldom grows.
pub fn sized_json<T: Serialize>(view: &T, size: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(size);
    // Views have string keys and no fallible parts; an error here would be a damaged stored value.
    if let Err(error) = serde_json::to_writer(&mut out, view) {
        tracing::error!(%error, "a stored value is not JSON");
        out.clear();
        out.extend_from_slice(b"null");
    }
    out
}

/// The JSON of a turn.
pub fn turn_json(turn: &TurnRecord) -> Vec<u8> {
    let reply = turn.reply.as_ref().and_then(|reply| reply.content.as_ref()).map_or(0, String::len);
    sized_json(&TurnView::from(turn), turn.stimulus.weight() + reply + 512)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::types::StateChange;

    #[test]
    fn a_turn_looks_as_the_api_says() {
        let channel = Channel::new("default").unwrap();
        let stimulus = Stimulus {
            data: Some(RawJson::parse("[1]").unwrap()),
            ..Stimulus::text(Source::Http, channel, "hi", Millis(5))
        };
        let stimulus = stimulus.with_repeatable_id(StimulusId::new("s1").unwrap());
        let publish = EffectKind::Publish {
            channel: Channel::new("fan").unwrap(),
            content: None,
            data: Some(RawJson::parse("{\"on\":true}").unwrap()),
            retain: false,
        };
        let turn = TurnRecord {
            turn: 12,
            version: 3,
            stimulus,
            outcome: Outcome::Replied,
            reply: Some(Reply { content: Some(String::from("hello")), data: None }),
            effects: vec![Effect { index: 0, kind: publish }],
            state: StateChange::None,
            episodes: vec![],
            steps: 1,
            engine: String::from("reflex"),
            model: None,
            usage: Some(Usage { input_tokens: 2, output_tokens: 3 }),
            error: None,
            decided_at: Millis(1_795_237_853_120),
            epoch: 0,
        };
        let body: Value = serde_json::from_slice(&turn_json(&turn)).unwrap();
        assert_eq!(
            body,
            json!({
                "turn": 12,
                "stimulus": {"id": "s1", "source": "http", "channel": "default", "priority": "human", "content": "hi",
                             "data": [1], "accepted_at": "1970-01-01T00:00:00.005Z"},
                "reply": {"content": "hello", "data": null},
                "effects": [{"id": "12-0", "kind": "publish", "channel": "fan", "content": null,
                             "data": {"on": true}, "retain": false}],
                "steps": 1, "engine": "reflex", "model": null, "usage": {"input_tokens": 2, "output_tokens": 3},
                "decided_at": "2026-11-21T05:10:53.120Z", "version": 3, "outcome": "replied"
            })
        );
    }

    #[test]
    fn a_state_shows_its_delta() {
        let doc = RawJson::parse(r#"{"desired":{"on":true},"reported":{"on":false}}"#).unwrap();
        let body: Value = serde_json::from_slice(&state_body(&StateSnapshot::new(4, 9, doc))).unwrap();
        assert_eq!(
            body,
            json!({"version": 4, "desired": {"on": true}, "reported": {"on": false}, "delta": {"on": true}})
        );
    }
}
