//! One node's part in the ownership of shards: what it holds, until when it may serve, what to take and what to give. Pure:
//! time, views of the cluster and ends of calls come in, decisions go out.
//!
//! Not here: the calls and the clock (`cluster::membership`), who should own what (`cluster::placement`), the fence that
//! makes all of this harmless when it is wrong (`store`).
//!
//! Invariants:
//! - What is held was taken by this node at that epoch, and nothing newer was seen.
//! - The lease is counted from before the renewal was asked for, so it ends here no later than in the store; serving stops
//!   a third of a lease earlier still.
//! - A shard that the store says is this node's, but that it does not hold, is given up before it is taken again: what an
//!   earlier holder in this process left on its way carries an older epoch.
//!
//! Tests: at the foot; `tests/sim/protocol.rs` checks the protocol against every order of events in a small cluster, and the
//! rest of `tests/sim` drives it in large ones.

use std::{collections::BTreeMap, time::Duration};

use super::placement::{self, Plan};
use crate::{
    store::{
        Fence,
        ownership::{Claim, View},
    },
    types::NodeId,
};

/// How the lease is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Terms {
    /// How long a membership lasts without renewal.
    pub lease: Duration,
    /// Between two renewals.
    pub every: Duration,
    /// Most shards on the move at once.
    pub moves: usize,
    /// Whether others could take what this node holds. If not, serving needs no end: a machine that stood still goes on.
    pub shared: bool,
}

impl Terms {
    /// How long after the last renewal was asked for serving stops: two thirds of the lease.
    pub fn serves(&self) -> Duration {
        self.lease * 2 / 3
    }
}

/// A moment of the node's own clock, which never jumps back: time since some moment in the past.
pub type Moment = Duration;

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Serving ends now: close everything without waiting.
    Stop,
    /// Join the cluster.
    Join,
    /// Renew the lease.
    Renew,
    /// Nothing until then.
    Nothing(Moment),
}

/// What a view asks for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Moves {
    /// Held no longer, by whatever happened in the store: close without waiting.
    pub lost: Vec<u32>,
    /// To be closed in good order and then released.
    pub hand_off: Vec<u32>,
    /// To be released at once: the store says they are this node's, which does not hold them.
    pub release: Vec<Fence>,
    /// To be taken.
    pub take: Vec<Claim>,
}

impl Moves {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.lost.is_empty() && self.hand_off.is_empty() && self.release.is_empty() && self.take.is_empty()
    }
}

/// A shard in this node's hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Held {
    epoch: u64,
    /// Being closed, to be released.
    closing: bool,
}

/// The state of one node's part.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Lease {
    node: NodeId,
    terms: Terms,
    /// When the last renewal that succeeded was asked for; none while it is no member.
    renewed: Option<Moment>,
    /// When it may ask next.
    next: Moment,
    /// Since when its views show that shards should change hands.
    restless: Option<Moment>,
    draining: bool,
    held: BTreeMap<u32, Held>,
}

impl Lease {
    /// A node that is no member yet.
    pub const fn new(node: NodeId, terms: Terms) -> Self {
        Self { node, terms, renewed: None, next: Moment::ZERO, restless: None, draining: false, held: BTreeMap::new() }
    }

    /// The node.
    pub const fn node(&self) -> &NodeId {
        &self.node
    }

    /// How it is kept.
    pub const fn terms(&self) -> &Terms {
        &self.terms
    }

    /// From here on it takes nothing and gives everything away.
    pub const fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether it gives everything away.
    pub const fn is_draining(&self) -> bool {
        self.draining
    }

    /// The shards that are open, with their epochs, in order.
    pub fn open(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.held.iter().filter(|(_, held)| !held.closing).map(|(shard, held)| (*shard, held.epoch))
    }

    /// Whether it holds nothing, not even something that is being closed.
    pub fn holds_nothing(&self) -> bool {
        self.held.is_empty()
    }

    /// Until when it may serve what it holds; none when it may not at all.
    pub fn serves_until(&self) -> Option<Moment> {
        let until = |renewed: Moment| if self.terms.shared { renewed + self.terms.serves() } else { Moment::MAX };
        self.renewed.map(until)
    }

