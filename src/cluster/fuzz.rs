//! What the fuzzer throws at a node from the bus.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.
#![allow(clippy::unwrap_used)]

use super::bus::{
    Message,
    frame::{self, Header},
};
use crate::types::fuzz::settles;

/// A frame: each of its messages settles, and a frame of them brings the same ones.
pub fn frames(bytes: &[u8]) {
    let _ = frame::sender(bytes);
    let Ok((header, messages)) = frame::open(bytes) else { return };
    let read: Vec<Message> = messages.filter_map(Result::ok).collect();
    let Header { from, number } = &header;
    assert_eq!(frame::sender(bytes).as_ref(), Some(from));
    let frame = |messages: &Vec<Message>| {
        let mut frame = frame::begin(&Header { from: from.clone(), number: *number }).unwrap();
        messages.iter().for_each(|message| frame::push(&mut frame, &frame::encode(message).unwrap()));
        frame
    };
    settles(Some(read), frame, |bytes| frame::open(bytes).ok()?.1.collect::<Result<_, _>>().ok());
}
