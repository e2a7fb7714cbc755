//! What a publish or subscription asks for, and whether its sender may: pure, shared by the embedded and the external door.
//!
//! Owns: the meaning of the topics under `sophont/`, topic rights, payload to [`Stimulus`], refusals and their reason codes.
//! Not here: the wire (`packet`), sessions, and what an instance does with a stimulus.
//!
//! Invariants: a topic of another tenant is refused exactly like one that does not exist; nothing here panics on any
//! input. Tests: at the foot.

use std::{borrow::Cow, fmt};

use base64::Engine as _;
use bytes::Bytes;

use super::topic;
use crate::{
    cluster::Router,
    types::{
        AuthContext, Channel, InstanceId, InstanceKey, Kind, Millis, Priority, RawJson, ReplyTo, Scope, Source,
        Stimulus, StimulusId, strict,
    },
};

/// First level of every topic that belongs to an instance.
pub const ROOT: &str = "sophont";

/// MQTT 5 reason codes of refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// 0x80: a fault of ours.
    Unspecified,
    /// 0x83: it may or may not have been accepted.
    Implementation,
    /// 0x87.
    NotAuthorized,
    /// 0x90.
    TopicName,
    /// 0x97: over a limit now; it may be sent again later.
    Quota,
    /// 0x99.
    PayloadFormat,
}

impl Reason {
    /// The code on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Reason::Unspecified => 0x80,
            Reason::Implementation => 0x83,
            Reason::NotAuthorized => 0x87,
            Reason::TopicName => 0x90,
            Reason::Quota => 0x97,
            Reason::PayloadFormat => 0x99,
        }
    }

    /// The name in metrics and error reports.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::Unspecified => "unspecified",
            Reason::Implementation => "implementation",
            Reason::NotAuthorized => "not_authorized",
            Reason::TopicName => "topic_name",
            Reason::Quota => "quota",
            Reason::PayloadFormat => "payload_format",
        }
    }

    /// Whether the same publish can never succeed.
    pub const fn is_permanent(self) -> bool {
        matches!(self, Reason::NotAuthorized | Reason::TopicName | Reason::PayloadFormat)
    }

    /// The reason for an error of a row below.
    pub const fn of(kind: Kind) -> Self {
        match kind {
            Kind::Invalid | Kind::Conflict => Reason::PayloadFormat,
            Kind::Unauthenticated | Kind::Forbidden | Kind::NotFound => Reason::NotAuthorized,
            Kind::RateLimited | Kind::Overloaded => Reason::Quota,
            Kind::Timeout => Reason::Implementation,
            Kind::Fenced | Kind::Unavailable | Kind::Internal => Reason::Unspecified,
        }
    }
}

/// Why a publish or subscription is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The code.
    pub reason: Reason,
    /// A sentence for whoever reads the reason string or `out/errors`.
    pub detail: Cow<'static, str>,
}

impl Refusal {
    /// A refusal with its sentence.
    pub fn new(reason: Reason, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { reason, detail: detail.into() }
    }

    fn forbidden(detail: &'static str) -> Self {
        Self::new(Reason::NotAuthorized, detail)
    }

    fn format(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Reason::PayloadFormat, detail)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

/// Where a publish goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `in/{channel...}`: a stimulus.
    Stimulus(InstanceKey, Channel),
    /// `state/reported`: a merge patch of the reported state.
    Reported(InstanceKey),
    /// `presence`.
    Presence(InstanceKey),
    /// Plain publish and subscribe within the tenant.
    Plain,
}

