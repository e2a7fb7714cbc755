//! A node keeps its part of the shards: joins, takes, hands off, loses, and stops in time. The real shell over the store in
//! memory, whose clock stands still unless a test moves it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use sophont::{
    cluster::{
        Membership,
        lease::Terms,
        membership::{Holder, Parts, Scales},
    },
    runtime::clock::Clock,
    store::{
        Fence,
        memory::MemoryStore,
        ownership::{Claim, Error, Joining, Ownership, Renewal, View},
    },
    types::{Load, Millis, NodeId},
};
use tokio::sync::watch;

use crate::{
    ownership_contract::{LEASE, joining},
    support::wait_until,
};

const SHARDS: u32 = 12;
const PATIENCE: Duration = Duration::from_secs(60);

/// A node without work.
struct Idle;

impl Scales for Idle {
    fn load(&self) -> Load {
        Load::default()
    }
    fn weight(&self) -> u32 {
        100
    }
    fn see(&self, _: &View) {}
}

/// Where every shard is open, over all nodes of a test.
#[derive(Default)]
struct House {
    open: Mutex<BTreeMap<u32, Vec<(NodeId, u64)>>>,
    /// A planned move found the shard still open elsewhere.
    shared: Mutex<Vec<u32>>,
}

struct Hands {
    node: NodeId,
    house: Arc<House>,
}

#[async_trait]
impl Holder for Hands {
    async fn open(&self, fences: Vec<Fence>) {
        let mut open = self.house.open.lock().unwrap();
        for fence in fences {
            let holders = open.entry(fence.shard).or_default();
            if !holders.is_empty() {
                self.house.shared.lock().unwrap().push(fence.shard);
            }
            holders.push((self.node.clone(), fence.epoch));
        }
    }

    async fn close(&self, shard: u32) {
        tokio::task::yield_now().await;
        self.drop_now(&[shard]);
    }

    fn drop_now(&self, shards: &[u32]) {
        let mut open = self.house.open.lock().unwrap();
        for shard in shards {
            open.entry(*shard).or_default().retain(|(node, _)| *node != self.node);
        }
    }

    fn seen(&self, _: &[Fence]) {}
}

/// A store that can stop answering.
struct Line {
    store: MemoryStore,
    cut: watch::Sender<bool>,
}

impl Line {
    async fn through(&self) -> &MemoryStore {
        let _ = self.cut.subscribe().wait_for(|cut| !cut).await;
        &self.store
    }
}

#[async_trait]
impl Ownership for Line {
    async fn join(&self, joining: &Joining) -> Result<View, Error> {
        self.through().await.join(joining).await
    }
    async fn renew(&self, node: &NodeId, renewal: Renewal) -> Result<View, Error> {
        self.through().await.renew(node, renewal).await
    }
    async fn view(&self) -> Result<View, Error> {
        self.through().await.view().await
    }
    async fn gone(&self) -> Result<Vec<NodeId>, Error> {
        self.through().await.gone().await
    }
    async fn take(&self, node: &NodeId, claims: &[Claim]) -> Result<Vec<Fence>, Error> {
        self.through().await.take(node, claims).await
    }
    async fn release(&self, node: &NodeId, fences: &[Fence]) -> Result<(), Error> {
        self.through().await.release(node, fences).await
    }
    async fn drain(&self, node: &NodeId) -> Result<bool, Error> {
        self.through().await.drain(node).await
    }
    async fn leave(&self, node: &NodeId) -> Result<(), Error> {
        self.through().await.leave(node).await
    }
}

struct Cluster {
    clock: Clock,
    store: MemoryStore,
    house: Arc<House>,
}

struct Member {
    membership: Membership,
    line: Arc<Line>,
    house: Arc<House>,
}

impl Cluster {
    fn new() -> Self {
        let clock = Clock::manual(Millis(1_000_000));
        let store = MemoryStore::shared(true, 100, 1, clock.clone());
        Self { clock, store, house: Arc::default() }
    }

