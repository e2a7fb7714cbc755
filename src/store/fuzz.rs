//! What the fuzzer throws at the store: the stored forms of turns, waiting and pending things, and steps.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.
#![allow(clippy::unwrap_used)]

use super::{
    journal::{self, Texts},
    record,
};
use crate::types::{Millis, fuzz::settles};

/// Where the row stands.
const POSITION: i64 = 5000;

/// Bytes of a row, a waiting stimulus, a pending effect, a step: what is read settles, and a row without its episodes is a row.
pub fn forms(bytes: &[u8]) {
    let turn = |bytes: &[u8]| {
        let (row, rest) = record::decode_row(bytes, POSITION).ok()?;
        Some((row, record::decode_record(rest, POSITION).ok()?))
    };
    settles(turn(bytes), |(row, turn)| record::encode(row, POSITION, turn, Vec::new()).unwrap(), turn);
    if let Ok(Some(redacted)) = record::redact(bytes, POSITION, &[0, 1, 2]) {
        let (_, turn) = turn(&redacted).unwrap();
        assert!(turn.episodes.iter().take(3).all(crate::types::EpisodeDraft::is_blank));
        assert!(matches!(record::redact(&redacted, POSITION, &[0, 1, 2]), Ok(None)), "nothing is left of them");
    }
    let stimulus = |bytes: &[u8]| record::decode_stimulus(bytes).ok();
    settles(stimulus(bytes), |stimulus| record::encode_stimulus(stimulus).unwrap(), stimulus);
    let pending = |bytes: &[u8]| {
        let key = crate::types::InstanceKey::new(
            crate::types::TenantId::new("t").unwrap(),
            crate::types::InstanceId::new("i").unwrap(),
        );
        record::decode_pending(key, String::from("7-0"), 0, Millis(0), bytes).ok()
    };
    settles(pending(bytes), |pending| record::encode_pending(pending).unwrap(), pending);
    step(bytes);
}

fn step(bytes: &[u8]) {
    let Ok(step) = Texts::default().decode(bytes) else { return };
    let written = journal::encode(&step).unwrap();
    let mut texts = Texts::default();
    written.texts.iter().for_each(|(hash, text)| texts.add(hash, text).unwrap());
    assert_eq!(texts.decode(&written.rec).unwrap(), step);
}
