//! What the fuzzer throws at the client of model servers: streams of answers.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.

use super::{
    reading::Reading,
    sse::{Event, Parser},
};
use crate::types::{
    ToolCall,
    limits::{MAX_ANSWER_BYTES, MAX_CALLS, MAX_SSE_BYTES},
};

/// A stream: the portions it comes in do not matter, and what it says stays within bounds; each call has a name and an id of
/// its own.
pub fn streams(bytes: &[u8]) {
    let whole = events(std::iter::once(bytes));
    let portions = events(bytes.chunks(bytes.len() % 13 + 1));
    assert_eq!(whole, portions, "the portions matter");
    let mut reading = Reading::default();
    let mut words = String::new();
    for event in whole.unwrap_or_default() {
        match reading.take(&event) {
            Ok(said) => words.extend(said),
            Err(_) => return,
        }
    }
    assert_eq!(words, reading.text, "what was streamed is what was said");
    assert!(reading.text.len() <= MAX_ANSWER_BYTES);
    let calls: Vec<ToolCall> = reading.calls.finish();
    assert!(calls.len() <= MAX_CALLS);
    let told: usize = calls.iter().map(|call| call.name.len() + call.arguments.len()).sum();
    assert!(told <= MAX_ANSWER_BYTES + MAX_SSE_BYTES, "{told} bytes of calls");
    for (at, call) in calls.iter().enumerate() {
        assert!(!call.name.is_empty() && !call.id.is_empty());
        assert!(calls[..at].iter().all(|earlier| earlier.id != call.id), "{calls:?}");
    }
}

fn events<'b>(mut portions: impl Iterator<Item = &'b [u8]>) -> Option<Vec<Event>> {
    let (mut parser, mut events) = (Parser::default(), Vec::new());
    portions.try_for_each(|portion| parser.push(portion, &mut events)).ok()?;
    events.extend(parser.finish());
    Some(events)
}
