//! The `do` of a rule: read from JSON and checked when a profile is stored, carried out as [`Action`]s on a match.
//!
//! Not here: templates (`template.rs`), the order of rules (`../reflex.rs`).
//! Tests: at the foot of `../reflex.rs`.

use serde_json::{Map, Value};

use super::{
    expression::{Flaw, Scope},
    template::{Pattern, Payload, Template},
};
use crate::{
    cognition::Action,
    types::{
        Channel, EpisodeDraft, InstanceId, Millis, RawJson, Reply,
        limits::{MAX_JSON_DEPTH, MAX_REMIND_AHEAD_MS},
    },
};

/// Where in an action something is wrong, such as `publish.channel`, and what.
pub(super) type Misfit = (String, Flaw);

/// What one entry of `do` asks.
#[derive(Debug)]
pub(super) enum Plan {
    /// Yields an action.
    Act(Box<Deed>),
    /// Asks the engine although a rule matched.
    Think,
    /// Ends the evaluation; nobody is asked.
    Drop,
}

/// An action with its templates.
#[derive(Debug)]
pub(super) enum Deed {
    Reply(Message),
    Publish { channel: Name<Channel>, message: Message, retain: bool },
    Send { instance: Name<InstanceId>, channel: Name<Channel>, message: Message },
    Set(Vec<(Vec<String>, Pattern)>),
    SetFixed(Value),
    Remember { content: Template, data: Option<Payload>, tags: Vec<Template>, reward: Option<f32> },
    Remind { when: When, message: Message },
    Webhook { url: Template, body: Payload },
}

/// Text, structured data, or both.
#[derive(Debug)]
pub(super) struct Message {
    content: Option<Template>,
    data: Option<Payload>,
}

/// When a reminder is due.
#[derive(Debug)]
pub(super) enum When {
    In(i64),
    InText(Template),
    At(Millis),
    AtText(Template),
}

/// A name that is checked at once when it is constant.
#[derive(Debug)]
pub(super) enum Name<T> {
    Fixed(T),
    Text(Template),
}

impl<T: std::str::FromStr<Err: std::fmt::Display> + Clone> Name<T> {
    fn compile(source: &str) -> Result<Self, Flaw> {
        let template = Template::compile(source)?;
        match template.fixed() {
            Some(text) => text.parse().map(Self::Fixed).map_err(|error| Flaw::new(0, error.to_string())),
            None => Ok(Self::Text(template)),
        }
    }

    fn cost(&self) -> u64 {
        if let Self::Text(template) = self { template.cost() } else { 1 }
    }

    fn get(&self, scope: &Scope<'_>) -> Result<T, String> {
        match self {
            Self::Fixed(name) => Ok(name.clone()),
            Self::Text(template) => template.text(scope)?.parse().map_err(|error: T::Err| error.to_string()),
        }
    }
}

/// The actions there are, for messages.
const KINDS: &str = "reply, publish, send, set, remember, remind, webhook, think, drop";

impl Plan {
    /// Reads one entry of `do`.
    pub(super) fn compile(source: &Value) -> Result<Self, Misfit> {
        let here = |reason: String| (String::new(), Flaw::new(0, reason));
        let entry = match source {
            Value::String(word) if word == "think" => return Ok(Self::Think),
            Value::String(word) if word == "drop" => return Ok(Self::Drop),
            Value::Object(entry) => entry,
            _ => return Err(here(format!("an action is an object with one of {KINDS}"))),
        };
        let mut fields = entry.iter();
        let (Some((kind, body)), None) = (fields.next(), fields.next()) else {
            return Err(here(format!("an action has exactly one of {KINDS}; write several actions for several")));
        };
        let deed = match kind.as_str() {
            "think" | "drop" => {
                if *body != Value::Bool(true) {
                    return Err((kind.clone(), Flaw::new(0, "write true")));
                }
                return Ok(if kind == "think" { Self::Think } else { Self::Drop });
            }
            "reply" => reply(body),
            "publish" => publish(body),
            "send" => send(body),
            "set" => set(body),
            "remember" => remember(body),
            "remind" => remind(body),
            "webhook" => webhook(body),
            _ => return Err((kind.clone(), Flaw::new(0, format!("there is no action '{kind}', there are {KINDS}")))),
        };
        deed.map(|deed| Self::Act(Box::new(deed))).map_err(|(part, flaw)| {
            let path = if part.is_empty() || part.starts_with('[') { part } else { format!(".{part}") };
            (format!("{kind}{path}"), flaw)
        })
    }

    /// Estimated steps of carrying it out.
    pub(super) fn cost(&self) -> u64 {
        match self {
            Self::Act(deed) => deed.cost(),
            Self::Think | Self::Drop => 1,
        }
    }
}