    /// What is due now.
    pub fn due(&self, now: Moment) -> Due {
        let stop = self.serves_until().filter(|_| !self.held.is_empty());
        if stop.is_some_and(|stop| now >= stop) {
            Due::Stop
        } else if now < self.next {
            Due::Nothing(stop.map_or(self.next, |stop| stop.min(self.next)))
        } else if self.renewed.is_none() {
            Due::Join
        } else {
            Due::Renew
        }
    }

    /// It asks to join or to renew now.
    pub fn asks(&mut self, now: Moment) {
        self.next = now + self.terms.every;
    }

    /// The next renewal is due at once: somebody said that something changed.
    pub const fn hurry(&mut self) {
        self.next = Moment::ZERO;
    }

    /// The next renewal is due at that moment at the latest.
    pub fn within(&mut self, moment: Moment) {
        self.next = self.next.min(moment);
    }

    /// A join or renewal that was asked for at that moment succeeded.
    pub fn renewed(&mut self, asked: Moment) {
        self.renewed = Some(asked);
    }

    /// Serving ended, by [`Due::Stop`] or because the store says the lease is over (`lost`: then it must join again).
    /// Returns what has to be closed without waiting.
    pub fn stop(&mut self, lost: bool) -> Vec<u32> {
        if lost {
            self.renewed = None;
        }
        std::mem::take(&mut self.held).into_keys().collect()
    }

    /// Whether shards are about to change hands somewhere: then everybody looks more often, so that none is free for long.
    pub const fn is_restless(&self) -> bool {
        self.restless.is_some()
    }

    /// What the view asks for, also that it drains. It must be newer than the last ends of calls told here.
    ///
    /// Nothing is given away before everybody has had the time to see that it will be, and looks out for it.
    pub fn look(&mut self, view: &View, now: Moment) -> Moves {
        let mut moves = Moves::default();
        self.draining |= view.nodes.iter().any(|row| row.node == self.node && row.draining);
        for row in &view.shards {
            let own = row.node.as_ref() == Some(&self.node);
            match self.held.get(&row.shard) {
                Some(held) if !own || held.epoch != row.epoch => {
                    self.held.remove(&row.shard);
                    moves.lost.push(row.shard);
                }
                None if own => moves.release.push(row.fence()),
                Some(_) | None => {}
            }
        }
        let Plan { take, give } = placement::plan(view, self.terms.moves);
        let at_rest = take.is_empty() && give.is_empty();
        self.restless = if at_rest { None } else { self.restless.or(Some(now)) };
        let noticed = self.restless.is_some_and(|since| now >= since + self.terms.every);
        for (shard, node) in give.into_iter().filter(|_| noticed) {
            if let Some(held) = self.held.get_mut(&shard).filter(|held| node == self.node && !held.closing) {
                held.closing = true;
                moves.hand_off.push(shard);
            }
        }
        for (shard, _) in take.into_iter().filter(|(_, node)| *node == self.node && !self.draining) {
            let row = view.shards.get(shard as usize).filter(|_| !self.held.contains_key(&shard));
            moves.take.extend(row.map(|row| Claim { shard, epoch: row.epoch }));
        }
        // What is still this node's in the store is taken in the next round, when it has been released.
        moves.take.retain(|claim| !moves.release.iter().any(|fence| fence.shard == claim.shard));
        moves
    }

    /// Shards were taken.
    pub fn taken(&mut self, fences: &[Fence]) {
        self.held.extend(fences.iter().map(|fence| (fence.shard, Held { epoch: fence.epoch, closing: false })));
    }

    /// A hand-off closed this shard. Returns what to release, unless it was lost meanwhile.
    pub fn closed(&mut self, shard: u32) -> Option<Fence> {
        let held = self.held.get(&shard).copied().filter(|held| held.closing)?;
        self.held.remove(&shard);
        Some(Fence { shard, epoch: held.epoch, ..Fence::default() })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        store::ownership::{Joining, Renewal, Rows},
        types::{Load, Millis, Protocol, Roles},
    };

    const TERMS: Terms = Terms { lease: Duration::from_secs(3), every: Duration::from_secs(1), moves: 4, shared: true };
    const SHARDS: u32 = 6;

    fn id(name: &str) -> NodeId {
        NodeId::new(format!("{name}.0")).unwrap()
    }