    async fn member(&self, name: &str) -> Member {
        let joining = Joining { shards: SHARDS, ..joining(name) };
        let line = Arc::new(Line { store: self.store.clone(), cut: watch::Sender::new(false) });
        let parts = Parts {
            ownership: line.clone(),
            holder: Arc::new(Hands { node: joining.node.clone(), house: self.house.clone() }),
            joining,
            terms: Terms { lease: LEASE, every: LEASE / 3, moves: 3, shared: true },
            look: Duration::from_millis(50),
            restless: Duration::from_millis(10),
            scales: Arc::new(Idle),
            changed: Arc::new(|| {}),
            handle: tokio::runtime::Handle::current(),
        };
        let membership = Membership::join(parts).await.unwrap();
        Member { membership, line, house: self.house.clone() }
    }

    /// Two nodes, each with half.
    async fn two(&self) -> (Member, Member) {
        let (a, b) = (self.member("a").await, self.member("b").await);
        let half = SHARDS as usize / 2;
        wait_until("each has half", PATIENCE, async || a.open().len() == half && b.open().len() == half).await;
        (a, b)
    }
}

impl Member {
    /// Shards that the holder has open, with their epochs.
    fn open(&self) -> BTreeSet<(u32, u64)> {
        let open = self.house.open.lock().unwrap();
        let mine = |(node, _): &&(NodeId, u64)| node == self.membership.node();
        let held = |(shard, holders): (&u32, &Vec<(NodeId, u64)>)| {
            holders.iter().filter(mine).map(|(_, epoch)| (*shard, *epoch)).collect::<Vec<_>>()
        };
        open.iter().flat_map(held).collect()
    }

    fn open_in_table(&self) -> BTreeSet<(u32, u64)> {
        let table = self.membership.table();
        let here = (0..).zip(&table.routes).filter(|(_, route)| route.here);
        here.map(|(shard, route)| (shard, route.epoch)).collect()
    }
}

#[tokio::test]
async fn a_second_node_gets_half_and_nothing_is_open_twice() {
    let cluster = Cluster::new();
    let (a, b) = cluster.two().await;
    assert_eq!(*cluster.house.shared.lock().unwrap(), [0; 0], "handed over while still open");
    for (member, other) in [(&a, &b), (&b, &a)] {
        wait_until("the tables agree", PATIENCE, async || {
            let table = member.membership.table();
            let named = |node: &NodeId| {
                let of = (0..).zip(&table.routes).filter(|(_, route)| route.node.as_ref() == Some(node));
                of.map(|(shard, route)| (shard, route.epoch)).collect::<BTreeSet<(u32, u64)>>()
            };
            member.open_in_table() == member.open()
                && named(member.membership.node()) == member.open()
                && named(other.membership.node()) == other.open()
        })
        .await;
        assert!(member.membership.serves());
        assert_eq!(member.membership.table().nodes.len(), 2);
    }
    let standing = *a.membership.standing().borrow();
    assert!(standing.member && !standing.alone && !standing.draining && !standing.empty, "{standing:?}");
    assert_eq!(standing.open, SHARDS as usize / 2);
}

#[tokio::test]
async fn what_a_process_that_is_gone_had_is_taken_and_it_stops_when_it_hears_nothing() {
    let cluster = Cluster::new();
    let (a, b) = cluster.two().await;
    a.line.cut.send_replace(true);
    cluster.store.faults().set_alive(a.membership.node(), false);
    wait_until("b has all", PATIENCE, async || b.open().len() == SHARDS as usize).await;
    wait_until("a stopped", PATIENCE, async || a.open().is_empty() && a.open_in_table().is_empty()).await;
    wait_until("a does not serve", PATIENCE, async || !a.membership.serves()).await;
    assert!(b.membership.serves());
    // Its session stands again, and it gets its share back.
    cluster.store.faults().set_alive(a.membership.node(), true);
    a.line.cut.send_replace(false);
    wait_until("a has its share again", PATIENCE, async || a.open().len() == SHARDS as usize / 2).await;
    assert!(a.open().iter().all(|(_, epoch)| *epoch >= 2), "{:?}", a.open());
}

