//! Who is next when many wait for the same model: fair between tenants, then between the instances of a tenant.
//!
//! Method: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), once among tenants and once among the instances of
//! each. A flow is charged what its calls cost, in tokens; the flow that was charged least comes first. Against deficit round
//! robin (Shreedhar and Varghese 1995) it needs no quantum, and one call costs a look-up in a sorted set whatever the calls
//! weigh. When the queue is full the flow that takes most of it gives a place up (longest queue drop; Suter and others, 1998),
//! so that one tenant cannot keep the others out.
//!
//! Pure. Invariants: what was put in comes out once, by [`Fair::next`], [`Fair::remove`] or [`Fair::make_room`]; one instance's
//! calls come out in the order they were put in; while two tenants wait, what they were served differs by two calls at most.
//! Tests: at the foot.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    hash::Hash,
};

use crate::types::{InstanceId, InstanceKey, TenantId};

/// Flows that wait for nothing are forgotten when there are more of them than this, and more than those that wait.
const IDLE_FLOWS: usize = 64;

/// One who waits.
#[derive(Debug)]
struct Item<T> {
    ticket: u64,
    cost: u64,
    value: T,
}

/// The flows of one level, by what they were charged.
#[derive(Debug)]
struct Level<K, Q> {
    /// How far the flows that wait have come: what a flow that comes anew is charged at least.
    now: u64,
    flows: HashMap<K, Flow<Q>, ahash::RandomState>,
    /// Those that wait: least charged first, then in the order of coming.
    order: BTreeSet<(u64, u64, K)>,
    came: u64,
}

#[derive(Debug)]
struct Flow<Q> {
    /// What it was charged.
    start: u64,
    /// Its place among equals, while it waits.
    place: Option<u64>,
    /// How many wait.
    waiting: usize,
    queue: Q,
}

impl<K: Clone + Eq + Hash + Ord, Q: Default> Default for Level<K, Q> {
    fn default() -> Self {
        Self { now: 0, flows: HashMap::default(), order: BTreeSet::new(), came: 0 }
    }
}

impl<K: Clone + Eq + Hash + Ord, Q: Default> Level<K, Q> {
    /// A flow, known from here on. One that waits for nothing does not gain by having been away.
    fn flow(&mut self, key: &K) -> &mut Flow<Q> {
        if self.flows.len() > IDLE_FLOWS.max(2 * self.order.len()) {
            let now = self.now;
            self.flows.retain(|_, flow| flow.waiting > 0 || flow.start > now);
        }
        let now = self.now;
        let fresh = || Flow { start: 0, place: None, waiting: 0, queue: Q::default() };
        let flow = self.flows.entry(key.clone()).or_insert_with(fresh);
        if flow.waiting == 0 {
            flow.start = flow.start.max(now);
        }
        flow
    }

    /// One more waits.
    fn joins(&mut self, key: &K) -> &mut Q {
        self.came += 1;
        let came = self.came;
        let flow = self.flow(key);
        flow.waiting += 1;
        let (start, fresh) = (flow.start, flow.place.is_none());
        if fresh {
            flow.place = Some(came);
            self.order.insert((start, came, key.clone()));
        }
        &mut self.flow_of(key).queue
    }

    /// Of those that wait the one charged least, which is served now: it is charged `cost` by [`Level::charge`].
    fn first(&mut self) -> Option<K> {
        let (start, _, key) = self.order.first()?.clone();
        self.now = self.now.max(start);
        Some(key)
    }

    /// One less waits.
    fn leaves(&mut self, key: &K) {
        let Some(flow) = self.flows.get_mut(key) else { return };
        flow.waiting = flow.waiting.saturating_sub(1);
        if flow.waiting == 0
            && let Some(place) = flow.place.take()
        {
            self.order.remove(&(flow.start, place, key.clone()));
        }
    }

    /// A call that need not wait, because nobody does.
    fn passes(&mut self, key: &K, cost: u64) -> &mut Q {
        let start = self.flow(key).start;
        self.now = self.now.max(start);
        self.charge(key, cost);
        &mut self.flow_of(key).queue
    }

