//! Which episodes go when a memory is to be made smaller, or something is to be forgotten. Pure.
//!
//! Tests: `shelf/tests.rs`; of what is said at the foot.

use serde_json::Value;

use super::shelf::{Shelf, Standing};
use crate::{
    store::Episode,
    types::{EpisodeId, Millis},
};

/// How to make a memory smaller.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Prune {
    /// What happened before goes.
    OlderThan(Millis),
    /// So many stay, those that happened last.
    KeepNewest(usize),
    /// So many stay, those with the highest rewards; one without counts as 0, and of equals the newer stays.
    KeepBest(usize),
}

impl Prune {
    /// What goes, in order.
    pub(super) fn picks(self, shelf: &Shelf) -> Vec<EpisodeId> {
        match self {
            Self::OlderThan(time) => shelf.pick(|episode| episode.occurred_at < time),
            Self::KeepNewest(stay) => rest(shelf, stay, |episode| (0.0, episode.occurred_at)),
            Self::KeepBest(stay) => rest(shelf, stay, |episode| (episode.reward.unwrap_or(0.0), episode.occurred_at)),
        }
    }
}

/// All but the first by weight.
fn rest(shelf: &Shelf, stay: usize, weight: impl Fn(&Standing<'_>) -> (f32, Millis)) -> Vec<EpisodeId> {
    let weighed = std::cell::RefCell::new(Vec::new());
    shelf.pick(|episode| {
        let (weight, at) = weight(episode);
        weighed.borrow_mut().push(((if episode.repeat { f32::NEG_INFINITY } else { weight }, at), episode.id));
        false
    });
    let mut weighed = weighed.into_inner();
    weighed.sort_unstable_by(|(a, one), (b, other)| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(other.cmp(one)));
    let mut ids: Vec<EpisodeId> = weighed.into_iter().skip(stay).map(|(_, id)| id).collect();
    ids.sort_unstable();
    ids
}

/// What to forget: everything that any of these names.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Forget {
    /// These.
    pub ids: Vec<EpisodeId>,
    /// What has one of these tags.
    pub tags: Vec<String>,
    /// What contains this text, upper or lower case alike. Looked for in the store, by the caller.
    pub text: Option<String>,
}

impl Forget {
    /// What goes by ids and tags, in order.
    pub(super) fn picks(&self, shelf: &Shelf) -> Vec<EpisodeId> {
        let mut ids = self.ids.clone();
        ids.sort_unstable();
        let tagged = |episode: &Standing<'_>| self.tags.iter().any(|tag| episode.tags.contains(&tag.as_str()));
        shelf.pick(|episode| ids.binary_search(&episode.id).is_ok() || tagged(episode))
    }
}

/// Whether an episode says a text, which is in lower case. JSON may spell signs as escapes, so its texts are looked at as they
/// read, too.
pub(super) fn says(episode: &Episode, text: &str) -> bool {
    let Some(data) = episode.data.as_ref().map(|data| data.get()) else {
        return episode.content.to_lowercase().contains(text);
    };
    let reads = || serde_json::from_str(data).is_ok_and(|value| reads(&value, text));
    episode.content.to_lowercase().contains(text)
        || data.to_lowercase().contains(text)
        || (data.contains('\\') && reads())
}

/// Whether a text stands in a name or a text of a value. No deeper than what the doors take.
fn reads(value: &Value, text: &str) -> bool {
    match value {
        Value::String(said) => said.to_lowercase().contains(text),
        Value::Array(values) => values.iter().any(|value| reads(value, text)),
        Value::Object(fields) => {
            fields.iter().any(|(name, value)| name.to_lowercase().contains(text) || reads(value, text))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::RawJson;

    #[test]
    fn what_is_to_be_forgotten_is_found_however_json_spells_it() {
        let episode = |content: &str, data: Option<&str>| Episode {
            id: 1,
            turn: 1,
            content: content.to_owned(),
            data: data.map(|data| RawJson::parse(data).unwrap()),
            tags: vec![],
            reward: None,
            occurred_at: Millis(0),
            recorded_at: Millis(0),
            score: 0.0,
        };
        for (content, data, text) in [
            ("The boiler FAILED", None, "boiler failed"),
            ("", Some(r#"{"who":"Ren\u00e9e"}"#), "renée"),
            ("", Some(r#"{"a":[{"Stra\u00dfe":1}]}"#), "straße"),
            ("", Some(r#"["C:\\temp \"x\""]"#), r#"c:\temp "x""#),
            ("", Some(r#"{"n":7731}"#), "7731"),
            ("", Some(r#"{"who":"Bob"}"#), r#""who":"bob""#),
            ("x", Some(r#"{"a":"b\/c"}"#), "b/c"),
        ] {
            assert!(says(&episode(content, data), text), "{content} {data:?} {text}");
        }
        assert!(!says(&episode("The boiler", Some(r#"{"a":"\u0062"}"#)), "kettle"));
    }
}
