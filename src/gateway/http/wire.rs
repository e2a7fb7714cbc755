//! The JSON of the HTTP door. Inner types are not the API: what a caller sees is spelled here and nowhere else.
//!
//! Owns: bodies that come in, views that go out. Not here: reading requests (`admission.rs`), the profile, which is stored
//! as it stands in the API (`types::profile`). Tests: at the foot; `tests/it/http.rs` over the wire.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::problem::Refusal;
use crate::{
    cluster::Router,
    gateway::mqtt::inbound::may_be_answered_on,
    store::DeadLetter,
    types::{
        AuthContext, Channel, Effect, EffectKind, InstanceId, Millis, Outcome, Principal, Priority, Profile, RawJson,
        Reply, ReplyTo, Source, StateDoc, StateSnapshot, Stimulus, StimulusId, TurnRecord, Usage,
        limits::MAX_SENDER_BYTES,
    },
};

/// The channel of a stimulus that names none.
pub const DEFAULT_CHANNEL: &str = "default";

/// A stimulus as it is sent: `content` or `data`, or both.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = StimulusBody)]
pub struct StimulusBody<'a> {
    /// Text.
    content: Option<String>,
    /// Any JSON.
    #[serde(borrow)]
    #[schema(value_type = Option<serde_json::Value>)]
    data: Option<&'a RawValue>,
    /// Chosen by the sender so that a repeat is recognised for at least 24 h; the same as the `Idempotency-Key` header.
    #[schema(value_type = Option<String>, pattern = "^[A-Za-z0-9._~-]{1,128}$")]
    id: Option<StimulusId>,
    /// Where it comes from when it is relayed; `http` when absent.
    source: Option<Source>,
    /// Where within the instance it arrives; `default` when absent.
    #[schema(value_type = Option<String>, max_length = 512)]
    channel: Option<Channel>,
    /// Who sends it; the token's name when absent. A device sends as itself.
    #[schema(max_length = 256)]
    sender: Option<String>,
    /// How urgent it is; by its source when absent.
    priority: Option<Priority>,
    /// How much attention it deserves.
    #[schema(minimum = 0, maximum = 1)]
    salience: Option<f32>,
    /// An MQTT topic that the reply goes to as well.
    reply_to: Option<ReplyToBody>,
}

/// Where else the reply goes.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ReplyTo)]
pub struct ReplyToBody {
    /// An MQTT topic.
    #[schema(max_length = 1024)]
    topic: String,
    /// Correlation data, returned as it came; base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    correlation: Option<String>,
}

impl ReplyToBody {
    fn check(self, who: &AuthContext) -> Result<ReplyTo, Refusal> {
        if !may_reply_on(who, &self.topic) {
            return Err(Refusal::ReplyTopic(self.topic.chars().take(100).collect()));
        }
        let correlation = match self.correlation {
            None => None,
            Some(text) => Some(
                BASE64_STANDARD
                    .decode(text)
                    .map_err(|error| Refusal::Field(format!("reply_to.correlation is not base64: {error}")))?,
            ),
        };
        Ok(ReplyTo { topic: self.topic, correlation })
    }
}

/// The MQTT door's rule holds at this door too. Whether plain topics have readers is that door's business.
fn may_reply_on(who: &AuthContext, topic: &str) -> bool {
    may_be_answered_on(who, topic, true).is_ok()
}

impl StimulusBody<'_> {
    /// The id the sender gave it.
    pub fn id(&self) -> Option<&StimulusId> {
        self.id.as_ref()
    }

    /// The stimulus, with the sender's rights checked. `id` is the one to use when the sender chose it.
    ///
    /// # Errors
    /// [`Refusal`] names the field.
    pub fn into_stimulus(self, who: &AuthContext, id: Option<StimulusId>, now: Millis) -> Result<Stimulus, Refusal> {
        if self.content.is_none() && self.data.is_none() {
            return Err(Refusal::Empty);
        }
        if self.salience.is_some_and(|salience| !(0.0..=1.0).contains(&salience)) {
            return Err(Refusal::Field(String::from("salience: must be 0 to 1")));
        }
        let source = self.source.unwrap_or(Source::Http);
        let channel = match self.channel {
            Some(channel) if channel.as_str() == Router::PATCH_CHANNEL => {
                return Err(Refusal::Channel(Router::PATCH_CHANNEL));
            }
            Some(channel) => channel,
            None => channel(DEFAULT_CHANNEL)?,
        };
        let stimulus = Stimulus {
            repeatable: id.is_some(),
            id: id.unwrap_or_else(StimulusId::generate),
            source,
            channel,
            sender: sender(self.sender, who)?,
            priority: self.priority.unwrap_or(Priority::default_for(source)),
            salience: self.salience,
            content: self.content,
            data: self.data.map(raw).transpose()?,
            content_type: None,
            reply_to: self.reply_to.map(|to| to.check(who)).transpose()?,
            traceparent: None,
            accepted_at: now,
        };
        Ok(stimulus)
    }
}

/// A channel of ours.
pub fn channel(text: &str) -> Result<Channel, Refusal> {
    Channel::new(text).map_err(|error| Refusal::Field(format!("channel: {error}")))
}

