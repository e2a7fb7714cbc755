//! The chat protocol's JSON: requests read, answers, chunks and errors written.
//!
//! Unknown fields are left alone, as the protocol's servers do: clients send what newer ones understand. Pure.
//! Tests: at the foot.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{CHANNEL, Refusal, asked};
use crate::{
    gateway::http::wire::{channel, sender},
    types::{
        AuthContext, Chat, Cut, InstanceId, Message, Millis, Priority, RawJson, Source, Speaker, Stimulus, StimulusId,
        TenantId, TurnRecord,
        chat::{CHAT_TYPE, LeftCall, LeftCalls},
    },
};

/// A request.
#[derive(Debug, Deserialize)]
pub struct Request {
    /// The instance.
    pub model: String,
    messages: Vec<Said>,
    /// Whether the answer is a stream of chunks.
    #[serde(default)]
    pub stream: Option<bool>,
    #[serde(default)]
    stream_options: Option<StreamOptions>,
    #[serde(default)]
    tools: Option<Vec<asked::Tool>>,
    #[serde(default)]
    n: Option<u64>,
    #[serde(default)]
    user: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Said {
    role: String,
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    tool_calls: Option<Vec<LeftCall>>,
    #[serde(default)]
    tool_call_id: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "text, or a list of parts of type 'text'")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: Option<String>,
}

pub(super) fn refuse(why: impl Into<String>) -> Refusal {
    Refusal::Field(why.into())
}

impl Said {
    fn text(&self, at: usize) -> Result<String, Refusal> {
        match &self.content {
            None => Ok(String::new()),
            Some(Content::Text(text)) => Ok(text.clone()),
            Some(Content::Parts(parts)) => {
                let text = |part: &Part| match (part.kind.as_str(), &part.text) {
                    ("text" | "refusal", Some(text)) => Ok(text.clone()),
                    (kind, _) => {
                        Err(refuse(format!("messages[{at}]: parts of type '{kind}' are not taken, only text")))
                    }
                };
                Ok(parts.iter().map(text).collect::<Result<Vec<_>, _>>()?.concat())
            }
        }
    }

    /// As a message; none for those that set the scene.
    fn message(self, at: usize) -> Result<Option<Message>, Refusal> {
        let text = self.text(at)?;
        Ok(match self.role.as_str() {
            "system" | "developer" => None,
            "user" => Some(Message::said(Speaker::User, text)),
            "assistant" => {
                let calls = LeftCalls { tool_calls: self.tool_calls.unwrap_or_default() }.calls();
                Some(Message { calls, ..Message::said(Speaker::Assistant, text) })
            }
            "tool" => {
                let call = self.tool_call_id.ok_or_else(|| refuse(format!("messages[{at}]: no tool_call_id")))?;
                Some(Message::result(call, text))
            }
            other => return Err(refuse(format!("messages[{at}]: nobody knows the role '{other}'"))),
        })
    }
}

impl Request {
    /// Whether there are messages before the last one.
    pub fn has_earlier(&self) -> bool {
        self.messages.len() > 1
    }