impl Deed {
    fn cost(&self) -> u64 {
        match self {
            Self::Reply(message) => message.cost(),
            Self::Publish { channel, message, .. } => channel.cost() + message.cost(),
            Self::Send { instance, channel, message } => instance.cost() + channel.cost() + message.cost(),
            Self::Set(entries) => entries.iter().map(|(_, pattern)| pattern.cost()).sum(),
            Self::SetFixed(_) => 1,
            Self::Remember { content, data, tags, .. } => {
                let tags: u64 = tags.iter().map(Template::cost).sum();
                content.cost() + data.as_ref().map_or(0, Payload::cost) + tags
            }
            Self::Remind { when, message } => {
                let when = if let When::InText(text) | When::AtText(text) = when { text.cost() } else { 1 };
                when + message.cost()
            }
            Self::Webhook { url, body } => url.cost() + body.cost(),
        }
    }

    /// The finished action. The error names the part and says why it cannot be finished.
    pub(super) fn perform(&self, scope: &Scope<'_>, now: Millis) -> Result<Action, (&'static str, String)> {
        let part = |name: &'static str| move |reason: String| (name, reason);
        Ok(match self {
            Self::Reply(message) => {
                let (content, data) = message.finish(scope).map_err(part("reply"))?;
                Action::Reply(Reply { content, data })
            }
            Self::Publish { channel, message, retain } => {
                let channel = channel.get(scope).map_err(part("publish.channel"))?;
                let (content, data) = message.finish(scope).map_err(part("publish"))?;
                Action::Publish { channel, content, data, retain: *retain }
            }
            Self::Send { instance, channel, message } => {
                let instance = instance.get(scope).map_err(part("send.instance"))?;
                let channel = channel.get(scope).map_err(part("send.channel"))?;
                let (content, data) = message.finish(scope).map_err(part("send"))?;
                Action::Send { instance, channel, content, data }
            }
            Self::SetFixed(patch) => Action::Set(patch.clone()),
            Self::Set(entries) => {
                let mut patch = Map::new();
                for (path, pattern) in entries {
                    insert(&mut patch, path, pattern.value(scope).map_err(part("set"))?);
                }
                Action::Set(Value::Object(patch))
            }
            Self::Remember { content, data, tags, reward } => Action::Remember(EpisodeDraft {
                content: content.text(scope).map_err(part("remember"))?,
                data: data.as_ref().map(|data| data.json(scope)).transpose().map_err(part("remember.data"))?,
                tags: tags
                    .iter()
                    .map(|tag| tag.text(scope))
                    .collect::<Result<_, _>>()
                    .map_err(part("remember.tags"))?,
                reward: *reward,
                occurred_at: None,
            }),
            Self::Remind { when, message } => {
                let due = when.due(scope, now).map_err(part("remind"))?;
                let (content, data) = message.finish(scope).map_err(part("remind"))?;
                Action::Remind { due, content, data }
            }
            Self::Webhook { url, body } => Action::Webhook {
                url: url.text(scope).map_err(part("webhook.url"))?,
                body: body.json(scope).map_err(part("webhook.body"))?,
            },
        })
    }
}

impl Message {
    fn cost(&self) -> u64 {
        self.content.as_ref().map_or(0, Template::cost) + self.data.as_ref().map_or(0, Payload::cost)
    }

    fn finish(&self, scope: &Scope<'_>) -> Result<(Option<String>, Option<RawJson>), String> {
        let content = self.content.as_ref().map(|content| content.text(scope)).transpose()?;
        let data = self.data.as_ref().map(|data| data.json(scope)).transpose()?;
        Ok((content, data))
    }
}

impl When {
    fn due(&self, scope: &Scope<'_>, now: Millis) -> Result<Millis, String> {
        match self {
            Self::In(ms) => Ok(now.plus(*ms)),
            Self::InText(text) => Ok(now.plus(duration_ms(&text.text(scope)?)?)),
            Self::At(due) => Ok(*due),
            Self::AtText(text) => {
                let text = text.text(scope)?;
                let due =
                    Millis::from_rfc3339(&text).map_err(|error| format!("'{text}' is no RFC 3339 time: {error}"))?;
                if due.0 > now.0.saturating_add(MAX_REMIND_AHEAD_MS) {
                    return Err(String::from("a reminder lies at most ten years ahead"));
                }
                Ok(due)
            }
        }
    }
}

