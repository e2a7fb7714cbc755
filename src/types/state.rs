//! The twin: desired and reported state, merge patches over them, and the delta between.

use std::sync::OnceLock;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::RawJson;

/// Desired and reported state, parsed.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateDoc {
    /// What the world should be like.
    #[serde(default)]
    pub desired: Map<String, Value>,
    /// What the device says it is like.
    #[serde(default)]
    pub reported: Map<String, Value>,
}

/// A committed state, serialized once and shared by every reader.
#[derive(Debug, Clone)]
pub struct StateSnapshot {
    /// Grows by one with each change.
    pub version: u64,
    /// The number of the instance's last turn.
    pub turn: u64,
    /// `{"desired":…,"reported":…}`.
    pub doc: RawJson,
    /// What a door sends for it; no part of the value.
    body: OnceLock<Bytes>,
    /// A hash of the text; no part of the value.
    digest: OnceLock<u64>,
}

impl StateSnapshot {
    /// Puts the parts together.
    pub fn new(version: u64, turn: u64, doc: RawJson) -> Self {
        Self { version, turn, doc, body: OnceLock::new(), digest: OnceLock::new() }
    }

    /// A hash of the text that is the same on every node: with the version it tells this state from all others of the
    /// instance, also from those of an earlier one of its name.
    pub fn digest(&self) -> u64 {
        *self.digest.get_or_init(|| {
            let hash = blake3::hash(self.doc.get().as_bytes());
            hash.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes))
        })
    }

    /// The body a door sends for this state: rendered by whoever asks first, then shared by all readers.
    pub fn body(&self, render: impl FnOnce(&Self) -> Bytes) -> Bytes {
        self.body.get_or_init(|| render(self)).clone()
    }
}

impl PartialEq for StateSnapshot {
    fn eq(&self, other: &Self) -> bool {
        (self.version, self.turn, &self.doc) == (other.version, other.turn, &other.doc)
    }
}

impl Eq for StateSnapshot {}

/// Why a patch cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// A key other than `desired` and `reported` at the top.
    #[error("the state has 'desired' and 'reported', not '{0}'")]
    UnknownPart(String),
    /// The patch or one of its parts is no object.
    #[error("'{0}' must be a JSON object")]
    NotAnObject(String),
}

/// Applies an RFC 7396 merge patch.
pub fn merge_patch(target: &mut Map<String, Value>, patch: &Map<String, Value>) {
    for (name, change) in patch {
        match change {
            Value::Null => {
                target.remove(name);
            }
            Value::Object(change) => {
                let slot = target.entry(name.clone()).or_insert_with(|| Value::Object(Map::new()));
                if !slot.is_object() {
                    *slot = Value::Object(Map::new());
                }
                if let Value::Object(slot) = slot {
                    merge_patch(slot, change);
                }
            }
            other => {
                target.insert(name.clone(), other.clone());
            }
        }
    }
}

/// What of `desired` is not so in `reported`: the same shape, only the differing leaves.
pub fn delta(desired: &Map<String, Value>, reported: &Map<String, Value>) -> Map<String, Value> {
    let mut out = Map::new();
    for (name, wanted) in desired {
        match (wanted, reported.get(name)) {
            (wanted, Some(actual)) if wanted == actual => {}
            (Value::Object(wanted), Some(Value::Object(actual))) => {
                let inner = delta(wanted, actual);
                if !inner.is_empty() {
                    out.insert(name.clone(), Value::Object(inner));
                }
            }
            (wanted, _) => {
                out.insert(name.clone(), wanted.clone());
            }
        }
    }
    out
}

impl StateDoc {
    /// Applies a merge patch of the form `{"desired":{…},"reported":{…}}`; nothing is changed when it is refused.
    ///
    /// # Errors
    /// [`PatchError`] when the patch has another part, or a part is no object.
    pub fn apply(&mut self, patch: &Value) -> Result<(), PatchError> {
        let Value::Object(parts) = patch else {
            return Err(PatchError::NotAnObject(String::from("the patch")));
        };
        for (name, part) in parts {
            if name != "desired" && name != "reported" {
                return Err(PatchError::UnknownPart(name.clone()));
            }
            if !part.is_object() && !part.is_null() {
                return Err(PatchError::NotAnObject(name.clone()));
            }
        }
        for (name, part) in parts {
            let target = if name == "desired" { &mut self.desired } else { &mut self.reported };
            match part {
                Value::Object(part) => merge_patch(target, part),
                _ => target.clear(),
            }
        }
        Ok(())
    }

    /// What still differs.
    pub fn delta(&self) -> Map<String, Value> {
        delta(&self.desired, &self.reported)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_patch_merges_removes_and_refuses() {
        let mut doc = StateDoc::default();
        doc.apply(&json!({"desired": {"a": {"b": 1, "c": 2}}, "reported": {"x": 1}})).unwrap();
        doc.apply(&json!({"desired": {"a": {"b": null}}})).unwrap();
        assert_eq!(Value::Object(doc.desired.clone()), json!({"a": {"c": 2}}));
        let before = doc.clone();
        assert_eq!(doc.apply(&json!({"wanted": {}})), Err(PatchError::UnknownPart("wanted".into())));
        assert_eq!(doc.apply(&json!({"desired": 3})), Err(PatchError::NotAnObject("desired".into())));
        assert_eq!(doc, before);
    }

    #[test]
    fn a_body_is_rendered_once_and_is_no_part_of_the_value() {
        let fresh = StateSnapshot::new(1, 2, RawJson::of(&json!({"desired": {}, "reported": {}})));
        let read = fresh.clone();
        assert_eq!(read.body(|_| Bytes::from_static(b"first")), "first");
        assert_eq!(read.body(|_| Bytes::from_static(b"second")), "first");
        assert_eq!(read, fresh);
    }

    #[test]
    fn the_delta_has_only_what_differs() {
        let mut doc = StateDoc::default();
        doc.apply(&json!({"desired": {"on": true, "color": {"r": 1, "g": 2}, "same": [1]},
                          "reported": {"on": false, "color": {"r": 1, "g": 9}, "same": [1], "extra": 5}}))
            .unwrap();
        assert_eq!(Value::Object(doc.delta()), json!({"on": true, "color": {"g": 2}}));
    }
}
