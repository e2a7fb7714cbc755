//! What the fuzzer throws at the HTTP door: bodies of stimuli, query strings, paths, and the cursors of streams.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;

use super::{
    chat,
    follow::{Has, Resume},
    json_body,
    query::Query,
    route,
    wire::StimulusBody,
};
use crate::types::{AuthContext, Millis, Stimulus, TenantId, limits::MAX_JSON_DEPTH, strict};

pub use super::{
    chat::fuzz::requests as chat_requests,
    memory::fuzz::{episodes, lines},
};

const PARAMETERS: [&str; 8] = ["wait", "after", "limit", "label", "instance", "consistency", "epochs", "key"];

/// A body of a stimulus, and JSON as the doors let it in: what is taken is stored as it is, and is never nested too deeply.
pub fn stimuli(bytes: &[u8]) {
    if let Ok(text) = strict::check(bytes)
        && let Ok(value) = serde_json::from_str::<serde_json::Value>(text)
    {
        assert!(depth(&value) <= MAX_JSON_DEPTH);
    }
    let Ok(body) = json_body::<StimulusBody<'_>>(bytes) else { return };
    let who = AuthContext::loopback(TenantId::new("t").unwrap());
    let id = body.id().cloned();
    let Ok(stimulus) = body.into_stimulus(&who, id, Millis(5)) else { return };
    assert!(stimulus.salience.is_none_or(|salience| (0.0..=1.0).contains(&salience)));
    let data = stimulus.data.as_ref().map(|data| serde_json::from_str::<serde_json::Value>(data.get()));
    assert!(data.is_none_or(|data| data.is_ok()), "everybody can read what was taken");
    let bytes = postcard::to_stdvec(&stimulus).unwrap();
    assert_eq!(postcard::from_bytes::<Stimulus>(&bytes).unwrap(), stimulus);
}

fn depth(value: &serde_json::Value) -> usize {
    match value {
        serde_json::Value::Array(all) => 1 + all.iter().map(depth).max().unwrap_or(0),
        serde_json::Value::Object(all) => 1 + all.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Lines, each a path, a query string and a cursor.
pub fn queries(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for line in text.split('\n').take(16) {
        if let Ok(query) = Query::parse(line, &PARAMETERS) {
            let _ = (query.after_turn(), query.limit());
        }
        for method in ["GET", "POST", "DELETE", "HEAD"] {
            let _ = route::find(method, line);
        }
        // What is escaped in full reads as it was.
        let mut escaped = String::new();
        line.bytes().for_each(|byte| write!(escaped, "%{byte:02x}").unwrap());
        assert_eq!(route::decode(&escaped, true).as_deref(), Some(line));
        let _ = route::decode(line, false);
        if let Some(resume) = Resume::parse(line) {
            let id = match resume.has {
                Has::Turn => format!("{}:turn", resume.stimulus),
                Has::Words(count, digest, None) => format!("{}:{count}:{digest:x}", resume.stimulus),
                Has::Words(count, digest, Some(said)) => format!("{}:{count}:{digest:x}:{said}", resume.stimulus),
            };
            assert_eq!(Resume::parse(&id), Some(resume));
        }
        chat::fuzz::cursor(line);
    }
}