#[tokio::test]
async fn a_node_that_is_cut_off_for_a_while_takes_its_own_again_at_higher_epochs() {
    let cluster = Cluster::new();
    let a = cluster.member("a").await;
    wait_until("a has all", PATIENCE, async || a.open().len() == SHARDS as usize).await;
    assert!(a.open().iter().all(|(_, epoch)| *epoch == 1));
    a.line.cut.send_replace(true);
    wait_until("a stopped", PATIENCE, async || a.open().is_empty()).await;
    a.line.cut.send_replace(false);
    wait_until("a has all", PATIENCE, async || a.open().len() == SHARDS as usize).await;
    assert!(a.open().iter().all(|(_, epoch)| *epoch == 2), "{:?}", a.open());
    assert_eq!(*cluster.house.shared.lock().unwrap(), [0; 0]);
}

#[tokio::test]
async fn a_node_whose_lease_is_over_joins_again() {
    let cluster = Cluster::new();
    let a = cluster.member("a").await;
    wait_until("a has all", PATIENCE, async || a.open().len() == SHARDS as usize).await;
    cluster.clock.advance(LEASE.as_millis() as i64 + 1);
    wait_until("a has all again", PATIENCE, async || {
        let open = a.open();
        open.len() == SHARDS as usize && open.iter().all(|(_, epoch)| *epoch == 2)
    })
    .await;
    assert_eq!(cluster.store.view().await.unwrap().nodes.len(), 1);
}

#[tokio::test]
async fn a_drain_hands_everything_off_and_who_leaves_is_gone() {
    let cluster = Cluster::new();
    let (a, b) = cluster.two().await;
    assert!(a.membership.drain(PATIENCE).await);
    wait_until("b has all", PATIENCE, async || b.open().len() == SHARDS as usize).await;
    assert_eq!(*cluster.house.shared.lock().unwrap(), [0; 0], "handed over while still open");
    a.membership.leave().await;
    let view = cluster.store.view().await.unwrap();
    assert_eq!(view.nodes.iter().map(|row| &row.node).collect::<Vec<_>>(), [b.membership.node()]);
    // The last one has nobody to give to.
    assert!(!b.membership.drain(PATIENCE).await);
    assert!(b.membership.standing().borrow().alone);
    b.membership.leave().await;
    assert!(b.open().is_empty());
    let view = cluster.store.view().await.unwrap();
    assert!(view.nodes.is_empty() && view.shards.iter().all(|row| row.node.is_none()));
}

#[tokio::test]
async fn an_operator_can_drain_a_node() {
    let cluster = Cluster::new();
    let (a, b) = cluster.two().await;
    assert!(cluster.store.drain(a.membership.node()).await.unwrap());
    wait_until("b has all", PATIENCE, async || b.open().len() == SHARDS as usize).await;
    let standing = *a.membership.standing().borrow();
    assert!(standing.draining && standing.empty, "{standing:?}");
}

#[tokio::test]
async fn a_node_that_does_not_fit_is_refused() {
    let cluster = Cluster::new();
    let _a = cluster.member("a").await;
    let joining = Joining { shards: SHARDS + 1, ..joining("b") };
    let parts = Parts {
        ownership: Arc::new(cluster.store.clone()),
        holder: Arc::new(Hands { node: joining.node.clone(), house: cluster.house.clone() }),
        joining,
        terms: Terms { lease: LEASE, every: LEASE / 3, moves: 3, shared: true },
        look: Duration::from_millis(50),
        restless: Duration::from_millis(10),
        scales: Arc::new(Idle),
        changed: Arc::new(|| {}),
        handle: tokio::runtime::Handle::current(),
    };
    assert!(matches!(Membership::join(parts).await, Err(Error::OtherShards { stored: SHARDS, .. })));
}
