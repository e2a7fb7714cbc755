//! Which episodes go when a memory is to be made smaller, or something is to be forgotten. Pure.
//!
//! Tests: `shelf/tests.rs`.

use super::shelf::{Shelf, Standing};
use crate::types::{EpisodeId, Millis};

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