    fn joining(node: &NodeId) -> Joining {
        Joining {
            node: node.clone(),
            cluster: String::from("c"),
            shards: SHARDS,
            addresses: Vec::new(),
            roles: Roles::default(),
            weight: 100,
            protocol: Protocol { min: 1, max: 1 },
            lease: TERMS.lease,
        }
    }

    /// Its process was not run for an hour, say, and nobody else could have come.
    #[test]
    fn who_has_its_store_for_itself_goes_on_after_any_pause() {
        for shared in [false, true] {
            let mut bench = Bench { rows: Rows::default(), now: Moment::from_secs(100) };
            let mut lease = Lease::new(id("a"), Terms { shared, ..TERMS });
            let moves = bench.join(&mut lease);
            bench.take(&mut lease, &moves);
            bench.now += Duration::from_secs(3600);
            assert_eq!(lease.due(bench.now), if shared { Due::Stop } else { Due::Renew });
            assert_eq!(lease.serves_until().is_some_and(|until| until > bench.now), !shared);
        }
    }

    /// A node and the rows, with one clock for both.
    struct Bench {
        rows: Rows,
        now: Moment,
    }

    impl Bench {
        fn millis(&self) -> Millis {
            Millis(self.now.as_millis() as i64)
        }

        fn join(&mut self, lease: &mut Lease) -> Moves {
            let view = self.rows.join(&joining(lease.node()), self.millis()).unwrap();
            lease.asks(self.now);
            lease.renewed(self.now);
            lease.look(&view, self.now)
        }

        fn renew(&mut self, lease: &mut Lease) -> Moves {
            let renewal =
                Renewal { lease: TERMS.lease, load: Load::default(), weight: 100, draining: lease.is_draining() };
            lease.asks(self.now);
            let view = self.rows.renew(lease.node(), renewal, self.millis()).unwrap();
            lease.renewed(self.now);
            lease.look(&view, self.now)
        }

        fn take(&mut self, lease: &mut Lease, moves: &Moves) {
            let taken = self.rows.take(lease.node(), &moves.take, self.millis()).unwrap();
            lease.taken(&taken);
        }
    }

    /// A cluster of two that is at rest.
    fn two() -> (Bench, Lease, Lease) {
        let mut bench = Bench { rows: Rows::default(), now: Moment::from_secs(100) };
        let mut leases = [Lease::new(id("a"), TERMS), Lease::new(id("b"), TERMS)];
        for lease in &mut leases {
            let moves = bench.join(lease);
            bench.take(lease, &moves);
        }
        for _ in 0..4 {
            bench.now += TERMS.every;
            for lease in &mut leases {
                let moves = bench.renew(lease);
                for shard in moves.hand_off.clone() {
                    let fence = lease.closed(shard).unwrap();
                    bench.rows.release(lease.node(), &[fence]);
                }
                bench.take(lease, &moves);
            }
        }
        let [a, b] = leases;
        assert_eq!((a.open().count(), b.open().count()), (3, 3));
        (bench, a, b)
    }

    #[test]
    fn the_first_takes_all_and_gives_half_to_the_second() {
        let (mut bench, mut a, mut b) = two();
        assert!(bench.renew(&mut a).is_empty() && bench.renew(&mut b).is_empty());
        assert!(b.open().all(|(_, epoch)| epoch == 2), "each was taken from the first");
    }

    #[test]
    fn what_is_due_follows_the_clock() {
        let mut lease = Lease::new(id("a"), TERMS);
        let at = Moment::from_millis;
        assert_eq!(lease.due(at(0)), Due::Join);
        lease.asks(at(0));
        assert_eq!(lease.due(at(1)), Due::Nothing(at(1000)));
        assert_eq!(lease.due(at(1000)), Due::Join);
        lease.renewed(at(1000));
        lease.asks(at(1000));
        assert_eq!((lease.due(at(1999)), lease.due(at(2000))), (Due::Nothing(at(2000)), Due::Renew));
        lease.taken(&[Fence { shard: 1, epoch: 1, ..Fence::default() }]);
        lease.asks(at(2500));
        assert_eq!((lease.due(at(2999)), lease.due(at(3000))), (Due::Nothing(at(3000)), Due::Stop));
        assert_eq!(lease.stop(false), [1]);
        assert_eq!(lease.due(at(3500)), Due::Renew, "the store may still know it");
        lease.hurry();
        assert_eq!(lease.due(at(0)), Due::Renew);
        assert!(lease.stop(true).is_empty());
        assert_eq!(lease.due(at(3500)), Due::Join);
    }

