//! The other brokers of a cluster: who is there, what their sessions want, what is asked of them. Pure.
//!
//! What a peer wants is told in numbered changes; whoever missed one asks for all. Not here: sending (`roam`), routes
//! (`registry`). Tests: at the foot.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use crate::types::{NodeId, TenantId};

/// A peer that was silent for so long is gone: what its sessions want is forgotten.
const SILENT: Duration = Duration::from_secs(5);

/// A subscription: tenant and filter.
pub type Want = (TenantId, String);

#[derive(Debug)]
struct Peer {
    heard: Instant,
    /// Number of the last change that was applied; `None` before the first whole account.
    told: Option<u64>,
    wants: HashSet<Want>,
}

/// What is to be done with routes after something was heard.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Subscriptions that came (true) or went.
    pub changes: Vec<(Want, bool)>,
    /// Whether to ask for a whole account.
    pub ask: bool,
}

/// All peers.
#[derive(Debug, Default)]
pub struct Peers(HashMap<NodeId, Peer>);

impl Peers {
    fn peer(&mut self, node: &NodeId, now: Instant) -> &mut Peer {
        let new = Peer { heard: now, told: None, wants: HashSet::new() };
        let peer = self.0.entry(node.clone()).or_insert(new);
        peer.heard = now;
        peer
    }

    /// A peer said that its last change has this number; whether all of them are known here.
    pub fn is_level(&mut self, node: &NodeId, told: u64, now: Instant) -> bool {
        self.peer(node, now).told == Some(told)
    }

    /// A peer told what its sessions want.
    pub fn wants(
        &mut self,
        node: &NodeId,
        told: u64,
        anew: bool,
        changes: Vec<(TenantId, String, bool)>,
        now: Instant,
    ) -> Heard {
        let peer = self.peer(node, now);
        let mut heard = Heard::default();
        if anew {
            heard.changes.extend(peer.wants.drain().map(|want| (want, false)));
        } else if peer.told.is_some_and(|before| told <= before) {
            return heard;
        } else if peer.told.is_none_or(|before| told != before + 1) {
            return Heard { ask: true, ..heard };
        }
        peer.told = Some(told);
        for (tenant, filter, wanted) in changes {
            let want = (tenant, filter);
            let is_change = if wanted { peer.wants.insert(want.clone()) } else { peer.wants.remove(&want) };
            if is_change {
                heard.changes.push((want, wanted));
            }
        }
        heard
    }

    /// Forgets those that were silent too long; what they wanted.
    pub fn forget_silent(&mut self, now: Instant) -> Vec<(NodeId, Want)> {
        let mut gone = Vec::new();
        self.0.retain(|node, peer| {
            let is_here = now.duration_since(peer.heard) < SILENT;
            if !is_here {
                gone.extend(peer.wants.drain().map(|want| (node.clone(), want)));
            }
            is_here
        });
        gone
    }

    /// Who is there.
    pub fn nodes(&self) -> Vec<NodeId> {
        self.0.keys().cloned().collect()
    }

    /// Whether nobody is.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What sessions of this node that do not last subscribe to, counted.
#[derive(Debug, Default)]
pub struct Own {
    counts: HashMap<Want, usize>,
    /// Number of the last change.
    pub told: u64,
}

impl Own {
    /// One more or one less; whether others are to be told, under the new number.
    pub fn count(&mut self, want: &Want, wanted: bool) -> bool {
        let is_change = if wanted {
            let count = self.counts.entry(want.clone()).or_default();
            *count += 1;
            *count == 1
        } else {
            match self.counts.get_mut(want) {
                None => false,
                Some(count) if *count > 1 => {
                    *count -= 1;
                    false
                }
                Some(_) => self.counts.remove(want).is_some(),
            }
        };
        self.told += u64::from(is_change);
        is_change
    }

    /// All of it.
    pub fn all(&self) -> Vec<(TenantId, String, bool)> {
        self.counts.keys().map(|(tenant, filter)| (tenant.clone(), filter.clone(), true)).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn want(filter: &str) -> Want {
        (TenantId::new("t").unwrap(), filter.into())
    }

    fn change(filter: &str, wanted: bool) -> Vec<(TenantId, String, bool)> {
        vec![(want(filter).0, filter.into(), wanted)]
    }

    #[test]
    fn whoever_missed_a_change_asks_for_all() {
        let (mut peers, now, node) = (Peers::default(), Instant::now(), NodeId::new("n.1").unwrap());
        assert!(!peers.is_level(&node, 0, now), "nothing was told yet");
        assert_eq!(peers.wants(&node, 4, false, change("a", true), now), Heard { ask: true, ..Heard::default() });
        let heard = peers.wants(&node, 4, true, change("a", true), now);
        assert_eq!(heard, Heard { changes: vec![(want("a"), true)], ask: false });
        assert_eq!(peers.wants(&node, 4, false, change("a", true), now), Heard::default(), "told again");
        assert_eq!(peers.wants(&node, 5, false, change("a", false), now).changes, [(want("a"), false)]);
        assert!(peers.wants(&node, 7, false, change("b", true), now).ask);
        assert!(peers.is_level(&node, 5, now) && !peers.is_level(&node, 7, now));
        peers.wants(&node, 7, true, change("b", true), now);
        assert_eq!(peers.forget_silent(now + SILENT), [(node, want("b"))]);
        assert!(peers.is_empty());
    }

    #[test]
    fn the_first_and_the_last_subscription_are_told() {
        let mut own = Own::default();
        assert!(own.count(&want("a"), true) && !own.count(&want("a"), true));
        assert!(!own.count(&want("a"), false) && own.count(&want("a"), false) && !own.count(&want("a"), false));
        assert_eq!((own.told, own.all().len()), (2, 0));
    }
}
