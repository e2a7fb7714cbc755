//! Which node should own which shard. Pure: a view of the cluster in, a plan out, the same on every node.
//!
//! Weighted rendezvous hashing (`scaling::load_balancer`) says who likes a shard best, by the weights in the nodes' rows.
//! Hashing alone is uneven: with 256 shards on 3 nodes, shares differ by 9 % (standard deviation). So, as in consistent
//! hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018), nobody gets more than its share rounded up; and what
//! a node rightly owns it keeps, so the plan starts from the present owners and is no function of the members alone.
//!
//! Not here: taking and giving (`cluster::lease`), who is alive (`store::ownership`), what a node weighs under its load
//! (`cluster::balancer`: each says so in its own row, so that all plan by the same figures).
//! Invariants: a node's arrival moves shards only to it, its end only those it had; at rest every node has its share, rounded
//! up or down, and nothing moves; a shard nobody owns is always planned for somebody.
//! Tests: at the foot.

use crate::{
    scaling::load_balancer::score,
    store::ownership::{NodeRow, View},
    types::{NodeId, Role, id::stable_hash},
};

/// What should change hands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Shards that nobody owns, and who should take them. Each node acts on its own part at once.
    pub take: Vec<(u32, NodeId)>,
    /// Shards whose owner should give them up, so that they can be taken, and that owner.
    pub give: Vec<(u32, NodeId)>,
}

/// A node that may own shards.
struct Candidate<'a> {
    node: &'a NodeId,
    /// What its hash is made of.
    name: &'a str,
    weight: u32,
    /// Its share of all shards, rounded down and up.
    least: usize,
    most: usize,
    share: f64,
    count: usize,
}

/// Plans one round: all shards without an owner find one, and at most `moves` shards are on the move, counting those that
/// have no owner at present.
pub fn plan(view: &View, moves: usize) -> Plan {
    let mut candidates = candidates(view);
    let mut plan = Plan::default();
    if candidates.is_empty() {
        return plan;
    }
    let mut owners: Vec<Option<usize>> = Vec::with_capacity(view.shards.len());
    let mut leaving = Vec::new();
    let mut free = Vec::new();
    for row in &view.shards {
        let at = row.node.as_ref().and_then(|node| candidates.iter().position(|candidate| candidate.node == node));
        if let Some(at) = at {
            candidates[at].count += 1;
        } else if let Some(node) = row.node.as_ref().filter(|node| holds(view, node)) {
            leaving.push((row.shard, node.clone()));
        } else {
            free.push(row.shard);
        }
        owners.push(at);
    }
    for shard in free {
        let at = best(&mut candidates, shard);
        owners[shard as usize] = Some(at);
        plan.take.push((shard, candidates[at].node.clone()));
    }
    let budget = moves.saturating_sub(plan.take.len());
    for (shard, node) in leaving.into_iter().take(budget) {
        owners[shard as usize] = Some(best(&mut candidates, shard));
        plan.give.push((shard, node));
    }
    while plan.give.len() < budget {
        let Some((from, to)) = unfair(&candidates) else { break };
        let Some(shard) = dearest(&candidates, &owners, &plan, from, to) else { break };
        plan.give.push((shard, candidates[from].node.clone()));
        owners[shard as usize] = Some(to);
        candidates[from].count -= 1;
        candidates[to].count += 1;
    }
    plan
}

/// Whether nobody but this node could own shards.
pub fn is_alone(view: &View, node: &NodeId) -> bool {
    !view.nodes.iter().any(|row| row.node != *node && may_own(row))
}

/// Whether a node may own shards: its lease runs, its process is there, it stays, and it has the role.
pub fn may_own(row: &NodeRow) -> bool {
    row.holds() && !row.draining && row.roles.has(Role::Mind) && row.weight > 0
}

fn holds(view: &View, node: &NodeId) -> bool {
    view.nodes.iter().any(|row| row.node == *node && row.holds())
}

fn candidates(view: &View) -> Vec<Candidate<'_>> {
    let rows: Vec<&NodeRow> = view.nodes.iter().filter(|row| may_own(row)).collect();
    let total: u64 = rows.iter().map(|row| u64::from(row.weight)).sum();
    let shards = view.shards.len() as u64;
    let candidate = |row: &&'_ NodeRow| {
        let part = shards * u64::from(row.weight);
        (part / total, part.div_ceil(total), part as f64 / total as f64)
    };
    rows.iter()
        .map(|row| {
            let (least, most, share) = candidate(row);
            // A node comes back under its name and likes the same shards; of several with one name each has its own taste.
            let namesakes = rows.iter().filter(|other| other.node.name() == row.node.name()).count();
            Candidate {
                node: &row.node,
                name: if namesakes > 1 { row.node.as_str() } else { row.node.name() },
                weight: row.weight,
                least: usize::try_from(least).unwrap_or(usize::MAX),
                most: usize::try_from(most).unwrap_or(usize::MAX),
                share,
                count: 0,
            }
        })
        .collect()
}