/// Reads `90s`, `5m`, `1h30m`, `2d`, `500ms`: milliseconds.
fn duration_ms(text: &str) -> Result<i64, String> {
    let wrong = || format!("'{text}' is no duration, write for example 90s, 5m, 1h30m or 2d");
    let mut rest = text.trim();
    let mut total = 0_i64;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: i64 = rest[..digits].parse().map_err(|_| wrong())?;
        let tail = &rest[digits..];
        let unit_end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let unit = match &tail[..unit_end] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        total = number.checked_mul(unit).and_then(|ms| total.checked_add(ms)).ok_or_else(wrong)?;
        rest = &tail[unit_end..];
    }
    if total > MAX_REMIND_AHEAD_MS {
        return Err(String::from("a reminder lies at most ten years ahead"));
    }
    Ok(total)
}

/// The object of an action, with only these fields.
fn fields<'v>(body: &'v Value, known: &[&str]) -> Result<&'v Map<String, Value>, Misfit> {
    let Value::Object(map) = body else {
        return Err((String::new(), Flaw::new(0, format!("write an object with {}", known.join(", ")))));
    };
    match map.keys().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err((name.clone(), Flaw::new(0, format!("unknown field, there are {}", known.join(", "))))),
        None => Ok(map),
    }
}

fn string<'v>(map: &'v Map<String, Value>, name: &str) -> Result<Option<&'v str>, Misfit> {
    match map.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err((name.to_owned(), Flaw::new(0, "must be a text"))),
    }
}

fn required<'v>(map: &'v Map<String, Value>, name: &str) -> Result<&'v str, Misfit> {
    string(map, name)?.ok_or_else(|| (name.to_owned(), Flaw::new(0, "is missing")))
}

fn at(name: &str) -> impl Fn(Flaw) -> Misfit {
    let name = name.to_owned();
    move |flaw| (name.clone(), flaw)
}

fn text(map: &Map<String, Value>, name: &str) -> Result<Option<Template>, Misfit> {
    string(map, name)?.map(Template::compile).transpose().map_err(at(name))
}

fn message(map: &Map<String, Value>) -> Result<Message, Misfit> {
    let content = text(map, "content")?;
    let data = map.get("data").map(Payload::compile).transpose().map_err(at("data"))?;
    if content.is_none() && data.is_none() {
        return Err((String::new(), Flaw::new(0, "needs content or data")));
    }
    Ok(Message { content, data })
}

fn reply(body: &Value) -> Result<Deed, Misfit> {
    if let Value::String(source) = body {
        let content = Template::compile(source).map_err(at(""))?;
        return Ok(Deed::Reply(Message { content: Some(content), data: None }));
    }
    message(fields(body, &["content", "data"])?).map(Deed::Reply)
}

fn publish(body: &Value) -> Result<Deed, Misfit> {
    let map = fields(body, &["channel", "content", "data", "retain"])?;
    let channel = Name::compile(required(map, "channel")?).map_err(at("channel"))?;
    let retain = match map.get("retain") {
        None => false,
        Some(Value::Bool(retain)) => *retain,
        Some(_) => return Err(at("retain")(Flaw::new(0, "must be true or false"))),
    };
    Ok(Deed::Publish { channel, message: message(map)?, retain })
}

fn send(body: &Value) -> Result<Deed, Misfit> {
    let map = fields(body, &["instance", "channel", "content", "data"])?;
    let instance = Name::compile(required(map, "instance")?).map_err(at("instance"))?;
    let channel = Name::compile(required(map, "channel")?).map_err(at("channel"))?;
    Ok(Deed::Send { instance, channel, message: message(map)? })
}

fn set(body: &Value) -> Result<Deed, Misfit> {
    let Value::Object(map) = body else {
        return Err((String::new(), Flaw::new(0, "write an object such as {\"reported.hot\": true}")));
    };
    if map.is_empty() {
        return Err((String::new(), Flaw::new(0, "names nothing to set")));
    }
    let mut entries = Vec::with_capacity(map.len());
    for (name, value) in map {
        let path = state_path(name, value)?;
        let pattern = Pattern::compile(value).map_err(|flaw| (format!("['{name}']"), flaw))?;
        entries.push((path, pattern));
    }
    if entries.iter().all(|(_, pattern)| matches!(pattern, Pattern::Fixed(_))) {
        return fixed_patch(map).map(Deed::SetFixed);
    }
    Ok(Deed::Set(entries))
}

/// The path `reported.a.b` names, checked.
fn state_path(name: &str, value: &Value) -> Result<Vec<String>, Misfit> {
    let here = |reason: &str| (format!("['{name}']"), Flaw::new(0, reason));
    let path: Vec<String> = name.split('.').map(str::to_owned).collect();
    if !matches!(path[0].as_str(), "desired" | "reported") || path.iter().any(String::is_empty) {
        return Err(here("a path begins with 'desired.' or 'reported.' and has no empty part"));
    }
    if path.len() > MAX_JSON_DEPTH {
        return Err(here("the path is too deep"));
    }
    if path.len() == 1 && !value.is_object() {
        return Err(here("the whole of it can only be merged with an object, name a field such as reported.hot"));
    }
    Ok(path)
}

