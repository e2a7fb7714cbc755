//! Slots that tell a fill whether something was committed or dropped meanwhile; keys share them by hash.
//!
//! Invariants: a change counts before anything held is replaced, and a fill looks after it is in place, so that none of the two
//! misses the other. Tests: those of `states` and of the facade.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

/// How many: with a hundred thousand instances in use few share one.
const STRIPES: usize = 1 << 16;

/// All of them. Cheap to clone.
#[derive(Clone)]
pub(super) struct Stripes(Arc<[Stripe]>);

/// One.
#[derive(Default)]
pub(super) struct Stripe {
    /// Changes so far.
    pub changes: AtomicU32,
    /// Readers between their look into the store and their fill.
    pub filling: AtomicU32,
    /// Whether another node may hold something of it: the second, from 1, in which it was last told; 0 if not.
    pub lent: AtomicU32,
}

impl Default for Stripes {
    fn default() -> Self {
        Self((0..STRIPES).map(|_| Stripe::default()).collect())
    }
}

impl Stripes {
    /// That of a key.
    #[allow(clippy::cast_possible_truncation)] // the rest of a division
    pub fn of(&self, hash: u64) -> &Stripe {
        &self.0[(hash % STRIPES as u64) as usize]
    }
}

impl Stripe {
    /// Something changed: fills under way are void.
    pub fn change(&self) -> u32 {
        self.changes.fetch_add(1, Ordering::SeqCst).wrapping_add(1)
    }

    /// How many changes there were.
    pub fn count(&self) -> u32 {
        self.changes.load(Ordering::SeqCst)
    }
}

/// A fill that has begun: taken before the source is read.
pub(super) struct Filling<'a> {
    stripe: &'a Stripe,
    changes: u32,
}

impl<'a> Filling<'a> {
    /// Begins; to be called before the source is read.
    pub fn begin(stripe: &'a Stripe) -> Self {
        stripe.filling.fetch_add(1, Ordering::SeqCst);
        Self { stripe, changes: stripe.count() }
    }

    /// Changes when it began.
    pub const fn changes(&self) -> u32 {
        self.changes
    }

    /// Whether nothing changed since.
    pub fn is_current(&self) -> bool {
        self.stripe.count() == self.changes
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        self.stripe.filling.fetch_sub(1, Ordering::SeqCst);
    }
}
