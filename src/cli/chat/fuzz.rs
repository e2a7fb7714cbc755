//! What the fuzzer throws at `sophont chat`: the stream of a node.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.

use super::sse::Parser;

/// The portions a stream comes in do not matter.
pub fn streams(bytes: &[u8]) {
    let whole = Parser::default().feed(bytes);
    let mut parser = Parser::default();
    let portions: Result<Vec<_>, _> = bytes.chunks(bytes.len() % 11 + 1).map(|portion| parser.feed(portion)).collect();
    assert_eq!(whole, portions.map(|events| events.concat()));
}