    #[test]
    fn what_another_took_is_lost() {
        let (mut bench, mut a, mut b) = two();
        bench.rows.set_alive(a.node(), false);
        let moves = bench.renew(&mut b);
        assert_eq!(moves.take.len(), 3);
        bench.take(&mut b, &moves);
        assert_eq!(b.open().count(), 6);
        let lost = bench.renew(&mut a).lost;
        assert_eq!((lost.len(), a.holds_nothing()), (3, true));
    }

    #[test]
    fn what_is_its_own_unknowingly_is_released_and_taken_again() {
        let (mut bench, mut a, _) = two();
        let had: Vec<(u32, u64)> = a.open().collect();
        assert_eq!(a.stop(false).len(), 3);
        let moves = bench.renew(&mut a);
        assert_eq!(moves.release.iter().map(|fence| (fence.shard, fence.epoch)).collect::<Vec<_>>(), had);
        assert!(moves.take.is_empty());
        bench.rows.release(a.node(), &moves.release);
        let moves = bench.renew(&mut a);
        bench.take(&mut a, &moves);
        assert!(a.open().eq(had.into_iter().map(|(shard, epoch)| (shard, epoch + 1))));
    }

    #[test]
    fn draining_gives_everything_in_rounds() {
        let (mut bench, mut a, mut b) = two();
        a.drain();
        assert!(bench.renew(&mut b).is_empty() && !b.is_restless(), "nobody knows yet");
        assert!(bench.renew(&mut a).is_empty(), "nobody else knows yet");
        bench.now += TERMS.every;
        assert!(bench.renew(&mut b).is_empty() && b.is_restless());
        let moves = bench.renew(&mut a);
        assert_eq!((moves.hand_off.len(), moves.take.len()), (3, 0));
        assert_eq!(bench.renew(&mut a), Moves::default(), "once is enough");
        let fences: Vec<Fence> = moves.hand_off.iter().filter_map(|shard| a.closed(*shard)).collect();
        assert_eq!(a.closed(moves.hand_off[0]), None);
        bench.rows.release(a.node(), &fences);
        assert!(a.holds_nothing());
        let moves = bench.renew(&mut b);
        bench.take(&mut b, &moves);
        assert_eq!(b.open().count(), 6);
        assert!(bench.renew(&mut b).is_empty() && !b.is_restless());
    }

    #[test]
    fn an_operator_makes_it_drain() {
        let (mut bench, mut a, _) = two();
        assert!(bench.rows.drain(a.node()));
        assert!(bench.renew(&mut a).is_empty() && a.is_draining() && a.is_restless());
        bench.now += TERMS.every;
        assert_eq!(bench.renew(&mut a).hand_off.len(), 3);
    }

    #[test]
    fn a_shard_that_was_lost_while_it_closed_is_not_released() {
        let (mut bench, mut a, mut b) = two();
        a.drain();
        bench.renew(&mut a);
        bench.now += TERMS.every;
        let moves = bench.renew(&mut a);
        bench.rows.set_alive(a.node(), false);
        let takes = bench.renew(&mut b);
        bench.take(&mut b, &takes);
        assert_eq!(bench.renew(&mut a).lost, moves.hand_off);
        assert!(moves.hand_off.iter().all(|shard| a.closed(*shard).is_none()));
    }

