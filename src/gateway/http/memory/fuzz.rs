//! What the fuzzer throws at the calls of memory: episodes, questions, what to forget, and lines of an import.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.
#![allow(clippy::unwrap_used)]

use super::{EpisodeBody, EpisodesBody, ForgetBody, PruneBody, RecallBody, transfer::LineBody};
use crate::{
    gateway::http::json_body,
    types::{
        fuzz::settles,
        limits::{MAX_EPISODE_BYTES, MAX_RECALL, MAX_TAGS},
        memory::{Writing, Written},
        strict,
    },
};

/// The bodies of memory's calls.
pub fn episodes(bytes: &[u8]) {
    let one = json_body::<EpisodeBody<'_>>(bytes).ok();
    let many = json_body::<EpisodesBody<'_>>(bytes).ok().map(|body| body.episodes);
    written(one.into_iter().chain(many.into_iter().flatten()).filter_map(|body| body.check().ok()).collect());
    if let Ok(Ok(ask)) = json_body::<RecallBody>(bytes).map(RecallBody::check) {
        assert!((1..=MAX_RECALL).contains(&ask.limit) && (ask.query.is_some() || ask.embedding.is_some()));
    }
    let _ = (json_body::<PruneBody>(bytes), json_body::<ForgetBody>(bytes));
}

/// Lines of an import: one that is taken is written, as an export would, and reads the same.
pub fn lines(bytes: &[u8]) {
    for line in bytes.split(|byte| *byte == b'\n').take(32) {
        let Ok(text) = strict::check(line) else { continue };
        let write =
            |text: &str| Some(serde_json::to_string(&serde_json::from_str::<LineBody<'_>>(text).ok()?).unwrap());
        // A number beyond the range of 32 bits is infinite, which JSON calls null; it is refused when the line is checked.
        if let Some(written) = write(text).filter(|written| !written.contains("null")) {
            assert_eq!(write(&written).as_ref(), Some(&written), "{text}");
        }
    }
}

/// What becomes of episodes that were taken: bounded, and the data of a stimulus reads as it was written.
fn written(episodes: Vec<Written>) {
    for episode in &episodes {
        assert!(episode.content.len() <= MAX_EPISODE_BYTES && episode.tags.len() <= MAX_TAGS);
        assert!(episode.reward.is_none_or(f32::is_finite));
        assert!(episode.extra.embedding.as_ref().is_none_or(|vector| vector.scale.is_finite() && vector.scale > 0.0));
    }
    let read = |bytes: &[u8]| serde_json::from_slice::<Writing>(bytes).ok();
    settles(Some(Writing { episodes }), |writing| serde_json::to_vec(writing).unwrap(), read);
}
