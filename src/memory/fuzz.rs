//! What the fuzzer throws at memory: stored parts, and answers of embeddings servers.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.
#![allow(clippy::unwrap_used)]

use super::{endpoint, part};
use crate::types::limits::MAX_DIMENSION;

/// Digests with a right sum: those that can be read are written and read again the same way.
pub fn parts(bytes: &[u8]) {
    let Some((lexical, digests)) = bytes.split_first() else { return };
    let lexical = lexical % 2 == 1;
    let sealed = part::seal([&[part::VERSION, u8::from(lexical)], digests].concat());
    let Ok(read) = part::decode(&sealed, lexical) else { return };
    let written = part::encode(&read, lexical).unwrap();
    let again = part::decode(&written, lexical).unwrap();
    assert_eq!(part::encode(&again, lexical).unwrap(), written);
    for digest in &read {
        assert!(digest.forgotten().count() <= digest.forgot.len() << 16, "a run stays within its turn");
    }
}

/// An answer of an embeddings server to a few texts.
pub fn vectors(bytes: &[u8]) {
    for count in 1..4 {
        let Ok(vectors) = endpoint::sort(bytes, count) else { continue };
        assert_eq!(vectors.len(), count);
        for vector in vectors.iter().flatten() {
            assert!(vector.dimension() <= MAX_DIMENSION && vector.scale.is_finite());
            assert!(vector.numbers().all(|number| number.abs() <= 1.01));
        }
    }
}