/// What a caller may publish on a topic.
///
/// # Errors
/// The refusal to answer with.
pub fn target(auth: &AuthContext, name: &str, plain_topics: bool) -> Result<Target, Refusal> {
    if !topic::is_name(name) {
        return Err(Refusal::new(Reason::TopicName, "not a topic name"));
    }
    if name.starts_with('$') {
        return Err(Refusal::new(Reason::TopicName, "topics that begin with '$' belong to the server"));
    }
    let Some(path) = below_root(name) else {
        return if plain_topics && auth.has(Scope::Write) {
            Ok(Target::Plain)
        } else if plain_topics {
            Err(Refusal::forbidden("the token may not publish"))
        } else {
            Err(Refusal::forbidden("topics outside sophont/ are switched off (mqtt.plain_topics)"))
        };
    };
    let mut levels = path.splitn(3, '/');
    let (tenant, instance, rest) = (levels.next(), levels.next(), levels.next());
    if tenant != Some(auth.tenant.as_str()) {
        return Err(Refusal::forbidden("the topic is not of the token's tenant"));
    }
    let (Some(instance), Some(rest)) = (instance, rest) else {
        return Err(Refusal::new(Reason::TopicName, "expected sophont/{tenant}/{instance}/in/{channel}"));
    };
    let instance = InstanceId::new(instance).map_err(|error| Refusal::new(Reason::TopicName, error.to_string()))?;
    if !auth.may(Scope::Write, &instance) {
        return Err(Refusal::forbidden("the token may not publish for this instance"));
    }
    let key = auth.key(instance);
    match rest {
        "state/reported" => Ok(Target::Reported(key)),
        "presence" => Ok(Target::Presence(key)),
        _ => match rest.strip_prefix("in/") {
            Some(Router::PATCH_CHANNEL) => {
                Err(Refusal::new(Reason::TopicName, "this channel is reserved: publish on state/reported"))
            }
            Some(channel) => {
                let channel =
                    Channel::new(channel).map_err(|error| Refusal::new(Reason::TopicName, error.to_string()))?;
                Ok(Target::Stimulus(key, channel))
            }
            None if rest.starts_with("out/") || rest == "state/desired" || rest == "state/delta" => {
                Err(Refusal::forbidden("only the instance publishes here"))
            }
            None => Err(Refusal::new(Reason::TopicName, "publish on in/{channel}, state/reported or presence")),
        },
    }
}

/// The part of a topic below `sophont/`, when it is there. `sophont` itself counts.
fn below_root(name: &str) -> Option<&str> {
    let rest = name.strip_prefix(ROOT)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix('/') }
}

/// The instance a topic of the caller's tenant speaks of, when the caller may read it.
pub fn readable_instance(auth: &AuthContext, name: &str) -> Option<InstanceId> {
    let mut levels = below_root(name)?.splitn(3, '/');
    if levels.next()? != auth.tenant.as_str() {
        return None;
    }
    InstanceId::new(levels.next()?).ok().filter(|instance| auth.may(Scope::Read, instance))
}

/// Whether a caller may subscribe to a filter (without its `$share` prefix).
///
/// Filters are matched only within the caller's tenant, so a wildcard never reaches another tenant; what is checked here
/// is the instance a token is bound to, and plain topics.
///
/// # Errors
/// The refusal to answer with.
pub fn may_subscribe(auth: &AuthContext, filter: &str, plain_topics: bool) -> Result<(), Refusal> {
    if !auth.has(Scope::Read) {
        return Err(Refusal::forbidden("the token may not subscribe"));
    }
    let first = filter.split('/').next().unwrap_or_default();
    if first.starts_with('$') {
        return Err(Refusal::forbidden("topics that begin with '$' belong to the server"));
    }
    if first != ROOT {
        let is_wild = matches!(first, "+" | "#");
        return match (plain_topics, &auth.instance) {
            (false, _) => Err(Refusal::forbidden("topics outside sophont/ are switched off (mqtt.plain_topics)")),
            (true, Some(_)) if is_wild => {
                Err(Refusal::forbidden("the filter reaches beyond the instance the token is bound to"))
            }
            (true, _) => Ok(()),
        };
    }
    let mut levels = filter.split('/').skip(1);
    if levels.next() != Some(auth.tenant.as_str()) {
        return Err(Refusal::forbidden("the filter is not of the token's tenant"));
    }
    match (&auth.instance, levels.next()) {
        (None, _) => Ok(()),
        (Some(own), Some(level)) if own.as_str() == level => Ok(()),
        (Some(_), _) => Err(Refusal::forbidden("the filter reaches beyond the instance the token is bound to")),
    }
}

/// Whether replies to a caller may be sent to a topic it names: a topic it could read, and that is no way into an instance.
///
/// # Errors
/// The refusal to answer with.
pub fn may_be_answered_on(auth: &AuthContext, name: &str, plain_topics: bool) -> Result<(), Refusal> {
    if !topic::is_name(name) {
        return Err(Refusal::new(Reason::TopicName, "the response topic is not a topic name"));
    }
    may_subscribe(auth, name, plain_topics)?;
    let Some(path) = below_root(name) else { return Ok(()) };
    let below_instance = path.splitn(3, '/').nth(2).unwrap_or_default();
    let first = below_instance.split('/').next().unwrap_or_default();
    if matches!(first, "" | "in" | "state" | "presence") {
        return Err(Refusal::forbidden(
            "a response topic under sophont/ is one of the instance's own, such as out/reply",
        ));
    }
    Ok(())
}

