//! Graceful stop: one signal that everybody can await and ask.

use tokio_util::sync::CancellationToken;

/// Tells the parts of a node to stop taking work, and later to stop altogether. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    leave: CancellationToken,
    refuse: CancellationToken,
    stop: CancellationToken,
}

impl Drain {
    /// From here on the node says that it will stop, and serves as before, so that those in front of it look elsewhere.
    pub fn leave(&self) {
        self.leave.cancel();
    }

    /// From here on new work is refused, work in hand is finished.
    pub fn begin(&self) {
        self.leave.cancel();
        self.refuse.cancel();
    }

    /// From here on everybody ends at once.
    pub fn stop(&self) {
        self.leave.cancel();
        self.refuse.cancel();
        self.stop.cancel();
    }

    /// Whether nobody new should be sent here.
    pub fn is_leaving(&self) -> bool {
        self.leave.is_cancelled()
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
