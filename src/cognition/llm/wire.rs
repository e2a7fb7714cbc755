//! Messages and tools as the chat protocol spells them, and calls of tools put together from the pieces they arrive in.
//!
//! Servers differ in how they stream calls: with or without an index, with an id in each piece, the first or none, arguments
//! piece by piece, at once, or as an object; some give every parallel call the same index. Pure.
//! Invariants: at most [`MAX_CALLS`] calls of at most [`MAX_ANSWER_BYTES`] together; each has a name, and an id of its own.
//! Tests: at the foot.

use serde::{Deserialize, Deserializer, Serialize, Serializer, ser::SerializeMap as _};
use serde_json::{Value, json};

use crate::types::{
    Message, RawJson, Speaker, ToolCall,
    limits::{MAX_ANSWER_BYTES, MAX_CALLS},
};

/// A message on its way out.
pub(super) struct Spoken<'a>(pub &'a Message);

impl Serialize for Spoken<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Message { role, content, calls, call } = self.0;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("role", role)?;
        if content.is_empty() && !calls.is_empty() {
            map.serialize_entry("content", &Value::Null)?;
        } else {
            map.serialize_entry("content", content)?;
        }
        if !calls.is_empty() && *role == Speaker::Assistant {
            let spelled = |call: &ToolCall| {
                let arguments = if call.arguments.is_empty() { "{}" } else { &call.arguments };
                json!({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}})
            };
            map.serialize_entry("tool_calls", &calls.iter().map(spelled).collect::<Vec<_>>())?;
        }
        if let Some(call) = call {
            map.serialize_entry("tool_call_id", call)?;
        }
        map.end()
    }
}

/// A tool on its way out.
#[derive(Debug, Clone)]
pub(super) struct Tool {
    pub(super) name: String,
    pub(super) description: String,
    pub(super) parameters: RawJson,
}

impl Serialize for Tool {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Function<'a> {
            name: &'a str,
            description: &'a str,
            parameters: &'a RawJson,
        }
        let Tool { name, description, parameters } = self;
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("type", "function")?;
        map.serialize_entry("function", &Function { name, description, parameters })?;
        map.end()
    }
}

/// A piece of a call.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Piece {
    #[serde(default)]
    index: Option<usize>,
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    function: Option<Function>,
}

#[derive(Debug, Default, Deserialize)]
struct Function {
    #[serde(default)]
    name: Option<String>,
    #[serde(default, deserialize_with = "text_or_object")]
    arguments: Option<Arguments>,
}

#[derive(Debug)]
enum Arguments {
    /// The next piece.
    Piece(String),
    /// All of them.
    Whole(String),
}

fn text_or_object<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Arguments>, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::Null => None,
        Value::String(piece) => Some(Arguments::Piece(piece)),
        other => Some(Arguments::Whole(other.to_string())),
    })
}

/// Calls while they arrive.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Calls {
    open: Vec<Open>,
    bytes: usize,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Open {
    index: Option<usize>,
    id: String,
    name: String,
    arguments: String,
}

impl Calls {
    /// Takes a piece.
    pub(super) fn take(&mut self, piece: Piece) {
        let Piece { index, id, function } = piece;
        let id = id.unwrap_or_default();
        let Function { name, arguments } = function.unwrap_or_default();
        let name = name.unwrap_or_default();
        let Some(open) = self.place(index, &id, &name) else { return };
        let before = open.id.len() + open.name.len() + open.arguments.len();
        if open.id.is_empty() {
            open.id = id;
        }
        if open.name.is_empty() {
            open.name = name;
        }
        match arguments {
            None => {}
            Some(Arguments::Piece(piece)) => open.arguments.push_str(&piece),
            Some(Arguments::Whole(whole)) => open.arguments = whole,
        }
        let after = open.id.len() + open.name.len() + open.arguments.len();
        self.bytes = self.bytes + after - before.min(after);
    }

