//! The bodies of the chat protocol as the API document describes them: what is looked at here. Fields beyond these are left alone.
//!
//! Descriptions only: what is read and written is in `wire.rs`, `asked.rs` and `embeddings.rs`.
#![allow(dead_code)]

use serde_json::Value;
use utoipa::ToSchema;

/// A chat request.
#[derive(ToSchema)]
pub struct ChatBody {
    /// The instance.
    model: String,
    /// The last one, of role `user` or `tool`, becomes the stimulus; those before it count only when the instance has no history.
    messages: Vec<ChatMessage>,
    /// Whether the answer is a stream of chunks.
    stream: Option<bool>,
    stream_options: Option<ChatStreamOptions>,
    /// Functions of the client: a call of one ends the turn.
    #[schema(max_items = 128)]
    tools: Option<Vec<ChatTool>>,
    /// 1.
    #[schema(minimum = 1, maximum = 1)]
    n: Option<u64>,
    /// The stimulus's sender.
    user: Option<String>,
    /// At most so many tokens of an answer, if that is less than the provider's own.
    #[schema(minimum = 1)]
    max_completion_tokens: Option<u64>,
    /// The same by its older name.
    #[schema(minimum = 1)]
    max_tokens: Option<u64>,
    /// Passed on, as are the fields behind it.
    #[schema(minimum = 0)]
    temperature: Option<f64>,
    #[schema(minimum = 0)]
    top_p: Option<f64>,
    /// Text, or a list of texts.
    stop: Option<Value>,
    seed: Option<i64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    #[schema(value_type = Option<Object>)]
    logit_bias: Option<Value>,
    /// An answer that is JSON is the reply's `data`, too.
    #[schema(value_type = Option<Object>)]
    response_format: Option<Value>,
    /// Text or an object.
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    reasoning_effort: Option<String>,
}

/// A message.
#[derive(ToSchema)]
struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    role: String,
    /// Text, or a list of parts of type `text`.
    content: Option<Value>,
    /// Calls the client was left, as the answer had them.
    #[schema(value_type = Option<Vec<Object>>)]
    tool_calls: Option<Value>,
    /// Of role `tool`: which call this is the result of.
    tool_call_id: Option<String>,
}

/// How a stream ends.
#[derive(ToSchema)]
struct ChatStreamOptions {
    /// Whether a last chunk says what was consumed.
    include_usage: Option<bool>,
}

/// A function of the client.
#[derive(ToSchema)]
struct ChatTool {
    /// `function`.
    #[schema(rename = "type")]
    kind: String,
    function: ChatFunction,
}

/// What the model is told of it.
#[derive(ToSchema)]
struct ChatFunction {
    #[schema(max_length = 64)]
    name: String,
    description: Option<String>,
    /// JSON schema of its arguments.
    #[schema(value_type = Option<Object>)]
    parameters: Option<Value>,
}

/// Texts to make vectors of.
#[derive(ToSchema)]
pub struct EmbeddingsBody {
    /// A text, or a list of 1 to 2048 texts.
    input: Value,
    /// Said again in the answer; the embedder is the node's own.
    model: Option<String>,
    /// `float` (the default) or `base64`.
    encoding_format: Option<String>,
    /// As many numbers as the node's vectors have; others are refused.
    dimensions: Option<usize>,
}

/// Vectors.
#[derive(ToSchema)]
pub struct EmbeddingsAnswer {
    /// `list`.
    object: String,
    /// In the order of the texts.
    data: Vec<EmbeddingView>,
    model: String,
    /// `prompt_tokens` and `total_tokens`: words.
    #[schema(value_type = Object)]
    usage: Value,
}

/// A vector.
#[derive(ToSchema)]
struct EmbeddingView {
    /// `embedding`.
    object: String,
    index: usize,
    /// Numbers, or their bytes (32 bits each, the lowest first) in base64.
    embedding: Value,
}

/// A refusal in the form of the chat protocol.
#[derive(ToSchema)]
pub struct ChatError {
    error: ChatFault,
}

/// What was refused.
#[derive(ToSchema)]
struct ChatFault {
    /// What is wrong, and what to do.
    message: String,
    /// By status: `invalid_request_error`, `authentication_error`, `server_error`, ...
    #[schema(rename = "type")]
    kind: String,
    /// The field it is about.
    param: Option<String>,
    /// As everywhere, in lower case.
    code: String,
}
