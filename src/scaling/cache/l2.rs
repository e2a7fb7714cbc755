//! The second tier, whichever it is.

use bytes::Bytes;

use super::{figures::Figures, link::Link, region::Region, slot::Slot};

/// Redis, or a region of this process.
#[derive(Clone)]
pub(super) enum L2 {
    /// None.
    Off,
    /// In this process.
    Region(Region),
    /// Shared by all nodes.
    Redis(Link),
}

impl L2 {
    /// What is there; nothing at once while it does not answer.
    pub async fn get(&self, slot: &Slot) -> Option<Bytes> {
        match self {
            L2::Off => None,
            L2::Region(region) => region.get(slot),
            L2::Redis(link) => link.get(slot).await.map(Bytes::from),
        }
    }

    /// Tells its figures.
    pub fn tell(&self, figures: &Figures) {
        let (entries, bytes) = match self {
            L2::Off => (0, 0),
            L2::Region(region) => region.measure(),
            L2::Redis(link) => link.measure(),
        };
        figures.holds(1, entries, bytes);
        let up = match self {
            L2::Off => false,
            L2::Region(_) => true,
            L2::Redis(link) => link.is_up(),
        };
        figures.up(1, up);
    }
}
