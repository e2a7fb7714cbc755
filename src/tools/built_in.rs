//! The tools that stay within the node: they read what the instance remembers, or ask something of its turn. Pure but for
//! [`recall`]. Tests: at the foot.

use std::time::Duration;

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::{Call, Output, Recall};
use crate::types::{
    Action, Channel, EpisodeDraft, InstanceId, Millis, RawJson, StateDoc, ToolSpec,
    limits::{MAX_RECALL, MAX_REMIND_AHEAD_MS},
};

/// The tool that searches what the instance remembers.
pub(super) const RECALL: &str = "recall";
/// Episodes when the call does not say how many.
const RECALLED: usize = 8;

/// Name, description and properties of each; the required ones.
fn all() -> [(&'static str, &'static str, Value, &'static [&'static str]); 6] {
    let (content, data) = (json!({"type": "string"}), json!({"description": "Any JSON, in place of content"}));
    let channel = json!({"type": "string", "description": "For instance alarms/fire"});
    [
        (
            RECALL,
            "Searches what you remember. Returns episodes, best first.",
            json!({"query": {"type": "string"}, "limit": {"type": "integer", "minimum": 1, "maximum": MAX_RECALL}}),
            &["query"],
        ),
        (
            "remember",
            "Keeps something to be recalled later.",
            json!({"content": content, "data": data, "tags": {"type": "array", "items": {"type": "string"}},
                   "reward": {"type": "number", "description": "How good it was"}}),
            &["content"],
        ),
        (
            "set_state",
            "Changes your state: objects merge, null removes. 'reported' is how things are, 'desired' how they should be.",
            json!({"reported": {"type": "object"}, "desired": {"type": "object"}}),
            &[],
        ),
        (
            "publish",
            "Publishes a message on one of your channels, for devices and others who listen.",
            json!({"channel": channel, "content": content, "data": data, "retain": {"type": "boolean"}}),
            &["channel"],
        ),
        (
            "send",
            "Sends a message to another instance.",
            json!({"instance": {"type": "string", "description": "Its id"}, "channel": channel, "content": content, "data": data}),
            &["instance", "channel"],
        ),
        (
            "remind",
            "Reminds you of something later.",
            json!({"in_seconds": {"type": "number", "exclusiveMinimum": 0},
                   "at": {"type": "string", "description": "RFC 3339, in place of in_seconds"}, "content": content, "data": data}),
            &[],
        ),
    ]
}

/// All of them, as an engine is told.
pub(super) fn specs() -> impl Iterator<Item = ToolSpec> {
    all().into_iter().map(|(name, description, properties, required)| {
        let parameters = json!({
            "type": "object", "properties": properties, "required": required, "additionalProperties": false,
        });
        ToolSpec {
            name: name.to_owned(),
            description: description.to_owned(),
            parameters: RawJson::of(&parameters),
            // Nothing is done before the turn's commit, which is made once.
            repeatable: true,
        }
    })
}