    /// Whether a stream ends with what was consumed.
    pub fn wants_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// The stimulus; `is_new`: the instance has no history and is told the one of the request.
    ///
    /// # Errors
    /// [`Refusal`] says what is wrong, by its place.
    pub fn into_stimulus(
        self,
        who: &AuthContext,
        id: Option<StimulusId>,
        is_new: bool,
        now: Millis,
    ) -> Result<Stimulus, Refusal> {
        if self.n.is_some_and(|n| n != 1) {
            return Err(refuse("n: an instance gives one answer"));
        }
        let tools = asked::tools(self.tools.unwrap_or_default())?;
        let mut instructions = Vec::new();
        let mut messages = Vec::with_capacity(self.messages.len());
        for (at, said) in self.messages.into_iter().enumerate() {
            let text = said.text(at)?;
            match said.message(at)? {
                Some(message) => messages.push(message),
                None => instructions.push(text),
            }
        }
        let mut results = Vec::new();
        while let Some(result) = messages.pop_if(|message| message.role == Speaker::Tool) {
            results.insert(0, result);
        }
        let content = match messages.pop_if(|message| results.is_empty() && message.role == Speaker::User) {
            Some(message) => Some(message.content),
            None if results.is_empty() => return Err(refuse("messages: the last one must be of user or tool")),
            None => None,
        };
        let chat = Chat {
            instructions: (!instructions.is_empty()).then(|| instructions.join("\n\n")),
            earlier: if is_new { messages } else { Vec::new() },
            results,
            tools,
            options: asked::options(self.rest)?,
        };
        let mut stimulus = Stimulus::empty(Source::Http, channel(CHANNEL)?, now);
        stimulus.sender = sender(self.user.filter(|user| !user.is_empty()), who)?;
        stimulus.priority = Priority::default_for(Source::Http);
        stimulus.content = content;
        if chat != Chat::default() {
            let text = RawJson::from_serialize(&chat).map_err(|error| refuse(error.to_string()))?;
            stimulus.data = Some(text);
            stimulus.content_type = Some(String::from(CHAT_TYPE));
        }
        Ok(match id {
            Some(id) => stimulus.with_repeatable_id(id),
            None => stimulus,
        })
    }
}

/// What all pieces of one answer have in common.
#[derive(Debug, Clone)]
pub struct Form {
    id: String,
    created: i64,
    model: String,
}

impl Form {
    /// Of the answer to a stimulus.
    pub fn new(model: &InstanceId, stimulus: &StimulusId, at: Millis) -> Self {
        Self { id: format!("chatcmpl-{stimulus}"), created: at.0.div_euclid(1000), model: model.to_string() }
    }

    /// A chunk with this change.
    pub fn chunk(&self, delta: &Value, finish: Option<&str>) -> Value {
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish});
        json!({
            "id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model,
            "choices": [choice],
        })
    }

    /// The last chunk, which says what was consumed.
    pub fn usage(&self, turn: &TurnRecord) -> Value {
        json!({
            "id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model,
            "choices": [], "usage": Usage::of(turn),
        })
    }
}

/// What was consumed.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = ChatUsage)]
pub struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
}

impl Usage {
    fn of(turn: &TurnRecord) -> Self {
        let usage = turn.usage.unwrap_or_default();
        let both = usage.input_tokens.saturating_add(usage.output_tokens);
        Self { prompt_tokens: usage.input_tokens, completion_tokens: usage.output_tokens, total_tokens: both }
    }
}

/// What a turn says, in the protocol's words.
pub struct Answer {
    /// Its text.
    pub content: String,
    /// Calls that are left to the client.
    pub calls: Vec<LeftCall>,
    cut: Option<Cut>,
}

impl Answer {
    /// Of a turn; data without text is its JSON.
    pub fn of(turn: &TurnRecord) -> Self {
        let cut = turn.cut();
        let Some(reply) = &turn.reply else { return Self { content: String::new(), calls: Vec::new(), cut } };
        let calls = reply.data.as_ref().and_then(LeftCalls::of).map(|left| left.tool_calls).unwrap_or_default();
        let content = match (&reply.content, &reply.data) {
            (Some(content), _) => content.clone(),
            (None, Some(data)) if calls.is_empty() => data.get().to_owned(),
            (None, _) => String::new(),
        };
        Self { content, calls, cut }
    }

    /// Why a turn has none, when it says so.
    ///
    /// # Errors
    /// [`Refusal::NoAnswer`].
    pub fn is_there(turn: &TurnRecord) -> Result<(), Refusal> {
        match &turn.error {
            Some(reason) if turn.reply.is_none() && turn.cut().is_none() => Err(Refusal::NoAnswer(reason.clone())),
            _ => Ok(()),
        }
    }

    /// Why it ends.
    pub fn finish(&self) -> &'static str {
        if self.calls.is_empty() { self.cut.map_or("stop", Cut::as_str) } else { "tool_calls" }
    }
}