impl Candidate<'_> {
    /// How much it likes a shard; the greatest wins. Among nodes of equal weight each wins as often as any other, and a node
    /// of twice the weight twice as often.
    fn score(&self, shard: u32) -> f64 {
        score(stable_hash(self.name.bytes().chain([0]).chain(shard.to_le_bytes())), self.weight)
    }

    fn excess(&self) -> f64 {
        self.count as f64 - self.share
    }
}

/// Who gets a shard that has no owner, counted at once: whoever likes it best of those with less than their share, or else
/// of those with room.
fn best(candidates: &mut [Candidate<'_>], shard: u32) -> usize {
    let wants = |room: fn(&Candidate<'_>) -> bool| {
        let those = candidates.iter().enumerate().filter(|(_, candidate)| room(candidate));
        those.max_by(|(_, one), (_, other)| one.score(shard).total_cmp(&other.score(shard))).map(|(at, _)| at)
    };
    let under = wants(|candidate| candidate.count < candidate.least);
    let at = under.or_else(|| wants(|candidate| candidate.count < candidate.most)).or_else(|| wants(|_| true));
    let at = at.unwrap_or_default();
    candidates[at].count += 1;
    at
}

/// Who has too much and who has too little, if anybody has more or less than a share rounded up or down.
fn unfair(candidates: &[Candidate<'_>]) -> Option<(usize, usize)> {
    let by_excess = |(_, one): &(usize, &Candidate<'_>), (_, other): &(usize, &Candidate<'_>)| {
        one.excess().total_cmp(&other.excess())
    };
    let each = || candidates.iter().enumerate();
    let (from, richest) = each().max_by(by_excess)?;
    let (to, poorest) = each().min_by(by_excess)?;
    let too_much = each().any(|(_, candidate)| candidate.count > candidate.most);
    let too_little = each().any(|(_, candidate)| candidate.count < candidate.least);
    ((too_much || too_little) && richest.excess() - poorest.excess() > 1.0).then_some((from, to))
}

/// Of the shards of `from`, the one that `to` likes most in comparison.
fn dearest(candidates: &[Candidate<'_>], owners: &[Option<usize>], plan: &Plan, from: usize, to: usize) -> Option<u32> {
    let planned = |shard: u32| plan.take.iter().chain(&plan.give).any(|(other, _)| *other == shard);
    let shards = (0..).zip(owners).filter(|(shard, owner)| **owner == Some(from) && !planned(*shard));
    let liking = |shard: u32| candidates[to].score(shard) / candidates[from].score(shard);
    shards.map(|(shard, _)| shard).max_by(|one, other| liking(*one).total_cmp(&liking(*other)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        store::ownership::ShardRow,
        types::{Load, Millis, Protocol, Roles},
    };

    fn node(name: &str, weight: u32) -> NodeRow {
        NodeRow {
            node: NodeId::new(format!("{name}.0")).unwrap(),
            addresses: Vec::new(),
            roles: Roles::default(),
            weight,
            protocol: Protocol { min: 1, max: 1 },
            lease_left: 1,
            load: Load::default(),
            draining: false,
            alive: true,
        }
    }

    fn view(shards: u32, weights: &[u32]) -> View {
        View {
            now: Millis(0),
            nodes: (0..).zip(weights).map(|(n, weight): (u32, _)| node(&format!("n{n}"), *weight)).collect(),
            shards: (0..shards).map(|shard| ShardRow { shard, node: None, epoch: 0, lodged: 0 }).collect(),
        }
    }

    /// Carries out a plan as the nodes would. Returns what was taken.
    fn carry_out(view: &mut View, plan: &Plan) {
        for (shard, node) in &plan.give {
            assert_eq!(view.shards[*shard as usize].node.as_ref(), Some(node), "only an owner gives");
            view.shards[*shard as usize].node = None;
        }
        for (shard, node) in &plan.take {
            view.shards[*shard as usize].node = Some(node.clone());
        }
    }

    /// Rounds until nothing moves.
    fn settle(view: &mut View, moves: usize) -> usize {
        for round in 0..2_000 {
            let plan = plan(view, moves);
            assert!(plan.give.len() <= moves);
            if plan == Plan::default() {
                return round;
            }
            carry_out(view, &plan);
        }
        panic!("it never comes to rest: {:?}", counts(view));
    }

    fn counts(view: &View) -> BTreeMap<NodeId, usize> {
        let mut counts: BTreeMap<NodeId, usize> = view.nodes.iter().map(|row| (row.node.clone(), 0)).collect();
        for owner in view.shards.iter().filter_map(|row| row.node.as_ref()) {
            *counts.entry(owner.clone()).or_default() += 1;
        }
        counts
    }

    fn owners(view: &View) -> Vec<Option<NodeId>> {
        view.shards.iter().map(|row| row.node.clone()).collect()
    }

    fn evenness(view: &View) -> f64 {
        let counts = counts(view);
        let most = *counts.values().max().unwrap() as f64;
        view.shards.len() as f64 / counts.len() as f64 / most
    }

    #[test]
    fn equal_nodes_own_equal_parts() {
        for (nodes, least) in [(2, 1.0), (3, 0.98), (5, 0.98), (10, 0.98)] {
            let mut view = view(256, &vec![100; nodes]);
            settle(&mut view, 16);
            assert!(evenness(&view) >= least, "{nodes}: {:?}", counts(&view));
        }
    }

    /// Why hashing alone is not enough.
    #[test]
    fn hashing_alone_is_uneven() {
        let view = view(256, &[100; 3]);
        let candidates = candidates(&view);
        let mut wins = [0usize; 3];
        for shard in 0..256 {
            let all = candidates.iter().enumerate();
            let winner = all.max_by(|(_, a), (_, b)| a.score(shard).total_cmp(&b.score(shard))).unwrap().0;
            wins[winner] += 1;
        }
        let evenness = 256.0 / 3.0 / *wins.iter().max().unwrap() as f64;
        assert!(evenness < 0.98, "{wins:?}");
        assert!(wins.iter().all(|wins| (60..=115).contains(wins)), "but it is not lopsided: {wins:?}");
    }

    #[test]
    fn weights_win_in_proportion() {
        let view = view(30_000, &[100, 200]);
        let candidates = candidates(&view);
        let wins = (0..30_000).filter(|shard| candidates[1].score(*shard) > candidates[0].score(*shard)).count();
        assert!((19_500..20_500).contains(&wins), "{wins}");
    }

    #[test]
    fn a_node_that_comes_back_likes_what_it_had() {
        let mut view = view(256, &[100; 3]);
        settle(&mut view, 256);
        let gone = view.nodes.pop().unwrap();
        let before: BTreeSet<u32> =
            view.shards.iter().filter(|row| row.node.as_ref() == Some(&gone.node)).map(|row| row.shard).collect();
        settle(&mut view, 256);
        view.nodes.push(NodeRow { node: NodeId::new("n2.1").unwrap(), ..gone });
        settle(&mut view, 256);
        let again = |row: &&ShardRow| row.node.as_ref().unwrap().as_str() == "n2.1" && before.contains(&row.shard);
        let kept = view.shards.iter().filter(again).count();
        assert!(kept * 2 > before.len(), "{kept} of {}", before.len());
    }

    #[test]
    fn namesakes_share() {
        let mut view = view(64, &[]);
        for life in 0..2 {
            view.nodes.push(NodeRow { node: NodeId::new(format!("same.{life}")).unwrap(), ..node("x", 100) });
        }
        settle(&mut view, 64);
        assert_eq!(counts(&view).into_values().collect::<Vec<_>>(), [32, 32]);
    }

    #[test]
    fn who_may_not_own_gets_nothing_and_gives_what_it_has() {
        let mut view = view(16, &[100, 100]);
        settle(&mut view, 16);
        view.nodes[0].roles = [Role::Gateway].into_iter().collect();
        assert_eq!(plan(&view, 3).give.len(), 3);
        settle(&mut view, 3);
        assert_eq!(counts(&view).into_values().collect::<Vec<_>>(), [0, 16]);
        assert!(is_alone(&view, &view.nodes[1].node) && !is_alone(&view, &view.nodes[0].node));
        view.nodes[1].draining = true;
        assert_eq!(plan(&view, 16), Plan::default(), "nobody could take it");
    }

    #[test]
    fn what_a_lost_node_had_is_taken_at_once() {
        let mut view = view(64, &[100; 3]);
        settle(&mut view, 64);
        for lost in
            [NodeRow { alive: false, ..view.nodes[0].clone() }, NodeRow { lease_left: 0, ..view.nodes[0].clone() }]
        {
            view.nodes[0] = lost;
            let plan = plan(&view, 1);
            assert!(plan.take.len() >= 21 && plan.give.is_empty(), "{plan:?}");
        }
    }

    fn weights() -> impl Strategy<Value = Vec<u32>> {
        prop_oneof![
            (1..8usize).prop_map(|nodes| vec![100; nodes]),
            prop::collection::vec(prop_oneof![Just(50), Just(100), Just(200), 1..1000u32], 1..8),
        ]
    }

    proptest! {
        #[test]
        fn a_node_that_gives_up_weight_sheds_just_that(shards in 1..300u32, nodes in 2..8usize, step in 1..4u32, moves in 1..40usize) {
            let mut view = view(shards, &vec![800; nodes]);
            settle(&mut view, 256);
            let before = owners(&view);
            view.nodes[0].weight -= 100 * step;
            settle(&mut view, moves);
            let moved = before.iter().zip(owners(&view)).filter(|(old, new)| *old != new).count();
            let share = |weight: u32| f64::from(shards) * f64::from(weight) / f64::from(800 * nodes as u32 - 100 * step);
            let shed = f64::from(shards) / nodes as f64 - share(800 - 100 * step);
            prop_assert!(moved as f64 <= shed + nodes as f64, "{moved} moved, {shed} to shed");
        }

        #[test]
        fn at_rest_everybody_has_a_fair_share(shards in 1..300u32, weights in weights(), moves in 1..40usize) {
            let mut view = view(shards, &weights);
            settle(&mut view, moves);
            let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
            for (count, weight) in counts(&view).values().zip(&weights) {
                let part = u64::from(shards) * u64::from(*weight);
                let (least, most) = ((part / total) as usize, part.div_ceil(total) as usize);
                prop_assert!((least..=most).contains(count), "{count} of {least}..={most}");
            }
        }

        #[test]
        fn an_arrival_moves_only_what_it_gains(shards in 1..300u32, nodes in 1..7usize, moves in 1..40usize) {
            let mut view = view(shards, &vec![100; nodes]);
            settle(&mut view, 256);
            let before = owners(&view);
            view.nodes.push(node("newcomer", 100));
            settle(&mut view, moves);
            for (old, new) in before.iter().zip(owners(&view)) {
                prop_assert!(*old == new || new == Some(NodeId::new("newcomer.0").unwrap()), "{old:?} -> {new:?}");
            }
        }

        #[test]
        fn an_end_moves_only_what_it_had(shards in 1..300u32, weights in weights(), lost in 0..8usize, drain: bool) {
            let mut view = view(shards, &weights);
            settle(&mut view, 256);
            let at = lost % view.nodes.len();
            let node = view.nodes[at].node.clone();
            let before = owners(&view);
            if drain { view.nodes[at].draining = true } else { view.nodes[at].lease_left = 0 }
            settle(&mut view, 7);
            for (old, new) in before.iter().zip(owners(&view)) {
                prop_assert!(*old == new || old.as_ref() == Some(&node), "{old:?} -> {new:?}");
                prop_assert!(view.nodes.len() == 1 || new.as_ref() != Some(&node));
            }
        }

        #[test]
        fn from_any_owners_it_comes_to_rest_with_everything_owned(
            shards in 1..80u32,
            weights in weights(),
            states in prop::collection::vec((any::<bool>(), any::<bool>(), any::<bool>()), 8),
            owned in prop::collection::vec(0..10usize, 80),
            moves in 1..20usize,
        ) {
            let mut view = view(shards, &weights);
            for (row, (draining, lapsed, gone)) in view.nodes.iter_mut().zip(states) {
                (row.draining, row.alive) = (draining, !gone);
                row.lease_left = i64::from(!lapsed);
            }
            for (row, owner) in view.shards.iter_mut().zip(owned) {
                row.node = view.nodes.get(owner).map(|row| row.node.clone());
            }
            settle(&mut view, moves);
            if view.nodes.iter().any(may_own) {
                for owner in owners(&view) {
                    let owner = owner.unwrap();
                    prop_assert!(view.nodes.iter().any(|row| row.node == owner && may_own(row)));
                }
            }
        }
    }
}