    /// Charges a flow, whether it waits or not.
    fn charge(&mut self, key: &K, cost: u64) {
        let flow = self.flow(key);
        let before = flow.start;
        flow.start = before.saturating_add(cost);
        let (start, place) = (flow.start, flow.place);
        if let Some(place) = place {
            self.order.remove(&(before, place, key.clone()));
            self.order.insert((start, place, key.clone()));
        }
    }

    fn flow_of(&mut self, key: &K) -> &mut Flow<Q> {
        let fresh = || Flow { start: 0, place: None, waiting: 0, queue: Q::default() };
        self.flows.entry(key.clone()).or_insert_with(fresh)
    }

    /// Of those that wait the one with the most who wait.
    fn longest(&self) -> Option<(&K, usize)> {
        let waiting = self.order.iter().filter_map(|(_, _, key)| Some((key, self.flows.get(key)?.waiting)));
        waiting.max_by_key(|(_, waiting)| *waiting)
    }

    fn waiting(&self, key: &K) -> usize {
        self.flows.get(key).map_or(0, |flow| flow.waiting)
    }
}

type Instances<T> = Level<InstanceId, VecDeque<Item<T>>>;

/// A queue that is fair. `T` is what waits.
#[derive(Debug)]
pub(super) struct Fair<T> {
    tenants: Level<TenantId, Instances<T>>,
    waiting: usize,
    tickets: u64,
}

/// What a removed or evicted item was put in with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ticket(u64);

impl<T> Default for Fair<T> {
    fn default() -> Self {
        Self { tenants: Level::default(), waiting: 0, tickets: 0 }
    }
}