fn raw(data: &RawValue) -> Result<RawJson, Refusal> {
    RawJson::parse(data.get()).map_err(|error| Refusal::Field(format!("data: {error}")))
}

fn sender(named: Option<String>, who: &AuthContext) -> Result<Option<String>, Refusal> {
    let Some(named) = named else { return Ok(who.sender().map(str::to_owned)) };
    if named.is_empty() || named.len() > MAX_SENDER_BYTES || named.chars().any(char::is_control) {
        let why = format!("sender: must have 1 to {MAX_SENDER_BYTES} bytes without control characters");
        return Err(Refusal::Field(why));
    }
    match &who.principal {
        Principal::Device(own) if *own != named => Err(Refusal::Sender),
        _ => Ok(Some(named)),
    }
}

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
    /// Who decided: `reflex`, `scripted` or `llm`.
    engine: &'a str,
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
            engine: &turn.engine,
            model: turn.model.as_deref(),
            usage: turn.usage.map(usage),
            decided_at: turn.decided_at,
            version: turn.version,
            outcome: turn.outcome,
            error: turn.error.as_deref(),
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

/// A change of the state: a merge patch (RFC 7396).
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[allow(dead_code)] // describes the body in the API document; the instance applies it as JSON
#[schema(as = StatePatch)]
pub struct StatePatchBody {
    /// Changes of what the world should be like.
    #[schema(value_type = Option<Object>)]
    desired: Option<serde_json::Value>,
    /// Changes of what the device says it is like.
    #[schema(value_type = Option<Object>)]
    reported: Option<serde_json::Value>,
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
    use crate::types::{StateChange, TenantId};

    fn who() -> AuthContext {
        AuthContext::loopback(TenantId::new("acme").unwrap())
    }

    fn take(text: &str, who: &AuthContext) -> Result<Stimulus, String> {
        let body: StimulusBody = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let id = body.id().cloned();
        body.into_stimulus(who, id, Millis(5)).map_err(|refusal| refusal.to_string())
    }

    #[test]
    fn a_stimulus_is_taken_with_its_defaults() {
        let text = take(r#"{"content":"hi"}"#, &who()).unwrap();
        assert_eq!((text.content.as_deref(), text.channel.as_str(), text.repeatable), (Some("hi"), "default", false));
        assert_eq!((text.source, text.priority, text.accepted_at), (Source::Http, Priority::Human, Millis(5)));
        let data = r#"{"data":{"a": 1},"id":"x1","source":"timer","channel":"a/b","sender":"ann","salience":0.5,
            "reply_to":{"topic":"answers/1","correlation":"AP8="}}"#;
        let data = take(data, &who()).unwrap();
        assert_eq!((data.id.as_str(), data.repeatable, data.priority), ("x1", true, Priority::Timer));
        assert_eq!(data.data.unwrap().get(), r#"{"a": 1}"#);
        assert_eq!(data.reply_to.unwrap().correlation, Some(vec![0, 255]));
    }

    #[test]
    fn what_a_stimulus_may_not_say_is_refused_by_name() {
        for (text, word) in [
            (r#"{"contents":"x"}"#, "contents"),
            (r#"{}"#, "content"),
            (r#"{"content":"x","salience":1.5}"#, "salience"),
            (r#"{"content":"x","channel":"state/patch"}"#, "state/patch"),
            (r#"{"content":"x","channel":"a//b"}"#, "channel"),
            (r#"{"content":"x","priority":"urgent"}"#, "urgent"),
            (r#"{"content":"x","sender":""}"#, "sender"),
            (r#"{"content":"x","id":"a b"}"#, "id"),
            (r#"{"content":"x","reply_to":{"topic":"a","correlation":"!"}}"#, "correlation"),
            (r#"{"content":"x","content":"y"}"#, "content"),
        ] {
            let error = take(text, &who()).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn a_device_sends_as_itself() {
        let device = AuthContext { principal: Principal::Device(String::from("lamp")), ..who() };
        assert_eq!(take(r#"{"content":"x"}"#, &device).unwrap().sender.as_deref(), Some("lamp"));
        assert!(take(r#"{"content":"x","sender":"lamp"}"#, &device).is_ok());
        assert!(take(r#"{"content":"x","sender":"ann"}"#, &device).is_err());
    }

    #[test]
    fn replies_stay_within_the_callers_rights() {
        let bound = AuthContext { instance: Some(InstanceId::new("lamp").unwrap()), ..who() };
        for good in ["answers/1", "sophont/acme/lamp/out/x", "sophontic/x"] {
            assert!(may_reply_on(&bound, good), "{good}");
        }
        assert!(may_reply_on(&who(), "sophont/acme/fan/out/x"));
        for bad in [
            "",
            "a/+",
            "#",
            "$SYS/x",
            "sophont/other/lamp/out/x",
            "sophont/acme/fan/out/x",
            "sophont/acme/lamp/in/x",
            "sophont/acme/lamp/state/reported",
            "a\u{0}",
        ] {
            assert!(!may_reply_on(&bound, bad), "{bad}");
        }
    }

    #[test]
    fn a_turn_looks_as_the_api_says() {
        let stimulus = take(r#"{"content":"hi","id":"s1","data":[1]}"#, &who()).unwrap();
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
