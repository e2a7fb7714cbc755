//! What an instance leaves behind when it leaves memory, and finds again when it comes back: its state, so that its turns need
//! not be read again.
//!
//! Not here: who leaves when (`cluster/shard.rs`), the tiers (`scaling::cache`). Invariants: a snapshot is of a commit, never of what
//! runs ahead of one; it is used only where the store says that the history still ends there, so it needs no invalidation and
//! does not care who owned the instance meanwhile. Tests: `tests/it/activation.rs`, the stores' contract.

use std::sync::Arc;

use super::{InstanceActor, Phase, State};
use crate::{
    scaling::cache::{Kind, Local, Slot},
    store::{Loaded, Snapshot},
    types::StateSnapshot,
};

/// What a snapshot takes beside the state.
const AROUND: usize = 160;

impl InstanceActor {
    /// Leaves a snapshot of what was committed last. Called when nothing is going on.
    pub(super) fn leave_snapshot(&self) {
        let State::Packed(doc) = &self.kept.state else { return };
        if self.phase != Phase::Active || self.agenda.is_some() || self.kept.head.turn == 0 {
            return;
        }
        let state = StateSnapshot::new(self.kept.version, self.kept.head.turn, doc.clone());
        let snapshot = Snapshot { head: self.kept.head, state, turns_since_full: self.kept.since_full.into() };
        let value = Local { value: Arc::new(snapshot), bytes: AROUND + doc.get().len() };
        // Which of two is newer is for the store to say: after a forgotten life numbers begin anew.
        let slot = Slot::of(Kind::Snapshot, &self.key);
        self.environment.cache.replace(&slot, self.kept.head.turn, value);
    }

    /// The snapshot it left, if that is still held.
    pub(super) fn snapshot(&self) -> Option<Arc<Snapshot>> {
        let held = self.environment.cache.held::<Local<Arc<Snapshot>>>(&Slot::of(Kind::Snapshot, &self.key));
        held.map(|held| held.value.clone())
    }

    /// Counts whether the snapshot was of use; it is let go, because the instance has it all itself.
    pub(super) fn came_back(&self, loaded: &Loaded) {
        let cache = &self.environment.cache;
        let still = self.snapshot().is_some_and(|snapshot| snapshot.head == loaded.head);
        cache.proved(Kind::Snapshot, still);
        cache.let_go(&Slot::of(Kind::Snapshot, &self.key));
    }
}
