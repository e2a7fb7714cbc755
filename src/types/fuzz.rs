//! What the fuzzer throws at the domain's words: identifiers, times, merge patches; and the one property all stored forms share.
//!
//! Run by `crate::fuzzing`, which says when this is compiled.
#![allow(clippy::unwrap_used)]

use std::fmt::{Debug, Display};

use serde_json::Value;

use super::{Channel, EpisodeId, InstanceId, Millis, NodeId, Profile, RawJson, StateDoc, StimulusId, TenantId};

/// What can be read and is written again reads as the same: its second writing is its first, byte by byte.
///
/// # Panics
/// When it does not.
pub fn settles<T>(value: Option<T>, write: impl Fn(&T) -> Vec<u8>, read: impl Fn(&[u8]) -> Option<T>) {
    let Some(value) = value else { return };
    let written = write(&value);
    let Some(again) = read(&written) else { panic!("what was written cannot be read: {written:?}") };
    assert_eq!(write(&again), written, "it is written another way the second time");
}

/// Identifiers and times, from the texts of each line.
pub fn words(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for line in text.lines().take(16) {
        same(line, TenantId::new(line).ok());
        same(line, InstanceId::new(line).ok());
        same(line, Channel::new(line).ok());
        same(line, StimulusId::new(line).ok());
        if let Ok(id) = line.parse::<EpisodeId>() {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        if let Ok(time) = Millis::from_rfc3339(line) {
            told(time);
        }
        if let Ok(ms) = line.parse() {
            told(Millis(ms));
        }
        if let Ok(id) = serde_json::from_value::<NodeId>(Value::from(line)) {
            let _ = id.name();
        }
    }
}

/// An identifier that was taken is its text, and its JSON reads back.
fn same<T: Display + Debug + PartialEq + serde::Serialize + serde::de::DeserializeOwned>(text: &str, id: Option<T>) {
    let Some(id) = id else { return };
    assert_eq!(id.to_string(), text);
    assert_eq!(serde_json::from_str::<T>(&serde_json::to_string(&id).unwrap()).unwrap(), id);
}

/// Our own calendar says what the library says, and the library reads it.
fn told(time: Millis) {
    let text = time.to_rfc3339();
    let Ok(known) = jiff::Timestamp::from_millisecond(time.0) else { return };
    assert_eq!(text, format!("{known:.3}"));
    assert_eq!(Millis::from_rfc3339(&text).unwrap(), time);
}

/// Profiles as the API takes and the store keeps them, and merge patches of a state.
pub fn documents(bytes: &[u8]) {
    let profile = |bytes: &[u8]| serde_json::from_slice::<Profile>(bytes).ok();
    settles(profile(bytes), |profile| serde_json::to_vec(profile).unwrap(), profile);
    let Ok(patch) = serde_json::from_slice::<Value>(bytes) else { return };
    let mut state = StateDoc::default();
    if state.apply(&patch).is_err() {
        return;
    }
    let once = serde_json::to_value(&state).unwrap();
    let _ = (state.delta(), RawJson::of(&once));
    state.apply(&patch).unwrap();
    assert_eq!(serde_json::to_value(&state).unwrap(), once, "a merge patch does the same when it is repeated");
}