    /// The call a piece belongs to; none when there are too many.
    fn place(&mut self, index: Option<usize>, id: &str, name: &str) -> Option<&mut Open> {
        if self.bytes > MAX_ANSWER_BYTES {
            return None;
        }
        let found = match index {
            Some(_) => self.open.iter().rposition(|open| open.index == index),
            None if !id.is_empty() => self.open.iter().position(|open| open.id == id),
            None => self.open.len().checked_sub(1),
        };
        // A new id, or a name where there are arguments already, begins another call whatever the index says.
        let goes_on = found.filter(|&at| {
            let open = &self.open[at];
            let other_id = !id.is_empty() && !open.id.is_empty() && open.id != id;
            let begins = id.is_empty() && index.is_none() && !name.is_empty() && !open.name.is_empty();
            !(other_id || begins)
        });
        match goes_on {
            Some(at) => self.open.get_mut(at),
            None if self.open.len() >= MAX_CALLS => None,
            None => {
                self.open.push(Open { index, ..Open::default() });
                self.open.last_mut()
            }
        }
    }

    /// Bytes so far.
    pub(super) fn weight(&self) -> usize {
        self.bytes
    }

    /// The calls, each with an id of its own; what has no name is no call.
    pub(super) fn finish(self) -> Vec<ToolCall> {
        let mut calls: Vec<ToolCall> = Vec::with_capacity(self.open.len());
        for (at, Open { id, name, arguments, .. }) in self.open.into_iter().enumerate() {
            if name.is_empty() {
                continue;
            }
            let free = |id: &String| !id.is_empty() && calls.iter().all(|call| call.id != *id);
            // One of so many names is free, whatever the server called the others.
            let made = (0..=calls.len()).map(|nth| format!("call_{at}_{nth}"));
            let id = std::iter::once(id).chain(made).find(free).unwrap_or_default();
            calls.push(ToolCall { id, name, arguments });
        }
        calls
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn put_together(pieces: &[Value]) -> Vec<(String, String, String)> {
        let mut calls = Calls::default();
        for piece in pieces {
            calls.take(serde_json::from_value(piece.clone()).unwrap());
        }
        calls.finish().into_iter().map(|call| (call.id, call.name, call.arguments)).collect()
    }

    fn call(id: &str, name: &str, arguments: &str) -> (String, String, String) {
        (id.into(), name.into(), arguments.into())
    }

    #[test]
    fn calls_are_put_together_however_a_server_streams_them() {
        let two = [call("a", "look", r#"{"at":1}"#), call("b", "touch", "{}")];
        let by_the_book = [
            json!({"index": 0, "id": "a", "type": "function", "function": {"name": "look", "arguments": ""}}),
            json!({"index": 0, "function": {"arguments": "{\"at\""}}),
            json!({"index": 0, "function": {"arguments": ":1}"}}),
            json!({"index": 1, "id": "b", "function": {"name": "touch", "arguments": "{}"}}),
        ];
        assert_eq!(put_together(&by_the_book), two);
        let in_one_piece = [
            json!({"id": "a", "function": {"name": "look", "arguments": {"at": 1}}}),
            json!({"id": "b", "function": {"name": "touch", "arguments": "{}"}}),
        ];
        assert_eq!(put_together(&in_one_piece), two);
        let same_index = [
            json!({"index": 0, "id": "a", "function": {"name": "look", "arguments": "{\"at\":1}"}}),
            json!({"index": 0, "id": "b", "function": {"name": "touch", "arguments": "{}"}}),
        ];
        assert_eq!(put_together(&same_index), two);
        let id_and_name_each_time = [
            json!({"index": 0, "id": "a", "function": {"name": "look", "arguments": "{\"at\":"}}),
            json!({"index": 0, "id": "a", "function": {"name": "look", "arguments": "1}"}}),
        ];
        assert_eq!(put_together(&id_and_name_each_time), two[..1]);
        let interleaved = [
            json!({"index": 0, "id": "a", "function": {"name": "look"}}),
            json!({"index": 1, "id": "b", "function": {"name": "touch"}}),
            json!({"index": 0, "function": {"arguments": "{\"at\":1}"}}),
            json!({"index": 1, "function": {"arguments": "{}"}}),
        ];
        assert_eq!(put_together(&interleaved), two);
    }

    #[test]
    fn missing_and_repeated_ids_are_made_up() {
        let nameless = json!({"function": {"arguments": "{}"}});
        let plain = json!({"function": {"name": "look", "arguments": "{}"}});
        let made = put_together(&[plain.clone(), plain, json!({"id": "x", "function": {"name": "look"}}), nameless]);
        assert_eq!(made.len(), 3, "{made:?}");
        assert!(made[0].0 != made[1].0 && made.iter().all(|call| !call.0.is_empty()), "{made:?}");
        let called_so = json!({"id": "call_1_0", "function": {"name": "look"}});
        let made = put_together(&[called_so, json!({"index": 1, "function": {"name": "look"}})]);
        assert!(made.len() == 2 && made[0].0 != made[1].0, "{made:?}");
        assert_eq!(put_together(&[json!({"id": "x"}), json!(null).get("y").cloned().unwrap_or(json!({}))]), []);
    }

    #[test]
    fn calls_are_bounded() {
        let pieces: Vec<Value> =
            (0..100).map(|n| json!({"index": n, "id": format!("{n}"), "function": {"name": "x"}})).collect();
        assert_eq!(put_together(&pieces).len(), MAX_CALLS);
        let long = json!({"index": 0, "function": {"name": "x", "arguments": "a".repeat(MAX_ANSWER_BYTES / 2)}});
        let made = put_together(&[long.clone(), long.clone(), long.clone(), long.clone(), long]);
        assert!(made[0].2.len() <= 2 * MAX_ANSWER_BYTES, "{}", made[0].2.len());
    }

    #[test]
    fn messages_are_spelled_as_servers_take_them() {
        let spelled = |message: &Message| serde_json::to_value(Spoken(message)).unwrap();
        assert_eq!(spelled(&Message::said(Speaker::User, "hi")), json!({"role": "user", "content": "hi"}));
        let calls = vec![ToolCall { id: "a".into(), name: "look".into(), arguments: String::new() }];
        let calling = Message { calls, ..Message::said(Speaker::Assistant, "") };
        let function = json!({"name": "look", "arguments": "{}"});
        assert_eq!(
            spelled(&calling),
            json!({"role": "assistant", "content": null, "tool_calls": [{"id": "a", "type": "function", "function": function}]})
        );
        let result = json!({"role": "tool", "content": "21", "tool_call_id": "a"});
        assert_eq!(spelled(&Message::result("a", "21")), result);
    }

    /// Any JSON that is not deep.
    fn anything() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            let key = prop_oneof!["index|id|type|function|name|arguments", ".{0,6}"];
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((key, inner), 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_pieces_are_too_strange(
            pieces in prop::collection::vec(anything(), 0..12),
            forms in prop::collection::vec((prop::option::of(0_usize..4), prop::option::of("[ab]?"), ".{0,3}", anything()), 0..40),
        ) {
            let mut calls = Calls::default();
            let formed = forms.into_iter().map(|(index, id, name, arguments)| {
                json!({"index": index, "id": id, "function": {"name": name, "arguments": arguments}})
            });
            for piece in pieces.into_iter().chain(formed) {
                // What is no piece is refused, and the others go on.
                if let Ok(piece) = serde_json::from_value::<Piece>(piece) {
                    calls.take(piece);
                }
            }
            let made = calls.finish();
            prop_assert!(made.len() <= MAX_CALLS);
            let ids: std::collections::HashSet<&str> = made.iter().map(|call| call.id.as_str()).collect();
            prop_assert_eq!(ids.len(), made.len(), "each has an id of its own: {:?}", made);
            prop_assert!(made.iter().all(|call| !call.id.is_empty() && !call.name.is_empty()));
        }
    }
}
