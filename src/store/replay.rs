//! From turn records back to a state, an id's time, an episode: the pure part every backend shares.
//!
//! Tests: at the foot, and `tests/it/store_contract.rs`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Episode, Error};
use crate::types::{EpisodeId, Millis, RawJson, StateChange, StateDoc, StateSnapshot, StimulusId, TurnRecord};

/// The document of an instance without turns.
pub(crate) const EMPTY_DOC: &str = r#"{"desired":{},"reported":{}}"#;

/// The state before the first turn.
///
/// # Errors
/// Never in practice: the empty document is valid JSON.
pub(crate) fn empty_state() -> Result<StateSnapshot, Error> {
    Ok(StateSnapshot::new(0, 0, raw(EMPTY_DOC)?))
}

/// The state after the last of these turns, which are in order and begin with one that holds the whole state (or with the
/// first turn of all).
///
/// # Errors
/// [`Error::Corrupt`] when a stored patch or document cannot be read or applied.
pub(crate) fn replay<'a>(turns: impl IntoIterator<Item = &'a TurnRecord>) -> Result<StateSnapshot, Error> {
    let mut state = empty_state()?;
    // Parsed only when there is something to apply: most activations find the whole state and nothing after it.
    let mut doc: Option<StateDoc> = None;
    for record in turns {
        match &record.state {
            StateChange::None => {}
            StateChange::Full(whole) => {
                state.doc = whole.clone();
                doc = None;
            }
            StateChange::Patch(patch) => {
                let mut current = match doc.take() {
                    Some(doc) => doc,
                    None => parse(&state.doc)?,
                };
                let patch: Value = serde_json::from_str(patch.get()).map_err(|e| damaged(record, &e))?;
                current.apply(&patch).map_err(|e| damaged(record, &e))?;
                doc = Some(current);
            }
        }
        state.version = record.version;
        state.turn = record.turn;
    }
    if let Some(doc) = doc {
        state.doc = RawJson::from_serialize(&doc).map_err(|e| Error::Corrupt(e.to_string()))?;
    }
    Ok(state)
}

fn parse(doc: &RawJson) -> Result<StateDoc, Error> {
    serde_json::from_str(doc.get()).map_err(|e| Error::Corrupt(format!("a stored state: {e}")))
}

fn raw(text: &str) -> Result<RawJson, Error> {
    RawJson::parse(text).map_err(|e| Error::Corrupt(e.to_string()))
}

fn damaged(record: &TurnRecord, error: &dyn std::fmt::Display) -> Error {
    Error::Corrupt(format!("the state change of turn {}: {error}", record.turn))
}

/// When a generated id was generated; `None` for an id its sender chose (or that does not look generated).
pub(crate) fn generated_at(id: &StimulusId) -> Option<Millis> {
    let text = id.as_str();
    let is_v7 = text.len() == 32 && text.as_bytes()[12] == b'7';
    let ms = text.get(..12).filter(|_| is_v7)?;
    i64::from_str_radix(ms, 16).ok().map(Millis)
}

/// The episodes a turn recorded and that were not forgotten since.
pub(crate) fn episodes(record: &TurnRecord) -> impl Iterator<Item = Episode> + '_ {
    let drafts = record.episodes.iter().enumerate().filter(|(_, draft)| !draft.is_blank());
    drafts.map(|(index, draft)| Episode {
        id: EpisodeId::new(record.turn, index).0,
        turn: record.turn,
        content: draft.content.clone(),
        data: draft.data.clone(),
        tags: draft.tags.clone(),
        reward: draft.reward,
        occurred_at: draft.occurred_at.unwrap_or(record.decided_at),
        recorded_at: record.decided_at,
        score: 0.0,
    })
}

/// The turns of forgotten episodes, each with the places it loses, in order.
pub(crate) fn losses(record: &TurnRecord) -> BTreeMap<u64, Vec<usize>> {
    let mut turns: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for id in record.forgotten().ids().filter(|id| id.turn() < record.turn) {
        turns.entry(id.turn()).or_default().push(id.place());
    }
    turns
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{Channel, Outcome, Source, Stimulus};

    fn turn(number: u64, version: u64, state: StateChange) -> TurnRecord {
        TurnRecord {
            turn: number,
            version,
            stimulus: Stimulus::text(Source::Http, Channel::new("c").unwrap(), "x", Millis(5)),
            outcome: Outcome::Silent,
            reply: None,
            effects: Vec::new(),
            state,
            episodes: Vec::new(),
            steps: 0,
            engine: String::from("reflex"),
            model: None,
            usage: None,
            error: None,
            decided_at: Millis(6),
            epoch: 0,
        }
    }

    fn json(text: &str) -> RawJson {
        RawJson::parse(text).unwrap()
    }

    #[test]
    fn a_state_is_its_last_whole_document_and_the_patches_since() {
        let turns = [
            turn(7, 3, StateChange::Full(json(r#"{"desired":{"a":1},"reported":{}}"#))),
            turn(8, 3, StateChange::None),
            turn(9, 4, StateChange::Patch(json(r#"{"reported":{"a":2}}"#))),
            turn(10, 5, StateChange::Patch(json(r#"{"desired":{"a":null,"b":true}}"#))),
        ];
        let state = replay(&turns).unwrap();
        assert_eq!((state.version, state.turn), (5, 10));
        assert_eq!(state.doc.get(), r#"{"desired":{"b":true},"reported":{"a":2}}"#);
        assert_eq!(replay(&turns[..2]).unwrap().doc.get(), r#"{"desired":{"a":1},"reported":{}}"#);
        assert_eq!(replay(&[]).unwrap(), empty_state().unwrap());
    }

    #[test]
    fn a_patch_that_cannot_be_applied_is_damage() {
        let turns = [turn(1, 1, StateChange::Patch(json(r#"{"wanted":{}}"#)))];
        assert!(matches!(replay(&turns), Err(Error::Corrupt(text)) if text.contains("turn 1")));
    }

    #[test]
    fn a_generated_id_tells_its_time_and_a_chosen_one_does_not() {
        let id = StimulusId::generate();
        assert!(generated_at(&id).unwrap() > Millis(1_700_000_000_000));
        for chosen in ["order-7", "0123456789abcdef0123456789abcdef", "x23456789abc7ef0123456789abcdef00"] {
            assert_eq!(generated_at(&StimulusId::new(chosen).unwrap()), None, "{chosen}");
        }
    }
}