/// The parts of a publish that make a stimulus.
#[derive(Debug, Clone, Copy, Default)]
pub struct Incoming<'a> {
    /// Payload.
    pub payload: &'a [u8],
    /// Payload format indicator: the sender promises UTF-8.
    pub is_utf8: bool,
    /// MIME type.
    pub content_type: Option<&'a str>,
    /// Where the reply goes.
    pub response_topic: Option<&'a str>,
    /// Returned with the reply.
    pub correlation: Option<&'a [u8]>,
    /// User property `id`.
    pub id: Option<&'a str>,
    /// User property `priority`.
    pub priority: Option<&'a str>,
    /// User property `salience`.
    pub salience: Option<&'a str>,
    /// User property `traceparent`.
    pub traceparent: Option<&'a str>,
}

impl<'a> Incoming<'a> {
    /// Takes a user property into account; names without a meaning here are passed over.
    pub fn property(&mut self, name: &str, value: &'a str) {
        match name {
            "id" => self.id = Some(value),
            "priority" => self.priority = Some(value),
            "salience" => self.salience = Some(value),
            "traceparent" => self.traceparent = Some(value),
            _ => {}
        }
    }
}

/// Makes a stimulus of a publish. Its id is the sender's when there is one, else generated (the door may replace it by one
/// derived from the session).
///
/// # Errors
/// The refusal to answer with.
pub fn stimulus(
    auth: &AuthContext,
    channel: Channel,
    incoming: &Incoming<'_>,
    client: &str,
    plain_topics: bool,
    now: Millis,
) -> Result<Stimulus, Refusal> {
    let mut stimulus = Stimulus::empty(Source::Mqtt, channel, now);
    if let Some(id) = incoming.id {
        let id = StimulusId::new(id).map_err(|error| Refusal::format(format!("user property id: {error}")))?;
        stimulus = stimulus.with_repeatable_id(id);
    }
    stimulus.sender = Some(String::from(auth.sender().unwrap_or(client)));
    if let Some(priority) = incoming.priority {
        stimulus.priority = parse_priority(priority)?;
    }
    if let Some(salience) = incoming.salience {
        stimulus.salience = Some(parse_salience(salience)?);
    }
    if let Some(topic) = incoming.response_topic {
        may_be_answered_on(auth, topic, plain_topics)?;
        stimulus.reply_to =
            Some(ReplyTo { topic: String::from(topic), correlation: incoming.correlation.map(<[u8]>::to_vec) });
    }
    stimulus.content_type = incoming.content_type.map(String::from);
    stimulus.traceparent = incoming.traceparent.filter(|text| is_traceparent(text)).map(String::from);
    match payload(incoming)? {
        Payload::Text(text) => stimulus.content = Some(String::from(text)),
        Payload::Data(data) => stimulus.data = Some(data),
    }
    Ok(stimulus)
}

fn parse_priority(text: &str) -> Result<Priority, Refusal> {
    match text {
        "human" => Ok(Priority::Human),
        "device" => Ok(Priority::Device),
        "timer" => Ok(Priority::Timer),
        "background" => Ok(Priority::Background),
        _ => Err(Refusal::format("user property priority: one of human, device, timer, background")),
    }
}

fn parse_salience(text: &str) -> Result<f32, Refusal> {
    text.parse()
        .ok()
        .filter(|salience| (0.0..=1.0).contains(salience))
        .ok_or_else(|| Refusal::format("user property salience: a number from 0 to 1"))
}

