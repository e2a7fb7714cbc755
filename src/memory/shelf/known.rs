//! Which episodes a shelf knows, as an import and whoever names one asks. Tests: `shelf/tests.rs`, `tests/it/memory.rs`.

use super::Shelf;
use crate::types::{EpisodeId, Millis, id::stable_hash};

impl Shelf {
    /// The episode that came from a line of an import. One that was forgotten since came from it all the same.
    pub(crate) fn imported(&self, line: &str) -> Option<EpisodeId> {
        self.lines.get(&stable_hash(line.bytes())).map(|slot| self.notes[*slot as usize].id)
    }

    /// When an episode was recorded, also of one that was forgotten since.
    pub(crate) fn recorded_at(&self, id: EpisodeId) -> Option<Millis> {
        self.slot(id).map(|slot| Millis(self.notes[slot as usize].recorded_at))
    }
}
