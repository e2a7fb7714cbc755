//! The last turns an engine is told of: those just before, and of an instance with attention also what it last said to people,
//! who would otherwise be forgotten over what streams report in the meantime.
//!
//! Tests: `tests/it/attention.rs`.

use std::sync::Arc;

use crate::{
    instance::talk::is_talk,
    store::{Error, Reader},
    types::{InstanceKey, TurnRecord},
};

/// How far back people are looked for when one asks and little is known of what was said: after a restart or a pause. In turns.
const LOOK_BACK: usize = 256;

/// What is wanted of the turns up to `head`.
pub(super) struct Wanted {
    /// The last turn.
    pub(super) head: u64,
    /// At most so many of the last ones, and of those that answered people.
    pub(super) count: usize,
    /// The last turns that answered people, as far as known; `None` without attention.
    pub(super) talk: Option<Vec<u64>>,
    /// Whether a person asks.
    pub(super) by_person: bool,
}

/// Those turns, in their order.
pub(super) async fn read<R: Reader + ?Sized>(
    reader: &R,
    key: &InstanceKey,
    wanted: Wanted,
) -> Result<Vec<Arc<TurnRecord>>, Error> {
    let Wanted { head, count, talk, by_person } = wanted;
    if count == 0 {
        return Ok(Vec::new());
    }
    let after = head.saturating_sub(count as u64);
    let mut last = reader.turns(key, after, count).await?;
    let Some(mut talk) = talk.filter(|_| after > 0) else { return Ok(last) };
    let mut before = Vec::new();
    if by_person && talk.len() < count {
        before = reader.turns(key, after.saturating_sub(LOOK_BACK as u64), LOOK_BACK).await?;
        before.retain(|turn| turn.turn <= after && is_talk(turn));
    }
    talk.retain(|number| *number <= after && before.iter().all(|turn| turn.turn != *number));
    if !talk.is_empty() {
        before.extend(reader.turns_at(key, &talk).await?);
    }
    before.sort_by_key(|turn| turn.turn);
    before.drain(..before.len().saturating_sub(count));
    before.append(&mut last);
    Ok(before)
}