    #[derive(Debug, Clone)]
    enum Event {
        Pass(u64),
        /// A round of a node: whether its answer arrives, whether its taking is answered, how many hand-offs end.
        Round {
            node: usize,
            answered: bool,
            taken: bool,
            closed: usize,
        },
        Alive(usize, bool),
        Drain(usize),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            2 => (1..2_500u64).prop_map(Event::Pass),
            8 => (0..3usize, prop::bool::weighted(0.8), prop::bool::weighted(0.8), 0..4usize)
                .prop_map(|(node, answered, taken, closed)| Event::Round { node, answered, taken, closed }),
            1 => (0..3usize, any::<bool>()).prop_map(|(node, alive)| Event::Alive(node, alive)),
            1 => (0..3usize).prop_map(Event::Drain),
        ];
        prop::collection::vec(event, 1..120)
    }

    /// One round of a node as the shell does it.
    fn round(bench: &mut Bench, lease: &mut Lease, answered: bool, taken: bool, closed: usize) {
        let now = bench.now;
        match lease.due(now) {
            Due::Stop => drop(lease.stop(false)),
            Due::Nothing(until) => assert!(until > now),
            Due::Join if answered => {
                let moves = bench.join(lease);
                bench.rows.release(lease.node(), &moves.release);
            }
            Due::Join => lease.asks(now),
            Due::Renew => {
                let renewal =
                    Renewal { lease: TERMS.lease, load: Load::default(), weight: 100, draining: lease.is_draining() };
                lease.asks(now);
                let view = bench.rows.renew(lease.node(), renewal, bench.millis());
                if !answered {
                    return;
                }
                let Ok(view) = view else {
                    lease.stop(true);
                    return;
                };
                lease.renewed(now);
                let moves = lease.look(&view, now);
                let ended: Vec<Fence> = (0..SHARDS).filter_map(|shard| lease.closed(shard)).take(closed).collect();
                bench.rows.release(lease.node(), &ended);
                bench.rows.release(lease.node(), &moves.release);
                let fences = bench.rows.take(lease.node(), &moves.take, bench.millis()).unwrap();
                if taken {
                    lease.taken(&fences);
                }
            }
        }
    }

    proptest! {
        /// Whatever happens: no two nodes hold a shard at one epoch, whoever may still serve holds what the store says is
        /// its own (unless its session broke), and once nothing happens any more, everything is owned again.
        #[test]
        fn no_epoch_is_held_twice_and_all_is_owned_in_the_end(events in events()) {
            let mut bench = Bench { rows: Rows::default(), now: Moment::from_secs(100) };
            let mut leases: Vec<Lease> = ["a", "b", "c"].map(|name| Lease::new(id(name), TERMS)).into();
            // Nodes that others may have taken from since their last round.
            let mut gone = [false; 3];
            for event in events {
                match event {
                    Event::Pass(ms) => bench.now += Duration::from_millis(ms),
                    Event::Round { node, answered, taken, closed } => {
                        let asks = matches!(leases[node].due(bench.now), Due::Join | Due::Renew);
                        round(&mut bench, &mut leases[node], answered, taken, closed);
                        let view = bench.rows.view(bench.millis());
                        let row = view.nodes.iter().find(|row| row.node == *leases[node].node());
                        gone[node] &= !(asks && answered && row.is_some_and(|row| row.alive));
                    }
                    Event::Alive(node, alive) => {
                        bench.rows.set_alive(leases[node].node(), alive);
                        gone[node] |= !alive;
                    }
                    Event::Drain(node) => leases[node].drain(),
                }
                let held: Vec<(u32, u64)> = leases.iter().flat_map(Lease::open).collect();
                let mut distinct = held.clone();
                distinct.sort_unstable();
                distinct.dedup();
                prop_assert_eq!(held.len(), distinct.len());
                let view = bench.rows.view(bench.millis());
                for (lease, _) in leases.iter().zip(gone).filter(|(_, gone)| !gone) {
                    let serves = lease.serves_until().is_some_and(|until| until > bench.now);
                    for (shard, epoch) in lease.open().filter(|_| serves) {
                        let row = &view.shards[shard as usize];
                        prop_assert_eq!((row.node.as_ref(), row.epoch), (Some(lease.node()), epoch));
                    }
                }
            }
            leases.iter().for_each(|lease| bench.rows.set_alive(lease.node(), true));
            for _ in 0..60 {
                bench.now += Duration::from_millis(500);
                leases.iter_mut().for_each(|lease| round(&mut bench, lease, true, true, 6));
            }
            let open: usize = leases.iter().map(|lease| lease.open().count()).sum();
            let able = leases.iter().any(|lease| !lease.is_draining());
            prop_assert!(!able || open == SHARDS as usize, "{open} are open");
        }
    }
}
