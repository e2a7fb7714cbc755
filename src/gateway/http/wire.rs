//! The bodies that come in, and what their senders may say.
//!
//! Not here: collecting bodies (`admission.rs`), what goes out (`view.rs`), the profile, which is stored as it stands in the
//! API (`types::profile`). Tests: at the foot; `tests/it/hostile.rs` over the wire.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::problem::Refusal;
use crate::{
    cluster::Router,
    gateway::mqtt::inbound::may_be_answered_on,
    types::{
        AuthContext, Channel, Millis, Principal, Priority, RawJson, ReplyTo, Source, Stimulus, StimulusId,
        limits::MAX_SENDER_BYTES,
        memory::{EMBED_CHANNEL, FORGET_CHANNEL, WRITE_CHANNEL},
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
    pub topic: String,
    /// Correlation data, returned as it came; base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation: Option<String>,
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
            Some(channel) if channel.as_str() == WRITE_CHANNEL => return Err(Refusal::Channel(WRITE_CHANNEL)),
            Some(channel) if channel.as_str() == FORGET_CHANNEL => return Err(Refusal::Channel(FORGET_CHANNEL)),
            Some(channel) if channel.as_str() == EMBED_CHANNEL => return Err(Refusal::Channel(EMBED_CHANNEL)),
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

/// Who sends: as named, or as the token says.
///
/// # Errors
/// [`Refusal`] when a device names another, or the name is none.
pub fn sender(named: Option<String>, who: &AuthContext) -> Result<Option<String>, Refusal> {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{InstanceId, TenantId};

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
            (r#"{"content":"x","channel":"memory/write"}"#, "memory/write"),
            (r#"{"content":"x","channel":"memory/forget"}"#, "memory/forget"),
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
}
