//! Which feeds are worth asking for: delivery asks for all that it follows whenever something was committed, and nearly all of
//! them are quiet.
//!
//! A feed is quiet from the position after which nothing was found until this node commits into it, and for a moment only:
//! what another node committed into it is found at the next full look. Invariant: a look that began before a commit never
//! makes its feed quiet. Pure but for the locks. Tests: at the foot.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::store::Feed;

/// How long a feed is quiet at most. Delivery looks at everything once a second.
const QUIET: Duration = Duration::from_millis(900);

#[derive(Debug, Clone, Copy)]
struct Quiet {
    after: i64,
    commits: u64,
    since: Instant,
}

/// What is known of each feed.
#[derive(Debug)]
pub(super) struct Feeds {
    /// Commits into each of them.
    commits: Vec<AtomicU64>,
    quiet: Mutex<Vec<Option<Quiet>>>,
}

/// A look at some feeds.
#[derive(Debug)]
pub(super) struct Look {
    /// Feeds and positions to be asked for.
    pub asked: Vec<(Feed, i64)>,
    commits: Vec<u64>,
}

impl Feeds {
    /// So many feeds, of which nothing is known.
    pub(super) fn new(count: u32) -> Self {
        let commits = (0..count).map(|_| AtomicU64::new(0)).collect();
        Self { commits, quiet: Mutex::new(vec![None; count as usize]) }
    }

    fn commits(&self, feed: Feed) -> u64 {
        self.commits.get(feed.0 as usize).map_or(0, |commits| commits.load(Ordering::Acquire))
    }

    /// Something was committed into these.
    pub(super) fn moved(&self, feeds: impl IntoIterator<Item = u32>) {
        for feed in feeds {
            if let Some(commits) = self.commits.get(feed as usize) {
                commits.fetch_add(1, Ordering::AcqRel);
            }
        }
    }

    /// Which of these are worth asking for now.
    pub(super) fn look(&self, after: &[(Feed, i64)], now: Instant) -> Look {
        let quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        let is_quiet = |feed: Feed, position: i64| {
            let known = quiet.get(feed.0 as usize).copied().flatten();
            known.is_some_and(|known| {
                known.after == position
                    && known.commits == self.commits(feed)
                    && now.duration_since(known.since) < QUIET
            })
        };
        let asked: Vec<_> = after.iter().copied().filter(|(feed, position)| !is_quiet(*feed, *position)).collect();
        let commits = asked.iter().map(|(feed, _)| self.commits(*feed)).collect();
        Look { asked, commits }
    }

    /// The look found something in these feeds and nothing in the others.
    pub(super) fn found(&self, look: &Look, now: Instant, feeds: impl Fn(Feed) -> bool) {
        let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        for (&(feed, after), &commits) in look.asked.iter().zip(&look.commits) {
            if let Some(place) = quiet.get_mut(feed.0 as usize) {
                *place = (!feeds(feed)).then_some(Quiet { after, commits, since: now });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_feed_is_asked_again_after_a_commit_or_a_moment() {
        let (feeds, now) = (Feeds::new(3), Instant::now());
        let all = [(Feed(0), 5), (Feed(1), 6), (Feed(2), 7)];
        let look = feeds.look(&all, now);
        assert_eq!(look.asked, all);
        // A commit while it looks: what it did not find may be there.
        feeds.moved([1]);
        feeds.found(&look, now, |feed| feed == Feed(2));
        assert_eq!(feeds.look(&all, now).asked, all[1..]);
        assert_eq!(feeds.look(&[(Feed(0), 4)], now).asked, [(Feed(0), 4)], "it is quiet only after that position");
        feeds.moved([0, 99]);
        assert_eq!(feeds.look(&all, now).asked, all);
        let look = feeds.look(&all, now);
        feeds.found(&look, now, |_| false);
        assert!(feeds.look(&all, now).asked.is_empty());
        assert_eq!(feeds.look(&all, now + QUIET).asked, all);
    }
}