/// An answer in one piece.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = ChatCompletion)]
pub struct Completion {
    id: String,
    object: &'static str,
    created: i64,
    model: String,
    #[schema(value_type = Vec<Object>)]
    choices: [Value; 1],
    usage: Usage,
}

impl Completion {
    /// Of a turn.
    pub fn of(form: &Form, turn: &TurnRecord) -> Self {
        let answer = Answer::of(turn);
        let finish = answer.finish();
        let mut message = json!({"role": "assistant", "content": answer.content, "refusal": null});
        if !answer.calls.is_empty() {
            message["tool_calls"] = json!(answer.calls);
            if answer.content.is_empty() {
                message["content"] = Value::Null;
            }
        }
        Self {
            id: form.id.clone(),
            object: "chat.completion",
            created: form.created,
            model: form.model.clone(),
            choices: [json!({"index": 0, "message": message, "logprobs": null, "finish_reason": finish})],
            usage: Usage::of(turn),
        }
    }
}

/// An instance as a model.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Model)]
pub struct ModelView {
    id: String,
    object: &'static str,
    created: i64,
    owned_by: String,
}

impl ModelView {
    /// Of an instance.
    pub fn of(instance: &InstanceId, created: Millis, tenant: &TenantId) -> Self {
        let created = created.0.div_euclid(1000);
        Self { id: instance.to_string(), object: "model", created, owned_by: tenant.to_string() }
    }
}

/// Instances as models.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Models {
    /// Always `list`.
    pub object: &'static str,
    /// In the order of their ids.
    pub data: Vec<ModelView>,
    /// Whether there are more: ask again with the last id as `after`.
    pub has_more: bool,
}

/// The field a refusal is about, where its text begins with one: `messages[0].content: ...`.
fn param(message: &str) -> Option<&str> {
    let (place, _) = message.split_once(": ")?;
    let named = |byte: u8| byte.is_ascii_alphanumeric() || b"_.[]".contains(&byte);
    (place.bytes().all(named) && place.starts_with(|first: char| first.is_ascii_lowercase())).then_some(place)
}