impl<T> Fair<T> {
    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.waiting
    }

    /// Charges a call that need not wait.
    pub(super) fn charge(&mut self, key: &InstanceKey, cost: u64) {
        self.tenants.passes(&key.tenant, cost).passes(&key.instance, cost);
    }

    /// Puts in one who waits for a call of so many tokens.
    pub(super) fn put(&mut self, key: &InstanceKey, cost: u64, value: T) -> Ticket {
        self.tickets += 1;
        let ticket = self.tickets;
        let instances = self.tenants.joins(&key.tenant);
        instances.joins(&key.instance).push_back(Item { ticket, cost: cost.max(1), value });
        self.waiting += 1;
        Ticket(ticket)
    }

    /// Takes out who is next, and charges the call.
    pub(super) fn next(&mut self) -> Option<T> {
        let tenant = self.tenants.first()?;
        let instances = &mut self.tenants.flow_of(&tenant).queue;
        let instance = instances.first()?;
        let item = instances.flow_of(&instance).queue.pop_front()?;
        instances.charge(&instance, item.cost);
        instances.leaves(&instance);
        self.tenants.charge(&tenant, item.cost);
        self.tenants.leaves(&tenant);
        self.waiting -= 1;
        Some(item.value)
    }

    /// Takes out one who waits no longer. None when it was taken out before.
    pub(super) fn remove(&mut self, key: &InstanceKey, ticket: Ticket) -> Option<T> {
        let instances = &mut self.tenants.flows.get_mut(&key.tenant)?.queue;
        let queue = &mut instances.flows.get_mut(&key.instance)?.queue;
        let at = queue.iter().position(|item| item.ticket == ticket.0)?;
        let item = queue.remove(at)?;
        self.gone(&key.tenant, &key.instance);
        Some(item.value)
    }

    /// Makes room for one more of this instance: takes out the newest of whoever waits most. None when that is the one who asks.
    pub(super) fn make_room(&mut self, key: &InstanceKey) -> Option<T> {
        let (tenant, most) = self.tenants.longest().map(|(tenant, most)| (tenant.clone(), most))?;
        let own = self.tenants.waiting(&key.tenant);
        let instances = &mut self.tenants.flows.get_mut(&tenant)?.queue;
        let (instance, most_of_one) = instances.longest().map(|(instance, most)| (instance.clone(), most))?;
        let asks_most =
            if tenant == key.tenant { instances.waiting(&key.instance) >= most_of_one } else { own >= most };
        if asks_most {
            return None;
        }
        let item = instances.flows.get_mut(&instance)?.queue.pop_back()?;
        self.gone(&tenant, &instance);
        Some(item.value)
    }

    fn gone(&mut self, tenant: &TenantId, instance: &InstanceId) {
        if let Some(flow) = self.tenants.flows.get_mut(tenant) {
            flow.queue.leaves(instance);
        }
        self.tenants.leaves(tenant);
        self.waiting -= 1;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn key(tenant: usize, instance: usize) -> InstanceKey {
        let tenant = TenantId::new(format!("t{tenant}")).unwrap();
        InstanceKey::new(tenant, InstanceId::new(format!("i{instance}")).unwrap())
    }

    /// Puts in `count` calls of `cost` for each tenant named, and says how much each was served by `calls` calls.
    fn served(fair: &mut Fair<(usize, u64)>, calls: usize) -> BTreeMap<usize, u64> {
        let mut out = BTreeMap::new();
        for _ in 0..calls {
            let (tenant, cost) = fair.next().unwrap();
            *out.entry(tenant).or_default() += cost;
        }
        out
    }

    #[test]
    fn tenants_are_served_by_what_they_cost_not_by_how_many_they_are() {
        let mut fair = Fair::default();
        for at in 0..1000 {
            fair.put(&key(0, at), 10, (0, 10)); // a thousand instances
        }
        for _ in 0..100 {
            fair.put(&key(1, 0), 10, (1, 10)); // one
            fair.put(&key(2, 0), 100, (2, 100)); // with calls ten times as large
        }
        let served = served(&mut fair, 105);
        assert_eq!(served.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
        assert!(served.values().all(|cost| cost.abs_diff(500) <= 100), "{served:?}");
    }

    #[test]
    fn whoever_asks_one_at_a_time_gets_no_more_and_no_less() {
        let mut fair = Fair::default();
        for _ in 0..100 {
            fair.put(&key(0, 0), 10, (0, 10));
        }
        let mut turns = [0, 0];
        fair.put(&key(1, 0), 10, (1, 10));
        for _ in 0..50 {
            let (tenant, _) = fair.next().unwrap();
            turns[tenant] += 1;
            if tenant == 1 {
                fair.put(&key(1, 0), 10, (1, 10));
            }
        }
        assert_eq!(turns, [25, 25]);
    }

    #[test]
    fn whoever_was_away_has_saved_nothing_up_and_a_call_that_did_not_wait_counts() {
        let mut fair = Fair::default();
        fair.charge(&key(1, 0), 30);
        for _ in 0..6 {
            fair.put(&key(0, 0), 10, (0, 10));
            fair.put(&key(1, 0), 10, (1, 10));
        }
        let order: Vec<usize> = (0..6).map(|_| fair.next().unwrap().0).collect();
        assert_eq!(order, [0, 0, 0, 0, 1, 0], "three calls were charged before");
        while fair.next().is_some() {}
        // Tenant 0 worked alone for long; tenant 1 comes back and does not get all of that at once.
        for _ in 0..100 {
            fair.put(&key(0, 0), 10, (0, 10));
        }
        served(&mut fair, 50);
        for _ in 0..100 {
            fair.put(&key(1, 0), 10, (1, 10));
        }
        let next = served(&mut fair, 20);
        assert!(next[&0].abs_diff(next[&1]) <= 20, "{next:?}");
    }

    #[test]
    fn a_full_queue_takes_from_whoever_has_most_of_it() {
        let mut fair = Fair::default();
        for at in 0..3 {
            fair.put(&key(0, 0), 1, format!("0/0/{at}"));
        }
        fair.put(&key(0, 1), 1, "0/1/0".into());
        assert_eq!(fair.make_room(&key(1, 0)).as_deref(), Some("0/0/2"), "the newest of the longest");
        fair.put(&key(1, 0), 1, "1/0/0".into());
        assert_eq!(fair.make_room(&key(0, 0)), None, "it has most itself");
        assert_eq!(fair.make_room(&key(0, 1)).as_deref(), Some("0/0/1"), "fair within a tenant, too");
        assert_eq!(fair.len(), 3);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Put { tenant: usize, instance: usize, cost: u64 },
        Charge { tenant: usize, instance: usize, cost: u64 },
        Next,
        Remove(usize),
        Room { tenant: usize, instance: usize },
    }

    fn step() -> impl Strategy<Value = Step> {
        let who = (0..4usize, 0..3usize, 1..50u64);
        prop_oneof![
            4 => who.clone().prop_map(|(tenant, instance, cost)| Step::Put { tenant, instance, cost }),
            1 => who.prop_map(|(tenant, instance, cost)| Step::Charge { tenant, instance, cost }),
            3 => Just(Step::Next),
            1 => (0..64usize).prop_map(Step::Remove),
            1 => (0..4usize, 0..3usize).prop_map(|(tenant, instance)| Step::Room { tenant, instance }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_put_in_comes_out_once_and_in_order(steps in prop::collection::vec(step(), 0..400)) {
            let mut fair: Fair<u64> = Fair::default();
            // Model: what waits, in the order of coming, by ticket.
            let mut waiting: Vec<(Ticket, InstanceKey, u64)> = Vec::new();
            let mut names = 0;
            for step in steps {
                match step {
                    Step::Put { tenant, instance, cost } => {
                        names += 1;
                        let key = key(tenant, instance);
                        let ticket = fair.put(&key, cost, names);
                        waiting.push((ticket, key, names));
                    }
                    Step::Charge { tenant, instance, cost } => fair.charge(&key(tenant, instance), cost),
                    Step::Next => match fair.next() {
                        None => prop_assert!(waiting.is_empty()),
                        Some(name) => {
                            let at = waiting.iter().position(|(_, _, held)| *held == name);
                            prop_assert!(at.is_some(), "{name} came out twice");
                            let (_, key, _) = waiting.remove(at.unwrap());
                            let earlier = waiting.iter().any(|(_, other, held)| *other == key && *held < name);
                            prop_assert!(!earlier, "one instance's calls keep their order");
                        }
                    },
                    Step::Remove(at) if at < waiting.len() => {
                        let (ticket, key, name) = waiting.remove(at);
                        prop_assert_eq!(fair.remove(&key, ticket), Some(name));
                        prop_assert_eq!(fair.remove(&key, ticket), None);
                    }
                    Step::Remove(_) => {}
                    Step::Room { tenant, instance } => {
                        if let Some(name) = fair.make_room(&key(tenant, instance)) {
                            let before = waiting.len();
                            waiting.retain(|(_, _, held)| *held != name);
                            prop_assert_eq!(waiting.len() + 1, before);
                        }
                    }
                }
                prop_assert_eq!(fair.len(), waiting.len());
            }
        }

        #[test]
        fn tenants_that_wait_are_served_alike(
            costs in prop::collection::vec((0..3usize, 0..3usize, 1..100u64), 3..300),
            calls in 1..200usize,
        ) {
            let mut fair = Fair::default();
            let mut left = [0u64; 3];
            for (tenant, instance, cost) in &costs {
                fair.put(&key(*tenant, *instance), *cost, (*tenant, *cost));
                left[*tenant] += 1;
            }
            let mut served = [0u64; 3];
            for _ in 0..calls {
                let Some((tenant, cost)) = fair.next() else { break };
                served[tenant] += cost;
                left[tenant] -= 1;
                for (one, other) in [(0, 1), (0, 2), (1, 2)] {
                    if left[one] > 0 && left[other] > 0 {
                        prop_assert!(served[one].abs_diff(served[other]) <= 200, "{served:?}");
                    }
                }
            }
        }
    }
}
