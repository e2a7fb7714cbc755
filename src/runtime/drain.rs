//! Graceful stop: one signal that everybody can await and ask.

use tokio_util::sync::CancellationToken;

/// Tells the parts of a node to stop taking work, and later to stop altogether. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    refuse: CancellationToken,
    stop: CancellationToken,
}

impl Drain {
    /// From here on new work is refused, work in hand is finished.
    pub fn begin(&self) {
        self.refuse.cancel();
    }

    /// From here on everybody ends at once.
    pub fn stop(&self) {
        self.refuse.cancel();
        self.stop.cancel();
    }

    /// Whether new work is refused.
    pub fn is_draining(&self) -> bool {
        self.refuse.is_cancelled()
    }

    /// Returns when draining begins. Cancel safe.
    pub async fn draining(&self) {
        self.refuse.cancelled().await;
    }

    /// Returns when everybody must end. Cancel safe.
    pub async fn stopped(&self) {
        self.stop.cancelled().await;
    }
}