/// A refusal in the protocol's form.
pub fn refused(status: u16, code: &str, message: &str) -> Value {
    let kind = match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        429 => "rate_limit_error",
        400..500 => "invalid_request_error",
        _ => "server_error",
    };
    let param = (status == 400).then(|| param(message)).flatten();
    json!({"error": {"message": message, "type": kind, "param": param, "code": code.to_ascii_lowercase()}})
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(body: &Value, is_new: bool) -> Result<Stimulus, Refusal> {
        let request: Request = serde_json::from_str(&body.to_string()).unwrap();
        let who = AuthContext::loopback(TenantId::new("t").unwrap());
        request.into_stimulus(&who, None, is_new, Millis(0))
    }

    #[test]
    fn a_plain_request_is_a_plain_stimulus() {
        let body = json!({"model": "ada", "messages": [{"role": "user", "content": "hello"}], "novel_field": 1});
        let stimulus = read(&body, true).unwrap();
        assert_eq!((stimulus.content.as_deref(), stimulus.data, stimulus.content_type), (Some("hello"), None, None));
        assert_eq!((stimulus.channel.as_str(), stimulus.priority), ("chat", Priority::Human));
    }

    #[test]
    fn what_came_before_is_taken_only_without_a_history() {
        let parts = json!([{"type": "text", "text": "and "}, {"type": "text", "text": "now?"}]);
        let body = json!({"model": "ada", "temperature": 0.5, "logprobs": null, "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"}, {"role": "user", "content": parts},
        ]});
        let stimulus = read(&body, true).unwrap();
        assert_eq!(stimulus.content.as_deref(), Some("and now?"));
        let chat = Chat::of(&stimulus).unwrap();
        assert_eq!((chat.instructions.as_deref(), chat.earlier.len()), (Some("Be brief."), 2));
        assert_eq!(chat.options, Map::from_iter([(String::from("temperature"), json!(0.5))]));
        assert_eq!(Chat::of(&read(&body, false).unwrap()).unwrap().earlier, []);
    }

    #[test]
    fn results_of_the_clients_tools_are_a_stimulus() {
        let call = json!({"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}});
        let tool = json!({"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}});
        let body = json!({"model": "ada", "tools": [tool], "messages": [
            {"role": "user", "content": "how warm?"}, {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "21"}, {"role": "tool", "tool_call_id": "c2", "content": "x"},
        ]});
        let stimulus = read(&body, false).unwrap();
        let chat = Chat::of(&stimulus).unwrap();
        assert_eq!(stimulus.content, None);
        assert_eq!(chat.results, [Message::result("c1", "21"), Message::result("c2", "x")]);
        assert_eq!((chat.tools.len(), chat.tools[0].name.as_str()), (1, "look"));
    }

    #[test]
    fn what_cannot_be_taken_is_refused_by_its_place() {
        let user = json!({"role": "user", "content": "x"});
        let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]});
        for (body, why) in [
            (json!({"messages": []}), "the last one must be"),
            (json!({"messages": [user, {"role": "assistant", "content": "y"}]}), "the last one must be"),
            (json!({"messages": [image]}), "messages[0]: parts of type 'image_url'"),
            (
                json!({"messages": [user, {"role": "ghost", "content": "x"}]}),
                "messages[1]: nobody knows the role 'ghost'",
            ),
            (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0]: no tool_call_id"),
            (json!({"messages": [user], "n": 2}), "n: an instance"),
            (json!({"messages": [user], "tools": [{"type": "browser"}]}), "tools[0].type: 'browser'"),
            (
                json!({"messages": [user], "tools": [{"type": "function", "function": {"name": "a b"}}]}),
                "tools[0].function.name: 'a b'",
            ),
            (json!({"messages": [user], "max_tokens": 0}), "max_tokens: must be"),
        ] {
            let mut body = body;
            body["model"] = json!("ada");
            let refusal = read(&body, true).unwrap_err().to_string();
            assert!(refusal.contains(why), "{refusal}");
        }
    }

    #[test]
    fn a_refusal_names_the_field_it_is_about() {
        assert_eq!(refused(400, "INVALID", "n: one answer")["error"]["param"], "n");
        assert_eq!(refused(400, "INVALID", "messages[0].content: text")["error"]["param"], "messages[0].content");
        for (status, message) in [(400, "this is not JSON: x"), (400, "none"), (422, "reason: x")] {
            assert_eq!(refused(status, "X", message)["error"]["param"], Value::Null, "{message}");
        }
    }

    proptest! {
        #[test]
        fn no_request_is_too_strange(
            at in any::<prop::sample::Index>(),
            cut in 0_usize..20,
            put in "[\\[\\]{}\",:a-z0-9\\\\]{0,8}|null|\\{\\}|\\[\\]|.{0,4}",
            role in "user|system|assistant|tool|developer|[a-z]{0,4}",
            is_new: bool,
        ) {
            let calls = json!([{"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}]);
            let body = json!({"model": "ada", "n": 1, "user": "u", "tools": [{"type": "function", "function": {"name": "look"}}],
                "messages": [{"role": "system", "content": "be"}, {"role": "assistant", "content": null, "tool_calls": calls},
                    {"role": "tool", "tool_call_id": "c", "content": "x"}, {"role": role, "content": [{"type": "text", "text": "hi"}]}]});
            let mut text = body.to_string();
            let start = (0..=at.index(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            let end = (start + cut).min(text.len());
            text.replace_range(start..end, &put);
            if let Ok(request) = serde_json::from_str::<Request>(&text) {
                let who = AuthContext::loopback(TenantId::new("t").unwrap());
                if let Ok(stimulus) = request.into_stimulus(&who, None, is_new, Millis(0)) {
                    // What was taken can be told to a model, whatever it was.
                    prop_assert!(stimulus.content_type.is_none() || Chat::of(&stimulus).is_some());
                }
            }
        }
    }
}