/// The merge patch of constant values.
pub(super) fn fixed_patch(map: &Map<String, Value>) -> Result<Value, Misfit> {
    let mut patch = Map::new();
    for (name, value) in map {
        insert(&mut patch, &state_path(name, value)?, value.clone());
    }
    Ok(Value::Object(patch))
}

/// Puts a value at a path of a merge patch; a later entry wins over an earlier one.
fn insert(patch: &mut Map<String, Value>, path: &[String], value: Value) {
    match path {
        [] => {}
        [last] => match (patch.get_mut(last), value) {
            (Some(Value::Object(present)), Value::Object(more)) => present.extend(more),
            (_, value) => {
                patch.insert(last.clone(), value);
            }
        },
        [first, rest @ ..] => {
            let slot = patch.entry(first.clone()).or_insert_with(|| Value::Object(Map::new()));
            if !slot.is_object() {
                *slot = Value::Object(Map::new());
            }
            if let Value::Object(slot) = slot {
                insert(slot, rest, value);
            }
        }
    }
}

fn remember(body: &Value) -> Result<Deed, Misfit> {
    if let Value::String(source) = body {
        let content = Template::compile(source).map_err(at(""))?;
        return Ok(Deed::Remember { content, data: None, tags: Vec::new(), reward: None });
    }
    let map = fields(body, &["content", "data", "tags", "reward"])?;
    let content = Template::compile(required(map, "content")?).map_err(at("content"))?;
    let data = map.get("data").map(Payload::compile).transpose().map_err(at("data"))?;
    let tags = match map.get("tags") {
        None => Vec::new(),
        Some(Value::Array(tags)) => tags
            .iter()
            .map(|tag| tag.as_str().ok_or_else(|| Flaw::new(0, "must be texts")).and_then(Template::compile))
            .collect::<Result<_, _>>()
            .map_err(at("tags"))?,
        Some(_) => return Err(at("tags")(Flaw::new(0, "must be a list of texts"))),
    };
    #[allow(clippy::cast_possible_truncation)] // a reward is a rough measure
    let reward = match map.get("reward") {
        None => None,
        Some(value) => Some(value.as_f64().ok_or_else(|| at("reward")(Flaw::new(0, "must be a number")))? as f32),
    };
    Ok(Deed::Remember { content, data, tags, reward })
}

fn remind(body: &Value) -> Result<Deed, Misfit> {
    let map = fields(body, &["in", "at", "content", "data"])?;
    let when = match (text(map, "in")?, text(map, "at")?) {
        (Some(after), None) => match after.fixed() {
            Some(fixed) => When::In(duration_ms(fixed).map_err(|reason| at("in")(Flaw::new(0, reason)))?),
            None => When::InText(after),
        },
        (None, Some(moment)) => match moment.fixed() {
            Some(fixed) => {
                let wrong = |error| at("at")(Flaw::new(0, format!("'{fixed}' is no RFC 3339 time: {error}")));
                When::At(Millis::from_rfc3339(fixed).map_err(wrong)?)
            }
            None => When::AtText(moment),
        },
        _ => return Err((String::new(), Flaw::new(0, "needs either 'in' or 'at'"))),
    };
    Ok(Deed::Remind { when, message: message(map)? })
}

fn webhook(body: &Value) -> Result<Deed, Misfit> {
    let map = fields(body, &["url", "body"])?;
    let url = Template::compile(required(map, "url")?).map_err(at("url"))?;
    let scheme = url.prefix().split_once("://").map(|(scheme, rest)| (scheme, !rest.is_empty()));
    if !matches!(scheme, Some(("http" | "https", true))) {
        return Err(at("url")(Flaw::new(0, "must begin with http:// or https:// and the host, written out")));
    }
    let body = Payload::compile(map.get("body").unwrap_or(&Value::Null)).map_err(at("body"))?;
    Ok(Deed::Webhook { url, body })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_or_refused() {
        for (text, ms) in [("500ms", 500), ("90s", 90_000), ("5m", 300_000), ("1h30m", 5_400_000), ("2d", 172_800_000)]
        {
            assert_eq!(duration_ms(text), Ok(ms), "{text}");
        }
        for bad in ["", "5", "m", "5x", "5m-", "-5m", "99999999999999999999s", "9999999999d", "１s"] {
            assert!(duration_ms(bad).is_err(), "{bad}");
        }
    }
}
