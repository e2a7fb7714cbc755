//! `POST /v1/embeddings`: vectors of texts by the node's own embedder, the one its memories are searched with.
//!
//! Texts only, as text or a list of texts; numbers as a list or, as the official clients ask for, as bytes in base64.
//! Tests: `tests/it/openai.rs`, with the official client.

use actix_web::{HttpResponse, http::StatusCode, web::Payload};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::{
    Caller, admission, json_body,
    problem::{Problem, Refusal},
    respond,
};
use crate::types::words;

/// Most texts of one request.
const MAX_TEXTS: usize = 2048;

#[derive(Debug, Deserialize)]
struct Request {
    input: Input,
    #[serde(default)]
    model: String,
    #[serde(default)]
    encoding_format: Option<Format>,
    #[serde(default)]
    dimensions: Option<usize>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "text or a list of texts: numbers of tokens are not taken, every model has its own")]
enum Input {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    Float,
    Base64,
}

/// `POST /v1/embeddings`.
///
/// # Errors
/// [`Problem`] when there is no embedder, or the request asks for what it cannot give.
pub async fn post(caller: &Caller<'_>, payload: Payload) -> Result<HttpResponse, Problem> {
    caller.query(&[])?;
    admission::json_type(caller.request.headers(), false)?;
    let bytes = admission::body(caller.request.headers(), payload, &caller.shared.config).await?;
    let Request { input, model, encoding_format, dimensions } = json_body(&bytes)?;
    let texts = match input {
        Input::One(text) => vec![text],
        Input::Many(texts) => texts,
    };
    if texts.is_empty() || texts.len() > MAX_TEXTS {
        return Err(Refusal::Field(format!("input: 1 to {MAX_TEXTS} texts")).into());
    }
    let Some(vectors) = caller.shared.router.memory().embed(&caller.who.tenant, &texts).await? else {
        return Err(Refusal::Field(String::from("this node has no embedder: memory.embedder is off")).into());
    };
    let mut data = Vec::with_capacity(texts.len());
    let tokens: usize = texts.iter().map(|text| words::words(text).count()).sum();
    for (index, numbers) in vectors.iter().enumerate() {
        if dimensions.is_some_and(|wanted| wanted != numbers.len()) {
            return Err(Refusal::Field(format!("dimensions: vectors have {} numbers", numbers.len())).into());
        }
        let embedding = match encoding_format {
            Some(Format::Base64) => {
                let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
                Value::String(BASE64_STANDARD.encode(bytes))
            }
            Some(Format::Float) | None => json!(numbers),
        };
        data.push(json!({"object": "embedding", "index": index, "embedding": embedding}));
    }
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    let answer = json!({"object": "list", "data": data, "model": model, "usage": usage});
    Ok(respond(StatusCode::OK, answer.to_string()))
}