/// `00-{32 hex}-{16 hex}-{2 hex}`. What is not one is passed over, as W3C Trace Context asks.
fn is_traceparent(text: &str) -> bool {
    text.len() == 55
        && text.split('-').map(str::len).eq([2, 32, 16, 2])
        && text.bytes().all(|b| b == b'-' || b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

enum Payload<'a> {
    Text(&'a str),
    Data(RawJson),
}

/// A JSON object is data, other UTF-8 is text, other bytes are `{"base64":…}`.
fn payload<'a>(incoming: &Incoming<'a>) -> Result<Payload<'a>, Refusal> {
    let is_json_type = incoming.content_type.is_some_and(|mime| mime.starts_with("application/json"));
    let Ok(text) = std::str::from_utf8(incoming.payload) else {
        if incoming.is_utf8 || is_json_type {
            return Err(Refusal::format("the payload is not UTF-8 as its properties say"));
        }
        let coded = base64::engine::general_purpose::STANDARD.encode(incoming.payload);
        // Base64 needs no escaping in JSON.
        let data = RawJson::parse(&format!("{{\"base64\":\"{coded}\"}}"));
        return data.map(Payload::Data).map_err(|error| Refusal::format(error.to_string()));
    };
    if !text.trim_ascii_start().starts_with('{') {
        return if is_json_type { json(text).map(Payload::Data) } else { Ok(Payload::Text(text)) };
    }
    match json(text) {
        Ok(data) => Ok(Payload::Data(data)),
        Err(refusal) if is_json_type => Err(refusal),
        Err(_) => Ok(Payload::Text(text)),
    }
}

fn json(text: &str) -> Result<RawJson, Refusal> {
    strict::whole(text).map_err(|error| Refusal::format(error.to_string()))
}

/// The state patch of a publish on `state/reported`, as the stimulus [`Router::patch`] takes.
///
/// # Errors
/// The refusal to answer with: the payload must be a JSON object.
pub fn reported(auth: &AuthContext, incoming: &Incoming<'_>, client: &str, now: Millis) -> Result<Stimulus, Refusal> {
    let text = std::str::from_utf8(incoming.payload).map_err(|_| Refusal::format("reported state is a JSON object"))?;
    if !text.trim_ascii_start().starts_with('{') {
        return Err(Refusal::format("reported state is a JSON object"));
    }
    let patch = json(text)?;
    let channel = Channel::new(Router::PATCH_CHANNEL).map_err(|error| Refusal::format(error.to_string()))?;
    let mut stimulus = Stimulus::empty(Source::Mqtt, channel, now);
    if let Some(id) = incoming.id {
        let id = StimulusId::new(id).map_err(|error| Refusal::format(format!("user property id: {error}")))?;
        stimulus = stimulus.with_repeatable_id(id);
    }
    stimulus.sender = Some(String::from(auth.sender().unwrap_or(client)));
    stimulus.traceparent = incoming.traceparent.filter(|text| is_traceparent(text)).map(String::from);
    let wrapped = format!("{{\"reported\":{}}}", patch.get());
    stimulus.data = Some(RawJson::parse(&wrapped).map_err(|error| Refusal::format(error.to_string()))?);
    Ok(stimulus)
}

/// Whether a payload is a presence: `online` or `offline`.
///
/// # Errors
/// The refusal to answer with.
pub fn presence(payload: &Bytes) -> Result<(), Refusal> {
    match &payload[..] {
        b"online" | b"offline" => Ok(()),
        _ => Err(Refusal::format("presence is 'online' or 'offline'")),
    }
}

