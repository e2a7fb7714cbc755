//! What the fuzzer throws at the OpenAI-compatible door: requests, and the ids of chunks.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.
#![allow(clippy::unwrap_used)]

use super::{stream::Resume, wire::Request};
use crate::{
    gateway::http::json_body,
    types::{AuthContext, Chat, Millis, Stimulus, TenantId},
};

/// A request: what is taken can be told to a model and is stored as it is, whether the instance has a history or not.
pub fn requests(bytes: &[u8]) {
    for is_new in [false, true] {
        let Ok(request) = json_body::<Request>(bytes) else { return };
        let _ = (request.has_earlier(), request.wants_usage());
        let who = AuthContext::loopback(TenantId::new("t").unwrap());
        let Ok(stimulus) = request.into_stimulus(&who, None, is_new, Millis(0)) else { continue };
        let chat = stimulus.content_type.as_ref().map_or_else(Chat::default, |_| Chat::of(&stimulus).unwrap());
        assert!(is_new || chat.earlier.is_empty(), "a history is told to a new instance only");
        assert!(stimulus.content.is_some() || !chat.results.is_empty(), "something is said");
        let bytes = postcard::to_stdvec(&stimulus).unwrap();
        assert_eq!(postcard::from_bytes::<Stimulus>(&bytes).unwrap(), stimulus);
    }
}

/// The id of a chunk that a client has.
pub fn cursor(id: &str) {
    if let Some(resume) = Resume::parse(id) {
        let again = format!("{}:c:{}", resume.stimulus, resume.said);
        let again = Resume::parse(&again).unwrap();
        assert_eq!((again.stimulus, again.said), (resume.stimulus, resume.said));
    }
}
