//! The stored form of digests: what a shelf is made of, so that a cold node need not read the log again.
//!
//! Bytes: version (1), whether vectors of the built-in embedder are in it (1), the digests (postcard), and the first 16 bytes of
//! BLAKE3 over all before. Derived: whatever is wrong with one, the turns it covers are read from the log. A new version is
//! told by its first byte, and old ones are damage like any other. Tests: at the foot; `tests/golden/memory` holds one.

use super::digest::Digest;

/// The newest version.
pub(super) const VERSION: u8 = 1;
/// Bytes of the sum at the end.
const SUM: usize = 16;

/// It is not what was written, or was written by another build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Damaged;

/// The bytes of digests.
pub(crate) fn encode(digests: &[Digest<'_>], lexical: bool) -> Option<Vec<u8>> {
    Some(seal(postcard::to_extend(digests, vec![VERSION, u8::from(lexical)]).ok()?))
}

/// With their sum behind them.
pub(super) fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = blake3::hash(&bytes);
    bytes.extend_from_slice(&sum.as_bytes()[..SUM]);
    bytes
}

/// What was sealed.
///
/// # Errors
/// [`Damaged`].
pub(super) fn sealed(bytes: &[u8]) -> Result<&[u8], Damaged> {
    let (told, sum) = bytes.split_at_checked(bytes.len().saturating_sub(SUM)).ok_or(Damaged)?;
    if blake3::hash(told).as_bytes()[..SUM] == *sum { Ok(told) } else { Err(Damaged) }
}

/// The digests, in the order of their turns.
///
/// # Errors
/// [`Damaged`], also when the built-in embedder was off when they were made and is on, or the other way round.
pub(crate) fn decode(bytes: &[u8], lexical: bool) -> Result<Vec<Digest<'_>>, Damaged> {
    let Some(([VERSION, embedder], digests)) = sealed(bytes)?.split_first_chunk::<2>() else { return Err(Damaged) };
    if *embedder != u8::from(lexical) {
        return Err(Damaged);
    }
    postcard::from_bytes(digests).map_err(|_| Damaged)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::memory::digest::{Late, Planes, Text, Trace};

    fn sample() -> Vec<Digest<'static>> {
        let planes = |bytes: &'static [u8]| Planes { scale: 0.25, planes: Cow::Borrowed(bytes) };
        let trace = Trace {
            occurred_at: Some(5),
            reward: Some(-0.5),
            tags: vec!["tea"],
            words: vec![(u64::MAX, 2), (7, 1)],
            length: 3,
            same: 99,
            junk: false,
            lexical: Some(planes(&[1, 255, 3])),
            given: Some(planes(&[1, 2, 3, 4])),
            supersedes: vec![65_536],
            line: Some(8),
            text: Some(Text { content: "green tea", data: Some("[1]") }),
        };
        let plain = Trace {
            occurred_at: None,
            reward: None,
            tags: Vec::new(),
            words: Vec::new(),
            length: 0,
            same: 0,
            junk: true,
            lexical: None,
            given: None,
            supersedes: Vec::new(),
            line: None,
            text: None,
        };
        let late = Late { of: 131_073, place: 0, given: Some(planes(&[9, 8, 7, 6])) };
        vec![
            Digest {
                turn: 2,
                at: 1000,
                traces: vec![Some(trace), None, Some(plain)],
                late: Vec::new(),
                forgot: Vec::new(),
            },
            Digest { turn: 4, at: 2000, traces: Vec::new(), late: vec![late], forgot: vec![(131_072, 131_072)] },
        ]
    }

    #[test]
    fn the_form_is_as_published() {
        let bytes = encode(&sample(), true).unwrap();
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/memory/part-1.bin");
        let stored =
            std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}; it should hold {bytes:02x?}", path.display()));
        assert_eq!(stored, bytes, "another form needs another version");
        assert_eq!(decode(&bytes, true).unwrap(), sample());
    }

    #[test]
    fn whatever_is_wrong_is_damage() {
        let bytes = encode(&sample(), true).unwrap();
        assert_eq!(decode(&bytes, false), Err(Damaged), "of another embedder");
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert_eq!(decode(&bad, true), Err(Damaged), "byte {at}");
        }
        for end in 0..bytes.len() {
            assert_eq!(decode(&bytes[..end], true), Err(Damaged));
        }
    }
}