/// The report of a refusal for `out/errors`: MQTT 3.1.1 has no other way to tell it.
pub fn report(topic: &str, refusal: &Refusal) -> String {
    serde_json::json!({"topic": topic, "reason": refusal.reason.name(), "code": refusal.reason.code(),
        "detail": refusal.detail})
    .to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::{Principal, TenantId, limits::MAX_JSON_DEPTH};

    fn owner() -> AuthContext {
        AuthContext::loopback(TenantId::new("acme").unwrap())
    }

    fn device() -> AuthContext {
        AuthContext {
            principal: Principal::Device("probe-7".into()),
            scopes: vec![Scope::Read, Scope::Write],
            instance: Some(InstanceId::new("lamp").unwrap()),
            ..owner()
        }
    }

    fn reason<T: fmt::Debug>(result: Result<T, Refusal>) -> u8 {
        result.unwrap_err().reason.code()
    }

    fn make(incoming: &Incoming<'_>) -> Result<Stimulus, Refusal> {
        stimulus(&device(), Channel::new("c").unwrap(), incoming, "client", true, Millis(1))
    }

    #[test]
    fn topics_have_their_meaning() {
        let key = owner().key(InstanceId::new("lamp").unwrap());
        let at = |name: &str| target(&owner(), name, true);
        let channel = Channel::new("room/t").unwrap();
        assert_eq!(at("sophont/acme/lamp/in/room/t"), Ok(Target::Stimulus(key.clone(), channel)));
        assert_eq!(at("sophont/acme/lamp/state/reported"), Ok(Target::Reported(key.clone())));
        assert_eq!(at("sophont/acme/lamp/presence"), Ok(Target::Presence(key)));
        assert_eq!(at("house/door"), Ok(Target::Plain));
        assert_eq!(at("sophonts/door"), Ok(Target::Plain));
    }

    #[test]
    fn topics_that_may_not_be_published_on_are_refused() {
        let at = |auth: &AuthContext, name: &str| reason(target(auth, name, true));
        for (name, code) in [
            ("sophont/other/lamp/in/c", 0x87),
            ("sophont/acme/lamp/out/c", 0x87),
            ("sophont/acme/lamp/state/desired", 0x87),
            ("sophont/acme/lamp/in/state/patch", 0x90),
            ("sophont/acme/lamp/in", 0x90),
            ("sophont/acme/lamp/in/", 0x90),
            ("sophont/acme/lamp/in/a//b", 0x90),
            ("sophont/acme/la mp/in/c", 0x90),
            ("sophont/acme", 0x90),
            ("sophont", 0x87),
            ("$SYS/x", 0x90),
            ("a/+", 0x90),
            ("", 0x90),
        ] {
            assert_eq!(at(&owner(), name), code, "{name:?}");
        }
        assert_eq!(at(&device(), "sophont/acme/door/in/c"), 0x87);
        let reader = AuthContext { scopes: vec![Scope::Read], ..device() };
        assert_eq!(at(&reader, "sophont/acme/lamp/in/c"), 0x87);
        assert_eq!(at(&reader, "house/door"), 0x87);
        assert_eq!(reason(target(&owner(), "house/door", false)), 0x87);
    }

    #[test]
    fn filters_stay_within_tenant_and_instance() {
        let may = |auth: &AuthContext, filter: &str| may_subscribe(auth, filter, true).is_ok();
        for good in ["#", "+/x", "sophont/acme/#", "sophont/acme/+/out/#", "sophont/acme/lamp/out/reply", "house/#"] {
            assert!(may(&owner(), good), "{good}");
        }
        for bad in ["sophont/other/#", "sophont/+/lamp/out/#", "sophont/#", "sophont", "$SYS/#"] {
            assert!(!may(&owner(), bad), "{bad}");
        }
        for good in ["sophont/acme/lamp/#", "sophont/acme/lamp/out/+", "house/#"] {
            assert!(may(&device(), good), "{good}");
        }
        for bad in ["#", "+/acme/lamp/out/x", "sophont/acme/#", "sophont/acme/+/out/x", "sophont/acme/door/out/x"] {
            assert!(!may(&device(), bad), "{bad}");
        }
        assert!(may_subscribe(&owner(), "#", false).is_err());
        assert!(!may(&AuthContext { scopes: vec![Scope::Write], ..owner() }, "sophont/acme/lamp/out/#"));
    }

    #[test]
    fn response_topics_are_checked() {
        let may = |name: &str| may_be_answered_on(&device(), name, true).is_ok();
        assert!(may("sophont/acme/lamp/out/reply/7") && may("replies/7"));
        for bad in [
            "sophont/acme/lamp/in/c",
            "sophont/acme/door/out/x",
            "sophont/other/lamp/out/x",
            "a/+",
            "",
            "sophont/acme/lamp/state/desired",
            "sophont/acme/lamp",
        ] {
            assert!(!may(bad), "{bad}");
        }
    }

    #[test]
    fn payloads_become_data_text_or_base64() {
        let of = |payload: &[u8]| make(&Incoming { payload, ..Incoming::default() }).unwrap();
        assert_eq!(of(b" {\"a\": 1}").data.unwrap().value(), serde_json::json!({"a": 1}));
        assert_eq!(of(b"[1]").content.as_deref(), Some("[1]"));
        assert_eq!(of("grün".as_bytes()).content.as_deref(), Some("grün"));
        assert_eq!(of(b"{broken").content.as_deref(), Some("{broken"));
        assert_eq!(of(b"").content.as_deref(), Some(""));
        assert_eq!(of(&[0xff, 0]).data.unwrap().value(), serde_json::json!({"base64": "/wA="}));
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(MAX_JSON_DEPTH), "]".repeat(MAX_JSON_DEPTH));
        assert!(of(deep.as_bytes()).data.is_none());
    }

    #[test]
    fn payloads_that_break_their_promise_are_refused() {
        let promise = Incoming { payload: &[0xff], is_utf8: true, ..Incoming::default() };
        assert_eq!(reason(make(&promise)), 0x99);
        let json = Incoming { payload: b"{broken", content_type: Some("application/json"), ..Incoming::default() };
        assert_eq!(reason(make(&json)), 0x99);
        let list = Incoming { payload: b"[1]", content_type: Some("application/json"), ..Incoming::default() };
        assert_eq!(make(&list).unwrap().data.unwrap().get(), "[1]");
    }

    #[test]
    fn what_no_parser_can_hold_is_no_data() {
        for text in [r#"{"a":"\ud800"}"#, r#"{"a":1e999}"#] {
            let plain = Incoming { payload: text.as_bytes(), ..Incoming::default() };
            assert_eq!(make(&plain).unwrap().content.as_deref(), Some(text));
            assert_eq!(reason(make(&Incoming { content_type: Some("application/json"), ..plain })), 0x99);
            assert!(reported(&owner(), &plain, "c", Millis(1)).is_err());
        }
    }

    #[test]
    fn properties_are_taken_over() {
        let mut incoming = Incoming { payload: b"x", response_topic: Some("replies/7"), ..Incoming::default() };
        incoming.correlation = Some(b"c");
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        for (name, value) in
            [("id", "order-1"), ("priority", "human"), ("salience", "0.25"), ("traceparent", trace), ("x", "y")]
        {
            incoming.property(name, value);
        }
        let made = make(&incoming).unwrap();
        assert_eq!((made.id.as_str(), made.repeatable, made.priority), ("order-1", true, Priority::Human));
        assert_eq!((made.salience, made.traceparent.as_deref()), (Some(0.25), Some(trace)));
        assert_eq!(made.reply_to, Some(ReplyTo { topic: "replies/7".into(), correlation: Some(b"c".to_vec()) }));
        assert_eq!(made.sender.as_deref(), Some("probe-7"));
        for (name, value) in [("id", "a b"), ("priority", "urgent"), ("salience", "2"), ("salience", "NaN")] {
            let mut incoming = Incoming::default();
            incoming.property(name, value);
            assert_eq!(reason(make(&incoming)), 0x99, "{name}={value}");
        }
    }

    #[test]
    fn reported_state_is_wrapped() {
        let of = |payload: &[u8]| reported(&device(), &Incoming { payload, ..Incoming::default() }, "c", Millis(1));
        assert_eq!(of(b"{\"on\":true}").unwrap().data.unwrap().get(), "{\"reported\":{\"on\":true}}");
        for bad in [&b"[1]"[..], b"on", b"{", &[0xff]] {
            assert_eq!(reason(of(bad)), 0x99);
        }
        assert!(presence(&Bytes::from_static(b"online")).is_ok() && presence(&Bytes::new()).is_err());
    }

    proptest! {
        #[test]
        fn nothing_from_outside_panics(
            name in ".{0,60}", payload in proptest::collection::vec(any::<u8>(), 0..80), is_utf8: bool,
            mime in proptest::option::of(".{0,20}"), text in ".{0,30}",
        ) {
            let auth = device();
            for name in [&name, &format!("sophont/acme/lamp/{name}")] {
                let _ = (target(&auth, name, true), may_subscribe(&auth, name, true), readable_instance(&auth, name));
                let _ = may_be_answered_on(&auth, name, true);
            }
            let incoming = Incoming { payload: &payload, is_utf8, content_type: mime.as_deref(),
                response_topic: Some(&text), id: Some(&text), salience: Some(&text), ..Incoming::default() };
            let _ = (make(&incoming), reported(&auth, &incoming, "c", Millis(1)));
        }

        #[test]
        fn a_bound_device_never_sees_another_instance(filter in "[a-z+#/]{0,12}|sophont/(acme|[+])/(lamp|door|[+#])(/[#])?") {
            if topic::is_filter(&filter) && may_subscribe(&device(), &filter, true).is_ok() {
                prop_assert!(!topic::matches(&filter, "sophont/acme/door/out/x"));
            }
        }
    }
}