/// Reads arguments, and says in words what is wrong with them.
pub(super) fn arguments<T: DeserializeOwned>(arguments: &Map<String, Value>) -> Result<T, String> {
    serde_json::from_value(Value::Object(arguments.clone())).map_err(|error| format!("wrong arguments: {error}"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    query: String,
    limit: Option<usize>,
}

/// Searches what the instance remembers.
pub(super) async fn recall(memory: &dyn Recall, call: &Call<'_>, deadline: Duration) -> Output {
    let asked: Asked = match arguments(call.arguments) {
        Ok(asked) => asked,
        Err(reason) => return Output::of(Err(reason)),
    };
    let limit = asked.limit.unwrap_or(RECALLED).clamp(1, MAX_RECALL);
    let found = memory.recall(call.key, &asked.query, limit, deadline).await;
    let shown = found.map(|episodes| {
        let shown = episodes.iter().map(|episode| {
            json!({"episode": episode.id, "content": episode.content, "data": episode.data.as_ref().map(RawJson::value),
                   "tags": episode.tags, "occurred_at": episode.occurred_at.to_rfc3339()})
        });
        Value::Array(shown.collect()).to_string()
    });
    Output::of(shown)
}

/// Calls one of the others; `None` when there is none of this name.
pub(super) fn perform(call: &Call<'_>) -> Option<Output> {
    let (said, action) = match call.name {
        "remember" => ("It will be remembered.", remember(call)),
        "set_state" => ("The state will be changed.", set_state(call)),
        "publish" => ("It will be published.", publish(call)),
        "send" if call.hops_left == 0 => {
            let reason = "not sent: instances have sent this on too often, one after the other; answer in words";
            ("", Err(String::from(reason)))
        }
        "send" => ("It will be sent.", send(call)),
        "remind" => ("You will be reminded.", remind(call)),
        _ => return None,
    };
    Some(match action {
        Ok(action) => Output::done(said, action),
        Err(reason) => Output::of(Err(reason)),
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Remembered {
    content: String,
    data: Option<Value>,
    #[serde(default)]
    tags: Vec<String>,
    reward: Option<f32>,
}

fn remember(call: &Call<'_>) -> Result<Action, String> {
    let Remembered { content, data, tags, reward } = arguments(call.arguments)?;
    if content.trim().is_empty() {
        return Err(String::from("wrong arguments: content is empty"));
    }
    if reward.is_some_and(|reward| !reward.is_finite()) {
        return Err(String::from("wrong arguments: reward is no number"));
    }
    Ok(Action::Remember(EpisodeDraft { content, data: json_of(data), tags, reward, occurred_at: None }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    reported: Option<Map<String, Value>>,
    desired: Option<Map<String, Value>>,
}

fn set_state(call: &Call<'_>) -> Result<Action, String> {
    let Change { reported, desired } = arguments(call.arguments)?;
    let parts = [("reported", reported), ("desired", desired)];
    let patch: Map<String, Value> =
        parts.into_iter().filter_map(|(name, part)| Some((name.to_owned(), Value::Object(part?)))).collect();
    if patch.is_empty() {
        return Err(String::from("wrong arguments: give reported or desired"));
    }
    let patch = Value::Object(patch);
    // What the document does not take is said now, while the model can still do better.
    StateDoc::default().apply(&patch).map_err(|error| format!("wrong arguments: {error}"))?;
    Ok(Action::Set(patch))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    instance: Option<String>,
    channel: String,
    content: Option<String>,
    data: Option<Value>,
    #[serde(default)]
    retain: bool,
}

fn message(call: &Call<'_>) -> Result<(Message, Channel), String> {
    let message: Message = arguments(call.arguments)?;
    if message.content.is_none() == message.data.is_none() {
        return Err(String::from("wrong arguments: give either content or data"));
    }
    let channel =
        Channel::new(message.channel.as_str()).map_err(|error| format!("wrong arguments: channel: {error}"))?;
    Ok((message, channel))
}

fn publish(call: &Call<'_>) -> Result<Action, String> {
    let (Message { instance, content, data, retain, .. }, channel) = message(call)?;
    if instance.is_some() {
        return Err(String::from("wrong arguments: to reach another instance, use send"));
    }
    Ok(Action::Publish { channel, content, data: json_of(data), retain })
}

fn send(call: &Call<'_>) -> Result<Action, String> {
    let (Message { instance, content, data, retain, .. }, channel) = message(call)?;
    let instance = instance.ok_or("wrong arguments: which instance?")?;
    let instance = InstanceId::new(instance).map_err(|error| format!("wrong arguments: instance: {error}"))?;
    if retain {
        return Err(String::from("wrong arguments: retain is for publish"));
    }
    Ok(Action::Send { instance, channel, content, data: json_of(data) })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Later {
    in_seconds: Option<f64>,
    at: Option<String>,
    content: Option<String>,
    data: Option<Value>,
}

#[allow(clippy::cast_possible_truncation)] // bounded before
fn remind(call: &Call<'_>) -> Result<Action, String> {
    let Later { in_seconds, at, content, data } = arguments(call.arguments)?;
    let ahead = match (in_seconds, at) {
        (Some(seconds), None) if seconds > 0.0 && seconds * 1000.0 <= MAX_REMIND_AHEAD_MS as f64 => {
            (seconds * 1000.0) as i64
        }
        (None, Some(at)) => {
            let at = Millis::from_rfc3339(&at).map_err(|error| format!("wrong arguments: at: {error}"))?;
            at.0.saturating_sub(call.now.0)
        }
        (None, None) | (Some(_), Some(_)) => return Err(String::from("wrong arguments: give either in_seconds or at")),
        (Some(_), None) => return Err(String::from("wrong arguments: in_seconds is out of range")),
    };
    if ahead > MAX_REMIND_AHEAD_MS {
        return Err(String::from("wrong arguments: at most ten years ahead"));
    }
    if content.is_none() == data.is_none() {
        return Err(String::from("wrong arguments: give either content or data"));
    }
    Ok(Action::Remind { due: Millis(call.now.0.saturating_add(ahead.max(0))), content, data: json_of(data) })
}

fn json_of(data: Option<Value>) -> Option<RawJson> {
    data.as_ref().map(RawJson::of)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{InstanceKey, Profile, TenantId};

    const NOW: Millis = Millis(1_000_000);

    fn call(name: &str, arguments: Value) -> Option<Output> {
        call_with(1, name, arguments)
    }

    fn call_with(hops_left: u32, name: &str, arguments: Value) -> Option<Output> {
        let key = InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap());
        let profile = Profile::default();
        let Value::Object(arguments) = arguments else { panic!("an object") };
        let deadline = Duration::from_secs(1);
        perform(&Call {
            key: &key,
            profile: &profile,
            name,
            arguments: &arguments,
            idempotency: "s.1",
            deadline,
            hops_left,
            now: NOW,
        })
    }

    #[test]
    fn what_was_sent_on_too_often_is_not_sent_and_the_model_is_told() {
        let arguments = json!({"instance": "fan", "channel": "orders", "content": "on"});
        assert_eq!(call("send", arguments.clone()).unwrap().actions.len(), 1);
        let refused = call_with(0, "send", arguments).unwrap();
        assert!(refused.result.failed && refused.actions.is_empty(), "{refused:?}");
    }

    #[test]
    fn a_call_becomes_an_action() {
        let channel = || Channel::new("fan").unwrap();
        let text = |text: &str| Some(text.to_owned());
        for (name, arguments, action) in [
            ("set_state", json!({"reported": {"on": true}}), Action::Set(json!({"reported": {"on": true}}))),
            (
                "publish",
                json!({"channel": "fan", "data": {"on": 1}}),
                Action::Publish {
                    channel: channel(),
                    content: None,
                    data: Some(RawJson::of(&json!({"on": 1}))),
                    retain: false,
                },
            ),
            (
                "send",
                json!({"instance": "x", "channel": "fan", "content": "hi"}),
                Action::Send {
                    instance: InstanceId::new("x").unwrap(),
                    channel: channel(),
                    content: text("hi"),
                    data: None,
                },
            ),
            (
                "remind",
                json!({"in_seconds": 1.5, "content": "x"}),
                Action::Remind { due: Millis(1_001_500), content: text("x"), data: None },
            ),
            (
                "remind",
                json!({"at": "1970-01-01T00:20:00Z", "content": "x"}),
                Action::Remind { due: Millis(1_200_000), content: text("x"), data: None },
            ),
        ] {
            let output = call(name, arguments).unwrap();
            assert_eq!(output.actions, [action], "{output:?}");
            assert!(!output.result.failed);
        }
    }

    #[test]
    fn wrong_arguments_are_told_and_do_nothing() {
        for (name, arguments, reason) in [
            ("remember", json!({}), "missing field `content`"),
            ("remember", json!({"content": " "}), "content is empty"),
            ("remember", json!({"content": "x", "y": 1}), "unknown field `y`"),
            ("set_state", json!({}), "give reported or desired"),
            ("set_state", json!({"state": {}}), "unknown field `state`"),
            ("set_state", json!({"reported": 1}), "invalid type"),
            ("publish", json!({"channel": "fan"}), "either content or data"),
            ("publish", json!({"channel": "fan/#", "content": "x"}), "channel: "),
            ("publish", json!({"instance": "i", "channel": "fan", "content": "x"}), "use send"),
            ("send", json!({"channel": "fan", "content": "x"}), "which instance?"),
            ("send", json!({"instance": "a b", "channel": "fan", "content": "x"}), "instance: "),
            ("remind", json!({"content": "x"}), "either in_seconds or at"),
            ("remind", json!({"in_seconds": -1, "content": "x"}), "out of range"),
            ("remind", json!({"in_seconds": 1e300, "content": "x"}), "out of range"),
            ("remind", json!({"at": "tomorrow", "content": "x"}), "at: "),
        ] {
            let output = call(name, arguments).unwrap();
            assert!(output.result.failed && output.result.content.contains(reason), "{name}: {output:?}");
            assert!(output.actions.is_empty());
        }
        assert_eq!(call("fly", json!({})), None);
    }

    #[test]
    fn all_are_offered_under_names_and_with_schemas() {
        let names: Vec<String> = specs().map(|spec| spec.name).collect();
        assert_eq!(names, crate::config::tools::BUILT_IN[..6]);
        for spec in specs() {
            assert!(ToolSpec::is_name(&spec.name));
            assert_eq!(spec.parameters.value()["type"], "object");
        }
    }

    proptest::proptest! {
        /// Whatever a model writes, there is an answer.
        #[test]
        fn no_arguments_are_too_strange(name in "remember|set_state|publish|send|remind", at in "[a-z_]{1,10}", text in ".{0,30}", n: f64) {
            for value in [json!(text), json!(n), json!({ at.clone(): text }), json!([n])] {
                for field in ["content", "data", "channel", "instance", "in_seconds", "at", "reported", at.as_str()] {
                    let output = call(&name, json!({ field: value, "content": "x" })).unwrap();
                    proptest::prop_assert_eq!(output.result.failed, output.actions.is_empty());
                }
            }
        }
    }
}
